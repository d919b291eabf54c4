"""The webhook that an OpenADR VTN notifies: the echo of its challenge, and a hint to look.

What a notification says is not believed: anybody could send one. It only makes the VEN ask the VTN at once,
and what the VTN says there, over TLS and with a token, counts. So duplicates, late ones and forged ones do
nothing.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

import msgspec

from scheduler.errors import FeedError

HEAD_BYTES_MAX = 16 * 1024
BODY_BYTES_MAX = 256 * 1024
REQUEST_S_MAX = 10.0
CONNECTIONS_MAX = 16
ECHO_CHARACTERS_MAX = 1024
_OBJECTS = ("EVENT", "PROGRAM")
_Answer = tuple[HTTPStatus, bytes]


class Webhook:
    """Answers at one path; one request a connection."""

    def __init__(self, path: str, hint: Callable[[], None]) -> None:
        """Answer at `path`, and call `hint` when the VTN says that something changed."""
        self._path = path or "/"
        self._hint = hint
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; returns the address in use (port 0 takes any).

        Raises:
            FeedError: The address can't be had.
        """
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_BYTES_MAX)
        except OSError as error:
            raise FeedError(
                f"[openadr] webhook_listen {host}:{port} can't be had: {error.strerror}; choose another port"
            ) from error
        bound = self._server.sockets[0].getsockname()
        return str(bound[0]), int(bound[1])

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                if self._open > CONNECTIONS_MAX:
                    status, body = HTTPStatus.SERVICE_UNAVAILABLE, b""
                else:
                    status, body = await self._answer(reader)
                writer.write(
                    f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
                    f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                writer.write(body)
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone, too slow or not speaking HTTP
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> _Answer:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        words = head[0].split(" ")
        if len(words) != 3:
            return HTTPStatus.BAD_REQUEST, b""
        method, target, _version = words
        try:
            parts = urlsplit(target)
            query = parse_qs(parts.query, max_num_fields=16)
        except ValueError:
            return HTTPStatus.BAD_REQUEST, b""
        if parts.path != self._path:
            return HTTPStatus.NOT_FOUND, b""
        if method == "GET":
            echo = query.get("echo", [""])[0]
            if not 0 < len(echo) <= ECHO_CHARACTERS_MAX:
                return HTTPStatus.BAD_REQUEST, b"echo is missing\n"
            return HTTPStatus.OK, echo.encode()
        if method != "POST":
            return HTTPStatus.METHOD_NOT_ALLOWED, b"GET, POST\n"
        return await self._notified(reader, _length(head[1:]))

    async def _notified(self, reader: asyncio.StreamReader, length: int | None) -> _Answer:
        if length is None:
            return HTTPStatus.LENGTH_REQUIRED, b""
        if length > BODY_BYTES_MAX:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b""
        try:
            said = msgspec.json.decode(await reader.readexactly(length))
        except (msgspec.DecodeError, RecursionError):
            return HTTPStatus.BAD_REQUEST, b"not JSON\n"
        if not isinstance(said, dict) or "objectType" not in said:
            return HTTPStatus.BAD_REQUEST, b"no notification\n"
        if said["objectType"] in _OBJECTS:
            self._hint()
        return HTTPStatus.OK, b""


def _length(headers: list[str]) -> int | None:
    """The length of a body; None where it is not said, or not in digits."""
    for header in headers:
        name, _, value = header.partition(":")
        if name.strip().lower() == "content-length":
            digits = value.strip()
            return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 16 else None
    return None
