"""systemd's protocols, against a NOTIFY_SOCKET of our own."""

import io
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scheduler.effects import systemd
from scheduler.effects.systemd import JournalFormatter, Notifier, TerminalFormatter


@contextmanager
def manager_at(address: str | bytes) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(5.0)
        yield manager


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


def heard(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


# Notifications -----------------------------------------------------------------------------------


def test_the_manager_hears_how_we_are(socket_path: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": socket_path})
    with manager_at(socket_path) as manager:
        notifier.ready("8 GPUs")
        assert heard(manager) == ["READY=1", "STATUS=8 GPUs"]
        notifier.ready()
        assert heard(manager) == ["READY=1"]
        notifier.status("two\nlines \t here")
        assert heard(manager) == ["STATUS=two lines here"]
        notifier.watchdog()
        assert heard(manager) == ["WATCHDOG=1"]
        notifier.stopping()
        assert heard(manager) == ["STOPPING=1"]


def test_a_reload_carries_the_time_that_systemd_compares(socket_path: str) -> None:
    with manager_at(socket_path) as manager:
        Notifier({"NOTIFY_SOCKET": socket_path}).reloading()
        reloading, at = heard(manager)
    assert reloading == "RELOADING=1"
    assert at.removeprefix("MONOTONIC_USEC=").isdecimal()


def test_an_abstract_socket_is_found() -> None:
    name = f"wattshift-test-{os.getpid()}"
    with manager_at(b"\0" + name.encode()) as manager:
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert heard(manager) == ["READY=1"]


def test_a_long_status_is_cut(socket_path: str) -> None:
    with manager_at(socket_path) as manager:
        Notifier({"NOTIFY_SOCKET": socket_path}).status("x" * 5000)
        (line,) = heard(manager)
    assert len(line) == len("STATUS=") + systemd.STATUS_CHARACTERS_MAX


def test_an_empty_status_is_no_message(socket_path: str) -> None:
    with manager_at(socket_path) as manager:
        notifier = Notifier({"NOTIFY_SOCKET": socket_path})
        notifier.status(" ")
        notifier.watchdog()
        assert heard(manager) == ["WATCHDOG=1"]


def test_without_a_manager_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    Notifier({}).ready()
    Notifier({"NOTIFY_SOCKET": ""}).ready()
    assert caplog.records == []


def test_a_manager_that_is_gone_is_complained_of_once(
    socket_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": socket_path})
    notifier.watchdog()
    notifier.watchdog()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "WATCHDOG=1" in caplog.text


def test_a_manager_that_does_not_read_never_blocks_us(
    socket_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": socket_path})
    with manager_at(socket_path):
        for _ in range(10_000):
            notifier.watchdog()
    assert "temporarily unavailable" in caplog.text


# Watchdog ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "period_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 10.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 10.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_a_sign_of_life_is_due_three_times_per_timeout(
    environ: dict[str, str], period_s: float | None
) -> None:
    assert systemd.watchdog_period_s(environ) == period_s


# Logs --------------------------------------------------------------------------------------------


def record(level: int, message: str) -> logging.LogRecord:
    made = logging.LogRecord("scheduler.test", level, "file.py", 1, message, None, None)
    made.created = 1769860800.5
    return made


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
        (logging.DEBUG, 7),
        (logging.INFO + 1, 6),
        (1, 7),
    ],
)
def test_the_journal_is_told_the_priority(level: int, priority: int) -> None:
    assert JournalFormatter().format(record(level, "a b")) == f"<{priority}>a b"


def test_every_line_of_a_traceback_has_its_priority() -> None:
    try:
        raise ValueError("bad\nnews")
    except ValueError:
        made = record(logging.ERROR, "a job")
        made.exc_info = sys.exc_info()
    lines = JournalFormatter().format(made).splitlines()
    assert lines[0] == "<3>a job"
    assert lines[-2:] == ["<3>ValueError: bad", "<3>news"]
    assert all(line.startswith("<3>") for line in lines)


def test_an_empty_message_is_a_line() -> None:
    assert JournalFormatter().format(record(logging.INFO, "")) == "<6>"


def test_elsewhere_a_line_has_its_time_in_utc() -> None:
    line = TerminalFormatter().format(record(logging.INFO, "a b"))
    assert line == "2026-01-31T12:00:00.500Z INFO    a b"


def test_the_journal_is_known_by_its_device_and_inode() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("w") as stream:
        found = os.fstat(ours.fileno())
        assert systemd.is_journal(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        assert not systemd.is_journal(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
        assert not systemd.is_journal(stream, {})
    assert not systemd.is_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})


def test_a_redirected_stream_is_not_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        found = os.fstat(stream.fileno())
        assert not systemd.is_journal(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})


def test_logging_is_set_up_for_where_it_goes() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = []  # pytest's own, which `force` would close
    stream = io.StringIO()
    try:
        systemd.set_up_logging("warning", stream, {})
        logging.getLogger("scheduler.test").warning("here")
        logging.getLogger("scheduler.test").info("not here")
    finally:
        root.handlers = before
        root.setLevel(level)
    assert stream.getvalue().endswith("Z WARNING here\n")
    assert "not here" not in stream.getvalue()
