"""From a fork to the job's first instruction.

The launcher has one thread, so the child may run Python between fork and exec. One child is forked ahead:
when a start is ordered it has made itself ready and only waits for its program, which comes over a pair of
sockets, the start line. What goes wrong comes back over it, line by line, and the exec closes it:

    P <pid> <start ticks>         written by a supervisor, of its child
    E <what> <errno> <message>    written by the child: there was no exec

Its end without an E line means that the exec succeeded (or that a SIGKILL came first; the launcher calls
that started, too: a process was there).
"""

from __future__ import annotations

import errno
import gc
import marshal
import os
import resource
import signal
import socket

from scheduler.effects.job_files import JobUser, open_job_directory
from scheduler.effects.job_signals import start_ticks
from scheduler.effects.linux import fork_into_cgroup, set_parent_death_signal

TYPE_CHECKING = False  # as in `launcher_wire.py`
if TYPE_CHECKING:
    from typing import NoReturn

# Blocked around a fork: until the child has reset its handlers, a signal to it would wake the launcher.
_SIGNALS_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_CHILD_FAILED = 127  # nobody reads it: the E line says more
_MESSAGE_CHARACTERS_MAX = 500
_TEXT_BYTES = 4096


class Spawner:
    """Forks processes that make themselves ready, wait for a program and become it."""

    __slots__ = ("_files_max", "_null_fd", "_oom_score", "jobs_fd", "user")

    def __init__(self, user: JobUser, jobs_fd: int, oom_score: bytes | None) -> None:
        """Prepare what all have in common.

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

    def spawn(self, line: StartLine, cgroup_fd: int = -1, *, joins: bool = False) -> int:
        """Fork a process that waits on this line for its program; return its pid.

        Args:
            line: Its end is still to be closed here.
            cgroup_fd: The cgroup that it is to be in, if any.
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
            self._make_ready(parent_pid, line)
            program, output_fd = line.wait_for_program()
            os.dup2(output_fd, 1)
            os.dup2(output_fd, 2)
            os.close(output_fd)
            self._become_user()
            what = "working_directory"
            program.enter(self.jobs_fd)
            what = "command"
            program.execute()
        except OSError as error:
            line.fail(what, error.errno or errno.EIO, error.strerror or str(error))
        except BaseException as error:
            line.fail(what, errno.EINVAL, str(error))

    def raise_open_files_limit(self) -> None:
        """Let this process hold as many descriptors as it may; children get the old limit back."""
        hard = self._files_max[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def _make_ready(self, parent_pid: int, line: StartLine) -> None:
        # It may wait for hours: it must not keep the launcher's connection, lock and pipes open for so long.
        close_descriptors({*self.kept_fds(), line.child_fd()})
        os.setsid()
        os.dup2(self._null_fd, 0)
        # Handlers end with the exec; until then a signal must not wake the launcher through its descriptor.
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if self._oom_score is not None:
            _write_oom_score(self._oom_score)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._files_max)
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(_CHILD_FAILED)  # too late: the parent died before it was asked for

    def _become_user(self) -> None:
        """Become the job's user: only now, so that no other job of that user can touch who waits."""
        if self.user.name:
            parent_pid = os.getppid()
            os.setgroups(self.user.groups)
            os.setresgid(self.user.gid, self.user.gid, self.user.gid)
            os.setresuid(self.user.uid, self.user.uid, self.user.uid)
            set_parent_death_signal(signal.SIGKILL)  # the change of user cleared it
            if os.getppid() != parent_pid:
                os._exit(_CHILD_FAILED)


class Program:
    """What one process is to run."""

    __slots__ = ("_arguments", "_environment", "_job_id", "_paths", "_working_directory")

    def __init__(
        self, arguments: list[str], environment: dict[str, str], working_directory: str, job_id: str
    ) -> None:
        """Take the command; it is found on the job's own PATH. "" as directory is the job's own."""
        self._arguments = arguments
        self._environment = environment
        self._paths = _candidates(arguments[0], environment.get("PATH", os.defpath))
        self._working_directory = working_directory
        self._job_id = job_id

    def packed(self) -> bytes:
        """Return it as bytes."""
        return marshal.dumps((self._arguments, self._environment, self._working_directory, self._job_id))

    @classmethod
    def unpacked(cls, data: bytes) -> Program:
        """Return what was packed by the same interpreter."""
        return cls(*marshal.loads(data))

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
    """The line between the launcher and a process that is to become a program."""

    __slots__ = ("_ours", "_text", "_theirs", "failure", "pid", "start_ticks")

    def __init__(self) -> None:
        """Make both ends.

        Raises:
            OSError: No descriptor is left.
        """
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._text = b""
        self.pid = 0
        self.start_ticks = 0
        self.failure: tuple[str, int, str] | None = None  # what, errno, message

    # The launcher's end ------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return what becomes readable when something is decided."""
        return self._ours.fileno()

    def send(self, program: Program, output_fd: int) -> None:
        """Let the process become this program, with its output going there.

        Raises:
            OSError: No descriptor or memory is left. (That a process is dead already is found by reading.)
        """
        memory_fd = os.memfd_create("program")
        try:
            data = memoryview(program.packed())
            while data:
                data = data[os.write(memory_fd, data) :]
            socket.send_fds(self._ours, [b"g"], [memory_fd, output_fd])
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            os.close(memory_fd)

    def is_decided(self) -> bool:
        """Read what has come; once True, the fields are set and the line may be closed."""
        while True:
            try:
                piece = self._ours.recv(_TEXT_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                break  # reset: the process died with our word unread
            if not piece:
                break
            self._text += piece
        for text in self._text.decode("utf-8", "replace").splitlines():
            match text.split(" ", 3):
                case ["P", pid, ticks]:
                    self.pid, self.start_ticks = int(pid), int(ticks)
                case ["E", what, number, message]:
                    self.failure = (what, int(number), message)
                case _:
                    pass  # a line cut short by a SIGKILL
        return True

    def close(self) -> None:
        """Let go of both ends; a second time is no error."""
        self._ours.close()
        self._theirs.close()

    # The process's end -------------------------------------------------------------------------

    def child_fd(self) -> int:
        """Return the descriptor that a supervisor keeps."""
        return self._theirs.fileno()

    def wait_for_program(self) -> tuple[Program, int]:
        """Return the program, and where its output goes."""
        word, fds, _, _ = socket.recv_fds(self._theirs, 1, 2)
        if not word:
            os._exit(_CHILD_FAILED)
        memory_fd, output_fd = fds
        program = Program.unpacked(os.pread(memory_fd, os.fstat(memory_fd).st_size, 0))
        os.close(memory_fd)  # these two are not closed by the exec: Python 3.11's recv_fds takes no flags
        return program, output_fd

    def fail(self, what: str, number: int, message: str) -> NoReturn:
        """Say why there is no exec, and end this process."""
        try:
            text = message[:_MESSAGE_CHARACTERS_MAX].replace("\n", " ")
            self._theirs.sendall(f"E {what} {number} {text}\n".encode("utf-8", "replace"))
        finally:
            os._exit(_CHILD_FAILED)

    def say_parent(self, pid: int) -> None:
        """Say who the process is, which has not been reaped."""
        self._theirs.sendall(b"P %d %d\n" % (pid, start_ticks(pid)))

    def close_child_end(self) -> None:
        """After the fork: only the process (and its supervisor) may hold the line open."""
        self._theirs.close()


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


def close_descriptors(keep: set[int]) -> None:
    """Close everything that is open but 0, 1, 2 and what is to be kept."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the one that the listing itself used


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
