"""The journal: an append-only chain of events, and the rows derived from it.

Each event carries a hash over the one before it, so a changed, lost or inserted event shows. Events and
the job rows that follow from them are one durable transaction. The values of job environments are secrets:
they are kept apart, outside the chain, and go with their job.
"""

from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.model.events import Event, NodeDrainChanged, UsageEntry
from scheduler.model.gpus import GpuBaseline, GpuBooked, GpuMark
from scheduler.model.jobs import Job
from scheduler.model.power import PowerState
from scheduler.model.power_events import DrawRecorded

# Events of a grid event's time that are looked at.
HISTORY_EVENTS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a listing wants; empty = all. Newest first, from below `before`."""

    states: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    name: str = ""
    tenant: str = ""
    active_only: bool = False
    before: int | None = None
    limit: int = 100


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A sum of usage under one key."""

    key: str
    gpu_ms: int
    energy_mj: int
    value_microusd: int
    preemptions: int
    cost_microusd: int
    unpriced_mj: int


@dataclass(frozen=True, slots=True)
class UsageBooking:
    """One row of usage and the preemptions that come with it."""

    at_s: float
    entry: UsageEntry
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class NodeState:
    """What outlives a restart beside the jobs."""

    marks: dict[str, GpuMark]  # by UUID
    drain: NodeDrainChanged | None
    next_number: int  # of the next job; never used before
    boot_id: str  # under which the last daemon started
    booked: dict[str, GpuBooked]  # by UUID of the whole GPU; replaced, never changed
    booked_seq: int  # of the last booking of all GPUs
    power: PowerState = field(default_factory=PowerState)
    baselines: dict[str, GpuBaseline] = field(default_factory=dict)  # by UUID


@dataclass(frozen=True, slots=True)
class Derived:
    """What follows from the staged events and is written with them."""

    jobs: list[Job]
    environments: dict[int, dict[str, str]]  # by job number
    usage: list[UsageBooking]
    node: NodeState | None  # None = as it was
    draws: list[tuple[int, DrawRecorded]] = field(default_factory=list)  # with the events' numbers


@dataclass(frozen=True, slots=True)
class Expired:
    """What a call of `expire` dropped; `more`: there may be more to drop."""

    job_ids: list[str]
    more: bool


@dataclass(frozen=True, slots=True)
class DrawPiece:
    """Some seconds of what the site drew, one value a second; NaN where nothing is known."""

    at_s: float  # when they were recorded
    first_s: int
    draw_w: "array[float]"
    baseline_w: float | None  # as it was reckoned at `at_s`


class History(Protocol):
    """What a journal knows of the past, by time."""

    def node_state(self) -> NodeState:
        """What events say of the node itself, up to now."""

    def job(self, number: int) -> Job | None:
        """One job by number, final ones too; None where it has aged out."""

    def draws(self, since_s: float, until_s: float) -> list[DrawPiece]:
        """What the site drew, in the order of recording; pieces that begin before or end after, too."""

    def events(self, since_s: float, until_s: float, kinds: tuple[type[Event], ...]) -> list[Event]:
        """The events of these kinds from about a minute before to as long after, in order.

        By the time of recording, and no more than `HISTORY_EVENTS_MAX`.
        """


class Journal(Protocol):
    """Durable events and the rows derived from them."""

    def node_state(self) -> NodeState:
        """What events say of the node itself, up to now."""

    def job(self, number: int) -> Job | None:
        """One job by number, final ones too; None where it has aged out."""

    @property
    def head(self) -> int:
        """Number of the last event, staged ones included."""

    @property
    def watch_floor(self) -> int:
        """Revision before which a watch can't be resumed: something that changed since then is gone."""

    def history(self) -> AbstractContextManager[History]:
        """The past by a connection of its own, for a thread of its own; what is committed by then.

        Raises:
            JournalError: The file can't be read.
        """

    def free_mib(self) -> int:
        """Space left on the journal's disk."""

    @property
    def staged(self) -> bool:
        """Whether events wait for a commit."""

    def stage(self, event: Event) -> int:
        """Put an event behind the others; return its number. Nothing is durable before `commit`."""

    def commit(self, derived: Derived) -> None:
        """Write what was staged, with what follows from it, durably.

        Raises:
            JournalError: Nothing was written and nothing stays staged.
        """

    def abandon(self) -> None:
        """Drop what was staged."""

    def active_jobs(self) -> list[Job]:
        """All jobs that are not final, by number."""

    def jobs(self, which: JobFilter) -> list[Job]:
        """The jobs of a listing, newest first."""

    def jobs_since(self, revision: int) -> Iterator[Job]:
        """Jobs that changed after the revision, oldest change first."""

    def finished_since(self, revision: int) -> list[Job]:
        """Final jobs that changed after the revision."""

    def request(self, request_id: str) -> tuple[int, str] | None:
        """Number of the job that a request_id made, and the digest of that request."""

    def environment(self, number: int) -> dict[str, str]:
        """The job's own environment."""

    def salt(self) -> bytes:
        """The secret salt with which environments are hashed into the chain."""

    def usage(
        self, group: str, start_s: float, end_s: float, after: str | None, limit: int
    ) -> list[UsageRow]:
        """Sums of usage by job_id, tenant, class or uuid, ordered by key, from behind `after`."""

    def expire(self, now_s: float, kept_s: float, kept_max: int) -> Expired:
        """Drop some finished jobs and sealed events that are past retention."""

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the database; for quiet moments."""
