"""What an hour of a job is worth where value decides: of the work that is left, and of not waiting.

Who has time loses little by waiting: he runs later, at what a GPU then goes for. Who would miss his deadline
loses all that he is still to be paid, less what the GPUs that the rest of his work takes would bring in
otherwise. Both are told for the next half hour, so that they compare; what GPUs go for is estimated from
who is there now.
"""

from typing import Any

import numpy as np

from scheduler.model.jobs import JobClass
from scheduler.model.snapshot import OPEN, UNKNOWN, WHOLE_MILLI, GpuColumns, JobColumns
from scheduler.planning.valuation import AHEAD_US, can_wait

# A job is never taken for nearer its end than this, nor for worth more than this: 1,000,000 USD per GPU-hour.
_LEFT_US_MIN = 60_000_000
_GROWN_VALUE_MAX = 1_000_000_000_000
# Later a GPU goes for this part of what it goes for now: of those who wait many have no time to wait so long.
# On made worlds like those of `tests/benchmarks/worlds32.py` all from 0.65 to 0.85 earn the same.
_LATER_PRICE_RATIO = 0.75
_HOUR_US = 3_600_000_000
_ROUNDING = 2  # micro-USD: a bar is rounded up, and so is its part of an hour


def value_of_what_is_left(jobs: JobColumns, whole_us: Any, now_us: int) -> Any:
    """Micro-USD per GPU-hour of the work that is left: who pays at the end is worth more, the less is left.

    Who will be done too late for his deadline earns nothing. Jobs whose duration nobody declared, and those
    that pay as they go, are worth what they say.
    """
    left_us = _left_us(jobs, now_us)
    grown = _clipped(jobs.value * (whole_us / np.maximum(left_us, _LEFT_US_MIN)))
    is_late = (jobs.deadline_us != UNKNOWN) & (now_us + left_us > jobs.deadline_us)
    return np.where(whole_us == UNKNOWN, jobs.value, np.where(is_late, 0, grown))


def value_of_not_waiting(
    jobs: JobColumns, whole_us: Any, now_us: int, gpus: GpuColumns, hysteresis_ratio: float
) -> Any:
    """Micro-USD per GPU-hour of the next half hour: what is left, and more of who would be late by waiting.

    So who can't wait goes before who can, if his work is worth more than GPUs go for later; but never before
    who is worth more than all that it pays to finish him, and never so that inference waits for him.
    """
    value = value_of_what_is_left(jobs, whole_us, now_us)
    left_us = _left_us(jobs, now_us)
    waits = can_wait(jobs.deadline_us - now_us - left_us, jobs.restart_loss_us)
    is_due = (whole_us != UNKNOWN) & (jobs.deadline_us != UNKNOWN) & ~waits
    urgent = is_due & (value > 0) & (left_us > AHEAD_US)
    if not urgent.any():
        return value
    later = _going_price(jobs, value, int((gpus.state == OPEN).sum())) * _LATER_PRICE_RATIO
    told = value + (value - later) * (left_us / AHEAD_US - 1.0)
    told = np.minimum(told, _below_inference(jobs, value, hysteresis_ratio))
    return np.where(urgent & (told > value), _clipped(told), value)


def _below_inference(jobs: JobColumns, value: Any, hysteresis_ratio: float) -> Any:
    """The most that each job may count for, so that all inference which outranks it by `value` still does."""
    # What hysteresis and restart ask for (`value_bar`).
    lead = 1.0 + np.maximum(hysteresis_ratio, jobs.restart_loss_us / _HOUR_US)
    serving = np.sort(value[jobs.job_class == int(JobClass.INFERENCE)])
    nearest = np.searchsorted(serving, value * lead + _ROUNDING)
    return np.append(serving, np.inf)[nearest] / lead - _ROUNDING


def _going_price(jobs: JobColumns, value: Any, gpus: int) -> int:
    """The value down to which all jobs but miners, the most valuable first, fill the GPUs; 0: they don't."""
    rows = np.flatnonzero((jobs.job_class != int(JobClass.MINING)) & (value > 0) & (jobs.gpus > 0))
    rows = rows[np.lexsort((jobs.number[rows], -value[rows]))]
    taken = np.cumsum(jobs.gpus[rows] * jobs.share_milli[rows])
    last = int(np.searchsorted(taken, gpus * WHOLE_MILLI, side="right"))
    return int(value[rows[last]]) if last < len(rows) else 0


def _left_us(jobs: JobColumns, now_us: int) -> Any:
    """How long each has still to run; of no meaning where nobody declared it."""
    ran_us = np.where(jobs.started_us == UNKNOWN, 0, now_us - jobs.started_us)
    return jobs.expected_us - np.maximum(ran_us, 0)


def _clipped(value: Any) -> Any:
    return np.rint(value).clip(-_GROWN_VALUE_MAX, _GROWN_VALUE_MAX).astype(np.int64)
