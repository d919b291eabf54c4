"""GPUs: who they are, what was read from them, who holds them."""

from dataclasses import dataclass
from enum import StrEnum

# No process has this PID or a larger one; drivers 535.43 to 535.86 list it, and 0.
PID_LIMIT = 2**32 - 1
# No board or module draws more (a GB300 module 2.9 kW); what says so can't be believed.
POWER_W_MAX = 5000.0


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
    # Where it sits; numbers are unique within a node and mean nothing beyond "the same".
    island: int | None = None  # GPUs that NVLinks join, directly or through switches
    numa: int | None = None
    switch: int | None = None  # GPUs below one PCIe switch
    is_numa_node: bool = False  # its memory is the system's, too (Grace): pages stay after a process
    minor_number: int | None = None
    power_limit_w_min: float | None = None
    power_limit_w_max: float | None = None
    power_limit_w_default: float | None = None
    power_limit_refusal: str = ""  # what the driver answers who sets its limit; "" = it does so
    power_scope: str = ""  # what power means here: "gpu", or "module" with the CPU beside it
    sm_clock_mhz_max: int | None = None
    temperature_celsius_slowdown: float | None = None
    temperature_celsius_shutdown: float | None = None
    compute_capability: str = ""  # "9.0"
    driver_version: str = ""
    cuda_version: str = ""  # the newest that the driver serves: "12.8"
    parent_uuid: str = ""  # of a MIG instance: the GPU that it is a part of
    slices: int | None = None  # of a MIG instance: compute slices
    node: int = 0  # which of the nodes that are planned together; a daemon plans for its own alone


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one GPU. None = the GPU does not report it: absent, never zero."""

    uuid: str
    at_s: float  # Unix seconds, when it was read
    memory_used_mib: int | None = None
    utilization_ratio: float | None = None
    memory_utilization_ratio: float | None = None  # of the last period, in which memory was read or written
    encoder_utilization_ratio: float | None = None
    decoder_utilization_ratio: float | None = None
    power_w: float | None = None  # instant where the GPU gives it, else the average
    power_w_average: float | None = None  # over about a second
    power_limit_w: float | None = None  # what was asked for
    power_limit_w_enforced: float | None = None  # lower where somebody else caps too
    power_capped_s: float | None = None  # for how long the limit has bound, since the driver was loaded
    energy_mj: int | None = None  # since the driver was loaded; of a MIG instance: its whole GPU's counter
    temperature_celsius: float | None = None
    memory_temperature_celsius: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    fan_speed_ratio: float | None = None  # that its fans are told to turn at, of their most
    clock_reasons: int | None = None  # what holds the clock back: NVML's bits
    ecc_corrected: int | None = None  # since the driver was loaded
    ecc_uncorrected: int | None = None
    rows_remapped_corrected: int | None = None  # for good
    rows_remapped_uncorrected: int | None = None
    is_remap_pending: bool | None = None  # takes effect at the next reset
    has_remap_failed: bool | None = None
    recovery_action: int | None = None  # the driver's own verdict, 0 = none needed
    is_power_smoothed: bool | None = None  # it may not shed at once
    ramp_down_w_per_s: float | None = None
    nvlink_tx_bytes: int | None = None  # over all links, since the driver was loaded
    nvlink_rx_bytes: int | None = None
    # What it said that can't be, and is None for that: "temperature_celsius=4294967295, ..."
    doubts: str = ""


# The driver's events of a GPU are heard from here on; what it told before is not known.
EVENTS_BEGIN = "events_begin"


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something that the driver told of a GPU by itself."""

    uuid: str
    at_s: float  # Unix seconds, when it was heard
    kind: str  # "xid", "ecc_double_bit", "mig_changed", "unavailable", "recovery_action", EVENTS_BEGIN
    code: int  # the XID; else what the driver adds


@dataclass(frozen=True, slots=True)
class GpuLimit:
    """What a GPU says of its limit after it was set."""

    power_limit_w: float | None
    power_limit_w_enforced: float | None


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """An entry of a GPU's process lists."""

    pid: int  # 0 = an entry that names no living process: an unknown holder
    memory_mib: int | None = None
    kind: str = "compute"  # or "graphics"
    user: str = ""
    command: str = ""  # base name of the executable
    utilization_ratio: float | None = None
    start_ticks: int = 0  # when it started: tells it from a later one of that PID; 0 = not known
    listed_pid: int | None = None  # of an unknown holder: what the list says, nobody's or another's by now


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


@dataclass(frozen=True, slots=True)
class GpuBaseline:
    """What a GPU shows as used when nobody is on it, under one driver."""

    used_mib: int
    driver_version: str


@dataclass(frozen=True, slots=True)
class GpuBooked:
    """Up to where the usage of a whole GPU is booked, so that another daemon goes on from there.

    Without a UUID it is the node's base load.
    """

    uuid: str
    timed_s: float  # its time, and that of its parts
    at_s: float  # its energy: the last reading that counted,
    energy_mj: int | None  # what its counter showed then,
    power_w: float | None  # and what it drew
    parts: tuple[tuple[str, int], ...]  # UUIDs and slices of its MIG instances then; out of MIG mode itself
    pending: tuple[tuple[int, int], ...] = ()  # numbers of jobs and attempts that ended since `at_s`
    cost_rest: int = 0  # of its energy's cost, what was less than a micro-USD: millijoules times USD/MWh/10^6


def model_matches(wanted: str, model: str) -> bool:
    """Whether `wanted` is, whole and case-insensitively, a run of words of the GPU's name.

    `H100` matches "NVIDIA H100 80GB HBM3"; `A10` does not match "NVIDIA A100-SXM4-40GB".
    """
    words = _words(model)
    run = _words(wanted)
    return bool(run) and any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").replace("_", " ").split()
