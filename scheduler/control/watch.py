"""Subscriptions to jobs and to the node: a slow reader gets the newest state, never a backlog."""

import asyncio
from dataclasses import dataclass, field

from scheduler.errors import LimitReached
from scheduler.model.jobs import Job

# Changed jobs that wait for one reader. A reader this far behind resumes by revision instead.
UNREAD_JOBS_MAX = 10_000


@dataclass(eq=False, slots=True)
class JobSubscription:
    """Changes of some jobs (all, where `numbers` is empty) since the last `take`."""

    numbers: frozenset[int] = frozenset()
    changed: dict[int, Job] = field(default_factory=dict)
    overrun: bool = False
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, job: Job) -> None:
        """Note a change."""
        if self.numbers and job.number not in self.numbers:
            return
        if len(self.changed) >= UNREAD_JOBS_MAX and job.number not in self.changed:
            self.overrun = True
        else:
            self.changed.pop(job.number, None)  # the order is that of the newest change
            self.changed[job.number] = job
        self._ready.set()

    async def take(self) -> list[Job]:
        """Wait for changes and take them, oldest first.

        Raises:
            LimitReached: The reader was too slow.
        """
        await self._ready.wait()
        self._ready.clear()
        if self.overrun:
            raise LimitReached(
                "watch_unread_jobs_max",
                UNREAD_JOBS_MAX,
                "read faster; resume with since_revision of the last message",
            )
        taken = list(self.changed.values())
        self.changed.clear()
        return taken


class Watchers:
    """All subscriptions."""

    def __init__(self, count_max: int) -> None:
        """Allow so many subscriptions at a time: each holds an RPC, and some must be left for operators."""
        self._count_max = count_max
        self._jobs: set[JobSubscription] = set()
        self._node: set[asyncio.Event] = set()

    def watch_jobs(self, numbers: frozenset[int] = frozenset()) -> JobSubscription:
        """Subscribe to changes of jobs from now on."""
        self._check()
        subscription = JobSubscription(numbers)
        self.join(subscription)
        return subscription

    def join(self, subscription: JobSubscription) -> None:
        """Tell a subscription of every change from now on; it is no client's and counts towards no limit."""
        self._jobs.add(subscription)

    def watch_node(self) -> asyncio.Event:
        """Subscribe to changes of the node; the event is set at each."""
        self._check()
        changed = asyncio.Event()
        self._node.add(changed)
        return changed

    def leave(self, subscription: "JobSubscription | asyncio.Event") -> None:
        """End a subscription."""
        if isinstance(subscription, JobSubscription):
            self._jobs.discard(subscription)
        else:
            self._node.discard(subscription)

    def publish(self, job: Job) -> None:
        """Tell those who watch the job."""
        for subscription in self._jobs:
            subscription.offer(job)

    def publish_node(self) -> None:
        """Tell those who watch the node."""
        for changed in self._node:
            changed.set()

    def _check(self) -> None:
        if len(self._jobs) + len(self._node) >= self._count_max:
            raise LimitReached("watches_max", self._count_max, "close watches that are not read")
