"""The command against a daemon that speaks real gRPC and does as the test says."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from scheduler.cli import failures, main
from scheduler.cli.exit_codes import ExitCode
from scheduler.v1 import job_pb2, node_pb2, reason_pb2, usage_pb2
from tests.fakes.daemon import FakeDaemon, job_of, violation

Run = pytest.CaptureFixture[str]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with FakeDaemon(tmp_path / "d.sock") as fake:
        monkeypatch.setenv("WATTSHIFT_ADDRESS", fake.address)
        yield fake


def printed(capsys: Run, *arguments: str, code: int = 0) -> str:
    """What a command prints on standard output, after checking how it ends."""
    assert main(arguments) == code, capsys.readouterr().err
    return capsys.readouterr().out


def told(capsys: Run, *arguments: str, code: int) -> str:
    """What a command that fails says on standard error; it says nothing on standard output."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


# Submitting ------------------------------------------------------------------------------------


def test_submit_prints_the_id_alone(daemon: FakeDaemon, capsys: Run) -> None:
    assert printed(capsys, "submit", "-c", "batch", "--", "sleep", "5") == "job-1\n"
    (request,) = daemon.requests["SubmitJob"]
    assert list(request.spec.command) == ["sleep", "5"]


def test_each_submission_has_a_request_id_of_its_own(daemon: FakeDaemon, capsys: Run) -> None:
    for _ in range(2):
        printed(capsys, "submit", "-c", "batch", "true")
    first, second = daemon.requests["SubmitJob"]
    assert first.request_id
    assert first.request_id != second.request_id


def test_submitting_with_the_same_request_id_gives_the_same_job(daemon: FakeDaemon, capsys: Run) -> None:
    for _ in range(2):
        assert printed(capsys, "submit", "-c", "batch", "--request-id", "r", "true") == "job-1\n"


def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_request(
    daemon: FakeDaemon, capsys: Run
) -> None:
    daemon.drop("SubmitJob")
    assert printed(capsys, "submit", "-c", "batch", "true") == "job-1\n"
    first, second = daemon.requests["SubmitJob"]
    assert first == second
    assert list(daemon.jobs) == ["job-1"]


def test_a_requeue_whose_answer_was_lost_is_not_done_twice(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1"))
    daemon.drop("RequeueJob")
    message = told(capsys, "requeue", "job-1", code=ExitCode.UNREACHABLE)
    assert "was lost before the answer came; look whether it was done" in message
    assert len(daemon.requests["RequeueJob"]) == 1


def test_a_file_of_jobs_is_submitted_whole_with_an_id_each(
    daemon: FakeDaemon, capsys: Run, tmp_path: Path
) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"command": ["a"], "class": "batch"}\n{"command": ["b"], "class": "mining"}\n', "utf-8")
    assert printed(capsys, "submit", "--file", str(file), "--request-id", "r") == "job-1\njob-2\n"
    (request,) = daemon.requests["SubmitJobs"]
    assert [job.request_id for job in request.jobs] == ["r-1", "r-2"]
    answer = printed(capsys, "submit", "-o", "json", "--file", str(file))
    assert json.loads(answer) == {"job_ids": ["job-3", "job-4"]}


def test_a_file_of_jobs_takes_no_job_options(daemon: FakeDaemon, capsys: Run, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.touch()
    for extra in (("-c", "batch"), ("--follow",), ("--", "true")):
        message = told(capsys, "submit", "--file", str(file), *extra, code=ExitCode.INVALID)
        assert "--file takes its jobs from the file" in message


def test_preview_says_who_would_stop(daemon: FakeDaemon, capsys: Run) -> None:
    assert printed(capsys, "preview", "-c", "inference", "true") == (
        "would start within 10s, after job-1 has stopped\n"
        "GPUs: GPU-00000000\n"
        "\n"
        "WOULD STOP  NAME   CLASS   GPUS  GRACE  HAND-OVER  LOST GPU-S  LOSS USD\n"
        "job-1       miner  MINING     1     2s        26s          31    0.0004\n"
    )
    assert daemon.jobs == {}


# Refusals --------------------------------------------------------------------------------------


def test_each_wrong_field_is_a_line_that_says_what_to_do(daemon: FakeDaemon, capsys: Run) -> None:
    wrong = violation("spec.gpus", "is 9; this node has 2")
    wrong.MergeFrom(violation("spec.priority", "is -1; give 0 to 1000"))
    daemon.refuse("SubmitJob", grpc.StatusCode.INVALID_ARGUMENT, "spec.gpus: is 9; spec.priority", wrong)
    assert told(capsys, "submit", "-c", "batch", "-g", "9", "--priority", "-1", "true", code=2) == (
        "error: gpus: is 9; this node has 2\nerror: priority: is -1; give 0 to 1000\n"
    )


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.NOT_FOUND, 3),
        (grpc.StatusCode.FAILED_PRECONDITION, 4),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 5),
        (grpc.StatusCode.ALREADY_EXISTS, 6),
        (grpc.StatusCode.OUT_OF_RANGE, 7),
        (grpc.StatusCode.PERMISSION_DENIED, 8),
        (grpc.StatusCode.INTERNAL, 70),
        (grpc.StatusCode.UNAVAILABLE, 75),
    ],
)
def test_a_refusal_is_told_once_and_has_its_exit_code(
    daemon: FakeDaemon, capsys: Run, status: grpc.StatusCode, code: int
) -> None:
    daemon.refuse("GetJob", status, "it can't be; do that")
    assert told(capsys, "show", "job-1", code=code) == "error: it can't be; do that\n"
    assert len(daemon.requests["GetJob"]) == 1


def test_a_call_that_the_daemon_does_not_know_is_blamed_on_its_version(
    daemon: FakeDaemon, capsys: Run
) -> None:
    daemon.refuse("GetNode", grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert "is it of another version?" in told(capsys, "gpus", code=ExitCode.INTERNAL)


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_absent_daemon_is_given_up_in_time_with_the_remedy(
    tmp_path: Path, capsys: Run, where: str
) -> None:
    options = ("--address", f"unix://{tmp_path}/absent.sock", "--connect-timeout", "0.2")
    arguments = (*options, "jobs") if where == "before" else ("jobs", *options)
    begun_s = time.monotonic()
    message = told(capsys, *arguments, code=ExitCode.UNREACHABLE)
    assert time.monotonic() - begun_s < 5  # the default; we asked for 0.2
    assert message == (
        f"error: no server answers at unix://{tmp_path}/absent.sock after 0.2 s (No such file or directory); "
        "start one with `wattshift serve`, or name another with --address or WATTSHIFT_ADDRESS\n"
    )


def test_a_daemon_that_accepts_and_says_nothing_is_given_up_too(tmp_path: Path, capsys: Run) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        address = f"unix://{tmp_path}/silent.sock"
        message = told(capsys, "--connect-timeout", "0.3", "jobs", "--address", address, code=69)
    assert f"no server answers at {address} after 0.3 s" in message


def test_a_daemon_that_comes_up_meanwhile_is_found(tmp_path: Path, capsys: Run) -> None:
    import threading

    path = tmp_path / "late.sock"
    made: list[FakeDaemon] = []
    timer = threading.Timer(0.3, lambda: made.append(FakeDaemon(path)))
    timer.start()
    try:
        assert printed(capsys, "jobs", "--address", f"unix://{path}").startswith("ID")
    finally:
        timer.join()
        made[0].stop()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "write unix:///path or host:port"),
        ("unix://relative", "an absolute path of at most 107 bytes"),
        ("unix:///" + "x" * 120, "an absolute path of at most 107 bytes"),
        ("node7:9476", "only this machine can be reached by TCP"),
        ("127.0.0.1.example.org:9476", "only this machine can be reached by TCP"),
    ],
)
def test_an_address_that_cant_be_is_refused_with_the_right_form(
    capsys: Run, address: str, message: str
) -> None:
    assert message in told(capsys, "--address", address, "jobs", code=ExitCode.INVALID)


def test_the_option_wins_over_the_variable(daemon: FakeDaemon, capsys: Run, tmp_path: Path) -> None:
    other = f"unix://{tmp_path}/other.sock"
    assert other in told(capsys, "--connect-timeout", "0.1", "--address", other, "jobs", code=69)
    assert daemon.requests == {}


def test_a_socket_that_one_may_not_open_says_so() -> None:
    error = failures.unreachable("unix:///run/x.sock", 5.0, "Permission denied")
    assert error.code is ExitCode.DENIED
    assert "you may not open unix:///run/x.sock; ask its owner" in error.lines[0]


# Looking ---------------------------------------------------------------------------------------


def test_jobs_shows_what_is_not_finished_and_all_shows_everything(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1", "RUNNING", "TRAINING", name="train", reason="REASON_STARTED_ON_FREE_GPUS"))
    daemon.add(job_of("job-2", "FAILED", exit_code=3, reason="REASON_EXITED_NONZERO"))
    assert re.sub(r"1m0\ds", "1m00s", printed(capsys, "jobs")) == (
        "ID     NAME   CLASS     STATE      FOR  GPUS  PRIO  REASON\n"
        "job-1  train  TRAINING  RUNNING  1m00s     1   500  started on free GPUs\n"
    )
    everything = printed(capsys, "jobs", "--all").splitlines()
    assert [line.split()[0] for line in everything] == ["ID", "job-2", "job-1"]
    assert everything[1].endswith("exited nonzero (exit code 3)")


def test_filters_reach_the_daemon(daemon: FakeDaemon, capsys: Run) -> None:
    printed(
        capsys, "jobs", "--state", "Failed", "-c", "MINING", "-c", "batch", "--name", "n", "--tenant", "t"
    )
    (request,) = daemon.requests["ListJobs"]
    assert list(request.states) == [job_pb2.JOB_STATE_FAILED]
    assert list(request.classes) == [job_pb2.JOB_CLASS_MINING, job_pb2.JOB_CLASS_BATCH]
    assert (request.name, request.tenant, request.active_only) == ("n", "t", False)


def test_pages_are_put_together_up_to_the_limit(
    daemon: FakeDaemon, capsys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.cli.jobs.PAGE_SIZE", 2)
    for number in range(1, 8):
        daemon.add(job_of(f"job-{number}"))
    answer = json.loads(printed(capsys, "jobs", "-o", "json"))
    assert [job["id"] for job in answer["jobs"]] == [f"job-{number}" for number in range(7, 0, -1)]
    assert answer["next_page_token"] == ""
    assert [request.page_size for request in daemon.requests["ListJobs"]] == [2, 2, 2, 2]
    assert main(["jobs", "--limit", "3"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 + 3
    assert captured.err == "the newest 3 are shown; --limit shows more\n"


def test_no_jobs_is_an_empty_list_not_an_empty_object(daemon: FakeDaemon, capsys: Run) -> None:
    assert json.loads(printed(capsys, "jobs", "-o", "json")) == {"jobs": [], "next_page_token": ""}


def test_show_in_json_has_the_names_that_scripts_rely_on(daemon: FakeDaemon, capsys: Run) -> None:
    job = job_of("job-1", "SUCCEEDED", exit_code=0, attempt=1)
    job.attempts.add(number=1, pid=77, gpus=["GPU-1"], preempted_by="job-9", preempted=["job-3"], exit_code=0)
    daemon.add(job)
    shown = json.loads(printed(capsys, "show", "job-1", "-o", "json"))["job"]
    assert (shown["id"], shown["name"], shown["state"]) == ("job-1", "work", "JOB_STATE_SUCCEEDED")
    assert (shown["exit_code"], shown["class"]) == (0, "JOB_CLASS_BATCH")
    (attempt,) = shown["attempts"]
    assert (attempt["pid"], attempt["gpus"]) == (77, ["GPU-1"])
    assert (attempt["preempted_by"], attempt["preempted"]) == ("job-9", ["job-3"])


def test_show_tells_the_story_of_each_attempt(daemon: FakeDaemon, capsys: Run) -> None:
    job = job_of("job-1", "RUNNING", "TRAINING", reason="REASON_STARTED_AFTER_PREEMPTION", preemptions=1)
    job.spec.command.extend(["python", "train it.py"])
    first = job.attempts.add(number=1, pid=77, gpus=["GPU-aaaaaaaa-1"], exit_code=143)
    first.end_reason = job_pb2.Job(reason="REASON_PREEMPTED_BY_HIGHER_RANK").reason
    first.preempted_by = "job-9"
    first.decided_at.FromMilliseconds(1_000)
    first.started_at.FromMilliseconds(1_012)
    first.notice.decided_at.FromMilliseconds(60_000)
    first.signalled_at.FromMilliseconds(60_002)
    first.exited_at.FromMilliseconds(60_200)
    first.verified_at.FromMilliseconds(60_215)
    second = job.attempts.add(number=2, pid=99, gpus=["GPU-bbbbbbbb-1"], preempted=["job-4", "job-5"])
    second.decided_at.FromMilliseconds(70_000)
    daemon.add(job)
    story = printed(capsys, "show", "job-1")
    assert "  command     python 'train it.py'\n" in story
    assert "  gave way    1 time\n" in story
    before, after = story.split("\nattempt 2\n")
    assert "12 ms later, PID 77" in before
    assert "  gave way to job-9\n" in before
    assert "decided, +2.0 ms signalled, +198 ms exited, +15 ms verified free (in all 215 ms)" in before
    assert "after 59s, preempted by higher rank, exit code 143" in before
    assert "  GPUs        GPU-bbbbbbbb\n" in after
    assert "  preempted   job-4, job-5\n" in after


def test_explain_says_why_and_what_would_help(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1", "PENDING"))
    lines = printed(capsys, "explain", "job-1").splitlines()
    assert lines[:2] == ["job-1  work  PENDING", "It wants 2 GPUs; 1 is free."]
    assert lines[3:] == [
        "3 pending jobs ahead of it",
        "stopping for it: job-4",
        "",
        "GPUS  KEPT FROM IT BY",
        "   1  GPU held         job-9 ranks higher",
        "",
        "what would help:",
        "  - job-9 ends",
        "  - a higher priority than 700",
    ]


def test_gpus_shows_what_each_one_does(daemon: FakeDaemon, capsys: Run) -> None:
    assert printed(capsys, "gpus") == (
        "GPU  UUID          MODEL           STATE      JOB    MEM GiB  UTIL  POWER W   TEMP\n"
        "  0  GPU-00000000  H100 80GB HBM3  ALLOCATED  job-1    40/80   97%  650/700  61 °C\n"
        "  1  GPU-00000001  H100 80GB HBM3  FREE       -         0/80     -   70/700      -\n"
    )


def test_gpus_says_whose_parts_instances_are(daemon: FakeDaemon, capsys: Run) -> None:
    for slices, gpu in zip((3, 1), daemon.node.gpus, strict=True):
        gpu.parent_uuid, gpu.slices = "GPU-99999999-0000", slices
    lines = printed(capsys, "gpus").splitlines()
    assert lines[0].split()[:5] == ["GPU", "UUID", "MODEL", "PART", "OF"]
    assert "3 slices of GPU-99999999" in lines[1]
    assert "1 slice of GPU-99999999" in lines[2]
    shown = json.loads(printed(capsys, "gpus", "-o", "json"))["node"]["gpus"]
    assert [(gpu["parent_uuid"], gpu["slices"]) for gpu in shown] == [
        ("GPU-99999999-0000", 3),
        ("GPU-99999999-0000", 1),
    ]


def test_gpus_names_strangers_old_readings_and_the_nodes_problems(daemon: FakeDaemon, capsys: Run) -> None:
    gpu = daemon.node.gpus[1]
    gpu.state, gpu.reason = node_pb2.GPU_STATE_FOREIGN, reason_pb2.REASON_FOREIGN_PROCESS
    gpu.processes.add(pid=4711, user="ann", command="python")
    gpu.sampled_at.FromSeconds(int(time.time()) - 90)
    daemon.node.problems.append("the launcher does not answer")
    assert main(["gpus"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"foreign process; python \(PID 4711, ann\); last read 1m\d\ds ago\n", captured.out)
    assert captured.err == "the launcher does not answer\n"


def test_operators_cordon_drain_and_release(daemon: FakeDaemon, capsys: Run) -> None:
    assert printed(capsys, "cordon", "1", "--reason", "fan") == (
        "GPU 1 GPU-00000001 CORDONED: cordoned by operator: fan\n"
    )
    assert json.loads(printed(capsys, "uncordon", "1", "-o", "json"))["gpu"]["state"] == "GPU_STATE_FREE"
    assert printed(capsys, "drain", "--stop-jobs") == "node1 is draining: 1 running, 2 pending\n"
    assert daemon.requests["DrainNode"][0].stop_jobs
    assert printed(capsys, "release") == "node1 is released: 1 running, 2 pending\n"
    assert printed(capsys, "undrain") == "node1 is open: 1 running, 2 pending\n"
    assert "no GPU '7'" in told(capsys, "cordon", "7", code=ExitCode.NOT_FOUND)


def test_cancelling_many_goes_on_after_a_refusal_and_says_so(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1", "SUCCEEDED"))
    daemon.add(job_of("job-2"))
    assert main(["cancel", "job-1", "job-2"]) == ExitCode.PRECONDITION
    captured = capsys.readouterr()
    assert captured.err == "error: job-1 is finished\n"
    assert captured.out == "job-2 work CANCELLED: cancelled by request\n"


def test_usage_asks_for_all_pages_of_its_time(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.usage = [
        usage_pb2.Usage(key=f"job-{n}", gpu_seconds=1800 * n, energy_wh=350, value_usd=0.25, preemptions=n)
        for n in range(1, 4)
    ]
    daemon.usage[1].MergeFrom(usage_pb2.Usage(cost_usd=-0.0123, unpriced_energy_wh=12.5, profit_usd=0.2623))
    daemon.usage[2].MergeFrom(usage_pb2.Usage(cost_usd=0.0, profit_usd=0.25))
    assert printed(capsys, "usage", "--by", "job", "--since", "2026-01-01T00:00:00Z", "--until", "1h") == (
        "JOB    GPU-HOURS  ENERGY WH  UNPRICED WH  COST USD  VALUE USD  PROFIT USD  PREEMPTIONS\n"
        "job-1      0.500      350.0            -         -       0.25           -            1\n"
        "job-2      1.000      350.0         12.5   -0.0123       0.25      0.2623            2\n"
        "job-3      1.500      350.0            -      0.00       0.25        0.25            3\n"
    )
    request = daemon.requests["ListUsage"][1]
    assert request.start.ToJsonString() == "2026-01-01T00:00:00Z"
    assert abs(request.end.seconds - (time.time() - 3600)) < 60
    assert request.page_token == "2"
    answer = json.loads(printed(capsys, "usage", "--by", "gpu", "-o", "json"))
    assert [entry["key"] for entry in answer["usage"]] == ["job-1", "job-2", "job-3"]


# What runs here --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete")]
)
def test_completion_prints_the_shells_script(capsys: Run, shell: str, mark: str) -> None:
    script = printed(capsys, "completion", shell)
    assert mark in script
    assert "_WATTSHIFT_COMPLETE" in script


def completed(monkeypatch: pytest.MonkeyPatch, capsys: Run, words: str, word_number: int) -> list[str]:
    """What bash is offered for a word of a command line."""
    monkeypatch.setenv("_WATTSHIFT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(word_number))
    with pytest.raises(SystemExit):
        main([])
    return capsys.readouterr().out.splitlines()


def test_commands_options_jobs_and_gpus_are_completed(
    daemon: FakeDaemon, capsys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.add(job_of("job-1"))
    daemon.add(job_of("job-2", "SUCCEEDED"))
    assert completed(monkeypatch, capsys, "wattshift un", 1) == ["plain,uncordon", "plain,undrain"]
    assert completed(monkeypatch, capsys, "wattshift submit -c ", 3) == [
        "plain,inference",
        "plain,training",
        "plain,batch",
        "plain,mining",
    ]
    assert completed(monkeypatch, capsys, "wattshift show job", 2) == ["plain,job-2", "plain,job-1"]
    assert completed(monkeypatch, capsys, "wattshift cancel ", 2) == ["plain,job-1"]
    assert completed(monkeypatch, capsys, "wattshift cordon ", 2) == ["plain,0", "plain,1"]


def test_completion_offers_nothing_where_no_daemon_answers(
    tmp_path: Path, capsys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATTSHIFT_ADDRESS", f"unix://{tmp_path}/absent.sock")
    assert completed(monkeypatch, capsys, "wattshift show ", 2) == [""]


def test_version_is_the_installed_one(capsys: Run) -> None:
    assert re.fullmatch(r"wattshift \d+\.\d+\.\d+\S*\n", printed(capsys, "version"))
    assert printed(capsys, "--version") == printed(capsys, "version")


def test_serve_hands_its_options_to_the_daemon_and_ends_as_it_does(
    capsys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[dict[str, object]] = []

    def serve(**options: object) -> int:
        served.append(options)
        return 5

    monkeypatch.setattr("scheduler.daemon.serve", serve)
    arguments = ("--simulate", "8xH100", "--state-dir", "/s", "--listen", "unix:///x", "--log-level", "DEBUG")
    assert main(["serve", *arguments]) == 5
    assert served == [
        {
            "config_path": None,
            "simulate": "8xH100",
            "state_dir": Path("/s"),
            "listen": "unix:///x",
            "metrics_listen": None,
            "log_level": "debug",
        }
    ]


def test_check_config_names_file_line_and_key(capsys: Run, tmp_path: Path) -> None:
    file = tmp_path / "wattshift.toml"
    file.touch()
    assert printed(capsys, "check-config", str(file)) == f"{file}: OK\n"
    file.write_text("[policy]\nodrer = 'class'\n", "utf-8")
    message = told(capsys, "check-config", str(file), code=ExitCode.CONFIG)
    assert message.startswith(f"error: {file}:2: policy.odrer: ")


def test_verifying_a_journal_that_is_not_there_fails(capsys: Run, tmp_path: Path) -> None:
    message = told(capsys, "journal", "verify", "--state-dir", str(tmp_path), code=ExitCode.FAILED)
    assert str(tmp_path) in message


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("event 7: its hash is wrong", 1)])
def test_verify_is_0_only_for_a_whole_chain(
    capsys: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, code: int
) -> None:
    from types import SimpleNamespace

    found = SimpleNamespace(ok=not problem, events=9, first=3, last=11, problem=problem)
    monkeypatch.setattr("scheduler.effects.journal_verify.verify", lambda state_dir: found)
    assert main(["journal", "verify", "--state-dir", str(tmp_path)]) == code
    captured = capsys.readouterr()
    if problem:
        assert captured.err == f"error: {tmp_path}: {problem}\n"
    else:
        assert captured.out == f"{tmp_path}: OK, 9 events, 3 to 11\n"


def test_help_lists_every_command_with_a_whole_sentence(capsys: Run) -> None:
    text = printed(capsys, "--help")
    for name in ("submit", "preview", "jobs", "show", "explain", "wait", "logs", "cancel", "requeue", "top",
                 "gpus", "cordon", "uncordon", "drain", "undrain", "release", "power", "usage", "serve",
                 "check-config", "journal", "completion", "version"):  # fmt: skip
        line = re.search(rf"^  {name} .*$", text, flags=re.MULTILINE)
        assert line, name
        assert line[0].endswith("."), line[0]
        assert "..." not in line[0]
    assert " 69  No server answers at the address." in text


@pytest.mark.parametrize(
    "arguments",
    [("fly",), ("jobs", "--fast"), ("show",), ("jobs", "--state", "odd"), ("logs", "j", "--tail", "0")],
)
def test_a_command_line_that_cant_be_is_refused_with_2(capsys: Run, arguments: tuple[str, ...]) -> None:
    assert "Error: " in told(capsys, *arguments, code=ExitCode.INVALID)


@pytest.mark.parametrize("module", ["numpy", "rich", "pynvml", "scheduler.api"])
def test_a_clients_command_never_loads_what_it_does_not_need(daemon: FakeDaemon, module: str) -> None:
    program = (
        "import sys; from scheduler.cli import main; main(['jobs']); "
        f"print({module!r} in sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stderr == "False\n"


def test_parsing_a_command_line_loads_neither_grpc_nor_protobuf() -> None:
    program = (
        "import sys; from scheduler.cli import main; main(['submit', '--help']); "
        "print(*(m for m in ('grpc', 'google.protobuf', 'rich') if m in sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stderr == "\n"
