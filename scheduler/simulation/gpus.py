"""Simulated GPUs for `serve --simulate`: memory, draw and process lists that follow real processes.

A job that starts on a GPU shows in its process list and holds memory until its process is gone; draw
follows what runs with a settling time. Which process is on which GPU is learnt from the launcher's
reports (`ObservingLauncher`), as a driver learns it from the process itself.
"""

import asyncio
import math
import re
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scheduler.effects.clock import Clock
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.launcher import (
    AttemptKey,
    Exited,
    Launcher,
    LauncherGone,
    LauncherHello,
    Report,
    Started,
    StartOrder,
    StopOrder,
)
from scheduler.errors import ConfigError, GpuReadError
from scheduler.model.gpus import GpuHolders, GpuIdentity, GpuLimit, GpuProcess, GpuSample

GPUS_MAX = 64
DRIVER_VERSION = "simulated"
# Draw moves to its new level with this time constant, as boards do after a change of load.
_SETTLING_S = 0.5
_IDLE_TEMPERATURE_C = 35.0
_TEMPERATURE_C_PER_W = 0.06


@dataclass(frozen=True, slots=True)
class Profile:
    """A board: NVML's name and typical figures (NVIDIA's mock profiles and data sheets)."""

    model: str
    memory_mib: int
    idle_w: float
    power_limit_w_min: float
    power_limit_w_max: float
    sm_clock_mhz: int


PROFILES = {
    "H100": Profile("NVIDIA H100 80GB HBM3", 81_559, 70.0, 200.0, 700.0, 1980),
    "H200": Profile("NVIDIA H200", 143_771, 75.0, 200.0, 700.0, 1980),
    "A100": Profile("NVIDIA A100-SXM4-80GB", 81_920, 54.0, 100.0, 400.0, 1410),
    "B200": Profile("NVIDIA B200", 183_359, 140.0, 400.0, 1000.0, 1965),
    "L40S": Profile("NVIDIA L40S", 46_068, 35.0, 100.0, 350.0, 2520),
    "T4": Profile("Tesla T4", 15_360, 10.0, 60.0, 70.0, 1590),
    "RTX4090": Profile("NVIDIA GeForce RTX 4090", 24_564, 20.0, 150.0, 450.0, 2520),
}

_PATTERN = re.compile(r"(\d+)x([A-Za-z0-9]+)")
# What an empty board shows as used: the driver's reserve.
_RESERVE_MIB = 512
_JOB_MEMORY_MIB = 4096
# A busy job without a declared draw takes this part of the limit.
_BUSY_RATIO = 0.8


@dataclass(slots=True)
class _Board:
    identity: GpuIdentity
    profile: Profile
    power_w: float
    energy_mj: float = 0.0
    at_s: float = 0.0
    # By attempt: its main pid, None between the order and the report.
    jobs: dict[AttemptKey, int] = field(default_factory=dict)
    power_limit_w: float | None = None  # as it was set; None = the board's own


def parse(text: str) -> list[Profile]:
    """The boards that `8xH100` or `4xA100,2xT4` names.

    Raises:
        ConfigError: The text is not of that form, or names an unknown board.
    """
    boards: list[Profile] = []
    for part in text.split(","):
        match = _PATTERN.fullmatch(part.strip())
        profile = PROFILES.get(match[2].upper()) if match else None
        if match is None or profile is None:
            raise ConfigError(
                f"--simulate {text!r}: write a count and a board, such as 8xH100 or 4xA100,2xT4; "
                f"boards: {', '.join(PROFILES)}"
            )
        boards += [profile] * int(match[1])
    if len(boards) > GPUS_MAX:
        raise ConfigError(f"--simulate {text!r}: at most {GPUS_MAX} GPUs")
    return boards


class SimulatedGpus:
    """GPUs that exist in this process only; they serve the Protocol `Gpus`."""

    def __init__(self, boards: list[Profile], clock: Clock, *, node: str) -> None:
        """Make the boards; equal node names give equal UUIDs, so that a restart finds the same GPUs."""
        self._clock = clock
        self._boards: dict[str, _Board] = {}
        self._released = False
        self._task: asyncio.Task[None] | None = None
        for index, profile in enumerate(boards):
            name = f"GPU-{uuids.uuid5(uuids.NAMESPACE_DNS, f'{index}.{profile.model}.{node}.wattshift')}"
            identity = GpuIdentity(
                uuid=name,
                index=index,
                model=profile.model,
                memory_total_mib=profile.memory_mib,
                pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
                numa=0 if index < len(boards) / 2 else 1,
                minor_number=index,
                power_limit_w_min=profile.power_limit_w_min,
                power_limit_w_max=profile.power_limit_w_max,
                power_limit_w_default=profile.power_limit_w_max,
                driver_version=DRIVER_VERSION,
            )
            self._boards[name] = _Board(identity, profile, profile.idle_w, at_s=clock.now_s())

    async def start(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> GpuReadings:
        self._task = asyncio.get_running_loop().create_task(self._sample(on_readings, period_s))
        return self._readings()

    async def holders(self, uuid: str) -> GpuHolders:
        board = self._boards.get(uuid)
        if board is None or self._released:
            raise GpuReadError("ERROR_NOT_FOUND", f"no simulated GPU {uuid}")
        return GpuHolders(uuid, self._clock.now_s(), tuple(self._processes(board)), self._memory_mib(board))

    async def set_power_limit(self, uuid: str, power_limit_w: float) -> GpuLimit:
        board = self._boards.get(uuid)
        if board is None or self._released:
            raise GpuReadError("ERROR_NOT_FOUND", f"no simulated GPU {uuid}")
        low, high = board.profile.power_limit_w_min, board.profile.power_limit_w_max
        if not low <= power_limit_w <= high:
            raise GpuReadError(
                "ERROR_INVALID_ARGUMENT", f"GPU {uuid}: {power_limit_w} W is not in {low} to {high} W"
            )
        self._sampled(board, self._clock.now_s())  # what was drawn until now was drawn under the old limit
        board.power_limit_w = power_limit_w
        return GpuLimit(power_limit_w, power_limit_w)

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
                self._boards[uuid].jobs[key] = pid

    def drop(self, key: AttemptKey) -> None:
        """The job's processes are gone."""
        for board in self._boards.values():
            board.jobs.pop(key, None)

    async def _sample(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            if not self._released:
                on_readings(self._readings())

    def _readings(self) -> GpuReadings:
        now_s = self._clock.now_s()
        return GpuReadings(
            identities=tuple(board.identity for board in self._boards.values()),
            samples=tuple(self._sampled(board, now_s) for board in self._boards.values()),
            errors={},
            driver_version=DRIVER_VERSION,
        )

    def _sampled(self, board: _Board, now_s: float) -> GpuSample:
        busy = bool(self._processes(board))
        profile = board.profile
        limit_w = board.power_limit_w or profile.power_limit_w_max
        target_w = min(profile.power_limit_w_max * _BUSY_RATIO, limit_w) if busy else profile.idle_w
        elapsed_s = max(0.0, now_s - board.at_s)
        before_w = board.power_w
        board.power_w = target_w + (before_w - target_w) * math.exp(-elapsed_s / _SETTLING_S)
        board.energy_mj += (before_w + board.power_w) / 2 * elapsed_s * 1000.0
        board.at_s = now_s
        return GpuSample(
            uuid=board.identity.uuid,
            at_s=now_s,
            memory_used_mib=self._memory_mib(board),
            utilization_ratio=0.95 if busy else 0.0,
            power_w=round(board.power_w, 1),
            power_limit_w=limit_w,
            energy_mj=round(board.energy_mj),
            temperature_celsius=round(_IDLE_TEMPERATURE_C + board.power_w * _TEMPERATURE_C_PER_W, 1),
            sm_clock_mhz=profile.sm_clock_mhz if busy else 345,
        )

    def _memory_mib(self, board: _Board) -> int:
        held = _JOB_MEMORY_MIB * len(self._processes(board))
        return min(board.profile.memory_mib, _RESERVE_MIB + held)

    def _processes(self, board: _Board) -> list[GpuProcess]:
        return [
            GpuProcess(pid, _JOB_MEMORY_MIB, "compute", "", _command(pid))
            for pid in board.jobs.values()
            if _is_alive(pid)
        ]


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
