"""A node whose draw is watched, for benchmarks of power in virtual time."""

import asyncio
from pathlib import Path

from scheduler.model.gpus import GpuLimit
from scheduler.model.settings import Config
from scheduler.simulation.machine import Workload
from tests.harness.simulated import SimulatedNode

# To set a power limit.
LIMIT_CALL_S = 0.005
NOTHING_SPECIAL = Workload()


class PoweredNode(SimulatedNode):
    """Boards whose draw settles and whose limits take a moment; `loads` says what each job's process does."""

    def __init__(
        self, directory: Path, config: Config, gpus: int, otherwise: Workload = NOTHING_SPECIAL
    ) -> None:
        """Take an empty directory, the settings, and what a job does that `loads` doesn't name."""
        self.loads: dict[str, Workload] = {}
        self.set_s: list[float] = []  # when limits were set
        self.config = config
        super().__init__(directory, lambda job: self.loads.get(job, otherwise), gpus=gpus, config=config)
        gpu_calls = self.daemon._gpus
        set_limit = gpu_calls.set_power_limit

        async def slowly(uuid: str, watts: float) -> GpuLimit:
            await asyncio.sleep(LIMIT_CALL_S)
            self.set_s.append(self.now_s)
            return await set_limit(uuid, watts)

        gpu_calls.set_power_limit = slowly  # type: ignore[method-assign]

    @property
    def now_s(self) -> float:
        """The node's clock."""
        return self.machine.clock.now_s()

    @property
    def draw_w(self) -> float:
        """What the site truly draws."""
        return self.site_w(sum((b.sample(self.now_s).power_w or 0.0) for b in self.machine.boards.values()))

    @property
    def demand_w(self) -> float:
        """What it would draw without limits."""
        return self.site_w(sum(board.natural_w for board in self.machine.boards.values()))

    @property
    def most_w(self) -> float:
        """What it draws with every board at its largest limit."""
        return self.site_w(sum(board.profile.power_limit_w_max for board in self.machine.boards.values()))

    def site_w(self, boards_w: float) -> float:
        """The site's watts with so much on its boards."""
        return (boards_w + self.config.power.base_w) * self.config.power.pue
