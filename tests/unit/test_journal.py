"""The journal: one chain, nothing half written, all tampering found, old events go without a broken link."""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.control.ledger import Ledger
from scheduler.effects import journal_file, journal_sqlite
from scheduler.effects.journal import JobFilter
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.effects.journal_verify import verify
from scheduler.errors import JournalCorrupt, JournalError, JournalFull, StateLocked
from scheduler.model.events import Event, GpuMarked, UsageBooked, UsageEntry
from scheduler.model.gpus import GpuBooked
from scheduler.model.jobs import JobState
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from tests.harness.values import end, start, started, stop, submission, verified

SECRET = "tiger-7f3a9c-lily"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    yield journal
    journal.close()


def live(ledger: Ledger, *ticks: tuple[Event, ...]) -> None:
    for tick in ticks:
        for event in tick:
            ledger.apply(event)
        ledger.commit()


def life(number: int, at_s: float = 10.0) -> tuple[tuple[Event, ...], ...]:
    return (
        (submission(number, at_s, request_id=f"r-{number}"),),
        (start(number, 1, at_s + 1),),
        (started(number, 1, at_s + 2), stop(number, JobState.STOPPING, 1, at_s + 3)),
        (end(number, JobState.CANCELLED, 1, at_s + 4),),
        (verified(number, 1, at_s + 5),),
    )


def written(tmp_path: Path, jobs: int = 2) -> Path:
    """A journal on disk with some life in it, and nobody there; returns its file."""
    journal = SqliteJournal(tmp_path, now_s=0.0)
    ledger = Ledger(journal, Policy())
    for number in range(1, jobs + 1):
        live(ledger, *life(number))
    live(
        ledger,
        (submission(jobs + 1, 99.0), GpuMarked(99.0, "GPU-a", "cordoned", Reason.CORDONED_BY_OPERATOR)),
    )
    journal.close()
    assert verify(tmp_path).ok
    return tmp_path / "journal.sqlite"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        yield db


# The chain -------------------------------------------------------------------------------------


def test_any_changed_byte_of_any_event_is_found(tmp_path: Path) -> None:
    path = written(tmp_path, jobs=1)
    with opened(path) as db:
        rows = db.execute("SELECT seq, kind, body, hash FROM events").fetchall()
    tried = 0
    for seq, kind, body, hash_ in rows:
        for column, value in (("body", bytes(body)), ("hash", bytes(hash_)), ("kind", kind.encode())):
            for place in range(0, len(value), 1 if column == "kind" else 29):
                changed = value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]
                told: Any = changed.decode() if column == "kind" else changed
                with opened(path) as db:
                    db.execute(f"UPDATE events SET {column} = ? WHERE seq = ?", (told, seq))
                assert not verify(tmp_path).ok, f"byte {place} of the {column} of event {seq}"
                with opened(path) as db:
                    original: Any = kind if column == "kind" else value
                    db.execute(f"UPDATE events SET {column} = ? WHERE seq = ?", (original, seq))
                tried += 1
    assert tried > 100
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM events WHERE seq = 3",
        "DELETE FROM events WHERE seq = 1",
        "DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)",
        "DELETE FROM events",
        "UPDATE events SET seq = 1000 WHERE seq = (SELECT max(seq) FROM events)",
        "INSERT INTO events SELECT seq + 1, at_s, kind, body, hash FROM events ORDER BY seq DESC LIMIT 1",
        "UPDATE jobs SET body = (SELECT body FROM jobs WHERE number = 1) WHERE number = 2",
        "UPDATE jobs SET body = replace(body, 'CANCELLED', 'SUCCEEDED') WHERE number = 1",
    ],
)
def test_lost_added_and_moved_events_and_changed_jobs_are_found(tmp_path: Path, sql: str) -> None:
    path = written(tmp_path)
    with opened(path) as db:
        assert db.execute(sql).rowcount
    assert not verify(tmp_path).ok


def test_a_swap_of_two_events_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    with opened(path) as db:
        db.execute("UPDATE events SET seq = -1 WHERE seq = 3")
        db.execute("UPDATE events SET seq = 3 WHERE seq = 4")
        db.execute("UPDATE events SET seq = 4 WHERE seq = -1")
    assert not verify(tmp_path).ok


def test_a_broken_tail_is_refused_when_the_journal_is_opened(tmp_path: Path) -> None:
    path = written(tmp_path)
    with opened(path) as db:
        db.execute("UPDATE events SET body = replace(body, 'j2', 'j1') WHERE kind = 'AttemptEnded'")
    with pytest.raises(JournalCorrupt, match="do not fit their hashes"):
        SqliteJournal(tmp_path, now_s=0.0)
    with pytest.raises(JournalCorrupt, match="do not fit their hashes"):
        SqliteJournal(tmp_path, now_s=0.0)  # the lock was given back


def test_verify_reads_beside_a_writer(tmp_path: Path, journal: SqliteJournal) -> None:
    ledger = Ledger(journal, Policy())
    live(ledger, *life(1))
    found = verify(tmp_path)
    assert (found.ok, found.first, found.last, found.events) == (True, 1, journal.head, journal.head)
    live(ledger, *life(2))
    assert verify(tmp_path).last == journal.head


def test_there_is_nothing_to_verify_where_there_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="does not exist"):
        verify(tmp_path)


def test_two_can_not_have_the_same_journal(tmp_path: Path, journal: SqliteJournal) -> None:
    with pytest.raises(StateLocked, match="another wattshift daemon"):
        SqliteJournal(tmp_path, now_s=0.0)


# Transactions ----------------------------------------------------------------------------------


class Failing:
    """A connection whose n-th statement of a transaction finds the disk full."""

    def __init__(self, db: sqlite3.Connection, fails_at: int) -> None:
        self._db = db
        self._left = fails_at
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def _count(self, sql: str) -> None:
        if sql.startswith("ROLLBACK"):
            return
        self._left -= 1
        if self._left == 0:
            self.failed = True
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    def execute(self, sql: str, *values: Any) -> Any:
        self._count(sql)
        return self._db.execute(sql, *values)

    def executemany(self, sql: str, *values: Any) -> Any:
        self._count(sql)
        return self._db.executemany(sql, *values)


def content(path: Path) -> dict[str, list[Any]]:
    with opened(path) as db:
        tables = ("events", "jobs", "requests", "environments", "usage", "meta", "segments")
        return {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in tables}


def test_a_commit_that_fails_at_any_statement_leaves_nothing(
    tmp_path: Path, journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(journal, Policy())
    live(ledger, *life(1))
    path = tmp_path / "journal.sqlite"
    before, head = content(path), journal.head
    entry = UsageEntry("j2", "GPU-a", "", "TRAINING", 5, 6, 7)
    tick = (submission(2, 50.0, request_id="r-2"), start(2, 1, 51.0), UsageBooked(52.0, (entry,)))
    failures = 0
    for fails_at in range(1, 100):
        with monkeypatch.context() as patch:
            failing = Failing(journal._db, fails_at)
            patch.setattr(journal, "_db", failing)
            for event in tick:
                ledger.apply(event)
            ledger.keep_environment(2, {"TOKEN": SECRET})
            if fails_at > 1 and not failing.failed and failures and fails_at > failures + 1:
                break
            try:
                ledger.commit()
            except JournalFull:
                failures += 1
            else:
                break
        assert (content(path), journal.head, journal.staged) == (before, head, False)
    assert failures >= 6
    assert journal.head == head + 3
    assert verify(tmp_path).ok
    assert journal.request("r-2") is not None


def test_what_was_committed_is_there_for_the_next_daemon(tmp_path: Path) -> None:
    written(tmp_path)
    journal = SqliteJournal(tmp_path, now_s=0.0)
    try:
        assert [job.id for job in journal.active_jobs()] == ["j3"]
        assert [job.id for job in journal.jobs(JobFilter())] == ["j3", "j2", "j1"]
        assert journal.node_state().next_number == 4
        assert set(journal.node_state().marks) == {"GPU-a"}
        assert journal.request("r-1") is not None
    finally:
        journal.close()


@pytest.mark.parametrize("jobs", [1, 40])
def test_commits_write_over_what_was_laid_for_the_log_and_a_crash_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    laid_bytes = 1 << 18  # one job's life fits into it, forty don't
    monkeypatch.setattr(journal_file, "WAL_BYTES_LAID", laid_bytes)
    journal = SqliteJournal(tmp_path / "one", now_s=0.0)
    log = tmp_path / "one" / "journal.sqlite-wal"
    assert log.stat().st_size == laid_bytes
    ledger = Ledger(journal, Policy())
    for number in range(1, jobs + 1):
        live(ledger, *life(number))
    assert (log.stat().st_size == laid_bytes) is (jobs == 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # as `kill -9` leaves it
    (tmp_path / "two" / "journal.sqlite-shm").unlink()
    journal.close()

    again = SqliteJournal(tmp_path / "two", now_s=0.0)
    assert again.head == journal.head
    live(Ledger(again, Policy()), *life(jobs + 1))
    again.close()
    assert verify(tmp_path / "two").ok


def test_nothing_is_laid_for_the_log_on_a_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid = journal_file.WAL_BYTES_LAID
    for free, is_laid in ((32 * laid - 1, False), (32 * laid, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        journal = SqliteJournal(tmp_path / str(free), now_s=0.0)
        assert ((tmp_path / str(free) / "journal.sqlite-wal").stat().st_size >= laid) is is_laid
        journal.close()


def test_the_log_is_folded_when_it_is_worth_a_sync_and_written_over_from_its_beginning(
    journal: SqliteJournal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_sqlite, "ROWS_FOLDED", 64)
    database, log = tmp_path / "journal.sqlite", tmp_path / "journal.sqlite-wal"
    journal.checkpoint()
    ledger, empty = Ledger(journal, Policy()), database.read_bytes()
    live(ledger, *life(1))
    journal.checkpoint()
    assert database.read_bytes() == empty
    for number in range(2, 10):
        live(ledger, *life(number))
    journal.checkpoint()
    assert database.read_bytes() != empty
    begin, folded = log.read_bytes()[:32], database.read_bytes()
    live(ledger, *life(10))
    assert log.read_bytes()[:32] != begin
    journal.checkpoint()
    assert database.read_bytes() == folded


def test_a_new_journal_goes_on_from_the_number_that_it_is_given(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path, now_s=0.0, first_number=42)
    assert journal.node_state().next_number == 42
    journal.close()
    again = SqliteJournal(tmp_path, now_s=0.0, first_number=1)
    assert again.node_state().next_number == 42
    again.close()


# Retention -------------------------------------------------------------------------------------


def test_old_events_go_by_whole_segments_and_the_chain_stays_verifiable(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path, now_s=0.0, segment_events=10, segments_kept=2)
    ledger = Ledger(journal, Policy())
    for number in range(1, 21):
        live(ledger, *life(number, number * 10.0))
        while journal.expire(number * 10.0, 1e9, 1_000_000).more:
            pass
        found = verify(tmp_path)
        assert found.ok, found.problem
        assert found.last == journal.head
    assert found.first > 1
    assert found.events <= 40
    live(ledger, (submission(21, 500.0),))
    journal.close()
    again = SqliteJournal(tmp_path, now_s=0.0, segment_events=10, segments_kept=2)
    assert (again.head, len(again.jobs(JobFilter(limit=100)))) == (found.last + 1, 21)
    again.close()
    with opened(tmp_path / "journal.sqlite") as db:
        db.execute("DELETE FROM events WHERE seq = (SELECT min(seq) FROM events)")
    assert not verify(tmp_path).ok, "the first event that is kept is missing"


def test_finished_jobs_go_with_their_secrets_and_requests_and_others_stay(
    tmp_path: Path, journal: SqliteJournal
) -> None:
    ledger = Ledger(journal, Policy())
    for number in (1, 2, 3):
        ledger.apply(submission(number, 0.0, request_id=f"r-{number}"))
        ledger.keep_environment(number, {"TOKEN": SECRET})
        ledger.commit()
        if number < 3:
            live(ledger, *life(number, number * 100.0)[1:])
    gone: list[str] = []
    while (expired := journal.expire(250.0, 100.0, 1000)).more:
        gone += expired.job_ids
    assert gone == ["j1"]
    assert journal.job(1) is None
    assert journal.request("r-1") is None
    assert journal.environment(1) == {}
    assert journal.environment(3) == {"TOKEN": SECRET}
    assert [job.id for job in journal.jobs(JobFilter())] == ["j3", "j2"]
    assert journal.watch_floor > 0
    assert verify(tmp_path).ok


def test_only_so_many_finished_jobs_are_kept_the_oldest_go(journal: SqliteJournal) -> None:
    ledger = Ledger(journal, Policy())
    for number in range(1, 8):
        live(ledger, *life(number, number * 10.0))
    while journal.expire(100.0, 1e9, 3).more:
        pass
    assert [job.id for job in journal.jobs(JobFilter())] == ["j7", "j6", "j5"]


def test_a_secret_that_was_deleted_is_nowhere_on_the_disk(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    ledger = Ledger(journal, Policy())
    ledger.apply(submission(1))
    ledger.keep_environment(1, {"TOKEN": SECRET})
    ledger.commit()
    live(ledger, *life(1, 10.0)[1:])
    while journal.expire(1000.0, 1.0, 1000).more:
        pass
    journal.close()
    left = [path.name for path in tmp_path.iterdir() if SECRET.encode() in path.read_bytes()]
    assert left == []


# Queries ---------------------------------------------------------------------------------------


def test_changes_since_a_revision_come_oldest_first(journal: SqliteJournal) -> None:
    ledger = Ledger(journal, Policy())
    live(ledger, (submission(1),), (submission(2),))
    revision = journal.head
    live(ledger, (start(2),), (submission(3),), (start(1, 1, 9.0, "GPU-b"),))
    assert [job.id for job in journal.jobs_since(revision)] == ["j2", "j3", "j1"]
    assert list(journal.jobs_since(journal.head)) == []


def test_jobs_that_finished_since_a_revision_are_final_and_have_changed(journal: SqliteJournal) -> None:
    ledger = Ledger(journal, Policy())
    live(ledger, *life(1))
    revision = journal.head
    live(ledger, (submission(2),), *life(3))
    assert [job.id for job in journal.finished_since(revision)] == ["j3"]
    assert {job.id for job in journal.finished_since(0)} == {"j1", "j3"}


def test_usage_sums_by_key_and_time_and_pages(journal: SqliteJournal) -> None:
    ledger = Ledger(journal, Policy())
    for at_s, job, gpu, ms in (
        (10.0, "j1", "a", 5),
        (10.0, "", "b", 7),
        (20.0, "j1", "b", 11),
        (30.0, "j2", "a", 13),
    ):
        label = "BATCH" if job else "IDLE"
        live(ledger, (UsageBooked(at_s, (UsageEntry(job, gpu, "t", label, ms, 2 * ms, 3 * ms),)),))

    def sums(
        group: str, start_s: float = 0.0, end_s: float = 100.0, after: str | None = None
    ) -> dict[str, int]:
        return {row.key: row.gpu_ms for row in journal.usage(group, start_s, end_s, after, 10)}

    assert sums("class") == {"BATCH": 29, "IDLE": 7}
    assert sums("uuid") == {"a": 18, "b": 18}
    assert sums("job_id", 10.0, 20.0) == {"": 7, "j1": 5}
    assert sums("job_id", 20.0) == {"j1": 11, "j2": 13}
    assert sums("job_id", after="j1") == {"j2": 13}
    assert journal.node_state().booked_seq == journal.head


def test_what_is_booked_of_gpus_outlives_a_tick_that_was_not_kept_and_is_written_when_it_changes(
    journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def booked(at_s: float) -> UsageBooked:
        return UsageBooked(at_s, (), True, (GpuBooked("GPU-a", at_s, at_s, None, None, ()),))

    def kept() -> float:
        return journal.node_state().booked["GPU-a"].timed_s

    ledger = Ledger(journal, Policy())
    live(ledger, (booked(10.0),))
    ledger.apply(booked(20.0))
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write", _full)
        with pytest.raises(JournalError):
            ledger.commit()
    live(ledger, (submission(1),))
    assert (kept(), journal.node_state().next_number) == (10.0, 2)
    live(ledger, (booked(30.0),))
    assert kept() == 30.0
    writes: list[str] = []
    journal._db.set_trace_callback(writes.append)
    live(ledger, (submission(2),))
    assert not [text for text in writes if "'booked'" in text]  # as long as there are GPUs


def _full(_: object) -> None:
    raise sqlite3.OperationalError("disk full")


def test_a_filter_takes_all_its_conditions_together(journal: SqliteJournal) -> None:
    ledger = Ledger(journal, Policy())
    live(ledger, (submission(1, tenant="a"),), (submission(2, tenant="b", name="x"),), *life(3))

    def found(which: JobFilter) -> list[str]:
        return [job.id for job in journal.jobs(which)]

    assert found(JobFilter(active_only=True)) == ["j2", "j1"]
    assert found(JobFilter(states=("PENDING",), tenant="a")) == ["j1"]
    assert found(JobFilter(name="x", tenant="a")) == []
    assert found(JobFilter(before=3, limit=1)) == ["j2"]
    assert found(replace(JobFilter(), classes=(1,), states=("CANCELLED",))) == ["j3"]
