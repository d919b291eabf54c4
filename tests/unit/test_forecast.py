"""How long a hand-over will take: from what the job declares, and from what was seen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.control.board import GpuBoard, NodeSize
from scheduler.control.forecast import CONTEXT_S, REMEMBERED_MAX, Forecast
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.control.telemetry import Telemetry
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.model.gpus import GpuIdentity
from scheduler.model.jobs import Job, JobClass, JobState
from scheduler.model.policy import Policy
from tests.harness.values import end, start, started, stop, submission, verified

A = GpuIdentity("GPU-a", 0, "NVIDIA H100 80GB HBM3", 81_559)
B = GpuIdentity("GPU-b", 1, "NVIDIA A100-SXM4-80GB", 81_559)
PENDING = JobState.PENDING
GB_243_MIB = round(243e9 / 2**20)


class Node:
    """A ledger with an H100 and an A100, and what is forecast of them."""

    def __init__(self, journal: SqliteJournal) -> None:
        self.ledger = Ledger(journal, Policy())
        self.board = GpuBoard(self.ledger, (NodeSize(8, 1024, 64),), Telemetry(Meters()))
        self.board.read(GpuReadings((A, B), (), {}))
        self.forecast = Forecast(self.ledger, self.board)

    def run(self, number: int, uuid: str = "GPU-a", attempt: int = 1, **spec: Any) -> Job:
        """A job runs."""
        if attempt == 1:
            self.ledger.apply(submission(number, **spec))
        self.ledger.apply(start(number, attempt, 1.0, uuid))
        return self._apply(started(number, attempt))

    def leave(self, number: int, attempt: int = 1, *, at_s: float = 4.0, took_s: float | None = None) -> Job:
        """It is told to stop, ends and waits again; its GPU is free after so long."""
        self.ledger.apply(stop(number, attempt=attempt))
        job = self._apply(end(number, PENDING, attempt, at_s))
        if took_s is not None:
            self.forecast.learn(job, attempt, at_s + took_s)
            job = self._apply(verified(number, attempt, at_s + took_s))
            self.board.prove(job.attempts[-1].gpus[0])
        return job

    def _apply(self, event: Any) -> Job:
        job = self.ledger.apply(event)
        assert job is not None
        return job


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    yield journal
    journal.close()


@pytest.fixture
def node(journal: SqliteJournal) -> Node:
    return Node(journal)


def test_a_job_of_which_nothing_is_known_leaves_as_contexts_do(node: Node) -> None:
    assert node.forecast.handover_s(node.run(1)) == CONTEXT_S


def test_what_a_job_pins_is_what_its_hand_over_takes(node: Node) -> None:
    job = node.run(1, pinned_memory_mib=GB_243_MIB)
    assert node.forecast.handover_s(job) == pytest.approx(25.9, abs=0.01)


def test_what_jobs_of_the_class_took_on_such_a_gpu_is_what_the_next_one_takes(node: Node) -> None:
    for number, took_s in enumerate((*[2.0] * 8, 5.0, 40.0), 1):
        node.run(number)
        node.leave(number, took_s=took_s)
    assert node.forecast.handover_s(node.run(20)) == 5.0, "nine of ten were as fast"
    assert node.forecast.handover_s(node.run(21, "GPU-b")) == CONTEXT_S, "another model"
    assert node.forecast.handover_s(node.run(22, "GPU-b", job_class=JobClass.BATCH)) == CONTEXT_S
    assert node.forecast.handover_s(node.run(23, pinned_memory_mib=GB_243_MIB)) > 25, "it says more"


def test_what_a_job_took_itself_counts_for_more_than_its_class(node: Node) -> None:
    node.run(1)
    node.leave(1, took_s=3.0)
    node.run(2)
    node.leave(2, took_s=30.0)
    assert node.forecast.handover_s(node.run(1, attempt=2)) == 3.0


def test_what_was_long_ago_is_forgotten(node: Node) -> None:
    slow = REMEMBERED_MAX // 4
    for number in range(1, slow + REMEMBERED_MAX + 1):
        node.run(number)
        node.leave(number, took_s=50.0 if number <= slow else 2.0)
        if number == REMEMBERED_MAX:
            assert node.forecast.handover_s(node.run(1000)) == 50.0
    assert node.forecast.handover_s(node.run(1001)) == 2.0


def test_what_the_ledger_has_of_before_a_restart_is_recalled_once(node: Node) -> None:
    node.run(1)
    node.leave(1, took_s=7.0)
    later = Forecast(node.ledger, node.board)
    other = node.run(2)
    assert later.handover_s(other) == CONTEXT_S
    for _ in range(2):
        later.recall((A, B))
    assert later.handover_s(other) == 7.0


def test_what_the_driver_takes_begins_with_the_kill_or_with_the_end_before_it(node: Node) -> None:
    node.run(1)
    node.leave(1, at_s=4.0, took_s=3.0)  # its grace ran until 13
    assert node.forecast.handover_s(node.run(1, attempt=2)) == 3.0
    # The tree of the next one is only gone when the driver has unpinned its memory.
    node.leave(1, attempt=2, at_s=33.0, took_s=1.0)
    assert node.forecast.handover_s(node.run(1, attempt=3)) == 21.0


def test_gpus_are_free_when_the_last_who_leaves_them_is_gone(node: Node) -> None:
    node.run(1, grace_s=10.0, pinned_memory_mib=GB_243_MIB)
    assert node.forecast.until_free_s(["GPU-a"], [], 100.0) == 0.0, "nobody leaves"
    assert node.forecast.until_free_s(["GPU-b"], [1], 100.0) == 0.0
    assert node.forecast.until_free_s(["GPU-a"], [1], 100.0) == pytest.approx(35.9, abs=0.01)
    node.ledger.apply(stop(1, at_s=100.0))
    assert node.forecast.until_free_s(["GPU-a"], [], 104.0) == pytest.approx(31.9, abs=0.01)
    assert node.forecast.until_free_s(["GPU-a"], [], 120.0) == pytest.approx(15.9, abs=0.01)
    node.ledger.apply(end(1, PENDING, at_s=105.0))
    assert node.forecast.until_free_s(["GPU-a"], [], 115.0) == pytest.approx(15.9, abs=0.01)
    assert node.forecast.until_free_s(["GPU-a"], [], 200.0) == 0.0, "it is late"
