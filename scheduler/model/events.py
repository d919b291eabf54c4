"""What happened, as values; the table of moves; and the fold that makes a job of its events.

The table is the program: `MOVES` is all the moves there are, and the state diagram in `docs/`
is drawn from it. `fold` is the only code that changes a job's state.
"""

from dataclasses import dataclass
from typing import Any

from scheduler.errors import TransitionError
from scheduler.model.gpus import GpuBooked
from scheduler.model.jobs import (
    ATTEMPTS_KEPT,
    FINAL_STATES,
    Attempt,
    Job,
    JobSpec,
    JobState,
    Notice,
)
from scheduler.model.policy import Policy
from scheduler.model.power_events import PowerEvent
from scheduler.model.reasons import Reason
from scheduler.model.values import changed

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.PENDING: frozenset({JobState.STARTING, JobState.CANCELLED, JobState.FAILED}),
    JobState.STARTING: frozenset(
        {JobState.RUNNING, JobState.FAILED, JobState.PENDING, JobState.STOPPING, JobState.PREEMPTING}
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.PENDING,
            JobState.PREEMPTING,
            JobState.SUSPENDED,
            JobState.STOPPING,
        }
    ),
    JobState.SUSPENDED: frozenset(
        {JobState.RUNNING, JobState.PREEMPTING, JobState.STOPPING, JobState.FAILED}
    ),
    JobState.PREEMPTING: frozenset(
        {JobState.PENDING, JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}
    ),
    JobState.STOPPING: frozenset({JobState.CANCELLED, JobState.FAILED, JobState.SUCCEEDED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


# Events of one job -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    """A job was accepted."""

    at_s: float
    job_id: str
    number: int
    spec: JobSpec
    request_id: str = ""
    request_digest: str = ""  # salted, of what the client typed: the same request again is known by it
    standing: str = ""


@dataclass(frozen=True, slots=True)
class StartDecided:
    """The plan gave the job its GPUs; the launcher is asked next."""

    at_s: float
    job_id: str
    attempt: int
    gpus: tuple[str, ...]
    launcher_id: str
    reason: Reason
    preempted: tuple[str, ...] = ()
    node: int = 0


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """The job's process runs."""

    at_s: float
    job_id: str
    attempt: int
    pid: int
    pid_start_ticks: int
    reason: Reason = Reason.PROCESS_STARTED


@dataclass(frozen=True, slots=True)
class StopDecided:
    """The job must give way: notice and grace run. `to` is PREEMPTING or STOPPING."""

    at_s: float
    job_id: str
    attempt: int
    to: JobState
    notice: Notice
    lost_gpu_ms: int = 0  # work since the last checkpoint that the plan reckoned with


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A cancel came while the job was already giving way; it ends CANCELLED."""

    at_s: float
    job_id: str


@dataclass(frozen=True, slots=True)
class AttemptSignalled:
    """SIGTERM was sent to the whole tree."""

    at_s: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptAcknowledged:
    """The job said that it is ready to be stopped."""

    at_s: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class CheckpointReported:
    """The job said that its work is saved until now."""

    at_s: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class SuspendDecided:
    """The job is to be frozen where it is: its GPUs stay its own, their watts are wanted."""

    at_s: float
    job_id: str
    attempt: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class ResumeDecided:
    """The job is to run again."""

    at_s: float
    job_id: str
    attempt: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class AttemptSuspended:
    """The whole tree is frozen."""

    at_s: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptResumed:
    """The tree runs again, or is about to be told as ended."""

    at_s: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """The whole tree of an attempt is gone, or never came to be; `to` says what becomes of the job."""

    at_s: float
    job_id: str
    attempt: int
    to: JobState
    reason: Reason
    exit_code: int | None = None
    lost: bool = False
    detail: str = ""
    eligible_s: float = 0.0  # of a requeued job: not started before
    preemptions: int = 0  # the job's counters from now on
    failures: int = 0
    behind_s: float = 0.0  # work that power limits kept it from doing, at full speed


@dataclass(frozen=True, slots=True)
class PendingEnded:
    """A job that waited ends without a start. `to` is CANCELLED or FAILED."""

    at_s: float
    job_id: str
    to: JobState
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BackoffCleared:
    """An operator asked for the job to be considered at once."""

    at_s: float
    job_id: str


@dataclass(frozen=True, slots=True)
class AttemptVerified:
    """Every GPU of the attempt is proved free of it."""

    at_s: float
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class SuccessorStarted:
    """The job for which this attempt stopped runs."""

    at_s: float
    job_id: str
    attempt: int


JobEvent = (
    JobSubmitted
    | StartDecided
    | AttemptStarted
    | StopDecided
    | CancelRequested
    | AttemptSignalled
    | AttemptAcknowledged
    | CheckpointReported
    | SuspendDecided
    | ResumeDecided
    | AttemptSuspended
    | AttemptResumed
    | AttemptEnded
    | PendingEnded
    | BackoffCleared
    | AttemptVerified
    | SuccessorStarted
)


# Events of the node ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DaemonStarted:
    """A daemon took over the state directory."""

    at_s: float
    version: str
    boot_id: str
    pid: int


@dataclass(frozen=True, slots=True)
class LauncherConnected:
    """The daemon speaks to this launcher from now on."""

    at_s: float
    launcher_id: str


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """The policy that plans are made with from now on."""

    at_s: float
    policy: Policy


@dataclass(frozen=True, slots=True)
class GpuMarked:
    """A GPU was cordoned by an operator or quarantined by the daemon."""

    at_s: float
    uuid: str
    state: str  # GpuState: cordoned, quarantined
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class GpuUnmarked:
    """A GPU may be scheduled again."""

    at_s: float
    uuid: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class BaselineLearned:
    """What a GPU showed as used when it was proved that nobody is on it."""

    at_s: float
    uuid: str
    used_mib: int
    driver_version: str


@dataclass(frozen=True, slots=True)
class NodeDrainChanged:
    """An operator drained the node (nothing starts; `stop_jobs`: what runs gives way) or undid it.

    `released`: the daemon holds no handle of any GPU until the drain is undone.
    """

    at_s: float
    draining: bool
    stop_jobs: bool = False
    released: bool = False


@dataclass(frozen=True, slots=True)
class UsageEntry:
    """What one job used of one GPU since the last booking; `job_id` empty = idle."""

    job_id: str
    uuid: str
    tenant: str
    job_class: str  # JobClass's name, or "IDLE", "BASE", "UNKNOWN"
    gpu_ms: int  # milliseconds times share
    energy_mj: int
    value_microusd: int
    attempt: int = 0
    cost_microusd: int = 0  # of the energy whose price was known; below 0 where that was
    unpriced_mj: int = 0  # the energy whose price was not


@dataclass(frozen=True, slots=True)
class UsageBooked:
    """Usage of some GPUs since their last bookings, integers only. `whole`: of all GPUs that there are."""

    at_s: float
    entries: tuple[UsageEntry, ...]
    whole: bool = True
    gpus: tuple[GpuBooked, ...] = ()  # up to where each of them is booked now


@dataclass(frozen=True, slots=True)
class PlanDecided:
    """A plan that acts, or lets a job wait that has just come: its digest and all that it was made from.

    So it can be made again. What it does is in the events behind it.
    """

    at_s: float
    plan_digest: str
    frame: bytes  # the snapshot and what jobs said, as `model/frames.py` has it
    policy: Policy | None = None  # with a whole frame; those that are told against it go by the same


NodeEvent = (
    DaemonStarted
    | LauncherConnected
    | PolicyChanged
    | GpuMarked
    | GpuUnmarked
    | BaselineLearned
    | NodeDrainChanged
    | UsageBooked
    | PlanDecided
)

Event = JobEvent | NodeEvent | PowerEvent


def submitted(event: JobSubmitted, revision: int) -> Job:
    """The job that a submission makes."""
    return Job(
        id=event.job_id,
        number=event.number,
        spec=event.spec,
        request_id=event.request_id,
        request_digest=event.request_digest,
        submitted_s=event.at_s,
        state=JobState.PENDING,
        reason=Reason.SUBMITTED,
        state_since_s=event.at_s,
        revision=revision,
        standing=event.standing,
        queued_since_s=event.at_s,
    )


def fold(job: Job, event: JobEvent, revision: int) -> Job:
    """The job after the event.

    Raises:
        TransitionError: The event does not fit the job's state or attempt; nothing was changed.
    """
    match event:
        case JobSubmitted():
            raise TransitionError(f"job {job.id} was submitted already")
        case StartDecided():
            return _start_decided(job, event, revision)
        case AttemptStarted():
            # Who was asked to stop before it ran stays as he is.
            runs = job.state is JobState.STARTING
            moved = _moved(job, JobState.RUNNING, event.reason, event.at_s) if runs else None
            known = {"pid": event.pid, "pid_start_ticks": event.pid_start_ticks}
            return _noted(job, _current(job, event), revision, moved, started_s=event.at_s, **known)
        case StopDecided():
            attempt = _current(job, event)
            moved = _moved(job, event.to, event.notice.reason, event.at_s)
            woken = _no_longer_suspended(attempt, event.at_s)  # by the notice
            return _noted(job, attempt, revision, moved, notice=event.notice, suspend_s=None, **woken)
        case CancelRequested():
            if job.state is not JobState.PREEMPTING:
                raise TransitionError(f"job {job.id} is {job.state}: stop it by StopDecided or PendingEnded")
            return changed(job, reason=Reason.CANCELLED_BY_REQUEST, revision=revision)
        case AttemptSignalled():
            return _noted(job, _current(job, event), revision, signalled_s=event.at_s)
        case AttemptAcknowledged():
            return _noted(job, _current(job, event), revision, acknowledged_s=event.at_s)
        case CheckpointReported():
            return _noted(job, _current(job, event), revision, checkpoint_s=event.at_s)
        case SuspendDecided() | ResumeDecided():
            return _told(job, event, revision)
        case AttemptSuspended():
            attempt = _current(job, event)
            moved = _moved(job, JobState.SUSPENDED, job.reason, event.at_s)
            return _noted(job, attempt, revision, moved, suspended_s=event.at_s, resumed_s=None)
        case AttemptResumed():
            if job.state is not JobState.SUSPENDED:
                raise TransitionError(f"job {job.id} is {job.state}, not SUSPENDED")
            attempt = _current(job, event)
            moved = _moved(job, JobState.RUNNING, job.reason, event.at_s)
            return _noted(job, attempt, revision, moved, **_no_longer_suspended(attempt, event.at_s))
        case AttemptEnded():
            return _ended(job, event, revision)
        case PendingEnded():
            if job.state is not JobState.PENDING:
                raise TransitionError(f"job {job.id} is {job.state}, not PENDING")
            moved = _moved(job, event.to, event.reason, event.at_s)
            return changed(job, revision=revision, detail=event.detail, finished_s=event.at_s, **moved)
        case BackoffCleared():
            if job.state is not JobState.PENDING:
                raise TransitionError(f"job {job.id} is {job.state}, not PENDING")
            return changed(job, eligible_s=event.at_s, revision=revision)
        case AttemptVerified():
            return _noted(job, _numbered(job, event.attempt), revision, verified_s=event.at_s)
        case SuccessorStarted():
            return _noted(job, _numbered(job, event.attempt), revision, successor_started_s=event.at_s)


def energy_of_jobs(event: UsageBooked) -> dict[str, dict[int, int]]:
    """The energy in millijoules that a booking adds, by job id and attempt."""
    found: dict[str, dict[int, int]] = {}
    for entry in event.entries:
        if entry.job_id and entry.energy_mj:
            attempts = found.setdefault(entry.job_id, {})
            attempts[entry.attempt] = attempts.get(entry.attempt, 0) + entry.energy_mj
    return found


def with_energy(job: Job, energy_mj: dict[int, int], revision: int) -> Job:
    """The job after a booking, by attempt; of an attempt that is not kept any more only the job tells."""
    attempts = tuple(
        changed(one, energy_mj=one.energy_mj + more_mj) if (more_mj := energy_mj.get(one.number, 0)) else one
        for one in job.attempts
    )
    total_mj = job.energy_mj + sum(energy_mj.values())
    return changed(job, attempts=attempts, energy_mj=total_mj, revision=revision)


def _start_decided(job: Job, event: StartDecided, revision: int) -> Job:
    if event.attempt != job.attempt + 1:
        raise TransitionError(f"job {job.id}: attempt {event.attempt} follows {job.attempt}")
    attempt = Attempt(
        number=event.attempt,
        gpus=event.gpus,
        gpu_share_milli=job.spec.gpu_share_milli,
        decided_s=event.at_s,
        launcher_id=event.launcher_id,
        preempted=event.preempted,
        node=event.node,
    )
    return changed(
        job,
        attempts=(*job.attempts, attempt)[-ATTEMPTS_KEPT:],
        attempt=event.attempt,
        revision=revision,
        detail="",
        **_moved(job, JobState.STARTING, event.reason, event.at_s),
    )


def _ended(job: Job, event: AttemptEnded, revision: int) -> Job:
    final = event.to in FINAL_STATES
    attempt = changed(
        _current(job, event),
        exited_s=event.at_s,
        exit_code=event.exit_code,
        lost=event.lost,
        end_reason=event.reason,
    )
    return changed(
        job,
        revision=revision,
        attempts=_with(job, attempt),
        detail=event.detail,
        eligible_s=event.eligible_s,
        eligible_reason=event.reason,
        preemptions=event.preemptions,
        failures=event.failures,
        queued_since_s=job.queued_since_s if final else event.at_s,
        finished_s=event.at_s if final else None,
        worked_s=job.worked_s + max(0.0, _saved_s(job, attempt) - event.behind_s),
        **_moved(job, event.to, event.reason, event.at_s),
    )


def _told(job: Job, event: SuspendDecided | ResumeDecided, revision: int) -> Job:
    """The state follows when the launcher says that it is done; the reason is that of the decision."""
    attempt = _current(job, event)
    if job.state not in (JobState.RUNNING, JobState.SUSPENDED):
        raise TransitionError(f"job {job.id} is {job.state}: only one that runs is frozen")
    suspend_s = event.at_s if isinstance(event, SuspendDecided) else None
    return _noted(job, attempt, revision, {"reason": event.reason}, suspend_s=suspend_s)


def _no_longer_suspended(attempt: Attempt, at_s: float) -> dict[str, float]:
    """What changes of the attempt where it was frozen until then."""
    if attempt.suspended_s is None or attempt.resumed_s is not None:
        return {}
    lasted_s = max(0.0, at_s - attempt.suspended_s)
    return {"resumed_s": at_s, "suspended_total_s": attempt.suspended_total_s + lasted_s}


def _saved_s(job: Job, attempt: Attempt) -> float:
    """What of an ended attempt's work is saved: until it was told to go, else until its last checkpoint."""
    asked = attempt.notice is not None and not attempt.lost
    until_s = (attempt.signalled_s or attempt.exited_s) if asked else attempt.checkpoint_s
    if attempt.started_s is None or until_s is None:
        return 0.0
    lost_s = job.spec.restart_loss_s if attempt.number > 1 else 0.0
    return max(0.0, until_s - attempt.started_s - lost_s)


def _moved(job: Job, to: JobState, reason: Reason, at_s: float) -> dict[str, Any]:
    """What changes of the job as it moves."""
    if to not in MOVES[job.state]:
        raise TransitionError(f"job {job.id} can't move from {job.state} to {to}")
    return {"state": to, "reason": reason, "state_since_s": at_s}


def _current(
    job: Job,
    event: AttemptStarted
    | StopDecided
    | AttemptSignalled
    | AttemptAcknowledged
    | CheckpointReported
    | SuspendDecided
    | ResumeDecided
    | AttemptSuspended
    | AttemptResumed
    | AttemptEnded,
) -> Attempt:
    if not job.holds or event.attempt != job.attempt:
        raise TransitionError(
            f"{type(event).__name__} of attempt {event.attempt}: "
            f"job {job.id} is {job.state}, attempt {job.attempt}"
        )
    return job.attempts[-1]


def _numbered(job: Job, number: int) -> Attempt:
    for attempt in job.attempts:
        if attempt.number == number:
            return attempt
    raise TransitionError(f"job {job.id} keeps no attempt {number}")


def _noted(
    job: Job, attempt: Attempt, revision: int, of_job: dict[str, Any] | None = None, **of_attempt: Any
) -> Job:
    """The job with changes of one of its attempts, and its own."""
    attempts = _with(job, changed(attempt, **of_attempt))
    return changed(job, attempts=attempts, revision=revision, **(of_job or {}))


def _with(job: Job, attempt: Attempt) -> tuple[Attempt, ...]:
    return tuple(attempt if a.number == attempt.number else a for a in job.attempts)
