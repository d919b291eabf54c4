"""`show` and `explain`: one job's story, and why it is where it is."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from scheduler.cli import output, words
from scheduler.cli.completing import complete_jobs
from scheduler.cli.jobs import ending
from scheduler.cli.session import Session, talks

if TYPE_CHECKING:
    from scheduler.v1 import job_pb2, job_service_pb2

LABEL_WIDTH = 11
# The stages of an attempt's end, in order; the time between two that happened is shown.
STAGES = (
    ("decided", "notice.decided_at"),
    ("signalled", "signalled_at"),
    ("acknowledged", "acknowledged_at"),
    ("exited", "exited_at"),
    ("verified free", "verified_at"),
    ("successor started", "successor_started_at"),
)


@click.command()
@click.argument("job_id", metavar="JOB", shell_complete=complete_jobs)
@talks
@click.pass_obj
def show(session: Session, job_id: str) -> None:
    """Tell a job's story.

    What it asked for, where it stands, each attempt, who gave way to whom, and how it ended.
    """
    from scheduler.v1 import job_service_pb2

    with session.connect() as client:
        request = job_service_pb2.GetJobRequest(job_id=job_id)
        answer = client.call(client.jobs.GetJob, request, job_service_pb2.GetJobResponse)
    if session.json:
        output.print_message(answer)
        return
    for line in job_story(answer.job):
        print(line)


def job_story(job: job_pb2.Job) -> Iterator[str]:
    """Yield the lines of a job's story, oldest attempt first."""
    yield words.clean(f"{job.id}  {job.name}")
    yield from _facts(_job_facts(job))
    names = words.gpu_names(uuid for attempt in job.attempts for uuid in attempt.gpus)
    for attempt in job.attempts:
        yield ""
        yield f"attempt {attempt.number}"
        yield from _facts(_attempt_facts(attempt, names))


def _facts(facts: Iterator[tuple[str, str]]) -> Iterator[str]:
    for label, text in facts:
        if text:
            yield f"  {label.ljust(LABEL_WIDTH)} {words.clean(text)}"


def _job_facts(job: job_pb2.Job) -> Iterator[tuple[str, str]]:
    final = ending(job)
    since = words.since(job.state_since) if job.HasField("state_since") else ""
    when = since and (f" {since} ago" if final else f" for {since}")
    yield "state", f"{words.word(job, 'state')}{when}: {final or words.because(job)}"
    spec = job.spec
    value = f", worth {words.usd(spec.value_usd_per_gpu_hour)} USD per GPU-hour"
    yield "class", f"{words.word(job, 'class')}, priority {job.priority}{value}"
    yield "command", shlex.join(spec.command)
    yield "in", spec.working_directory
    yield "asks for", _asks(spec)
    yield "terms", _terms(spec)
    yield "limits", _limits(spec)
    yield "submitted", _submitted(job)
    if job.HasField("eligible_at") and not final:
        yield "not before", words.moment(job.eligible_at)
    if job.preemptions:
        yield "gave way", words.count(job.preemptions, "time")
    yield "energy", words.energy(job.energy_j) if job.energy_j and job.attempt > 1 else ""


def _submitted(job: job_pb2.Job) -> str:
    parts = [f"{words.moment(job.submitted_at)} ({words.since(job.submitted_at)} ago)"]
    parts += [f"tenant {job.spec.tenant}"] if job.spec.tenant else []
    parts += [f"standing job {job.standing_job}"] if job.standing_job else []
    parts += [f"request id {job.request_id}"] if job.request_id else []
    return ", ".join(parts)


def _asks(spec: job_pb2.JobSpec) -> str:
    share = 0 < spec.gpu_share_milli < words.SHARE_MILLI_WHOLE
    gpus = f"{words.gpus_asked(1, spec.gpu_share_milli)} of a GPU" if share else words.count(spec.gpus, "GPU")
    if spec.gpus == 0 and not share:
        gpus = "no GPU"
    models = f" ({' or '.join(spec.gpu_models)})" if spec.gpu_models else ""
    parts = [gpus + models]
    parts += [f"{words.size(spec.gpu_memory_mib)} of GPU memory each"] if spec.gpu_memory_mib else []
    parts += [words.count(spec.cpus, "CPU")] if spec.cpus else []
    parts += [f"{words.size(spec.memory_mib)} of memory"] if spec.memory_mib else []
    parts += [f"draws {spec.draw_w:g} W per GPU"] if spec.HasField("draw_w") else []
    return ", ".join(parts)


def _terms(spec: job_pb2.JobSpec) -> str:
    if spec.preemptible:
        parts = [f"preemptible ({words.word(spec, 'on_preempt').lower() or 'requeue'})"]
    else:
        parts = ["not preemptible"]
    parts.append(f"grace {words.span(spec.grace_s)}")
    parts += [f"minimum runtime {words.span(spec.min_runtime_s)}"] if spec.min_runtime_s else []
    parts += [f"restart loss {words.span(spec.restart_loss_s)}"] if spec.restart_loss_s else []
    parts += ["exit code 0 after the notice is done"] if spec.exit_zero_is_done else []
    parts.append(f"restart {words.word(spec, 'restart').lower().replace('_', ' ') or 'never'}")
    return ", ".join(parts)


def _limits(spec: job_pb2.JobSpec) -> str:
    parts = []
    if spec.HasField("expected_duration_s"):
        parts.append(f"expected to run {words.span(spec.expected_duration_s)}")
    if spec.HasField("time_limit_s"):
        parts.append(f"at most {words.span(spec.time_limit_s)} an attempt")
    if spec.HasField("deadline"):
        parts.append(f"complete by {words.moment(spec.deadline)}")
    return ", ".join(parts)


def _attempt_facts(attempt: job_pb2.Attempt, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    share = f" (a share of {words.gpus_asked(1, attempt.gpu_share_milli)})"
    held = ", ".join(names[uuid] for uuid in attempt.gpus)
    yield "GPUs", held + (share if 0 < attempt.gpu_share_milli < words.SHARE_MILLI_WHOLE else "")
    if attempt.HasField("decided_at"):
        yield "decided", words.moment(attempt.decided_at)
    if attempt.HasField("started_at"):
        took = words.epoch_s(attempt.started_at) - words.epoch_s(attempt.decided_at)
        yield (
            "started",
            f"{words.moment(attempt.started_at)}, {words.milliseconds(took)} later, PID {attempt.pid}",
        )
    yield "preempted", ", ".join(attempt.preempted)
    if attempt.HasField("checkpoint_at"):
        yield (
            "checkpoint",
            f"{words.moment(attempt.checkpoint_at)} ({words.since(attempt.checkpoint_at)} ago)",
        )
    if attempt.HasField("notice"):
        yield (
            "notice",
            f"{words.reason(attempt.notice)}, to be gone by {words.moment(attempt.notice.deadline)}",
        )
    yield "gave way to", attempt.preempted_by
    yield "stages", stages(attempt)
    yield "energy", words.energy(attempt.energy_j) if attempt.energy_j else ""
    yield "ended", _attempt_end(attempt)


def stages(attempt: job_pb2.Attempt) -> str:
    """Return the time between the stages of giving way that an attempt has passed; "" before any."""
    times = [(label, moment) for label, path in STAGES if (moment := _time_at(attempt, path)) is not None]
    if len(times) < 2 or not attempt.HasField("notice"):
        return ""
    steps = [
        f"{words.milliseconds(moment - before)} {label}" for (_, before), (label, moment) in pairwise(times)
    ]
    total = words.milliseconds(times[-1][1] - times[0][1])
    return f"{times[0][0]}, " + ", ".join(f"+{step}" for step in steps) + f" (in all {total})"


def _time_at(attempt: job_pb2.Attempt, path: str) -> float | None:
    *outer, field = path.split(".")
    message = getattr(attempt, outer[0]) if outer else attempt
    return words.epoch_s(getattr(message, field)) if message.HasField(field) else None


def _attempt_end(attempt: job_pb2.Attempt) -> str:
    if not attempt.HasField("exited_at") and not attempt.lost and not attempt.end_reason:
        return ""
    parts = [words.moment(attempt.exited_at)] if attempt.HasField("exited_at") else []
    if attempt.HasField("exited_at") and attempt.HasField("started_at"):
        ran = words.epoch_s(attempt.exited_at) - words.epoch_s(attempt.started_at)
        parts.append(f"after {words.span(ran)}")
    parts += [words.reason(attempt, "end_reason")] if attempt.end_reason else []
    parts += [f"exit code {attempt.exit_code}"] if attempt.HasField("exit_code") else []
    parts += ["exit code can't be known"] if attempt.lost else []
    return ", ".join(parts)


@click.command()
@click.argument("job_id", metavar="JOB", shell_complete=complete_jobs)
@talks
@click.pass_obj
def explain(session: Session, job_id: str) -> None:
    """Say why a job is where it is.

    Since when, what stands in its way, and what would have to change.
    """
    from scheduler.v1 import job_service_pb2

    with session.connect() as client:
        request = job_service_pb2.ExplainJobRequest(job_id=job_id)
        answer = client.call(client.jobs.ExplainJob, request, job_service_pb2.ExplainJobResponse)
    if session.json:
        output.print_message(answer)
        return
    for line in explanation(answer):
        print(line)


def explanation(answer: job_service_pb2.ExplainJobResponse) -> Iterator[str]:
    """Yield the lines of an explanation, the sentence first."""
    job = answer.job
    yield words.clean(f"{job.id}  {job.name}  {words.word(job, 'state')}")
    yield words.clean(answer.summary) or words.reason(answer) or words.because(job)
    if answer.HasField("since"):
        yield f"since {words.moment(answer.since)} ({words.since(answer.since)})"
    if answer.ahead:
        yield f"{words.count(answer.ahead, 'pending job')} ahead of it"
    if answer.awaited:
        yield words.clean(f"stopping for it: {', '.join(answer.awaited)}")
    if answer.HasField("expected_start"):
        yield f"expected start: {words.moment(answer.expected_start)}"
    if answer.obstacles:
        yield ""
        yield from output.plain_lines(_obstacles(answer.obstacles))
    if answer.remedies:
        yield ""
        yield "what would help:"
        for remedy in answer.remedies:
            yield words.clean(f"  - {remedy}")


def _obstacles(obstacles: Collection[job_service_pb2.Obstacle]) -> output.Table:
    """What each rule keeps from the job; how many nodes that is only where it may be more than one."""
    rows = [(str(o.gpus), str(o.nodes), words.reason(o), o.detail) for o in obstacles]
    if all(o.nodes < 2 for o in obstacles):
        one = [(gpus, *rest) for gpus, _, *rest in rows]
        return output.table(("GPUS", "KEPT FROM IT BY", ""), one, right=("GPUS",))
    return output.table(("GPUS", "NODES", "KEPT FROM IT BY", ""), rows, right=("GPUS", "NODES"))
