"""Looking at and signalling processes that are not our own children."""

import os
import signal
from collections.abc import Callable

# Listings until no new process turns up, and kills until none is left. What forks faster meets its deadline,
# or the next attempt to kill it.
_ROUNDS_MAX = 8
# Letters of /proc/<pid>/stat: stopped, stopped by a tracer, zombie, dead; and waiting where no signal comes.
_STILL, _IN_KERNEL = frozenset((b"T", b"t", b"Z", b"X")), b"D"


def start_ticks(pid: int) -> int:
    """Return field 22 of /proc/<pid>/stat, which with the pid names a process for ever; 0 if unreadable."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0  # no descriptor left, say; the process is there all the same
    try:
        text = os.read(fd, 4096)
    except OSError:
        return 0
    finally:
        os.close(fd)
    # The name (field 2) may hold spaces and parentheses; after its last ")" comes field 3.
    return int(text[text.rindex(b")") + 2 :].split()[19])


def descendants(pid: int) -> set[int]:
    """Return the pids of everything below a process, as far as one look can tell."""
    found: set[int] = set()
    unread = [pid]
    while unread:
        for child in children(unread.pop()):
            if child not in found:
                found.add(child)
                unread.append(child)
    return found


def children(pid: int) -> list[int]:
    """Return the pids of a process's children, all its threads', as far as one look can tell."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            fd = os.open(f"/proc/{pid}/task/{thread}/children", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        text = b""
        try:
            while piece := os.read(fd, 65536):
                text += piece
        except OSError:
            pass  # it ended while we read; what it had is listed elsewhere now
        finally:
            os.close(fd)
        found += map(int, text.split())
    return found


def signal_tree(members: Callable[[], set[int]], *signals: int) -> set[int]:
    """Send the signals, in order, to each process that `members` lists; return which they were.

    All are found before the first is signalled: what a handler forks then (to save the work, to say so) must
    be left alone. And each is listed once more after its descriptor is open, so that a number that changed
    hands between listing and signalling hits nobody else.
    """
    opened: dict[int, int] = {}
    try:
        for _ in range(_ROUNDS_MAX):
            listed = members()
            if listed <= opened.keys():
                break
            for pid in sorted(listed - opened.keys()):
                try:
                    opened[pid] = os.pidfd_open(pid)
                except OSError:
                    continue  # gone already, or no descriptor is left; the next round tries again
        signalled = listed & opened.keys()
        for pid in sorted(signalled):
            for number in signals:
                try:
                    signal.pidfd_send_signal(opened[pid], number)
                except OSError:
                    break  # gone meanwhile
    finally:
        for fd in opened.values():
            os.close(fd)
    return signalled


def stop_tree(members: Callable[[], set[int]]) -> None:
    """SIGSTOP each process that `members` lists, and what these forked meanwhile."""
    stopped: set[int] = set()

    def left() -> set[int]:
        return members() - stopped

    for _ in range(_ROUNDS_MAX):
        new = signal_tree(left, signal.SIGSTOP)
        if not new:
            return
        stopped |= new


def wake_vforked(members: Callable[[], set[int]]) -> None:
    """SIGCONT the children of those that are in the kernel: some wait in vfork for a child to exec.

    The kernel doesn't stop such a parent before, and a stopped child never execs. (dash forks so.)
    """

    def awaited() -> set[int]:
        return {child for pid in members() if _IN_KERNEL in _states(pid) for child in children(pid)}

    signal_tree(awaited, signal.SIGCONT)


def runs(pid: int) -> bool:
    """Say whether a process is there and neither stopped nor dead; each of its threads is looked at."""
    return not _states(pid) <= _STILL


def _states(pid: int) -> set[bytes]:
    """Return the letters of a process's threads, as /proc/<pid>/stat has them; none if it is gone."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return set()
    return {letter for thread in threads if (letter := _state(pid, thread))}


def _state(pid: int, thread: str) -> bytes:
    try:
        fd = os.open(f"/proc/{pid}/task/{thread}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""  # it ended
    try:
        text = os.read(fd, 4096)
    except OSError:
        return b""
    finally:
        os.close(fd)
    place = text.rindex(b")") + 2
    return text[place : place + 1]


def kill_tree(members: Callable[[], set[int]]) -> None:
    """SIGKILL each process that `members` lists, and what these forked meanwhile."""
    killed: set[int] = set()

    def left() -> set[int]:
        return members() - killed

    for _ in range(_ROUNDS_MAX):
        new = signal_tree(left, signal.SIGKILL)
        if not new:
            return
        killed |= new
