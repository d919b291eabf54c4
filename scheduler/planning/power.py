"""The power stage: limits, sheds and starts, so that what may be drawn fits the budget at every step.

Each board counts with what it may draw: an occupied one with its limit, an empty one with its idle draw. A
full limit is the job's natural draw and a margin, within what the board takes; of a miner that earns most at
less, that. Two sums matter. *Now*: limits
as they are in force, and whoever stops still has his. *Planned*: limits as this plan sets them, and whoever
stops has gone. Nothing starts and no limit rises unless *now* has room; jobs are stopped until *planned* has.

A shed looks at all jobs from the start, as if nobody had been lowered, so it finds the same answer in each
plan (R7). A start must not undo that: it is let in only if the same optimum, with it, stops nobody and (where
class decides) lowers nobody of a higher one; also once minimum runtimes are over, or it would be stopped as
soon as it may be. Where it doesn't fit so, jobs that it outranks are stopped for it, of least loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from scheduler.model.actions import RequeueJob, ResumeJob, SetPowerLimit, SuspendJob
from scheduler.model.jobs import JobClass
from scheduler.model.policy import Order, Policy
from scheduler.model.power import UNLIMITED_W, PowerOutlook
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import (
    PENDING,
    PREEMPTING,
    STOPPING,
    UNKNOWN,
    WHOLE_MILLI,
    JobColumns,
    PowerColumns,
    Snapshot,
)
from scheduler.planning.allocator import Request
from scheduler.planning.arrays import lists, rows_where, xp
from scheduler.planning.freezing import Freezing
from scheduler.planning.shedding import (
    MILLI,
    Chosen,
    Option,
    Unit,
    as_victim,
    cheapest,
    given_back,
    is_worth,
    least_slack_us,
    most,
    options,
)
from scheduler.planning.valuation import at_stake, lost_work, value_of

# Starts that are refused after a close look, in one plan; the rest wait unseen until the next.
REFUSALS_MAX = 32
# A limit that can't rise as far as it should does so by this at least: not every watt is worth a call.
RISE_W_MIN = 10
_US_PER_MS = 1000
_US_PER_HOUR = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Admission:
    """A start that fits the budget. `starts_now`: what it relies on has fallen already."""

    starts_now: bool
    victims: tuple[int, ...] = ()  # numbers of the jobs that have to stop for its watts


def shed_grace_us(snapshot: Snapshot, policy: Policy) -> int:
    """The longest grace of those whom a shed to the snapshot's budget would stop; 0 where it stops nobody."""
    jobs = snapshot.jobs
    stopped = [shed.job for shed in PowerStage(snapshot, policy, frozenset()).sheds]
    graces = jobs.grace_us[xp.isin(jobs.number, xp.asarray(stopped, dtype=xp.int64))]
    return int(graces.max()) if len(graces) else 0


# Of a start that no budget is about.
UNBOUNDED = Admission(starts_now=True)


class PowerStage:
    """The watts of one plan. `stopping`: jobs that this plan stops for other reasons.

    Columns are by GPU row, in whole watts of boards.
    """

    def __init__(self, snapshot: Snapshot, policy: Policy, stopping: frozenset[int]) -> None:
        assert snapshot.power is not None
        self._snapshot = snapshot
        self._policy = policy
        self._power: PowerColumns = snapshot.power
        self._refusals = 0
        # By number of a refused job: what it would draw beyond the budget.
        self.lacking_w: dict[int, int] = {}
        self._shadow_microusd_per_wh = 0.0
        self.freezing = Freezing(snapshot, snapshot.power)
        self._in_force_w: Any  # what each board may draw now
        self._look(stopping)
        self.sheds: list[RequeueJob] = []
        need_w = self._full_sum_w - self._power.budget_w
        if need_w > 0:
            self._shed(need_w)
        self._in_force_w = self.freezing.resume(self._units, self._in_force_w)

    def _look(self, stopping: frozenset[int]) -> None:
        """Tell boards that stay occupied from those that come free, and what each counts for."""
        snapshot, power = self._snapshot, self._power
        jobs, holdings, count = snapshot.jobs, snapshot.holdings, len(snapshot.gpus)
        stays = (jobs.state != PENDING) & (jobs.state != PREEMPTING) & (jobs.state != STOPPING)
        if stopping:
            stays &= ~xp.isin(jobs.number, xp.asarray(sorted(stopping), dtype=xp.int64))
        held = rows_where(holdings.job != UNKNOWN)
        held = held[stays[holdings.job[held]]]
        self._gpu, self._job, self._milli = holdings.gpu[held], holdings.job[held], holdings.share_milli[held]
        # Occupied by who stays, or by who starts; coming free; to be had by who waits for it.
        self.stays = xp.bincount(self._gpu, minlength=count) > 0
        self.leaves = (xp.bincount(holdings.gpu, minlength=count) > 0) & ~self.stays
        # Of those that come free, where somebody who was told to go still runs.
        told = rows_where(holdings.job != UNKNOWN)
        told = told[~stays[holdings.job[told]]]
        self._goes = (xp.bincount(holdings.gpu[told], minlength=count) > 0) & self.leaves
        self._claimed = xp.zeros(count, dtype=bool)
        self._begun = xp.zeros(count, dtype=bool)  # by a start of this plan
        # By number, in rank: admitted and free, but for the watts of now.
        self._lingering: dict[int, Unit] = {}
        natural_w = power.natural_w[self._job]
        most_w = power.limit_w_max[self._gpu]
        natural_w = xp.where(natural_w == UNKNOWN, most_w, xp.minimum(natural_w, most_w))
        self._natural_w = xp.bincount(self._gpu, weights=natural_w, minlength=count).astype(xp.int64)
        self._full_w = self._at_best(self._full(self._natural_w))
        self._planned_w = xp.where(self.stays, self._full_w, power.idle_w)
        empty_w = xp.maximum(power.idle_w, power.measured_w)
        occupied = self.stays | self.leaves
        self._in_force_w = xp.where(occupied, power.limit_w, empty_w)
        # Of boards that came free a moment ago nobody has seen yet that their draw falls: a start, whose draw
        # rises no faster, may rely on it, a limit of who draws already may not.
        unseen = ~occupied & (power.measured_w == UNKNOWN)
        self._unseen_w = xp.where(unseen, xp.maximum(0, power.limit_w - power.idle_w), 0)
        self._frozen_w, self._is_frozen = self.freezing.boards(self._gpu, self._job, self._full_w)
        frozen_w = xp.minimum(self._in_force_w, self._frozen_w)
        self._in_force_w = xp.where(self._is_frozen, frozen_w, self._in_force_w)
        self._may_stop, self._may_lower = self._freedoms()
        stuck = xp.bincount(self._gpu[~self._may_stop[self._job]], minlength=count) > 0
        firm = xp.bincount(self._gpu[~self._may_lower[self._job]], minlength=count) > 0
        least_w = xp.where(firm, self._full_w, xp.minimum(power.limit_w_min, self._full_w))
        self._floor_w = xp.where(self.stays & stuck, least_w, power.idle_w)

    def _freedoms(self) -> tuple[Any, Any]:
        """Bool, shape (jobs,) each: whom a shed may stop, and whose limit it may lower."""
        jobs, now_us = self._snapshot.jobs, self._snapshot.now_us
        started_us = xp.where(jobs.started_us == UNKNOWN, now_us, jobs.started_us)
        over = started_us + jobs.min_runtime_us <= now_us
        if self._power.is_emergency:
            over |= True
        may_lower = xp.ones(len(jobs), dtype=bool)
        if not self._power.limits_inference:
            may_lower = jobs.job_class != int(JobClass.INFERENCE)
        return jobs.preemptible & over, may_lower

    def _full(self, natural_w: Any) -> Any:
        """Limits with which nobody is held back."""
        power = self._power
        wanted = -(-natural_w * (MILLI + power.margin_milli) // MILLI)
        return xp.clip(wanted, power.limit_w_min, power.limit_w_max)

    def _at_best(self, full_w: Any) -> Any:
        """The limits, lower where all that is on a board is a miner that earns most at less."""
        power, count = self._power, len(full_w)
        best_w = power.best_w[self._job]
        known = best_w != UNKNOWN
        others = xp.bincount(self._gpu[~known], minlength=count) > 0
        sums_w = xp.bincount(self._gpu[known], weights=best_w[known], minlength=count).astype(xp.int64)
        at_best = (sums_w > 0) & ~others
        return xp.where(at_best, xp.minimum(full_w, xp.maximum(sums_w, power.limit_w_min)), full_w)

    @property
    def _full_sum_w(self) -> int:
        """What all boards would draw if nobody were lowered."""
        return int(self._unlowered_w.sum())

    @property
    def _unlowered_w(self) -> Any:
        return xp.where(self.stays | self._claimed, self._full_w, self._power.idle_w)

    # A shed -------------------------------------------------------------------------------------

    def _shed(self, need_w: int) -> None:
        """Lower limits, and stop whom it takes, until the plan fits the budget; or do what can be done."""
        units = self._units
        chosen = self._optimum(units, need_w) or Chosen([most(unit) for unit in units], 0.0)
        self._shadow_microusd_per_wh = chosen.microusd_per_w * _US_PER_HOUR / max(1, self._power.horizon_us)
        self._set(units, chosen.options)
        stopped = [
            unit for unit, option in zip(units, chosen.options, strict=True) if option.limits_w is None
        ]
        self._drop(stopped)
        self.sheds = [RequeueJob(number, self._reason) for unit in stopped for number in unit.jobs]

    @property
    def _reason(self) -> Reason:
        return Reason.SHED_IN_EMERGENCY if self._power.is_emergency else Reason.SHED_FOR_POWER

    def freezes(self) -> list[SuspendJob | ResumeJob]:
        """Who is to be frozen from now on, and who is to run again, of those that this plan lets be."""
        return self.freezing.actions(self._units, self._reason)

    @cached_property
    def _units(self) -> list[Unit]:
        """Who sheds as one, by the number of the first job; those who wait for a start join."""
        jobs = self._snapshot.jobs
        rows = xp.unique(self._job)
        started_us = xp.where(jobs.started_us[rows] == UNKNOWN, self._snapshot.now_us, jobs.started_us[rows])
        place = xp.searchsorted(rows, self._job)
        milli = xp.bincount(place, weights=self._milli, minlength=len(rows)).astype(xp.int64)
        lost = lost_work(self._snapshot, self._policy, rows, started_us, milli)
        value = xp.maximum(jobs.value[rows], 0)
        hourly = value * milli // WHOLE_MILLI
        stake, slack_us = at_stake(self._snapshot, self._policy.order, rows, milli)
        freezing = self.freezing
        flags = (self._may_stop, jobs.preemptible, self._may_lower, freezing.yields, freezing.may)
        columns = (jobs.number, jobs.job_class, *flags)
        money = (hourly, value_of(value, lost), stake, slack_us)
        facts = zip(rows.tolist(), *lists(columns, rows), *(each.tolist() for each in money), strict=True)
        by_job = {row: tuple(rest) for row, *rest in facts}
        gpus_of: dict[int, list[int]] = {}
        holders: dict[int, list[int]] = {}
        for gpu, job in zip(self._gpu.tolist(), self._job.tolist(), strict=True):
            gpus_of.setdefault(job, []).append(gpu)
            holders.setdefault(gpu, []).append(job)
        groups = {tuple(sorted(holders[gpus[0]])): gpus for gpus in gpus_of.values()}
        units = [self._made_unit(tuple(by_job[job] for job in group), gpus) for group, gpus in groups.items()]
        return sorted(units, key=lambda unit: unit.jobs)

    def _made_unit(self, facts: Sequence[Any], gpus: Sequence[int]) -> Unit:
        """A unit on these GPUs of jobs: number, class, five flags as in the `Unit`, then money and slack."""
        uuid = self._snapshot.gpus.uuid
        rows = tuple(sorted(gpus, key=lambda gpu: uuid[gpu]))
        power = self._power
        numbers, classes, *flags, values, losses, stakes, slacks = zip(*sorted(facts), strict=True)
        may_stop, yields, may_lower, freezes, may_freeze = map(all, flags)
        watts = (self._full_w, self._natural_w, power.limit_w_min, power.idle_w, self._frozen_w)
        full, natural, least, idle, frozen = (tuple(int(column[gpu]) for gpu in rows) for column in watts)
        return Unit(
            gpus=rows,
            jobs=numbers,
            job_class=min(classes),
            value=sum(values),
            loss=sum(losses),
            may_stop=may_stop,
            yields=yields,
            may_lower=may_lower,
            full_w=full,
            natural_w=tuple(max(1, watts) for watts in natural),
            least_w=tuple(map(min, least, full)),
            idle_w=idle,
            stake=sum(stakes),
            slack_us=least_slack_us(zip(stakes, slacks, strict=True)),
            frozen_w=frozen if freezes else (),
            may_freeze=may_freeze,
        )

    def _optimum(self, units: Sequence[Unit], need_w: int, *, lasts: bool = False) -> Chosen | None:
        """The least loss that saves so many watts, and no limit lower than it takes.

        `lasts`: also once minimum runtimes are over, and who is held far down now would rather be stopped.
        """
        chosen = cheapest([self._options(unit, lasts=lasts) for unit in units], need_w)
        if chosen is None:
            return None
        surplus_w = sum(option.gain_w for option in chosen.options) - max(0, need_w)
        return chosen._replace(options=given_back(units, chosen.options, surplus_w))

    def _options(self, unit: Unit, *, lasts: bool = False) -> list[Option]:
        if lasts and unit.yields and not unit.may_stop:
            unit = replace(unit, may_stop=True)
        if lasts and unit.frozen_w and not unit.may_freeze:
            unit = replace(unit, may_freeze=True)
        return options(unit, self._power.curves[unit.job_class], self._power.horizon_us)

    def _set(self, units: Sequence[Unit], chosen: Sequence[Option]) -> None:
        self.freezing.choose(u for u, option in zip(units, chosen, strict=True) if option.freezes)
        for unit, option in zip(units, chosen, strict=True):
            for gpu, watts in zip(unit.gpus, option.limits_w or unit.idle_w, strict=True):
                self._planned_w[gpu] = watts

    def _drop(self, stopped: Sequence[Unit]) -> None:
        """Let these boards come free."""
        if not stopped:
            return
        for unit in stopped:
            for gpu in unit.gpus:
                self.stays[gpu], self.leaves[gpu], self._goes[gpu] = False, True, True
                if self._is_frozen[gpu]:  # the notice wakes it
                    self._in_force_w[gpu] = self._power.limit_w[gpu]
                self._planned_w[gpu] = self._floor_w[gpu] = self._power.idle_w[gpu]
                self._natural_w[gpu] = 0
        gone = {unit.jobs for unit in stopped}
        self._units = [unit for unit in self._units if unit.jobs not in gone]

    # Starts -------------------------------------------------------------------------------------

    def admit(
        self,
        request: Request,
        row: int,
        gpus: tuple[int, ...],
        victims: tuple[int, ...],
        may_displace: Callable[[], set[int]],
    ) -> Admission | None:
        """How a job fits that is to have these GPUs once its victims have gone; None: it doesn't.

        `may_displace`: numbers of the jobs that it may stop. What fits is taken.
        """
        leaving = [unit for unit in self._units if not set(unit.jobs).isdisjoint(victims)]
        beside = [each for each in self._units if each not in leaving and not set(each.gpus).isdisjoint(gpus)]
        others = [each for each in self._units if each not in leaving and each not in beside]
        unit = self._unit_of(request, row, gpus, beside)
        beyond_w = self._beyond_promise_w(request, unit, leaving)
        if beyond_w > 0:
            self.lacking_w[request.number] = beyond_w
            return None
        need_w = self._need_w(unit, leaving)
        if need_w <= 0:
            return self._take(request.number, unit, [*others, unit], None, leaving, [])
        by_value = self._policy.order is Order.VALUE
        if self._refusals < REFUSALS_MAX:
            for stopped in self._ways(unit, request, others, need_w, may_displace):
                if by_value and not is_worth(unit, stopped, self._power.horizon_us):
                    continue  # a shed must not undo it
                rest = [*(each for each in others if each not in stopped), unit]
                chosen = self._optimum(rest, self._need_w(unit, [*leaving, *stopped]), lasts=True)
                if chosen is not None and self._harms_nobody(request, rest, chosen.options):
                    return self._take(request.number, unit, rest, chosen.options, leaving, stopped)
        self._refusals += 1
        self.lacking_w[request.number] = need_w
        density = unit.value / max(1, sum(unit.full_w) - sum(unit.idle_w))
        self._shadow_microusd_per_wh = max(self._shadow_microusd_per_wh, density)
        return None

    def takes_less(self, row: int, gpus: Any) -> Any:
        """Bool, shape (gpus,): the boards on which the job at this row adds less than on one of these."""
        own_w, alone_w = self._alone(row)
        shared = self.stays | self._claimed
        full_w = xp.where(shared, self._full(self._natural_w + own_w), alone_w)
        more_w = full_w - self._unlowered_w
        return more_w < more_w[gpus].max()

    def _alone(self, row: int) -> tuple[Any, Any]:
        """By board, what the job at this row draws there by nature, and its full limit with nobody beside."""
        power = self._power
        natural_w, best_w = int(power.natural_w[row]), int(power.best_w[row])
        most_w = power.limit_w_max
        own_w = most_w if natural_w == UNKNOWN else xp.minimum(most_w, natural_w)
        full_w = self._full(own_w)
        if best_w != UNKNOWN:
            full_w = xp.minimum(full_w, xp.maximum(best_w, power.limit_w_min))
        return own_w, full_w

    def no_better(self, jobs: JobColumns, row: int) -> Any:
        """Bool, shape (jobs,): who draws as much as the job at this row, and may do and is worth no more."""
        natural_w = self._power.natural_w
        alike = (natural_w == UNKNOWN) | ((natural_w >= natural_w[row]) & (natural_w[row] != UNKNOWN))
        for name in ("gpus", "share_milli", "gpu_memory_mib", "models", "preemptible", "restart_loss_us"):
            column = getattr(jobs, name)
            alike &= column == column[row]
        for name in ("job_class", "min_runtime_us", "grace_us", "cpus", "memory_mib"):
            column = getattr(jobs, name)
            alike &= column >= column[row]
        return alike & (jobs.value <= jobs.value[row])

    def _unit_of(self, request: Request, row: int, gpus: tuple[int, ...], beside: Sequence[Unit]) -> Unit:
        """The job as a unit; a share as one with those who share the GPU already."""
        power = self._power
        rows = xp.asarray(gpus, dtype=xp.int64)
        each_w, full_w = self._alone(row)
        if beside:
            each_w = each_w + sum(unit.natural_w[0] for unit in beside)
            full_w = self._full(each_w)
        each_w, full_w = each_w[rows].tolist(), full_w[rows].tolist()
        least_w, idle_w = power.limit_w_min[rows].tolist(), power.idle_w[rows].tolist()
        gpu_milli = request.share_milli * len(gpus)
        lost_gpu_ms = request.restart_loss_us // _US_PER_MS * gpu_milli // WHOLE_MILLI
        row_only = xp.asarray([row], dtype=xp.int64)
        own = [int(each[0]) for each in at_stake(self._snapshot, self._policy.order, row_only, gpu_milli)]
        due = [(own[0], own[1]), *((unit.stake, unit.slack_us) for unit in beside)]
        made = Unit(
            gpus=gpus,
            jobs=tuple(sorted([request.number, *(number for unit in beside for number in unit.jobs)])),
            job_class=min([request.job_class, *(unit.job_class for unit in beside)]),
            value=max(request.value, 0) * gpu_milli // WHOLE_MILLI + sum(unit.value for unit in beside),
            loss=int(value_of(max(request.value, 0), lost_gpu_ms)) + sum(unit.loss for unit in beside),
            may_stop=bool(self._may_stop[row]) and all(unit.may_stop for unit in beside),
            yields=bool(self._snapshot.jobs.preemptible[row]) and all(unit.yields for unit in beside),
            may_lower=bool(self._may_lower[row]) and all(unit.may_lower for unit in beside),
            full_w=tuple(full_w),
            natural_w=tuple(max(1, watts) for watts in each_w),
            least_w=tuple(map(min, least_w, full_w)),
            idle_w=tuple(idle_w),
            stake=sum(stake for stake, _ in due),
            slack_us=least_slack_us(due),
        )
        return replace(made, frozen_w=self.freezing.of_start(row, made, beside))

    def _ways(
        self,
        unit: Unit,
        request: Request,
        others: Sequence[Unit],
        need_w: int,
        may_displace: Callable[[], set[int]],
    ) -> Iterator[list[Unit]]:
        """Whom to stop for it: nobody; as few as do with others lowered; so many that nobody is lowered."""
        yield []
        numbers = may_displace()
        stoppable = [numbers.issuperset(each.jobs) for each in others]
        if not any(stoppable):
            return
        for lowers in (True, False):
            choices = []
            for each, stops in zip(others, stoppable, strict=True):
                may_lower = lowers and self._may_slow(request, each)
                choices.append([*self._kept(each, may_lower), *([as_victim(each)] if stops else ())])
            chosen = cheapest([*choices, self._kept(unit, lowers)], need_w)
            if chosen is not None:
                pairs = zip(others, chosen.options[:-1], strict=True)
                yield [each for each, option in pairs if option.limits_w is None]

    def _kept(self, unit: Unit, lowers: bool) -> list[Option]:
        """What may be done with a unit short of a stop; here it costs nothing, as victims are what counts."""
        found = [option._replace(cost=0) for option in self._options(unit, lasts=True) if option.limits_w]
        if self.freezing.is_chosen(unit):
            return [option for option in found if option.freezes]
        kept = [option for option in found if not option.freezes]
        return kept if lowers else kept[:1]

    def _harms_nobody(self, request: Request, units: Sequence[Unit], chosen: Sequence[Option]) -> bool:
        """Nobody is stopped or frozen, and nobody who is not to be slowed for it is lowered further."""
        return all(
            option.limits_w is not None
            and (not option.freezes or self.freezing.is_chosen(each))
            and (
                self._may_slow(request, each)
                or all(
                    watts >= int(self._planned_w[gpu])
                    for gpu, watts in zip(each.gpus, option.limits_w, strict=True)
                )
            )
            for each, option in zip(units, chosen, strict=True)
        )

    def _may_slow(self, request: Request, unit: Unit) -> bool:
        """Whether a start may take watts of who goes on; where value decides the optimum has weighed it."""
        return self._policy.order is Order.VALUE or unit.job_class >= request.job_class

    def _beyond_promise_w(self, request: Request, unit: Unit, leaving: Sequence[Unit]) -> int:
        """How far above an accepted event the floor would lie with this job; 0 or less: it can be met."""
        power = self._power
        if power.promised_w is None:
            return 0
        free_us = self._snapshot.now_us + request.min_runtime_us + request.grace_us
        stops = unit.may_stop and free_us <= power.promised_us
        lowest = unit.idle_w if stops else unit.least_w if unit.may_lower else unit.full_w
        return self._with(self._floor_w, unit, lowest, leaving) - power.promised_w

    def _need_w(self, unit: Unit, gone: Sequence[Unit]) -> int:
        """What this one and all that stay, nobody lowered, would draw beyond the budget."""
        return self._with(self._unlowered_w, unit, unit.full_w, gone) - self._power.budget_w

    def _with(self, column: Any, unit: Unit, watts: Sequence[int], gone: Sequence[Unit]) -> int:
        """The sum of the column with these watts for the unit, and idle draw where others have gone."""
        column = column.copy()
        for each in gone:
            column[xp.asarray(each.gpus, dtype=xp.int64)] = xp.asarray(each.idle_w, dtype=xp.int64)
        column[xp.asarray(unit.gpus, dtype=xp.int64)] = xp.asarray(watts, dtype=xp.int64)
        return int(column.sum())

    def _take(
        self,
        number: int,
        unit: Unit,
        units: list[Unit],
        chosen: Sequence[Option] | None,
        leaving: list[Unit],
        stopped: list[Unit],
    ) -> Admission:
        """Count the job in; it starts now if what may be drawn now leaves room for it."""
        power = self._power
        for gpu, full, natural in zip(unit.gpus, unit.full_w, unit.natural_w, strict=True):
            self._full_w[gpu] = self._planned_w[gpu] = full
            self._natural_w[gpu] = natural
        if chosen is not None:
            self._set(units, chosen)
        # Who started before in this plan may have been lowered for this one: nobody has set its limit yet.
        begun_w = xp.maximum(power.limit_w, self._planned_w)
        self._in_force_w = xp.where(self._begun, xp.minimum(self._in_force_w, begun_w), self._in_force_w)
        self._drop([*leaving, *stopped])
        self._units = sorted(units, key=lambda each: each.jobs)
        is_free = True
        for gpu, least, idle in zip(unit.gpus, unit.least_w, unit.idle_w, strict=True):
            is_free &= not bool(self.leaves[gpu])
            self._claimed[gpu] = True
            self._floor_w[gpu] = idle if unit.may_stop else least if unit.may_lower else self._full_w[gpu]
        # Without a budget a share need not wait for a neighbour to leave.
        may_begin = (is_free or power.budget_w >= UNLIMITED_W) and not stopped
        # Nobody takes the watts that a higher one waits for: the next plan would have him placed otherwise.
        starts = may_begin and not self._lingering and self._begins(unit)
        if may_begin and not starts:
            self._lingering[number] = unit
        return Admission(starts, tuple(number for each in stopped for number in each.jobs))

    def begin_late(self) -> list[int]:
        """The admitted jobs that begin now after all: who was let in after them has lowered others."""
        begun = list(takewhile(lambda number: self._begins(self._lingering[number]), self._lingering))
        for number in begun:
            del self._lingering[number]
        return begun

    def _begins(self, unit: Unit) -> bool:
        """Whether what may be drawn now leaves room for it; then it is counted."""
        # While draws are on their way to a lower budget no limit rises for it either.
        wanted_w = self._power.limit_w if self._power.lead_milli else self._planned_w
        in_force_w = [max(int(self._power.limit_w[gpu]), int(wanted_w[gpu])) for gpu in unit.gpus]
        if self._with(self._in_force_w, unit, in_force_w, ()) > self._power.budget_w:
            return False
        for gpu, watts in zip(unit.gpus, in_force_w, strict=True):
            self._in_force_w[gpu], self.stays[gpu], self._begun[gpu] = watts, not bool(self.leaves[gpu]), True
        return True

    # What follows -------------------------------------------------------------------------------

    def limits(self) -> list[SetPowerLimit]:
        """The limits to set: those that fall first, those that rise as far as there is room now."""
        power = self._power
        is_over = int(self._in_force_w.sum()) > power.budget_w
        wanted_w = xp.where(self.stays | self._claimed & ~self.leaves, self._ahead_w, power.limit_w)
        if is_over:
            # Whoever goes is held down until he has gone; in an emergency everybody is until it is met.
            held_w = xp.minimum(power.limit_w, power.limit_w_min)
            wanted_w = xp.where(self._goes, held_w, wanted_w)
            if power.is_emergency:
                firm = xp.bincount(self._gpu[~self._may_lower[self._job]], minlength=len(wanted_w)) > 0
                wanted_w = xp.where(self.stays & ~firm, xp.minimum(wanted_w, power.limit_w_min), wanted_w)
        for unit in filter(self.freezing.stands_still, self._units):
            rows = xp.asarray(unit.gpus, dtype=xp.int64)
            least_w = power.limit_w_min if unit.may_lower else power.limit_w
            wanted_w[rows] = xp.minimum(power.limit_w[rows], least_w[rows])
        falls = rows_where(wanted_w < power.limit_w).tolist()
        orders = [self._order(gpu, int(wanted_w[gpu])) for gpu in falls]
        worth = {gpu: unit.value // len(unit.gpus) for unit in self._units for gpu in unit.gpus}
        for gpu in sorted(
            rows_where(wanted_w > power.limit_w).tolist(),
            key=lambda gpu: (-worth.get(gpu, 0), self._uuid(gpu)),
        ):
            if not bool(self.stays[gpu]):
                orders.append(self._order(gpu, int(wanted_w[gpu])))  # nobody draws there yet
                continue
            if power.lead_milli:
                continue  # what may be drawn fits, but draws are still on their way there
            more_w = max(0, int(wanted_w[gpu] - self._in_force_w[gpu]))
            unseen_w = int(self._unseen_w[~self._begun].sum())
            room_w = power.budget_w - int(self._in_force_w.sum()) - unseen_w
            if more_w > max(0, room_w):  # of who begins it is counted
                if room_w < RISE_W_MIN:
                    continue
                more_w = room_w
            self._in_force_w[gpu] += more_w
            orders.append(self._order(gpu, int(self._in_force_w[gpu])))
        return sorted(orders, key=lambda order: (order.reason is Reason.POWER_LIMIT_RAISED, order.gpu))

    @property
    def _ahead_w(self) -> Any:
        """What is planned; where it binds less, while draws fall to a lower budget: they only near it."""
        power = self._power
        if not power.lead_milli:
            return self._planned_w
        binds = self.stays & (self._planned_w < self._natural_w)
        least_w = xp.minimum(power.limit_w_min, self._planned_w)
        lower_w = xp.maximum(least_w, self._planned_w * (MILLI - power.lead_milli) // MILLI)
        return xp.where(binds, lower_w, self._planned_w)

    def _order(self, gpu: int, watts: int) -> SetPowerLimit:
        rises = watts > int(self._power.limit_w[gpu])
        reason = Reason.POWER_LIMIT_RAISED if rises else Reason.POWER_LIMIT_LOWERED
        return SetPowerLimit(self._uuid(gpu), watts, reason)

    def _uuid(self, gpu: int) -> str:
        return self._snapshot.gpus.uuid[gpu]

    @property
    def outlook(self) -> PowerOutlook:
        """What the plan reckons with, after all that it orders."""
        return PowerOutlook(
            budget_w=self._power.budget_w,
            committed_w=int(self._in_force_w.sum()),
            planned_w=int(self._planned_w.sum()),
            floor_w=int(self._floor_w.sum()),
            shadow_microusd_per_wh=self._shadow_microusd_per_wh,
        )
