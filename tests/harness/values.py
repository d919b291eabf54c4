"""Small values of the model for tests: a job's specification, and the events of its life."""

from dataclasses import replace
from typing import Any

from scheduler.model.events import (
    AttemptEnded,
    AttemptStarted,
    AttemptVerified,
    JobSubmitted,
    StartDecided,
    StopDecided,
)
from scheduler.model.jobs import JobClass, JobSpec, JobState, Notice, OnPreempt, RestartRule
from scheduler.model.reasons import Reason

SPEC = JobSpec(
    name="train",
    command=("train",),
    job_class=JobClass.TRAINING,
    priority=500,
    value_microusd_per_gpu_hour=2_000_000,
    gpus=1,
    gpu_share_milli=1000,
    gpu_memory_mib=0,
    gpu_models=(),
    cpus=0,
    memory_mib=0,
    preemptible=True,
    on_preempt=OnPreempt.REQUEUE,
    grace_s=10.0,
    min_runtime_s=0.0,
    restart_loss_s=0.0,
    exit_zero_is_done=False,
    restart=RestartRule.NEVER,
)


def submission(number: int, at_s: float = 0.0, *, request_id: str = "", **spec: Any) -> JobSubmitted:
    """A job is accepted."""
    return JobSubmitted(
        at_s, f"j{number}", number, replace(SPEC, **spec), request_id, f"digest of {request_id}"
    )


def start(number: int, attempt: int = 1, at_s: float = 1.0, *gpus: str) -> StartDecided:
    """A start is decided."""
    return StartDecided(
        at_s, f"j{number}", attempt, gpus or ("GPU-a",), "launcher-1", Reason.STARTED_ON_FREE_GPUS
    )


def started(number: int, attempt: int = 1, at_s: float = 2.0) -> AttemptStarted:
    """The process runs."""
    return AttemptStarted(at_s, f"j{number}", attempt, 4711, 99)


def stop(
    number: int, to: JobState = JobState.PREEMPTING, attempt: int = 1, at_s: float = 3.0, by: str = ""
) -> StopDecided:
    """A notice is given."""
    reason = Reason.PREEMPTED_BY_HIGHER_RANK if by else Reason.REQUEUED_BY_OPERATOR
    return StopDecided(at_s, f"j{number}", attempt, to, Notice(reason, at_s, at_s + 10.0, by))


def end(
    number: int, to: JobState = JobState.SUCCEEDED, attempt: int = 1, at_s: float = 4.0, **facts: Any
) -> AttemptEnded:
    """The process tree is gone."""
    code = facts.pop("exit_code", 0)
    return AttemptEnded(at_s, f"j{number}", attempt, to, Reason.EXITED_ZERO, exit_code=code, **facts)


def verified(number: int, attempt: int = 1, at_s: float = 5.0) -> AttemptVerified:
    """The GPUs are free of it."""
    return AttemptVerified(at_s, f"j{number}", attempt)
