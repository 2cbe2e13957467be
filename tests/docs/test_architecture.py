"""docs/architecture.md and the other pages: every module, file, function and link that they name exists, and the tree
lists every module."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.programs import ROOT
from tests.test_house import LEVELS

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# The dated notes stay as they were written, and drill reports are written by the drill.
PAGES = [path for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
                           *sorted((ROOT / "slurm").rglob("*.md"))] if path.name != "lab-notes.md"]  # fmt: skip
TREES = ("hpcgpt", "data_prep", "slurm", "bundle")


def block(heading: str) -> str:
    """Return the first block of code below a heading of the page."""
    (found,) = re.findall(rf"^## {heading}\n.*?```\n(.*?)```", ARCHITECTURE, flags=re.DOTALL | re.MULTILINE)[:1]
    return str(found)


def listed() -> list[str]:
    """Return the paths of the tree, folders with a slash at the end."""
    paths: list[str] = []
    folders: list[str] = []
    for line in block("The tree").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        paths.append("".join([*folders, name]))
        folders.append(name)
    return paths


def test_the_tree_lists_every_module_and_no_other() -> None:
    there = {path.relative_to(ROOT).as_posix() for name in TREES for path in (ROOT / name).rglob("*.py")
             if path.name != "__init__.py"}  # fmt: skip
    assert len(there) > 100
    modules = [path for path in listed() if path.endswith(".py")]
    assert len(modules) == len(set(modules))
    assert {"not listed": there - set(modules), "not there": set(modules) - there} == {
        "not listed": set(),
        "not there": set(),
    }
    assert [path for path in listed() if not (ROOT / path).exists()] == []


def test_every_line_of_the_tree_has_a_description_and_fits_the_width() -> None:
    for line in block("The tree").splitlines():
        assert len(line) <= 120
        assert len(line.split()) > 2 or line in {f"{name}/" for name in TREES}, line


def test_the_import_order_is_the_checked_one() -> None:
    assert [tuple(line.split()) for line in block("Import order").splitlines()] == list(LEVELS)


@cache
def names_in(path: Path) -> set[str]:
    """Return the functions and classes of a file (`f`, `Class`, `Class.method`), or the functions of a shell script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"^([a-z_]+)\(\) ?\{", text, flags=re.MULTILINE))
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def missing(page: str) -> list[str]:
    """Return each `file:function` in a text that does not exist."""
    named = re.findall(r"`((?:hpcgpt|data_prep|slurm|tests)/[\w/.-]+):([\w.]+)`", page)
    return [f"{path}:{name}" for path, name in named
            if not (ROOT / path).is_file() or name not in names_in(ROOT / path)]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_function_that_is_named_exists(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


def test_the_walks_name_functions_and_a_wrong_name_is_found() -> None:
    assert len(re.findall(r"`hpcgpt/[\w/]+\.py:\w", ARCHITECTURE)) > 50
    wrong = "`hpcgpt/train.py:main` `hpcgpt/train.py:mains` `hpcgpt/trains.py:main` `slurm/pretrain.sbatch:decided`"
    assert missing(wrong) == ["hpcgpt/train.py:mains", "hpcgpt/trains.py:main", "slurm/pretrain.sbatch:decided"]


def line_of(path: Path, name: str) -> int:
    """Return the line of `f` or `Class.method` in a file."""
    owner, _, method = name.rpartition(".")
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    if owner:
        (nodes,) = [node.body for node in nodes if isinstance(node, ast.ClassDef) and node.name == owner]
    (line,) = [node.lineno for node in nodes if isinstance(node, ast.FunctionDef) and node.name == method]
    return line


def test_the_line_numbers_in_the_walks_are_right() -> None:
    found = re.findall(r"`([\w/]+\.py):([\w.]+)`(?:, | \()line (\d+)", ARCHITECTURE)
    assert len(found) >= 7
    assert {(path, name): int(line) for path, name, line in found} == {
        (path, name): line_of(ROOT / path, name) for path, name, _ in found
    }
    renames = re.findall(r"`([\w/]+\.py):[\w.]+` \(line \d+; the rename is its line (\d+)\)", ARCHITECTURE)
    assert len(renames) == 1
    for path, line in renames:
        assert ".rename(" in (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"(?<![\w/.~-])((?:hpcgpt|data_prep|slurm|bundle|tests|benchmarks|docs)/[\w/.-]*\w)",
                       page.read_text(encoding="utf-8"))  # fmt: skip
    ours = {name for name in named if "." in name.rpartition("/")[2]}
    assert [name for name in sorted(ours) if not (ROOT / name).exists() and name not in OF_USERS] == []


OF_USERS = {"slurm/sites/mycluster.sh", "hpcgpt/NAME.py"}  # in examples


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_module_that_is_named_exists(page: Path) -> None:
    """`python -m hpcgpt.train`, and `hpcgpt.training.loop` in a sentence."""
    named = re.findall(r"(?<![\w/.-])((?:hpcgpt|data_prep)(?:\.[a-z_]+)+)", page.read_text(encoding="utf-8"))
    for name in set(named):
        parents = [name, name.rpartition(".")[0]]  # of a function its module
        assert any((found and (ROOT / found.replace(".", "/")).with_suffix(".py").is_file()) or is_room(found)
                   for found in parents if "." in found), name  # fmt: skip


def is_room(name: str) -> bool:
    return "." in name and importlib.util.find_spec(name) is not None


def anchors(page: Path) -> set[str]:
    """Return the headings of a page in the form of link anchors."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_has_an_existing_target(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_page_can_be_reached_from_the_readme() -> None:
    listed = ["git", "ls-files", "docs/*.md", "*.md"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout.count("\n") > 10
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            path = (page.parent / link).resolve()
            path = path / "README.md" if path.is_dir() else path
            if path.suffix == ".md" and path.exists() and path not in seen:
                todo.append(path)
    expected = {ROOT / name for name in tracked.stdout.split() if name.startswith("docs/") and name.count("/") == 1}
    assert {page.name for page in expected - seen} == set()


def test_the_lab_notes_map_old_module_names_to_existing_modules() -> None:
    mapping = next(line for line in (ROOT / "docs" / "lab-notes.md").read_text(encoding="utf-8").splitlines()
                   if line.startswith("> "))  # fmt: skip
    paths = set(re.findall(r"`([\w/]+\.py)`", mapping)) - {"hpcgpt/x.py", "data_prep/x.py"}  # placeholders
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).is_file()] == []
