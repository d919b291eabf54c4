"""`wattshift journal verify`: walk a journal's whole chain, beside a running daemon if there is one."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import msgspec

from scheduler.effects.journal_file import DATABASE_NAME, DECODERS, anchor, decode_job
from scheduler.effects.journal_read import chain, opened
from scheduler.errors import JournalCorrupt, TransitionError
from scheduler.model.events import (
    JobEvent,
    JobSubmitted,
    UsageBooked,
    energy_of_jobs,
    fold,
    submitted,
    with_energy,
)
from scheduler.model.jobs import Job


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
    with opened(path) as db:
        db.execute("BEGIN")
        return _verified(db, path)


def _verified(db: sqlite3.Connection, path: Path) -> Verification:
    seq, _ = anchor(db, path)
    first, count = seq + 1, 0
    jobs: dict[str, Job] = {}
    try:
        for event_seq, kind, body in chain(db, path):
            problem = _refold(jobs, event_seq, kind, body)
            if problem:
                return Verification(False, count, first, seq, problem)
            seq, count = event_seq, count + 1
    except JournalCorrupt as error:
        return Verification(False, count, first, seq, str(error))
    (end,) = db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()
    if end > seq:
        return Verification(False, count, first, seq, f"event {end} stands behind the last one, {seq}")
    for job in jobs.values():
        row = db.execute("SELECT body FROM jobs WHERE number = ?", (job.number,)).fetchone()
        if row and decode_job(row[0]) != job:
            return Verification(
                False, count, first, seq, f"the row of job {job.id} is not what its events make"
            )
    return Verification(True, count, first, seq, "")


def _refold(jobs: dict[str, Job], seq: int, kind: str, body: bytes) -> str:
    """Fold an event into `jobs`; return what is wrong with it, or an empty string."""
    try:
        event = DECODERS[kind].decode(body)
        if isinstance(event, JobSubmitted):
            jobs[event.job_id] = submitted(event, seq)
        elif isinstance(event, JobEvent) and event.job_id in jobs:  # else its submission has aged out
            jobs[event.job_id] = fold(jobs[event.job_id], event, seq)
        elif isinstance(event, UsageBooked):
            for job_id, energy_mj in energy_of_jobs(event).items():
                if job_id in jobs:
                    jobs[job_id] = with_energy(jobs[job_id], energy_mj, seq)
    except (KeyError, msgspec.MsgspecError, TransitionError) as error:
        return f"event {seq} ({kind}) can't be read: {error}"
    return ""
