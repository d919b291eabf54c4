"""The journal in SQLite: write-ahead log, `synchronous=FULL`, one transaction a tick."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from scheduler.effects.journal import Derived, Expired, History, JobFilter, NodeState, UsageRow
from scheduler.effects.journal_file import (
    DATABASE_NAME,
    LocalStorage,
    Storage,
    chained,
    check_tail,
    decode_environment,
    decode_job,
    encode,
    encode_head,
    head,
    lock,
    meta,
    open_database,
    translated,
)
from scheduler.effects.journal_history import DRAWS_KEPT_S, JournalHistory, draw_row, open_history
from scheduler.model.events import Event, JobSubmitted
from scheduler.model.gpus import GpuBooked
from scheduler.model.jobs import FINAL_STATES, Job, job_id

# A sealed segment is the unit in which old events age out.
SEGMENT_EVENTS = 1_000_000
SEGMENTS_KEPT = 16
WATCH_REVISIONS_KEPT = 100_000
# Jobs and events dropped at a time: a few milliseconds of work.
EXPIRED_AT_ONCE_MAX = 500
EVENTS_DROPPED_AT_ONCE = 2000
# Folding the log syncs the database, so it is worth doing only for a good piece of it: of rows written since
# the last time. Each is a page of the log, or less where many are written at once.
ROWS_FOLDED = 256

_SET_HEAD = "UPDATE meta SET value = ? WHERE key = 'head'"


class SqliteJournal:
    """The journal in `journal.sqlite` of a state directory, which it locks for itself."""

    def __init__(
        self,
        state_dir: Path,
        *,
        now_s: float,
        segment_events: int = SEGMENT_EVENTS,
        segments_kept: int = SEGMENTS_KEPT,
        watch_kept: int = WATCH_REVISIONS_KEPT,
        first_number: int = 1,
        storage: Storage | None = None,
    ) -> None:
        """Open or make the journal; a new one numbers its jobs from `first_number` on.

        `storage` None is this machine's file system.

        Raises:
            StateLocked: Another daemon owns the directory.
            JournalCorrupt: The file or its chain is broken; nothing was changed.
            JournalError: The directory can't be used.
        """
        self._lock = lock(state_dir)
        path = state_dir / DATABASE_NAME
        self._segment_events = segment_events
        self._segments_kept = segments_kept
        self._watch_kept = watch_kept
        self._directory = state_dir
        self._storage = storage or LocalStorage()
        self._folded = 0  # rows written when the log was folded last
        try:
            self._db = open_database(self._storage, path, now_s, first_number)
            try:
                self._read_ends(path)
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise
        self._history = JournalHistory(self._db)
        self._staged: list[tuple[int, float, str, bytes, bytes]] = []
        self._requests: list[tuple[str, int, str]] = []
        self._committed = (self._head, self._hash)
        self._booked: dict[str, GpuBooked] | None = None  # as it was written or read last; None = neither

    def _read_ends(self, path: Path) -> None:
        db = self._db
        self._head, self._hash = head(db, path)
        check_tail(db, self._head, self._hash, path)
        self._salt = bytes(meta(db, "salt"))
        self._watch_floor = int(meta(db, "watch_floor"))
        self._sealed = int(db.execute("SELECT coalesce(max(last_seq), 0) FROM segments").fetchone()[0])

    @property
    def head(self) -> int:
        return self._head

    @property
    def watch_floor(self) -> int:
        return max(self._watch_floor, self._head - self._watch_kept)

    def history(self) -> AbstractContextManager[History]:
        return open_history(self._directory)

    def free_mib(self) -> int:
        return self._storage.free_mib(self._directory)

    @property
    def staged(self) -> bool:
        return bool(self._staged)

    def node_state(self) -> NodeState:
        state = self._history.node_state()
        if self._booked is None:
            self._booked = state.booked
        return state

    def stage(self, event: Event) -> int:
        kind = type(event).__name__
        body = encode(event)
        self._head += 1
        self._hash = chained(self._hash, self._head, kind, body)
        self._staged.append((self._head, event.at_s, kind, body, self._hash))
        if isinstance(event, JobSubmitted) and event.request_id:
            self._requests.append((event.request_id, event.number, event.request_digest))
        return self._head

    def commit(self, derived: Derived) -> None:
        try:
            self._write(derived)
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self.abandon()
            raise translated(error) from error
        self._committed = (self._head, self._hash)
        if derived.node:
            self._booked = derived.node.booked
        self._staged.clear()
        self._requests.clear()

    def abandon(self) -> None:
        self._head, self._hash = self._committed
        self._staged.clear()
        self._requests.clear()

    def _write(self, derived: Derived) -> None:
        db, jobs = self._db, derived.jobs
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", self._staged)
        rows = [_row(job) for job in jobs]
        if rows:
            db.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        if self._requests:
            db.executemany("INSERT INTO requests VALUES (?, ?, ?)", self._requests)
        if derived.environments:
            db.executemany(
                "INSERT OR REPLACE INTO environments VALUES (?, ?)",
                [(number, encode(values)) for number, values in derived.environments.items()],
            )
        booked = [
            (
                u.at_s,
                e.job_id,
                e.uuid,
                e.tenant,
                e.job_class,
                e.gpu_ms,
                e.energy_mj,
                e.value_microusd,
                u.preemptions,
                e.cost_microusd,
                e.unpriced_mj,
            )
            for u in derived.usage
            for e in (u.entry,)
        ]
        if booked:
            db.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", booked)
        if derived.draws:
            db.executemany("INSERT INTO draws VALUES (?, ?, ?, ?, ?)", map(draw_row, derived.draws))
        if derived.node:
            # A row of its own: it is as long as there are GPUs, and changes but once a minute.
            if derived.node.booked is not self._booked:
                db.execute("UPDATE meta SET value = ? WHERE key = 'booked'", (encode(derived.node.booked),))
            text = encode(replace(derived.node, booked={}))
            db.execute("UPDATE meta SET value = ? WHERE key = 'node'", (text,))
        if self._staged:
            db.execute(_SET_HEAD, (encode_head(self._head, self._hash),))
            if self._head - self._sealed >= self._segment_events:
                db.execute(
                    "INSERT INTO segments VALUES (?, ?, ?)", (self._head, self._hash, self._staged[-1][1])
                )
                self._sealed = self._head
        db.execute("COMMIT")

    def active_jobs(self) -> list[Job]:
        rows = self._db.execute("SELECT body FROM jobs WHERE final = 0 ORDER BY number")
        return [decode_job(body) for (body,) in rows]

    def job(self, number: int) -> Job | None:
        return self._history.job(number)

    def jobs(self, which: JobFilter) -> list[Job]:
        where, values = ["1"], []  # type: list[str], list[str | int]
        for column, wanted in (("state", which.states), ("class", which.classes)):
            if wanted:
                where.append(f"{column} IN ({','.join('?' * len(wanted))})")
                values += wanted
        for column, text in (("name", which.name), ("tenant", which.tenant)):
            if text:
                where.append(f"{column} = ?")
                values.append(text)
        if which.active_only:
            where.append("final = 0")
        if which.before is not None:
            where.append("number < ?")
            values.append(which.before)
        sql = f"SELECT body FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?"
        return [decode_job(body) for (body,) in self._db.execute(sql, (*values, which.limit))]

    def jobs_since(self, revision: int) -> Iterator[Job]:
        rows = self._db.execute("SELECT body FROM jobs WHERE revision > ? ORDER BY revision", (revision,))
        return (decode_job(body) for (body,) in rows)

    def finished_since(self, revision: int) -> list[Job]:
        rows = self._db.execute("SELECT body FROM jobs WHERE revision > ? AND final = 1", (revision,))
        return [decode_job(body) for (body,) in rows]

    def request(self, request_id: str) -> tuple[int, str] | None:
        row = self._db.execute(
            "SELECT number, digest FROM requests WHERE request_id = ?", (request_id,)
        ).fetchone()
        return (int(row[0]), str(row[1])) if row else None

    def environment(self, number: int) -> dict[str, str]:
        row = self._db.execute("SELECT body FROM environments WHERE number = ?", (number,)).fetchone()
        return decode_environment(row[0]) if row else {}

    def salt(self) -> bytes:
        return self._salt

    def usage(
        self, group: str, start_s: float, end_s: float, after: str | None, limit: int
    ) -> list[UsageRow]:
        assert group in ("job_id", "tenant", "class", "uuid")
        rows = self._db.execute(
            f"SELECT {group}, sum(gpu_ms), sum(energy_mj), sum(value_microusd), sum(preemptions),"
            " sum(cost_microusd), sum(unpriced_mj) FROM usage"
            f" WHERE at_s >= ? AND at_s < ? AND (? IS NULL OR {group} > ?)"
            f" GROUP BY {group} ORDER BY {group} LIMIT ?",
            (start_s, end_s, after, after, limit),
        )
        return [UsageRow(*row) for row in rows]

    def expire(self, now_s: float, kept_s: float, kept_max: int) -> Expired:
        db = self._db
        before_s = now_s - kept_s
        surplus = db.execute("SELECT count(*) FROM jobs WHERE final = 1").fetchone()[0] - kept_max
        if surplus > 0:
            row = db.execute(
                "SELECT finished_s FROM jobs WHERE final = 1 ORDER BY finished_s LIMIT 1 OFFSET ?", (surplus,)
            ).fetchone()
            before_s = max(before_s, row[0] if row else now_s)
        found = db.execute(
            "SELECT number, revision, body FROM jobs WHERE final = 1 AND finished_s < ?"
            " ORDER BY finished_s LIMIT ?",
            (before_s, EXPIRED_AT_ONCE_MAX),
        ).fetchall()
        gone = [(number,) for number, _, _ in found]
        requests = [(job.request_id,) for _, _, body in found if (job := decode_job(body)).request_id]
        floor = max([self._watch_floor, *(revision for _, revision, _ in found)])
        anchor = self._last_to_drop()
        stale_s = now_s - DRAWS_KEPT_S
        is_stale = db.execute("SELECT 1 FROM draws WHERE at_s < ? LIMIT 1", (stale_s,)).fetchone()
        if not gone and anchor is None and not is_stale:
            return Expired([], more=False)
        try:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("DELETE FROM jobs WHERE number = ?", gone)
            db.executemany("DELETE FROM environments WHERE number = ?", gone)
            db.executemany("DELETE FROM requests WHERE request_id = ?", requests)
            db.execute("UPDATE meta SET value = ? WHERE key = 'watch_floor'", (floor,))
            db.execute("DELETE FROM usage WHERE at_s < ?", (now_s - kept_s,))
            db.execute("DELETE FROM draws WHERE at_s < ?", (stale_s,))
            if anchor is not None:
                db.execute("UPDATE meta SET value = ? WHERE key = 'anchor'", (encode_head(*anchor),))
                db.execute("DELETE FROM events WHERE seq <= ?", (anchor[0],))
                db.execute("DELETE FROM segments WHERE last_seq <= ?", (anchor[0],))
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise translated(error) from error
        self._watch_floor = floor
        return Expired([job_id(number) for (number,) in gone], more=True)

    def _last_to_drop(self) -> tuple[int, bytes] | None:
        """Number and hash of the last of the oldest events that may go now: a piece of a surplus segment."""
        db = self._db
        surplus = db.execute(
            "SELECT last_seq FROM segments ORDER BY last_seq DESC LIMIT 1 OFFSET ?", (self._segments_kept,)
        ).fetchone()
        if surplus is None:
            return None
        row = db.execute(
            "SELECT seq, hash FROM events WHERE seq <= ? ORDER BY seq LIMIT 1 OFFSET ?",
            (surplus[0], EVENTS_DROPPED_AT_ONCE - 1),
        ).fetchone()
        row = row or db.execute("SELECT seq, hash FROM events WHERE seq = ?", surplus).fetchone()
        return (int(row[0]), bytes(row[1])) if row else None

    def checkpoint(self) -> None:
        rows = self._db.total_changes
        if rows - self._folded < ROWS_FOLDED:
            return
        # Where the disk is full the log is durable as it is; a later quiet moment folds it.
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._folded = rows

    def close(self) -> None:
        """Fold the log, close the file and give the directory free."""
        with contextlib.suppress(sqlite3.Error):  # the log is durable as it is; the next start folds it
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._db.close()
        os.close(self._lock)


def _row(job: Job) -> tuple[int, int, int, str, int, str, str, float | None, bytes]:
    spec = job.spec
    return (
        job.number,
        job.state in FINAL_STATES,
        job.revision,
        job.state.value,
        int(spec.job_class),
        spec.name,
        spec.tenant,
        job.finished_s,
        encode(job),
    )
