"""The ledger: what a tick changes, and that a tick that could not be kept never was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.control.ledger import Committed, Ledger
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.errors import JournalFull
from scheduler.model.events import DaemonStarted, Event, GpuMarked, NodeDrainChanged
from scheduler.model.jobs import Job, JobState
from scheduler.model.policy import Policy
from scheduler.model.power import LimitKept
from scheduler.model.power_events import LimitChange, LimitsDecided
from scheduler.model.reasons import Reason
from tests.harness.values import end, start, started, stop, submission, verified


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    yield journal
    journal.close()


@pytest.fixture
def ledger(journal: SqliteJournal) -> Ledger:
    return Ledger(journal, Policy())


def state_of(ledger: Ledger) -> dict[str, Any]:
    return {
        "jobs": dict(ledger.jobs),
        "live": set(ledger.live),
        "pending": ledger.pending,
        "leaving": dict(ledger.leaving),
        "rows": len(ledger.table),
        "marks": dict(ledger.marks),
        "drain": ledger.drain,
        "next_number": ledger.next_number,
        "head": ledger.journal.head,
        "request": ledger.request("r-1"),
    }


def commit(ledger: Ledger, *events: Event) -> Committed:
    for event in events:
        ledger.apply(event)
    return ledger.commit()


LIFE = (
    (submission(1, request_id="r-1"), submission(2)),
    (start(1), start(2, 1, 1.0, "GPU-b")),
    (started(1), started(2)),
    (stop(1), end(2)),
    (end(1, JobState.PENDING), verified(2)),
    (verified(1), start(1, 2, 6.0)),
    (end(1, JobState.FAILED, 2),),
    (verified(1, 2),),
    (
        GpuMarked(9.0, "GPU-a", "cordoned", Reason.CORDONED_BY_OPERATOR),
        NodeDrainChanged(9.0, draining=True, stop_jobs=True),
    ),
)


def test_each_commit_is_seen_once_with_the_job_as_it_was_before(ledger: Ledger) -> None:
    seen = [step for tick in LIFE for step in commit(ledger, *tick).steps]
    newest: dict[int, Job] = {}
    for before, after in seen:
        assert before == newest.get(after.number), "also where the job was final already"
        newest[after.number] = after
    assert {number: job.state for number, job in newest.items()} == {1: "FAILED", 2: "SUCCEEDED"}


@pytest.mark.parametrize("ticks", range(len(LIFE)))
def test_a_tick_that_could_not_be_kept_never_was(
    ledger: Ledger, journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch, ticks: int
) -> None:
    for tick in LIFE[:ticks]:
        commit(ledger, *tick)
    before = state_of(ledger)
    for event in LIFE[ticks]:
        ledger.apply(event)
    assert state_of(ledger) != before

    def full(derived: Any) -> None:
        journal.abandon()
        raise JournalFull("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "commit", full)
        with pytest.raises(JournalFull):
            ledger.commit()
    assert state_of(ledger) == before
    for event in LIFE[ticks]:
        ledger.apply(event)
    ledger.abandon()
    assert state_of(ledger) == before
    for tick in LIFE[ticks:]:
        commit(ledger, *tick)
    assert (len(ledger.jobs), ledger.pending, ledger.live, ledger.leaving) == (0, 0, {}, {})


@pytest.mark.parametrize("ticks", range(len(LIFE) + 1))
def test_a_new_ledger_over_the_journal_is_the_same(
    ledger: Ledger, journal: SqliteJournal, ticks: int
) -> None:
    for tick in LIFE[:ticks]:
        commit(ledger, *tick)
    again = state_of(Ledger(journal, Policy()))
    # GPUs of jobs that are final are proved free by the first look after a start, not by the ledger.
    now = state_of(ledger) | {"leaving": again["leaving"]}
    assert again == now


def test_a_number_is_never_given_out_again(ledger: Ledger, journal: SqliteJournal) -> None:
    commit(ledger, submission(1), submission(2))
    commit(ledger, start(2), started(2), end(2))
    ledger.apply(submission(3))
    ledger.abandon()
    assert ledger.next_number == 3, "nobody was told of the third"
    assert Ledger(journal, Policy()).next_number == 3


def test_an_environment_is_kept_with_its_job_or_not_at_all(ledger: Ledger, journal: SqliteJournal) -> None:
    ledger.apply(submission(1))
    ledger.keep_environment(1, {"TOKEN": "x"})
    ledger.abandon()
    commit(ledger, submission(1))
    assert journal.environment(1) == {}
    ledger.apply(submission(2))
    ledger.keep_environment(2, {"TOKEN": "y"})
    ledger.commit()
    assert journal.environment(2) == {"TOKEN": "y"}


def test_limits_that_were_set_outlive_the_daemon_and_no_reboot(ledger: Ledger) -> None:
    commit(ledger, DaemonStarted(1.0, "1", "boot-1", 7))
    commit(ledger, LimitsDecided(2.0, (LimitChange("GPU-a", 700.0, 300.0),)))
    commit(ledger, DaemonStarted(3.0, "1", "boot-1", 8))
    assert Ledger(ledger.journal, Policy()).power.limits == {"GPU-a": LimitKept(700.0, 300.0)}
    commit(ledger, DaemonStarted(4.0, "1", "boot-2", 7))
    assert Ledger(ledger.journal, Policy()).power.limits == {}
