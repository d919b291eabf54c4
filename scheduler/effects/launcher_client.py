"""The daemon's end of the launcher's protocol, on asyncio."""

import asyncio
import errno
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from scheduler.effects.job_files import LOG_BYTES_DEFAULT, LOG_FILES_DEFAULT
from scheduler.effects.launcher import (
    Acknowledged,
    AttemptKey,
    CheckpointSaved,
    Exited,
    Frozen,
    HeldAttempt,
    LauncherGone,
    LauncherHello,
    Report,
    Signalled,
    Started,
    StartFailed,
    StartOrder,
    StopOrder,
    Thawed,
    TreeStuck,
)
from scheduler.effects.launcher_wire import (
    VERSION_NEWEST,
    VERSION_OLDEST,
    LineSplitter,
    Message,
    WireError,
    decode,
    encode,
    hello,
)
from scheduler.errors import LauncherError

CONNECT_S_MAX = 10.0  # for a launcher to start, clear what an earlier one left (5 s at most), and say hello
CLOSE_S_MAX = 2.0  # for the last orders to be taken
# Orders for a launcher that doesn't read. It always reads, so it is stopped or stuck in the kernel.
UNSENT_BYTES_MAX = 64 << 20
LAUNCHER_LOG_NAME = "launcher.log"
LAUNCHER_LOG_BYTES_MAX = 1 << 20  # a longer log starts over with the next launcher

_RETRY_S = 0.02  # between tries while a launcher ends and its socket is still there
_READY_FD = 3
_READY = b"ready\n"
_READY_BYTES_MAX = 4096
_PROGRAM = Path(__file__).with_name("launcher_process.py")

_AttemptReport = (
    Started | StartFailed | Signalled | Acknowledged | CheckpointSaved | Frozen | Thawed | Exited | TreeStuck
)
_REPORTS: dict[str, type[_AttemptReport]] = {
    "started": Started,
    "start_failed": StartFailed,
    "signalled": Signalled,
    "acknowledged": Acknowledged,
    "checkpoint_saved": CheckpointSaved,
    "frozen": Frozen,
    "thawed": Thawed,
    "exited": Exited,
    "tree_stuck": TreeStuck,
}


class LauncherClient:
    """Starts and ends jobs through a launcher on a Unix socket."""

    def __init__(
        self,
        socket_path: Path,
        jobs_dir: Path,
        *,
        user: str = "",
        log_bytes_max: int = LOG_BYTES_DEFAULT,
        log_files_max: int = LOG_FILES_DEFAULT,
        containment: str = "auto",
        spawn: bool = True,
    ) -> None:
        """Name the launcher; nothing happens before `connect`.

        Args:
            socket_path: Its directory must exist; a launcher that we start writes launcher.log there.
            jobs_dir: Made by the launcher if it is missing.
            user: Whom jobs run as, if the launcher is root; "" = its own user.
            log_bytes_max: Of one file of a job's output.
            log_files_max: Kept of a job's output, the growing one among them.
            containment: "auto", "cgroup" or "supervisor".
            spawn: Start a launcher if none answers; the five options above are for that one.
        """
        self._socket_path = socket_path.absolute()
        self._jobs_dir = jobs_dir.absolute()
        self._options = {
            "--socket": str(self._socket_path),
            "--jobs-dir": str(self._jobs_dir),
            "--containment": containment,
            "--user": user,
            "--log-bytes": str(log_bytes_max),
            "--log-files": str(log_files_max),
        }
        self._spawn_wanted = spawn
        self._line: _Line | None = None
        self._prepared: dict[AttemptKey, StartOrder] = {}  # and not started
        self._unsendable: dict[AttemptKey, str] = {}  # why it can't even be prepared
        self._children: dict[int, int] = {}  # pidfd -> pid of launchers that we started and have not reaped

    async def connect(self, on_report: Callable[[Report], None]) -> LauncherHello:
        """Connect, starting a launcher if none answers (unless systemd owns it).

        Reports of before the hello are in the hello; reports of after it are delivered after this returned.

        Raises:
            LauncherError: None could be reached or started, or it speaks another protocol.
        """
        assert self._line is None or self._line.is_broken, "connected already"
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                while True:
                    line = await self._try_to_connect(on_report)
                    if line is not None:
                        break
        except TimeoutError as error:
            raise LauncherError(
                f"no launcher answered on {self._socket_path} within {CONNECT_S_MAX:g} s"
            ) from error
        self._line = line
        self._prepared.clear()
        self._unsendable.clear()
        said = line.hello()
        ours = str(self._jobs_dir.resolve())
        if line.jobs_dir != ours:
            await self.close()
            raise LauncherError(
                f"the launcher on {self._socket_path} serves {line.jobs_dir}, not {ours}; "
                "stop it (its jobs end), or go back to that directory"
            )
        line.deliver()
        return said

    def prepare(self, order: StartOrder) -> None:
        """Have everything ready for a start that is likely to come, and report nothing yet.

        Nothing of the job runs before `start`; `forget`, or the end of the connection, takes it all back.
        """
        message = {
            "order": "prepare",
            **asdict(order.key),
            "command": order.command,
            "environment": order.environment,
            "working_directory": order.working_directory,
            "stop_command": order.stop_command,
        }
        self._prepared[order.key] = order
        try:
            self._send(message)
        except WireError as error:
            self._unsendable[order.key] = str(error)

    def start(self, order: StartOrder) -> None:
        """Order a start, prepared or not; answered by Started or StartFailed.

        Since it was prepared variables may have changed or come in: the GPUs are often known only now.
        """
        key = order.key
        if key not in self._prepared:
            self.prepare(order)
        prepared = self._prepared.pop(key).environment
        changed = {name: value for name, value in order.environment.items() if prepared.get(name) != value}
        unsendable = self._unsendable.pop(key, None)
        if unsendable is None:
            self._send({"order": "start", **asdict(key), "environment": changed})
        elif self._line is not None:
            # What is too long for the line is too long for exec, and fails as it would fail there.
            self._line.pretend(StartFailed(key, time.time(), "command", errno.E2BIG, unsendable))

    def stop(self, order: StopOrder) -> None:
        """Order a stop; answered by Signalled and Exited. A later order may only shorten the grace."""
        self._send(
            {
                "order": "stop",
                **asdict(order.key),
                "deadline_s": order.deadline_s,
                "notice": order.notice,
            }
        )

    def end_grace(self, key: AttemptKey) -> None:
        """SIGKILL the whole tree now."""
        self._send({"order": "end_grace", **asdict(key)})

    def freeze(self, key: AttemptKey) -> None:
        """Order that no process of the tree runs; answered by Frozen. A notice, or `thaw`, ends it."""
        self._send({"order": "freeze", **asdict(key)})

    def thaw(self, key: AttemptKey) -> None:
        """Let the tree run again; answered by Thawed if it was frozen, or was to be."""
        self._send({"order": "thaw", **asdict(key)})

    def forget(self, key: AttemptKey) -> None:
        """The exit is in the journal, or the start will not come: the launcher may drop the attempt."""
        self._prepared.pop(key, None)
        self._unsendable.pop(key, None)
        self._send({"order": "forget", **asdict(key)})

    async def close(self) -> None:
        """Let go of the launcher; it lives on while it has a job. No report comes after this."""
        line, self._line = self._line, None
        if line is not None:
            await line.close()
        loop = asyncio.get_running_loop()
        for pidfd, pid in self._children.items():
            # From here on it is init's to reap, or ours if it has ended already.
            loop.remove_reader(pidfd)
            _reap(pid)
            os.close(pidfd)
        self._children.clear()

    def _send(self, message: Message) -> None:
        assert self._line is not None, "not connected"
        self._line.send(message)

    async def _try_to_connect(self, on_report: Callable[[Report], None]) -> "_Line | None":
        """Return a line that has said hello; None if it is worth another try."""
        try:
            peer = _connected(self._socket_path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if not self._spawn_wanted:
                raise LauncherError(f"{self._socket_path}: {error.strerror}; is its unit running?") from error
            await self._spawn()
            return None
        except OSError as error:
            raise LauncherError(f"{self._socket_path}: {error.strerror}") from error
        line = _Line(on_report)
        await asyncio.get_running_loop().create_unix_connection(lambda: line, sock=peer)
        line.send(hello())
        try:
            await line.greeted.wait()
        except asyncio.CancelledError:  # it did not answer in time
            line.abort()
            raise
        if line.failure:
            await line.close()
            raise LauncherError(f"the launcher on {self._socket_path}: {line.failure}")
        if not line.is_broken:
            return line
        await asyncio.sleep(_RETRY_S)  # it was about to end when we came
        return None

    async def _spawn(self) -> None:
        """Start a launcher and wait until it listens, or until another one turns out to be there.

        Raises:
            LauncherError: It did not come up; the message is its own.
        """
        read_fd, write_fd = os.pipe()
        try:
            pid = self._spawn_process(write_fd)
        except OSError as error:
            os.close(read_fd)
            raise LauncherError(f"{sys.executable} does not start a launcher: {error.strerror}") from error
        finally:
            os.close(write_fd)
        self._reap_when_it_ends(pid)
        said = (await _read_to_end(read_fd)).decode("utf-8", "replace").strip()
        if said == _READY.decode().strip():
            return
        if said.startswith("another launcher"):
            await asyncio.sleep(_RETRY_S)  # it listens in a moment, or is about to end
            return
        raise LauncherError(f"the launcher did not start: {said or 'it ended without a word'}")

    def _spawn_process(self, ready_fd: int) -> int:
        log_path = self._socket_path.with_name(LAUNCHER_LOG_NAME)
        log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        if _size(log_path) > LAUNCHER_LOG_BYTES_MAX:
            log_flags |= os.O_TRUNC
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_path), log_flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            (os.POSIX_SPAWN_DUP2, ready_fd, _READY_FD),
        ]
        options = {**self._options, "--ready-fd": str(_READY_FD)}
        arguments = [argument for pair in options.items() for argument in pair]
        # -I -S: none of the user's site-packages and start-up files; it starts in a third of the time.
        command = [sys.executable, "-I", "-S", str(_PROGRAM), *arguments]
        # posix_spawn and not fork: gRPC's threads and their fork handlers don't come into it.
        return os.posix_spawn(
            sys.executable, command, _environment(), file_actions=actions, setsid=True, setsigmask=()
        )

    def _reap_when_it_ends(self, pid: int) -> None:
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            del self._children[pidfd]
            _reap(pid)

        loop.add_reader(pidfd, ended)


class _Line(asyncio.Protocol):
    """One connection: greets, then turns lines into reports until it breaks."""

    def __init__(self, on_report: Callable[[Report], None]) -> None:
        self._on_report = on_report
        self._splitter = LineSplitter()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._hello: Message = {}
        self._held: list[HeldAttempt] = []
        self._early: deque[Report] | None = deque()  # what came before `connect` returned
        self._is_let_go = False
        self.greeted = asyncio.Event()  # or failed, or broken
        self.failure = ""  # why a hello will never come
        self.is_broken = False
        self.jobs_dir = ""

    def hello(self) -> LauncherHello:
        """Return what the launcher said of itself."""
        said = self._hello
        return LauncherHello(
            said["launcher_id"], said["boot_id"], said["pid"], said["containment"], tuple(self._held)
        )

    def send(self, message: Message) -> None:
        """Send without waiting, in order. After the connection broke nothing is sent: LauncherGone says so.

        Raises:
            WireError: It is too long for a line.
        """
        data = encode(message)
        if self.is_broken or self._transport is None:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._transport.abort()

    def pretend(self, report: Report) -> None:
        """Deliver a report as if the launcher had sent it."""
        self._loop.call_soon(self._deliver_one, report)

    def deliver(self) -> None:
        """From the next turn on, deliver."""
        self._loop.call_soon(self._deliver_early)

    def abort(self) -> None:
        """Hang up now; nothing is delivered any more."""
        self._is_let_go = True
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Hang up; nothing is delivered any more."""
        self._is_let_go = True
        if self._transport is None:
            return
        self._transport.close()
        try:
            async with asyncio.timeout(CLOSE_S_MAX):
                await self._closed.wait()
        except TimeoutError:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's: the transport is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Asyncio's: something came."""
        try:
            for text in self._splitter.feed(data):
                self._receive(decode(text))
        except (WireError, KeyError, TypeError) as error:
            self._fail(f"it does not speak our protocol: {error!r}")

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Asyncio's: nothing will come any more."""
        self.is_broken = True
        self._closed.set()
        if self.greeted.is_set():
            self._deliver_one(LauncherGone(time.time()))
        self.greeted.set()

    def _receive(self, message: Message) -> None:
        kind = message["report"]
        if self.greeted.is_set():
            if kind in _REPORTS:
                self._deliver_one(report_of(message))
            return
        if kind == "refused":
            self._fail(message["message"])
        elif kind == "hello":
            if not VERSION_OLDEST <= message["version"] <= VERSION_NEWEST:
                raise WireError(f"it answers in version {message['version']}")
            self._hello = message
            self.jobs_dir = message["jobs_dir"]
        elif kind == "held":
            reports = tuple(report_of(report) for report in message["reports"])
            self._held.append(HeldAttempt(_key_of(message), reports))
        if self._hello and len(self._held) == self._hello["held"]:
            self.greeted.set()

    def _fail(self, failure: str) -> None:
        if not self.greeted.is_set():
            self.failure = failure
            self.greeted.set()
        if self._transport is not None:
            self._transport.abort()

    def _deliver_one(self, report: Report) -> None:
        if self._is_let_go:
            return
        if self._early is not None:
            self._early.append(report)
        else:
            self._on_report(report)

    def _deliver_early(self) -> None:
        early, self._early = self._early, None
        for report in early or ():
            self._deliver_one(report)


def report_of(message: Message) -> Report:
    """Return the report that a line says.

    Raises:
        KeyError: A field is missing, or this is no report.
    """
    kind = _REPORTS[message["report"]]
    values: dict[str, Any] = {
        field.name: message[field.name] for field in fields(kind) if field.name != "key"
    }
    if kind is TreeStuck:
        values["pids"] = tuple(values["pids"])
    return kind(key=_key_of(message), **values)


def _key_of(message: Message) -> AttemptKey:
    return AttemptKey(message["job_id"], message["attempt"])


def _connected(path: Path) -> socket.socket:
    """Return a connection; through the directory's descriptor, since sun_path holds 108 bytes.

    Raises:
        OSError: Nobody listens there.
    """
    directory_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.setblocking(False)  # a Unix socket connects at once or not at all
        peer.connect(f"/proc/self/fd/{directory_fd}/{path.name}")
    except OSError:
        peer.close()
        raise
    finally:
        os.close(directory_fd)
    return peer


async def _read_to_end(fd: int) -> bytes:
    """Return what comes until the other end closes, and close this one."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    text = bytearray()

    def read() -> None:
        try:
            piece = os.read(fd, _READY_BYTES_MAX)
        except BlockingIOError:
            return
        text.extend(piece)
        if not piece or len(text) >= _READY_BYTES_MAX:
            ended.set()

    os.set_blocking(fd, False)
    loop.add_reader(fd, read)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return bytes(text)


def _environment() -> dict[str, str]:
    """Return the little that a launcher may inherit: nothing of the daemon's reaches a job through it."""
    return {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # somebody else in this process may wait for all children
        os.waitpid(pid, os.WNOHANG)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
