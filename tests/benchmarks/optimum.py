"""What plans are worth against the exact optimum of one planning step, as one JSON object.

    python -m tests.benchmarks.optimum [--worlds N] [--processes N]     (from the root of the repository)

The worlds are seeded and of five kinds (`tests/fakes/contested.py`), the policy is order "value" without
hysteresis. `tests/properties/optimum.py` says what a plan is worth and what the optima may choose. Ratios are
of the proved bound of the optimum; `unproved` counts the programs that were stopped before they met it.

Between plan and optimum stand what the rules cost and what the planner could do better:

    optimum                 anybody may be left out
    optimum_by_rank         only who does not fit at its turn may (R4); the best places and victims
    plan                    the planner
    plan_with_hour          the planner, were a victim's loss to count what it would have earned, too
    plan_with_hour_and_bar  and were the value that displaces a job to make up for its unsaved work, too

The last two are the planner itself in a changed world, its decision judged in the true one: a checkpoint an
hour older adds the hour to a loss; restart loss in the place of unsaved work adds that to the bar.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from scheduler.model.policy import Order, Policy
from scheduler.planning.planner import plan
from tests.fakes.contested import KINDS, contested
from tests.fakes.worlds import HOUR_US, UNKNOWN, J, W, snapshot
from tests.properties.optimum import Decision, Rules, decided, optimum, worth_microusd
from tests.properties.oracle import Oracle

WORLDS = 1000
WORST = 5
POLICY = Policy(order=Order.VALUE, hysteresis_ratio=0.0)
PERCENTILES = {"p50": 50, "p10": 10, "p1": 1, "min": 0}
# An optimum that is this much above another is another: both are exact to a micro-USD or so.
BINDS_MICROUSD = 100


@dataclass(frozen=True)
class Judged:
    """The figures of one world."""

    kind: str
    seed: int
    worth_microusd: dict[str, int]
    unproved: int

    def ratio(self, of: str, to: str) -> float:
        """One worth over another; 1 where there is nothing to earn."""
        return self.worth_microusd[of] / self.worth_microusd[to] if self.worth_microusd[to] else 1.0

    @property
    def is_bound_by_rank(self) -> bool:
        """Whether R4 keeps the step from its optimum."""
        worth = self.worth_microusd
        return worth["optimum"] - worth["optimum_by_rank"] > BINDS_MICROUSD


def judge(kind: str, seed: int) -> Judged:
    """Plan the world, find its optima."""
    world = contested(kind, seed)
    worth = {name: worth_microusd(world, POLICY, decide(changed(world))) for name, changed in PLANS.items()}
    unproved = 0
    for name, rules in (("optimum_by_rank", Rules.BY_RANK), ("optimum", Rules.ANY)):
        best = optimum(world, POLICY, rules)
        assert best is not None, "to do nothing is always allowed where nothing is wanted"
        worth[name] = best.microusd_max
        unproved += best.microusd_max > best.microusd
    return Judged(kind, seed, worth, unproved)


def decide(world: W) -> Decision:
    """What the planner decides."""
    return decided(plan(snapshot(world), POLICY))


def unchanged(world: W) -> W:
    """The world itself."""
    return world


def with_hour(world: W) -> W:
    """The world in which victims lose, beside their work, what they would have earned in the hour."""
    return _with_live(world, lambda job: _unsaved(world, job, _unsaved_us(world, job) + HOUR_US))


def with_hour_and_bar(world: W) -> W:
    """The same, and whoever displaces a job must be worth its unsaved work as well as its restart."""

    def changed(job: J) -> J:
        lost_us = job.restart_loss_us + _unsaved_us(world, job)
        return replace(_unsaved(world, job, HOUR_US), restart_loss_us=lost_us)

    return _with_live(world, changed)


PLANS: dict[str, Callable[[W], W]] = {
    "plan": unchanged,
    "plan_with_hour": with_hour,
    "plan_with_hour_and_bar": with_hour_and_bar,
}
LADDER = (*PLANS, "optimum_by_rank", "optimum")


def _with_live(world: W, changed: Callable[[J], J]) -> W:
    return replace(world, jobs=tuple(changed(job) if job.is_live else job for job in world.jobs))


def _unsaved_us(world: W, job: J) -> int:
    """Work since the last checkpoint, or half the interval that is assumed of who reports none."""
    ran_us = world.now_us - job.started_us
    if job.checkpoint_us != UNKNOWN:
        return min(ran_us, world.now_us - job.checkpoint_us)
    return min(ran_us, round(POLICY.assumed_checkpoint_interval_s * 1e6) // 2)


def _unsaved(world: W, job: J, unsaved_us: int) -> J:
    """The job with this much unsaved work, running for longer by an hour, and as free to be displaced."""
    is_free = Oracle(world, POLICY).protected_until(job) <= world.now_us
    return replace(
        job,
        checkpoint_us=world.now_us - unsaved_us,
        started_us=job.started_us - HOUR_US,
        preemptible=job.preemptible and is_free,
        min_runtime_us=0,
    )


def summary(judged: list[Judged]) -> dict[str, object]:
    """The figures of these worlds: each rung over the optimum, and plan over optimum by rank."""
    ratios = {
        f"{of}_over_{to}": [world.ratio(of, to) for world in judged]
        for of, to in (
            *((rung, "optimum") for rung in LADDER[:-1]),
            ("plan", "optimum_by_rank"),
        )
    }
    free = [world.ratio("plan", "optimum") for world in judged if not world.is_bound_by_rank]
    worst = sorted(judged, key=lambda world: (world.ratio("plan", "optimum"), world.kind, world.seed))
    return {
        "worlds": len(judged),
        "unproved": sum(world.unproved for world in judged),
        "bound_by_rank": len(judged) - len(free),
        **{name: distribution(values) for name, values in ratios.items()},
        "plan_over_optimum_where_rank_does_not_bind": distribution(free),
        "worst": [
            {
                "kind": world.kind,
                "seed": world.seed,
                **{rung: round(world.ratio(rung, "optimum"), 4) for rung in LADDER[:-1]},
            }
            for world in worst[:WORST]
        ],
    }


def distribution(ratios: list[float]) -> dict[str, float]:
    """Mean and percentiles; nothing of nothing."""
    if not ratios:
        return {}
    percentiles = {name: float(np.percentile(ratios, at)) for name, at in PERCENTILES.items()}
    named = {"mean": float(np.mean(ratios)), **percentiles}
    return {name: round(value, 5) for name, value in named.items()}


def main() -> None:
    """Take the figures and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=WORLDS, help="in all; each kind has its part")
    parser.add_argument("--processes", type=int, default=1, help="that plan and solve at a time")
    options = parser.parse_args()
    begun_s = time.perf_counter()
    seeds = range(options.worlds // len(KINDS))
    judged: dict[str, list[Judged]] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for kind in KINDS:
            judged[kind] = list(pool.map(judge, repeat(kind), seeds, chunksize=4))
    every = [world for worlds in judged.values() for world in worlds]
    figures = {
        "policy": {"order": str(POLICY.order), "hysteresis_ratio": POLICY.hysteresis_ratio},
        "seconds": round(time.perf_counter() - begun_s, 1),
        "all": summary(every),
        "kinds": {kind: summary(worlds) for kind, worlds in judged.items()},
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
