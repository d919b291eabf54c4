"""Trees of processes below supervisors, for where cgroups can't be written.

The supervisor is a copy of the launcher for each tree, and a subreaper: everything that detaches itself below
ends up as its child. It says the first process's wait status over its control socket and ends when it has no
child left; its end says that the tree is gone. One order is known: KILL_ORDER. The end of the control socket
means that the launcher died, and is the same order (unlike PR_SET_PDEATHSIG it can't come too early to be
seen). A supervisor stays root where the launcher is: a job's user can't kill it. If it is killed all the
same, the kernel kills its child, and what else it held falls to the launcher, which kills it.
"""

from __future__ import annotations

import os
import select
import signal
import socket

from scheduler.effects.job_signals import children, descendants, kill_tree
from scheduler.effects.job_spawn import Spawner, StartLine, close_descriptors, fork_blocked
from scheduler.effects.job_tree import Containment, Listener, Tree
from scheduler.effects.launcher_loop import Loop
from scheduler.effects.linux import set_child_subreaper

TYPE_CHECKING = False  # as in `launcher_wire.py`
if TYPE_CHECKING:
    from typing import NoReturn

KILL_ORDER = b"kill"

_CONTROL_BYTES = 64
# A killed tree is looked at again when a child ends, and at the latest after these delays in turn: what hangs
# below a process that is stuck in the kernel tells nobody of its end.
_KILL_AGAIN_MS_FIRST = 10
_KILL_AGAIN_MS_MAX = 1000


class Supervisor:
    """A supervisor whose child waits for a program."""

    __slots__ = ("control", "line", "pid")

    def __init__(self, spawner: Spawner) -> None:
        """Fork it.

        Raises:
            OSError: No process came to be.
        """
        self.line = StartLine()
        try:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            self.line.close()
            raise
        try:
            self.pid = fork_blocked()
        except OSError:
            self.close()
            theirs.close()
            raise
        if self.pid == 0:
            supervise(spawner, self.line, theirs.fileno())
        self.line.close_child_end()
        theirs.close()
        self.control.setblocking(False)

    def close(self) -> None:
        """Let go of it, which makes it end."""
        self.line.close()
        self.control.close()


class SupervisedTree(Tree):
    """A tree that is what lies below a supervisor."""

    __slots__ = ("_containment", "_control", "_supervisor_pid")

    def __init__(
        self, containment: SupervisorContainment, loop: Loop, listener: Listener, supervisor: Supervisor
    ) -> None:
        super().__init__(loop, listener, supervisor.line)
        self._containment = containment
        self._control: socket.socket | None = supervisor.control
        self._supervisor_pid = supervisor.pid
        loop.watch(supervisor.control.fileno(), self._read_control)

    def pids(self) -> set[int]:
        """Return what is below the supervisor; after its death, what it left."""
        if self._supervisor_pid in self._containment.by_supervisor_pid:
            return descendants(self._supervisor_pid)
        return set() if self.is_over else self._containment.orphans()

    def kill(self) -> None:
        """Have the supervisor kill until nothing is left."""
        if self._control is not None:
            try:
                self._control.send(KILL_ORDER)
            except OSError:
                pass  # it was told often and is busy, or it is gone, which we are about to read
        elif not self.is_over:
            self._containment.kill_orphans()

    def supervisor_was_reaped(self, status: int) -> None:
        """The supervisor ended: with nothing left below it, or killed, which kills its child."""
        self._read_control()
        if status == 0:
            self._ended()
        else:
            self._containment.adopt(self)

    def orphan_was_reaped(self, pid: int, status: int) -> None:
        """The launcher inherited a process of this tree, and it ended."""
        if pid == self.main_pid and self.main_status is None:
            self._main_ended(status)

    def orphans_are_gone(self) -> None:
        """Nothing of the tree is left."""
        if self.main_status is None:
            self._main_ended(signal.SIGKILL)
        self._ended()

    def _read_control(self) -> None:
        has_ended = False
        while self._control is not None:
            try:
                word = self._control.recv(_CONTROL_BYTES)
            except BlockingIOError:
                if has_ended:
                    self._listener.rest_remains()
                return
            except OSError:
                word = b""
            if word:
                self._main_ended(int(word))
                has_ended = True
            else:
                self._loop.unwatch(self._control.fileno())
                self._control.close()
                self._control = None
                self._read_line()


class SupervisorContainment(Containment):
    """Makes trees under supervisors."""

    kind = "supervisor"

    __slots__ = ("_adopted", "_spare", "_spawner", "by_supervisor_pid")

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._spare: Supervisor | None = None
        self.by_supervisor_pid: dict[int, SupervisedTree] = {}
        self._adopted: list[SupervisedTree] = []  # their supervisors were killed

    def tree(self, loop: Loop, listener: Listener) -> Tree:
        """Return a tree whose first process waits below a supervisor.

        Raises:
            OSError: No process came to be.
        """
        supervisor = self._spare or Supervisor(self._spawner)
        self._spare = None
        tree = self.by_supervisor_pid[supervisor.pid] = SupervisedTree(self, loop, listener, supervisor)
        return tree

    def prepare(self) -> None:
        """Have a supervisor and its child wait for the next `tree`."""
        if self._spare is None:
            self._spare = Supervisor(self._spawner)

    def reaped(self, pid: int, status: int) -> None:
        """A child of the launcher ended: a supervisor, or an orphan that a killed supervisor left."""
        tree = self.by_supervisor_pid.pop(pid, None)
        if tree is not None:
            tree.supervisor_was_reaped(status)
            return
        if self._spare is not None and pid == self._spare.pid:
            self._spare.close()
            self._spare = None
            return
        for adopted in self._adopted:
            adopted.orphan_was_reaped(pid, status)

    def all_reaped(self) -> None:
        """Go on killing what killed supervisors left."""
        if self._adopted and not self.kill_orphans():
            ended, self._adopted = self._adopted, []
            for tree in ended:
                tree.orphans_are_gone()

    def close(self) -> None:
        """Leave no process behind: supervisors ended with their trees, but one waits."""
        if self._spare is not None:
            self._spare.close()
            os.waitpid(self._spare.pid, 0)
            self._spare = None

    def adopt(self, tree: SupervisedTree) -> None:
        """Take over from a supervisor that was killed: what it held are our children now."""
        self._adopted.append(tree)

    def kill_orphans(self) -> set[int]:
        """SIGKILL all that is below us and under no supervisor; return what was there.

        Whose tree each was can't be known any more. It doesn't matter: none may live.
        """
        kill_tree(self.orphans)
        return self.orphans()

    def orphans(self) -> set[int]:
        """Return all that is below us and under no supervisor."""
        found = {pid for pid in children(os.getpid()) if pid not in self.by_supervisor_pid}
        if self._spare is not None:
            found.discard(self._spare.pid)
        for pid in list(found):
            found |= descendants(pid)
        return found


def supervise(spawner: Spawner, line: StartLine, control_fd: int) -> NoReturn:
    """Be the supervisor of a tree, in a process just forked, to its end."""
    try:
        wakeup_fd = _detach(keep={*spawner.kept_fds(), line.child_fd(), control_fd})
        try:
            main_pid = spawner.spawn(line)
            line.say_parent(main_pid)
        except OSError as error:
            line.fail("fork", error.errno or 0, str(error))
        line.close_child_end()  # and not ours: `_detach` closed it, its number may be another's by now
        _serve(main_pid, control_fd, wakeup_fd)
    finally:
        os._exit(1)


def _detach(keep: set[int]) -> int:
    """Let go of all that is the launcher's; return what becomes readable when a child ends."""
    close_descriptors(keep)
    wakeup_fd, wakeup_write_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)
    os.set_blocking(wakeup_write_fd, False)
    signal.set_wakeup_fd(wakeup_write_fd, warn_on_full_buffer=False)
    # The launcher's handlers do nothing, and stay: who signals the launcher stops its jobs through it.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    set_child_subreaper()
    return wakeup_fd


def _serve(main_pid: int, control_fd: int, wakeup_fd: int) -> NoReturn:
    poll = select.poll()
    poll.register(control_fd, select.POLLIN)
    poll.register(wakeup_fd, select.POLLIN)
    kill_again_ms: int | None = None
    while True:
        _reap(main_pid, control_fd)
        if kill_again_ms is not None:
            kill_tree(_tree)
        for fd, _ in poll.poll(kill_again_ms):
            if fd == wakeup_fd:
                os.read(wakeup_fd, 4096)
                continue
            kill_again_ms = _KILL_AGAIN_MS_FIRST
            if not os.read(control_fd, 64):
                poll.unregister(control_fd)  # the launcher is gone; nobody will ask again
        if kill_again_ms is not None:
            kill_again_ms = min(2 * kill_again_ms, _KILL_AGAIN_MS_MAX)


def _reap(main_pid: int, control_fd: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            os._exit(0)
        if pid == 0:
            return
        if pid == main_pid:
            try:
                os.write(control_fd, b"%d" % status)
            except OSError:
                pass  # the launcher is gone; we learn it from the next poll


def _tree() -> set[int]:
    return descendants(os.getpid())
