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
        self._open = 0

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; returns the address in use (port 0 takes any).

        Raises:
            NodeError: The address can't be had.
        """
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES_MAX)
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

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                if self._open > CONNECTIONS_MAX:
                    status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"too many connections\n"
                else:
                    head = await reader.readuntil(b"\r\n\r\n")
                    status, kind, body = self._answer(head)
                writer.write(
                    f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                )
                writer.write(body)
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone, too slow or not speaking HTTP
        finally:
            self._open -= 1
            writer.close()

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
