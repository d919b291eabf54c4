"""ReadLogs: what an attempt wrote, as a stream of pieces."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

from scheduler.control.loop import Controller
from scheduler.control.watch import JobSubscription
from scheduler.effects.job_logs import Following, OutputReader, OutputWatch
from scheduler.errors import FieldViolation, InvalidRequest, NotFound, Unavailable
from scheduler.model.jobs import Job
from scheduler.v1 import job_service_pb2

PIECE_BYTES = 64 * 1024
FOLLOWERS_MAX = 256


class LogReader:
    """Reads the logs that the launcher writes, for as many readers as want them."""

    def __init__(self, controller: Controller, jobs_dir: Path) -> None:
        self._control = controller
        self._jobs_dir = jobs_dir
        self._watch: OutputWatch | None = None
        self._followers = 0

    async def read(
        self, job: Job, request: job_service_pb2.ReadLogsRequest
    ) -> AsyncIterator[job_service_pb2.ReadLogsResponse]:
        """The attempt's output from the oldest kept piece on; with `follow` until the attempt ends."""
        number = self._attempt(job, request)
        if number == 0:
            return
        try:
            reader = OutputReader(self._jobs_dir, job.id, number)
        except FileNotFoundError:
            if self._is_live(job.number, number):
                raise Unavailable(
                    f"attempt {number} of job {job.id} is only just starting; try again"
                ) from None
            raise NotFound("log of attempt", str(number), f"job {job.id} keeps none (any more)") from None
        except OSError as error:
            raise Unavailable(f"the log of job {job.id} can't be read: {error}") from error
        with closing(reader):
            try:
                async for message in self._pieces(job, number, request, reader):
                    yield message
            except OSError as error:
                raise Unavailable(f"the log of job {job.id} can't be read: {error}") from error

    async def _pieces(
        self, job: Job, number: int, request: job_service_pb2.ReadLogsRequest, reader: OutputReader
    ) -> AsyncIterator[job_service_pb2.ReadLogsResponse]:
        if request.tail_bytes:
            yield job_service_pb2.ReadLogsResponse(
                data=await _tail(reader, request.tail_bytes), attempt=number
            )
        if not request.follow:
            while piece := reader.read(PIECE_BYTES):
                yield job_service_pb2.ReadLogsResponse(data=piece, attempt=number, dropped_pieces=reader.lost)
            return
        if self._followers >= FOLLOWERS_MAX:
            raise Unavailable(
                f"the limit log_followers_max = {FOLLOWERS_MAX} is reached; close some, or don't follow"
            )
        if self._watch is None:
            self._watch = OutputWatch()
        following = self._watch.follow(reader)
        subscription = self._control.watchers.watch_jobs(frozenset({job.number}))
        self._followers += 1
        try:
            while True:
                following.clear()
                live = self._is_live(job.number, number)  # before the read: what came until its end is read
                while piece := reader.read(PIECE_BYTES):
                    yield job_service_pb2.ReadLogsResponse(
                        data=piece, attempt=number, dropped_pieces=reader.lost
                    )
                if not live:
                    return
                await _either(following, subscription)
        finally:
            self._followers -= 1
            following.close()
            self._control.watchers.leave(subscription)

    def _attempt(self, job: Job, request: job_service_pb2.ReadLogsRequest) -> int:
        number = request.attempt or job.attempt
        if not 0 <= number <= job.attempt:
            raise InvalidRequest(
                FieldViolation("attempt", f"is {number}; job {job.id} had attempts 1 to {job.attempt}")
            )
        if request.tail_bytes < 0:
            raise InvalidRequest(FieldViolation("tail_bytes", "is negative; give 0 for all"))
        return number

    def _is_live(self, number: int, attempt: int) -> bool:
        job = self._control.ledger.jobs.get(number)
        return job is not None and job.holds and job.attempt == attempt


async def _tail(reader: OutputReader, count: int) -> bytes:
    """The last `count` bytes of what is there, at most one piece's worth more than the kept logs hold."""
    kept = bytearray()
    while piece := reader.read(PIECE_BYTES):
        kept += piece
        if len(kept) > count + PIECE_BYTES:
            del kept[:-count]
        await asyncio.sleep(0)
    return bytes(kept[-count:])


async def _either(following: Following, subscription: JobSubscription) -> None:
    """Wait for more output or a change of the job."""
    waits = [asyncio.ensure_future(following.changed()), asyncio.ensure_future(subscription.take())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
