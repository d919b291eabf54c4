"""Who is frozen in a plan: what his boards count for, when he runs again, and the actions that follow.

Who is frozen keeps his boards. They count with what a frozen board draws, once the launcher has said that it
is so and for as long as nobody was told otherwise; their limits lie at the boards' minimum meanwhile, so that
what was queued runs out under it and a return begins with it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from scheduler.model.actions import ResumeJob, SuspendJob
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import RUNNING, SUSPENDED, UNKNOWN, PowerColumns, Snapshot
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.shedding import Unit

# Whoever was frozen stays so for this long at least: a budget that moves to and fro must make no job stutter.
FROZEN_US_MIN = 30_000_000


class Freezing:
    """The frozen jobs of one plan. A unit is named by the numbers of its jobs."""

    def __init__(self, snapshot: Snapshot, power: PowerColumns) -> None:
        jobs = snapshot.jobs
        self._power = power
        self._now_us = snapshot.now_us
        told = power.suspend_us != UNKNOWN
        rows = rows_where(told)
        pairs = zip(jobs.number[rows].tolist(), power.suspend_us[rows].tolist(), strict=True)
        self._since_us: dict[int, int] = dict(pairs)  # of who is told to be frozen
        # Bool, shape (jobs,) each: who may be frozen, one day or now; who is known to be, and stays so.
        self.yields = jobs.preemptible & (power.frozen_w != UNKNOWN)
        self.may = self.yields & ((jobs.state == RUNNING) | (jobs.state == SUSPENDED))
        self._still = self.yields & told & (jobs.state == SUSPENDED)
        self._chosen: set[tuple[int, ...]] = set()
        self._resumed: set[tuple[int, ...]] = set()
        self.wake_us: int | None = None  # when somebody has been frozen for long enough

    def boards(self, gpu: Any, job: Any, full_w: Any) -> tuple[Any, Any]:
        """What boards draw whose holders are all frozen, W, and which boards are so now; shape (gpus,) each.

        `gpu`, `job`: rows of who holds what, of those that stay.
        """
        count = len(full_w)
        added_w = xp.maximum(self._power.frozen_w[job] - self._power.idle_w[gpu], 0)
        added_w = xp.bincount(gpu, weights=added_w, minlength=count).astype(xp.int64)
        held = xp.bincount(gpu, minlength=count) > 0
        runs = xp.bincount(gpu[~self._still[job]], minlength=count) > 0
        return xp.minimum(full_w, self._power.idle_w + added_w), held & ~runs

    def of_start(self, row: int, unit: Unit, beside: Sequence[Unit]) -> tuple[int, ...]:
        """What a unit's boards would draw frozen, of a job that is to start beside others; empty: never."""
        if not bool(self.yields[row]) or not all(each.frozen_w for each in beside):
            return ()
        own_w = int(self._power.frozen_w[row])
        frozen_w = []
        for idle, full in zip(unit.idle_w, unit.full_w, strict=True):
            beside_w = sum(each.frozen_w[0] - idle for each in beside)
            frozen_w.append(min(full, max(own_w, idle) + beside_w))
        return tuple(frozen_w)

    def choose(self, units: Iterable[Unit]) -> None:
        """Have these and nobody else frozen, or stay so."""
        self._chosen = {unit.jobs for unit in units}

    def is_chosen(self, unit: Unit) -> bool:
        """Whether the plan wants the unit frozen."""
        return unit.jobs in self._chosen

    def resume(self, units: Iterable[Unit], in_force_w: Any) -> Any:
        """What boards may draw now, with those running again who need not be frozen, as far as there is room.

        The most valuable come first.
        """
        if not self._since_us or self._power.lead_milli:
            return in_force_w  # nobody is; or draws are still on their way to a lower budget
        power, in_force_w = self._power, in_force_w.copy()
        for unit in sorted(units, key=lambda unit: (-unit.value // len(unit.gpus), unit.jobs)):
            if self.is_chosen(unit) or not self._is_told(unit):
                continue
            since_us = max(self._since_us.get(number, 0) for number in unit.jobs)
            ready_us = since_us + FROZEN_US_MIN
            if since_us <= self._now_us < ready_us:  # a clock that was set back keeps nobody frozen for hours
                self.wake_us = min(ready_us, self.wake_us or ready_us)
                continue
            rows = xp.asarray(unit.gpus, dtype=xp.int64)
            then_w = xp.maximum(power.limit_w[rows], in_force_w[rows])
            if int(in_force_w.sum() + (then_w - in_force_w[rows]).sum()) <= power.budget_w:
                in_force_w[rows] = then_w
                self._resumed.add(unit.jobs)
        return in_force_w

    def stands_still(self, unit: Unit) -> bool:
        """Whether the unit is, or is about to be, frozen: its limits lie at the minimum, if they may."""
        waits = self._is_told(unit) and unit.jobs not in self._resumed
        return waits or self.is_chosen(unit)

    def actions(self, units: Iterable[Unit], reason: Reason) -> list[SuspendJob | ResumeJob]:
        """Who is to be frozen from now on, and who is to run again, of the units that stay."""
        suspends: list[SuspendJob] = []
        resumes: list[ResumeJob] = []
        for unit in units:
            told = [number for number in unit.jobs if number in self._since_us]
            if self.is_chosen(unit):
                suspends += [SuspendJob(number, reason) for number in unit.jobs if number not in told]
            elif unit.jobs in self._resumed:
                resumes += [ResumeJob(number, Reason.RESUMED_AFTER_SHED) for number in told]
        return [*suspends, *resumes]

    def _is_told(self, unit: Unit) -> bool:
        return not self._since_us.keys().isdisjoint(unit.jobs)
