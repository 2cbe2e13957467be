"""The learning-rate schedule: a pure function of the step and the configuration.

With p the peak (optim.lr), i the initial rate, m the minimum, w the warm-up steps and T all steps, the rate of step
g = 0 ... T-1 is::

    g < w       i + g (p - i) / w
    cosine      m + (p - m)/2 (1 + cos(pi (g - w)/(T - w)))
    linear      m + (p - m) (T - g)/(T - w)
    wsd         p, then linear to m over the last decay_fraction of T
    constant    p

Beyond T the rate is m; p for constant.
"""

from __future__ import annotations

import math

from hpcgpt.config.options import Config


def first_that_depends_on_length(total_steps: int, config: Config) -> int | None:
    """Return the first step (counted from 0) whose rate a longer run would not have; None if there is none.

    Up to there, a run of `total_steps` and one that was planned longer from the start are the same run.
    """
    schedule = config.schedule
    if schedule.kind == "constant":
        return None
    if schedule.kind == "wsd":
        return max(schedule.warmup_steps, total_steps - wsd_decay_steps(total_steps, config) + 1)
    return schedule.warmup_steps + 1  # at the end of the warm-up, the rate is the peak for any length


def wsd_decay_steps(total_steps: int, config: Config) -> int:
    """Return the number of steps at the end of which the rate of wsd decays."""
    return max(1, round(config.schedule.decay_fraction * total_steps))


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Return the learning rate of optimizer step number `step` (counted from 0) of `total_steps`."""
    schedule, peak = config.schedule, config.optim.lr
    low, warmup = schedule.min_lr, schedule.warmup_steps
    if step < warmup:
        return schedule.initial_lr + step * (peak - schedule.initial_lr) / warmup
    if schedule.kind == "constant":
        return peak
    if step >= total_steps:
        return low
    if schedule.kind == "cosine":
        progress = (step - warmup) / (total_steps - warmup)
        return low + (peak - low) / 2 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "linear":
        return low + (peak - low) * ((total_steps - step) / (total_steps - warmup))
    decay_steps = wsd_decay_steps(total_steps, config)
    left = total_steps - step
    return low + (peak - low) * min(1.0, left / decay_steps)
