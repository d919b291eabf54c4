"""`wattshift power` against a daemon that speaks real gRPC and does as the test says."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from scheduler.cli import main
from scheduler.cli.exit_codes import ExitCode
from tests.fakes.daemon import FakeDaemon, violation

Run = pytest.CaptureFixture[str]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "d.sock") as fake:
        monkeypatch.setenv("WATTSHIFT_ADDRESS", fake.address)
        yield fake


def printed(capsys: Run, *arguments: str) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_status_shows_the_budget_its_sources_and_each_gpu(daemon: FakeDaemon, capsys: Run) -> None:
    assert printed(capsys, "power", "status").splitlines()[:8] == [
        "budget     1500 W",
        "draw       730 W",
        "committed  900 W",
        "floor      240 W",
        "source     requested: 1500 W",
        "         GPU  DRAW W  LIMIT W  RANGE W  FOUND W  REMARK",
        "GPU-00000000     560      616  200-700      700",
        "GPU-00000001      70      700  200-700        -  no permission",
    ]
    daemon.power.ClearField("draw_w")
    daemon.power.ClearField("budget_w")
    shown = printed(capsys, "power", "status")
    assert "budget     none\n" in shown
    assert "draw       not known: a GPU has no fresh reading\n" in shown
    assert json.loads(printed(capsys, "power", "status", "-o", "json"))["power"]["floor_w"] == 240


def test_a_budget_is_set_with_its_times_and_taken_away(daemon: FakeDaemon, capsys: Run) -> None:
    before_s = time.time()
    printed(capsys, "power", "budget", "1.5kW", "--until", "+1h", "--valid-for", "5m")
    printed(capsys, "power", "budget", "--none")
    first, second = daemon.requests["SetPowerBudget"]
    (interval,) = first.intervals
    assert (interval.budget_w, first.valid_for_s) == (1500, 300)
    assert not interval.HasField("start")
    assert before_s + 3600 <= interval.end.seconds + 1
    assert not second.intervals


@pytest.mark.parametrize(
    "arguments",
    [
        ("budget",),
        ("budget", "100", "--none"),
        ("budget", "5 mW"),
        ("budget", "lots"),
        ("event", "submit", "e"),
    ],
)
def test_a_command_line_that_cant_be_is_refused_with_2(
    daemon: FakeDaemon, capsys: Run, arguments: tuple[str, ...]
) -> None:
    assert main(("power", *arguments)) == ExitCode.INVALID
    assert not daemon.requests["SetPowerBudget"]


def test_an_event_is_offered_listed_and_cancelled(daemon: FakeDaemon, capsys: Run) -> None:
    shown = printed(
        capsys, "power", "event", "submit", "e1", "--budget", "2kW", "--until", "+1h", "--emergency"
    )
    (request,) = daemon.requests["SubmitGridEvent"]
    assert (request.event.id, request.event.budget_w, request.event.emergency) == ("e1", 2000, True)
    assert "SCHEDULED" in shown
    assert shown.splitlines()[1].endswith("emergency")
    event = daemon.events[0]
    event.shed_began_at.seconds, event.shed_ended_at.seconds = 100, 102
    event.measured_w, event.state, event.over = 1990.4, 3, True
    event.reasons.append("job j1 is still stopping")
    row = printed(capsys, "power", "event", "list", "--all").splitlines()[1]
    assert daemon.requests["ListGridEvents"][0].all
    assert row.startswith("e1     OVER, MET")
    assert row.endswith("2000        1990  2.0 s  job j1 is still stopping")
    assert "CANCELLED" in printed(capsys, "power", "event", "cancel", "e1")
    assert main(("power", "event", "cancel", "e2")) == ExitCode.NOT_FOUND


def test_a_refusal_is_told_as_the_daemon_says_it(daemon: FakeDaemon, capsys: Run) -> None:
    wrong = violation("event.end", "is in the past")
    daemon.refuse("SubmitGridEvent", grpc.StatusCode.INVALID_ARGUMENT, "event.end: is in the past", wrong)
    arguments = ("power", "event", "submit", "e1", "--budget", "2kW", "--until", "+1h")
    assert main(arguments) == ExitCode.INVALID
    assert "is in the past" in capsys.readouterr().err
    daemon.refuse("SubmitGridEvent", grpc.StatusCode.FAILED_PRECONDITION, "the least is 900 W")
    assert main(arguments) == ExitCode.PRECONDITION
    assert capsys.readouterr().err == "error: the least is 900 W\n"
