"""Streams that outlast a restart of the daemon: job changes and logs, and waiting for jobs to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from scheduler.cli import output, words
from scheduler.cli.client import Client
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError, ConnectionLost
from scheduler.v1 import job_pb2, job_service_pb2

# Whoever waits for hours bears a daemon that is upgraded meanwhile, but not one that is gone.
RECONNECT_TIMEOUT_S = 60.0
RESUME_TAIL_BYTES = 64 * 1024  # more than most jobs write while a daemon restarts
RECONNECT_PAUSE_S = 0.1  # between streams, so that a server that cuts each one isn't run hot


def watch_jobs(
    client: Client,
    job_ids: Sequence[str] = (),
    *,
    timeout_s: float | None = None,
    restarted: Callable[[], None] | None = None,
) -> Iterator[job_service_pb2.WatchJobsResponse]:
    """Yield the present state of jobs and then each change, over restarts of the daemon.

    Args:
        job_ids: Only these; empty = all.
        restarted: Called when the whole state comes again, because there is no resuming: what it does
            not hold is gone.

    Raises:
        TimeoutError: `timeout_s` has passed.
        CliError: The server refused, or stayed away for RECONNECT_TIMEOUT_S.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    revision = 0
    connect_timeout_s = client.connect_timeout_s
    while True:
        request = job_service_pb2.WatchJobsRequest(job_ids=job_ids, since_revision=revision)
        left_s = None if deadline_s is None else max(0.001, deadline_s - time.monotonic())
        try:
            for message in client.stream(
                client.jobs.WatchJobs,
                request,
                job_service_pb2.WatchJobsResponse,
                timeout_s=left_s,
                connect_timeout_s=connect_timeout_s,
            ):
                # Before the whole state is known there is nothing to resume from.
                if message.synced or revision:
                    revision = message.revision
                yield message
        except ConnectionLost:
            pass
        except CliError as error:
            if error.code is not ExitCode.GONE or not revision:
                raise
            revision = 0
        if not revision and restarted:
            restarted()
        connect_timeout_s = max(client.connect_timeout_s, RECONNECT_TIMEOUT_S)
        time.sleep(RECONNECT_PAUSE_S)


def wait_for(
    client: Client,
    job_ids: Sequence[str],
    until: Callable[[job_pb2.Job], bool],
    *,
    timeout_s: float | None = None,
    told: Callable[[job_service_pb2.WatchJobsResponse], None] | None = None,
) -> dict[str, job_pb2.Job]:
    """Return the jobs by id once `until` holds for each.

    Args:
        told: Called with each message.

    Raises:
        TimeoutError: `timeout_s` has passed.
        CliError: There is no such job; or the server refused, or stayed away.
    """
    wanted = dict.fromkeys(job_ids).keys()
    seen: dict[str, job_pb2.Job] = {}
    for message in watch_jobs(client, tuple(wanted), timeout_s=timeout_s):
        if told:
            told(message)
        if message.job.id in wanted:
            seen[message.job.id] = message.job
        if message.synced and (unknown := sorted(wanted - seen.keys())):
            raise CliError(ExitCode.NOT_FOUND, *(f"no job {job_id!r}" for job_id in unknown))
        if wanted <= seen.keys() and all(until(job) for job in seen.values()):
            return seen
    raise AssertionError("a watch ends only by an error")


def is_final(job: job_pb2.Job) -> bool:
    """Return whether nothing more will happen to the job."""
    return words.word(job, "state") in words.FINAL_STATES


def follow_job(
    client: Client,
    job_id: str,
    write: Callable[[job_service_pb2.ReadLogsResponse], None],
    *,
    first_attempt: int = 1,
    tail_bytes: int = 0,
) -> job_pb2.Job:
    """Pass on what each attempt of a job writes, until the job is final, and return it."""
    attempt = first_attempt
    while True:
        job = wait_for(client, (job_id,), partial(_is_final_or_at, attempt=attempt))[job_id]
        # Attempts may have come and gone while we looked elsewhere; what they wrote is kept for a while.
        for number in range(attempt, job.attempt + 1):
            try:
                for message in read_logs(client, job_id, attempt=number, follow=True, tail_bytes=tail_bytes):
                    write(message)
            except CliError as error:
                if error.code is not ExitCode.NOT_FOUND:
                    raise  # what could not be started wrote nothing
            tail_bytes = 0
        attempt = max(attempt, job.attempt + 1)
        if is_final(job):
            return job


def _is_final_or_at(job: job_pb2.Job, attempt: int) -> bool:
    return is_final(job) or any(
        a.number >= attempt and (a.HasField("started_at") or a.HasField("exited_at")) for a in job.attempts
    )


def read_logs(
    client: Client, job_id: str, *, attempt: int = 0, follow: bool = False, tail_bytes: int = 0
) -> Iterator[job_service_pb2.ReadLogsResponse]:
    """Yield what an attempt wrote; a followed log goes on where it stopped when the daemon returns.

    Where that place can't be found again (the log has been rotated, or was read from near its end), the
    last RESUME_TAIL_BYTES are repeated, and standard error says so.

    Raises:
        CliError: The server refused, or stayed away.
    """
    read_bytes = skip_bytes = 0
    connect_timeout_s = client.connect_timeout_s
    while True:
        request = job_service_pb2.ReadLogsRequest(
            job_id=job_id, attempt=attempt, follow=follow, tail_bytes=tail_bytes
        )
        try:
            for message in _log_pieces(client, request, connect_timeout_s):
                attempt = message.attempt or attempt
                skipped = min(skip_bytes, len(message.data))
                skip_bytes -= skipped
                message.data = message.data[skipped:]
                read_bytes += len(message.data)
                yield message
            return
        except ConnectionLost:
            if not follow:
                raise
        connect_timeout_s = max(client.connect_timeout_s, RECONNECT_TIMEOUT_S)
        time.sleep(RECONNECT_PAUSE_S)
        whole = job_service_pb2.ReadLogsRequest(job_id=job_id, attempt=attempt)
        kept_bytes = sum(len(message.data) for message in _log_pieces(client, whole, connect_timeout_s))
        if tail_bytes or kept_bytes < read_bytes:
            tail_bytes = RESUME_TAIL_BYTES
            output.note(f"[connected again; the last {tail_bytes} bytes may be repeated here]")
        else:
            skip_bytes = read_bytes


def _log_pieces(
    client: Client, request: job_service_pb2.ReadLogsRequest, connect_timeout_s: float
) -> Iterator[job_service_pb2.ReadLogsResponse]:
    return client.stream(
        client.jobs.ReadLogs,
        request,
        job_service_pb2.ReadLogsResponse,
        connect_timeout_s=connect_timeout_s,
    )
