"""The journal's chain: tampering shows wherever it is, old events go and the rest stays provable."""

import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.control.ledger import Ledger
from scheduler.effects.journal import JobFilter
from scheduler.effects.journal_file import DATABASE_NAME, chained
from scheduler.effects.journal_sqlite import EVENTS_DROPPED_AT_ONCE, SqliteJournal
from scheduler.effects.journal_verify import verify
from scheduler.errors import JournalCorrupt, JournalError, StateLocked
from scheduler.model.jobs import JobState
from scheduler.model.policy import Policy
from tests.harness.values import end, start, started, submission, verified


def written(directory: Path, jobs: int = 20, **options: int) -> None:
    """A journal in which jobs were submitted, ran and ended."""
    journal = SqliteJournal(directory, now_s=0.0, **options)
    ledger = Ledger(journal, Policy())
    for number in range(1, jobs + 1):
        for event in (
            submission(number, float(number), request_id=f"r-{number}"),
            start(number, at_s=float(number)),
            started(number, at_s=float(number)),
            end(number, at_s=float(number)),
            verified(number, at_s=float(number)),
        ):
            ledger.apply(event)
        ledger.commit()
    journal.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_event_is_found_whatever_was_changed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    written(directory, jobs=3)
    db = sqlite3.connect(directory / DATABASE_NAME)
    seq = data.draw(st.integers(1, 15), label="event")
    change = data.draw(st.sampled_from(["body", "kind", "hash", "delete", "swap"]), label="change")
    if change == "body":
        (body,) = db.execute("SELECT body FROM events WHERE seq = ?", (seq,)).fetchone()
        at = data.draw(st.integers(0, len(body) - 1), label="byte")
        db.execute(
            "UPDATE events SET body = ? WHERE seq = ?",
            (body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :], seq),
        )
    elif change == "kind":
        db.execute("UPDATE events SET kind = 'BackoffCleared' WHERE seq = ?", (seq,))
    elif change == "hash":
        db.execute("UPDATE events SET hash = zeroblob(32) WHERE seq = ?", (seq,))
    elif change == "delete":
        db.execute("DELETE FROM events WHERE seq >= ?", (seq,))
    else:
        other = seq % 15 + 1
        db.execute("UPDATE events SET seq = -1 WHERE seq = ?", (seq,))
        db.execute("UPDATE events SET seq = ? WHERE seq = ?", (seq, other))
        db.execute("UPDATE events SET seq = ? WHERE seq = -1", (other,))
    db.commit()
    db.close()
    assert not verify(directory).ok


def test_a_changed_job_row_is_found(tmp_path: Path) -> None:
    written(tmp_path)
    assert verify(tmp_path).ok
    db = sqlite3.connect(tmp_path / DATABASE_NAME)
    told, lie = '"exit_code":0', '"exit_code":1'
    db.execute("UPDATE jobs SET body = replace(CAST(body AS TEXT), ?, ?) WHERE number = 7", (told, lie))
    db.commit()
    db.close()
    assert "j7" in verify(tmp_path).problem


def test_a_meddled_tail_keeps_the_daemon_from_starting(tmp_path: Path) -> None:
    written(tmp_path)
    db = sqlite3.connect(tmp_path / DATABASE_NAME)
    db.execute("UPDATE events SET body = '{}' WHERE seq = (SELECT max(seq) FROM events)")
    db.commit()
    db.close()
    before = (tmp_path / DATABASE_NAME).read_bytes()
    with pytest.raises(JournalCorrupt, match="nothing was changed"):
        SqliteJournal(tmp_path, now_s=0.0)
    assert (tmp_path / DATABASE_NAME).read_bytes() == before


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    first = SqliteJournal(tmp_path, now_s=0.0)
    with pytest.raises(StateLocked, match="another wattshift daemon"):
        SqliteJournal(tmp_path, now_s=0.0)
    first.close()
    SqliteJournal(tmp_path, now_s=0.0).close()


def test_there_must_be_a_journal_to_verify(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="state directory"):
        verify(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_journal_beside_which_nothing_may_be_written_says_what_to_do(tmp_path: Path) -> None:
    written(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(JournalError, match="copy the state directory to where you may write"):
            verify(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_an_event_behind_the_last_one_is_found(tmp_path: Path) -> None:
    written(tmp_path, jobs=3)
    db = sqlite3.connect(tmp_path / DATABASE_NAME)
    (seq, running) = db.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    forged = chained(running, seq + 1, "BackoffCleared", b"{}")
    db.execute("INSERT INTO events VALUES (?, 0, 'BackoffCleared', '{}', ?)", (seq + 1, forged))
    db.commit()
    db.close()
    assert verify(tmp_path).problem == f"event {seq + 1} stands behind the last one, {seq}"


def test_old_jobs_and_events_go_and_what_stays_is_provable(tmp_path: Path) -> None:
    jobs = EVENTS_DROPPED_AT_ONCE // 5 + 100
    written(tmp_path, jobs=jobs, segment_events=200, segments_kept=1)
    journal = SqliteJournal(tmp_path, now_s=0.0, segment_events=200, segments_kept=1)
    gone: list[str] = []
    while (expired := journal.expire(float(jobs), kept_s=50.0, kept_max=1000)).more:
        gone += expired.job_ids
    assert gone == [f"j{number}" for number in range(1, jobs - 50)]
    left = journal.jobs(JobFilter(limit=1000))
    assert [job.number for job in left] == list(range(jobs, jobs - 51, -1))
    assert journal.request("r-1") is None
    assert journal.request(f"r-{jobs}") is not None
    assert journal.watch_floor > 0
    journal.close()
    found = verify(tmp_path)
    assert (found.ok, found.problem) == (True, "")
    assert 200 < found.events <= 400
    SqliteJournal(tmp_path, now_s=0.0).close()


def test_more_finished_jobs_than_may_be_kept_go_oldest_first(tmp_path: Path) -> None:
    written(tmp_path, jobs=20)
    journal = SqliteJournal(tmp_path, now_s=0.0)
    assert journal.expire(20.0, kept_s=1e9, kept_max=5).job_ids == [f"j{number}" for number in range(1, 16)]
    assert not journal.expire(20.0, kept_s=1e9, kept_max=5).more
    assert {job.state for job in journal.jobs(JobFilter())} == {JobState.SUCCEEDED}
    journal.close()
