"""What really happened in a replay: attempts, the timeline, and what each class got, earned and lost.

Everything is taken from the daemon's published changes and the machine's truth; nothing here steers.
"""

import asyncio
import csv
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from scheduler.control.watch import JobSubscription
from scheduler.model.jobs import FINAL_STATES, SHARE_MILLI_WHOLE, Attempt, Job, JobClass, JobState
from scheduler.model.reasons import Reason
from scheduler.simulation.boards import Board
from scheduler.simulation.inputs import JobRow
from scheduler.simulation.machine import Machine, Work
from scheduler.simulation.site import Site

ATTEMPT_COLUMNS = (
    "job_id", "attempt", "node_id", "gpus", "gpu_share_milli", "start_s", "end_s", "end_reason",
)  # fmt: skip
TIMELINE_COLUMNS = (
    "time_s", "arrived_gpu_milli", "allocated_gpu_milli", "running_jobs", "pending_jobs", "draw_w",
    "budget_w", "usd_per_mwh", *(f"{job_class.name.lower()}_gpu_milli" for job_class in JobClass),
)  # fmt: skip
# What an attempt ends for that outlasts the simulation.
SIMULATION_ENDED = "SIMULATION_ENDED"
# The curves of the report have that many points at most; twice as far apart when they are full.
SAMPLES_MAX = 800
SAMPLE_S_FIRST = 60.0
_S_PER_HOUR = 3600.0
# What sums of floats in another order may differ by.
_ENERGY_ERROR = 1e-6
# Progress is told once in so many changes of jobs.
_CHANGES_PER_REPORT = 32


@dataclass(slots=True)
class ClassTally:
    """What the jobs of a class got."""

    jobs: int = 0
    completed: int = 0
    missed: int = 0  # of those that are final: complete too late, or never
    waits_s: "array[float]" = field(default_factory=lambda: array("d"))  # from submission to the first start
    completions_s: "array[float]" = field(default_factory=lambda: array("d"))  # from submission to the end
    gpu_s: float = 0.0
    lost_gpu_s: float = 0.0
    preemptions: int = 0
    value_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Sums up to a moment, for curves."""

    time_s: float
    value_usd: float
    cost_usd: float
    preemptions: tuple[int, ...]  # by class
    lost_gpu_s: tuple[float, ...]  # by class


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a replay is."""

    now_s: float
    arrived: int
    ended: int


@dataclass(slots=True)
class _Tracked:
    """A job that is not final, as the timeline counts it."""

    row: JobRow
    job: Job
    pending: bool = False
    holding: bool = False
    begun: bool = False  # has ever run
    written: int = 0  # number of the last attempt in attempts.csv
    counted: Work = field(default_factory=Work)  # of its work, what the tallies have


class Changes(JobSubscription):
    """Hands each change of a job on at once: nobody is too slow in virtual time."""

    def __init__(self, on_change: Callable[[Job], None]) -> None:
        """Take who is told."""
        super().__init__()
        self._on_change = on_change

    def offer(self, job: Job) -> None:
        self._on_change(job)


class Recorder:
    """Writes attempts.csv and timeline.csv as time goes by, and sums up the rest."""

    def __init__(
        self,
        machine: Machine,
        site: Site,
        nodes: Sequence[str],
        folder: Path,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Take the machine, the site's meter, the nodes' names, the folder, whom to tell how far it is."""
        self.site = site
        self.tallies = {job_class: ClassTally() for job_class in JobClass}
        self.samples: list[Sample] = []
        self.moved = asyncio.Event()  # a board's draw is going elsewhere
        self._machine = machine
        self._nodes = nodes
        self._on_progress = on_progress
        self._rows: dict[str, JobRow] = {}  # announced, and not seen yet
        self._jobs: dict[int, _Tracked] = {}
        self._targets_w = {uuid: board.target_w for uuid, board in machine.boards.items()}
        site.settled(sum(self._targets_w.values()))
        for board in machine.boards.values():
            board.on_change = self._board_changed
        self._arrived_milli = 0
        self._held_milli = dict.fromkeys(JobClass, 0)
        self._running = self._pending = self._arrived = self._ended = self._changes = 0
        self._time_s = 0.0  # of the row of the timeline that is being filled
        self._last_row: tuple[object, ...] = ()
        self._sample_s = SAMPLE_S_FIRST
        self._epoch_s = machine.clock.epoch_s
        self._files: list[TextIO] = []
        self._attempts = self._open(folder / "attempts.csv", ATTEMPT_COLUMNS)
        self._timeline = self._open(folder / "timeline.csv", TIMELINE_COLUMNS)

    def announce(self, row: JobRow) -> None:
        """A job is about to be submitted."""
        self._at(self._now_s())
        self._rows[row.job_id] = row
        self._arrived += 1
        self._arrived_milli += row.gpu_milli
        self.tallies[row.job_class].jobs += 1

    def see(self, job: Job) -> None:
        """A job changed."""
        self._at(self._now_s())
        tracked = self._jobs.get(job.number)
        if tracked is None:
            row = self._rows.pop(job.spec.name, None)
            if row is None:
                return  # it is final; its GPUs were proved free since
            tracked = self._jobs[job.number] = _Tracked(row, job)
        tracked.job = job
        self._count(tracked)
        for attempt in job.attempts:
            if attempt.number > tracked.written and attempt.exited_s is not None:
                notice = attempt.notice
                reason = notice.reason if notice is not None else attempt.end_reason
                self._attempt_ended(tracked, attempt, attempt.exited_s - self._epoch_s, str(reason))
        if job.state in FINAL_STATES:
            self._final(tracked)
        self._changes += 1
        if self._changes % _CHANGES_PER_REPORT == 0:
            self._on_progress(Progress(self._time_s, self._arrived, self._ended))

    async def sample(self) -> None:
        """Take samples for the curves, for ever."""
        while True:
            self._take_sample()
            if len(self.samples) > SAMPLES_MAX:
                del self.samples[1::2]
                self._sample_s *= 2
            await asyncio.sleep(self._sample_s)

    def finish(self) -> None:
        """The simulation ends now: what still runs is cut off."""
        end_s = self._now_s()
        self._at(end_s)
        self._machine.settle()
        for tracked in self._jobs.values():
            last = tracked.job.last
            if tracked.holding and last is not None and last.started_s is not None:
                self._attempt_ended(tracked, last, end_s, SIMULATION_ENDED)
        self.site.advance(end_s)
        self._check_energy(end_s)
        self._write_row()
        self._take_sample()
        self._on_progress(Progress(end_s, self._arrived, self._ended))
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        for board in self._machine.boards.values():
            board.on_change = None

    # The timeline -----------------------------------------------------------------------------

    def _board_changed(self, board: Board, now_s: float) -> None:
        time_s = now_s - self._epoch_s
        self._at(time_s)
        uuid, target_w = board.identity.uuid, board.target_w
        by_w = target_w - self._targets_w[uuid]
        if by_w:
            self._targets_w[uuid] = target_w
            self.site.change(by_w, time_s)
            self.moved.set()

    def _at(self, time_s: float) -> None:
        """Something changes now: what held is a row, and so is each step of price and budget since."""
        if _milliseconds(time_s) <= _milliseconds(self._time_s):
            return
        self._write_row()
        for moment_s in self.site.steps_between(self._time_s, time_s):
            if moment_s < time_s:
                self._time_s = moment_s
                self._write_row()
        self._time_s = time_s

    def _write_row(self) -> None:
        budget_w = self.site.budgets.at(self._time_s)
        price = self.site.prices.at(self._time_s)
        row = (
            self._arrived_milli,
            sum(self._held_milli.values()),
            self._running,
            self._pending,
            f"{self.site.target_w:.1f}",
            "" if budget_w == float("inf") else f"{budget_w:.1f}",
            "" if price != price else f"{price:.4f}",
            *self._held_milli.values(),
        )
        if row != self._last_row:
            self._last_row = row
            self._timeline.writerow((_seconds(self._time_s), *row))

    def _count(self, tracked: _Tracked) -> None:
        job = tracked.job
        pending, holding = job.state is JobState.PENDING, job.holds
        self._pending += pending - tracked.pending
        self._running += holding - tracked.holding
        self._held_milli[tracked.row.job_class] += (holding - tracked.holding) * tracked.row.gpu_milli
        tracked.pending, tracked.holding = pending, holding
        if not tracked.begun and job.attempts and job.attempts[-1].started_s is not None:
            tracked.begun = True
            wait_s = job.attempts[-1].started_s - self._epoch_s - tracked.row.submit_s
            self.tallies[tracked.row.job_class].waits_s.append(wait_s)

    # Sums ---------------------------------------------------------------------------------------

    def _attempt_ended(self, tracked: _Tracked, attempt: Attempt, end_s: float, reason: str) -> None:
        tracked.written = attempt.number
        begun_s = attempt.started_s if attempt.started_s is not None else attempt.decided_s
        start_s = begun_s - self._epoch_s
        gpus = [self._machine.boards[uuid].identity for uuid in attempt.gpus]
        nodes = {gpu.node for gpu in gpus} or {attempt.node}
        # A gang over several nodes names the node of each of its GPUs.
        names = [gpu.node for gpu in gpus] if len(nodes) > 1 else nodes
        row = tracked.row
        self._attempts.writerow(
            (
                row.job_id,
                attempt.number,
                "|".join(self._nodes[node] for node in names),
                "|".join(str(gpu.index) for gpu in gpus),
                row.gpu_share_milli,
                _seconds(start_s),
                _seconds(end_s),
                reason,
            )
        )
        tally = self.tallies[row.job_class]
        tally.gpu_s += max(0.0, end_s - start_s) * row.gpu_milli / SHARE_MILLI_WHOLE
        notice = attempt.notice
        if notice is not None and notice.reason is Reason.PREEMPTED_BY_HIGHER_RANK:
            tally.preemptions += 1
        self._count_work(tracked)

    def _count_work(self, tracked: _Tracked) -> None:
        """Book what the machine did for the job since the last time."""
        job = tracked.job
        work, counted = self._machine.work.get(job.id), tracked.counted
        if work is None:
            return
        tally = self.tallies[tracked.row.job_class]
        gpus = tracked.row.gpu_milli / SHARE_MILLI_WHOLE
        tally.lost_gpu_s += (work.lost_s - counted.lost_s) * gpus
        if tracked.row.job_class is JobClass.MINING:
            useful_s = work.useful_s - counted.useful_s
            tally.value_usd += self._usd_per_hour(job) * useful_s / _S_PER_HOUR
        tracked.counted = Work(work.useful_s, work.lost_s)

    def _final(self, tracked: _Tracked) -> None:
        job, row = tracked.job, tracked.row
        tally = self.tallies[row.job_class]
        assert job.finished_s is not None
        finished_s = job.finished_s - self._epoch_s
        in_time = row.deadline_s is None or _milliseconds(finished_s) <= _milliseconds(row.deadline_s)
        if job.state is JobState.SUCCEEDED and in_time:
            tally.completed += 1
            tally.completions_s.append(finished_s - row.submit_s)
            if row.job_class is not JobClass.MINING:
                tally.value_usd += self._usd_per_hour(job) * row.duration_s / _S_PER_HOUR
        else:
            tally.missed += 1
        self._ended += 1
        del self._jobs[job.number]
        self._machine.work.pop(job.id, None)

    @staticmethod
    def _usd_per_hour(job: Job) -> float:
        spec = job.spec
        per_gpu_usd = spec.value_microusd_per_gpu_hour / 1e6
        return per_gpu_usd * spec.gpus * spec.gpu_share_milli / SHARE_MILLI_WHOLE

    def _take_sample(self) -> None:
        now_s = self._now_s()
        if self.samples and self.samples[-1].time_s >= now_s:
            return
        self.site.advance(now_s)
        self._machine.settle()
        for tracked in self._jobs.values():
            if tracked.holding and tracked.row.job_class is JobClass.MINING:
                self._count_work(tracked)
        tallies = self.tallies.values()
        self.samples.append(
            Sample(
                now_s,
                sum(tally.value_usd for tally in tallies),
                self.site.cost_usd,
                tuple(tally.preemptions for tally in tallies),
                tuple(tally.lost_gpu_s for tally in tallies),
            )
        )

    def _check_energy(self, end_s: float) -> None:
        """The site's closed form and the sum of the boards are two ways to the same joules."""
        now_s = self._epoch_s + end_s
        boards_j = sum(board.energy_j(now_s) for board in self._machine.boards.values())
        site_j = self.site.energy_j / self.site.pue - self.site.base_w * end_s
        assert abs(site_j - boards_j) <= _ENERGY_ERROR * max(1.0, boards_j), (site_j, boards_j)

    def _now_s(self) -> float:
        return self._machine.clock.true_s() - self._epoch_s

    def _open(self, path: Path, columns: tuple[str, ...]) -> Any:
        file = path.open("w", encoding="utf-8", newline="")
        self._files.append(file)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        return writer


def _milliseconds(time_s: float) -> int:
    return round(time_s * 1000.0)


def _seconds(time_s: float) -> str:
    return f"{time_s:.3f}"
