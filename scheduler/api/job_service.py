"""JobService: jobs over gRPC."""

import hashlib
from collections.abc import AsyncIterator, Iterable

from scheduler.api import convert, explaining, submission
from scheduler.api.logs import LogReader
from scheduler.api.rpc import Context, stream, unary
from scheduler.control import inbox
from scheduler.control.admission import check_feasible
from scheduler.control.commands import environment_digest
from scheduler.control.loop import Controller
from scheduler.effects.journal import JobFilter
from scheduler.errors import FieldViolation, InvalidRequest, NotFound, RevisionGone
from scheduler.model.jobs import FINAL_STATES, Job, JobSpec, job_number
from scheduler.model.policy import aged_priority
from scheduler.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

BATCH_MAX = 10_000
PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000
WATCHED_IDS_MAX = 10_000


class JobService(job_service_pb2_grpc.JobServiceServicer):
    """Turns messages into commands and looks; decides nothing."""

    def __init__(self, controller: Controller, logs: LogReader) -> None:
        self._control = controller
        self._logs = logs
        self.meters = controller.meters

    @unary
    async def SubmitJob(
        self, request: job_service_pb2.SubmitJobRequest, context: Context
    ) -> job_service_pb2.SubmitJobResponse:
        wanted = self._submission(request, "", {})
        (job,) = await self._control.ask(inbox.Submit((wanted,)))
        return job_service_pb2.SubmitJobResponse(job=self._job(job))

    @unary
    async def SubmitJobs(
        self, request: job_service_pb2.SubmitJobsRequest, context: Context
    ) -> job_service_pb2.SubmitJobsResponse:
        if not 1 <= len(request.jobs) <= BATCH_MAX:
            raise InvalidRequest(
                FieldViolation("jobs", f"has {len(request.jobs)} jobs; give 1 to {BATCH_MAX}")
            )
        read: dict[bytes, tuple[JobSpec, dict[str, str]]] = {}
        submissions = tuple(self._submission(one, f"jobs[{i}].", read) for i, one in enumerate(request.jobs))
        jobs = await self._control.ask(inbox.Submit(submissions))
        return job_service_pb2.SubmitJobsResponse(job_ids=[job.id for job in jobs])

    @unary
    async def PreviewJob(
        self, request: job_service_pb2.PreviewJobRequest, context: Context
    ) -> job_service_pb2.PreviewJobResponse:
        spec, _ = self._read(request.spec, "spec.")
        return explaining.preview(self._control, spec)

    @unary
    async def GetJob(
        self, request: job_service_pb2.GetJobRequest, context: Context
    ) -> job_service_pb2.GetJobResponse:
        return job_service_pb2.GetJobResponse(job=self._job(self._find(request.job_id)))

    @unary
    async def ListJobs(
        self, request: job_service_pb2.ListJobsRequest, context: Context
    ) -> job_service_pb2.ListJobsResponse:
        size = page_size(request.page_size)
        states = submission.job_states(request.states, "states")
        if request.active_only and any(state in FINAL_STATES for state in states):
            raise InvalidRequest(FieldViolation("active_only", "can't be combined with final states"))
        which = JobFilter(
            states=states,
            classes=submission.job_classes(request.classes, "classes"),
            name=request.name,
            tenant=request.tenant,
            active_only=request.active_only,
            before=_page_start(request.page_token),
            limit=size + 1,
        )
        jobs = self._control.effects.journal.jobs(which)
        more = len(jobs) > size
        return job_service_pb2.ListJobsResponse(
            jobs=[self._job(job) for job in jobs[:size]],
            next_page_token=jobs[size - 1].id if more else "",
        )

    @stream
    async def WatchJobs(
        self, request: job_service_pb2.WatchJobsRequest, context: Context
    ) -> AsyncIterator[job_service_pb2.WatchJobsResponse]:
        numbers = self._watched(request.job_ids)
        control = self._control
        subscription = control.watchers.watch_jobs(numbers)
        try:
            initial = self._initial(request.since_revision, numbers)
            for index, job in enumerate(initial, 1):
                yield job_service_pb2.WatchJobsResponse(
                    job=self._job(job), revision=job.revision, synced=index == len(initial)
                )
            if not initial:
                yield job_service_pb2.WatchJobsResponse(revision=control.effects.journal.head, synced=True)
            del initial
            while True:
                for job in await subscription.take():
                    yield job_service_pb2.WatchJobsResponse(job=self._job(job), revision=job.revision)
        finally:
            control.watchers.leave(subscription)

    @unary
    async def CancelJob(
        self, request: job_service_pb2.CancelJobRequest, context: Context
    ) -> job_service_pb2.CancelJobResponse:
        job = inbox.asked_job(await self._control.ask(inbox.Cancel(request.job_id)))
        return job_service_pb2.CancelJobResponse(job=self._job(job))

    @unary
    async def RequeueJob(
        self, request: job_service_pb2.RequeueJobRequest, context: Context
    ) -> job_service_pb2.RequeueJobResponse:
        job = inbox.asked_job(await self._control.ask(inbox.Requeue(request.job_id)))
        return job_service_pb2.RequeueJobResponse(job=self._job(job))

    @unary
    async def ExplainJob(
        self, request: job_service_pb2.ExplainJobRequest, context: Context
    ) -> job_service_pb2.ExplainJobResponse:
        job = self._find(request.job_id)
        return explaining.explain(self._control, job, self._job(job))

    @stream
    async def ReadLogs(
        self, request: job_service_pb2.ReadLogsRequest, context: Context
    ) -> AsyncIterator[job_service_pb2.ReadLogsResponse]:
        job = self._find(request.job_id)
        async for message in self._logs.read(job, request):
            yield message

    @unary
    async def AcknowledgePreemption(
        self, request: job_service_pb2.AcknowledgePreemptionRequest, context: Context
    ) -> job_service_pb2.AcknowledgePreemptionResponse:
        command = inbox.Acknowledge(request.job_id, request.attempt)
        job = inbox.asked_job(await self._control.ask(command))
        return job_service_pb2.AcknowledgePreemptionResponse(job=self._job(job))

    @unary
    async def ReportCheckpoint(
        self, request: job_service_pb2.ReportCheckpointRequest, context: Context
    ) -> job_service_pb2.ReportCheckpointResponse:
        command = inbox.SaveCheckpoint(request.job_id, request.attempt)
        job = inbox.asked_job(await self._control.ask(command))
        return job_service_pb2.ReportCheckpointResponse(job=self._job(job))

    def _submission(
        self,
        request: job_service_pb2.SubmitJobRequest,
        prefix: str,
        read: dict[bytes, tuple[JobSpec, dict[str, str]]],
    ) -> inbox.Submission:
        """What the request asks for; `read` has what equal specifications of the same call came to."""
        if len(request.request_id) > submission.REQUEST_ID_CHARS_MAX:
            limit = submission.REQUEST_ID_CHARS_MAX
            raise InvalidRequest(FieldViolation(prefix + "request_id", f"is longer than {limit} characters"))
        typed = request.spec.SerializeToString(deterministic=True)
        digest, unknown_at = "", -1
        if request.request_id:
            digest = hashlib.sha256(self._control.effects.journal.salt() + typed).hexdigest()
            ledger = self._control.ledger
            known = ledger.request(request.request_id)
            if known is None:
                unknown_at = ledger.journal.head
            job = ledger.job(known[0]) if known is not None and known[1] == digest else None
            if job is not None:  # not judged again: its deadline may be over, its GPU gone
                return inbox.Submission(job.spec, {}, request.request_id, digest)
        if typed not in read:
            read[typed] = self._read(request.spec, prefix + "spec.")
        spec, environment = read[typed]
        return inbox.Submission(spec, environment, request.request_id, digest, unknown_at)

    def _read(self, message: job_pb2.JobSpec, prefix: str) -> tuple[JobSpec, dict[str, str]]:
        control = self._control
        config, now_s = control.config, control.effects.clock.now_s()
        spec, environment = submission.job_spec(message, config.policy, config.jobs, now_s, prefix)
        check_feasible(spec, control.board, prefix)
        if environment:
            digest = environment_digest(control.effects.journal.salt(), environment)
            spec = submission.with_environment_digest(spec, digest)
        return spec, environment

    def _find(self, job_id: str) -> Job:
        job = self._control.ledger.by_id(job_id)
        if job is None:
            raise NotFound("job", job_id, "`wattshift jobs --all` lists them")
        return job

    def _job(self, job: Job) -> job_pb2.Job:
        policy = self._control.config.policy
        priority = aged_priority(job.spec.job_class, job.spec.priority, job.preemptions, policy)
        return convert.job(job, priority, self._control.reason(job))

    def _initial(self, since_revision: int, numbers: frozenset[int]) -> list[Job]:
        """What a watch begins with: all that is there, or what changed since a revision."""
        control = self._control
        if not since_revision:
            wanted = (
                [control.ledger.job(number) for number in sorted(numbers)]
                if numbers
                else control.ledger.jobs.values()
            )
            return sorted((job for job in wanted if job is not None), key=lambda job: job.revision)
        journal = control.effects.journal
        if not journal.watch_floor <= since_revision <= journal.head:
            raise RevisionGone(
                f"revision {since_revision} is not kept; there are {journal.watch_floor} to {journal.head}. "
                "Watch again without since_revision"
            )
        return [job for job in journal.jobs_since(since_revision) if not numbers or job.number in numbers]

    def _watched(self, job_ids: Iterable[str]) -> frozenset[int]:
        ids = list(job_ids)
        if len(ids) > WATCHED_IDS_MAX:
            raise InvalidRequest(
                FieldViolation("job_ids", f"names {len(ids)} jobs; give at most {WATCHED_IDS_MAX}")
            )
        return frozenset(self._find(job_id).number for job_id in ids)


def page_size(wanted: int) -> int:
    """The page size that a request asks for."""
    if not 0 <= wanted <= PAGE_SIZE_MAX:
        raise InvalidRequest(FieldViolation("page_size", f"is {wanted}; give 1 to {PAGE_SIZE_MAX}, or 0"))
    return wanted or PAGE_SIZE_DEFAULT


def _page_start(token: str) -> int | None:
    if not token:
        return None
    number = job_number(token)
    if number is None:
        raise InvalidRequest(
            FieldViolation("page_token", "is not one of ours; give next_page_token of the page before")
        )
    return number
