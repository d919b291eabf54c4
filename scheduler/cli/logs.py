"""`logs`: what a job wrote, byte for byte."""

from __future__ import annotations

import sys
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
    """Write what a job wrote to standard output."""
    from scheduler.cli.watching import read_logs

    with session.connect() as client:
        for message in read_logs(
            client, job_id, attempt=attempt or 0, follow=follow, tail_bytes=tail_bytes or 0
        ):
            (output.print_line if session.json else write_message)(message)


def write_message(message: job_service_pb2.ReadLogsResponse) -> None:
    """Write a piece of a log to standard output as it is, and say beside it what rotation has dropped."""
    if message.dropped_pieces:
        output.note("[rotation dropped some output here]")
    sys.stdout.buffer.write(message.data)
    sys.stdout.buffer.flush()
