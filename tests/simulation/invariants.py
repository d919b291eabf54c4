"""What must never happen, whatever goes wrong; and what must follow once nothing does any more.

Everything is compared with the machine as it is and with the journal as it is on disk, never with what the
daemon believes of itself.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from scheduler.control.sheds import GRACE_RATIO_MIN
from scheduler.effects.launcher import AttemptKey, StartOrder, StopOrder
from scheduler.model.gpus import GpuState
from scheduler.model.jobs import FINAL_STATES, SHARE_MILLI_WHOLE, Attempt, Job, JobState, job_number
from scheduler.model.reasons import Reason
from scheduler.simulation.boards import RESERVE_MIB
from scheduler.simulation.machine import Process
from tests.simulation.books import Books
from tests.simulation.plans import UNDER_WAY_S, Plans
from tests.simulation.stops import Stops
from tests.simulation.watching import Watch
from tests.simulation.watts import Watts

if TYPE_CHECKING:
    from tests.simulation.world import World

# The loop hears of an end in the same moment; a journal that can't be written is tried again each second.
HEARD_S = 3.0
# Two clocks meet: the launcher's timer and the daemon's deadline.
ROUNDING_S = 0.01


class Invariants(Watch):
    """Watches one world: its processes and orders here, the rest where it belongs."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self.plans = Plans(world)
        self.stops = Stops(world)
        self.watts = Watts(world)
        self.books = Books(world)
        self._signalled_s: dict[AttemptKey, float] = {}
        self._told_s: dict[AttemptKey, float] = {}  # by a stop order
        self._may_end: set[AttemptKey] = set()  # the daemon said that they must not run
        self._steps: list[tuple[float, float]] = []  # of the clock
        self._without_process_s: dict[AttemptKey, float] = {}
        self._without_job_s: dict[AttemptKey, float] = {}
        self._without_signal_s: dict[AttemptKey, float] = {}
        self._without_reason_s: dict[AttemptKey, float] = {}
        self._without_freeze_s: dict[AttemptKey, float] = {}
        self._since_s: dict[AttemptKey, tuple[JobState, float]] = {}
        self._anybody_may_be_killed = False
        self._states: dict[int, Job] = {}
        self._marks: dict[str, str] = {}

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
        if self._anybody_may_be_killed or key in self._may_end:
            return
        job = self._durable(key)
        self._demand(key in self._signalled_s, f"{_name(key)} is killed and was never told to go")
        assert job is not None
        ready_s = process.workload.acknowledges_s
        if ready_s is not None and self._now_s() >= self._signalled_s[key] + ready_s - ROUNDING_S:
            return  # it has said so itself
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
                if gpus and self._world.clock.now_s() - attempt.decided_s <= ROUNDING_S:  # else said again
                    self.watts.before_more(f"{_name(key)} is to start", gpus)
            case "stop":
                self._demand(attempt is not None and attempt.notice is not None, f"{said} notice")
                self._told_s.setdefault(key, self._now_s())
            case "freeze" | "thaw":
                told = attempt is not None and attempt.suspend_s is not None
                self._demand(attempt is not None and told is (what == "freeze"), f"{said} such decision")
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
        grace_s = GRACE_RATIO_MIN * daemon.config.power.emergency_grace_s
        return any(self._world.clock.now_s() >= begun_s + grace_s for begun_s in began)

    def _durable(self, key: AttemptKey) -> Job | None:
        number = job_number(key.job_id)
        assert number is not None
        daemon = self._world.daemon
        return daemon.journal.job(number) if daemon.runs else self._states.get(number)

    # Every moment ----------------------------------------------------------------------------------

    def came_up(self) -> None:
        """What was acknowledged survived, and the chain is whole."""
        self.books.acknowledged_are_there()
        self.books.chain_is_whole()

    def died(self) -> None:
        """Nothing of the daemon counts any more but what is on disk."""
        self.plans.died()
        self.books.died()

    def hold(self) -> None:
        """Everything that must hold at any moment."""
        daemon = self._world.daemon
        if not daemon.serves:
            self._without_process_s = dict.fromkeys(self._without_process_s, self._now_s())
            self._without_job_s.clear()
            self._without_signal_s.clear()
            self._without_reason_s.clear()
            self._without_freeze_s.clear()
            return
        failures = daemon.controller.meters.tick_failures
        self._demand(not failures, f"{failures} ticks failed")
        self._tell_changes()
        self.plans.nothing_is_over_committed()
        self._processes_are_jobs()
        self.plans.hold()
        self.watts.hold()
        self.books.acknowledged_are_known()
        self.books.hold()

    def _tell_changes(self) -> None:
        """Write down how jobs moved since the last look, and check each preemption."""
        world, ledger = self._world, self._world.daemon.controller.ledger
        for number, job in list(ledger.jobs.items()):
            self._see(self._states.get(number), job)
        for number, before in list(self._states.items()):
            if number not in ledger.jobs and before.state not in FINAL_STATES:
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
        self.stops.seen(before, job)

    def _processes_are_jobs(self) -> None:
        """No process without a job or the notice that it has got, no running job without a process.

        Not for longer than it takes to hear.
        """
        world, now_s = self._world, self._now_s()
        daemon, ledger = world.daemon, world.daemon.controller.ledger
        heard = daemon.controller.launcher_id and not daemon.disk.fails
        alive = {process.key for process in world.machine.processes.values()}
        jobs = {
            AttemptKey(job.id, job.attempt)
            for job in ledger.live_jobs()
            if job.attempts[-1].started_s is not None
        }
        known = {AttemptKey(job.id, job.attempt) for job in ledger.live_jobs()}
        killed = {process.key for process in world.machine.processes.values() if process.killed}
        told = {AttemptKey(job.id, job.attempt) for job in ledger.live_jobs() if job.attempts[-1].notice}
        frozen = {p.key for p in world.machine.processes.values() if p.frozen and not p.killed}
        suspended = {
            AttemptKey(job.id, job.attempt)
            for job in ledger.live_jobs()
            if job.attempts[-1].suspend_s is not None
        }
        for there, wanted, since_s, words in (
            (alive - killed, known, self._without_job_s, "runs and is nobody's"),
            (jobs, alive, self._without_process_s, "is running and has no process"),
            (
                told & alive - killed,
                self._signalled_s.keys(),
                self._without_signal_s,
                "is to go, and not told",
            ),
            (frozen, suspended, self._without_reason_s, "is frozen, and is to run"),
            (suspended & alive - killed, frozen, self._without_freeze_s, "is to be frozen, and runs"),
        ):
            for key in there - wanted:
                since_s.setdefault(key, now_s)
                if not heard:
                    since_s[key] = now_s
                self._demand(now_s - since_s[key] <= HEARD_S, f"{_name(key)} {words}")
            for key in list(since_s):
                if key not in there - wanted:
                    del since_s[key]

    # The end ---------------------------------------------------------------------------------------

    def all_is_well(self) -> None:
        """Faults are over for a good while: nothing is under way for ever, and nobody waits for nothing."""
        world, daemon = self._world, self._world.daemon
        self._demand(daemon.serves, "the daemon did not come up again")
        self.books.acknowledged_are_there()
        controller, now_s = daemon.controller, world.clock.now_s()
        for job in controller.ledger.live_jobs():
            stays = job.state is JobState.SUSPENDED and self.watts.has_budget()
            if job.state is not JobState.RUNNING and not stays and job.state_since_s <= now_s - UNDER_WAY_S:
                self._demand(False, f"{job.id} is {job.state} for ever")
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
        self.plans.are_at_rest()
        self.watts.are_kept()

    def is_over(self) -> None:
        """The daemon has stopped in good order: its books are complete."""
        self.books.chain_is_whole()
        self.books.energy_is_booked(self._world.faults.read)
        self.books.decisions_replay()


def _attempt(job: Job | None, key: AttemptKey) -> Attempt | None:
    return None if job is None else next((a for a in job.attempts if a.number == key.attempt), None)


def _name(key: AttemptKey) -> str:
    return f"{key.job_id}/{key.attempt}"
