"""What systemd and a service say to each other: readiness, the watchdog, logs.

All of it is optional: without systemd's environment variables a notifier says nothing and logs go to
standard error with their time. [sd_notify(3), sd_watchdog_enabled(3), sd-daemon(3)]
"""

import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

# systemd wants two signs of life per timeout; a third makes one late tick harmless.
WATCHDOG_SIGNS_PER_TIMEOUT = 3
STATUS_CHARACTERS_MAX = 512  # of one line in `systemctl status`

_MICROSECONDS = 1_000_000
# syslog(3): what journald calls PRIORITY.
_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}

_log = logging.getLogger(__name__)


class Notifier:
    """Tells the service manager how we are; says nothing where there is none.

    A message that can't be delivered is logged once and dropped: a manager that doesn't listen is no
    reason to stop serving.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An abstract socket's name begins with a zero byte, which an environment can't hold.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._has_complained = False

    def ready(self, status: str = "") -> None:
        """Say that start-up, or a reload, is complete."""
        self._send("READY=1", *_status(status))

    def reloading(self) -> None:
        """Say that the settings are being read again; `ready` must follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """Give a sign of life."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Say in one line, for `systemctl status`, how things are."""
        self._send(*_status(text))

    def _send(self, *assignments: str) -> None:
        if not self._address or not assignments:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
                # Never wait: a manager whose queue is full must not stop the loop.
                client.setblocking(False)
                client.connect(self._address)
                client.send("\n".join(assignments).encode())
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                _log.warning("the service manager can't be told %s: %s", assignments[0], error)


def _status(text: str) -> tuple[str, ...]:
    line = " ".join(text.split())[:STATUS_CHARACTERS_MAX]
    return (f"STATUS={line}",) if line else ()


def watchdog_period_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """How often to give a sign of life; None where nobody watches this process."""
    timeout_us = environ.get("WATCHDOG_USEC", "")
    if not timeout_us.isdecimal() or not int(timeout_us):
        return None
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(timeout_us) / _MICROSECONDS / WATCHDOG_SIGNS_PER_TIMEOUT


def set_up_logging(
    level: str = "info", stream: TextIO | None = None, environ: Mapping[str, str] = os.environ
) -> None:
    """Send what is logged, from `level` on, to `stream` (standard error by default).

    With priorities where that is the journal, else with times.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JournalFormatter() if is_journal(stream, environ) else TerminalFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to `stream` goes to the journal, and not to a file or a pipe instead."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return stat.S_ISSOCK(found.st_mode) and (str(found.st_dev), str(found.st_ino)) == (device, inode)


class JournalFormatter(logging.Formatter):
    """The message alone, each line with its priority: the journal knows the time and the process."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of the journal for each line of the record."""
        prefix = f"<{_priority(record.levelno)}>"
        lines = super().format(record).splitlines() or [""]
        return "\n".join(prefix + line for line in lines)


class TerminalFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z WARNING message`: the time in UTC, as the journal's exports have it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002
        """The record's time in UTC with milliseconds."""
        at = datetime.fromtimestamp(record.created, tz=UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _priority(level: int) -> int:
    return min((p for at_least, p in _PRIORITIES.items() if level >= at_least), default=7)
