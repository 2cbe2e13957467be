"""Opens the shards of a run to read them, as `hpcgpt eval` and `hpcgpt export` do, and not to train.

A plan (``hpcgpt.plan``) is checked for training on a number of ranks. What a run sends between GPUs, where it began,
where it is to go back to, how large its batch is, and which tasks it answers has nothing to do with reading its
windows, and may not even exist any more. No torch in here.
"""

from __future__ import annotations

from dataclasses import replace

from hpcgpt import plan
from hpcgpt.checkpoint.layout import State
from hpcgpt.config.options import Config, Parallel
from hpcgpt.errors import UserError
from hpcgpt.plan import Plan


def open_to_read(config: Config, state: State, validation: bool) -> Plan:
    """Open the data of the run with this checkpoint; its validation split only if `validation`.

    Raises:
        UserError: the shards are gone, are not those that it was trained on, or have no validation split.
    """
    settings = replace(
        config,
        run=replace(config.run, init_from=""),
        parallel=Parallel(),
        checkpoint=replace(config.checkpoint, step=0),
        eval=replace(config.eval, every=int(validation), tasks=(), tasks_every=0),
        train=replace(config.train, global_batch=1, micro_batch=1),
    )
    planned = plan.make(settings, world_size=1)
    planned = replace(planned, config=replace(planned.config, train=config.train))
    if changed := plan.changes(state.identity, planned.identity):
        raise UserError(f"it was trained with other data or settings: {'; '.join(changed)}")
    return planned
