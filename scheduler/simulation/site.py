"""The site's watts as they truly are: energy, cost, time above the budget, in closed form between changes.

Every board's draw settles exponentially with one time constant, so their sum does: a target, and an excess
over it that decays. Nothing has to be looked at between two changes, and nothing depends on how often.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from scheduler.simulation.boards import SETTLING_S
from scheduler.simulation.inputs import EventRow, PriceRow

J_PER_KWH = 3_600_000.0
J_PER_MWH = 3_600_000_000.0
# A draw that approaches its budget from above never reaches it: this near it is there.
OVER_BUDGET_TOLERANCE_W = 1.0


@dataclass(frozen=True, slots=True)
class Steps:
    """A value that changes in steps: `values[i]` holds from `starts_s[i]` on, `before` until the first."""

    starts_s: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    before: float = math.nan

    def at(self, time_s: float) -> float:
        """The value at a moment."""
        place = bisect_right(self.starts_s, time_s)
        return self.values[place - 1] if place else self.before


def price_steps(prices: Iterable[PriceRow]) -> Steps:
    """The true price in USD per MWh; NaN before the first row, when nobody knows it."""
    rows = list(prices)
    return Steps(tuple(row.start_s for row in rows), tuple(row.usd_per_mwh for row in rows))


def budget_steps(events: Iterable[EventRow], configured_w: float | None = None) -> Steps:
    """The budget in W: the tightest of what is configured and of the events that hold; inf if none does."""
    rows = sorted(events, key=lambda row: row.start_s, reverse=True)
    always_w = math.inf if configured_w is None else configured_w
    moments = sorted({0.0, *(row.start_s for row in rows), *(row.end_s for row in rows)})
    holding: list[tuple[float, float]] = []  # watts and end, the tightest first
    values = list[float]()
    for moment in moments:
        while rows and rows[-1].start_s <= moment:
            row = rows.pop()
            heapq.heappush(holding, (row.site_power_w, row.end_s))
        while holding and holding[0][1] <= moment:
            heapq.heappop(holding)
        values.append(min(always_w, holding[0][0]) if holding else always_w)
    return Steps(tuple(moments), tuple(values), always_w)


@dataclass(slots=True)
class Shed:
    """A grid event and how long it took until the draw was inside it."""

    event: EventRow
    met_s: float | None = None  # None = not yet, or never


@dataclass(slots=True)
class Site:
    """The site's draw and what it adds up to. Times are seconds since the beginning, watts at the meter."""

    prices: Steps
    budgets: Steps
    events: tuple[EventRow, ...] = ()
    base_w: float = 0.0
    pue: float = 1.0
    energy_j: float = 0.0
    cost_usd: float = 0.0
    unpriced_j: float = 0.0  # drawn when no price was known
    over_budget_s: float = 0.0
    sheds: list[Shed] = field(default_factory=list)
    _at_s: float = 0.0
    _target_w: float = 0.0  # of the boards
    _excess_w: float = 0.0  # of the boards, above the target; negative while the draw rises
    _moments: list[float] = field(default_factory=list)
    _to_come: list[Shed] = field(default_factory=list)
    _open: list[Shed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sheds = [Shed(event) for event in sorted(self.events, key=lambda e: (e.start_s, e.event_id))]
        self._to_come = self.sheds[::-1]
        self._moments = sorted({*self.prices.starts_s, *self.budgets.starts_s})

    @property
    def target_w(self) -> float:
        """What the site draws when it has settled."""
        return (self._target_w + self.base_w) * self.pue

    @property
    def draw_w(self) -> float:
        """What the site draws at the moment up to which it was advanced."""
        return (self._target_w + self._excess_w + self.base_w) * self.pue

    @property
    def shed_s(self) -> float:
        """How long the sheds took, all together; one that was never met counts until its event ended."""
        return sum(self._shed_s(shed) for shed in self.sheds)

    def steps_between(self, after_s: float, until_s: float) -> Iterator[float]:
        """The moments in (after, until] at which a price or a budget changes."""
        first = bisect_right(self._moments, after_s)
        yield from self._moments[first : bisect_right(self._moments, until_s)]

    def change(self, by_w: float, at_s: float) -> None:
        """The boards' target moves."""
        self.advance(at_s)
        self._target_w += by_w
        self._excess_w -= by_w

    def settled(self, board_w: float) -> None:
        """The boards draw this much when the world begins."""
        self._target_w, self._excess_w = board_w, 0.0

    def advance(self, to_s: float) -> None:
        """Add up until a moment."""
        if to_s <= self._at_s:
            return
        for start_s, end_s in pairwise((self._at_s, *self.steps_between(self._at_s, to_s), to_s)):
            if end_s > start_s:
                self._advance(start_s, end_s)

    def _advance(self, start_s: float, end_s: float) -> None:
        """Add up a time in which price, budget and target stay."""
        span_s = end_s - start_s
        kept = math.exp(-span_s / SETTLING_S)
        board_j = self._target_w * span_s + self._excess_w * SETTLING_S * (1.0 - kept)
        used_j = (board_j + self.base_w * span_s) * self.pue
        self.energy_j += used_j
        usd_per_mwh = self.prices.at(start_s)
        if math.isnan(usd_per_mwh):
            self.unpriced_j += used_j
        else:
            self.cost_usd += used_j / J_PER_MWH * usd_per_mwh
        self.over_budget_s += self._above_s(self.budgets.at(start_s), span_s)
        self._look_at_sheds(start_s, span_s)
        self._excess_w *= kept
        self._at_s = end_s

    def _look_at_sheds(self, start_s: float, span_s: float) -> None:
        while self._to_come and self._to_come[-1].event.start_s <= start_s:
            self._open.append(self._to_come.pop())
        for shed in self._open:
            limit_w = shed.event.site_power_w
            falls_s = self._above_s(limit_w, span_s) if self._is_above(limit_w) else 0.0
            if falls_s < span_s:
                shed.met_s = start_s + falls_s
        end_s = start_s + span_s
        self._open = [shed for shed in self._open if shed.met_s is None and shed.event.end_s > end_s]

    def _is_above(self, limit_w: float) -> bool:
        return self.draw_w > limit_w + OVER_BUDGET_TOLERANCE_W

    def _above_s(self, limit_w: float, span_s: float) -> float:
        """For how long of the next `span_s` the draw is above a limit: at its beginning, or at its end."""
        now_above, beyond_w = self._is_above(limit_w), self.target_w - limit_w - OVER_BUDGET_TOLERANCE_W
        if now_above == (beyond_w > 0.0) or beyond_w == 0.0:
            return span_s if now_above else 0.0
        crosses_s = SETTLING_S * math.log(abs(self._excess_w * self.pue / beyond_w))
        return min(span_s, crosses_s) if now_above else max(0.0, span_s - crosses_s)

    def _shed_s(self, shed: Shed) -> float:
        until_s = shed.met_s if shed.met_s is not None else min(self._at_s, shed.event.end_s)
        return max(0.0, until_s - shed.event.start_s)
