"""What mining is worth in the loop: hashprices, proved hashrates, doubts; in virtual time.

There are no sockets in virtual time, so a miner's answer goes straight to its reader; `test_miners.py` has
the way over the network and `test_mining.py` the whole daemon.
"""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from scheduler.control import mining as mining_control
from scheduler.control.inbox import SetHashprices, SetPrices
from scheduler.control.mining import PORT_VARIABLE
from scheduler.control.mining_view import MinerView
from scheduler.effects.miners import reading_of
from scheduler.errors import FeedError, IllegalMove
from scheduler.model.jobs import JobClass, JobState
from scheduler.model.mining import Hashprice, Miner, MinerApi, MinerDoubt, MinerReading
from scheduler.model.prices import PricePoint
from scheduler.model.reasons import Reason
from scheduler.model.settings import Config, MiningConfig, OperatingPoint, PowerConfig, SamplingConfig
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import run
from tests.harness.rigs import Rig
from tests.harness.simulated import SimulatedNode

HOUR_S = 3600.0
DAY_S = 86_400.0
PORT = 4067
# It draws 500 W: 0.03 USD an hour at 0.06 USD per kWh. At 30 MH/s and 0.024 USD per MH/s and day it earns
# that.
MINER: dict[str, Any] = {
    "job_class": JobClass.MINING,
    "value_microusd_per_gpu_hour": 50_000,
    "draw_w": 500.0,
    "grace_s": 2.0,
    "miner": Miner(MinerApi.T_REX, PORT, "kawpow"),
}
FULL = MiningConfig(operating_point=OperatingPoint.FULL)
LASTING = MiningConfig(operating_point=OperatingPoint.FULL, hashprice_max_age_s=30 * DAY_S)


class World(SimulatedNode):
    """A node whose miners' APIs are rigs, by port; a port without one refuses."""

    def __init__(self, tmp_path: Path, mining: MiningConfig = FULL, gpus: int = 1) -> None:
        config = Config(power=PowerConfig(), mining=mining, sampling=SamplingConfig(period_s=30.0))
        super().__init__(tmp_path, lambda _: Workload(draw_w=500.0, stop_s=0.5), gpus=gpus, config=config)
        self.rigs: dict[int, Rig] = {}
        self.share_s: float | None = 10.0  # a share of each rig so often; None = none comes
        self.dead: set[int] = set()

    async def read(self, miner: Miner, port: int, token: str) -> MinerReading:
        if port not in self.rigs or port in self.dead:
            raise FeedError(f"{miner.api.value} on 127.0.0.1:{port} can't be read: refused")
        return reading_of(miner.api, self.rigs[port].answer(), miner.algorithm)

    async def begin(self) -> None:
        await self.daemon.start()
        self.shares = asyncio.get_running_loop().create_task(self._mine())

    async def _mine(self) -> None:
        while True:
            await asyncio.sleep(self.share_s or 1.0)
            for rig in self.rigs.values():
                rig.accepted += self.share_s is not None

    def rig(self, port: int = PORT, **fields: Any) -> Rig:
        self.rigs[port] = Rig(MinerApi.T_REX, port, **fields)
        return self.rigs[port]

    async def hashprice(self, usd_per_day: float, algorithm: str = "kawpow") -> None:
        one = Hashprice(algorithm, "MH/s", usd_per_day, self.machine.clock.now_s())
        await self.daemon.ask(SetHashprices((one,)))

    async def price(self, usd_per_kwh: float) -> None:
        now_s = self.machine.clock.now_s()
        await self.daemon.ask(SetPrices((PricePoint(now_s, usd_per_kwh, now_s + 30 * DAY_S),)))

    def value(self, job_id: str) -> float:
        """USD per GPU-hour."""
        return self.daemon.controller.ledger.table.value(self.job(job_id)) / 1e6

    def view(self) -> MinerView:
        (view,) = self.daemon.controller.mining.views()
        return view

    @property
    def problem(self) -> str:
        return self.daemon.controller.problems.get("miners", "")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Play a story in a world of its own."""

    def play(story: Callable[[World], Coroutine[Any, Any, None]], **fields: Any) -> None:
        async def whole() -> None:
            world = World(tmp_path, **fields)
            monkeypatch.setattr(mining_control, "read_miner", world.read)
            await world.begin()
            await story(world)
            world.shares.cancel()
            world.daemon.stop()

        run(whole())

    return play


def test_a_miner_is_worth_its_proved_hashrate_at_the_hashprice_less_fees(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER | {"miner": Miner(MinerApi.T_REX, PORT, "kawpow", 0.02)})
        await world.hashprice(0.024)
        assert world.value(job) == 0.05, "nothing is known yet: it is worth what it says"
        await asyncio.sleep(60.0)
        assert world.value(job) == pytest.approx(0.03 * 0.98)
        await world.hashprice(0.048)
        assert world.value(job) == pytest.approx(0.06 * 0.98)
        assert (world.view().doubt, world.problem) == (None, "")

    played(story)


def test_the_price_gate_goes_by_what_the_miner_earns_and_not_by_what_was_configured(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await world.price(0.05)  # energy costs 0.025 USD an hour
        await asyncio.sleep(120.0)
        assert world.state(job) is JobState.RUNNING
        await world.hashprice(0.016)  # it earns 0.02 USD an hour
        await asyncio.sleep(5.0)
        assert world.daemon.controller.reason(world.job(job)) is Reason.WAITING_FOR_PRICE
        await world.hashprice(0.024)
        await asyncio.sleep(5.0)
        assert world.state(job) is JobState.RUNNING

    played(story)


def test_hashprices_and_hashrates_survive_a_crash(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await asyncio.sleep(120.0)
        world.daemon.crash()
        await world.daemon.start()
        assert world.value(job) == pytest.approx(0.03)

    played(story)


def test_an_old_hashprice_falls_to_the_declared_value_and_a_new_one_brings_it_back(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER)
        await asyncio.sleep(25.0)  # nothing else happens when it becomes too old
        await world.hashprice(0.024)
        await world.price(0.05)
        await asyncio.sleep(HOUR_S - 60.0)
        assert world.state(job) is JobState.RUNNING
        await asyncio.sleep(63.0)
        assert world.value(job) == 0.0
        assert world.daemon.controller.reason(world.job(job)) is Reason.WAITING_FOR_PRICE
        await world.hashprice(0.024)
        await asyncio.sleep(5.0)
        assert world.state(job) is JobState.RUNNING

    played(story, mining=MiningConfig(hashprice_max_age_s=HOUR_S, operating_point=OperatingPoint.FULL))


def test_an_algorithm_without_a_hashprice_keeps_its_configured_value_and_the_doubt_is_named(
    played: Any,
) -> None:
    async def story(world: World) -> None:
        world.rig()
        job = await world.submit(**MINER)
        await world.hashprice(0.024, algorithm="octopus")
        await asyncio.sleep(60.0)
        assert world.value(job) == 0.05
        assert world.view().doubt is MinerDoubt.HASHPRICE
        assert "no hashprice of kawpow" in world.problem

    played(story)


@pytest.mark.timeout(300)
def test_a_hashrate_without_accepted_shares_is_worth_nothing_after_what_chance_explains(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await world.price(0.05)
        await asyncio.sleep(HOUR_S)
        assert world.state(job) is JobState.RUNNING
        patience_s = world.view().proof.patience_s
        world.share_s = None
        await asyncio.sleep(patience_s - 60.0)
        assert world.value(job) == pytest.approx(0.03)
        await asyncio.sleep(120.0)
        assert world.view().doubt is MinerDoubt.SHARES
        assert "no share was accepted for" in world.problem
        assert world.daemon.controller.reason(world.job(job)) is Reason.WAITING_FOR_PRICE
        # It is tried again, ever more seldom, and comes back for good with its shares.
        starts = world.job(job).attempt
        await asyncio.sleep(3 * HOUR_S)
        assert 2 <= world.job(job).attempt - starts <= 4
        world.share_s = 10.0
        await asyncio.sleep(2.5 * HOUR_S)
        assert world.state(job) is JobState.RUNNING
        assert (world.value(job), world.problem) == (pytest.approx(0.03), "")

    played(story, mining=LASTING)


def test_a_miner_that_never_gets_a_share_is_found_although_it_is_started_again_and_again(played: Any) -> None:
    async def story(world: World) -> None:
        world.share_s = None
        world.rig()
        job = await world.submit(**MINER)
        for _ in range(8):
            await asyncio.sleep(600.0)
            assert world.value(job) == 0.05 or world.view().doubt is MinerDoubt.SHARES
            other = await world.submit(job_class=JobClass.TRAINING)
            await asyncio.sleep(60.0)
            assert world.state(job) is not JobState.RUNNING
            world.machine.fail(next(p for p in world.machine.processes.values() if p.key.job_id == other))
            await asyncio.sleep(310.0)  # it backs off from being preempted
        assert world.value(job) == 0.0

    played(story)


def test_a_dead_api_is_no_dead_miner(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await world.price(0.05)
        await asyncio.sleep(300.0)
        world.dead.add(PORT)
        await asyncio.sleep(HOUR_S)
        assert world.state(job) is JobState.RUNNING
        assert world.view().doubt is MinerDoubt.API
        assert "its API is dead" in world.problem
        assert "refused" in world.problem
        assert world.value(job) == pytest.approx(0.03), "what was proved goes on counting"
        assert world.view().proof.silent_s < 120.0, "who does not answer is not silent"
        world.dead.clear()
        await asyncio.sleep(60.0)
        assert world.problem == ""

    played(story)


def test_an_api_that_never_answers_leaves_the_configured_value(played: Any) -> None:
    async def story(world: World) -> None:
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await asyncio.sleep(DAY_S / 6)
        assert (world.state(job), world.value(job)) == (JobState.RUNNING, 0.05)
        assert world.view().doubt is MinerDoubt.API

    played(story)


def test_an_answer_without_figures_is_a_doubt(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=None)
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await asyncio.sleep(60.0)
        assert (world.view().doubt, world.value(job)) == (MinerDoubt.FIGURES, 0.05)

    played(story)


def test_a_hashrate_that_no_gpu_has_is_not_believed(played: Any) -> None:
    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e9)
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await asyncio.sleep(120.0)
        assert (world.view().doubt, world.value(job)) == (MinerDoubt.IMPLAUSIBLE, 0.05)

    played(story)


def test_shares_that_are_refused_take_their_part_and_a_flicker_is_no_news(played: Any) -> None:
    async def story(world: World) -> None:
        rig = world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER)
        await world.hashprice(0.024)
        await asyncio.sleep(300.0)
        head = world.daemon.controller.ledger.power
        for rate in (30.5e6, 29.6e6, 31e6) * 20:
            rig.hashrate_hs = rate
            await asyncio.sleep(10.0)
        assert world.daemon.controller.ledger.power.hashrates_hs == head.hashrates_hs
        for _ in range(200):
            rig.refused += 1
            await asyncio.sleep(10.0)
        assert world.value(job) == pytest.approx(0.015, rel=0.2)

    played(story)


def test_counters_that_begin_anew_are_no_silence(played: Any) -> None:
    async def story(world: World) -> None:
        rig = world.rig(hashrate_hs=30e6)
        await world.submit(**MINER)
        for _ in range(20):
            await asyncio.sleep(300.0)
            rig.accepted = 0  # its own watchdog restarted it
            assert world.problem == ""
        assert world.view().proof.accepted_sum > 500

    played(story)


def test_each_instance_has_the_port_of_its_gpu_and_two_jobs_at_one_port_are_told(played: Any) -> None:
    async def story(world: World) -> None:
        for port in (PORT, PORT + 1):
            world.rig(port, hashrate_hs=30e6 * (1 + port - PORT))
        first = await world.submit(**MINER)
        second = await world.submit(**MINER)
        await world.hashprice(0.024)
        await asyncio.sleep(120.0)
        assert sorted((world.value(first), world.value(second))) == pytest.approx([0.03, 0.06])
        control = world.daemon.controller
        ports = {control.mining.variables(world.job(one), world.job(one).attempts[-1].gpus)[PORT_VARIABLE]
                 for one in (first, second)}  # fmt: skip
        assert ports == {str(PORT), str(PORT + 1)}
        await world.submit(**MINER | {"miner": Miner(MinerApi.T_REX, PORT - 1, "kawpow")})
        await world.submit(**MINER | {"miner": Miner(MinerApi.T_REX, PORT - 2, "kawpow")})
        await asyncio.sleep(60.0)
        assert MinerDoubt.PORT in {view.doubt for view in control.mining.views()}
        assert f"expected at port {PORT}" in world.problem or f"expected at port {PORT + 1}" in world.problem

    played(story, gpus=4)


def test_clients_may_not_set_what_a_source_says(played: Any, tmp_path: Path) -> None:
    source = tmp_path / "hashprices.csv"

    async def story(world: World) -> None:
        world.rig(hashrate_hs=30e6)
        job = await world.submit(**MINER)
        control = world.daemon.controller
        await asyncio.sleep(5.0)
        assert "No such file" in control.problems["hashprices"]
        assert world.value(job) == 0.01, "a source that has never answered: the declared value"
        with pytest.raises(IllegalMove, match="hashprices come from"):
            await world.hashprice(1.0)
        source.write_text("algorithm,unit,usd_per_day\nKawPow,GH/s,24\n")
        await asyncio.sleep(120.0)
        assert "hashprices" not in control.problems
        assert world.value(job) == pytest.approx(0.03)

    played(
        story,
        mining=MiningConfig(
            hashprice_source=str(source),
            hashprice_poll_s=60.0,
            stale_value_usd_per_gpu_hour=0.01,
            operating_point=OperatingPoint.FULL,
        ),
    )
