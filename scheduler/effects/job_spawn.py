r"""From a fork to the job's first instruction, and signals to processes that are not our children.

The launcher has one thread, so the child may run Python between fork and exec. The fork comes first: the
child makes itself ready while the launcher makes the attempt's files, then waits for the word. What goes
wrong comes back over the same line, a pair of sockets which the exec closes:

    P <pid> <start ticks>\n         written by a supervisor, of its child
    E <what> <errno> <message>\n    written by the child: there was no exec

Its end without an E line means that the exec succeeded (or that a SIGKILL came first; the launcher calls
that started, too: a process was there).
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
from collections.abc import Callable

from scheduler.effects.job_files import JobUser, open_job_directory
from scheduler.effects.linux import fork_into_cgroup, set_parent_death_signal

TYPE_CHECKING = False  # as in `launcher_wire.py`
if TYPE_CHECKING:
    from typing import NoReturn

# Blocked around a fork: until the child has reset its handlers, a signal to it would wake the launcher.
_SIGNALS_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_GO = b"g"
_CHILD_FAILED = 127  # nobody reads it: the E line says more
_MESSAGE_CHARACTERS_MAX = 500
# pidfds open at a time while a tree is signalled.
_SIGNAL_BATCH = 128
# A tree that forks faster than this many rounds can list it will meet its deadline instead.
_SIGNAL_ROUNDS_MAX = 8


class Spawner:
    """What all jobs' processes have in common; made once, before the first fork."""

    __slots__ = ("_files_max", "_null_fd", "_oom_score", "jobs_fd", "user")

    def __init__(self, user: JobUser, jobs_fd: int, oom_score: bytes | None) -> None:
        """Prepare.

        Args:
            jobs_fd: The jobs directory, open.
            oom_score: What to write to the child's oom_score_adj; None leaves it alone.
        """
        self.user = user
        self.jobs_fd = jobs_fd
        self._oom_score = oom_score
        self._null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # We raise our own limit (`raise_open_files_limit`); programs that use select() need the old one.
        self._files_max = resource.getrlimit(resource.RLIMIT_NOFILE)

    def kept_fds(self) -> set[int]:
        """Return what a supervisor must not close."""
        return {self._null_fd, self.jobs_fd}

    def spawn(self, program: Program, start_fd: int, cgroup_fd: int = -1, *, joins: bool = False) -> int:
        """Fork; return the pid. The child makes ready, waits for the word on `start_fd`, then execs.

        Args:
            cgroup_fd: The cgroup that the child is to be in, if any.
            joins: It is born outside and joins: slow, but not every kernel and container can do better.

        Raises:
            OSError: The fork failed.
        """
        parent_pid = os.getpid()
        pid = fork_blocked(-1 if joins else cgroup_fd)
        if pid:
            return pid
        what = "fork"
        try:
            if joins:
                join_cgroup(cgroup_fd)
            self._make_ready(program, parent_pid)
            if os.read(start_fd, 1) != _GO:
                os._exit(_CHILD_FAILED)
            what = "working_directory"
            program.enter(self.jobs_fd)
            what = "command"
            program.execute()
        except OSError as error:
            _fail(start_fd, what, error.errno or errno.EIO, error.strerror or str(error))
        except BaseException as error:
            _fail(start_fd, what, errno.EINVAL, str(error))

    def raise_open_files_limit(self) -> None:
        """Let this process hold as many descriptors as it may; children get the old limit back."""
        hard = self._files_max[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def _make_ready(self, program: Program, parent_pid: int) -> None:
        os.setsid()
        os.dup2(self._null_fd, 0)
        os.dup2(program.output_fd, 1)
        os.dup2(program.output_fd, 2)
        # Handlers end with the exec; until then a signal must not wake the launcher through its descriptor.
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if self._oom_score is not None:
            _write_oom_score(self._oom_score)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._files_max)
        if self.user.name:
            os.setgroups(self.user.groups)
            os.setresgid(self.user.gid, self.user.gid, self.user.gid)
            os.setresuid(self.user.uid, self.user.uid, self.user.uid)
        # After the change of user, which clears it.
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(_CHILD_FAILED)  # too late: the parent died before it was asked for


class Program:
    """What one process is to run."""

    __slots__ = ("_arguments", "_environment", "_job_id", "_paths", "_working_directory", "output_fd")

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        working_directory: str,
        job_id: str,
        output_fd: int,
    ) -> None:
        """Resolve the command against the job's own PATH.

        Args:
            working_directory: Absolute; "" = the job's own directory.
            output_fd: Becomes stdout and stderr.
        """
        self._arguments = arguments
        self._environment = environment
        self._paths = _candidates(arguments[0], environment.get("PATH", os.defpath))
        self._working_directory = working_directory
        self._job_id = job_id
        self.output_fd = output_fd

    def enter(self, jobs_fd: int) -> None:
        """Change to the working directory, with the rights that this process has by now.

        Raises:
            OSError: It is missing or out of reach.
        """
        if self._working_directory:
            os.chdir(self._working_directory)
        else:
            os.chdir(open_job_directory(jobs_fd, self._job_id))

    def execute(self) -> NoReturn:
        """Become the program.

        Raises:
            OSError: As execvp(3): the first EACCES of the PATH, else the last error.
        """
        denied: OSError | None = None
        missing: OSError | None = None
        for path in self._paths:
            try:
                os.execve(path, self._arguments, self._environment)
            except (FileNotFoundError, NotADirectoryError) as error:
                missing = error
            except PermissionError as error:
                denied = denied or error
        raise denied or missing or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


class StartLine:
    """The launcher's end of the line to a process that is to become a program."""

    __slots__ = ("_text", "child_fd", "failure", "fd", "pid", "start_ticks")

    def __init__(self) -> None:
        """Make the line.

        Raises:
            OSError: No descriptor is left.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.fd, self.child_fd = ours.detach(), theirs.detach()
        self._text = b""
        self.pid = 0
        self.start_ticks = 0
        self.failure: tuple[str, int, str] | None = None  # what, errno, message

    def close_child_end(self) -> None:
        """After the fork: only the child (and its supervisor) may hold the start open."""
        os.close(self.child_fd)
        self.child_fd = -1

    def say_go(self) -> None:
        """Let the child exec; one that is dead already is found out by reading."""
        try:
            os.write(self.fd, _GO)
        except OSError:
            pass

    def is_decided(self) -> bool:
        """Read what has come; once True, the fields are set and the line may be closed."""
        while True:
            try:
                piece = os.read(self.fd, 4096)
            except BlockingIOError:
                return False
            except OSError:
                break  # reset: the child died with our word unread
            if not piece:
                break
            self._text += piece
        for line in self._text.decode("utf-8", "replace").splitlines():
            match line.split(" ", 3):
                case ["P", pid, start_ticks]:
                    self.pid, self.start_ticks = int(pid), int(start_ticks)
                case ["E", what, number, message]:
                    self.failure = (what, int(number), message)
                case _:
                    pass  # a line cut short by a SIGKILL
        return True

    def close(self) -> None:
        """Let go of what is still open."""
        os.close(self.fd)
        if self.child_fd >= 0:
            self.close_child_end()


def fork_blocked(cgroup_fd: int = -1) -> int:
    """Fork, into a cgroup if one is given, with the launcher's signals blocked.

    The parent's are unblocked again, the child's are not.

    Raises:
        OSError: The fork failed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_HANDLED)
    try:
        pid = os.fork() if cgroup_fd < 0 else fork_into_cgroup(cgroup_fd)
    except OSError:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS_HANDLED)
        raise
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS_HANDLED)
    else:
        gc.disable()
    return pid


def join_cgroup(cgroup_fd: int) -> None:
    """Move this process into a cgroup.

    Raises:
        OSError: The cgroup is not ours to write.
    """
    fd = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup_fd)
    os.write(fd, b"0")
    os.close(fd)


def say_parent(start_fd: int, pid: int) -> None:
    """Write the P line for a child that has not been reaped."""
    os.write(start_fd, b"P %d %d\n" % (pid, start_ticks(pid)))


def close_descriptors(keep: set[int]) -> None:
    """Close everything that is open but 0, 1, 2 and what is to be kept."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the one that the listing itself used


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


def signal_tree(members: Callable[[], set[int]], *signals: int, rounds: int = _SIGNAL_ROUNDS_MAX) -> None:
    """Send the signals, in order, to each process that `members` lists, and in later rounds to new ones.

    A pid is looked up again after its descriptor is open, so that a number that changed hands between
    listing and signalling hits nobody else.
    """
    done: set[int] = set()
    for _ in range(rounds):
        new = members() - done
        if not new:
            return
        done |= new
        pids = sorted(new)
        for start in range(0, len(pids), _SIGNAL_BATCH):
            _signal_batch(pids[start : start + _SIGNAL_BATCH], members, signals)


def _signal_batch(pids: list[int], members: Callable[[], set[int]], signals: tuple[int, ...]) -> None:
    opened: list[tuple[int, int]] = []
    try:
        for pid in pids:
            try:
                opened.append((pid, os.pidfd_open(pid)))
            except OSError:
                continue  # gone already
        still = members()
        for pid, fd in opened:
            if pid in still:
                for number in signals:
                    try:
                        signal.pidfd_send_signal(fd, number)
                    except OSError:
                        break  # gone meanwhile
    finally:
        for _, fd in opened:
            os.close(fd)


def _candidates(command: str, path: str) -> list[str]:
    if "/" in command:
        return [command]
    return [f"{directory or '.'}/{command}" for directory in path.split(os.pathsep)]


def _write_oom_score(score: bytes) -> None:
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, score)
    finally:
        os.close(fd)


def _fail(start_fd: int, what: str, number: int, message: str) -> NoReturn:
    try:
        text = message[:_MESSAGE_CHARACTERS_MAX].replace("\n", " ")
        os.write(start_fd, f"E {what} {number} {text}\n".encode("utf-8", "replace"))
    finally:
        os._exit(_CHILD_FAILED)
