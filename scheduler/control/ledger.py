"""The jobs of the node as the journal knows them, changed only by events, a transaction a tick.

`apply` folds an event into its job and stages it; `commit` makes the tick durable; `rollback` puts
everything back as it was, so that a full disk loses nothing that was acknowledged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scheduler.control.table import JobTable
from scheduler.effects.journal import Derived, Journal, NodeState, UsageBooking
from scheduler.errors import JournalError
from scheduler.model.events import (
    BaselineLearned,
    DaemonStarted,
    Event,
    GpuMarked,
    GpuUnmarked,
    JobSubmitted,
    LauncherConnected,
    NodeDrainChanged,
    PlanDecided,
    PolicyChanged,
    UsageBooked,
    energy_of_jobs,
    fold,
    submitted,
    with_energy,
)
from scheduler.model.gpus import GpuBaseline, GpuMark, GpuState
from scheduler.model.jobs import FINAL_STATES, Job, JobState, Notice, job_number
from scheduler.model.policy import Policy
from scheduler.model.power import PowerState
from scheduler.model.power_events import (
    BudgetReturns,
    DrawRecorded,
    DrawsLearned,
    GridEventAccepted,
    GridEventDelayed,
    GridEventMoved,
    HashpricesSet,
    HashratesLearned,
    LimitsDecided,
    LimitsRestored,
    PowerBudgetSet,
    PricesSet,
    folded,
)

# A GPU that is cut anew and anew has new instances each time; those learnt first are forgotten.
BASELINES_MAX = 256
# Jobs that ended are looked up again soon: their GPUs are proved free, their energy is booked within seconds.
ENDED_KEPT = 1024

Change = tuple[Job | None, Job]  # before, after


@dataclass(frozen=True, slots=True)
class Committed:
    """What a tick made durable."""

    changes: list[Change]  # one for each job that changed
    steps: list[Change]  # one for each event of a job, in order


@dataclass(frozen=True, slots=True)
class Leaving:
    """An attempt that ended on GPUs which are not all proved free of it."""

    gpus: tuple[str, ...]
    share_milli: int
    memory_mib: int
    notice: Notice | None = None


class Ledger:
    """Active jobs by number, and what an operator decided about the node."""

    def __init__(self, journal: Journal, policy: Policy) -> None:
        self.journal = journal
        self.jobs: dict[int, Job] = {job.number: job for job in journal.active_jobs()}
        self.table = JobTable(policy)
        self.pending = 0
        self.live: dict[int, Job] = {}
        self.stopping: set[int] = set()  # jobs told to go
        self.timed: set[int] = set()  # live jobs with a time limit or a deadline
        self.leaving: dict[tuple[str, int], Leaving] = {}  # by job id and attempt
        for job in self.jobs.values():
            self._index(None, job)
        node = journal.node_state()
        self.marks: dict[str, GpuMark] = node.marks
        self.baselines: dict[str, GpuBaseline] = node.baselines
        self.drain: NodeDrainChanged | None = node.drain
        self.power: PowerState = node.power
        self.next_number = node.next_number
        self._undo: dict[int, Job | None] = {}
        self._steps: list[Change] = []
        self.boot_id = node.boot_id  # of the last daemon; empty before the first
        self.booked = (
            node.booked
        )  # by whole GPU; replaced, never changed, so that a tick compares it at no cost
        self.booked_seq = node.booked_seq
        self._node_before = self._node()
        self._environments: dict[int, dict[str, str]] = {}
        self._usage: list[UsageBooking] = []
        self._draws: list[tuple[int, DrawRecorded]] = []
        self._requests: dict[str, tuple[int, str]] = {}
        self._finals: dict[int, Job] = {}  # of this tick
        self._ended: dict[int, Job] = {}  # those that ended last, as the journal has them

    def job(self, number: int) -> Job | None:
        """A job by number, finished ones too."""
        return (
            self.jobs.get(number)
            or self._finals.get(number)
            or self._ended.get(number)
            or self.journal.job(number)
        )

    def forget(self, job_ids: list[str]) -> None:
        """These have aged out of the journal."""
        for job_id in job_ids:
            self._ended.pop(job_number(job_id) or 0, None)

    def by_id(self, job_id: str) -> Job | None:
        """A job by id, finished ones too."""
        number = job_number(job_id)
        return None if number is None else self.job(number)

    def by_key(self, wanted: str, attempt: int) -> Job | None:
        """The live job whose newest attempt this is."""
        number = job_number(wanted)
        job = self.jobs.get(number) if number is not None else None
        return job if job is not None and job.holds and job.attempt == attempt else None

    def request(self, request_id: str) -> tuple[int, str] | None:
        """Number of the job that a request_id made, and the digest of that request."""
        return self._requests.get(request_id) or self.journal.request(request_id)

    @property
    def needs_plan(self) -> bool:
        """Whether a plan could say anything: somebody waits, must give way, or has a time of its own."""
        return bool(self.pending or self.timed or self.drain)

    def live_jobs(self) -> Iterator[Job]:
        """Jobs that have a process or may have one."""
        return iter(self.live.values())

    def apply(self, event: Event) -> Job | None:
        """Stage an event and fold it; returns the job that it changed."""
        match event:
            case JobSubmitted():
                job = submitted(event, self.journal.stage(event))
                self._put(None, job)
                if event.request_id:
                    self._requests[event.request_id] = (event.number, event.request_digest)
                self.next_number = max(self.next_number, event.number + 1)
                return job
            case GpuMarked():
                self.marks[event.uuid] = GpuMark(
                    event.uuid, GpuState(event.state), event.reason.value, event.detail, event.at_s
                )
            case GpuUnmarked():
                self.marks.pop(event.uuid, None)
            case BaselineLearned():
                known = {uuid: one for uuid, one in self.baselines.items() if uuid != event.uuid}
                while len(known) >= BASELINES_MAX:
                    del known[next(iter(known))]
                # Another value each time: whoever looks sees that something changed.
                self.baselines = {**known, event.uuid: GpuBaseline(event.used_mib, event.driver_version)}
            case DaemonStarted():
                if event.boot_id != self.boot_id:
                    # Nothing of ours outlives a reboot: what is used is the driver's, and limits are its own.
                    self.baselines = {}
                    self.power = replace(self.power, limits={})
                self.boot_id = event.boot_id
            case NodeDrainChanged():
                self.drain = event if event.draining else None
            case UsageBooked():
                self._book(event)
                return None
            case DrawRecorded():
                self._draws.append((self.journal.stage(event), event))
                return None
            case PlanDecided() | PolicyChanged() | LauncherConnected() | GridEventDelayed():
                pass
            case (
                PowerBudgetSet()
                | GridEventAccepted()
                | GridEventMoved()
                | LimitsDecided()
                | LimitsRestored()
                | DrawsLearned()
                | BudgetReturns()
                | PricesSet()
                | HashpricesSet()
                | HashratesLearned()
            ):
                self.power = folded(self.power, event)
            case _:
                number = job_number(event.job_id)
                before = None if number is None else self.job(number)
                if before is None:
                    return None  # aged out in the meantime
                job = fold(before, event, self.journal.head + 1)
                self.journal.stage(event)
                self._put(before, job)
                return job
        self.journal.stage(event)
        return None

    def _book(self, event: UsageBooked) -> None:
        seq = self.journal.stage(event)
        gpus = {gpu.uuid: gpu for gpu in event.gpus}
        if event.whole:
            self.booked_seq, self.booked = seq, gpus
        else:
            self.booked = self.booked | gpus
        self._usage += [UsageBooking(event.at_s, entry) for entry in event.entries]
        for job_id, energy_mj in energy_of_jobs(event).items():
            before = self.by_id(job_id)
            if before is not None:  # else it has aged out
                self._put(before, with_energy(before, energy_mj, seq))

    def keep_environment(self, number: int, environment: dict[str, str]) -> None:
        """Store a job's environment with the transaction."""
        self._environments[number] = environment

    def environment(self, number: int) -> dict[str, str]:
        """What the job's owner set, stored or about to be."""
        staged = self._environments.get(number)
        return self.journal.environment(number) if staged is None else staged

    def book(self, booking: UsageBooking) -> None:
        """Store a usage row that no event carries (a preemption count) with the transaction."""
        self._usage.append(booking)

    @property
    def touched(self) -> bool:
        """Whether anything is waiting for a commit."""
        return self.journal.staged

    def commit(self) -> Committed:
        """Make the tick durable.

        Raises:
            JournalError: Nothing was kept; jobs and node are as they were before the tick.
        """
        if not self.touched:
            return Committed([], [])
        changed = [self._current(number) for number in self._undo]
        try:
            node = self._node()
            self.journal.commit(
                Derived(
                    changed,
                    self._environments,
                    self._usage,
                    node if node != self._node_before else None,
                    self._draws,
                )
            )
        except JournalError:
            self._rollback()
            raise
        before, steps = self._undo, self._steps
        self._ended.update(self._finals)
        while len(self._ended) > ENDED_KEPT:
            del self._ended[next(iter(self._ended))]
        self._begin()
        return Committed([(before[job.number], job) for job in changed], steps)

    def abandon(self) -> None:
        """Drop what was staged: jobs and node are as they were before the tick."""
        self.journal.abandon()
        self._rollback()

    def set_policy(self, policy: Policy) -> None:
        """Rank by another policy from now on."""
        self.table.set_policy(policy, self.jobs)

    def _current(self, number: int) -> Job:
        return self.jobs.get(number) or self._finals[number]

    def _put(self, before: Job | None, job: Job) -> None:
        self._undo.setdefault(job.number, before)
        self._steps.append((before, job))
        self._index(before, job)
        if job.state in FINAL_STATES:
            self.jobs.pop(job.number, None)
            self._finals[job.number] = job
        else:
            self.jobs[job.number] = job

    def _index(self, before: Job | None, job: Job) -> None:
        self.pending += (job.state is JobState.PENDING) - (
            before is not None and before.state is JobState.PENDING
        )
        if job.holds:
            self.live[job.number] = job
        else:
            self.live.pop(job.number, None)
        if job.holds and (job.spec.time_limit_s is not None or job.spec.deadline_s is not None):
            self.timed.add(job.number)
        else:
            self.timed.discard(job.number)
        if job.state in (JobState.PREEMPTING, JobState.STOPPING):
            self.stopping.add(job.number)
        else:
            self.stopping.discard(job.number)
        self.table.put(job)
        for attempt in job.attempts:
            if attempt.exited_s is not None and attempt.verified_s is None and attempt.gpus:
                self.leaving[job.id, attempt.number] = Leaving(
                    attempt.gpus, attempt.gpu_share_milli, job.spec.gpu_memory_mib, attempt.notice
                )
            else:
                self.leaving.pop((job.id, attempt.number), None)

    def _rollback(self) -> None:
        for number, earlier in self._undo.items():
            now = self._current(number)
            self._finals.pop(number, None)
            if earlier is None:
                self.jobs.pop(number, None)
                self.live.pop(number, None)
                self.stopping.discard(number)
                self.timed.discard(number)
                self.table.drop(number)
                self.pending -= now.state is JobState.PENDING
            else:
                self._index(now, earlier)
                if earlier.state in FINAL_STATES:
                    self.jobs.pop(number, None)
                else:
                    self.jobs[number] = earlier
        before = self._node_before
        self.marks, self.drain, self.power = dict(before.marks), before.drain, before.power
        self.baselines = dict(before.baselines)
        self.next_number, self.boot_id = before.next_number, before.boot_id
        self.booked, self.booked_seq = before.booked, before.booked_seq
        self._begin()

    def _node(self) -> NodeState:
        return NodeState(
            marks=dict(self.marks),
            drain=self.drain,
            next_number=self.next_number,
            boot_id=self.boot_id,
            booked=self.booked,
            booked_seq=self.booked_seq,
            baselines=dict(self.baselines),
            power=self.power,
        )

    def _begin(self) -> None:
        self._undo = {}
        self._steps = []
        self._finals = {}
        self._environments = {}
        self._usage = []
        self._draws = []
        self._requests = {}
        self._node_before = self._node()
