"""The metrics listener: GET /metrics, /healthz and /readyz, and nothing else.

It shares the loop's thread, so a page is a consistent look at the state. Three routes need no framework.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from scheduler.api.exposition import CONTENT_TYPE
from scheduler.errors import NodeError

REQUEST_BYTES_MAX = 16 * 1024
REQUEST_S_MAX = 10.0
CONNECTIONS_MAX = 64
_TEXT = "text/plain; charset=utf-8"


class MetricsServer:
    """Serves the pages; one request a connection."""

    def __init__(self, page: Callable[[], bytes], problem: Callable[[], str]) -> None:
        """Serve `page` as metrics; `problem` says why the node is not ready, or nothing."""
        self._page = page
        self._problem = problem
        self._server: asyncio.Server | None = None
        self.open = 0  # connections

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; returns the address in use (port 0 takes any).

        Raises:
            NodeError: The address can't be had.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _Connection(self), host, port)
        except OSError as error:
            raise NodeError(
                f"server.metrics_listen {host}:{port} can't be had: {error.strerror}; choose another port"
            ) from error
        bound = self._server.sockets[0].getsockname()
        return str(bound[0]), int(bound[1])

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    def answer(self, head: bytes) -> bytes:
        """Return the answer to a request; only its first line matters."""
        status, kind, body = self._answer(head)
        return _written(status, kind, body)

    def _answer(self, head: bytes) -> tuple[HTTPStatus, str, bytes]:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or words[0] not in (b"GET", b"HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET\n"
        path = words[1].split(b"?", 1)[0]
        if path == b"/metrics":
            body = self._page()
            return HTTPStatus.OK, CONTENT_TYPE, b"" if words[0] == b"HEAD" else body
        if path == b"/healthz":
            return HTTPStatus.OK, _TEXT, b"ok\n"
        if path == b"/readyz":
            problem = self._problem()
            if problem:
                return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{problem}\n".encode()
            return HTTPStatus.OK, _TEXT, b"ready\n"
        return HTTPStatus.NOT_FOUND, _TEXT, b"/metrics, /healthz, /readyz\n"


def _written(status: HTTPStatus, kind: str, body: bytes) -> bytes:
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    ) + body


_TOO_MANY = _written(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"too many connections\n")


class _Connection(asyncio.Protocol):
    """One connection. No stream and no task: those cost as much as the page."""

    def __init__(self, server: MetricsServer) -> None:
        self._server = server
        self._head = b""
        self._is_answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.open += 1
        # Whoever is too slow, to ask or to take the answer, is cut off.
        self._timer = asyncio.get_running_loop().call_later(REQUEST_S_MAX, transport.abort)
        if self._server.open > CONNECTIONS_MAX:
            self._end(_TOO_MANY)

    def data_received(self, data: bytes) -> None:
        if self._is_answered:
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            self._end(self._server.answer(self._head))
        elif len(self._head) > REQUEST_BYTES_MAX:
            self._transport.abort()

    def _end(self, answer: bytes) -> None:
        self._is_answered = True
        self._transport.write(answer)
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._server.open -= 1
        self._timer.cancel()
