"""Power in the loop: budgets and grid events, what the planner is told, and whether the watts really fell.

The planner decides limits, sheds and starts (`planning/power.py`); here is what it looks at, and what closes
the loop: measured draw decides whether a shed is met, and what is drawn beyond the plan is taken from the
budget of the next tick.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scheduler.control.budget import Budget, is_in_force
from scheduler.control.draw_log import DrawLog
from scheduler.control.draws import Draws
from scheduler.control.frozen import Frozen
from scheduler.control.idle_draws import IdleDraws
from scheduler.control.inbox import (
    CancelGridEvent,
    LimitSet,
    LimitsGivenBack,
    OfferGridEvent,
    PowerCommand,
    PowerItem,
    SetHashprices,
    SetPowerBudget,
    SetPrices,
)
from scheduler.control.limits import RETRY_S, Limits
from scheduler.control.operating import OperatingPoints
from scheduler.control.power_view import GpuPowerView, PowerView, limit_cause
from scheduler.control.sheds import SETTLE_S, Sheds
from scheduler.control.slowed import Slowed
from scheduler.control.table import JobWatts
from scheduler.control.telemetry import fresh_s
from scheduler.errors import IllegalMove, LimitReached, NotFound, Unreachable
from scheduler.model.actions import Action, SetPowerLimit
from scheduler.model.gpus import GpuIdentity
from scheduler.model.jobs import Job, JobClass, JobState
from scheduler.model.power import (
    BUDGET_INTERVALS_MAX,
    GRID_EVENTS_MAX,
    UNLIMITED_W,
    GridEvent,
    ShedState,
    curve_of,
)
from scheduler.model.power_events import (
    DrawsLearned,
    GridEventAccepted,
    GridEventMoved,
    LimitsRestored,
    PowerBudgetSet,
)
from scheduler.model.snapshot import UNKNOWN, PowerColumns
from scheduler.planning.floor import floor_w

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

# A draw only nears a limit: until it is inside a budget that fell, at most so long, what binds lies lower.
LEAD_S = 4.0
LEAD_RATIO = 0.03
# Answers of a driver that say that there is nothing to read.
NO_GPUS = frozenset({"ERROR_LIBRARY_NOT_FOUND", "ERROR_GPU_NOT_FOUND"})
# The planner sees these in steps, so that no limit follows every flicker.
IDLE_STEP_W = 5
CORRECTION_STEP_W = 10
# For how long a shed is reckoned to last: until its source's end, within these.
HORIZON_S_MIN, HORIZON_S_MAX = 60.0, 3600.0
# What the plan's error is given back with each reading below the budget.
CORRECTION_DECAY = 0.1
MILLI = 1000
# Watts that come back do so in steps of this length, where no reading comes sooner.
RETURN_STEP_S = 1.0
# Longer than any grace and minimum runtime that a configuration takes.
DURATION_S_LONG = 1e9


class PowerControl:
    """All of power that the loop keeps."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        ledger = controller.ledger
        self.draws = Draws(ledger.power)
        self.budget = Budget(ledger, controller.config.node.name)
        self.limits = Limits(controller)
        self.idle = IdleDraws(controller.board, self.limits)
        self.frozen = Frozen(ledger, controller.board, self.limits, self.idle)
        self.sheds = Sheds(controller, self)
        self.log = DrawLog(controller, self)
        self.points = OperatingPoints(controller)
        self._correction_w = 0.0  # of boards: what they drew beyond the plan
        self._changed_s = 0.0  # when a limit or a job last changed
        self._fell_s = -math.inf  # when the budget fell
        self._read_s = 0.0
        self._give_back_s = 0.0  # not before
        self._knows_budget = False  # the first readings come before the first look at the sources
        self.slowed = Slowed()
        ledger.table.natural_w, ledger.table.behind_s = self.draws.natural_w, self.slowed.behind_s
        for job in ledger.jobs.values():
            ledger.table.put(job)
        controller.board.power = self._columns_now

    @property
    def is_active(self) -> bool:
        """Whether there is a budget to keep."""
        return self.budget.in_force_w is not None

    @property
    def sets_limits(self) -> bool:
        """Whether plans set power limits."""
        return self.is_active or self.points.is_active

    # Watts of the site and of its boards --------------------------------------------------------

    def site_w(self, boards_w: float) -> float:
        """What the site draws with so much on its boards."""
        config = self._control.config.power
        return (boards_w + config.base_w) * config.pue

    def boards_w(self, site_w: float) -> float:
        """What of the site's watts is left to its boards."""
        config = self._control.config.power
        return site_w / config.pue - config.base_w

    def measured_w(self, now_s: float) -> float | None:
        """What the site draws by fresh readings; None where a board has none.

        A board that the driver has lost can't be read any more: it counts as idle. Of a driver that does not
        answer nobody knows which boards there are.
        """
        if self.unreadable:
            return None
        total_w, board = 0.0, self._control.board
        for gpu in board.identities:
            is_there = board.is_present(gpu.uuid)
            watts = self._fresh_w(gpu.uuid, now_s) if is_there else self.idle.of(gpu)
            if watts is None:
                return None
            total_w += watts
        return self.site_w(total_w)

    @property
    def unreadable(self) -> str:
        """Why no board can be read, as NVML says it; empty where the driver answers, or there is no GPU."""
        code = self._control.board.errors.get("driver", "")
        return "" if code in NO_GPUS else code

    def stale(self, now_s: float) -> list[str]:
        """The boards without a fresh reading."""
        board = self._control.board
        present = [gpu.uuid for gpu in board.identities if board.is_present(gpu.uuid)]
        return [uuid for uuid in present if self._fresh_w(uuid, now_s) is None]

    def _fresh_w(self, uuid: str, now_s: float) -> float | None:
        sample = self._control.board.samples.get(uuid)
        age_max_s = fresh_s(self._control.config.sampling.period_s)
        return None if sample is None or abs(now_s - sample.at_s) > age_max_s else sample.power_w

    def _empty_w(self, gpu: GpuIdentity, now_s: float) -> int:
        """What a board was seen to draw since it came free; what it counts for where it can't be read."""
        watts = self._fresh_w(gpu.uuid, now_s)
        if watts is None:
            return math.ceil(self.idle.of(gpu))
        return math.ceil(watts) if self.idle.was_seen(gpu.uuid) else UNKNOWN

    @property
    def most_w(self) -> float:
        """What the site draws with every board at the most that its limit may be."""
        gpus = self._control.board.identities
        return self.site_w(sum(self.limits.range_w(gpu)[1] for gpu in gpus))

    # A tick -------------------------------------------------------------------------------------

    def advance(self, now_s: float) -> None:
        """Go by the budget that holds now; begin and end grid events."""
        self._knows_budget = True
        self.sheds.advance(now_s)
        self._fall_behind(now_s)
        self.points.advance(now_s)
        before_w = self.budget.in_force_w
        self.budget.advance(self._control.config.power, now_s, self.most_w if self.is_active else 0.0)
        if not self.is_active:
            self.frozen.resume_all(now_s)
        after_w = self.budget.in_force_w
        if after_w is not None and (before_w is None or after_w < before_w):
            self._fell_s = now_s

    def _leads(self, now_s: float) -> bool:
        return now_s < self._fell_s + LEAD_S

    def clock_was_set_back(self, now_s: float) -> None:
        """Reckon from now on where it was from a time that is still to come."""
        self._changed_s, self._fell_s = min(self._changed_s, now_s), min(self._fell_s, now_s)
        self._give_back_s = min(self._give_back_s, now_s)
        self.idle.clock_was_set_back()
        self.limits.clock_was_set_back(now_s)

    def _fall_behind(self, now_s: float) -> None:
        """Count the work that limits keep jobs from doing."""
        ledger, classes = self._control.ledger, self._control.config.policy.classes
        if not (self.is_active or ledger.power.limits or self.slowed):
            return  # no limit is ours, and nobody is behind: a full site has thousands of jobs to ask about
        identities = {gpu.uuid: gpu for gpu in self._control.board.identities}
        curves = {job_class: curve_of(defaults.power_curve) for job_class, defaults in classes.items()}

        def speed(job: Job) -> float:
            if job.state is JobState.SUSPENDED:
                return 0.0
            natural_w = self.draws.natural_w(job)
            boards = [identities[uuid] for uuid in job.attempts[-1].gpus if uuid in identities]
            if natural_w is None or not boards:
                return 1.0
            limit_w = min(self.limits.in_force_w(gpu) for gpu in boards)
            draw_milli = math.floor(min(1.0, limit_w / natural_w) * MILLI)
            return curves[job.spec.job_class].work_milli(draw_milli) / MILLI

        for job in self.slowed.advance(ledger.live_jobs(), speed, now_s):
            ledger.table.put(job)

    def wake_s(self, now_s: float) -> float | None:
        """The next moment at which time alone changes the budget, or ends a grace."""
        moments = self.budget.edges_s()
        moments += self.sheds.moments_s(now_s)
        moments.append(self._fell_s + LEAD_S)
        moments += [moment for moment in [self.points.wake_s(now_s)] if moment is not None]
        state = self._control.ledger.power
        if state.returned_from_w is not None:
            moments.append(max(state.return_began_s, now_s + RETURN_STEP_S))
        return min((moment for moment in moments if moment > now_s), default=None)

    def perform(self, actions: tuple[Action, ...], now_s: float) -> None:
        """Journal the limits that the plan sets; they follow the commit."""
        if actions:
            self._changed_s = now_s
        self.limits.order([action for action in actions if isinstance(action, SetPowerLimit)], now_s)

    def undo(self) -> None:
        """The tick was not kept: nothing follows from it."""
        self.limits.clear()
        self.log.undo()

    def take(self, item: PowerItem, now_s: float) -> None:
        """Take what boards answered."""
        match item:
            case LimitSet():
                self.limits.answered(item, now_s)
            case LimitsGivenBack():
                self.limits.given_back(item.uuids)
                self._control.ledger.apply(LimitsRestored(now_s, item.uuids))

    # Readings -----------------------------------------------------------------------------------

    def read(self, now_s: float) -> None:
        """Learn from a round of readings; see whether the watts are where they should be."""
        control = self._control
        elapsed_s, self._read_s = max(0.0, now_s - self._read_s) if self._read_s else 0.0, now_s
        occupants = control.board.occupants()
        learned: list[Job] = []
        news: dict[str, float] = {}
        for gpu in control.board.identities:
            sample = control.board.samples.get(gpu.uuid)
            if sample is None:
                continue
            self.limits.read(sample, now_s)
            if self._fresh_w(gpu.uuid, now_s) is None:
                continue  # the same old reading teaches nothing twice
            held = control.board.holders(gpu.uuid)
            whole = len(held) == 1 and not held[0].spec.is_share
            if whole:
                news |= self.frozen.see(held[0], gpu, sample)
            runs = whole and held[0].state is JobState.RUNNING and held[0].attempts[-1].suspend_s is None
            # Who is held at less for long would seem to want ever less.
            if runs and self.points.held_w.get(held[0].number, UNKNOWN) == UNKNOWN:
                limit_w = self.limits.in_force_w(gpu)
                if self.draws.see(held[0], sample, limit_w) and held[0] not in learned:
                    learned.append(held[0])
            is_empty = not held and gpu.uuid not in occupants and gpu.uuid not in control.board.foreign
            if is_empty:
                self.idle.empty(gpu.uuid, sample.power_w, now_s)
            else:
                self.idle.occupied(gpu.uuid)
        self._learn(news | self.draws.news(learned), now_s)
        measured_w = self.measured_w(now_s)
        self.log.read(measured_w, now_s)
        self._close(elapsed_s, measured_w, now_s)
        self.sheds.read(now_s)
        self._tell()
        if self._knows_budget and not self.sets_limits:
            self._give_back(now_s)

    def _tell(self) -> None:
        """Say it where no plan keeps the budget."""
        control = self._control
        outlook = control.last_plan.power if control.last_plan is not None else None
        if outlook is None or outlook.planned_w <= outlook.budget_w:
            control.problems.pop("power", None)
            return
        control.problems["power"] = (
            f"the power budget can't be kept: the least that a plan reaches is "
            f"{self.site_w(outlook.planned_w):.0f} W of {self.site_w(outlook.budget_w):.0f} W; "
            "`wattshift power status`"
        )

    def _learn(self, news: dict[str, float], now_s: float) -> None:
        control = self._control
        news |= self.draws.gone({job.id for job in control.ledger.jobs.values()})
        if not news:
            return
        control.ledger.apply(DrawsLearned(now_s, news))
        self.draws.learn(news)
        classes = {job_class for job_class in JobClass if job_class.name in news}
        for job in list(control.ledger.jobs.values()):
            if job.id in news or job.spec.job_class in classes:
                control.ledger.table.put(job)

    def _close(self, elapsed_s: float, measured_w: float | None, now_s: float) -> None:
        """Take from the next plan's budget what was drawn beyond this one's."""
        budget_w = self.budget.in_force_w
        if measured_w is None or budget_w is None:
            self._correction_w = 0.0 if budget_w is None else self._correction_w
            return
        if measured_w > budget_w:
            self._control.meters.power_over_budget_s += elapsed_s
        elif not self._control.ledger.stopping:
            self._fell_s = -math.inf  # the draw is there
        if now_s - self._changed_s < SETTLE_S or self._control.ledger.stopping:
            return  # it is on its way
        beyond_w = (measured_w - budget_w) / self._control.config.power.pue
        if beyond_w > 0:
            self._correction_w += beyond_w
            self._changed_s = now_s
        else:
            self._correction_w = max(0.0, self._correction_w + CORRECTION_DECAY * beyond_w)

    def basis(self, now_s: float) -> object:
        """What of the power columns can change between two readings; None where no plan sets limits."""
        if not self.is_active:
            return self.points.basis(), self._promised(now_s)
        gpus, events = self._control.board.identities, self._control.ledger.power.events
        return (
            self.budget.in_force_w,
            self._leads(now_s),
            _in_steps(self._correction_w, CORRECTION_STEP_W),
            self._promised(now_s),
            [event for event in events if event.emergency and is_in_force(event, now_s)],
            [(self.limits.in_force_w(gpu), self.limits.range_w(gpu), self.idle.of(gpu)) for gpu in gpus],
            self.points.basis(),
        )

    # What the planner sees ----------------------------------------------------------------------

    def _columns_now(self) -> Callable[[JobWatts], PowerColumns] | None:
        if self.is_active:
            return self.columns
        is_promised = self._promised(self._control.effects.clock.now_s()) is not None
        return self._unbudgeted if self.points.is_active or is_promised else None

    def _unbudgeted(self, jobs: JobWatts) -> PowerColumns:
        """The power columns without a budget: only miners are limited, and starts keep promises for later."""
        columns = self.columns(jobs)
        if not self.points.is_active:  # no plan sets limits: what is still lowered is given back
            columns = replace(columns, limit_w=columns.limit_w_max)
        # So large a margin that each full limit is its board's largest; nor do draws fall to anything.
        return replace(columns, budget_w=UNLIMITED_W, margin_milli=UNLIMITED_W, lead_milli=0)

    def columns(self, jobs: JobWatts) -> PowerColumns:
        """The power columns of a snapshot."""
        control = self._control
        now_s = control.effects.clock.now_s()
        config, gpus = control.config.power, control.board.identities
        site_w = self.most_w if self.budget.in_force_w is None else self.budget.in_force_w
        ranges = [self.limits.range_w(gpu) for gpu in gpus]
        promised = self._promised(now_s)
        until_s = self.budget.until_s
        left_s = HORIZON_S_MAX if until_s is None else min(HORIZON_S_MAX, max(HORIZON_S_MIN, until_s - now_s))
        return PowerColumns(
            budget_w=math.floor(self.boards_w(site_w)) - _in_steps(self._correction_w, CORRECTION_STEP_W),
            promised_w=None if promised is None else math.floor(self.boards_w(promised.budget_w)),
            promised_us=UNKNOWN if promised is None else round(promised.start_s * 1e6),
            is_emergency=any(
                event.emergency and is_in_force(event, now_s) for event in control.ledger.power.events
            ),
            horizon_us=math.ceil(left_s / HORIZON_S_MIN) * round(HORIZON_S_MIN * 1e6),
            margin_milli=round(config.margin_ratio * MILLI),
            lead_milli=round(LEAD_RATIO * MILLI) if self._leads(now_s) else 0,
            limits_inference=config.limit_inference,
            curves=tuple(
                curve_of(control.config.policy.classes[job_class].power_curve) for job_class in JobClass
            ),
            idle_w=_ints(_in_steps(self.idle.of(gpu), IDLE_STEP_W) for gpu in gpus),
            limit_w=_ints(math.ceil(self.limits.in_force_w(gpu)) for gpu in gpus),
            limit_w_min=_ints(math.ceil(low) for low, _ in ranges),
            limit_w_max=_ints(math.ceil(high) for _, high in ranges),
            measured_w=_ints(self._empty_w(gpu, now_s) for gpu in gpus),
            natural_w=jobs.natural_w,
            best_w=self._best_w(jobs),
            frozen_w=control.ledger.table.of_suspendable(self.frozen.counted_w),
            suspend_us=jobs.suspend_us,
        )

    def _best_w(self, jobs: JobWatts) -> Any:
        """Where miners earn most; of those that run, how far they are on their way there."""
        held_w = self.points.held_w
        if jobs.best_w is None or not held_w:
            return jobs.best_w
        pairs = zip(jobs.number.tolist(), jobs.best_w.tolist(), strict=True)
        return _ints(held_w.get(number, best_w) for number, best_w in pairs)

    def _promised(self, now_s: float) -> GridEvent | None:
        """The tightest of the events that are accepted and not over."""
        events = [event for event in self._control.ledger.power.events if event.binds]
        return min(
            (event for event in events if now_s < event.end_s),
            key=lambda event: (event.budget_w, event.start_s),
            default=None,
        )

    # Commands -----------------------------------------------------------------------------------

    def handle(self, command: PowerCommand, now_s: float) -> object:
        """Apply a command.

        Raises:
            RequestError: It was refused; nothing was changed.
        """
        match command:
            case SetPowerBudget():
                self._set_budget(command, now_s)
            case SetPrices():
                self._control.prices.set(command, now_s)
            case SetHashprices():
                self._control.mining.set(command, now_s)
            case OfferGridEvent():
                return self._offer(command.event, now_s)
            case CancelGridEvent():
                return self._cancel(command.event_id, now_s)
        return None

    def _set_budget(self, command: SetPowerBudget, now_s: float) -> None:
        if len(command.intervals) > BUDGET_INTERVALS_MAX:
            raise LimitReached("budget_intervals_max", BUDGET_INTERVALS_MAX, "send fewer intervals at a time")
        self._control.ledger.apply(PowerBudgetSet(now_s, command.intervals, command.valid_until_s))

    def _offer(self, offered: GridEvent, now_s: float) -> GridEvent:
        ledger = self._control.ledger
        known = next((one for one in ledger.power.events if one.id == offered.id), None)
        if known is not None:
            same = (known.start_s, known.end_s, known.budget_w, known.emergency)
            if same == (offered.start_s, offered.end_s, offered.budget_w, offered.emergency):
                return known
            raise IllegalMove(f"grid event {offered.id!r} is there already with other terms; cancel it first")
        if sum(one.binds for one in ledger.power.events) >= GRID_EVENTS_MAX:
            raise LimitReached("grid_events_max", GRID_EVENTS_MAX, "cancel some, or offer it later")
        least_w, why = self.reachable(max(now_s, offered.start_s), now_s, emergency=offered.emergency)
        if not offered.emergency and least_w > offered.budget_w:
            raise Unreachable(offered.budget_w, least_w, why)
        event = GridEvent(
            offered.id,
            offered.start_s,
            offered.end_s,
            offered.budget_w,
            offered.emergency,
            accepted_s=now_s,
            received_s=offered.received_s,
            floor_w=least_w,
        )
        ledger.apply(GridEventAccepted(now_s, event))
        self.log.write(now_s)  # what was drawn before it outlives whatever comes
        return event

    def reachable(self, by_s: float, now_s: float, *, emergency: bool = False) -> tuple[float, str]:
        """The least that the site can draw by then, in watts, and what keeps it from less."""
        control = self._control
        snapshot = control.board.snapshot(now_s, self.columns)
        lowest_w = self.site_w(floor_w(snapshot, round(by_s * 1e6), emergency=emergency))
        stuck = [
            job.id
            for job in control.ledger.live_jobs()
            if job.attempts[-1].gpus and not (job.spec.preemptible and job.state is not JobState.STOPPING)
        ]
        words = f"jobs that may not be stopped: {', '.join(sorted(stuck)[:8])}; " if stuck else ""
        return lowest_w, f"{words}idle boards, base_w and pue"

    def _cancel(self, event_id: str, now_s: float) -> GridEvent:
        ledger = self._control.ledger
        known = next((one for one in ledger.power.events if one.id == event_id), None)
        if known is None:
            raise NotFound("grid event", event_id, "`wattshift power event list` shows them")
        if known.binds:
            ledger.apply(GridEventMoved(now_s, event_id, ShedState.CANCELLED))
        return next(one for one in ledger.power.events if one.id == event_id)

    # Looks --------------------------------------------------------------------------------------

    def view(self, now_s: float) -> PowerView:
        """The power of the node, now."""
        control = self._control
        plan = control.last_plan
        outlook = plan.power if plan is not None else None
        kept = control.ledger.power.limits
        gpus = []
        for gpu in control.board.identities:
            low, high = self.limits.range_w(gpu)
            gpus.append(
                GpuPowerView(
                    uuid=gpu.uuid,
                    index=gpu.index,
                    draw_w=self._fresh_w(gpu.uuid, now_s),
                    limit_w=self.limits.in_force_w(gpu),
                    limit_w_min=low,
                    limit_w_max=high,
                    limit_w_found=kept[gpu.uuid].found_w if gpu.uuid in kept else None,
                    refusal=self.limits.refusals.get(gpu.uuid, ""),
                    cause=limit_cause(control, gpu),
                )
            )
        return PowerView(
            budget_w=self.budget.in_force_w,
            sources=self.budget.sources,
            draw_w=self.measured_w(now_s),
            committed_w=self.committed_w(),
            floor_w=self.reachable(now_s + DURATION_S_LONG, now_s)[0],
            shadow_microusd_per_wh=outlook.shadow_microusd_per_wh if outlook else 0.0,
            gpus=tuple(gpus),
        )

    def committed_w(self) -> float:
        """What the site may draw: limits of occupied boards, less of frozen ones, idle draw of others."""
        board = self._control.board
        leaving = board.occupants()
        return self.site_w(
            sum(
                self.frozen.held_w(gpu)
                if board.is_held(gpu.uuid) or gpu.uuid in leaving
                else self.idle.of(gpu)
                for gpu in board.identities
            )
        )

    # The end ------------------------------------------------------------------------------------

    def _give_back(self, now_s: float) -> None:
        """Without a budget no limit is ours; what fails is tried again."""
        uuids = list(self._control.ledger.power.limits)
        if uuids and now_s >= self._give_back_s:
            self._give_back_s = now_s + RETRY_S
            self._control.spawn(self._gives_back(uuids))

    async def _gives_back(self, uuids: list[str]) -> None:
        done = await self.limits.give_back(uuids)
        if done:
            self._control.inbox.put(LimitsGivenBack(done))

    async def leave(self) -> None:
        """Give back every limit of a board that no job holds any more, before its handle is let go."""
        ledger, board = self._control.ledger, self._control.board
        is_held = any(board.is_held(gpu.uuid) for gpu in board.identities)
        done = await self.limits.give_back([] if is_held else list(ledger.power.limits))
        if done:
            self.limits.given_back(done)
            ledger.apply(LimitsRestored(self._control.effects.clock.now_s(), done))


def _in_steps(watts: float, step_w: int) -> int:
    return math.ceil(watts / step_w) * step_w


def _ints(values: Any) -> Any:
    return np.fromiter(values, dtype=np.int64)
