"""Whose tree a process is in, and whom the daemon ends."""

import contextlib
import getpass
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.effects import processes
from scheduler.effects.job_signals import start_ticks
from scheduler.effects.processes import ProcProcesses
from scheduler.model.gpus import GpuProcess
from tests.harness.daemon import until

LOOKS = ProcProcesses()


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def named(pid: int) -> GpuProcess:
    return GpuProcess(pid, start_ticks=start_ticks(pid))


@pytest.mark.parametrize(("at_once", "number"), [(False, signal.SIGTERM), (True, signal.SIGKILL)])
def test_a_process_is_asked_to_end_or_made_to(at_once: bool, number: int) -> None:
    with running("cat") as cat:
        assert LOOKS.end(named(cat.pid), at_once=at_once)
        assert cat.wait() == -number


def test_a_process_that_has_the_pid_of_another_is_left_alone() -> None:
    with running("cat") as cat:
        earlier = replace(named(cat.pid), start_ticks=start_ticks(cat.pid) - 1)
        assert LOOKS.end(earlier, at_once=True)
        assert LOOKS.end(replace(earlier, start_ticks=0), at_once=True), "nobody knows which it was"
        cat.stdin.write(b"alive\n")
        cat.stdin.flush()
        assert cat.stdout.readline() == b"alive\n"


def test_a_process_that_is_gone_is_as_good_as_ended() -> None:
    with running("true") as gone:
        gone.wait()
        assert LOOKS.end(GpuProcess(gone.pid, start_ticks=1), at_once=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may end every process")
def test_a_process_that_we_may_not_end_is_told() -> None:
    assert not LOOKS.end(named(1), at_once=False)


def test_a_tree_is_that_of_its_main_process_and_not_of_who_took_its_pid() -> None:
    with running("sh", "-c", "cat; true") as shell:
        ticks = start_ticks(shell.pid)
        assert LOOKS.belongs_to(shell.pid, shell.pid, ticks)
        assert LOOKS.belongs_to(shell.pid, shell.pid, 0), "not known"
        assert not LOOKS.belongs_to(shell.pid, shell.pid, ticks + 1)


def named_openers(device: Path) -> list[GpuProcess]:
    return [process for process in LOOKS.openers(str(device)) if process.command == "cat"]


def test_who_has_a_device_open_is_named(tmp_path: Path) -> None:
    device = tmp_path / "nvidia0"
    device.touch()
    with device.open() as held:
        # Our own children don't count: the NVML child has every device open.
        shell = subprocess.Popen(["sh", "-c", "cat; true"], stdin=subprocess.PIPE, pass_fds=[held.fileno()])
        try:
            (opener,) = until("the shell's child has it", lambda: named_openers(device))
            assert opener == GpuProcess(
                opener.pid, None, "", getpass.getuser(), "cat", None, start_ticks(opener.pid)
            )
        finally:
            shell.communicate()
    assert LOOKS.openers(str(device)) == ()


def test_processes_are_named_as_far_as_they_are_there() -> None:
    with running("cat") as cat, running("true") as gone:
        gone.communicate()
        found = LOOKS.named((cat.pid, gone.pid))
    assert [(process.pid, process.command) for process in found] == [(cat.pid, "cat"), (gone.pid, "")]


def test_a_pid_namespace_of_its_own_is_told_from_the_hosts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert LOOKS.knows_host_pids(), "a kernel without namespaces"
    (tmp_path / "self/ns/pid").symlink_to("/proc/self/ns/mnt")
    assert not LOOKS.knows_host_pids()
