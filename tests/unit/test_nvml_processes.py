"""Whose process a PID in NVML's lists is: read from a /proc of our own."""

import os
from pathlib import Path

import pytest

from scheduler.effects import nvml_processes
from scheduler.model.gpus import GpuProcess

PID = 5_000_000  # more than Linux gives out
NO_SUCH_UID = 2**31 - 3


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Process 4711, of which only the kernel's status is readable."""
    monkeypatch.setattr(nvml_processes, "PROC", tmp_path)
    folder = tmp_path / str(PID)
    folder.mkdir()
    (folder / "status").write_text(
        f"Name:\tx\nUmask:\t0022\nUid:\t{NO_SUCH_UID}\t0\t0\t0\nGid:\t0\t0\t0\t0\n"
    )
    return folder


def command_of(pid: int) -> str:
    (process,) = nvml_processes.merge_processes([("compute", pid, None)])
    return process.command


def test_a_user_without_a_name_is_named_by_number_and_by_who_started_it(process: Path) -> None:
    assert nvml_processes.merge_processes([("compute", PID, 2**20)]) == (
        GpuProcess(PID, 1, "compute", str(NO_SUCH_UID), ""),
    )


def test_the_executable_is_what_counts_and_not_what_the_process_says_of_itself(process: Path) -> None:
    (process / "exe").symlink_to("/usr/bin/miner")
    (process / "comm").write_text("Xorg\n")
    (process / "cmdline").write_bytes(b"/usr/bin/Xorg\0:0\0")
    assert command_of(PID) == "miner"


def test_where_the_executable_can_not_be_read_the_process_is_believed(process: Path) -> None:
    (process / "comm").write_text("python3\n")
    (process / "cmdline").write_bytes(b"/opt/bin/other\0train.py\0")
    assert command_of(PID) == "python3"


def test_a_name_that_the_kernel_cut_is_completed_from_the_arguments(process: Path) -> None:
    (process / "comm").write_text("nvidia-cuda-mps\n")
    (process / "cmdline").write_bytes(b"/usr/bin/nvidia-cuda-mps-server\0-force-tegra\0")
    assert command_of(PID) == "nvidia-cuda-mps-server"


def test_a_name_that_the_kernel_cut_is_not_replaced_by_arguments_that_differ(process: Path) -> None:
    (process / "comm").write_text("nvidia-cuda-mps\n")
    (process / "cmdline").write_bytes(b"Xorg\0")
    assert command_of(PID) == "nvidia-cuda-mps"


def test_a_name_can_not_steer_a_terminal_and_is_bounded(process: Path) -> None:
    (process / "exe").symlink_to("/tmp/\x1b[2Jx\n" + "y" * 250)
    assert command_of(PID) == "?[2Jx?" + "y" * 249


def test_a_pid_without_a_process_is_an_unknown_holder(process: Path) -> None:
    assert nvml_processes.merge_processes([("graphics", PID + 1, 2**30)]) == (
        GpuProcess(0, 1024, "graphics", listed_pid=PID + 1),
    )


@pytest.mark.parametrize("pid", [0, 2**32 - 1, 2**32])
def test_an_impossible_pid_is_an_unknown_holder_each_time(process: Path, pid: int) -> None:
    twice = [("compute", pid, None), ("graphics", pid, None)]
    assert nvml_processes.merge_processes(twice) == (
        GpuProcess(0, listed_pid=pid),
        GpuProcess(0, kind="graphics", listed_pid=pid),
    )


def test_the_order_of_the_lists_does_not_matter_but_for_the_kind(process: Path) -> None:
    me = os.getpid()
    (process.parent / str(me)).symlink_to(process)
    entries = [("compute", PID, 2**20), ("compute", me, 2**21)]
    assert nvml_processes.merge_processes(entries) == nvml_processes.merge_processes(entries[::-1])


def test_a_flood_of_processes_is_bounded(process: Path) -> None:
    flood = [("compute", 0, None)] * (nvml_processes.PROCESSES_MAX + 1)
    assert len(nvml_processes.merge_processes(flood)) == nvml_processes.PROCESSES_MAX
