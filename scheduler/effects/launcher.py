"""The launcher seen from the daemon: orders, reports, and the Protocol between them.

The launcher is a process of its own that outlives the daemon (`launcher_process.py`). Every order
is idempotent by (job, attempt): said twice, it happens once. Reports go to the callback given to
`connect`, in the order in which the launcher sent them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# Orders ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttemptKey:
    """Names one start of a job."""

    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StartOrder:
    """The attempt's process. Paths are absolute; the launcher makes what is missing."""

    key: AttemptKey
    command: tuple[str, ...]
    environment: dict[str, str]  # the whole environment, nothing is added but the paths below
    working_directory: str  # "" = the job's own directory
    stop_command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopOrder:
    """Notice, then SIGCONT + SIGTERM to the whole tree (and the stop command), then SIGKILL."""

    key: AttemptKey
    deadline_s: float  # Unix time of the SIGKILL; in the past = at once
    notice: dict[str, str | float]  # what the notice file says, JSON


# Reports ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The process runs (its exec succeeded)."""

    key: AttemptKey
    at_s: float
    pid: int
    pid_start_ticks: int  # field 22 of /proc/<pid>/stat


@dataclass(frozen=True, slots=True)
class StartFailed:
    """No process came to be, and none is left. `what` is "command", "working_directory", "files" or "fork".

    "fork" is also said where a stop came before the exec.
    """

    key: AttemptKey
    at_s: float
    what: str
    errno: int
    message: str


@dataclass(frozen=True, slots=True)
class Signalled:
    """SIGTERM went to the whole tree as it was; what handlers fork from now on is left alone till the end."""

    key: AttemptKey
    at_s: float


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The job made its acknowledgement file; its grace is over."""

    key: AttemptKey
    at_s: float


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """The job touched `checkpoint` in its checkpoint directory."""

    key: AttemptKey
    at_s: float


@dataclass(frozen=True, slots=True)
class Frozen:
    """No process of the tree runs any more; what the GPU has in its queues still runs out."""

    key: AttemptKey
    at_s: float


@dataclass(frozen=True, slots=True)
class Thawed:
    """The tree runs again."""

    key: AttemptKey
    at_s: float


@dataclass(frozen=True, slots=True)
class Exited:
    """The main process ended and the whole tree is gone. One of code and signal is not None.

    Without a stop the rest of the tree is killed as soon as the main process ends; after a stop it may take
    until the deadline, and so may the stop command.
    """

    key: AttemptKey
    at_s: float
    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class TreeStuck:
    """SIGKILL was sent, but these processes are still there (state D, say); `Exited` may follow."""

    key: AttemptKey
    at_s: float
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LauncherGone:
    """The connection broke: the launcher died, and with it every tree that it held.

    (Or another daemon connected: the next hello's `launcher_id` tells.) Orders go nowhere until `connect`,
    which returns when what a dead launcher left has been killed.
    """

    at_s: float


Report = (
    Started
    | StartFailed
    | Signalled
    | Acknowledged
    | CheckpointSaved
    | Frozen
    | Thawed
    | Exited
    | TreeStuck
    | LauncherGone
)


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """What the launcher knows of an attempt: the reports so far, oldest first."""

    key: AttemptKey
    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class LauncherHello:
    """Who answers, and all the attempts that it holds (exited ones until they are forgotten)."""

    launcher_id: str  # random, made at the launcher's start
    boot_id: str
    pid: int
    containment: str  # "cgroup" or "supervisor"
    attempts: tuple[HeldAttempt, ...]


class Launcher(Protocol):
    """Starts and ends jobs."""

    async def connect(self, on_report: Callable[[Report], None]) -> LauncherHello:
        """Connect, starting a launcher if none answers (unless systemd owns it).

        Raises:
            LauncherError: None could be reached or started, or it speaks another protocol.
        """

    def prepare(self, order: StartOrder) -> None:
        """Have everything ready for a start that is likely to come, and report nothing yet.

        Nothing of the job runs before `start`; `forget`, or the end of the connection, takes it all back.
        """

    def start(self, order: StartOrder) -> None:
        """Order a start, prepared or not; answered by Started or StartFailed.

        Since it was prepared variables may have changed or come in: the GPUs are often known only now.
        """

    def stop(self, order: StopOrder) -> None:
        """Order a stop; answered by Signalled and Exited. A later order may only shorten the grace."""

    def end_grace(self, key: AttemptKey) -> None:
        """SIGKILL the whole tree now."""

    def freeze(self, key: AttemptKey) -> None:
        """Order that no process of the tree runs; answered by Frozen. A notice, or `thaw`, ends it."""

    def thaw(self, key: AttemptKey) -> None:
        """Let the tree run again; answered by Thawed if it was frozen, or was to be."""

    def forget(self, key: AttemptKey) -> None:
        """The exit is in the journal, or the start will not come: the launcher may drop the attempt."""

    async def close(self) -> None:
        """Let go of the launcher; it lives on while it has a job."""
