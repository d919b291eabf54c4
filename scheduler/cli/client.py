"""The connection to a daemon: one channel, bounded waits, retries that can do no harm.

Imported late: gRPC and protobuf cost a tenth of a second.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

# What gRPC's C core logs is for its developers; a person gets our message instead.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf.message import Message

from scheduler import paths
from scheduler.cli import failures
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError, ConnectionLost

# A call that has reached the daemon and hangs there is given up: it answers in milliseconds, and
# a batch of 10,000 submissions in a second or two.
CALL_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 0.5
# A page of 1,000 jobs with 16 attempts each is about 10 MB; gRPC's default limit is 4 MiB.
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
UNIX_PATH_BYTES_MAX = 107  # the kernel's sun_path, less the final zero
RETRY_PAUSE_S_MIN = 0.02
RETRY_PAUSE_S_MAX = 0.5
RETRY_PAUSE_GROWTH = 2

Answer = TypeVar("Answer", bound=Message)


class Client:
    """A lazily connected client of one daemon. Use as a context manager."""

    def __init__(self, address: str, connect_timeout_s: float) -> None:
        self.address = address
        self.connect_timeout_s = connect_timeout_s
        timeout_ms = max(1, round(connect_timeout_s * 1000))
        self._channel = grpc.insecure_channel(
            target(address),
            options=(
                # gRPC's word for how long one attempt to connect may take: a stopped daemon's socket
                # accepts and then says nothing.
                ("grpc.min_reconnect_backoff_ms", timeout_ms),
                ("grpc.initial_reconnect_backoff_ms", 20),
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                # A proxy of the environment has no business with a local daemon.
                ("grpc.enable_http_proxy", 0),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is open and let go of the connection.

        Bounded: gRPC waits for ever for a call whose beginning Ctrl-C has cut short (seen with 1.85).
        """
        closing = threading.Thread(target=self._channel.close, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    @cached_property
    def jobs(self) -> Any:
        """The stub of JobService."""
        from scheduler.v1 import job_service_pb2_grpc

        return job_service_pb2_grpc.JobServiceStub(self._channel)

    @cached_property
    def node(self) -> Any:
        """The stub of NodeService."""
        from scheduler.v1 import node_service_pb2_grpc

        return node_service_pb2_grpc.NodeServiceStub(self._channel)

    @cached_property
    def power(self) -> Any:
        """The stub of PowerService."""
        from scheduler.v1 import power_service_pb2_grpc

        return power_service_pb2_grpc.PowerServiceStub(self._channel)

    @cached_property
    def usage(self) -> Any:
        """The stub of UsageService."""
        from scheduler.v1 import usage_service_pb2_grpc

        return usage_service_pb2_grpc.UsageServiceStub(self._channel)

    def call(
        self,
        method: Callable[..., Any],
        request: Message,
        answer: type[Answer],
        *,
        idempotent: bool = True,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Answer:
        """Return the answer to a unary call.

        While no server answers, the same request is sent again until the connect timeout has passed;
        once it may have arrived, only if doing it twice is doing it once.

        Raises:
            CliError: The server refused, or can't be reached.
        """
        attempts = _Attempts(self.address, self.connect_timeout_s)
        while True:
            try:
                reply = method(request, timeout=timeout_s)
                assert isinstance(reply, answer)
                return reply
            except grpc.RpcError as error:
                attempts.again_or_raise(error, idempotent=idempotent)

    def stream(
        self,
        method: Callable[..., Any],
        request: Message,
        answer: type[Answer],
        *,
        timeout_s: float | None = None,
        connect_timeout_s: float | None = None,
    ) -> Iterator[Answer]:
        """Yield a server stream's messages; connecting is retried as in `call`.

        Args:
            timeout_s: Of the whole stream; None = for as long as it takes.
            connect_timeout_s: None = the client's.

        Raises:
            ConnectionLost: There was a connection, and it broke.
            CliError: The server refused, or can't be reached.
            TimeoutError: `timeout_s` has passed.
        """
        attempts = _Attempts(self.address, connect_timeout_s or self.connect_timeout_s)
        while True:
            messages = method(request, timeout=timeout_s)
            try:
                for message in messages:
                    assert isinstance(message, answer)
                    yield message
                return
            except grpc.RpcError as error:
                if timeout_s is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise TimeoutError from error
                if _connection_failed(error) and not _never_connected(error):
                    raise ConnectionLost(
                        ExitCode.UNREACHABLE, f"the connection to {self.address} was lost"
                    ) from error
                attempts.again_or_raise(error, idempotent=True)
            finally:
                messages.cancel()


class _Attempts:
    """Decides whether a failed call is tried again, and pauses in between."""

    def __init__(self, address: str, connect_timeout_s: float) -> None:
        self._address = address
        self._timeout_s = connect_timeout_s
        self._deadline_s = time.monotonic() + connect_timeout_s
        self._pause_s = RETRY_PAUSE_S_MIN

    def again_or_raise(self, error: grpc.RpcError, *, idempotent: bool) -> None:
        if not _connection_failed(error):
            raise failures.from_rpc(error) from None
        details = error.details() or ""
        if not idempotent and not _never_connected(error):
            raise CliError(
                ExitCode.UNREACHABLE,
                f"the connection to {self._address} was lost before the answer came; "
                "look whether it was done before you try again",
            ) from None
        if time.monotonic() + self._pause_s > self._deadline_s:
            raise failures.unreachable(
                self._address, self._timeout_s, failures.connect_cause(details)
            ) from None
        time.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * RETRY_PAUSE_GROWTH, RETRY_PAUSE_S_MAX)


def target(address: str) -> str:
    """Return gRPC's form of `unix:///path` or `host:port`.

    Raises:
        CliError: It is neither; or another host, to which nothing goes in the clear; or a socket in a
            directory under /tmp that someone else made.
    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:").removeprefix("//"))
        if not path.is_absolute() or len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
            raise CliError(
                ExitCode.INVALID,
                f"address {address!r}: write unix:///path, an absolute path of at most "
                f"{UNIX_PATH_BYTES_MAX} bytes",
            )
        _check_temporary(path)
        return f"unix:{path}"
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise CliError(ExitCode.INVALID, f"address {address!r}: write unix:///path or host:port")
    if not _is_loopback(host):
        raise CliError(
            ExitCode.INVALID,
            f"address {address!r}: only this machine can be reached by TCP, because nothing is sent in "
            f"the clear; forward the socket instead: ssh -L 9476:{paths.SYSTEM_SOCKET} HOST, then "
            "--address localhost:9476",
        )
    return address


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_temporary(path: Path) -> None:
    fallback = paths.for_user({}, os.geteuid()).socket
    if path == fallback and path.parent.exists() and not paths.is_private(path.parent):
        raise CliError(
            ExitCode.DENIED,
            f"{path.parent} is not yours alone, so whoever listens there could be anyone; "
            "remove it, or set XDG_RUNTIME_DIR or --address",
        )


def _connection_failed(error: grpc.RpcError) -> bool:
    """Whether there was no server, or it went away; it cancels what is open when it stops."""
    if failures.answered(error):
        return False
    removed = error.code() is grpc.StatusCode.UNKNOWN and "Stream removed" in (error.details() or "")
    return removed or error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def _never_connected(error: grpc.RpcError) -> bool:
    """Whether the request can't have arrived. Only gRPC's text tells (1.71 to 1.85 say it alike)."""
    return _connection_failed(error) and "failed to connect" in (error.details() or "").lower()
