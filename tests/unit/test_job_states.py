"""The table of moves: every legal move works, every other raises and changes nothing."""

from dataclasses import replace

import pytest

from scheduler.errors import TransitionError
from scheduler.model.events import (
    MOVES,
    AttemptEnded,
    AttemptResumed,
    AttemptStarted,
    AttemptSuspended,
    JobEvent,
    PendingEnded,
    StartDecided,
    StopDecided,
    fold,
    submitted,
)
from scheduler.model.jobs import ATTEMPTS_KEPT, FINAL_STATES, Attempt, Job, JobState, Notice
from scheduler.model.reasons import Reason
from tests.harness.values import end, start, started, stop, submission, verified
from tools.draw_states import PAGE, page

NOTICE = Notice(Reason.TIME_LIMIT, 3.0, 13.0)


def job_in(state: JobState) -> Job:
    """A job in any state, with one attempt where it has started."""
    job = submitted(submission(1), 1)
    if state is JobState.PENDING:
        return job
    attempt = Attempt(1, ("GPU-a",), 1000, 1.0, "launcher-1", notice=NOTICE)
    return replace(job, state=state, attempts=(attempt,), attempt=1)


def event_to(job: Job, to: JobState) -> JobEvent:
    """An event that asks for the move."""
    if to is JobState.STARTING:
        return StartDecided(5.0, "j1", job.attempt + 1, ("GPU-a",), "launcher-1", Reason.BACKFILLED)
    if to is JobState.SUSPENDED:
        return AttemptSuspended(5.0, "j1", 1)
    if to is JobState.RUNNING and job.state is not JobState.STARTING:
        return AttemptResumed(5.0, "j1", 1)
    if to is JobState.RUNNING:
        return AttemptStarted(5.0, "j1", 1, 4711, 99)
    if to in (JobState.PREEMPTING, JobState.STOPPING):
        return StopDecided(5.0, "j1", 1, to, NOTICE)
    if job.state is JobState.PENDING:
        return PendingEnded(5.0, "j1", to, Reason.CANCELLED_BY_REQUEST)
    return AttemptEnded(5.0, "j1", 1, to, Reason.EXITED_ZERO)


ASKED = [(state, to) for state in JobState for to in JobState]


@pytest.mark.parametrize(("state", "to"), ASKED)
def test_a_move_is_made_if_and_only_if_the_table_has_it(state: JobState, to: JobState) -> None:
    job = job_in(state)
    if to in MOVES[state]:
        moved = fold(job, event_to(job, to), 2)
        assert (moved.state, moved.revision) == (to, 2)
    else:
        before = repr(job)
        with pytest.raises(TransitionError):
            fold(job, event_to(job, to), 2)
        assert repr(job) == before


def test_final_states_are_those_without_a_way_out() -> None:
    assert {state for state in JobState if not MOVES[state]} == FINAL_STATES


def test_the_page_of_states_is_drawn_from_the_table() -> None:
    assert PAGE.read_text() == page(), "run `python tools/draw_states.py`"


def test_a_start_that_is_reported_late_keeps_the_state_and_fills_in_the_pid() -> None:
    job = submitted(submission(1), 1)
    for revision, event in enumerate((start(1), stop(1), started(1)), 2):
        job = fold(job, event, revision)
    assert job.state is JobState.PREEMPTING
    assert job.attempts[-1].pid == 4711


def test_attempts_are_numbered_without_gaps_and_only_the_last_are_kept() -> None:
    job = submitted(submission(1), 1)
    for number in range(1, ATTEMPTS_KEPT + 5):
        for event in (start(1, number), started(1, number), end(1, JobState.PENDING, number)):
            job = fold(job, event, job.revision + 1)
    assert [attempt.number for attempt in job.attempts] == list(range(5, ATTEMPTS_KEPT + 5))
    with pytest.raises(TransitionError, match="keeps no attempt 1"):
        fold(job, verified(1, 1), job.revision + 1)
    with pytest.raises(TransitionError, match="follows"):
        fold(job, start(1, 1), job.revision + 1)
