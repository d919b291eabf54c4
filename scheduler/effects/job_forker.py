"""The process that forks for the launcher.

A fork copies the page tables of whoever forks, and each page that either side then touches: for the launcher
that was a third of its time. So it forks once, at its start, and this copy forks for it ever after: it does
nothing else, touches little, and knows no job's secrets. What it forks are the launcher's children, not its
own (CLONE_PARENT).

A request is one message with two descriptors: the process's end of a start line, and its place (the cgroup
that it is to be in, or a supervisor's control socket). There is no answer but on the line.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable

from scheduler.effects.job_spawn import (
    ChildLine,
    Spawner,
    StartLine,
    close_descriptors,
    receive_descriptors,
)

TYPE_CHECKING = False  # as in `launcher_wire.py`
if TYPE_CHECKING:
    from typing import NoReturn

# Takes line, place and the launcher's pid; forks a sibling, which never returns.
Bear = Callable[[ChildLine, int, int], None]


class Forker:
    """The launcher's side."""

    __slots__ = ("_bear", "_requests", "_spawner", "pid")

    def __init__(self, spawner: Spawner, bear: Bear) -> None:
        """Say how processes are born; nothing is forked before the first request."""
        self._spawner = spawner
        self._bear = bear
        self._requests: socket.socket | None = None
        self.pid = 0

    def fork(self, place_fd: int) -> StartLine:
        """Ask for a process; return the line to it. It may be born only later, or never: the line tells.

        Raises:
            OSError: It could not even be asked for.
        """
        line = StartLine()
        try:
            if self._requests is None:
                self._start()
            assert self._requests is not None
            socket.send_fds(self._requests, [b"f"], [line.child_fd(), place_fd])
        except OSError:
            line.close()
            raise
        line.close_child_end()
        return line

    def has_ended(self) -> None:
        """It was killed: the next request starts another."""
        if self._requests is not None:
            self._requests.close()
        self._requests = None
        self.pid = 0

    def close(self) -> None:
        """End it."""
        pid = self.pid
        self.has_ended()
        if pid:
            os.waitpid(pid, 0)

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)  # it answers in microseconds; if it is stuck, a start fails, and nobody waits
        launcher_pid = os.getpid()
        # Until the copy has let go of the launcher's wakeup descriptor, no signal may reach it.
        signals = signal.valid_signals()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._serve(theirs, launcher_pid)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._requests = ours

    def _serve(self, requests: socket.socket, launcher_pid: int) -> NoReturn:
        try:
            gc.disable()
            close_descriptors({*self._spawner.kept_fds(), requests.fileno()})
            # The launcher's signal handlers do nothing, and stay: it stops the jobs, never we.
            self._spawner.settle()
            while fds := receive_descriptors(requests):
                line = ChildLine(fds[0])
                try:
                    self._bear(line, fds[1], launcher_pid)
                except OSError as error:
                    line.fail("fork", error.errno or errno.EIO, error.strerror or str(error))
                line.close()
                os.close(fds[1])
        except Exception:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
