"""What clients and dashboards see: listings, watches, the node, usage, health, metrics."""

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from scheduler.api.http import CONNECTIONS_MAX
from scheduler.v1 import job_pb2, job_service_pb2, node_pb2, node_service_pb2, usage_service_pb2
from tests.harness.daemon import (
    CALL_S,
    CANCELLED,
    PENDING,
    RUNNING,
    SUCCEEDED,
    Daemon,
    reason_of,
    spec,
    until,
    word,
)
from tests.harness.fixtures import Make
from tests.harness.refusals import refusal

SERVICES = (
    "wattshift.scheduler.v1.JobService",
    "wattshift.scheduler.v1.NodeService",
    "wattshift.scheduler.v1.UsageService",
)


def submit_many(daemon: Daemon, count: int, **fields: Any) -> list[str]:
    """Jobs that wait: they want more CPUs than anyone leaves free."""
    one = job_service_pb2.SubmitJobRequest(spec=spec("sleep", "600", **fields))
    return list(
        daemon.jobs.SubmitJobs(job_service_pb2.SubmitJobsRequest(jobs=[one] * count), timeout=CALL_S).job_ids
    )


# Listings --------------------------------------------------------------------------------------


def pages(daemon: Daemon, size: int, **filters: Any) -> Iterator[list[job_pb2.Job]]:
    token = ""
    while True:
        request = job_service_pb2.ListJobsRequest(page_size=size, page_token=token, **filters)
        answer = daemon.jobs.ListJobs(request, timeout=CALL_S)
        yield list(answer.jobs)
        token = answer.next_page_token
        if not token:
            return


def test_pages_are_complete_and_stable_while_jobs_are_added(daemon: Daemon) -> None:
    daemon.run("sleep", "600", gpus=4)
    ids = submit_many(daemon, 95)
    seen: list[str] = []
    for page in pages(daemon, 10, states=[PENDING]):
        seen += [job.id for job in page]
        ids_new = submit_many(daemon, 3)
        assert not set(ids_new) & set(seen), "the newest come first: later ones stand on pages before"
    assert seen == ids[::-1]


def test_a_page_that_is_just_full_is_the_last(daemon: Daemon) -> None:
    daemon.run("sleep", "600", gpus=4)
    submit_many(daemon, 20)
    assert [len(page) for page in pages(daemon, 10, states=[PENDING])] == [10, 10]


def test_filters_choose_by_state_class_name_and_tenant(daemon: Daemon) -> None:
    ends = daemon.finish("true", name="short", tenant="amber")
    runs = daemon.run("sleep", "600", name="long", tenant="amber", job_class="training", gpus=4)
    waits = daemon.submit("sleep", "600", name="long", tenant="blue", gpus=4)

    def found(**filters: Any) -> list[str]:
        return [job.id for job in daemon.all_jobs(**filters) if job.id in {ends.id, runs.id, waits.id}]

    assert found() == [waits.id, runs.id, ends.id]
    assert found(states=[RUNNING, SUCCEEDED]) == [runs.id, ends.id]
    assert found(classes=[job_pb2.JOB_CLASS_TRAINING]) == [runs.id]
    assert found(name="long") == [waits.id, runs.id]
    assert found(tenant="amber") == [runs.id, ends.id]
    assert found(active_only=True) == [waits.id, runs.id]
    assert found(active_only=True, tenant="blue", states=[PENDING]) == [waits.id]
    assert found(name="lon") == []


# Watches ---------------------------------------------------------------------------------------


def watch(daemon: Daemon, **fields: Any) -> Any:
    return daemon.jobs.WatchJobs(job_service_pb2.WatchJobsRequest(**fields), timeout=30)


def test_a_watch_brings_the_state_first_then_each_change(daemon: Daemon) -> None:
    ids = {daemon.submit("sleep", "600", gpus=gpus).id for gpus in (4, 4, 4)}
    stream = watch(daemon)
    initial = [next(stream) for _ in ids]
    assert {message.job.id for message in initial} == ids
    assert [message.synced for message in initial] == [False, False, True]
    revisions = [message.revision for message in initial]
    assert revisions == sorted(revisions)
    job = daemon.submit("true", gpus=0)
    states = []
    for message in stream:
        assert message.revision >= revisions[-1]
        if message.job.id == job.id:
            states.append(message.job.state)
        if message.job.state == SUCCEEDED:
            break
    assert states == sorted(states), "never back in time"
    stream.cancel()


def test_a_watch_with_nothing_to_say_says_so(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="1xT4").start()
    stream = watch(daemon)
    first = next(stream)
    assert (first.synced, first.HasField("job")) == (True, False)
    job = daemon.finish("true")
    again = watch(daemon, since_revision=first.revision)
    assert (message := next(again)).job.id == job.id
    assert message.job.state == SUCCEEDED
    stream.cancel()
    again.cancel()


def test_a_watch_of_some_jobs_brings_no_others(daemon: Daemon) -> None:
    first = daemon.submit("sleep", "600", gpus=4)
    second = daemon.submit("sleep", "600", gpus=4)
    stream = watch(daemon, job_ids=[second.id])
    assert next(stream).synced
    daemon.cancel(first.id)
    daemon.cancel(second.id)
    assert next(stream).job.id == second.id
    stream.cancel()


def test_a_watch_resumed_by_revision_across_a_restart_misses_nothing(daemon: Daemon) -> None:
    kept = daemon.submit("sleep", "600", gpus=4)
    stream = watch(daemon)
    revision = next(message for message in stream if message.synced).revision
    early = daemon.finish("true", gpus=0)
    daemon.kill()
    daemon.start()
    late = daemon.finish(script="exit 3", gpus=0)
    daemon.cancel(kept.id)
    resumed = watch(daemon, since_revision=revision)
    seen: dict[str, job_pb2.Job] = {}
    for message in resumed:
        seen[message.job.id] = message.job
        if {early.id, late.id} <= set(seen) and seen.get(kept.id, kept).state != kept.state:
            break
    resumed.cancel()
    assert seen[early.id] == daemon.get(early.id)
    assert seen[late.id] == daemon.get(late.id)


def test_a_reader_that_sleeps_through_thousands_of_changes_harms_nobody_and_sees_the_end(
    daemon: Daemon,
) -> None:
    daemon.run("sleep", "600", gpus=4)
    stream = watch(daemon)
    next(stream)
    ids = submit_many(daemon, 1500, environment={"PADDING": "x" * 500})
    for job_id in ids[:1000]:
        daemon.cancel(job_id)
    assert daemon.get(ids[0]).state == CANCELLED
    newest: dict[str, int] = {}
    for message in stream:
        newest[message.job.id] = message.job.state
        if sum(newest.get(job_id) == CANCELLED for job_id in ids) == 1000 and len(newest) >= 1500:
            break
    stream.cancel()
    assert "Traceback" not in daemon.log()


def test_a_watch_of_the_node_comes_at_once_and_with_each_change(daemon: Daemon) -> None:
    stream = daemon.node.WatchNode(node_service_pb2.WatchNodeRequest(), timeout=20)
    assert not next(stream).node.draining
    daemon.node.DrainNode(node_service_pb2.DrainNodeRequest())
    assert next(message.node for message in stream if message.node.draining)
    stream.cancel()


# The node --------------------------------------------------------------------------------------


def test_the_node_says_what_it_has_and_who_holds_it(daemon: Daemon) -> None:
    job = daemon.run("sleep", "600", gpus=1)
    node = until("it draws power", lambda: (n := daemon.get_node()).gpus[0].power_w > 100 and n)
    assert (node.simulated, node.draining, node.released, list(node.problems)) == (True, False, False, [])
    assert (node.live_jobs, node.pending_jobs, len(node.gpus)) == (1, 0, 4)
    assert node.name
    assert node.version
    assert node.driver_version
    holder, *others = node.gpus
    assert (holder.uuid, list(holder.job_ids)) == (job.attempts[0].gpus[0], [job.id])
    assert (holder.state, word(holder.reason)) == (node_pb2.GPU_STATE_ALLOCATED, "GPU_HELD")
    assert {gpu.state for gpu in others} == {node_pb2.GPU_STATE_FREE}
    assert [gpu.index for gpu in node.gpus] == [0, 1, 2, 3]
    for gpu in node.gpus:
        assert gpu.model == "NVIDIA H100 80GB HBM3"
        assert gpu.uuid.startswith("GPU-")
        assert 0 < gpu.memory_used_mib < gpu.memory_total_mib
        assert gpu.power_limit_w_min < gpu.power_limit_w <= gpu.power_limit_w_max
        assert gpu.HasField("energy_j")


def test_nothing_new_starts_on_a_cordoned_gpu_and_what_runs_there_goes_on(daemon: Daemon) -> None:
    job = daemon.run("sleep", "600")
    uuid = job.attempts[0].gpus[0]
    request = node_service_pb2.CordonGpuRequest(gpu=uuid[:12].lower(), reason="fan")
    for _ in range(2):
        gpu = daemon.node.CordonGpu(request).gpu
        assert (gpu.uuid, gpu.state, gpu.detail) == (uuid, node_pb2.GPU_STATE_CORDONED, "fan")
    assert daemon.submit("sleep", "600", gpus=4).state == PENDING
    others = [daemon.run("sleep", "600") for _ in range(3)]
    assert daemon.submit("sleep", "600").state == PENDING
    assert uuid not in {gpu for other in others for gpu in other.attempts[0].gpus}
    assert daemon.get(job.id).state == RUNNING
    daemon.node.UncordonGpu(node_service_pb2.UncordonGpuRequest(gpu=uuid))


def test_uncordoning_lets_the_waiting_start(daemon: Daemon) -> None:
    for index in range(4):
        daemon.node.CordonGpu(node_service_pb2.CordonGpuRequest(gpu=str(index)))
    job = daemon.submit("sleep", "600", gpus=4)
    assert job.state == PENDING
    for index in range(4):
        daemon.node.UncordonGpu(node_service_pb2.UncordonGpuRequest(gpu=str(index)))
    daemon.wait(job.id, RUNNING)


def test_a_drain_starts_nothing_and_stops_nothing_unless_told(daemon: Daemon) -> None:
    runs = daemon.run("sleep", "600")
    daemon.node.DrainNode(node_service_pb2.DrainNodeRequest())
    waits = daemon.submit("sleep", "600")
    assert (waits.state, daemon.get(runs.id).state) == (PENDING, RUNNING)
    daemon.node.DrainNode(node_service_pb2.DrainNodeRequest(stop_jobs=True))
    job = daemon.wait(runs.id, PENDING)
    assert (word(job.attempts[-1].end_reason), job.preemptions) == ("NODE_DRAINED", 0)
    assert reason_of(job) == "NODE_DRAINING", "what it waits for"
    assert daemon.get_node().live_jobs == 0
    daemon.node.UndrainNode(node_service_pb2.UndrainNodeRequest())
    daemon.wait_attempt(runs.id, 2)
    daemon.wait(waits.id, RUNNING)


def test_a_release_waits_until_no_job_holds_a_gpu(daemon: Daemon) -> None:
    job = daemon.run("sleep", "600")
    told = refusal(lambda: daemon.node.ReleaseNode(node_service_pb2.ReleaseNodeRequest()))
    assert told.code is grpc.StatusCode.FAILED_PRECONDITION
    assert job.id in told.message
    daemon.cancel(job.id)
    daemon.wait(job.id)
    node = daemon.node.ReleaseNode(node_service_pb2.ReleaseNodeRequest()).node
    assert (node.released, node.draining) == (True, True)
    assert daemon.submit("true").state == PENDING
    assert daemon.node.DrainNode(node_service_pb2.DrainNodeRequest()).node.released, "a drain ends no release"
    node = daemon.node.UndrainNode(node_service_pb2.UndrainNodeRequest()).node
    assert (node.released, node.draining) == (False, False)
    until("it has run", lambda: not daemon.all_jobs(active_only=True))


# Usage -----------------------------------------------------------------------------------------


def usage_by_job(daemon: Daemon) -> dict[str, Any]:
    request = usage_service_pb2.ListUsageRequest(group_by=usage_service_pb2.USAGE_GROUP_JOB, page_size=1000)
    return {row.key: row for row in daemon.usage.ListUsage(request, timeout=CALL_S).usage}


def test_usage_of_a_job_is_the_time_that_it_held_its_gpus(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    victim = daemon.run("sleep", "600", job_class="mining", gpus=4, tenant="amber", gpu_memory_mib=1000)
    until("it draws power", lambda: daemon.get_node().gpus[0].power_w > 100)
    job = daemon.finish("sleep", "0.5", job_class="inference", gpus=2, tenant="blue")
    share = daemon.finish("sleep", "0.5", gpu_share_milli=250, job_class="inference")
    daemon.cancel(victim.id)
    daemon.wait(victim.id)
    assert daemon.terminate() == 0
    daemon.start()
    usage = usage_by_job(daemon)
    for one, gpus in ((daemon.get(victim.id), 4), (job, 2), (share, 0.25)):
        held_s = sum(a.exited_at.ToNanoseconds() - a.decided_at.ToNanoseconds() for a in one.attempts) / 1e9
        assert usage[one.id].gpu_seconds == pytest.approx(gpus * held_s, rel=0.1, abs=0.1)
    assert usage[victim.id].preemptions == daemon.get(victim.id).preemptions >= 1
    assert usage[victim.id].energy_wh > 0
    by_class = daemon.usage.ListUsage(usage_service_pb2.ListUsageRequest()).usage
    assert {row.key for row in by_class} >= {"IDLE", "MINING", "INFERENCE", "BATCH"} - {"BATCH"}
    by_tenant = usage_service_pb2.ListUsageRequest(group_by=usage_service_pb2.USAGE_GROUP_TENANT)
    assert {row.key for row in daemon.usage.ListUsage(by_tenant).usage} >= {"amber", "blue"}


def test_usage_of_a_job_that_ended_survives_a_crash(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="1xT4").start()
    job = daemon.finish("sleep", "0.3")
    daemon.restart()
    assert daemon.terminate() == 0
    daemon.start()
    assert usage_by_job(daemon)[job.id].gpu_seconds > 0.2


# Health, reflection, metrics -------------------------------------------------------------------


def test_health_says_serving_for_all_and_for_each_service(daemon: Daemon) -> None:
    stub = health_pb2_grpc.HealthStub(daemon.channel)
    for name in ("", *SERVICES):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=CALL_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    unknown = health_pb2.HealthCheckRequest(service="nonsense")
    assert refusal(lambda: stub.Check(unknown, timeout=CALL_S)).code is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(daemon: Daemon) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([ask]), timeout=CALL_S)
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {*SERVICES, "grpc.health.v1.Health"}


def test_health_pages_answer(daemon: Daemon) -> None:
    assert daemon.metrics("/healthz") == "ok\n"
    assert daemon.metrics("/readyz") == "ready\n"
    for path, code in (("/", 404), ("/metrics/../etc/passwd", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            daemon.metrics(path)
        with caught.value as error:
            assert error.code == code


def test_each_move_of_a_job_is_counted_once(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="1xT4").start()
    victim = daemon.run("sleep", "600", job_class="mining")
    daemon.finish("true", job_class="inference")
    daemon.wait_attempt(victim.id, 2)
    until("the counters are there", lambda: 'state="succeeded"' in daemon.metrics())
    counts = {
        match[1]: float(match[2])
        for match in re.finditer(r"^wattshift_(\S+) (\S+)$", daemon.metrics(), flags=re.MULTILINE)
    }
    inference = 'job_transitions_total{{class="inference",reason="{}",state="{}"}}'
    assert counts[inference.format("exited_zero", "succeeded")] == 1
    assert counts[inference.format("started_after_preemption", "starting")] == 1
    mining = 'job_transitions_total{{class="mining",reason="{}",state="{}"}}'
    assert counts[mining.format("preempted_by_higher_rank", "preempting")] == 1
    assert counts[mining.format("requeued_after_preemption", "pending")] == 1
    assert counts[mining.format("process_started", "running")] == 2
    labels = 'preemptor_class="inference",reason="preempted_by_higher_rank",victim_class="mining"'
    assert counts[f"preemptions_total{{{labels}}}"] == 1
    assert counts['preemption_stage_seconds_count{stage="total",victim_class="mining"}'] == 1


def test_a_watch_that_its_client_cancels_is_counted(daemon: Daemon) -> None:
    stream = watch(daemon)
    submit_many(daemon, 1, gpus=4)
    next(stream)
    stream.cancel()
    line = 'wattshift_rpc_requests_total{code="CANCELLED",method="WatchJobs"}'
    until("it is counted", lambda: line in daemon.metrics(), 5.0)


def test_labels_name_no_job_tenant_or_path(daemon: Daemon) -> None:
    job = daemon.finish("true", name="label-name", tenant="label-tenant")
    page = daemon.metrics()
    for word_ in ("label-name", "label-tenant", f'"{job.id}"', str(daemon.directory)):
        assert word_ not in page


# Bad HTTP clients ------------------------------------------------------------------------------


def http_socket(daemon: Daemon) -> socket.socket:
    return socket.create_connection(("127.0.0.1", daemon.metrics_port), timeout=CALL_S)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 1000 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\n\r\n",
        b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
    ],
    ids=["zeros", "no path", "no version", "a POST", "a long path", "TLS", "endless headers"],
)
def test_garbage_on_the_metrics_port_harms_nobody(daemon: Daemon, data: bytes) -> None:
    with http_socket(daemon) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
        except (ConnectionError, BrokenPipeError):
            pass
    assert daemon.metrics("/healthz") == "ok\n"
    assert "Traceback" not in daemon.log()


def test_slow_readers_and_writers_do_not_keep_prometheus_away(daemon: Daemon) -> None:
    clients = [http_socket(daemon) for _ in range(40)]
    try:
        for number, client in enumerate(clients):
            client.sendall(b"GET /metrics HTTP/1.1\r\n" + (b"\r\n" if number % 2 else b""))
        assert "wattshift_gpu_info" in daemon.metrics()
        assert daemon.get_node().gpus
    finally:
        for client in clients:
            client.close()


def test_scrapers_beyond_the_limit_are_refused_at_once_and_not_for_good(daemon: Daemon) -> None:
    idle = [http_socket(daemon) for _ in range(CONNECTIONS_MAX)]
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            daemon.metrics()
        assert (caught.value.code, caught.value.read()) == (503, b"too many connections\n")
    finally:
        for client in idle:
            client.close()
    until("there is room again", lambda: reads(daemon))


def reads(daemon: Daemon) -> bool:
    try:
        return "wattshift_gpu_info" in daemon.metrics()
    except urllib.error.HTTPError:
        return False


def test_many_scrapes_at_once_are_all_answered(daemon: Daemon) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: len(daemon.metrics()), range(64)))
    assert min(found) > 1000


def test_a_thousand_connections_leave_room_for_one_more(daemon: Daemon) -> None:
    path = daemon.address.removeprefix("unix://")
    idle = []
    try:
        for _ in range(1000):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(CALL_S)
            client.connect(path)
            idle.append(client)
        with daemon.open_channel(("grpc.use_local_subchannel_pool", 1)) as channel:
            ready = threading.Event()
            channel.subscribe(
                lambda state: ready.set() if state is grpc.ChannelConnectivity.READY else None, True
            )
            assert ready.wait(CALL_S)
    finally:
        for client in idle:
            client.close()
    assert "Traceback" not in daemon.log()
