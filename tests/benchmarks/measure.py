"""What a figure is made of: spreads, targets, processor time, and where it was measured."""

import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Figure = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
MS_PER_S = 1000.0
NS_PER_MS = 1e6
# A tail is fine while it stays within this many times the median's target.
TAIL_RATIO_MAX = 5.0
# A round is quiet if the yardstick around it took at most this many times its best.
QUIET_RATIO_MAX = 1.15
QUIET_ROUNDS_MIN = 20
_YARDSTICK_STEPS = 4_000
_YARDSTICK_TRIES = 3  # the shortest counts: an interrupt in between is not the processor's pace
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PACKAGES = ("grpcio", "protobuf", "numpy", "msgspec")


class DidNotWork(Exception):
    """Something that a figure rests on did not happen."""


def spread(values: Sequence[float], digits: int = 3) -> Figure:
    """Percentiles by nearest rank: one of the values, never a mixture; the minimum has little noise."""
    if not values:
        raise DidNotWork("nothing was measured")
    ordered = sorted(values)

    def at(percent: int) -> float:
        return round(ordered[math.ceil(percent * len(ordered) / 100) - 1], digits)

    return {
        "p50": at(50),
        "p90": at(90),
        "p99": at(99),
        "max": at(100),
        "min": round(ordered[0], digits),
        "n": len(ordered),
    }


def at_most(what: str, value: float, limit: float, unit: str) -> Figure:
    """A target that a small value meets."""
    return {"target": f"{what} <= {limit:g} {unit}", "value": value, "met": value <= limit}


def at_least(what: str, value: float, limit: float, unit: str) -> Figure:
    """A target that a large value meets."""
    return {"target": f"{what} >= {limit:g} {unit}", "value": value, "met": value >= limit}


class Yardstick:
    """How fast the processors are at the moment: others may share them, and then all figures grow alike."""

    def __init__(self) -> None:
        self.best_ms = math.inf

    def measure(self) -> float:
        """Time a loop that is always the same, on each processor in turn; returns the slowest, in ms."""
        processors = os.sched_getaffinity(0)
        slowest_ms = 0.0
        for processor in processors:
            os.sched_setaffinity(0, {processor})
            slowest_ms = max(slowest_ms, min(_loop_ms() for _ in range(_YARDSTICK_TRIES)))
        os.sched_setaffinity(0, processors)
        self.best_ms = min(self.best_ms, slowest_ms)
        return slowest_ms


def _loop_ms() -> float:
    begun = time.perf_counter()
    total = 0
    for i in range(_YARDSTICK_STEPS):
        total += i
    return MS_PER_S * (time.perf_counter() - begun)


class Rounds:
    """What repeated rounds took, and how fast the processors were around each."""

    def __init__(self, yardstick: Yardstick) -> None:
        self._yardstick = yardstick
        self._before_ms = yardstick.measure()
        self._found: list[tuple[float, float]] = []

    def add(self, value: float) -> None:
        """Take what a round took that ended just now."""
        after_ms = self._yardstick.measure()
        self._found.append((value, max(self._before_ms, after_ms)))
        self._before_ms = after_ms

    def spread(self) -> Figure:
        """Of all rounds; and, if there are enough, of those in which all processors ran at their best."""
        limit_ms = QUIET_RATIO_MAX * self._yardstick.best_ms
        quiet = [value for value, pace_ms in self._found if pace_ms <= limit_ms]
        return {
            **spread([value for value, _ in self._found]),
            "yardstick_ms": spread([pace_ms for _, pace_ms in self._found]),
            "quiet": spread(quiet) if len(quiet) >= QUIET_ROUNDS_MIN else None,
        }


def latency_targets(found: Figure, p50_ms: float) -> list[Figure]:
    """Targets of a latency on a quiet machine: the median, and a tail within five times the median's."""
    judged = found["quiet"] or found
    return [
        at_most("p50", judged["p50"], p50_ms, "ms"),
        at_most("p99", judged["p99"], TAIL_RATIO_MAX * p50_ms, "ms"),
    ]


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Processor time that some processes used, and time that they were ready and waited for a processor."""

    used_s: float
    waited_s: float

    def since(self, before: "CpuTime") -> "CpuTime":
        """What was added."""
        return CpuTime(self.used_s - before.used_s, self.waited_s - before.waited_s)


def cpu_time(*pids: int) -> CpuTime:
    """Of these processes, all threads, and of their children that they have waited for."""
    used_ticks, waited_ns = 0, 0
    for pid in pids:
        process = Path(f"/proc/{pid}")
        # The name (field 2) may hold spaces; after its last ")" comes field 3. utime stands in field 14.
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        used_ticks += sum(map(int, fields[11:15]))
        for thread in (process / "task").iterdir():
            waited_ns += int((thread / "schedstat").read_text().split()[1])
    return CpuTime(used_ticks / _TICKS_PER_S, waited_ns / 1e9)


def cost(spent: CpuTime, operations: int) -> Figure:
    """Processor time an operation, and how much of the time the processes waited because others ran."""
    return {
        "cpu_ms_per_operation": round(MS_PER_S * spent.used_s / operations, 3),
        "waited_for_cpu_ms_per_operation": round(MS_PER_S * spent.waited_s / operations, 3),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(one, 2) for one in os.getloadavg()]


def machine() -> Figure:
    """What the figures depend on beside the code."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    with Path("/proc/cpuinfo").open() as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def code() -> Figure:
    """The commit, and whether the working tree differs from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "", "dirty": True}


def _git(*arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
