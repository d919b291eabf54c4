"""The site's energy, cost and time above the budget, against sums over many small steps."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulation.boards import SETTLING_S
from scheduler.simulation.inputs import EventRow, PriceRow
from scheduler.simulation.site import OVER_BUDGET_TOLERANCE_W, Site, Steps, budget_steps, price_steps

STEP_S = 0.01


def event(name: str, start_s: float, end_s: float, watts: float) -> EventRow:
    return EventRow(name, start_s, end_s, watts, 0.0, False)


def test_the_tightest_of_overlapping_events_is_the_budget() -> None:
    events = [event("a", 10, 100, 500.0), event("b", 20, 60, 300.0), event("c", 50, 80, 400.0)]
    steps = budget_steps(events, configured_w=900.0)
    moments = (0, 10, 19.9, 20, 55, 60, 79.9, 80, 99.9, 100)
    found = [steps.at(moment) for moment in moments]
    assert found == [900, 500, 500, 300, 300, 400, 400, 500, 500, 900]
    assert budget_steps([]).at(5.0) == math.inf


def test_before_the_first_price_energy_has_none() -> None:
    site = Site(price_steps([PriceRow(10.0, 100.0, 10.0), PriceRow(20.0, -50.0, 20.0)]), budget_steps([]))
    site.settled(3_600.0)
    site.advance(30.0)
    assert site.energy_j == pytest.approx(108_000.0)
    assert site.unpriced_j == pytest.approx(36_000.0)
    assert site.cost_usd == pytest.approx(36_000.0 / 3.6e9 * (100.0 - 50.0))


def test_a_shed_takes_until_the_draw_is_inside_the_events_watts() -> None:
    site = Site(Steps(), budget_steps([event("a", 10, 100, 500.0)]), (event("a", 10, 100, 500.0),))
    site.settled(1_000.0)
    site.change(-600.0, 12.0)  # from 1000 W towards 400 W
    site.advance(200.0)
    falls_s = SETTLING_S * math.log(600.0 / (100.0 + OVER_BUDGET_TOLERANCE_W))
    assert site.over_budget_s == pytest.approx(2.0 + falls_s)
    assert site.shed_s == pytest.approx(2.0 + falls_s)


def test_a_shed_that_is_never_met_lasts_as_long_as_its_event() -> None:
    events = (event("a", 10, 100, 500.0), event("b", 50, 70, 1_200.0), event("c", 500, 600, 1.0))
    site = Site(Steps(), budget_steps(events), events)
    site.settled(1_000.0)
    site.advance(200.0)
    assert (site.over_budget_s, site.shed_s) == (90.0, 90.0)


def test_base_and_overhead_count_at_the_meter() -> None:
    site = Site(Steps(), budget_steps([], 1_400.0), base_w=200.0, pue=1.2)
    site.settled(1_000.0)
    site.advance(10.0)
    assert (site.target_w, site.draw_w, site.over_budget_s) == (1_440.0, 1_440.0, 10.0)
    assert site.energy_j == pytest.approx(14_400.0)


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(st.floats(0.05, 3.0), st.integers(-900, 900)), min_size=1, max_size=8),
    budget_w=st.integers(200, 1_800),
    prices=st.lists(st.integers(-100, 300), min_size=1, max_size=4),
)
def test_closed_forms_agree_with_small_steps(
    changes: list[tuple[float, int]], budget_w: int, prices: list[int]
) -> None:
    rows = [PriceRow(float(n), float(price), float(n)) for n, price in enumerate(prices)]
    site = Site(price_steps(rows), budget_steps([], float(budget_w)))
    site.settled(1_000.0)
    at_s, target_w, plan = 0.0, 1_000.0, []
    for wait_s, by_w in changes:
        at_s += wait_s
        by_w = max(by_w, -int(target_w))
        site.change(float(by_w), at_s)
        target_w += by_w
        plan.append((at_s, target_w))
    end_s = at_s + 2.0
    site.advance(end_s)
    energy_j = cost_usd = over_s = 0.0
    draw_w, goal_w = 1_000.0, 1_000.0
    for step in range(round(end_s / STEP_S)):
        now_s = (step + 0.5) * STEP_S
        goal_w = next((watts for moment, watts in reversed(plan) if moment <= now_s), 1_000.0)
        draw_w = goal_w + (draw_w - goal_w) * math.exp(-STEP_S / SETTLING_S)
        energy_j += draw_w * STEP_S
        cost_usd += draw_w * STEP_S / 3.6e9 * prices[min(len(prices) - 1, int(now_s))]
        over_s += STEP_S * (draw_w > budget_w + OVER_BUDGET_TOLERANCE_W)
    assert site.energy_j == pytest.approx(energy_j, rel=0.02)
    assert site.cost_usd == pytest.approx(cost_usd, rel=0.03, abs=1e-7 * 300)
    assert site.over_budget_s == pytest.approx(over_s, abs=0.05 * (len(changes) + 1))
