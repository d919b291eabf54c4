"""ReadLogs: what a job wrote, as a stream of pieces."""

from collections.abc import AsyncIterator
from pathlib import Path

from scheduler.control.loop import Controller
from scheduler.model.jobs import Job
from scheduler.v1 import job_service_pb2


class LogReader:
    """Reads the logs that the launcher writes."""

    def __init__(self, controller: Controller, jobs_dir: Path) -> None:
        self._control = controller
        self._jobs_dir = jobs_dir

    async def read(
        self, job: Job, request: job_service_pb2.ReadLogsRequest
    ) -> AsyncIterator[job_service_pb2.ReadLogsResponse]:
        attempt = request.attempt or job.attempt
        yield job_service_pb2.ReadLogsResponse(
            data=(self._jobs_dir / job.id / str(attempt) / "output.log").read_bytes(), attempt=attempt
        )
