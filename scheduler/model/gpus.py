"""GPUs: who they are, what was read from them, who holds them."""

from dataclasses import dataclass
from enum import StrEnum


class GpuState(StrEnum):
    """Where a GPU stands; exactly one at a time, and a metric label each."""

    FREE = "free"
    ALLOCATED = "allocated"
    HANDOVER = "handover"
    CORDONED = "cordoned"
    QUARANTINED = "quarantined"
    FOREIGN = "foreign"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """What does not change while the driver is loaded. None = the GPU does not say."""

    uuid: str
    index: int  # NVML's; moves between boots, for people only
    model: str  # NVML's name: "NVIDIA H100 80GB HBM3"
    memory_total_mib: int
    pci_bus_id: str = ""
    numa_node: int | None = None
    minor_number: int | None = None
    power_limit_w_min: float | None = None
    power_limit_w_max: float | None = None
    power_limit_w_default: float | None = None
    driver_version: str = ""


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one GPU. None = the GPU does not report it: absent, never zero."""

    uuid: str
    at_s: float  # Unix seconds, when it was read
    memory_used_mib: int | None = None
    utilization_ratio: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_mj: int | None = None  # since the driver was loaded
    temperature_celsius: float | None = None
    sm_clock_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """An entry of a GPU's process lists."""

    pid: int  # 0 = an entry that names no living process: an unknown holder
    memory_mib: int | None = None
    kind: str = "compute"  # or "graphics"
    user: str = ""
    command: str = ""  # base name of the executable


@dataclass(frozen=True, slots=True)
class GpuHolders:
    """Who is on one GPU at one moment: what a verified hand-over looks at."""

    uuid: str
    at_s: float
    processes: tuple[GpuProcess, ...]
    memory_used_mib: int | None


@dataclass(frozen=True, slots=True)
class GpuMark:
    """An operator's or the daemon's verdict on a GPU that outlives a restart."""

    uuid: str
    state: GpuState  # CORDONED or QUARANTINED
    reason: str  # Reason's name
    detail: str
    since_s: float


def model_matches(wanted: str, model: str) -> bool:
    """Whether `wanted` is, whole and case-insensitively, a run of words of the GPU's name.

    `H100` matches "NVIDIA H100 80GB HBM3"; `A10` does not match "NVIDIA A100-SXM4-40GB".
    """
    words = _words(model)
    run = _words(wanted)
    return bool(run) and any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").replace("_", " ").split()
