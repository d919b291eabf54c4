"""Processes of this machine, as far as the daemon must know them: whose tree one belongs to, ending one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from scheduler.effects.job_signals import start_ticks
from scheduler.effects.nvml_processes import owner_of
from scheduler.model.gpus import GpuProcess

_PROC = Path("/proc")
# Generations looked through for an ancestor; deeper trees than this are not ours to explain.
ANCESTORS_MAX = 64
# Who has a device open is for a person to read.
OPENERS_MAX = 16
# The kernel's own number of the first PID namespace (PROC_PID_INIT_INO): the only one whose PIDs NVML tells.
_HOST_PID_NAMESPACE = 0xEFFFFFFC


class Processes(Protocol):
    """Looks at processes and ends them."""

    def belongs_to(self, pid: int, main_pid: int, main_start_ticks: int) -> bool:
        """Whether `pid` is in the tree of the job with this main process; 0 ticks = not known."""

    def end(self, process: GpuProcess, *, at_once: bool) -> bool:
        """Send SIGTERM, or SIGKILL `at_once`; False where that is not permitted.

        Nothing is sent where another process has the PID by now, or where that can't be told.
        """

    def named(self, pids: tuple[int, ...]) -> tuple[GpuProcess, ...]:
        """Whose processes these are, as far as they are there."""

    def openers(self, device: str) -> tuple[GpuProcess, ...]:
        """Who has the device open but us and our children, as far as this user may look.

        Slow: it reads all of /proc.
        """

    def knows_host_pids(self) -> bool:
        """Whether PIDs mean here what they mean to the driver: the host's own PID namespace."""


class ProcProcesses:
    """Reads /proc.

    A tree is known by its control group where the launcher gave it one, else by ancestry: every
    descendant, orphans too, hangs under the job's supervisor.
    """

    def belongs_to(self, pid: int, main_pid: int, main_start_ticks: int) -> bool:
        if main_start_ticks and start_ticks(main_pid) != main_start_ticks:
            return False  # it is gone: whoever has its number now is no job
        if pid == main_pid:
            return True
        group, own = _cgroup(main_pid), _cgroup(os.getpid())
        if group and group not in ("/", own):
            return _cgroup(pid) == group or _cgroup(pid).startswith(group + "/")
        roots = {main_pid, _parent(main_pid)} - {0, 1}
        ancestor = pid
        for _ in range(ANCESTORS_MAX):
            ancestor = _parent(ancestor)
            if ancestor in roots:
                return True
            if ancestor <= 1:
                return False
        return False

    def end(self, process: GpuProcess, *, at_once: bool) -> bool:
        try:
            # The descriptor means one process whatever becomes of its number.
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return True
        try:
            if not process.start_ticks or start_ticks(process.pid) != process.start_ticks:
                return True
            signal.pidfd_send_signal(fd, signal.SIGKILL if at_once else signal.SIGTERM)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        finally:
            os.close(fd)
        return True

    def named(self, pids: tuple[int, ...]) -> tuple[GpuProcess, ...]:
        return tuple(_named(pid) for pid in pids)

    def openers(self, device: str) -> tuple[GpuProcess, ...]:
        found, own = [], os.getpid()
        for entry in sorted(_PROC.glob("[0-9]*"), key=lambda path: int(path.name)):
            pid = int(entry.name)
            if own in (pid, _parent(pid)) or device not in _open_files(entry):
                continue
            found.append(_named(pid))
        return tuple(found[:OPENERS_MAX])

    def knows_host_pids(self) -> bool:
        try:
            return (_PROC / "self/ns/pid").stat().st_ino == _HOST_PID_NAMESPACE
        except OSError:
            return True  # no namespaces in this kernel


def _named(pid: int) -> GpuProcess:
    owner = owner_of(pid)
    if owner is None:
        return GpuProcess(pid, None, "")
    return GpuProcess(pid, None, "", owner.user, owner.command, None, owner.start_ticks)


def _open_files(process: Path) -> Iterator[str]:
    """Yield what the process has open; nothing where we may not look."""
    try:
        for link in (process / "fd").iterdir():
            yield str(link.readlink())
    except OSError:  # another user's, or it ended while we looked
        return


def _cgroup(pid: int) -> str:
    """The process's path in the unified hierarchy; empty where there is none."""
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:] for line in lines if line.startswith("0::")), "")


def _parent(pid: int) -> int:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])
