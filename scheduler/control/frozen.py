"""Frozen jobs: what boards draw with them, learned from readings by class and model of the board.

A frozen process keeps its CUDA context, and a context keeps the clock up: an H100 that draws 76 W when it is
empty drew 130 W with a frozen job on it (docs/operating/power.md).
"""

import math
from collections import deque

from scheduler.control.board import GpuBoard
from scheduler.control.draws import is_news, quantile
from scheduler.control.idle_draws import IdleDraws
from scheduler.control.ledger import Ledger
from scheduler.control.limits import Limits
from scheduler.model.events import ResumeDecided
from scheduler.model.gpus import GpuIdentity, GpuSample
from scheduler.model.jobs import Job, JobState, OnPreempt
from scheduler.model.reasons import Reason

# Beyond its idle draw, until it was seen: contexts were seen to take 26 W (A100) to 80 W (A40).
FROZEN_EXTRA_W = 100.0
# What a job had queued runs out first; queues of 2.2 s were seen, at full draw.
FROZEN_AFTER_S = 5.0
STEP_W = 5  # so that no plan follows every flicker
READINGS_KEPT = 120
READINGS_MIN = 5
_PREFIX = "FROZEN"  # of names among the learned draws; no class is called so, and no job


class Frozen:
    """Estimates in watts of a whole board; what is news goes into the journal."""

    def __init__(self, ledger: Ledger, board: GpuBoard, limits: Limits, idle: IdleDraws) -> None:
        draws_w = ledger.power.draws_w
        self._known = {name: watts for name, watts in draws_w.items() if name.startswith(_PREFIX)}
        self._ledger = ledger
        self._board = board
        self._limits = limits
        self._idle = idle
        self._readings: dict[str, deque[float]] = {}

    def of(self, job: Job) -> float | None:
        """What each board of the job draws while it is frozen; None of who may not be.

        Of who has no board yet it is the most of any.
        """
        spec = job.spec
        if spec.on_preempt is not OnPreempt.SUSPEND or not spec.preemptible or not spec.gpus:
            return None
        board = self._board
        held = job.attempts[-1].gpus if job.holds else ()
        gpus = [board.identities[board.row[uuid]] for uuid in held if uuid in board.row]
        return max((self.of_board(gpu, job) for gpu in gpus or board.identities), default=None)

    def counted_w(self, number: int) -> float | None:
        """The same by the job's number, in the steps in which plans see it."""
        watts = self.of(self._ledger.jobs[number])
        return None if watts is None else math.ceil(watts / STEP_W) * STEP_W

    def held_w(self, gpu: GpuIdentity) -> float:
        """The most that a board that jobs hold may draw: its limit, or what it draws with all frozen."""
        limit_w, idle_w = self._limits.in_force_w(gpu), self._idle.of(gpu)
        held = self._board.holders(gpu.uuid)
        if not held or any(
            job.state is not JobState.SUSPENDED or job.attempts[-1].suspend_s is None for job in held
        ):
            return limit_w
        added_w = sum(max(0.0, self.of_board(gpu, job) - idle_w) for job in held)
        return min(limit_w, idle_w + added_w)

    def resume_all(self, now_s: float) -> None:
        """Without a budget nobody is frozen for it."""
        for number in sorted(self._ledger.table.suspendable):
            job = self._ledger.jobs[number]
            if job.holds and job.attempts[-1].suspend_s is not None:
                self._ledger.apply(ResumeDecided(now_s, job.id, job.attempt, Reason.RESUMED_AFTER_SHED))

    def of_board(self, gpu: GpuIdentity, job: Job) -> float:
        """What this board draws while the job is frozen on it."""
        watts = self._known.get(_name(gpu, job), self._idle.of(gpu) + FROZEN_EXTRA_W)
        return min(watts, self._limits.range_w(gpu)[1])

    def see(self, job: Job, gpu: GpuIdentity, sample: GpuSample) -> dict[str, float]:
        """Take a reading of a board that the job has to itself; what is news in it."""
        last, name = job.attempts[-1], _name(gpu, job)
        if job.state is not JobState.SUSPENDED or last.suspended_s is None or sample.power_w is None:
            return {}
        if sample.at_s - last.suspended_s < FROZEN_AFTER_S:
            return {}
        readings = self._readings.setdefault(name, deque(maxlen=READINGS_KEPT))
        readings.append(sample.power_w)
        watts = quantile(readings)
        if len(readings) < READINGS_MIN or not is_news(self._known.get(name), watts):
            return {}
        self._known[name] = watts
        return {name: watts}


def _name(gpu: GpuIdentity, job: Job) -> str:
    return f"{_PREFIX} {job.spec.job_class.name} {gpu.model}"
