"""`logs`: what a job wrote, byte for byte."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from scheduler.cli import output
from scheduler.cli.completing import complete_jobs
from scheduler.cli.session import Session, talks

if TYPE_CHECKING:
    from scheduler.v1 import job_service_pb2


@click.command()
@click.argument("job_id", metavar="JOB", shell_complete=complete_jobs)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--attempt", type=click.IntRange(min=1), help="Of this attempt [default: the newest].")
@click.option(
    "--tail",
    "tail_bytes",
    type=click.IntRange(min=1),
    metavar="BYTES",
    help="Begin with only the last so many bytes.",
)
@talks
@click.pass_obj
def logs(session: Session, job_id: str, follow: bool, attempt: int | None, tail_bytes: int | None) -> None:
    """Write what a job wrote to standard output.

    With --follow, on to the end of the job, over all attempts from the newest; with --attempt too, to the
    end of that one.
    """
    from scheduler.cli.watching import follow_job, read_logs
    from scheduler.v1 import job_service_pb2

    write = output.print_line if session.json else writer()
    tail = tail_bytes or 0
    with session.connect() as client:
        if follow and attempt is None:
            request = job_service_pb2.GetJobRequest(job_id=job_id)
            job = client.call(client.jobs.GetJob, request, job_service_pb2.GetJobResponse).job
            follow_job(client, job_id, write, first_attempt=max(1, job.attempt), tail_bytes=tail)
            return
        for message in read_logs(client, job_id, attempt=attempt or 0, follow=follow, tail_bytes=tail):
            write(message)


def writer() -> Callable[[job_service_pb2.ReadLogsResponse], None]:
    """Return what writes pieces of logs to standard output as they are, and tells of gaps beside it."""
    gaps = 0

    def write(message: job_service_pb2.ReadLogsResponse) -> None:
        nonlocal gaps
        if message.dropped_pieces > gaps:
            output.note("[output is missing here: the job wrote faster than it was read]")
        gaps = message.dropped_pieces
        sys.stdout.buffer.write(message.data)
        sys.stdout.buffer.flush()

    return write
