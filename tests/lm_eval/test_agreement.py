"""hpcgpt.lm_eval, with the real lm-evaluation-harness: `hpcgpt eval`, the adapter, and lm-eval's hf model on an export
of the run agree.

lm-eval brings 45 packages and 320 MB, which takes a minute. So it is not in the extra `test`, and these tests, which
are `long`, install it into an environment of their own.
"""

from __future__ import annotations

import json
import site
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT, clean_env, command, on_ranks
from tests.tasks import made_questions
from tests.tiny_run import TINY

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(900)]

MULTIPLE_CHOICE = """
output_type: multiple_choice
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
"""
# What lm-eval's own tasks of these names say, with a local file.
TASKS = {
    "endings": f'{MULTIPLE_CHOICE}doc_to_text: "{{{{ctx}}}}"\ndoc_to_choice: endings\ndoc_to_target: label\n',
    "arc": f'{MULTIPLE_CHOICE}doc_to_text: "Question: {{{{question}}}}\\nAnswer:"\n'
    'doc_to_choice: "{{choices.text}}"\ndoc_to_target: "{{choices.label.index(answerKey)}}"\n',
    "hellaswag": f'{MULTIPLE_CHOICE}process_docs: !function hellaswag_docs.process_docs\ndoc_to_text: "{{{{query}}}}"\n'
    'doc_to_choice: choices\ndoc_to_target: "{{label}}"\n',
    "lambada": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python in an environment that has lm-eval, and everything that this one has."""
    folder = tmp_path_factory.mktemp("harness")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join(site.getsitepackages()))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    flags = ["--quiet", "--no-compile", "--disable-pip-version-check", *extras["lm-eval"], "accelerate"]
    subprocess.run([folder / "bin/python", "-m", "pip", "install", *flags], check=True)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def folder(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200 steps of each kind, their exports, and lm-eval's descriptions of tasks of 500 questions."""
    home = tmp_path_factory.mktemp("agreement")
    longer = (
        TINY.replace("steps = 12", "steps = 200").replace("every = 4", "every = 0").replace("every = 6", "every = 0")
    )
    (home / "my.toml").write_text(f'{longer}\n[data]\ndir = "{shards_folder}"\n[optim]\nlr = 5e-3\n')
    for kind, run, export in (("gpt2", "run", "export"), ("modern", "modern_run", "modern_export")):
        # lm-eval computes exports in float32; some CPUs would train in bfloat16.
        flags = ["--run.dir", str(home), "--run.name", run, "--model.kind", kind, "--train.dtype", "float32"]
        done = command("hpcgpt.train", str(home / "my.toml"), *flags)
        assert done.returncode == 0, done.stderr
        done = command("hpcgpt.export", str(home / run), str(home / export), "--to", "hf")
        assert done.returncode == 0, done.stderr
    tasks = home / "tasks"
    tasks.mkdir()
    made_questions.write(tasks)
    of_one_form = [as_hugging_face_has_it(row) for row in made_questions.arc()]
    (tasks / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_one_form))
    source = made_questions.text()
    for name, length, count in (("documents", 400, 20), ("continued", 60, 20)):
        parts = [source[start : start + length] for start in range(5000, 5000 + 1000 * count, 1000)]
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    (tasks / "hellaswag_docs.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs as process_docs\n")
    for name, about in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks / name}.jsonl}}}}\ntest_split: test"
        (tasks / f"made_{name}.yaml").write_text(f"task: made_{name}\n{files}\n{about}")
    return home


def as_hugging_face_has_it(row: dict[str, Any]) -> dict[str, Any]:
    """Return a question of ARC's original files with the fields of Hugging Face's data set."""
    if isinstance(row["question"], str):
        return row
    stem, pairs = row["question"]["stem"], row["question"]["choices"]
    return row | {"question": stem, "choices": {key: [pair[key] for pair in pairs] for key in ("text", "label")}}


@pytest.fixture(scope="module")
def found(python: Path, folder: Path) -> dict[str, Any]:
    """The results of lm-eval: of the run through the adapter, and of the export."""
    offline = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = [str(folder / name) for name in ("tasks", "run", "export", "modern_run", "modern_export")]
    done = subprocess.run(
        [python, "-m", "tests.lm_eval.harness", *arguments], cwd=ROOT, env=clean_env() | offline, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results: dict[str, Any] = json.loads((folder / "tasks/results.json").read_text())
    return results


def ours(folder: Path, ranks: int, run: str = "run") -> dict[str, Any]:
    files = [str(folder / f"tasks/{form}.jsonl") for form in ("endings", "hellaswag", "arc", "lambada")]
    done = on_ranks(ranks, "hpcgpt.eval", str(folder / run), "--tasks", *files, "--batch", "16", "--json")
    assert done.returncode == 0, done.stderr
    tasks: dict[str, Any] = json.loads(done.stdout)["tasks"]
    return tasks


NAMES = {"accuracy": "acc", "accuracy_norm": "acc_norm", "accuracy_bytes": "acc_bytes"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", ["ours", "export"], ids=["adapter", "hf"])
def test_accuracies_and_standard_errors_of_500_questions_are_the_same(
    ranks: int, model: str, folder: Path, found: dict[str, Any]
) -> None:
    results = found[model]["results"]
    for form, task in ours(folder, ranks).items():
        assert task["questions"] == 500
        for name in [name for name in NAMES if name in task]:
            value, error = (results[f"made_{form}"][f"{NAMES[name]}{end},none"] for end in ("", "_stderr"))
            assert (task[name], task[f"{name}_stderr"]) == pytest.approx((value, error), rel=1e-12)
        if form == "lambada":
            assert task["perplexity"] == pytest.approx(results["made_lambada"]["perplexity,none"], rel=1e-5)
        else:
            assert 0.2 < task["accuracy"] < 0.9


@pytest.mark.parametrize("model", ["modern_ours", "modern_export"], ids=["adapter", "hf"])
def test_so_are_those_of_a_modern_model(model: str, folder: Path, found: dict[str, Any]) -> None:
    own, result = ours(folder, 1, "modern_run")["arc"], found[model]["results"]["made_arc"]
    assert own["questions"] == 500
    for name in NAMES:
        value, error = (result[f"{NAMES[name]}{end},none"] for end in ("", "_stderr"))
        assert (own[name], own[f"{name}_stderr"]) == pytest.approx((value, error), rel=1e-12)


def test_log_likelihoods_agree_for_each_request(found: dict[str, Any]) -> None:
    """Also of whole documents, which are longer than the window."""
    for task in ("made_endings", "made_hellaswag", "made_arc", "made_lambada"):
        pairs = zip(found["ours"]["answers"][task], found["export"]["answers"][task], strict=True)
        for own, expected in pairs:
            assert [one[0] for (one,) in own] == pytest.approx([one[0] for (one,) in expected], rel=1e-4)
            assert [one[1] for (one,) in own] == [one[1] for (one,) in expected]
    documents = [found[model]["answers"]["made_documents"] for model in ("ours", "export")]
    assert [one[0][0] for one in documents[0]] == pytest.approx([one[0][0] for one in documents[1]], rel=1e-5)
    assert len(documents[0]) == 20


def test_texts_are_continued_alike(found: dict[str, Any]) -> None:
    texts = [found[model]["answers"]["made_continued"] for model in ("ours", "export")]
    assert texts[0] == texts[1]
    assert len({one[0][0] for one in texts[0]}) > 3


def test_the_command_line_reports_the_run(folder: Path, found: dict[str, Any]) -> None:
    (path,) = (folder / "tasks/command").rglob("results_*.json")
    result = json.loads(path.read_text())
    assert result["results"]["made_endings"]["acc,none"] == found["ours"]["results"]["made_endings"]["acc,none"]
    assert result["config"]["model_step"] == 200
