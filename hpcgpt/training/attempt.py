"""One attempt at a run: connect to the other ranks, acquire the lease, load the newest checkpoint, train, exit.

This builds what the training loop (``hpcgpt.training.loop``) needs. When the loop has ended, it saves the last
checkpoint, and reports the exit status.
"""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from hpcgpt import exit_codes
from hpcgpt.checkpoint.layout import TrainState
from hpcgpt.config import paths, sources
from hpcgpt.data.shard_check import ShardCheck
from hpcgpt.distributed import layout, node_channel, rendezvous, world
from hpcgpt.distributed.collectives import gather_to_rank0, make_on_rank0, run_on_rank0
from hpcgpt.distributed.stop_signals import RECENT_SAVES, StopFlag
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.model import host_memory
from hpcgpt.output import streams
from hpcgpt.output.best_effort import only_informs
from hpcgpt.plan import Plan
from hpcgpt.run import records, run_folder
from hpcgpt.storage.lease import HeldError, Lease, acquire, exit_when_superseded
from hpcgpt.tokenizer import save_load
from hpcgpt.training import in_effect, parallel
from hpcgpt.training.checkpointer import Checkpointer
from hpcgpt.training.engine import Engine
from hpcgpt.training.evaluation import Evaluator
from hpcgpt.training.hang_watchdog import Watchdog
from hpcgpt.training.loop import Loop
from hpcgpt.training.profiler import Profiler
from hpcgpt.training.reporter import AttemptInfo, Reporter
from hpcgpt.training.resume import Restorer, Resumed, Rollback
from hpcgpt.training.samples import Sampler
from hpcgpt.training.spikes import SpikeDetector
from hpcgpt.training.stragglers import StragglerDetector

LAST_REPORT_S = 60.0  # limit for the last report


def train(planned: Plan, here: World, flag: StopFlag, began_at: float) -> int:
    """Run one attempt to its end; return its exit status, the same on every rank.

    `began_at` is when this process started, in unix seconds.
    """
    settings = planned.config
    times = {"imports_s": time.time() - began_at}
    torch.set_num_threads(settings.run.threads or world.cores(here))
    device = world.pick_device(here, settings.run.device)
    if device.type == "cpu":
        host_memory.keep_freed()
        if here.is_first and (warning := layout.why_no_gpu(here, settings.run.device)):
            streams.warn(warning)
    ranks = rendezvous.connect(
        here, device, settings.run_folder, settings.run.backend, settings.run.rendezvous_timeout_s
    )
    lease = make_on_rank0(ranks, lambda: _acquire(settings.run_folder, here))
    times["meet_s"] = time.time() - began_at - times["imports_s"]
    with lease or nullcontext():
        try:
            status = Attempt(planned, ranks, lease, flag, began_at, times).run()
            # Wait for rank 0, which has more to do at the end: `srun -K` ends all ranks once the first one has exited.
            run_on_rank0(ranks, lambda: None)
        except RuntimeError as error:
            if not rendezvous.is_broken_connection(error):
                raise
            lost = f"{here} lost its connection to another rank, which has ended: see its error"
            raise ConnectionError(lost) from error
    return status


def _acquire(folder: Path, here: World) -> Lease:
    run_folder.prepare(folder)
    try:
        return acquire(folder, world.job_start())
    except HeldError as error:
        if here.size > 1:
            raise
        named = "RANK and WORLD_SIZE" if here.launcher == "env" else f"the variables of {here.launcher}"
        why = "it has found no variables of srun, torchrun or mpirun" if here.launcher == "alone" else f"so say {named}"
        raise HeldError(
            f"{error}. This process is rank 0 of 1: {why}. If both are to train together, start both at once (srun "
            "--ntasks 2, torchrun --nproc-per-node 2 or, on two nodes, --nnodes 2, mpirun -n 2), and hand the "
            "variables of the launcher on into a container"
        ) from None


class Attempt:
    """One attempt at a run, from its lease to its exit status. Every rank has one."""

    def __init__(
        self,
        planned: Plan,
        ranks: Ranks,
        lease: Lease | None,
        flag: StopFlag,
        began_at: float,
        times: dict[str, float],
    ) -> None:
        """Build all that does not depend on the checkpoint. `lease` is None except on rank 0.

        `times`: how long the parts of the start took so far, in seconds, for the event "ready".
        """
        self.plan, self.ranks, self.lease, self.flag = planned, ranks, lease, flag
        self._began_at, self._times = began_at, times
        self.config, self.folder = planned.config, planned.config.run_folder
        self.number = run_on_rank0(ranks, lambda: lease.number if lease else 0)
        if not lease:
            exit_when_superseded(self.folder, self.number, instead=lambda: node_channel.wait_for_leader(ranks.channel))
        self.watchdog = Watchdog(self.config, ranks.world, self.number)
        self.stragglers = StragglerDetector(self.config.blame, ranks)
        self.engine = Engine(planned, ranks, self.stragglers.local)
        self.hosts = gather_to_rank0(ranks, socket.gethostname)  # [] on other ranks
        first = planned.sets[0]
        self.tokenizer = save_load.load(first.folder / "tokenizer", first.manifest.tokenizer["fingerprint"])
        self._evaluator = Evaluator(planned, ranks, self.tokenizer, self.engine.precision, self.engine.dtype)
        self._in_effect = in_effect.collect(planned, ranks, self.engine)
        groups, cpus_have_bf16 = self.engine.model.mesh is not None, self.engine.cpus_have_bf16
        unlike = parallel.drift(self.config, self._in_effect, groups, cpus_have_bf16)
        if unlike and ranks.world.is_first:
            streams.warn(unlike)
        self._has_config = False  # rank 0: whether config.toml is written, which other commands need
        self.state = TrainState()

    def run(self) -> int:
        """Train to the end, or until a stop is requested; return the exit status."""
        self.watchdog.alive()
        started_at = time.monotonic()
        self.engine.warm_up()
        self._times["warm_up_s"] = time.monotonic() - started_at
        started_at = time.monotonic()
        restorer = Restorer(self.plan, self.ranks, self.lease, self.engine, self.state, self.watchdog)
        resumed = restorer.resume(self._in_effect)
        self._times["load_s"] = time.monotonic() - started_at
        reporter = make_on_rank0(self.ranks, lambda: self._begin_to_report(resumed))
        checkpointer = Checkpointer(
            plan=self.plan, ranks=self.ranks, lease=self.lease, engine=self.engine, state=self.state, stop=self.flag,
            in_effect=self._in_effect, watchdog=self.watchdog, reporter=reporter,
        )  # fmt: skip
        if resumed.path:
            checkpointer.loaded(resumed.path)
        spikes = SpikeDetector(self.config.spike)
        rollback = Rollback(restorer, checkpointer, spikes, reporter)
        rollback.replay_losses()
        loop = Loop(
            plan=self.plan, ranks=self.ranks, number=self.number, engine=self.engine, state=self.state, stop=self.flag,
            evaluate=self._evaluate, sampler=self._sampler(), checkpointer=checkpointer, spikes=spikes,
            rollback=rollback, stragglers=self.stragglers, watchdog=self.watchdog, reporter=reporter,
            profiler=self._profiler(),
        )  # fmt: skip
        check = self._check_shards(reporter)
        status = exit_codes.FAILED
        try:
            gc.collect()
            gc.freeze()
            gc.disable()
            status = self._leave(loop, checkpointer, reporter)
        finally:
            gc.enable()
            self.watchdog.off()
            if check:
                check.close()
            if reporter:
                reporter.close(status)
        return status

    def _leave(self, loop: Loop, checkpointer: Checkpointer, reporter: Reporter | None) -> int:
        """Run the loop, save the last step, report how the attempt ended; return the exit status."""
        reason = loop.run()
        self.watchdog.alive()
        loop.trace(leaving=True)
        finished = loop.finished
        if reporter:
            reporter.event("stop", step=self.state.step, reason=reason.message or "finished")
        # A job that must stop has no time to remove old checkpoints. The next attempt removes them.
        problem = checkpointer.last_save(prune_old=finished)
        if problem:
            status, message = exit_codes.FAILED, f"the last checkpoint could not be written: {problem}"
        elif finished:
            status, message = exit_codes.FINISHED, "finished"
        else:
            status, message = exit_codes.AGAIN, reason.message
        if reporter:
            with self.watchdog.patience(LAST_REPORT_S):
                if not self._has_config:
                    self._keep_config()
                reporter.leave(status, message, self.state.step, saved=not problem)
        return status

    def _begin_to_report(self, resumed: Resumed) -> Reporter:
        """Write config.toml and the tokenizer, and report the start. Rank 0 only."""
        assert self.lease is not None
        # config.toml shows that a folder is a copy: it stays as it is until the copy has an id of its own.
        is_separate = False
        with only_informs("run.json"):
            if message := run_folder.separate(self.folder):
                streams.warn(message)
            is_separate = True
        self._has_config = not is_separate or self._keep_config()
        save_load.save(self.tokenizer, self.folder / "tokenizer")
        newest = records.events(self.folder, brief=True)
        saves = [event.get("seconds", 0.0) for event in newest if event["event"] == "save"]
        info = AttemptInfo(
            plan=self.plan, ranks=self.ranks, number=self.number, hosts=self.hosts,
            parameters=self.engine.model.gpt.parameter_count(), dtype=self.engine.dtype, began_at=self._began_at,
            step=self.state.step, pending=self.state.pending is not None,
        )  # fmt: skip
        reporter = Reporter(info, self.lease)
        for note in resumed.notes:
            reporter.say(note)
        if resumed.origin:
            reporter.say(resumed.origin)
            source = paths.absolute(self.config.run.init_from)
            reporter.event("init_from", words=resumed.origin, from_run=source, from_step=resumed.origin_step)
        for line in resumed.changes.lines:
            reporter.say(line)
        if resumed.changes.found:
            reporter.event("changed", **resumed.changes.fields)
        for seconds in saves[-RECENT_SAVES:]:
            self.flag.save_takes(seconds)
        reporter.event("ready", step=self.state.step, **self._times)
        return reporter

    def _keep_config(self) -> bool:
        return run_folder.keep_config(self.folder, self.number, sources.to_toml(self.config.from_anywhere))

    def _check_shards(self, reporter: Reporter | None) -> ShardCheck | None:
        """Compare the shards with their checksums while training runs. Rank 0 only, and only if steps are left."""
        rate = self.config.data.verify_mb_per_s
        if not reporter or not rate or self.state.step >= self.plan.total_steps:
            return None
        return ShardCheck(self.plan.sets, self.folder, rate, reporter.event)

    def _profiler(self) -> Profiler | None:
        if not self.ranks.world.is_first:
            return None
        return Profiler(self.folder, self.config.profiled_steps, self.ranks.device)

    def _sampler(self) -> Sampler:
        return Sampler(
            self.engine.model,
            self.ranks,
            self.tokenizer,
            self.config.sample,
            self.config.run.seed,
            self.engine.dtype,
        )

    def _evaluate(self, stopped: Callable[[], bool]) -> dict[str, float | None] | None:
        """Return the figures of an evaluation; None if `stopped` returned True before they were complete.

        A collective.
        """
        return self._evaluator.evaluate(self.engine.model, self.state.step, stopped)
