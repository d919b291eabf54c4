"""A script, played: the real daemon on a simulated machine, its clients, and all that goes wrong there."""

import asyncio
import contextlib
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from scheduler.control.board import NodeSize
from scheduler.control.inbox import (
    Acknowledge,
    Cancel,
    CancelGridEvent,
    Command,
    Cordon,
    Drain,
    OfferGridEvent,
    Requeue,
    SetPowerBudget,
    SetPrices,
    Submission,
    Submit,
    Uncordon,
    Undrain,
)
from scheduler.control.loop import Effects
from scheduler.effects.launcher import AttemptKey, StartOrder, StopOrder
from scheduler.errors import NodeError, RequestError, Unavailable
from scheduler.model.events import Event, PlanDecided
from scheduler.model.jobs import Job, OnPreempt
from scheduler.model.power import BudgetInterval, GridEvent
from scheduler.model.prices import PricePoint
from scheduler.model.reasons import Reason
from scheduler.model.settings import Config, PowerConfig, SamplingConfig, StandingJob
from scheduler.simulation.boards import PROFILES, boards
from scheduler.simulation.daemon import SimulatedDaemon
from scheduler.simulation.faults import Crashed, Faults
from scheduler.simulation.machine import Machine, Process, Workload
from scheduler.simulation.virtual_time import EPOCH_S, VirtualClock, VirtualLoop, run
from tests.simulation.expecting import found_otherwise
from tests.simulation.invariants import Invariants
from tests.simulation.script import Arrival, Expectation, Script, Wish
from tests.simulation.troubles import Troubles
from tests.simulation.watching import Violation

# Faults are over: so long until all that was under way has come to an end.
SETTLING_S = 120.0
COMMAND_CHARACTERS_MAX = 120
RETRY_S = 0.5  # of a client that was not answered
REFUSED_START_S = 2.0  # until systemd starts a daemon again that would not
_MINER = StandingJob("miner", ("work", "miner"))
# A stop would cost more than the shed lasts: it is frozen instead.
_FREEZABLE = replace(_MINER, on_preempt=OnPreempt.SUSPEND, restart_loss_s=600.0)
_PIDS_FIRST = 1000
LATE_S = 1e6  # no run lasts that long


class WatchedMachine(Machine):
    """A machine that tells what is done on it."""

    # As `Machine` is: set after it is made.
    watch: "World"

    def spawn(self, key: AttemptKey, gpus: tuple[str, ...]) -> Process:
        self.watch.invariants.before_spawn(key, gpus)
        process = super().spawn(key, gpus)
        self.watch.say(f"{key.job_id}/{key.attempt} runs as pid {process.pid} on {self.watch.names(gpus)}")
        return process

    def terminate(self, process: Process) -> None:
        self.watch.say(f"{process.key.job_id}/{process.key.attempt} gets SIGTERM")
        self.watch.invariants.signalled(process)
        super().terminate(process)

    def kill(self, process: Process) -> None:
        if process.pid in self.processes and not process.killed:
            self.watch.say(f"{process.key.job_id}/{process.key.attempt} gets SIGKILL")
            self.watch.invariants.before_kill(process)
        super().kill(process)

    def set_power_limit(self, uuid: str, power_limit_w: float) -> None:
        rises = power_limit_w > self.boards[uuid].power_limit_w
        super().set_power_limit(uuid, power_limit_w)
        self.watch.say(f"the limit of {self.watch.names((uuid,))} is {power_limit_w:g} W")
        if rises:
            self.watch.invariants.watts.before_more(f"the limit of {self.watch.names((uuid,))} rises")


class World:
    """Everything that a run is made of; `log` is its story so far."""

    def __init__(self, script: Script, directory: Path) -> None:
        """Take the script, and an empty directory for the journal (best in memory)."""
        self.script = script
        self.log: list[str] = []
        self.failure: Violation | None = None
        self.clock = VirtualClock()
        self.workloads: dict[str, Workload] = {}
        self._behaviours = {arrival.spec.name: arrival.workload for arrival in script.arrivals}
        self._behaviours[_MINER.name] = Workload(stop_s=0.5)
        self.acknowledged: dict[str, str] = {}  # by request_id: the job that the client was told
        self.machine = WatchedMachine(
            boards([PROFILES["H100"]] * script.gpus, "n", EPOCH_S), self.clock, self._workload
        )
        self.machine.watch = self
        self.gpus = tuple(self.machine.boards)
        if script.pids:
            self.machine.pids = itertools.cycle(
                range(_PIDS_FIRST, _PIDS_FIRST + 2 * script.gpus + script.pids)
            )
        self.faults = Faults(verdicts={} if script.gives_verdicts else None)
        self.faults.on_order = self._ordered
        miner = _FREEZABLE if script.miners_freeze else _MINER
        self.daemon = SimulatedDaemon(
            self.machine,
            directory,
            Config(
                sampling=SamplingConfig(period_s=script.sampling_s),
                power=PowerConfig(budget_w=script.budget_w),
                standing_jobs=(miner,) if script.miners else (),
            ),
            (NodeSize(script.node["cpus"], script.node["memory_mib"], 100),),
            self._wrapped,
        )
        self.daemon.launcher.start_s = script.start_s
        self.faults.watch(self.daemon.disk)
        self._tell_ends()
        self.invariants = Invariants(self)
        self.down_s = 0.0  # for how long the next death lasts
        self._tasks: list[asyncio.Task[None]] = []
        self._over = asyncio.Event()

    # The story -----------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Write it down, up to the end of the story."""
        if self.failure is not None:
            return
        self.log.append(f"{asyncio.get_running_loop().time():11.4f}  {text}")

    def names(self, gpus: tuple[str, ...]) -> str:
        """GPUs by their numbers."""
        return "GPU " + ",".join(str(self.gpus.index(uuid)) for uuid in gpus) if gpus else "no GPU"

    def _tell_ends(self) -> None:
        told = self.machine.on_exit
        assert told is not None

        def tell(process: Process, exit_code: int | None, signal: int | None) -> None:
            how = f"of signal {signal}" if exit_code is None else f"with {exit_code}"
            self.say(f"{process.key.job_id}/{process.key.attempt} ends {how}")
            self.invariants.ended(process)
            told(process, exit_code, signal)

        self.machine.on_exit = tell

    def _wrapped(self, effects: Effects) -> Effects:
        """A daemon's effects, with what goes wrong there; its plans are looked at before they are written."""
        stage = effects.journal.stage

        def watched(event: Event) -> int:
            if isinstance(event, PlanDecided):
                assert self.daemon.loop is not None
                self.invariants.plans.decided(self.daemon.loop, event)
            return stage(event)

        effects.journal.stage = watched  # type: ignore[method-assign]
        return self.faults.wrap(effects)

    # Life ------------------------------------------------------------------------------------------

    async def play(self) -> None:
        """Faults fly; then they stop, and all must come right.

        Raises:
            Violation: Something happened that must never happen.
        """
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.set_exception_handler(self._defect)
        loop.on_quiet = self._quiet
        self.start_later(0.0)
        for arrival in self.script.arrivals:
            self._spawn(self._client(arrival))
        for wish in self.script.wishes:
            self._spawn(self._operator(wish))
        troubles = Troubles(self)
        for fault in self.script.faults:
            self._spawn(troubles.befall(fault))
        for expectation in self.script.expectations:
            self._spawn(self._expect(expectation))
        await self._until(self.script.faults_s)
        self.end_faults()
        await self._until(self.script.faults_s + SETTLING_S)
        self.invariants.all_is_well()
        loop.on_quiet = None
        self.say(f"the journal has {self.daemon.journal.head} events")
        self.daemon.stop()
        self.invariants.is_over()
        if self.failure is not None:
            raise self.failure

    async def _until(self, at_s: float) -> None:
        """Wait, but no longer than until something was violated."""
        left_s = at_s - asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), left_s)
        if self.failure is not None:
            raise self.failure

    def _spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def _quiet(self) -> None:
        if self.failure is None:
            with contextlib.suppress(Violation):
                self.invariants.hold()

    def failed(self, violation: Violation) -> None:
        """What must never happen has happened; the first counts."""
        if self.failure is None:
            self.say(f"VIOLATION {violation}")
            self.failure = violation
            self._over.set()

    def _defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Crashed) and loop.is_running():
            self.failed(Violation(f"{context['message']}: {error!r}"))

    # The daemon ------------------------------------------------------------------------------------

    def start_later(self, delay_s: float) -> None:
        """Have systemd start the daemon."""
        asyncio.get_running_loop().call_later(delay_s, self._start)

    def _start(self) -> None:
        self._spawn(self._come_up())

    async def _come_up(self) -> None:
        if self.daemon.runs:
            return
        self.say("the daemon starts")
        try:
            await self.daemon.start()
        except NodeError as error:
            self.say(f"the daemon refuses to start: {error}")
            self.faults.end_life()
            self.start_later(REFUSED_START_S)
        except Crashed:
            pass
        else:
            self.invariants.came_up()

    def die(self, why: str, *, is_power_lost: bool = False) -> None:
        """The daemon is killed; or the power fails."""
        self.say(why)
        self.faults.end_life()
        self.faults.on_point = None
        self.daemon.disk.on_torn = None
        if is_power_lost:
            self.invariants.books.power_fails()
            self.daemon.reboot()
        elif self.daemon.runs:
            self.daemon.crash()
        self.invariants.died()
        self.start_later(self.down_s)

    # Clients ---------------------------------------------------------------------------------------

    async def _client(self, arrival: Arrival) -> None:
        await asyncio.sleep(arrival.at_s)
        request_id = f"request of {arrival.spec.name}"
        command = Submit((Submission(arrival.spec, {}, request_id, f"digest of {arrival.spec.name}"),))
        for _ in range(1 + arrival.says_again):
            while True:
                try:
                    (job,) = await asyncio.wait_for(self.daemon.ask(command), arrival.gives_up_s)
                    break
                except (Unavailable, TimeoutError):
                    if self.failure is not None:
                        return  # nobody may ever answer: the run is over
                    await asyncio.sleep(RETRY_S)
                    arrival = replace(arrival, gives_up_s=2 * arrival.gives_up_s)
                except RequestError as error:
                    self.say(f"{arrival.spec.name} is refused: {error}")
                    return
            self._acknowledge(request_id, job)
            await asyncio.sleep(10.0)

    def _acknowledge(self, request_id: str, job: Job) -> None:
        if request_id not in self.acknowledged:
            self.say(f"{job.id} is {job.spec.name} ({_words(job)})")
        known = self.acknowledged.setdefault(request_id, job.id)
        if known != job.id:
            self.failed(Violation(f"the {request_id} was {known} and is {job.id} now"))

    async def _operator(self, wish: Wish) -> None:
        await asyncio.sleep(wish.at_s)
        for wait_s, command in self._commands(wish):
            await asyncio.sleep(wait_s)
            while True:
                try:
                    await self.daemon.ask(command)
                    self.say(f"an operator: {str(command)[:COMMAND_CHARACTERS_MAX]}")
                except Unavailable:
                    if self.failure is not None:
                        return
                    await asyncio.sleep(RETRY_S)
                    continue
                except RequestError as error:
                    self.say(f"an operator: {str(command)[:COMMAND_CHARACTERS_MAX]} is refused: {error}")
                break

    def _commands(self, wish: Wish) -> list[tuple[float, Command]]:
        """What is asked for, each after a while; the API lets no more nonsense through than this."""
        job_id = self.acknowledged.get(f"request of job{wish.target}", "j1")
        now_s, watts = self.clock.now_s(), float(wish.target)
        match wish.what:
            case "cancel":
                self.invariants.stops.asked(Reason.CANCELLED_BY_REQUEST, job_id)
                return [(0.0, Cancel(job_id))]
            case "requeue":
                self.invariants.stops.asked(Reason.REQUEUED_BY_OPERATOR, job_id)
                return [(0.0, Requeue(job_id))]
            case "acknowledge":
                self.invariants.may_end_early(job_id)
                return [(0.0, Acknowledge(job_id, 0))]
            case "cordon":
                return [(0.0, Cordon(str(wish.target), "a fan")), (wish.for_s, Uncordon(str(wish.target)))]
            case "drain":
                return [(0.0, Drain(stop_jobs=bool(wish.target % 2))), (wish.for_s, Undrain())]
            case "budget":
                budget = BudgetInterval(now_s + wish.lead_s, None, max(0.0, watts))
                return [(0.0, SetPowerBudget((budget,))), (wish.for_s, SetPowerBudget(()))]
            case "signal_lost":  # it is good for a while only, and nobody renews it
                budget = BudgetInterval(now_s, None, max(0.0, watts))
                return [(0.0, SetPowerBudget((budget,), now_s + wish.for_s))]
            case "prices":
                points = (PricePoint(now_s + wish.lead_s, watts / 1e3), PricePoint(now_s + wish.for_s, 0.05))
                return [(0.0, SetPrices(tuple(sorted(points, key=lambda point: point.start_s))))]
            case _:
                start_s = now_s + wish.lead_s
                event = GridEvent(
                    f"event at {wish.at_s}",
                    start_s,
                    start_s + wish.for_s,
                    max(0.0, watts),
                    wish.what == "emergency",
                    now_s,
                )
                return [(0.0, OfferGridEvent(event)), (wish.for_s, CancelGridEvent(event.id))]

    def _workload(self, job_id: str) -> Workload:
        return self.workloads[job_id]

    def _ordered(self, order: StartOrder | StopOrder | AttemptKey, what: str) -> None:
        if isinstance(order, StartOrder):
            self.workloads[order.key.job_id] = self._behaviours[order.command[1]]
        self.invariants.ordered(order, what)

    async def _expect(self, expectation: Expectation) -> None:
        await asyncio.sleep(expectation.at_s)
        otherwise = found_otherwise(self, expectation)
        if otherwise:
            self.failed(Violation(f"at {expectation.at_s:g} s {otherwise}"))

    def end_faults(self) -> None:
        """From now on nothing goes wrong any more."""
        self.say("faults are over")
        self.faults.on_point = None
        self.daemon.disk.on_torn = None


def _words(job: Job) -> str:
    spec = job.spec
    what = f"{spec.gpus} GPU" if spec.gpu_share_milli == 1000 else f"{spec.gpu_share_milli}/1000 of a GPU"
    return f"{spec.job_class.name}, priority {spec.priority}, {what}, grace {spec.grace_s:g} s"


def play(script: Script, directory: Path) -> tuple[list[str], Violation | None]:
    """Play a script from its beginning; returns its story and what went wrong, if anything did."""
    logging.disable(logging.CRITICAL)
    world: World | None = None

    async def story() -> None:
        nonlocal world
        world = World(script, directory)
        try:
            await world.play()
        finally:
            if world.daemon.runs:
                world.end_faults()
                world.faults.end_life()
                world.daemon.crash()

    failure = None
    try:
        run(story())
    except Violation as violation:
        failure = violation
    finally:
        logging.disable(logging.NOTSET)
    assert world is not None
    return world.log, failure
