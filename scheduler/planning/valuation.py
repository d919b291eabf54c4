"""Rank: who goes before whom, and by how much a challenger must be worth more.

Under order "class": class, then effective priority (larger first), then value (larger first), then number.
Under order "value": value, then class, then priority, then number. Numbers are unique, so rank is total.
"""

from typing import Any

from scheduler.model.jobs import JobClass
from scheduler.model.policy import Order, Policy
from scheduler.model.snapshot import UNKNOWN, WHOLE_MILLI, JobColumns, Snapshot
from scheduler.planning.allocator import Request
from scheduler.planning.arrays import lists, some, xp

# Bits of a packed key: int64 without its sign.
_KEY_BITS = 63
# Below this many rows a sort of plain tuples is faster than packing (measured: they meet near 100).
_FEW_ROWS = 64
_MICRO = 1_000_000
_US_PER_MS = 1000
_MS_PER_HOUR = 3_600_000
_US_PER_MINUTE = 60_000_000
_MINUTES_PER_HOUR = 60
# What of a value (10,000 USD per GPU-hour) and of a restart loss (ten days) counts towards a bar, at most:
# their product stays inside int64, so that columns and single jobs give the same bar.
_BAR_VALUE_MAX = 10_000_000_000
_BAR_RESTART_MS_MAX = 864_000_000
# Who would be late by waiting so long can't wait; his value is told for so long ahead. On made worlds 10 to
# 20 minutes earn alike; with 30 too many hurry at once where nobody has much time.
WAIT_US = 900_000_000
AHEAD_US = 1_800_000_000
# Three years: more work is not lost at once, and times GPUs it stays inside int64.
_UNSAVED_US_MAX = 10**14


def first_ranked(rows: Any, count: int, order: Order, jobs: JobColumns) -> Any:
    """The `count` rows of the highest rank, first to last."""
    if order is Order.CLASS and len(rows) > max(count, _FEW_ROWS):
        rows = _without_later_classes(rows, count, jobs)
    by_rank = (jobs.job_class, jobs.priority, jobs.value, jobs.number)
    if len(rows) <= _FEW_ROWS:
        ranked = [rank_key(order, *key) for key in zip(*lists(by_rank, rows), strict=True)]
        return rows[sorted(range(len(ranked)), key=ranked.__getitem__)[:count]]
    job_class, priority, value, number = (column[rows] for column in by_rank)
    packed = packed_ranks(order, job_class, priority, value, number)
    if packed is None:
        keys = (-value, -priority, job_class) if order is Order.CLASS else (-priority, job_class, -value)
        return rows[xp.lexsort(xp.stack([number, *keys]))[:count]]
    if len(rows) > count:
        first = xp.argpartition(packed, count)[:count]
        rows, packed = rows[first], packed[first]
    return rows[packed.argsort(kind="stable")]


def _without_later_classes(rows: Any, count: int, jobs: JobColumns) -> Any:
    """The rows of the first classes that have so many together."""
    job_class = jobs.job_class[rows]
    up_to = xp.cumsum(xp.bincount(job_class, minlength=len(JobClass)))
    return rows[job_class <= (up_to < count).sum()]


def rank_key(
    order: Order, job_class: int, priority: int, value: int, number: int
) -> tuple[int, int, int, int]:
    """A key that is smaller for a job of higher rank."""
    if order is Order.CLASS:
        return (job_class, -priority, -value, number)
    return (-value, job_class, -priority, number)


def ranked_above(order: Order, jobs: JobColumns, row: int) -> Any:
    """Bool, shape (jobs,): the jobs of higher rank than the one at this row."""
    keys = [jobs.job_class, -jobs.priority, -jobs.value, jobs.number]
    if order is Order.VALUE:
        keys = [-jobs.value, jobs.job_class, -jobs.priority, jobs.number]
    above = xp.zeros(len(jobs), dtype=bool)
    for key in reversed(keys):
        above = (key < key[row]) | ((key == key[row]) & above)
    return above


def value_bar(value: int, restart_loss_us: int, policy: Policy) -> int:
    """The least value with which a challenger of equal priority displaces an incumbent of this value.

    The incumbent plus the larger of the policy's share of it and its restart loss spread over an hour;
    always more than the incumbent, so that equals never displace each other.
    """
    share = -(-min(abs(value), _BAR_VALUE_MAX) * round(policy.hysteresis_ratio * _MICRO) // _MICRO)
    restart_ms = min(restart_loss_us // _US_PER_MS, _BAR_RESTART_MS_MAX)
    restart = -(-min(max(value, 0), _BAR_VALUE_MAX) * restart_ms // _MS_PER_HOUR)
    return value + max(share, restart, 1)


def outranked(request: Request, order: Order, job_class: Any, priority: Any, bars: Any) -> Any:
    """Bool for each row: who ranks below the request by the hysteresis (`preemption.outranks`)."""
    lower = request.value >= bars
    if order is Order.CLASS:
        lower &= priority == request.priority
        lower |= priority < request.priority
        lower &= job_class == request.job_class
        lower |= job_class > request.job_class
    return lower


def value_bars(value: Any, restart_loss_us: Any, policy: Policy) -> Any:
    """`value_bar` of each row."""
    share = -(-xp.minimum(abs(value), _BAR_VALUE_MAX) * round(policy.hysteresis_ratio * _MICRO) // _MICRO)
    return value + xp.maximum(xp.maximum(share, restart_cost(value, restart_loss_us)), 1)


def restart_cost(value: Any, restart_loss_us: Any) -> Any:
    """What a restart of each row's job loses, spread over an hour; micro-USD per GPU-hour."""
    restart_ms = xp.minimum(restart_loss_us // _US_PER_MS, _BAR_RESTART_MS_MAX)
    return -(-xp.minimum(xp.maximum(value, 0), _BAR_VALUE_MAX) * restart_ms // _MS_PER_HOUR)


def packed_ranks(order: Order, job_class: Any, priority: Any, value: Any, number: Any) -> Any | None:
    """Ranks as one int64 each, the smaller the higher; shape (jobs,). None where the columns span too much.

    Taking the first 16 of 100,000 by it costs 2 ms; sorting them by four columns 16 ms.
    """
    top_priority, top_value, least_number = int(priority.max()), int(value.max()), int(number.min())
    priority_bits = (top_priority - int(priority.min())).bit_length()
    value_bits = (top_value - int(value.min())).bit_length()
    number_bits = (int(number.max()) - least_number).bit_length()
    class_bits = (len(JobClass) - 1).bit_length()
    if class_bits + priority_bits + value_bits + number_bits > _KEY_BITS:
        return None
    low_priority, low_value = top_priority - priority, top_value - value
    if order is Order.CLASS:
        head = ((job_class << priority_bits) | low_priority) << value_bits | low_value
    else:
        head = ((low_value << class_bits) | job_class) << priority_bits | low_priority
    return (head << number_bits) | (number - least_number)


def lost_work(snapshot: Snapshot, policy: Policy, rows: Any, started_us: Any, milli_gpus: Any) -> Any:
    """GPU-milliseconds that a stop of each row would lose: work since the last checkpoint, restart loss.

    Without a known checkpoint half the assumed interval, so that silence never protects.
    """
    jobs, now_us = snapshot.jobs, snapshot.now_us
    checkpoint_us = jobs.checkpoint_us[rows]
    saved_us = xp.maximum(0, now_us - xp.maximum(checkpoint_us, started_us))
    assumed_us = round(policy.assumed_checkpoint_interval_s * _MICRO) // 2
    unsaved_us = xp.minimum(xp.maximum(0, now_us - started_us), assumed_us)
    since_us = xp.minimum(xp.where(checkpoint_us == UNKNOWN, unsaved_us, saved_us), _UNSAVED_US_MAX)
    return (since_us + jobs.restart_loss_us[rows]) * milli_gpus // (WHOLE_MILLI * _US_PER_MS)


def value_of(value_microusd_per_hour: Any, gpu_ms: Any) -> Any:
    """What so many GPU-milliseconds are worth, rounded down; hours and the rest apart, to stay in int64."""
    hours, rest_ms = gpu_ms // _MS_PER_HOUR, gpu_ms % _MS_PER_HOUR
    return value_microusd_per_hour * hours + value_microusd_per_hour * rest_ms // _MS_PER_HOUR


def can_wait(slack_us: Any, restart_loss_us: Any) -> Any:
    """Whether each row's job would still be in time if it waited for WAIT_US.

    Of who waits as of who runs a restart is reckoned in: who is let in must be worth the same once he runs,
    or the next plan would stop him again, and so on without end.
    """
    return slack_us - restart_loss_us >= WAIT_US


def at_stake(snapshot: Snapshot, order: Order, rows: Any, milli_gpus: Any) -> tuple[Any, Any]:
    """What each row's job loses if it misses its deadline, micro-USD, and by how much it may be delayed, us.

    Nothing is at stake where nobody knows when it will be done, or where it is too late already. Where value
    decides, a job's value is that of what is left.
    """
    jobs, now_us = snapshot.jobs, snapshot.now_us
    deadline_us = jobs.deadline_us[rows]
    if not some(deadline_us != UNKNOWN):  # few jobs have one
        nothing = xp.zeros_like(deadline_us)
        return nothing, nothing
    expected_us, started_us = jobs.expected_us[rows], jobs.started_us[rows]
    left_us = xp.maximum(0, expected_us - xp.where(started_us == UNKNOWN, 0, now_us - started_us))
    slack_us = deadline_us - now_us - left_us
    dated = (expected_us != UNKNOWN) & (deadline_us != UNKNOWN) & (slack_us >= 0)
    paid_us = expected_us
    if order is Order.VALUE:  # the value of who can't wait holds all that he would lose by it
        waits = can_wait(slack_us, jobs.restart_loss_us[rows])
        paid_us = xp.where(waits, left_us, xp.minimum(left_us, AHEAD_US))
    hourly = xp.maximum(jobs.value[rows], 0) * milli_gpus // WHOLE_MILLI
    stake = value_of(hourly, xp.minimum(paid_us, _UNSAVED_US_MAX) // _US_PER_MS)
    return xp.where(dated, stake, 0), xp.where(dated, slack_us, 0)


def at_risk(stake: Any, slack_us: Any) -> Any:
    """What of a stake, micro-USD, a stop of unknown length is reckoned to lose.

    All of it where nothing may be delayed, half of it where an hour may be, a third with two.
    """
    return stake * _MINUTES_PER_HOUR // (_MINUTES_PER_HOUR + slack_us // _US_PER_MINUTE)
