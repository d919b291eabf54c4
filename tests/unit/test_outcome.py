"""What becomes of a job when an attempt ends."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.events import MOVES, CancelRequested, JobEvent, StopDecided, fold, submitted
from scheduler.model.jobs import Job, JobState, Notice, OnPreempt, RestartRule
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.planning.outcome import Ending, ended
from tests.harness.values import start, started, stop, submission

S, R = JobState, Reason
POLICY = Policy(
    preemption_backoff_s=1.0,
    preemption_backoff_s_max=4.0,
    restart_backoff_s=2.0,
    restart_backoff_s_max=10.0,
    restart_attempts_max=3,
    restart_reset_s=600.0,
)
BY_JOB = R.PREEMPTED_BY_HIGHER_RANK
TIME_LIMIT = StopDecided(3.0, "j1", 1, S.STOPPING, Notice(R.TIME_LIMIT, 3.0, 13.0))
CANCEL = StopDecided(3.0, "j1", 1, S.STOPPING, Notice(R.CANCELLED_BY_REQUEST, 3.0, 13.0))


def live(*events: JobEvent, facts: dict[str, Any] | None = None, **spec: Any) -> Job:
    job = submitted(submission(1, **spec), 1)
    for event in (start(1), started(1), *events):
        job = fold(job, event, 2)
    return replace(job, **(facts or {}))


def outcome(job: Job, code: int | None, **facts: Any) -> tuple[JobState, Reason, float]:
    """State, reason and back-off after the job's attempt ended at 100 s."""
    reason = facts.pop("reason", R.EXITED_ZERO if code == 0 else R.EXITED_NONZERO)
    event = ended(job, Ending(100.0, code, reason, **facts), POLICY)
    after = fold(job, event, 3)
    assert after.attempts[-1].exit_code == code, "the attempt keeps its own code, whatever becomes of the job"
    assert after.attempts[-1].exited_s == 100.0
    return after.state, after.reason, max(0.0, after.eligible_s - 100.0)


def test_an_exit_by_itself_succeeds_or_fails() -> None:
    assert outcome(live(), 0) == (S.SUCCEEDED, R.EXITED_ZERO, 0.0)
    assert outcome(live(), 1) == (S.FAILED, R.EXITED_NONZERO, 0.0)
    assert outcome(live(), 137, reason=R.KILLED_BY_SIGNAL) == (S.FAILED, R.KILLED_BY_SIGNAL, 0.0)


@pytest.mark.parametrize(
    ("rule", "code", "again"),
    [
        (RestartRule.NEVER, 0, False),
        (RestartRule.NEVER, 1, False),
        (RestartRule.ON_FAILURE, 0, False),
        (RestartRule.ON_FAILURE, 1, True),
        (RestartRule.ALWAYS, 0, True),
        (RestartRule.ALWAYS, 1, True),
    ],
)
def test_the_restart_rule_decides_who_comes_back(rule: RestartRule, code: int, again: bool) -> None:
    state, _, wait_s = outcome(live(restart=rule), code)
    assert (state is S.PENDING, wait_s) == (again, 2.0 if again else 0.0)


@pytest.mark.parametrize(("failures", "wait_s"), [(0, 2.0), (1, 4.0), (2, 8.0)])
def test_the_back_off_doubles(failures: int, wait_s: float) -> None:
    job = live(restart=RestartRule.ALWAYS, facts={"failures": failures})
    assert outcome(job, 1) == (S.PENDING, R.EXITED_NONZERO, wait_s)


def test_after_the_last_restart_in_a_row_the_job_fails() -> None:
    assert outcome(live(restart=RestartRule.ALWAYS, facts={"failures": 3}), 1)[0] is S.FAILED


def test_a_standing_job_never_fails_for_good_and_its_back_off_is_bounded() -> None:
    job = live(restart=RestartRule.ALWAYS, facts={"failures": 30, "standing": "miner"})
    assert outcome(job, 1) == (S.PENDING, R.EXITED_NONZERO, 10.0)


def test_a_job_that_ran_long_has_recovered() -> None:
    job = live(restart=RestartRule.ALWAYS, facts={"failures": 3})
    old = replace(job, attempts=(replace(job.attempts[0], started_s=100.0 - 600.0),))
    assert outcome(old, 1) == (S.PENDING, R.EXITED_NONZERO, 2.0)


def test_a_start_that_failed_for_the_nodes_reasons_is_tried_again_whatever_the_rule() -> None:
    job = fold(submitted(submission(1), 1), start(1), 2)
    assert outcome(job, None, reason=R.START_FAILED, retry_start=True) == (S.PENDING, R.START_FAILED, 2.0)


def test_a_start_that_failed_for_the_jobs_reasons_is_not() -> None:
    job = fold(submitted(submission(1, restart=RestartRule.ALWAYS), 1), start(1), 2)
    assert outcome(job, 127, reason=R.COMMAND_NOT_FOUND, never_again=True)[0] is S.FAILED


@pytest.mark.parametrize(("rule", "to"), [(RestartRule.NEVER, S.FAILED), (RestartRule.ON_FAILURE, S.PENDING)])
def test_a_lost_attempt_goes_by_the_rule(rule: RestartRule, to: JobState) -> None:
    assert outcome(live(restart=rule), None, reason=R.LAUNCHER_LOST, lost=True)[:2] == (to, R.LAUNCHER_LOST)


@pytest.mark.parametrize("code", [0, 1, 143, None])
def test_a_victim_is_requeued_whatever_its_code(code: int | None) -> None:
    assert outcome(live(stop(1, by="j9")), code)[:2] == (S.PENDING, R.REQUEUED_AFTER_PREEMPTION)


@pytest.mark.parametrize(("count", "wait_s"), [(0, 0.0), (1, 1.0), (2, 2.0), (3, 4.0), (9, 4.0)])
def test_who_is_preempted_again_and_again_backs_off_but_not_the_first_time(count: int, wait_s: float) -> None:
    job = live(stop(1, by="j9"), facts={"preemptions": count})
    assert outcome(job, 143)[2] == wait_s
    assert ended(job, Ending(100.0, 143, R.KILLED_BY_SIGNAL), POLICY).preemptions == count + 1


def test_a_standing_job_is_back_at_once() -> None:
    assert outcome(live(stop(1, by="j9"), facts={"preemptions": 9, "standing": "miner"}), 143)[2] == 0.0


def test_a_stop_for_the_nodes_sake_is_not_counted_as_a_preemption() -> None:
    job = live(stop(1))
    assert outcome(job, 143) == (S.PENDING, R.REQUEUED_BY_OPERATOR, 0.0)
    assert ended(job, Ending(100.0, 143, R.KILLED_BY_SIGNAL), POLICY).preemptions == 0


def test_exit_zero_is_done_holds_after_a_notice_too() -> None:
    job = live(stop(1, by="j9"), exit_zero_is_done=True)
    assert outcome(job, 0)[0] is S.SUCCEEDED
    assert outcome(job, 1)[0] is S.PENDING


def test_a_preemption_cancels_who_wants_that_but_not_one_that_was_done() -> None:
    job = live(stop(1, by="j9"), on_preempt=OnPreempt.CANCEL)
    assert outcome(job, 0)[:2] == (S.CANCELLED, R.CANCELLED_BY_PREEMPTION)
    done = live(stop(1, by="j9"), on_preempt=OnPreempt.CANCEL, exit_zero_is_done=True)
    assert outcome(done, 0)[0] is S.SUCCEEDED


def test_a_cancel_during_the_grace_wins() -> None:
    job = live(stop(1, by="j9"), CancelRequested(3.5, "j1"), exit_zero_is_done=True)
    assert outcome(job, 0)[:2] == (S.CANCELLED, R.CANCELLED_BY_REQUEST)


def test_who_was_cancelled_is_cancelled_whatever_its_code() -> None:
    for code in (0, 1, None):
        assert outcome(live(CANCEL, exit_zero_is_done=True), code)[0] is S.CANCELLED


def test_past_its_time_limit_a_job_fails_unless_it_says_that_it_is_done() -> None:
    assert outcome(live(TIME_LIMIT), 0)[:2] == (S.FAILED, R.TIME_LIMIT)
    assert outcome(live(TIME_LIMIT, exit_zero_is_done=True), 0)[0] is S.SUCCEEDED
    assert outcome(live(TIME_LIMIT, exit_zero_is_done=True), 1)[:2] == (S.FAILED, R.TIME_LIMIT)


LIVE_JOBS = st.builds(
    live,
    st.sampled_from([started(1), stop(1), stop(1, by="j9"), TIME_LIMIT, CANCEL]),
    facts=st.fixed_dictionaries(
        {
            "failures": st.integers(0, 5),
            "preemptions": st.integers(0, 5),
            "standing": st.sampled_from(["", "m"]),
        }
    ),
    restart=st.sampled_from(RestartRule),
    on_preempt=st.sampled_from(OnPreempt),
    exit_zero_is_done=st.booleans(),
)
ENDINGS = st.one_of(
    st.builds(Ending, st.just(100.0), st.integers(0, 255), st.just(R.EXITED_NONZERO)),
    st.just(Ending(100.0, None, R.LAUNCHER_LOST, lost=True)),
)


@given(LIVE_JOBS, ENDINGS)
def test_every_end_of_every_live_job_is_a_move_of_the_table(job: Job, ending: Ending) -> None:
    event = ended(job, ending, POLICY)
    assert event.to in MOVES[job.state]
    after = fold(job, event, 3)
    assert not after.holds
    assert event == ended(job, ending, POLICY)
    if job.standing and job.spec.restart is RestartRule.ALWAYS and after.state is not S.PENDING:
        assert job.state in (S.STOPPING, S.PREEMPTING), "a standing job ends only where it was told to"
