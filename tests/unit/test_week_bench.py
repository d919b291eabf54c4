"""An hour of the benchmark's week: the draw is not above the budget for longer than the bar."""

import pytest

from tests.benchmarks.week import BAR_S, DAY_S, INTERVAL_S, Week, figures, played

HOUR_S = 3600.0
# Below and above what mining is worth.
PRICES = [40.0, 150.0, -10.0, 60.0]
OFTEN_S = (180.0, 600.0)


def test_in_an_hour_full_of_events_the_draw_is_never_above_the_budget_for_long() -> None:
    assert len(PRICES) * INTERVAL_S == HOUR_S
    found = played(4, HOUR_S / DAY_S, PRICES, OFTEN_S)
    assert found.asked["jobs"] > 5
    assert found.asked["event"] + found.asked["emergency"] > 5
    assert found.spans[0.0], "budgets fell"
    told = figures(found)
    assert told["above_by_0.0%"]["longest_s"] <= BAR_S, told["worst"]


def test_a_budget_that_is_not_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Week, "_budget_w", lambda self: (1000.0, 0.0, "nobody"))
    found = played(2, 120.0 / DAY_S, PRICES)
    (span,) = found.spans[0.0]
    assert span.for_s > 100.0, "it is not over yet, and counts"
