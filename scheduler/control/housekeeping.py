"""What is done in quiet moments: folding the journal's log, dropping what is past its time."""

import asyncio
import logging
from typing import TYPE_CHECKING

from scheduler.errors import JournalError

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

log = logging.getLogger("wattshift.housekeeping")

EXPIRE_PERIOD_S = 60.0


class Housekeeper:
    """Looks at each round of readings whether there is time for it."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self._expired_s = 0.0

    def read(self, now_s: float) -> None:
        """Do what can wait, unless somebody waits."""
        control = self._control
        journal, state = control.effects.journal, control.config.state
        control.commands.free_mib = journal.free_mib()
        control.commands.free_mib_min = state.free_mib_min
        if len(control.inbox) or control.ledger.touched:
            return
        journal.checkpoint()
        if 0.0 <= now_s - self._expired_s < EXPIRE_PERIOD_S:
            return
        try:
            expired = journal.expire(now_s, state.finished_jobs_kept_s, state.finished_jobs_kept_max)
        except JournalError as error:
            log.warning("old jobs could not be dropped: %s", error)
            self._expired_s = now_s
            return
        if not expired.more:  # else the rest goes in the next quiet moment
            self._expired_s = now_s
        if expired.job_ids:
            control.ledger.forget(expired.job_ids)
            control.spawn(asyncio.to_thread(self._remove_files, expired.job_ids))

    def _remove_files(self, gone: list[str]) -> None:
        """Remove what jobs left on disk; in a thread of its own, for a job may have left a lot."""
        for job_id in gone:
            try:
                self._control.site.remove_job(job_id)
            except OSError as error:
                log.warning("the files of job %s could not be removed: %s", job_id, error)
