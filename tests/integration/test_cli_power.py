"""`wattshift power` against a daemon that speaks real gRPC and does as the test says."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from scheduler.cli import main
from scheduler.cli.exit_codes import ExitCode
from scheduler.v1 import job_pb2, power_pb2, power_report_pb2
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


def reported() -> power_report_pb2.GridEventReport:
    """A report as a daemon makes it: ten seconds before, a minute of event, ten seconds after."""
    report = power_report_pb2.GridEventReport(limits=["None of it is a meter."], other_events=["e0"])
    event = report.event
    event.id, event.budget_w, event.emergency, event.floor_w = "e1", 1200.0, True, 400.0
    event.state, event.over = power_pb2.SHED_STATE_MET, True
    for stamp, at_s in (
        (event.start, 1000), (event.end, 1060), (event.accepted_at, 1000), (event.shed_began_at, 1000),
        (report.received_at, 1000), (report.first_fall_at, 1001), (report.ended_at, 1060),
    ):  # fmt: skip
        stamp.FromSeconds(at_s)
    failed = report.moves.add(
        state=power_pb2.SHED_STATE_FAILED, measured_w=1300.0, reasons=["j9 is stopping"]
    )
    failed.at.FromMilliseconds(1_005_500)
    report.moves.add(state=power_pb2.SHED_STATE_MET, measured_w=1100.0).at.FromMilliseconds(1_006_250)
    report.moves.add(state=power_pb2.SHED_STATE_MET, over=True).at.FromSeconds(1060)
    report.baseline.MergeFrom(
        power_report_pb2.GridEventBaseline(site_w=2240.0, idle_w=70.0, base_w=100.0, pue=1.1)
    )
    report.baseline.jobs.add(job_id="j1", draw_w=1120.0)
    report.baseline.jobs.add(job_id="j2")
    report.delivery.MergeFrom(
        power_report_pb2.GridEventDelivery(
            seconds_known=57, seconds_missing=3, asked_w=1040.0, mean_w=1100.0, least_w=940.0,
            delivered_wh=17.4, over_wh=1.2, seconds_short=6, short_wh=0.17,
        )
    )  # fmt: skip
    report.rebound.MergeFrom(power_report_pb2.GridEventRebound(seconds_known=10, most_w=2300.0, above_wh=0.1))
    report.rebound.most_at.FromSeconds(1068)
    report.back_test.MergeFrom(power_report_pb2.BaselineBackTest(windows=4, window_s=60))
    limited = report.jobs.add(
        job_id="j1", kind=power_report_pb2.TOUCH_KIND_LIMITED, draw_w=1120.0, gpu="GPU-12345678-9",
        limit_w_before=700.0, limit_w_least=200.0,
    )  # fmt: skip
    setattr(limited, "class", job_pb2.JOB_CLASS_TRAINING)
    limited.at.FromMilliseconds(1_000_100)
    stopped = report.jobs.add(
        job_id="j2", kind=power_report_pb2.TOUCH_KIND_STOPPED, reason="SHED_IN_EMERGENCY"
    )
    stopped.at.FromSeconds(1001)
    stopped.again_at.FromSeconds(1065)
    for at_s in range(990, 1070):
        second = report.draw.add()
        second.at.FromSeconds(at_s)
        if not 1030 <= at_s < 1038:
            second.draw_w = 2240.0 if at_s < 1001 or at_s >= 1062 else 1140.0
    gap = report.missing.add()
    gap.start.FromSeconds(1030)
    gap.end.FromSeconds(1038)
    return report


def test_a_report_tells_a_grid_event_from_the_instruction_to_the_return(
    daemon: FakeDaemon, capsys: Run
) -> None:
    daemon.report = reported()
    lines = printed(capsys, "power", "report", "e1").splitlines()
    assert lines[0] == "event       e1, emergency: at most 1200 W"
    assert lines[2].startswith("received    ")
    assert lines[3].endswith(", reachable then: 400 W")
    assert lines[5:24] == [
        "fell        1.0 s: the first whole second below the baseline",
        "failed      5.5 s at 1300 W: j9 is stopping",
        "met         6.2 s at 1100 W",
        lines[8],
        "baseline    2240 W: 1 job 1120 W, 1 job not measured yet, idle boards 70 W, base 100 W, x PUE 1.1",
        "delivered   1100 W on average of 1040 W asked, 940 W at least",
        "            17.4 Wh in 57 s, 3 s missing; 1.2 Wh beyond what was asked",
        "short       6 s above the event's watts, by 0.17 Wh",
        "rebound     2300 W at most, 8.0 s later; 0.1 Wh above the baseline in 10 s",
        "back-test   not enough history: 4 windows of 1m00s without an event, ten are needed",
        "meanwhile   in force, too: e0",
        "missing     8 s of the draw: 30 to 38 s",
        "",
        "AT S  JOB  CLASS     WHAT     WATTS  REMARK",
        " 0.1  j1   TRAINING  limited   1120  700 W to 200 W on GPU-12345678",
        " 1.0  j2   -         stopped      -  shed in emergency; started again 64.0 s later",
        "",
        "FROM S  TO S  MEAN W  LEAST W  MOST W  MISSING S",
        "   -10    -6    2240     2240    2240          -",
    ]
    assert "    30    38       -        -       -          8" in lines, "what is missing is shown as that"
    assert lines[-1] == "None of it is a meter."
    asked = daemon.requests["GetGridEventReport"][0]
    assert asked.event_id == "e1"
    told = json.loads(printed(capsys, "power", "report", "e1", "-o", "json"))["report"]
    assert [("draw_w" in second) for second in told["draw"][38:50]] == [True] * 2 + [False] * 8 + [True] * 2


def test_a_back_test_with_enough_windows_says_how_far_it_was_off(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.report = reported()
    daemon.report.back_test.MergeFrom(
        power_report_pb2.BaselineBackTest(windows=40, bias_w=-12.4, error_p95_w=80.0, mean_draw_w=2000.0)
    )
    assert (
        "back-test   the baseline was off by -12 W on average, by at most 80 W (4.0%) in 95 of 100: "
        "40 windows of 1m00s without an event\n"
    ) in printed(capsys, "power", "report", "e1")


def test_an_event_that_has_not_begun_says_so_and_one_that_is_not_there_is_not_found(
    daemon: FakeDaemon, capsys: Run, tmp_path: Path
) -> None:
    daemon.report = power_report_pb2.GridEventReport()
    daemon.report.event.id, daemon.report.event.state = "e1", power_pb2.SHED_STATE_SCHEDULED
    assert "shed        has not begun; the event is SCHEDULED\n" in printed(capsys, "power", "report", "e1")
    daemon.report = None
    assert main(["power", "report", "e9"]) == ExitCode.NOT_FOUND
    assert "no grid event 'e9'" in capsys.readouterr().err
    assert main(["power", "report", "e1", "--state-dir", str(tmp_path)]) == ExitCode.INVALID
    assert "--state-dir needs --offline" in capsys.readouterr().err
    assert main(["power", "report", "e1", "--offline", "--state-dir", str(tmp_path)]) == ExitCode.FAILED
    assert "journal.sqlite does not exist" in capsys.readouterr().err
