"""The fake driver as a test holds it: `FakeNvml` changes what the library in another process reads.

fake = FakeNvml(tmp_path, gpus=2)
fake.gpus[0].memory_used = 3 * GIB
fake.rule("nvmlDeviceGetPowerUsage", gpu=1, hang=True)
gpus = NvmlGpus(environment=fake.environment())
"""

import ctypes
import mmap
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.fakes.nvml import build

GPUS_MAX = 16
PROCESSES_MAX = 64
RULES_MAX = 64
ABSENT = 2**64 - 1  # not reported; for a process's memory NVML's own word for it
ANY_GPU = -1
MIB = 2**20
GIB = 2**30
LISTS = ("compute", "graphics", "mps")

# What a driver before 510 lacks.
OLD_DRIVER = (
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetNumaNodeId",
)


class Process(ctypes.Structure):
    _fields_ = (("pid", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("memory_bytes", ctypes.c_uint64))


GPU_FIGURES = (
    "memory_total",
    "memory_reserved",
    "memory_used",
    "utilization_percent",
    "power_instant_mw",
    "power_average_mw",
    "limit_mw",
    "limit_enforced_mw",
    "limit_min_mw",
    "limit_max_mw",
    "limit_default_mw",
    "energy_mj",
    "temperature_celsius",
    "sm_clock_mhz",
    "minor_number",
    "numa_node",
)


class Gpu(ctypes.Structure):
    _fields_ = (
        ("uuid_bytes", ctypes.c_char * 96),
        ("name", ctypes.c_char * 96),
        ("bus_id", ctypes.c_char * 32),
        *((figure, ctypes.c_uint64) for figure in GPU_FIGURES),
        ("lost", ctypes.c_int32),
        ("short_sizings", ctypes.c_int32),
        ("process_count", ctypes.c_uint32 * len(LISTS)),
        ("pad", ctypes.c_uint32),
        ("processes", Process * PROCESSES_MAX * len(LISTS)),
    )

    @property
    def uuid(self) -> str:
        return self.uuid_bytes.decode()

    def set_processes(self, processes: Sequence[tuple[int, int]], kind: str = "compute") -> None:
        """Put (PID, bytes) into one of the lists, for all that it held."""
        which = LISTS.index(kind)
        for place, (pid, memory_bytes) in enumerate(processes):
            self.processes[which][place] = Process(pid, 0, memory_bytes)
        self.process_count[which] = len(processes)


class Rule(ctypes.Structure):
    """What one call does instead. `calls` and `inside` are counted by the library."""

    _fields_ = (
        ("function", ctypes.c_char * 64),
        ("gpu", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("hang", ctypes.c_int32),
        ("delay_us", ctypes.c_uint32),
        ("calls", ctypes.c_uint32),
        ("inside", ctypes.c_uint32),
    )


class State(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("driver_loaded", ctypes.c_int32),
        ("driver_generation", ctypes.c_uint32),
        ("kernel_version", ctypes.c_uint32),
        ("gpu_count", ctypes.c_uint32),
        ("opened_by", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("driver_version", ctypes.c_char * 80),
        ("rules", Rule * RULES_MAX),
        ("gpus", Gpu * GPUS_MAX),
    )


class FakeNvml:
    """A node's GPUs; all attributes of its `gpus` may be set while others read."""

    def __init__(self, folder: Path, gpus: int = 1, without: Iterable[str] = ()) -> None:
        self._library = build.build(without)
        self._visible = folder / "lib"
        self._visible.mkdir()
        self._file = folder / "fake-nvml.state"
        with self._file.open("xb+") as file:
            os.ftruncate(file.fileno(), ctypes.sizeof(State))
            memory = mmap.mmap(file.fileno(), ctypes.sizeof(State))
        self._state = State.from_buffer(memory)
        self._state.size = ctypes.sizeof(State)
        self._state.driver_loaded = 1
        self.set_driver_version("570.86.15")
        self.gpus: Any = self._state.gpus
        for index in range(GPUS_MAX):
            self._fill(index)
        self.set_count(gpus)
        self.show_library()

    def _fill(self, index: int) -> None:
        gpu = self.gpus[index]
        gpu.uuid_bytes = f"GPU-{uuid.UUID(int=0xFA4E << 96 | index)}".encode()
        gpu.name = b"NVIDIA H100 80GB HBM3"
        gpu.bus_id = f"00000000:{0x10 + index:02X}:00.0".encode()
        figures = {
            "memory_total": 81559 * MIB,
            "memory_reserved": 308 * MIB,
            "memory_used": 4 * MIB,
            "utilization_percent": 0,
            "power_instant_mw": 71_800,
            "power_average_mw": 72_000,
            "limit_mw": 700_000,
            "limit_enforced_mw": 700_000,
            "limit_min_mw": 200_000,
            "limit_max_mw": 700_000,
            "limit_default_mw": 700_000,
            "energy_mj": 1_000_000,
            "temperature_celsius": 31,
            "sm_clock_mhz": 345,
            "minor_number": index,
            "numa_node": ABSENT,
        }
        for figure, value in figures.items():
            setattr(gpu, figure, value)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment in which a process finds this driver."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self._visible),
            "WATTSHIFT_FAKE_NVML_STATE": str(self._file),
            **more,
        }

    @property
    def opened_by(self) -> int:
        """PID of the last process that initialised the library, 0 = none yet."""
        return self._state.opened_by

    def set_count(self, gpus: int) -> None:
        self._state.gpu_count = gpus

    def set_driver_version(self, version: str) -> None:
        self._state.driver_version = version.encode()

    def reorder(self, *order: int) -> None:
        """Give place N what is now at place order[N]."""
        taken = [bytes(self.gpus[index]) for index in order]
        for index, image in enumerate(taken):
            ctypes.memmove(ctypes.byref(self.gpus[index]), image, len(image))

    def hide_library(self) -> None:
        (self._visible / build.LIBRARY).unlink()

    def show_library(self) -> None:
        (self._visible / build.LIBRARY).symlink_to(self._library)

    def unload_driver(self) -> None:
        self._state.driver_loaded = 0

    def load_driver(self) -> None:
        """Load the driver anew: handles of the one before are dead."""
        self._state.driver_generation += 1
        self._state.driver_loaded = 1

    def upgrade_driver(self) -> None:
        """Exchange the driver: processes that have the library mapped can't use it any more."""
        self._state.kernel_version += 1
        self.load_driver()

    def rule(
        self, function: str, gpu: int = ANY_GPU, code: int = 0, delay_s: float = 0.0, hang: bool = False
    ) -> Rule:
        """Bend a call, of one GPU or of all; the rule that comes back can be bent further."""
        rule = next(rule for rule in self._state.rules if not rule.function)
        rule.gpu, rule.code, rule.hang, rule.delay_us = gpu, code, hang, round(delay_s * 1e6)
        rule.function = function.encode()  # last: from here on it counts
        return rule
