"""What must never happen, whatever goes wrong; and what must follow once nothing does any more.

Everything is compared with the machine as it is and with the journal as it is on disk, never with what the
daemon believes of itself.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from typing import TYPE_CHECKING

from scheduler.effects.journal_file import DATABASE_NAME
from scheduler.effects.journal_verify import verify
from scheduler.effects.launcher import AttemptKey, StartOrder, StopOrder
from scheduler.errors import JournalError
from scheduler.model.actions import Action, SetPowerLimit
from scheduler.model.gpus import GpuState
from scheduler.model.jobs import SHARE_MILLI_WHOLE, Attempt, Job, JobState, job_number
from scheduler.model.policy import aged_priority
from scheduler.model.reasons import Reason
from scheduler.planning.planner import plan
from scheduler.simulation.boards import RESERVE_MIB
from scheduler.simulation.decisions import Decisions
from scheduler.simulation.machine import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

# The loop hears of an end in the same moment; a journal that can't be written is tried again each second.
HEARD_S = 3.0
# Two clocks meet: the launcher's timer and the daemon's deadline.
ROUNDING_S = 0.01
# Nothing takes longer once nothing goes wrong: a grace, a hand-over, a process that hangs in the driver.
UNDER_WAY_S = 100.0
# Of energy counters, as the accounts promise it.
SENSOR_ERROR_RATIO = 0.005
# What is put down for the time in which nobody knew: a minute at most, by the last draw.
LOST_BY_REBOOT_S = 90.0


class Violation(Exception):
    """Something happened that must never happen."""


class Invariants:
    """Watches one world."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._signalled_s: dict[AttemptKey, float] = {}
        self._told_s: dict[AttemptKey, float] = {}  # by a stop order
        self._may_end: set[AttemptKey] = set()  # the daemon said that they must not run
        self._steps: list[tuple[float, float]] = []  # of the clock
        self._without_process_s: dict[AttemptKey, float] = {}
        self._without_job_s: dict[AttemptKey, float] = {}
        self._since_s: dict[AttemptKey, tuple[JobState, float]] = {}
        self._anybody_may_be_killed = False
        self._states: dict[int, Job] = {}
        self._planned: object = None
        self._marks: dict[str, str] = {}
        self._drawn_mj: dict[str, int] = {}  # by GPU, before the last power loss

    # The machine -----------------------------------------------------------------------------------

    def before_spawn(self, key: AttemptKey, gpus: tuple[str, ...]) -> None:
        """A GPU is given on only when whoever had it is gone, memory and all; and to one start of a job."""
        machine = self._world.machine
        for process in machine.processes.values():
            self._demand(
                process.key.job_id != key.job_id
                or process.killed,  # one that hangs in the driver does nothing
                f"{_name(key)} starts while {_name(process.key)} runs",
            )
        workload = machine.workload(key.job_id)
        for uuid in gpus:
            where = self._world.names((uuid,))
            others = [o for o in machine.boards[uuid].occupants if o.pid not in machine.strangers]
            left = [o for o in others if not o.is_listed]
            self._demand(not left or workload.share_milli < SHARE_MILLI_WHOLE, f"{where} still holds memory")
            shares = workload.share_milli + sum(o.share_milli for o in others if o.is_listed)
            self._demand(shares <= SHARE_MILLI_WHOLE, f"{_name(key)} starts on {where}, which is in use")
            used_mib = RESERVE_MIB + workload.memory_mib + sum(o.memory_mib for o in others)
            total_mib = machine.boards[uuid].profile.memory_mib
            self._demand(used_mib <= total_mib, f"{where} would hold {used_mib} MiB of {total_mib}")

    def signalled(self, process: Process) -> None:
        """Its grace begins."""
        self._signalled_s.setdefault(process.key, self._now_s())

    def before_kill(self, process: Process) -> None:
        """Nobody is killed before its grace ended or it said that it is ready."""
        key = process.key
        if self._anybody_may_be_killed or key in self._may_end or process.workload.acknowledges_s is not None:
            return
        job = self._durable(key)
        self._demand(key in self._signalled_s, f"{_name(key)} is killed and was never told to go")
        assert job is not None
        # A process that was told before it ran has one deadline all the same.
        started_s = process.started_s - self._world.clock.epoch_s
        told_s = self._told_s.get(key, started_s)
        had_s = self._now_s() - (told_s if told_s < started_s else self._signalled_s[key])
        stepped_s = sum(max(0.0, by_s) for at_s, by_s in self._steps if at_s >= self._decided_s(key))
        grace_s = job.spec.grace_s
        attempt = _attempt(job, key)
        notice = attempt.notice if attempt is not None else None
        if notice is not None and notice.reason is Reason.SHED_IN_EMERGENCY:  # it caps the grace
            grace_s = min(grace_s, notice.deadline_s - notice.decided_s)
        self._demand(
            had_s >= grace_s - stepped_s - ROUNDING_S,
            f"{_name(key)} is killed after {had_s:.3f} s of its grace of {grace_s} s",
        )

    def _decided_s(self, key: AttemptKey) -> float:
        return self._told_s.get(key, 0.0) - UNDER_WAY_S

    def ended(self, process: Process) -> None:
        """Its end must be heard."""
        self._without_process_s.setdefault(process.key, self._now_s())

    def clock_stepped(self, by_s: float) -> None:
        """Deadlines in Unix time are nearer or farther now."""
        self._steps.append((self._now_s(), by_s))

    @contextlib.contextmanager
    def anybody_may_be_killed(self) -> Iterator[None]:
        """Whoever holds the processes dies, and they with it."""
        self._anybody_may_be_killed = True
        yield
        self._anybody_may_be_killed = False

    def may_end_early(self, job_id: str) -> None:
        """Somebody said in the job's name that it is ready to be stopped."""
        job = self._world.daemon.journal.job(job_number(job_id) or 0) if self._world.daemon.runs else None
        if job is not None:
            self._may_end.add(AttemptKey(job_id, job.attempt))

    # Orders ----------------------------------------------------------------------------------------

    def ordered(self, order: StartOrder | StopOrder | AttemptKey, what: str) -> None:
        """Nothing is ordered that is not in the journal."""
        key = order if isinstance(order, AttemptKey) else order.key
        job = self._durable(key)
        attempt = _attempt(job, key)
        said = f"{_name(key)}: the order to {what} is sent, but the journal knows no"
        match what:
            case "start":
                assert isinstance(order, StartOrder)
                gpus = tuple(filter(None, order.environment["CUDA_VISIBLE_DEVICES"].split(",")))
                self._demand(attempt is not None and attempt.exited_s is None, f"{said} such start")
                assert attempt is not None
                self._demand(attempt.gpus == gpus, f"{said} start on {self._world.names(gpus)}")
            case "stop":
                self._demand(attempt is not None and attempt.notice is not None, f"{said} notice")
                self._told_s.setdefault(key, self._now_s())
            case "end_grace":
                over = job is None or attempt is None or not job.holds or attempt.exited_s is not None
                ready = attempt is not None and attempt.acknowledged_s is not None
                capped = attempt is not None and self._is_capped(attempt)
                self._demand(over or ready or capped, f"{said} acknowledgement and no emergency that cuts it")
                self._may_end.add(key)
            case _:
                over = job is None or attempt is None or attempt.exited_s is not None
                self._demand(
                    over or not self._world.daemon.launcher.was_begun(key.job_id, key.attempt), f"{said} end"
                )

    def _is_capped(self, attempt: Attempt) -> bool:
        """Whether a grid emergency that the journal knows has cut the attempt's grace by now."""
        daemon = self._world.daemon
        if attempt.notice is None or not daemon.runs:
            return False
        began = [
            max(event.shed_began_s, attempt.notice.decided_s)
            for event in daemon.journal.node_state().power.events
            if event.emergency and event.binds and event.shed_began_s is not None
        ]
        grace_s = daemon.config.power.emergency_grace_s
        return any(self._world.clock.now_s() >= begun_s + grace_s for begun_s in began)

    def _durable(self, key: AttemptKey) -> Job | None:
        number = job_number(key.job_id)
        assert number is not None
        daemon = self._world.daemon
        return daemon.journal.job(number) if daemon.runs else self._states.get(number)

    # Every moment ----------------------------------------------------------------------------------

    def came_up(self) -> None:
        """What was acknowledged survived."""
        self._acknowledged_are_there()

    def died(self) -> None:
        """Nothing of the daemon counts any more but what is on disk."""
        self._planned = None

    def hold(self) -> None:
        """Everything that must hold at any moment."""
        daemon = self._world.daemon
        if not daemon.serves:
            self._without_process_s = dict.fromkeys(self._without_process_s, self._now_s())
            self._without_job_s.clear()
            return
        failures = daemon.controller.meters.tick_failures
        self._demand(not failures, f"{failures} ticks failed")
        self._tell_changes()
        self._nothing_is_over_committed()
        self._processes_are_jobs()
        self._plan_is_a_fixed_point()

    def _tell_changes(self) -> None:
        """Write down how jobs moved since the last look, and check each preemption."""
        world, ledger = self._world, self._world.daemon.controller.ledger
        for number, job in list(ledger.jobs.items()):
            self._see(self._states.get(number), job)
        for number, before in list(self._states.items()):
            if number not in ledger.jobs and before.state in _LIVE_OR_PENDING:
                now = ledger.job(number)
                if now is not None:
                    self._see(before, now)
        marks = {
            uuid: f"{mark.state.value}: {mark.reason} {mark.detail}" for uuid, mark in ledger.marks.items()
        }
        if marks != self._marks:
            for uuid in sorted(marks.keys() | self._marks.keys()):
                if marks.get(uuid) != self._marks.get(uuid):
                    world.say(f"{world.names((uuid,))} is {marks.get(uuid, 'open again')}")
            self._marks = marks

    def _see(self, before: Job | None, job: Job) -> None:
        if before is job or (before is not None and before.revision == job.revision):
            return
        self._states[job.number] = job
        if before is None or (before.state, before.attempt) != (job.state, job.attempt):
            by = job.last.preempted_by if job.last is not None and job.state is JobState.PREEMPTING else ""
            self._world.say(
                f"{job.id} {job.state} {job.reason}{' by ' + by if by else ''} {job.detail}".rstrip()
            )
        if job.state is JobState.PREEMPTING and (before is None or before.state is not JobState.PREEMPTING):
            self._preempted_with_reason(job)

    def _preempted_with_reason(self, job: Job) -> None:
        notice = job.attempts[-1].notice
        self._demand(notice is not None, f"{job.id} gives way and nobody told it why")
        assert notice is not None
        if notice.reason is not Reason.PREEMPTED_BY_HIGHER_RANK:
            return
        number = job_number(notice.preempted_by)
        preemptor = self._world.daemon.controller.ledger.job(number) if number is not None else None
        self._demand(preemptor is not None, f"{job.id} gives way to {notice.preempted_by!r}, which is no job")
        assert preemptor is not None
        self._demand(job.spec.preemptible, f"{job.id} gives way and is not preemptible")
        self._demand(
            self._rank(preemptor)[:3] < self._rank(job)[:3],
            f"{job.id} gives way to {preemptor.id}, which does not outrank it",
        )

    def _priority(self, job: Job) -> int:
        policy = self._world.daemon.config.policy
        return aged_priority(job.spec.job_class, job.spec.priority, job.preemptions, policy)

    def _nothing_is_over_committed(self) -> None:
        controller = self._world.daemon.controller
        node = self._world.script.node
        jobs = list(controller.ledger.live_jobs())
        for name in ("cpus", "memory_mib"):
            used = sum(getattr(job.spec, name) for job in jobs)
            self._demand(used <= node[name], f"{used} {name} are given out of {node[name]}")
        shares = dict.fromkeys(self._world.gpus, 0)
        for job in jobs:
            gpus = job.attempts[-1].gpus
            self._demand(len(set(gpus)) == job.spec.gpus, f"{job.id} wants {job.spec.gpus} GPUs, has {gpus}")
            for uuid in gpus:
                shares[uuid] += job.spec.gpu_share_milli
        for uuid, share in shares.items():
            self._demand(share <= SHARE_MILLI_WHOLE, f"{self._world.names((uuid,))} is given to {share}/1000")

    def _processes_are_jobs(self) -> None:
        """No process without a job, no running job without a process, for longer than it takes to hear."""
        world, now_s = self._world, self._now_s()
        daemon, ledger = world.daemon, world.daemon.controller.ledger
        heard = daemon.controller.launcher_id and not daemon.disk.failure and not daemon.disk.is_full
        alive = {process.key for process in world.machine.processes.values()}
        jobs = {
            AttemptKey(job.id, job.attempt)
            for job in ledger.live_jobs()
            if job.attempts[-1].started_s is not None
        }
        known = {AttemptKey(job.id, job.attempt) for job in ledger.live_jobs()}
        killed = {process.key for process in world.machine.processes.values() if process.killed}
        for there, wanted, since_s, words in (
            (alive - killed, known, self._without_job_s, "runs and is nobody's"),
            (jobs, alive, self._without_process_s, "is running and has no process"),
        ):
            for key in there - wanted:
                since_s.setdefault(key, now_s)
                if not heard:
                    since_s[key] = now_s
                self._demand(now_s - since_s[key] <= HEARD_S, f"{_name(key)} {words}")
            for key in list(since_s):
                if key not in there - wanted:
                    del since_s[key]

    def _plan_is_a_fixed_point(self) -> None:
        """R7: what was just planned and done leaves nothing to do."""
        controller = self._world.daemon.controller
        made = controller.last_plan
        if made is None or not made.actions or made is self._planned:
            return
        self._planned = made
        if controller.inbox or not controller.launcher_id or self._disk_fails():
            return  # nothing can be planned, or not all is known
        more = self._planned_again()
        self._demand(not more, f"planned again, there is more to do: {more}")

    def _planned_again(self) -> list[Action]:
        """What a plan would do now. Limits follow what is measured, so there is always more of them."""
        controller = self._world.daemon.controller
        again = plan(controller.board.snapshot(self._world.clock.now_s()), controller.config.policy)
        return [action for action in again.actions if not isinstance(action, SetPowerLimit)]

    def _disk_fails(self) -> bool:
        disk = self._world.daemon.disk
        return bool(disk.failure or disk.is_full)

    def _acknowledged_are_there(self) -> None:
        daemon = self._world.daemon
        for request_id, job_id in self._world.acknowledged.items():
            number = job_number(job_id)
            assert number is not None
            self._demand(daemon.journal.job(number) is not None, f"{job_id} was acknowledged and is gone")
            found = daemon.journal.request(request_id)
            self._demand(found is not None and found[0] == number, f"{request_id} of {job_id} is forgotten")

    # The end ---------------------------------------------------------------------------------------

    def all_is_well(self) -> None:
        """Faults are over for a good while: nothing is under way for ever, and nobody waits for nothing."""
        world, daemon = self._world, self._world.daemon
        self._demand(daemon.serves, "the daemon did not come up again")
        self._acknowledged_are_there()
        controller, now_s = daemon.controller, world.clock.now_s()
        for job in controller.ledger.live_jobs():
            if job.state is not JobState.RUNNING and job.state_since_s <= now_s - UNDER_WAY_S:
                self._demand(False, f"{job.id} is {job.state} for ever")
        more = self._planned_again()
        self._demand(not more, f"there is something to do: {more}")
        held = {uuid for job in controller.ledger.live_jobs() for uuid in job.attempts[-1].gpus}
        for view in controller.board.views(now_s):
            uuid, where = view.identity.uuid, world.names((view.identity.uuid,))
            board = world.machine.boards[uuid]
            if view.state in (GpuState.QUARANTINED, GpuState.CORDONED):
                self._demand(bool(view.detail), f"{where} is {view.state.value} and nobody knows why")
            elif not board.occupants and uuid not in held:
                self._demand(
                    view.state is GpuState.FREE, f"{where} is empty and {view.state.value} ({view.detail})"
                )
        self._nobody_is_left_out()

    def _nobody_is_left_out(self) -> None:
        """R4, in its simplest form: a job that waits, may start, and finds its GPUs free."""
        world, controller = self._world, self._world.daemon.controller
        ledger, now_s = controller.ledger, world.clock.now_s()
        views = {view.identity.uuid: view for view in controller.board.views(now_s)}
        free = [uuid for uuid, view in views.items() if view.state is GpuState.FREE]
        cpus = world.script.node["cpus"] - sum(job.spec.cpus for job in ledger.live_jobs())
        waiting = [
            job for job in ledger.jobs.values() if job.state is JobState.PENDING and job.eligible_s <= now_s
        ]
        for job in waiting:
            reason = controller.reason(job)
            if any(self._rank(other) < self._rank(job) for other in waiting):
                continue  # what is free may be kept for who ranks higher
            held_back = reason is Reason.WAITING_FOR_PROMISED_START
            self._demand(not held_back, f"{job.id} is held back for a higher rank, and nobody ranks higher")
            if (reason is Reason.WAITING_FOR_POWER and controller.power.is_active) or (
                reason is Reason.WAITING_FOR_PRICE and controller.prices.price is not None
            ):
                continue
            fits = len(free) >= job.spec.gpus and cpus >= job.spec.cpus
            self._demand(not fits, f"{job.id} waits ({reason}) and what it wants is free")

    def _rank(self, job: Job) -> tuple[int, ...]:
        """The smaller, the higher."""
        value = job.spec.value_microusd_per_gpu_hour
        return (int(job.spec.job_class), -self._priority(job), -value, job.number)

    def energy_is_booked(self) -> None:
        """What all jobs and idle time were charged is what the boards drew, but for the last reading's age.

        What was not booked when the power failed may never be known; then too no more is booked than was
        drawn, but for what is put down by the last draw.
        """
        path = self._world.daemon.disk.directory / DATABASE_NAME
        with contextlib.closing(sqlite3.connect(path)) as db:
            booked = dict(db.execute("SELECT uuid, sum(energy_mj) FROM usage GROUP BY uuid").fetchall())
        boots = self._world.machine.boots
        unread_s = 2 * self._world.script.sampling_s + LOST_BY_REBOOT_S * boots
        for uuid, board in self._world.machine.boards.items():
            drawn_mj = self._drawn_mj.get(uuid, 0) + self._counted_mj(uuid)
            more_mj = booked.get(uuid, 0) - drawn_mj
            off_mj = max(0, more_mj) if boots else abs(more_mj)
            unread_mj = unread_s * board.profile.power_limit_w_max * 1000.0
            where, drawn_kj, more_kj = self._world.names((uuid,)), drawn_mj / 1e6, more_mj / 1e6
            self._demand(
                off_mj <= SENSOR_ERROR_RATIO * drawn_mj + unread_mj,
                f"{where} drew {drawn_kj:.1f} kJ, and {more_kj:.1f} kJ more are booked",
            )

    def power_fails(self) -> None:
        """The boards' counters begin anew."""
        for uuid in self._world.gpus:
            self._drawn_mj[uuid] = self._drawn_mj.get(uuid, 0) + self._counted_mj(uuid)

    def _counted_mj(self, uuid: str) -> int:
        return self._world.machine.boards[uuid].sample(self._world.clock.true_s()).energy_mj or 0

    def chain_is_whole(self) -> None:
        """The journal proves itself."""
        found = verify(self._world.daemon.disk.directory)
        self._demand(found.ok, f"the journal is not whole: {found.problem}")

    def decisions_replay(self) -> None:
        """Each decision can be made again, and what jobs said makes the columns that the plan had."""
        decisions = Decisions(self._world.daemon.disk.directory, self._world.daemon.config.policy)
        try:
            for decision in decisions.again():
                event = f"event {decision.event}"
                self._demand(decision.is_same, f"{event} is another plan when it is made again")
                self._demand(not decision.otherwise, f"the same policy decides {event} otherwise")
        except JournalError as error:
            self._demand(False, f"decisions can't be made again: {error}")
        skipped = decisions.totals.skipped
        self._demand(not skipped, f"{skipped} decisions have no whole frame before them")

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _demand(self, holds: bool, words: str) -> None:
        if not holds:
            violation = Violation(words)
            self._world.failed(violation)  # the loop catches everything
            raise violation


_LIVE_OR_PENDING = frozenset(JobState) - {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


def _attempt(job: Job | None, key: AttemptKey) -> Attempt | None:
    return None if job is None else next((a for a in job.attempts if a.number == key.attempt), None)


def _name(key: AttemptKey) -> str:
    return f"{key.job_id}/{key.attempt}"
