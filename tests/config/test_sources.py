"""hpcgpt.config.sources and options: defaults, then TOML, then flags, each checked strictly."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.config.sources import PRESETS
from hpcgpt.errors import UserError
from tests.programs import ROOT, clean_env, command


def from_flags(*argv: str) -> Config:
    return sources.from_command_line(argv, "train", "")


def from_text(folder: Path, text: str) -> Config:
    path = folder / "my.toml"
    path.write_text(text)
    return sources.from_file(path)


# --- sources of values -----------------------------------------------------------------------------


def test_without_arguments_the_defaults_apply() -> None:
    assert from_flags() == Config()


def test_a_file_overrides_the_defaults_and_a_flag_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[model]\nn_layer = 3\nn_head = 4\n[optim]\nlr = 1e-3\n")
    found = from_flags(str(path), "--model.n_layer", "5", "--model.tied=false")
    assert (found.model.n_layer, found.model.n_head, found.optim.lr, found.model.tied) == (5, 4, 1e-3, False)
    assert found.model.n_embd == Config().model.n_embd


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_is_found_by_its_name_and_loads(preset: str) -> None:
    assert from_flags(preset).run.name == preset


@pytest.mark.parametrize("path", sorted(PRESETS.glob("gpt2-*.toml")), ids=lambda path: path.stem)
def test_the_presets_of_gpt2_have_the_documented_number_of_parameters(path: Path) -> None:
    shape = sources.from_file(path).model
    layers, width = shape.n_layer, shape.n_embd
    a_block = 12 * width * width + 13 * width  # four matrices and their biases, two norms
    count = (50_257 + shape.block_size) * width + layers * a_block + 2 * width
    assert f"{count:,} parameters" in path.read_text()


def test_a_file_overrides_a_preset_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").write_text("[model]\nn_layer = 7\n")
    monkeypatch.chdir(tmp_path)
    assert from_flags("quickstart").model.n_layer == 7


def test_an_empty_file_is_valid(tmp_path: Path) -> None:
    assert from_text(tmp_path, "") == Config()


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ([], (0, 10_000_000_000, 0.0)),
        (["--train.steps", "7"], (7, 0, 0.0)),
        (["--train.epochs", "1.5"], (0, 0, 1.5)),
        (["--train.tokens", "1e9"], (0, 1_000_000_000, 0.0)),
    ],
)
def test_a_length_on_the_command_line_replaces_the_presets_in_any_unit(
    flags: list[str], length: tuple[int, int, float]
) -> None:
    train = from_flags("gpt2-124m", *flags).train
    assert (train.steps, train.tokens, train.epochs) == length


def test_a_length_in_a_file_replaces_the_default_one(tmp_path: Path) -> None:
    train = from_text(tmp_path, "[train]\nepochs = 2\n").train
    assert (train.steps, train.tokens, train.epochs) == (0, 0, 2.0)


def test_a_length_of_zero_is_refused_on_the_command_line_and_not_given_in_a_file(tmp_path: Path) -> None:
    """Each run has zeros in its config.toml. As a flag it would train for the default length, or the file's."""
    assert from_text(tmp_path, "[train]\nsteps = 0\n") == Config()
    assert from_flags("--train.steps", "0", "--train.epochs", "1.5").train.epochs == 1.5
    with pytest.raises(UserError) as caught:
        from_flags("gpt2-124m", "--train.steps", "0", "--train.epochs", "0")
    assert str(caught.value).splitlines() == [
        "command line: train.steps: 0 has no effect: give a length, or leave it out",
        "command line: train.epochs: 0 has no effect: give a length, or leave it out",
    ]


def test_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"exactly one of .*found train\.steps and train\.epochs"):
        from_flags("--train.steps", "5", "--train.epochs", "1")


def test_a_configuration_survives_toml_and_back(tmp_path: Path) -> None:
    odd = 'a "quoted" = \\ 萧炎\n\tline'
    before = from_flags("--sample.prompt", odd, "--optim.lr", "0.12345678901234567", "--train.steps", "3",
                        "--model.tied", "false", "--run.seed", str(2**63 - 1))  # fmt: skip
    assert from_text(tmp_path, sources.to_toml(before)) == before
    assert before.sample.prompt == odd


def test_the_modern_kind_has_no_biases_by_default(tmp_path: Path) -> None:
    found = from_flags("--model.kind", "modern", "--model.n_kv_head", "4")
    assert (found.model.qkv_bias, found.model.n_kv_head) == (False, 4)
    (tmp_path / "copy.toml").write_text(sources.to_toml(found))
    assert sources.from_file(tmp_path / "copy.toml") == found
    assert from_flags("--model.kind", "gpt2").model.qkv_bias
    assert from_flags("--model.kind", "modern", "--model.qkv_bias", "true").model.qkv_bias  # Qwen2's


def test_a_configuration_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.n_layer = 3  # type: ignore[misc]


def test_the_stride_is_the_block_size_unless_set() -> None:
    assert from_flags("--model.block_size", "64").stride == 64
    assert from_flags("--model.block_size", "64", "--data.stride", "16").stride == 16


# --- refused values --------------------------------------------------------------------------------

# First errors in a single key, then contradictions between keys.
WRONG_KEYS = [
    ("[modle]\nn_layer = 3", "unknown section [modle] (did you mean model?)"),
    ("[model]\nn_layers = 3", "unknown key model.n_layers (did you mean model.n_layer?)"),
    ("[train]\nlr = 3e-4", "unknown key train.lr (did you mean optim.lr?)"),
    ("[model]\nqqqqqqqq = 3", "unknown key model.qqqqqqqq (valid: model.kind, model.n_layer,"),
    ("model = 3", "model is a section: write [model]"),
    ('[model]\nn_layer = "3"', "model.n_layer: expected a whole number, found '3'"),
    ("[model]\nn_layer = 3.0", "model.n_layer: expected a whole number, found 3.0"),
    ("[model]\nn_layer = true", "model.n_layer: expected a whole number, found True"),
    ("[model]\nn_layer = [3]", "model.n_layer: expected a whole number, found [3]"),
    ("[optim]\nlr = true", "optim.lr: expected a number, found True"),
    ("[model]\ntied = 1", "model.tied: expected true or false, found 1"),
    ("[run]\nname = 3", "run.name: expected text, found 3"),
    ("[model]\nn_layer = 0", "model.n_layer: 0 must be at least 1"),
    ("[model]\ndropout = 1.0", "model.dropout: 1.0 must be less than 1"),
    ("[optim]\nlr = 0", "optim.lr: 0.0 must be greater than 0"),
    ("[sample]\ntop_p = 1.5", "sample.top_p: 1.5 must be at most 1"),
    ("[run]\nseed = 9223372036854775808", "run.seed: 9223372036854775808 must be less than 9223372036854775808"),
    ("[optim]\nlr = nan", "optim.lr: nan"),
    ("[optim]\nweight_decay = nan", "optim.weight_decay: nan"),
    ("[optim]\nlr = inf", "optim.lr: inf"),
    ("[train]\nepochs = inf", "train.epochs: inf"),
    ("[run]\nrendezvous_timeout_s = inf", "run.rendezvous_timeout_s: inf"),
    (
        '[schedule]\nkind = "cosin"',
        "schedule.kind: 'cosin' is none of cosine, linear, wsd, constant (did you mean cosine?)",
    ),
    ("[tracking]\nwandb = false", "tracking.wandb: False is none of auto, online, offline, disabled"),
]
CONTRADICTIONS = [
    ("[model]\nn_embd = 100\nn_head = 3", "model.n_embd 100 must be a multiple of model.n_head 3"),
    ("[model]\nblock_size = 8\n[data]\nstride = 9", "data.stride 9 is larger than model.block_size 8"),
    ("[train]\nglobal_batch = 10\nmicro_batch = 4", "train.global_batch 10 must be a multiple of train.micro_batch 4"),
    ("[schedule]\nmin_lr = 1", "schedule.min_lr 1.0 is above optim.lr"),
    ("[checkpoint]\nevery = 10\nkeep_every = 15", "checkpoint.keep_every 15 must be a multiple of checkpoint.every 10"),
    ("[checkpoint]\nevery = 0\nkeep_every = 5", "checkpoint.keep_every 5 must be a multiple of checkpoint.every 0"),
    ("[model]\nn_kv_head = 4", 'model.n_kv_head 4 is for model.kind "modern"'),
    ("[model]\nqk_norm = false", 'model.qk_norm is for model.kind "modern": leave it out'),
    ("[model]\nhead_size = 32", 'model.head_size is for model.kind "modern": leave it out'),
    ("[model]\nrope_base = 1e6", 'model.rope_base is for model.kind "modern": leave it out'),
    ('[model]\nkind = "modern"\ngelu = "exact"', 'model.gelu exact is for model.kind "gpt2": modern has SwiGLU'),
    ('[model]\nkind = "modern"\nhead_size = 5', "model.head_size 5 is odd: rotary positions rotate pairs"),
    ('[model]\nkind = "modern"\nrope_low = 2', "model.rope_low has no effect with model.rope_factor 1: give both"),
    (
        '[model]\nkind = "modern"\nrope_factor = 8\nrope_low = 4\nrope_high = 4',
        "model.rope_low 4 must be less than model.rope_high 4",
    ),
    ('[model]\nkind = "modern"\nn_kv_head = 5', "model.n_head 12 must be a multiple of model.n_kv_head 5"),
    ('[model]\nkind = "modern"\nn_embd = 36', "n_embd 36 / model.n_head 12 is odd: rotary positions rotate pairs"),
    ("[model]\nblock_size = 8\n[train]\nloss_chunk = 200", "train.loss_chunk 200 is more than the 128 tokens of a"),
    (
        '[train]\nattention = "cudnn"\ndeterministic = true',
        "train.attention cudnn adds in no fixed order, which train.deterministic rules out",
    ),
    (
        '[model]\ndropout = 0.1\n[train]\nattention = "fa3"',
        "train.attention fa3 has no dropout, and model.dropout is 0.1",
    ),
    (
        '[data]\ndocument_mask = true\n[train]\nattention = "flash"',
        "train.attention flash has no effect with data.docu",
    ),
    ("[model]\nblock_size = 8\n[sample]\nslide = 9", "sample.slide 9 is more than model.block_size 8"),
    ('[run]\nname = "a/b"', "run.name 'a/b' must be a plain folder name"),
    ('[run]\nname = ".."', "run.name '..' must be a plain folder name"),
    ('[run]\nname = ""', "run.name '' must be a plain folder name"),
    ('[run]\nname = "-n"', "run.name '-n' must be a plain folder name: it is empty, begins with . or -, or has a /"),
    ('[run]\nname = "a\\nb"', r"run.name 'a\nb' must be a plain folder name: it has control characters"),
    ("[run]\ninit_step = 4", "run.init_step has no effect without run.init_from"),
    ("[run]\ninit_optimizer = true", "run.init_optimizer has no effect without run.init_from"),
    ('[run]\ninit_data = "continue"', "run.init_data has no effect without run.init_from"),
    ("[eval]\nevery = 0\ntrain_batches = 2", "eval.train_batches has no effect with eval.every 0"),
    (f'[run]\nname = "{"x" * 300}"', "must be a plain folder name: it has 300 bytes, and 200 are the most"),
    ('[tracking]\nproject = "a\\u001bb"', r"tracking.project 'a\x1bb' must be a plain folder name: it has control"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG_KEYS)
def test_a_wrong_key_in_a_file_is_refused_with_the_file_and_the_reason(
    text: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'my.toml'}: {sentence}")):
        from_text(tmp_path, text)


@pytest.mark.parametrize(("text", "sentence"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from_text(tmp_path, text)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model.n_layers", "3"], "command line: unknown flag --model.n_layers (did you mean --model.n_layer?)"),
        (["--modle.n_layer=3"], "command line: unknown flag --modle.n_layer (did you mean --model.n_layer?)"),
        (["--train.lr", "3"], "command line: unknown flag --train.lr (did you mean --optim.lr?)"),
        (["--n_layer", "3"], "command line: unknown flag --n_layer (did you mean --model.n_layer?)"),
        (["--model.n_lay", "3"], "command line: unknown flag --model.n_lay"),
        (["--lr", "3"], "command line: unknown flag --lr (did you mean --optim.lr?)"),
        (["--steps=3"], "command line: unknown flag --steps (did you mean --train.steps or --profile.steps?)"),
        (["--batch-size", "3"], "command line: unknown flag --batch-size (did you mean --train.global_batch?)"),
        (["--nodes", "4"], "unknown flag --nodes: it is one of sbatch's, before the script's name: sbatch --nodes=..."),
        (["--nodez", "4"], "command line: unknown flag --nodez (did you mean --nodes?)"),
        (["--model.n_layer", "three"], "command line: model.n_layer: expected a whole number, found 'three'"),
        (["--model.n_layer", "2.5"], "command line: model.n_layer: expected a whole number, found '2.5'"),
        (["--train.steps", "1e999"], "command line: train.steps: expected a whole number, found '1e999'"),
        (["--model.tied", "maybe"], "command line: model.tied: expected true or false, found 'maybe'"),
        (["--model.tied", "1"], "command line: model.tied: expected true or false, found '1'"),
        (["--optim.lr", "-1"], "command line: optim.lr: -1.0 must be greater than 0"),
        (["--optim.lr", "nan"], "command line: optim.lr: nan"),
        (["--optim.lr", "inf"], "command line: optim.lr: inf"),
        (["--train.dtype", "fp16"], "command line: train.dtype: 'fp16' is none of auto, bfloat16, float32, float64"),
        (["quickstart", "extra"], "unexpected argument 'extra': flags are spelled --section.key value"),
        (["quickstrat"], "no configuration 'quickstrat': it is neither a file nor a preset"),
        (["quickstrat"], "(did you mean quickstart?)"),
    ],
)
@pytest.mark.parametrize("preset", [True, False])
def test_a_wrong_flag_is_refused_with_the_nearest_valid_one(flags: list[str], sentence: str, preset: bool) -> None:
    """With and without a CONFIG before it: the value of an unknown flag is not taken for a CONFIG."""
    if preset and flags[0].startswith("-"):
        flags = ["quickstart", *flags]
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        from_flags(*flags)
    assert len(str(refused.value).splitlines()) == 1


def test_a_configuration_after_an_unknown_flag_is_checked_too() -> None:
    with pytest.raises(ValueError, match="unknown flag --fast") as refused:
        from_flags("--fast", "quickstart", "--model.n_layer", "0")
    assert "model.n_layer: 0 must be at least 1" in str(refused.value)
    with pytest.raises(ValueError, match="unknown flag --fast") as refused:
        from_flags("--fast", "-1", "--fast", "quickstrat")
    assert len(str(refused.value).splitlines()) == 1


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[model]\nn_layers = 3\nn_head = 0\n[optin]\nlr = 1\n")
    with pytest.raises(ValueError, match="n_layers") as caught:
        from_flags(str(path), "--optim.lr", "x", "--schedule.knd", "wsd")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for key in ("model.n_layers", "model.n_head", "[optin]", "optim.lr", "--schedule.knd"):
        assert any(key in line for line in lines), key


def test_a_file_that_is_not_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"my\.toml: not valid TOML: .*line 2"):
        from_text(tmp_path, "[model]\nn_layer = = 3\n")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"[run]\nname = '\xff'\n")
    with pytest.raises(ValueError, match=r"my\.toml: cannot be read"):
        sources.from_file(path)


def test_a_missing_file_is_refused_with_the_presets() -> None:
    with pytest.raises(ValueError, match=r"no configuration 'nowhere\.toml'.*gpt2-124m, .*quickstart"):
        from_flags("nowhere.toml")


def test_a_missing_file_does_not_hide_a_wrong_flag() -> None:
    with pytest.raises(ValueError, match="nowhere") as caught:
        from_flags("nowhere.toml", "--model.n_layers", "3")
    assert "--model.n_layers" in str(caught.value)


# --- paths and text --------------------------------------------------------------------------------


def test_paths_are_expanded_in_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.chdir(tmp_path)
    found = from_flags("--run.dir=~/runs", "--run.init_from", "${SCRATCH}/old", "--data.mix", "~/a:0.5,$SCRATCH/b:0.5")
    assert (found.run.dir, found.run.init_from) == ("/home/me/runs", "/scratch/me/old")
    assert [part.dir for part in found.data.mix] == ["/home/me/a", "/scratch/me/b"]
    assert from_text(tmp_path, '[data]\ndir = "$SCRATCH/shards"\n').data.dir == "/scratch/me/shards"
    assert from_flags("--sample.prompt", "~ $SCRATCH").sample.prompt == "~ $SCRATCH", "a prompt is not a path"
    (tmp_path / "$SCRATCH").mkdir()
    assert from_flags("--data.dir", "$SCRATCH").data.dir == "$SCRATCH", "it exists"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--run.dir", "$NOWHERE/runs"], "run.dir: path '$NOWHERE/runs': the environment variable NOWHERE is not set"),
        (["--data.mix", "~nosuchuser/a:1"], "data.mix: path '~nosuchuser/a': there is no such file here, and ~ is not"),
        (["--run.dir", "a\nb"], r"run.dir: path 'a\nb': a path must have no control characters"),
        (["--run.name", "a\udc80"], r"run.name: 'a\udc80' is not valid UTF-8"),
        (["--data.mix", "a\udc80:1"], r"data.mix: 'a\udc80' is not valid UTF-8"),
        (["$NOWHERE/my.toml"], "CONFIG '$NOWHERE/my.toml': the environment variable NOWHERE is not set"),
        (["x" * 300], f"no configuration '{'x' * 300}'"),
        (["a\x1b[2J"], r"CONFIG 'a\x1b[2J': a path must have no control characters"),
        (["hpcgpt"], "'hpcgpt' is a folder: name a TOML file"),
    ],
)
def test_an_unusable_path_or_text_is_refused(flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from_flags(*flags)


def test_a_byte_order_mark_is_not_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(b"\xef\xbb\xbf[model]\nn_layer = 3\n")
    assert sources.from_file(tmp_path / "my.toml").model.n_layer == 3


def test_from_anywhere_means_the_same_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = from_flags("--run.dir", "runs", "--data.dir", "a/shards", "--run.init_from", "../old").from_anywhere
    assert (kept.run.dir, kept.data.dir) == (f"{tmp_path}/runs", f"{tmp_path}/a/shards")
    assert Path(kept.run.init_from).is_absolute()
    mixed = from_flags("--data.mix", "a:1,/b:2").from_anywhere
    assert ([part.dir for part in mixed.data.mix], mixed.data.dir) == ([f"{tmp_path}/a", "/b"], "")
    assert mixed.run.init_from == ""
    monkeypatch.chdir("/")
    assert kept.from_anywhere == kept


def moved_run(folder: Path) -> str:
    """Make a run folder as it is after a move: its config.toml names another place. Return its config.toml."""
    folder.mkdir()
    (folder / "run.json").write_text('{"id": "a"}')
    (folder / "config.toml").write_text('[run]\ndir = "/old/place"\nname = "first"\n[model]\nn_layer = 3\n')
    return f"{folder}/config.toml"


def to_train(*argv: str) -> Config:
    return sources.for_training(argv, "train", "")


def test_the_configuration_of_a_run_that_was_moved_is_refused_with_the_flags_to_type(tmp_path: Path) -> None:
    config = moved_run(tmp_path / "a copy")
    assert from_flags(config).run.name == "first"  # for a command that trains nothing
    with pytest.raises(UserError) as caught:
        to_train(config)
    assert "names another, /old/place/first" in str(caught.value)
    flags = re.search(r"add (--run.dir .*); for another run", str(caught.value))
    assert flags is not None
    assert to_train(config, *shlex.split(flags[1])).run_folder == tmp_path / "a copy"
    # A fork says which run is meant, and so does a start of the old one.
    assert to_train(config, "--run.name", "fork").run_folder == Path("/old/place/fork")
    assert to_train(config, "--run.dir", "/old/place").run.name == "first"
    assert sources.from_file(Path(config)).run.name == "first"  # other commands are given the folder


def test_the_configuration_of_a_run_is_taken_where_it_names_its_folder(tmp_path: Path) -> None:
    config = moved_run(tmp_path / "run")
    (tmp_path / "first").symlink_to("run")  # left where the run was
    here = Path(config).read_text().replace("/old/place", str(tmp_path))
    Path(config).write_text(here)
    assert to_train(config).run.name == "first"
    (tmp_path / "run" / "mine.toml").write_text('[run]\nname = "other"\n')
    assert to_train(f"{tmp_path}/run/mine.toml").run.name == "other"


def test_the_configuration_of_imported_weights_names_a_new_run(tmp_path: Path) -> None:
    config = moved_run(tmp_path / "weights")
    (tmp_path / "weights" / "imported.json").write_text("{}")
    assert to_train(config).run.name == "first"


def test_a_current_folder_that_is_not_utf_8_is_refused_where_a_path_begins_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.toml gets absolute paths, and is UTF-8; it is written after all ranks have met."""
    folder = tmp_path / os.fsdecode(b"\xb2\xe2")
    folder.mkdir()
    monkeypatch.chdir(folder)
    found = rf"run.dir: '{tmp_path}/\udcb2\udce2/runs' is not valid UTF-8: start in another folder"
    with pytest.raises(UserError, match=re.escape(found)):
        to_train()
    absolute = ("--run.dir", "/runs", "--data.dir", "/shards")
    with pytest.raises(UserError, match=re.escape("eval.tasks: 'tasks = [")):
        to_train(*absolute, "--eval.tasks", "a.jsonl", "--eval.tasks_every", "250")
    assert to_train(*absolute).run.dir == "/runs"


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.processes
def test_help_names_every_option_and_loads_neither_torch_nor_numpy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hpcgpt.train", "--help"],
        capture_output=True, text=True, cwd=ROOT, env=clean_env(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "hpcgpt" in loaded
    assert not loaded & {"torch", "numpy", "tiktoken", "wandb", "submitit"}
    for section in dataclasses.fields(Config):
        for option in dataclasses.fields(getattr(Config(), section.name)):
            assert f"--{section.name}.{option.name} " in done.stdout


@pytest.mark.processes
@pytest.mark.parametrize(
    "flags", [["--model.n_layers", "3"], ["--train.steps"], ["nowhere"], ["quickstart", "--optim.lr", "inf"]]
)
def test_a_user_error_ends_with_status_2_a_message_and_no_traceback(flags: list[str], tmp_path: Path) -> None:
    done = command("hpcgpt.train", *flags, "--run.dir", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
