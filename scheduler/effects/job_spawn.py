"""From a process just forked to the job's first instruction.

Processes are forked ahead (`job_forker.py`): when a start is prepared one has made itself ready and only
waits for its program, which comes over a pair of sockets, the start line; a word lets it become that
program. Back over the line come, one below the other,

    P <pid> <start ticks>         the process itself, when it is ready
    E <what> <errno> <message>    why there was no exec, or not even a process

and the exec closes it. Its end after P without E means that the exec succeeded (or that a SIGKILL came in the
moment before; the launcher calls that started, too: a process was there).
"""

from __future__ import annotations

import errno
import marshal
import os
import resource
import signal
import socket
import struct

from scheduler.effects.job_files import JobUser, open_job_directory
from scheduler.effects.job_signals import start_ticks
from scheduler.effects.linux import set_parent_death_signal

TYPE_CHECKING = False  # as in `launcher_wire.py`
if TYPE_CHECKING:
    from typing import NoReturn

_CHILD_FAILED = 127  # nobody reads it: the E line says more
_MESSAGE_CHARACTERS_MAX = 500
_TEXT_BYTES = 4096
_LENGTH = struct.Struct("=I")


class Spawner:
    """Turns forked processes into programs."""

    __slots__ = ("_files_max", "_null_fd", "_oom_score", "jobs_fd", "user")

    def __init__(self, user: JobUser, jobs_fd: int, oom_score: bytes | None) -> None:
        """Take what all programs have in common.

        Args:
            jobs_fd: The jobs directory, open.
            oom_score: What programs are to have as oom_score_adj; None leaves it alone.
        """
        self.user = user
        self.jobs_fd = jobs_fd
        self._oom_score = oom_score
        self._null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # We raise our own limit (`raise_open_files_limit`); programs that use select() need the old one.
        self._files_max = resource.getrlimit(resource.RLIMIT_NOFILE)

    def kept_fds(self) -> set[int]:
        """Return what a process that is to settle must not close."""
        return {self._null_fd, self.jobs_fd}

    def raise_open_files_limit(self) -> None:
        """Let this process hold as many descriptors as it may; programs get the old limit back."""
        hard = self._files_max[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def settle(self) -> None:
        """Make this process, which forks the others, what they are to inherit."""
        os.dup2(self._null_fd, 0)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        resource.setrlimit(resource.RLIMIT_NOFILE, self._files_max)
        if self._oom_score is not None:
            _write_oom_score(self._oom_score)

    def become(self, line: ChildLine, parent_pid: int) -> NoReturn:
        """Wait, in a process forked by one that is settled, for the program on the line, and become it."""
        what = "fork"
        try:
            os.setsid()
            _die_with(parent_pid)
            line.say_ready()
            program, output_fd = line.wait_for_program()
            os.dup2(output_fd, 1)
            os.dup2(output_fd, 2)
            program.environment.update(line.wait_for_word())
            self._become_user(parent_pid)
            what = "working_directory"
            program.enter(self.jobs_fd)
            what = "command"
            program.execute()
        except OSError as error:
            line.fail(what, error.errno or errno.EIO, error.strerror or str(error))
        except BaseException as error:
            line.fail(what, errno.EINVAL, str(error))
        finally:
            os._exit(_CHILD_FAILED)

    def _become_user(self, parent_pid: int) -> None:
        """Become the job's user: only now, so that no other job of that user can touch who waits."""
        if self.user.name:
            os.setgroups(self.user.groups)
            os.setresgid(self.user.gid, self.user.gid, self.user.gid)
            os.setresuid(self.user.uid, self.user.uid, self.user.uid)
            _die_with(parent_pid)  # the change of user cleared it


class Program:
    """What one process is to run."""

    __slots__ = ("_arguments", "_job_id", "_working_directory", "environment")

    def __init__(
        self, arguments: list[str], environment: dict[str, str], working_directory: str, job_id: str
    ) -> None:
        """Take the command; it is found on the job's own PATH. "" as directory is the job's own."""
        self._arguments = arguments
        self.environment = environment
        self._working_directory = working_directory
        self._job_id = job_id

    def packed(self) -> bytes:
        """Return it as bytes."""
        return marshal.dumps((self._arguments, self.environment, self._working_directory, self._job_id))

    @classmethod
    def unpacked(cls, data: bytes) -> Program:
        """Return what the same interpreter packed."""
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
        for path in _candidates(self._arguments[0], self.environment.get("PATH", os.defpath)):
            try:
                os.execve(path, self._arguments, self.environment)
            except (FileNotFoundError, NotADirectoryError) as error:
                missing = error
            except PermissionError as error:
                denied = denied or error
        raise denied or missing or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


class StartLine:
    """The launcher's end of the line to a process that is to become a program."""

    __slots__ = ("_may_go", "_ours", "_text", "_theirs", "failure", "pid", "start_ticks")

    def __init__(self) -> None:
        """Make both ends.

        Raises:
            OSError: No descriptor is left.
        """
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._text = b""
        self._may_go = False
        self.pid = 0  # known when it is ready
        self.start_ticks = 0
        self.failure: tuple[str, int, str] | None = None  # what, errno, message

    def fileno(self) -> int:
        """Return what becomes readable when there is something to `read`."""
        return self._ours.fileno()

    def child_fd(self) -> int:
        """Return the process's end, to be given away."""
        return self._theirs.fileno()

    def close_child_end(self) -> None:
        """After it was given away: only the process (and its supervisor) may hold the line open."""
        self._theirs.close()

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
            socket.send_fds(self._ours, [b"p"], [memory_fd, output_fd])
        except (BrokenPipeError, ConnectionResetError):
            self._was_killed_waiting()
        finally:
            os.close(memory_fd)

    def go(self, environment: dict[str, str]) -> None:
        """Let the process become the program that it was sent, with this more in its environment."""
        self._may_go = True
        word = marshal.dumps(environment)
        try:
            self._ours.send(_LENGTH.pack(len(word)) + word)
        except (BrokenPipeError, ConnectionResetError):
            self._was_killed_waiting()

    def read(self) -> bool:
        """Read what has come into the fields; True once all is decided and the line may be closed."""
        is_open = True
        while is_open:
            try:
                piece = self._ours.recv(_TEXT_BYTES)
            except BlockingIOError:
                break
            except ConnectionResetError:
                piece = b""
                self._was_killed_waiting()
            self._text += piece
            is_open = bool(piece)
            if not is_open and not self._may_go:
                self._was_killed_waiting()
        *whole, self._text = self._text.split(b"\n")
        for text in whole:
            match text.decode("utf-8", "replace").split(" ", 3):
                case ["P", pid, ticks]:
                    self.pid, self.start_ticks = int(pid), int(ticks)
                case ["E", what, number, message]:
                    self.failure = (what, int(number), message)
                case other:
                    raise AssertionError(f"a start line that nobody writes: {other}")
        return not is_open

    def close(self) -> None:
        """Let go of both ends; a second time is no error."""
        self._ours.close()
        self._theirs.close()

    def _was_killed_waiting(self) -> None:
        """It never read what it was sent (the kernel says so: ECONNRESET), or it ended before it might go."""
        if self.failure is None:
            self.failure = ("fork", errno.ESRCH, "the process was killed before it became the program")


class ChildLine:
    """The process's end of a start line."""

    __slots__ = ("_socket",)

    def __init__(self, fd: int) -> None:
        """Take over the descriptor."""
        self._socket = socket.socket(fileno=fd)

    def say_ready(self) -> None:
        """Say who waits here."""
        pid = os.getpid()
        self._socket.sendall(b"P %d %d\n" % (pid, start_ticks(pid)))

    def wait_for_program(self) -> tuple[Program, int]:
        """Return the program, and where its output goes; ends this process if none will come."""
        fds = receive_descriptors(self._socket)
        if not fds:
            os._exit(_CHILD_FAILED)
        memory_fd, output_fd = fds
        return Program.unpacked(os.pread(memory_fd, os.fstat(memory_fd).st_size, 0)), output_fd

    def wait_for_word(self) -> dict[str, str]:
        """Return, when the launcher says so, what is new in the environment; or end this process."""
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        new: dict[str, str] = marshal.loads(self._receive(length))
        return new

    def _receive(self, size: int) -> bytes:
        data = self._socket.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            os._exit(_CHILD_FAILED)
        return data

    def fail(self, what: str, number: int, message: str) -> None:
        """Say why there is no exec."""
        text = message[:_MESSAGE_CHARACTERS_MAX].replace("\n", " ")
        self._socket.sendall(f"E {what} {number} {text}\n".encode("utf-8", "replace"))

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()


def receive_descriptors(connection: socket.socket) -> list[int]:
    """Return the two descriptors that come with the next message; none at the end of the connection."""
    word, fds, _, _ = socket.recv_fds(connection, 1, 2)
    for fd in fds:
        os.set_inheritable(fd, False)  # Python 3.11's recv_fds drops the flag that would do this
    assert not word or len(fds) == 2
    return fds


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


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, or die now if that is done."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(_CHILD_FAILED)
