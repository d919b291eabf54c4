"""OpenADR 3.1 events as values: what JSON says when, and which grid events and prices follow."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from scheduler.model.openadr import (
    EVENTS_MAX,
    FOREVER_S,
    PRIORITY_WEAKEST,
    ROWS_MAX,
    Payload,
    Signals,
    Span,
    duration_s,
    read,
    strongest,
)
from scheduler.model.openadr_terms import TERMS_MAX, Terms, TermsKind, Wanted, wanted
from scheduler.model.prices import PricePoint
from scheduler.model.settings import OpenAdrConfig

NOW_S = 1_700_000_000.0
HOUR_S = 3600.0
LEAST_W = 100.0
CONFIG = OpenAdrConfig(normal_w=10_000.0, simple_moderate_w=8000.0, simple_high_w=6000.0)
PROGRAM = {"id": "p0", "programName": "dr"}


def at(seconds: float) -> str:
    return datetime.fromtimestamp(NOW_S + seconds, UTC).isoformat()


def event(*intervals: Any, name: str = "e", units: str = "KW", **fields: Any) -> dict[str, Any]:
    """An event that starts now, with intervals of an hour; of an interval only its payload is given."""
    rows = [{"id": n, **(one if isinstance(one, dict) else payload(*one))} for n, one in enumerate(intervals)]
    types = {p["type"] for row in rows for p in row["payloads"]}
    return {
        "id": name,
        "programID": "p0",
        "modificationDateTime": at(-60),
        "intervalPeriod": {"start": at(0), "duration": "PT1H"},
        "payloadDescriptors": [{"payloadType": t, "units": units, "currency": "USD"} for t in types],
        "intervals": rows,
        **fields,
    }


def payload(kind: str, *values: Any) -> dict[str, Any]:
    return {"payloads": [{"type": kind, "values": list(values)}]}


def signals(*events: Any, now_s: float = NOW_S, draw: Callable[[str], float] = lambda _: 0.0) -> Signals:
    return read(events, PROGRAM, now_s, draw)


def hours(found: Signals) -> list[tuple[float, float, float]]:
    """Start and end in hours from now, and value."""
    return [((s.start_s - NOW_S) / HOUR_S, (s.end_s - NOW_S) / HOUR_S, s.value) for s in found.spans]


def problem(*events: Any) -> str:
    (text,) = signals(*events).problems
    return text


def follows(*events: Any, fallback_w: float | None = None, config: OpenAdrConfig = CONFIG) -> Wanted:
    return wanted(signals(*events), config, LEAST_W, fallback_w, NOW_S)


def terms(*events: Any, **fields: Any) -> list[tuple[str, float, float, float, bool]]:
    """Kind, start and end in hours from now, watts, emergency; nothing may be wrong."""
    found = follows(*events, **fields)
    assert found.problems == ()
    return [row(t) for t in found.terms]


def row(t: Terms) -> tuple[str, float, float, float, bool]:
    end_h = math.inf if t.end_s == FOREVER_S else (t.end_s - NOW_S) / HOUR_S
    start_h = (t.start_s - NOW_S) / HOUR_S if t.start_s else -math.inf
    return t.kind.value, start_h, end_h, t.budget_w, t.emergency


# Time --------------------------------------------------------------------------------------------


def test_an_interval_without_its_own_period_follows_the_one_before() -> None:
    own = {"intervalPeriod": {"start": at(5 * HOUR_S), "duration": "PT30M"}, **payload("SIMPLE", 2)}
    assert hours(signals(event(("SIMPLE", 1), own, ("SIMPLE", 3)))) == [(0, 1, 1), (5, 5.5, 2), (5.5, 6.5, 3)]


@pytest.mark.parametrize(
    ("duration", "wanted_hours"),
    [
        ("PT90M", [(0, 1, 1), (1, 1.5, 2)]),
        ("PT5H", [(0, 1, 1), (1, 2, 2), (2, 3, 1), (3, 4, 2), (4, 5, 1)]),
    ],
)
def test_the_duration_of_an_event_shortens_or_repeats_its_intervals(
    duration: str, wanted_hours: list[tuple[float, float, float]]
) -> None:
    assert hours(signals(event(("SIMPLE", 1), ("SIMPLE", 2), duration=duration))) == wanted_hours


def test_an_event_that_repeats_for_ever_is_taken_from_now_on_as_far_as_there_is_room() -> None:
    found = signals(event(("SIMPLE", 1), ("SIMPLE", 2), duration="P9999Y"), now_s=NOW_S + 1000.5 * HOUR_S)
    assert hours(found)[:2] == [(1000, 1001, 1), (1001, 1002, 2)]
    assert len(found.spans) == ROWS_MAX
    assert found.problems == (f"event e: only its nearest {ROWS_MAX} intervals are taken",)


def test_an_interval_without_end_lasts_until_it_is_withdrawn() -> None:
    period = {"start": at(0), "duration": "P9999Y"}
    assert signals(event(("SIMPLE", 1), intervalPeriod=period)).spans[0].end_s == FOREVER_S
    assert signals(event(("SIMPLE", 1), intervalPeriod={"start": at(0)})).spans[0].end_s == FOREVER_S


@pytest.mark.parametrize(("drawn", "shift_h"), [(1.0, 0.25), (-0.5, -0.125), (0.0, 0.0)])
def test_one_draw_shifts_all_starts(drawn: float, shift_h: float) -> None:
    period = {"start": at(HOUR_S), "duration": "PT1H", "randomizeStart": "PT15M"}
    found = signals(event(("SIMPLE", 1), ("SIMPLE", 2), intervalPeriod=period), draw=lambda _: drawn)
    assert hours(found) == [(1 + shift_h, 2 + shift_h, 1), (2 + shift_h, 3 + shift_h, 2)]


def test_now_means_when_the_event_was_modified_and_the_same_in_each_poll() -> None:
    one = event(("SIMPLE", 1), intervalPeriod={"start": "0001-01-01T00:00:00Z", "duration": "PT1H"})
    assert {signals(one, now_s=NOW_S + later).spans[0].start_s for later in (0, 99, 999)} == {NOW_S - 60}


def test_several_values_split_their_interval_evenly_and_what_is_over_is_left_out() -> None:
    found = signals(event(("PRICE", 0.1, 0.2, 0.3, 0.4), units="KWH"), now_s=NOW_S + 0.25 * HOUR_S)
    assert hours(found) == [(0.25, 0.5, 0.2), (0.5, 0.75, 0.3), (0.75, 1.0, 0.4)]


def test_the_program_gives_the_period_and_the_units_that_an_event_does_not() -> None:
    bare = {"id": "e", "intervals": [payload("IMPORT_CAPACITY_LIMIT", 3)]}
    program = {
        "intervalPeriod": {"start": at(0), "duration": "PT2H"},
        "payloadDescriptors": [{"payloadType": "IMPORT_CAPACITY_LIMIT", "units": "KW"}],
    }
    (span,) = read([bare], program, NOW_S, lambda _: 0.0).spans
    assert (span.end_s - span.start_s, span.value) == (2 * HOUR_S, 3000.0)


def test_of_an_event_that_is_there_twice_the_one_modified_last_counts() -> None:
    old, new = event(("SIMPLE", 1)), event(("SIMPLE", 2), modificationDateTime=at(-5))
    assert hours(signals(old, new)) == hours(signals(new, old)) == [(0, 1, 2)]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("PT15M", 900),
        ("P1DT1H", 90_000),
        ("P1W", 604_800),
        ("PT0.5S", 0.5),
        ("P9999Y", math.inf),
        ("PT0S", 0),
    ],
)
def test_durations_are_iso_8601(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "P", "PT", "15M", "-PT5M", "PT5X", "P1DT", "PT" + "9" * 200 + "S", "PT٣M"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        duration_s(text)


# What is not understood --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (event(("IMPORT_CAPACITY_LIMIT", 3), payloadDescriptors=[]), "no payloadDescriptor names its units"),
        (event(("IMPORT_CAPACITY_LIMIT", 3), units="KVA"), "the units are KVA; W, KW, MW are understood"),
        (event(("IMPORT_CAPACITY_LIMIT", -3)), "below zero"),
        (event(("IMPORT_CAPACITY_LIMIT", "3")), "no number"),
        (event(("IMPORT_CAPACITY_LIMIT", True)), "no number"),
        (event(("IMPORT_CAPACITY_LIMIT", math.nan)), "no number"),
        (event(("IMPORT_CAPACITY_LIMIT",)), "has 0 values"),
        (event(("SIMPLE", 4)), "no level from 0 to 3"),
        (event(("SIMPLE", 1.5)), "no level"),
        (event(("CONTROL_LEVEL_OFFSET_PERCENT", -2)), "no level from -1 to 1"),
        (
            event(
                ("PRICE", 0.1),
                payloadDescriptors=[{"payloadType": "PRICE", "units": "KWH", "currency": "EUR"}],
            ),
            "the currency is EUR",
        ),
        (event(("SIMPLE", 1), intervalPeriod={"start": "tomorrow"}), "tomorrow is no time"),
        (event(("SIMPLE", 1), intervalPeriod={"start": "2026-01-01T00:00:00"}), "is no time"),
        (event(("SIMPLE", 1), duration="PT0.1S"), "less than 1 s"),
        (event(("SIMPLE", 1), priority=-1), "the priority -1"),
        (event(), "it has no intervals"),
        ({"id": 7}, "event 7 makes no sense"),
        ("event", "event None makes no sense"),
    ],
)
def test_what_can_not_be_understood_is_named(wrong: Any, words: str) -> None:
    assert words in problem(wrong)
    assert signals(wrong).spans == ()


def test_one_bad_event_costs_the_others_nothing() -> None:
    found = signals(event(("SIMPLE", 9), name="bad"), event(("SIMPLE", 1), name="good"), None)
    assert [span.event_id for span in found.spans] == ["good"]
    assert len(found.problems) == 2


def test_payloads_that_nothing_is_done_about_are_named_once() -> None:
    found = signals(event(("GHG", 300), ("GHG", 200), ("ALERT_FIRE", "smoke"), ("SIMPLE", 1)))
    assert (found.unused, len(found.spans), found.problems) == (("ALERT_FIRE", "GHG"), 1, ())


def test_there_are_no_more_events_than_are_read() -> None:
    found = signals(*(event(("SIMPLE", 1), name=f"e{n}") for n in range(EVENTS_MAX + 1)))
    assert len(found.spans) == EVENTS_MAX
    assert found.problems == (f"more than {EVENTS_MAX} events; the others are left out",)


# Priority ----------------------------------------------------------------------------------------


def test_the_lower_priority_wins_and_among_equals_the_tighter() -> None:
    def span(name: str, priority: int, start_s: float, end_s: float, value: float) -> Span:
        return Span(name, Payload.IMPORT_CAPACITY_LIMIT, priority, start_s, end_s, value)

    spans = [span("weak", 5, 0, 10, 1), span("strong", 0, 2, 4, 9), span("as strong", 0, 3, 6, 8)]
    found = strongest(spans, lambda s: s.value)
    assert [(s.event_id, s.start_s, s.end_s) for s in found] == [
        ("weak", 0, 2),
        ("strong", 2, 3),
        ("as strong", 3, 6),
        ("weak", 6, 10),
    ]


def test_an_event_without_a_priority_is_the_weakest() -> None:
    assert signals(event(("SIMPLE", 1))).spans[0].priority == PRIORITY_WEAKEST
    strong, weak = event(("SIMPLE", 1), name="a", priority=99), event(("SIMPLE", 2), name="b")
    assert terms(strong, weak) == [("dispatch", 0, 1, 8000.0, False)]


def test_normal_operation_by_a_stronger_event_ends_what_a_weaker_one_asks() -> None:
    assert terms(event(("SIMPLE", 0), name="a", priority=0), event(("SIMPLE", 2), name="b", priority=1)) == []


def test_prices_limits_and_dispatches_overlap_without_conflict() -> None:
    found = follows(
        event(("PRICE", 0.25), name="p", units="KWH", priority=0),
        event(("IMPORT_CAPACITY_LIMIT", 9), name="l", priority=1),
        event(("SIMPLE", 2), name="s", priority=2),
    )
    assert {(t.kind, t.budget_w) for t in found.terms} == {
        (TermsKind.LIMIT, 9000.0),
        (TermsKind.DISPATCH, 6000.0),
    }
    assert found.prices == (PricePoint(NOW_S, 0.25, NOW_S + HOUR_S),)


# What follows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "units", "expected"),
    [
        ("SIMPLE", 0, "", []),
        ("SIMPLE", 1, "", [("dispatch", 0, 1, 8000.0, False)]),
        ("SIMPLE", 2, "", [("dispatch", 0, 1, 6000.0, False)]),
        ("SIMPLE", 3, "", [("dispatch", 0, 1, LEAST_W, True)]),
        ("IMPORT_CAPACITY_LIMIT", 3, "KW", [("limit", 0, 1, 3000.0, False)]),
        ("IMPORT_CAPACITY_LIMIT", 0.5, "MW", [("limit", 0, 1, 500_000.0, False)]),
        ("IMPORT_CAPACITY_LIMIT", 0, "W", [("limit", 0, 1, LEAST_W, False)]),
        ("IMPORT_CAPACITY_SUBSCRIPTION", 5, "KW", [("subscription", 0, 1, 5000.0, False)]),
        ("DISPATCH_SETPOINT", 4, "KW", [("dispatch", 0, 1, 4000.0, False)]),
        ("DISPATCH_SETPOINT_RELATIVE", -4, "KW", [("dispatch", 0, 1, 6000.0, False)]),
        ("DISPATCH_SETPOINT_RELATIVE", 4, "KW", []),
        ("CONTROL_LEVEL_OFFSET", 3, "", [("dispatch", 0, 1, 7000.0, False)]),
        ("CONTROL_LEVEL_OFFSET", -3, "", []),
        ("CONTROL_LEVEL_OFFSET_PERCENT", -0.25, "PERCENT", [("dispatch", 0, 1, 7500.0, False)]),
        ("CONTROL_LEVEL_OFFSET_PERCENT", 0.25, "PERCENT", []),
        ("ALERT_GRID_EMERGENCY", "shed now", "", [("alert", 0, 1, LEAST_W, True)]),
        ("ALERT_BLACK_START", "minimum", "", [("alert", 0, 1, LEAST_W, True)]),
    ],
)
def test_each_payload_becomes_a_grid_event(kind: str, value: Any, units: str, expected: list[Any]) -> None:
    assert terms(event((kind, value), units=units)) == expected


def test_the_watts_of_an_emergency_may_be_declared_but_a_black_start_means_the_minimum() -> None:
    config = OpenAdrConfig(simple_emergency_w=2000.0)
    for kind, value, watts in (
        ("SIMPLE", 3, 2000.0),
        ("ALERT_GRID_EMERGENCY", "now", 2000.0),
        ("ALERT_BLACK_START", "now", LEAST_W),
    ):
        ((_, _, _, found_w, emergency),) = terms(event((kind, value)), config=config)
        assert (found_w, emergency) == (watts, True)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("SIMPLE", 1, "SIMPLE 1 means nothing here yet: set [openadr] simple_moderate_w"),
        ("CONTROL_LEVEL_OFFSET", 1, "CONTROL_LEVEL_OFFSET means nothing here yet: set [openadr] normal_w"),
        ("DISPATCH_SETPOINT_RELATIVE", -1, "set [openadr] normal_w"),
    ],
)
def test_a_level_without_declared_watts_is_named(kind: str, value: int, words: str) -> None:
    found = follows(event((kind, value)), config=OpenAdrConfig())
    assert found.terms == ()
    assert words in found.problems[0]


def test_where_no_limit_is_in_force_the_subscription_is() -> None:
    limits = event(("IMPORT_CAPACITY_LIMIT", 8), ("IMPORT_CAPACITY_LIMIT", 3))
    assert terms(limits, fallback_w=5000.0) == [
        ("subscription", 1, math.inf, 5000.0, False),
        ("limit", 0, 1, 8000.0, False),
        ("limit", 1, 2, 3000.0, False),
    ]


def test_a_reservation_adds_to_the_subscription_that_the_vtn_names() -> None:
    period = {"start": at(-HOUR_S), "duration": "P9999Y"}
    subscribed = event(("IMPORT_CAPACITY_SUBSCRIPTION", 4), name="s", intervalPeriod=period)
    reserved = event(("IMPORT_CAPACITY_RESERVATION", 2), name="r")
    assert terms(subscribed, reserved, fallback_w=5000.0) == [
        ("subscription", 0, 1, 6000.0, False),
        ("subscription", 1, math.inf, 4000.0, False),
    ]


def test_the_dearer_of_equal_prices_counts_and_a_wrong_unit_is_left_out() -> None:
    found = follows(event(("PRICE", 0.1), units="KWH"), event(("PRICE", 200), name="f", units="MWH"))
    assert [p.usd_per_kwh for p in found.prices] == [0.2]
    assert "wrong unit" in follows(event(("PRICE", 5000), units="KWH")).problems[0]


def test_the_nearest_intervals_and_the_subscription_are_taken_where_there_are_too_many() -> None:
    many = event(*(("IMPORT_CAPACITY_LIMIT", 1 + n % 2) for n in range(200)))
    found = follows(many, fallback_w=5000.0)
    assert len(found.terms) == TERMS_MAX
    assert row(found.terms[0]) == ("subscription", -math.inf, math.inf, 5000.0, False)
    assert [t.start_s for t in found.terms[1:]] == sorted(t.start_s for t in found.terms[1:])
    assert found.problems == (f"only the nearest {TERMS_MAX} of 201 intervals are taken",)
