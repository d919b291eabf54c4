"""The real loop, ledger and journal on a simulated machine; the daemon can be killed and started again."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scheduler.control.board import NodeSize
from scheduler.control.inbox import Command
from scheduler.control.loop import Controller, Effects, Site
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.errors import NodeError, Unavailable
from scheduler.model.settings import Config
from scheduler.simulation.machine import Machine
from scheduler.simulation.node import MachineGpus, MachineProcesses, SimulatedLauncher
from scheduler.simulation.storage import Disk

VERSION = "simulated"


class SimulatedDaemon:
    """A daemon on a machine, with its state in a directory; machine and launcher outlive it."""

    def __init__(
        self,
        machine: Machine,
        state_dir: Path,
        config: Config,
        sizes: tuple[NodeSize, ...],
        wrap: Callable[[Effects], Effects] | None = None,
        *,
        keeps_decisions: bool = True,
    ) -> None:
        """Take the machine, the journal's directory (best in memory), the settings, each node's size.

        `wrap` may put something between each daemon and its effects. `keeps_decisions` as `Site` has it.
        """
        self.machine = machine
        self.launcher = SimulatedLauncher(machine)
        self.disk = Disk(state_dir)
        self.config = config
        self._gpus = MachineGpus(machine)
        self._sizes = sizes
        self._wrap = wrap
        self._keeps_decisions = keeps_decisions
        self._journal: SqliteJournal | None = None
        self._controller: Controller | None = None
        self._serves = False
        self._pid = 0
        self._asked: set[asyncio.Future[Any]] = set()

    @property
    def runs(self) -> bool:
        """Whether it is up, or about to be."""
        return self._journal is not None

    @property
    def serves(self) -> bool:
        """Whether it takes commands: it has adopted what runs."""
        return self._serves

    @property
    def loop(self) -> Controller | None:
        """The loop of the daemon that is up, or about to be."""
        return self._controller

    @property
    def controller(self) -> Controller:
        """The loop of the daemon that runs.

        Raises:
            Unavailable: None does, or it is still starting.
        """
        if self._controller is None or not self._serves:
            raise Unavailable("no daemon runs")
        return self._controller

    @property
    def journal(self) -> SqliteJournal:
        """The journal of the daemon that runs, or is about to.

        Raises:
            Unavailable: None does.
        """
        if self._journal is None:
            raise Unavailable("no daemon runs")
        return self._journal

    async def start(self) -> None:
        """Start the daemon: it reads its journal and adopts what still runs.

        Raises:
            NodeError: It refuses to start; why is in the words.
        """
        assert not self.runs
        clock = self.machine.clock
        self._pid += 1
        kept = self.config.state
        try:
            journal = SqliteJournal(
                self.disk.directory,
                now_s=clock.now_s(),
                segment_events=kept.journal_segment_events_max,
                segments_kept=kept.journal_segments_kept_max,
                storage=self.disk,
            )
        except BaseException:
            self.disk.closed()
            raise
        self._journal = journal
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
                keeps_decisions=self._keeps_decisions,
            )
            controller = Controller(self._wrap(effects) if self._wrap else effects, self.config, site)
            self._controller = controller
            await controller.start()
        except NodeError:
            self._leave()
            raise
        self._serves = True

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
        """End the daemon as `kill -9` does: what was not written is gone."""
        self._die(is_power_lost=False)

    def reboot(self) -> None:
        """The power fails: whatever was not synced is gone too, and every process of the machine."""
        if self.runs:
            self._die(is_power_lost=True)
        self.launcher.reboot()

    def _die(self, *, is_power_lost: bool) -> None:
        image = self.disk.image(is_power_lost=is_power_lost)
        self._leave()
        self.disk.restore(image)

    def _leave(self) -> None:
        self._serves = False
        self.launcher.leave()
        self._gpus.leave()
        if self._controller is not None:
            self._controller.halt()
        assert self._journal is not None
        # Where a crash came in the middle of a transaction SQLite takes that back as it closes.
        with contextlib.suppress(sqlite3.Error):
            self._journal.close()
        self.disk.closed()
        self._journal = self._controller = None
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(Unavailable("the daemon ended before it answered"))
