"""The benchmark of the price gate: its optimum is the optimum, and the gate stays near it."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.mining_gate import INTERVAL_S, gated, optimum, shares

PRICES = st.lists(st.sampled_from([-20.0, 10.0, 55.0, 61.0, 64.0, 70.0, 300.0]), min_size=1, max_size=9)


def earned(prices: list[float], runs: tuple[bool, ...], break_even: float, restart_s: float) -> float:
    was, total = False, 0.0
    for price, on in zip(prices, runs, strict=True):
        total += (
            on * (break_even - price) * INTERVAL_S / 3600 - (on and not was) * break_even * restart_s / 3600
        )
        was = on
    return total


@given(PRICES, st.sampled_from([0.0, 300.0, 900.0]))
def test_no_way_to_run_earns_more_than_the_optimum(prices: list[float], restart_s: float) -> None:
    best = max(
        earned(prices, runs, 60.0, restart_s) for runs in itertools.product((False, True), repeat=len(prices))
    )
    assert abs(optimum(prices, 60.0, restart_s) - best) < 1e-9
    assert gated(prices, prices, 60.0, restart_s) <= best + 1e-6


def test_the_gate_rides_out_a_peak_that_costs_less_than_a_restart() -> None:
    prices = [20.0] * 8 + [64.0] * 2 + [20.0] * 8 + [300.0] * 4 + [20.0] * 8
    known, old = shares(prices, 60.0, 300.0)
    assert known == 1.0
    assert old < 1.0  # late by an interval at each edge
