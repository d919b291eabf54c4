"""What may arrive at the loop: commands of clients, reports of effects. Bounded; nothing acts on arrival."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scheduler.control.handover import Look
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.launcher import LauncherGone, LauncherHello, Report
from scheduler.errors import LimitReached
from scheduler.model.gpus import GpuHolders, GpuLimit
from scheduler.model.jobs import Job, JobSpec
from scheduler.model.mining import Hashprice, MinerReading
from scheduler.model.power import BudgetInterval, GridEvent
from scheduler.model.prices import PricePoint

# Commands that wait for one tick. A tick takes all of them, so this is the most that can arrive in one.
COMMANDS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Submission:
    """One job as a client wants it, defaults filled in."""

    spec: JobSpec
    environment: dict[str, str]
    request_id: str = ""
    request_digest: str = ""
    unknown_at: int = -1  # the journal's head when it did not know the request; -1 = nobody looked


@dataclass(frozen=True, slots=True)
class Submit:
    """Accept these jobs, all or none. Answer: the jobs."""

    submissions: tuple[Submission, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a job. Answer: the job."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """Stop a job and queue it again, or end its back-off. Answer: the job."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """A job is ready to be stopped. Answer: the job."""

    job_id: str
    attempt: int  # 0 = the newest


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """A job's work is saved until now. Answer: the job."""

    job_id: str
    attempt: int  # 0 = the newest


@dataclass(frozen=True, slots=True)
class Cordon:
    """Start nothing new on a GPU. Answer: its UUID."""

    gpu: str
    detail: str


@dataclass(frozen=True, slots=True)
class Uncordon:
    """End a cordon or quarantine. Answer: the GPU's UUID."""

    gpu: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Start nothing on the node; `stop_jobs`: what runs gives way."""

    stop_jobs: bool
    release: bool = False


@dataclass(frozen=True, slots=True)
class Undrain:
    """End a drain and a release."""


@dataclass(frozen=True, slots=True)
class SetPowerBudget:
    """What the site may draw, by time; no interval: nothing from here. `valid_until_s`: renewed by then."""

    intervals: tuple[BudgetInterval, ...]
    valid_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class OfferGridEvent:
    """Take a grid event on, or refuse it. Answer: the event."""

    event: GridEvent


@dataclass(frozen=True, slots=True)
class CancelGridEvent:
    """End a grid event. Answer: the event."""

    event_id: str


@dataclass(frozen=True, slots=True)
class SetPrices:
    """What electricity costs, by time; no point: nobody knows, and the price gate is off."""

    points: tuple[PricePoint, ...]


@dataclass(frozen=True, slots=True)
class SetHashprices:
    """What hashrate earns; none: mining is worth what the configuration says."""

    hashprices: tuple[Hashprice, ...]


PowerCommand = SetPowerBudget | OfferGridEvent | CancelGridEvent | SetPrices | SetHashprices
JobCommand = Submit | Cancel | Requeue | Acknowledge | SaveCheckpoint
NodeCommand = Cordon | Uncordon | Drain | Undrain
Command = JobCommand | NodeCommand | PowerCommand


@dataclass(frozen=True, slots=True)
class Asked:
    """A command and where its answer goes."""

    command: Command
    answer: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class HandoverResult:
    """A watch on a GPU ended: it is free, or its time is up."""

    uuid: str
    look: Look | None
    error: str


@dataclass(frozen=True, slots=True)
class HoldersSeen:
    """A routine look at who is on a GPU."""

    holders: GpuHolders


@dataclass(frozen=True, slots=True)
class LookFailed:
    """A routine look could not tell who is on a GPU; `code` says why."""

    uuid: str
    code: str


@dataclass(frozen=True, slots=True)
class LauncherBack:
    """A launcher answers again after the connection had broken."""

    hello: LauncherHello


@dataclass(frozen=True, slots=True)
class LimitSet:
    """A board was asked for a power limit: what it says of it now, or why it could not be set."""

    uuid: str
    asked_w: float
    limit: GpuLimit | None
    error: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class LimitsGivenBack:
    """These boards have the limits back that they were found with."""

    uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Elapsed:
    """A moment came for which the loop wanted to be woken."""


@dataclass(frozen=True, slots=True)
class PricesRead:
    """What the file or URL says that electricity costs."""

    points: tuple[PricePoint, ...]
    source: str


@dataclass(frozen=True, slots=True)
class HashpricesRead:
    """What the file or URL says that hashrate earns."""

    hashprices: tuple[Hashprice, ...]
    source: str


@dataclass(frozen=True, slots=True)
class MinerRead:
    """What the miner of a job's attempt says, or why it can't be read."""

    number: int  # of the job
    attempt: int
    reading: MinerReading | None
    error: str = ""


PowerItem = LimitSet | LimitsGivenBack
MiningItem = HashpricesRead | MinerRead
DaemonItem = LauncherBack | PricesRead | Elapsed
GpuItem = GpuReadings | HandoverResult | HoldersSeen | LookFailed
Item = Asked | Report | GpuItem | PowerItem | MiningItem | DaemonItem


@dataclass(slots=True)
class Inbox:
    """Items in the order of arrival; `wake` is called with each."""

    wake: Callable[[Item], None]
    _items: deque[Item] = field(default_factory=deque)
    _commands: int = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Put a report behind the others."""
        self._items.append(item)
        self.wake(item)

    def ask(self, command: Command) -> asyncio.Future[Any]:
        """Put a command behind the others; the future brings its answer after it is on disk.

        Raises:
            LimitReached: Too many commands wait already.
        """
        if self._commands >= COMMANDS_MAX:
            raise LimitReached("commands_waiting_max", COMMANDS_MAX, "try again in a moment")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._commands += 1
        self.put(Asked(command, answer))
        return answer

    def drain(self) -> list[Item]:
        """Take everything."""
        items = list(self._items)
        self._items.clear()
        self._commands = 0
        return items

    def put_back(self, items: list[Item]) -> None:
        """Put reports back in front: the tick that took them could not keep what follows.

        Not so commands, whose clients are told. Nor a launcher's end: it was acted on, and each try would
        connect once more. Nor a greeting from before it: that launcher is gone.
        """
        ends = [at for at, item in enumerate(items) if isinstance(item, LauncherGone)]
        kept = [
            item
            for at, item in enumerate(items)
            if not isinstance(item, Asked | LauncherGone)
            and not (isinstance(item, LauncherBack) and ends and at < ends[-1])
        ]
        self._items.extendleft(reversed(kept))


def asked_job(answer: Any) -> Job:
    """The answer of a command about one job."""
    assert isinstance(answer, Job)
    return answer
