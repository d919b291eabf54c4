"""Health: GPUs that report errors are quarantined, their jobs moved, and come back when they are well.

What an error means stands in `model/health.py`. The driver's own verdict, where it gives one, decides about
the return: an error's quarantine ends when the driver needs nothing for a while. Who comes back and fails
again waits longer each time, and in the end for a person. XIDs that follow our own kills never quarantine.
"""

import logging
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scheduler.control.energy import begins_anew
from scheduler.effects.gpus import GpuReadings
from scheduler.model.events import GpuMarked, GpuUnmarked
from scheduler.model.gpus import EVENTS_BEGIN, GpuEvent, GpuIdentity, GpuSample, GpuState
from scheduler.model.health import (
    OWN_KILLS,
    TABLE_VERSION,
    Outcome,
    is_known_xid,
    outcome_of_event,
    outcome_of_recovery_action,
)
from scheduler.model.jobs import Job, JobState
from scheduler.model.reasons import Reason

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

log = logging.getLogger("wattshift.health")

# The driver logs an ended context within milliseconds, and behind a reset or a crash dump within seconds.
OWN_KILL_S = 30.0
# An error this close to the end of a job is told with it.
ERROR_TOLD_S = 60.0
# A GPU is well when nothing was wrong with it for so long; doubled by each return in the last day.
WELL_S_FIRST = 10.0
RETURNS_REMEMBERED_S = 86_400.0
RETURNS_MAX = 3

_REASONS = {
    Outcome.RESET: Reason.GPU_NEEDS_RESET,
    Outcome.REBOOT: Reason.GPU_NEEDS_REBOOT,
    Outcome.SERVICE: Reason.GPU_NEEDS_SERVICE,
}
_OUTCOMES = {reason: outcome for outcome, reason in _REASONS.items()}
_LOST = {"ERROR_GPU_IS_LOST": Outcome.REBOOT, "ERROR_RESET_REQUIRED": Outcome.RESET}
# What a sample counts up, and whose growth says that something went wrong.
COUNTS = ("ecc_corrected", "ecc_uncorrected", "rows_remapped_uncorrected")
_MOVABLE = frozenset({JobState.STARTING, JobState.RUNNING, JobState.SUSPENDED})


@dataclass(slots=True)
class _Error:
    at_s: float
    what: str


class Health:
    """Judges each round of readings."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self._before: dict[str, GpuSample] = {}
        self._ended_s: dict[str, float] = {}  # by GPU: when a job of ours last ended there
        self._errors: dict[str, _Error] = {}  # by GPU: the last one that hurt whoever was on it
        self._well_since_s: dict[str, float] = {}
        # By GPU: when its energy was read last, and what it was.
        self._counted: dict[str, tuple[float, int]] = {}
        self._known: set[str] = set()  # GPUs that this daemon has seen
        self._was_reset: set[str] = set()  # since they were quarantined
        self._returns_s: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RETURNS_MAX))

    def start(self) -> None:
        """Know what the start of the daemon tells: after a reboot every GPU was reset.

        Else its energy counter says so, which is lower then than the daemon before has booked.
        """
        if self._control.rebooted:
            self._was_reset.update(self._control.ledger.marks)
        for booked in self._control.ledger.booked.values():
            if booked.energy_mj is not None:
                self._counted |= {uuid: (booked.at_s, booked.energy_mj) for uuid, _ in booked.parts}

    def clock_was_set_back(self, now_s: float) -> None:
        """Reckon from now on where it was from a time that is still to come."""
        for times_s in (self._ended_s, self._well_since_s):
            times_s.update({uuid: min(at_s, now_s) for uuid, at_s in times_s.items()})

    def ended(self, job: Job, at_s: float) -> None:
        """Note that an attempt of ours ended: what its GPUs report of that now is no news."""
        for uuid in job.attempts[-1].gpus:
            self._ended_s[uuid] = at_s

    def error_near(self, job: Job, at_s: float) -> str:
        """What hurt its GPUs just before the job ended, in words; or ""."""
        return "; ".join(
            f"GPU {uuid} reported {error.what}"
            for uuid in job.attempts[-1].gpus
            if (error := self._errors.get(uuid)) and abs(at_s - error.at_s) <= ERROR_TOLD_S
        )

    def read(self, readings: GpuReadings, fresh: tuple[GpuIdentity, ...], now_s: float) -> None:
        """Take a round: count what went wrong, quarantine who needs it, let back who is well."""
        # Who is there again was reset; of whom we see for the first time nobody knows.
        self._was_reset.update(gpu.uuid for gpu in fresh if gpu.uuid in self._known)
        self._known.update(gpu.uuid for gpu in readings.identities)
        found: dict[str, tuple[Outcome, str]] = {}

        def find(uuid: str, outcome: Outcome, what: str) -> None:
            if outcome > found.get(uuid, (Outcome.IGNORE, ""))[0]:
                found[uuid] = (outcome, what)

        for event in readings.events:
            if event.kind == EVENTS_BEGIN:
                self._missed(event.uuid, now_s)
            else:
                find(event.uuid, *self._heard(event, now_s))
        for uuid, code in readings.errors.items():
            if code in _LOST:
                find(uuid, _LOST[code], code.removeprefix("ERROR_").replace("_", " ").lower())
        for sample in readings.samples:
            for outcome, what in self._seen(sample, has_told=sample.uuid in found):
                find(sample.uuid, outcome, what)
        for uuid, (outcome, what) in sorted(found.items()):
            self._judge(uuid, outcome, what, now_s)
        for sample in readings.samples:
            if sample.uuid not in found and sample.uuid not in readings.errors:
                self._let_back(sample, now_s)

    def _heard(self, event: GpuEvent, now_s: float) -> tuple[Outcome, str]:
        outcome = outcome_of_event(event.kind, event.code)
        if event.kind == "xid":
            what = f"XID {event.code}"
            kind = f"xid_{event.code}" if is_known_xid(event.code) else "xid_other"
            if event.code in OWN_KILLS and self._is_near_our_kill(event.uuid, now_s):
                kind = "own_kill"
        else:
            what = kind = event.kind
        if event.kind != "mig_changed":
            self._control.meters.gpu_errors[event.uuid, kind] += 1
            log.warning("GPU %s reported %s: %s", event.uuid, what, outcome.name.lower())
        return outcome, what.replace("_", " ")

    def _missed(self, uuid: str, now_s: float) -> None:
        """Note that a GPU that was read before is heard anew: what it told in between is lost.

        The samples before and after tell of memory errors, and of what the driver says that it needs.
        """
        if uuid not in self._before:
            return
        self._control.meters.gpu_errors[uuid, "events_missed"] += 1
        log.warning("GPU %s was not heard for a moment: XIDs may be missing; journalctl -k -g Xid", uuid)
        last = self._errors.get(uuid)
        if last is None or now_s - last.at_s > ERROR_TOLD_S:
            self._errors[uuid] = _Error(now_s, "nothing for a moment, in which XIDs may have been missed")

    def _is_near_our_kill(self, uuid: str, now_s: float) -> bool:
        board = self._control.board
        stopping = any(job.attempts[-1].notice for job in board.holders(uuid))
        ended_s = self._ended_s.get(uuid)
        return stopping or (ended_s is not None and now_s - ended_s <= OWN_KILL_S)

    def _seen(self, sample: GpuSample, *, has_told: bool) -> list[tuple[Outcome, str]]:
        """What the sample itself says, beside what it counts."""
        uuid, before = sample.uuid, self._before.get(sample.uuid)
        self._before[uuid] = sample if before is None else _carried_on(before, sample)
        self._see_reset(sample)
        uncorrected = _growth(before.ecc_uncorrected if before else None, sample.ecc_uncorrected)
        corrected = _growth(before.ecc_corrected if before else None, sample.ecc_corrected)
        remapped = _growth(
            before.rows_remapped_uncorrected if before else None, sample.rows_remapped_uncorrected
        )
        for kind, count in (("ecc_uncorrected", uncorrected), ("ecc_corrected", corrected)):
            if count:
                self._control.meters.gpu_errors[uuid, kind] += count
        found = []
        if sample.has_remap_failed:
            found.append((Outcome.SERVICE, "rows of its memory that can't be remapped"))
        if sample.recovery_action:
            action = outcome_of_recovery_action(sample.recovery_action)
            found.append((action, f"recovery action {sample.recovery_action}"))
        elif (uncorrected or remapped) and sample.recovery_action is None and not has_told:
            # A board that neither tells events nor gives a verdict: nobody else will say it.
            found.append((Outcome.RESET, "an uncorrectable error of its memory"))
        return found

    def _see_reset(self, sample: GpuSample) -> None:
        """Know a reset by the energy counter, which begins anew with it, as it does with the driver.

        One that is not read, or falls to what a new one can't show yet, is only wrong.
        """
        if sample.energy_mj is None:
            return
        at_s, energy_mj = self._counted.get(sample.uuid, (sample.at_s, 0))
        if begins_anew(sample.energy_mj, energy_mj, sample.at_s - at_s):
            self._was_reset.add(sample.uuid)
        self._counted[sample.uuid] = (sample.at_s, sample.energy_mj)

    def _judge(self, uuid: str, outcome: Outcome, what: str, now_s: float) -> None:
        if outcome is Outcome.IGNORE:
            return
        self._errors[uuid] = _Error(now_s, what)
        if outcome is Outcome.RESTART_JOB:
            return  # what hurt the job ends it; its restart rule says what then
        self._well_since_s.pop(uuid, None)
        returns = [at_s for at_s in self._returns_s[uuid] if now_s - at_s <= RETURNS_REMEMBERED_S]
        detail = f"{what} (table {TABLE_VERSION})"
        if len(returns) >= RETURNS_MAX:
            outcome = Outcome.SERVICE
            detail = f"{what}, after it came back {RETURNS_MAX} times within a day (table {TABLE_VERSION})"
        mark = self._control.ledger.marks.get(uuid)
        # What an operator closed stays closed as it is: it must not come back by itself.
        if mark is None or (
            mark.state is GpuState.QUARANTINED
            and _OUTCOMES.get(Reason(mark.reason), Outcome.IGNORE) < outcome
        ):
            self._was_reset.discard(uuid)
            self._control.ledger.apply(
                GpuMarked(now_s, uuid, GpuState.QUARANTINED.value, _REASONS[outcome], detail)
            )
            log.error("GPU %s is quarantined: %s", uuid, detail)
        self._move_jobs(uuid, now_s)

    def _move_jobs(self, uuid: str, now_s: float) -> None:
        for job in self._control.board.holders(uuid):
            if job.state in _MOVABLE:
                self._control.commands.stop(job, JobState.PREEMPTING, Reason.GPU_FAILED, now_s)

    def _let_back(self, sample: GpuSample, now_s: float) -> None:
        """End the quarantine of a GPU that was well for long enough, if it may come back by itself."""
        uuid, control = sample.uuid, self._control
        mark = control.ledger.marks.get(uuid)
        if mark is None or not self._may_return(Reason(mark.reason), sample):
            self._well_since_s.pop(uuid, None)
            return
        returns = [at_s for at_s in self._returns_s[uuid] if now_s - at_s <= RETURNS_REMEMBERED_S]
        since_s = self._well_since_s.setdefault(uuid, now_s)
        if now_s - since_s < WELL_S_FIRST * 2 ** len(returns):
            return
        self._well_since_s.pop(uuid)
        self._was_reset.discard(uuid)
        self._returns_s[uuid].append(now_s)
        control.ledger.apply(GpuUnmarked(now_s, uuid, Reason.GPU_RECOVERED))
        control.occupancy.prove_again(uuid)
        log.warning("GPU %s is well again; it was quarantined: %s", uuid, mark.detail)

    def _may_return(self, reason: Reason, sample: GpuSample) -> bool:
        outcome = _OUTCOMES.get(reason)
        if outcome is None or outcome is Outcome.SERVICE or sample.recovery_action:
            return False
        # The driver needs nothing: that outweighs the table. Where it gives no verdict a reset must be seen.
        return sample.recovery_action == 0 or sample.uuid in self._was_reset


def _carried_on(before: GpuSample, now: GpuSample) -> GpuSample:
    """Return the sample with the counts that it lacks as they were when they were told last."""
    lacking = {
        name: getattr(before, name)
        for name in COUNTS
        if getattr(now, name) is None and getattr(before, name) is not None
    }
    return replace(now, **lacking) if lacking else now


def _growth(before: int | None, now: int | None) -> int:
    """Return by how much a counter grew; one that began anew counts from zero, an unknown one not at all."""
    if before is None or now is None:
        return 0
    return now - before if now >= before else now
