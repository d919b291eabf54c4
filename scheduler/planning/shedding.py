"""Shedding as one optimisation: which jobs give up which watts, so that the least value is lost.

A *unit* is what sheds as one: a whole-GPU job with its GPUs, or a shared GPU with all its holders. It may
have its full limits, limits lowered along the curve of its class, be frozen, or be stopped. Each option saves
watts (limits that fall, or that give way to what a frozen or an idle board draws) and costs value over the
shed's horizon; a stop costs what a restart loses, too. To cover a need at
the least cost is a knapsack of one option a unit; dynamic programming over the watts still to be covered is
exact to the watt for a node, and to 1/4096 of the need for a site.

What would not be saved is not counted: a full limit lies at the natural draw and a margin, so that a limit
above the draw saves nothing. Below the last point of a curve nothing is known. Such a limit, down to the
board's minimum, is an option only of who may not be stopped, and reckoned as all work lost: the lowest clock
of a V100 cost 82 % of the work for 70 % of the watts (arXiv 2605.26384, shipped): a stop was better.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scheduler.model.jobs import JobClass
from scheduler.model.power import Curve
from scheduler.planning.arrays import xp
from scheduler.planning.valuation import at_risk

# Steps along a curve, thousandths of the natural draw.
STEP_MILLI = 50
# Cells of the table: a node's watts one by one, a site's rounded so that what is chosen always covers.
CELLS_MAX = 4096
# Losing the margin above a natural draw that is a high quantile: the job is slowed now and then.
MARGIN_WORK_MILLI = 5
MILLI = 1000
_US_PER_HOUR = 3_600_000_000
# A unit's loss counts up to a million dollars: so the costs of 500,000 units fit an int64.
LOSS_MAX = 1 << 40
_RUNGS = 16
_GPUS_MAX = 16  # that tell victims of equal loss apart
_UNREACHABLE = 1 << 61

# Of equal losses the gentler rung. By class: lowered while work is nearly whole, lowered further, frozen,
# stopped.
_LOWERED_GENTLY = {JobClass.MINING: 1, JobClass.BATCH: 2, JobClass.TRAINING: 3, JobClass.INFERENCE: 12}
_LOWERED_FAR = {JobClass.MINING: 4, JobClass.BATCH: 4, JobClass.TRAINING: 9, JobClass.INFERENCE: 13}
_FROZEN = {JobClass.MINING: 5, JobClass.BATCH: 7, JobClass.TRAINING: 10, JobClass.INFERENCE: 14}
_STOPPED = {JobClass.MINING: 6, JobClass.BATCH: 8, JobClass.TRAINING: 11, JobClass.INFERENCE: 15}
_GENTLE_WORK_MILLI = 950


@dataclass(frozen=True, slots=True)
class Unit:
    """What sheds as one. Lists are by GPU of the unit, in whole watts."""

    gpus: tuple[int, ...]  # rows
    jobs: tuple[int, ...]  # numbers; the first one names the unit
    job_class: int  # of its highest job
    value: int  # micro-USD per hour, of all its jobs on all its GPUs
    loss: int  # what a stop loses at once, micro-USD
    may_stop: bool
    yields: bool  # whether it may be stopped once its minimum runtimes are over
    may_lower: bool
    full_w: tuple[int, ...]
    natural_w: tuple[int, ...]
    least_w: tuple[int, ...]  # the boards' minimum limits
    idle_w: tuple[int, ...]
    # What is lost, micro-USD, if its deadlines are missed; and by how much it may be delayed before they are.
    stake: int = 0
    slack_us: int = 0
    frozen_w: tuple[int, ...] = ()  # what the boards draw while all its jobs are frozen; empty: never
    may_freeze: bool = False  # now: who is only starting may be later


class Option(NamedTuple):
    """What a unit could do; `limits_w` by GPU, None = it stops; of a frozen one what its boards draw."""

    gain_w: int
    cost: int  # loss and, below it, the rung
    limits_w: tuple[int, ...] | None
    freezes: bool = False


class Chosen(NamedTuple):
    """An option for each unit, and what the last watt saved costs over the horizon, micro-USD."""

    options: list[Option]
    microusd_per_w: float


def options(unit: Unit, curve: Curve, horizon_us: int) -> list[Option]:
    """What the unit could do, full limits first, a stop last."""
    found = [Option(0, 0, unit.full_w)]
    if unit.may_lower:
        levels = [*range(MILLI, curve.least_milli, -STEP_MILLI), curve.least_milli]
        for level in levels:
            limits = _limits(unit, level)
            if sum(limits) < sum(found[-1].limits_w or ()):
                found.append(_lowered(unit, curve, limits, horizon_us))
        if not unit.may_stop and sum(unit.least_w) < sum(found[-1].limits_w or ()):
            cost = _cost(_delayed(unit, horizon_us, MILLI), _LOWERED_FAR, unit)
            found.append(Option(sum(unit.full_w) - sum(unit.least_w), cost, unit.least_w))
    if unit.may_freeze:
        found.append(_frozen(unit, _cost(_delayed(unit, horizon_us, MILLI), _FROZEN, unit)))
    if unit.may_stop:
        gain_w = sum(unit.full_w) - sum(unit.idle_w)
        cost = _cost(_delayed(unit, horizon_us, MILLI) + unit.loss, _STOPPED, unit)
        found.append(Option(max(0, gain_w), cost, None))
    return found


def least_slack_us(due: Iterable[tuple[int, int]]) -> int:
    """By how much all of these may be delayed, of pairs of what is at stake and by how much each may be."""
    return min((slack_us for stake, slack_us in due if stake), default=0)


def most(unit: Unit) -> Option:
    """The option that saves most, whatever it costs: what a floor is made of."""
    if unit.may_stop:
        return Option(max(0, sum(unit.full_w) - sum(unit.idle_w)), 0, None)
    limits = unit.least_w if unit.may_lower else unit.full_w
    lowered = Option(sum(unit.full_w) - sum(limits), 0, limits)
    frozen = _frozen(unit, 0) if unit.may_freeze else lowered
    return frozen if frozen.gain_w > lowered.gain_w else lowered


def as_victim(unit: Unit) -> Option:
    """A stop for somebody else's sake: least loss first, then the fewest GPUs."""
    saved_w = max(0, sum(unit.full_w) - sum(unit.idle_w))
    loss = min(LOSS_MAX, unit.loss + at_risk(unit.stake, unit.slack_us))
    return Option(saved_w, loss * _GPUS_MAX + min(len(unit.gpus), _GPUS_MAX), None)


def is_worth(unit: Unit, stopped: Iterable[Unit], horizon_us: int) -> bool:
    """Whether a start gains more over the horizon than the stops lose that it takes; of none always."""
    lost = [_delayed(each, horizon_us, MILLI) + each.loss for each in stopped]
    return not lost or _delayed(unit, horizon_us, MILLI) > sum(lost)


def cheapest(choices: Sequence[Sequence[Option]], need_w: int) -> Chosen | None:
    """One option of each unit, together saving the need at the least cost; None: it can't be covered.

    Of equal costs the earlier unit keeps more, and of its options the earlier.
    """
    if need_w <= 0:
        return Chosen([unit[0] for unit in choices], 0.0)
    if sum(max(option.gain_w for option in unit) for unit in choices) < need_w:
        return None
    quantum = -(-need_w // CELLS_MAX)
    cells = -(-need_w // quantum)
    wants = xp.arange(cells + 1, dtype=xp.int64)
    # best[k]: the least cost of saving at least k quanta with the units so far.
    best = xp.where(wants == 0, 0, _UNREACHABLE)
    picks: list[tuple[Any, list[int]]] = []
    for unit in reversed(choices):  # the last to be looked at keeps more
        gains = [option.gain_w // quantum for option in unit]
        left = xp.maximum(0, wants[None, :] - xp.asarray(gains, dtype=xp.int64)[:, None])
        costs = best[left] + xp.asarray([option.cost for option in unit], dtype=xp.int64)[:, None]
        pick = costs.argmin(axis=0)
        best = xp.minimum(xp.take_along_axis(costs, pick[None, :], axis=0)[0], _UNREACHABLE)
        picks.append((pick, gains))
    if int(best[cells]) >= _UNREACHABLE:
        return _all_that_helps(choices)  # rounding down lost what was just enough
    taken, at = [], cells
    for unit, (pick, gains) in zip(choices, reversed(picks), strict=True):
        place = int(pick[at])
        taken.append(unit[place])
        at = max(0, at - gains[place])
    return Chosen(taken, _slope(best, cells, quantum))


def given_back(units: Sequence[Unit], chosen: Sequence[Option], surplus_w: int) -> list[Option]:
    """The options with limits raised by what they save too much, the most valuable units first."""
    raised = list(chosen)
    order = sorted(range(len(units)), key=lambda i: (-units[i].value // len(units[i].gpus), units[i].jobs))
    for index in order:
        unit, limits = units[index], chosen[index].limits_w
        if limits is None or chosen[index].freezes or surplus_w <= 0 or limits == unit.full_w:
            continue
        # In equal parts: a gang goes as fast as its slowest GPU.
        each_w = surplus_w // len(limits)
        new = [min(full, limit + each_w) for limit, full in zip(limits, unit.full_w, strict=True)]
        surplus_w -= sum(new) - sum(limits)
        raised[index] = chosen[index]._replace(
            gain_w=sum(unit.full_w) - sum(new),
            limits_w=tuple(new),
        )
    return raised


def _limits(unit: Unit, level_milli: int) -> tuple[int, ...]:
    """The unit's limits at a part of its natural draw, within what the boards take."""
    return tuple(
        max(least, min(full, -(-natural * level_milli // MILLI)))
        for natural, least, full in zip(unit.natural_w, unit.least_w, unit.full_w, strict=True)
    )


def _lowered(unit: Unit, curve: Curve, limits: tuple[int, ...], horizon_us: int) -> Option:
    """What is lost to the full limits, which of a miner may lie below its natural draw already."""
    full_work = _work(unit, curve, unit.full_w)
    work = min(_work(unit, curve, limits), MILLI - MARGIN_WORK_MILLI)
    rungs = _LOWERED_GENTLY if work >= _GENTLE_WORK_MILLI else _LOWERED_FAR
    cost = _cost(_delayed(unit, horizon_us, max(0, full_work - work)), rungs, unit)
    return Option(sum(unit.full_w) - sum(limits), cost, limits)


def _frozen(unit: Unit, cost: int) -> Option:
    return Option(sum(unit.full_w) - sum(unit.frozen_w), cost, unit.frozen_w, freezes=True)


def _work(unit: Unit, curve: Curve, limits: tuple[int, ...]) -> int:
    """Thousandths: the gang goes as fast as its slowest GPU."""
    pairs = zip(limits, unit.natural_w, strict=True)
    return min(curve.work_milli(limit * MILLI // natural) for limit, natural in pairs)


def _delayed(unit: Unit, horizon_us: int, undone_milli: int) -> int:
    """Micro-USD lost where so much of the horizon's work is left undone: at least all that comes too late."""
    lost = max(0, unit.value) * undone_milli // MILLI * horizon_us // _US_PER_HOUR
    if undone_milli <= MARGIN_WORK_MILLI:  # within what a declared duration is good for
        return lost
    is_late = horizon_us * undone_milli // MILLI > unit.slack_us
    return max(lost, unit.stake) if is_late else lost


def _cost(loss: int, rungs: dict[JobClass, int], unit: Unit) -> int:
    return min(LOSS_MAX, loss) * _RUNGS + rungs[JobClass(unit.job_class)]


def _slope(best: Any, cells: int, quantum: int) -> float:
    """What the last watts cost each, over the last quarter of the need: options are steps, not a line."""
    back = max(1, cells // 4)
    return int(best[cells] - best[cells - back]) / _RUNGS / (back * quantum)


def _all_that_helps(choices: Sequence[Sequence[Option]]) -> Chosen:
    return Chosen([max(unit, key=lambda option: option.gain_w) for unit in choices], 0.0)
