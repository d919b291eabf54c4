"""Simulated GPUs for `serve --simulate`: boards that follow real processes.

A job that starts on a GPU shows in its process list and holds memory until its process is gone. Which process
is on which GPU is learnt from the launcher's reports (`ObservingLauncher`), as a driver learns it from the
process itself.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scheduler.effects.clock import Clock
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.launcher import (
    AttemptKey,
    Exited,
    Frozen,
    Launcher,
    LauncherGone,
    LauncherHello,
    Report,
    Started,
    StartOrder,
    StopOrder,
    Thawed,
)
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuLimit
from scheduler.simulation.boards import DRIVER_VERSION, Board, Occupant, Profile, boards

# What runs without a declared draw takes this part of the largest limit.
_BUSY_RATIO = 0.8


class SimulatedGpus:
    """GPUs that exist in this process only; they serve the Protocol `Gpus`."""

    def __init__(self, profiles: list[Profile], clock: Clock, *, node: str) -> None:
        """Make the boards of a node."""
        self._clock = clock
        self._boards = boards(profiles, node, clock.now_s())
        self._pids: defaultdict[str, dict[AttemptKey, int]] = defaultdict(dict)  # by UUID
        self._frozen: set[AttemptKey] = set()
        self._released = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> GpuReadings:
        self._task = asyncio.get_running_loop().create_task(self._sample(on_readings, period_s))
        return self._readings()

    async def holders(self, uuid: str) -> GpuHolders:
        return self._looked(self._board(uuid)).holders(self._clock.now_s())

    async def set_power_limit(self, uuid: str, power_limit_w: float) -> GpuLimit:
        return self._looked(self._board(uuid)).set_power_limit(power_limit_w, self._clock.now_s())

    async def release(self) -> None:
        self._released = True

    async def acquire(self) -> None:
        self._released = False

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def hold(self, key: AttemptKey, gpus: list[str], pid: int) -> None:
        """A job's process uses these GPUs from now on."""
        for uuid in gpus:
            if uuid in self._boards:
                self._pids[uuid][key] = pid
                self._looked(self._boards[uuid])

    def drop(self, key: AttemptKey) -> None:
        """The job's processes are gone."""
        self._frozen.discard(key)
        for uuid, pids in self._pids.items():
            if pids.pop(key, None) is not None:
                self._looked(self._boards[uuid])

    async def _sample(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            if not self._released:
                on_readings(self._readings())

    def _readings(self) -> GpuReadings:
        now_s = self._clock.now_s()
        return GpuReadings(
            identities=tuple(board.identity for board in self._boards.values()),
            samples=tuple(self._looked(board).sample(now_s) for board in self._boards.values()),
            errors={},
            driver_version=DRIVER_VERSION,
        )

    def _board(self, uuid: str) -> Board:
        board = self._boards.get(uuid)
        if board is None or self._released:
            raise GpuReadError("ERROR_NOT_FOUND", f"no simulated GPU {uuid}")
        return board

    def freeze(self, key: AttemptKey, *, frozen: bool) -> None:
        """The job's processes are stopped, or run again."""
        (self._frozen.add if frozen else self._frozen.discard)(key)
        for uuid, pids in self._pids.items():
            if key in pids:
                self._looked(self._boards[uuid])

    def _looked(self, board: Board) -> Board:
        """The board with who is really on it: processes end without a word."""
        now_s = self._clock.now_s()
        alive = {pid for pid in self._pids[board.identity.uuid].values() if _is_alive(pid)}
        there = {occupant.pid for occupant in board.occupants}
        for pid in there - alive:
            board.remove(pid, now_s)
        frozen = {pid for key, pid in self._pids[board.identity.uuid].items() if key in self._frozen}
        for occupant in board.occupants:
            if occupant.is_frozen is not (occupant.pid in frozen):
                board.put(replace(occupant, is_frozen=occupant.pid in frozen), now_s)
        draw_w = board.profile.power_limit_w_max * _BUSY_RATIO
        for pid in sorted(alive - there):
            board.put(Occupant(pid, _command(pid), draw_w=draw_w, is_frozen=pid in frozen), now_s)
        return board


class ObservingLauncher:
    """The real launcher, and the simulated GPUs see what it starts and ends."""

    def __init__(self, launcher: Launcher, gpus: SimulatedGpus) -> None:
        self._launcher = launcher
        self._gpus = gpus
        self._orders: dict[AttemptKey, list[str]] = {}

    async def connect(self, on_report: Callable[[Report], None]) -> LauncherHello:
        def observed(report: Report) -> None:
            self._observe(report)
            on_report(report)

        hello = await self._launcher.connect(observed)
        for held in hello.attempts:
            for report in held.reports:
                self._observe(report)
        return hello

    def prepare(self, order: StartOrder) -> None:
        self._launcher.prepare(order)

    def start(self, order: StartOrder) -> None:
        self._orders[order.key] = order.environment["CUDA_VISIBLE_DEVICES"].split(",")
        self._launcher.start(order)

    def stop(self, order: StopOrder) -> None:
        self._launcher.stop(order)

    def freeze(self, key: AttemptKey) -> None:
        self._launcher.freeze(key)

    def thaw(self, key: AttemptKey) -> None:
        self._launcher.thaw(key)

    def end_grace(self, key: AttemptKey) -> None:
        self._launcher.end_grace(key)

    def forget(self, key: AttemptKey) -> None:
        self._launcher.forget(key)

    async def close(self) -> None:
        await self._launcher.close()

    def _observe(self, report: Report) -> None:
        match report:
            case Started():
                gpus = self._orders.pop(report.key, None)
                if gpus is None:  # adopted: its environment says where it is
                    gpus = _visible_devices(report.pid)
                self._gpus.hold(report.key, gpus, report.pid)
            case Frozen():
                self._gpus.freeze(report.key, frozen=True)
            case Thawed():
                self._gpus.freeze(report.key, frozen=False)
            case Exited():
                self._orders.pop(report.key, None)
                self._gpus.drop(report.key)
            case LauncherGone():
                self._orders.clear()
            case _:
                pass


def _visible_devices(pid: int) -> list[str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
    prefix = b"CUDA_VISIBLE_DEVICES="
    return next((e[len(prefix) :].decode().split(",") for e in entries if e.startswith(prefix)), [])


def _is_alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
