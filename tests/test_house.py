"""The rules of the code base that can be checked: direction of imports, sizes, and no unused options."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from hpcgpt.config.options import Config
from tests.programs import ROOT, command


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


HPCGPT = sorted((ROOT / "hpcgpt").rglob("*.py"))
MODULES = {module_name(path): path for path in [*HPCGPT, *sorted((ROOT / "data_prep").rglob("*.py"))]}

# Each may import what is before it, and nothing else of ours. A room is a folder of hpcgpt, or a module beside it.
LEVELS = (
    ("exit_codes",), ("errors",), ("output",), ("cli", "config"), ("storage",),
    ("distributed", "tokenizer", "data", "model"), ("optim", "run", "tasks"), ("tracking", "checkpoint"), ("slurm",),
    ("sites", "plan"), ("training",), ("export",), ("import_weights",),
    ("estimate", "submit_checks", "submit_options", "preview"), ("doctor",),
    ("train", "submit", "slurm_script", "site", "requeue", "status", "sample", "eval", "lm_eval"), ("drill", "report"),
    ("__main__",),
)  # fmt: skip
# A login node loads none of these, except by late imports. Of the other rooms every module counts.
WITH_TORCH = ("model", "optim.optimizer", "optim.muon", "optim.uncompiled", "training", "data.prefetch", "data.loader",
"distributed.collectives", "distributed.eager_ddp", "distributed.tree",
              "distributed.sharded_tensor", "checkpoint.save", "checkpoint.load", "checkpoint.load_model",
              "tasks.likelihood", "tasks.evaluation", "lm_eval.adapter",
              "checkpoint.init_from", "checkpoint.safetensors_writer", "checkpoint.stored", "checkpoint.weights",
              *(f"export.{name}" for name in ("agreement", "exporting", "huggingface", "huggingface_model", "llmc",
                "model_card", "nanogpt", "on_demand", "reference_gpt2", "source")),
              *(f"import_weights.{name}" for name in ("against_transformers", "assemble", "checkpoints", "huggingface",
                "importing", "stored", "weights_folder")), "estimate.fake_step",
              "estimate.storage_log", "doctor.nodes.worker")  # fmt: skip
WITHOUT_TORCH = [name.removeprefix("hpcgpt.") for name in MODULES if name.startswith("hpcgpt.")
                 and not any(f"{name}.".startswith(f"hpcgpt.{heavy}.") for heavy in WITH_TORCH)]  # fmt: skip
MOST_MODULES = 16  # of a folder
MOST_LINES = {"module": 400, "class": 200, "function": 60}
MOST_POSITIONAL = 7  # parameters


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Return all nodes of a file; walked once, as several tests look at every file."""
    return list(ast.walk(tree(path)))


def imported(nodes: list[ast.stmt]) -> set[str]:
    """Return the full names of the modules that these statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full here"
            assert node.module
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def at_import_time(path: Path) -> set[str]:
    """Return what importing the file imports: everything outside of functions and of TYPE_CHECKING."""
    nodes: list[ast.stmt] = []
    todo: list[ast.stmt] = list(tree(path).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
            continue
        nodes.append(node)
        todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return imported(nodes)


def anywhere(path: Path) -> set[str]:
    return imported([node for node in nodes(path) if isinstance(node, ast.stmt)])


def reached(module: str) -> set[str]:
    """Return everything that importing a module imports through our own modules, at any depth."""
    found: set[str] = set()
    todo = [module]
    while todo:
        for name in at_import_time(MODULES[todo.pop()]) - found:
            found.add(name)
            if name in MODULES:
                todo.append(name)
    return found


# --- imports ---------------------------------------------------------------------------------------


def test_modules_of_a_login_node_never_import_torch() -> None:
    heavy = {name: {found.partition(".")[0] for found in reached(f"hpcgpt.{name}")} & {"torch", "transformers"}
             for name in WITHOUT_TORCH}  # fmt: skip
    assert len(heavy) > 150
    assert {name: found for name, found in heavy.items() if found} == {}


def test_reached_finds_torch_where_it_is_imported() -> None:
    assert "torch" in reached("hpcgpt.training.loop")
    assert "torch" not in at_import_time(MODULES["hpcgpt.distributed.rendezvous"])
    assert "torch" in anywhere(MODULES["hpcgpt.distributed.rendezvous"])


@pytest.mark.processes
def test_really_importing_them_loads_no_torch() -> None:
    names = ", ".join(f"hpcgpt.{name}" for name in WITHOUT_TORCH)
    code = f"import sys, {names}; print(sorted({{'torch', 'wandb', 'submitit'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "[]\n", done.stderr


def room_of(module: str) -> str:
    """Return `training` for hpcgpt.training.loop, `plan` for hpcgpt.plan."""
    return module.split(".")[1]


def upward(path: Path) -> list[str]:
    """Return the imports of a file that its room may not have."""
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    own = room_of(module_name(path))
    found = {name for name in anywhere(path) if name in MODULES and name.count(".") and name.startswith("hpcgpt.")}
    return sorted(name for name in found if room_of(name) != own and level[room_of(name)] >= level[own])


def test_imports_point_down() -> None:
    found = {name: upward(path) for name, path in MODULES.items() if name.startswith("hpcgpt.")}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_every_room_has_a_level_and_every_module_is_found() -> None:
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "hpcgpt").iterdir() if path.suffix == ".py" or
             (path.is_dir() and list(path.glob("*.py")))} - {"__init__"}  # fmt: skip
    assert rooms == {room for rooms in LEVELS for room in rooms}
    tracked = subprocess.run(["git", "ls-files", "hpcgpt", "data_prep"], cwd=ROOT, capture_output=True, text=True,
                             check=False).stdout.split()  # fmt: skip
    assert {ROOT / name for name in tracked if name.endswith(".py")} <= set(MODULES.values())


def test_no_folder_has_too_many_modules() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert len(folders) > 15
    assert {str(folder): len(list(folder.glob("*.py"))) for folder in folders
            if len(list(folder.glob("*.py"))) > MOST_MODULES} == {}  # fmt: skip


def too_large(path: Path) -> list[str]:
    """Return the module, classes and functions longer than MOST_LINES, or with more parameters than MOST_POSITIONAL."""
    sized = [("module", path.name, len(path.read_text(encoding="utf-8").splitlines()))]
    found = []
    for node in nodes(path):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            sized.append((kind, node.name, (node.end_lineno or 0) - node.lineno + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = [item.arg for item in (*node.args.posonlyargs, *node.args.args) if item.arg not in ("self", "cls")]
            if len(named) > MOST_POSITIONAL:
                found.append(f"{node.name} takes {len(named)} positional parameters")
    return found + [f"{kind} {name} has {lines} lines" for kind, name, lines in sized if lines > MOST_LINES[kind]]


def test_no_module_class_or_function_is_too_long() -> None:
    found = {name: too_large(path) for name, path in MODULES.items()}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_hpcgpt_never_imports_data_prep() -> None:
    for path in HPCGPT:
        assert not {found for found in anywhere(path) if found.startswith("data_prep")}, path


def test_nothing_imports_the_command_that_trains() -> None:
    assert [name for name, path in MODULES.items() if "hpcgpt.train" in anywhere(path)] == []


def test_only_the_tracking_processes_import_wandb_and_tensorboard() -> None:
    found = [path.stem for path in HPCGPT if {n.partition(".")[0] for n in anywhere(path)} & {"wandb", "tensorboard"}]
    assert found == ["arrived", "dashboard", "shown", "tensorboard_process", "wandb_sender"]


def test_no_import_goes_in_a_circle() -> None:
    for name in MODULES:
        assert name not in reached(name), f"{name} imports itself"


@pytest.mark.processes
def test_importing_a_module_has_no_effect(tmp_path: Path) -> None:
    """Nothing is printed or written; there is no new signal handler or thread."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    code = f"""
import importlib, signal, threading
before = [signal.getsignal(n) for n in signal.valid_signals()]
for name in {names}:
    importlib.import_module(name)
    assert before == [signal.getsignal(n) for n in signal.valid_signals()], name
    assert threading.active_count() == 1, name
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
                          check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# --- one place for each thing ----------------------------------------------------------------------


def strings(path: Path) -> set[str]:
    """Return the string constants of a file except docstrings and other bare statements."""
    bare = {id(node.value) for node in nodes(path) if isinstance(node, ast.Expr)}
    return {node.value for node in nodes(path)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare}  # fmt: skip


@pytest.mark.parametrize("variable", ["SLURM_PROCID", "SLURM_LOCALID", "LOCAL_RANK", "WORLD_SIZE", "RANK"])
def test_only_world_reads_the_variables_of_the_rank(variable: str) -> None:
    assert [path.stem for path in HPCGPT if variable in strings(path)] == ["world"]


def test_cuda_visible_devices_is_never_written_or_read() -> None:
    assert [name for name, path in MODULES.items() if "CUDA_VISIBLE_DEVICES" in strings(path)] == []


def test_nothing_loads_pickles() -> None:
    """Loading executes no code from a file."""
    for name, path in MODULES.items():
        assert not {found for found in anywhere(path) if found in ("pickle", "dill", "shelve")}, name
        calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
        named = {ast.unparse(node.func) for node in calls}
        # nanoGPT's files are pickles of tensors.
        saves = set() if name == "hpcgpt.export.nanogpt" else {"torch.save"}
        assert not named & ({"eval", "exec", "__import__"} | saves), name
        for node in calls:
            if ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), name


def warnings_printed(path: Path) -> list[int]:
    """Return the lines that print a text beginning with `warning: `."""
    calls = [node for node in nodes(path) if isinstance(node, ast.Call) and last_name(node.func) == "print"]
    texts = [(node.lineno, ast.unparse(argument)) for node in calls for argument in node.args[:1]]
    return [line for line, text in texts if text.lstrip("f").strip("'\"").startswith("warning: ")]


def test_warnings_are_printed_in_one_place() -> None:
    found = {module_name(path) for path in HPCGPT if warnings_printed(path)}
    assert found == {"hpcgpt.output.streams"}


def test_no_file_has_a_vague_name() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base", "core", "tools"}
    assert not {path.stem for path in MODULES.values()} & vague


def test_every_module_has_a_docstring() -> None:
    assert [name for name, path in MODULES.items() if not ast.get_docstring(tree(path))] == []


# --- no unused options ------------------------------------------------------------------------------


def options() -> list[tuple[str, str]]:
    """Return every option that has more than one value."""
    found = []
    for section in dataclasses.fields(Config):
        cls = type(getattr(Config(), section.name))
        for item in dataclasses.fields(cls):
            hint = get_type_hints(cls)[item.name]
            if get_origin(hint) is not Literal or len(get_args(hint)) > 1:
                found.append((section.name, item.name))
    return found


def last_name(node: ast.expr | None) -> str:
    """Return `b` for `a.b`, and `a` for `a`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def read_in(path: Path) -> set[tuple[str, str]]:
    """Return the options (section, key) that a file reads: `x.section.key`, or `name.key` for a name of a section.

    A name refers to a section if it is annotated with its class, or assigned from it.
    """
    classes = {type(getattr(Config(), item.name)).__name__: item.name for item in dataclasses.fields(Config)}
    sections = set(classes.values())
    refers_to = {section: {section} for section in sections}
    for node in nodes(path):
        if isinstance(node, ast.arg) and last_name(node.annotation) in classes:
            refers_to.setdefault(node.arg, set()).add(classes[last_name(node.annotation)])
    for _ in range(2):  # a name of a name
        for node in nodes(path):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    many = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    pairs = zip(target.elts, node.value.elts, strict=False) if many else [(target, node.value)]  # type: ignore[attr-defined]
                    for left, right in pairs:
                        if last_name(left) and last_name(right) in refers_to:
                            refers_to.setdefault(last_name(left), set()).update(refers_to[last_name(right)])
    return {
        (section, node.attr)
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        for section in refers_to.get(last_name(node.value), ())
    }


def test_every_option_is_read_outside_of_the_configuration() -> None:
    # Read through properties of Config and Model.
    through = {("run", "dir"): "run_folder", ("run", "name"): "run_folder", ("data", "stride"): "stride",
               ("profile", "steps"): "profiled_steps", ("model", "n_kv_head"): "kv_heads",
               ("model", "head_size"): "head_width", ("model", "mlp_width"): "hidden_width",
               ("model", "norm_eps"): "epsilon"}  # fmt: skip
    outside = [path for path in HPCGPT if path.parent.name != "config"]
    used = {node.attr for path in outside for node in nodes(path) if isinstance(node, ast.Attribute)}
    assert set(through.values()) <= used
    read = set().union(*map(read_in, outside), through)
    assert len(options()) > 100
    assert [f"{section}.{key}" for section, key in options() if (section, key) not in read] == []


# --- the tools -------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments", [["ruff", "check"], ["ruff", "format", "--check"], pytest.param(["mypy"], marks=pytest.mark.long)]
)
def test_linter_formatter_and_type_checker_pass(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.processes
def test_every_listed_command_has_help() -> None:
    from hpcgpt.__main__ import COMMANDS, RENAMED

    for name in COMMANDS:
        done = command(f"hpcgpt.{RENAMED.get(name, name).replace('-', '_')}", "--help")
        assert done.returncode == 0, done.stderr
        assert f"hpcgpt {name}" in done.stdout
    listed = command("hpcgpt", "--help").stdout
    assert all(about in listed for about in COMMANDS.values())


def test_an_option_with_a_default_says_it_in_its_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every command and its parts; those of `train` are tables of all keys, with defaults."""
    from hpcgpt.__main__ import COMMANDS, PACKAGES, RENAMED

    found: list[argparse.Action] = []
    add = argparse._ActionsContainer._add_action

    def recorded(self: argparse._ActionsContainer, action: argparse.Action) -> argparse.Action:
        found.append(action)
        return add(self, action)

    monkeypatch.setattr(argparse._ActionsContainer, "_add_action", recorded)
    for name in COMMANDS:
        package = RENAMED.get(name, name)
        module = f"hpcgpt.{package}.__main__" if package in PACKAGES else f"hpcgpt.{package.replace('-', '_')}"
        with suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
    silent = {
        "/".join(action.option_strings): action.default
        for action in found
        if action.nargs != 0 and action.option_strings and action.default not in (None, False, "", 0, [])
        if "default" not in str(action.help)
    }
    assert len(found) > 200
    assert silent == {"-h/--help": argparse.SUPPRESS} or silent == {}
    of_run = [action for action in found if action.dest in ("tokens", "temperature", "top_k", "top_p", "slide")]
    assert len(of_run) == 5
    assert all("(default: the run's" in str(action.help) for action in of_run)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("typed", "suggestion"),
    [("trian", "train"), ("tran", "train"), ("list", "status"), ("ls", "checkpoint ls"), ("generate", "sample"),
     ("make-shards", "`python -m data_prep.make_shards`")],
)  # fmt: skip
def test_an_unknown_command_is_refused_with_the_nearest_one(typed: str, suggestion: str) -> None:
    done = command("hpcgpt", typed)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no command '{typed}'; there are train, ")
    assert done.stderr.endswith(f" (did you mean {suggestion}?)\n")
