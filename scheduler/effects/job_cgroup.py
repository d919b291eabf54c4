"""Trees of processes as the content of cgroups (v2)."""

import errno
import os
import select
import signal

from scheduler.effects.job_files import open_directory
from scheduler.effects.job_forker import Forker
from scheduler.effects.job_signals import kill_tree
from scheduler.effects.job_spawn import ChildLine, Spawner, StartLine
from scheduler.effects.job_tree import Containment, Listener, Tree
from scheduler.effects.launcher_loop import Loop, guarded, log
from scheduler.effects.linux import fork_child, fork_sibling

_TEXT_BYTES = 4096
# What an earlier launcher left is killed before the first order; what is stuck in the kernel is let be.
_LEFTOVER_S_MAX = 5.0
_LEFTOVER_POLL_MS_MAX = 1000


class CgroupsUnusable(Exception):
    """No cgroup v2 can be written here; the message says why."""


class CgroupTree(Tree):
    """A tree that is the content of a cgroup."""

    __slots__ = ("_containment", "_events_fd", "_freezes", "_is_condemned", "_path")

    def __init__(
        self, containment: "CgroupContainment", loop: Loop, listener: Listener, line: StartLine, path: str
    ) -> None:
        super().__init__(loop, listener, line)
        self._containment = containment
        self._path = path
        self._events_fd = -1
        self._freezes = True  # as far as is known: the kernel stops whole cgroups
        self._is_condemned = False  # killed before it was born

    def pids(self) -> set[int]:
        """Return what cgroup.procs lists, and the first process if it has not got there yet."""
        pids = cgroup_pids(self._path)
        if self._holds_main_pid:
            pids.add(self.main_pid)
        return pids

    @property
    def _holds_main_pid(self) -> bool:
        """Whether the first process has its number: once it is reaped, anybody may get that."""
        reaped = self.main_status is not None or self.main_pid == self._containment.reaped_pid
        return self.main_pid != 0 and not reaped

    def terminate(self) -> None:
        """SIGTERM everything that is there, and wake what is stopped so that it can answer."""
        if not self._holds_main_pid or self.pids() != {self.main_pid}:
            super().terminate()
            return
        self._signal_main(signal.SIGTERM, signal.SIGCONT)  # alone, as most are

    def freeze(self) -> None:
        """Have the kernel stop the cgroup; where it can't (before Linux 5.2), stop each process."""
        if self._freezes and not _write(f"{self._path}/cgroup.freeze", b"1"):
            self._freezes = False
        if not self._freezes:
            super().freeze()

    def is_frozen(self) -> bool:
        """Say whether nothing of the tree runs."""
        return _cgroup_says(self._path, b"frozen 1") if self._freezes else super().is_frozen()

    def help_freeze(self) -> None:
        """Undo for a moment what keeps something from stopping; it takes another `freeze`."""
        if not self._freezes:
            super().help_freeze()

    def thaw(self) -> None:
        """Let everything that is there run again."""
        if self._freezes:
            _write(f"{self._path}/cgroup.freeze", b"0")
        else:
            super().thaw()

    def kill(self) -> None:
        """SIGKILL the first process, which may still be on its way into the cgroup, and the cgroup."""
        if self.is_over:
            return
        if not self.main_pid:
            self._is_condemned = True
        elif self._holds_main_pid:
            self._signal_main(signal.SIGKILL)
        kill_cgroup(self._path)

    def _signal_main(self, *numbers: int) -> None:
        """Signal the first process; nobody else can have its number before we reap it."""
        try:
            for number in numbers:
                os.kill(self.main_pid, number)
        except PermissionError:
            pass  # a program that became another user: its cgroup is ours all the same

    def main_was_reaped(self, status: int) -> None:
        """The launcher reaped the first process."""
        self._main_ended(status)
        self.look()
        if not self.is_over:
            self._listener.rest_remains()

    def look(self) -> None:
        """Find out whether the tree is gone; called after each exit and when the kernel says so."""
        if self.is_over or self.main_status is None:
            return
        if not cgroup_is_empty(self._path):
            if self._events_fd < 0:
                # Only now: most trees end with their first process, and each watch costs.
                self._events_fd = os.open(f"{self._path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
                self._loop.watch(self._events_fd, self._read_events, select.EPOLLPRI)
                self._containment.lingering.append(self)
                self._read_events()
            return
        if self._events_fd >= 0:
            self._loop.unwatch(self._events_fd)
            os.close(self._events_fd)
            self._events_fd = -1
            self._containment.lingering.remove(self)
        self._containment.remove(self._path)
        self._ended()

    def _was_born(self) -> None:
        self._containment.was_born(self)
        if self._is_condemned:
            self.kill()

    def _was_never_born(self) -> None:
        self._containment.was_born(self)
        self._containment.remove(self._path)
        self._ended()

    def _read_events(self) -> None:
        # The kernel reports the next change only to who has read the last one.
        os.pread(self._events_fd, _TEXT_BYTES, 0)
        if cgroup_is_empty(self._path):
            self.look()


class CgroupContainment(Containment):
    """Makes trees in cgroups below one of our own."""

    kind = "cgroup"

    __slots__ = (
        "_base",
        "_by_main_pid",
        "_forked",
        "_forker",
        "_joins",
        "_spare",
        "_spawner",
        "_unborn",
        "_unremoved",
        "lingering",
        "reaped_pid",
    )

    def __init__(self, jobs_fd: int, spawner: Spawner) -> None:
        """Make this jobs directory's own cgroup, clear what an earlier launcher left in it, and prove it.

        It lies below the cgroup that we are in (systemd delegates that one), and is named for the jobs
        directory's place on the disk: another launcher's jobs are never in it, an earlier one's of this
        directory are.

        Raises:
            CgroupsUnusable: There is no cgroup v2 here, or it is not ours to write.
        """
        status = os.fstat(jobs_fd)
        self._base = f"{own_cgroup()}/wattshift-{status.st_dev:x}-{status.st_ino:x}"
        self._spawner = spawner
        try:
            try:
                os.mkdir(self._base, 0o755)
            except FileExistsError:
                _clear(self._base)
            self._joins = not _prove(f"{self._base}/probe")
        except OSError as error:
            raise CgroupsUnusable(f"{self._base}: {error.strerror}") from error
        self._forker = Forker(spawner, self._bear)
        self._by_main_pid: dict[int, CgroupTree] = {}
        self._unborn: list[CgroupTree] = []
        self.reaped_pid = 0  # whose end is being told: it can't be signalled any more
        self._spare: tuple[StartLine, str] | None = None  # forked ahead: its line, its cgroup
        self._forked = 0
        self.lingering: list[CgroupTree] = []  # the first process is gone, others are not
        self._unremoved: list[str] = []

    def tree(self, loop: Loop, listener: Listener) -> Tree:
        """Return a tree whose first process waits, now or soon, in a cgroup of its own.

        Raises:
            OSError: No process could be asked for.
        """
        if self._spare is not None and self._spare[0].read():
            self._drop_spare()  # killed while it waited
        line, path = self._spare or self._fork()
        self._spare = None
        tree = CgroupTree(self, loop, listener, line, path)
        self._unborn.append(tree)
        tree.read_line()
        return tree

    def was_born(self, tree: CgroupTree) -> None:
        """The tree's first process has a pid, or there will be none."""
        self._unborn.remove(tree)
        if tree.main_pid:
            self._by_main_pid[tree.main_pid] = tree

    def fork_ahead(self) -> None:
        """Have a process wait for the next `tree`.

        Raises:
            OSError: None could be asked for.
        """
        if self._spare is None:
            self._spare = self._fork()

    def reaped(self, pid: int, status: int) -> None:
        """A child of the launcher ended: a first process, or an orphan of some tree."""
        if pid == self._forker.pid:
            log("the process that forks was killed")
            self._forker.has_ended()
            return
        self.reaped_pid = pid
        if pid not in self._by_main_pid:
            # It was ready before it ended, and said so; we have perhaps not read it yet.
            for tree in list(self._unborn):
                guarded(tree.read_line)  # whatever it leads to, this end must be told
            if self._spare is not None and (self._spare[0].read() or self._spare[0].pid == pid):
                self._drop_spare()
        if (ended := self._by_main_pid.pop(pid, None)) is not None:
            ended.main_was_reaped(status)

    def all_reaped(self) -> None:
        """Look after those whose last process may have been among the reaped.

        The kernel says so, too, but up to 10 ms late (CGROUP_FILE_NOTIFY_MIN_INTV).
        """
        self.reaped_pid = 0
        for tree in list(self.lingering):
            tree.look()
        for path in list(self._unremoved):
            self._unremoved.remove(path)
            self.remove(path)

    def close(self) -> None:
        """Leave no process and no cgroup behind."""
        self._forker.close()  # first: what it was asked for is born now, or never
        if self._spare is not None:
            self._spare[0].close()
            kill_cgroup(self._spare[1])
            _await_empty(self._spare[1])
            self._drop_spare()
        self.all_reaped()
        self.remove(self._base)

    def remove(self, path: str) -> None:
        """Remove an empty cgroup, now or after a later exit: the last process may still be on its way out."""
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                self._unremoved.append(path)
            elif error.errno != errno.ENOENT:
                log(f"{path} is left behind: {error}")

    def _fork(self) -> tuple[StartLine, str]:
        self._forked += 1
        # With our pid in it: what an earlier launcher could not kill may still be there.
        path = f"{self._base}/{os.getpid()}-{self._forked}"
        try:
            os.mkdir(path, 0o755)
        except FileNotFoundError:  # somebody tidied up, and ours was empty
            os.makedirs(path, 0o755)
        try:
            fd = open_directory(path)
            try:
                return self._forker.fork(fd), path
            finally:
                os.close(fd)
        except OSError:
            os.rmdir(path)
            raise

    def _bear(self, line: ChildLine, cgroup_fd: int, launcher_pid: int) -> None:
        """Fork a process in the cgroup; called in the forker."""
        if fork_sibling(-1 if self._joins else cgroup_fd) == 0:
            try:
                if self._joins:
                    join_cgroup(cgroup_fd)
                self._spawner.become(line, launcher_pid)
            except OSError as error:
                line.fail("fork", error.errno or errno.EIO, error.strerror or str(error))
            finally:
                os._exit(1)  # whatever happens: there must be one forker only

    def _drop_spare(self) -> None:
        assert self._spare is not None
        line, path = self._spare
        self._spare = None
        line.close()
        self.remove(path)


def cgroup_pids(path: str) -> set[int]:
    """Return the processes in a cgroup; none if it is gone."""
    try:
        fd = os.open(f"{path}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return set()
    text = b""
    try:
        while piece := os.read(fd, 65536):
            text += piece
    except OSError:
        pass  # the cgroup was removed
    finally:
        os.close(fd)
    return {int(pid) for pid in text.split()}


def cgroup_is_empty(path: str) -> bool:
    """Say whether no living process is in a cgroup or below it."""
    try:
        fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return b"populated 0" in os.read(fd, _TEXT_BYTES)
    finally:
        os.close(fd)


def _cgroup_says(path: str, word: bytes) -> bool:
    try:
        fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # it is gone, and nobody will ask again
    try:
        return word in os.read(fd, _TEXT_BYTES)
    finally:
        os.close(fd)


def _write(path: str, text: bytes) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, text)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def kill_cgroup(path: str) -> None:
    """SIGKILL all in a cgroup and below, with the kernel's help where it has `cgroup.kill` (Linux 5.14)."""
    try:
        fd = os.open(f"{path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        kill_tree(lambda: cgroup_pids(path))
        return
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)


def own_cgroup() -> str:
    """Return where in the file system our own cgroup v2 is."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
            own = next((line[3:].rstrip("\n") for line in lines if line.startswith("0::")), None)
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            mounts = [line.split() for line in lines if " - cgroup2 " in line]
    except OSError as error:
        raise CgroupsUnusable(f"/proc: {error.strerror}") from error
    if own is None or not mounts:
        raise CgroupsUnusable("no cgroup v2 is mounted")
    root, mount_point = mounts[0][3], mounts[0][4]
    if root != "/":
        own = own.removeprefix(root)
    return (mount_point + own).rstrip("/")


def _prove(path: str) -> bool:
    """Put a process into a new cgroup: only that shows that we may. True if it can be born there.

    Raises:
        OSError: It can't even be moved there.
    """
    os.mkdir(path, 0o755)
    fd = open_directory(path)
    try:
        try:
            pid = fork_child(fd)
        except OSError:
            _prove_joining(fd)
            return False
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return True
    finally:
        os.close(fd)
        os.rmdir(path)


def join_cgroup(cgroup_fd: int) -> None:
    """Move this process into a cgroup.

    Raises:
        OSError: The cgroup is not ours to write.
    """
    fd = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup_fd)
    os.write(fd, b"0")
    os.close(fd)


def _prove_joining(cgroup_fd: int) -> None:
    if (pid := os.fork()) == 0:
        try:
            join_cgroup(cgroup_fd)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or errno.EIO)
    _, status = os.waitpid(pid, 0)
    if number := os.waitstatus_to_exitcode(status):
        raise OSError(number, os.strerror(abs(number)))


def _clear(base: str) -> None:
    """Kill and remove what an earlier launcher of this jobs directory left."""
    names = [entry.name for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False)]
    for name in names:
        kill_cgroup(f"{base}/{name}")
    for name in names:
        path = f"{base}/{name}"
        if not _await_empty(path):
            log(f"{path}: an earlier launcher's processes survive SIGKILL: {sorted(cgroup_pids(path))}")
            continue
        try:
            os.rmdir(path)
        except OSError as error:
            log(f"{path} is left behind: {error}")


def _await_empty(path: str) -> bool:
    try:
        fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        left_ms = round(_LEFTOVER_S_MAX * 1000)
        while b"populated 1" in os.pread(fd, _TEXT_BYTES, 0):
            if left_ms <= 0:
                return False
            wait_ms = min(left_ms, _LEFTOVER_POLL_MS_MAX)
            if not poll.poll(wait_ms):
                left_ms -= wait_ms
    finally:
        os.close(fd)
    return True
