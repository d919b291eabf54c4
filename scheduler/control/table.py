"""The columns of the jobs that are not final, kept up to date by change, and the snapshot over them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scheduler.control.holdings import Holdings
from scheduler.control.worth import value_of_not_waiting
from scheduler.model import snapshot as columns
from scheduler.model.frames import SaidColumns
from scheduler.model.gpus import GpuIdentity, model_matches
from scheduler.model.jobs import FINAL_STATES, Job, JobClass, JobState, Notice, OnPreempt, job_number
from scheduler.model.policy import Order, Policy, aged_priority
from scheduler.model.power import Curve
from scheduler.model.snapshot import (
    UNKNOWN,
    WHOLE_MILLI,
    GpuColumns,
    HoldingColumns,
    JobColumns,
    NodeColumns,
    PowerColumns,
    Snapshot,
)
from scheduler.planning.economics import Point, operating_point

_STATE_CODES = {
    JobState.PENDING: columns.PENDING,
    JobState.STARTING: columns.STARTING,
    JobState.RUNNING: columns.RUNNING,
    JobState.SUSPENDED: columns.SUSPENDED,
    JobState.PREEMPTING: columns.PREEMPTING,
    JobState.STOPPING: columns.STOPPING,
}
# Beside the jobs' own: what a job draws by nature, W; since when it is to be frozen; the whole work of one
# that pays at its end, µs; its priority before aging; how often it gave way to a job.
_COLUMNS = (
    *JobColumns.__dataclass_fields__, "natural_w", "suspend_us", "whole_us", "said_priority", "preemptions",
)  # fmt: skip
_OWN = len(JobColumns.__dataclass_fields__)
_SAID = tuple(map(_COLUMNS.index, ("said_priority", "preemptions", "value", "whole_us")))
_NUMBER = _COLUMNS.index("number")
_BOOL_COLUMNS = frozenset({"preemptible"})
_ROWS_AT_FIRST = 256
_MICROUSD_PER_USD = 1_000_000
_W_PER_KW = 1000.0

# What an ended attempt still occupies: row of the GPU, share in thousandths, memory in MiB, then the number
# of the job that it gave way to and when it was told, microseconds; UNKNOWN where nobody was.
Leaver = tuple[int, int, int, int, int]


def microseconds(seconds: float | None) -> int:
    """Whole microseconds; UNKNOWN for None."""
    return UNKNOWN if seconds is None else round(seconds * 1e6)


def gave_way(notice: Notice | None) -> tuple[int, int]:
    """The number of the job that a stopping one gives way to, and when it was told; UNKNOWN."""
    if notice is None:
        return UNKNOWN, UNKNOWN
    preemptor = job_number(notice.preempted_by)
    return UNKNOWN if preemptor is None else preemptor, microseconds(notice.decided_s)


@dataclass(frozen=True, slots=True)
class EnergyPrice:
    """What a GPU-hour's energy costs at a draw."""

    usd_per_kwh: float  # at the boards: the price times PUE
    unknown_w: int  # what a job counts for of which nobody knows the draw
    # Of mining, and the least limit that boards take; None: limits aren't lowered for the price.
    curve: Curve | None = None
    least_w: int = 0

    @property
    def microusd_per_kwh(self) -> int:
        """The price in whole micro-USD."""
        return round(self.usd_per_kwh * _MICROUSD_PER_USD)

    def best(self, jobs: JobColumns, natural_w: Any) -> tuple[Any, Any]:
        """What each job is worth net of energy, and the limits of miners that earn most at less; UNKNOWN."""
        net, best_w = jobs.value - self.cost(natural_w), np.full(len(jobs), UNKNOWN, dtype=np.int64)
        if self.curve is None:
            return net, best_w
        steered = (jobs.job_class == int(JobClass.MINING)) & (natural_w != UNKNOWN) & (jobs.gpus > 0)
        rows = np.flatnonzero(steered & (jobs.share_milli == WHOLE_MILLI))
        known: dict[tuple[int, int], Point] = {}
        for row in rows.tolist():
            pair = int(natural_w[row]), int(jobs.value[row])
            if pair not in known:
                known[pair] = operating_point(self.curve, *pair, self.microusd_per_kwh, self.least_w)
            best_w[row], net[row] = known[pair]
        return net, best_w

    def cost(self, natural_w: Any) -> Any:
        """Micro-USD per GPU-hour; shape (jobs,) of watts in, UNKNOWN where not known."""
        watts = np.where(natural_w == UNKNOWN, self.unknown_w, natural_w)
        return np.rint(watts * (self.usd_per_kwh * _MICROUSD_PER_USD / _W_PER_KW)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class JobWatts:
    """Columns of jobs, in watts per GPU; UNKNOWN."""

    number: Any
    natural_w: Any
    best_w: Any  # where a miner earns most, if that is below its full limit
    suspend_us: Any  # since when it is to be frozen; UNKNOWN


class JobTable:
    """Jobs as columns: a row per job that is not final, in no particular order."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        # What a job draws per GPU, as far as anybody knows.
        self.natural_w: Callable[[Job], float | None] = lambda job: job.spec.draw_w
        # What a GPU-hour of a job is worth now, micro-USD. Whoever lets it change counts that.
        self.value: Callable[[Job], int] = lambda job: job.spec.value_microusd_per_gpu_hour
        self.values_changed = 0
        self.miners: set[int] = set()  # numbers of the jobs that tell what they mine
        self.mining: set[int] = set()  # numbers of the jobs of that class
        self.suspendable: set[int] = set()  # numbers of the jobs that may be frozen
        # How much later than at full speed its live attempt will be done.
        self.behind_s: Callable[[Job], float] = lambda _: 0.0
        self.energy: EnergyPrice | None = None  # what energy costs; None = nobody knows
        self._rows: dict[int, int] = {}  # job number -> row
        # Jobs whose rows are not written yet: one may change often before somebody looks.
        self._unwritten: dict[int, Job] = {}
        self._arrays = self._allocate(_ROWS_AT_FIRST)
        self._model_sets: dict[tuple[str, ...], int] = {}
        self._model_fits: Any = np.zeros((0, 0), dtype=bool)
        self._identities: tuple[GpuIdentity, ...] = ()
        self.holdings = Holdings()
        self._model_set(())

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, job: Job) -> None:
        """Take the job as it is now into its row, or drop that where the job is final."""
        if job.state in FINAL_STATES:
            self.drop(job.number)
            return
        row = self._rows.get(job.number)
        if row is None:
            row = len(self._rows)
            if row == len(self._arrays[0]):
                self._grow()
            self._rows[job.number] = row
            self._arrays[_NUMBER][row] = job.number
            if job.spec.miner is not None:
                self.miners.add(job.number)
            if job.spec.job_class is JobClass.MINING:
                self.mining.add(job.number)
            if job.spec.on_preempt is OnPreempt.SUSPEND:
                self.suspendable.add(job.number)
        self._unwritten[job.number] = job
        if job.holds:
            self.holdings.put(job, row)
        else:
            self.holdings.drop(job.number)

    def drop(self, number: int) -> None:
        """Forget a job; the last row takes its place."""
        row = self._rows.pop(number, None)
        if row is None:
            return
        self._unwritten.pop(number, None)
        self.miners.discard(number)
        self.mining.discard(number)
        self.suspendable.discard(number)
        self.holdings.drop(number)
        last = len(self._rows)
        if row != last:
            for array in self._arrays:
                array[row] = array[last]
            moved = int(self._arrays[_NUMBER][row])
            self._rows[moved] = row
            self.holdings.job_moved(moved, row)

    def see_gpus(self, identities: tuple[GpuIdentity, ...]) -> None:
        """Match every set of models against these GPUs from now on."""
        if identities == self._identities:
            return
        self._identities = identities
        self.holdings.see_gpus({gpu.uuid: row for row, gpu in enumerate(identities)}, self._rows)
        self._model_fits = np.array([self._fits(models) for models in self._model_sets], dtype=bool).reshape(
            len(self._model_sets), len(identities)
        )

    def of_suspendable(self, watts: Callable[[int], float | None]) -> Any:
        """A column of jobs, UNKNOWN but of those that may be frozen, W by number."""
        column = np.full(len(self._rows), UNKNOWN, dtype=np.int64)
        for number in self.suspendable:
            known = watts(number)
            column[self._rows[number]] = UNKNOWN if known is None else math.ceil(known)
        return column

    def set_policy(self, policy: Policy, jobs: dict[int, Job]) -> None:
        """Rank by another policy from now on."""
        self._policy = policy
        for number in self._rows:
            self.put(jobs[number])

    def snapshot(
        self,
        now_s: float,
        gpus: GpuColumns,
        nodes: NodeColumns,
        leaving: list[Leaver],
        power: Callable[[JobWatts], PowerColumns] | None = None,
    ) -> Snapshot:
        """The world now, with what is leaving; the columns are views, valid until the next change.

        `power` makes the power columns of what each job draws.
        """
        self._write()
        count = len(self._rows)
        own = [array[:count] for array in self._arrays]
        natural_w, suspend_us, whole_us, *_ = own[_OWN:]
        jobs, gross, best_w = JobColumns(*own[:_OWN]), None, None
        if self._policy.order is Order.VALUE:
            ratio = self._policy.hysteresis_ratio
            value = value_of_not_waiting(jobs, whole_us, microseconds(now_s), gpus, ratio)
            jobs = replace(jobs, value=value)
        if self.energy is not None:
            gross = jobs.value
            net, best_w = self.energy.best(jobs, natural_w)
            jobs = replace(jobs, value=net)
        return Snapshot(
            now_us=microseconds(now_s),
            jobs=jobs,
            gpus=gpus,
            nodes=nodes,
            holdings=self._holding_columns(leaving),
            model_fits=self._model_fits,
            power=None if power is None else power(JobWatts(jobs.number, natural_w, best_w, suspend_us)),
            gross_value=gross,
        )

    def said(self) -> SaidColumns:
        """What the jobs of the snapshot said; views, valid until the next change."""
        self._write()
        count = len(self._rows)
        return SaidColumns(*(self._arrays[row][:count] for row in _SAID))

    def _holding_columns(self, leaving: list[Leaver]) -> HoldingColumns:
        held = self.holdings.columns()
        if not leaving:
            return HoldingColumns(*held)
        count = held.shape[1]
        columns: Any = np.full((6, count + len(leaving)), UNKNOWN, dtype=np.int64)
        columns[:4, :count] = held
        columns[1:, count:] = np.array(leaving, dtype=np.int64).T
        return HoldingColumns(*columns)

    def _write(self) -> None:
        """Write the rows that have changed."""
        for job in self._unwritten.values():
            row = self._rows[job.number]
            for array, value in zip(self._arrays, self._values(job), strict=True):
                array[row] = value
        self._unwritten.clear()

    def _values(self, job: Job) -> tuple[int | bool, ...]:
        spec, last, code = job.spec, job.last, _STATE_CODES[job.state]
        live = code != columns.PENDING and last is not None
        preemptor, stop_us = gave_way(last.notice if live and last else None)
        natural_w, expected_s = self.natural_w(job), job.expected_attempt_s
        if expected_s is not None:
            expected_s += self.behind_s(job)
        return (
            job.number,
            code,
            int(spec.job_class),
            aged_priority(spec.job_class, spec.priority, job.preemptions, self._policy),
            self.value(job),
            spec.gpus,
            spec.gpu_share_milli,
            spec.gpu_memory_mib,
            self._model_set(spec.gpu_models),
            spec.cpus,
            spec.memory_mib,
            spec.preemptible,
            microseconds(job.eligible_s),
            microseconds(spec.min_runtime_s),
            microseconds(spec.grace_s),
            microseconds(spec.restart_loss_s),
            microseconds(expected_s),
            microseconds(spec.deadline_s),
            microseconds(spec.time_limit_s),
            microseconds(last.started_s) if live and last else UNKNOWN,
            microseconds(last.checkpoint_s) if live and last else UNKNOWN,
            last.node if live and last else UNKNOWN,
            preemptor,
            stop_us,
            UNKNOWN if natural_w is None else max(1, math.ceil(natural_w)),
            microseconds(last.suspend_s) if live and last else UNKNOWN,
            UNKNOWN if spec.job_class is JobClass.MINING else microseconds(spec.expected_duration_s),
            spec.priority,
            job.preemptions,
        )

    def _model_set(self, models: tuple[str, ...]) -> int:
        known = self._model_sets.get(models)
        if known is None:
            known = self._model_sets[models] = len(self._model_sets)
            fits = np.array(self._fits(models), dtype=bool).reshape(1, len(self._identities))
            self._model_fits = np.concatenate([self._model_fits.reshape(known, len(self._identities)), fits])
        return known

    def _fits(self, models: tuple[str, ...]) -> list[bool]:
        return [
            not models or any(model_matches(model, gpu.model) for model in models) for gpu in self._identities
        ]

    def _grow(self) -> None:
        grown = self._allocate(2 * len(self._arrays[0]))
        for new, old in zip(grown, self._arrays, strict=True):
            new[: len(old)] = old
        self._arrays = grown

    @staticmethod
    def _allocate(rows: int) -> list[Any]:
        return [np.zeros(rows, dtype=bool if name in _BOOL_COLUMNS else np.int64) for name in _COLUMNS]
