"""Work that power limits keep jobs from doing: what a daemon reckons, and what a simulated job knows."""

import pytest

from scheduler.control.slowed import Slowed
from scheduler.model.events import fold, submitted
from scheduler.model.jobs import Job, JobState
from scheduler.model.policy import Policy
from scheduler.model.power import Curve
from scheduler.model.reasons import Reason
from scheduler.planning.outcome import Ending, ended
from scheduler.simulation.machine import speed_at
from tests.harness import values


def live(*events: object, **spec: object) -> Job:
    job = submitted(values.submission(1, expected_duration_s=1000.0, **spec), 1)
    for event in (values.start(1), values.started(1, at_s=0.0), *events):
        job = fold(job, event, job.revision + 1)  # type: ignore[arg-type]
    return job


def test_a_job_falls_behind_by_what_its_limit_costs_and_keeps_that_when_it_is_lifted() -> None:
    slowed, job = Slowed(), live()
    assert slowed.advance([job], lambda _: 0.5, 100.0) == []
    assert slowed.advance([job], lambda _: 0.5, 160.0) == [job]
    assert slowed.behind_s(job) == pytest.approx(30.0)
    assert slowed.advance([job], lambda _: 1.0, 180.0) == [job]
    assert slowed.advance([job], lambda _: 1.0, 999.0) == []
    assert slowed.behind_s(job) == pytest.approx(40.0)


def test_who_was_never_held_back_costs_nothing_and_another_attempt_begins_anew() -> None:
    slowed, job = Slowed(), live()
    slowed.advance([job], lambda _: 1.0, 100.0)
    assert slowed.behind_s(job) == 0.0
    slowed.advance([job], lambda _: 0.5, 100.0)
    slowed.advance([job], lambda _: 0.5, 200.0)
    told = fold(job, values.stop(1, at_s=200.0), job.revision + 1)
    gone = fold(told, values.end(1, JobState.PENDING, at_s=210.0), told.revision + 1)
    assert slowed.behind_s(gone) == 0.0


def test_a_clock_that_is_set_back_takes_nothing_back() -> None:
    slowed, job = Slowed(), live()
    slowed.advance([job], lambda _: 0.5, 100.0)
    slowed.advance([job], lambda _: 0.5, 120.0)
    slowed.advance([job], lambda _: 0.5, 20.0)
    assert slowed.behind_s(job) == pytest.approx(10.0)
    slowed.advance([job], lambda _: 0.5, 40.0)
    assert slowed.behind_s(job) == pytest.approx(20.0)


def test_what_was_not_done_is_still_to_be_done_in_the_next_attempt() -> None:
    told = live(values.stop(1, at_s=300.0))
    ending = Ending(310.0, 0, Reason.EXITED_ZERO, behind_s=120.0)
    gone = fold(told, ended(told, ending, Policy()), told.revision + 1)
    assert gone.worked_s == pytest.approx(310.0 - 120.0)


@pytest.mark.parametrize(
    ("curve", "draw", "speed"),
    [
        (None, 0.6, 0.6),
        (Curve(((1000, 1000), (800, 950))), 1.0, 1.0),
        (Curve(((1000, 1000), (800, 950))), 0.9, 0.975),
        (Curve(((1000, 1000), (800, 950))), 0.4, 0.475),  # in proportion where nothing is known
    ],
)
def test_simulated_work_goes_by_the_curve_that_the_policy_names(
    curve: Curve | None, draw: float, speed: float
) -> None:
    assert speed_at(curve, draw) == pytest.approx(speed)
