"""What plans are worth against the exact optimum of one planning step, as one JSON object.

    python -m tests.benchmarks.optimum [--worlds N] [--processes N]     (from the root of the repository)

The worlds are seeded and of five kinds (`tests/fakes/contested.py`), the policy is order "value" without
hysteresis. `tests/properties/optimum.py` says what a plan is worth and what the optima may choose. Ratios are
of the proved bound of the optimum; `unproved` counts the programs that were stopped before they met it.

Between nothing and the optimum stand what the planner could do better and what the rules cost:

    nothing               all goes on as it is
    plan                  the planner
    plan_with_hysteresis  the planner under the default hysteresis
    plan_with_hour        the planner, were a victim's loss to count what it would have earned, too
    plan_worth_it         and were nobody to displace victims whose loss is more than it earns itself
    optimum_by_rank       the best places and victims; only who does not fit at its turn is left out (R4)
    optimum               anybody may be left out

The last two plans are the planner itself in a changed world, its decision judged in the true one: a
checkpoint an hour older adds the hour to a loss; who is not worth its victims is set aside and the plan made
anew.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from scheduler.model.actions import PreemptJob
from scheduler.model.policy import Order, Policy
from scheduler.planning.planner import plan
from tests.fakes.contested import KINDS, contested
from tests.fakes.worlds import HOUR_US, UNKNOWN, J, W, snapshot
from tests.properties.optimum import Decision, Rules, decided, hourly_microusd, optimum, worth_microusd
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
    breaks_a_rule: bool  # the plan is none of the choices that the rules leave

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
    worth = {name: worth_microusd(world, POLICY, decide(world)) for name, decide in DECIDE.items()}
    chosen = optimum(world, POLICY, Rules.BY_RANK, fixed=planned(world))
    breaks_a_rule = chosen is None or chosen.microusd != worth["plan"]
    unproved = 0
    for name, rules in (("optimum_by_rank", Rules.BY_RANK), ("optimum", Rules.ANY)):
        best = optimum(world, POLICY, rules)
        assert best is not None, "without a fixed decision there is always one"
        worth[name] = best.microusd_max
        unproved += best.microusd_max > best.microusd
    return Judged(kind, seed, worth, unproved, breaks_a_rule)


def nothing(world: W) -> Decision:
    """Nobody starts, nobody goes."""
    return Decision(frozenset(), frozenset())


def planned(world: W) -> Decision:
    """What the planner decides."""
    return decided(plan(snapshot(world), POLICY))


def with_hysteresis(world: W) -> Decision:
    """What it decides where a challenger must be worth a share more than the incumbent."""
    return decided(plan(snapshot(world), Policy(order=Order.VALUE)))


def with_hour(world: W) -> Decision:
    """What it decides where victims lose, beside their work, what they would have earned in the hour."""
    return planned(priced_by_the_hour(world))


def worth_it(world: W) -> Decision:
    """The same, where nobody displaces victims that lose more than it earns in the hour."""
    priced = priced_by_the_hour(world)
    while True:
        made = plan(snapshot(priced), POLICY)
        cost = Counter[int]()
        for action in made.actions:
            if isinstance(action, PreemptJob):
                cost[action.preemptor] += action.loss_microusd
        too_dear = [world.job(number) for number in cost if cost[number] > hourly_microusd(world.job(number))]
        if not too_dear:
            return decided(made)
        # Who ranks lower may be worth its victims once this one does not take them: one at a time.
        first = min(too_dear, key=Oracle(world, POLICY).rank)
        later = replace(first, eligible_us=world.now_us + HOUR_US)
        priced = replace(
            priced, jobs=tuple(later if job.number == first.number else job for job in priced.jobs)
        )


DECIDE: dict[str, Callable[[W], Decision]] = {
    "nothing": nothing,
    "plan": planned,
    "plan_with_hysteresis": with_hysteresis,
    "plan_with_hour": with_hour,
    "plan_worth_it": worth_it,
}
RUNGS = (*DECIDE, "optimum_by_rank")


def priced_by_the_hour(world: W) -> W:
    """The world in which every live job saved its work an hour earlier and may be displaced as before."""
    return replace(
        world, jobs=tuple(_an_hour_older(world, job) if job.is_live else job for job in world.jobs)
    )


def _an_hour_older(world: W, job: J) -> J:
    unsaved_us = world.now_us - job.started_us
    if job.checkpoint_us != UNKNOWN:
        unsaved_us = min(unsaved_us, world.now_us - job.checkpoint_us)
    else:  # half the interval that is assumed of who reports no checkpoint
        unsaved_us = min(unsaved_us, round(POLICY.assumed_checkpoint_interval_s * 1e6) // 2)
    is_free = Oracle(world, POLICY).protected_until(job) <= world.now_us
    return replace(
        job,
        checkpoint_us=world.now_us - unsaved_us - HOUR_US,
        started_us=job.started_us - HOUR_US,
        preemptible=job.preemptible and is_free,
        min_runtime_us=0,
    )


def summary(judged: list[Judged]) -> dict[str, object]:
    """The figures of these worlds: each rung over the optimum, and plan over optimum by rank."""
    ratios = {
        f"{of}_over_{to}": [world.ratio(of, to) for world in judged]
        for of, to in (
            *((rung, "optimum") for rung in RUNGS),
            ("plan", "optimum_by_rank"),
        )
    }
    free = [world.ratio("plan", "optimum") for world in judged if not world.is_bound_by_rank]
    return {
        "worlds": len(judged),
        "unproved": sum(world.unproved for world in judged),
        "plans_that_break_a_rule": sum(world.breaks_a_rule for world in judged),
        "bound_by_rank": len(judged) - len(free),
        **{name: distribution(values) for name, values in ratios.items()},
        "plan_over_optimum_where_rank_does_not_bind": distribution(free),
        "worst": worst(judged, "optimum"),
        "worst_by_rank": worst(judged, "optimum_by_rank"),
    }


def worst(judged: list[Judged], than: str) -> list[dict[str, object]]:
    """The worlds in which the plan falls furthest behind this rung, each with its ratios to the optimum."""
    missed = [world for world in judged if world.worth_microusd[than] > world.worth_microusd["plan"]]
    missed.sort(key=lambda world: (world.ratio("plan", than), world.kind, world.seed))
    return [
        {
            "kind": world.kind,
            "seed": world.seed,
            **{rung: round(world.ratio(rung, "optimum"), 4) for rung in RUNGS},
        }
        for world in missed[:WORST]
    ]


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
