"""The launcher's protocol, version 3: one JSON object a line, both ways, over a Unix socket.

The daemon speaks first: `{"order": "hello", "oldest": 3, "newest": 3}` names the versions it can speak.
The launcher answers with the newest version both know:

    {"report": "hello", "version": 3, "launcher_id": …, "boot_id": …, "pid": …, "containment": …,
     "jobs_dir": …, "held": 2}
    {"report": "held", "job_id": …, "attempt": …, "reports": [{"report": "started", …}, …]}   (`held` times)

or with `{"report": "refused", "message": …}` and the end of the connection. After that orders go one way
(prepare, start, stop, freeze, thaw, end_grace, forget) and reports the other (started, start_failed,
signalled, acknowledged, checkpoint_saved, frozen, thawed, exited, tree_stuck), each with job_id, attempt and
the fields of the dataclass of that name in `launcher.py`. `prepare` says all about an attempt, `start` only
which, and what is new in its environment; what was prepared and not started is never reported, and ends with
the connection. Fields that one side does not know are ignored; a new order or a new meaning is a new version.
(Version 1 had no `prepare`, version 2 no `freeze` and `thaw`.)

This module loads nothing but json: the launcher is meant to stay small.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False  # type checkers take it for True; the original costs the import of `typing`, 0.7 MiB
if TYPE_CHECKING:
    from typing import Any

    Message = dict[str, Any]
else:
    Message = dict

VERSION_OLDEST = 3
VERSION_NEWEST = 3

# The kernel takes 2 MiB of arguments and environment (a quarter of the usual 8 MiB stack limit); JSON's
# escapes make that longer. What does not fit would not be executed either.
LINE_BYTES_MAX = 4 << 20


class WireError(Exception):
    """What came over the connection is not this protocol."""


def encode(message: Message) -> bytes:
    """Return the line for a message.

    Raises:
        WireError: It is longer than LINE_BYTES_MAX.
    """
    line = json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise WireError(f"a line of {len(line)} bytes; at most {LINE_BYTES_MAX} are sent")
    return line


def decode(line: bytes) -> Message:
    """Return the message of a line (without its newline).

    Raises:
        WireError: It is not a JSON object.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"a JSON object was expected, not {type(message).__name__}")
    return message


def hello() -> Message:
    """Return the daemon's first message."""
    return {"order": "hello", "oldest": VERSION_OLDEST, "newest": VERSION_NEWEST}


def agreed_version(message: Message) -> int:
    """Return the newest version that the sender of this hello and this side both speak.

    Raises:
        WireError: There is none, or the message is no hello.
    """
    oldest, newest = message.get("oldest"), message.get("newest")
    if message.get("order") != "hello" or not isinstance(oldest, int) or not isinstance(newest, int):
        raise WireError("the first line must be a hello with the versions that the daemon speaks")
    version = min(newest, VERSION_NEWEST)
    if version < max(oldest, VERSION_OLDEST):
        raise WireError(
            f"the daemon speaks launcher protocol {oldest} to {newest}, this launcher "
            f"{VERSION_OLDEST} to {VERSION_NEWEST}; drain the node, then restart the launcher"
        )
    return version


class LineSplitter:
    """Cuts a stream of bytes into lines."""

    __slots__ = ("_rest", "_searched")

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = (
            0  # no newline before this offset, so that long lines aren't searched again and again
        )

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was read; return the lines it completes, without their newlines.

        Raises:
            WireError: A line is longer than LINE_BYTES_MAX; the stream can't be used any more.
        """
        rest = self._rest
        rest += data
        end = rest.find(b"\n", self._searched)
        lines = []
        start = 0
        while end >= 0:
            if end - start >= LINE_BYTES_MAX:
                raise WireError(f"a line of {end - start} bytes; at most {LINE_BYTES_MAX} are read")
            lines.append(bytes(rest[start:end]))
            start = end + 1
            end = rest.find(b"\n", start)
        if start:
            del rest[:start]
        if len(rest) >= LINE_BYTES_MAX:
            raise WireError(f"a line of more than {LINE_BYTES_MAX} bytes")
        self._searched = len(rest)
        return lines
