"""Trees of processes below supervisors, for where cgroups can't be written.

The supervisor is a copy of the launcher for each tree, and a subreaper: everything that detaches itself below
ends up as its child. It says the first process's wait status over its control socket (X), and when it has no
child left (E): then the tree is gone, and it ends, which takes longer than to say so. One order is known: K.
The end of the control socket
means that the launcher died, and is the same order (unlike PR_SET_PDEATHSIG it can't come too early to be
seen). A supervisor stays root where the launcher is: a job's user can't kill it. If it is killed all the
same, the kernel kills its child, and what else it held falls to the launcher, which kills it.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys

from scheduler.effects.job_forker import Forker
from scheduler.effects.job_signals import children, descendants, kill_tree
from scheduler.effects.job_spawn import ChildLine, Spawner, StartLine
from scheduler.effects.job_tree import Containment, Listener, Tree
from scheduler.effects.launcher_loop import Loop, log
from scheduler.effects.linux import fork_sibling, set_child_subreaper

TYPE_CHECKING = False  # as in `launcher_wire.py`
if TYPE_CHECKING:
    from typing import NoReturn

_KILL = b"K"
_CONTROL_BYTES = 64
# A killed tree is looked at again when a child ends, and at the latest after these delays in turn: what hangs
# below a process that is stuck in the kernel tells nobody of its end.
_KILL_AGAIN_MS_FIRST = 10
_KILL_AGAIN_MS_MAX = 1000


class SupervisedTree(Tree):
    """A tree that is what lies below a supervisor."""

    __slots__ = ("_containment", "_control", "supervisor_pid")

    def __init__(
        self,
        containment: SupervisorContainment,
        loop: Loop,
        listener: Listener,
        line: StartLine,
        control: socket.socket,
    ) -> None:
        super().__init__(loop, listener, line)
        self._containment = containment
        self._control: socket.socket | None = control
        self.supervisor_pid = 0  # not known before it says so
        loop.watch(control.fileno(), self.read_control)

    def pids(self) -> set[int]:
        """Return what is below the supervisor; after its death, what it left."""
        if self._control is not None:
            return descendants(self.supervisor_pid) if self.supervisor_pid else set()
        return set() if self.is_over else self._containment.orphans()

    def kill(self) -> None:
        """Have the supervisor kill until nothing is left."""
        if self._control is not None:
            try:
                self._control.send(_KILL)
            except OSError:
                pass  # it was told often and is busy, or it is gone, which we are about to read
        elif not self.is_over:
            self._containment.kill_orphans()

    def read_control(self) -> None:
        """Take in what the supervisor said; called when there is something, or when it must be known."""
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
            match word.split():
                case [b"I", pid]:
                    self.supervisor_pid = int(pid)
                    self._containment.was_born(self)
                case [b"X", status]:
                    self._main_ended(int(status))
                    has_ended = True
                case [b"X", status, b"E"]:
                    self._main_ended(int(status))
                    self._close_control()
                    self._ended()
                case [b"E"]:
                    self._close_control()
                    self._ended()
                case _:
                    self._close_control()

    def supervisor_was_reaped(self, status: int) -> None:
        """The supervisor ended: with nothing left below it, as it said, or killed, which kills its child."""
        self.read_control()
        if status == 0 or self.is_over:
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

    def _close_control(self) -> None:
        assert self._control is not None
        self._loop.unwatch(self._control.fileno())
        self._control.close()
        self._control = None
        self.read_line()
        if not self.supervisor_pid:
            self._containment.was_born(self)
            self._ended()


class SupervisorContainment(Containment):
    """Makes trees under supervisors."""

    kind = "supervisor"

    __slots__ = ("_adopted", "_by_supervisor_pid", "_forker", "_spare", "_spawner", "_unborn")

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._forker = Forker(spawner, self._bear)
        self._by_supervisor_pid: dict[int, SupervisedTree] = {}
        self._unborn: list[SupervisedTree] = []
        self._adopted: list[SupervisedTree] = []  # their supervisors were killed
        self._spare: tuple[StartLine, socket.socket] | None = None  # forked ahead: its line, its control

    def tree(self, loop: Loop, listener: Listener) -> Tree:
        """Return a tree whose first process waits, now or soon, below a supervisor.

        Raises:
            OSError: No process could be asked for.
        """
        if self._spare is not None and self._spare[0].read():
            self._drop_spare()  # killed while it waited
        line, control = self._spare or self._fork()
        self._spare = None
        tree = SupervisedTree(self, loop, listener, line, control)
        self._unborn.append(tree)
        tree.read_control()
        tree.read_line()
        return tree

    def was_born(self, tree: SupervisedTree) -> None:
        """The tree's supervisor has a pid, or there will be none."""
        self._unborn.remove(tree)
        if tree.supervisor_pid:
            self._by_supervisor_pid[tree.supervisor_pid] = tree
        self.all_reaped()

    def fork_ahead(self) -> None:
        """Have a supervisor and its child wait for the next `tree`.

        Raises:
            OSError: None could be asked for.
        """
        if self._spare is None and not self._adopted:
            self._spare = self._fork()

    def reaped(self, pid: int, status: int) -> None:
        """A child of the launcher ended: a supervisor, or an orphan that a killed supervisor left."""
        if pid == self._forker.pid:
            log("the process that forks was killed")
            self._forker.has_ended()
            return
        if pid not in self._by_supervisor_pid:
            # A supervisor says its pid before anything else; we have perhaps not read it yet.
            for unborn in list(self._unborn):
                unborn.read_control()
        tree = self._by_supervisor_pid.pop(pid, None)
        if tree is not None:
            tree.supervisor_was_reaped(status)
            return
        if self._spare is not None and pid == _spoken_pid(self._spare[1]):
            self._drop_spare()
        for adopted in self._adopted:
            adopted.orphan_was_reaped(pid, status)

    def all_reaped(self) -> None:
        """Go on killing what killed supervisors left, as soon as no newborn can be taken for it."""
        if self._adopted and not self._unborn and not self.kill_orphans():
            ended, self._adopted = self._adopted, []
            for tree in ended:
                tree.orphans_are_gone()

    def close(self) -> None:
        """Leave no process behind: supervisors ended with their trees, or are about to, but one waits."""
        self._forker.close()
        if self._spare is not None:
            self._drop_spare()
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            pass  # nobody is left

    def adopt(self, tree: SupervisedTree) -> None:
        """Take over from a supervisor that was killed: what it held are our children now.

        So that they can be told from processes just forked, none may be that has not said its pid.
        """
        self._adopted.append(tree)
        if self._spare is not None and not _spoken_pid(self._spare[1]):
            self._drop_spare()

    def kill_orphans(self) -> set[int]:
        """SIGKILL all that is below us and under no supervisor; return what was there.

        Whose tree each was can't be known any more. It doesn't matter: none may live.
        """
        kill_tree(self.orphans)
        return self.orphans()

    def orphans(self) -> set[int]:
        """Return all that is below us and under no supervisor."""
        known = {self._forker.pid, *self._by_supervisor_pid}
        if self._spare is not None:
            known.add(_spoken_pid(self._spare[1]))
        found = set(children(os.getpid())) - known
        for pid in list(found):
            found |= descendants(pid)
        return found

    def _fork(self) -> tuple[StartLine, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            line = self._forker.fork(theirs.fileno())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return line, ours

    def _drop_spare(self) -> None:
        assert self._spare is not None
        line, control = self._spare
        self._spare = None
        line.close()
        control.close()

    def _bear(self, line: ChildLine, control_fd: int, launcher_pid: int) -> None:
        """Fork a supervisor; called in the forker."""
        del launcher_pid  # its death ends the control socket, which is what a supervisor heeds
        if fork_sibling() == 0:
            supervise(self._spawner, line, control_fd)


def _spoken_pid(control: socket.socket) -> int:
    """Return the pid that a supervisor has said and nobody has read; 0 if it has not."""
    try:
        word = control.recv(_CONTROL_BYTES, socket.MSG_PEEK)
    except OSError:
        return 0
    return int(word.split()[1]) if word else 0


def supervise(spawner: Spawner, line: ChildLine, control_fd: int) -> NoReturn:
    """Be the supervisor of a tree, in a process just forked, to its end."""
    try:
        own_pid = os.getpid()
        os.write(control_fd, b"I %d" % own_pid)
        wakeup_fd = _get_ready()
        try:
            main_pid = os.fork()
        except OSError as error:
            line.fail("fork", error.errno or errno.EAGAIN, error.strerror or str(error))
            os._exit(0)
        if main_pid == 0:
            signal.set_wakeup_fd(-1)
            spawner.become(line, own_pid)
        line.close()
        _serve(main_pid, control_fd, wakeup_fd)
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _get_ready() -> int:
    """Become the reaper of all below; return what becomes readable when a child ends."""
    wakeup_fd, wakeup_write_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)
    os.set_blocking(wakeup_write_fd, False)
    signal.set_wakeup_fd(wakeup_write_fd, warn_on_full_buffer=False)
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
            if not _read(control_fd):
                poll.unregister(control_fd)  # the launcher is gone; nobody will ask again
        if kill_again_ms is not None:
            kill_again_ms = min(2 * kill_again_ms, _KILL_AGAIN_MS_MAX)


def _read(control_fd: int) -> bytes:
    try:
        return os.read(control_fd, _CONTROL_BYTES)
    except ConnectionResetError:  # it died with our last word unread
        return b""


def _reap(main_pid: int, control_fd: int) -> None:
    said: list[bytes] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            _say(control_fd, [*said, b"E"])
            os._exit(0)
        if pid == 0:
            _say(control_fd, said)
            return
        if pid == main_pid:
            said = [b"X %d" % status]


def _say(control_fd: int, words: list[bytes]) -> None:
    """Say it in one message, for each wakes the launcher."""
    if words:
        try:
            os.write(control_fd, b" ".join(words))
        except OSError:
            pass  # the launcher is gone; we learn it from the next poll


def _tree() -> set[int]:
    return descendants(os.getpid())
