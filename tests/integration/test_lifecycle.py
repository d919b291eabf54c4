"""The life of a job, from the submission to its end, on the real daemon with real processes."""

import json
import time
from pathlib import Path

import grpc
import pytest

from scheduler.v1 import job_pb2, job_service_pb2, node_service_pb2, reason_pb2
from tests.harness.daemon import (
    CANCELLED,
    FAILED,
    PENDING,
    RUNNING,
    STOPPING,
    SUCCEEDED,
    Daemon,
    reason_of,
    spec,
    until,
)
from tests.harness.fixtures import Make
from tests.harness.refusals import refusal

SECRET = "tiger-7f3a9c-lily"
CONFIG = """
[policy]
restart_backoff_s = 0.05
restart_backoff_s_max = 0.1
restart_attempts_max = 3
"""
IGNORES_TERM = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


# Ends ------------------------------------------------------------------------------------------


def test_jobs_of_a_millisecond_that_a_drain_stops_as_they_start_leave_nobody_behind(daemon: Daemon) -> None:
    many = [job_service_pb2.SubmitJobRequest(spec=spec("true", gpus=1)) for _ in range(40)]
    moments_s = [0.002 * turn for turn in range(20)]  # after the submission: each moment of some start
    for moment_s in 2 * moments_s:
        daemon.jobs.SubmitJobs(job_service_pb2.SubmitJobsRequest(jobs=many), timeout=10)
        time.sleep(moment_s)
        daemon.node.DrainNode(node_service_pb2.DrainNodeRequest(stop_jobs=True), timeout=10)
        until("nobody runs", lambda: not daemon.get_node().live_jobs)
        daemon.node.UndrainNode(node_service_pb2.UndrainNodeRequest(), timeout=10)


def test_a_job_that_exits_with_zero_succeeds(daemon: Daemon) -> None:
    job = daemon.finish("true")
    assert (job.state, job.exit_code, reason_of(job)) == (SUCCEEDED, 0, "EXITED_ZERO")
    (attempt,) = job.attempts
    assert attempt.pid > 0
    assert attempt.decided_at.ToNanoseconds() <= attempt.started_at.ToNanoseconds()
    assert attempt.started_at.ToNanoseconds() <= attempt.exited_at.ToNanoseconds()
    assert job.finished_at == attempt.exited_at


def test_a_job_keeps_the_exit_code_with_which_it_failed(daemon: Daemon) -> None:
    job = daemon.finish(script="exit 41")
    assert (job.state, job.exit_code, reason_of(job)) == (FAILED, 41, "EXITED_NONZERO")
    assert job.detail == "exit code 41"


@pytest.mark.parametrize("number", [6, 9, 15])
def test_a_job_that_a_signal_ends_has_128_and_the_signal_as_its_exit_code(
    daemon: Daemon, number: int
) -> None:
    job = daemon.finish(script=f"kill -{number} $$")
    assert (job.state, job.exit_code, reason_of(job)) == (FAILED, 128 + number, "KILLED_BY_SIGNAL")
    assert f"signal {number}" in job.detail


def test_a_command_that_is_not_there_fails_with_127(daemon: Daemon) -> None:
    job = daemon.finish("/nowhere/at-all", restart=job_pb2.RESTART_RULE_ALWAYS)
    assert (job.state, job.exit_code, reason_of(job)) == (FAILED, 127, "COMMAND_NOT_FOUND")
    assert len(job.attempts) == 1, "no rule makes it worth a retry"


def test_a_command_without_a_slash_is_looked_up_in_the_jobs_path(daemon: Daemon) -> None:
    assert daemon.finish("no-such-command-anywhere").exit_code == 127
    assert daemon.finish("ls").state == SUCCEEDED


def test_a_file_that_is_not_executable_fails_with_126(daemon: Daemon) -> None:
    text = daemon.directory / "text"
    text.write_text("echo hello\n")
    job = daemon.finish(str(text))
    assert (job.state, job.exit_code, reason_of(job)) == (FAILED, 126, "COMMAND_NOT_EXECUTABLE")


def test_a_working_directory_that_is_not_there_fails_the_job(daemon: Daemon) -> None:
    job = daemon.finish("true", working_directory="/nowhere/at-all")
    assert (job.state, reason_of(job)) == (FAILED, "WORKING_DIRECTORY_MISSING")
    assert "/nowhere/at-all" in job.detail


def test_a_job_works_in_the_directory_that_it_names(daemon: Daemon) -> None:
    job = daemon.finish("pwd", working_directory="/usr/lib")
    assert daemon.output(job.id) == "/usr/lib\n"


# What it sees ----------------------------------------------------------------------------------


def environment_of(daemon: Daemon, job: job_pb2.Job) -> dict[str, str]:
    return dict(line.split("=", 1) for line in daemon.output(job.id).splitlines())


def test_a_gpu_job_sees_its_gpus_by_uuid_and_where_to_save(daemon: Daemon) -> None:
    job = daemon.finish("env", gpus=2)
    found = environment_of(daemon, job)
    gpus = ",".join(job.attempts[0].gpus)
    assert len(job.attempts[0].gpus) == 2
    assert (found["CUDA_VISIBLE_DEVICES"], found["NVIDIA_VISIBLE_DEVICES"]) == (gpus, gpus)
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert (found["WATTSHIFT_JOB_ID"], found["WATTSHIFT_ATTEMPT"]) == (job.id, "1")
    mine = str(daemon.state / "jobs" / job.id)
    for name in ("WATTSHIFT_CHECKPOINT_DIR", "WATTSHIFT_NOTICE_FILE", "WATTSHIFT_ACK_FILE"):
        assert found[name].startswith(mine)
    assert Path(found["WATTSHIFT_CHECKPOINT_DIR"]).stat().st_mode & 0o777 == 0o700


def test_a_cpu_job_sees_no_gpu(daemon: Daemon) -> None:
    job = daemon.finish("env", gpus=0)
    found = environment_of(daemon, job)
    assert list(job.attempts[0].gpus) == []
    assert (found["CUDA_VISIBLE_DEVICES"], found["NVIDIA_VISIBLE_DEVICES"]) == ("", "void")


def test_nothing_of_the_daemons_environment_reaches_a_job(daemon: Daemon) -> None:
    found = environment_of(daemon, daemon.finish("env"))
    ours = {name for name in daemon.environment if name not in {"PATH", "HOME", "USER", "LANG", "PWD"}}
    assert ours & set(found) == set()
    assert found["PATH"] != daemon.environment["PATH"]


def test_a_job_has_its_own_environment_but_not_over_what_we_promise(daemon: Daemon) -> None:
    own = {"MODE": "fast", "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "all", "WATTSHIFT_JOB_ID": "j0"}
    job = daemon.finish("env", environment=own)
    found = environment_of(daemon, job)
    assert (found["MODE"], found["PATH"]) == ("fast", "/usr/bin:/bin")
    assert found["CUDA_VISIBLE_DEVICES"] == job.attempts[0].gpus[0]
    assert found["WATTSHIFT_JOB_ID"] == job.id


def test_secrets_of_an_environment_are_shown_to_nobody_but_the_job(daemon: Daemon) -> None:
    counts = spec(script='echo "$TOKEN" | wc -c; exec sleep 60', environment={"TOKEN": SECRET})
    job = daemon.submit_spec(counts, "secret-1")
    daemon.wait(job.id, RUNNING)
    until("the job has seen it", lambda: daemon.output(job.id) == f"{len(SECRET) + 1}\n")
    again = daemon.submit_spec(counts, "secret-1")
    assert again.id == job.id
    watch = daemon.jobs.WatchJobs(job_service_pb2.WatchJobsRequest(job_ids=[job.id]), timeout=10)
    answers = [daemon.get(job.id), again, next(watch), daemon.all_jobs(), daemon.get_node()]
    answers.append(daemon.jobs.ExplainJob(job_service_pb2.ExplainJobRequest(job_id=job.id)))
    watch.cancel()
    daemon.cancel(job.id)
    answers.append(daemon.wait(job.id))
    assert not any(SECRET in str(answer) for answer in answers)
    for table in ("events", "jobs", "requests", "meta", "usage"):
        assert SECRET not in repr(daemon.query(f"SELECT * FROM {table}"))
    assert SECRET not in daemon.log()


# Logs ------------------------------------------------------------------------------------------


def test_logs_are_what_the_job_wrote_on_both_streams(daemon: Daemon) -> None:
    job = daemon.finish(script="echo out; echo err >&2; printf 'no end'")
    assert daemon.output(job.id) == "out\nerr\nno end"
    assert daemon.output(job.id, tail_bytes=6) == "no end"


def test_following_logs_brings_each_line_and_ends_with_the_job(daemon: Daemon) -> None:
    gate = daemon.directory / "gate"
    job = daemon.run_ready(f"echo one; until [ -e {gate} ]; do sleep 0.02; done; echo two")
    pieces = daemon.jobs.ReadLogs(job_service_pb2.ReadLogsRequest(job_id=job.id, follow=True), timeout=20)
    assert next(pieces).data == b"one\n"
    gate.touch()
    assert b"".join(piece.data for piece in pieces) == b"two\n"
    assert daemon.wait(job.id).state == SUCCEEDED


# Restart rules and limits ----------------------------------------------------------------------


def test_a_job_that_restarts_on_failure_backs_off_and_goes_on_until_it_succeeds(daemon: Daemon) -> None:
    script = 'echo x >> $WATTSHIFT_CHECKPOINT_DIR/n; [ "$(wc -l < $WATTSHIFT_CHECKPOINT_DIR/n)" -ge 3 ]'
    job = daemon.finish(script=script, restart=job_pb2.RESTART_RULE_ON_FAILURE)
    assert (job.state, len(job.attempts)) == (SUCCEEDED, 3)
    first, second, third = job.attempts
    assert second.started_at.ToNanoseconds() - first.exited_at.ToNanoseconds() >= 0.05e9
    assert third.started_at.ToNanoseconds() - second.exited_at.ToNanoseconds() >= 0.1e9


def test_a_job_that_fails_again_and_again_fails_for_good(daemon: Daemon) -> None:
    job = daemon.finish(script="exit 5", restart=job_pb2.RESTART_RULE_ON_FAILURE)
    assert (job.state, job.exit_code, job.attempt) == (FAILED, 5, 4)


def test_a_job_that_always_restarts_is_started_again_after_a_success_too(daemon: Daemon) -> None:
    job = daemon.submit("true", restart=job_pb2.RESTART_RULE_ALWAYS)
    until("it was started twice", lambda: daemon.get(job.id).attempt >= 2)


def test_a_job_without_a_restart_rule_is_started_once(daemon: Daemon) -> None:
    assert daemon.finish(script="exit 1").attempt == 1


def test_a_job_past_its_time_limit_gets_notice_and_grace_and_fails(daemon: Daemon) -> None:
    job = daemon.finish(script="trap 'exit 0' TERM; while :; do sleep 0.02; done", time_limit_s=0.2)
    assert (job.state, job.exit_code, reason_of(job)) == (FAILED, 0, "TIME_LIMIT")
    (attempt,) = job.attempts
    assert attempt.notice.decided_at.ToNanoseconds() - attempt.started_at.ToNanoseconds() >= 0.2e9


def test_a_job_that_runs_past_its_deadline_fails(daemon: Daemon) -> None:
    wanted = spec("sleep", "60")
    wanted.deadline.FromNanoseconds(time.time_ns() + 500_000_000)
    job = daemon.wait(daemon.submit_spec(wanted).id)
    assert (job.state, reason_of(job)) == (FAILED, "DEADLINE_MISSED")


def test_a_waiting_job_that_can_no_longer_make_its_deadline_fails_without_a_start(daemon: Daemon) -> None:
    daemon.run("sleep", "60", gpus=4)
    wanted = spec("sleep", "1", gpus=1, expected_duration_s=0.5)
    wanted.deadline.FromNanoseconds(time.time_ns() + 1_500_000_000)
    job = daemon.submit_spec(wanted)
    assert job.state == PENDING
    job = daemon.wait(job.id)
    assert (job.state, reason_of(job), job.attempt) == (FAILED, "DEADLINE_UNREACHABLE", 0)


# Cancel and requeue ----------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once(daemon: Daemon) -> None:
    daemon.run("sleep", "60", gpus=4)
    waiting = daemon.submit("sleep", "60")
    job = daemon.cancel(waiting.id)
    assert (job.state, reason_of(job), job.attempt) == (CANCELLED, "CANCELLED_BY_REQUEST", 0)


def test_a_starting_job_can_be_cancelled(daemon: Daemon) -> None:
    job = daemon.submit("sleep", "60")
    daemon.cancel(job.id)
    job = daemon.wait(job.id)
    assert (job.state, reason_of(job)) == (CANCELLED, "CANCELLED_BY_REQUEST")


def test_a_running_job_is_cancelled_with_notice_and_keeps_its_exit_code(daemon: Daemon) -> None:
    job = daemon.run_ready("trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done")
    daemon.cancel(job.id)
    job = daemon.wait(job.id)
    assert (job.state, job.exit_code, reason_of(job)) == (CANCELLED, 7, "CANCELLED_BY_REQUEST")


def test_a_cancel_during_the_grace_changes_nothing_and_a_cancelled_job_may_be_cancelled_again(
    daemon: Daemon,
) -> None:
    job = daemon.run_ready(IGNORES_TERM)
    first = daemon.cancel(job.id)
    assert first.state == STOPPING
    second = daemon.cancel(job.id)
    assert second.attempts[-1].notice == first.attempts[-1].notice
    daemon.acknowledge(job.id)
    assert daemon.wait(job.id).exit_code == 128 + 9
    assert daemon.cancel(job.id).state == CANCELLED


def test_a_job_that_ended_by_itself_can_no_longer_be_cancelled(daemon: Daemon) -> None:
    job = daemon.finish("true")
    told = refusal(lambda: daemon.cancel(job.id))
    assert told.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "already ended" in told.message
    assert daemon.get(job.id).state == SUCCEEDED


def test_requeueing_a_running_job_stops_it_and_starts_it_again_under_its_id(daemon: Daemon) -> None:
    job = daemon.run("sleep", "60")
    daemon.requeue(job.id)
    again = daemon.wait_attempt(job.id, 2)
    assert again.attempts[0].notice.reason == reason_pb2.REASON_REQUEUED_BY_OPERATOR
    assert again.preemptions == 0


def test_requeueing_ends_a_back_off(make_daemon: Make) -> None:
    daemon = make_daemon(config="[policy]\nrestart_backoff_s = 300.0\n").start()
    job = daemon.submit(script="exit 1", restart=job_pb2.RESTART_RULE_ON_FAILURE)
    backing = daemon.wait_attempt(job.id, 1, PENDING)
    assert backing.eligible_at.ToSeconds() > time.time() + 200
    daemon.requeue(job.id)
    until("attempt 2 has begun", lambda: daemon.get(job.id).attempt == 2)
    daemon.cancel_all()


def test_a_finished_job_can_not_be_requeued(daemon: Daemon) -> None:
    job = daemon.finish("true")
    assert refusal(lambda: daemon.requeue(job.id)).code is grpc.StatusCode.FAILED_PRECONDITION


# Idempotence -----------------------------------------------------------------------------------


def test_the_same_request_is_the_same_job_and_another_job_under_its_id_is_refused(daemon: Daemon) -> None:
    first = daemon.submit("sleep", "60", request_id="r-1")
    assert daemon.submit("sleep", "60", request_id="r-1").id == first.id
    told = refusal(lambda: daemon.submit("sleep", "61", request_id="r-1"))
    assert told.code is grpc.StatusCode.ALREADY_EXISTS
    assert first.id in told.message
    daemon.restart()
    assert daemon.submit("sleep", "60", request_id="r-1").id == first.id
    told = refusal(lambda: daemon.submit("sleep", "61", request_id="r-1"))
    assert told.code is grpc.StatusCode.ALREADY_EXISTS


def test_another_environment_is_another_job(daemon: Daemon) -> None:
    daemon.submit("true", request_id="r-2", environment={"A": "1"})
    told = refusal(lambda: daemon.submit("true", request_id="r-2", environment={"A": "2"}))
    assert told.code is grpc.StatusCode.ALREADY_EXISTS


def test_the_same_request_with_a_deadline_is_the_same_job_even_after_the_deadline(daemon: Daemon) -> None:
    wanted = spec("true")
    wanted.deadline.FromNanoseconds(time.time_ns() + 2_000_000_000)
    job = daemon.wait(daemon.submit_spec(wanted, "r-3").id)
    assert daemon.submit_spec(wanted, "r-3").id == job.id
    until("the deadline is over", lambda: time.time_ns() > wanted.deadline.ToNanoseconds())
    assert daemon.submit_spec(wanted, "r-3").id == job.id


def submissions(*wanted: tuple[str, str]) -> job_service_pb2.SubmitJobsRequest:
    return job_service_pb2.SubmitJobsRequest(
        jobs=[
            job_service_pb2.SubmitJobRequest(spec=spec("sleep", seconds), request_id=request_id)
            for request_id, seconds in wanted
        ]
    )


def test_many_jobs_are_accepted_in_order_and_a_repetition_makes_none(daemon: Daemon) -> None:
    request = submissions(("m-1", "50"), ("m-2", "51"), ("", "52"), ("m-1", "50"))
    ids = list(daemon.jobs.SubmitJobs(request, timeout=10).job_ids)
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3
    assert [daemon.get(job_id).spec.command[1] for job_id in ids] == ["50", "51", "52", "50"]
    again = list(daemon.jobs.SubmitJobs(submissions(("m-2", "51"), ("m-1", "50")), timeout=10).job_ids)
    assert again == [ids[1], ids[0]]


def test_one_bad_job_refuses_all_of_its_call(daemon: Daemon) -> None:
    before = len(daemon.all_jobs())
    request = submissions(("n-1", "50"), ("n-2", "50"))
    request.jobs[1].spec.ClearField("command")
    told = refusal(lambda: daemon.jobs.SubmitJobs(request, timeout=10))
    assert told.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(told.fields) == {"jobs[1].spec.command"}
    clash = submissions(("n-3", "50"), ("n-3", "51"))
    assert refusal(lambda: daemon.jobs.SubmitJobs(clash, timeout=10)).code is grpc.StatusCode.ALREADY_EXISTS
    assert len(daemon.all_jobs()) == before


def test_the_notice_file_says_why_and_until_when(daemon: Daemon) -> None:
    job = daemon.run_ready(IGNORES_TERM, grace_s=30.0)
    deadline = daemon.cancel(job.id).attempts[-1].notice.deadline
    notice = daemon.files(job.id) / "notice.json"
    until("the notice is there", notice.exists)
    said = json.loads(notice.read_text())
    assert (said["job_id"], said["reason"]) == (job.id, "CANCELLED_BY_REQUEST")
    assert abs(said["deadline_s"] - deadline.ToNanoseconds() / 1e9) < 1e-3
