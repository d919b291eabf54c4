"""The real loop, ledger and journal on a simulated machine; the daemon can be killed and started again."""

import asyncio
from pathlib import Path
from typing import Any

from scheduler.control.board import NodeSize
from scheduler.control.inbox import Command
from scheduler.control.loop import Controller, Effects, Site
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.errors import Unavailable
from scheduler.model.settings import Config
from scheduler.simulation.machine import Machine
from scheduler.simulation.node import MachineGpus, MachineProcesses, SimulatedLauncher

VERSION = "simulated"


class SimulatedDaemon:
    """A daemon on a machine, with its state in a directory; machine and launcher outlive it."""

    def __init__(
        self, machine: Machine, state_dir: Path, config: Config, sizes: tuple[NodeSize, ...]
    ) -> None:
        """Take the machine, the journal's directory (best in memory), the settings, each node's size."""
        self.machine = machine
        self.launcher = SimulatedLauncher(machine)
        self.config = config
        self._gpus = MachineGpus(machine)
        self._state_dir = state_dir
        self._sizes = sizes
        self._journal: SqliteJournal | None = None
        self._controller: Controller | None = None
        self._pid = 0
        self._asked: set[asyncio.Future[Any]] = set()

    @property
    def runs(self) -> bool:
        """Whether it is up."""
        return self._controller is not None

    @property
    def controller(self) -> Controller:
        """The loop of the daemon that runs.

        Raises:
            Unavailable: None does.
        """
        if self._controller is None:
            raise Unavailable("no daemon runs")
        return self._controller

    async def start(self) -> None:
        """Start the daemon: it reads its journal and adopts what still runs.

        Raises:
            NodeError: It refuses to start; why is in the words.
        """
        assert not self.runs
        clock = self.machine.clock
        self._pid += 1
        kept = self.config.state
        journal = SqliteJournal(
            self._state_dir,
            now_s=clock.now_s(),
            segment_events=kept.journal_segment_events_max,
            segments_kept=kept.journal_segments_kept_max,
        )
        try:
            effects = Effects(clock, journal, self.launcher, self._gpus, MachineProcesses(self.machine))
            site = Site(
                sizes=self._sizes,
                base_environment={},
                remove_job=lambda _: None,
                was_begun=self.launcher.was_begun,
                boot_id=self.machine.boot_id,
                version=VERSION,
                pid=self._pid,
            )
            controller = Controller(effects, self.config, site)
            await controller.start()
        except BaseException:
            journal.close()
            self._gpus.leave()
            raise
        self._journal, self._controller = journal, controller

    async def ask(self, command: Command) -> Any:
        """Hand a command to the loop; returns its answer.

        Raises:
            RequestError: It was refused; or `Unavailable`: no daemon runs, or it ended before it answered,
                and whether it took the command is not known.
        """
        answer = self.controller.inbox.ask(command)
        self._asked.add(answer)
        try:
            return await answer
        finally:
            self._asked.discard(answer)

    def stop(self) -> None:
        """End the daemon in good order."""
        self.controller.stop()
        self._leave()

    def crash(self) -> None:
        """End the daemon as `kill -9` does: what was not committed is gone."""
        self.controller.halt()
        self._leave()

    def reboot(self) -> None:
        """Crash, and the machine with it."""
        if self.runs:
            self.crash()
        self.launcher.reboot()

    def _leave(self) -> None:
        self.launcher.leave()
        self._gpus.leave()
        assert self._journal is not None
        self._journal.close()
        self._journal = self._controller = None
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(Unavailable("the daemon ended before it answered"))
