"""The real loop on a simulated machine, for tests in virtual time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scheduler.control.board import NodeSize
from scheduler.control.inbox import Submission, Submit
from scheduler.control.loop import Effects
from scheduler.model.jobs import Job, JobState
from scheduler.model.settings import Config
from scheduler.simulation.boards import PROFILES, Board, boards
from scheduler.simulation.daemon import SimulatedDaemon
from scheduler.simulation.machine import Machine, Workload
from scheduler.simulation.virtual_time import EPOCH_S, VirtualClock
from tests.harness.values import SPEC

SIZE = NodeSize(64, 512_000, 100)
DEFAULTS = Config()


class SimulatedNode:
    """A daemon over nodes of H100 boards; what a job's process does is looked up by job id."""

    def __init__(
        self,
        state_dir: Path,
        workload: Callable[[str], Workload],
        *,
        gpus: int = 1,
        nodes: int = 1,
        config: Config = DEFAULTS,
        wrap: Callable[[Effects], Effects] | None = None,
    ) -> None:
        made: dict[str, Board] = {}
        for row in range(nodes):
            made |= boards([PROFILES["H100"]] * gpus, f"n{row}", EPOCH_S, row)
        self.machine = Machine(made, VirtualClock(), workload)
        self.daemon = SimulatedDaemon(self.machine, state_dir, config, (SIZE,) * nodes, wrap)

    async def submit(self, **fields: Any) -> str:
        """Submit a job; its id."""
        (job,) = await self.daemon.ask(Submit((Submission(replace(SPEC, **fields), {}),)))
        return str(job.id)

    def job(self, job_id: str) -> Job:
        """The job as the ledger has it."""
        job = self.daemon.controller.ledger.by_id(job_id)
        assert job is not None
        return job

    def state(self, job_id: str) -> JobState:
        """Where the job stands."""
        return self.job(job_id).state
