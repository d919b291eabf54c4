"""Processes of this machine, as far as the daemon must know them: whose tree one belongs to, ending one."""

import os
import signal
from pathlib import Path
from typing import Protocol

_PROC = Path("/proc")
# Generations looked through for an ancestor; deeper trees than this are not ours to explain.
ANCESTORS_MAX = 64


class Processes(Protocol):
    """Looks at processes and ends them."""

    def belongs_to(self, pid: int, main_pid: int) -> bool:
        """Whether `pid` is in the tree of the job whose main process is `main_pid`."""

    def end(self, pid: int, *, at_once: bool) -> bool:
        """Send SIGTERM, or SIGKILL `at_once`; False where that is not permitted."""


class ProcProcesses:
    """Reads /proc.

    A tree is known by its control group where the launcher gave it one, else by ancestry: every
    descendant, orphans too, hangs under the job's supervisor.
    """

    def belongs_to(self, pid: int, main_pid: int) -> bool:
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

    def end(self, pid: int, *, at_once: bool) -> bool:
        try:
            os.kill(pid, signal.SIGKILL if at_once else signal.SIGTERM)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return True


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
