"""Grid events from their start to their end: met when the measured watts say so, failed when time is up."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from scheduler.effects.launcher import AttemptKey
from scheduler.model.actions import Action, RequeueJob
from scheduler.model.jobs import Job, JobClass
from scheduler.model.power import BudgetInterval, GridEvent, ShedState
from scheduler.model.power_events import GridEventMoved
from scheduler.planning.power import shed_grace_us

if TYPE_CHECKING:
    from scheduler.control.loop import Controller
    from scheduler.control.power import PowerControl

# A shed that is not met so long after it had to be has failed: boards settle in a second or two, and they are
# read once a second.
PATIENCE_S = 5.0
REASONS_MAX = 8
# Boards settle within 0.3 to 1 s of a change.
SETTLE_S = 2.0
# An emergency's draw is to be at its target so soon after it came: in 2 s, less a turn of the loop. It
# only nears that, with this time constant: boards were seen to be within 5 % after 0.8 s, which is 0.28
# s, and half a second allows for slower ones. Where the target leaves too little room for what boards
# still draw then, graces are shorter than `emergency_grace_s`, down to this part of it: who saves quickly
# still can.
EMERGENCY_S = 1.95
SETTLING_S = 0.5
GRACE_RATIO_MIN = 0.5
ENDED_TOO_SOON = "the event ended before the measured draw was down"


class Sheds:
    """Moves the grid events."""

    def __init__(self, controller: "Controller", power: "PowerControl") -> None:
        self._control = controller
        self._power = power
        self._given_s = math.inf  # the longest grace in the emergency that is in force, as given by now

    def advance(self, now_s: float) -> None:
        """Begin the events whose time has come, end those whose time is over, and graces that they cut."""
        control = self._control
        for event in control.ledger.power.events:
            if not event.binds:
                continue
            if now_s >= event.end_s:
                self._end(event, now_s)
            elif event.state is ShedState.SCHEDULED and now_s >= self._begins_s(event, now_s):
                baseline = self._power.log.baseline(now_s)
                control.ledger.apply(GridEventMoved(now_s, event.id, ShedState.SHEDDING, baseline=baseline))
        for interval in self._power.budget.falls(now_s, now_s + self._ahead_s):
            if now_s >= self._begins_s(interval, now_s):
                self._power.budget.begin(interval)
        self._cut_graces(now_s)

    def moments_s(self, now_s: float) -> list[float]:
        """When sheds begin, and graces end that are cut."""
        events = self._control.ledger.power.events
        scheduled = [event for event in events if event.binds and event.state is ShedState.SCHEDULED]
        found = [moment for _, moment in self.cut_off()]
        found += [self._begins_s(event, now_s) for event in scheduled]
        # Those that are farther off are asked about when their time has come.
        soon_s = now_s + self._ahead_s
        for interval in self._power.budget.falls(now_s, math.inf):
            is_soon = interval.start_s <= soon_s
            found.append(self._begins_s(interval, now_s) if is_soon else interval.start_s - soon_s + now_s)
        return found

    @property
    def _ahead_s(self) -> float:
        """By how much a shed may have to begin before its budget does, at most."""
        jobs = self._control.ledger.live_jobs()
        return SETTLE_S + max((job.spec.grace_s for job in jobs if job.attempts[-1].gpus), default=0.0)

    def _begins_s(self, what: GridEvent | BudgetInterval, now_s: float) -> float:
        """When its shed has to begin: so early that whoever stops has had his grace; an emergency's at once.

        Whom it would stop is asked of the planner, as soon as somebody's grace is as long as what is left.
        """
        if isinstance(what, GridEvent) and what.emergency:
            return what.start_s
        control, power, ahead_s = self._control, self._power, self._ahead_s
        if now_s < what.start_s - ahead_s:
            return what.start_s - ahead_s
        snapshot = control.board.snapshot(now_s, power.columns)
        assert snapshot.power is not None
        boards_w = math.floor(power.boards_w(what.budget_w))
        then = replace(snapshot, power=replace(snapshot.power, budget_w=boards_w))
        return what.start_s - SETTLE_S - shed_grace_us(then, control.config.policy) / 1e6

    def give_grace_s(self, actions: tuple[Action, ...]) -> float:
        """The longest grace of those whom a plan with these actions stops in an emergency.

        Whoever was told to go before has no more from then on.
        """
        grace_s = self._affordable_s(actions)
        self._given_s = min(self._given_s, grace_s)
        return grace_s

    def _affordable_s(self, actions: tuple[Action, ...]) -> float:
        control, power = self._control, self._power
        longest_s = control.config.power.emergency_grace_s
        outlook = control.last_plan.power if control.last_plan is not None else None
        if outlook is None:
            return longest_s
        going = {action.job for action in actions if isinstance(action, RequeueJob)}
        going |= control.ledger.stopping
        room_w, held_w = float(outlook.budget_w), 0.0
        for gpu in control.board.identities:
            sample = control.board.samples.get(gpu.uuid)
            idle_w, least_w = power.idle.of(gpu), power.limits.range_w(gpu)[0]
            drawn_w = sample.power_w if sample is not None and sample.power_w is not None else least_w
            holders = control.board.holders(gpu.uuid)
            stays = [job for job in holders if job.number not in going]
            # Until the emergency is met all limits that may be lowered lie at their least.
            is_firm = any(job.spec.job_class is JobClass.INFERENCE for job in stays)
            is_firm &= not control.config.power.limit_inference
            down_w = drawn_w if is_firm else min(drawn_w, least_w) if holders else idle_w
            # Whatever the graces, this is left of what it has drawn above that.
            room_w -= down_w + max(0.0, drawn_w - down_w) * math.exp(-EMERGENCY_S / SETTLING_S)
            if holders and not stays:
                held_w += max(0.0, down_w - idle_w)
        room_w += held_w  # once their graces are over
        if not held_w:
            return longest_s
        settles_s = SETTLING_S * math.log(held_w / room_w) if room_w > 0 else math.inf
        return min(longest_s, max(GRACE_RATIO_MIN * longest_s, EMERGENCY_S - settles_s))

    def cut_off(self) -> list[tuple[Job, float]]:
        """In an emergency, who gives way with a longer grace than it leaves, and when that is over."""
        control = self._control
        began = [
            event.shed_began_s for event in control.ledger.power.events if event.emergency and event.binds
        ]
        begun_s = min((began_s for began_s in began if began_s is not None), default=None)
        if begun_s is None:
            self._given_s = math.inf
            return []
        found = []
        for job in control.ledger.live_jobs():
            last = job.attempts[-1]
            if last.notice is not None and last.gpus and last.acknowledged_s is None:
                told_s, grace_s = last.notice.decided_s, control.config.power.emergency_grace_s
                if told_s < begun_s:  # others were told how much they have
                    grace_s = min(grace_s, self._given_s)
                ends_s = max(begun_s, told_s) + grace_s
                if ends_s < last.notice.deadline_s:
                    found.append((job, ends_s))
        return found

    def _cut_graces(self, now_s: float) -> None:
        """End the graces that are over in an emergency, of jobs that were told to go before it, too."""
        for job, ends_s in self.cut_off():
            if now_s >= ends_s:
                self._control.orders.kill(AttemptKey(job.id, job.attempt))

    def _end(self, event: GridEvent, now_s: float) -> None:
        to = event.state
        if to in (ShedState.SCHEDULED, ShedState.SHEDDING):
            to = ShedState.FAILED
            self._move(event, to, now_s, None, (ENDED_TOO_SOON,))
        self._control.ledger.apply(GridEventMoved(now_s, event.id, to, is_over=True))

    def read(self, now_s: float) -> None:
        """Judge by a round of readings the events in force."""
        measured_w = self._power.measured_w(now_s)
        for event in self._control.ledger.power.events:
            if not event.binds or event.shed_began_s is None or event.state is ShedState.MET:
                continue
            if measured_w is not None and measured_w <= event.budget_w and self._is_news(event):
                self._control.meters.grid_shed_s.observe(now_s - event.shed_began_s)
                self._move(event, ShedState.MET, now_s, measured_w, ())
            elif event.state is ShedState.SHEDDING and now_s > self._due_s(event):
                self._move(event, ShedState.FAILED, now_s, measured_w, self._reasons(event, now_s))

    def _due_s(self, event: GridEvent) -> float:
        assert event.shed_began_s is not None
        return max(event.start_s, event.shed_began_s) + PATIENCE_S

    def _is_news(self, event: GridEvent) -> bool:
        """Whether every board that is there was read after the shed began."""
        board, began_s = self._control.board, event.shed_began_s or 0.0
        there = (sample for uuid, sample in board.samples.items() if board.is_present(uuid))
        return all(sample.at_s >= began_s for sample in there)

    def _move(
        self,
        event: GridEvent,
        to: ShedState,
        now_s: float,
        measured_w: float | None,
        reasons: tuple[str, ...],
    ) -> None:
        self._control.meters.grid_sheds[(to.value,)] += 1
        self._control.ledger.apply(GridEventMoved(now_s, event.id, to, measured_w, reasons))

    def _reasons(self, event: GridEvent, now_s: float) -> tuple[str, ...]:
        """What is in the way, in words."""
        control = self._control
        found = []
        least_w, why = self._power.reachable(now_s, now_s, emergency=event.emergency)
        if least_w > event.budget_w:
            found.append(f"the least that can be reached is {least_w:.0f} W: {why}")
        found += [
            f"GPU {uuid} can't be limited: {text}" for uuid, text in self._power.limits.refusals.items()
        ]
        if code := self._power.unreadable:
            found.append(f"no GPU can be read: {code}")
        found += [f"GPU {uuid} has no fresh reading" for uuid in self._power.stale(now_s)]
        stopping = sorted(control.ledger.stopping)
        found += [f"job j{number} is still stopping" for number in stopping]
        return tuple(found[:REASONS_MAX]) or ("the boards draw more than their limits allow",)
