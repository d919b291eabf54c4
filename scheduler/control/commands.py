"""Commands of clients as events: what is refused, and with which words."""

import hashlib
import json
import math

from scheduler.control.board import GpuBoard
from scheduler.control.inbox import (
    Acknowledge,
    Cancel,
    Cordon,
    Drain,
    JobCommand,
    NodeCommand,
    Requeue,
    SaveCheckpoint,
    Submission,
    Submit,
    Uncordon,
    Undrain,
)
from scheduler.control.ledger import Ledger
from scheduler.errors import IllegalMove, LimitReached, NotFound, RequestIdReused
from scheduler.model.events import (
    AttemptAcknowledged,
    BackoffCleared,
    CancelRequested,
    CheckpointReported,
    GpuMarked,
    GpuUnmarked,
    JobSubmitted,
    NodeDrainChanged,
    PendingEnded,
    StopDecided,
)
from scheduler.model.gpus import GpuState
from scheduler.model.jobs import FINAL_STATES, Job, JobState, Notice, job_id
from scheduler.model.reasons import Reason


class CommandHandler:
    """Turns a command into events of the ledger; what it returns is answered after the commit."""

    def __init__(self, ledger: Ledger, board: GpuBoard, *, pending_max: int) -> None:
        self._ledger = ledger
        self._board = board
        self.pending_max = pending_max
        self.free_mib: int | None = None  # on the disk of the state directory; None = not looked yet
        self.free_mib_min = 0

    def handle(self, command: JobCommand | NodeCommand, now_s: float) -> object:
        """Apply a command.

        Raises:
            RequestError: It was refused; nothing was changed.
        """
        match command:
            case Submit():
                return self._submit(command.submissions, now_s)
            case Cancel():
                return self._cancel(command.job_id, now_s)
            case Requeue():
                return self._requeue(command.job_id, now_s)
            case Acknowledge():
                return self._acknowledge(command, now_s)
            case SaveCheckpoint():
                return self._checkpoint(command, now_s)
            case Cordon():
                return self._cordon(command, now_s)
            case Uncordon():
                return self._uncordon(command, now_s)
            case Drain():
                self._drain(command, now_s)
                return None
            case Undrain():
                if self._ledger.drain is not None:
                    self._ledger.apply(NodeDrainChanged(now_s, draining=False))
                return None

    def _submit(self, submissions: tuple[Submission, ...], now_s: float) -> list[Job]:
        known = [self._known(submission) for submission in submissions]
        fresh = sum(job is None for job in known)
        if fresh and self.free_mib is not None and self.free_mib < self.free_mib_min:
            raise LimitReached(
                "state.free_mib_min",
                self.free_mib_min,
                f"the state directory has {self.free_mib} MiB left; free some",
            )
        if self._ledger.pending + fresh > self.pending_max:
            raise LimitReached(
                "jobs.pending_max",
                self.pending_max,
                "submit again when some of the waiting jobs have started",
            )
        digests: dict[str, str] = {}
        for one in submissions:
            if (
                one.request_id
                and digests.setdefault(one.request_id, one.request_digest) != one.request_digest
            ):
                raise RequestIdReused(one.request_id, "of the same call")
        made: dict[str, Job] = {}
        jobs = []
        for submission, job in zip(submissions, known, strict=True):
            job = job or made.get(submission.request_id) or self._accept(submission, now_s)
            if submission.request_id:
                made[submission.request_id] = job
            jobs.append(job)
        return jobs

    def _known(self, submission: Submission) -> Job | None:
        """The job that the same request made before."""
        if not submission.request_id or submission.unknown_at == self._ledger.journal.head:
            return None
        found = self._ledger.request(submission.request_id)
        if found is None:
            return None
        job = self._ledger.job(found[0])
        if found[1] != submission.request_digest:
            raise RequestIdReused(submission.request_id, job_id(found[0]))
        return job

    def _accept(self, submission: Submission, now_s: float, standing: str = "") -> Job:
        number = self._ledger.next_number
        job = self._ledger.apply(
            JobSubmitted(
                at_s=now_s,
                job_id=job_id(number),
                number=number,
                spec=submission.spec,
                request_id=submission.request_id,
                request_digest=submission.request_digest,
                standing=standing,
            )
        )
        assert job is not None
        if submission.environment:
            self._ledger.keep_environment(number, submission.environment)
        return job

    def accept_standing(self, submission: Submission, name: str, now_s: float) -> Job:
        """Add an instance of a standing job."""
        return self._accept(submission, now_s, standing=name)

    def _cancel(self, wanted: str, now_s: float) -> Job:
        job = self._job(wanted)
        if job.standing:
            raise IllegalMove(
                f"job {job.id} is an instance of the standing job {job.standing!r}, which the configuration "
                "keeps alive; remove it from [[standing_jobs]] and reload, or cordon the GPU"
            )
        return self.cancel(job, Reason.CANCELLED_BY_REQUEST, now_s)

    def cancel(self, job: Job, reason: Reason, now_s: float) -> Job:
        """End a job that is not final: at once where it waits, with notice and grace where it runs."""
        ledger = self._ledger
        if job.state is JobState.PENDING:
            return _job(ledger.apply(PendingEnded(now_s, job.id, JobState.CANCELLED, reason)))
        if job.state is JobState.PREEMPTING:
            return _job(ledger.apply(CancelRequested(now_s, job.id)))
        if job.state is JobState.STOPPING or (
            job.state is JobState.CANCELLED and job.reason is Reason.CANCELLED_BY_REQUEST
        ):
            return job
        if job.state in FINAL_STATES:
            raise IllegalMove(
                f"job {job.id} has already ended ({job.state}, {job.reason}); nothing to cancel"
            )
        return self.stop(job, JobState.STOPPING, reason, now_s)

    def stop(
        self, job: Job, to: JobState, reason: Reason, now_s: float, grace_s_max: float = math.inf
    ) -> Job:
        """Give a live job its notice; the loop sends the order after the commit."""
        notice = Notice(reason, now_s, now_s + min(job.spec.grace_s, grace_s_max))
        return _job(self._ledger.apply(StopDecided(now_s, job.id, job.attempt, to, notice)))

    def _requeue(self, wanted: str, now_s: float) -> Job:
        job = self._job(wanted)
        if job.state is JobState.PENDING:
            return _job(self._ledger.apply(BackoffCleared(now_s, job.id)))
        if job.state in (JobState.STARTING, JobState.RUNNING, JobState.SUSPENDED):
            return self.stop(job, JobState.PREEMPTING, Reason.REQUEUED_BY_OPERATOR, now_s)
        if job.state is JobState.PREEMPTING:
            return job
        raise IllegalMove(f"job {job.id} is {job.state} and can't be requeued; submit it again")

    def _acknowledge(self, command: Acknowledge, now_s: float) -> Job:
        job = self._live(command.job_id, command.attempt)
        if job.attempts[-1].notice is None:
            raise IllegalMove(f"job {job.id} has no notice to acknowledge; it is {job.state}")
        if job.attempts[-1].acknowledged_s is not None:
            return job
        return _job(self._ledger.apply(AttemptAcknowledged(now_s, job.id, job.attempt)))

    def _checkpoint(self, command: SaveCheckpoint, now_s: float) -> Job:
        job = self._live(command.job_id, command.attempt)
        return _job(self._ledger.apply(CheckpointReported(now_s, job.id, job.attempt)))

    def _cordon(self, command: Cordon, now_s: float) -> str:
        uuid = self.resolve_gpu(command.gpu)
        mark = self._ledger.marks.get(uuid)
        if mark is None or mark.state is not GpuState.QUARANTINED:
            self._ledger.apply(
                GpuMarked(now_s, uuid, GpuState.CORDONED.value, Reason.CORDONED_BY_OPERATOR, command.detail)
            )
        return uuid

    def _uncordon(self, command: Uncordon, now_s: float) -> str:
        uuid = self.resolve_gpu(command.gpu)
        if uuid in self._ledger.marks:
            self._ledger.apply(GpuUnmarked(now_s, uuid, Reason.UNCORDONED_BY_OPERATOR))
        return uuid

    def _drain(self, command: Drain, now_s: float) -> None:
        if command.release:
            holding = [job.id for job in self._ledger.live_jobs() if job.attempts[-1].gpus]
            if holding:
                raise IllegalMove(
                    f"jobs {', '.join(sorted(holding)[:8])} hold GPUs; drain with stop_jobs first"
                )
        now = self._ledger.drain
        released = command.release or (now is not None and now.released)  # until the drain is undone
        change = NodeDrainChanged(now_s, draining=True, stop_jobs=command.stop_jobs, released=released)
        if now is None or (now.stop_jobs, now.released) != (change.stop_jobs, change.released):
            self._ledger.apply(change)

    def resolve_gpu(self, name: str) -> str:
        """UUID of the GPU that is named by UUID, by a unique beginning of one, or by index."""
        gpus = self._board.identities
        found = [gpu.uuid for gpu in gpus if gpu.uuid == name or (name.isdigit() and gpu.index == int(name))]
        if not found and len(name) >= 4:
            found = [gpu.uuid for gpu in gpus if gpu.uuid.lower().startswith(name.lower())]
        if len(found) != 1:
            problem = "name one GPU by its index, its UUID or a unique beginning of it"
            raise NotFound("GPU", name, problem + ("; several match" if found else ""))
        return found[0]

    def _job(self, wanted: str) -> Job:
        job = self._ledger.by_id(wanted)
        if job is None:
            raise NotFound("job", wanted, "`wattshift jobs --all` lists them")
        return job

    def _live(self, wanted: str, attempt: int) -> Job:
        job = self._job(wanted)
        if not job.holds or attempt not in (0, job.attempt):
            raise IllegalMove(
                f"attempt {attempt or job.attempt} of job {job.id} does not run; the job is {job.state}"
            )
        return job


def environment_digest(salt: bytes, environment: dict[str, str]) -> str:
    """Salted SHA-256 of an environment: what the journal's chain knows of a secret."""
    if not environment:
        return ""
    return hashlib.sha256(salt + json.dumps(environment, sort_keys=True).encode()).hexdigest()


def _job(job: Job | None) -> Job:
    assert job is not None
    return job
