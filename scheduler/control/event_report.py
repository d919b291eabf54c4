"""What became of a grid event, from the journal: the instruction, the draw second by second, watts delivered.

Delivered is the baseline less the measured draw. The baseline is what ran and was admitted when the shed
began, at its measured watts (`control/draw_log.py`). How far such a baseline is off is found by reckoning it
for times without an event, too: it is noted with each minute of draw, and compared with what came after it.

A second without a reading counts nowhere, neither as delivered nor as short; how many there were is said.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from scheduler.control.event_touched import Touched, touched
from scheduler.effects.journal import DrawPiece, History
from scheduler.effects.journal_history import draw_piece
from scheduler.errors import NotFound
from scheduler.model.events import (
    AttemptEnded,
    AttemptResumed,
    StartDecided,
    StopDecided,
    SuspendDecided,
)
from scheduler.model.power import GRID_EVENT_REPORTED_S, Baseline, GridEvent
from scheduler.model.power_events import DrawRecorded, GridEventDelayed, GridEventMoved, LimitsDecided

# Shown before the shed began, and after the end: what comes back too fast shows in a quarter of an hour.
BEFORE_S = 300.0
AFTER_S = 900.0
# The draw has begun to fall when it is below the baseline by more than both: the noise of a reading.
FALL_W = 5.0
FALL_RATIO = 0.02
# The baseline is tried on windows of the last week, as long as the event, at most these.
BACK_TEST_S = 7 * 86_400.0
WINDOW_S_MIN, WINDOW_S_MAX = 60, 4 * 3600
WINDOWS_MIN = 10
# A window counts if so much of it is known.
KNOWN_RATIO_MIN = 0.9
_QUANTILE = 0.95
_S_PER_HOUR = 3600.0
_KINDS = (
    GridEventMoved, GridEventDelayed, LimitsDecided, StartDecided, StopDecided, AttemptEnded, SuspendDecided,
    AttemptResumed,
)  # fmt: skip

# What holds of every report.
LIMITS = (
    "Watts are of the site, (GPU boards + base_w) x PUE; base_w and PUE are configured.",
    "Boards are measured by their own sensors, which may be off by 11 %; none of it is a meter.",
    "The baseline stays as it was when the shed began: who would have come or gone meanwhile is not in it.",
    "The back-test says by how much such a baseline is off.",
    "Readings are a second apart: times that are read off the draw are no finer.",
)

Span = tuple[int, int]  # from a second to before another, Unix time


@dataclass(frozen=True, slots=True)
class Delivery:
    """What was delivered while the event was in force. Watts and Wh of the site, of known seconds only."""

    since_s: int
    until_s: int
    known: int  # seconds
    missing: int
    asked_w: float  # the baseline less the event's watts; 0 where it was below them
    mean_w: float
    least_w: float
    delivered_wh: float
    over_wh: float  # of it, beyond what was asked
    short: int  # seconds above the event's watts
    short_wh: float


@dataclass(frozen=True, slots=True)
class Rebound:
    """What came back after the event's end."""

    until_s: int
    known: int  # seconds
    most_w: float
    most_at_s: int
    above_wh: float  # above the baseline


@dataclass(frozen=True, slots=True)
class BackTest:
    """By how much the same baseline was off where no event was. None = fewer than `WINDOWS_MIN` windows."""

    windows: int
    window_s: int
    bias_w: float | None = None  # the mean; above 0: the baseline is too high, which flatters
    error_w: float | None = None  # that 95 of 100 windows do not exceed
    mean_w: float | None = None  # drawn in the windows


@dataclass(frozen=True, slots=True)
class EventReport:
    """A grid event and what became of it. None = not known, or it has not come to that."""

    event: GridEvent
    moves: tuple[GridEventMoved, ...]
    baseline: Baseline | None
    first_s: int  # of `draw_w`, one value a second; NaN where nothing is known
    draw_w: Any
    missing: tuple[Span, ...]
    first_fall_s: int | None
    delivery: Delivery | None
    rebound: Rebound | None
    back_test: BackTest
    touched: tuple[Touched, ...]
    others: tuple[str, ...]  # events that were in force meanwhile
    is_cut: bool  # it lasted longer than is reported


def event_report(
    history: History, event_id: str, now_s: float, unwritten: DrawRecorded | None = None
) -> EventReport:
    """Report an event as far as it has come; `unwritten`: what a daemon has yet to write of the draw.

    Raises:
        NotFound: There is none of that id, or it is kept no more.
    """
    events = history.node_state().power.events
    event = next((one for one in events if one.id == event_id), None)
    if event is None:
        raise NotFound("grid event", event_id, "`wattshift power event list --all` shows them")
    began_s = event.shed_began_s
    if began_s is None:
        return EventReport(
            event, (), None, 0, np.empty(0), (), None, None, None, BackTest(0, 0), (), (), is_cut=False
        )
    ended_s = min(now_s, event.ended_s or now_s, began_s + GRID_EVENT_REPORTED_S)
    happened = history.events(began_s, min(now_s, ended_s + AFTER_S), _KINDS)
    moves = tuple(one for one in happened if isinstance(one, GridEventMoved) and one.id == event_id)
    baseline = next((move.baseline for move in moves if move.baseline is not None), None)
    first_s, last_s = math.floor(began_s - BEFORE_S), math.ceil(min(now_s, ended_s + AFTER_S))
    news = [] if unwritten is None else [draw_piece(unwritten)]
    draw_w = _dense(history.draws(first_s, last_s) + news, first_s, last_s)
    base_w = baseline.site_w if baseline is not None else None
    delivery = rebound = first_fall_s = None
    if base_w is not None:
        first_fall_s = _first_fall(draw_w, first_s, began_s, base_w)
        window = (math.ceil(max(event.start_s, began_s)), math.floor(ended_s))
        delivery = _delivery(_cut(draw_w, first_s, *window), window, base_w, event.budget_w)
        if event.ended_s is not None and ended_s == event.ended_s:
            rebound = _rebound(_cut(draw_w, first_s, math.ceil(ended_s), last_s), math.ceil(ended_s), base_w)
    window_s = round(ended_s - began_s)
    return EventReport(
        event,
        moves,
        baseline,
        first_s,
        draw_w,
        tuple(_gaps(draw_w, first_s)),
        first_fall_s,
        delivery,
        rebound,
        back_test(history.draws(now_s - BACK_TEST_S, now_s) + news, _busy(events, now_s), window_s, now_s),
        touched(event, baseline, happened, ended_s, history.job),
        tuple(_others(events, event, began_s, ended_s)),
        is_cut=(event.ended_s or now_s) > ended_s,
    )


def back_test(
    pieces: Sequence[DrawPiece], busy: Sequence[tuple[float, float]], window_s: int, now_s: float
) -> BackTest:
    """Try the baseline on windows of that length one after the other, none of them in a busy time."""
    window_s = min(WINDOW_S_MAX, max(WINDOW_S_MIN, window_s))
    first_s, last_s = math.floor(now_s - BACK_TEST_S), math.floor(now_s)
    draw_w = _dense(pieces, first_s, last_s)
    errors, means, free_s = [], [], first_s
    for piece in sorted(pieces, key=lambda piece: (piece.at_s, piece.first_s)):
        since_s = math.ceil(piece.at_s)
        until_s = since_s + window_s
        if piece.baseline_w is None or since_s < free_s or until_s > last_s:
            continue
        if any(begin_s < until_s and since_s < end_s for begin_s, end_s in busy):
            continue
        window = _cut(draw_w, first_s, since_s, until_s)
        known = window[~np.isnan(window)]
        if len(known) >= KNOWN_RATIO_MIN * window_s:
            free_s = until_s
            means.append(float(known.mean()))
            errors.append(piece.baseline_w - means[-1])
    if len(errors) < WINDOWS_MIN:
        return BackTest(len(errors), window_s)
    worst = sorted(map(abs, errors))
    error_w = worst[min(len(worst) - 1, math.ceil(_QUANTILE * len(worst)) - 1)]
    count = len(errors)
    return BackTest(count, window_s, math.fsum(errors) / count, error_w, math.fsum(means) / count)


def _dense(pieces: Iterable[DrawPiece], first_s: int, last_s: int) -> Any:
    """One value a second from the first to before the last; NaN where nothing is known."""
    draw_w = np.full(max(0, last_s - first_s), np.nan)
    for piece in pieces:
        since_s, until_s = max(first_s, piece.first_s), min(last_s, piece.first_s + len(piece.draw_w))
        if since_s < until_s:
            values = np.asarray(piece.draw_w)[since_s - piece.first_s : until_s - piece.first_s]
            known = ~np.isnan(values)
            draw_w[since_s - first_s : until_s - first_s][known] = values[known]
    return draw_w


def _cut(draw_w: Any, first_s: int, since_s: int, until_s: int) -> Any:
    return draw_w[max(0, since_s - first_s) : max(0, until_s - first_s)]


def _gaps(draw_w: Any, first_s: int) -> Iterator[Span]:
    at_s = first_s
    for is_missing, run in groupby(np.isnan(draw_w).tolist()):
        length = len(list(run))
        if is_missing:
            yield at_s, at_s + length
        at_s += length


def _first_fall(draw_w: Any, first_s: int, began_s: float, base_w: float) -> int | None:
    """The first second that was read after the shed began and shows less."""
    since_s = math.ceil(began_s)
    fallen = _cut(draw_w, first_s, since_s, first_s + len(draw_w)) < base_w - max(FALL_W, FALL_RATIO * base_w)
    places = fallen.nonzero()[0]
    return since_s + int(places[0]) if len(places) else None


def _delivery(draw_w: Any, window: Span, base_w: float, budget_w: float) -> Delivery | None:
    known_w = draw_w[~np.isnan(draw_w)]
    if not len(known_w):
        return None
    less_w = base_w - known_w
    beyond_w = np.maximum(0.0, min(base_w, budget_w) - known_w)
    above_w = np.maximum(0.0, known_w - budget_w)
    return Delivery(
        *window,
        known=len(known_w),
        missing=len(draw_w) - len(known_w),
        asked_w=max(0.0, base_w - budget_w),
        mean_w=float(less_w.mean()),
        least_w=float(less_w.min()),
        delivered_wh=float(less_w.sum()) / _S_PER_HOUR,
        over_wh=float(beyond_w.sum()) / _S_PER_HOUR,
        short=int((above_w > 0).sum()),
        short_wh=float(above_w.sum()) / _S_PER_HOUR,
    )


def _rebound(draw_w: Any, since_s: int, base_w: float) -> Rebound | None:
    known = ~np.isnan(draw_w)
    if not known.any():
        return None
    most = int(np.nanargmax(draw_w))
    above_w = np.maximum(0.0, draw_w[known] - base_w)
    return Rebound(
        since_s + len(draw_w),
        int(known.sum()),
        float(draw_w[most]),
        since_s + most,
        float(above_w.sum()) / _S_PER_HOUR,
    )


def _busy(events: Iterable[GridEvent], now_s: float) -> list[tuple[float, float]]:
    """The times in which an event shed, or what it shed came back; under a standing limit life goes on."""
    times = [(one.shed_began_s, one.ended_s or now_s) for one in events]
    return [
        (began_s, ended_s + AFTER_S)
        for began_s, ended_s in times
        if began_s is not None and ended_s - began_s <= GRID_EVENT_REPORTED_S
    ]


def _others(events: Iterable[GridEvent], event: GridEvent, began_s: float, ended_s: float) -> Iterator[str]:
    for one in events:
        is_another = one.id != event.id and one.shed_began_s is not None
        if is_another and (one.shed_began_s or 0.0) < ended_s and began_s < (one.ended_s or ended_s):
            yield one.id
