"""What follows from OpenADR signals: grid events in watts of the site, and prices.

The watts of the fail-safe rule are part of the schedule: wherever no IMPORT_CAPACITY_LIMIT is in force the
subscription is. So when contact is lost, the limits that are known run out, and the subscription is there.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from scheduler.model.openadr import (
    ALERTS,
    FOREVER_S,
    PRIORITY_WEAKEST,
    WATTS_MAX,
    Payload,
    Signals,
    Span,
    strongest,
)
from scheduler.model.prices import PRICE_USD_PER_KWH_MAX, PricePoint
from scheduler.model.settings import OpenAdrConfig

# Of the 256 grid events that are kept at a time, the most that a VTN may fill.
TERMS_MAX = 128
PRICES_MAX = 2000

_CONTROL_LEVELS = 10
_EMERGENCY_LEVEL = 3
_DISPATCHES = frozenset(
    {
        Payload.SIMPLE,
        Payload.DISPATCH_SETPOINT,
        Payload.DISPATCH_SETPOINT_RELATIVE,
        Payload.CONTROL_LEVEL_OFFSET,
        Payload.CONTROL_LEVEL_OFFSET_PERCENT,
    }
)


class TermsKind(StrEnum):
    """What a grid event comes from."""

    SUBSCRIPTION = "subscription"
    LIMIT = "limit"
    DISPATCH = "dispatch"
    ALERT = "alert"


@dataclass(frozen=True, slots=True)
class Terms:
    """A grid event that a VTN's signals ask for: at most `budget_w` from `start_s` until `end_s`."""

    kind: TermsKind
    event_id: str  # the VTN's; empty where the configuration asks for it
    start_s: float
    end_s: float
    budget_w: float
    emergency: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """All that follows."""

    terms: tuple[Terms, ...] = ()
    prices: tuple[PricePoint, ...] = ()
    problems: tuple[str, ...] = ()


def wanted(
    signals: Signals, config: OpenAdrConfig, least_w: float, fallback_w: float | None, now_s: float
) -> Wanted:
    """What follows from the signals.

    `least_w`: below that no event may go, the site draws it with every board off. `fallback_w`: the
    subscription where the VTN names none.
    """
    problems = list(signals.problems)
    limits = _strongest(signals.spans, Payload.IMPORT_CAPACITY_LIMIT)
    terms = [
        *_subscriptions(signals.spans, limits, fallback_w),
        *(Terms(TermsKind.LIMIT, s.event_id, s.start_s, s.end_s, s.value) for s in limits),
        *_dispatches(signals.spans, config, least_w, problems),
        *_alerts(signals.spans, config, least_w),
    ]
    checked = [
        Terms(t.kind, t.event_id, t.start_s, t.end_s, min(WATTS_MAX, max(least_w, t.budget_w)), t.emergency)
        for t in terms
        if t.end_s > now_s
    ]
    checked.sort(key=lambda t: (t.kind is not TermsKind.SUBSCRIPTION, t.start_s, t.end_s, t.kind, t.event_id))
    if len(checked) > TERMS_MAX:
        problems.append(f"only the nearest {TERMS_MAX} of {len(checked)} intervals are taken")
    return Wanted(tuple(checked[:TERMS_MAX]), _prices(signals.spans, problems), tuple(problems))


def _strongest(spans: Sequence[Span], payload: Payload) -> tuple[Span, ...]:
    return strongest((span for span in spans if span.payload is payload), lambda span: span.value)


def _subscriptions(
    spans: Sequence[Span], limits: tuple[Span, ...], fallback_w: float | None
) -> Iterator[Terms]:
    """The subscription and what is reserved beside it, but where a limit allows more."""
    named = [span for span in spans if span.payload is Payload.IMPORT_CAPACITY_SUBSCRIPTION]
    if fallback_w is not None:
        payload = Payload.IMPORT_CAPACITY_SUBSCRIPTION
        # From the beginning of time on: the same terms in each poll.
        named.append(Span("", payload, PRIORITY_WEAKEST + 1, 0.0, FOREVER_S, fallback_w))
    subscribed = strongest(named, lambda span: span.value)
    reserved = _strongest(spans, Payload.IMPORT_CAPACITY_RESERVATION)
    before: Terms | None = None
    for start_s, end_s, (one, extra, limit) in _segments(subscribed, reserved, limits):
        budget_w = (one.value if one else math.inf) + (extra.value if extra else 0.0)
        if one is None or (limit is not None and limit.value > budget_w):
            continue
        if before and (before.event_id, before.end_s, before.budget_w) == (one.event_id, start_s, budget_w):
            start_s = before.start_s
        elif before:
            yield before
        before = Terms(TermsKind.SUBSCRIPTION, one.event_id, start_s, end_s, budget_w)
    if before:
        yield before


def _segments(*lists: tuple[Span, ...]) -> Iterator[tuple[float, float, list[Span | None]]]:
    """The pieces of time in which none of the lists changes, and what each says then."""
    moments = sorted({moment for spans in lists for s in spans for moment in (s.start_s, s.end_s)})
    starts = [[span.start_s for span in spans] for spans in lists]
    for start_s, end_s in itertools.pairwise(moments):
        now: list[Span | None] = []
        for spans, begins in zip(lists, starts, strict=True):
            row = bisect_right(begins, start_s) - 1
            now.append(spans[row] if row >= 0 and start_s < spans[row].end_s else None)
        yield start_s, end_s, now


def _dispatches(
    spans: Sequence[Span], config: OpenAdrConfig, least_w: float, problems: list[str]
) -> Iterator[Terms]:
    """What is asked of the load at each moment by the strongest event."""
    usable = []
    for span in spans:
        if span.payload in _DISPATCHES:
            try:
                _dispatch_w(span, config, least_w)
                usable.append(span)
            except ValueError as error:
                if str(error) not in problems:
                    problems.append(str(error))
    for span in strongest(usable, lambda span: _dispatch_w(span, config, least_w)):
        watts = _dispatch_w(span, config, least_w)
        if math.isfinite(watts):
            emergency = span.payload is Payload.SIMPLE and span.value == _EMERGENCY_LEVEL
            yield Terms(TermsKind.DISPATCH, span.event_id, span.start_s, span.end_s, watts, emergency)


def _dispatch_w(span: Span, config: OpenAdrConfig, least_w: float) -> float:
    """What the site may draw; inf = as in normal operation."""
    value = span.value
    match span.payload:
        case Payload.SIMPLE if value == 0:
            return math.inf
        case Payload.SIMPLE if value == _EMERGENCY_LEVEL:
            return _emergency_w(config, least_w)
        case Payload.SIMPLE if value == 1:
            return _declared(config.simple_moderate_w, "simple_moderate_w", "SIMPLE 1")
        case Payload.SIMPLE:
            return _declared(config.simple_high_w, "simple_high_w", "SIMPLE 2")
        case Payload.DISPATCH_SETPOINT:
            return value
        case Payload.DISPATCH_SETPOINT_RELATIVE:
            return _declared(config.normal_w, "normal_w", span.payload) + value if value < 0 else math.inf
        case Payload.CONTROL_LEVEL_OFFSET:  # the higher, the less load
            part = 1 - value / _CONTROL_LEVELS
        case _:  # CONTROL_LEVEL_OFFSET_PERCENT: the lower, the less load
            part = 1 + value
    return _declared(config.normal_w, "normal_w", span.payload) * part if part < 1 else math.inf


def _declared(watts: float | None, key: str, what: str) -> float:
    if watts is None:
        raise ValueError(f"{what} means nothing here yet: set [openadr] {key}")
    return watts


def _emergency_w(config: OpenAdrConfig, least_w: float) -> float:
    return least_w if config.simple_emergency_w is None else config.simple_emergency_w


def _alerts(spans: Sequence[Span], config: OpenAdrConfig, least_w: float) -> Iterator[Terms]:
    for span in spans:
        if span.payload in ALERTS:
            black = span.payload is Payload.ALERT_BLACK_START
            watts = least_w if black else _emergency_w(config, least_w)
            yield Terms(TermsKind.ALERT, span.event_id, span.start_s, span.end_s, watts, emergency=True)


def _prices(spans: Sequence[Span], problems: list[str]) -> tuple[PricePoint, ...]:
    """The price at each moment; among equals in priority the dearer."""
    found = strongest((span for span in spans if span.payload is Payload.PRICE), lambda span: -span.value)
    sane = [span for span in found if abs(span.value) <= PRICE_USD_PER_KWH_MAX]
    if len(sane) < len(found):
        problems.append(f"PRICE beyond {PRICE_USD_PER_KWH_MAX:g} USD per kWh is a wrong unit; left out")
    if len(sane) > PRICES_MAX:
        problems.append(f"only the nearest {PRICES_MAX} of {len(sane)} prices are taken")
    return tuple(PricePoint(s.start_s, s.value, s.end_s) for s in sane[:PRICES_MAX])
