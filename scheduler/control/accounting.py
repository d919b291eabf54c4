"""Who used what: GPU time by share, energy from the counters, value; idle is booked as idle.

A GPU's energy between two readings is split over those who held it at the later one by share; what
nobody held is idle's. Where a GPU has no counter its power reading is integrated.
"""

from collections import defaultdict
from dataclasses import dataclass

from scheduler.control.board import GpuBoard
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.effects.journal import UsageBooking
from scheduler.model.events import UsageBooked, UsageEntry
from scheduler.model.jobs import SHARE_MILLI_WHOLE, Job

IDLE = "IDLE"
BOOKING_PERIOD_S = 60.0
_MS_PER_HOUR = 3_600_000
# Utilisation below this on a held GPU counts as nothing running on it.
_IDLE_UTILIZATION = 0.005


_Key = tuple[str, int]  # a GPU's UUID and a job's number, 0 = idle


@dataclass(frozen=True, slots=True)
class _Booking:
    """What was staged as event `seq`; it counts once that is durable."""

    seq: int
    entries: tuple[UsageEntry, ...]
    sums: list[tuple[_Key, float, float]]  # GPU-ms and mJ, to be taken back if it is not


class Accounts:
    """Usage since the last booking, in memory; `book` puts it into the ledger's transaction."""

    def __init__(self, ledger: Ledger, board: GpuBoard, meters: Meters) -> None:
        self._ledger = ledger
        self._board = board
        self._meters = meters
        self._at_s = 0.0
        self._gpu_ms: defaultdict[tuple[str, int], float] = defaultdict(float)
        self._energy_mj: defaultdict[tuple[str, int], float] = defaultdict(float)
        self._counters: dict[str, tuple[float, int | None]] = {}
        self._jobs: dict[int, Job] = {}  # that the sums name
        self._ended: set[int] = set()
        self._unsettled: list[_Booking] = []

    def resume(self, now_s: float) -> None:
        """Start counting; what ran while no daemon looked is booked on those who still hold."""
        self._at_s = now_s
        booked_s = self._ledger.booked_s
        for job in self._ledger.live_jobs():
            last = job.attempts[-1]
            if last.started_s is not None:
                self._add(job, max(0.0, now_s - max(last.started_s, booked_s)))

    def advance(self, now_s: float) -> None:
        """Count the time since the last call for those who hold GPUs now; call before that changes."""
        if self._unsettled:
            self._settle()
        elapsed_s = max(0.0, now_s - self._at_s)
        self._at_s = now_s
        if not elapsed_s:
            return
        free = {gpu.uuid: SHARE_MILLI_WHOLE for gpu in self._board.identities}
        for job in self._ledger.live_jobs():
            self._add(job, elapsed_s)
            for uuid in job.attempts[-1].gpus:
                free[uuid] = free.get(uuid, SHARE_MILLI_WHOLE) - job.spec.gpu_share_milli
        for uuid, share in free.items():
            self._gpu_ms[uuid, 0] += elapsed_s * share

    def read(self) -> None:
        """Split the energy since the last readings."""
        for uuid, sample in self._board.samples.items():
            before = self._counters.get(uuid)
            if before is not None and before[0] == sample.at_s:
                continue
            self._counters[uuid] = (sample.at_s, sample.energy_mj)
            if before is None:
                continue
            elapsed_s = sample.at_s - before[0]
            if sample.energy_mj is not None and before[1] is not None:
                used_mj = float(max(0, sample.energy_mj - before[1]))  # a reset counter books nothing
            else:
                used_mj = (sample.power_w or 0.0) * elapsed_s * 1000.0
            jobs = self._board.holders(uuid)
            left = SHARE_MILLI_WHOLE
            for job in jobs:
                self._jobs[job.number] = job
                self._energy_mj[uuid, job.number] += used_mj * job.spec.gpu_share_milli / SHARE_MILLI_WHOLE
                left -= job.spec.gpu_share_milli
            self._energy_mj[uuid, 0] += used_mj * left / SHARE_MILLI_WHOLE
            if jobs and sample.utilization_ratio is not None and sample.utilization_ratio < _IDLE_UTILIZATION:
                self._meters.allocated_idle_s[(uuid,)] += elapsed_s

    def due(self, now_s: float) -> bool:
        """Whether a booking is due."""
        return now_s - self._ledger.booked_s >= BOOKING_PERIOD_S

    def ended(self, job: Job) -> None:
        """The job's attempt ended: what it used is booked with this tick."""
        self._ended.add(job.number)

    def book_ended(self, now_s: float) -> None:
        """Book those that ended, so that no crash can lose what they used."""
        self._settle()
        if self._ended:
            self._book(now_s, {key for key in self._used() if key[1] in self._ended}, whole=False)
        self._ended.clear()

    def book(self, now_s: float) -> None:
        """Put all that was used into the ledger's transaction."""
        self._settle()
        self._book(now_s, self._used(), whole=True)

    def _used(self) -> set[_Key]:
        return {key for key, value in (*self._gpu_ms.items(), *self._energy_mj.items()) if value}

    def _book(self, now_s: float, keys: set[_Key], *, whole: bool) -> None:
        if not keys:
            return
        entries = tuple(self._entry(uuid, number) for uuid, number in sorted(keys))
        self._ledger.apply(UsageBooked(now_s, entries, whole))
        sums = [(key, self._gpu_ms.pop(key, 0.0), self._energy_mj.pop(key, 0.0)) for key in keys]
        self._unsettled.append(_Booking(self._ledger.journal.head, entries, sums))

    def _settle(self) -> None:
        """Count what was booked, or take back what could not be kept: a full disk must not lose it."""
        unsettled, self._unsettled = self._unsettled, []
        head = self._ledger.journal.head
        for booking in unsettled:
            if booking.seq <= head:
                for entry in booking.entries:
                    label = (entry.job_class,)
                    self._meters.class_gpu_s[label] += entry.gpu_ms / 1000.0
                    self._meters.class_energy_j[label] += entry.energy_mj / 1000.0
                    self._meters.class_value_usd[label] += entry.value_microusd / 1e6
            else:
                for key, gpu_ms, energy_mj in booking.sums:
                    self._gpu_ms[key] += gpu_ms
                    self._energy_mj[key] += energy_mj

    def count_preemption(self, job: Job, at_s: float) -> None:
        """Book that a job gave way to another."""
        gpus = job.attempts[-1].gpus
        entry = UsageEntry(
            job_id=job.id,
            uuid=gpus[0] if gpus else "",
            tenant=job.spec.tenant,
            job_class=job.spec.job_class.name,
            gpu_ms=0,
            energy_mj=0,
            value_microusd=0,
        )
        self._ledger.book(UsageBooking(at_s, entry, preemptions=1))

    def _add(self, job: Job, elapsed_s: float) -> None:
        self._jobs[job.number] = job
        for uuid in job.attempts[-1].gpus:
            self._gpu_ms[uuid, job.number] += elapsed_s * job.spec.gpu_share_milli

    def _entry(self, uuid: str, number: int) -> UsageEntry:
        gpu_ms = round(self._gpu_ms[uuid, number])
        energy_mj = round(self._energy_mj[uuid, number])
        job = self._jobs.get(number)
        label = job.spec.job_class.name if job else IDLE
        value = gpu_ms * job.spec.value_microusd_per_gpu_hour // _MS_PER_HOUR if job else 0
        return UsageEntry(
            job_id=job.id if job else "",
            uuid=uuid,
            tenant=job.spec.tenant if job else "",
            job_class=label,
            gpu_ms=gpu_ms,
            energy_mj=energy_mj,
            value_microusd=value,
        )
