"""What is on disk: nothing acknowledged is lost, the chain is whole, and the energy drawn is booked."""

import contextlib
import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING

from scheduler.effects.journal_file import DATABASE_NAME
from scheduler.effects.journal_verify import verify
from scheduler.errors import JournalError
from scheduler.model.jobs import FINAL_STATES, job_number
from scheduler.simulation.decisions import Decisions
from scheduler.simulation.faults import Read
from tests.simulation.watching import Watch

if TYPE_CHECKING:
    from tests.simulation.world import World

# Of energy counters, as the accounts promise it.
SENSOR_ERROR_RATIO = 0.005
# Counters show whole millijoules.
ROUNDING_MJ = 10


class Books(Watch):
    """Watches what is on disk."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self._drawn_mj: dict[str, int] = {}  # by GPU, before the last power loss
        self._booked_seq = 0  # the last booking of everything
        self._booked: dict[str, Read] = {}  # by GPU: the reading up to which it went
        self._read: dict[str, Read] = {}  # what had been read when it was quiet before
        self._newest_mj: dict[str, int] = {}  # by GPU: what daemons that are no more had read
        self._unknown_mj: dict[str, int] = {}  # by GPU: drawn after a booking, before the power failed
        self._put_down_mj: dict[str, float] = {}  # by GPU: what may be put down for that
        self._gaps: set[str] = set()  # GPUs that were not read since the power failed
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
        read = self._world.faults.read
        self._see_gaps(read)
        seq = self._world.daemon.controller.ledger.booked_seq
        if seq != self._booked_seq:
            # A reading of this very moment may have come before the booking, or after.
            self._booked_seq, self._booked = seq, {**read, **self._read}
            self.energy_is_booked(self._booked)
        self._read = dict(read)

    def died(self) -> None:
        """What was read and not booked is to be read again; what is on disk was perhaps not seen here."""
        for uuid, read in self._world.faults.read.items():
            known_mj = 0 if uuid in self._gaps else self._newest_mj.get(uuid, 0)
            self._newest_mj[uuid] = max(known_mj, read.energy_mj)
        self._world.faults.read = dict(self._booked)
        self._read = dict(self._booked)

    def energy_is_booked(self, read: dict[str, Read]) -> None:
        """What all jobs and idle time were charged is what boards drew up to these readings, or newer ones.

        What was drawn after the last booking and before the power failed may never be known; or it is put
        down by the draw that was known.
        """
        world = self._world
        path = world.daemon.disk.directory / DATABASE_NAME
        with contextlib.closing(sqlite3.connect(path)) as db:
            booked = dict(db.execute("SELECT uuid, sum(energy_mj) FROM usage GROUP BY uuid").fetchall())
        for uuid, newest in world.faults.read.items():
            booked_mj = booked.get(uuid, 0)
            before_mj = self._drawn_mj.get(uuid, 0)
            newest_mj = max(newest.energy_mj, self._newest_mj.get(uuid, 0))
            least_mj, most_mj = before_mj + read[uuid].energy_mj, before_mj + newest_mj
            error_mj = SENSOR_ERROR_RATIO * most_mj + ROUNDING_MJ
            where, drawn_kj = world.names((uuid,)), most_mj / 1e6
            self._demand(
                booked_mj <= most_mj + error_mj + self._put_down_mj.get(uuid, 0.0),
                f"{where} drew {drawn_kj:.1f} kJ, and {(booked_mj - most_mj) / 1e6:.1f} kJ more are booked",
            )
            self._demand(
                booked_mj >= least_mj - error_mj - self._unknown_mj.get(uuid, 0),
                f"{where} drew {drawn_kj:.1f} kJ, and {(least_mj - booked_mj) / 1e6:.1f} kJ are not booked",
            )

    def power_fails(self) -> None:
        """The boards' counters begin anew; what they counted since the last booking is not on disk."""
        for uuid, booked in self._booked.items():
            counted_mj = self._counted_mj(uuid)
            self._drawn_mj[uuid] = self._drawn_mj.get(uuid, 0) + counted_mj
            self._unknown_mj[uuid] = self._unknown_mj.get(uuid, 0) + counted_mj - booked.energy_mj
            self._booked[uuid] = self._world.faults.read[uuid] = replace(booked, energy_mj=0)
            self._gaps.add(uuid)

    def _see_gaps(self, read: dict[str, Read]) -> None:
        """See the first reading after a power loss: before it only the draw at both ends is known."""
        for uuid in [uuid for uuid in self._gaps if read[uuid] is not self._booked[uuid]]:
            before, now = self._booked[uuid], read[uuid]
            most_mj = max(before.power_w, now.power_w) * (now.at_s - before.at_s) * 1000.0
            self._put_down_mj[uuid] = self._put_down_mj.get(uuid, 0.0) + most_mj
            self._gaps.remove(uuid)

    def _counted_mj(self, uuid: str) -> int:
        return self._world.machine.boards[uuid].sample(self._world.clock.true_s()).energy_mj or 0
