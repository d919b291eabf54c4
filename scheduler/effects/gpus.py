"""The GPUs seen from the daemon: the Protocol that NVML (`nvml.py`) and the simulation serve."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from scheduler.model.gpus import GpuEvent, GpuHolders, GpuIdentity, GpuLimit, GpuSample


@dataclass(frozen=True, slots=True)
class GpuReadings:
    """One round of sampling: what answered, and per GPU what went wrong."""

    identities: tuple[GpuIdentity, ...]  # all GPUs that could be opened, by index
    samples: tuple[GpuSample, ...]
    errors: dict[str, str]  # UUID, or "index N", or "driver" -> name of the failure, as NVML says it
    driver_version: str = ""
    events: tuple[GpuEvent, ...] = ()  # since the round before, oldest first; each is told once


class Gpus(Protocol):
    """Reads the node's GPUs. Never blocks the loop: a call that hangs makes readings old."""

    async def start(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> GpuReadings:
        """Open the GPUs, return the first round, and deliver one every `period_s` from then on.

        No driver, no library, no GPU: a round with no identities and errors["driver"]; never raises.
        """

    async def holders(self, uuid: str) -> GpuHolders:
        """Who is on this GPU now.

        Raises:
            GpuReadError: It could not be read in time; `code` says why.
        """

    async def set_power_limit(self, uuid: str, power_limit_w: float) -> GpuLimit:
        """Set this GPU's limit and read it back; calls about one GPU are made one after the other.

        Raises:
            GpuReadError: It was refused, was not kept, or is not known to have arrived; `code` says why.
        """

    async def release(self) -> None:
        """Let go of every handle; no reading comes until `acquire`."""

    async def acquire(self) -> None:
        """Open the GPUs again after `release`; readings go on."""

    async def close(self) -> None:
        """Stop sampling, then let go."""
