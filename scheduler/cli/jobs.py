"""`jobs`, `wait`, `cancel`, `requeue`: many jobs at a glance, and what happens to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from scheduler.cli import exit_codes, output, words
from scheduler.cli.completing import complete_active_jobs, complete_jobs
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.session import Session, talks
from scheduler.cli.spec import CLASSES
from scheduler.cli.values import DURATION_S

if TYPE_CHECKING:
    from scheduler.cli.client import Client
    from scheduler.v1 import job_pb2, job_service_pb2

STATES = (
    "pending",
    "starting",
    "running",
    "suspended",
    "preempting",
    "stopping",
    "succeeded",
    "failed",
    "cancelled",
)
JOBS_SHOWN_MAX = 1000
# Of a page of jobs; the server's own limit is 1,000, and smaller pages keep its loop lively.
PAGE_SIZE = 500
# FOR: how long in this state, so that of a pending job it is the wait.
TITLES = ("ID", "NAME", "CLASS", "STATE", "FOR", "GPUS", "PRIO", "REASON")
NUMBERS = ("FOR", "GPUS", "PRIO")


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Finished jobs too.")
@click.option(
    "--state",
    "states",
    type=click.Choice(STATES, case_sensitive=False),
    multiple=True,
    help="Only jobs in this state; may be repeated.",
)
@click.option(
    "-c",
    "--class",
    "classes",
    type=click.Choice(CLASSES, case_sensitive=False),
    multiple=True,
    help="Only jobs of this class; may be repeated.",
)
@click.option("--name", default="", help="Only jobs of exactly this name.")
@click.option("--tenant", default="", help="Only jobs of this tenant.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=JOBS_SHOWN_MAX,
    show_default=True,
    help="Show at most so many, the newest.",
)
@click.option("-w", "--watch", is_flag=True, help="Go on with a line for each change.")
@talks
@click.pass_obj
def jobs(
    session: Session,
    everything: bool,
    states: tuple[str, ...],
    classes: tuple[str, ...],
    name: str,
    tenant: str,
    limit: int,
    watch: bool,
) -> None:
    """List the jobs that are not finished.

    With --all, every job that is kept; with --state, the jobs in that state.
    """
    from scheduler.v1 import job_service_pb2

    request = job_service_pb2.ListJobsRequest(
        states=[f"JOB_STATE_{state.upper()}" for state in states],
        classes=[f"JOB_CLASS_{kind.upper()}" for kind in classes],
        name=name,
        tenant=tenant,
        active_only=not everything and not states,
    )
    with session.connect() as client:
        if watch:
            _watch(client, request, json=session.json)
            return
        answer = list_jobs(client, request, limit)
    if session.json:
        output.print_message(answer)
        return
    output.print_table(jobs_table(answer.jobs))
    if answer.next_page_token:
        output.note(f"the newest {limit} are shown; --limit shows more")


def list_jobs(
    client: Client, request: job_service_pb2.ListJobsRequest, limit: int
) -> job_service_pb2.ListJobsResponse:
    """Return up to `limit` jobs, of as many pages as it takes, as one answer."""
    from scheduler.v1 import job_service_pb2

    answer = job_service_pb2.ListJobsResponse()
    while True:
        request.page_size = min(PAGE_SIZE, limit - len(answer.jobs))
        page = client.call(client.jobs.ListJobs, request, job_service_pb2.ListJobsResponse)
        answer.jobs.extend(page.jobs)
        answer.next_page_token = page.next_page_token
        if not page.next_page_token or len(answer.jobs) >= limit:
            return answer
        request.page_token = page.next_page_token


def jobs_table(shown: Iterable[job_pb2.Job]) -> output.Table:
    """Return jobs as a table, in the order given."""
    return output.table(TITLES, (job_row(job) for job in shown), right=NUMBERS)


def job_row(job: job_pb2.Job) -> tuple[str, ...]:
    """Return a job as a row under TITLES."""
    return (
        job.id,
        job.name,
        words.word(job, "class"),
        words.word(job, "state"),
        words.since(job.state_since) if job.HasField("state_since") else words.NONE,
        words.gpus_asked(job.spec.gpus, job.spec.gpu_share_milli),
        str(job.priority),
        ending(job) or words.because(job),
    )


def ending(job: job_pb2.Job) -> str:
    """Return how a final job ended: its reason and exit code; "" for one that isn't final."""
    if words.word(job, "state") not in words.FINAL_STATES:
        return ""
    why = words.because(job)
    code = f"exit code {job.exit_code}"
    return why if not job.HasField("exit_code") or job.exit_code == 0 or code in why else f"{why} ({code})"


def _watch(client: Client, request: job_service_pb2.ListJobsRequest, *, json: bool) -> None:
    from scheduler.cli.watching import watch_jobs

    initial: list[job_pb2.Job] = []
    widths: list[int] = []
    told = ""
    for message in watch_jobs(client):
        fits = message.HasField("job") and _matches(request, message.job, changed=bool(widths))
        if json:
            if fits or message.synced:
                output.print_line(message)
        elif widths and fits:
            change = jobs_table((message.job,))
            widths = output.widths(change, widths)
            line = output.plain_lines(change, widths)[1]
            if line != told:  # facts of an attempt may change that the table does not show
                print(time.strftime("%H:%M:%S"), line, flush=True)
            told = line
        elif not widths:
            initial += [message.job] if fits else []
            if message.synced:
                output.print_table(jobs_table(initial))
                widths = output.widths(jobs_table(initial))


def _matches(request: job_service_pb2.ListJobsRequest, job: job_pb2.Job, *, changed: bool) -> bool:
    """Return whether the list would show a watched job; one that ends while watched is shown ending."""
    return (
        (not request.states or job.state in request.states)
        and (not request.classes or getattr(job, "class") in request.classes)
        and (not request.name or job.name == request.name)
        and (not request.tenant or job.spec.tenant == request.tenant)
        and (changed or not request.active_only or words.word(job, "state") not in words.FINAL_STATES)
    )


@click.command()
@click.argument("job_ids", metavar="JOB...", nargs=-1, required=True, shell_complete=complete_jobs)
@click.option(
    "--timeout", "timeout_s", type=DURATION_S, help="Give up waiting after so long; the jobs go on."
)
@talks
@click.pass_obj
def wait(session: Session, job_ids: tuple[str, ...], timeout_s: float | None) -> int:
    """Wait until jobs are finished, and exit as they did.

    The exit code is that of the first JOB, in the order given, that did not succeed.
    """
    with session.connect() as client:
        return wait_until_final(client, job_ids, timeout_s=timeout_s, json=session.json)


def wait_until_final(
    client: Client,
    job_ids: Sequence[str],
    *,
    json: bool,
    timeout_s: float | None = None,
    tell: Callable[[str], None] = print,
) -> int:
    """Return the exit code that final jobs give; Ctrl-C and the time limit leave them alone.

    Args:
        tell: Called with a sentence on each job's end, unless `json`.
    """
    from scheduler.cli.watching import is_final, wait_for

    def told(message: job_service_pb2.WatchJobsResponse) -> None:
        if json:
            output.print_line(message)
        elif is_final(message.job):
            tell(final_line(message.job))

    try:
        final = wait_for(client, job_ids, is_final, timeout_s=timeout_s, told=told)
    except KeyboardInterrupt:
        say_it_goes_on(job_ids)
        return ExitCode.INTERRUPTED
    except TimeoutError:
        assert timeout_s is not None
        raise CliError(
            ExitCode.TIMEOUT, f"not finished after {words.span(timeout_s)}; the jobs go on"
        ) from None
    return exit_code_of(final[job_id] for job_id in job_ids)


def exit_code_of(final: Iterable[job_pb2.Job]) -> int:
    """Return the exit code of the first job that did not succeed, else 0."""
    for job in final:
        own = job.exit_code if job.HasField("exit_code") else None
        if code := exit_codes.of_job(words.word(job, "state"), own):
            return code
    return ExitCode.OK


def final_line(job: job_pb2.Job) -> str:
    """Return a sentence on how a job ended."""
    took = ""
    if job.HasField("finished_at") and job.HasField("submitted_at"):
        took = f" after {words.span(words.epoch_s(job.finished_at) - words.epoch_s(job.submitted_at))}"
    return words.clean(f"{job.id} {job.name} {words.word(job, 'state')}{took}: {ending(job)}")


def say_it_goes_on(job_ids: Sequence[str]) -> None:
    """Tell a person who stopped waiting that the jobs run on, and how to cancel them."""
    output.note(f"the job goes on; to cancel it: wattshift cancel {' '.join(job_ids)}")


@click.command()
@click.argument("job_ids", metavar="JOB...", nargs=-1, required=True, shell_complete=complete_active_jobs)
@talks
@click.pass_obj
def cancel(session: Session, job_ids: tuple[str, ...]) -> int:
    """Cancel jobs; what runs is stopped with notice and grace."""
    from scheduler.v1 import job_service_pb2

    def one(client: Client, job_id: str) -> job_service_pb2.CancelJobResponse:
        request = job_service_pb2.CancelJobRequest(job_id=job_id)
        return client.call(client.jobs.CancelJob, request, job_service_pb2.CancelJobResponse)

    return _for_each(session, job_ids, one)


@click.command()
@click.argument("job_ids", metavar="JOB...", nargs=-1, required=True, shell_complete=complete_active_jobs)
@talks
@click.pass_obj
def requeue(session: Session, job_ids: tuple[str, ...]) -> int:
    """Stop jobs with notice and grace, and queue them again.

    A waiting job's back-off ends.
    """
    from scheduler.v1 import job_service_pb2

    def one(client: Client, job_id: str) -> job_service_pb2.RequeueJobResponse:
        request = job_service_pb2.RequeueJobRequest(job_id=job_id)
        answer = job_service_pb2.RequeueJobResponse
        return client.call(client.jobs.RequeueJob, request, answer, idempotent=False)

    return _for_each(session, job_ids, one)


def _for_each(session: Session, job_ids: Sequence[str], one: Callable[[Client, str], Any]) -> int:
    """Do it to each job, go on after a refusal, and return the first refusal's exit code.

    Args:
        one: Returns a response with a `job`.
    """
    code = ExitCode.OK
    with session.connect() as client:
        for job_id in job_ids:
            try:
                answer = one(client, job_id)
            except CliError as error:
                if error.code is ExitCode.UNREACHABLE or len(job_ids) == 1:
                    raise
                for line in error.lines:
                    output.note(f"error: {line}" if job_id in line else f"error: {job_id}: {line}")
                code = code or error.code
                continue
            if session.json:
                (output.print_message if len(job_ids) == 1 else output.print_line)(answer)
            else:
                job = answer.job
                print(words.clean(f"{job.id} {job.name} {words.word(job, 'state')}: {words.because(job)}"))
    return code
