"""NVML through `pynvml`, and the only file that imports it: when it is first used, not when this is imported.

All of this runs in the NVML child (`nvml_child.py`), never in the daemon: any call may hang in the driver.
What a GPU does not report is None, never zero. Failures are `GpuReadError`s whose code is NVML's own name
without its prefix ("ERROR_GPU_IS_LOST"). GPUs are opened by index, because opening by UUID fails for all of
them once one is lost; everything above this file names them by UUID, because indices move.
"""

import functools
import pwd
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuIdentity, GpuProcess, GpuSample

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

POWER_INSTANT_FIELD = 186  # GetPowerUsage is a 1 s average on Ampere and newer, this one is not
TEMPERATURE_SENSOR_GPU = 0
CLOCK_SM = 1
BYTES_PER_MIB = 2**20
MW_PER_W = 1000
PERCENT = 100
PID_LIMIT = 2**32 - 1  # drivers 535.43 to 535.86 fill in 0 and this one
# pynvml sizes a process list at twice what the driver says plus 5; three misses in a row are a fork bomb.
LIST_TRIES_MAX = 3
# Any node has fewer users on its GPUs; a lookup may ask a directory server.
USERS_CACHED_MAX = 256
COMM_LENGTH_MAX = 15  # the kernel cuts /proc/<pid>/comm here
NAME_LENGTH_MAX = 255  # NAME_MAX of a file system
# More than fit on any GPU, and their names fit in a line of the protocol; one entry is enough to be held.
PROCESSES_MAX = 512

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
# Which member of the value's union is valid, by its valueType.
VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")

SYSFS_PCI_DEVICES = Path("/sys/bus/pci/devices")
PROC = Path("/proc")


# The library -----------------------------------------------------------------------------------


def open_library() -> tuple[int, str]:
    """Initialise the library; return how many GPUs it counts, and the driver's version.

    Raises:
        GpuReadError: There is no library, no driver, or they do not fit each other.
    """
    _call("nvmlInit")
    return _call("nvmlDeviceGetCount"), _unless_dead("nvmlSystemGetDriverVersion") or ""


def close_library() -> None:
    """Shut the library down. One that is not open, or whose driver is gone, is as good as shut down."""
    try:
        _call("nvmlShutdown")
    except GpuReadError as error:
        if error.code not in DRIVER_GONE:
            raise


# One GPU ---------------------------------------------------------------------------------------


class OpenGpu:
    """A GPU with an open handle."""

    def __init__(self, index: int, driver_version: str) -> None:
        self._handle = _call("nvmlDeviceGetHandleByIndex", index)
        self.identity = _identity(self._handle, index, driver_version)

    def sample(self) -> tuple[GpuSample, str]:
        """Return what the GPU reports now, and the name of a failure that cost a field, or "".

        Raises:
            GpuReadError: The GPU or the driver is gone.
        """
        at_s = time.time()
        failures: list[str] = []
        values = {name: self._read(reader, failures) for name, reader in SAMPLE_FIELDS.items()}
        sample = GpuSample(uuid=self.identity.uuid, at_s=at_s, **values)
        return sample, failures[0] if failures else ""

    def holders(self) -> GpuHolders:
        """Return who is on the GPU now.

        Raises:
            GpuReadError: A list can't be read. A GPU without a list of compute processes raises too, for
                an empty answer would read as "free".
        """
        at_s = time.time()
        entries: list[tuple[str, int, int | None]] = []
        for place, (kind, functions) in enumerate(PROCESS_LISTS):
            try:
                entries += ((kind, entry.pid, entry.usedGpuMemory) for entry in self._list(functions))
            except GpuReadError as error:
                if place == 0 or error.code not in ABSENT:
                    raise
        return GpuHolders(
            uuid=self.identity.uuid,
            at_s=at_s,
            processes=merge_processes(entries),
            memory_used_mib=_or_none(_memory_used_mib, self._handle),
        )

    def _read(self, reader: Callable[[Any], Any], failures: list[str]) -> Any:
        try:
            return reader(self._handle)
        except GpuReadError as error:
            if error.code in DEAD:
                raise
            if error.code not in ABSENT:
                failures.append(error.code)
            return None

    def _list(self, functions: tuple[str, ...]) -> list[Any]:
        for tries in range(1, LIST_TRIES_MAX + 1):
            try:
                return list(_first(*((function, self._handle) for function in functions)))
            except GpuReadError as error:
                # The list grew between the call that sizes it and the call that reads it.
                if error.code != "ERROR_INSUFFICIENT_SIZE" or tries == LIST_TRIES_MAX:
                    raise
        raise AssertionError("the last try returns or raises")


def _identity(handle: Any, index: int, driver_version: str) -> GpuIdentity:
    memory = _or_none(_memory, handle)
    limits_mw = _unless_dead("nvmlDeviceGetPowerManagementLimitConstraints", handle)
    pci = _unless_dead("nvmlDeviceGetPciInfo", handle)
    pci_bus_id = pci.busId if pci else ""
    return GpuIdentity(
        uuid=_call("nvmlDeviceGetUUID", handle),
        index=index,
        model=_call("nvmlDeviceGetName", handle),
        memory_total_mib=memory.total // BYTES_PER_MIB if memory else 0,
        pci_bus_id=pci_bus_id,
        numa_node=_numa_node(handle, pci_bus_id),
        minor_number=_unless_dead("nvmlDeviceGetMinorNumber", handle),
        power_limit_w_min=_watts(limits_mw[0]) if limits_mw else None,
        power_limit_w_max=_watts(limits_mw[1]) if limits_mw else None,
        power_limit_w_default=_watts(_unless_dead("nvmlDeviceGetPowerManagementDefaultLimit", handle)),
        driver_version=driver_version,
    )


def _numa_node(handle: Any, pci_bus_id: str) -> int | None:
    """Return NVML's node where the GPU is one itself (Grace), else that of its PCI slot."""
    node: int | None = _unless_dead("nvmlDeviceGetNumaNodeId", handle)
    if node is not None:
        return node
    # NVML writes 00000000:3B:00.0, sysfs 0000:3b:00.0.
    text = _text(SYSFS_PCI_DEVICES / pci_bus_id.lower()[4:] / "numa_node").strip() if pci_bus_id else ""
    return int(text) if text.isdigit() else None  # -1 = unknown


def _watts(mw: int | None) -> float | None:
    return None if mw is None else mw / MW_PER_W


# Fields of a sample ----------------------------------------------------------------------------


def _memory(handle: Any) -> Any:
    # The older struct counts the driver's reserve as used.
    return _first(
        ("nvmlDeviceGetMemoryInfo", handle, getattr(_pynvml(), "nvmlMemory_v2", None)),
        ("nvmlDeviceGetMemoryInfo", handle),
    )


def _memory_used_mib(handle: Any) -> int:
    used: int = _memory(handle).used
    return used // BYTES_PER_MIB


def _utilization_ratio(handle: Any) -> float:
    percent: int = _call("nvmlDeviceGetUtilizationRates", handle).gpu
    return percent / PERCENT


def _power_w(handle: Any) -> float:
    try:
        return _field(handle, POWER_INSTANT_FIELD) / MW_PER_W
    except GpuReadError as error:
        # Drivers that do not know the field answer several ways; only the dead are not asked again.
        if error.code in DEAD:
            raise
    mw: int = _call("nvmlDeviceGetPowerUsage", handle)
    return mw / MW_PER_W


def _power_limit_w(handle: Any) -> float:
    # What was asked for; the enforced limit is lower where somebody else caps too.
    mw: int = _first(
        ("nvmlDeviceGetPowerManagementLimit", handle), ("nvmlDeviceGetEnforcedPowerLimit", handle)
    )
    return mw / MW_PER_W


def _energy_mj(handle: Any) -> int:
    energy_mj: int = _call("nvmlDeviceGetTotalEnergyConsumption", handle)
    return energy_mj


def _temperature_celsius(handle: Any) -> float:
    # The second is deprecated and goes with CUDA 14, the first is missing before.
    celsius: int = _first(
        ("nvmlDeviceGetTemperatureV", handle, TEMPERATURE_SENSOR_GPU),
        ("nvmlDeviceGetTemperature", handle, TEMPERATURE_SENSOR_GPU),
    )
    return float(celsius)


def _sm_clock_mhz(handle: Any) -> int:
    mhz: int = _call("nvmlDeviceGetClockInfo", handle, CLOCK_SM)
    return mhz


SAMPLE_FIELDS: dict[str, Callable[[Any], Any]] = {
    "memory_used_mib": _memory_used_mib,
    "utilization_ratio": _utilization_ratio,
    "power_w": _power_w,
    "power_limit_w": _power_limit_w,
    "energy_mj": _energy_mj,
    "temperature_celsius": _temperature_celsius,
    "sm_clock_mhz": _sm_clock_mhz,
}


def _field(handle: Any, field: int) -> int:
    """Return a field's value; each carries its own verdict and says which member of its union is valid."""
    value = _call("nvmlDeviceGetFieldValues", handle, [field])[0]
    if value.nvmlReturn != 0:
        raise _failure(value.nvmlReturn, f"field {field}")
    if not 0 <= value.valueType < len(VALUE_MEMBERS):
        raise GpuReadError("ERROR_ARGUMENT_VERSION_MISMATCH", f"field {field} has type {value.valueType}")
    return int(getattr(value.value, VALUE_MEMBERS[value.valueType]))


# Processes -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Owner:
    user: str
    command: str


def merge_processes(entries: Iterable[tuple[str, int, int | None]]) -> tuple[GpuProcess, ...]:
    """Return one process per living PID, by PID, and one unknown holder (PID 0) per entry that names none.

    Args:
        entries: (kind, PID, bytes) as listed. A process in several lists keeps its first kind and the
            largest figure, because each list reports all that the process holds.
    """
    merged: dict[int, tuple[str, int | None]] = {}
    unknown: list[GpuProcess] = []
    for kind, pid, memory_bytes in entries:
        memory_mib = None if memory_bytes is None else memory_bytes // BYTES_PER_MIB
        if not 0 < pid < PID_LIMIT:
            unknown.append(GpuProcess(pid=0, memory_mib=memory_mib, kind=kind))
            continue
        first_kind, first_mib = merged.get(pid, (kind, None))
        known = [mib for mib in (first_mib, memory_mib) if mib is not None]
        merged[pid] = (first_kind, max(known, default=None))
    living: list[GpuProcess] = []
    for pid, (kind, mib) in sorted(merged.items())[:PROCESSES_MAX]:
        owner = _owner(pid)
        if owner is None:
            unknown.append(GpuProcess(pid=0, memory_mib=mib, kind=kind))
        else:
            living.append(GpuProcess(pid, mib, kind, owner.user, owner.command))
    return (*unknown, *living)[:PROCESSES_MAX]


def _owner(pid: int) -> _Owner | None:
    """Return whose process it is and what it runs, or None if there is no such process."""
    status = _text(PROC / str(pid) / "status")
    uid = next((line.split()[1] for line in status.splitlines() if line.startswith("Uid:")), "")
    if not uid:
        return None
    return _Owner(_user_name(int(uid)), _command(pid))


@functools.lru_cache(maxsize=USERS_CACHED_MAX)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _command(pid: int) -> str:
    """Return the base name of the executable, or the process's own word where we may not look."""
    process = PROC / str(pid)
    try:
        name = (process / "exe").readlink().name
    except OSError:
        comm = _text(process / "comm").strip()
        argument = _text(process / "cmdline").split("\0", 1)[0].rsplit("/", 1)[-1]
        is_cut = len(comm) == COMM_LENGTH_MAX and argument.startswith(comm)
        name = argument if is_cut else comm
    # Its own word may hold what would steer an operator's terminal.
    printable = "".join(letter if letter.isprintable() else "?" for letter in name.removesuffix(" (deleted)"))
    return printable[:NAME_LENGTH_MAX]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# Calls -----------------------------------------------------------------------------------------


def _call(function: str, *arguments: Any) -> Any:
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
            return _call(function, *arguments)
        except GpuReadError as error:
            if error.code not in ABSENT:
                raise
    function, *arguments = calls[-1]
    return _call(function, *arguments)


def _unless_dead(function: str, *arguments: Any) -> Any:
    """Return the answer, or None: what only helps must not keep a GPU out for less than its death."""
    try:
        return _call(function, *arguments)
    except GpuReadError as error:
        if error.code in DEAD:
            raise
        return None


def _or_none(reader: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the reader returns, or None where it is absent."""
    try:
        return reader(*arguments)
    except GpuReadError as error:
        if error.code not in ABSENT:
            raise
        return None


def _failure(code: int, what: str) -> GpuReadError:
    name = _error_names().get(code, f"ERROR_{code}")
    return GpuReadError(name, f"{what}: {name} ({code})")


@functools.cache
def _pynvml() -> Any:
    import pynvml

    return pynvml


@functools.cache
def _error_names() -> dict[int, str]:
    names = (name for name in dir(_pynvml()) if name.startswith("NVML_ERROR_"))
    return {getattr(_pynvml(), name): name.removeprefix("NVML_") for name in names}
