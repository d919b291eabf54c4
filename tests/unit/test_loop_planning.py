"""The loop plans when a plan could say something new, and only then."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from scheduler.control import loop
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.errors import JournalFull, Unavailable
from scheduler.model.jobs import Job, JobClass, JobState
from scheduler.model.settings import Config, SamplingConfig
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import run
from tests.harness.simulated import SimulatedNode

EACH_SECOND = Config(sampling=SamplingConfig(period_s=1.0))


class World(SimulatedNode):
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int = 1) -> None:
        super().__init__(tmp_path, lambda _: Workload(duration_s=1000.0), gpus=gpus, config=EACH_SECOND)
        self.plans = 0
        made = loop.plan

        def counted(*arguments: Any) -> Any:
            self.plans += 1
            return made(*arguments)

        monkeypatch.setattr(loop, "plan", counted)


def test_a_job_that_waits_is_not_planned_for_at_every_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        world = World(tmp_path, monkeypatch)
        await world.daemon.start()
        first, second = await world.submit(), await world.submit()
        await asyncio.sleep(30.0)
        before = world.plans
        await asyncio.sleep(25.0)  # readings, but no booking of usage and nothing else
        assert world.plans == before
        await asyncio.sleep(1000.0)
        assert (world.state(first), world.state(second)) == (JobState.SUCCEEDED, JobState.RUNNING)
        world.daemon.stop()

    run(story())


def test_ends_that_come_together_and_the_looks_at_their_gpus_are_one_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        world = World(tmp_path, monkeypatch, gpus=4)
        await world.daemon.start()
        first = [await world.submit() for _ in range(4)]
        second = [await world.submit() for _ in range(4)]
        await asyncio.sleep(999.9)
        assert {world.state(job) for job in first} == {JobState.RUNNING}
        before = world.plans
        await asyncio.sleep(0.2)
        assert {world.state(job) for job in first} == {JobState.SUCCEEDED}
        assert {world.state(job) for job in second} == {JobState.RUNNING}
        assert world.plans == before + 1
        world.daemon.stop()

    run(story())


def test_a_preemptors_start_is_prepared_when_the_last_of_its_victims_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops_s = {"j1": 1.0, "j2": 3.0}
    world = SimulatedNode(tmp_path, lambda job_id: Workload(stop_s=stops_s.get(job_id)), gpus=2)
    said: list[tuple[str, JobState]] = []

    def prepare_ahead(job: Job) -> None:
        said.append((job.id, world.state("j1")))

    async def story() -> None:
        await world.daemon.start()
        victims = [await world.submit(job_class=JobClass.BATCH, grace_s=9.0) for _ in range(2)]
        await asyncio.sleep(1.0)
        monkeypatch.setattr(world.daemon.controller.orders, "prepare_ahead", prepare_ahead)
        gang = await world.submit(job_class=JobClass.TRAINING, gpus=2)
        await asyncio.sleep(2.5)
        assert [world.state(victim) for victim in victims] == [JobState.PENDING, JobState.PREEMPTING]
        assert said == [], "the stops come first"
        await asyncio.sleep(1.0)
        assert said == [(gang, JobState.PENDING)], "once"
        assert world.state(gang) is JobState.RUNNING
        world.daemon.stop()

    run(story())


def test_a_job_that_comes_alone_to_free_gpus_is_prepared_while_it_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SimulatedNode(tmp_path, lambda _: Workload(duration_s=10.0), gpus=3)
    expected: list[str] = []

    async def story() -> None:
        await world.daemon.start()
        orders = world.daemon.controller.orders
        expect = orders.expect
        monkeypatch.setattr(orders, "expect", lambda job: (expected.append(job.id), expect(job)))
        first = await world.submit(gpus=2)
        large = await world.submit(gpus=2)
        assert (world.state(first), world.state(large)) == (JobState.STARTING, JobState.PENDING)
        assert expected == [first], "one GPU is free, which is too few"
        small = await world.submit(gpus=1, job_class=JobClass.INFERENCE)
        assert world.state(small) is JobState.STARTING
        assert expected == [first], "somebody waits"
        await asyncio.sleep(30.0)
        assert {world.state(job) for job in (first, large, small)} == {JobState.SUCCEEDED}
        world.daemon.stop()

    run(story())


def test_a_plan_whose_tick_was_not_kept_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        world = World(tmp_path, monkeypatch)
        await world.daemon.start()
        commit, full = SqliteJournal.commit, False

        def perhaps(self: SqliteJournal, derived: Any) -> None:
            if full:
                self.abandon()
                raise JournalFull("no space")
            commit(self, derived)

        monkeypatch.setattr(SqliteJournal, "commit", perhaps)
        full = True
        with pytest.raises(Unavailable):  # planned for, and dropped
            await world.submit()
        full = False
        first = await world.submit()  # its event has the number of the one that was dropped
        await asyncio.sleep(1.0)
        assert world.state(first) is JobState.RUNNING
        world.daemon.stop()

    run(story())
