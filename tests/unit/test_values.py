"""A changed value is what `dataclasses.replace` makes, and shares nothing that could change with the old."""

from dataclasses import dataclass, fields, replace

import pytest

from scheduler.model.events import submitted
from scheduler.model.jobs import Attempt, Job, JobState
from scheduler.model.values import changed
from tests.harness.values import submission


def job() -> Job:
    return submitted(submission(1), 1)


@dataclass(frozen=True, slots=True)
class Checked:
    number: int

    def __post_init__(self) -> None:
        assert self.number > 0


def test_each_field_of_a_job_and_of_an_attempt_changes_alone_and_the_old_value_stays() -> None:
    attempt = Attempt(1, ("GPU-a",), 1000, 1.0, "launcher")
    for value in (attempt, job()):
        for field in fields(value):
            before = replace(value)
            new = changed(value, **{field.name: "else"})
            assert new == replace(value, **{field.name: "else"}) != value
            assert value == before
    assert changed(job(), state=JobState.FAILED, detail="x") == replace(
        job(), state=JobState.FAILED, detail="x"
    )


def test_a_field_that_is_not_there_and_a_class_that_checks_itself_are_refused() -> None:
    with pytest.raises(KeyError, match="colour"):
        changed(job(), colour="red")
    with pytest.raises(AssertionError, match="checks itself"):
        changed(Checked(1), number=-1)
