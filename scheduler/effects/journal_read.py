"""A journal as whoever looks at it finds it: read-only, beside a running daemon if there is one."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from scheduler.effects.journal_file import (
    DATABASE_NAME,
    SELECT_EVENTS,
    anchor,
    chained,
    check_format,
    head,
)
from scheduler.errors import JournalCorrupt, JournalError

# Events read at a time: outside a transaction nobody's write-ahead log waits for longer than they take.
_PIECE = 5000


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The journal's file, for reading.

    Raises:
        JournalError: There is none, or it has another format.
        JournalCorrupt: The file is no database, or a damaged one.
    """
    if not path.exists():
        raise JournalError(f"{path} does not exist; name the daemon's state directory")
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        ) as db:
            check_format(db, path)
            yield db
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise JournalError(
                f"{path} can't be opened: {error}. SQLite writes an index beside it to read it: be the "
                "daemon's user, or copy the state directory to where you may write"
            ) from error
        raise JournalCorrupt(
            f"{path} can't be read: {error}; name a daemon's state directory, or a whole copy of its "
            f"{DATABASE_NAME} (with {DATABASE_NAME}-wal, if that is there)"
        ) from error


def chain(db: sqlite3.Connection, path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Number, kind and body of each event up to the one that is the last now, its hash computed again.

    Outside a transaction events may age out meanwhile: then there is a gap in the numbers.

    Raises:
        JournalCorrupt: An event is missing or does not match its hash; the message names the event.
    """
    last, last_hash = head(db, path)
    seq, running = anchor(db, path)
    while seq < last:
        rows = db.execute(
            f"{SELECT_EVENTS} WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?", (seq, last, _PIECE)
        ).fetchall()
        aged_out, its_hash = anchor(db, path)
        if aged_out > seq:
            seq, running = aged_out, its_hash
            continue
        if not rows:
            break
        for found, kind, body, stored in rows:
            running = chained(running, found, kind, body)
            if found != seq + 1:
                raise JournalCorrupt(f"event {seq + 1} is missing")
            if running != stored:
                raise JournalCorrupt(f"event {found} ({kind}) does not match its hash")
            seq = found
            yield found, kind, body
    if seq < last or (seq == last and running != last_hash):
        raise JournalCorrupt(f"the chain ends at event {seq}, the journal says {last}")
