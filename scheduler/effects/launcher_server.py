"""What the launcher does with connections, orders, ended children and its own end."""

import errno
import os
import select
import signal
import socket
import struct
import time

from scheduler.effects.job_attempt import Attempt, Key
from scheduler.effects.job_workshop import Workshop
from scheduler.effects.launcher_loop import Loop, Timer, guarded, log
from scheduler.effects.launcher_wire import LineSplitter, Message, WireError, agreed_version, decode, encode
from scheduler.effects.linux import IN_Q_OVERFLOW

IDLE_S = 2.0  # time for a restarting daemon to come back before a launcher without jobs ends
TERM_GRACE_S = 5.0
FORK_AHEAD_S = 0.002  # after a start, the fork for the next: when this one has reached its exec
HELD_MAX = 10_000  # attempts; a daemon that never forgets one is broken
GREETING_MAX = 4  # connections that have not said hello; the oldest gives way
UNSENT_BYTES_MAX = 16 << 20  # reports for a daemon that doesn't read; it reconnects and gets what is held
JOB_ID_CHARACTERS_MAX = 100
NEWS_CHARACTERS_MAX = 16384  # of a start order: a hundred GPUs, twice

_READ_BYTES = 65536
_UNIX_S_MAX = 1e12  # more is no time
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid
_JOB_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


class Connection:
    """One peer: lines in, lines out, never waiting."""

    __slots__ = ("_loop", "_socket", "_splitter", "_unsent", "_waits_to_send", "is_greeted", "lines")

    def __init__(self, loop: Loop, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._loop = loop
        self._socket = peer
        self._unsent = bytearray()
        self._waits_to_send = False
        self._splitter = LineSplitter()
        self.is_greeted = False
        self.lines: list[bytes] = []  # received and not obeyed yet, the next one last

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self._socket.fileno()

    def receive(self) -> bool:
        """Take into `lines` what came; False at the end.

        Raises:
            WireError: A line was too long.
        """
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.lines[:0] = reversed(self._splitter.feed(data))
        return bool(data)

    def send(self, message: Message) -> None:
        """Queue a message for `flush`."""
        self._unsent += encode(message)

    def flush(self) -> bool:
        """Send what the peer takes; False if it takes too little or is gone."""
        if not self._unsent:
            return True
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        del self._unsent[:sent]
        if bool(self._unsent) is not self._waits_to_send:
            self._waits_to_send = bool(self._unsent)
            events = select.EPOLLIN | (select.EPOLLOUT if self._waits_to_send else 0)
            self._loop.change(self._socket.fileno(), events)
        return len(self._unsent) <= UNSENT_BYTES_MAX

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class Server:
    """Serves one daemon at a time and holds its attempts."""

    def __init__(self, listener: socket.socket, identity: Message) -> None:
        """Take a listening socket and what the hello says of us."""
        self.loop = Loop(self._flush)
        self._listener = listener
        self._identity = identity
        self._shop: Workshop | None = None
        self._attempts: dict[Key, Attempt] = {}
        self._discarded: list[Attempt] = []  # prepared for nothing; their processes are about to be gone
        self._daemon: Connection | None = None
        self._greeting: list[Connection] = []
        self._idle_timer: Timer | None = None
        self._is_ending = False
        self._is_reachable = True
        self._wakeup_fd = -1

    def socket_is_gone(self) -> None:
        """Nobody can reach us any more: what is over is held for nobody."""
        log("the socket was removed; ending when no job runs")
        self._is_reachable = False
        self._look_for_work()

    def serve(self, shop: Workshop) -> None:
        """Serve until nobody needs us."""
        self._shop = shop
        self._wakeup_fd = wakeup_on_signals()
        self._listener.setblocking(False)
        self.loop.watch(self._wakeup_fd, self._signals_came)
        self.loop.watch(shop.inotify.fd, self._files_changed)
        self.loop.watch(self._listener.fileno(), self._accept)
        self._look_for_work()
        self._fork_ahead()
        self.loop.run()

    # Connections -------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log(f"a connection was not accepted: {error}")
            return
        _, uid, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid not in (0, os.getuid()):
            log(f"a connection of user {uid} was refused")
            peer.close()
            return
        connection = Connection(self.loop, peer)
        self._greeting.append(connection)
        if len(self._greeting) > GREETING_MAX:
            self._hang_up(self._greeting[0])
        self.loop.watch(connection.fileno(), lambda: self._receive(connection))

    def _receive(self, connection: Connection) -> None:
        """Take what came, unless there is work from before."""
        if connection.lines:
            return
        try:
            is_open = connection.receive()
            self._work(connection)
            if not is_open and not connection.lines:
                self._hang_up(connection)
        except WireError as error:
            self._refuse(connection, error)

    def _work(self, connection: Connection) -> None:
        """Obey up to the first that takes long; then exits, deadlines and reports have their turn."""
        while connection.lines and connection.fileno() >= 0:
            message = decode(connection.lines.pop())
            if not connection.is_greeted:
                self._greet(connection, message)
            elif self._obey(message) and connection.lines:
                self.loop.call_after(0.0, lambda: self._work_on(connection))
                return

    def _work_on(self, connection: Connection) -> None:
        try:
            self._work(connection)
        except WireError as error:
            self._refuse(connection, error)

    def _refuse(self, connection: Connection, error: WireError) -> None:
        if connection.fileno() >= 0:
            log(f"a connection was ended: {error}")
            connection.send({"report": "refused", "message": str(error)})
            connection.flush()
            self._hang_up(connection)

    def _greet(self, connection: Connection, message: Message) -> None:
        version = agreed_version(message)
        if self._daemon is not None:
            log("another daemon took over")
            self._hang_up(self._daemon)  # which discards what it had prepared: the new one hears of none
        self._greeting.remove(connection)
        self._daemon = connection
        connection.is_greeted = True
        connection.send(
            {"report": "hello", "version": version, **self._identity, "held": len(self._attempts)}
        )
        for (job_id, number), attempt in self._attempts.items():
            connection.send(
                {"report": "held", "job_id": job_id, "attempt": number, "reports": attempt.reports}
            )
        self._look_for_work()

    def _hang_up(self, connection: Connection) -> None:
        if connection.fileno() < 0:
            return
        self.loop.unwatch(connection.fileno())
        connection.close()
        if connection is self._daemon:
            self._daemon = None
            self._discard_prepared()
            self._look_for_work()
        else:
            self._greeting.remove(connection)

    def _report(self, message: Message) -> None:
        if self._daemon is not None:
            self._daemon.send(message)

    def _flush(self) -> None:
        for connection in (self._daemon, *self._greeting):
            if connection is not None and not connection.flush():
                log("a connection was ended: it takes no reports")
                self._hang_up(connection)

    # Orders ------------------------------------------------------------------------------------

    def _obey(self, message: Message) -> bool:
        """Do as ordered; True if that took as long as a preparation takes."""
        order = message.get("order")
        key = checked_key(message)
        attempt = self._attempts.get(key)
        if order == "prepare":
            if attempt is None:
                self._prepare(key, checked_preparation(message))
                return True
        elif attempt is None:
            if order == "start":
                raise WireError(f"an order to start what was not prepared: {key}")
            log(f"{key}: an order to {order} what is not held")
        elif order == "start":
            attempt.start(checked_news(message))
            self.loop.call_after(FORK_AHEAD_S, self._fork_ahead)
        elif order == "stop":
            attempt.stop(*checked_stop(message))
        elif order == "end_grace":
            attempt.end_grace()
        elif order == "freeze":
            attempt.freeze()
        elif order == "thaw":
            attempt.thaw()
        elif order == "forget":
            if not attempt.is_ordered:
                self._discard(key)
            elif attempt.is_over:
                del self._attempts[key]
                self._look_for_work()
            else:
                log(f"{key}: an order to forget what is not over")
        else:
            raise WireError(f"an order that version 3 does not know: {order!r}")
        return False

    def _prepare(self, key: Key, order: Message) -> None:
        assert self._shop is not None
        attempt = self._attempts[key] = Attempt(self._shop, key, order, self._report, self._look_for_work)
        if self._is_ending:
            attempt.refuse(errno.ESHUTDOWN, "the launcher is ending")
        elif len(self._attempts) > HELD_MAX:
            attempt.refuse(errno.EAGAIN, f"the launcher holds {HELD_MAX} attempts that are not forgotten")
        else:
            attempt.prepare()

    def _discard(self, key: Key) -> None:
        attempt = self._attempts.pop(key)
        self._discarded.append(attempt)
        attempt.discard()
        self._look_for_work()

    def _discard_prepared(self) -> None:
        for key in [key for key, attempt in self._attempts.items() if not attempt.is_ordered]:
            self._discard(key)

    def _fork_ahead(self) -> None:
        """Have the next start's process wait; with what is urgent done, so that nobody waits for the fork."""
        if not self._is_ending and self._shop is not None:
            try:
                self._shop.containment.fork_ahead()
            except OSError as error:
                log(f"no process could be forked ahead: {error}")

    # The world ---------------------------------------------------------------------------------

    def _signals_came(self) -> None:
        numbers = os.read(self._wakeup_fd, 4096)
        self._reap()
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._end()

    def _reap(self) -> None:
        assert self._shop is not None
        containment = self._shop.containment
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            guarded(containment.reaped, pid, status)
        containment.all_reaped()

    def _files_changed(self) -> None:
        assert self._shop is not None
        for watch, mask, name in self._shop.inotify.read():
            if mask & IN_Q_OVERFLOW:
                log("file events were lost: looking at each attempt")
                for attempt in list(self._attempts.values()):
                    attempt.look_for_acknowledgement()
            elif (callback := self._shop.watches.get(watch)) is not None:
                callback(name)

    # The end -----------------------------------------------------------------------------------

    def _look_for_work(self) -> None:
        """End now, in a while, or not yet."""
        self._discarded = [attempt for attempt in self._discarded if not attempt.is_over]
        is_idle = self._daemon is None and not self._attempts and not self._discarded
        if self._is_ending or not self._is_reachable:
            is_all_over = not self._discarded and all(attempt.is_over for attempt in self._attempts.values())
            if self._is_ending and is_all_over:
                self._flush()
                self.loop.stop()
            is_idle = self._daemon is None and is_all_over
        if is_idle and self._idle_timer is None:
            self._idle_timer = self.loop.call_after(IDLE_S, self.loop.stop)
        elif not is_idle and self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _end(self) -> None:
        grace_s = 0.0 if self._is_ending else TERM_GRACE_S
        log(f"stopping all jobs with a grace of {grace_s:g} s, then ending")
        self._is_ending = True
        self._discard_prepared()
        deadline_s = time.time() + grace_s
        for attempt in list(self._attempts.values()):
            attempt.stop(deadline_s, {"reason": "launcher_stopped", "deadline_s": deadline_s})
        self._look_for_work()


def wakeup_on_signals() -> int:
    """Return a descriptor that becomes readable, with their numbers, on the signals that we serve."""
    wakeup_fd, write_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    # A handler and not SIG_IGN, which jobs would inherit: Python ignores SIGPIPE, whoever started us perhaps
    # others, SIGHUP is not for us.
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _do_nothing)
    return wakeup_fd


def checked_key(message: Message) -> Key:
    """Return the attempt that an order names.

    Raises:
        WireError: It is no safe name of a directory and a number.
    """
    job_id, attempt = message.get("job_id"), message.get("attempt")
    if (
        not isinstance(job_id, str)
        or not 0 < len(job_id) <= JOB_ID_CHARACTERS_MAX
        or not _JOB_ID_CHARACTERS.issuperset(job_id)
        or job_id[0] == "."
    ):
        raise WireError(f"not a job's id: {str(job_id)[:JOB_ID_CHARACTERS_MAX]!r}")
    if type(attempt) is not int or not 0 <= attempt < 1 << 31:
        raise WireError(f"not an attempt's number: {str(attempt)[:JOB_ID_CHARACTERS_MAX]!r}")
    return job_id, attempt


def checked_preparation(message: Message) -> Message:
    """Return the order if its fields have the types that it needs.

    Raises:
        WireError: They have not.
    """
    command, stop_command = message.get("command"), message.get("stop_command")
    if (
        not _are_strings(command)
        or not command
        or not _are_strings(stop_command)
        or not isinstance(message.get("working_directory"), str)
    ):
        raise WireError("an order to prepare whose fields have the wrong types")
    checked_environment(message)
    return message


def checked_environment(message: Message) -> dict[str, str]:
    """Return an order's environment.

    Raises:
        WireError: It is missing, or no object of strings.
    """
    environment = message.get("environment")
    if not isinstance(environment, dict) or not _are_strings(list(environment.values())):
        raise WireError("an order whose environment is no object of strings")
    return environment


def checked_news(message: Message) -> dict[str, str]:
    """Return what a start order adds to the environment: it must fit into a socket's buffer.

    Raises:
        WireError: It is missing, no object of strings, or too long.
    """
    environment = checked_environment(message)
    if sum(len(name) + len(value) for name, value in environment.items()) > NEWS_CHARACTERS_MAX:
        raise WireError("a start order that adds too much to the environment")
    return environment


def checked_stop(message: Message) -> tuple[float, dict[str, object]]:
    """Return a stop order's deadline and notice.

    Raises:
        WireError: They are missing.
    """
    deadline_s, notice = message.get("deadline_s"), message.get("notice")
    if not isinstance(deadline_s, int | float) or not isinstance(notice, dict):
        raise WireError("a stop order without deadline_s or notice")
    if not abs(deadline_s) < _UNIX_S_MAX:  # NaN is not less, either
        raise WireError(f"a stop order's deadline_s is no time: {deadline_s}")
    return float(deadline_s), notice


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _do_nothing(number: int, frame: object) -> None:
    """Only the wakeup descriptor matters."""
