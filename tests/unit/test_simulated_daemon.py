"""The real loop on a simulated machine: it preempts, is killed, comes back, and every job's work is right."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from scheduler.errors import Unavailable
from scheduler.model.jobs import JobClass, JobState, RestartRule
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.harness.simulated import SimulatedNode


class World(SimulatedNode):
    def __init__(self, tmp_path: Path, gpus: int = 1, nodes: int = 1) -> None:
        self.workloads: dict[str, Workload] = {}
        super().__init__(tmp_path, self.workloads.__getitem__, gpus=gpus, nodes=nodes)

    async def submit_work(self, workload: Workload, job_class: JobClass, **fields: Any) -> str:
        job_id = await self.submit(job_class=job_class, **fields)
        self.workloads[job_id] = workload
        return job_id


def test_a_miner_gives_way_and_goes_on_where_it_was(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        await world.daemon.start()
        miner = await world.submit_work(
            Workload(duration_s=3600.0, stop_s=1.0, restart_loss_s=10.0), JobClass.MINING, grace_s=2.0
        )
        await asyncio.sleep(600.0)
        urgent = await world.submit_work(Workload(duration_s=100.0), JobClass.INFERENCE)
        await asyncio.sleep(50.0)
        assert world.job(miner).state is JobState.PENDING
        assert world.job(miner).attempts[0].preempted_by == urgent
        # One second to stop, then the hand-over is proved and the successor starts.
        started_s = world.job(urgent).attempts[0].started_s
        assert started_s == pytest.approx(EPOCH_S + 601.0, abs=0.1)
        await asyncio.sleep(4000.0)
        assert world.job(urgent).state is JobState.SUCCEEDED
        done = world.job(miner)
        assert (done.state, done.attempt, done.exit_code) == (JobState.SUCCEEDED, 2, 0)
        assert done.finished_s == pytest.approx(EPOCH_S + 3600.0 + 1.0 + 100.0 + 10.0, abs=0.5)
        world.daemon.stop()

    run(story())


def test_a_killed_daemon_adopts_what_runs_and_learns_what_ended(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, gpus=2)
        await world.daemon.start()
        short = await world.submit_work(Workload(duration_s=100.0, exit_code=7), JobClass.TRAINING)
        long = await world.submit_work(Workload(duration_s=1000.0), JobClass.TRAINING)
        await asyncio.sleep(10.0)
        pid = world.job(long).attempts[0].pid
        world.daemon.crash()
        with pytest.raises(Unavailable):
            await world.submit_work(Workload(), JobClass.TRAINING)
        await asyncio.sleep(300.0)
        await world.daemon.start()
        await asyncio.sleep(1.0)
        assert (world.job(short).state, world.job(short).exit_code) == (JobState.FAILED, 7)
        assert world.job(long).attempts[0].pid == pid
        await asyncio.sleep(1000.0)
        assert (world.job(long).state, world.job(long).attempt) == (JobState.SUCCEEDED, 1)
        world.daemon.stop()

    run(story())


def test_a_launcher_that_dies_and_a_reboot_lose_attempts_and_no_job(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        await world.daemon.start()
        job = await world.submit_work(
            Workload(duration_s=1000.0), JobClass.TRAINING, restart=RestartRule.ON_FAILURE
        )
        await asyncio.sleep(100.0)
        world.daemon.launcher.die()
        await asyncio.sleep(100.0)
        assert (world.job(job).state, world.job(job).attempts[0].lost) == (JobState.RUNNING, True)
        world.daemon.reboot()
        await asyncio.sleep(60.0)
        await world.daemon.start()
        await asyncio.sleep(60.0)
        assert [attempt.lost for attempt in world.job(job).attempts] == [True, True, False]
        assert world.job(job).attempts[1].end_reason == "NODE_REBOOTED"
        world.daemon.stop()

    run(story())


def test_one_planner_serves_several_nodes_and_gangs_stay_on_one(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, gpus=4, nodes=3)
        await world.daemon.start()
        gangs = [await world.submit_work(Workload(), JobClass.BATCH, gpus=3) for _ in range(3)]
        cpu = [await world.submit_work(Workload(), JobClass.BATCH, gpus=0, cpus=40) for _ in range(4)]
        urgent = await world.submit_work(Workload(), JobClass.INFERENCE, gpus=4)
        await asyncio.sleep(60.0)
        boards_of = world.daemon.machine.boards
        nodes = {
            job_id: {boards_of[uuid].identity.node for uuid in world.job(job_id).attempts[-1].gpus}
            for job_id in (*gangs, urgent)
            if world.job(job_id).holds
        }
        assert all(len(found) == 1 for found in nodes.values())
        assert len({next(iter(found)) for found in nodes.values()}) == 3
        assert [world.job(job_id).state for job_id in gangs].count(JobState.PENDING) == 1
        assert world.job(urgent).state is JobState.RUNNING
        # 64 CPUs a node: one of them each, on a node of its own.
        held = [world.job(job_id).attempts[-1].node for job_id in cpu if world.job(job_id).holds]
        assert sorted(held) == [0, 1, 2]
        world.daemon.stop()

    run(story())


def test_what_a_finished_share_still_holds_is_not_given_on_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        await world.daemon.start()
        share = {"gpu_share_milli": 250, "gpu_memory_mib": 20_000}
        works = {"share_milli": 250, "memory_mib": 20_000}
        stays = await world.submit_work(Workload(**works), JobClass.TRAINING, **share)
        done = await world.submit_work(
            Workload(duration_s=5.0, release_s=25.0, **works), JobClass.TRAINING, **share
        )
        await asyncio.sleep(6.0)
        assert world.state(done) is JobState.SUCCEEDED
        world.daemon.crash()
        await world.daemon.start()
        wants = {"gpu_share_milli": 700, "gpu_memory_mib": 50_000}
        waits = await world.submit_work(
            Workload(share_milli=700, memory_mib=50_000), JobClass.TRAINING, **wants
        )
        await asyncio.sleep(10.0)
        assert (world.state(stays), world.state(waits)) == (JobState.RUNNING, JobState.PENDING)
        await asyncio.sleep(20.0)
        assert world.state(waits) is JobState.RUNNING
        world.daemon.stop()

    run(story())


def test_a_boot_whose_first_tick_could_not_be_written_is_known_to_the_next_daemon(tmp_path: Path) -> None:
    """Else it would take the counters for new ones once more, and book what they show twice."""

    async def story() -> None:
        world = World(tmp_path)
        await world.daemon.start()
        await asyncio.sleep(70.0)
        world.daemon.reboot()
        world.daemon.disk.failure = "fsync"
        await world.daemon.start()
        await asyncio.sleep(5.0)
        world.daemon.disk.failure = ""
        await asyncio.sleep(120.0)
        ledger = world.daemon.controller.ledger
        (booked,) = ledger.booked.values()
        world.daemon.crash()
        await world.daemon.start()
        again = world.daemon.controller
        assert (ledger.boot_id, again.rebooted) == (world.machine.boot_id, False)
        assert again.ledger.booked[booked.uuid].energy_mj >= booked.energy_mj
        world.daemon.stop()

    run(story())
