"""NVML through `pynvml`, and the only file that imports it: when it is first used, not when this is imported.

All of this runs in the NVML child (`nvml_child.py`), never in the daemon: any call may hang in the driver.
What a GPU does not report is None, never zero. Failures are `GpuReadError`s whose code is NVML's own name
without its prefix ("ERROR_GPU_IS_LOST"). GPUs are opened by index, because opening by UUID fails for all of
them once one is lost; everything above this file names them by UUID, because indices move.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scheduler.effects import nvml_fields as fields
from scheduler.effects.nvml_energy import EnergyCounter
from scheduler.effects.nvml_plausible import (
    IDENTITY_RANGES,
    SAMPLE_RANGES,
    doubtful,
    doubtful_memory,
    in_words,
    is_uuid,
)
from scheduler.effects.nvml_processes import BYTES_PER_MIB, merge_processes, printable, read_text
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuIdentity, GpuLimit, GpuSample

# Codes 3, 13, 25 and 26 all say that this GPU or this driver does not have it: the field is absent.
ABSENT = frozenset(
    {
        "ERROR_NOT_SUPPORTED",
        "ERROR_FUNCTION_NOT_FOUND",
        "ERROR_ARGUMENT_VERSION_MISMATCH",
        "ERROR_DEPRECATED",
    }
)
# The driver went away or was exchanged beneath us: every handle is dead.
DRIVER_GONE = frozenset({"ERROR_UNINITIALIZED", "ERROR_DRIVER_NOT_LOADED", "ERROR_LIB_RM_VERSION_MISMATCH"})
# The GPU behind this one handle is dead: no other field of it is worth a call.
GPU_GONE = frozenset({"ERROR_GPU_IS_LOST", "ERROR_RESET_REQUIRED"})
DEAD = DRIVER_GONE | GPU_GONE
# Ours: the library answers, and what it says can't be.
IMPLAUSIBLE = "IMPLAUSIBLE"
# Ours: a limit was set without an error, and is another one when it is read back.
NOT_KEPT = "NOT_KEPT"

# Grace superchips refuse the GPU's own scope and report the whole module's power.
POWER_SCOPES = (("gpu", 0), ("module", 1))
TEMPERATURE_SENSOR_GPU = 0
THRESHOLD_SHUTDOWN = 0
THRESHOLD_SLOWDOWN = 1
CLOCK_SM = 1
CLOCK_MEMORY = 2
TOPOLOGY_ONE_SWITCH = 10  # the farthest that two GPUs below one switch are from each other
MW_PER_W = 1000
NS_PER_S = 1_000_000_000
PERCENT = 100
BYTES_PER_KIB = 1024
CUDA_MAJOR, CUDA_MINOR = 1000, 10  # 12080 is 12.8
# pynvml sizes a process list at twice what the driver says plus 5; three misses in a row are a fork bomb.
LIST_TRIES_MAX = 3
NAME_LENGTH_MAX = 96  # NVML's own buffer for a name

# Kind of process, and the calls that list it: the newest that the driver has is used. MPS lists its clients
# apart, while its server owns their context.
PROCESS_LISTS = (
    (
        "compute",
        ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"),
    ),
    (
        "compute",
        ("nvmlDeviceGetMPSComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2"),
    ),
    (
        "graphics",
        ("nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v2"),
    ),
)
SYSFS_PCI_DEVICES = Path("/sys/bus/pci/devices")


# The library -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Library:
    """An open library."""

    gpu_count: int
    driver_version: str
    cuda_version: str


def open_library() -> Library:
    """Initialise the library and return what it says of itself.

    Raises:
        GpuReadError: There is no library, no driver, or they do not fit each other.
    """
    call("nvmlInit")
    count = gpu_count()
    driver: str = unless_dead("nvmlSystemGetDriverVersion") or ""
    cuda: int = unless_dead("nvmlSystemGetCudaDriverVersion") or 0
    version = f"{cuda // CUDA_MAJOR}.{cuda % CUDA_MAJOR // CUDA_MINOR}" if cuda else ""
    return Library(count, printable(driver, NAME_LENGTH_MAX), version)


def gpu_count() -> int:
    """Return how many GPUs the driver has, those included that we may not open.

    Raises:
        GpuReadError: It does not say.
    """
    count: int = call("nvmlDeviceGetCount")
    return count


def close_library() -> None:
    """Shut the library down. One that is not open, or whose driver is gone, is as good as shut down."""
    try:
        call("nvmlShutdown")
    except GpuReadError as error:
        if error.code not in DRIVER_GONE:
            raise


# One GPU ---------------------------------------------------------------------------------------


class OpenGpu:
    """A GPU with an open handle."""

    def __init__(self, index: int, library: Library) -> None:
        self.handle = call("nvmlDeviceGetHandleByIndex", index)
        self._scope_name, self._scope = _power_scope(self.handle)
        self.identity, self._doubts = _identity(self.handle, index, library, self._scope_name)
        self.linked_to = _linked_to(self.handle)
        self._utilization_since_us = 0
        self._energy = EnergyCounter()

    def sample(self) -> tuple[GpuSample, str]:
        """Return what the GPU reports now, and the name of a failure that cost a field, or "".

        Raises:
            GpuReadError: The GPU or the driver is gone.
        """
        at_s = time.time()
        failures: list[str] = []
        values = {name: self._read(reader, failures) for name, reader in SAMPLE_CALLS.items()}
        values["energy_mj"] = self._energy.read(at_s, lambda: self._read(_energy_mj, failures))
        values |= self._read(_utilization_ratios, failures) or {}
        values |= _from_fields(_fields(self.handle, _sample_fields(self._scope)))
        if values["power_w"] is None:
            values["power_w"] = self._read(_power_usage_w, failures)
        if values["is_power_smoothed"]:
            values["ramp_down_w_per_s"] = _ramp_down_w_per_s(self.handle)
        doubts = doubtful(values.get, SAMPLE_RANGES)
        doubts |= doubtful_memory(values["memory_used_mib"], self.identity.memory_total_mib)
        values |= dict.fromkeys(doubts)
        words = in_words(self._doubts | doubts)
        sample = GpuSample(uuid=self.identity.uuid, at_s=at_s, doubts=words, **values)
        return sample, failures[0] if failures else ""

    def holders(self) -> GpuHolders:
        """Return who is on the GPU now.

        Raises:
            GpuReadError: A list can't be read. A GPU without a list of compute processes raises too, for
                an empty answer would read as "free".
        """
        total_mib = self.identity.memory_total_mib
        return holders_of(self.handle, self.identity.uuid, total_mib, self._utilization)

    def set_power_limit(self, power_limit_w: float) -> GpuLimit:
        """Set the limit; return what the GPU says of it now.

        Raises:
            GpuReadError: The driver refused it; or it took it without a word and has another one (NOT_KEPT).
        """
        # Not the second version of the call: pynvml 13 never looks at the code that it returns.
        asked_mw = round(power_limit_w * MW_PER_W)
        call("nvmlDeviceSetPowerManagementLimit", self.handle, asked_mw)
        kept_mw: int | None = unless_dead("nvmlDeviceGetPowerManagementLimit", self.handle)
        if kept_mw != asked_mw:
            kept = "nothing" if kept_mw is None else f"{kept_mw / MW_PER_W} W"
            raise GpuReadError(NOT_KEPT, f"asked for {power_limit_w} W, the GPU says {kept}")
        enforced = _watts(unless_dead("nvmlDeviceGetEnforcedPowerLimit", self.handle))
        return GpuLimit(kept_mw / MW_PER_W, enforced)

    def is_beside(self, other: "OpenGpu") -> bool | None:
        """Whether both sit below one PCIe switch; None where the driver does not say."""
        level: int | None = unless_dead("nvmlDeviceGetTopologyCommonAncestor", self.handle, other.handle)
        return None if level is None else level <= TOPOLOGY_ONE_SWITCH

    def _read(self, reader: Callable[[Any], Any], failures: list[str]) -> Any:
        try:
            return reader(self.handle)
        except GpuReadError as error:
            if error.code in DEAD:
                raise
            if error.code not in ABSENT:
                failures.append(error.code)
            return None

    def _utilization(self) -> dict[int, float]:
        """Return by PID how busy each kept the GPU since the last look; no new sample, no entry."""
        samples = unless_dead("nvmlDeviceGetProcessUtilization", self.handle, self._utilization_since_us)
        newest: dict[int, tuple[int, float]] = {}
        for sample in samples or ():
            seen = (sample.timeStamp, sample.smUtil / PERCENT)
            newest[sample.pid] = max(seen, newest.get(sample.pid, seen))
            self._utilization_since_us = max(self._utilization_since_us, sample.timeStamp)
        return {pid: ratio for pid, (_, ratio) in newest.items()}


def holders_of(
    handle: Any,
    uuid: str,
    memory_total_mib: int,
    utilization: Callable[[], dict[int, float]] = dict[int, float],
) -> GpuHolders:
    """Return who is on the GPU or the instance; `utilization` tells of PIDs how busy they keep it.

    More memory used than there is counts as a figure that there is not.

    Raises:
        GpuReadError: A list can't be read. A GPU without a list of compute processes raises too, for an
            empty answer would read as "free".
    """
    at_s = time.time()
    entries: list[tuple[str, int, int | None]] = []
    for place, (kind, functions) in enumerate(PROCESS_LISTS):
        try:
            entries += ((kind, entry.pid, entry.usedGpuMemory) for entry in _listed(handle, functions))
        except GpuReadError as error:
            if place == 0 or error.code not in ABSENT:
                raise
    used_mib = or_none(memory_used_mib, handle)
    return GpuHolders(
        uuid=uuid,
        at_s=at_s,
        processes=merge_processes(entries, utilization() if entries else {}),
        memory_used_mib=None if doubtful_memory(used_mib, memory_total_mib) else used_mib,
    )


def _listed(handle: Any, functions: tuple[str, ...]) -> list[Any]:
    for tries in range(1, LIST_TRIES_MAX + 1):
        try:
            return list(_first(*((function, handle) for function in functions)))
        except GpuReadError as error:
            # The list grew between the call that sizes it and the call that reads it.
            if error.code != "ERROR_INSUFFICIENT_SIZE" or tries == LIST_TRIES_MAX:
                raise
    raise AssertionError("the last try returns or raises")


def _identity(
    handle: Any, index: int, library: Library, power_scope: str
) -> tuple[GpuIdentity, dict[str, Any]]:
    """Return who it is, and what it says of that which can't be.

    Raises:
        GpuReadError: It can't be named, or is gone.
    """
    uuid = printable(call("nvmlDeviceGetUUID", handle), NAME_LENGTH_MAX)
    if not is_uuid(uuid):
        raise GpuReadError(
            IMPLAUSIBLE, f"GPU {index} calls itself {uuid!r}: no program could be told to use it"
        )
    size = or_none(memory, handle)
    limits_mw = unless_dead("nvmlDeviceGetPowerManagementLimitConstraints", handle)
    pci = unless_dead("nvmlDeviceGetPciInfo", handle)
    pci_bus_id = pci.busId if pci else ""
    capability = unless_dead("nvmlDeviceGetCudaComputeCapability", handle)
    node: int | None = unless_dead("nvmlDeviceGetNumaNodeId", handle)
    identity = GpuIdentity(
        uuid=uuid,
        index=index,
        model=printable(unless_dead("nvmlDeviceGetName", handle) or "", NAME_LENGTH_MAX),
        memory_total_mib=size.total // BYTES_PER_MIB if size else 0,
        pci_bus_id=pci_bus_id,
        # Where the GPU is no node itself, that of its PCI slot.
        numa=_numa_of_slot(pci_bus_id) if node is None else node,
        is_numa_node=node is not None,
        minor_number=unless_dead("nvmlDeviceGetMinorNumber", handle),
        power_limit_w_min=_watts(limits_mw[0]) if limits_mw else None,
        power_limit_w_max=_watts(limits_mw[1]) if limits_mw else None,
        power_limit_w_default=_watts(unless_dead("nvmlDeviceGetPowerManagementDefaultLimit", handle)),
        power_limit_refusal=_limit_refusal(handle),
        power_scope=power_scope,
        sm_clock_mhz_max=unless_dead("nvmlDeviceGetMaxClockInfo", handle, CLOCK_SM),
        temperature_celsius_slowdown=unless_dead(
            "nvmlDeviceGetTemperatureThreshold", handle, THRESHOLD_SLOWDOWN
        ),
        temperature_celsius_shutdown=unless_dead(
            "nvmlDeviceGetTemperatureThreshold", handle, THRESHOLD_SHUTDOWN
        ),
        compute_capability=".".join(map(str, capability)) if capability else "",
        driver_version=library.driver_version,
        cuda_version=library.cuda_version,
    )
    doubts = doubtful(functools.partial(getattr, identity), IDENTITY_RANGES)
    unknown: dict[str, Any] = {name: 0 if name == "memory_total_mib" else None for name in doubts}
    believed = replace(identity, **unknown)
    # Without a name it is a GPU all the same; it fits whoever asks for no model.
    return believed, doubts if identity.model else doubts | {"model": ""}


def _limit_refusal(handle: Any) -> str:
    """Return what keeps the limit from being set, "" where it can be or there is none.

    The limit that it has is set again. Nothing else tells: rights are checked in the kernel, where root in a
    container may be nobody. Known now, and not when watts must go.
    """
    limit_mw = unless_dead("nvmlDeviceGetPowerManagementLimit", handle)
    if limit_mw is None:
        return ""
    try:
        call("nvmlDeviceSetPowerManagementLimit", handle, limit_mw)
    except GpuReadError as error:
        if error.code in DEAD:
            raise
        return error.code
    return ""


def _power_scope(handle: Any) -> tuple[str, int]:
    """Return the scope in which the GPU reports power; "" where no field of it does."""
    for name, scope in POWER_SCOPES:
        ids = [(fields.POWER_INSTANT, scope), (fields.POWER_AVERAGE, scope)]
        if _fields(handle, ids):
            return name, scope
    return "", POWER_SCOPES[0][1]


def _linked_to(handle: Any) -> tuple[str, ...]:
    """Return the PCI bus ids at the other ends of its NVLinks: GPUs or switches."""
    found = set()
    for link in range(_fields(handle, [fields.NVLINKS]).get(fields.NVLINKS, 0)):
        if unless_dead("nvmlDeviceGetNvLinkState", handle, link):
            remote = unless_dead("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
            if remote:
                found.add(remote.busId)
    return tuple(sorted(found))


def _numa_of_slot(pci_bus_id: str) -> int | None:
    # NVML writes 00000000:3B:00.0, sysfs 0000:3b:00.0.
    text = read_text(SYSFS_PCI_DEVICES / pci_bus_id.lower()[4:] / "numa_node").strip() if pci_bus_id else ""
    return int(text) if text.isdigit() else None  # -1 = unknown


def _watts(mw: int | None) -> float | None:
    return None if mw is None else mw / MW_PER_W


# Fields of a sample, by a call each ------------------------------------------------------------


def memory(handle: Any) -> Any:
    """Return the library's struct of a GPU's or an instance's memory, in bytes."""
    # The older struct counts the driver's reserve as used.
    return _first(
        ("nvmlDeviceGetMemoryInfo", handle, getattr(_pynvml(), "nvmlMemory_v2", None)),
        ("nvmlDeviceGetMemoryInfo", handle),
    )


def memory_used_mib(handle: Any) -> int:
    """Return how much of a GPU's or an instance's memory is used."""
    used: int = memory(handle).used
    return used // BYTES_PER_MIB


def _utilization_ratios(handle: Any) -> dict[str, float]:
    """Return two fields of a sample: one call has both."""
    rates = call("nvmlDeviceGetUtilizationRates", handle)
    return {
        "utilization_ratio": rates.gpu / PERCENT,
        "memory_utilization_ratio": rates.memory / PERCENT,
    }


def _engine_ratio(function: str, handle: Any) -> float:
    percent, _ = call(function, handle)
    return float(percent / PERCENT)


def _fan_speed_ratio(handle: Any) -> float:
    percent: int = call("nvmlDeviceGetFanSpeed", handle)
    return percent / PERCENT


def _power_usage_w(handle: Any) -> float:
    mw: int = call("nvmlDeviceGetPowerUsage", handle)
    return mw / MW_PER_W


def _power_limit_w(handle: Any) -> float:
    mw: int = _first(
        ("nvmlDeviceGetPowerManagementLimit", handle), ("nvmlDeviceGetEnforcedPowerLimit", handle)
    )
    return mw / MW_PER_W


def _power_limit_w_enforced(handle: Any) -> float:
    mw: int = call("nvmlDeviceGetEnforcedPowerLimit", handle)
    return mw / MW_PER_W


def _energy_mj(handle: Any) -> int:
    energy_mj: int = call("nvmlDeviceGetTotalEnergyConsumption", handle)
    return energy_mj


def _temperature_celsius(handle: Any) -> float:
    # The second is deprecated and goes with CUDA 14, the first is missing before.
    celsius: int = _first(
        ("nvmlDeviceGetTemperatureV", handle, TEMPERATURE_SENSOR_GPU),
        ("nvmlDeviceGetTemperature", handle, TEMPERATURE_SENSOR_GPU),
    )
    return float(celsius)


def _clock_reasons(handle: Any) -> int:
    # The second name is the older driver's.
    reasons: int = _first(
        ("nvmlDeviceGetCurrentClocksEventReasons", handle),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", handle),
    )
    return reasons


SAMPLE_CALLS: dict[str, Callable[[Any], Any]] = {
    "memory_used_mib": memory_used_mib,
    "encoder_utilization_ratio": functools.partial(_engine_ratio, "nvmlDeviceGetEncoderUtilization"),
    "decoder_utilization_ratio": functools.partial(_engine_ratio, "nvmlDeviceGetDecoderUtilization"),
    "power_limit_w": _power_limit_w,
    "power_limit_w_enforced": _power_limit_w_enforced,
    "temperature_celsius": _temperature_celsius,
    "sm_clock_mhz": lambda handle: call("nvmlDeviceGetClockInfo", handle, CLOCK_SM),
    "memory_clock_mhz": lambda handle: call("nvmlDeviceGetClockInfo", handle, CLOCK_MEMORY),
    "fan_speed_ratio": _fan_speed_ratio,
    "clock_reasons": _clock_reasons,
}


# Fields of a sample, by one call for all -------------------------------------------------------


def _milli(value: int) -> float:
    return value / MW_PER_W


def _kib(value: int) -> int:
    return value * BYTES_PER_KIB


SAMPLE_FIELDS: tuple[tuple[str, int, Callable[[int], Any]], ...] = (
    ("power_w", fields.POWER_INSTANT, _milli),
    ("power_w_average", fields.POWER_AVERAGE, _milli),
    ("power_capped_s", fields.POWER_CAPPED_NS, lambda ns: ns / NS_PER_S),
    ("memory_temperature_celsius", fields.MEMORY_TEMPERATURE, float),
    ("ecc_corrected", fields.ECC_CORRECTED, int),
    ("ecc_uncorrected", fields.ECC_UNCORRECTED, int),
    ("rows_remapped_corrected", fields.REMAPPED_CORRECTED, int),
    ("rows_remapped_uncorrected", fields.REMAPPED_UNCORRECTED, int),
    ("is_remap_pending", fields.REMAP_PENDING, bool),
    ("has_remap_failed", fields.REMAP_FAILURE, bool),
    ("recovery_action", fields.RECOVERY_ACTION, int),
    ("is_power_smoothed", fields.SMOOTHING_ENABLED, bool),
    ("nvlink_tx_bytes", fields.NVLINK_TX_KIB, _kib),
    ("nvlink_rx_bytes", fields.NVLINK_RX_KIB, _kib),
)
POWER_FIELDS = frozenset({fields.POWER_INSTANT, fields.POWER_AVERAGE})
NVLINK_FIELDS = frozenset({fields.NVLINK_TX_KIB, fields.NVLINK_RX_KIB})


@functools.cache
def _sample_fields(power_scope: int) -> list[Any]:
    scopes = dict.fromkeys(POWER_FIELDS, power_scope) | dict.fromkeys(NVLINK_FIELDS, fields.EVERY_NVLINK)
    return [(field, scopes[field]) if field in scopes else field for _, field, _ in SAMPLE_FIELDS]


def _from_fields(values: dict[int, int]) -> dict[str, Any]:
    return {
        name: convert(values[field]) if field in values else None for name, field, convert in SAMPLE_FIELDS
    }


def _ramp_down_w_per_s(handle: Any) -> float | None:
    """Return how fast a smoothed GPU's draw may fall: as an admin overrode it, else by its profile."""
    values = _fields(handle, [fields.SMOOTHING_RAMP_DOWN_OVERRIDE, fields.SMOOTHING_PROFILE])
    mw_per_s = values.get(fields.SMOOTHING_RAMP_DOWN_OVERRIDE, fields.NOT_OVERRIDDEN)
    if mw_per_s == fields.NOT_OVERRIDDEN and fields.SMOOTHING_PROFILE in values:
        profile = (fields.SMOOTHING_RAMP_DOWN, values[fields.SMOOTHING_PROFILE])
        mw_per_s = _fields(handle, [profile]).get(fields.SMOOTHING_RAMP_DOWN, fields.NOT_OVERRIDDEN)
    return None if mw_per_s == fields.NOT_OVERRIDDEN else mw_per_s / MW_PER_W


def _fields(handle: Any, ids: list[Any]) -> dict[int, int]:
    """Return by id the fields that the GPU has.

    Each value carries its own verdict and says which member of its union is valid. Drivers that do not know
    a field, or the call, answer several ways; only the dead are not asked again.

    Raises:
        GpuReadError: The GPU or the driver is gone.
    """
    answers = unless_dead("nvmlDeviceGetFieldValues", handle, ids) or b""
    found = {}
    for field, _, _, _, kind, code, value in fields.ANSWER.iter_unpack(answers):
        if code and (name := _error_name(code)) in DEAD:
            raise GpuReadError(name, f"field {field}: {name}")
        if not code and kind < len(fields.VALUES):
            found[field] = int(fields.VALUES[kind].unpack_from(value)[0])
    return found


# Calls -----------------------------------------------------------------------------------------


def call(function: str, *arguments: Any) -> Any:
    """Return what the library's function returns.

    Raises:
        GpuReadError: It failed; or the installed `pynvml` does not have it, which is the same as a driver
            without it.
    """
    pynvml = _pynvml()
    wrapper = getattr(pynvml, function, None)
    if wrapper is None:
        raise GpuReadError("ERROR_FUNCTION_NOT_FOUND", f"{function}: not in this version of nvidia-ml-py")
    try:
        return wrapper(*arguments)
    except pynvml.NVMLError as error:
        # Compared by value: instances have __eq__ without __hash__.
        raise _failure(error.value, function) from None
    except UnicodeDecodeError:
        raise GpuReadError("ERROR_UNKNOWN", f"{function}: answers with bytes that are no text") from None


def _first(*calls: tuple[Any, ...]) -> Any:
    """Return the first answer; the next call is tried only where the one before is absent."""
    for function, *arguments in calls[:-1]:
        try:
            return call(function, *arguments)
        except GpuReadError as error:
            if error.code not in ABSENT:
                raise
    function, *arguments = calls[-1]
    return call(function, *arguments)


def unless_dead(function: str, *arguments: Any) -> Any:
    """Return the answer, or None: what only helps must not keep a GPU out for less than its death."""
    try:
        return call(function, *arguments)
    except GpuReadError as error:
        if error.code in DEAD:
            raise
        return None


def or_none(reader: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the reader returns, or None where it is absent."""
    try:
        return reader(*arguments)
    except GpuReadError as error:
        if error.code not in ABSENT:
            raise
        return None


def _failure(code: int, what: str) -> GpuReadError:
    name = _error_name(code)
    return GpuReadError(name, f"{what}: {name} ({code})")


def _error_name(code: int) -> str:
    return _error_names().get(code, f"ERROR_{code}")


@functools.cache
def _pynvml() -> Any:
    import pynvml

    return pynvml


@functools.cache
def _error_names() -> dict[int, str]:
    names = (name for name in dir(_pynvml()) if name.startswith("NVML_ERROR_"))
    return {getattr(_pynvml(), name): name.removeprefix("NVML_") for name in names}
