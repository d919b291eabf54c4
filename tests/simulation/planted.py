"""Bugs that are planted on purpose, one at a time, to see whether the fault simulation finds them.

Each is a change of the real code such as somebody could make in good faith, put in place for a while.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from scheduler.control.handover import HandoverVerifier
from scheduler.control.inbox import Inbox
from scheduler.control.ledger import Ledger
from scheduler.control.loop import Controller
from scheduler.control.reports import ReportHandler
from scheduler.effects import journal_file
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.effects.launcher import AttemptKey, StopOrder
from scheduler.simulation.node import SimulatedLauncher

Plant = Callable[[pytest.MonkeyPatch], None]


def orders_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    """Loop: what follows from a tick is sent before the tick is on disk."""

    def early(self: Controller) -> None:
        for number, before in list(self.ledger._undo.items()):
            self.orders.follow(before, self.ledger._current(number))
        self.orders.send()
        commit_plainly(self)

    commit_plainly = Controller._commit
    patch.setattr(Controller, "_commit", early)


def reports_of_a_tick_that_was_not_kept_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """Loop: what arrived is not put back when the journal can't be written."""
    patch.setattr(Inbox, "put_back", lambda self, items: None)


def nobody_is_buried(patch: pytest.MonkeyPatch) -> None:
    """Recovery: an attempt that no launcher holds any more is believed to run."""
    patch.setattr(ReportHandler, "_bury", lambda self, job, now_s: None)


def a_stop_is_not_said_again(patch: pytest.MonkeyPatch) -> None:
    """Recovery: who was told to go before the crash, and was not signalled, is not stopped after it."""

    def adopt(self: ReportHandler, job: Any, held: Any, now_s: float) -> None:
        for report in held.reports:
            self.report(report)

    patch.setattr(ReportHandler, "_adopt", adopt)


def a_start_is_not_said_again(patch: pytest.MonkeyPatch) -> None:
    """Recovery: an order to start that never arrived is believed to have."""
    patch.setattr(ReportHandler, "_say_again", lambda self, job: None)


def a_rollback_forgets_who_is_live(patch: pytest.MonkeyPatch) -> None:
    """Ledger: a tick that was not kept leaves its jobs as they were in it."""

    def rollback(self: Ledger) -> None:
        self._begin()

    patch.setattr(Ledger, "_rollback", rollback)


def commits_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    """Journal: `synchronous` is off."""
    opened = journal_file.open_database

    def open_database(*arguments: Any) -> sqlite3.Connection:
        db = opened(*arguments)
        db.execute("PRAGMA synchronous = OFF")
        return db

    patch.setattr("scheduler.effects.journal_sqlite.open_database", open_database)


def a_failed_commit_stays_staged(patch: pytest.MonkeyPatch) -> None:
    """Journal: after a commit that failed its events are written with the next one."""

    def abandon(self: SqliteJournal) -> None:
        self._requests.clear()

    patch.setattr(SqliteJournal, "abandon", abandon)


def request_ids_are_not_kept(patch: pytest.MonkeyPatch) -> None:
    """Journal: a request_id is known only until the tick is over."""
    patch.setattr(SqliteJournal, "request", lambda self, request_id: None)


def memory_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """Hand-over: a GPU without processes is given on, whatever it still holds."""
    judge = HandoverVerifier.judge

    def lenient(self: HandoverVerifier, uuid: str, holders: Any) -> Any:
        return judge(self, uuid, replace(holders, memory_used_mib=None))

    patch.setattr(HandoverVerifier, "judge", lenient)


def starts_are_not_idempotent(patch: pytest.MonkeyPatch) -> None:
    """Launcher: an order to start that is said again starts again."""
    start = SimulatedLauncher.start

    def again(self: SimulatedLauncher, order: Any) -> None:
        self._held.pop(order.key, None)
        start(self, order)

    patch.setattr(SimulatedLauncher, "start", again)


def graces_are_halved(patch: pytest.MonkeyPatch) -> None:
    """Launcher: half of a grace is over when it begins."""
    stop = SimulatedLauncher.stop

    def impatient(self: SimulatedLauncher, order: StopOrder) -> None:
        left_s = max(0.0, order.deadline_s - self._machine.clock.now_s())
        stop(self, replace(order, deadline_s=order.deadline_s - left_s / 2))

    patch.setattr(SimulatedLauncher, "stop", impatient)


def an_exit_is_told_to_nobody_later(patch: pytest.MonkeyPatch) -> None:
    """Launcher: what ended while no daemon listened is forgotten."""
    report = SimulatedLauncher._report

    def forgetful(self: SimulatedLauncher, one: Any) -> None:
        report(self, one)
        if self._on_report is None:
            self._held.get(one.key, []).clear()

    patch.setattr(SimulatedLauncher, "_report", forgetful)


def attempts_are_forgotten_before_their_end_is_on_disk(patch: pytest.MonkeyPatch) -> None:
    """Orders: the launcher may drop an end as soon as it has told it."""
    ended = ReportHandler._exited

    def eager(self: ReportHandler, report: Any) -> None:
        ended(self, report)
        self._control.effects.launcher.forget(AttemptKey(report.key.job_id, report.key.attempt))

    patch.setattr(ReportHandler, "_exited", eager)


PLANTED: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        orders_before_the_commit,
        reports_of_a_tick_that_was_not_kept_are_dropped,
        nobody_is_buried,
        a_stop_is_not_said_again,
        a_start_is_not_said_again,
        a_rollback_forgets_who_is_live,
        commits_are_not_synced,
        a_failed_commit_stays_staged,
        request_ids_are_not_kept,
        memory_is_not_looked_at,
        starts_are_not_idempotent,
        graces_are_halved,
        an_exit_is_told_to_nobody_later,
        attempts_are_forgotten_before_their_end_is_on_disk,
    )
}
