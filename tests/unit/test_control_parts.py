"""The small parts of the loop: who watches, who may have a GPU next, who pays for what."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.control.accounting import BOOKING_PERIOD_S, Accounts
from scheduler.control.board import GpuBoard, NodeSize
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.control.watch import UNREAD_JOBS_MAX, JobSubscription, Watchers
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.errors import LimitReached
from scheduler.model.events import Event, submitted
from scheduler.model.gpus import GpuIdentity, GpuSample
from scheduler.model.jobs import Job
from scheduler.model.policy import Policy
from tests.harness.values import end, start, started, submission

# Watches ---------------------------------------------------------------------------------------


def job(number: int, revision: int = 1) -> Job:
    return submitted(submission(number), revision)


async def test_a_slow_reader_gets_the_newest_state_of_each_job_in_the_order_of_change() -> None:
    subscription = JobSubscription()
    for number, revision in ((1, 1), (2, 2), (1, 3), (3, 4), (2, 5)):
        subscription.offer(job(number, revision))
    assert [(j.number, j.revision) for j in await subscription.take()] == [(1, 3), (3, 4), (2, 5)]


async def test_a_reader_with_nothing_to_read_waits() -> None:
    subscription = JobSubscription(frozenset({2}))
    subscription.offer(job(1))
    waiting = asyncio.ensure_future(subscription.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    subscription.offer(job(2))
    assert [j.number for j in await waiting] == [2]


async def test_a_reader_too_far_behind_is_told_so() -> None:
    subscription = JobSubscription()
    for number in range(UNREAD_JOBS_MAX + 1):
        subscription.offer(job(number))
    with pytest.raises(LimitReached, match="since_revision"):
        await subscription.take()


def test_the_number_of_watches_is_bounded_and_leaving_makes_room() -> None:
    watchers = Watchers(2)
    first = watchers.watch_jobs()
    node = watchers.watch_node()
    with pytest.raises(LimitReached):
        watchers.watch_jobs()
    watchers.leave(first)
    watchers.leave(first)
    watchers.watch_node()
    watchers.publish_node()
    assert node.is_set()


# Accounts --------------------------------------------------------------------------------------

GPUS = ("GPU-a", "GPU-b")


class Books:
    """A ledger, a board with two GPUs, and their accounts."""

    def __init__(self, journal: SqliteJournal) -> None:
        self.ledger = Ledger(journal, Policy())
        self.board = GpuBoard(self.ledger, (NodeSize(8, 1024, 64),))
        self.accounts = Accounts(self.ledger, self.board, Meters())
        self.at_s = 100.0
        self.energy_mj = 0
        self.read()
        self.accounts.read()
        self.accounts.resume(self.at_s)

    def tick(self, seconds: float, *events: Event) -> None:
        """Time passes, each GPU uses 500 W, then events happen."""
        self.at_s += seconds
        self.energy_mj += round(seconds * 500_000)
        self.read()
        self.accounts.advance(self.at_s)
        self.accounts.read()
        for event in events:
            self.ledger.apply(event)
        self.ledger.commit()

    def read(self) -> None:
        """Both GPUs answer."""
        self.board.read(
            GpuReadings(
                identities=tuple(identity(uuid, index) for index, uuid in enumerate(GPUS)),
                samples=tuple(sample(uuid, self.at_s, self.energy_mj) for uuid in GPUS),
                errors={},
                driver_version="1",
            )
        )

    def book(self) -> None:
        """Book and commit."""
        self.accounts.book(self.at_s)
        self.ledger.commit()

    def sums(self, group: str) -> dict[str, tuple[int, int]]:
        """GPU-milliseconds and millijoules by key."""
        rows = self.ledger.journal.usage(group, 0.0, 1e12, None, 100)
        return {row.key: (row.gpu_ms, row.energy_mj) for row in rows}


def identity(uuid: str, index: int) -> GpuIdentity:
    return GpuIdentity(
        uuid=uuid,
        index=index,
        model="NVIDIA H100",
        memory_total_mib=80_000,
        pci_bus_id=f"0000:{index}",
        numa=0,
        minor_number=index,
        power_limit_w_min=200.0,
        power_limit_w_max=700.0,
        power_limit_w_default=700.0,
        driver_version="1",
    )


def sample(uuid: str, at_s: float, energy_mj: int) -> GpuSample:
    return GpuSample(
        uuid=uuid,
        at_s=at_s,
        memory_used_mib=500,
        utilization_ratio=0.5,
        power_w=500.0,
        power_limit_w=700.0,
        energy_mj=energy_mj,
        temperature_celsius=40.0,
        sm_clock_mhz=1000,
    )


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    yield Books(journal)
    journal.close()


def test_time_and_energy_go_to_who_held_the_gpu_and_the_rest_to_idle(books: Books) -> None:
    books.tick(10.0, submission(1, books.at_s), start(1, 1, books.at_s))
    books.tick(0.0, started(1))
    books.tick(30.0, end(1, at_s=books.at_s))
    books.tick(5.0)
    books.book()
    assert books.sums("job_id") == {"": (60_000, 30_000_000), "j1": (30_000, 15_000_000)}
    assert books.sums("uuid") == {"GPU-a": (45_000, 22_500_000), "GPU-b": (45_000, 22_500_000)}


def test_a_share_pays_its_share(books: Books) -> None:
    books.tick(0.0, submission(1, books.at_s, gpu_share_milli=250), start(1, 1, books.at_s))
    books.tick(10.0)
    books.book()
    assert books.sums("job_id")["j1"] == (2_500, 1_250_000)
    assert books.sums("class") == {"TRAINING": (2_500, 1_250_000), "IDLE": (17_500, 8_750_000)}


def test_a_booking_is_due_once_a_period(books: Books) -> None:
    assert books.accounts.due(books.at_s)
    books.tick(1.0)
    books.book()
    assert not books.accounts.due(books.at_s + BOOKING_PERIOD_S - 1)
    assert books.accounts.due(books.at_s + BOOKING_PERIOD_S)


def test_what_could_not_be_booked_is_booked_later(books: Books) -> None:
    books.tick(10.0)
    books.accounts.book(books.at_s)
    books.ledger.abandon()  # the disk was full
    books.book()
    assert books.sums("uuid") == {"GPU-a": (10_000, 5_000_000), "GPU-b": (10_000, 5_000_000)}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 100.0, allow_nan=False), st.sampled_from(["start", "end", "book", "wait"])),
        max_size=30,
    )
)
def test_whatever_happens_jobs_and_idle_add_up_to_the_time_and_the_counters(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, str]]
) -> None:
    journal = SqliteJournal(tmp_path_factory.mktemp("journal"), now_s=0.0)
    try:
        books = Books(journal)
        begun_s, number, runs, bookings = books.at_s, 0, False, 1
        for seconds, what in steps:
            events: tuple[Event, ...] = ()
            if what == "start" and not runs:
                number, runs = number + 1, True
                events = (
                    submission(number, books.at_s),
                    start(number, 1, books.at_s, *GPUS),
                    started(number),
                )
            elif what == "end" and runs:
                runs, events = False, (end(number, at_s=books.at_s),)
            books.tick(seconds, *events)
            if what == "book":
                books.book()
                bookings += 1
        books.book()
        elapsed_ms = (books.at_s - begun_s) * 1000
        # Each booking rounds each entry to a whole millisecond and millijoule.
        for gpu_ms, energy_mj in (books.sums("uuid").get(uuid, (0, 0)) for uuid in GPUS):
            assert gpu_ms == pytest.approx(elapsed_ms, abs=bookings * (number + 1))
            assert energy_mj == pytest.approx(books.energy_mj, abs=bookings * (number + 1))
        by_job = books.sums("job_id").values()
        by_gpu = books.sums("uuid").values()
        assert [sum(row[i] for row in by_job) for i in (0, 1)] == [
            sum(row[i] for row in by_gpu) for i in (0, 1)
        ]
    finally:
        journal.close()
