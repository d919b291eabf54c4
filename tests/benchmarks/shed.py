"""How fast an emergency's watts go, and how near a budget the draw is kept: the real loop in virtual time.

    python -m tests.benchmarks.shed [EMERGENCIES]

Eight simulated boards whose draw settles with a time constant of 0.5 s and is read once a second; a limit
takes 5 ms to set. Times are the simulation's, in which what the daemon computes takes none. The draw is the
boards' true one, looked at each 10 ms; for MET it is the daemon's own readings. A target next to the floor is
reached late by any means, as a draw that settles only nears where it goes: `room` tells those apart.
"""

import asyncio
import json
import math
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scheduler.control.inbox import Cancel, OfferGridEvent, SetPowerBudget
from scheduler.model.jobs import JobClass
from scheduler.model.power import BudgetInterval, GridEvent, ShedState
from scheduler.model.settings import Config, PowerConfig
from scheduler.simulation.machine import Workload
from scheduler.simulation.outputs import percentile
from scheduler.simulation.virtual_time import run
from tests.benchmarks.powered import PoweredNode

GPUS = 8
EMERGENCIES = 100
LOOK_S = 0.01
LEARNED_S = 40.0  # jobs have come, and their draw is known
SHED_S = 10.0
FELL_RATIO, NEAR_RATIO = 0.01, 0.01
ROOM_MIN = 0.1
# Budgets that limits alone can keep, each held for so long, of which the first seconds settle.
BUDGETS, BUDGET_S, SETTLE_S = 12, 30, 4
BUDGET_RATIOS = (0.75, 0.98)
ABOVE_RATIOS = (0.001, 0.01)
NOT_ABOVE = dict.fromkeys(ABOVE_RATIOS, 0.0)
BURST_S, BURST_RATIOS = (2.0, 6.0), (0.6, 1.0)
POWER = PowerConfig(base_w=400.0, pue=1.1, return_jitter_s=0.0, return_w_per_s=1e6)
# From SIGTERM to the end; None = not before it is killed.
STOPS_S = (0.0, 0.2, 0.9, None)


@dataclass(frozen=True, slots=True)
class Shed:
    """One emergency, in seconds from its receipt; inf = not within `SHED_S`."""

    fell_s: float = math.inf
    near_s: float = math.inf  # above the target by no more than `NEAR_RATIO`
    inside_s: float = math.inf
    met_s: float = math.inf
    limits_s: float = 0.0
    room: float = 0.0  # of the target above the floor, as a part of what the site drew above it


@dataclass(frozen=True, slots=True)
class Tracked:
    """How near the draw was to what it may be and would be."""

    error: float  # mean, of the budget
    longest_s: dict[float, float]  # above the budget by more than that part of it


class Bench(PoweredNode):
    """A node of busy boards."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, Config(power=POWER), GPUS)
        self.chance = random.Random(seed)

    async def fill(self, *, is_steady: bool = False) -> list[str]:
        """A gang and single jobs on every board, and time to know them."""
        jobs, left = [], GPUS
        while left:
            gpus = min(left, self.chance.choice((1, 1, 2, 4)))
            left -= gpus
            job_class = self.chance.choice((JobClass.TRAINING, JobClass.BATCH, JobClass.MINING))
            draw_w = self.chance.uniform(350.0, 690.0)
            stop_s = 0.0 if is_steady else self.chance.choice(STOPS_S)
            value = round(self.chance.uniform(0.04, 3.0) * 1e6)
            job = await self.submit(
                gpus=gpus, job_class=job_class, draw_w=draw_w, value_microusd_per_gpu_hour=value
            )
            self.loads[job] = Workload(draw_w=draw_w, stop_s=stop_s)
            jobs.append(job)
        await asyncio.sleep(LEARNED_S + self.chance.random())
        return jobs

    async def empty(self, jobs: list[str]) -> None:
        for job in jobs:
            await self.daemon.ask(Cancel(job))
        await asyncio.sleep(45.0)  # the longest grace, and the budget's return

    async def shed(self, name: str) -> Shed:
        """An emergency, from its receipt on."""
        floor_w = self.daemon.controller.power.reachable(self.now_s, self.now_s, emergency=True)[0]
        before_w, begun_s = self.draw_w, self.now_s
        budget_w = self.chance.uniform(floor_w, 0.95 * before_w)
        event = GridEvent(name, begun_s, begun_s + 60.0, budget_w, True, begun_s, begun_s)
        self.set_s.clear()
        await self.daemon.ask(OfferGridEvent(event))
        fell_s = near_s = inside_s = math.inf
        while self.now_s < begun_s + SHED_S:
            await asyncio.sleep(LOOK_S)
            passed_s, draw_w = self.now_s - begun_s, self.draw_w
            if draw_w < before_w * (1.0 - FELL_RATIO):
                fell_s = min(fell_s, passed_s)
            near_s = min(near_s, passed_s) if draw_w <= budget_w * (1.0 + NEAR_RATIO) else math.inf
            inside_s = min(inside_s, passed_s) if draw_w <= budget_w else math.inf
        (found,) = [one for one in self.daemon.controller.ledger.power.events if one.id == name]
        is_met = found.state is ShedState.MET and found.shed_ended_s is not None
        first = [at_s - begun_s for at_s in self.set_s if at_s < begun_s + 0.1]
        await asyncio.sleep(60.0)
        return Shed(
            fell_s,
            near_s,
            inside_s,
            found.shed_ended_s - begun_s if is_met and found.shed_ended_s else math.inf,
            max(first, default=0.0),
            (budget_w - floor_w) / (before_w - floor_w),
        )

    async def track(self, *, is_bursty: bool) -> Tracked:
        """Budgets one after the other, each kept for a while."""
        await self.fill(is_steady=True)
        bursts = asyncio.ensure_future(self._burst()) if is_bursty else None
        most_w, errors, above_s, longest_s = self.demand_w, list[float](), dict(NOT_ABOVE), dict(NOT_ABOVE)
        for _ in range(BUDGETS):
            budget_w = most_w * self.chance.uniform(*BUDGET_RATIOS)
            await self.daemon.ask(SetPowerBudget((BudgetInterval(self.now_s, None, budget_w),)))
            for place in range(round(BUDGET_S / LOOK_S)):
                await asyncio.sleep(LOOK_S)
                for ratio in ABOVE_RATIOS:
                    is_above = self.draw_w > budget_w * (1.0 + ratio)
                    above_s[ratio] = above_s[ratio] + LOOK_S if is_above else 0.0
                    longest_s[ratio] = max(longest_s[ratio], above_s[ratio])
                if place * LOOK_S >= SETTLE_S:
                    errors.append(abs(self.draw_w - min(budget_w, self.demand_w)) / budget_w)
        if bursts is not None:
            bursts.cancel()
        return Tracked(sum(errors) / len(errors), longest_s)

    async def _burst(self) -> None:
        """Every board's load changes again and again."""
        natural_w = {pid: self.loads[p.key.job_id].draw_w for pid, p in self.machine.processes.items()}
        while True:
            await asyncio.sleep(self.chance.uniform(*BURST_S))
            board = self.chance.choice(list(self.machine.boards.values()))
            for one in board.occupants:
                draw_w = (natural_w.get(one.pid) or 0.0) * self.chance.uniform(*BURST_RATIOS)
                board.put(replace(one, draw_w=draw_w), self.now_s)


async def emergencies(directory: Path, count: int) -> list[Shed]:
    """That many, each on other jobs."""
    bench = Bench(directory, seed=1)
    await bench.daemon.start()
    found = []
    for number in range(count):
        jobs = await bench.fill()
        found.append(await bench.shed(f"e{number}"))
        await bench.empty(jobs)
    bench.daemon.stop()
    return found


async def tracking(directory: Path, *, is_bursty: bool) -> Tracked:
    """How near one load is kept to its budgets."""
    bench = Bench(directory, seed=2)
    await bench.daemon.start()
    found = await bench.track(is_bursty=is_bursty)
    bench.daemon.stop()
    return found


def figures(count: int) -> dict[str, Any]:
    """All of them."""
    with tempfile.TemporaryDirectory(prefix="wattshift-bench-") as scratch:
        folder = Path(scratch)
        sheds = run(emergencies(folder / "sheds", count))
        steady, bursty = (run(tracking(folder / f"t{b}", is_bursty=b)) for b in (False, True))
    roomy = [shed for shed in sheds if shed.room >= ROOM_MIN]
    told: dict[str, Any] = {"all": _spread(sheds), f"room_at_least_{ROOM_MIN:g}": _spread(roomy)}
    for name, tracked in (("steady", steady), ("bursty", bursty)):
        longest = {f"above_by_{ratio:.1%}_s": round(s, 2) for ratio, s in tracked.longest_s.items()}
        told[name] = {"error_mean": round(tracked.error, 4), **longest}
    return told


def _spread(sheds: list[Shed]) -> dict[str, Any]:
    told: dict[str, Any] = {"emergencies": len(sheds)}
    for name in ("fell_s", "near_s", "inside_s", "met_s", "limits_s"):
        values = sorted(round(getattr(shed, name), 3) for shed in sheds)
        told[name] = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "most": max(values)}
    return told


if __name__ == "__main__":
    print(json.dumps(figures(int(sys.argv[1]) if len(sys.argv) > 1 else EMERGENCIES), indent=2))
