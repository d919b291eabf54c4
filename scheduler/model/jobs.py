"""Jobs and their attempts, as values."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from scheduler.model.mining import Miner
from scheduler.model.reasons import Reason

# Attempts kept on a job; older ones are only counted. A job that restarts for ever stays small.
ATTEMPTS_KEPT = 16

SHARE_MILLI_WHOLE = 1000


class JobClass(IntEnum):
    """What kind of work a job is; the smaller number goes first under `order = "class"`."""

    INFERENCE = 0
    TRAINING = 1
    BATCH = 2
    MINING = 3


class JobState(StrEnum):
    """Where a job stands; the moves between states are in `model/events.py`."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    PREEMPTING = "PREEMPTING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
# The job has a process, or may have one.
LIVE_STATES = frozenset(
    {JobState.STARTING, JobState.RUNNING, JobState.SUSPENDED, JobState.PREEMPTING, JobState.STOPPING}
)


class OnPreempt(StrEnum):
    """What a preemption does to a job."""

    REQUEUE = "REQUEUE"
    SUSPEND = "SUSPEND"
    CANCEL = "CANCEL"


class RestartRule(StrEnum):
    """Whether a job that ended by itself is started again."""

    NEVER = "NEVER"
    ON_FAILURE = "ON_FAILURE"
    ALWAYS = "ALWAYS"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a job says of itself, every default filled in. The environment is kept apart (a secret)."""

    name: str
    command: tuple[str, ...]
    job_class: JobClass
    priority: int  # 0..1000 within the class, larger first
    value_microusd_per_gpu_hour: int
    gpus: int  # whole GPUs; 1 where gpu_share_milli < 1000; 0 for a CPU-only job
    gpu_share_milli: int  # 1..999 a share of one GPU, 1000 whole GPUs
    gpu_memory_mib: int  # per GPU; 0 = not accounted
    gpu_models: tuple[str, ...]  # any of them; empty = all
    cpus: int  # 0 = not accounted
    memory_mib: int  # host memory; 0 = not accounted
    preemptible: bool
    on_preempt: OnPreempt
    grace_s: float
    min_runtime_s: float
    restart_loss_s: float
    exit_zero_is_done: bool
    restart: RestartRule
    working_directory: str = ""
    stop_command: tuple[str, ...] = ()
    expected_duration_s: float | None = None
    deadline_s: float | None = None  # Unix time
    time_limit_s: float | None = None
    draw_w: float | None = None  # per GPU
    pinned_memory_mib: int = 0
    tenant: str = ""
    environment_digest: str = ""  # salted; equal environments of one submission compare equal
    miner: Miner | None = None  # where it tells what it mines; None = it doesn't

    @property
    def is_share(self) -> bool:
        """Whether the job wants a part of one GPU."""
        return self.gpu_share_milli < SHARE_MILLI_WHOLE


@dataclass(frozen=True, slots=True)
class Notice:
    """Told to a job that it must give way: why, since when, until when, for whom."""

    reason: Reason
    decided_s: float
    deadline_s: float
    preempted_by: str = ""  # job id; empty where no job is the cause


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a job. Times are Unix seconds; None = has not happened."""

    number: int  # 1, 2, ...
    gpus: tuple[str, ...]  # UUIDs
    gpu_share_milli: int
    decided_s: float
    launcher_id: str
    preempted: tuple[str, ...] = ()  # ids of the jobs that stopped for this attempt
    started_s: float | None = None
    pid: int | None = None
    pid_start_ticks: int | None = None
    notice: Notice | None = None
    signalled_s: float | None = None
    acknowledged_s: float | None = None
    checkpoint_s: float | None = None
    exited_s: float | None = None
    exit_code: int | None = None  # 128 + signal where a signal ended it, as shells say it
    lost: bool = False  # the exit status can't be known
    end_reason: Reason | None = None
    verified_s: float | None = None  # all its GPUs are proved free
    successor_started_s: float | None = None
    energy_mj: int = 0  # of its GPUs, as far as it is booked
    node: int = 0  # where, of the nodes that are planned together
    suspend_s: float | None = None  # since when it is to be frozen; None = it is to run
    suspended_s: float | None = None  # when it was last frozen
    resumed_s: float | None = None  # when it last ran again; None while it is frozen
    suspended_total_s: float = 0.0  # of freezes that are over

    @property
    def preempted_by(self) -> str:
        """Id of the job that this attempt gave way to; empty where there is none."""
        return self.notice.preempted_by if self.notice else ""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the journal's events have made it."""

    id: str
    number: int
    spec: JobSpec
    request_id: str
    submitted_s: float
    state: JobState
    reason: Reason
    state_since_s: float
    revision: int  # sequence number of the last event that changed it
    request_digest: str = ""
    attempts: tuple[Attempt, ...] = ()  # the last ATTEMPTS_KEPT
    attempt: int = 0  # number of the last attempt
    standing: str = ""  # name of the standing job that it is an instance of
    eligible_s: float = 0.0  # back-off: not started before
    eligible_reason: Reason = Reason.SUBMITTED  # what it backs off from
    preemptions: int = 0  # by jobs; what aging counts
    failures: int = 0  # in a row; what the restart back-off counts
    queued_since_s: float = 0.0
    finished_s: float | None = None
    worked_s: float = 0.0  # work of ended attempts that is saved, without what restarts lost
    detail: str = ""  # facts for a person behind the reason: an errno, a signal, a name
    energy_mj: int = 0  # of all attempts, as far as it is booked

    @property
    def last(self) -> Attempt | None:
        """The newest attempt, if any."""
        return self.attempts[-1] if self.attempts else None

    @property
    def expected_attempt_s(self) -> float | None:
        """How long the live attempt, or else the next, should take from its start; None = unknown."""
        if self.spec.expected_duration_s is None:
            return None
        is_first = self.attempt <= (1 if self.holds else 0)
        left_s = max(0.0, self.spec.expected_duration_s - self.worked_s)
        return left_s if is_first else left_s + self.spec.restart_loss_s

    @property
    def holds(self) -> bool:
        """Whether the job holds its GPUs."""
        return self.state in LIVE_STATES

    @property
    def exit_code(self) -> int | None:
        """Exit code of the newest attempt that has one."""
        return self.attempts[-1].exit_code if self.attempts else None


def job_id(number: int) -> str:
    """The id of the job with this number."""
    return f"j{number}"


def job_number(job_id: str) -> int | None:
    """The number in a job's id; None where it is no id of ours."""
    digits = job_id[1:]
    if not job_id.startswith("j") or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        return None
    return int(digits) if digits == str(int(digits)) else None
