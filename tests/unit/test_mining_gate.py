"""The benchmark of the price gate: its optimum is the optimum, and the gate stays near it."""

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.actions import RequeueJob, StartJob
from scheduler.model.policy import Policy
from scheduler.model.power import UNLIMITED_W, Curve
from scheduler.model.snapshot import UNKNOWN
from scheduler.planning.economics import operating_point
from scheduler.planning.planner import plan
from tests.benchmarks.mining_gate import (
    INTERVAL_S,
    NATURAL_W,
    gated,
    lowered,
    lowered_gain,
    lowered_optimum,
    optimum,
    shares,
)
from tests.fakes import power as watts
from tests.fakes.power import B, P
from tests.fakes.worlds import MINING, NOW_US, PENDING, RUNNING, SECOND_US, J, W, gpus

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


CURVE = Curve(((1000, 1000), (881, 967), (660, 830)))


@given(PRICES, st.sampled_from([0.0, 300.0]))
def test_with_limits_no_way_to_run_earns_more_than_the_optimum_and_none_less_than_full(
    prices: list[float], restart_s: float
) -> None:
    hours, loss = INTERVAL_S / 3600, 60.0 * restart_s / 3600
    best = 0.0
    for states in itertools.product((None, *CURVE.points), repeat=min(5, len(prices))):
        was, total = None, 0.0
        for price, point in zip(prices, states, strict=False):
            if point is not None:
                total += hours * (60.0 * point[1] - price * point[0]) / 1000 - (loss if was is None else 0.0)
            was = point
        best = max(best, total)
    few = prices[:5]
    assert abs(lowered_optimum(few, 60.0, restart_s, CURVE) - best) < 1e-9
    # Energy and value are in whole micro-USD, limits in whole watts.
    assert lowered(few, few, 60.0, restart_s, CURVE) <= best + 1e-3
    assert lowered_optimum(few, 60.0, restart_s, CURVE) >= optimum(few, 60.0, restart_s)


def planned(prices: list[float], break_even: float, restart_s: float) -> float:
    """What the planner earns: one plan an interval, carried out at once, limits too."""
    gross = round(break_even * 1000)
    miner = J(1, job_class=MINING, value=gross, restart_loss_us=round(restart_s * SECOND_US))
    board = B(limit_w=NATURAL_W, limit_w_min=100, limit_w_max=NATURAL_W)
    power = P(
        W(jobs=(miner,), gpus=gpus(1), has_price=True),
        budget_w=UNLIMITED_W,
        boards={"GPU-0": board},
        natural_w={1: NATURAL_W},
        curve=CURVE,
    )
    earned, at_w = 0.0, UNKNOWN
    for number, price in enumerate(prices):
        at_w, net = operating_point(CURVE, NATURAL_W, gross, round(price * 1000), 100, at_w)
        job = replace(power.world.jobs[0], energy_cost=gross - net)
        world = replace(power.world, jobs=(job,), now_us=NOW_US + number * INTERVAL_S * SECOND_US)
        power = replace(power, world=world, best_w={1: at_w})
        made = plan(watts.snapshot(power), Policy())
        for action in made.actions:
            match action:
                case StartJob():
                    job = replace(job, state=RUNNING, on=action.gpus, node=0, started_us=world.now_us)
                    earned -= break_even * restart_s / 3600
                case RequeueJob():
                    job = replace(job, state=PENDING, on=(), node=-1, started_us=-1)
        power = replace(power, world=replace(world, jobs=(job,))).with_limits(watts.limits(made))
        if job.state == RUNNING:
            earned += lowered_gain(price, break_even, CURVE, power.board("GPU-0").limit_w)
    return earned


@given(PRICES, st.sampled_from([0.0, 300.0, 900.0]))
def test_the_rules_that_are_played_are_those_of_the_planner(prices: list[float], restart_s: float) -> None:
    assert abs(planned(prices, 60.0, restart_s) - lowered(prices, prices, 60.0, restart_s, CURVE)) < 1e-9


def test_a_miner_that_may_be_lowered_mines_where_another_stops() -> None:
    prices = [20.0] * 4 + [70.0] * 8 + [20.0] * 4
    on_off, less = gated(prices, prices, 60.0, 300.0), lowered(prices, prices, 60.0, 300.0, CURVE)
    # Eight quarters of an hour at 66 % of the watts: 49.8 less 46.2 USD an hour, and no restart.
    assert less >= on_off + 8 * 0.25 * (0.83 * 60 - 0.66 * 70)
