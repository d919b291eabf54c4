"""What the price gate earns with one miner on real prices, as a share of what perfect foresight earns.

    python -m tests.benchmarks.mining_gate [PRICES.csv]

The optimum is exact: dynamic programming over on and off at each interval, with the restart loss. The gate is
the planner's own: one `plan()` an interval, carried out at once.
"""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

from scheduler.model.actions import RequeueJob, StartJob
from scheduler.model.policy import Policy
from scheduler.planning.planner import plan
from tests.fakes.worlds import MINING, NOW_US, PENDING, RUNNING, SECOND_US, J, W, gpus, snapshot

PRICES = Path(__file__).parents[3] / "shared/data/energy/ercot_hb_south_15min_2024-06-01_200d.csv"
INTERVAL_S = 900
DRAW_KW = 1.0  # so that a price in USD per MWh is the energy's cost in thousandths of a USD per GPU-hour
MICROUSD_PER_MWH_PRICE = 1000
POLICY = Policy()
# Break-even in USD per MWh, restart loss in seconds.
CASES = ((40, 300), (60, 0), (60, 300), (60, 900), (100, 300))


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


def shares(prices: list[float], break_even: float, restart_s: float) -> tuple[float, float]:
    """Earned over optimum: with the price known, and with the price one interval old."""
    best = optimum(prices, break_even, restart_s)
    old = [prices[0], *prices[:-1]]
    return (
        gated(prices, prices, break_even, restart_s) / best,
        gated(prices, old, break_even, restart_s) / best,
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


if __name__ == "__main__":
    main()
