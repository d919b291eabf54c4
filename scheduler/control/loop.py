"""The loop: take what arrived, fold it into jobs, plan, make it durable, act, publish.

A tick is one transaction. It runs when something arrived and when time alone may have changed the
plan; nothing acts on arrival. If the journal can't be written, the tick never was: reports go back
into the inbox, commands are answered with the error, and no order leaves.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scheduler.control.abilities import Abilities
from scheduler.control.accounting import Accounts
from scheduler.control.board import GpuBoard, NodeSize
from scheduler.control.commands import CommandHandler
from scheduler.control.decisions import Decisions
from scheduler.control.handover import HandoverVerifier
from scheduler.control.health import Health
from scheduler.control.housekeeping import Housekeeper
from scheduler.control.inbox import (
    Asked,
    Command,
    Drain,
    Elapsed,
    HandoverResult,
    HashpricesRead,
    HoldersSeen,
    Inbox,
    Item,
    LauncherBack,
    LimitSet,
    LimitsGivenBack,
    LookFailed,
    MinerRead,
    PowerCommand,
    PricesRead,
    Uncordon,
    Undrain,
)
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.control.mining import Mining
from scheduler.control.observer import Observer
from scheduler.control.occupancy import Occupancy
from scheduler.control.openadr import OpenAdr
from scheduler.control.orders import Orders
from scheduler.control.pace import Pace
from scheduler.control.power import PowerControl
from scheduler.control.prices import Prices
from scheduler.control.reports import ReportHandler
from scheduler.control.standing import StandingJobs
from scheduler.control.telemetry import Telemetry
from scheduler.control.watch import Watchers
from scheduler.control.witness import Witness
from scheduler.effects.clock import Clock
from scheduler.effects.gpus import GpuReadings, Gpus
from scheduler.effects.journal import Journal
from scheduler.effects.launcher import Exited, Launcher, LauncherGone, Report
from scheduler.effects.processes import Processes
from scheduler.errors import GpuReadError, JournalError, LauncherError, RequestError, Unavailable
from scheduler.model.actions import WAIT_REASONS, Plan
from scheduler.model.events import DaemonStarted, JobSubmitted, PolicyChanged, submitted
from scheduler.model.jobs import FINAL_STATES, Job, JobSpec, JobState
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.settings import Config
from scheduler.planning.explain import Explanation, Preview, explain, preview
from scheduler.planning.planner import Memo, plan

log = logging.getLogger("wattshift.loop")

JOURNAL_RETRY_S = 1.0  # until a journal that could not be written is tried again
# A moment nearer than this has come: clocks are no finer, and a tick must not call itself.
WAKE_S_MIN = 0.001
# A launcher that can't be reached is tried again: at once, then ever later.
RECONNECT_S, RECONNECT_S_MAX = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Effects:
    """The outside world."""

    clock: Clock
    journal: Journal
    launcher: Launcher
    gpus: Gpus
    processes: Processes


@dataclass(frozen=True, slots=True)
class Site:
    """What the composition root knows of the place."""

    sizes: tuple[NodeSize, ...]  # of each node that is planned for: of this one
    base_environment: Mapping[str, str]  # of every job: a minimal PATH, HOME
    remove_job: Callable[[str], None]  # removes what a job left on disk
    was_begun: Callable[[str, int], bool]  # whether a launcher ever took the order to start an attempt
    boot_id: str
    version: str
    pid: int
    # Whether each decision is journalled with all that it was made from: so that it can be made again.
    keeps_decisions: bool = True


class Controller:
    """The node's loop and all that it keeps."""

    def __init__(self, effects: Effects, config: Config, site: Site) -> None:
        self.effects = effects
        self.site = site
        self.config = config
        self.meters = Meters()
        self.watchers = Watchers(config.server.concurrent_rpcs_max // 2)
        self.ledger = Ledger(effects.journal, config.policy)
        self.decisions = Decisions(self.ledger)
        self.telemetry = Telemetry(self.meters)
        self.board = GpuBoard(self.ledger, site.sizes, self.telemetry)
        self.prices = Prices(self)
        self.accounts = Accounts(self.ledger, self.board, self.meters, self.telemetry, self.prices)
        self.commands = CommandHandler(self.ledger, self.board, pending_max=config.jobs.pending_max)
        self.inbox = Inbox(self._arrived)
        self.pace = Pace()
        self.witness = Witness(effects.gpus)
        self.occupancy = Occupancy(self)
        self.verifier = HandoverVerifier(
            self.witness,
            self.occupancy.facts(),
            on_result=lambda *found: self.inbox.put(HandoverResult(*found)),
            timeout_s=lambda: self.config.policy.handover_timeout_s,
        )
        self.mining = Mining(self)
        self.orders = Orders(
            effects.launcher,
            self.ledger.environment,
            self.verifier,
            site.base_environment,
            self.mining.variables,
        )
        self.reports = ReportHandler(self)
        self.standing = StandingJobs(self)
        self.observer = Observer(self.ledger, self.meters)
        # Another boot than the last daemon's: every process of before is gone.
        self.rebooted = self.ledger.boot_id not in ("", site.boot_id)
        self.health = Health(self)
        self.power = PowerControl(self)
        self.openadr = OpenAdr(self)
        self._sources = (self.prices.polled, self.mining.polled, self.openadr)
        self.launcher_id = ""  # empty while none answers
        self.problems: dict[str, str] = {}
        self.abilities = Abilities(self.problems)
        self.last_plan: Plan | None = None
        self._memo = Memo()
        self._planned: tuple[object, float] | None = None  # what the last plan rests on, and when it was made
        self._wake_s: float | None = None  # when time alone could change it
        self._rebooted_before = self.rebooted  # when the tick began
        self._timer: asyncio.TimerHandle | None = None
        self._scheduled: asyncio.Handle | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._running = False
        self._recorded_policy: Policy | None = None  # as the journal has it; None: nor this daemon's start
        self._gone: set[int] = set()  # jobs whose ends are in the inbox
        self._looks: set[asyncio.Task[None]] = set()
        self._looked_s = self._turned_s = 0.0  # when it last looked at processes, and ticked
        self._housekeeper = Housekeeper(self)

    # Life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Adopt what still runs, then look at the GPUs, then tick.

        In this order: a GPU that is missing never kills a running job by itself.

        Raises:
            LauncherError: No launcher could be reached or started.
            JournalError: The journal can't be written.
        """
        self.accounts.resume(rebooted=self.rebooted)
        self.health.start()
        await self.connect_launcher()
        self.inbox.put(await self.effects.gpus.start(self.inbox.put, self.config.sampling.period_s))
        self._running = True
        for source in self._sources:
            source.start()
        self._release_or_acquire()
        self._tick()

    async def connect_launcher(self) -> None:
        """Reach the launcher and put what it holds into the inbox.

        Raises:
            LauncherError: None could be reached or started.
        """
        self.inbox.put(LauncherBack(await self.effects.launcher.connect(self._reported)))

    def _reported(self, report: Report) -> None:
        """Take a report; of an end, look at its GPUs at once, so that one tick knows both."""
        if isinstance(report, Exited):
            job = self.ledger.by_key(report.key.job_id, report.key.attempt)
            if job is not None:
                self._gone.add(job.number)
                self.reports.is_about_to_end(job, self._gone)
                for uuid in job.attempts[-1].gpus:
                    self.verifier.watch(uuid)
        self.inbox.put(report)

    async def _reconnect(self) -> None:
        delay_s = RECONNECT_S
        while self._running:
            try:
                await self.connect_launcher()
            except LauncherError as error:
                self.problems["launcher"] = str(error)
                log.error("no launcher: %s", error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_S_MAX)
            else:
                return

    def stop(self) -> None:
        """Tick no more, with what was used booked. Jobs go on under the launcher."""
        if self._running:
            self._book_last()
        self.halt()

    def halt(self) -> None:
        """Tick no more, and leave everything as it is: what a crash does."""
        self._running = False
        self.verifier.close()
        for source in self._sources:
            source.stop()
        for task in self._looks:
            task.cancel()
        self._stop_lingering()
        for timer in (self._timer, self._scheduled):
            if timer is not None:
                timer.cancel()

    def _book_last(self) -> None:
        now_s = self.effects.clock.now_s()
        self.accounts.settle()
        self.accounts.book_all(now_s)
        self.power.log.write(now_s)
        try:
            self._commit()
        except JournalError as error:
            log.error("the last usage could not be booked: %s", error)

    async def ask(self, command: Command) -> Any:
        """Hand a command to the next tick; returns its answer after it is on disk.

        Raises:
            RequestError: It was refused; nothing was changed.
        """
        return await self.inbox.ask(command)

    def reload(self, config: Config) -> None:
        """Go by another configuration from now on."""
        self.commands.pending_max = config.jobs.pending_max
        self.config = config
        self.ledger.set_policy(config.policy)
        self.board.sizes = tuple(
            replace(size, live_jobs_max=config.policy.live_jobs_max) for size in self.board.sizes
        )
        self.standing.reload()
        for source in self._sources:
            source.reload()
        self.inbox.put(Elapsed())

    def reason(self, job: Job) -> Reason:
        """Why the job is where it is; of a waiting one, what the last plan says that it waits for."""
        if job.state is not JobState.PENDING or self.last_plan is None:
            return job.reason
        waits = self.last_plan.waits
        (rows,) = (waits.numbers == job.number).nonzero()
        return WAIT_REASONS[int(waits.reasons[rows[0]])] if len(rows) else job.reason

    def explain(self, job: Job) -> Explanation:
        """Why a pending job waits, from the planner itself."""
        snapshot = self.board.snapshot(self.effects.clock.now_s())
        return explain(snapshot, self.config.policy, job.number)

    def preview(self, spec: JobSpec) -> tuple[Preview, float]:
        """What would happen to such a job, and the seconds until its GPUs are proved free, as forecast.

        It is in the table for as long as the planner looks.
        """
        now_s = self.effects.clock.now_s()
        number = self.ledger.next_number
        self.ledger.table.put(submitted(JobSubmitted(now_s, "", number, spec), 0))
        try:
            found = preview(self.board.snapshot(now_s), self.config.policy, number)
        finally:
            self.ledger.table.drop(number)
        told = [victim.number for victim in found.victims]
        return found, self.occupancy.forecast.until_free_s(found.gpus, told, now_s)

    # A tick -----------------------------------------------------------------------------------

    def _arrived(self, item: Item) -> None:
        """Wake for the item: at once, or after a moment if others are likely to come along."""
        if not self._running or self._scheduled is not None:
            return
        loop = asyncio.get_running_loop()
        stopping = self.ledger.stopping
        awaits_exits = not stopping.isdisjoint(self._gone) and not stopping <= self._gone
        linger_s = self.pace.linger_s(item, awaits_exits=awaits_exits)
        if not linger_s:
            self._schedule(item)
        elif self._lingering is None or loop.time() + linger_s < self._lingering.when():
            self._stop_lingering()
            self._lingering = loop.call_later(linger_s, self._schedule)

    def _schedule(self, item: Item | None = None) -> None:
        self._stop_lingering()
        if self._running and self._scheduled is None:
            self._scheduled = self.pace.schedule(self._tick, item)

    def _stop_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None

    def _tick(self) -> None:
        self._scheduled = None
        if not self._running:
            return
        begun = time.perf_counter()
        items = self.inbox.drain()
        self.pace.took(items)
        self._gone.clear()
        try:
            self._turn(items)
        except Exception:  # the loop is the one place that catches everything: it logs, counts, goes on
            log.exception("a tick failed; its items are taken one by one")
            self._forget_turn()
            for item in items:
                self._turn_alone(item)
        self.meters.tick_s.observe(time.perf_counter() - begun)

    def _turn_alone(self, item: Item) -> None:
        """Take one item of a tick that failed, so that a bad one harms nobody but itself."""
        try:
            self._turn([item])
        except Exception:
            log.exception("dropped: %r", item)
            self._forget_turn()
            self._fail_asked([item], Unavailable("the daemon could not do it; its log says why"))

    def _forget_turn(self) -> None:
        self.meters.tick_failures += 1
        self.ledger.abandon()
        self._undo_turn()

    def _undo_turn(self) -> None:
        """The ledger is as it was before the tick; so must be all that was made of it."""
        self.orders.clear()
        self.reports.recall_victims()
        self.standing.reload()
        self.rebooted = self._rebooted_before
        self.decisions.forget()
        self.power.undo()
        self._planned = None  # the numbers of dropped events come again
        self._release_or_acquire()

    def _turn(self, items: list[Item]) -> None:
        now_s = self.effects.clock.now_s()
        if now_s < self._turned_s:
            self._clock_was_set_back(now_s)
        self._turned_s = now_s
        self._rebooted_before = self.rebooted
        self.accounts.settle()
        if self._recorded_policy is None:
            self.ledger.apply(DaemonStarted(now_s, self.site.version, self.site.boot_id, self.site.pid))
        if self._recorded_policy != self.config.policy:
            self.ledger.apply(PolicyChanged(now_s, self.config.policy))
        # What the driver told of a GPU comes before the end of whoever died of it.
        ordered = sorted(items, key=lambda item: not isinstance(item, GpuReadings))
        answers = [answer for item in ordered if (answer := self._take(item, now_s)) is not None]
        self.reports.were_answered(result for _, result in answers)
        has_readings = any(isinstance(item, GpuReadings) for item in items)
        self.prices.advance(now_s)
        if has_readings:
            self.accounts.read(now_s)  # not before it is known who has ended meanwhile, and at what price
        self.standing.reconcile(now_s)
        self.mining.advance(now_s)
        self.power.advance(now_s)
        wake_s = self._plan(now_s, has_readings=has_readings)
        if has_readings:  # nothing else adds energy; where they are rare, as in a replay, so are bookings
            self.accounts.book(now_s)
        try:
            self._commit()
        except JournalError as error:
            self._not_kept(items, error)
            return
        for future, result in answers:
            if not future.done():
                future.set_result(self.reports.newest(result))  # a job may have started in this tick
        self.watchers.publish_node()
        self._wake_at((wake_s, *(one.wake_s(now_s) for one in (self.prices, self.mining, self.power))), now_s)

    def _clock_was_set_back(self, now_s: float) -> None:
        """What is reckoned from a time that is still to come would stay as it is until then."""
        log.warning("the clock was set back by %.3f s", self._turned_s - now_s)
        self.power.clock_was_set_back(now_s)
        self.health.clock_was_set_back(now_s)
        self.occupancy.clock_was_set_back(now_s)

    def _take(self, item: Item, now_s: float) -> tuple[asyncio.Future[Any], object] | None:
        match item:
            case Asked():
                return self._answer(item, now_s)
            case GpuReadings():
                self._read(item, now_s)
            case HandoverResult():
                self.occupancy.handover(item, now_s)
            case HoldersSeen():
                self.occupancy.seen(item.holders, now_s)
            case LookFailed():
                self.occupancy.unseen(item.uuid, item.code)
            case LauncherGone():
                self.launcher_id = ""
                self.problems["launcher"] = "the launcher is gone; starting another"
                self.spawn(self._reconnect())
            case LauncherBack():
                self.reports.reconcile(item.hello, now_s)
            case LimitSet() | LimitsGivenBack():
                self.power.take(item, now_s)
            case PricesRead():
                self.prices.take(item, now_s)
            case HashpricesRead() | MinerRead():
                self.mining.take(item, now_s)
            case Elapsed():
                pass
            case _:
                self.reports.report(item)
        return None

    def _answer(self, item: Asked, now_s: float) -> tuple[asyncio.Future[Any], object] | None:
        if item.answer.done():  # the client is gone
            return None
        command = item.command
        try:
            if isinstance(command, PowerCommand):
                result = self.power.handle(command, now_s)
            else:
                result = self.commands.handle(command, now_s)
        except RequestError as error:
            item.answer.set_exception(error)
            return None
        if isinstance(command, Drain | Undrain):
            self._release_or_acquire()
        elif isinstance(command, Uncordon):
            assert isinstance(result, str)
            self.occupancy.prove_again(result)
        return item.answer, result

    def _plan(self, now_s: float, *, has_readings: bool) -> float | None:
        """Plan and turn the plan into events; returns when time alone could change it."""
        if not self.launcher_id:
            return None
        if not (self.ledger.needs_plan or self.power.is_active or self.prices.price):
            self.last_plan = None
            return None
        basis = (self.board.basis(), self.config.policy, self.power.basis(now_s))
        # What a plan under a budget rests on moves with each reading, and with time alone.
        if not (self.power.is_active and has_readings) and self._still_holds(basis, now_s):
            return self._wake_s
        begun = time.perf_counter()
        try:
            snapshot = self.board.snapshot(now_s)
            made = plan(snapshot, self.config.policy, self._memo)
            took_s = time.perf_counter() - begun
            if self.site.keeps_decisions and self.decisions.is_one(made):
                self.decisions.record(now_s, snapshot, self.config.policy, made)
                basis = (self.board.basis(), *basis[1:])  # this event changes no plan
        except Exception:  # a defect of ours; what arrived is kept all the same, and jobs go on
            log.exception("no plan could be made")
            self.meters.tick_failures += 1
            self.problems["planner"] = "no plan could be made; the daemon's log says why"
            return None
        self.problems.pop("planner", None)
        self.meters.plan_s.observe(took_s)
        self.last_plan, self._planned = made, (basis, now_s)
        self._wake_s = None if made.wake_us is None else made.wake_us / 1e6
        if made.actions:
            self.power.perform(made.actions, now_s)
            self.reports.perform(made.actions, now_s)
        return self._wake_s

    def _still_holds(self, basis: object, now_s: float) -> bool:
        """Whether the last plan is what another would be: nothing changed, and time alone can't yet."""
        if self.last_plan is None or self._planned is None or self._planned[0] != basis:
            return False
        return self._planned[1] <= now_s and (self._wake_s is None or now_s < self._wake_s)

    def _commit(self) -> None:
        """Make the tick durable, send the orders that follow, then tell those who look."""
        if not self.ledger.touched:
            self._send()
            return
        begun = time.perf_counter()
        committed = self.ledger.commit()
        self._recorded_policy = self.config.policy
        took_s = time.perf_counter() - begun
        for before, after in committed.changes:
            self.orders.follow(before, after)
        self._send()  # somebody waits for these; whoever only looks comes after
        self.meters.journal_append_s.observe(took_s)
        for before, after in committed.steps:
            self.observer.see(before, after)
        for _, after in committed.changes:
            self.watchers.publish(after)
            if after.state in FINAL_STATES:
                self.reports.forget(after.number)
        self.problems.pop("journal", None)

    def _send(self) -> None:
        """Send what follows from the tick in the order of safety: limits, stops, starts."""
        self.power.limits.send()
        self.orders.send()

    def _not_kept(self, items: list[Item], error: JournalError) -> None:
        log.error("the journal could not be written: %s", error)
        self.problems["journal"] = str(error)
        self._undo_turn()
        self._fail_asked(items, Unavailable(f"nothing was accepted: {error}"))
        self.inbox.put_back(items)
        asyncio.get_running_loop().call_later(JOURNAL_RETRY_S, self._schedule)

    @staticmethod
    def _fail_asked(items: list[Item], error: RequestError) -> None:
        for item in items:
            if isinstance(item, Asked) and not item.answer.done():
                item.answer.set_exception(error)

    def _release_or_acquire(self) -> None:
        """Let go of the GPUs, or take them back, as the drain says."""
        drain = self.ledger.drain
        release = drain is not None and drain.released
        if release != self.board.released:
            self.board.released = release
            gpus = self.effects.gpus
            self.spawn(self._let_go() if release else gpus.acquire())

    async def _let_go(self) -> None:
        await self.power.leave()
        await self.effects.gpus.release()

    def _wake_at(self, moments_s: tuple[float | None, ...], now_s: float) -> None:
        """Tick again at the first of these moments."""
        wake_s = min((moment for moment in moments_s if moment is not None), default=None)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if wake_s is not None:
            wait_s = max(WAKE_S_MIN, wake_s - now_s)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.inbox.put, Elapsed())

    # Readings ---------------------------------------------------------------------------------

    def _read(self, readings: GpuReadings, now_s: float) -> None:
        self.telemetry.read(readings, now_s)
        silent = self.telemetry.listen(readings, now_s, self.config.sampling.period_s)
        fresh = self.board.read(readings)
        if unused := self.telemetry.nameless(self.board.row):
            self.problems["telemetry"] = unused
        else:
            self.problems.pop("telemetry", None)
        self.abilities.read(readings, self.board)
        self.occupancy.fresh(fresh)
        self.occupancy.silent(silent)
        self.occupancy.vanished(now_s)
        self.occupancy.read(now_s)
        self.health.read(readings, fresh, now_s)
        self.power.read(now_s)
        if not 0.0 <= now_s - self._looked_s < self.config.sampling.processes_period_s:  # or set back
            self._looked_s = now_s
            known = frozenset(self.board.row)
            self.witness.forget(known)
            self.occupancy.forget(known)
            for gpu in self.board.identities:
                if self.board.is_present(gpu.uuid):
                    self.spawn(self._look_once(gpu.uuid))
        self._housekeeper.read(now_s)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run this beside the loop, until the loop ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    async def _look_once(self, uuid: str) -> None:
        try:
            self.inbox.put(HoldersSeen(await self.witness.holders(uuid)))
        except GpuReadError as error:
            self.meters.telemetry_errors[(error.code,)] += 1
            self.inbox.put(LookFailed(uuid, error.code))
