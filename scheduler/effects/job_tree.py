"""A program's whole tree of processes: started, signalled, killed, known to be gone.

Two ways to know a tree, whatever it forks and however it detaches itself:

* `cgroup` (`job_cgroup.py`): a cgroup v2 for each tree; the launcher is its parent and inherits its orphans.
* `supervisor` (`job_supervisor.py`): where no cgroup is writable, a copy of the launcher for each tree. It
  inherits the orphans, so that the tree is what lies below it.
"""

import errno
import signal

from scheduler.effects.job_signals import runs, signal_tree, stop_tree, wake_vforked
from scheduler.effects.job_spawn import Program, StartLine
from scheduler.effects.launcher_loop import Loop

_STUCK_PIDS_MAX = 64


class Listener:
    """Whom a tree tells what becomes of it. `is_empty` comes last, once."""

    __slots__ = ()

    def has_started(self, pid: int, start_ticks: int) -> None:
        """The program runs."""

    def has_failed_to_start(self, what: str, number: int, message: str) -> None:
        """There was no exec."""

    def main_has_exited(self, status: int) -> None:
        """The first process ended, with this wait status."""

    def rest_remains(self) -> None:
        """The first process ended and others are still there, as far as is known yet."""

    def is_empty(self) -> None:
        """No process is left."""


class Tree:
    """What both ways share: the start and the end of the first process."""

    __slots__ = (
        "_line",
        "_listener",
        "_loop",
        "is_over",
        "is_started",
        "main_pid",
        "main_status",
    )

    def __init__(self, loop: Loop, listener: Listener, line: StartLine) -> None:
        """Take the line to a process that waits."""
        self._loop = loop
        self._listener = listener
        self._line: StartLine | None = line
        self.is_over = False
        self.is_started = False
        self.main_pid = 0  # not known before the process is ready
        self.main_status: int | None = None
        loop.watch(line.fileno(), self.read_line)

    def load(self, program: Program, output_fd: int) -> None:
        """Tell the process what program it is to become, and where that one's output goes.

        Raises:
            OSError: It could not be told; it still waits.
        """
        if self._line is not None:
            self._line.send(program, output_fd)

    def go(self, environment: dict[str, str]) -> None:
        """Let the process become the program, with this more in its environment; the rest is heard."""
        if self._line is not None:
            self._line.go(environment)

    def read_line(self) -> None:
        """Take in what the process said; called when there is something, or when it must be known."""
        line = self._line
        if line is None:
            return
        # Once the process has ended, its word is the last: the forker may still hold the line's other end.
        is_decided = line.read() or self.main_status is not None
        if line.pid and not self.main_pid:
            self.main_pid = line.pid
            self._was_born()
        if not is_decided:
            return
        self._line = None
        self._loop.unwatch(line.fileno())
        line.close()
        if line.failure is not None:
            self._listener.has_failed_to_start(*line.failure)
        elif line.pid:
            self.is_started = True
            self._listener.has_started(line.pid, line.start_ticks)
        else:
            self._listener.has_failed_to_start("fork", errno.ESRCH, "it was killed before it was ready")
        if not line.pid:
            self._was_never_born()

    def pids(self) -> set[int]:
        """Return the processes that are in the tree now."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL everything; may be repeated."""
        raise NotImplementedError

    def terminate(self) -> None:
        """SIGTERM everything that is there, and wake what is stopped so that it can answer."""
        signal_tree(self.pids, signal.SIGTERM, signal.SIGCONT)

    def freeze(self) -> None:
        """Stop everything that is there; may be repeated, for what was forked meanwhile."""
        stop_tree(self.pids)

    def is_frozen(self) -> bool:
        """Say whether nothing of the tree runs."""
        return not any(map(runs, self.pids()))

    def help_freeze(self) -> None:
        """Undo for a moment what keeps something from stopping; it takes another `freeze`."""
        wake_vforked(self.pids)

    def thaw(self) -> None:
        """Let everything that is there run again."""
        signal_tree(self.pids, signal.SIGCONT)

    def stuck_pids(self) -> list[int]:
        """Return the lowest of the pids that are left, a bounded number."""
        return sorted(self.pids())[:_STUCK_PIDS_MAX]

    def _was_born(self) -> None:
        """The first process is ready, and its pid is known."""

    def _was_never_born(self) -> None:
        """There is no first process and there will be none."""

    def _main_ended(self, status: int) -> None:
        self.main_status = status
        self.read_line()
        if self.is_started:
            self._listener.main_has_exited(status)

    def _ended(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._listener.is_empty()


class Containment:
    """Makes trees, and is told of every child of the launcher that ended."""

    __slots__ = ()

    kind: str

    def tree(self, loop: Loop, listener: Listener) -> Tree:
        """Return a tree whose first process waits for its program, now or soon.

        Raises:
            OSError: No process could be asked for.
        """
        raise NotImplementedError

    def fork_ahead(self) -> None:
        """Have a process wait for the next `tree`.

        Raises:
            OSError: None could be asked for.
        """
        raise NotImplementedError

    def reaped(self, pid: int, status: int) -> None:
        """A child of the launcher ended, with this wait status."""
        raise NotImplementedError

    def all_reaped(self) -> None:
        """All children that had ended were told."""
        raise NotImplementedError

    def close(self) -> None:
        """No tree is left and none will come."""
        raise NotImplementedError
