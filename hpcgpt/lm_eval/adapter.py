"""The model ``hpcgpt`` of lm-evaluation-harness: log-likelihoods and text from a checkpoint of a run.

`register` makes it known to lm_eval, for its command line (``hpcgpt lm-eval``) or for a program::

    from hpcgpt.lm_eval import adapter
    adapter.register()
    lm_eval.simple_evaluate(model="hpcgpt", model_args="run=runs/gpt2-124m", tasks=["hellaswag"])

Log-likelihoods are those of ``hpcgpt eval --tasks`` (``hpcgpt.tasks``). One process, one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from hpcgpt.checkpoint import load_model
from hpcgpt.config import sources
from hpcgpt.config.operation import Sample
from hpcgpt.errors import UserError
from hpcgpt.model.generate import generate
from hpcgpt.run import which_runs
from hpcgpt.tasks.likelihood import Computation, loglikelihoods
from hpcgpt.tasks.requests import Request, encode_pair
from hpcgpt.tasks.scores import LogLikelihood
from hpcgpt.tokenizer import interface

NAME = "hpcgpt"
MOST_NEW_TOKENS = 256  # as lm_eval's own models, where a task does not say
# What a task may ask of generation. `until` and `max_gen_toks` end it.
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


# By lm_eval's --device, which is cuda:0 by default: a run on the CPU stays there, and so do all where there is no GPU.
DEVICES = {None: "", "": "", "cuda:0": "", "auto": "auto", "cuda": "cuda", "cpu": "cpu"}


class Instance(Protocol):
    """What is used of lm_eval's requests."""

    @property
    def args(self) -> tuple[Any, ...]: ...


def register() -> None:
    """Add the model to lm_eval's, once. Imports lm_eval, which takes seconds."""
    import lm_eval.models  # noqa: F401 (lm_eval's own, which it registers by itself only while there are no others)
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    register_model(NAME)(type("HpcgptLM", (RunModel, LM), {"__doc__": RunModel.__doc__}))


class RunModel:
    """A run's checkpoint with the interface of lm_eval's LM, whose constructor and cache it needs: see `register`."""

    cache_hook: Any  # lm_eval's

    def __init__(
        self,
        run: str = "",
        step: int | None = None,
        best: bool = False,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,  # noqa: ARG002 (lm_eval passes it to all models)
        **unknown: object,
    ) -> None:
        """Load the checkpoint: model_args ``run=RUN[,step=N][,best=True]``; device and batch_size as flags of lm_eval.

        Raises:
            UserError: there is no such run or checkpoint, or an argument is not one of these.
        """
        super().__init__()
        if unknown:
            raise UserError(f"--model_args: unknown {', '.join(sorted(unknown))}: expected run=RUN, step=N, best=True")
        if not run:
            raise UserError("--model_args: name the run folder, run=RUN")
        if step is not None and best:
            raise UserError("--model_args: step=N and best=True name two checkpoints: leave one of them out")
        if device not in DEVICES:
            raise UserError(f"--device {device}: expected cpu, cuda or cuda:0; CUDA_VISIBLE_DEVICES chooses the GPU")
        folder = which_runs.one(str(run), which_runs.run_dir())
        self._trained = load_model.load(folder, step, best, DEVICES[device])
        automatic = batch_size is None or str(batch_size).startswith("auto")
        batch = self._trained.config.train.micro_batch if automatic else int(batch_size or 1)
        self._how = Computation(batch, self._trained.ranks, self._trained.computing)

    @property
    def tokenizer_name(self) -> str:
        """Return a name of the tokenizer, under which lm_eval keeps requests with --cache_requests."""
        return self._trained.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval puts into its results."""
        trained = self._trained
        return {
            "model_num_parameters": trained.model.parameter_count(),
            "model_dtype": str(trained.dtype),
            "model_path": str(trained.path),
            "model_step": trained.state.step,
        }

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each (context, continuation) in nats, and whether it is the greedy one."""
        pairs = [request.args for request in requests]
        encoded = [encode_pair(self._trained.tokenizer, context, continuation) for context, continuation in pairs]
        for (context, continuation), one in zip(pairs, encoded, strict=True):
            if not 0 < len(one.continuation) <= self._block_size:
                raise UserError(
                    f"the continuation '{continuation[:40]}' after '{context[-40:]}' has {len(one.continuation)} "
                    f"tokens of its own: expected 1 to {self._block_size} (model.block_size)"
                )
        answers = [(one.nats, one.is_greedy) for one in self._compute(encoded, disable_tqdm)]
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of block_size, each with as much context as fits.

        The first window begins with end-of-text. The last one is filled up with tokens that were predicted before.
        """
        texts = [request.args for request in requests]
        windows, counts = [], []
        for (text,) in texts:
            ids = (self._trained.tokenizer.end_of_text, *self._trained.tokenizer.encode(text))
            size = self._block_size
            starts = range(1, len(ids), size)
            windows += [Request(ids[max(0, start - size) : start], ids[start : start + size]) for start in starts]
            counts.append(len(starts))
        found = iter(self._compute(windows, disable_tqdm))
        sums = [sum(next(found).nats for _ in range(count)) for count in counts]
        for text, nats in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", text, nats)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to one of the strings `until`, end-of-text or `max_gen_toks`.

        Where a task samples, the seed is the request's number: a repeated context is continued in another way.

        Raises:
            UserError: a task asks for what generation here does not have.
        """
        texts = []
        for number, request in enumerate(tqdm(requests, desc="generating", disable=disable_tqdm)):
            context, settings = request.args
            text = self._generate(context, settings, seed=number)
            self.cache_hook.add_partial("generate_until", (context, settings), text)
            texts.append(text)
        return texts

    @property
    def _block_size(self) -> int:
        return self._trained.config.model.block_size

    def _compute(self, requests: Sequence[Request], disable_tqdm: bool) -> list[LogLikelihood]:
        batches = self._how.rounds(len(requests))
        with tqdm(total=batches, unit="batch", desc="log-likelihoods", disable=disable_tqdm) as bar:

            def stopped() -> bool:
                bar.update()
                return False

            how = Computation(self._how.batch, self._how.ranks, self._how.precision, stopped)
            found = loglikelihoods(self._trained.model, requests, how)
        assert found is not None, "None is returned only if `stopped` returns True"
        return found

    def _generate(self, context: str, settings: Mapping[str, Any], seed: int) -> str:
        if unknown := settings.keys() - set(_GENERATION):
            raise UserError(f"generation: unknown {', '.join(sorted(unknown))}: expected {', '.join(_GENERATION)}")
        most = int(settings.get("max_gen_toks", MOST_NEW_TOKENS))
        room = self._block_size - most
        if room < 1:
            raise UserError(
                f"max_gen_toks {most} must be less than the run's block_size of {self._block_size}: give "
                f"--gen_kwargs max_gen_toks={max(1, self._block_size // 2)}"
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        tokenizer = self._trained.tokenizer
        prompt = tokenizer.encode(context)[-room:] or [tokenizer.end_of_text]
        text = ""
        with self._trained.computing():
            ids = self._new_tokens(prompt, _sampling(settings, most), seed)
            for piece in interface.stream(tokenizer, ids, after=prompt):
                text += piece
                if any(stop in text for stop in stops):
                    break
        ends = [text.index(stop) for stop in stops if stop in text]
        return text[: min(ends)] if ends else text

    def _new_tokens(self, prompt: Sequence[int], sampling: Sample, seed: int) -> Iterator[int]:
        """Yield the ids that follow `prompt`, up to end-of-text."""
        for token in generate(self._trained.model, prompt, sampling, self._trained.ranks.device, seed):
            if token == self._trained.tokenizer.end_of_text:
                return
            yield token


def _sampling(settings: Mapping[str, Any], tokens: int) -> Sample:
    """Return the sampling that a task asks for: greedy, unless `do_sample`."""
    if not settings.get("do_sample") or not settings.get("temperature", 1.0):
        return Sample(tokens=tokens, temperature=0.0)
    given = {key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings}
    checked = {key: sources.checked("sample", key, value) for key, value in given.items()}
    return Sample(**{"tokens": tokens, "temperature": 1.0, "top_k": 0} | checked)
