import io
import json

import pytest

from scheduler.cli import output
from scheduler.cli.node import gpu_remark
from scheduler.v1 import job_pb2, job_service_pb2, node_pb2, reason_pb2

JOBS = output.table(
    ("ID", "NAME", "STATE", "GPUS", "REASON"),
    [
        ("job-1", "a-name-of-some-length", "RUNNING", "8", ""),
        ("job-20", "[red]b", "PENDING", "16", "waiting for GPUs\x1b[0m: 8 more are needed and none is free"),
    ],
    right=("GPUS",),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_piped_tables_are_aligned_text_without_escape_codes() -> None:
    stream = io.StringIO()
    output.print_table(JOBS, stream)
    assert stream.getvalue() == (
        "ID      NAME                   STATE    GPUS  REASON\n"
        "job-1   a-name-of-some-length  RUNNING     8\n"
        "job-20  [red]b                 PENDING    16  waiting for GPUs\\x1b[0m: 8 more are needed and none "
        "is free\n"
    )


def test_on_a_terminal_states_are_coloured_and_names_are_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    output.print_table(JOBS, stream)
    assert "\x1b[32mRUNNING" in stream.getvalue()
    assert "[red]b" in stream.getvalue()
    assert "\\x1b[0m" in stream.getvalue()


def test_an_empty_table_is_its_titles() -> None:
    assert output.plain_lines(output.table(("A", "B"), [])) == ["A  B"]


def test_a_table_of_one_row_can_continue_another() -> None:
    widths = output.widths(output.table(("A", "B"), [("long", "x")]))
    row = output.table(("A", "B"), [("s", "wider")])
    assert output.widths(row, widths) == [4, 5]
    assert output.plain_lines(row, widths)[1] == "s     wider"


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_a_table_fits_its_window_with_a_line_a_row(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = output.coloured_lines(JOBS, width)
    assert len(lines) == 3
    assert max(len(_without_style(line)) for line in lines) <= width
    assert all("job-" in line for line in lines[1:])


def test_a_narrow_window_cuts_names_before_it_cuts_reasons() -> None:
    assert output.fitted_widths(JOBS, 200) == output.widths(JOBS)
    narrow = output.fitted_widths(JOBS, 60)
    assert narrow[:4] == [6, 60 - 6 - 7 - 4 - 24 - 8, 7, 4]
    assert narrow[4] == output.LAST_WIDTH_MIN


def test_json_has_the_protos_names_and_nothing_is_left_out_but_what_is_optional() -> None:
    job = job_pb2.Job(id="job-1", state="JOB_STATE_RUNNING", attempts=[job_pb2.Attempt(number=1, pid=7)])
    shown = json.loads(output.message_json(job_service_pb2.GetJobResponse(job=job), indent=2))
    assert shown["job"]["id"] == "job-1"
    assert shown["job"]["state"] == "JOB_STATE_RUNNING"
    assert shown["job"]["attempts"][0]["pid"] == 7
    assert shown["job"]["attempts"][0]["preempted_by"] == ""
    assert shown["job"]["attempts"][0]["gpus"] == []
    assert "exit_code" not in shown["job"]
    assert json.loads(output.message_json(job_service_pb2.ListJobsResponse(), indent=None)) == {
        "jobs": [],
        "next_page_token": "",
    }


def test_a_message_of_a_stream_is_one_line() -> None:
    job = job_pb2.Job(id="job-1", name="two\nlines")
    assert "\n" not in output.message_json(job_service_pb2.WatchJobsResponse(job=job), indent=None)


def _without_style(line: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def test_a_gpus_trouble_is_not_told_twice() -> None:
    gpu = node_pb2.Gpu(
        state=node_pb2.GPU_STATE_HANDOVER,
        reason=reason_pb2.REASON_HANDOVER_PENDING,
        detail="it does not answer: ERROR_TIMEOUT",
        telemetry_problems=["ERROR_TIMEOUT", "IMPLAUSIBLE: power_w=0.0"],
    )
    told = "handover pending: it does not answer: ERROR_TIMEOUT; IMPLAUSIBLE: power_w=0.0"
    assert gpu_remark(gpu) == told


def test_a_gpu_that_a_job_holds_and_that_does_not_answer_says_so() -> None:
    gpu = node_pb2.Gpu(
        state=node_pb2.GPU_STATE_ALLOCATED,
        reason=reason_pb2.REASON_GPU_HELD,
        detail="it does not answer: ERROR_TIMEOUT",
        telemetry_problems=["ERROR_TIMEOUT"],
    )
    assert gpu_remark(gpu) == "it does not answer: ERROR_TIMEOUT"
