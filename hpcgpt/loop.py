"""The training loop: what happens between the first step of an attempt and its last.

An attempt meets the other ranks, takes a generation of the run folder, loads the newest valid
checkpoint, and steps. After each step it evaluates and saves where that is due, and asks all ranks
whether to stop. Told to stop, it saves that very step and leaves with status 75.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcgpt import (
    checkpoint,
    config_sources,
    durable,
    generation,
    metrics,
    plan,
    rendezvous,
    restore,
    retention,
    runfolder,
    tokenizer,
    world,
)
from hpcgpt.blame import Blame
from hpcgpt.evaluate import HeldOut, Terms, evaluate_all
from hpcgpt.generation import Generation
from hpcgpt.loader import Loader, Mixture, Windows, widen
from hpcgpt.model import GPT, Manner
from hpcgpt.optim import make_optimizer
from hpcgpt.plan import Plan
from hpcgpt.precision import pick_dtype
from hpcgpt.preempt import Stop, StopFlag, shielded
from hpcgpt.reporter import Reporter, Story
from hpcgpt.saver import Saved, Saver, tensors_of
from hpcgpt.schedule import learning_rate
from hpcgpt.step import accumulate, train_step
from hpcgpt.together import on_all, on_first
from hpcgpt.watchdog import Watchdog
from hpcgpt.world import Ranks, World


def train(planned: Plan, here: World, flag: StopFlag, began_at: float) -> int:
    """Run one attempt to its end; returns its exit status, the same on every rank.

    `began_at` is when this process began, in unix seconds.
    """
    settings = planned.config
    times = {"imports_s": time.time() - began_at}
    torch.set_num_threads(settings.run.threads or world.cores(here))
    device = world.pick_device(here, settings.run.device)
    ranks = rendezvous.connect(
        here, device, settings.run_folder, settings.run.backend, settings.run.rendezvous_timeout_s
    )
    held = _take(ranks, settings.run_folder)
    times["meet_s"] = time.time() - began_at - times["imports_s"]
    try:
        status = Attempt(planned, ranks, held, flag, began_at, times).run()
        # Rank 0 has more to do at the end, and `srun -K` ends whoever is left when the first rank leaves.
        on_first(ranks, lambda: None)
    except RuntimeError as error:
        if not rendezvous.is_broken_connection(error):
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
    """`pending` is the row of a step whose evaluation is still to be done, `val_loss` that of this very step."""

    step: int = 0
    pending: dict[str, Any] | None = None
    val_loss: float | None = None


class Attempt:
    """One attempt at a run, from its generation to its exit status."""

    def __init__(
        self,
        planned: Plan,
        ranks: Ranks,
        held: Generation | None,
        flag: StopFlag,
        began_at: float,
        times: dict[str, float],
    ) -> None:
        """`times` has the seconds that the start took so far; see the event "ready"."""
        self.plan, self.ranks, self.held, self.flag = planned, ranks, held, flag
        self._began_at, self._times = began_at, times
        self.config = settings = planned.config
        self.folder = settings.run_folder
        self.number = on_first(ranks, lambda: held.number if held else 0)
        if not held:
            generation.watch(self.folder, self.number)
        self._watchdog = Watchdog(settings, ranks.world, self.number)
        self.dtype = pick_dtype(settings.train.dtype, ranks.device)
        dtypes = on_all(ranks, lambda: str(self.dtype))
        if len(set(dtypes)) > 1:
            raise ValueError(f"the ranks would compute in {' and '.join(sorted(set(dtypes)))}: set train.dtype")
        cuda = ranks.device.type == "cuda"
        # The table is of bf16 peaks.
        measured = cuda and self.dtype == torch.bfloat16
        self._peak_flops = metrics.peak_flops(torch.cuda.get_device_name(ranks.device)) if measured else None
        self._data_wait_s = 0.0
        manner = Manner.of(settings, planned.sets[0].manifest.tokenizer["end_of_text"])
        self.model = GPT(settings.model, settings.run.seed, manner).to(ranks.device)
        if self.dtype == torch.float64:
            self.model.double()
        self.forward = _wrapped(self.model, ranks, settings.train.compile)
        self.optimizer = make_optimizer(self.model, settings.optim)
        self._blame = Blame(settings.blame, ranks)
        size = settings.model.vocab_size
        context = settings.model.block_size
        train = [Windows(part.train, context, settings.stride, size) for part in planned.sets]
        self.held_out = [
            HeldOut(part.name, Windows(part.val, context, context, size), part.quota)
            for part in planned.sets
            if part.val
        ]
        self.loader = Loader(
            Mixture(train, [part.quota for part in planned.sets]),
            settings.run.seed,
            ranks.world.rank,
            ranks.world.size,
            settings.train.global_batch,
            settings.train.micro_batch,
        )
        self._hosts = on_all(ranks, socket.gethostname)
        first = planned.sets[0]
        self.words = tokenizer.load(first.folder / "tokenizer", first.manifest.tokenizer["fingerprint"])
        self.token_bytes: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.token_bytes[: self.words.vocab_size] = self.words.token_bytes

        self.progress = Progress()
        self._reporter: Reporter | None = None  # rank 0 has one, once the checkpoint is loaded
        self._saver = Saver(
            self.folder / "checkpoints", ranks, held, settings.checkpoint, self._sync_rows, self._committed
        )

    # --- from start to end -------------------------------------------------------------------------

    def run(self) -> int:
        self._warm_up()
        self._resume()
        on_first(self.ranks, self._report)
        status = runfolder.FAILED
        try:
            reason = self._steps()
            progress = self.progress
            finished = progress.step >= self.plan.total_steps and progress.pending is None
            if reporter := self._reporter:
                reporter.event("stop", step=progress.step, reason=reason.words or "finished")
            # Who is told to leave has no time for old checkpoints; the next attempt has.
            self._saver.tidy = finished
            problem = self._last_save()
            if problem:
                status, words = runfolder.FAILED, f"the last checkpoint could not be written: {problem}"
            elif finished:
                status, words = runfolder.FINISHED, "finished"
            else:
                status, words = runfolder.AGAIN, reason.words
            if reporter:
                reporter.leave(status, words, progress.step, saved=not problem)
        finally:
            self._watchdog.off()
            if self._reporter:
                self._reporter.close(status)
        return status

    def _warm_up(self) -> None:
        """One pass whose gradients are thrown away.

        DDP orders its buckets anew after the first backward pass, and the order decides in which sequence
        floats are added. Without this pass the first step after a resume would round differently than
        the same step in a run that was never interrupted. Compilation happens here too.
        """
        started_at = time.monotonic()
        self.forward.train()
        # The compiler's worker processes must not die of Slurm's warning.
        with shielded() if self.config.train.compile else nullcontext():
            accumulate(self.forward, self._micro_batches(0, 1), 1, self._precision)
        self.optimizer.zero_grad(set_to_none=True)
        self._times["warm_up_s"] = time.monotonic() - started_at

    def _resume(self) -> None:
        """Load the newest valid checkpoint, if there is one, and make the folder fit it."""
        started_at = time.monotonic()
        settings, checkpoints = self.config, self.folder / "checkpoints"
        if self.held:
            retention.clean(checkpoints, self.held)
        newest = restore.newest_valid(checkpoints, self.ranks, self.held)
        if newest is None:
            torch.manual_seed(settings.run.seed + 7919 * self.ranks.world.rank)
        else:
            changed = plan.changes(checkpoint.read_state(newest).identity, self.plan.identity)
            if changed:
                raise ValueError(
                    f"{self.folder} was trained with other settings than these: {'; '.join(changed)}. Give the new run "
                    "another --run.name, or restore the settings"
                )
            state = restore.load(newest, self.model, self.optimizer, self.ranks)
            self.progress = Progress(state.step, state.pending, state.val_loss)
            if state.world_size != self.ranks.world.size:
                torch.manual_seed(settings.run.seed + 7919 * self.ranks.world.rank + 104729 * state.step)
        self._times["load_s"] = time.monotonic() - started_at

    def _report(self) -> None:
        """Rank 0: write what the folder is to hold, and begin to tell."""
        durable.write(self.folder / "config.toml", config_sources.to_toml(self.config).encode())
        tokenizer.save(self.words, self.folder / "tokenizer")
        slowest_s = max(
            (event.get("seconds", 0.0) for event in runfolder.events(self.folder)[-100:] if event["event"] == "save"),
            default=0.0,
        )
        progress, pending = self.progress, self.progress.pending is not None
        story = Story(
            self.plan, self.ranks, self.number, self._hosts, self.dtype, self._began_at, progress.step, pending
        )
        assert self.held is not None
        self._reporter = Reporter(story, self.held, self.model, self.words)
        self._mind_the_end(slowest_s)
        self._reporter.event("ready", step=progress.step, **self._times)

    def _steps(self) -> Stop:
        """Step until the end or until told to stop; returns why."""
        total, every, progress = self.plan.total_steps, self.config.checkpoint.every, self.progress
        while progress.step < total or progress.pending:
            if progress.pending is None:
                row = self._step(progress.step)
                progress.step, progress.val_loss = progress.step + 1, None
                self._watchdog.step(progress.step)
                for straggler in self._blame.after(progress.step):
                    if self._reporter:
                        self._reporter.straggler(progress.step, straggler)
            else:
                row, progress.pending = progress.pending, None
            if self._due(self.config.eval.every, progress.step):
                started_at = time.monotonic()
                figures = self._evaluate()
                if figures is None:
                    progress.pending = row
                    return self.flag.agree(self.ranks)
                row |= figures | {"val/elapsed_s": time.monotonic() - started_at}
                progress.val_loss = figures["val/loss"]
            if self._reporter:
                self._reporter.row(row)
            reason = self._between()
            if reason:
                return reason
            if every and progress.step % every == 0 and progress.step < total:
                self._tell(self._save())
        return Stop.NO

    def _between(self) -> Stop:
        """At each step boundary, and between the batches of an evaluation: what all ranks have to agree on."""
        self._watchdog.alive()
        if self._saver.busy:
            self._tell(self._saver.poll())
        return self.flag.agree(self.ranks)

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
            self._blame.local,
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
        batches, micro_batch = self.config.eval.batches, self.config.train.micro_batch
        terms = Terms(
            batches, micro_batch, self.token_bytes, self.ranks, self._precision, lambda: self._between() != Stop.NO
        )
        return evaluate_all(self.model, self.held_out, terms)

    # --- saving ------------------------------------------------------------------------------------

    def _save(self) -> Saved | None:
        """Begin to save this step; the outcome, if it has one at once. The save before has to end first."""
        self._tell(self._saver.finish(self._watchdog.alive))
        progress = self.progress
        state = checkpoint.State(
            progress.step,
            progress.step * self.plan.tokens_per_step,
            progress.step * self.config.train.global_batch,
            self.ranks.world.size,
            self.plan.identity,
            progress.pending,
            progress.val_loss,
        )
        saved = self._saver.begin(state, tensors_of(self.model, self.optimizer, self.ranks))
        if saved is None and not self.config.checkpoint.background:
            saved = self._saver.finish(self._watchdog.alive)
        return saved

    def _last_save(self) -> str:
        """Save this step before leaving; '' or why that failed, on every rank."""
        saved = self._save() or self._saver.finish(self._watchdog.alive)
        assert saved is not None
        self._tell(saved)
        return saved.problem

    def _tell(self, saved: Saved | None) -> None:
        """A save has ended, if one has. A failure costs a checkpoint, not the run."""
        if saved is None:
            return
        if self._reporter:
            self._reporter.saved(saved)
            self._mind_the_end(saved.seconds)

    def _mind_the_end(self, save_s: float) -> None:
        lead_s = self.flag.save_takes(save_s)
        if lead_s is not None and self._reporter:
            self._reporter.say(f"a save takes {save_s:.1f} s: leaving {lead_s:.0f} s before the job's end")

    def _committed(self, saved: Saved) -> None:
        assert self._reporter is not None
        self._reporter.committed(saved)

    def _sync_rows(self) -> None:
        """Rows must be on the disk before the checkpoint that follows them: nobody would make them again."""
        assert self._reporter is not None
        self._reporter.metrics.sync()


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
