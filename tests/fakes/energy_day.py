"""A day of a node in virtual time: boards that draw, jobs that come and go, and everything that goes wrong.

The accounts under test are the real ones on a real journal; boards and their counters follow nvml.h and what
was measured: a counter in whole millijoules since the driver was loaded, a power reading with its own gain
and with noise. What each board drew, as its own sensor would integrate it, is the truth that the bookings
must come near.
"""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from scheduler.effects.gpus import GpuReadings
from scheduler.model.events import AttemptEnded, Event
from scheduler.model.gpus import GpuIdentity, GpuSample
from scheduler.model.reasons import Reason
from tests.harness.books import Books, identity, lost
from tests.harness.values import end, start, started, submission

DAY_S = 86_400.0
PERIOD_S = 10.0  # a tenth of the usual rate: every error of the splitting is ten times as large
BEGIN_S = 1_700_000_000.0
LAYOUTS = ((("MIG-3", 3), ("MIG-4", 4)), (("MIG-1", 1), ("MIG-2", 2), ("MIG-5", 4)))
WRAP = 2**32
# Sensors differ from board to board by so much (-6 to +11 %: JimZeyuYang/GPU_Power_Benchmark); the counter is
# of the same sensor.
GAINS = (0.94, 1.11)
NOISE_W = 5.0
# How often it happens to a node, on average.
SECONDS_BETWEEN = {
    "kill": 7000.0,
    "stop": 14_000.0,
    "reload": 20_000.0,
    "reboot": 40_000.0,
    "launcher": 30_000.0,
    "lose": 15_000.0,
    "hang": 3000.0,
    "lie": 1500.0,
    "fail": 2000.0,
    "clock": 20_000.0,
    "layout": 4000.0,
    "load": 40.0,
    "job": 60.0,
}


@dataclass
class Board:
    """A whole GPU."""

    uuid: str
    idle_w: float
    natural_w: float
    gain: float
    has_counter: bool = True
    bits: int = 64
    counter_mj: float = 0.0
    drawn_mj: float = 0.0  # the truth, as its own sensor would integrate it
    load: float = 0.0
    is_there: bool = True
    deaf_until_s: float = 0.0  # no reading of it
    sample: tuple[float, int | None, float] | None = None

    @property
    def draw_w(self) -> float:
        if not self.is_there:
            return 0.0
        return (self.idle_w + self.load * (self.natural_w - self.idle_w)) * self.gain

    def pass_time(self, seconds: float) -> float:
        """Draw for so long; return the millijoules."""
        energy_mj = self.draw_w * seconds * 1000
        self.drawn_mj += energy_mj
        self.counter_mj += energy_mj
        return energy_mj

    def read(self, at_s: float, dice: random.Random) -> None:
        """Let it be read."""
        counter_mj = int(self.counter_mj) % 2**self.bits if self.has_counter else None
        self.sample = (at_s, counter_mj, self.draw_w + dice.uniform(-NOISE_W, NOISE_W))


@dataclass
class Run:
    """A job that holds GPUs or instances."""

    number: int
    uuids: tuple[str, ...]
    share: int
    until_s: float
    begun_s: float
    drawn_mj: float = 0.0  # the truth: its share of what its GPUs drew


@dataclass
class Day:
    """One seed's day."""

    directory: Path
    seed: int
    now_s: float = BEGIN_S
    wall_offset_s: float = 0.0
    runs: dict[int, Run] = field(default_factory=dict)
    late: list[Event] = field(default_factory=list)  # what no daemon has heard of yet
    done: list[Run] = field(default_factory=list)
    happened: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.layout = LAYOUTS[0]
        self.books = Books(self.directory)
        gains = [self.dice.uniform(*GAINS) for _ in range(6)]
        self.boards = {
            board.uuid: board
            for board in (
                Board("GPU-0", 71.8, 700.0, gains[0], counter_mj=8e12),
                Board("GPU-1", 71.8, 700.0, gains[1], counter_mj=0.0),
                Board("GPU-old", 54.0, 400.0, gains[2], bits=32, counter_mj=4e9),
                Board("GPU-bare", 10.0, 250.0, gains[3], has_counter=False),
                Board("GPU-cut", 53.7, 400.0, gains[4], counter_mj=5e11),
                Board("GPU-module", 180.0, 1000.0, gains[5], counter_mj=3e11),
            )
        }
        self.number = 0
        self.daemon_until_s = 0.0  # none runs until then

    @property
    def wall_s(self) -> float:
        return self.now_s + self.wall_offset_s

    def live(self) -> None:
        """Let the day pass, and book the rest."""
        self._read_all()
        self._tick()
        for board in self.boards.values():
            board.drawn_mj = 0.0  # it is counted from the first reading on
        while self.now_s < BEGIN_S + DAY_S:
            for what, mean_s in SECONDS_BETWEEN.items():
                if self.dice.random() < PERIOD_S / mean_s:
                    self.happened[what] = self.happened.get(what, 0) + 1
                    getattr(self, f"_{what}")()
            self._pass_time(PERIOD_S)
            self._tick()
        self.daemon_until_s = 0.0
        for board in self.boards.values():
            board.deaf_until_s = 0.0
        for _ in range(20):  # until every counter is believed again
            self._pass_time(PERIOD_S)
            self._tick()
        self.books.accounts.settle()
        self.books.book(self.wall_s)

    # Time -----------------------------------------------------------------------------------

    def _pass_time(self, seconds: float) -> None:
        """Let boards draw and jobs end; each end is heard of with the next tick."""
        until_s = self.now_s + seconds
        for run in sorted(self.runs.values(), key=lambda run: run.until_s):
            if run.until_s <= until_s:
                self._draw(run.until_s)
                self._finish(run)
        self._draw(until_s)
        self._read_all()

    def _draw(self, until_s: float) -> None:
        seconds, self.now_s = max(0.0, until_s - self.now_s), max(self.now_s, until_s)
        for board in self.boards.values():
            energy_mj = board.pass_time(seconds)
            for run in self.runs.values():
                run.drawn_mj += sum(
                    energy_mj * part * run.share / 1000 for part in self._parts(board, run.uuids)
                )

    def _parts(self, board: Board, uuids: tuple[str, ...]) -> list[float]:
        """Which parts of the board these are."""
        if board.uuid in uuids:
            return [1.0]
        if board.uuid != "GPU-cut":
            return []
        slices = sum(each for _, each in self.layout)
        return [each / slices for uuid, each in self.layout if uuid in uuids]

    def _finish(self, run: Run) -> None:
        del self.runs[run.number]
        self.done.append(run)
        self.late.append(end(run.number, at_s=self.wall_s))

    def _read_all(self) -> None:
        for board in self.boards.values():
            if board.is_there and self.now_s >= board.deaf_until_s:
                board.read(self.wall_s, self.dice)

    # The daemon -----------------------------------------------------------------------------

    def _tick(self, *, is_kept: bool = True, is_blind: bool = False) -> None:
        if self.now_s < self.daemon_until_s:
            return
        heard = tuple(self.late)
        self.books.tick(self.wall_s, None if is_blind else self._readings(), *heard, is_kept=is_kept)
        self.late = [] if is_kept else list(heard)

    def _identities(self) -> list[GpuIdentity]:
        found = []
        for index, board in enumerate(self.boards.values()):
            if not board.is_there:
                continue
            if board.uuid == "GPU-cut":
                found += [identity(uuid, index, board.uuid, slices) for uuid, slices in self.layout]
            else:
                found.append(identity(board.uuid, index))
        return found

    def _readings(self) -> GpuReadings:
        samples = []
        for gpu in self._identities():
            board = self.boards[gpu.parent_uuid or gpu.uuid]
            if board.sample is not None and self.now_s >= board.deaf_until_s:
                at_s, counter_mj, power_w = board.sample
                part = sum(self._parts(board, (gpu.uuid,)))
                samples.append(
                    GpuSample(
                        gpu.uuid, at_s, energy_mj=counter_mj, power_w=power_w * part, utilization_ratio=0.9
                    )
                )
        return GpuReadings(tuple(self._identities()), tuple(samples), {}, "1")

    def _is_down(self) -> bool:
        return self.now_s < self.daemon_until_s

    # What happens ---------------------------------------------------------------------------

    def _job(self) -> None:
        """A job starts where there is room, for minutes to hours."""
        if self._is_down():
            return
        self._tick()
        free = dict.fromkeys((gpu.uuid for gpu in self._identities()), 1000)
        for run in self.runs.values():
            for uuid in run.uuids:
                free[uuid] = free.get(uuid, 0) - run.share
        share = self.dice.choice((1000, 1000, 500, 250))
        room = [uuid for uuid, milli in free.items() if milli >= share]
        if not room:
            return
        gang = share == 1000 and self.dice.random() < 0.2
        uuids = tuple(room[:2]) if gang and len(room) > 1 else (self.dice.choice(room),)
        self.number += 1
        lasts_s = self.dice.choice((20.0, 400.0, 3000.0, 9000.0)) * self.dice.uniform(0.5, 1.5)
        run = Run(self.number, uuids, share, self.now_s + lasts_s, self.now_s)
        self.runs[self.number] = run
        self.books.tick(
            self.wall_s,
            None,
            submission(run.number, self.wall_s, gpu_share_milli=share, gpus=len(uuids)),
            start(run.number, 1, self.wall_s, *uuids),
            started(run.number, 1, self.wall_s),
        )

    def _load(self) -> None:
        """Boards work as much as they like; idle ones rest."""
        for board in self.boards.values():
            is_held = any(self._parts(board, run.uuids) for run in self.runs.values())
            board.load = self.dice.random() if is_held else 0.0

    def _kill(self) -> None:
        """The daemon dies; the next one comes after a while, and jobs end meanwhile."""
        if not self._is_down():
            self.books.kill()
            self.daemon_until_s = self.now_s + self.dice.choice((0.0, 10.0, 120.0, 1500.0))

    def _stop(self) -> None:
        if not self._is_down():
            self.books.stop(self.wall_s)
            self.daemon_until_s = self.now_s + self.dice.choice((0.0, 10.0, 120.0))

    def _fail(self) -> None:
        """The disk is full for a tick."""
        self._pass_time(1.0)
        self._tick(is_kept=False)

    def _end_all(self, *, uuids: frozenset[str] | None = None) -> None:
        for run in list(self.runs.values()):
            if uuids is None or not uuids.isdisjoint(run.uuids):
                self._finish(run)

    def _reload(self) -> None:
        """The driver is unloaded, which nobody may use then, and loaded again: counters begin anew."""
        self._end_all()
        self._load()
        self._pass_time(1.0)
        self._tick()
        self._draw(self.now_s + self.dice.uniform(2.0, 15.0))
        for board in self.boards.values():
            board.counter_mj = 0.0

    def _reboot(self) -> None:
        """The node is off, then on; the jobs are lost with it."""
        if self._is_down():
            return
        self.books.kill(rebooted=True)
        self._lose_all(Reason.NODE_REBOOTED)
        for board in self.boards.values():
            board.counter_mj = board.load = 0.0
        self.now_s += self.dice.uniform(100.0, 500.0)
        self._draw(self.now_s + 60.0)
        self._read_all()

    def _launcher(self) -> None:
        """The launcher dies with its jobs, and so did the daemon: nobody knows when they ended."""
        if self._is_down():
            return
        self.books.kill()
        self._draw(self.now_s + self.dice.uniform(1.0, 120.0))
        self._lose_all(Reason.LAUNCHER_LOST)
        self._load()
        self._draw(self.now_s + self.dice.uniform(1.0, 60.0))
        self._read_all()
        self.late = [
            replace(event, at_s=self.wall_s)
            if isinstance(event, AttemptEnded) and event.reason is Reason.LAUNCHER_LOST
            else event
            for event in self.late
        ]

    def _lose_all(self, reason: Reason) -> None:
        """End all jobs, and let nobody know when."""
        for run in list(self.runs.values()):
            del self.runs[run.number]
            run.until_s = -1.0  # nothing is said of its energy
            self.done.append(run)
            self.late.append(lost(run.number, self.wall_s, reason))

    def _lose(self) -> None:
        """A GPU falls off the bus, and is back after a reset."""
        board = self.boards[self.dice.choice(("GPU-0", "GPU-1", "GPU-module"))]
        if self._is_down() or not board.is_there:
            return
        self._end_all(uuids=frozenset({board.uuid}))
        board.is_there = False
        for _ in range(self.dice.randrange(5, 200)):
            self._pass_time(PERIOD_S)
            self._tick()
        board.is_there = True
        board.counter_mj = board.load = 0.0

    def _hang(self) -> None:
        """A GPU does not answer for a while; it goes on drawing."""
        board = self.dice.choice(list(self.boards.values()))
        board.deaf_until_s = self.now_s + self.dice.choice((10.0, 60.0, 400.0))

    def _lie(self) -> None:
        """A counter says something else for a reading or two."""
        board = self.dice.choice([board for board in self.boards.values() if board.has_counter])
        right_mj = board.counter_mj
        wrong = self.dice.choice((-50_000_000.0, 10.0**14, -right_mj / 2))
        if board.bits == 64 and right_mj > 10**10:
            for _ in range(self.dice.randrange(1, 4)):
                board.counter_mj += wrong
                self._read_all()
                board.counter_mj -= wrong
                self._tick()
                self._draw(self.now_s + 1.0)
            self._read_all()

    def _clock(self) -> None:
        """The clock is set."""
        if not self._is_down():
            self._tick()
            self.wall_offset_s += self.dice.choice((-30.0, -2.0, 5.0, 60.0))

    def _layout(self) -> None:
        """An admin cuts the GPU in other parts, while nobody holds any."""
        cut = {uuid for uuid, _ in self.layout}
        if not self._is_down() and all(cut.isdisjoint(run.uuids) for run in self.runs.values()):
            self._pass_time(1.0)
            self._tick()
            self.layout = self.dice.choice(LAYOUTS)


@dataclass(frozen=True)
class Found:
    """What a day's books say beside the truth."""

    error: float  # of the sum of all bookings, relative
    errors: dict[str, float]  # the same by board
    misbooked: float  # of the energy of jobs whose end is known: what others have of it, or they of others'
    by_group: dict[str, int]  # the sum of all bookings, summed up in several ways
    class_mj: dict[str, int]
    jobs: int
    happened: dict[str, int]


def run_day(directory: Path, seed: int) -> Found:
    """Live through a day, and compare."""
    day = Day(directory, seed)
    day.live()
    books = day.books
    parts = {uuid: "GPU-cut" for layout in LAYOUTS for uuid, _ in layout}
    booked_mj = dict.fromkeys(day.boards, 0)
    for uuid, energy_mj in books.energy_mj("uuid").items():
        booked_mj[parts.get(uuid, uuid)] += energy_mj
    by_job = books.energy_mj("job_id")
    known = [run for run in day.done if run.until_s > 0]
    off_mj = sum(abs(by_job.get(f"j{run.number}", 0) - run.drawn_mj) for run in known)
    found = Found(
        error=sum(booked_mj.values()) / sum(board.drawn_mj for board in day.boards.values()) - 1,
        errors={uuid: booked_mj[uuid] / board.drawn_mj - 1 for uuid, board in day.boards.items()},
        misbooked=off_mj / sum(run.drawn_mj for run in known),
        by_group={group: sum(books.energy_mj(group).values()) for group in ("uuid", "job_id", "class")},
        class_mj=books.energy_mj("class"),
        jobs=len(known),
        happened=day.happened,
    )
    books.close()
    return found
