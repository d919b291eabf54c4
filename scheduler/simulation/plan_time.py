"""How long planning takes on worlds of a given size, beside what reading the world once would take.

A *cold* plan starts from columns in host memory and nothing else: freezing them into a snapshot, which checks
itself, counts, and so does the way to the GPU where CuPy plans. A *tick* is the same on columns in which
some things, by default 1,000, changed since the last plan, with that plan's memo; the change itself doesn't
count, because the daemon keeps its columns up to date as things happen. A world is taken as it was drawn, or
*settled*: as it is found between two ticks, with nothing left to do.

The *floor* is the time to read every column once at the memory's bandwidth, which is measured as the best of
some sums over a buffer that no cache holds: what has to look at all jobs can't be faster.
"""

import gc
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from scheduler.effects.collector import COLLECTOR_THRESHOLDS
from scheduler.model.actions import Plan, PreemptJob, StartJob
from scheduler.model.policy import Policy
from scheduler.model.snapshot import Snapshot
from scheduler.planning.arrays import finish, on_backend, pool_mib, release, xp
from scheduler.planning.planner import Memo, digest, plan
from scheduler.simulation.changes import carried_out, changed, held_gpus, settled
from scheduler.simulation.worlds import world

CHANGES = 1_000
# A figure is taken this often, or until it has taken this long, and once at the least.
REPEATS_MAX = 20
MEASURING_S_MAX = 20.0
# Planned once before anything is timed: CuPy compiles its kernels then, numpy loads what it loads late.
_WARM_UP_JOBS, _WARM_UP_GPUS = 1_000, 64
_BUFFER_BYTES = 1 << 28
_BUFFER_READS = 5
_MIB = 1 << 20
_KIB_PER_MIB = 1 << 10
_S_DIGITS, _MIB_DIGITS = 9, 1


@dataclass(frozen=True, slots=True)
class PlanTime:
    """What `wattshift bench allocator` prints."""

    plan_seconds_p50: float
    plan_seconds_p90: float
    next_tick_seconds_p50: float
    jobs_placed: int  # that start, or have their GPUs as soon as others leave them
    gpus_used: int  # that somebody holds once the plan is carried out, even in part or while leaving
    victims: int
    plan_digest: str
    peak_memory_mib: float  # of this process while it planned, and of CuPy's pool
    memory_floor_seconds: float


def measure(
    jobs: int,
    gpus: int,
    seed: int,
    told: Callable[[str, int], None],
    *,
    changes: int = CHANGES,
    is_settled: bool = False,
) -> PlanTime:
    """Take the figures of one world, with the policy that a node has by default.

    Args:
        changes: How many things change before each tick.
        is_settled: Take the world once nothing more is to be done in it, as it is found between two ticks.
        told: Is given the name of a stage and how many of its rounds are done, for a person who waits.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)  # as in the daemon
    try:
        return _measured(jobs, gpus, seed, changes, is_settled, told)
    finally:
        gc.set_threshold(*thresholds)


def _measured(
    jobs: int, gpus: int, seed: int, changes: int, is_settled: bool, told: Callable[[str, int], None]
) -> PlanTime:
    policy = Policy()
    told("world", 0)
    plan(on_backend(world(_WARM_UP_JOBS, _WARM_UP_GPUS, seed)), policy)
    snapshot = world(jobs, gpus, seed)
    if is_settled:
        told("settling", 0)
        snapshot = settled(snapshot, policy)
    floor_s = _column_bytes(snapshot) / _bytes_per_s()
    forget_peak_memory()
    plans_s: list[float] = []
    for done in _rounds(plans_s):
        told("plan", done)
        taken_s, first = timed(snapshot, policy, Memo())
        plans_s.append(taken_s)
    peak_mib = peak_memory_mib()
    ticks_s = _ticks(snapshot, first, policy, seed, changes, told)
    return PlanTime(
        plan_seconds_p50=_percentile(plans_s, 50),
        plan_seconds_p90=_percentile(plans_s, 90),
        next_tick_seconds_p50=_percentile(ticks_s, 50),
        jobs_placed=sum(isinstance(action, StartJob) for action in first.actions) + len(first.awaited),
        gpus_used=held_gpus(carried_out(snapshot, first)),
        victims=sum(isinstance(action, PreemptJob) for action in first.actions),
        plan_digest=digest(first),
        peak_memory_mib=round(peak_mib, _MIB_DIGITS),
        memory_floor_seconds=round(floor_s, _S_DIGITS),
    )


def forget_peak_memory() -> None:
    """Let the process's peak of memory begin anew, where the kernel allows it, and that of CuPy's pool."""
    release()
    try:
        # 5 resets the peak of the resident set (Linux, Documentation/filesystems/proc.rst). Where /proc is
        # read-only the figure holds what building the world took, too.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mib() -> float:
    """The most memory this process, and CuPy's pool, had at once since the peak was forgotten."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_kib / _KIB_PER_MIB + pool_mib()


def _ticks(
    snapshot: Snapshot,
    last: Plan,
    policy: Policy,
    seed: int,
    changes: int,
    told: Callable[[str, int], None],
) -> list[float]:
    """Seconds of each tick in a row, each after the one before was carried out and so many things changed."""
    random = np.random.default_rng(seed)
    memo = Memo()
    plan(on_backend(snapshot), policy, memo)
    ticks_s: list[float] = []
    for done in _rounds(ticks_s):
        told("tick", done)
        snapshot = changed(carried_out(snapshot, last), changes, random)
        taken_s, last = timed(snapshot, policy, memo)
        ticks_s.append(taken_s)
    return ticks_s


def timed(snapshot: Snapshot, policy: Policy, memo: Memo) -> tuple[float, Plan]:
    """Seconds from columns to a plan, and the plan."""
    finish()
    begun_s = time.perf_counter()
    made = plan(on_backend(replace(snapshot)), policy, memo)
    finish()
    return time.perf_counter() - begun_s, made


def _rounds(taken_s: list[float]) -> Iterator[int]:
    """Count rounds until there were enough; the caller adds what each took."""
    while len(taken_s) < REPEATS_MAX and sum(taken_s) < MEASURING_S_MAX:
        yield len(taken_s)


def _bytes_per_s() -> float:
    """The bandwidth at which memory is read, by one thread on numpy, by the GPU on CuPy."""
    buffer = xp.ones(_BUFFER_BYTES // 8, dtype=xp.int64)
    taken_s = math.inf
    for _ in range(_BUFFER_READS):
        finish()
        begun_s = time.perf_counter()
        buffer.sum()
        finish()
        taken_s = min(taken_s, time.perf_counter() - begun_s)
    return _BUFFER_BYTES / taken_s


def _column_bytes(record: Any) -> int:
    """Bytes of all columns of a snapshot or a part of it."""
    values = [getattr(record, field.name) for field in fields(record)]
    parts = [value for value in values if hasattr(value, "__dataclass_fields__")]
    own = sum(value.nbytes for value in values if isinstance(value, np.ndarray))
    return own + sum(_column_bytes(part) for part in parts)


def _percentile(taken_s: list[float], percent: int) -> float:
    """By nearest rank: one of the values, never a mixture."""
    ordered = sorted(taken_s)
    return round(ordered[math.ceil(percent * len(ordered) / 100) - 1], _S_DIGITS)
