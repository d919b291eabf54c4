"""When the loop ticks: a lone client never waits, a crowd shares its commits."""

from typing import Any, cast

from scheduler.control.inbox import Asked, Cancel, Command, Elapsed, HandoverResult, Submit
from scheduler.control.pace import (
    EXIT_LINGER_S,
    PROBE_EVERY_TICKS,
    REPORT_LINGER_S,
    SUBMIT_LINGER_S,
    Pace,
)
from scheduler.effects.launcher import AttemptKey, Exited, Started

NOBODY = cast(Any, None)
SUBMISSION = Asked(Submit(()), NOBODY)
KEY = AttemptKey("j1", 1)


def asked(command: Command) -> Asked:
    return Asked(command, NOBODY)


def test_a_lone_client_waits_once_in_many_calls() -> None:
    pace = Pace()
    waits = 0
    for _ in range(10 * PROBE_EVERY_TICKS):
        waits += pace.linger_s(SUBMISSION) > 0
        pace.took([SUBMISSION])
    assert 0 < waits <= 10


def test_those_who_come_together_wait_for_each_other() -> None:
    pace = Pace()
    pace.took([SUBMISSION, SUBMISSION])
    assert pace.linger_s(SUBMISSION) == SUBMIT_LINGER_S
    assert pace.linger_s(asked(Cancel("j1"))) == 0.0
    pace.took([SUBMISSION])
    assert pace.linger_s(SUBMISSION) == 0.0


def test_an_exit_is_never_kept_waiting_but_a_start_may_be() -> None:
    pace = Pace()
    pace.took([SUBMISSION, SUBMISSION])
    assert pace.linger_s(Exited(KEY, 0.0, 0, None)) == 0.0
    assert pace.linger_s(Elapsed()) == 0.0
    assert pace.linger_s(Started(KEY, 0.0, 1, 1)) == REPORT_LINGER_S


def test_of_several_that_were_told_to_go_the_first_wait_for_the_others() -> None:
    pace = Pace()
    gone, proved = Exited(KEY, 0.0, 0, None), HandoverResult("GPU-a", None, "")
    assert pace.linger_s(gone, awaits_exits=True) == EXIT_LINGER_S
    assert pace.linger_s(proved, awaits_exits=True) == EXIT_LINGER_S
    assert pace.linger_s(proved) == 0.0
    assert pace.linger_s(Elapsed(), awaits_exits=True) == 0.0
