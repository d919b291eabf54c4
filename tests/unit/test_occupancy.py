"""What is made of what was seen on GPUs: whom SIGKILL doesn't end, whom the policy sends away."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.control.board import GpuBoard, NodeSize
from scheduler.control.handover import Look
from scheduler.control.inbox import HandoverResult
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.control.occupancy import Occupancy
from scheduler.control.telemetry import Telemetry
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.effects.launcher import AttemptKey, TreeStuck
from scheduler.model.gpus import GpuHolders, GpuIdentity, GpuProcess, GpuState
from scheduler.model.jobs import JobState
from scheduler.model.policy import Policy
from scheduler.model.settings import ForeignAction, ForeignConfig, ForeignRule
from tests.harness.values import end, start, started, stop, submission

A = GpuIdentity("GPU-a", 0, "NVIDIA H100 80GB HBM3", 81_559)
TIMEOUT_S = 60.0
KEY = AttemptKey("j1", 1)
STRANGER = GpuProcess(77, 1000, "compute", "alice", "notebook", start_ticks=5)


class Place:
    """A node with one GPU on which a job runs; what is asked of processes is written down."""

    def __init__(self, journal: SqliteJournal) -> None:
        self.ledger = Ledger(journal, Policy())
        self.board = GpuBoard(self.ledger, (NodeSize(8, 1024, 64),), Telemetry(Meters()))
        self.board.read(GpuReadings((A,), (), {}))
        self.ended: list[tuple[int, bool]] = []
        self.may_end = self.knows_host_pids = True
        self.problems: dict[str, str] = {}
        self.watched: list[str] = []
        self.free = False
        rules = (ForeignRule(ForeignAction.EVICT, command="notebook"),)
        control: Any = SimpleNamespace(
            ledger=self.ledger,
            board=self.board,
            problems=self.problems,
            config=SimpleNamespace(
                policy=Policy(handover_timeout_s=TIMEOUT_S), foreign=ForeignConfig(rules=rules)
            ),
            effects=SimpleNamespace(
                processes=SimpleNamespace(
                    named=lambda pids: tuple(GpuProcess(pid, user="bob", command="train") for pid in pids),
                    end=self._end,
                    knows_host_pids=lambda: self.knows_host_pids,
                )
            ),
            orders=SimpleNamespace(watch=lambda uuid, **_: self.watched.append(uuid)),
            verifier=SimpleNamespace(is_watched=lambda uuid: False, judge=self._judge),
        )
        self.occupancy = Occupancy(control)

    def _end(self, process: GpuProcess, *, at_once: bool) -> bool:
        self.ended.append((process.pid, at_once))
        return self.may_end

    def _judge(self, uuid: str, holders: GpuHolders) -> Look:
        return Look(self.free, holders.processes, 4)

    def run_job(self) -> None:
        for event in (submission(1), start(1), started(1)):
            self.ledger.apply(event)

    def see(self, *processes: GpuProcess, uuid: str = "GPU-a", at_s: float = 100.0) -> None:
        self.occupancy.seen(GpuHolders(uuid, at_s, processes, 4), at_s)

    @property
    def mark(self) -> str | None:
        mark = self.ledger.marks.get("GPU-a")
        return None if mark is None else f"{mark.reason}: {mark.detail}"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    yield Place(journal)
    journal.close()


# Trees that SIGKILL does not end ---------------------------------------------------------------


def test_a_tree_that_the_driver_only_takes_its_time_with_is_not_stuck(place: Place) -> None:
    place.run_job()
    place.ledger.apply(stop(1))
    place.occupancy.stuck(TreeStuck(KEY, 100.0, (5, 6)))
    place.occupancy.read(100.0 + TIMEOUT_S - 1)
    assert place.mark is None
    place.ledger.apply(end(1, JobState.PENDING))
    place.occupancy.read(100.0 + TIMEOUT_S)
    assert place.mark is None


def test_a_tree_that_does_not_end_in_time_quarantines_its_gpu_and_is_named(place: Place) -> None:
    place.run_job()
    place.occupancy.stuck(TreeStuck(KEY, 100.0, (5, 6)))
    place.occupancy.read(100.0 + TIMEOUT_S)
    assert place.mark == (
        "PROCESS_TREE_STUCK: SIGKILL did not end pid 5 (bob, train), pid 6 (bob, train) of job j1"
    )


def test_the_quarantine_of_a_tree_ends_with_the_proof_that_it_is_gone_and_not_before(place: Place) -> None:
    place.run_job()
    place.ledger.apply(stop(1))
    place.occupancy.stuck(TreeStuck(KEY, 100.0, (5,)))
    place.occupancy.read(100.0 + TIMEOUT_S)
    place.free = True  # as its own processes may be there
    place.see()
    assert place.mark is not None
    place.ledger.apply(end(1, JobState.PENDING))
    place.see()
    assert (place.mark, place.ledger.leaving) == (None, {})


# Hand-overs ------------------------------------------------------------------------------------


def test_what_a_job_left_on_a_cordoned_gpu_is_proved_gone_later(place: Place) -> None:
    place.run_job()
    place.ledger.apply(end(1, JobState.PENDING))
    place.occupancy.handover(HandoverResult("GPU-a", Look(False, (), 9000), ""), 100.0)
    assert place.mark == "HANDOVER_TIMED_OUT: still held by 9000 MiB in use and no process to name"
    place.see()
    assert place.ledger.leaving
    place.free = True
    place.see()
    assert (place.mark, place.ledger.leaving) == (None, {})


def test_who_has_the_device_open_is_told_where_no_process_is_listed(place: Place) -> None:
    place.run_job()
    place.ledger.apply(end(1, JobState.PENDING))
    holding = (GpuProcess(9, None, "", "root", "dcgm"),)
    place.occupancy.handover(HandoverResult("GPU-a", Look(False, (), 9000, holding=holding), ""), 100.0)
    assert str(place.mark).endswith("no process to name; it is open in pid 9 (root, dcgm)")


def test_where_jobs_run_and_none_left_nothing_is_proved_at_a_start(place: Place) -> None:
    place.occupancy.prove_again("GPU-a")
    assert place.watched == ["GPU-a"]
    place.run_job()
    place.occupancy.prove_again("GPU-a")
    assert place.watched == ["GPU-a"]


# Routine looks ---------------------------------------------------------------------------------


def test_a_look_from_before_the_proof_or_while_a_job_starts_says_nothing(place: Place) -> None:
    place.occupancy.handover(HandoverResult("GPU-a", Look(True, (), 4), ""), 100.0)
    place.see(STRANGER, at_s=99.0)
    assert place.board.foreign == {}
    for event in (submission(1), start(1)):  # its PID is not known yet
        place.ledger.apply(event)
    place.see(STRANGER, at_s=101.0)
    assert (place.board.foreign, place.ended) == ({}, [])


def test_a_free_gpu_whose_lists_can_not_be_read_is_given_to_nobody_before_it_is_proved_free(
    place: Place,
) -> None:
    for code in ("ERROR_TIMEOUT", "ERROR_UNINITIALIZED"):  # late, or let go of
        place.occupancy.unseen("GPU-a", code)
    assert (place.board.state("GPU-a", False, False)[0], place.watched) == (GpuState.FREE, [])
    place.occupancy.unseen("GPU-a", "ERROR_UNKNOWN")
    assert place.watched == ["GPU-a"]
    assert [view.state for view in place.board.views(0.0)] == [GpuState.HANDOVER]


def test_a_held_gpu_whose_lists_can_not_be_read_is_its_jobs(place: Place) -> None:
    place.run_job()
    place.occupancy.unseen("GPU-a", "ERROR_UNKNOWN")
    assert place.watched == []


def test_a_gpu_that_does_not_answer_must_be_proved_free_and_one_that_is_gone_when_it_is_back(
    place: Place,
) -> None:
    place.occupancy.silent(frozenset({"GPU-a", "GPU-elsewhere"}))
    assert place.watched == ["GPU-a"]


def test_who_is_sent_away_is_asked_once_and_then_made_to_go_whatever_other_gpus_show(place: Place) -> None:
    for _ in range(2):
        place.see(STRANGER)
        place.see(uuid="GPU-b")
    assert place.ended == [(77, False), (77, True)]


def test_another_process_of_that_pid_is_asked_first(place: Place) -> None:
    place.see(STRANGER)
    place.see(GpuProcess(77, 1000, "compute", "alice", "notebook", start_ticks=6))
    assert place.ended == [(77, False), (77, False)]


def test_an_entry_that_names_nobody_is_not_sent_away(place: Place) -> None:
    place.see(GpuProcess(0, 1000, listed_pid=77))
    assert place.ended == []
    assert place.board.foreign["GPU-a"][0].listed_pid == 77


def test_that_somebody_may_not_be_ended_is_a_problem_until_he_is_gone(place: Place) -> None:
    place.may_end = False
    place.see(STRANGER)
    assert place.problems == {
        "evict": "GPU GPU-a: no permission to end pid 77 (alice, notebook, 1000 MiB)",
    }
    place.see()
    assert place.problems == {}


def test_nobody_is_ended_where_pids_can_not_be_trusted(place: Place) -> None:
    place.knows_host_pids = False
    place.see(STRANGER)
    assert place.ended == []
    assert "PIDs can't be trusted" in place.problems["evict"]


def test_of_a_gpu_that_is_no_more_nothing_is_remembered(place: Place) -> None:
    place.may_end = False
    place.see(STRANGER)
    place.occupancy.forget(frozenset())
    place.see(uuid="GPU-b")
    assert place.problems == {}


def test_a_closed_gpu_is_still_open_to_the_eye(place: Place) -> None:
    place.see(STRANGER)
    (view,) = place.board.views(0.0)
    assert (view.state, view.detail) == (GpuState.FOREIGN, "pid 77 (alice, notebook, 1000 MiB)")
