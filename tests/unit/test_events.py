"""The table of moves and the fold: what may happen to a job, and that nothing else does."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.errors import TransitionError
from scheduler.model.events import (
    MOVES,
    AttemptAcknowledged,
    AttemptResumed,
    AttemptSignalled,
    AttemptSuspended,
    BackoffCleared,
    CancelRequested,
    CheckpointReported,
    JobEvent,
    PendingEnded,
    ResumeDecided,
    SuccessorStarted,
    SuspendDecided,
    fold,
    submitted,
)
from scheduler.model.jobs import ATTEMPTS_KEPT, FINAL_STATES, LIVE_STATES, Job, JobState
from scheduler.model.reasons import Reason
from tests.harness.values import end, start, started, stop, submission, verified

S = JobState
FREEZE = SuspendDecided(4.0, "j1", 1, Reason.SHED_FOR_POWER)
THAW = ResumeDecided(6.0, "j1", 1, Reason.RESUMED_AFTER_SHED)


def folded(*events: JobEvent) -> Job:
    job = submitted(submission(1), 1)
    for revision, event in enumerate(events, 2):
        job = fold(job, event, revision)
    return job


def in_state(state: JobState) -> Job:
    """A job in its first attempt (or before it) in this state."""
    ways: dict[JobState, tuple[JobEvent, ...]] = {
        S.PENDING: (),
        S.STARTING: (start(1),),
        S.RUNNING: (start(1), started(1)),
        S.SUSPENDED: (start(1), started(1), FREEZE, AttemptSuspended(4.5, "j1", 1)),
        S.PREEMPTING: (start(1), started(1), stop(1)),
        S.STOPPING: (start(1), started(1), stop(1, S.STOPPING)),
        S.SUCCEEDED: (start(1), started(1), end(1)),
        S.FAILED: (start(1), started(1), end(1, S.FAILED, exit_code=1)),
        S.CANCELLED: (PendingEnded(9.0, "j1", S.CANCELLED, Reason.CANCELLED_BY_REQUEST),),
    }
    job = folded(*ways[state])
    assert job.state is state
    return job


def legal(job: Job, event: JobEvent) -> Job | None:
    """The job after the event; None where it is refused. Either way the job itself stays as it was."""
    before = replace(job)
    try:
        after = fold(job, event, 99)
    except TransitionError:
        after = None
    else:
        assert fold(job, event, 99) == after
        assert after.revision == 99
    assert job == before
    return after


def test_the_table_knows_every_state_and_final_ones_are_final() -> None:
    assert set(MOVES) == set(JobState)
    assert {state for state, moves in MOVES.items() if not moves} == FINAL_STATES
    assert LIVE_STATES | FINAL_STATES | {S.PENDING} == set(JobState)
    assert all(state not in moves for state, moves in MOVES.items())


@pytest.mark.parametrize("state", JobState)
def test_only_a_waiting_job_is_started(state: JobState) -> None:
    job = in_state(state)
    after = legal(job, start(1, job.attempt + 1))
    assert (after is not None) == (state is S.PENDING)
    if after is not None:
        assert (after.state, after.attempt, after.holds) == (S.STARTING, 1, True)


def test_attempts_are_numbered_without_gaps() -> None:
    assert legal(in_state(S.PENDING), start(1, 2)) is None
    assert legal(in_state(S.PENDING), start(1, 0)) is None


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("to", [S.PREEMPTING, S.STOPPING])
def test_a_notice_is_given_where_the_table_says_so(state: JobState, to: JobState) -> None:
    after = legal(in_state(state), stop(1, to))
    assert (after is not None) == (to in MOVES[state])
    if after is not None:
        assert (after.state, after.attempts[-1].notice is not None) == (to, True)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("to", [S.PENDING, *sorted(FINAL_STATES)])
def test_an_attempt_ends_where_the_table_says_so(state: JobState, to: JobState) -> None:
    after = legal(in_state(state), end(1, to, exit_code=3))
    assert (after is not None) == (state in LIVE_STATES and to in MOVES[state])
    if after is not None:
        assert (after.state, after.attempts[-1].exit_code, after.holds) == (to, 3, False)
        assert (after.finished_s is not None) == (to in FINAL_STATES)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("to", [S.CANCELLED, S.FAILED])
def test_only_a_waiting_job_ends_without_an_attempt(state: JobState, to: JobState) -> None:
    after = legal(in_state(state), PendingEnded(9.0, "j1", to, Reason.DEADLINE_UNREACHABLE))
    assert (after is not None) == (state is S.PENDING)


@pytest.mark.parametrize("state", JobState)
def test_facts_about_an_attempt_are_taken_while_it_lives(state: JobState) -> None:
    job = in_state(state)
    lives = state in LIVE_STATES
    for event in (
        started(1),
        AttemptSignalled(5.0, "j1", 1),
        AttemptAcknowledged(5.0, "j1", 1),
        CheckpointReported(5.0, "j1", 1),
    ):
        assert (legal(job, event) is not None) == lives
    assert (legal(job, CancelRequested(5.0, "j1")) is not None) == (state is S.PREEMPTING)
    assert (legal(job, BackoffCleared(5.0, "j1")) is not None) == (state is S.PENDING)
    known = bool(job.attempts)
    assert (legal(job, verified(1)) is not None) == known
    assert (legal(job, SuccessorStarted(5.0, "j1", 1)) is not None) == known


@pytest.mark.parametrize("state", JobState)
def test_only_a_job_that_runs_is_frozen_and_only_a_frozen_one_resumes(state: JobState) -> None:
    job = in_state(state)
    for event in (FREEZE, THAW):
        assert (legal(job, event) is not None) == (state in (S.RUNNING, S.SUSPENDED))
    assert (legal(job, AttemptSuspended(5.0, "j1", 1)) is not None) == (state is S.RUNNING)
    assert (legal(job, AttemptResumed(5.0, "j1", 1)) is not None) == (state is S.SUSPENDED)


def test_the_state_follows_the_launcher_and_the_reason_the_decision() -> None:
    told = folded(start(1), started(1), FREEZE)
    assert (told.state, told.reason, told.attempts[-1].suspend_s) == (S.RUNNING, FREEZE.reason, 4.0)
    frozen = fold(told, AttemptSuspended(4.5, "j1", 1), 5)
    assert (frozen.state, frozen.reason, frozen.state_since_s) == (S.SUSPENDED, FREEZE.reason, 4.5)
    back = fold(fold(frozen, THAW, 6), AttemptResumed(6.5, "j1", 1), 7)
    last = back.attempts[-1]
    assert (back.state, back.reason) == (S.RUNNING, THAW.reason)
    assert (last.suspend_s, last.suspended_s, last.resumed_s, last.suspended_total_s) == (None, 4.5, 6.5, 2.0)


def test_a_notice_ends_the_freeze() -> None:
    last = fold(in_state(S.SUSPENDED), stop(1, S.STOPPING), 9).attempts[-1]
    assert (last.suspend_s, last.resumed_s) == (None, last.notice.decided_s if last.notice else None)


def test_facts_about_another_attempt_are_refused() -> None:
    job = in_state(S.RUNNING)
    for event in (started(1, 2), stop(1, S.STOPPING, 2), end(1, S.FAILED, 2), verified(1, 2)):
        assert legal(job, event) is None


def test_a_job_is_submitted_once() -> None:
    assert legal(in_state(S.PENDING), submission(1)) is None


def test_a_start_that_is_told_after_the_notice_does_not_take_it_back() -> None:
    job = folded(start(1), stop(1), started(1))
    assert job.state is S.PREEMPTING
    assert job.attempts[-1].started_s == 2.0


ANY_EVENT = st.one_of(
    st.builds(start, st.just(1), st.integers(1, 40)),
    st.builds(started, st.just(1), st.integers(1, 40)),
    st.builds(stop, st.just(1), st.sampled_from([S.PREEMPTING, S.STOPPING]), st.integers(1, 40)),
    st.builds(
        end, st.just(1), st.sampled_from([S.PENDING, S.PENDING, *sorted(FINAL_STATES)]), st.integers(1, 40)
    ),
    st.builds(verified, st.just(1), st.integers(1, 40)),
    st.just(CancelRequested(5.0, "j1")),
    st.just(BackoffCleared(5.0, "j1")),
)


@given(st.lists(ANY_EVENT, max_size=60))
def test_whatever_comes_a_job_moves_only_along_the_table(events: list[JobEvent]) -> None:
    job = submitted(submission(1), 1)
    kept: list[JobEvent] = []
    for event in events:
        after = legal(job, event)
        if after is None:
            continue
        assert after.state is job.state or after.state in MOVES[job.state]
        assert after.attempt in (job.attempt, job.attempt + 1)
        assert len(after.attempts) <= ATTEMPTS_KEPT
        assert after.holds == (after.state in LIVE_STATES)
        kept.append(event)
        job = after
    assert replace(folded(*kept), revision=0) == replace(job, revision=0), "a job is a fold over its events"


def test_a_job_that_restarts_for_ever_keeps_its_newest_attempts() -> None:
    job = submitted(submission(1), 1)
    for number in range(1, ATTEMPTS_KEPT + 5):
        for event in (start(1, number), started(1, number), end(1, S.PENDING, number)):
            job = fold(job, event, 2)
    assert [attempt.number for attempt in job.attempts] == list(range(5, ATTEMPTS_KEPT + 5))
