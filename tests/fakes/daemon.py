"""A daemon for the tests of the command: real gRPC over a Unix socket, jobs that do as the test says."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from scheduler.v1 import (
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    node_pb2,
    node_service_pb2,
    node_service_pb2_grpc,
    power_pb2,
    power_report_pb2,
    power_service_pb2,
    power_service_pb2_grpc,
    reason_pb2,
    usage_pb2,
    usage_service_pb2,
    usage_service_pb2_grpc,
)

FINAL = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})
GIB_MIB = 1024


class FakeDaemon:
    """Serves all services; what it was asked is in `requests`, by method."""

    def __init__(self, socket: Path) -> None:
        self.address = f"unix://{socket}"
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.jobs: dict[str, job_pb2.Job] = {}
        self.logs: dict[tuple[str, int], list[bytes]] = defaultdict(list)  # by attempt
        self.dropped_pieces = 0
        self.node = node_of(2)
        self.usage: list[usage_pb2.Usage] = []
        self.report: power_report_pb2.GridEventReport | None = None
        self.power = power_of(2)
        self.events: list[power_pb2.GridEvent] = []
        self.refusals: dict[str, list[tuple[grpc.StatusCode, str, Any]]] = defaultdict(list)
        self.dropped: set[str] = set()
        self.revision_kept_first = 0
        self.changed = threading.Condition()
        self.revision = 0
        self.closing = False
        self._server = self._listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End as a daemon that is stopped: open streams are cut."""
        stopped = self._server.stop(grace=None)  # first, so that no stream ends as if done
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        stopped.wait()

    def restart(self) -> None:
        """Listen again at the same address, with the same state."""
        self.closing = False
        self._server = self._listen()

    def _listen(self) -> grpc.Server:
        server = grpc.server(futures.ThreadPoolExecutor(16))
        job_service_pb2_grpc.add_JobServiceServicer_to_server(_Jobs(self), server)
        node_service_pb2_grpc.add_NodeServiceServicer_to_server(_Node(self), server)
        power_service_pb2_grpc.add_PowerServiceServicer_to_server(_Power(self), server)
        usage_service_pb2_grpc.add_UsageServiceServicer_to_server(_Usage(self), server)
        assert server.add_insecure_port(self.address)
        server.start()
        return server

    def add(self, job: job_pb2.Job) -> job_pb2.Job:
        """Put a job there, or its new state."""
        with self.changed:
            self.revision += 1
            job.revision = self.revision
            self.jobs[job.id] = job
            self.changed.notify_all()
        return job

    def end(self, job_id: str, state: str, exit_code: int | None = None, reason: str = "EXITED_ZERO") -> None:
        """End a job."""
        job = job_pb2.Job()
        job.CopyFrom(self.jobs[job_id])
        job.state = job_pb2.JobState.Value(f"JOB_STATE_{state}")
        job.reason = reason_pb2.Reason.Value(f"REASON_{reason}")
        job.finished_at.FromNanoseconds(time.time_ns())
        if exit_code is not None:
            job.exit_code = exit_code
        self.add(job)

    def write(self, job_id: str, data: bytes, attempt: int = 1) -> None:
        """Let an attempt write to its log."""
        with self.changed:
            self.logs[job_id, attempt].append(data)
            self.changed.notify_all()

    def refuse(self, method: str, code: grpc.StatusCode, message: str, detail: Any = None) -> None:
        """Refuse the next call of a method."""
        self.refusals[method].append((code, message, detail))

    def drop(self, method: str) -> None:
        """Do what the next call of a method asks, and lose its answer with the connection."""
        self.dropped.add(method)

    def answer(self, method: str, message: Any, context: grpc.ServicerContext) -> Any:
        """The answer, unless it is lost."""
        if method in self.dropped:
            self.dropped.remove(method)
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")  # as gRPC tells it to the client
        return message

    def heard(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        """Note a call, and refuse it where the test wants that."""
        with self.changed:
            self.requests[method].append(request)
            self.changed.notify_all()
        if self.refusals[method]:
            abort(context, *self.refusals[method].pop(0))

    def wait_until_heard(self, method: str, times: int = 1) -> None:
        """Wait until a method was called so often."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.requests[method]) >= times, timeout=10), method

    def job(self, job_id: str, context: grpc.ServicerContext) -> job_pb2.Job:
        """The job, or NOT_FOUND."""
        if job_id not in self.jobs:
            abort(context, grpc.StatusCode.NOT_FOUND, f"no job {job_id!r}; `wattshift jobs --all` lists them")
        return self.jobs[job_id]


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, detail: Any = None) -> None:
    """End a call as the daemon does: the status with its details in the trailing metadata."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if detail is not None:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


def violation(field: str, description: str) -> error_details_pb2.BadRequest:
    """A wrong field."""
    wrong = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return error_details_pb2.BadRequest(field_violations=[wrong])


def job_of(job_id: str, state: str = "RUNNING", job_class: str = "BATCH", **fields: Any) -> job_pb2.Job:
    """A job in a state, submitted two minutes ago."""
    job = job_pb2.Job(id=job_id, state=f"JOB_STATE_{state}", priority=500, **fields)
    setattr(job, "class", job_pb2.JobClass.Value(f"JOB_CLASS_{job_class}"))
    job.name = job.name or "work"
    job.spec.gpus = job.spec.gpus if job.spec.HasField("gpus") else 1
    now_s = int(time.time())
    job.submitted_at.seconds = now_s - 120
    job.state_since.seconds = now_s - 60
    return job


def node_of(gpus: int) -> node_pb2.Node:
    """A node with so many GPUs; the first is held by job-1."""
    node = node_pb2.Node(name="node1", version="0.1.0", simulated=True, live_jobs=1, pending_jobs=2)
    for index in range(gpus):
        gpu = node.gpus.add(
            uuid=f"GPU-{index:08x}-1111-2222-3333-444455556666",
            index=index,
            model="NVIDIA H100 80GB HBM3",
            state="GPU_STATE_FREE" if index else "GPU_STATE_ALLOCATED",
            job_ids=[] if index else ["job-1"],
            memory_total_mib=80 * GIB_MIB,
            memory_used_mib=0 if index else 40 * GIB_MIB,
            power_w=70 if index else 650,
            power_limit_w=700,
        )
        if index == 0:
            gpu.utilization_ratio = 0.97
            gpu.temperature_celsius = 61
        gpu.sampled_at.FromNanoseconds(time.time_ns())
    return node


def power_of(gpus: int) -> power_pb2.Power:
    """The power of a node under a budget; the first GPU is loaded, the others can't be set."""
    power = power_pb2.Power(budget_w=1500.5, draw_w=730, committed_w=900, floor_w=240, base_w=100, pue=1)
    power.sources.add(kind=power_pb2.BUDGET_KIND_REQUESTED, budget_w=1500.5)
    for index in range(gpus):
        gpu = power.gpus.add(
            uuid=f"GPU-{index:08x}-1111-2222-3333-444455556666",
            index=index,
            draw_w=70 if index else 560,
            limit_w=700 if index else 616,
            limit_w_min=200,
            limit_w_max=700,
        )
        if index:
            gpu.refusal = "no permission"
        else:
            gpu.limit_w_found = 700
    return power


class _Jobs(job_service_pb2_grpc.JobServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    def _accept(self, request: job_service_pb2.SubmitJobRequest) -> job_pb2.Job:
        known = [job for job in self.daemon.jobs.values() if job.request_id == request.request_id]
        if known:
            return known[0]
        job = job_of(f"job-{len(self.daemon.jobs) + 1}", "PENDING", request_id=request.request_id)
        job.name = request.spec.name or request.spec.command[0]
        setattr(job, "class", getattr(request.spec, "class"))
        job.spec.CopyFrom(request.spec)
        job.reason = reason_pb2.REASON_WAITING_FOR_GPUS
        return self.daemon.add(job)

    def SubmitJob(self, request: Any, context: Any) -> Any:
        self.daemon.heard("SubmitJob", request, context)
        answer = job_service_pb2.SubmitJobResponse(job=self._accept(request))
        return self.daemon.answer("SubmitJob", answer, context)

    def SubmitJobs(self, request: Any, context: Any) -> Any:
        self.daemon.heard("SubmitJobs", request, context)
        return job_service_pb2.SubmitJobsResponse(job_ids=[self._accept(one).id for one in request.jobs])

    def PreviewJob(self, request: Any, context: Any) -> Any:
        self.daemon.heard("PreviewJob", request, context)
        answer = job_service_pb2.PreviewJobResponse(
            gpus=[self.daemon.node.gpus[0].uuid],
            start_within_s=10,
            summary="would start within 10s, after job-1 has stopped",
        )
        victim = answer.victims.add(job_id="job-1", name="miner", gpus=answer.gpus, grace_s=2, handover_s=26)
        setattr(victim, "class", job_pb2.JOB_CLASS_MINING)
        victim.lost_gpu_seconds = 31
        victim.loss_usd = 0.0004
        return answer

    def GetJob(self, request: Any, context: Any) -> Any:
        self.daemon.heard("GetJob", request, context)
        return job_service_pb2.GetJobResponse(job=self.daemon.job(request.job_id, context))

    def ListJobs(self, request: Any, context: Any) -> Any:
        # The client fills in the same message for the next page.
        kept = job_service_pb2.ListJobsRequest()
        kept.CopyFrom(request)
        self.daemon.heard("ListJobs", kept, context)
        newest_first = [
            job
            for job in reversed(self.daemon.jobs.values())
            if not (request.active_only and job.state in FINAL)
            and (not request.states or job.state in request.states)
        ]
        start = int(request.page_token or 0)
        page = newest_first[start : start + (request.page_size or 100)]
        more = start + len(page) < len(newest_first)
        return job_service_pb2.ListJobsResponse(
            jobs=page, next_page_token=str(start + len(page)) if more else ""
        )

    def WatchJobs(self, request: Any, context: Any) -> Iterator[Any]:
        daemon = self.daemon
        daemon.heard("WatchJobs", request, context)
        if 0 < request.since_revision < daemon.revision_kept_first:
            abort(context, grpc.StatusCode.OUT_OF_RANGE, f"revision {request.since_revision} is not kept")
        for job_id in request.job_ids:
            daemon.job(job_id, context)
        sent = request.since_revision
        first = True
        while True:
            with daemon.changed:
                fresh = [
                    job
                    for job in sorted(daemon.jobs.values(), key=lambda job: job.revision)
                    if job.revision > sent and (not request.job_ids or job.id in request.job_ids)
                ]
                if not fresh and not first:
                    daemon.changed.wait(timeout=0.2)
            if daemon.closing or not context.is_active():
                return
            for index, job in enumerate(fresh, start=1):
                sent = job.revision
                yield job_service_pb2.WatchJobsResponse(
                    job=job, revision=sent, synced=first and index == len(fresh)
                )
            if first and not fresh:
                yield job_service_pb2.WatchJobsResponse(revision=max(sent, daemon.revision), synced=True)
            first = False

    def CancelJob(self, request: Any, context: Any) -> Any:
        self.daemon.heard("CancelJob", request, context)
        job = self.daemon.job(request.job_id, context)
        if job.state in FINAL:
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, f"{job.id} is finished")
        self.daemon.end(job.id, "CANCELLED", reason="CANCELLED_BY_REQUEST")
        return job_service_pb2.CancelJobResponse(job=self.daemon.jobs[job.id])

    def RequeueJob(self, request: Any, context: Any) -> Any:
        self.daemon.heard("RequeueJob", request, context)
        answer = job_service_pb2.RequeueJobResponse(job=self.daemon.job(request.job_id, context))
        return self.daemon.answer("RequeueJob", answer, context)

    def ExplainJob(self, request: Any, context: Any) -> Any:
        self.daemon.heard("ExplainJob", request, context)
        answer = job_service_pb2.ExplainJobResponse(
            job=self.daemon.job(request.job_id, context),
            reason="REASON_WAITING_FOR_GPUS",
            summary="It wants 2 GPUs; 1 is free.",
            obstacles=[
                job_service_pb2.Obstacle(reason="REASON_GPU_HELD", gpus=1, detail="job-9 ranks higher")
            ],
            remedies=["job-9 ends", "a higher priority than 700"],
            awaited=["job-4"],
            ahead=3,
        )
        answer.since.FromNanoseconds(time.time_ns())
        return answer

    def ReadLogs(self, request: Any, context: Any) -> Iterator[Any]:
        daemon = self.daemon
        daemon.heard("ReadLogs", request, context)
        job = daemon.job(request.job_id, context)
        attempt = request.attempt or job.attempt or 1
        sent = 0
        while True:
            with daemon.changed:
                written = b"".join(daemon.logs[request.job_id, attempt])
                job = daemon.jobs[request.job_id]
                ended = job.state in FINAL or job.attempt > attempt
                if len(written) == sent and not ended and request.follow:
                    daemon.changed.wait(timeout=0.2)
            if daemon.closing or not context.is_active():
                return
            data = written[sent:][-request.tail_bytes :] if not sent else written[sent:]
            sent = len(written)
            if data:
                yield job_service_pb2.ReadLogsResponse(
                    data=data, attempt=attempt, dropped_pieces=daemon.dropped_pieces
                )
            if ended or not request.follow:
                return


class _Node(node_service_pb2_grpc.NodeServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    def GetNode(self, request: Any, context: Any) -> Any:
        self.daemon.heard("GetNode", request, context)
        return node_service_pb2.GetNodeResponse(node=self.daemon.node)

    def WatchNode(self, request: Any, context: Any) -> Iterator[Any]:
        self.daemon.heard("WatchNode", request, context)
        while context.is_active() and not self.daemon.closing:
            yield node_service_pb2.WatchNodeResponse(node=self.daemon.node)
            with self.daemon.changed:
                self.daemon.changed.wait(timeout=0.2)

    def _gpu(self, name: str, context: Any) -> node_pb2.Gpu:
        found = [gpu for gpu in self.daemon.node.gpus if name in (str(gpu.index), gpu.uuid)]
        if not found:
            abort(context, grpc.StatusCode.NOT_FOUND, f"no GPU {name!r}; `wattshift gpus` lists them")
        return found[0]

    def CordonGpu(self, request: Any, context: Any) -> Any:
        self.daemon.heard("CordonGpu", request, context)
        gpu = self._gpu(request.gpu, context)
        gpu.state = node_pb2.GPU_STATE_CORDONED
        gpu.reason = reason_pb2.REASON_CORDONED_BY_OPERATOR
        gpu.detail = request.reason
        return node_service_pb2.CordonGpuResponse(gpu=gpu)

    def UncordonGpu(self, request: Any, context: Any) -> Any:
        self.daemon.heard("UncordonGpu", request, context)
        gpu = self._gpu(request.gpu, context)
        gpu.state = node_pb2.GPU_STATE_FREE
        return node_service_pb2.UncordonGpuResponse(gpu=gpu)

    def DrainNode(self, request: Any, context: Any) -> Any:
        self.daemon.heard("DrainNode", request, context)
        self.daemon.node.draining = True
        return node_service_pb2.DrainNodeResponse(node=self.daemon.node)

    def UndrainNode(self, request: Any, context: Any) -> Any:
        self.daemon.heard("UndrainNode", request, context)
        self.daemon.node.draining = self.daemon.node.released = False
        return node_service_pb2.UndrainNodeResponse(node=self.daemon.node)

    def ReleaseNode(self, request: Any, context: Any) -> Any:
        self.daemon.heard("ReleaseNode", request, context)
        self.daemon.node.draining = self.daemon.node.released = True
        return node_service_pb2.ReleaseNodeResponse(node=self.daemon.node)


class _Usage(usage_service_pb2_grpc.UsageServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    def ListUsage(self, request: Any, context: Any) -> Any:
        kept = usage_service_pb2.ListUsageRequest()
        kept.CopyFrom(request)
        self.daemon.heard("ListUsage", kept, context)
        start = int(request.page_token or 0)
        page = self.daemon.usage[start : start + 2]  # small pages: the command must ask on
        more = start + len(page) < len(self.daemon.usage)
        return usage_service_pb2.ListUsageResponse(
            usage=page, next_page_token=str(start + len(page)) if more else ""
        )


class _Power(power_service_pb2_grpc.PowerServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    def GetPower(self, request: Any, context: Any) -> Any:
        self.daemon.heard("GetPower", request, context)
        return power_service_pb2.GetPowerResponse(power=self.daemon.power)

    def SetPowerBudget(self, request: Any, context: Any) -> Any:
        self.daemon.heard("SetPowerBudget", request, context)
        return power_service_pb2.SetPowerBudgetResponse(power=self.daemon.power)

    def SubmitGridEvent(self, request: Any, context: Any) -> Any:
        self.daemon.heard("SubmitGridEvent", request, context)
        event = power_pb2.GridEvent()
        event.CopyFrom(request.event)
        event.state = power_pb2.SHED_STATE_SCHEDULED
        if not event.HasField("start"):
            event.start.FromNanoseconds(time.time_ns())
        self.daemon.events.append(event)
        return power_service_pb2.SubmitGridEventResponse(event=event)

    def CancelGridEvent(self, request: Any, context: Any) -> Any:
        self.daemon.heard("CancelGridEvent", request, context)
        found = [event for event in self.daemon.events if event.id == request.event_id]
        if not found:
            abort(context, grpc.StatusCode.NOT_FOUND, f"no grid event {request.event_id!r}")
        found[0].state = power_pb2.SHED_STATE_CANCELLED
        return power_service_pb2.CancelGridEventResponse(event=found[0])

    def GetGridEventReport(self, request: Any, context: Any) -> Any:
        self.daemon.heard("GetGridEventReport", request, context)
        if self.daemon.report is None:
            abort(context, grpc.StatusCode.NOT_FOUND, f"no grid event {request.event_id!r}")
        return power_service_pb2.GetGridEventReportResponse(report=self.daemon.report)

    def ListGridEvents(self, request: Any, context: Any) -> Any:
        self.daemon.heard("ListGridEvents", request, context)
        return power_service_pb2.ListGridEventsResponse(events=self.daemon.events)
