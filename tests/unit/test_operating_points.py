"""Miners at the power limits at which they earn most: in the loop, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scheduler.control.inbox import OfferGridEvent, SetPowerBudget, SetPrices
from scheduler.model.jobs import JobClass, JobState
from scheduler.model.power import BudgetInterval, GridEvent, LimitCause
from scheduler.model.prices import PricePoint
from scheduler.model.settings import Config, MiningConfig, OperatingPoint, PowerConfig, SamplingConfig
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import run
from tests.harness.simulated import SimulatedNode

DAY_S = 86_400.0
FOUND_W = 700.0
# At 0.03 USD per GPU-hour and 500 W it breaks even at 0.06 USD per kWh, at full draw.
MINER: dict[str, Any] = {
    "job_class": JobClass.MINING,
    "value_microusd_per_gpu_hour": 30_000,
    "draw_w": 500.0,
    "grace_s": 2.0,
    "restart_loss_s": 300.0,
}
# The corners of the curve: 0.881 and 0.66 of 500 W.
EFFICIENT_W, LEAST_W = 441.0, 330.0
AT_ONCE = PowerConfig(return_w_per_s=1e6, return_jitter_s=0.0)
SLOWLY = PowerConfig(return_w_per_s=10.0, return_jitter_s=8.0)


class World(SimulatedNode):
    def __init__(self, tmp_path: Path, power: PowerConfig, gpus: int, point: OperatingPoint) -> None:
        config = Config(
            power=power, mining=MiningConfig(operating_point=point), sampling=SamplingConfig(period_s=1.0)
        )
        super().__init__(tmp_path, lambda _: Workload(draw_w=500.0, stop_s=0.5), gpus=gpus, config=config)

    async def price(self, usd_per_kwh: float | None) -> None:
        now_s = self.machine.clock.now_s()
        points = () if usd_per_kwh is None else (PricePoint(now_s, usd_per_kwh, now_s + DAY_S),)
        await self.daemon.ask(SetPrices(points))

    @property
    def limits_w(self) -> list[float]:
        return [board.power_limit_w for board in self.machine.boards.values()]

    @property
    def causes(self) -> list[LimitCause | None]:
        return [gpu.cause for gpu in self.daemon.controller.power.view(self.machine.clock.now_s()).gpus]


@pytest.fixture
def played(tmp_path: Path) -> Callable[..., None]:
    """Play a story in a world of its own."""

    def play(
        story: Callable[[World], Coroutine[Any, Any, None]],
        power: PowerConfig = AT_ONCE,
        gpus: int = 1,
        point: OperatingPoint = OperatingPoint.BEST,
    ) -> None:
        async def whole() -> None:
            world = World(tmp_path, power, gpus, point)
            await world.daemon.start()
            await story(world)
            world.daemon.stop()

        run(whole())

    return play


def test_with_the_price_a_miner_goes_from_full_to_efficient_to_off_and_back(played: Any) -> None:
    async def story(world: World) -> None:
        miner = await world.submit(**MINER)
        seen = []
        for price in (0.01, 0.03, 0.05, 0.07, 0.10, 0.05, 0.01):
            await world.price(price)
            await asyncio.sleep(20.0)
            seen.append((world.state(miner) is JobState.RUNNING, world.limits_w[0], world.causes[0]))
        full = (True, FOUND_W, LimitCause.FOUND)
        least = (True, LEAST_W, LimitCause.OPERATING_POINT)
        assert seen == [
            full,
            (True, EFFICIENT_W, LimitCause.OPERATING_POINT),
            least,
            least,  # at full draw it would not pay any more
            (False, LEAST_W, None),
            least,
            full,
        ]
        await world.price(0.05)
        await asyncio.sleep(20.0)
        await world.price(None)
        await asyncio.sleep(20.0)
        assert world.limits_w == [FOUND_W], "without a price the limit is given back"
        assert not world.daemon.controller.ledger.power.limits

    played(story)


def test_where_the_configuration_wants_no_such_point_no_limit_is_touched(played: Any) -> None:
    async def story(world: World) -> None:
        miner = await world.submit(**MINER)
        await world.price(0.05)
        await asyncio.sleep(20.0)
        assert (world.state(miner), world.limits_w) == (JobState.RUNNING, [FOUND_W])
        await world.price(0.07)
        await asyncio.sleep(20.0)
        assert world.state(miner) is JobState.PENDING

    played(story, point=OperatingPoint.FULL)


def test_limits_move_slowly_and_after_a_moment_of_the_nodes_own(played: Any) -> None:
    async def story(world: World) -> None:
        for _ in range(2):
            await world.submit(**MINER)
        await world.price(0.01)
        await asyncio.sleep(20.0)
        await world.price(0.03)
        sums = []
        for _ in range(60):
            await asyncio.sleep(1.0)
            sums.append(sum(min(500.0, watts) for watts in world.limits_w))
        steps = [before - after for before, after in zip([1000.0, *sums], sums, strict=False)]
        assert max(steps) <= 2 * 10.0 + 2, "10 W a second for the node, as fast as looks come"
        assert sums[-1] == 2 * EFFICIENT_W
        assert sums[8 + 13] == sums[-1], "up to 8 s of waiting and 118 W"
        await world.price(0.01)
        await asyncio.sleep(5.0)
        assert sum(world.limits_w) < 2 * FOUND_W
        await asyncio.sleep(60.0)
        assert world.limits_w == [FOUND_W, FOUND_W]

    played(story, SLOWLY, gpus=2)


def test_a_price_that_wavers_about_a_corner_moves_no_limit(played: Any) -> None:
    async def story(world: World) -> None:
        await world.submit(**MINER)
        # Full draw earns 0.0139 of a USD less a kWh's price times 0.5; both are equal at 0.01664 USD per kWh.
        await world.price(0.0150)
        await asyncio.sleep(20.0)
        seen = set()
        for number in range(20):
            await world.price(0.0165 if number % 2 else 0.0168)
            await asyncio.sleep(5.0)
            seen.add(world.limits_w[0])
        assert seen == {FOUND_W}
        await world.price(0.025)
        await asyncio.sleep(5.0)
        assert world.limits_w == [EFFICIENT_W]

    played(story)


def test_a_budget_and_an_emergency_are_tighter_than_the_best_point(played: Any) -> None:
    async def story(world: World) -> None:
        for _ in range(2):
            await world.submit(**MINER)
        await world.price(0.03)
        await asyncio.sleep(20.0)
        assert world.limits_w == [EFFICIENT_W] * 2
        await world.daemon.ask(SetPowerBudget((BudgetInterval(0.0, None, 800.0),)))
        await asyncio.sleep(10.0)
        assert sum(world.limits_w) <= 800.0
        assert LimitCause.SHED in world.causes
        now_s = world.machine.clock.now_s()
        event = GridEvent("e", now_s, now_s + 60.0, 300.0, emergency=True, accepted_s=now_s)
        await world.daemon.ask(OfferGridEvent(event))
        await asyncio.sleep(20.0)
        measured_w = world.daemon.controller.power.measured_w(world.machine.clock.now_s())
        assert measured_w is not None
        assert measured_w <= 300.0
        await asyncio.sleep(120.0)
        await world.daemon.ask(SetPowerBudget(()))
        await asyncio.sleep(60.0)
        assert world.limits_w == [EFFICIENT_W] * 2

    played(story, gpus=2)


def test_training_gets_the_whole_board_that_a_miner_had_at_less(played: Any) -> None:
    async def story(world: World) -> None:
        miner = await world.submit(**MINER)
        await world.price(0.03)
        await asyncio.sleep(20.0)
        assert world.limits_w == [EFFICIENT_W]
        job = await world.submit(job_class=JobClass.TRAINING, draw_w=650.0)
        await asyncio.sleep(20.0)
        assert (world.state(job), world.state(miner)) == (JobState.RUNNING, JobState.PENDING)
        assert world.limits_w == [FOUND_W]

    played(story)


def test_a_daemon_that_comes_back_finds_its_limits_again(played: Any) -> None:
    async def story(world: World) -> None:
        await world.submit(**MINER)
        await world.price(0.03)
        await asyncio.sleep(20.0)
        world.daemon.crash()
        await world.daemon.start()
        await asyncio.sleep(20.0)
        assert world.limits_w == [EFFICIENT_W]
        assert world.causes == [LimitCause.OPERATING_POINT]
        assert "somebody else" not in " ".join(world.daemon.controller.problems.values())

    played(story)


def test_a_miner_held_at_less_that_draws_less_still_is_not_taken_for_one_that_wants_less(played: Any) -> None:
    async def story(world: World) -> None:
        miner = await world.submit(**MINER | {"draw_w": None})
        await asyncio.sleep(60.0)  # its draw is learned
        await world.price(0.05)
        await asyncio.sleep(60.0)
        assert world.limits_w == [LEAST_W]
        (board,) = world.machine.boards.values()
        (occupant,) = board.occupants
        board.remove(occupant.pid, world.machine.clock.now_s())
        board.put(replace(occupant, draw_w=300.0), world.machine.clock.now_s())
        await asyncio.sleep(300.0)
        assert world.daemon.controller.power.draws.natural_w(world.job(miner)) == 500.0
        assert world.limits_w == [LEAST_W]

    played(story)
