"""Any JSON is events or a named problem, and at each moment the strongest signal counts."""

import itertools
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.openadr import PRIORITY_WEAKEST, ROWS_MAX, Payload, Signals, Span, read, strongest
from scheduler.model.openadr_terms import TERMS_MAX, TermsKind, wanted
from scheduler.model.settings import OpenAdrConfig

NOW_S = 1_767_225_600.0  # 2026-01-01
LEAST_W = 100.0
CONFIG = OpenAdrConfig(normal_w=5000.0, simple_moderate_w=4000.0, simple_high_w=3000.0)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TIMES = st.sampled_from(
    ["2026-01-01T00:00:00Z", "2025-12-31T23:30:00Z", "2026-01-01T06:00:00+05:30", "0001-01-01T00:00:00Z",
     "9999-12-31T23:59:59Z", "1900-01-01T00:00:00Z", "never"]
)  # fmt: skip
DURATIONS = st.sampled_from(["PT1S", "PT15M", "PT1H", "P1D", "P9999Y", "PT0S", "PT0.001S", "P1M", "x"])
VALUES = st.sampled_from([0, 1, 2, 3, -1, 5, 0.5, -0.5, 1e3, 1e12, "text"])
PERIODS = st.fixed_dictionaries(
    {}, optional={"start": TIMES, "duration": DURATIONS, "randomizeStart": DURATIONS}
)
TYPES = st.sampled_from([*Payload, "GHG", "PRIVATE"])
PAYLOADS = st.fixed_dictionaries({"type": TYPES, "values": st.lists(VALUES, max_size=3)})
INTERVALS = st.fixed_dictionaries(
    {"payloads": st.lists(PAYLOADS, max_size=3)}, optional={"intervalPeriod": PERIODS}
)
DESCRIPTORS = [
    {"payloadType": one, "units": "KWH" if one == "PRICE" else "KW", "currency": "USD"} for one in Payload
]
EVENTS = st.fixed_dictionaries(
    {"id": st.sampled_from(["a", "b", "c"]), "intervals": st.lists(INTERVALS, max_size=4)},
    optional={
        "intervalPeriod": PERIODS,
        "duration": DURATIONS,
        "priority": st.integers(-1, 5),
        "payloadDescriptors": st.just(DESCRIPTORS),
        "modificationDateTime": TIMES,
    },
)


@st.composite
def spoiled(draw: st.DrawFn) -> Any:
    """An event of which one field is anything."""
    event = dict(draw(EVENTS))
    event[draw(st.sampled_from(sorted({*event, "priority", "intervals"})))] = draw(JSON)
    return event


@given(st.lists(EVENTS | spoiled() | JSON, max_size=3), JSON, st.floats(-1, 1))
def test_any_json_is_events_or_a_named_problem(objects: list[Any], program: Any, drawn: float) -> None:
    signals = read(objects, program, NOW_S, lambda _: drawn)
    for span in signals.spans:
        assert all(map(math.isfinite, (span.start_s, span.end_s, span.value)))
        assert max(span.start_s, NOW_S) < span.end_s
    assert len(signals.spans) <= 3 * ROWS_MAX * 9
    found = wanted(signals, CONFIG, LEAST_W, 2000.0, NOW_S)
    assert len(found.terms) <= TERMS_MAX
    for terms in found.terms:
        assert LEAST_W <= terms.budget_w <= 1e9
        assert terms.start_s < terms.end_s
    for kind in set(TermsKind) - {TermsKind.ALERT}:
        alike = sorted((t.start_s, t.end_s) for t in found.terms if t.kind is kind)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(alike))
    understood = {span.event_id for span in signals.spans}
    ids = [one.get("id") if isinstance(one, dict) else None for one in objects]
    if any(not isinstance(name, str) for name in ids):
        assert signals.problems
    assert all(name in ids for name in understood)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 6), st.integers(0, 4)),
        max_size=8,
    )
)
def test_at_each_moment_the_strongest_counts(rows: list[tuple[int, int, int, int]]) -> None:
    spans = [
        Span(f"e{n}", Payload.IMPORT_CAPACITY_LIMIT, priority, start, start + lasts, value)
        for n, (priority, start, lasts, value) in enumerate(rows)
    ]
    cut = strongest(spans, lambda span: span.value)
    for half in range(40):
        moment = half / 2
        there = [(s.priority, s.value) for s in spans if s.start_s <= moment < s.end_s]
        found = [(s.priority, s.value) for s in cut if s.start_s <= moment < s.end_s]
        assert found == ([min(there)] if there else [])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 9)), max_size=5),
    st.integers(1, 9),
)
def test_the_site_is_never_without_limit_or_subscription(
    rows: list[tuple[int, int, int]], level: int
) -> None:
    """The fail-safe rule: whenever no limit is in force, also after the last, the subscription is."""
    spans = tuple(
        Span(
            f"e{n}",
            Payload.IMPORT_CAPACITY_LIMIT,
            PRIORITY_WEAKEST,
            NOW_S + start,
            NOW_S + start + lasts,
            w * 1e3,
        )
        for n, (start, lasts, w) in enumerate(rows)
    )
    found = wanted(Signals(spans), CONFIG, LEAST_W, level * 1e3, NOW_S)
    for half in range(40):
        moment = NOW_S + half / 2
        limits = [s.value for s in spans if s.start_s <= moment < s.end_s]
        held = [t.budget_w for t in found.terms if t.start_s <= moment < t.end_s]
        assert min(held) == (min(limits) if limits else level * 1e3)
