"""The simulated machine: work proceeds with speed, is kept between attempts, and energy is what was drawn."""

import asyncio

import pytest

from scheduler.effects.launcher import AttemptKey
from scheduler.simulation.boards import PROFILES, RESERVE_MIB, SETTLING_S, boards
from scheduler.simulation.machine import SIGKILL, SIGTERM, Machine, Process, Workload
from scheduler.simulation.virtual_time import EPOCH_S, VirtualClock, run

H100 = PROFILES["H100"]


class World:
    def __init__(self, *workloads: Workload, gpus: int = 1) -> None:
        self.clock = VirtualClock()
        self.ends: list[tuple[str, float, int | None, int | None]] = []
        self.machine = Machine(
            boards([H100] * gpus, "n", EPOCH_S), self.clock, lambda job_id: workloads[int(job_id[1:])]
        )
        self.machine.on_exit = self._ended
        self.gpus = tuple(self.machine.boards)

    def start(self, job: int, attempt: int = 1) -> Process:
        return self.machine.spawn(AttemptKey(f"j{job}", attempt), self.gpus)

    def energy_kj(self) -> float:
        return sum(b.sample(self.clock.true_s()).energy_mj or 0 for b in self.machine.boards.values()) / 1e6

    def _ended(self, process: Process, exit_code: int | None, signal: int | None) -> None:
        self.ends.append((process.key.job_id, self.clock.true_s() - EPOCH_S, exit_code, signal))


def test_work_ends_when_it_is_done_and_its_energy_is_its_draw() -> None:
    async def story() -> None:
        world = World(Workload(duration_s=100.0, draw_w=570.0, exit_code=3))
        world.start(0)
        await asyncio.sleep(1000.0)
        assert world.ends == [("j0", 100.0, 3, None)]
        # What settling leaves out on the way up comes back on the way down.
        assert world.energy_kj() == pytest.approx((100.0 * 570.0 + 900.0 * 70.0) / 1e3, abs=0.001)
        assert world.machine.useful_s("j0") == pytest.approx(100.0)

    run(story())


def test_a_limit_slows_work_down_in_proportion_from_then_on() -> None:
    async def story() -> None:
        world = World(Workload(duration_s=100.0, draw_w=600.0), gpus=2)
        world.start(0)
        await asyncio.sleep(40.0)
        world.machine.set_power_limit(world.gpus[1], 300.0)  # the slowest board sets the pace
        await asyncio.sleep(100.0)
        assert world.machine.useful_s("j0") == pytest.approx(90.0)
        world.machine.set_power_limit(world.gpus[1], 700.0)
        await asyncio.sleep(100.0)
        assert world.ends == [("j0", pytest.approx(150.0), 0, None)]

    run(story())


def test_work_is_kept_between_attempts_and_a_restart_costs_its_loss_first() -> None:
    async def story() -> None:
        world = World(Workload(duration_s=100.0, restart_loss_s=30.0, stop_s=2.0))
        first = world.start(0)
        await asyncio.sleep(60.0)
        world.machine.terminate(first)
        await asyncio.sleep(10.0)
        assert world.ends == [("j0", 62.0, None, SIGTERM)]
        world.start(0, attempt=2)  # at 70: 30 s of loss, then the 40 s that are left
        await asyncio.sleep(25.0)
        assert world.machine.useful_s("j0") == pytest.approx(60.0)
        await asyncio.sleep(100.0)
        assert world.ends[1] == ("j0", pytest.approx(140.0), 0, None)

    run(story())


def test_who_ignores_sigterm_dies_of_sigkill_and_its_memory_goes_later() -> None:
    async def story() -> None:
        world = World(Workload(stop_s=None, memory_mib=1000, release_s=5.0))
        process = world.start(0)
        board = world.machine.boards[world.gpus[0]]
        world.machine.terminate(process)
        await asyncio.sleep(60.0)
        assert world.ends == []
        world.machine.kill(process)
        assert world.ends == [("j0", 60.0, None, SIGKILL)]
        holders = board.holders(world.clock.true_s())
        assert (holders.processes, holders.memory_used_mib) == ((), RESERVE_MIB + 1000)
        await asyncio.sleep(5.0)
        assert board.memory_used_mib == RESERVE_MIB

    run(story())


def test_shares_add_what_each_adds_to_idle() -> None:
    async def story() -> None:
        half = Workload(share_milli=500, draw_w=570.0)
        world = World(half, half)
        world.start(0)
        board = world.machine.boards[world.gpus[0]]
        assert board.target_w == pytest.approx(70.0 + 250.0)
        world.start(1)
        assert board.target_w == pytest.approx(570.0)
        await asyncio.sleep(20 * SETTLING_S)
        assert board.sample(world.clock.true_s()).power_w == pytest.approx(570.0, abs=0.1)

    run(story())


def test_a_cpu_job_ends_too_and_a_reboot_ends_all_in_silence() -> None:
    async def story() -> None:
        world = World(Workload(duration_s=5.0), Workload(duration_s=50.0))
        world.machine.spawn(AttemptKey("j0", 1), ())
        world.start(1)
        await asyncio.sleep(10.0)
        world.machine.reboot()
        await asyncio.sleep(100.0)
        assert world.ends == [("j0", 5.0, 0, None)]
        assert not world.machine.processes
        assert world.machine.boards[world.gpus[0]].occupants == ()

    run(story())
