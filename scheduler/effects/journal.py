"""The journal: an append-only chain of events in SQLite, and the rows derived from it.

Each event carries SHA-256 over the hash before it, its number, kind and body, so a changed, lost or
inserted event shows. Events and the job rows that follow from them are one transaction, written with
`synchronous=FULL`: after `commit` returns they survive power loss. The values of job environments are
secrets: they sit in a table of their own, outside the chain, and go with their job.
"""

import fcntl
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from scheduler.errors import JournalCorrupt, JournalError, JournalFull, StateLocked, TransitionError
from scheduler.model import events as model_events
from scheduler.model.events import (
    Event,
    JobEvent,
    JobSubmitted,
    NodeDrainChanged,
    UsageEntry,
    fold,
    submitted,
)
from scheduler.model.gpus import GpuMark
from scheduler.model.jobs import FINAL_STATES, Job

FORMAT = 1
DATABASE_NAME = "journal.sqlite"
LOCK_NAME = "daemon.lock"
# Events checked at start: enough to see a torn or meddled tail, cheap at any length of journal.
TAIL_CHECKED = 256
# A sealed segment is the unit in which old events age out.
SEGMENT_EVENTS = 1_000_000
SEGMENTS_KEPT = 16
# The write-ahead log is folded in quiet moments (`checkpoint`); at this many pages of 4 KiB at any moment.
WAL_PAGES_MAX = 16_384
GENESIS = bytes(32)

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, at_s REAL NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL);
CREATE TABLE segments (last_seq INTEGER PRIMARY KEY, last_hash BLOB NOT NULL, sealed_s REAL NOT NULL);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, final INTEGER NOT NULL, revision INTEGER NOT NULL, state TEXT NOT NULL,
    class INTEGER NOT NULL, name TEXT NOT NULL, tenant TEXT NOT NULL, finished_s REAL, body BLOB NOT NULL);
CREATE INDEX jobs_active ON jobs (number) WHERE final = 0;
CREATE INDEX jobs_revision ON jobs (revision);
CREATE INDEX jobs_finished ON jobs (finished_s) WHERE final = 1;
CREATE TABLE requests (request_id TEXT PRIMARY KEY, number INTEGER NOT NULL, digest TEXT NOT NULL)
    WITHOUT ROWID;
CREATE INDEX requests_number ON requests (number);
CREATE TABLE environments (number INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE usage (
    at_s REAL NOT NULL, job_id TEXT NOT NULL, uuid TEXT NOT NULL, tenant TEXT NOT NULL, class TEXT NOT NULL,
    gpu_ms INTEGER NOT NULL, energy_mj INTEGER NOT NULL, value_microusd INTEGER NOT NULL,
    preemptions INTEGER NOT NULL);
CREATE INDEX usage_at ON usage (at_s);
"""

_EVENT_TYPES: dict[str, type[Event]] = {
    name: kind
    for name, kind in vars(model_events).items()
    if isinstance(kind, type) and kind.__module__ == model_events.__name__ and kind is not UsageEntry
}
_DECODERS = {name: msgspec.json.Decoder(kind) for name, kind in _EVENT_TYPES.items()}
_encode = msgspec.json.Encoder(order="deterministic").encode
_decode_job = msgspec.json.Decoder(Job).decode
_decode_environment = msgspec.json.Decoder(dict[str, str]).decode


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a listing wants; empty = all. Newest first, from below `before`."""

    states: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    name: str = ""
    tenant: str = ""
    active_only: bool = False
    before: int | None = None
    limit: int = 100


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A sum of usage under one key."""

    key: str
    gpu_ms: int
    energy_mj: int
    value_microusd: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class UsageBooking:
    """One row of usage and the preemptions that come with it."""

    at_s: float
    entry: UsageEntry
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class NodeState:
    """What outlives a restart beside the jobs."""

    marks: dict[str, GpuMark]  # by UUID
    drain: NodeDrainChanged | None
    next_number: int  # of the next job; never used before
    booked_s: float  # usage is booked up to here
    boot_id: str  # under which the last daemon started


@dataclass(frozen=True, slots=True)
class Derived:
    """What follows from the staged events and is written with them."""

    jobs: list[Job]
    environments: dict[int, dict[str, str]]  # by job number
    usage: list[UsageBooking]
    node: NodeState | None  # None = as it was


_decode_node = msgspec.json.Decoder(NodeState).decode


class Journal(Protocol):
    """Durable events and the rows derived from them."""

    @property
    def head(self) -> int:
        """Number of the last event, staged ones included."""

    @property
    def first(self) -> int:
        """Number of the oldest event that is still kept."""

    @property
    def staged(self) -> bool:
        """Whether events wait for a commit."""

    def node_state(self) -> NodeState:
        """What earlier events say of the node itself."""

    def stage(self, event: Event) -> int:
        """Put an event behind the others; return its number. Nothing is durable before `commit`."""

    def commit(self, derived: Derived) -> None:
        """Write what was staged, with what follows from it, durably.

        Raises:
            JournalError: Nothing was written and nothing stays staged.
        """

    def abandon(self) -> None:
        """Drop what was staged."""

    def active_jobs(self) -> list[Job]:
        """All jobs that are not final, by number."""

    def job(self, number: int) -> Job | None:
        """One job by number, final ones too; None where it has aged out."""

    def jobs(self, which: JobFilter) -> list[Job]:
        """The jobs of a listing, newest first."""

    def jobs_since(self, revision: int) -> Iterator[Job]:
        """Jobs that changed after the revision, oldest change first."""

    def request(self, request_id: str) -> tuple[int, str] | None:
        """Number of the job that a request_id made, and the digest of that request."""

    def environment(self, number: int) -> dict[str, str]:
        """The job's own environment."""

    def salt(self) -> bytes:
        """The secret salt with which environments are hashed into the chain."""

    def usage(
        self, group: str, start_s: float, end_s: float, after: str | None, limit: int
    ) -> list[UsageRow]:
        """Sums of usage by job_id, tenant, class or uuid, ordered by key, from behind `after`."""

    def expire(self, now_s: float, kept_s: float, kept_max: int) -> list[str]:
        """Drop finished jobs and sealed events that are past retention; return ids of dropped jobs."""

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the database; for quiet moments."""


class SqliteJournal:
    """The journal in `journal.sqlite` of a state directory, which it locks for itself."""

    def __init__(
        self,
        state_dir: Path,
        *,
        now_s: float,
        segment_events: int = SEGMENT_EVENTS,
        segments_kept: int = SEGMENTS_KEPT,
    ) -> None:
        """Open or make the journal.

        Raises:
            StateLocked: Another daemon owns the directory.
            JournalCorrupt: The file or its chain is broken; nothing was changed.
            JournalError: The directory can't be used.
        """
        self._lock = _lock(state_dir)
        path = state_dir / DATABASE_NAME
        self._segment_events = segment_events
        self._segments_kept = segments_kept
        try:
            self._db = _open(path, now_s)
        except BaseException:
            os.close(self._lock)
            raise
        self._head, self._hash = _head(self._db, path)
        _check_tail(self._db, self._head, self._hash, path)
        self._staged: list[tuple[int, float, str, bytes, bytes]] = []
        self._requests: list[tuple[str, int, str]] = []
        self._salt = bytes(_meta(self._db, "salt"))
        self._first = int(self._db.execute("SELECT coalesce(min(seq), 1) FROM events").fetchone()[0])
        self._sealed = int(self._db.execute("SELECT coalesce(max(last_seq), 0) FROM segments").fetchone()[0])
        self._committed = (self._head, self._hash)

    @property
    def head(self) -> int:
        return self._head

    @property
    def first(self) -> int:
        return self._first

    @property
    def staged(self) -> bool:
        return bool(self._staged)

    def node_state(self) -> NodeState:
        text = self._db.execute("SELECT value FROM meta WHERE key = 'node'").fetchone()[0]
        return _decode_node(text)

    def stage(self, event: Event) -> int:
        kind = type(event).__name__
        body = _encode(event)
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
            raise _translated(error) from error
        self._committed = (self._head, self._hash)
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
                [(number, _encode(values)) for number, values in derived.environments.items()],
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
            )
            for u in derived.usage
            for e in (u.entry,)
        ]
        if booked:
            db.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", booked)
        if derived.node:
            db.execute("UPDATE meta SET value = ? WHERE key = 'node'", (_encode(derived.node),))
        if self._staged:
            db.execute("UPDATE meta SET value = ? WHERE key = 'head_seq'", (self._head,))
            db.execute("UPDATE meta SET value = ? WHERE key = 'head_hash'", (self._hash,))
            if self._head - self._sealed >= self._segment_events:
                db.execute(
                    "INSERT INTO segments VALUES (?, ?, ?)", (self._head, self._hash, self._staged[-1][1])
                )
                self._sealed = self._head
        db.execute("COMMIT")

    def active_jobs(self) -> list[Job]:
        rows = self._db.execute("SELECT body FROM jobs WHERE final = 0 ORDER BY number")
        return [_decode_job(body) for (body,) in rows]

    def job(self, number: int) -> Job | None:
        row = self._db.execute("SELECT body FROM jobs WHERE number = ?", (number,)).fetchone()
        return _decode_job(row[0]) if row else None

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
        return [_decode_job(body) for (body,) in self._db.execute(sql, (*values, which.limit))]

    def jobs_since(self, revision: int) -> Iterator[Job]:
        rows = self._db.execute("SELECT body FROM jobs WHERE revision > ? ORDER BY revision", (revision,))
        return (_decode_job(body) for (body,) in rows)

    def request(self, request_id: str) -> tuple[int, str] | None:
        row = self._db.execute(
            "SELECT number, digest FROM requests WHERE request_id = ?", (request_id,)
        ).fetchone()
        return (int(row[0]), str(row[1])) if row else None

    def environment(self, number: int) -> dict[str, str]:
        row = self._db.execute("SELECT body FROM environments WHERE number = ?", (number,)).fetchone()
        return _decode_environment(row[0]) if row else {}

    def salt(self) -> bytes:
        return self._salt

    def usage(
        self, group: str, start_s: float, end_s: float, after: str | None, limit: int
    ) -> list[UsageRow]:
        assert group in ("job_id", "tenant", "class", "uuid")
        rows = self._db.execute(
            f"SELECT {group}, sum(gpu_ms), sum(energy_mj), sum(value_microusd), sum(preemptions) FROM usage"
            f" WHERE at_s >= ? AND at_s < ? AND (? IS NULL OR {group} > ?) GROUP BY {group} ORDER BY {group} LIMIT ?",
            (start_s, end_s, after, after, limit),
        )
        return [UsageRow(*row) for row in rows]

    def expire(self, now_s: float, kept_s: float, kept_max: int) -> list[str]:
        db = self._db
        before_s = now_s - kept_s
        surplus = db.execute("SELECT count(*) FROM jobs WHERE final = 1").fetchone()[0] - kept_max
        if surplus > 0:
            row = db.execute(
                "SELECT finished_s FROM jobs WHERE final = 1 ORDER BY finished_s LIMIT 1 OFFSET ?", (surplus,)
            ).fetchone()
            before_s = max(before_s, row[0] if row else now_s)
        gone = db.execute(
            "SELECT number FROM jobs WHERE final = 1 AND finished_s < ?", (before_s,)
        ).fetchall()
        sealed = db.execute(
            "SELECT max(last_seq) FROM segments WHERE last_seq >= ? AND last_seq <="
            " (SELECT last_seq FROM segments ORDER BY last_seq DESC LIMIT 1 OFFSET ?)",
            (self._first, self._segments_kept),
        ).fetchone()[0]
        if not gone and not sealed:
            return []
        try:
            db.execute("BEGIN IMMEDIATE")
            for table in ("jobs", "requests", "environments"):
                db.executemany(f"DELETE FROM {table} WHERE number = ?", gone)
            db.execute("DELETE FROM usage WHERE at_s < ?", (now_s - kept_s,))
            if sealed:
                db.execute("DELETE FROM events WHERE seq <= ?", (sealed,))
                db.execute("DELETE FROM segments WHERE last_seq < ?", (sealed,))
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise _translated(error) from error
        if sealed:
            self._first = sealed + 1
        return [job_id(number) for (number,) in gone]

    def checkpoint(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def close(self) -> None:
        """Fold the log, close the file and give the directory free."""
        try:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error:
            pass  # the log is durable as it is; the next start folds it
        self._db.close()
        os.close(self._lock)


def job_id(number: int) -> str:
    """The id of the job with this number."""
    return f"j{number}"


def job_number(job_id: str) -> int | None:
    """The number in a job's id; None where it is no id of ours."""
    digits = job_id[1:]
    if not job_id.startswith("j") or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        return None
    return int(digits) if digits == str(int(digits)) else None


def chained(before: bytes, seq: int, kind: str, body: bytes) -> bytes:
    """The hash of an event: SHA-256 over the hash before it, its number, kind and body."""
    return hashlib.sha256(b"%b%d %b\n%b" % (before, seq, kind.encode(), body)).digest()


@dataclass(frozen=True, slots=True)
class Verification:
    """What a walk over the whole chain found; `problem` is empty where it is whole."""

    ok: bool
    events: int
    first: int
    last: int
    problem: str


def verify(state_dir: Path) -> Verification:
    """Walk the chain of a state directory, beside a running daemon if there is one.

    Every hash is computed again, and every job whose events are all kept is folded again and compared
    with its row.

    Raises:
        JournalError: There is no journal, or the file is no database.
    """
    path = state_dir / DATABASE_NAME
    if not path.exists():
        raise JournalError(f"{path} does not exist; name the daemon's state directory")
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        db.execute("BEGIN")
        return _verified(db, path)
    except sqlite3.Error as error:
        raise JournalCorrupt(f"{path} can't be read: {error}") from error


def _verified(db: sqlite3.Connection, path: Path) -> Verification:
    head, head_hash = _head(db, path)
    anchor = db.execute(
        "SELECT last_seq, last_hash FROM segments WHERE last_seq < (SELECT coalesce(min(seq), 1) FROM events)"
        " ORDER BY last_seq DESC LIMIT 1"
    ).fetchone()
    seq, running = (anchor[0], bytes(anchor[1])) if anchor else (0, GENESIS)
    first, count = seq + 1, 0
    jobs: dict[str, Job] = {}
    for row_seq, kind, body, stored in db.execute("SELECT seq, kind, body, hash FROM events ORDER BY seq"):
        problem = ""
        running = chained(running, row_seq, kind, body)
        if row_seq != seq + 1:
            problem = f"event {seq + 1} is missing"
        elif running != stored:
            problem = f"event {row_seq} ({kind}) does not match its hash"
        else:
            problem = _refold(jobs, row_seq, kind, body)
        if problem:
            return Verification(False, count, first, seq, problem)
        seq, count = row_seq, count + 1
    if (seq, running) != (head, head_hash):
        return Verification(
            False, count, first, seq, f"the chain ends at event {seq}, the journal says {head}"
        )
    for job in jobs.values():
        row = db.execute("SELECT body FROM jobs WHERE number = ?", (job.number,)).fetchone()
        if row and _decode_job(row[0]) != job:
            return Verification(
                False, count, first, seq, f"the row of job {job.id} is not what its events make"
            )
    return Verification(True, count, first, seq, "")


def _refold(jobs: dict[str, Job], seq: int, kind: str, body: bytes) -> str:
    """Fold an event into `jobs`; return what is wrong with it, or an empty string."""
    try:
        event = _DECODERS[kind].decode(body)
        if isinstance(event, JobSubmitted):
            jobs[event.job_id] = submitted(event, seq)
        elif isinstance(event, JobEvent) and event.job_id in jobs:  # else its submission has aged out
            jobs[event.job_id] = fold(jobs[event.job_id], event, seq)
    except (KeyError, msgspec.MsgspecError, TransitionError) as error:
        return f"event {seq} ({kind}) can't be read: {error}"
    return ""


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
        _encode(job),
    )


def _lock(state_dir: Path) -> int:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalError(
            f"the state directory {state_dir} can't be written: {error.strerror}; "
            "choose another with --state-dir or give this user the right to write"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StateLocked(
            f"another wattshift daemon uses the state directory {state_dir}; stop it or choose another directory"
        ) from error
    return lock


def _open(path: Path, now_s: float) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES_MAX}")
        db.execute("PRAGMA cache_size = -8192")
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}")
            db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [
                    ("format", FORMAT),
                    ("created_s", now_s),
                    ("salt", secrets.token_bytes(16)),
                    ("node", _encode(NodeState({}, None, 1, 0.0, ""))),
                    ("head_seq", 0),
                    ("head_hash", GENESIS),
                ],
            )
            db.execute("COMMIT")
        found = _meta(db, "format")
    except sqlite3.DatabaseError as error:
        raise _translated(error, path) from error
    if found != FORMAT:
        raise JournalError(f"{path} has format {found}, this wattshift reads {FORMAT}; nothing was changed")
    return db


def _meta(db: sqlite3.Connection, key: str) -> bytes:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise JournalCorrupt(f"the journal lacks its {key}; nothing was changed")
    value: bytes = row[0]
    return value


def _head(db: sqlite3.Connection, path: Path) -> tuple[int, bytes]:
    try:
        return int(_meta(db, "head_seq")), bytes(_meta(db, "head_hash"))
    except sqlite3.DatabaseError as error:
        raise _translated(error, path) from error


def _check_tail(db: sqlite3.Connection, head: int, head_hash: bytes, path: Path) -> None:
    try:
        rows = db.execute(
            "SELECT seq, kind, body, hash FROM events ORDER BY seq DESC LIMIT ?", (TAIL_CHECKED + 1,)
        ).fetchall()[::-1]
    except sqlite3.DatabaseError as error:
        raise _translated(error, path) from error
    if not rows:
        whole = head == 0 or db.execute("SELECT 1 FROM segments WHERE last_seq = ?", (head,)).fetchone()
    else:
        whole = (rows[-1][0], bytes(rows[-1][3])) == (head, head_hash) and all(
            seq == before + 1 and chained(bytes(running), seq, kind, body) == stored
            for (before, _, _, running), (seq, kind, body, stored) in zip(rows, rows[1:], strict=False)
        )
    if not whole:
        raise JournalCorrupt(
            f"the last events of {path} do not fit their hashes; nothing was changed. "
            "See `wattshift journal verify`; move the file away to start anew"
        )


def _translated(error: sqlite3.Error, path: Path | None = None) -> JournalError:
    where = str(path) if path else "the journal"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return JournalCorrupt(
            f"{where} is damaged ({error}); nothing was changed. Move it away to start anew"
        )
    if code == sqlite3.SQLITE_FULL:
        return JournalFull("the disk is full; the journal took nothing. Free space in the state directory")
    return JournalError(f"{where} can't be used: {error}")
