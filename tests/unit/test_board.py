"""The board: which GPUs are there, what they show when empty, and what a hand-over leaves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.control.board import EMPTY_MIB_MAX, GpuBoard, NodeSize, describe
from scheduler.control.ledger import BASELINES_MAX, Ledger
from scheduler.control.meters import Meters
from scheduler.control.telemetry import Telemetry
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.model.events import DaemonStarted, GpuMarked
from scheduler.model.gpus import PID_LIMIT, GpuIdentity, GpuProcess, GpuState
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import CLOSED, OPEN, UNKNOWN
from tests.harness.values import end, start, started, submission, verified

A = GpuIdentity("GPU-a", 0, "NVIDIA H100 80GB HBM3", 81_559)
B = GpuIdentity("GPU-b", 1, "NVIDIA H100 80GB HBM3", 81_559)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    yield Ledger(journal, Policy())
    journal.close()


@pytest.fixture
def board(ledger: Ledger) -> GpuBoard:
    board = GpuBoard(ledger, (NodeSize(8, 1024, 16),), Telemetry(Meters()))
    board.read(GpuReadings((A, B), (), {}))
    return board


def states(board: GpuBoard) -> dict[str, GpuState]:
    return {view.identity.uuid: view.state for view in board.views(0.0)}


def test_a_gpu_that_comes_back_is_new_again(board: GpuBoard) -> None:
    assert board.read(GpuReadings((A,), (), {})) == ()
    assert states(board) == {"GPU-a": GpuState.FREE, "GPU-b": GpuState.LOST}
    assert board.read(GpuReadings((A, B), (), {})) == (B,)


def test_a_gpu_that_says_it_is_lost_is_not_there(board: GpuBoard) -> None:
    board.read(GpuReadings((A, B), (), {"GPU-a": "ERROR_GPU_IS_LOST"}))
    assert states(board) == {"GPU-a": GpuState.LOST, "GPU-b": GpuState.FREE}
    assert board.snapshot(0.0).gpus.state.tolist() == [CLOSED, OPEN]
    assert board.read(GpuReadings((A, B), (), {})) == (A,)


def test_a_gpu_that_is_lost_says_what_it_was_quarantined_for(board: GpuBoard, ledger: Ledger) -> None:
    ledger.apply(
        GpuMarked(1.0, "GPU-a", GpuState.QUARANTINED.value, Reason.GPU_NEEDS_REBOOT, "XID 79 (table 1)")
    )
    board.read(GpuReadings((A, B), (), {"GPU-a": "ERROR_GPU_IS_LOST"}))
    view = board.views(0.0)[0]
    assert (view.state, view.detail) == (GpuState.LOST, "ERROR_GPU_IS_LOST; XID 79 (table 1)")


def test_a_gpu_that_does_not_answer_is_given_to_nobody_and_says_so(board: GpuBoard, ledger: Ledger) -> None:
    telemetry = Telemetry(Meters())
    board = GpuBoard(ledger, board.sizes, telemetry)
    board.read(GpuReadings((A, B), (), {}))
    for event in (submission(1), start(1, 1, 1.0, "GPU-b"), started(1)):
        ledger.apply(event)
    telemetry.silent.update({"GPU-a": "ERROR_TIMEOUT", "GPU-b": "ERROR_TIMEOUT"})
    assert board.snapshot(0.0).gpus.state.tolist() == [CLOSED, CLOSED]
    shown = [(view.state, view.detail) for view in board.views(0.0)]
    why = "it does not answer: ERROR_TIMEOUT"
    assert shown == [(GpuState.HANDOVER, why), (GpuState.ALLOCATED, why)]
    telemetry.silent.clear()
    assert board.snapshot(0.0).gpus.state.tolist() == [OPEN, OPEN]


def test_what_a_gpu_learns_of_its_place_later_is_taken(board: GpuBoard) -> None:
    placed = replace(A, switch=0, island=0)
    assert board.read(GpuReadings((placed, B), (), {})) == (), "it is no new GPU for that"
    assert board.identities == (placed, B)


def test_the_planner_sees_which_gpus_are_near_each_other(board: GpuBoard) -> None:
    board.read(GpuReadings((replace(A, island=3, switch=1, numa=0), replace(B, island=3)), (), {}))
    columns = board.snapshot(0.0).gpus
    assert columns.island.tolist() == [3, 3]
    assert columns.switch.tolist() == [1, UNKNOWN]
    assert columns.numa.tolist() == [0, UNKNOWN]


def test_instances_that_a_new_layout_ended_are_no_more_but_those_that_a_job_holds(
    board: GpuBoard, ledger: Ledger
) -> None:
    parts = [replace(B, uuid=f"MIG-{n}", parent_uuid="GPU-b", slices=1) for n in range(4)]
    board.read(GpuReadings((A, *parts[:2]), (), {}))
    assert list(states(board)) == ["GPU-a", "MIG-0", "MIG-1"], "cut, it can't be used whole"
    for event in (submission(1), start(1, 1, 1.0, "MIG-1"), started(1)):
        ledger.apply(event)
    board.read(GpuReadings((A, *parts[2:]), (), {}))
    assert states(board) == {
        "GPU-a": GpuState.FREE,
        "MIG-1": GpuState.LOST,
        "MIG-2": GpuState.FREE,
        "MIG-3": GpuState.FREE,
    }
    board.read(GpuReadings((A,), (), {}))
    assert states(board)["MIG-2"] is GpuState.LOST, "that its GPU is gone is no new layout"
    board.read(GpuReadings((A, B), (), {}))
    assert list(states(board)) == ["GPU-a", "GPU-b", "MIG-1"]


def test_a_leak_does_not_become_the_baseline(board: GpuBoard) -> None:
    for used_mib in (512, 540, 570, 500):
        board.learn_baseline("GPU-a", used_mib, 1.0)
    assert (board.bookable_mib(A), board.empty_mib("GPU-a")) == (81_559 - 500, 500)


def test_a_baseline_outlives_the_daemon_but_not_its_driver(ledger: Ledger) -> None:
    def board_of_the_next_daemon(driver: str) -> GpuBoard:
        board = GpuBoard(Ledger(ledger.journal, Policy()), (NodeSize(8, 1024, 16),), Telemetry(Meters()))
        board.read(GpuReadings((A, B), (), {}, driver))
        return board

    first = board_of_the_next_daemon("570")
    assert first.empty_mib("GPU-a") == EMPTY_MIB_MAX, "before anything is known"
    first.learn_baseline("GPU-a", 512, 1.0)
    first._ledger.commit()
    assert board_of_the_next_daemon("570").empty_mib("GPU-a") == 512
    upgraded = board_of_the_next_daemon("580")
    assert upgraded.empty_mib("GPU-a") == EMPTY_MIB_MAX
    upgraded.learn_baseline("GPU-a", 700, 2.0)
    assert upgraded.empty_mib("GPU-a") == 700


def test_a_baseline_does_not_outlive_a_reboot(board: GpuBoard, ledger: Ledger) -> None:
    ledger.apply(DaemonStarted(1.0, "0", "boot-1", 1))
    board.learn_baseline(A.uuid, 512, 1.0)
    ledger.apply(DaemonStarted(2.0, "0", "boot-1", 2))
    assert A.uuid in ledger.baselines
    ledger.apply(DaemonStarted(3.0, "0", "boot-2", 3))
    assert not ledger.baselines


def test_a_baseline_that_was_not_kept_is_not_known(board: GpuBoard, ledger: Ledger) -> None:
    board.learn_baseline("GPU-a", 512, 1.0)
    ledger.abandon()
    assert board.empty_mib("GPU-a") == EMPTY_MIB_MAX


def test_baselines_are_bounded_and_the_newest_stay(board: GpuBoard, ledger: Ledger) -> None:
    for number in range(BASELINES_MAX + 1):
        board.learn_baseline(f"MIG-{number}", 12, 1.0)
    assert len(ledger.baselines) == BASELINES_MAX
    assert "MIG-0" not in ledger.baselines
    assert f"MIG-{BASELINES_MAX}" in ledger.baselines


def test_memory_that_is_the_systems_too_proves_nothing(board: GpuBoard) -> None:
    board.read(GpuReadings((replace(A, is_numa_node=True), B), (), {}))
    assert board.empty_mib("GPU-a") is None


def test_a_mark_closes_a_gpu_at_once(board: GpuBoard, ledger: Ledger) -> None:
    assert board.snapshot(0.0).gpus.state.tolist() == [OPEN, OPEN]
    ledger.apply(GpuMarked(0.0, "GPU-b", "cordoned", Reason.CORDONED_BY_OPERATOR, "fan"))
    assert board.snapshot(0.0).gpus.state.tolist() == [OPEN, CLOSED]


def test_an_ended_gang_occupies_each_gpu_until_that_gpu_is_proved_free(
    board: GpuBoard, ledger: Ledger
) -> None:
    for event in (submission(1, gpus=2), start(1, 1, 1.0, "GPU-a", "GPU-b"), started(1), end(1)):
        ledger.apply(event)
    assert states(board) == {"GPU-a": GpuState.HANDOVER, "GPU-b": GpuState.HANDOVER}
    assert board.prove("GPU-a") == []
    assert states(board) == {"GPU-a": GpuState.FREE, "GPU-b": GpuState.HANDOVER}
    holdings = board.snapshot(0.0).holdings
    assert (holdings.job.tolist(), holdings.gpu.tolist()) == ([UNKNOWN], [1])
    assert board.prove("GPU-b") == [("j1", 1)]
    ledger.apply(verified(1))
    assert states(board) == {"GPU-a": GpuState.FREE, "GPU-b": GpuState.FREE}


def test_what_was_given_on_before_a_restart_had_been_proved(board: GpuBoard, ledger: Ledger) -> None:
    for event in (submission(1, gpus=2), start(1, 1, 1.0, "GPU-a", "GPU-b"), started(1), end(1)):
        ledger.apply(event)
    assert board.prove("GPU-a") == []
    for event in (submission(2), start(2, 1, 6.0, "GPU-a"), started(2)):
        ledger.apply(event)
    restarted = GpuBoard(ledger, board.sizes, Telemetry(Meters()))
    restarted.read(GpuReadings((A, B), (), {}))
    assert list(restarted.occupants()) == ["GPU-b"]
    restarted.snapshot(0.0)
    assert restarted.prove("GPU-b") == [], "the other still waits for its proof"


def test_a_gpu_that_nobody_has_looked_at_is_not_given_out(board: GpuBoard) -> None:
    board.doubt("GPU-a")
    assert states(board)["GPU-a"] is GpuState.HANDOVER
    assert board.snapshot(0.0).holdings.share_milli.tolist() == [1000]
    board.prove("GPU-a")
    assert states(board)["GPU-a"] is GpuState.FREE


def test_processes_are_named_as_far_as_they_are_known() -> None:
    found = (GpuProcess(4711, 2048, user="ann", command="python3"), GpuProcess(12), GpuProcess(0))
    assert describe(found) == "pid 4711 (ann, python3, 2048 MiB), pid 12, a process that can't be named"


def test_an_entry_that_names_nobody_says_what_the_list_says() -> None:
    ended = "pid 4711, which has ended or is another process by now (2048 MiB)"
    assert describe((GpuProcess(0, 2048, listed_pid=4711),)) == ended
    scrambled = "a process that can't be named (0 MiB)"
    assert describe((GpuProcess(0, 0, listed_pid=PID_LIMIT),)) == scrambled


def test_a_gpu_whose_memory_is_not_known_has_none_to_book(board: GpuBoard) -> None:
    board.learn_baseline(A.uuid, 500, 1.0)
    assert board.bookable_mib(replace(A, memory_total_mib=0)) == 0
