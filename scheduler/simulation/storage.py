"""A simulated machine's disk under the journal: what a crash leaves of the files, and what fails on the way.

What SQLite promises with a write-ahead log and `synchronous=FULL`, and so what this disk keeps:

* A process that dies (`kill -9`) loses what it had not written; the kernel keeps the rest. So an image of the
  files is what the next one finds, without the log having been folded, and without the index beside it
  (`-shm`), which the first to open the database makes anew.
* A power loss keeps what was synced. A commit returns when the log is synced up to it, so only a commit that
  had not returned can be torn: of the 512-byte sectors that it wrote into the log each one is there, is as it
  was, or is garbage. The log's header is synced before the frames that follow it.
* Folding the log writes pages of the database that the log still holds: those sectors can be torn in any way.
  The log itself stays as it is until the next commit.
* With a weaker `synchronous` nothing is synced between two foldings, and any end of the log can go.
* A sync that fails takes the transaction back, but its frames are in the file. Until the next commit writes
  over them, a crash brings the transaction back to life.

A full disk is SQLite's own, by `max_page_count`.
"""

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from scheduler.effects.journal_file import DATABASE_NAME

_LOG_NAME = f"{DATABASE_NAME}-wal"
SECTOR_BYTES = 512
# Where log frames begin: behind its header of 32 bytes.
_HEADER_BYTES = 32
LAID_BYTES_MAX = 1 << 16
FREE_MIB = 100_000
_PAGES_MAX = 4_294_967_294  # SQLite's own limit
_SYNCHRONOUS_FULL = 2

Image = dict[str, bytes]  # by the file's name
Moment = Literal["before", "after"]
Failure = Literal["", "fsync", "write"]


class Disk:
    """The disk of a machine. Serves the Protocol `Storage` for one journal at a time."""

    def __init__(self, directory: Path) -> None:
        """Take the journal's directory, best one in memory."""
        self.directory = directory
        self.failure: Failure = ""
        # Called around each commit with the kinds of its events.
        self.on_commit: Callable[[Moment, tuple[str, ...]], None] | None = None
        # The next commit, or the next folding of the log, does not return, but ends in this call.
        self.on_torn: Callable[[], None] | None = None
        self.chance = random.Random(0)  # of what is torn
        self._is_full = False
        self._db: _Connection | None = None
        self._next: Image | None = None  # what is found after a crash, where that isn't what is there now
        # Of a commit whose sync failed: until the next one a crash brings it back to life.
        self._unsynced: list[_Statement] = []

    # The journal's storage ----------------------------------------------------------------------

    def connect(self, path: Path) -> sqlite3.Connection:
        assert path == self.directory / DATABASE_NAME
        db = sqlite3.connect(path, isolation_level=None, cached_statements=64, factory=_Connection)
        db.disk = self
        self._db = db
        self.is_full = self._is_full
        return db

    def lay(self, path: Path, size: int) -> None:
        """As far as a few commits reach, so that there are those that write over zeros, and those beyond."""
        if not self._is_full and path.exists():
            with path.open("ab") as file:
                file.write(bytes(max(0, min(size, LAID_BYTES_MAX) - file.tell())))

    def free_mib(self, directory: Path) -> int:
        del directory
        return 0 if self._is_full else FREE_MIB

    # Faults -------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether the database may not grow."""
        return self._is_full

    @is_full.setter
    def is_full(self, is_full: bool) -> None:
        self._is_full = is_full
        if self._db is not None:
            pages = self._db.execute("PRAGMA page_count").fetchone()[0] if is_full else _PAGES_MAX
            self._db.execute(f"PRAGMA max_page_count = {max(1, pages)}")

    @property
    def fails(self) -> bool:
        """Whether nothing, or not everything, can be written now."""
        return bool(self.failure) or self._is_full

    def image(self, *, is_power_lost: bool = False) -> Image:
        """The files as the next daemon finds them if this one dies now."""
        image = self._next if self._next is not None else self._read()
        if self._unsynced:
            image = self._committed_elsewhere(self._unsynced)
        if is_power_lost and not self._is_synced:
            log = image.get(_LOG_NAME, b"").rstrip(b"\0")  # without what was laid for it
            image = {**image, _LOG_NAME: log[: self.chance.randint(0, len(log))]}
        return image

    def restore(self, image: Image) -> None:
        """Put an image in the place of whatever is there; nobody may have the database open."""
        for name in (DATABASE_NAME, _LOG_NAME, f"{DATABASE_NAME}-shm"):
            (self.directory / name).unlink(missing_ok=True)
        for name, content in image.items():
            (self.directory / name).write_bytes(content)
        self.closed()

    def closed(self) -> None:
        """The journal was closed: nothing is left open."""
        self._db = None
        self._next, self._unsynced = None, []

    def fold_now(self) -> None:
        """Fold the log, as the journal does in quiet moments when it has grown long."""
        assert self._db is not None
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    # Transactions -------------------------------------------------------------------------------

    def commit(self, db: "_Connection") -> sqlite3.Cursor:
        """Commit, or what becomes of it."""
        if self.on_commit is not None:
            self.on_commit("before", db.kinds)
        if self.failure:
            self._fail(db)
        before = self._read() if self.on_torn is not None else {}
        committed = db.plainly("COMMIT")
        self._next, self._unsynced = None, []
        self._power_may_fail(before, _LOG_NAME)
        if self.on_commit is not None:
            self.on_commit("after", db.kinds)
        return committed

    @property
    def _is_synced(self) -> bool:
        """Whether each commit is."""
        assert self._db is not None
        return bool(self._db.plainly("PRAGMA synchronous").fetchone()[0] >= _SYNCHRONOUS_FULL)

    def fold(self, db: "_Connection", sql: str) -> sqlite3.Cursor:
        """Fold the log into the database."""
        before = self._read() if self.on_torn is not None else {}
        folded = db.plainly(sql)
        self._power_may_fail(before, DATABASE_NAME)
        return folded

    def _power_may_fail(self, before: Image, name: str) -> None:
        if self.on_torn is not None:
            now = self._read()
            # The one is synced before the other is touched.
            self._next = {**before, name: torn(before.get(name, b""), now.get(name, b""), self.chance)}
            on_torn, self.on_torn = self.on_torn, None
            on_torn()

    def _fail(self, db: "_Connection") -> None:
        if self.failure == "fsync":
            self._unsynced = db.statements
        db.plainly("ROLLBACK")
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = (
            sqlite3.SQLITE_IOERR_FSYNC if self.failure == "fsync" else sqlite3.SQLITE_IOERR_WRITE
        )
        raise error

    def _committed_elsewhere(self, statements: "list[_Statement]") -> Image:
        """The files as they would be had the transaction been committed."""
        elsewhere = Disk(self.directory / "unsynced")
        elsewhere.directory.mkdir()
        try:
            elsewhere.restore(self._read())
            db = sqlite3.connect(elsewhere.directory / DATABASE_NAME, isolation_level=None)
            for sql, values in statements:
                if values is None:
                    db.executescript(sql) if sql.startswith("BEGIN") else db.execute(sql)
                elif isinstance(values, tuple):
                    db.execute(sql, values)
                else:
                    db.executemany(sql, values)
            db.execute("COMMIT")
            image = elsewhere.image()
            db.close()
        finally:
            shutil.rmtree(elsewhere.directory)
        return image

    def _read(self) -> Image:
        names = (DATABASE_NAME, _LOG_NAME)
        return {
            name: (self.directory / name).read_bytes() for name in names if (self.directory / name).exists()
        }


_Statement = tuple[str, tuple[Any, ...] | list[Any] | None]


class _Connection(sqlite3.Connection):
    """A connection whose transactions end on a simulated disk."""

    disk: Disk
    kinds: tuple[str, ...] = ()  # of the events in this transaction
    statements: list[_Statement]  # of this transaction

    def plainly(self, sql: str) -> sqlite3.Cursor:
        """Execute with nothing in between."""
        return super().execute(sql)

    def execute(self, sql: str, values: Any = None, /) -> sqlite3.Cursor:
        if sql == "COMMIT":
            return self.disk.commit(self)
        if sql.startswith("PRAGMA wal_checkpoint"):
            return self.disk.fold(self, sql)
        if sql.startswith("BEGIN"):
            self._begin(sql)
        elif self.in_transaction:
            self.statements.append((sql, values))
        return super().execute(sql) if values is None else super().execute(sql, values)

    def executemany(self, sql: str, values: Iterable[Any], /) -> sqlite3.Cursor:
        values = list(values)
        if self.in_transaction:
            self.statements.append((sql, values))
            if sql.startswith("INSERT INTO events"):
                self.kinds += tuple(row[2] for row in values)
        return super().executemany(sql, values)

    def executescript(self, sql: str, /) -> sqlite3.Cursor:
        self._begin(sql)
        return super().executescript(sql)

    def _begin(self, sql: str) -> None:
        self.kinds = ()
        self.statements = [(sql, None)]


def torn(before: bytes, after: bytes, chance: random.Random) -> bytes:
    """`after` as a power loss leaves it, where only `before` had been synced.

    Each 512-byte sector that differs is there, is as it was, or is garbage; but frames of a log whose header
    changed are only looked at with the new header, which is synced before them.
    """
    old = before.ljust(len(after), b"\0")
    pieces = [after[:_HEADER_BYTES], after[_HEADER_BYTES:SECTOR_BYTES]]
    pieces += [after[at : at + SECTOR_BYTES] for at in range(SECTOR_BYTES, len(after), SECTOR_BYTES)]
    kept = chance.choice((0.0, 0.5, 0.9, 1.0))
    at, left = 0, []
    for number, piece in enumerate(pieces):
        was = old[at : at + len(piece)]
        at += len(piece)
        if number == 0 or was == piece or chance.random() < kept:
            left.append(piece)
        else:
            left.append(was if chance.random() < 0.5 else _garbled(was, piece, chance))
    end = len(after) if chance.random() < 0.5 else chance.randint(min(len(before), len(after)), len(after))
    return b"".join(left)[:end]


def _garbled(was: bytes, piece: bytes, chance: random.Random) -> bytes:
    """Garbage where the two differ: what was not written is not harmed (SQLite's "powersafe overwrite")."""
    begin = next(at for at, (a, b) in enumerate(zip(was, piece, strict=True)) if a != b)
    end = next(at for at in range(len(piece), 0, -1) if was[at - 1] != piece[at - 1])
    return piece[:begin] + chance.randbytes(end - begin) + piece[end:]
