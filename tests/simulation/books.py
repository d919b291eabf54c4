"""What is on disk: nothing acknowledged is lost, the chain is whole, and the energy drawn is booked."""

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from scheduler.effects.journal_file import DATABASE_NAME
from scheduler.effects.journal_verify import verify
from scheduler.errors import JournalError
from scheduler.model.jobs import FINAL_STATES, job_number
from scheduler.simulation.decisions import Decisions
from tests.simulation.watching import Watch

if TYPE_CHECKING:
    from tests.simulation.world import World

# Of energy counters, as the accounts promise it.
SENSOR_ERROR_RATIO = 0.005
# What is put down for the time in which nobody knew: a minute at most, by the last draw.
LOST_BY_REBOOT_S = 90.0
# Counters show whole millijoules.
ROUNDING_MJ = 10


class Books(Watch):
    """Watches what is on disk."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self._drawn_mj: dict[str, int] = {}  # by GPU, before the last power loss
        self._booked_seq = 0  # the last booking of everything
        self._booked_s: dict[str, float] = {}  # by GPU: the reading up to which it went
        self._read_s: dict[str, float] = {}  # what had been read when it was quiet before
        self._finished_s: dict[str, float] = {}  # acknowledged jobs that were seen to be over, and since when

    def acknowledged_are_there(self) -> None:
        """Every job that a client was told of is on disk, under its request_id, for as long as it is kept."""
        daemon, now_s = self._world.daemon, self._world.clock.now_s()
        kept_s = daemon.config.state.finished_jobs_kept_s
        for request_id, job_id in self._world.acknowledged.items():
            if now_s - self._finished_s.get(job_id, now_s) > kept_s:
                continue  # the clock was set forward by days
            number = job_number(job_id)
            assert number is not None
            self._demand(daemon.journal.job(number) is not None, f"{job_id} was acknowledged and is gone")
            found = daemon.journal.request(request_id)
            self._demand(found is not None and found[0] == number, f"{request_id} of {job_id} is forgotten")

    def acknowledged_are_known(self) -> None:
        """The same of what the loop knows: it is active, or its end was seen."""
        ledger = self._world.daemon.controller.ledger
        for job_id in self._world.acknowledged.values():
            number = job_number(job_id)
            assert number is not None
            if job_id in self._finished_s or number in ledger.jobs:
                continue
            job = ledger.job(number)
            self._demand(job is not None, f"{job_id} was acknowledged and nobody knows it")
            assert job is not None
            self._demand(job.state in FINAL_STATES, f"{job_id} is {job.state} and the loop has forgotten it")
            assert job.finished_s is not None
            self._finished_s[job_id] = job.finished_s

    def chain_is_whole(self) -> None:
        """The journal proves itself."""
        found = verify(self._world.daemon.disk.directory)
        self._demand(found.ok, f"the journal is not whole: {found.problem}")

    def decisions_replay(self) -> None:
        """Each decision can be made again, and what jobs said makes the columns that the plan had."""
        daemon = self._world.daemon
        decisions = Decisions(daemon.disk.directory, daemon.config.policy)
        try:
            for decision in decisions.again():
                event = f"event {decision.event}"
                self._demand(decision.is_same, f"{event} is another plan when it is made again")
                self._demand(not decision.otherwise, f"the same policy decides {event} otherwise")
        except JournalError as error:
            self._demand(False, f"decisions can't be made again: {error}")
        skipped = decisions.totals.skipped
        self._demand(not skipped, f"{skipped} decisions have no whole frame before them")

    # Energy --------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Each time that everything was booked it is what was drawn up to the last reading."""
        seq = self._world.daemon.controller.ledger.booked_seq
        if seq != self._booked_seq:
            # A reading of this very moment may have come before the booking, or after.
            self._booked_seq, self._booked_s = seq, self._read_s
            self.energy_is_booked(self._booked_s)
        self._read_s = dict(self._world.faults.read_s)

    def died(self) -> None:
        """What was read and not booked is to be read again."""
        self._world.faults.read_s = dict(self._booked_s)
        self._read_s = dict(self._booked_s)

    def energy_is_booked(self, read_s: dict[str, float]) -> None:
        """What all jobs and idle time were charged is what the boards drew, up to these readings.

        What was not booked when the power failed may never be known; then too no more is booked than was
        drawn, but for what is put down by the last draw.
        """
        world = self._world
        path = world.daemon.disk.directory / DATABASE_NAME
        with contextlib.closing(sqlite3.connect(path)) as db:
            booked = dict(db.execute("SELECT uuid, sum(energy_mj) FROM usage GROUP BY uuid").fetchall())
        for uuid, board in world.machine.boards.items():
            drawn_mj = self._drawn_mj.get(uuid, 0) + self._counted_mj(uuid)
            more_mj = booked.get(uuid, 0) - drawn_mj
            boots = world.machine.boots
            off_mj = max(0, more_mj) if boots else abs(more_mj)
            unread_s = self._now_s() - read_s.get(uuid, 0.0) + LOST_BY_REBOOT_S * boots
            unread_mj = unread_s * board.profile.power_limit_w_max * 1000.0
            where, drawn_kj, more_kj = world.names((uuid,)), drawn_mj / 1e6, more_mj / 1e6
            self._demand(
                off_mj <= SENSOR_ERROR_RATIO * drawn_mj + unread_mj + ROUNDING_MJ,
                f"{where} drew {drawn_kj:.1f} kJ, and {more_kj:.1f} kJ more are booked",
            )

    def power_fails(self) -> None:
        """The boards' counters begin anew."""
        for uuid in self._world.gpus:
            self._drawn_mj[uuid] = self._drawn_mj.get(uuid, 0) + self._counted_mj(uuid)

    def _counted_mj(self, uuid: str) -> int:
        return self._world.machine.boards[uuid].sample(self._world.clock.true_s()).energy_mj or 0
