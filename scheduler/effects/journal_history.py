"""The past in a journal's file, by time: what the site drew, and what was decided meanwhile."""

import math
import sqlite3
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from scheduler.effects.journal import HISTORY_EVENTS_MAX, DrawPiece, NodeState
from scheduler.effects.journal_file import (
    DATABASE_NAME,
    DECODERS,
    check_format,
    decode_booked,
    decode_job,
    decode_node,
    meta,
    translated,
)
from scheduler.errors import JournalError
from scheduler.model.events import Event
from scheduler.model.jobs import Job
from scheduler.model.power_events import DrawRecorded

# A month's bill is argued about when the month is over: 12 MiB.
DRAWS_KEPT_S = 35 * 86_400.0
# Draws are recorded at least so often while there are readings.
_SLACK_S = 60.0
# What could not be written in time, as the disk was full, is looked for so long after; later it is not found.
_LATE_S = 3600.0


class JournalHistory:
    """Looks into a journal's file; beside a running daemon, too."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def node_state(self) -> NodeState:
        return replace(decode_node(meta(self._db, "node")), booked=decode_booked(meta(self._db, "booked")))

    def job(self, number: int) -> Job | None:
        row = self._db.execute("SELECT body FROM jobs WHERE number = ?", (number,)).fetchone()
        return decode_job(row[0]) if row else None

    def draws(self, since_s: float, until_s: float) -> list[DrawPiece]:
        rows = self._db.execute(
            "SELECT at_s, first_s, baseline_w, draw_w FROM draws WHERE at_s >= ? AND at_s < ? ORDER BY seq",
            (since_s, until_s + _LATE_S),
        )
        return [
            DrawPiece(at_s, first_s, array("f", draw_w), baseline_w)
            for at_s, first_s, baseline_w, draw_w in rows
            if first_s < until_s
        ]

    def events(self, since_s: float, until_s: float, kinds: tuple[type[Event], ...]) -> list[Event]:
        db, names = self._db, [kind.__name__ for kind in kinds]
        # Each piece of draw has the number of its event: it tells where in the chain a time is.
        before = db.execute("SELECT max(seq) FROM draws WHERE at_s < ?", (since_s - _SLACK_S,)).fetchone()[0]
        after = db.execute("SELECT min(seq) FROM draws WHERE at_s > ?", (until_s + _SLACK_S,)).fetchone()[0]
        rows = db.execute(
            f"SELECT kind, CAST(body AS BLOB) FROM events WHERE seq > ? AND seq < ?"
            f" AND kind IN ({','.join('?' * len(names))}) ORDER BY seq LIMIT ?",
            (before or 0, math.inf if after is None else after, *names, HISTORY_EVENTS_MAX),
        )
        return [DECODERS[kind].decode(body) for kind, body in rows]


@contextmanager
def open_history(state_dir: Path) -> Iterator[JournalHistory]:
    """Look into the journal of a state directory, which a daemon may have open.

    Raises:
        JournalError: There is none, or the file is no database of this format.
    """
    path = state_dir / DATABASE_NAME
    if not path.exists():
        raise JournalError(f"{path} does not exist; name the daemon's state directory")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as db:
            db.execute("BEGIN")
            check_format(db, path)
            yield JournalHistory(db)
    except sqlite3.Error as error:
        raise translated(error, path) from error


def draw_row(recorded: tuple[int, DrawRecorded]) -> tuple[int, float, int, float | None, bytes]:
    """A row of the table of draws."""
    seq, piece = recorded[0], draw_piece(recorded[1])
    return seq, piece.at_s, piece.first_s, piece.baseline_w, piece.draw_w.tobytes()


def draw_piece(event: DrawRecorded) -> DrawPiece:
    """What was recorded, as it is read again."""
    watts = array("f", (math.nan if one is None else one for one in event.draw_w))
    return DrawPiece(event.at_s, event.first_s, watts, event.baseline_w)
