"""What becomes of a job when an attempt ends: the restart rule, the requeue, the back-off."""

from dataclasses import dataclass

from scheduler.model.events import AttemptEnded
from scheduler.model.jobs import Job, JobState, OnPreempt, RestartRule
from scheduler.model.policy import Policy, backoff_s
from scheduler.model.reasons import Reason

# Reasons to give way that count as a preemption by a job: they age it and make it back off.
_COUNTED = frozenset({Reason.PREEMPTED_BY_HIGHER_RANK})


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended. `exit_code` is 128 + signal where a signal ended it; None = not known."""

    at_s: float
    exit_code: int | None
    reason: Reason  # of an end by itself
    detail: str = ""
    lost: bool = False
    retry_start: bool = False  # the start failed for the node's reasons
    never_again: bool = False  # the start failed for the job's own reasons
    behind_s: float = 0.0  # work that power limits kept it from doing


def ended(job: Job, ending: Ending, policy: Policy) -> AttemptEnded:
    """The event that ends the job's live attempt."""
    last = job.last
    assert last is not None
    assert job.holds
    if job.state is JobState.PREEMPTING:
        return _gave_way(job, ending, policy)
    if job.state is JobState.STOPPING:
        return _stopped(job, ending)
    return _by_itself(job, ending, policy)


def _gave_way(job: Job, ending: Ending, policy: Policy) -> AttemptEnded:
    """After the notice a job is requeued whatever its exit code: trainers save and exit 0."""
    notice = job.attempts[-1].notice
    assert notice is not None
    if job.reason is Reason.CANCELLED_BY_REQUEST:
        return _event(job, ending, JobState.CANCELLED, Reason.CANCELLED_BY_REQUEST)
    if job.spec.exit_zero_is_done and ending.exit_code == 0:
        return _event(job, ending, JobState.SUCCEEDED, Reason.EXITED_ZERO)
    if job.spec.on_preempt is OnPreempt.CANCEL:
        return _event(job, ending, JobState.CANCELLED, Reason.CANCELLED_BY_PREEMPTION)
    if notice.reason not in _COUNTED:
        return _event(job, ending, JobState.PENDING, notice.reason)
    count = job.preemptions + 1
    wait_s = backoff_s(policy.preemption_backoff_s, policy.preemption_backoff_s_max, count - 1)
    if job.standing:  # it fills what is idle; waiting would only leave a GPU dark
        wait_s = 0.0
    return _event(
        job,
        ending,
        JobState.PENDING,
        Reason.REQUEUED_AFTER_PREEMPTION,
        eligible_s=ending.at_s + wait_s if wait_s else 0.0,
        preemptions=count,
    )


def _stopped(job: Job, ending: Ending) -> AttemptEnded:
    notice = job.attempts[-1].notice
    assert notice is not None
    if notice.reason in (Reason.TIME_LIMIT, Reason.DEADLINE_MISSED):
        if job.spec.exit_zero_is_done and ending.exit_code == 0:
            return _event(job, ending, JobState.SUCCEEDED, Reason.EXITED_ZERO)
        return _event(job, ending, JobState.FAILED, notice.reason)
    return _event(job, ending, JobState.CANCELLED, notice.reason)


def _by_itself(job: Job, ending: Ending, policy: Policy) -> AttemptEnded:
    if ending.exit_code == 0 and not ending.lost:
        if job.spec.restart is RestartRule.ALWAYS:
            return _again(job, ending, policy, Reason.RESTARTED_BY_RULE)
        return _event(job, ending, JobState.SUCCEEDED, Reason.EXITED_ZERO)
    wanted = job.spec.restart is not RestartRule.NEVER and not ending.never_again
    if wanted or ending.retry_start or job.standing:
        return _again(job, ending, policy, ending.reason)
    return _event(job, ending, JobState.FAILED, ending.reason)


def _again(job: Job, ending: Ending, policy: Policy, reason: Reason) -> AttemptEnded:
    last = job.attempts[-1]
    ran_s = ending.at_s - last.started_s if last.started_s is not None else 0.0
    failures = 1 if ran_s >= policy.restart_reset_s else job.failures + 1
    if failures > policy.restart_attempts_max and not job.standing:
        return _event(job, ending, JobState.FAILED, ending.reason, failures=failures)
    wait_s = backoff_s(policy.restart_backoff_s, policy.restart_backoff_s_max, failures)
    return _event(job, ending, JobState.PENDING, reason, eligible_s=ending.at_s + wait_s, failures=failures)


def _event(
    job: Job,
    ending: Ending,
    to: JobState,
    reason: Reason,
    *,
    eligible_s: float = 0.0,
    preemptions: int | None = None,
    failures: int | None = None,
) -> AttemptEnded:
    return AttemptEnded(
        at_s=ending.at_s,
        job_id=job.id,
        attempt=job.attempt,
        to=to,
        reason=reason,
        exit_code=ending.exit_code,
        lost=ending.lost,
        detail=ending.detail,
        eligible_s=eligible_s,
        preemptions=job.preemptions if preemptions is None else preemptions,
        failures=job.failures if failures is None else failures,
        behind_s=ending.behind_s,
    )
