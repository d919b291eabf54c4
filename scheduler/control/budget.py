"""What the site may draw now: of all sources the tightest, and watts that come back only bit by bit."""

import math
import random

from scheduler.control.ledger import Ledger
from scheduler.model.power import BudgetInterval, BudgetKind, GridEvent, Source
from scheduler.model.power_events import BudgetReturns
from scheduler.model.settings import PowerConfig


class Budget:
    """The budget in force, in watts of the site."""

    def __init__(self, ledger: Ledger, node: str) -> None:
        self._ledger = ledger
        self._node = node
        self.in_force_w: float | None = None  # None: nobody sets a budget
        self.sources: tuple[Source, ...] = ()
        self._begun: set[BudgetInterval] = set()  # whose shed began before they did
        self._back_s = math.inf  # when all watts that are on their way are back
        state = ledger.power
        if state.returned_from_w is not None:
            self.in_force_w = state.returned_from_w

    @property
    def tightest(self) -> Source | None:
        """The source that binds, or would if no watts were coming back."""
        return min(self.sources, key=lambda source: source.budget_w, default=None)

    @property
    def until_s(self) -> float | None:
        """Until when the budget in force lasts, or until all watts are back; None: nobody knows."""
        if self._ledger.power.returned_from_w is not None:
            return self._back_s
        return self.tightest.until_s if self.tightest else None

    def advance(self, config: PowerConfig, now_s: float, most_w: float) -> None:
        """Go by what holds now; `most_w`: all that the site could draw."""
        self.sources = tuple(self._sources(config, now_s))
        tightest = self.tightest
        if self.in_force_w is None:
            self.in_force_w = tightest.budget_w if tightest else None
            return
        wanted_w = min(tightest.budget_w, most_w) if tightest else most_w
        if wanted_w <= self.in_force_w:
            self._arrive(tightest.budget_w if tightest else None, now_s)
            return
        if self._ledger.power.returned_from_w is None:
            jitter = random.Random(f"{self._node} {now_s:.3f}").uniform(0.0, config.return_jitter_s)
            self._ledger.apply(BudgetReturns(now_s, self.in_force_w, now_s + jitter))
        state = self._ledger.power
        assert state.returned_from_w is not None
        self._back_s = state.return_began_s + (wanted_w - state.returned_from_w) / config.return_w_per_s
        risen_s = max(0.0, now_s - state.return_began_s)
        self.in_force_w = max(self.in_force_w, state.returned_from_w + risen_s * config.return_w_per_s)
        if self.in_force_w >= wanted_w:
            self._arrive(tightest.budget_w if tightest else None, now_s)

    def falls(self, now_s: float, until_s: float) -> list[BudgetInterval]:
        """The intervals that are to begin by then, and with less than is in force now."""
        state = self._ledger.power
        if self._begun:
            self._begun.intersection_update(state.budget)
        valid_s = math.inf if state.budget_valid_until_s is None else state.budget_valid_until_s
        most_w = math.inf if self.in_force_w is None else self.in_force_w
        return [
            one
            for one in state.budget
            if now_s < one.start_s <= until_s
            and one.start_s < valid_s
            and one.budget_w < most_w
            and one not in self._begun
        ]

    def begin(self, interval: BudgetInterval) -> None:
        """Go by an interval from now on that is still to come."""
        self._begun.add(interval)

    def edges_s(self) -> list[float]:
        """The moments at which a source begins or ends."""
        state = self._ledger.power
        edges = [edge for one in state.budget for edge in (one.start_s, one.end_s) if edge is not None]
        if state.budget_valid_until_s is not None:
            edges.append(state.budget_valid_until_s)
        for event in state.events:
            if event.binds:
                edges += [event.start_s, event.end_s]
        return edges

    def _arrive(self, budget_w: float | None, now_s: float) -> None:
        self.in_force_w = budget_w
        if self._ledger.power.returned_from_w is not None:
            self._ledger.apply(BudgetReturns(now_s, None, 0.0))

    def _sources(self, config: PowerConfig, now_s: float) -> list[Source]:
        state = self._ledger.power
        found = []
        if config.budget_w is not None:
            found.append(Source(BudgetKind.CONFIGURED, config.budget_w, None))
        valid_s = state.budget_valid_until_s
        if valid_s is not None and now_s >= valid_s and state.budget:
            safe_w = config.safe_budget_w if config.safe_budget_w is not None else config.budget_w
            if safe_w is not None:
                found.append(Source(BudgetKind.SAFE, safe_w, None))
        else:
            found += [
                Source(BudgetKind.REQUESTED, one.budget_w, one.end_s if valid_s is None else valid_s)
                for one in state.budget
                if (one.start_s <= now_s or one in self._begun) and (one.end_s is None or now_s < one.end_s)
            ]
        for event in state.events:
            if is_in_force(event, now_s):
                kind = BudgetKind.EMERGENCY if event.emergency else BudgetKind.GRID_EVENT
                found.append(Source(kind, event.budget_w, event.end_s, event.id))
        return found


def is_in_force(event: GridEvent, now_s: float) -> bool:
    """Whether the event binds now: from the begin of its shed on, which may be before its start."""
    begins_s = event.start_s if event.shed_began_s is None else event.shed_began_s
    return event.binds and begins_s <= now_s < event.end_s
