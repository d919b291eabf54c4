"""The journal's file: its tables, its codec, its chain of hashes, its lock."""

import contextlib
import fcntl
import hashlib
import itertools
import os
import secrets
import shutil
import sqlite3
from pathlib import Path
from typing import Any, Protocol, get_args

import msgspec

from scheduler.effects.journal import NodeState
from scheduler.errors import JournalCorrupt, JournalError, JournalFull, StateLocked
from scheduler.model.events import Event
from scheduler.model.gpus import GpuBooked
from scheduler.model.jobs import Job

FORMAT = 5
DATABASE_NAME = "journal.sqlite"
LOCK_NAME = "daemon.lock"
# Events checked at start: enough to see a torn or meddled tail, cheap at any length of journal.
TAIL_CHECKED = 256
# The write-ahead log is folded in quiet moments; at this many pages of 4 KiB at any moment.
WAL_PAGES_MAX = 16_384
# So long the log is from the start: what a node writes between two foldings, 170 starts of jobs. A sync takes
# 0.14 ms where a commit writes over what is there, and 0.27 ms where it makes the file longer.
WAL_BYTES_LAID = 4 << 20
# Not on a disk that has less room than so many times that.
LAID_ROOM_RATIO = 32
GENESIS = bytes(32)
# Cast: who meddles with a row may leave text where bytes were.
SELECT_EVENTS = "SELECT seq, kind, CAST(body AS BLOB), CAST(hash AS BLOB) FROM events"
_SEQ_BYTES = 8

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
CREATE TABLE environments (number INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE usage (
    at_s REAL NOT NULL, job_id TEXT NOT NULL, uuid TEXT NOT NULL, tenant TEXT NOT NULL, class TEXT NOT NULL,
    gpu_ms INTEGER NOT NULL, energy_mj INTEGER NOT NULL, value_microusd INTEGER NOT NULL,
    preemptions INTEGER NOT NULL, cost_microusd INTEGER NOT NULL, unpriced_mj INTEGER NOT NULL);
CREATE INDEX usage_at ON usage (at_s);
CREATE TABLE draws (
    seq INTEGER PRIMARY KEY, at_s REAL NOT NULL, first_s INTEGER NOT NULL, baseline_w REAL,
    draw_w BLOB NOT NULL);
CREATE INDEX draws_at ON draws (at_s);
"""

_EVENT_TYPES: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}
DECODERS: dict[str, msgspec.json.Decoder[Event]] = {
    name: msgspec.json.Decoder(kind) for name, kind in _EVENT_TYPES.items()
}
encode = msgspec.json.Encoder().encode
decode_job = msgspec.json.Decoder(Job).decode
decode_environment = msgspec.json.Decoder(dict[str, str]).decode
decode_node = msgspec.json.Decoder(NodeState).decode
decode_booked = msgspec.json.Decoder(dict[str, GpuBooked]).decode


def chained(before: bytes, seq: int, kind: str, body: bytes) -> bytes:
    """The hash of an event: SHA-256 over the hash before it, its number, kind and body."""
    return hashlib.sha256(b"%b%d %b\n%b" % (before, seq, kind.encode(), body)).digest()


def lock(state_dir: Path) -> int:
    """Take the state directory for this process; returns the descriptor that holds it.

    Raises:
        StateLocked: Another daemon has it.
        JournalError: It can't be written.
    """
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
            f"another wattshift daemon uses the state directory {state_dir}; stop it or choose another"
        ) from error
    return lock


class Storage(Protocol):
    """The file system under the journal."""

    def connect(self, path: Path) -> sqlite3.Connection:
        """Open a database, or make an empty one; every transaction is begun in so many words.

        Raises:
            sqlite3.Error: It can't be opened.
        """

    def lay(self, path: Path, size: int) -> None:
        """Make a file that is there so long, with zeros behind what it holds, if the disk has ample room."""

    def free_mib(self, directory: Path) -> int:
        """Space left on the directory's disk."""


class LocalStorage:
    """This machine's file system."""

    def connect(self, path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None, cached_statements=64)

    def lay(self, path: Path, size: int) -> None:
        with contextlib.suppress(OSError), path.open("r+b") as file:
            missing = size - file.seek(0, os.SEEK_END)
            if missing > 0 and shutil.disk_usage(path.parent).free >= LAID_ROOM_RATIO * size:
                file.write(bytes(missing))
                file.flush()
                os.fsync(file.fileno())

    def free_mib(self, directory: Path) -> int:
        return shutil.disk_usage(directory).free >> 20


def open_database(storage: Storage, path: Path, now_s: float, first_number: int = 1) -> sqlite3.Connection:
    """Open the file, making what is missing; the jobs of a new one are numbered from `first_number` on.

    Raises:
        JournalCorrupt: It is no database, or a damaged one; nothing was changed.
        JournalError: It can't be used, or has another format.
    """
    if first_number > 1 and path.exists() and not path.stat().st_size:
        raise JournalCorrupt(
            f"{path} is empty, but jobs ran here; nothing was changed. Restore it, or remove it to start anew"
        )
    try:
        db = storage.connect(path)
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")  # a deleted secret is overwritten
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
                    ("node", encode(NodeState({}, None, first_number, "", {}, 0))),
                    ("booked", encode({})),
                    ("watch_floor", 0),
                    ("head", encode_head(0, GENESIS)),
                    ("anchor", encode_head(0, GENESIS)),
                ],
            )
            db.execute("COMMIT")
        check_format(db, path)
    except sqlite3.DatabaseError as error:
        raise translated(error, path) from error
    # SQLite reads the log up to the first frame without its salt, so zeros end it as the file's end does.
    storage.lay(path.with_name(f"{path.name}-wal"), WAL_BYTES_LAID)
    return db


def check_format(db: sqlite3.Connection, path: Path) -> None:
    """Raise `JournalError` where another wattshift wrote the file in another format."""
    found = meta(db, "format")
    if found != FORMAT:
        raise JournalError(
            f"{path} has format {found}, this wattshift reads {FORMAT}; nothing was changed. "
            "Use the version that wrote it, or move the file away to start anew"
        )


def meta(db: sqlite3.Connection, key: str) -> Any:
    """A value of the table `meta`; `JournalCorrupt` where it is not there."""
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise JournalCorrupt(f"the journal lacks its {key}; nothing was changed")
    return row[0]


def head(db: sqlite3.Connection, path: Path) -> tuple[int, bytes]:
    """Number and hash of the last event, as the last transaction left them."""
    return _link(db, path, "head")


def anchor(db: sqlite3.Connection, path: Path) -> tuple[int, bytes]:
    """Number and hash of the last event that has aged out: what the kept chain hangs on."""
    return _link(db, path, "anchor")


def _link(db: sqlite3.Connection, path: Path, key: str) -> tuple[int, bytes]:
    try:
        text = bytes(meta(db, key))
    except sqlite3.DatabaseError as error:
        raise translated(error, path) from error
    return int.from_bytes(text[:_SEQ_BYTES]), text[_SEQ_BYTES:]


def encode_head(seq: int, last_hash: bytes) -> bytes:
    """Number and hash of the last event as one value: one row to write in each transaction."""
    return seq.to_bytes(_SEQ_BYTES) + last_hash


def check_tail(db: sqlite3.Connection, head: int, head_hash: bytes, path: Path) -> None:
    """Raise `JournalCorrupt` where the last events do not fit their hashes or the head."""
    try:
        rows = db.execute(f"{SELECT_EVENTS} ORDER BY seq DESC LIMIT ?", (TAIL_CHECKED + 1,)).fetchall()[::-1]
    except sqlite3.DatabaseError as error:
        raise translated(error, path) from error
    if not rows:
        whole = anchor(db, path) == (head, head_hash)
    else:
        whole = (rows[-1][0], bytes(rows[-1][3])) == (head, head_hash) and all(
            seq == before + 1 and chained(bytes(running), seq, kind, body) == stored
            for (before, _, _, running), (seq, kind, body, stored) in itertools.pairwise(rows)
        )
    if not whole:
        raise JournalCorrupt(
            f"the last events of {path} do not fit their hashes; nothing was changed. "
            "See `wattshift journal verify`; move the file away to start anew"
        )


def translated(error: sqlite3.Error, path: Path | None = None) -> JournalError:
    """The error as an operator should read it."""
    where = str(path) if path else "the journal"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return JournalCorrupt(
            f"{where} is damaged ({error}); nothing was changed. Move it away to start anew"
        )
    if code == sqlite3.SQLITE_FULL:
        return JournalFull("the disk is full; the journal took nothing. Free space in the state directory")
    return JournalError(f"{where} can't be used: {error}")
