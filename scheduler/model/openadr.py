"""OpenADR 3.1 events as values: what a VTN's JSON says, from when until when.

The rules are those of the OpenADR 3.1 Definition and User Guide: an interval without a period of its own
follows the one before, `event.duration` shortens or repeats the list, `randomizeStart` shifts all of it at
once. What can't be understood is named; whatever the JSON is, reading it never fails.
"""

import heapq
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

# "For ever" ends here, 2100-01-01: dates far beyond it don't fit where times are shown and sent.
FOREVER_S = 4_102_444_800.0
EVENTS_MAX = 1000
# Of one event, with its repetitions: a week of quarters of an hour and then some.
ROWS_MAX = 1024
VALUES_MAX = 1024  # of one payload
PROBLEMS_MAX = 32
TEXT_MAX = 128
PRIORITY_WEAKEST = 2**31
WATTS_MAX = 1e9
# The shortest interval: boards are read, and a shed is judged, once a second.
INTERVAL_S_MIN = 1.0

_YEAR_S, _MONTH_S, _WEEK_S, _DAY_S = 365 * 86_400.0, 30 * 86_400.0, 7 * 86_400.0, 86_400.0
_DURATION = re.compile(
    r"P(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?"
    r"(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?",
    re.ASCII,
)
_UNITS_S = (_YEAR_S, _MONTH_S, _WEEK_S, _DAY_S, 3600.0, 60.0, 1.0)
_WATTS = {"W": 1.0, "KW": 1e3, "MW": 1e6}
_PER_KWH = {"KWH": 1.0, "MWH": 1e-3}


class Payload(StrEnum):
    """Types of payloads that something is done about."""

    SIMPLE = "SIMPLE"
    IMPORT_CAPACITY_LIMIT = "IMPORT_CAPACITY_LIMIT"
    IMPORT_CAPACITY_SUBSCRIPTION = "IMPORT_CAPACITY_SUBSCRIPTION"
    IMPORT_CAPACITY_RESERVATION = "IMPORT_CAPACITY_RESERVATION"
    DISPATCH_SETPOINT = "DISPATCH_SETPOINT"
    DISPATCH_SETPOINT_RELATIVE = "DISPATCH_SETPOINT_RELATIVE"
    CONTROL_LEVEL_OFFSET = "CONTROL_LEVEL_OFFSET"
    CONTROL_LEVEL_OFFSET_PERCENT = "CONTROL_LEVEL_OFFSET_PERCENT"
    ALERT_GRID_EMERGENCY = "ALERT_GRID_EMERGENCY"
    ALERT_BLACK_START = "ALERT_BLACK_START"
    PRICE = "PRICE"


ALERTS = frozenset({Payload.ALERT_GRID_EMERGENCY, Payload.ALERT_BLACK_START})
# Least and greatest value where the payload has no unit; the levels of the first two are whole numbers.
_LEVELS = {
    Payload.SIMPLE: (0.0, 3.0),
    Payload.CONTROL_LEVEL_OFFSET: (-10.0, 10.0),
    Payload.CONTROL_LEVEL_OFFSET_PERCENT: (-1.0, 1.0),
}
_WHOLE = frozenset({Payload.SIMPLE, Payload.CONTROL_LEVEL_OFFSET})


@dataclass(frozen=True, slots=True)
class Span:
    """What one payload says from `start_s` until `end_s`: W, USD per kWh, a level; 0 for an alert."""

    event_id: str
    payload: Payload
    priority: int  # the lower is the stronger
    start_s: float
    end_s: float
    value: float


@dataclass(frozen=True, slots=True)
class Signals:
    """What a VTN says as far as it is not over, and what of it can't be used."""

    spans: tuple[Span, ...] = ()
    problems: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()  # types of payloads that nothing is done about


class _Period(msgspec.Struct, frozen=True):
    start: str | None = None
    duration: str | None = None
    randomizeStart: str | None = None  # the wire's name


class _Values(msgspec.Struct, frozen=True):
    type: str
    values: list[Any] | None = None


class _Interval(msgspec.Struct, frozen=True):
    payloads: list[_Values] | None = None
    intervalPeriod: _Period | None = None


class _Descriptor(msgspec.Struct, frozen=True):
    payloadType: str | None = None
    units: str | None = None
    currency: str | None = None


class _Program(msgspec.Struct, frozen=True):
    intervalPeriod: _Period | None = None
    payloadDescriptors: list[_Descriptor] | None = None


class _Event(msgspec.Struct, frozen=True):
    id: str
    createdDateTime: str | None = None
    modificationDateTime: str | None = None
    priority: int | None = None
    duration: str | None = None
    intervalPeriod: _Period | None = None
    payloadDescriptors: list[_Descriptor] | None = None
    intervals: list[_Interval] | None = None


class _Findings:
    """What is found while reading."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.problems: dict[str, None] = {}
        self.unused: set[str] = set()

    def problem(self, text: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems[text] = None


def read(objects: Iterable[Any], program: Any, now_s: float, draw: Callable[[str], float]) -> Signals:
    """What the events of a program say from now on.

    `program` gives defaults of periods and units. `draw` gives an event's id a number from -1 to 1, the same
    each time, for `randomizeStart`. Of an event that is there twice the one modified last counts.
    """
    found = _Findings()
    try:
        defaults = msgspec.convert(program, _Program)
    except (msgspec.ValidationError, RecursionError) as error:
        found.problem(f"the program makes no sense: {error}")
        defaults = _Program()
    for event in _newest(objects, found):
        try:
            _read_event(event, defaults, now_s, draw, found)
        except ValueError as error:
            found.problem(f"event {_short(event.id)}: {error}")
    spans = tuple(span for span in found.spans if span.end_s > now_s)
    return Signals(spans, tuple(found.problems), tuple(sorted(found.unused)))


def strongest(spans: Iterable[Span], least: Callable[[Span], float]) -> tuple[Span, ...]:
    """At each moment the span that counts, cut so that none overlap, by start.

    The lower priority counts; among equals, where the standard leaves it open, the one of the `least`.
    """
    ordered = sorted(spans, key=lambda span: (span.start_s, span.end_s, span.event_id, span.payload))
    moments = sorted({moment for span in ordered for moment in (span.start_s, span.end_s)})
    waiting: list[tuple[int, float, int]] = []
    found: list[tuple[int, Span]] = []
    row = 0
    for start_s, end_s in itertools.pairwise(moments):
        while row < len(ordered) and ordered[row].start_s <= start_s:
            heapq.heappush(waiting, (ordered[row].priority, least(ordered[row]), row))
            row += 1
        while waiting and ordered[waiting[0][2]].end_s <= start_s:
            heapq.heappop(waiting)
        if not waiting:
            continue
        number = waiting[0][2]
        if found and found[-1][0] == number and found[-1][1].end_s == start_s:
            found[-1] = (number, replace(found[-1][1], end_s=end_s))
        else:
            found.append((number, replace(ordered[number], start_s=start_s, end_s=end_s)))
    return tuple(span for _, span in found)


def duration_s(text: str) -> float:
    """Seconds of an ISO 8601 duration; a year has 365 days, a month 30. Inf for P9999Y.

    Raises:
        ValueError: It is none.
    """
    match = _DURATION.fullmatch(text) if len(text) <= TEXT_MAX else None
    parts = match.groups() if match else ()
    if not any(parts) or text.endswith("T"):
        raise ValueError(f"{_short(text)} is no duration such as PT15M")
    years = parts[0]
    if years and int(years) >= 9999:
        return math.inf
    return sum(float(part) * unit_s for part, unit_s in zip(parts, _UNITS_S, strict=True) if part)


def _newest(objects: Iterable[Any], found: _Findings) -> list[_Event]:
    """The events that are well formed, each once, by id."""
    known: dict[str, tuple[float, _Event]] = {}
    for number, one in enumerate(objects):
        if number >= EVENTS_MAX:
            found.problem(f"more than {EVENTS_MAX} events; the others are left out")
            break
        try:
            event = msgspec.convert(one, _Event)
            modified_s = _moment_s(event.modificationDateTime) if event.modificationDateTime else 0.0
        except (ValueError, RecursionError) as error:
            name = one.get("id") if isinstance(one, dict) else None
            found.problem(f"event {_short(str(name))} makes no sense: {_short(str(error))}")
            continue
        if event.id not in known or known[event.id][0] <= modified_s:
            known[event.id] = (modified_s, event)
    return [event for _, (_, event) in sorted(known.items())]


def _read_event(
    event: _Event, program: _Program, now_s: float, draw: Callable[[str], float], found: _Findings
) -> None:
    priority = PRIORITY_WEAKEST if event.priority is None else event.priority
    if not 0 <= priority <= PRIORITY_WEAKEST:
        raise ValueError(f"the priority {priority} must lie between 0 and {PRIORITY_WEAKEST}")
    units = {
        descriptor.payloadType: descriptor
        for descriptor in (*(program.payloadDescriptors or ()), *(event.payloadDescriptors or ()))
    }
    seen: dict[int, list[tuple[Payload, list[float]]]] = {}
    rows = _rows(event, program, now_s, draw)
    for count, (start_s, end_s, interval) in enumerate(rows):
        if count == ROWS_MAX:
            found.problem(f"event {_short(event.id)}: only its nearest {ROWS_MAX} intervals are taken")
            break
        if id(interval) not in seen:
            seen[id(interval)] = _payloads(event, interval, units, found)
        for payload, values in seen[id(interval)]:
            step_s = (end_s - start_s) / len(values)
            for number, value in enumerate(values):
                begins_s = start_s + number * step_s
                ends_s = end_s if number + 1 == len(values) else begins_s + step_s
                if begins_s < ends_s:
                    found.spans.append(Span(event.id, payload, priority, begins_s, ends_s, value))


def _rows(
    event: _Event, program: _Program, now_s: float, draw: Callable[[str], float]
) -> Iterator[tuple[float, float, _Interval]]:
    """Start, end and interval of all that is not over, repetitions too."""
    period = event.intervalPeriod or program.intervalPeriod or _Period()
    shift_s = draw(event.id) * duration_s(period.randomizeStart) if period.randomizeStart else 0.0
    if not math.isfinite(shift_s):
        raise ValueError("randomizeStart has no end")
    lasts_s = _lasts_s(period.duration) if period.duration else math.inf
    now_of_event_s = _now_of(event, now_s)
    cursor_s = _start_s(period.start, now_of_event_s)
    if cursor_s is None:
        cursor_s = now_of_event_s
    once: list[tuple[float, float, _Interval]] = []
    for interval in event.intervals or ():
        own = interval.intervalPeriod or _Period()
        start_s = _start_s(own.start, now_of_event_s)
        begins_s = cursor_s if start_s is None else start_s
        cursor_s = begins_s + (_lasts_s(own.duration) if own.duration else lasts_s)
        once.append((begins_s, cursor_s, interval))
    if not once:
        raise ValueError("it has no intervals")
    first_s = min(begins_s for begins_s, _, _ in once)
    length_s = max(ends_s for _, ends_s, _ in once) - first_s
    whole_s = _lasts_s(event.duration) if event.duration else length_s
    limit_s = min(first_s + whole_s, FOREVER_S - shift_s)
    passed = (now_s - shift_s - first_s) / length_s
    for turn in itertools.count(max(0, math.floor(passed)) if math.isfinite(passed) else 0):
        ahead_s = turn * length_s if turn else 0.0
        if first_s + ahead_s >= limit_s:
            return
        for begins_s, ends_s, interval in once:
            start_s, end_s = begins_s + ahead_s + shift_s, min(ends_s + ahead_s, limit_s) + shift_s
            if start_s < end_s and end_s > now_s:
                yield start_s, end_s, interval


def _payloads(
    event: _Event, interval: _Interval, units: dict[str | None, _Descriptor], found: _Findings
) -> list[tuple[Payload, list[float]]]:
    """The payloads of an interval that can be used, in our units."""
    usable = []
    for one in interval.payloads or ():
        try:
            payload = Payload(one.type)
        except ValueError:
            if len(found.unused) < PROBLEMS_MAX:
                found.unused.add(_short(one.type))
            continue
        try:
            usable.append((payload, _values(payload, one.values or [], units.get(one.type))))
        except ValueError as error:
            found.problem(f"event {_short(event.id)}: {payload}: {error}")
    return usable


def _values(payload: Payload, values: list[Any], descriptor: _Descriptor | None) -> list[float]:
    if payload in ALERTS:
        return [0.0]
    if not 0 < len(values) <= VALUES_MAX:
        raise ValueError(f"has {len(values)} values; it must have 1 to {VALUES_MAX}")
    factor = 1.0 if payload in _LEVELS else _factor(payload, descriptor)
    return [_value(payload, value, factor) for value in values]


def _value(payload: Payload, value: Any, factor: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > WATTS_MAX:
        raise ValueError(f"{_short(str(value))} is no number that makes sense")
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number that makes sense")
    if payload in _LEVELS:
        low, high = _LEVELS[payload]
        if not low <= value <= high or (payload in _WHOLE and value != int(value)):
            raise ValueError(f"{value:g} is no level from {low:g} to {high:g}")
        return float(value)
    if value < 0 and payload not in (Payload.PRICE, Payload.DISPATCH_SETPOINT_RELATIVE):
        raise ValueError(f"{value:g} is below zero")
    return float(value) * factor


def _factor(payload: Payload, descriptor: _Descriptor | None) -> float:
    """What makes our unit of the payload's."""
    known = _PER_KWH if payload is Payload.PRICE else _WATTS
    units = (descriptor.units if descriptor else None) or ""
    if units.upper() not in known:
        said = f"the units are {_short(units)}" if units else "no payloadDescriptor names its units"
        raise ValueError(f"{said}; {', '.join(known)} are understood")
    if payload is Payload.PRICE:
        assert descriptor is not None
        if (descriptor.currency or "").upper() != "USD":
            raise ValueError(
                f"the currency is {_short(descriptor.currency or 'not named')}; prices are in USD"
            )
    return known[units.upper()]


def _lasts_s(text: str) -> float:
    """How long an interval or an event lasts."""
    seconds = duration_s(text)
    if seconds < INTERVAL_S_MIN:
        raise ValueError(f"the duration {_short(text)} is less than {INTERVAL_S_MIN:g} s")
    return seconds


def _now_of(event: _Event, now_s: float) -> float:
    """What "now" means in an event: when it was last modified, so that it means the same in each poll."""
    stamp = event.modificationDateTime or event.createdDateTime
    return _moment_s(stamp) if stamp else now_s


def _start_s(text: str | None, now_of_event_s: float) -> float | None:
    if not text:
        return None
    return now_of_event_s if text.startswith("0001-01-01") else _moment_s(text)


def _moment_s(text: str) -> float:
    """Unix seconds of an RFC 3339 time."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(f"{_short(text)} is no time such as 2026-01-31T12:00:00Z")
    try:
        return moment.timestamp()
    except (OverflowError, ValueError):
        raise ValueError(f"{_short(text)} lies outside the calendar") from None


def _short(text: str) -> str:
    """A text of somebody else, printable and cut."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= TEXT_MAX else clean[:TEXT_MAX] + "..."
