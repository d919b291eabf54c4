"""Simulated GPU boards: memory, draw with its settling, limit, temperature and energy of who is on them.

A board knows only its occupants and the time that it is told. Draw moves to its new level exponentially, and
the energy is that curve's integral, so that it does not depend on how often somebody looks.
"""

import math
import re
import uuid as uuids
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scheduler.errors import ConfigError, GpuReadError
from scheduler.model.gpus import GpuHolders, GpuIdentity, GpuLimit, GpuProcess, GpuSample
from scheduler.model.jobs import SHARE_MILLI_WHOLE

GPUS_MAX = 64
DRIVER_VERSION = "simulated"
# Draw moves to its new level with this time constant, as boards do after a change of load.
SETTLING_S = 0.5
# What an empty board shows as used: the driver's reserve.
RESERVE_MIB = 512
# What a process holds that has not said how much.
PROCESS_MEMORY_MIB = 4096
# What a process that has a context and runs nothing adds to an idle board: an H100's 72 to 76 W become 122 to
# 130 (docs/operating/power.md).
CONTEXT_W = 54.0
_IDLE_TEMPERATURE_C = 35.0
_TEMPERATURE_C_PER_W = 0.06
_IDLE_CLOCK_MHZ = 345
_BUSY_UTILIZATION = 0.95


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


@dataclass(frozen=True, slots=True)
class Occupant:
    """A process on a board, and what it takes of it."""

    pid: int
    command: str = ""
    user: str = ""
    memory_mib: int = PROCESS_MEMORY_MIB
    share_milli: int = SHARE_MILLI_WHOLE
    draw_w: float | None = None  # of the whole board, were it alone on it; None = the largest limit
    is_frozen: bool = False  # it has nothing running there; what is in the board's queues is not simulated
    is_listed: bool = True  # False: gone from the process lists, its memory is not freed yet


class Board:
    """One board in one node; times are Unix seconds and never run backwards here."""

    def __init__(self, identity: GpuIdentity, profile: Profile, now_s: float) -> None:
        """Take what the driver says of the board, and what it is."""
        self.identity = identity
        self.profile = profile
        self.power_limit_w = profile.power_limit_w_max
        self.power_w = profile.idle_w
        self.energy_mj = 0.0
        self.on_change: Callable[[Board, float], None] | None = None  # its target draw may have moved
        self._at_s = now_s
        self._occupants: dict[int, Occupant] = {}

    @property
    def occupants(self) -> tuple[Occupant, ...]:
        """Who is there, in the order of arrival."""
        return tuple(self._occupants.values())

    @property
    def natural_w(self) -> float:
        """What it would draw without a limit: idle, and each occupant's share of what it adds alone."""
        idle_w, most_w = self.profile.idle_w, self.profile.power_limit_w_max
        added_w = (
            (max(idle_w, most_w if o.draw_w is None else o.draw_w) - idle_w)
            * o.share_milli
            / SHARE_MILLI_WHOLE
            for o in self._occupants.values()
            if o.is_listed and not o.is_frozen
        )
        # A context keeps the clock up, whoever has more of them.
        held_w = CONTEXT_W if any(o.is_listed and o.is_frozen for o in self._occupants.values()) else 0.0
        return min(most_w, idle_w + max(held_w, sum(added_w)))

    @property
    def target_w(self) -> float:
        """Where the draw is going: no limit takes away what an idle board draws."""
        return max(self.profile.idle_w, min(self.natural_w, self.power_limit_w))

    @property
    def draw_ratio(self) -> float:
        """What it draws of what it would without a limit."""
        return self.target_w / self.natural_w

    @property
    def memory_used_mib(self) -> int:
        """What is in use, the driver's reserve included."""
        held = sum(o.memory_mib for o in self._occupants.values())
        return min(self.profile.memory_mib, RESERVE_MIB + held)

    def put(self, occupant: Occupant, now_s: float) -> None:
        """A process comes, or changes what it takes."""
        self._advance(now_s)
        self._occupants[occupant.pid] = occupant
        self._changed(now_s)

    def remove(self, pid: int, now_s: float) -> None:
        """A process and its memory are gone."""
        self._advance(now_s)
        self._occupants.pop(pid, None)
        self._changed(now_s)

    def set_power_limit(self, power_limit_w: float, now_s: float) -> GpuLimit:
        """Limit the draw from now on.

        Raises:
            GpuReadError: It is outside the board's range.
        """
        low, high = self.profile.power_limit_w_min, self.profile.power_limit_w_max
        if not low <= power_limit_w <= high:
            raise GpuReadError(
                "ERROR_INVALID_ARGUMENT",
                f"GPU {self.identity.uuid}: {power_limit_w} W is not in {low} to {high} W",
            )
        self._advance(now_s)
        self.power_limit_w = power_limit_w
        self._changed(now_s)
        return GpuLimit(power_limit_w, power_limit_w)

    def sample(self, now_s: float) -> GpuSample:
        """What a driver would read now."""
        self._advance(now_s)
        busy = any(o.is_listed and not o.is_frozen for o in self._occupants.values())
        return GpuSample(
            uuid=self.identity.uuid,
            at_s=now_s,
            memory_used_mib=self.memory_used_mib,
            utilization_ratio=_BUSY_UTILIZATION if busy else 0.0,
            power_w=round(self.power_w, 1),
            power_limit_w=self.power_limit_w,
            energy_mj=round(self.energy_mj),
            temperature_celsius=round(_IDLE_TEMPERATURE_C + self.power_w * _TEMPERATURE_C_PER_W, 1),
            sm_clock_mhz=self.profile.sm_clock_mhz if busy else _IDLE_CLOCK_MHZ,
        )

    def energy_j(self, now_s: float) -> float:
        """What it has used since its driver was loaded."""
        self._advance(now_s)
        return self.energy_mj / 1000.0

    def restart(self, now_s: float) -> None:
        """The driver is loaded anew: its energy counter begins at zero, and the limit is the board's own."""
        self._advance(now_s)
        self.energy_mj = 0.0
        self.power_limit_w = self.profile.power_limit_w_max
        self._changed(now_s)

    def holders(self, now_s: float) -> GpuHolders:
        """Who is on it now, as the process lists say."""
        listed = tuple(
            GpuProcess(o.pid, o.memory_mib, "compute", o.user, o.command)
            for o in self._occupants.values()
            if o.is_listed
        )
        return GpuHolders(self.identity.uuid, now_s, listed, self.memory_used_mib)

    def _changed(self, now_s: float) -> None:
        if self.on_change is not None:
            self.on_change(self, now_s)

    def _advance(self, now_s: float) -> None:
        elapsed_s = now_s - self._at_s
        if elapsed_s <= 0.0:
            return
        target_w, off_w = self.target_w, self.power_w - self.target_w
        left = math.exp(-elapsed_s / SETTLING_S)
        self.power_w = target_w + off_w * left
        self.energy_mj += (target_w * elapsed_s + off_w * SETTLING_S * (1.0 - left)) * 1000.0
        self._at_s = now_s


def boards(profiles: Iterable[Profile], node: str, now_s: float, row: int = 0) -> dict[str, Board]:
    """A node's boards by UUID; equal node names give equal UUIDs, so that a restart finds the same GPUs.

    `row` is the node's place among those that are planned for together.
    """
    profiles = list(profiles)
    made: dict[str, Board] = {}
    for index, profile in enumerate(profiles):
        name = f"GPU-{uuids.uuid5(uuids.NAMESPACE_DNS, f'{index}.{profile.model}.{node}.wattshift')}"
        identity = GpuIdentity(
            uuid=name,
            index=index,
            model=profile.model,
            memory_total_mib=profile.memory_mib,
            pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
            numa=0 if index < len(profiles) / 2 else 1,
            minor_number=index,
            power_limit_w_min=profile.power_limit_w_min,
            power_limit_w_max=profile.power_limit_w_max,
            power_limit_w_default=profile.power_limit_w_max,
            driver_version=DRIVER_VERSION,
            node=row,
        )
        made[name] = Board(identity, profile, now_s)
    return made
