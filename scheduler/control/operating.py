"""Where the miners that run are on their curves, and how they get from one point to another.

The planner sees a limit at which a miner earns most (`planning/economics.py`). A miner that starts, starts
there. One that runs moves there as watts come back after a shed: after a moment of the node's own, and with
all others of the node together no faster than `return_w_per_s`; for what a grid fears is everybody at once.
"""

import math
import random
from typing import TYPE_CHECKING

from scheduler.model.jobs import Job, JobClass
from scheduler.model.power import Curve, curve_of
from scheduler.model.settings import OperatingPoint
from scheduler.model.snapshot import UNKNOWN
from scheduler.planning.economics import operating_point

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

STEP_S = 1.0


class OperatingPoints:
    """The limits that running miners are held at for what energy costs, in watts; UNKNOWN = full."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self.held_w: dict[int, int] = {}  # by job number: what the planner is told
        self._wanted_w: dict[int, int] = {}
        self._begins_s: float | None = None  # when limits begin to move; None = they are where they should be
        self._moved_s = 0.0

    @property
    def is_active(self) -> bool:
        """Whether limits are set for what energy costs: it has a price, boards take them, somebody mines."""
        table = self._control.ledger.table
        return table.energy is not None and table.energy.curve is not None and bool(table.mining)

    def mined(self) -> tuple[Curve | None, int]:
        """Mining's curve, and the least limit of boards that take one; None: none is set for the price."""
        control = self._control
        ranges = [control.power.limits.range_w(gpu) for gpu in control.board.identities]
        least_w = max((math.ceil(low) for low, high in ranges if low < high), default=None)
        if least_w is None or control.config.mining.operating_point is not OperatingPoint.BEST:
            return None, 0
        return curve_of(control.config.policy.classes[JobClass.MINING].power_curve), least_w

    def basis(self) -> object:
        """What a plan without a budget rests on, of power; equal where nothing changed."""
        if not self.is_active:
            return None
        limits, gpus = self._control.power.limits, self._control.board.identities
        boards = tuple((limits.in_force_w(gpu), limits.range_w(gpu)) for gpu in gpus)
        return tuple(self.held_w.items()), boards

    def advance(self, now_s: float) -> None:
        """Say where each running miner is best, and move the limits a step."""
        if not self.is_active:
            self.held_w, self._wanted_w, self._begins_s = {}, {}, None
            return
        jobs = {job.number: job for job in self._control.ledger.live_jobs() if self._may_be_limited(job)}
        wanted_w = {number: self._best_w(job) for number, job in jobs.items()}
        moved = any(wanted_w[number] != self._wanted_w.get(number, wanted_w[number]) for number in wanted_w)
        self._wanted_w = wanted_w
        self.held_w = {number: self.held_w.get(number, watts) for number, watts in wanted_w.items()}
        if self.held_w == wanted_w:
            self._begins_s = None
            return
        if moved and self._begins_s is None:
            config = self._control.config
            jitter = random.Random(f"{config.node.name} {now_s:.3f}").uniform(
                0.0, config.power.return_jitter_s
            )
            self._begins_s = self._moved_s = now_s + jitter
        if self._begins_s is None or now_s >= self._begins_s:
            self._move(jobs, now_s)

    def wake_s(self, now_s: float) -> float | None:
        """When limits move by themselves."""
        return None if self._begins_s is None else max(self._begins_s, now_s + STEP_S)

    def _may_be_limited(self, job: Job) -> bool:
        spec = job.spec
        return (
            spec.job_class is JobClass.MINING
            and spec.gpus > 0
            and not spec.is_share
            and self._control.power.draws.natural_w(job) is not None
        )

    def _best_w(self, job: Job) -> int:
        """Where the job earns most on its boards; where it is, unless another point is clearly better."""
        control, power = self._control, self._control.power
        energy, natural_w = control.ledger.table.energy, power.draws.natural_w(job)
        assert energy is not None
        assert energy.curve is not None
        assert natural_w is not None
        board = control.board
        gpus = [board.identities[board.row[uuid]] for uuid in job.attempts[-1].gpus if uuid in board.row]
        least_w = max((math.ceil(power.limits.range_w(gpu)[0]) for gpu in gpus), default=energy.least_w)
        return operating_point(
            energy.curve,
            max(1, math.ceil(natural_w)),
            control.ledger.table.value(job),
            energy.microusd_per_kwh,
            least_w,
            self._wanted_w.get(job.number),
        ).limit_w

    def _move(self, jobs: dict[int, Job], now_s: float) -> None:
        """Bring each limit nearer to where it should be, by its part of what the node may change."""
        power = self._control.config.power
        moving = {
            number: job for number, job in jobs.items() if self.held_w[number] != self._wanted_w[number]
        }
        boards = sum(job.spec.gpus for job in moving.values())
        step_w = math.floor(power.return_w_per_s / power.pue * (now_s - self._moved_s) / boards)
        if step_w < 1:
            return
        self._moved_s = now_s
        for number, job in moving.items():
            natural_w = math.ceil(self._control.power.draws.natural_w(job) or 0.0)
            now_w, to_w = (
                natural_w if watts == UNKNOWN else watts
                for watts in (self.held_w[number], self._wanted_w[number])
            )
            nearer_w = min(to_w, now_w + step_w) if to_w > now_w else max(to_w, now_w - step_w)
            self.held_w[number] = self._wanted_w[number] if nearer_w == to_w else nearer_w
