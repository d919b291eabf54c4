"""Whatever happens: jobs, idle and what nobody knows add up to the counters, to the millijoule."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.events import Event
from scheduler.model.gpus import GpuIdentity
from tests.harness.books import Books, identity, lost, priced, readings, sample
from tests.harness.values import end, start, started, submission

WHOLE = ("GPU-a", "GPU-b")
LAYOUTS = ((("MIG-1", 3), ("MIG-2", 4)), (("MIG-7", 7),), ())
STEPS = ("start", "end", "wait", "book", "kill", "stop", "fail", "blind", "lose", "layout", "price")
# The exact division of a micro-USD among millijoules.
MJ_PER_MWH = 3_600_000_000_000


class World:
    """Two GPUs and one that is cut, jobs on them, and the counters that all must add up to."""

    def __init__(self, books: Books, seed: int) -> None:
        self.books = books
        self.dice = random.Random(seed)
        self.at_s = 1000.0
        self.counters_mj = {uuid: self.dice.randrange(2**40) for uuid in (*WHOLE, "GPU-p")}
        self.first_mj = dict(self.counters_mj)
        self.layout = LAYOUTS[0]
        self.jobs: dict[int, tuple[str, int]] = {}
        self.number = 0
        self.late: list[Event] = []  # what no daemon has heard of yet
        self.is_one_price = self.dice.random() < 0.5
        self.price = self.dice.choice((-0.05, 0.0, 0.0371, 1.0))

    def identities(self) -> list[GpuIdentity]:
        whole = [identity(uuid, index) for index, uuid in enumerate(WHOLE)]
        parts = [identity(uuid, 2, "GPU-p", slices) for uuid, slices in self.layout]
        return [*whole, *(parts or [identity("GPU-p", 2)])]

    def pass_time(self, seconds: float) -> None:
        self.at_s += seconds
        for uuid in self.counters_mj:
            self.counters_mj[uuid] += round(seconds * self.dice.uniform(50_000, 700_000))

    def tick(self, *events: Event, is_blind: bool = False, is_kept: bool = True) -> None:
        """One turn of the loop; what it could not keep, it hears again."""
        gpus = self.identities()
        samples = (
            sample(gpu.uuid, self.at_s, self.counters_mj[gpu.parent_uuid or gpu.uuid], 300.0) for gpu in gpus
        )
        read = None if is_blind else readings(gpus, samples)
        heard = (*self.late, *events)
        self.books.tick(self.at_s, read, *heard, is_kept=is_kept)
        self.late = [] if is_kept else list(heard)

    def step(self, what: str, seconds: float) -> None:
        self.pass_time(seconds)
        match what:
            case "start":
                self.start()
            case "end" | "lose" if self.jobs:
                number = self.dice.choice(sorted(self.jobs))
                del self.jobs[number]
                exited_s = self.at_s - self.dice.uniform(0.0, seconds)
                ended = end(number, at_s=exited_s) if what == "end" else lost(number, self.at_s)
                self.tick(ended, is_blind=self.dice.random() < 0.5)
            case "book":
                self.books.accounts.settle()
                self.books.book(self.at_s)
            case "kill":
                self.books.kill()
            case "stop":
                self.books.stop(self.at_s)
            case "fail":
                self.tick(is_kept=False)
            case "price":
                self.tick(self.priced())
            case "blind":
                self.tick(is_blind=True)
            case "layout" if not any(uuid not in WHOLE for uuid, _ in self.jobs.values()) and not self.late:
                self.tick()
                self.layout = self.dice.choice(LAYOUTS)
                self.tick()
            case _:
                self.tick()

    def priced(self) -> Event:
        """What electricity costs from some moment on: always the same, or not the same, or nobody knows."""
        cut_s = self.at_s + self.dice.uniform(-1000.0, 1000.0)
        second = self.price if self.is_one_price else self.dice.uniform(-0.1, 0.3)
        return priced(self.at_s, (0.0, cut_s, self.price), (cut_s, 1e12, second))

    def start(self) -> None:
        """Start a job on a GPU that the daemon has seen and that has room."""
        self.tick()
        used = dict.fromkeys((gpu.uuid for gpu in self.identities()), 0)
        for uuid, share in self.jobs.values():
            used[uuid] += share
        share = self.dice.choice((250, 500, 1000))
        room = [uuid for uuid, milli in used.items() if milli + share <= 1000]
        if room:
            self.number += 1
            uuid = self.dice.choice(room)
            self.jobs[self.number] = (uuid, share)
            spec = submission(self.number, self.at_s, gpu_share_milli=share)
            run = (start(self.number, 1, self.at_s, uuid), started(self.number, 1, self.at_s))
            self.tick(spec, *run, is_blind=True)


@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.floats(0.001, 3000.0)), max_size=25), st.integers(0, 2**32)
)
def test_bookings_add_up_to_the_counters_exactly(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, float]], seed: int
) -> None:
    books = Books(tmp_path_factory.mktemp("journal"))
    try:
        world = World(books, seed)
        world.tick()
        for what, seconds in steps:
            world.step(what, seconds)
        world.tick()
        books.accounts.settle()
        books.book(world.at_s)
        of = {"MIG-1": "GPU-p", "MIG-2": "GPU-p", "MIG-7": "GPU-p"}
        booked_mj = dict.fromkeys(world.counters_mj, 0)
        for uuid, energy_mj in books.energy_mj("uuid").items():
            booked_mj[of.get(uuid, uuid)] += energy_mj
        assert booked_mj == {
            uuid: world.counters_mj[uuid] - world.first_mj[uuid] for uuid in world.counters_mj
        }
        for group in ("job_id", "class", "tenant"):
            assert sum(books.energy_mj(group).values()) == sum(booked_mj.values())
        by_job = books.energy_mj("job_id")
        for number in range(1, world.number + 1):
            job = books.journal.job(number)
            assert job is not None
            assert job.energy_mj == sum(attempt.energy_mj for attempt in job.attempts)
            assert job.energy_mj == by_job.get(job.id, 0)
        costs_add_up(world)
    finally:
        books.close()


def costs_add_up(world: World) -> None:
    """Jobs and idle pay for all energy once: at one price to the micro-USD of what each counter says."""
    sums = {
        group: (
            sum(row.cost_microusd for row in rows.values()),
            sum(row.unpriced_mj for row in rows.values()),
        )
        for group in ("job_id", "class", "tenant", "uuid")
        for rows in (world.books.rows(group),)
    }
    assert len(set(sums.values())) == 1, sums
    for row in world.books.rows("job_id").values():
        assert 0 <= row.unpriced_mj <= row.energy_mj
        assert row.cost_microusd == 0 or row.unpriced_mj < row.energy_mj
    if not world.is_one_price:
        return
    rate = round(world.price * 1e9)
    rows = world.books.rows("uuid")
    of = {"MIG-1": "GPU-p", "MIG-2": "GPU-p", "MIG-7": "GPU-p"}
    for gpu in world.counters_mj:
        parts = [row for uuid, row in rows.items() if of.get(uuid, uuid) == gpu]
        priced_mj = sum(row.energy_mj - row.unpriced_mj for row in parts)
        assert sum(row.cost_microusd for row in parts) == priced_mj * rate // MJ_PER_MWH
