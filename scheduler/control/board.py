"""The GPUs of the node as the daemon sees them: who is there, in which state, and what may be booked.

A GPU's state is derived: from the last readings, from the operator's marks in the ledger, from the
jobs that hold it, and from the hand-overs that are not yet proved. Nothing here is counted twice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.control.ledger import Ledger
from scheduler.control.table import JobWatts, Leaver, gave_way
from scheduler.control.telemetry import Telemetry
from scheduler.effects.gpus import GpuReadings
from scheduler.model.events import BaselineLearned
from scheduler.model.gpus import PID_LIMIT, GpuIdentity, GpuProcess, GpuSample, GpuState
from scheduler.model.jobs import SHARE_MILLI_WHOLE, Job
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import (
    CLOSED,
    DRAINING,
    DRAINING_STOP,
    NOT_DRAINING,
    OPEN,
    UNKNOWN,
    GpuColumns,
    NodeColumns,
    PowerColumns,
    Snapshot,
)

# What NVML answers for a GPU that is not there any more.
_LOST_CODES = frozenset({"ERROR_GPU_IS_LOST", "ERROR_RESET_REQUIRED"})
# An empty GPU shows its driver's reserve and what ECC takes, hundreds of MiB; a process at work has more.
EMPTY_MIB_MAX = 2048


@dataclass(frozen=True, slots=True)
class Occupant:
    """What an ended attempt still occupies of a GPU until it is proved free. No job: nobody knows yet."""

    job_id: str
    attempt: int
    share_milli: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class NodeSize:
    """What the node has for jobs beside GPUs."""

    cpus: int
    memory_mib: int
    live_jobs_max: int


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU for a person or a dashboard."""

    identity: GpuIdentity
    state: GpuState
    reason: Reason
    detail: str
    since_s: float
    sample: GpuSample | None
    job_ids: tuple[str, ...]
    free_share_milli: int
    foreign: tuple[GpuProcess, ...]
    telemetry_problems: tuple[str, ...] = ()


class GpuBoard:
    """Every GPU that this daemon has seen, by index."""

    def __init__(self, ledger: Ledger, sizes: tuple[NodeSize, ...], telemetry: Telemetry) -> None:
        """Take the ledger and the size of each node, in the order in which GPUs name them."""
        self._ledger = ledger
        self._telemetry = telemetry
        self.sizes = sizes
        self.identities: tuple[GpuIdentity, ...] = ()
        self.row: dict[str, int] = {}
        self.samples: dict[str, GpuSample] = {}
        self.errors: dict[str, str] = {}
        self.driver_version = ""
        self._unproved: set[str] = set()
        self._proved: set[tuple[str, int, str]] = set()
        self.foreign: dict[str, tuple[GpuProcess, ...]] = {}
        self.released = False
        self._present: frozenset[str] = frozenset()
        self._read: tuple[GpuIdentity, ...] = ()
        self._absent: frozenset[str] = frozenset()  # known, and not in the last round
        self.vanished: frozenset[str] = frozenset()  # in the last round: no more, and nobody can be on them
        self._gpus: tuple[object, GpuColumns] | None = None
        self._nodes: tuple[object, NodeColumns] | None = None
        self._since: dict[str, tuple[GpuState, float]] = {}
        # What makes the power columns; None while nobody sets a budget.
        self.power: Callable[[], Callable[[JobWatts], PowerColumns] | None] = lambda: None

    def read(self, readings: GpuReadings) -> tuple[GpuIdentity, ...]:
        """Take a round of readings; return the GPUs that were not there in the round before.

        A GPU that is not in the round any more is lost, not forgotten: jobs may still hold it. One that is
        back must be looked at like a new one.
        """
        present = frozenset(
            gpu.uuid for gpu in readings.identities if readings.errors.get(gpu.uuid) not in _LOST_CODES
        )
        fresh = tuple(
            gpu for gpu in readings.identities if gpu.uuid in present and gpu.uuid not in self._present
        )
        self.errors = readings.errors
        self.samples.update((sample.uuid, sample) for sample in readings.samples)
        if readings.driver_version:
            self.driver_version = readings.driver_version
        # What a GPU says of itself grows: its switch is known once its neighbour is there.
        # Who is absent may have been held until now by a job that is gone.
        if present != self._present or readings.identities != self._read or self._absent:
            known = {gpu.uuid: gpu for gpu in (*self.identities, *readings.identities)}
            self.vanished = self._cut_away(known.values(), readings.identities)
            for uuid in self.vanished:
                del known[uuid]
                self.samples.pop(uuid, None)
                self._unproved.discard(uuid)
                self.foreign.pop(uuid, None)
            self.identities = tuple(sorted(known.values(), key=lambda gpu: (gpu.node, gpu.index, gpu.uuid)))
            self.row = {gpu.uuid: row for row, gpu in enumerate(self.identities)}
            self._present, self._read = present, readings.identities
            self._absent = frozenset(self.row) - present
            self._ledger.table.see_gpus(self.identities)
        return fresh

    def _cut_away(self, known: Iterable[GpuIdentity], there: tuple[GpuIdentity, ...]) -> frozenset[str]:
        """Those that a new MIG layout ended and nobody holds: they are not lost, they are no more."""
        names = {gpu.uuid for gpu in there}
        parents = {gpu.parent_uuid for gpu in there if gpu.parent_uuid}
        # A layout is only known of a GPU that is there: whole, or in other parts.
        return frozenset(
            gpu.uuid
            for gpu in known
            if gpu.uuid not in names
            and (gpu.uuid in parents or gpu.parent_uuid in names | parents)
            and not self.is_held(gpu.uuid)
        )

    def is_present(self, uuid: str) -> bool:
        """Whether the last round of readings saw the GPU."""
        return uuid in self._present

    def learn_baseline(self, uuid: str, used_mib: int, now_s: float) -> None:
        """Note what the empty GPU shows as used. Only ever less: a leak must not become normal bit by bit.

        Another driver has another reserve: with it everything is learnt anew.
        """
        known = self._baseline(uuid)
        if known is None or used_mib < known:
            self._ledger.apply(BaselineLearned(now_s, uuid, max(0, used_mib), self.driver_version))

    def _baseline(self, uuid: str) -> int | None:
        known = self._ledger.baselines.get(uuid)
        return known.used_mib if known and known.driver_version == self.driver_version else None

    def empty_mib(self, uuid: str) -> int | None:
        """The most that the GPU may show as used when nobody is on it; None where that proves nothing."""
        # Where its memory is a NUMA node the system keeps pages after their process [nvml.h].
        if uuid in self.row and self.identities[self.row[uuid]].is_numa_node:
            return None
        known = self._baseline(uuid)
        return EMPTY_MIB_MAX if known is None else known

    def occupants(self) -> dict[str, list[Occupant]]:
        """By GPU, what ended there and is not proved gone; or that nobody has looked yet.

        An attempt is journalled as verified when all its GPUs are. Which of them were before a restart shows
        in that they were given on: there is no room beside who holds them now.
        """
        found: dict[str, list[Occupant]] = {}
        rooms: dict[str, int] = {}
        for (job_id, attempt), leaving in self._ledger.leaving.items():
            for uuid in leaving.gpus:
                room = rooms.setdefault(uuid, SHARE_MILLI_WHOLE - self._held_milli(uuid))
                if leaving.share_milli <= room and (job_id, attempt, uuid) not in self._proved:
                    rooms[uuid] = room - leaving.share_milli
                    found.setdefault(uuid, []).append(
                        Occupant(job_id, attempt, leaving.share_milli, leaving.memory_mib)
                    )
        for uuid in self._unproved:
            # Whoever ended there and is final by now is not among the leaving: a restart forgets him.
            room = rooms.get(uuid, SHARE_MILLI_WHOLE - self._held_milli(uuid))
            if room > 0:
                found.setdefault(uuid, []).append(Occupant("", 0, room, 0))
        return found

    def is_left(self, uuid: str) -> bool:
        """Whether an attempt of ours ended on the GPU and is not proved gone."""
        return any(
            uuid in leaving.gpus and (job_id, attempt, uuid) not in self._proved
            for (job_id, attempt), leaving in self._ledger.leaving.items()
        )

    def has_room(self, uuid: str) -> bool:
        """Whether live jobs hold less than the whole GPU."""
        return self._held_milli(uuid) < SHARE_MILLI_WHOLE

    def _held_milli(self, uuid: str) -> int:
        return sum(job.spec.gpu_share_milli for job in self.holders(uuid))

    def doubt(self, uuid: str) -> None:
        """The GPU must be proved free before anything starts on it."""
        self._unproved.add(uuid)

    def prove(self, uuid: str) -> list[tuple[str, int]]:
        """The GPU is free of all that ended there; returns the attempts that have left all their GPUs."""
        self._unproved.discard(uuid)
        gone = []
        for (job_id, attempt), leaving in self._ledger.leaving.items():
            if uuid in leaving.gpus:
                self._proved.add((job_id, attempt, uuid))
                if all((job_id, attempt, gpu) in self._proved for gpu in leaving.gpus):
                    gone.append((job_id, attempt))
        return gone

    def settle(self) -> None:
        """Forget the proofs of attempts that the ledger has as verified."""
        self._proved = {key for key in self._proved if key[:2] in self._ledger.leaving}

    def held_unseen(self) -> dict[str, list[Job]]:
        """The GPUs that jobs hold and nobody has seen since the start, with those jobs."""
        by_gpu = self._ledger.table.holdings.by_gpu
        return {uuid: list(jobs.values()) for uuid, jobs in by_gpu.items() if uuid not in self.row}

    def holders(self, uuid: str) -> list[Job]:
        """Live jobs that hold a GPU."""
        return self._ledger.table.holdings.jobs(uuid)

    def is_held(self, uuid: str) -> bool:
        """Whether a live job holds a GPU."""
        return uuid in self._ledger.table.holdings.by_gpu

    def state(self, uuid: str, held: bool, leaving: bool) -> tuple[GpuState, Reason, str]:
        """The GPU's state, its reason and the facts behind it."""
        mark = self._ledger.marks.get(uuid)
        if not self.is_present(uuid):
            code = self.errors.get(uuid) or self.errors.get("driver")
            facts = (code or "not in the driver's list", mark.detail if mark else "")
            return GpuState.LOST, Reason.GPU_NOT_SEEN, "; ".join(filter(None, facts))
        if mark is not None:
            return mark.state, Reason(mark.reason), mark.detail
        failure = self._telemetry.silent.get(uuid)
        detail = "" if failure is None else f"it does not answer: {failure}"
        if held:
            return GpuState.ALLOCATED, Reason.GPU_HELD, detail
        if self.foreign.get(uuid):
            return GpuState.FOREIGN, Reason.FOREIGN_PROCESS, describe(self.foreign[uuid])
        if leaving or detail:
            return GpuState.HANDOVER, Reason.HANDOVER_PENDING, detail
        return GpuState.FREE, Reason.GPU_FREE, ""

    def views(self, now_s: float) -> list[GpuView]:
        """All GPUs, by index."""
        occupants = self.occupants()
        views = []
        for gpu in self.identities:
            jobs = self.holders(gpu.uuid)
            occupied = sum(o.share_milli for o in occupants.get(gpu.uuid, ()))
            held = sum(job.spec.gpu_share_milli for job in jobs)
            state, reason, detail = self.state(gpu.uuid, bool(jobs), bool(occupied))
            before = self._since.get(gpu.uuid)
            if before is None or before[0] is not state:
                before = self._since[gpu.uuid] = (state, now_s)
            views.append(
                GpuView(
                    identity=gpu,
                    state=state,
                    reason=reason,
                    detail=detail,
                    since_s=before[1],
                    sample=self.samples.get(gpu.uuid),
                    job_ids=tuple(sorted(job.id for job in jobs)),
                    free_share_milli=max(0, SHARE_MILLI_WHOLE - held - occupied),
                    foreign=self.foreign.get(gpu.uuid, ()),
                    telemetry_problems=self._telemetry.of(gpu.uuid),
                )
            )
        return views

    def bookable_mib(self, gpu: GpuIdentity) -> int:
        """GPU memory that jobs may book: the total less what the empty GPU shows as used."""
        return max(0, gpu.memory_total_mib - (self._baseline(gpu.uuid) or 0))

    def basis(self) -> tuple[object, ...]:
        """What snapshots are made of, but for the time; equal where nothing that the planner sees changed."""
        head = self._ledger.journal.head
        worth = self._ledger.table.energy, self._ledger.table.values_changed
        return head, self._gpu_columns(), self._node_columns(), tuple(self._leaving()), worth

    def snapshot(self, now_s: float, power: Callable[[JobWatts], PowerColumns] | None = None) -> Snapshot:
        """The world now, for the planner; valid until the next change. `power`: else as the budget says."""
        return self._ledger.table.snapshot(
            now_s, self._gpu_columns(), self._node_columns(), self._leaving(), power or self.power()
        )

    def _gpu_columns(self) -> GpuColumns:
        """The GPUs' columns; made again only when something in them changed."""
        closed = {*self._ledger.marks, *self.foreign, *self._telemetry.silent}
        key = (
            self.identities,
            self.released,
            frozenset(closed | self._absent),
            self._ledger.baselines,
            self.driver_version,
        )
        if self._gpus is None or self._gpus[0] != key:
            self._gpus = (key, self._made_gpu_columns(key[2]))
        return self._gpus[1]

    def _made_gpu_columns(self, closed: frozenset[str]) -> GpuColumns:
        gpus = self.identities
        models = sorted({gpu.model for gpu in gpus})
        states = [CLOSED if self.released or gpu.uuid in closed else OPEN for gpu in gpus]
        return GpuColumns(
            uuid=tuple(gpu.uuid for gpu in gpus),
            index=np.arange(len(gpus), dtype=np.int64),
            node=np.array([gpu.node for gpu in gpus], dtype=np.int64),
            memory_mib=np.array([self.bookable_mib(gpu) for gpu in gpus], dtype=np.int64),
            state=np.array(states, dtype=np.int64),
            island=_known(gpu.island for gpu in gpus),
            switch=_known(gpu.switch for gpu in gpus),
            numa=_known(gpu.numa for gpu in gpus),
            model=np.array([models.index(gpu.model) for gpu in gpus], dtype=np.int64),
            instance=np.array([bool(gpu.parent_uuid) for gpu in gpus], dtype=bool),
        )

    def _node_columns(self) -> NodeColumns:
        drain = self._ledger.drain
        code = NOT_DRAINING if drain is None else DRAINING_STOP if drain.stop_jobs else DRAINING
        if self._nodes is None or self._nodes[0] != (code, self.sizes):
            rows = [(size.cpus, size.memory_mib, size.live_jobs_max, code) for size in self.sizes]
            columns: Any = np.array(rows, dtype=np.int64).T
            self._nodes = ((code, self.sizes), NodeColumns(*columns))
        return self._nodes[1]

    def _leaving(self) -> list[Leaver]:
        rows: list[Leaver] = []
        for uuid, occupants in self.occupants().items():
            gpu = self.row.get(uuid)
            if gpu is not None:
                for one in occupants:
                    leaving = self._ledger.leaving.get((one.job_id, one.attempt))
                    notice = gave_way(leaving.notice if leaving else None)
                    rows.append((gpu, one.share_milli, one.memory_mib, *notice))
        return rows


def _known(numbers: Iterable[int | None]) -> Any:
    return np.array([UNKNOWN if number is None else number for number in numbers], dtype=np.int64)


def describe(processes: tuple[GpuProcess, ...]) -> str:
    """Processes in words: `pid 4711 (alice, python3, 2048 MiB)`."""
    return ", ".join(_describe(process) for process in processes)


def _describe(process: GpuProcess) -> str:
    memory = "" if process.memory_mib is None else f"{process.memory_mib} MiB"
    facts = ", ".join(filter(None, (process.user, process.command, memory)))
    told = f" ({facts})" if facts else ""
    if process.pid:
        return f"pid {process.pid}{told}"
    if process.listed_pid is None or not 0 < process.listed_pid < PID_LIMIT:
        return f"a process that can't be named{told}"
    return f"pid {process.listed_pid}, which has ended or is another process by now{told}"
