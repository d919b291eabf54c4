"""What the price gate earns with one miner on real prices, as a share of what perfect foresight earns.

    python -m tests.benchmarks.mining_gate [PRICES.csv]

The optimum is exact: dynamic programming over on and off at each interval, with the restart loss; where
limits may be lowered, an interval's gain is the best of the curve's corners. The gate is the planner's own:
one `plan()` an interval, carried out at once; with limits, its rules.
"""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from scheduler.model.actions import RequeueJob, StartJob
from scheduler.model.policy import COMPUTE_BOUND, MEMORY_BOUND, Policy
from scheduler.model.power import Curve, curve_of
from scheduler.model.snapshot import UNKNOWN
from scheduler.planning.economics import operating_point
from scheduler.planning.planner import plan
from scheduler.planning.valuation import restart_cost
from tests.fakes.worlds import MINING, NOW_US, PENDING, RUNNING, SECOND_US, J, W, gpus, snapshot

PRICES = Path(__file__).parents[3] / "shared/data/energy/ercot_hb_south_15min_2024-06-01_200d.csv"
INTERVAL_S = 900
DRAW_KW = 1.0  # so that a price in USD per MWh is the energy's cost in thousandths of a USD per GPU-hour
MICROUSD_PER_MWH_PRICE = 1000
POLICY = Policy()
# Break-even in USD per MWh, restart loss in seconds.
CASES = ((40, 300), (60, 0), (60, 300), (60, 900), (100, 300))
# Those that are also played with limits that may be lowered, on boards of 1 kW.
NATURAL_W = 1000
CURVES = {"memory-bound": MEMORY_BOUND, "compute-bound": COMPUTE_BOUND}
ON_OFF = Curve(((1000, 1000),))
LOWERED_CASES = ((40, 300), (60, 300), (100, 300))


def read(path: Path) -> list[float]:
    """Real-time prices, USD per MWh, one an interval."""
    with path.open() as file:
        return [float(row["HB_SOUTH_RTM"]) for row in csv.DictReader(file)]


def optimum(prices: list[float], break_even: float, restart_s: float) -> float:
    """The most that can be earned, knowing everything; the miner is off before and after."""
    hours, loss = INTERVAL_S / 3600, break_even * restart_s / 3600
    on = off = 0.0
    for price in reversed(prices):
        gain = (break_even - price) * hours
        on, off = max(gain + on, off), max(gain + on - loss, off)
    return off


def gated(prices: list[float], known: list[float], break_even: float, restart_s: float) -> float:
    """What the planner earns that sees `known` prices and pays the true ones."""
    miner = J(1, job_class=MINING, value=round(break_even * MICROUSD_PER_MWH_PRICE), preemptible=True)
    miner = replace(miner, restart_loss_us=round(restart_s * SECOND_US))
    world = W(jobs=(miner,), gpus=gpus(1), has_price=True)
    earned, loss = 0.0, break_even * restart_s / 3600
    for number, (price, seen) in enumerate(zip(prices, known, strict=True)):
        job = replace(world.jobs[0], energy_cost=round(seen * MICROUSD_PER_MWH_PRICE))
        world = replace(world, jobs=(job,), now_us=NOW_US + number * INTERVAL_S * SECOND_US)
        for action in plan(snapshot(world), POLICY).actions:
            match action:
                case StartJob():
                    job = replace(job, state=RUNNING, on=action.gpus, node=0, started_us=world.now_us)
                    earned -= loss
                case RequeueJob():
                    job = replace(job, state=PENDING, on=(), node=-1, started_us=-1)
        world = replace(world, jobs=(job,))
        if job.state == RUNNING:
            earned += (break_even - price) * INTERVAL_S / 3600
    return earned


def lowered_optimum(prices: list[float], break_even: float, restart_s: float, curve: Curve) -> float:
    """The most that can be earned where the limit may be at any corner of the curve."""
    hours, loss = INTERVAL_S / 3600, break_even * restart_s / 3600
    on = off = 0.0
    for price in reversed(prices):
        gain = hours * max(work * break_even - draw * price for draw, work in curve.points) / 1000
        on, off = max(gain + on, off), max(gain + on - loss, off)
    return off


def lowered(
    prices: list[float], known: list[float], break_even: float, restart_s: float, curve: Curve
) -> float:
    """What the gate earns that sees `known` prices, lowers limits and pays the true prices.

    By the planner's rules and not by plans, which takes a hundredth of the time; a test plays both.
    """
    gross = round(break_even * MICROUSD_PER_MWH_PRICE)
    cost = int(restart_cost(np.int64(gross), np.int64(restart_s * SECOND_US)))
    earned, loss, at_w, runs = 0.0, break_even * restart_s / 3600, UNKNOWN, False
    for price, seen in zip(prices, known, strict=True):
        at_w, net = operating_point(curve, NATURAL_W, gross, round(seen * MICROUSD_PER_MWH_PRICE), 0, at_w)
        ran, runs = runs, net >= -cost if runs else net > 0
        if runs:
            earned += lowered_gain(price, break_even, curve, at_w) - (0.0 if ran else loss)
    return earned


def lowered_gain(price: float, break_even: float, curve: Curve, limit_w: int) -> float:
    """What an interval under a limit earns; UNKNOWN is the full one."""
    watts = NATURAL_W if limit_w == UNKNOWN else limit_w
    work = curve.work_milli(watts * 1000 // NATURAL_W)
    return (break_even * work - price * watts) / 1000 * INTERVAL_S / 3600


def one_interval_old(prices: list[float]) -> list[float]:
    """What a feed knows that is late by an interval."""
    return [prices[0], *prices[:-1]]


def shares(prices: list[float], break_even: float, restart_s: float) -> tuple[float, float]:
    """Earned over optimum: with the price known, and with the price one interval old."""
    best = optimum(prices, break_even, restart_s)
    return (
        gated(prices, prices, break_even, restart_s) / best,
        gated(prices, one_interval_old(prices), break_even, restart_s) / best,
    )


def main() -> None:
    """Print a JSON object a case."""
    prices = read(Path(sys.argv[1]) if len(sys.argv) > 1 else PRICES)
    for break_even, restart_s in CASES:
        known, old = shares(prices, break_even, restart_s)
        print(
            json.dumps(
                {
                    "break_even_usd_per_mwh": break_even,
                    "restart_loss_s": restart_s,
                    "intervals": len(prices),
                    "share_price_known": round(known, 4),
                    "share_price_one_interval_old": round(old, 4),
                }
            )
        )
    for name, points in CURVES.items():
        for break_even, restart_s in LOWERED_CASES:
            print(json.dumps({"curve": name} | with_limits(prices, break_even, restart_s, curve_of(points))))


def with_limits(prices: list[float], break_even: float, restart_s: float, curve: Curve) -> dict[str, float]:
    """On and off only, beside limits that may be lowered: USD for each kW of full draw, and shares."""
    old = one_interval_old(prices)
    best = lowered_optimum(prices, break_even, restart_s, curve)
    known = lowered(prices, prices, break_even, restart_s, curve)
    late = lowered(prices, old, break_even, restart_s, curve)
    per_kw = 1 / 1000  # of USD/MWh times hours
    return {
        "break_even_usd_per_mwh": break_even,
        "restart_loss_s": restart_s,
        "on_off_usd_per_kw": round(lowered(prices, prices, break_even, restart_s, ON_OFF) * per_kw, 2),
        "lowered_usd_per_kw": round(known * per_kw, 2),
        "on_off_old_usd_per_kw": round(lowered(prices, old, break_even, restart_s, ON_OFF) * per_kw, 2),
        "lowered_old_usd_per_kw": round(late * per_kw, 2),
        "optimum_usd_per_kw": round(best * per_kw, 2),
        "share_price_known": round(known / best, 4),
        "share_price_one_interval_old": round(late / best, 4),
    }


if __name__ == "__main__":
    main()
