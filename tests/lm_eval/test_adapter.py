"""hpcgpt.lm_eval.adapter: log-likelihoods and text of a run. With the real lm-eval: test_agreement."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcgpt.errors import UserError
from hpcgpt.lm_eval import __main__ as lm_eval_command
from hpcgpt.lm_eval.adapter import RunModel
from tests.tasks import made_questions

pytestmark = pytest.mark.processes  # the run is trained by one


@dataclass(frozen=True)
class Instance:
    args: tuple[Any, ...]


class Kept(list[Any]):
    """What the model hands to lm_eval's cache."""

    def add_partial(self, *row: Any) -> None:
        self.append(row)


@pytest.fixture
def model(finished_run: Path, tmp_path: Path) -> RunModel:
    """The finished run in float32: bfloat16, which some CPUs compute in, depends on the batch that a text is in."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace('dtype = "auto"', 'dtype = "float32"'))
    made = RunModel(run=str(run), batch_size="16", max_batch_size=None, device="cuda:0")
    made.cache_hook = Kept()
    return made


def logits(model: RunModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model._trained.model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)  # type: ignore[no-any-return]


def test_the_log_likelihood_of_a_continuation(model: RunModel) -> None:
    tokenizer = model._trained.tokenizer
    requests = [Instance(("def main(", "argv)")), Instance(("from __future__ ", "import")), Instance(("", "import"))]
    found = model.loglikelihood(requests, disable_tqdm=True)
    context, whole = tokenizer.encode("from __future__"), tokenizer.encode("from __future__ import")
    rows = logits(model, whole[:-1])
    expected = sum(float(rows[place - 1, whole[place]]) for place in range(len(context), len(whole)))
    assert found[1][0] == pytest.approx(expected, rel=1e-5)
    whole = [tokenizer.end_of_text, *tokenizer.encode("import")]
    rows = logits(model, whole[:-1])
    expected = sum(float(rows[place - 1, whole[place]]) for place in range(1, len(whole)))
    assert found[2][0] == pytest.approx(expected, rel=1e-5)
    kept = [("loglikelihood", request.args, answer) for request, answer in zip(requests, found, strict=True)]
    assert model.cache_hook == kept


def test_a_document_longer_than_the_window(model: RunModel) -> None:
    """Each token is predicted once; the last window is filled with tokens before it."""
    tokenizer, size = model._trained.tokenizer, model._trained.config.model.block_size
    text = made_questions.text()[:300]
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    count = len(ids) - 1
    assert count > 2 * size
    assert count % size
    expected = 0.0
    for start in range(1, count + 1, size):
        end = min(start + size, count + 1)
        inputs = ids[max(0, end - 1 - size) : end - 1]
        rows = logits(model, inputs)[-(end - start) :]
        expected += math.fsum(float(row[ids[place]]) for row, place in zip(rows, range(start, end), strict=True))
    short = Instance(("import",))
    found = model.loglikelihood_rolling([Instance((text,)), short, Instance(("",))], disable_tqdm=True)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    ((nats, _),) = model.loglikelihood([Instance(("", "import"))], disable_tqdm=True)
    assert found[1] == pytest.approx(nats, rel=1e-6)
    assert found[2] == 0


def test_text_is_continued_until_a_stop_or_a_number_of_tokens(model: RunModel) -> None:
    settings = {"until": ["never"], "max_gen_toks": 20}
    context = made_questions.text()[1000:1300]
    (whole,) = model.generate_until([Instance((context, settings))], disable_tqdm=True)
    tokenizer, size = model._trained.tokenizer, model._trained.config.model.block_size
    ids = tokenizer.encode(context)[-(size - 20) :]
    expected: list[int] = []
    for _ in range(20):
        expected.append(int(logits(model, [*ids, *expected])[-1].argmax()))
        if expected[-1] == tokenizer.end_of_text:
            expected.pop()
            break
    assert whole == "".join(tokenizer.stream(expected, after=ids))
    assert len(whole) > 4
    stop = whole[3:5]
    for until in (stop, [stop], ["never", stop]):
        requests = [Instance((context, settings | {"until": until}))]
        assert model.generate_until(requests, disable_tqdm=True) == [whole[: whole.index(stop)]]
    sampled = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 3.0, "top_k": 0}
    first, second = (model.generate_until([Instance((context, sampled))], disable_tqdm=True) for _ in range(2))
    assert first == second != [whole]


def test_a_task_that_repeats_a_context_gets_another_text_for_each(model: RunModel) -> None:
    """As lm_eval does it for pass@k and for the majority of several answers."""
    sampled = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 3.0, "top_k": 0}
    four = [Instance(("Once", sampled)) for _ in range(4)]
    texts = model.generate_until(four, disable_tqdm=True)
    assert len(set(texts)) == 4
    assert model.generate_until(four, disable_tqdm=True) == texts
    greedy = [Instance(("Once", {"until": [], "max_gen_toks": 20})) for _ in range(2)]
    assert len(set(model.generate_until(greedy, disable_tqdm=True))) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_gen_toks": 32}, "max_gen_toks 32 must be less than the run's block_size of 32: give --gen_kwargs"),
        ({}, "max_gen_toks 256 must be less"),
        ({"num_beams": 4, "max_gen_toks": 3}, "generation: unknown num_beams: expected until"),
    ],
)
def test_generation_that_is_impossible_is_refused(settings: dict[str, Any], sentence: str, model: RunModel) -> None:
    with pytest.raises(UserError, match=sentence):
        model.generate_until([Instance(("a", settings))], disable_tqdm=True)


def test_a_continuation_that_does_not_fit_is_refused(model: RunModel) -> None:
    with pytest.raises(
        UserError, match=r"the continuation 'x{40}' after 'a' has \d+ tokens of its own: expected 1 to 32"
    ):
        model.loglikelihood([Instance(("a", "x" * 400))], disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "name the run folder, run=RUN"),
        ({"run": "absent"}, "no run in absent"),
        ({"run": "absent", "pretrained": "gpt2"}, "unknown pretrained: expected run=RUN, step=N, best=True"),
        ({"run": "absent", "step": 4, "best": True}, "step=N and best=True name two checkpoints"),
        ({"run": "absent", "device": "cuda:3"}, "--device cuda:3: expected cpu, cuda or cuda:0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        RunModel(**arguments)


def test_what_is_reported_about_the_model(model: RunModel) -> None:
    about = model.get_model_info()
    assert (about["model_step"], about["model_dtype"]) == (12, "torch.float32")
    assert model.tokenizer_name == model._trained.tokenizer.fingerprint
    assert model._how.batch == 16
    assert RunModel(run=str(Path(about["model_path"]).parents[1]), batch_size="auto", step=4)._how.batch == 4


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"is not installed: pip install 'hpcgpt\[lm-eval\]'"):
        lm_eval_command.main(["run", "--model", "hpcgpt"])
