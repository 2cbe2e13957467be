"""The training loop: what happens between the first step of an attempt and its last.

An attempt meets the other ranks, takes a generation of the run folder, loads the newest valid
checkpoint, and steps. After each step it evaluates and saves where that is due, and asks all ranks
whether to stop. Told to stop, it saves that very step and leaves with status 75.
"""

from __future__ import annotations

import math
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcgpt import checkpoint, config, durable, generation, metrics, plan, runfolder, tokenizer, world
from hpcgpt.blame import Blame, Straggler
from hpcgpt.evaluate import evaluate
from hpcgpt.generate import generate
from hpcgpt.generation import Generation
from hpcgpt.loader import Loader, Windows, widen
from hpcgpt.model import GPT
from hpcgpt.optim import make_optimizer
from hpcgpt.plan import Plan
from hpcgpt.precision import pick_dtype
from hpcgpt.preempt import Stop, StopFlag, shielded
from hpcgpt.schedule import learning_rate
from hpcgpt.step import accumulate, train_step
from hpcgpt.together import on_all, on_first
from hpcgpt.tracking import Tracker
from hpcgpt.world import Ranks, World


def train(planned: Plan, here: World, flag: StopFlag) -> int:
    """Run one attempt to its end; returns its exit status, the same on every rank."""
    settings = planned.config
    torch.set_num_threads(settings.run.threads or world.cores(here))
    device = world.pick_device(here, settings.run.device)
    ranks = world.connect(here, device, settings.run_folder, settings.run.backend, settings.run.rendezvous_timeout_s)
    held = _take(ranks, settings.run_folder)
    try:
        status = Attempt(planned, ranks, held, flag).run()
        # Rank 0 has more to do at the end, and `srun -K` ends whoever is left when the first rank leaves.
        on_first(ranks, lambda: None)
    except RuntimeError as error:
        if not world.is_broken_connection(error):
            raise
        raise ConnectionError(f"{here} lost its connection to another rank, which has ended: see its words") from error
    finally:
        if held is not None:
            held.release()
    return status


def _take(ranks: Ranks, folder: Path) -> Generation | None:
    """Rank 0 takes the run folder; None on the others."""
    taken: list[Generation] = []

    def take() -> None:
        runfolder.prepare(folder)
        taken.append(generation.take(folder, world.job_attempt()))

    on_first(ranks, take)
    return taken[0] if taken else None


@dataclass
class Progress:
    """`pending` is the row of a step whose evaluation is still to be done."""

    step: int = 0
    pending: dict[str, Any] | None = None


class Attempt:
    """One attempt at a run, from its generation to its exit status."""

    def __init__(self, planned: Plan, ranks: Ranks, held: Generation | None, flag: StopFlag) -> None:
        self.plan, self.ranks, self.held, self.flag = planned, ranks, held, flag
        self.config = settings = planned.config
        self.folder = settings.run_folder
        self.number = on_first(ranks, lambda: held.number if held else 0)
        if not held:
            generation.watch(self.folder, self.number)
        self.dtype = pick_dtype(settings.train.dtype, ranks.device)
        dtypes = on_all(ranks, lambda: str(self.dtype))
        if len(set(dtypes)) > 1:
            raise ValueError(f"the ranks would compute in {' and '.join(sorted(set(dtypes)))}: set train.dtype")
        cuda = ranks.device.type == "cuda"
        # The table is of bf16 peaks.
        measured = cuda and self.dtype == torch.bfloat16
        self._peak_flops = metrics.peak_flops(torch.cuda.get_device_name(ranks.device)) if measured else None
        self._data_wait_s = 0.0
        self.model = GPT(settings.model, settings.run.seed).to(ranks.device)
        if self.dtype == torch.float64:
            self.model.double()
        self.forward = _wrapped(self.model, ranks, settings.train.compile)
        self.optimizer = make_optimizer(self.model, settings.optim)
        self.blame = Blame(settings.blame, ranks)
        size = settings.model.vocab_size
        context = settings.model.block_size
        train = Windows(planned.train, context, settings.stride, size)
        self.val = Windows(planned.val, context, context, size) if planned.val else None
        self.loader = Loader(
            train,
            settings.run.seed,
            ranks.world.rank,
            ranks.world.size,
            settings.train.global_batch,
            settings.train.micro_batch,
        )
        self.words = tokenizer.load(Path(settings.data.dir) / "tokenizer", planned.manifest.tokenizer["fingerprint"])
        self.token_bytes: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.token_bytes[: self.words.vocab_size] = self.words.token_bytes

    # --- from start to end -------------------------------------------------------------------------

    def run(self) -> int:
        self._warm_up()
        progress = self._resume()
        reporter = self._report(progress)
        reason = Stop.NO
        status = runfolder.FAILED
        try:
            reason = self._steps(progress, reporter)
            finished = progress.step >= self.plan.total_steps and progress.pending is None
            problem = self._save(progress, reporter)
            if problem:
                status, words = runfolder.FAILED, f"the last checkpoint could not be written: {problem}"
            elif finished:
                status, words = runfolder.FINISHED, "finished"
            else:
                status, words = runfolder.AGAIN, reason.words
            if reporter:
                reporter.leave(status, words, progress.step, saved=not problem)
        finally:
            if reporter:
                reporter.close(status)
        return status

    def _report(self, progress: Progress) -> Reporter | None:
        made: list[Reporter] = []
        on_first(self.ranks, lambda: made.append(Reporter(self, progress)))
        return made[0] if made else None

    def _warm_up(self) -> None:
        """One pass whose gradients are thrown away.

        DDP orders its buckets anew after the first backward pass, and the order decides in which sequence
        floats are added. Without this pass the first step after a resume would round differently than
        the same step in a run that was never interrupted. Compilation happens here too.
        """
        self.forward.train()
        # The compiler's worker processes must not die of Slurm's warning.
        with shielded() if self.config.train.compile else nullcontext():
            accumulate(self.forward, self._micro_batches(0, 1), 1, self._precision)
        self.optimizer.zero_grad(set_to_none=True)

    def _resume(self) -> Progress:
        """Load the newest valid checkpoint, if there is one, and make the folder fit it."""
        settings, folder = self.config, self.folder
        if self.held:
            checkpoint.clean(folder / "checkpoints", self.held)
        newest = checkpoint.newest_valid(folder / "checkpoints", self.ranks, self.held)
        progress = Progress()
        if newest is None:
            torch.manual_seed(settings.run.seed + 7919 * self.ranks.world.rank)
        else:
            changed = plan.changes(checkpoint.read_state(newest).identity, self.plan.identity)
            if changed:
                raise ValueError(
                    f"{folder} was trained with other settings than these: {'; '.join(changed)}. Give the new run "
                    "another --run.name, or restore the settings"
                )
            state = checkpoint.load(newest, self.model, self.optimizer, self.ranks)
            progress = Progress(state.step, state.pending)
            if state.world_size != self.ranks.world.size:
                torch.manual_seed(settings.run.seed + 7919 * self.ranks.world.rank + 104729 * state.step)
        on_first(self.ranks, lambda: self._write_folder(progress.step))
        return progress

    def _write_folder(self, step: int) -> None:
        durable.write(self.folder / "config.toml", config.to_toml(self.config).encode())
        tokenizer.save(self.words, self.folder / "tokenizer")
        runfolder.record(
            self.folder,
            "start",
            attempt=self.number,
            job=world.job_attempt(),
            step=step,
            total_steps=self.plan.total_steps,
            world_size=self.ranks.world.size,
            host=socket.gethostname(),
        )

    def _steps(self, progress: Progress, reporter: Reporter | None) -> Stop:
        """Step until the end or until told to stop; returns why."""
        total, every = self.plan.total_steps, self.config.checkpoint.every
        while progress.step < total or progress.pending:
            if progress.pending is None:
                row = self._step(progress.step)
                progress.step += 1
                for straggler in self.blame.after(progress.step):
                    if reporter:
                        reporter.straggler(progress.step, straggler)
            else:
                row, progress.pending = progress.pending, None
            if self._due(self.config.eval.every, progress.step):
                figures = self._evaluate()
                if figures is None:
                    progress.pending = row
                    return self.flag.agree(self.ranks)
                row |= figures
            if reporter:
                reporter.row(row)
            reason = self.flag.agree(self.ranks)
            if reason:
                return reason
            if every and progress.step % every == 0 and progress.step < total:
                self._save(progress, reporter)
        return Stop.NO

    # --- the parts of a step -----------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, Any]:
        """Optimizer step number `step`, counted from 0; returns its metrics row."""
        settings, started_at = self.config, time.perf_counter()
        self._data_wait_s = 0.0
        rate = learning_rate(step, self.plan.total_steps, settings)
        loss, norm = train_step(
            self.forward,
            self.optimizer,
            self._micro_batches(step, self.plan.micro_steps),
            self.plan.micro_steps,
            rate,
            settings.optim.clip_norm,
            self._precision,
            self.ranks,
            self.blame.local,
        )
        loss_value, norm_value = float(loss), float(norm)
        # The same on every rank, so all of them leave here, before anything of it is saved.
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise ValueError(
                f"step {step + 1:,}: the loss is {loss_value} and the gradient's norm {norm_value}: training has "
                "diverged, and the checkpoints before are whole; try a lower optim.lr under another --run.name"
            )
        elapsed_s = time.perf_counter() - started_at
        tokens_per_s = self.plan.tokens_per_step / elapsed_s
        row = {
            "step": step + 1,
            "tokens": (step + 1) * self.plan.tokens_per_step,
            "samples": (step + 1) * settings.train.global_batch,
            "time": time.time(),
            "attempt": self.number,
            "train/loss": loss_value,
            "train/lr": rate,
            "train/grad_norm": norm_value,
            "train/tokens_per_s": tokens_per_s,
            "train/step_s": elapsed_s,
            "train/data_wait_s": self._data_wait_s,
        }
        if self._peak_flops:
            achieved = tokens_per_s * self.model.flops_per_token() / self.ranks.world.size
            row["train/mfu"] = achieved / self._peak_flops
        return row

    def _micro_batches(self, step: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for micro_step in range(count):
            started_at = time.perf_counter()
            batch = self.loader.batch(step, micro_step)
            self._data_wait_s += time.perf_counter() - started_at
            yield widen(batch, self.ranks.device)

    def _precision(self) -> AbstractContextManager[None]:
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.plan.total_steps)

    def _evaluate(self) -> dict[str, float] | None:
        assert self.val is not None
        return evaluate(
            self.model,
            self.val,
            self.config.eval.batches,
            self.config.train.micro_batch,
            self.token_bytes,
            self.ranks,
            self._precision,
            lambda: self.flag.agree(self.ranks) != Stop.NO,
        )

    def _save(self, progress: Progress, reporter: Reporter | None) -> str:
        """Save this step; '' or why that failed, on every rank. A failure costs a checkpoint, not the run."""
        started_at = time.monotonic()
        state = checkpoint.State(
            progress.step,
            progress.step * self.plan.tokens_per_step,
            progress.step * self.config.train.global_batch,
            self.ranks.world.size,
            self.plan.identity,
            progress.pending,
        )
        try:
            on_first(self.ranks, lambda: reporter.metrics.sync() if reporter else None)
        except OSError as error:
            problem = str(error)
        else:
            tensors = checkpoint.tensors_of(self.model, self.optimizer, self.ranks)
            problem = checkpoint.save(self.folder / "checkpoints", state, tensors, self.ranks, self.held)
        if reporter:
            reporter.saved(progress.step, problem, time.monotonic() - started_at)
        return problem


class Reporter:
    """Everything that rank 0 alone tells the world: metrics.jsonl, console, wandb, events, samples."""

    def __init__(self, attempt: Attempt, progress: Progress) -> None:
        self.attempt, self.folder = attempt, attempt.folder
        settings, total = attempt.config, attempt.plan.total_steps
        self.metrics = metrics.MetricsFile(
            self.folder / "metrics.jsonl", progress.step + (0 if progress.pending else 1)
        )
        run_id = runfolder.run_id(self.folder)
        self.tracker = Tracker(settings, run_id, asdict(settings), self.metrics.newest)
        self.console = metrics.Console(progress.step, total)
        done = progress.step >= total and not progress.pending
        tokens = attempt.plan.tokens_per_step
        self.console.say(
            f"run {self.folder}, generation {attempt.number}: {attempt.model.parameter_count():,} parameters, "
            f"{attempt.ranks.world.size} x {attempt.ranks.device.type}, "
            f"{str(attempt.dtype).removeprefix('torch.')}, {tokens:,} tokens a step "
            f"({attempt.plan.micro_steps} micro-steps a rank)"
        )
        if done:
            self.console.say(f"finished already, at step {total:,}: nothing to do")
        elif progress.step:
            self.console.say(f"resumed at step {progress.step:,} of {total:,}")

    def row(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.tracker.write(row)
        self.console.step(row)
        if "val/loss" in row and self.attempt.config.sample.tokens:
            self._sample(row["step"])

    def saved(self, step: int, problem: str, seconds: float) -> None:
        if problem:
            print(f"warning: no checkpoint of step {step:,}: {problem}", file=sys.stderr, flush=True)
            self._record("save_failed", step=step, problem=problem)
        else:
            self._record("save", step=step, seconds=seconds)
            try:
                checkpoint.retain(self.folder / "checkpoints", self.attempt.config.checkpoint.keep_last)
            except OSError as error:
                print(f"warning: an old checkpoint could not be removed: {error}", file=sys.stderr, flush=True)

    def straggler(self, step: int, found: Straggler) -> None:
        self.console.say(f"step {step:,}: {found.words}")
        self._record("straggler", step=step, **asdict(found), factor=found.factor)

    def leave(self, status: int, words: str, step: int, saved: bool) -> None:
        """The last words of an attempt that ends by itself."""
        self._record("end", status=status, reason=words, step=step)
        if status == runfolder.AGAIN:
            self.console.say(f"saved at step {step:,} and leaving: {words}")
        elif status == runfolder.FAILED:
            print(f"error: {words}", file=sys.stderr, flush=True)
        try:
            runfolder.write_exit(self.folder, runfolder.Exit(world.job_attempt(), status, words, step, saved))
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def close(self, status: int) -> None:
        self.console.close()
        self.metrics.close()
        self.tracker.close(status)

    def _sample(self, step: int) -> None:
        attempt, settings = self.attempt, self.attempt.config.sample
        prompt = [attempt.words.end_of_text, *attempt.words.encode(settings.prompt)]
        ids = generate(attempt.model, prompt, settings, attempt.ranks.device, attempt.config.run.seed + step)
        text = settings.prompt + "".join(tokenizer.stream(attempt.words, ids))
        self.console.say(f"--- sample at step {step:,}\n{text}\n---")
        self.tracker.sample(step, text)

    def _record(self, event: str, **fields: Any) -> None:
        try:
            runfolder.record(self.folder, event, attempt=self.attempt.number, **fields)
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)


def _wrapped(model: GPT, ranks: Ranks, compiled: bool) -> nn.Module:
    """What training calls: the model, compiled if asked for, behind DDP if there are other ranks."""
    module: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
    if ranks.control is None:
        return module
    return DistributedDataParallel(
        module,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
