"""Who used what: GPU time by share, energy from the counters, value; idle is booked as idle.

A job holds its GPUs from the decision to start it until its last process is gone. What a GPU used between two
readings is split by the time within that interval for which each job held it, and its share; the rest is
idle's. A MIG instance has of its GPU's energy what it has of the compute slices. All is whole millijoules and
adds up to the counter. What it costs is booked with it, at the price of the moment of use, and adds up to a
micro-USD per GPU. `docs/operating/energy.md` has the rules for operators.

What was used since the last booking is in memory, and up to where each GPU is booked in the journal: a daemon
that starts, whatever became of the one before, goes on from there.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.control.board import GpuBoard
from scheduler.control.energy import EnergyMeter, Used
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.control.telemetry import Telemetry
from scheduler.effects.journal import UsageBooking
from scheduler.model.events import UsageBooked, UsageEntry
from scheduler.model.gpus import GpuBooked, GpuSample
from scheduler.model.jobs import SHARE_MILLI_WHOLE, Attempt, Job
from scheduler.model.reasons import Reason

IDLE = "IDLE"
# What the node draws beside its boards, as configured; its account is kept under no UUID.
BASE = "BASE"
BASE_UUID = ""
# Of attempts that ended when nobody looked: the launcher was gone, too.
UNKNOWN = "UNKNOWN"
BOOKING_PERIOD_S = 60.0
# A GPU that was taken out of the node is remembered for so long.
FORGOTTEN_S = 7 * 86_400.0
_MS_PER_HOUR = 3_600_000
_MJ_PER_MWH = 3_600_000_000_000
# Utilisation below this on a held GPU counts as nothing running on it.
_IDLE_UTILIZATION = 0.005

_Part = tuple[str, int]  # a GPU or a MIG instance, and its compute slices


class Tariff(Protocol):
    """What the node draws beside its boards, and what all of it costs."""

    @property
    def base_w(self) -> float:
        """What the node draws beside its boards."""

    def pieces(self, since_s: float, until_s: float) -> list[tuple[float, int | None]]:
        """The pieces of a time by their ends, and what energy cost then, micro-USD per MWh; None: unknown."""


@dataclass(frozen=True, slots=True, order=True)
class _User:
    """Whoever used a GPU or an instance: an attempt of a job, idle, or one that is not known."""

    uuid: str
    number: int = 0  # of the job
    attempt: int = 0
    label: str = IDLE


@dataclass(slots=True)
class _Sums:
    """What one user used since the last booking."""

    gpu_ms: float = 0.0
    frozen_ms: float = 0.0  # of those; nothing is earned
    energy_mj: int = 0
    cost: int = 0  # millijoules times micro-USD per MWh
    unpriced_mj: int = 0


@dataclass(frozen=True, slots=True)
class _Hold:
    """That an attempt has, or had, its GPUs."""

    job: Job
    attempt: Attempt
    until_s: float = math.inf
    is_known: bool = True  # else nobody knows when it ended

    def share_ms(self, since_s: float, until_s: float) -> float:
        """For how long it held within the interval, times its share."""
        held_s = min(self.until_s, until_s) - max(self.attempt.decided_s, since_s)
        return max(0.0, held_s) * self.attempt.gpu_share_milli

    def frozen_ms(self, since_s: float, until_s: float) -> float:
        """For how much of that it was frozen, times its share."""
        attempt = self.attempt
        if attempt.suspended_s is None:
            return 0.0
        ended_s = self.until_s if attempt.resumed_s is None else attempt.resumed_s
        frozen_s = min(ended_s, until_s) - max(attempt.suspended_s, since_s)
        return max(0.0, frozen_s) * attempt.gpu_share_milli

    def weight(self, used: Used) -> float:
        """Its mean share over the interval; where the clock was set back, its share if it holds it now."""
        if used.until_s > used.since_s:
            return self.share_ms(used.since_s, used.until_s) / (used.until_s - used.since_s)
        return self.attempt.gpu_share_milli if self.until_s == math.inf else 0.0

    def user(self, uuid: str) -> _User:
        """Who it is, on this GPU or instance."""
        if not self.is_known:
            return _User(uuid, label=UNKNOWN)
        return _User(uuid, self.job.number, self.attempt.number, self.job.spec.job_class.name)


@dataclass(slots=True)
class _Gpu:
    """A whole GPU: what it used is split over its parts, which are its MIG instances, or itself."""

    uuid: str
    meter: EnergyMeter
    parts: tuple[_Part, ...]  # at the last reading: whoever is newer can't have been held before
    timed_s: float
    cost_rest: int = 0  # less than a micro-USD, not booked yet
    used: dict[_User, _Sums] = field(default_factory=dict)

    def add(self, user: _User, more: _Sums) -> None:
        if more.gpu_ms or more.energy_mj:
            sums = self.used.setdefault(user, _Sums())
            sums.gpu_ms += more.gpu_ms
            sums.frozen_ms += more.frozen_ms
            sums.energy_mj += more.energy_mj
            sums.cost += more.cost
            sums.unpriced_mj += more.unpriced_mj

    def charge(self, user: _User, energy_mj: int, rate: int | None) -> None:
        """Energy at a price in micro-USD per MWh; None: nobody knows it."""
        if rate is None:
            self.add(user, _Sums(energy_mj=energy_mj, unpriced_mj=energy_mj))
        else:
            self.add(user, _Sums(energy_mj=energy_mj, cost=energy_mj * rate))


@dataclass(frozen=True, slots=True)
class _Booking:
    """What was staged as event `seq`; it counts once that is durable."""

    seq: int
    entries: tuple[UsageEntry, ...]
    used: tuple[tuple[_Gpu, dict[_User, _Sums], int], ...]  # with what rested before: taken back if it is not


class Accounts:
    """Usage since the last booking; `book` puts it into the ledger's transaction."""

    def __init__(
        self, ledger: Ledger, board: GpuBoard, meters: Meters, telemetry: Telemetry, tariff: Tariff
    ) -> None:
        self._ledger = ledger
        self._tariff = tariff
        self._board = board
        self._meters = meters
        self._telemetry = telemetry
        self._gpus: dict[str, _Gpu] = {}
        self._ended: dict[tuple[int, int], _Hold] = {}  # attempts whose last energy is not counted yet
        self._ended_on: set[str] = set()  # GPUs and instances that attempts have left since they were booked
        self._booked_s = -math.inf
        self._unsettled: list[_Booking] = []
        self._has_read = False  # since attempts that ended were forgotten last

    def resume(self, *, rebooted: bool) -> None:
        """Go on from where the daemon before has booked."""
        ledger = self._ledger
        for uuid, booked in ledger.booked.items():
            meter = EnergyMeter(booked.at_s, booked.energy_mj, booked.power_w)
            if rebooted:
                meter.driver_is_new()
            self._gpus[uuid] = _Gpu(uuid, meter, booked.parts, booked.timed_s, booked.cost_rest)
        if not self._gpus:
            return
        pending = {number: ledger.job(number) for gpu in ledger.booked.values() for number, _ in gpu.pending}
        finished = ledger.journal.finished_since(ledger.booked_seq)
        for job in (*filter(None, pending.values()), *finished, *ledger.jobs.values()):
            for attempt in job.attempts:
                if attempt.exited_s is not None:
                    self._end(job, attempt, attempt.exited_s, attempt.end_reason, lost=attempt.lost)
        self._forget_ended()

    def ended(self, job: Job, at_s: float, reason: Reason, *, lost: bool) -> None:
        """The job's attempt ended; `lost`: before then, and nobody knows when."""
        self._end(job, job.attempts[-1], at_s, reason, lost=lost)
        self._ended_on.update(job.attempts[-1].gpus)

    def read(self, now_s: float) -> None:
        """Split the time up to now and the energy up to the newest readings; call when the ends are known."""
        holds = self._holds()
        for uuid, parts in self._wholes().items():
            samples = [self._board.samples[part] for part, _ in parts if part in self._board.samples]
            if not samples:
                continue
            newest = max(samples, key=lambda sample: sample.at_s)
            power_w = _sum(sample.power_w for sample in samples)
            if newest.energy_mj is not None or power_w is not None:
                for part, _ in parts:
                    self._meters.gpu_energy_j[(part,)] += 0.0  # from 0 on, for rates
            gpu = self._gpus.get(uuid)
            if gpu is None:
                meter = EnergyMeter(newest.at_s, newest.energy_mj, power_w)
                self._gpus[uuid] = _Gpu(uuid, meter, parts, now_s)
                continue
            self._time(gpu, parts, holds, now_s)
            if newest.at_s == gpu.meter.seen_s:
                continue
            seen_s = gpu.meter.seen_s
            left_s = [hold.until_s for part, _ in gpu.parts for hold in holds.get(part, ())]
            used = gpu.meter.read(newest.at_s, newest.energy_mj, power_w, max(left_s, default=0.0))
            self._telemetry.note(gpu.uuid, "energy_mj", gpu.meter.fault, now_s)
            for interval in used:
                for piece, rate in self._priced(interval):
                    self._split(gpu, holds, piece, rate)
            self._note_idle(holds, samples, max(0.0, newest.at_s - seen_s))
            if used:
                gpu.parts = parts
        self._read_base(now_s)
        self._has_read = True

    def book(self, now_s: float) -> None:
        """Put what is due after readings into the transaction: all each minute, GPUs that were left."""
        if abs(now_s - self._booked_s) >= BOOKING_PERIOD_S:
            self.book_all(now_s)
        elif self._ended_on:
            self._book(now_s, [gpu for gpu in self._gpus.values() if self._was_left(gpu)])

    def book_all(self, now_s: float) -> None:
        """Put everything into the ledger's transaction."""
        self._book(now_s, list(self._gpus.values()), whole=True)
        self._booked_s = now_s
        here = self._wholes()
        for uuid, gpu in list(self._gpus.items()):
            if uuid not in here and now_s - gpu.meter.at_s > FORGOTTEN_S:
                del self._gpus[uuid]

    def settle(self) -> None:
        """Count what was booked, or take back what could not be kept: a full disk must not lose it.

        To be called before anything is staged in a tick.
        """
        unsettled, self._unsettled = self._unsettled[::-1], []  # what rested before the first is right
        head = self._ledger.journal.head
        for booking in unsettled:
            if booking.seq <= head:
                for entry in booking.entries:
                    label = (entry.job_class,)
                    self._meters.class_gpu_s[label] += entry.gpu_ms / 1000.0
                    self._meters.class_energy_j[label] += entry.energy_mj / 1000.0
                    self._meters.class_value_usd[label] += entry.value_microusd / 1e6
                    self._meters.energy_cost_usd += max(0, entry.cost_microusd) / 1e6
                    self._meters.energy_credit_usd += max(0, -entry.cost_microusd) / 1e6
                    self._meters.energy_unpriced_j += entry.unpriced_mj / 1000.0
                continue
            self._booked_s = -math.inf
            for gpu, used, cost_rest in booking.used:
                gpu.cost_rest = cost_rest
                for user, sums in used.items():
                    gpu.add(user, sums)
        if self._has_read:  # nothing else counts energy
            self._has_read = False
            self._forget_ended()

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

    # Who held what ----------------------------------------------------------------------------

    def _end(self, job: Job, attempt: Attempt, at_s: float, reason: Reason | None, *, lost: bool) -> None:
        # What a reboot ended was gone when the GPU's new driver began to count.
        until_s = -math.inf if reason is Reason.NODE_REBOOTED else at_s
        if attempt.gpus:
            self._ended[job.number, attempt.number] = _Hold(job, attempt, until_s, is_known=not lost)

    def _holds(self) -> dict[str, list[_Hold]]:
        """By GPU or instance who holds it, or held it since the energy was last counted."""
        found: dict[str, list[_Hold]] = {}
        live = (_Hold(job, job.attempts[-1]) for job in self._ledger.live_jobs())
        # An end that could not be journalled yet is an end all the same.
        present = (hold for hold in live if (hold.job.number, hold.attempt.number) not in self._ended)
        for hold in (*self._ended.values(), *present):
            for uuid in hold.attempt.gpus:
                found.setdefault(uuid, []).append(hold)
        return found

    def _forget_ended(self) -> None:
        """Forget attempts that ended before all that is still to be counted, once their end is durable."""
        if not self._ended:
            return
        counted_s = {part: gpu.meter.at_s for gpu in self._gpus.values() for part, _ in gpu.parts}
        self._ended = {
            key: hold
            for key, hold in self._ended.items()
            if any(hold.until_s > counted_s.get(uuid, math.inf) for uuid in hold.attempt.gpus)
            or self._is_live(*key)
        }

    def _is_live(self, number: int, attempt: int) -> bool:
        job = self._ledger.live.get(number)
        return job is not None and job.attempt == attempt

    def _wholes(self) -> dict[str, tuple[_Part, ...]]:
        """The GPUs that are there, whole ones and those that are cut, and their parts."""
        found: dict[str, tuple[_Part, ...]] = {}
        for gpu in self._board.identities:
            if self._board.is_present(gpu.uuid):
                whole = gpu.parent_uuid or gpu.uuid
                found[whole] = (*found.get(whole, ()), (gpu.uuid, gpu.slices or 1))
        return found

    def _was_left(self, gpu: _Gpu) -> bool:
        return any(part in self._ended_on for part, _ in gpu.parts)

    # Who used what ----------------------------------------------------------------------------

    def _time(self, gpu: _Gpu, parts: tuple[_Part, ...], holds: dict[str, list[_Hold]], now_s: float) -> None:
        """Count the time of a GPU up to now."""
        since_s, gpu.timed_s = gpu.timed_s, now_s
        for uuid, _ in parts:
            left_ms = max(0.0, now_s - since_s) * SHARE_MILLI_WHOLE
            for hold in holds.get(uuid, ()):
                held_ms = hold.share_ms(since_s, now_s)
                frozen_ms = hold.frozen_ms(since_s, now_s)
                gpu.add(hold.user(uuid), _Sums(gpu_ms=held_ms, frozen_ms=min(held_ms, frozen_ms)))
                left_ms -= held_ms
            if uuid in self._board.row:  # else it was taken out of the node
                gpu.add(_User(uuid), _Sums(gpu_ms=max(0.0, left_ms)))

    def _read_base(self, now_s: float) -> None:
        """Count what the node draws beside its boards, as configured: nothing measures it."""
        base, base_w = self._gpus.get(BASE_UUID), self._tariff.base_w
        if base is None:
            if base_w:
                meter = EnergyMeter(now_s, None, base_w)
                self._gpus[BASE_UUID] = _Gpu(BASE_UUID, meter, ((BASE_UUID, 1),), now_s)
            return
        for used in base.meter.read(now_s, None, base_w):
            for piece, rate in self._priced(used):
                base.charge(_User(BASE_UUID, label=BASE), piece.energy_mj, rate)

    def _priced(self, used: Used) -> Iterator[tuple[Used, int | None]]:
        """The pieces of an interval in each of which energy has one price, as if it was used evenly."""
        since_s, given_mj, lasted_s = used.since_s, 0, used.until_s - used.since_s
        for until_s, rate in self._tariff.pieces(used.since_s, used.until_s):
            is_last = until_s >= used.until_s
            upto_mj = (
                used.energy_mj if is_last else int(used.energy_mj * ((until_s - used.since_s) / lasted_s))
            )
            yield Used(since_s, until_s, upto_mj - given_mj), rate
            since_s, given_mj = until_s, upto_mj

    def _split(self, gpu: _Gpu, holds: dict[str, list[_Hold]], used: Used, rate: int | None) -> None:
        """Split what a GPU used at one price over those who held it then; the sum is exact."""
        weights: list[tuple[_User, float]] = []
        for uuid, slices in gpu.parts:
            held = [(hold.user(uuid), hold.weight(used)) for hold in holds.get(uuid, ())]
            left = SHARE_MILLI_WHOLE - sum(share for _, share in held)
            weights.append((_User(uuid), max(0.0, left) * slices))
            weights += [(user, share * slices) for user, share in held]
        for user, energy_mj in _divided(used.energy_mj, weights):
            gpu.charge(user, energy_mj, rate)
            if energy_mj:  # of a GPU that tells neither counter nor draw nothing is known, not even zero
                self._meters.gpu_energy_j[(user.uuid,)] += energy_mj / 1000.0

    def _note_idle(self, holds: dict[str, list[_Hold]], samples: list[GpuSample], lasted_s: float) -> None:
        """Note the time since the last reading for which a GPU was held with nothing running on it."""
        for sample in samples:
            is_held = any(hold.until_s == math.inf for hold in holds.get(sample.uuid, ()))
            if (
                is_held
                and sample.utilization_ratio is not None
                and sample.utilization_ratio < _IDLE_UTILIZATION
            ):
                self._meters.allocated_idle_s[(sample.uuid,)] += lasted_s

    # Bookings ---------------------------------------------------------------------------------

    def _book(self, now_s: float, gpus: list[_Gpu], *, whole: bool = False) -> None:
        if not gpus:
            return
        holds, wholes = self._holds(), self._wholes()
        for gpu in gpus:
            self._time(gpu, wholes.get(gpu.uuid, gpu.parts), holds, now_s)
            self._ended_on.difference_update(part for part, _ in gpu.parts)
        used = tuple((gpu, gpu.used, gpu.cost_rest) for gpu in gpus)
        entries = tuple(entry for gpu in gpus for entry in self._entries(gpu))
        self._ledger.apply(UsageBooked(now_s, entries, whole, tuple(map(self._booked, gpus))))
        for gpu in gpus:
            gpu.used = {}
        self._unsettled.append(_Booking(self._ledger.journal.head, entries, used))

    def _booked(self, gpu: _Gpu) -> GpuBooked:
        meter = gpu.meter
        parts = {part for part, _ in gpu.parts}
        pending = sorted(
            key
            for key, hold in self._ended.items()
            if hold.until_s > meter.at_s and not parts.isdisjoint(hold.attempt.gpus)
        )
        return GpuBooked(
            gpu.uuid,
            gpu.timed_s,
            meter.at_s,
            meter.counter_mj,
            meter.power_w,
            gpu.parts,
            tuple(pending),
            gpu.cost_rest,
        )

    def _entries(self, gpu: _Gpu) -> Iterator[UsageEntry]:
        """What a GPU's users used, in whole micro-USD; what is less goes on to the next entry."""
        for user in sorted(gpu.used):
            cost_microusd, gpu.cost_rest = divmod(gpu.cost_rest + gpu.used[user].cost, _MJ_PER_MWH)
            yield self._entry(user, gpu.used[user], cost_microusd)

    def _entry(self, user: _User, sums: _Sums, cost_microusd: int) -> UsageEntry:
        gpu_ms = round(sums.gpu_ms)
        worked_ms = gpu_ms - min(gpu_ms, round(sums.frozen_ms))
        job = self._ledger.job(user.number) if user.number else None
        return UsageEntry(
            job_id=job.id if job else "",
            uuid=user.uuid,
            tenant=job.spec.tenant if job else "",
            job_class=user.label,
            gpu_ms=gpu_ms,
            energy_mj=sums.energy_mj,
            value_microusd=worked_ms * self._ledger.table.value(job) // _MS_PER_HOUR if job else 0,
            attempt=user.attempt,
            cost_microusd=cost_microusd,
            unpriced_mj=sums.unpriced_mj,
        )


def _divided(total: int, weights: list[tuple[_User, float]]) -> Iterable[tuple[_User, int]]:
    """Divide whole millijoules by weight: each part is within one of its due, and their sum is the total."""
    heavy = [(user, weight) for user, weight in weights if weight > 0]
    whole = sum(weight for _, weight in heavy)
    seen, given = 0.0, 0
    for place, (user, weight) in enumerate(heavy, start=1):
        seen += weight
        upto = total if place == len(heavy) else int(total * (seen / whole))
        yield user, upto - given
        given = upto


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
