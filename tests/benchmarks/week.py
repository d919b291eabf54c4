"""For how long the draw is above the budget in a week without faults: the real loop in virtual time.

    python -m tests.benchmarks.week [--seed N] [--days N] [--prices FILE]

Eight simulated boards, whose draw settles with a time constant of 0.5 s and is read once a second; a limit
takes 5 ms to set. Jobs are like those of the 32-GPU worlds: inference that must run, batch and training that
pay only if complete in time, mining on the rest; half of the weeks' miners may be frozen. Electricity costs
what it cost in ERCOT's south hub. What the site may draw comes from everything that says so:

* a contract for the whole week, by configuration;
* on some days a load schedule of quarter-hours, told the evening before (`SetPowerBudget` with intervals);
* on others base points every 5 min, told when they hold, each up to 5 % from the last;
* voluntary events of 10 and 30 min notice, a quarter of an hour to three hours long;
* emergencies without notice, down to near the floor.

The draw is the boards' true one, compared with the tightest of what holds at that moment; an event binds from
its start on, an emergency from its receipt.
"""

import argparse
import asyncio
import json
import math
import random
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scheduler.control.inbox import OfferGridEvent, SetPowerBudget, SetPrices
from scheduler.errors import Unreachable
from scheduler.model.jobs import JobClass, OnPreempt
from scheduler.model.power import BudgetInterval, GridEvent
from scheduler.model.prices import PricePoint
from scheduler.model.settings import Config, PowerConfig, StandingJob
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.benchmarks.mining_gate import INTERVAL_S, PRICES, read
from tests.benchmarks.powered import PoweredNode

GPUS = 8
DAY_S = 86_400.0
# How often somebody looks: always, and while the draw is above the budget.
LOOK_S, LOOK_CLOSELY_S = 0.25, 0.02
BAR_S = 2.0
ABOVE_RATIOS = (0.0, 0.001, 0.01)
# A draw as read is rounded to a tenth of a watt.
ROUNDING_W = 0.1 * GPUS
CONTRACT_RATIO = 0.9  # of what all boards at their largest limits would draw
SCHEDULE_RATIOS, SCHEDULE_STEP, QUARTER_S = (0.5, 0.9), 0.15, 900.0
POINT_S, POINT_STEP = 300.0, 0.05
EVENT_RATIOS, EMERGENCY_ROOM = (0.4, 0.8), (0.1, 0.6)
EVENT_NOTICES_S = (600.0, 1800.0)
LENGTHS_S = (900.0, 1800.0, 3600.0, 10_800.0)
GAP_S = (3600.0, 36_000.0)
# Of GPU time that batch and training ask for, and the length of jobs.
LOAD, LENGTH_S = 1.5, (1800.0, 14_400.0)
INFERENCE_MAX = 3
MINER_DRAW_W = 276.0
# Half of them ignore what they are told until they are killed, or take nearly all of their grace.
STOP_RATIOS = (0.0, 0.1, 0.9, None)


@dataclass(slots=True)
class Span:
    """A time above the budget."""

    at_s: float
    for_s: float
    above_w: float  # at most
    above_ratio: float
    cause: str


@dataclass(slots=True)
class Found:
    """What was seen: spans above the budget by more than each ratio, and how much there was to keep."""

    spans: dict[float, list[Span]] = field(default_factory=lambda: {ratio: [] for ratio in ABOVE_RATIOS})
    asked: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        """One more of them."""
        self.asked[what] = self.asked.get(what, 0) + 1


class Week(PoweredNode):
    """The node, its clients, its operators and who watches its draw."""

    def __init__(self, directory: Path, seed: int, gap_s: tuple[float, float] = GAP_S) -> None:
        """`gap_s`: between one grid event's offer and the next."""
        self.chance = random.Random(seed)
        self._gap_s = gap_s
        miner = StandingJob(
            "miner",
            ("work", "miner"),
            value_usd_per_gpu_hour=0.0138,
            restart_loss_s=300.0,
            on_preempt=OnPreempt.SUSPEND if seed % 2 else None,
        )
        power = PowerConfig(base_w=400.0, pue=1.1, return_jitter_s=30.0)
        config = Config(power=power, standing_jobs=(miner,))
        mines = Workload(draw_w=MINER_DRAW_W, stop_s=1.0)
        super().__init__(directory, config, GPUS, mines)
        contract_w = CONTRACT_RATIO * self.most_w
        self.daemon.config = replace(config, power=replace(power, budget_w=contract_w))
        self.config = self.daemon.config
        self.found = Found()
        self._since: dict[float, Span] = {}  # above the budget by that ratio, and not over
        self._tasks: list[asyncio.Task[None]] = []

    async def live(self, seconds: float, prices: list[float]) -> Found:
        """All of it for so long."""
        await self.daemon.start()
        points = (
            PricePoint(self.now_s + i * INTERVAL_S, usd_per_mwh / 1e3) for i, usd_per_mwh in enumerate(prices)
        )
        await self.daemon.ask(SetPrices(tuple(points)))
        for work in (self._demand(), self._replicas(), self._budgets(), self._grid(), self._watch()):
            self._tasks.append(asyncio.ensure_future(work))
        done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in self._tasks:
            task.cancel()
        for task in done:
            task.result()
        for ratio, span in self._since.items():
            self.found.spans[ratio].append(span)
        self.daemon.stop()
        return self.found

    # Jobs ---------------------------------------------------------------------------------------

    async def _add(self, job_class: JobClass, draw_w: float, duration_s: float, **fields: Any) -> None:
        grace_s = {JobClass.INFERENCE: 30.0, JobClass.TRAINING: 60.0, JobClass.BATCH: 10.0}[job_class]
        job = await self.submit(
            job_class=job_class,
            grace_s=grace_s,
            expected_duration_s=duration_s,
            preemptible=job_class is not JobClass.INFERENCE,
            **fields,
        )
        ratio = self.chance.choice(STOP_RATIOS)
        stop_s = None if ratio is None else ratio * grace_s
        self.loads[job] = Workload(
            duration_s=duration_s,
            draw_w=draw_w,
            stop_s=stop_s,
            restart_loss_s=fields.get("restart_loss_s", 0.0),
        )
        self.found.count("jobs")

    async def _demand(self) -> None:
        """Batch and training that are worth something if complete in time."""
        chance = self.chance
        while True:
            job_class = chance.choice((JobClass.TRAINING, JobClass.BATCH, JobClass.BATCH, JobClass.BATCH))
            gpus = 4 if job_class is JobClass.TRAINING else chance.choice((1, 1, 1, 2))
            duration_s = chance.uniform(*LENGTH_S)
            await self._add(
                job_class,
                chance.uniform(350.0, 690.0),
                duration_s,
                gpus=gpus,
                value_microusd_per_gpu_hour=round(chance.lognormvariate(-1.0, 0.8) * 1e6),
                deadline_s=self.now_s + 2.0 * duration_s,
                restart_loss_s=360.0,
            )
            await asyncio.sleep(chance.expovariate(LOAD * GPUS / (gpus * duration_s)))

    async def _replicas(self) -> None:
        """Inference comes and goes with the hour."""
        until_s: list[float] = []
        while True:
            until_s = [at_s for at_s in until_s if at_s > self.now_s]
            if len(until_s) < INFERENCE_MAX:
                duration_s = self.chance.uniform(900.0, 18_000.0)
                until_s.append(self.now_s + duration_s)
                value = 1_500_000
                await self._add(
                    JobClass.INFERENCE, 420.0, duration_s, gpus=1, value_microusd_per_gpu_hour=value
                )
            await asyncio.sleep(self.chance.uniform(600.0, 7200.0))

    # Budgets ------------------------------------------------------------------------------------

    async def _budgets(self) -> None:
        """A schedule for some days, base points on the others."""
        while True:
            if self.chance.random() < 0.5:
                await self._schedule()
                await asyncio.sleep(DAY_S)
            else:
                await self._base_points()

    async def _schedule(self) -> None:
        level, intervals, at_s = SCHEDULE_RATIOS[1], [], self.now_s + QUARTER_S
        for _ in range(round(DAY_S / QUARTER_S)):
            level += self.chance.uniform(-SCHEDULE_STEP, SCHEDULE_STEP)
            level = min(SCHEDULE_RATIOS[1], max(SCHEDULE_RATIOS[0], level))
            intervals.append(BudgetInterval(at_s, at_s + QUARTER_S, level * self.most_w))
            at_s += QUARTER_S
            self.found.count("scheduled quarter-hours")
        await self.daemon.ask(SetPowerBudget(tuple(intervals)))

    async def _base_points(self) -> None:
        level, until_s = SCHEDULE_RATIOS[1], self.now_s + DAY_S
        while self.now_s < until_s:
            level += self.chance.uniform(-POINT_STEP, POINT_STEP)
            level = min(SCHEDULE_RATIOS[1], max(SCHEDULE_RATIOS[0], level))
            await self.daemon.ask(SetPowerBudget((BudgetInterval(self.now_s, None, level * self.most_w),)))
            self.found.count("base points")
            await asyncio.sleep(POINT_S)

    async def _grid(self) -> None:
        """Events and emergencies, one after the other or one in the other."""
        number = 0
        while True:
            await asyncio.sleep(self.chance.uniform(*self._gap_s))
            number += 1
            emergency, now_s = self.chance.random() < 0.4, self.now_s
            if emergency:
                floor_w = self.daemon.controller.power.reachable(now_s, now_s, emergency=True)[0]
                above_w = self.chance.uniform(*EMERGENCY_ROOM) * (self.draw_w - floor_w)
                start_s, budget_w = now_s, floor_w + above_w
            else:
                start_s = now_s + self.chance.choice(EVENT_NOTICES_S)
                budget_w = self.chance.uniform(*EVENT_RATIOS) * self.most_w
            end_s = start_s + self.chance.choice(LENGTHS_S)
            event = GridEvent(f"e{number}", start_s, end_s, budget_w, emergency, now_s, now_s)
            try:
                await self.daemon.ask(OfferGridEvent(event))
            except Unreachable:
                self.found.count("events refused")
            else:
                self.found.count(_kind(event))

    # Who watches --------------------------------------------------------------------------------

    def _budget_w(self) -> tuple[float, float, str]:
        """The tightest of what holds now, as operators and the grid have said it; since when; who said it."""
        now_s, power, config = self.now_s, self.daemon.controller.ledger.power, self.config.power
        assert config.budget_w is not None
        said = [(config.budget_w, -math.inf, "contract")]
        said += [
            (one.budget_w, one.start_s, "interval")
            for one in power.budget
            if one.start_s <= now_s and (one.end_s is None or now_s < one.end_s)
        ]
        said += [
            (event.budget_w, event.start_s, _kind(event))
            for event in power.events
            if event.binds and event.start_s <= now_s < event.end_s
        ]
        return min(said)

    async def _watch(self) -> None:
        """Note for how long the draw is above what holds."""
        since, looked_s = self._since, self.now_s
        while True:
            await asyncio.sleep(LOOK_CLOSELY_S if since else LOOK_S)
            draw_w, now_s = self.draw_w, self.now_s
            budget_w, since_s, cause = self._budget_w()
            for ratio in ABOVE_RATIOS:
                if draw_w <= budget_w * (1.0 + ratio) + ROUNDING_W:
                    if (span := since.pop(ratio, None)) is not None:
                        self.found.spans[ratio].append(span)
                    continue
                # It began when nobody looked, but not before it was to be kept.
                span = since.setdefault(ratio, Span(max(looked_s, since_s), 0.0, 0.0, 0.0, cause))
                span.for_s = now_s - span.at_s
                span.above_w = max(span.above_w, draw_w - budget_w)
                span.above_ratio = max(span.above_ratio, draw_w / budget_w - 1.0)
            looked_s = now_s


def _kind(event: GridEvent) -> str:
    return "emergency" if event.emergency else "event"


def prices_of(path: Path, seed: int, days: float) -> list[float]:
    """So many days of real prices, USD per MWh, from a day of the seed on."""
    prices, count = read(path), round(days * DAY_S / INTERVAL_S)
    first = random.Random(seed).randrange(max(1, len(prices) - count))
    return prices[first : first + count]


def played(seed: int, days: float, prices: list[float], gap_s: tuple[float, float] = GAP_S) -> Found:
    """Such a week, or a shorter time."""

    async def live() -> Found:
        return await Week(Path(scratch), seed, gap_s).live(days * DAY_S, prices)

    with tempfile.TemporaryDirectory(prefix="wattshift-bench-") as scratch:
        return run(live())


def figures(found: Found) -> dict[str, Any]:
    """What there was to keep, and how it was kept."""
    told: dict[str, Any] = {"asked": found.asked}
    for ratio, spans in found.spans.items():
        told[f"above_by_{ratio:.1%}"] = {
            "spans": len(spans),
            "longest_s": round(max((span.for_s for span in spans), default=0.0), 2),
            "too_long": sum(span.for_s > BAR_S for span in spans),
        }
    worst = sorted(found.spans[0.0], key=lambda span: -span.for_s)[:10]
    told["worst"] = [
        f"at {span.at_s - EPOCH_S:.2f} s for {span.for_s:.2f} s by at most {span.above_w:.1f} W "
        f"({span.above_ratio:.2%}): {span.cause}"
        for span in worst
    ]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.week", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--prices", type=Path, default=PRICES, help="as in tests/benchmarks/mining_gate.py")
    chosen = parser.parse_args()
    prices = prices_of(chosen.prices, chosen.seed, chosen.days)
    found = played(chosen.seed, chosen.days, prices)
    print(json.dumps({"seed": chosen.seed, "days": chosen.days, **figures(found)}, indent=2))


if __name__ == "__main__":
    main()
