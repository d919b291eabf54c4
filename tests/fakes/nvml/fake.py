"""The fake driver as a test holds it: `FakeNvml` changes what the library in another process reads.

fake = FakeNvml(tmp_path, gpus=2)
fake.gpus[0].memory_used = 3 * GIB
fake.rule("nvmlDeviceGetPowerUsage", gpu=1, hang=True)
gpus = NvmlGpus(environment=fake.environment())

With `is_live` power, energy, clocks, heat and utilization follow from load, limit and time:

fake = FakeNvml(tmp_path, is_live=True)
fake.stop_clock()
fake.load(0, 1.0)
fake.advance(2.5)
"""

import ctypes
import mmap
import os
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.fakes.nvml import build
from tests.fakes.nvml.profiles import ABSENT, FOLLOWING, LINKS_MAX, LIVE, MIB, PROFILES, SWITCHES

GPUS_MAX = 16
PROCESSES_MAX = 64
RULES_MAX = 64
EVENTS_MAX = 64
INSTANCES_MAX = 8
STEPS_MAX = 64
ANY_GPU = -1
NO_INSTANCE = 2**32 - 1
KIB = 2**10
GIB = 2**30
LISTS = ("compute", "graphics", "mps")
NVLINK_TO_SWITCH = 2
EVENT_XID = 0x8
EVENT_MIG = 0x100
MULTIPROCESSORS_PER_SLICE = 16
HEADER = build.HEADER.read_text()

# What a driver before 510 lacks.
OLD_DRIVER = (
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetNumaNodeId",
)


def _names(macro: str) -> tuple[str, ...]:
    """Return what the header lists under the macro: one place for names and order."""
    body = HEADER.partition(f"#define {macro}(X)")[2].partition("\n\n")[0]
    return tuple(re.findall(r"X\((\w+)\)", body))


GPU_FIGURES = _names("FIGURES")
GPU_INPUTS = _names("INPUTS")


class Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("instance", ctypes.c_uint32),
        ("memory_bytes", ctypes.c_uint64),
        ("utilization_percent", ctypes.c_uint64),
        ("seen_us", ctypes.c_uint64),
    )


class Instance(ctypes.Structure):
    _fields_ = (
        ("uuid_bytes", ctypes.c_char * 96),
        ("name", ctypes.c_char * 96),
        ("instance", ctypes.c_uint32),
        ("compute_instance", ctypes.c_uint32),
        ("slices", ctypes.c_uint32),
        ("multiprocessors", ctypes.c_uint32),
        ("memory_total", ctypes.c_uint64),
        ("memory_reserved", ctypes.c_uint64),
        ("memory_used", ctypes.c_uint64),
    )

    @property
    def uuid(self) -> str:
        return self.uuid_bytes.decode()


class Link(ctypes.Structure):
    _fields_ = (
        ("remote_bus_id", ctypes.c_char * 32),
        ("remote_type", ctypes.c_int32),
        ("pad", ctypes.c_uint32),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("at_ns", ctypes.c_int64),
        ("draw_mw", ctypes.c_uint64),
        ("is_capped", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class Gpu(ctypes.Structure):
    _fields_ = (
        ("uuid_bytes", ctypes.c_char * 96),
        ("name", ctypes.c_char * 256),
        ("bus_id", ctypes.c_char * 32),
        *((figure, ctypes.c_uint64) for figure in (*GPU_FIGURES, *GPU_INPUTS)),
        ("lost", ctypes.c_int32),
        ("deaf", ctypes.c_int32),
        ("short_sizings", ctypes.c_int32),
        ("process_count", ctypes.c_uint32 * len(LISTS)),
        ("processes", Process * PROCESSES_MAX * len(LISTS)),
        ("instances", Instance * INSTANCES_MAX),
        ("links", Link * LINKS_MAX),
        ("counted_nj", ctypes.c_uint64),
        ("counted_capped_ns", ctypes.c_uint64),
        ("step_count", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("steps", Step * STEPS_MAX),
    )

    @property
    def uuid(self) -> str:
        return self.uuid_bytes.decode()

    def set_processes(
        self, processes: Sequence[tuple[int, int]], kind: str = "compute", instance: int = NO_INSTANCE
    ) -> None:
        """Put (PID, bytes) into one of the lists, for all that it held of that instance."""
        which = LISTS.index(kind)
        kept = [
            Process.from_buffer_copy(process)
            for process in self.processes[which][: self.process_count[which]]
            if process.instance != instance
        ]
        fresh = [Process(pid, instance, memory_bytes, 0, 0) for pid, memory_bytes in processes]
        for place, process in enumerate((*kept, *fresh)):
            self.processes[which][place] = process
        self.process_count[which] = len(kept) + len(fresh)

    def set_utilization(self, place: int, ratio: float) -> None:
        """Let the driver have a new sample of how busy the compute process at that place keeps the GPU."""
        process = self.processes[0][place]
        process.utilization_percent, process.seen_us = round(100 * ratio), time.time_ns() // 1000

    def partition(self, *slices: int) -> None:
        """Set MIG instances of so many sevenths each, for all that there were; none = out of MIG mode."""
        self.mig_mode = 1 if slices else 0
        for place in range(INSTANCES_MAX):
            ctypes.memset(ctypes.byref(self.instances[place]), 0, ctypes.sizeof(Instance))
        for place, part in enumerate(slices):
            one = self.instances[place]
            # Eighths of the memory, and an eighth at least: 1g.10gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb.
            eighths = {1: 1, 2: 2, 3: 4, 4: 4, 7: 8}[part]
            one.memory_total = self.memory_total * eighths // 8
            gib = round(self.memory_total / GIB / 10) * 10 * eighths // 8
            one.name = self.name + f" MIG {part}g.{gib}gb".encode()
            one.instance, one.slices = place + 1, part
            one.multiprocessors = MULTIPROCESSORS_PER_SLICE * part
            one.memory_used = 12 * MIB
            # Last: from here on it is there. A layout of other sizes has other UUIDs.
            salt = sum(slices[: place + 1]) * 100 + part
            one.uuid_bytes = f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, f'{self.uuid}/{place}/{salt}')}".encode()


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


class Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
        ("gpu", ctypes.c_uint32),
        ("instance", ctypes.c_uint32),
        ("compute_instance", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class State(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("driver_loaded", ctypes.c_int32),
        ("driver_generation", ctypes.c_uint32),
        ("kernel_version", ctypes.c_uint32),
        ("gpu_count", ctypes.c_uint32),
        ("opened_by", ctypes.c_uint32),
        ("privileged", ctypes.c_uint32),
        ("clock_ns", ctypes.c_int64),
        ("cuda_version", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("driver_version", ctypes.c_char * 80),
        ("event_count", ctypes.c_uint64),
        ("events", Event * EVENTS_MAX),
        ("rules", Rule * RULES_MAX),
        ("lock", ctypes.c_uint64 * 5),  # a pthread_mutex_t, for the library alone
        ("gpus", Gpu * GPUS_MAX),
    )


class FakeNvml:
    """A node's GPUs; all attributes of its `gpus` may be set while others read."""

    def __init__(
        self,
        folder: Path,
        gpus: int = 1,
        without: Iterable[str] = (),
        profile: str = "H100",
        is_live: bool = False,
    ) -> None:
        """Make a driver in the folder. Functions in `without` are missing in its library."""
        self._library = build.build(without)
        self._visible = folder / "lib"
        self._visible.mkdir()
        self._file = folder / "fake-nvml.state"
        with self._file.open("xb") as file:
            os.ftruncate(file.fileno(), ctypes.sizeof(State))
        self._map()
        self._state.size = ctypes.sizeof(State)
        self._state.driver_loaded = self._state.privileged = 1
        self._state.cuda_version = 12_080
        self.set_driver_version("570.86.15")
        build.writer().fake_create(self._address)
        for index in range(GPUS_MAX):
            self._place(index)
            self.become(index, profile, is_live=is_live)
        self.set_count(gpus)
        self.show_library()

    @classmethod
    def opened(cls, folder: Path) -> "FakeNvml":
        """Return the driver that another process made in the folder."""
        fake = cls.__new__(cls)
        fake._visible, fake._file = folder / "lib", folder / "fake-nvml.state"
        fake._library = (fake._visible / build.LIBRARY).resolve()
        fake._map()
        assert fake._state.size == ctypes.sizeof(State), f"{fake._file} was made by another version"
        return fake

    def _map(self) -> None:
        with self._file.open("rb+") as file:
            memory = mmap.mmap(file.fileno(), ctypes.sizeof(State))
        self._state = State.from_buffer(memory)
        self._address = ctypes.addressof(self._state)
        self.gpus: Any = self._state.gpus

    def _place(self, index: int) -> None:
        """Give the GPU its name tag and its slot: pairs on a switch, four on a socket."""
        gpu = self.gpus[index]
        gpu.uuid_bytes = f"GPU-{uuid.UUID(int=0xFA4E << 96 | index)}".encode()
        gpu.bus_id = f"00000000:{0x10 + index:02X}:00.0".encode()
        gpu.minor_number = index
        gpu.pcie_switch, gpu.host_bridge = index // 2, index // 4

    def become(self, index: int, profile: str, is_live: bool = False) -> None:
        """Make the GPU another board."""
        gpu, board = self.gpus[index], PROFILES[profile]
        for figure, value in board.figures().items():
            setattr(gpu, figure, value)
        gpu.name = board.name.encode()
        for place in range(LINKS_MAX):
            remote = SWITCHES[place % len(SWITCHES)] if place < board.links else ""
            gpu.links[place].remote_bus_id = remote.encode()
            gpu.links[place].remote_type = NVLINK_TO_SWITCH
        if is_live:
            for figure in FOLLOWING:
                if getattr(gpu, figure) != ABSENT:
                    setattr(gpu, figure, LIVE)
            self.load(index, 0.0)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment in which a process finds this driver."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self._visible),
            "WATTSHIFT_FAKE_NVML_STATE": str(self._file),
            **more,
        }

    # Time and draw ------------------------------------------------------------------------------

    def stop_clock(self, at_s: float = 1000.0) -> None:
        """Let the fake's time pass by `advance` alone."""
        self._state.clock_ns = round(at_s * 1e9)
        for index in range(self._state.gpu_count):
            self.gpus[index].step_count = 0
            self.draw_changed(index)

    def advance(self, s: float) -> None:
        self._state.clock_ns += round(s * 1e9)

    def load(self, index: int, ratio: float) -> None:
        """Let the GPU work at so much of its natural draw from now on."""
        self.gpus[index].load_milli = round(ratio * 1000)
        self.draw_changed(index)

    def draw_changed(self, index: int) -> None:
        """Take an input of the draw that was set as of now."""
        build.writer().fake_draw_changed(self._address, index)

    # Events -------------------------------------------------------------------------------------

    def event(self, index: int, kind: int, data: int = 0, instance: int = NO_INSTANCE) -> None:
        build.writer().fake_event(self._address, index, kind, data, instance)

    def xid(self, index: int, number: int) -> None:
        self.event(index, EVENT_XID, number)

    # The driver ---------------------------------------------------------------------------------

    @property
    def opened_by(self) -> int:
        """PID of the last process that initialised the library, 0 = none yet."""
        return self._state.opened_by

    def set_count(self, gpus: int) -> None:
        self._state.gpu_count = gpus

    def set_driver_version(self, version: str) -> None:
        self._state.driver_version = version.encode()

    def set_privileged(self, is_privileged: bool) -> None:
        """Let setters work, or answer NO_PERMISSION as to anybody but root."""
        self._state.privileged = is_privileged

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
        """Load the driver anew: handles of the one before are dead; counters, limits and locks are gone."""
        build.writer().fake_forget(self._address)
        self._state.driver_generation += 1
        self._state.driver_loaded = 1

    def upgrade_driver(self) -> None:
        """Exchange the driver: processes that have the library mapped can't use it any more."""
        self._state.kernel_version += 1
        self.load_driver()

    def rule(
        self, function: str, gpu: int = ANY_GPU, code: int = 0, delay_s: float = 0.0, hang: bool = False
    ) -> Rule:
        """Bend a call, of one GPU or of all ("*" = every call); what comes back can be bent further."""
        rule = next(rule for rule in self._state.rules if not rule.function)
        rule.gpu, rule.code, rule.hang, rule.delay_us = gpu, code, hang, round(delay_s * 1e6)
        rule.function = function.encode()  # last: from here on it counts
        return rule

    def clear_rules(self) -> None:
        for rule in self._state.rules:
            rule.code = rule.hang = rule.delay_us = 0
            rule.function = b""
