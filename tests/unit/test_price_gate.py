"""Prices in the loop: set or read, kept, told to the planner; miners follow them in virtual time."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from scheduler.control.inbox import SetPrices
from scheduler.errors import IllegalMove
from scheduler.model.jobs import JobClass, JobState
from scheduler.model.prices import PricePoint
from scheduler.model.reasons import Reason
from scheduler.model.settings import Config, MiningConfig, OperatingPoint, PowerConfig, SamplingConfig
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.harness.simulated import SimulatedNode

HOUR_S = 3600.0
# At 0.03 USD per GPU-hour and 500 W it breaks even at 0.06 USD per kWh.
MINER: dict[str, Any] = {
    "job_class": JobClass.MINING,
    "value_microusd_per_gpu_hour": 30_000,
    "draw_w": 500.0,
    "grace_s": 2.0,
    "restart_loss_s": 300.0,
}


class World(SimulatedNode):
    def __init__(self, tmp_path: Path, power: PowerConfig | None = None) -> None:
        config = Config(
            power=power or PowerConfig(),
            mining=MiningConfig(operating_point=OperatingPoint.FULL),  # on and off only
            sampling=SamplingConfig(period_s=30.0),
        )
        super().__init__(tmp_path, lambda _: Workload(draw_w=500.0, stop_s=0.5), config=config)

    async def mine(self) -> str:
        return await self.submit(**MINER)

    async def price(self, *usd_per_kwh: float) -> None:
        """One price an hour, from now on."""
        now_s = self.machine.clock.now_s()
        points = (PricePoint(now_s + hour * HOUR_S, usd) for hour, usd in enumerate(usd_per_kwh))
        await self.daemon.ask(SetPrices(tuple(points)))

    def waits_for(self, job_id: str) -> Reason:
        return self.daemon.controller.reason(self.job(job_id))


def test_a_miner_follows_the_price_from_hour_to_hour(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        await world.daemon.start()
        miner = await world.mine()
        await world.price(0.03, 0.30, 0.064, 0.05, -0.02)
        states = []
        await asyncio.sleep(60.0)
        for _ in range(5):
            states.append((world.job(miner).state, world.waits_for(miner)))
            await asyncio.sleep(HOUR_S)
        mining = (JobState.RUNNING, Reason.PROCESS_STARTED)
        dear = (JobState.PENDING, Reason.WAITING_FOR_PRICE)
        # At 0.064 it would go on if it ran, but does not start.
        assert states == [mining, dear, dear, mining, mining]
        attempts = world.job(miner).attempts
        assert attempts[0].exited_s == pytest.approx(EPOCH_S + HOUR_S + 0.5, abs=0.1)
        assert attempts[0].end_reason is Reason.STOPPED_FOR_PRICE
        assert attempts[1].started_s == pytest.approx(EPOCH_S + 3 * HOUR_S, abs=0.1)
        world.daemon.stop()

    run(story())


def test_the_last_price_holds_for_its_age_then_the_declared_one(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, PowerConfig(price_max_age_s=7200.0))
        await world.daemon.start()
        miner = await world.mine()
        await world.price(0.03)
        await asyncio.sleep(7100.0)
        assert world.job(miner).state is JobState.RUNNING
        await asyncio.sleep(200.0)
        assert world.waits_for(miner) is Reason.WAITING_FOR_PRICE
        price = world.daemon.controller.prices.price
        assert price is not None
        assert (price.usd_per_kwh, price.is_declared) == (1.0, True)
        await world.daemon.ask(SetPrices(()))  # nobody knows: energy costs nothing
        await asyncio.sleep(1.0)
        assert world.job(miner).state is JobState.RUNNING
        world.daemon.stop()

    run(story())


def test_prices_survive_a_crash_and_pue_counts(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, PowerConfig(pue=1.5))
        await world.daemon.start()
        miner = await world.mine()
        await world.price(0.045, 0.035)  # with PUE 0.0675, then 0.0525
        await asyncio.sleep(60.0)
        assert world.waits_for(miner) is Reason.WAITING_FOR_PRICE
        world.daemon.crash()
        await world.daemon.start()
        await asyncio.sleep(60.0)
        assert world.waits_for(miner) is Reason.WAITING_FOR_PRICE
        await asyncio.sleep(HOUR_S)
        assert world.job(miner).state is JobState.RUNNING
        world.daemon.stop()

    run(story())


def test_a_file_is_read_again_and_again_and_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    source = tmp_path / "prices.csv"

    async def story() -> None:
        world = World(tmp_path / "state", PowerConfig(price_source=str(source), price_poll_s=60.0))
        await world.daemon.start()
        miner = await world.mine()
        await asyncio.sleep(5.0)
        control = world.daemon.controller
        # Not there yet: the declared price holds, and the daemon says why.
        assert world.waits_for(miner) is Reason.WAITING_FOR_PRICE
        assert "No such file" in control.problems["prices"]
        source.write_text(f"start,usd_per_mwh\n{EPOCH_S},40\n")
        await asyncio.sleep(60.0)
        assert world.job(miner).state is JobState.RUNNING
        assert "prices" not in control.problems
        with pytest.raises(IllegalMove, match="prices come from"):
            await world.price(0.5)
        source.write_text("<html>")
        await asyncio.sleep(120.0)
        assert "no series of prices" in control.problems["prices"]
        assert world.job(miner).state is JobState.RUNNING  # by the last price that was known
        source.write_text(f"start,usd_per_mwh\n{EPOCH_S},400\n")
        await asyncio.sleep(1000.0)
        assert world.waits_for(miner) is Reason.WAITING_FOR_PRICE
        world.daemon.stop()

    run(story())


def test_inference_runs_at_any_price(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        await world.daemon.start()
        await world.price(50.0)
        job = await world.submit(job_class=JobClass.INFERENCE, draw_w=500.0)
        await asyncio.sleep(1.0)
        assert world.state(job) is JobState.RUNNING
        world.daemon.stop()

    run(story())
