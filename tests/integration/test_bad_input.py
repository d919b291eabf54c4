"""What a caller can get wrong: the right code, the field by name, a remedy, and nothing is accepted."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from scheduler.v1 import (
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    node_service_pb2,
    usage_service_pb2,
)
from tests.harness.daemon import PENDING, SUCCEEDED, Daemon, reason_of, spec, until
from tests.harness.fixtures import Make
from tests.harness.refusals import refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CONFIG = "[server]\nmessage_bytes_max = 1048576\n"
GIB = 1 << 30


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """The module's daemon; what was accepted ends with the test."""
    yield shared_daemon
    if shared_daemon.all_jobs(active_only=True):
        shared_daemon.settle()


@pytest.fixture(autouse=True)
def no_error_of_its_own(daemon: Daemon) -> Iterator[None]:
    """Whatever a test sends, the daemon lives on and logs no error of its own."""
    before = len(daemon.log())
    yield
    assert "Traceback" not in daemon.log()[before:]


@pytest.fixture
def nothing_accepted(daemon: Daemon) -> Iterator[None]:
    """The test leaves no new job."""
    before = {job.id for job in daemon.all_jobs()}
    yield
    assert {job.id for job in daemon.all_jobs()} == before


def wrong(**fields: Any) -> job_pb2.JobSpec:
    return spec("true", **fields)


def unknown_class() -> job_pb2.JobSpec:
    message = spec("true")
    setattr(message, "class", 99)
    return message


def deadline(seconds: int, nanos: int = 0) -> job_pb2.JobSpec:
    message = spec("true")
    message.deadline.seconds, message.deadline.nanos = seconds, nanos
    return message


CASES: dict[str, tuple[Callable[[], job_pb2.JobSpec], str]] = {
    "no command": (lambda: job_pb2.JobSpec(gpus=1), "spec.command"),
    "an empty program": (lambda: spec("", "x"), "spec.command"),
    "a NUL in an argument": (lambda: spec("echo", "a\0b"), "spec.command[1]"),
    "too many words": (lambda: spec("echo", *["x"] * 2000), "spec.command"),
    "a command of a megabyte": (lambda: spec("echo", "x" * 900_000), "spec.command"),
    "a NUL in the stop command": (lambda: wrong(stop_command=["a\0"]), "spec.stop_command[0]"),
    "no class": (lambda: job_pb2.JobSpec(command=["true"]), "spec.class"),
    "an unknown class": (unknown_class, "spec.class"),
    "an unknown on_preempt": (lambda: wrong(on_preempt=77), "spec.on_preempt"),
    "an unknown restart rule": (lambda: wrong(restart=77), "spec.restart"),
    "minus one GPU": (lambda: wrong(gpus=-1), "spec.gpus"),
    "a billion GPUs": (lambda: wrong(gpus=1_000_000_000), "spec.gpus"),
    "more GPUs than the node has": (lambda: wrong(gpus=5), "spec.gpus"),
    "a share of two GPUs": (lambda: wrong(gpus=2, gpu_share_milli=500), "spec.gpu_share_milli"),
    "a share above one": (lambda: wrong(gpu_share_milli=1001), "spec.gpu_share_milli"),
    "a negative share": (lambda: wrong(gpu_share_milli=-5), "spec.gpu_share_milli"),
    "too much GPU memory": (lambda: wrong(gpu_memory_mib=900_000), "spec.gpu_memory_mib"),
    "negative GPU memory": (lambda: wrong(gpu_memory_mib=-1), "spec.gpu_memory_mib"),
    "a model that is not here": (lambda: wrong(gpu_models=["A100"]), "spec.gpu_models"),
    "half the name of a model": (lambda: wrong(gpu_models=["H10"]), "spec.gpu_models"),
    "an empty model": (lambda: wrong(gpu_models=[" "]), "spec.gpu_models[0]"),
    "a thousand models": (lambda: wrong(gpu_models=["H100"] * 1000), "spec.gpu_models"),
    "a million CPUs": (lambda: wrong(cpus=1_000_000), "spec.cpus"),
    "negative CPUs": (lambda: wrong(cpus=-1), "spec.cpus"),
    "more memory than there is": (lambda: wrong(memory_mib=1 << 39), "spec.memory_mib"),
    "negative memory": (lambda: wrong(memory_mib=-(1 << 62)), "spec.memory_mib"),
    "priority 1001": (lambda: wrong(priority=1001), "spec.priority"),
    "priority -1": (lambda: wrong(priority=-1), "spec.priority"),
    "a deadline in the past": (lambda: deadline(int(time.time()) - 10), "spec.deadline"),
    "a deadline before 1970": (lambda: deadline(-(1 << 62)), "spec.deadline"),
    "a deadline in a million years": (lambda: deadline(1 << 62), "spec.deadline"),
    "a relative working directory": (lambda: wrong(working_directory="tmp"), "spec.working_directory"),
    "a NUL in the working directory": (lambda: wrong(working_directory="/a\0"), "spec.working_directory"),
    "control characters in the name": (lambda: wrong(name="a\x1b[31mb"), "spec.name"),
    "a line break in the name": (lambda: wrong(name="a\nb"), "spec.name"),
    "a C1 control character in the name": (lambda: wrong(name="a\x9b31mb"), "spec.name"),
    "a name of 129 characters": (lambda: wrong(name="x" * 129), "spec.name"),
    "control characters in the tenant": (lambda: wrong(tenant="a\tb"), "spec.tenant"),
    "a tenant of 65 characters": (lambda: wrong(tenant="x" * 65), "spec.tenant"),
    "an environment above its limit": (lambda: wrong(environment={"A": "x" * 70_000}), "spec.environment"),
    "a name with = in the environment": (lambda: wrong(environment={"A=B": "x"}), "spec.environment[A=B]"),
    "an empty name in the environment": (lambda: wrong(environment={"": "x"}), "spec.environment[]"),
    "a NUL in the environment": (lambda: wrong(environment={"A": "x\0"}), "spec.environment[A]"),
    "a negative amount of pinned memory": (lambda: wrong(pinned_memory_mib=-1), "spec.pinned_memory_mib"),
}
for number in (float("nan"), float("inf"), float("-inf"), -1.0, 1e300):
    for name in (
        "value_usd_per_gpu_hour",
        "grace_s",
        "min_runtime_s",
        "restart_loss_s",
        "expected_duration_s",
        "time_limit_s",
        "draw_w",
    ):
        fields = {name: number}
        CASES[f"{name} of {number}"] = (lambda fields=fields: wrong(**fields), f"spec.{name}")
for name in ("expected_duration_s", "time_limit_s"):
    CASES[f"{name} of 0"] = (lambda fields={name: 0.0}: wrong(**fields), f"spec.{name}")


@pytest.mark.usefixtures("nothing_accepted")
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_field_is_refused_by_its_name(daemon: Daemon, case: str) -> None:
    make, field = CASES[case]
    for call in (
        daemon.submit_spec,
        lambda s: daemon.jobs.PreviewJob(job_service_pb2.PreviewJobRequest(spec=s)),
    ):
        told = refusal(lambda call=call: call(make()))
        assert told.code is INVALID
        assert field in told.fields, told
        assert len(told.fields[field]) > len("is wrong"), "it says what to do"


@pytest.mark.usefixtures("nothing_accepted")
def test_all_wrong_fields_are_told_at_once(daemon: Daemon) -> None:
    told = refusal(lambda: daemon.submit("", priority=-1, grace_s=float("nan"), name="\n"))
    assert set(told.fields) == {"spec.command", "spec.priority", "spec.grace_s", "spec.name"}


def test_a_job_without_gpus_is_legal(daemon: Daemon) -> None:
    assert daemon.finish("true", gpus=0).state == SUCCEEDED


def test_any_text_is_a_name(daemon: Daemon) -> None:
    for name in ("größer 模型 🦉", "'; DROP TABLE jobs; --", "x" * 128):
        assert daemon.finish("true", name=name).name == name
        assert [job.name for job in daemon.all_jobs(name=name)] == [name]


# Things that are not there, or not any more ----------------------------------------------------


def call_by_id(daemon: Daemon) -> dict[str, Callable[[str], Any]]:
    jobs, requests = daemon.jobs, job_service_pb2
    return {
        "GetJob": lambda i: jobs.GetJob(requests.GetJobRequest(job_id=i)),
        "CancelJob": daemon.cancel,
        "RequeueJob": daemon.requeue,
        "ExplainJob": lambda i: jobs.ExplainJob(requests.ExplainJobRequest(job_id=i)),
        "ReadLogs": daemon.output,
        "AcknowledgePreemption": daemon.acknowledge,
        "ReportCheckpoint": lambda i: jobs.ReportCheckpoint(requests.ReportCheckpointRequest(job_id=i)),
        "WatchJobs": lambda i: next(jobs.WatchJobs(requests.WatchJobsRequest(job_ids=[i]), timeout=10)),
    }


@pytest.mark.usefixtures("nothing_accepted")
@pytest.mark.parametrize(
    "job_id",
    ["", "j0", "j999999", "j01", "j-1", "4711", "j" + "9" * 30, "j١", "../../etc/passwd", "x" * 3000],
)
def test_an_unknown_job_is_not_found(daemon: Daemon, job_id: str) -> None:
    for method, call in call_by_id(daemon).items():
        told = refusal(lambda call=call: call(job_id))
        assert (told.code, method) == (grpc.StatusCode.NOT_FOUND, method), told


@pytest.mark.usefixtures("nothing_accepted")
def test_a_name_of_a_hundred_kilobytes_is_still_answered_in_words(daemon: Daemon) -> None:
    for call in (
        lambda: daemon.get("x" * 100_000),
        lambda: daemon.get("ü" * 50_000),
        lambda: daemon.node.CordonGpu(node_service_pb2.CordonGpuRequest(gpu="x" * 100_000)),
    ):
        told = refusal(call)
        assert told.code is grpc.StatusCode.NOT_FOUND, told.message[:200]


@pytest.mark.usefixtures("nothing_accepted")
def test_a_thousand_wrong_names_are_still_answered_in_words(daemon: Daemon) -> None:
    environment = {f"{'x' * 40}={i}": "" for i in range(1000)}
    told = refusal(lambda: daemon.submit("true", environment=environment))
    assert told.code is INVALID, told.message[:200]
    assert told.fields


@pytest.mark.parametrize("gpu", ["", "4", "-1", "GPU", "GPU-", "nonsense", "GPU-00000000-0000-0000-0000"])
def test_an_unknown_gpu_is_not_found(daemon: Daemon, gpu: str) -> None:
    for call in (
        lambda: daemon.node.CordonGpu(node_service_pb2.CordonGpuRequest(gpu=gpu)),
        lambda: daemon.node.UncordonGpu(node_service_pb2.UncordonGpuRequest(gpu=gpu)),
    ):
        assert refusal(call).code is grpc.StatusCode.NOT_FOUND


def test_a_cordons_reason_is_checked_like_a_name(daemon: Daemon) -> None:
    told = refusal(
        lambda: daemon.node.CordonGpu(node_service_pb2.CordonGpuRequest(gpu="0", reason="\x1b[2J"))
    )
    assert (told.code, set(told.fields)) == (INVALID, {"reason"})


@pytest.mark.parametrize("token", ["x", "j-1", "j" + "9" * 40, "\U0001f989", "' OR 1", "x" * 3000])
def test_a_page_token_that_is_not_ours_is_refused(daemon: Daemon, token: str) -> None:
    for call in (
        lambda: daemon.jobs.ListJobs(job_service_pb2.ListJobsRequest(page_token=token)),
        lambda: daemon.usage.ListUsage(usage_service_pb2.ListUsageRequest(page_token=token)),
    ):
        told = refusal(call)
        assert (told.code, set(told.fields)) == (INVALID, {"page_token"})


@pytest.mark.parametrize("size", [-1, 1001, 2**31 - 1, -(2**31)])
def test_a_page_size_out_of_range_is_refused(daemon: Daemon, size: int) -> None:
    for call in (
        lambda: daemon.jobs.ListJobs(job_service_pb2.ListJobsRequest(page_size=size)),
        lambda: daemon.usage.ListUsage(usage_service_pb2.ListUsageRequest(page_size=size)),
    ):
        told = refusal(call)
        assert (told.code, set(told.fields)) == (INVALID, {"page_size"})


def test_filters_that_make_no_sense_are_refused(daemon: Daemon) -> None:
    jobs, request = daemon.jobs, job_service_pb2.ListJobsRequest
    for fields, name in (
        ({"states": [99]}, "states"),
        ({"classes": [99]}, "classes"),
        ({"active_only": True, "states": [SUCCEEDED]}, "active_only"),
    ):
        told = refusal(lambda fields=fields: jobs.ListJobs(request(**fields)))
        assert (told.code, set(told.fields)) == (INVALID, {name})
    told = refusal(lambda: daemon.usage.ListUsage(usage_service_pb2.ListUsageRequest(group_by=99)))
    assert (told.code, set(told.fields)) == (INVALID, {"group_by"})
    backwards = usage_service_pb2.ListUsageRequest()
    backwards.start.seconds, backwards.end.seconds = 20, 10
    assert set(refusal(lambda: daemon.usage.ListUsage(backwards)).fields) == {"end"}


def test_a_watch_from_a_revision_that_is_to_come_is_out_of_range(daemon: Daemon) -> None:
    for revision in (daemon.get_node().revision + 1000, 2**62, -1, -(2**62)):
        watch = daemon.jobs.WatchJobs(job_service_pb2.WatchJobsRequest(since_revision=revision), timeout=10)
        told = refusal(lambda watch=watch: next(watch))
        assert told.code is grpc.StatusCode.OUT_OF_RANGE
        assert "without since_revision" in told.message


def test_logs_of_an_attempt_that_never_was_are_refused(daemon: Daemon) -> None:
    job = daemon.finish("true")
    for fields, name in (
        ({"attempt": 2}, "attempt"),
        ({"attempt": -1}, "attempt"),
        ({"tail_bytes": -1}, "tail_bytes"),
    ):
        told = refusal(lambda fields=fields: daemon.output(job.id, **fields))
        assert (told.code, set(told.fields)) == (INVALID, {name})


def test_an_acknowledgement_without_a_notice_is_refused(daemon: Daemon) -> None:
    job = daemon.run("sleep", "60")
    told = refusal(lambda: daemon.acknowledge(job.id))
    assert told.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "notice" in told.message


@pytest.mark.usefixtures("nothing_accepted")
@pytest.mark.parametrize("count", [0, 10_001])
def test_a_batch_is_of_one_to_ten_thousand_jobs(daemon: Daemon, count: int) -> None:
    request = job_service_pb2.SubmitJobsRequest(
        jobs=[job_service_pb2.SubmitJobRequest(spec=spec("true"))] * count
    )
    told = refusal(lambda: daemon.jobs.SubmitJobs(request, timeout=10))
    assert (told.code, set(told.fields)) == (INVALID, {"jobs"})


@pytest.mark.usefixtures("nothing_accepted")
def test_a_request_id_of_129_characters_is_refused(daemon: Daemon) -> None:
    told = refusal(lambda: daemon.submit("true", request_id="x" * 129))
    assert (told.code, set(told.fields)) == (INVALID, {"request_id"})


# On the wire -----------------------------------------------------------------------------------


def raw(daemon: Daemon, method: str, data: bytes) -> Any:
    assert daemon.channel is not None
    call = daemon.channel.unary_unary(
        f"/wattshift.scheduler.v1.{method}",
        request_serializer=lambda message: message,
        response_deserializer=lambda message: message,
    )
    return call(data, timeout=10)


@pytest.mark.usefixtures("nothing_accepted")
def test_a_message_above_the_limit_is_refused(daemon: Daemon) -> None:
    told = refusal(lambda: daemon.submit("true", environment={"A": "x" * 10 * 1024 * 1024}))
    assert told.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert daemon.get_node().live_jobs == 0


NOT_UTF_8 = b"\x0a\x06\x0a\x04ab\xff\xfe"  # spec.name


@pytest.mark.usefixtures("nothing_accepted")
@pytest.mark.parametrize(
    "data",
    [b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", NOT_UTF_8, b"\x0a" + b"\x7f" * 50],
    ids=["noise", "a length of 4 GiB", "text that is not UTF-8", "too short"],
)
def test_bytes_that_are_no_message_are_refused_as_the_callers_fault(daemon: Daemon, data: bytes) -> None:
    for method in ("JobService/SubmitJob", "JobService/PreviewJob"):
        told = refusal(lambda method=method: raw(daemon, method, data))
        assert told.code is INVALID, told


def test_a_method_that_is_not_there_is_unimplemented(daemon: Daemon) -> None:
    assert refusal(lambda: raw(daemon, "JobService/Nonsense", b"")).code is grpc.StatusCode.UNIMPLEMENTED


def test_fields_of_a_newer_client_are_ignored(daemon: Daemon) -> None:
    request = job_service_pb2.SubmitJobRequest(spec=spec("true"))
    answer = raw(daemon, "JobService/SubmitJob", request.SerializeToString() + b"\xf2\x7f\x03new")
    job = job_service_pb2.SubmitJobResponse.FromString(answer).job
    assert daemon.wait(job.id).state == SUCCEEDED


# Too much of it --------------------------------------------------------------------------------


def test_two_hundred_clients_at_once_are_all_served(daemon: Daemon) -> None:
    def client(number: int) -> str:
        with daemon.open_channel(("grpc.use_local_subchannel_pool", 1)) as channel:
            stub = job_service_pb2_grpc.JobServiceStub(channel)
            request = job_service_pb2.SubmitJobRequest(spec=spec("true", gpus=0), request_id=f"c-{number}")
            return str(stub.SubmitJob(request, timeout=30, wait_for_ready=True).job.id)

    with ThreadPoolExecutor(50) as pool:
        ids = list(pool.map(client, range(200)))
    assert len(set(ids)) == 200
    until("all are done", lambda: not daemon.all_jobs(active_only=True))


def test_the_limit_of_waiting_jobs_refuses_all_of_a_call(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="1xT4", config="[jobs]\npending_max = 3\n").start()
    daemon.run("sleep", "60")
    for _ in range(2):
        assert daemon.submit("sleep", "60").state == PENDING
    two = job_service_pb2.SubmitJobsRequest(jobs=[job_service_pb2.SubmitJobRequest(spec=spec("true"))] * 2)
    told = refusal(lambda: daemon.jobs.SubmitJobs(two, timeout=10))
    assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    assert "jobs.pending_max = 3" in told.message
    last = daemon.submit("sleep", "60", request_id="last")
    assert refusal(lambda: daemon.submit("true")).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert daemon.submit("sleep", "60", request_id="last").id == last.id, "it is accepted already"
    daemon.cancel_all()
    assert reason_of(daemon.get(last.id)) == "CANCELLED_BY_REQUEST"
