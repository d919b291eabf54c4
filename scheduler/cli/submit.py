"""`submit` and `preview`: describe a job, hand it over, or ask what would happen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

import click

from scheduler.cli import output, spec, words
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.jobs import exit_code_of, final_line, say_it_goes_on, wait_until_final
from scheduler.cli.session import Session, talks

if TYPE_CHECKING:
    from scheduler.cli.client import Client
    from scheduler.v1 import job_service_pb2

WITHOUT_SUMMARY = {True: "would start at once", False: "would wait"}
# Options of a job stand before its command, so that the command keeps its own.
COMMAND_LAST = {"allow_interspersed_args": False}


@click.command(context_settings=COMMAND_LAST)
@spec.job_options
@click.option(
    "-f",
    "--file",
    "job_file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Submit the jobs that FILE describes, all or none: a JobSpec in JSON a line; - is standard input.",
)
@click.option(
    "--request-id",
    default="",
    help="Submitting again with the same id returns the same job [default: a new one].",
)
@click.option("--wait", "wait_for_end", is_flag=True, help="Wait for the end and exit as the job does.")
@click.option("--follow", is_flag=True, help="Show what it writes until its end, and exit as it does.")
@talks
@click.argument("command", metavar="-- COMMAND [ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def submit(
    session: Session,
    job_file: TextIO | None,
    request_id: str,
    wait_for_end: bool,
    follow: bool,
    command: tuple[str, ...],
) -> int:
    """Submit a job and print its id.

    \b
    wattshift submit --class training --gpus 4 -- python train.py --epochs 3
    """  # noqa: D301 (click's mark for a paragraph that is not wrapped)
    if job_file is None:
        request = _request(session, command, request_id)
        with session.connect() as client:
            return _submit_one(client, request, wait=wait_for_end, follow=follow, json=session.json)
    if command or session.job_options or follow:
        raise click.UsageError(
            "--file takes its jobs from the file: no command, no job options, no --follow."
        )
    with session.connect() as client:
        job_ids = _submit_file(client, job_file, request_id, json=session.json)
        return (
            wait_until_final(client, job_ids, json=session.json, tell=output.note)
            if wait_for_end
            else ExitCode.OK
        )


def _request(session: Session, command: tuple[str, ...], request_id: str) -> job_service_pb2.SubmitJobRequest:
    from scheduler.v1 import job_service_pb2

    return job_service_pb2.SubmitJobRequest(
        spec=spec.build(session, command), request_id=request_id or _new_request_id()
    )


def _new_request_id() -> str:
    import uuid

    return str(uuid.uuid4())


def _submit_one(
    client: Client, request: job_service_pb2.SubmitJobRequest, *, wait: bool, follow: bool, json: bool
) -> int:
    from scheduler.v1 import job_service_pb2

    answer = client.call(client.jobs.SubmitJob, request, job_service_pb2.SubmitJobResponse)
    if json:
        # Where a stream follows, this is its first line.
        (output.print_line if wait or follow else output.print_message)(answer)
    elif follow:
        output.note(answer.job.id)  # standard output is the job's
    else:
        print(answer.job.id, flush=True)
    if follow:
        return _follow(client, answer.job.id, json=json)
    return wait_until_final(client, (answer.job.id,), json=json, tell=output.note) if wait else ExitCode.OK


def _follow(client: Client, job_id: str, *, json: bool) -> int:
    from scheduler.cli.logs import writer
    from scheduler.cli.watching import follow_job

    try:
        job = follow_job(client, job_id, output.print_line if json else writer())
    except KeyboardInterrupt:
        say_it_goes_on((job_id,))
        return ExitCode.INTERRUPTED
    if not json:
        output.note(final_line(job))
    return exit_code_of((job,))


def _submit_file(client: Client, job_file: TextIO, request_id: str, *, json: bool) -> list[str]:
    from scheduler.v1 import job_service_pb2

    requests = spec.read_requests(job_file.read(), job_file.name)
    for number, request in enumerate(requests, start=1):
        request.request_id = request.request_id or (
            f"{request_id}-{number}" if request_id else _new_request_id()
        )
    batch = job_service_pb2.SubmitJobsRequest(jobs=requests)
    answer = client.call(client.jobs.SubmitJobs, batch, job_service_pb2.SubmitJobsResponse)
    if json:
        output.print_message(answer)
    else:
        sys.stdout.writelines(f"{job_id}\n" for job_id in answer.job_ids)
        sys.stdout.flush()
    return list(answer.job_ids)


@click.command(context_settings=COMMAND_LAST)
@spec.job_options
@talks
@click.argument("command", metavar="-- COMMAND [ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def preview(session: Session, command: tuple[str, ...]) -> None:
    """Say what would happen if this job were submitted now.

    Who would stop for it, or why it would wait; nothing is changed.
    """
    from scheduler.v1 import job_service_pb2

    request = job_service_pb2.PreviewJobRequest(spec=spec.build(session, command))
    with session.connect() as client:
        answer = client.call(client.jobs.PreviewJob, request, job_service_pb2.PreviewJobResponse)
    if session.json:
        output.print_message(answer)
        return
    print(words.clean(answer.summary) or words.reason(answer) or WITHOUT_SUMMARY[answer.starts_now])
    if answer.gpus:
        print("GPUs:", ", ".join(words.gpu_names(answer.gpus).values()))
    if answer.HasField("expected_start"):
        print("expected start:", words.moment(answer.expected_start))
    if answer.victims:
        print()
        output.print_table(_victims(answer))


def _victims(answer: job_service_pb2.PreviewJobResponse) -> output.Table:
    rows = [
        (
            victim.job_id,
            victim.name,
            words.word(victim, "class"),
            str(len(victim.gpus)),
            words.span(victim.grace_s),
            words.span(victim.handover_s),
            f"{victim.lost_gpu_seconds:.0f}",
            words.usd(victim.loss_usd),
        )
        for victim in answer.victims
    ]
    numbers = ("GPUS", "GRACE", "HAND-OVER", "LOST GPU-S", "LOSS USD")
    return output.table(("WOULD STOP", "NAME", "CLASS", *numbers), rows, right=numbers)
