"""What the node costs while nothing happens."""

import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from measure import DidNotWork, Figure, at_most, cpu_time
from node import Node

if TYPE_CHECKING:
    from bench import Bench

CPU_PERCENT = 1.0
RSS_MIB = 150.0
_SETTLE_S = 3.0
_PERIOD_S = 1.0


def idle(bench: "Bench") -> Figure:
    """Memory and processor time of the node's own processes: with no job, and with eight that sleep."""
    samples = 4 if bench.quick else 20
    figure: Figure = {}
    with bench.node() as node:
        figure["no_jobs"] = _observe(node, samples)
        node.fill(bench.line, "BATCH")
        figure["eight_sleeping_jobs"] = _observe(node, samples)
    figure["targets"] = [
        target
        for name in ("no_jobs", "eight_sleeping_jobs")
        for target in (
            at_most(f"{name} cpu of all", figure[name]["all"]["cpu_percent"], CPU_PERCENT, "% of a core"),
            at_most(f"{name} rss of all", figure[name]["all"]["rss_mib"], RSS_MIB, "MiB"),
        )
    ]
    return figure


def _observe(node: Node, samples: int) -> Figure:
    """By role: processes, medians of their memory summed, processor time; and the sum of all."""
    time.sleep(_SETTLE_S)
    processes = node.processes()
    before = {process.pid: cpu_time(process.pid).used_s for process in processes}
    begun_s = time.perf_counter()
    memory: dict[int, list[tuple[float, float]]] = {process.pid: [] for process in processes}
    for _ in range(samples):
        time.sleep(_PERIOD_S)
        for pid, seen in memory.items():
            seen.append(_memory_mib(pid))
    took_s = time.perf_counter() - begun_s
    figure: Figure = {}
    for process in processes:
        used_s = cpu_time(process.pid).used_s - before[process.pid]
        one = {
            "processes": 1,
            "rss_mib": statistics.median(rss for rss, _ in memory[process.pid]),
            "pss_mib": statistics.median(pss for _, pss in memory[process.pid]),
            "cpu_percent": 100 * used_s / took_s,
        }
        row = figure.setdefault(process.role, dict.fromkeys(one, 0))
        for key, value in one.items():
            row[key] += value
    figure["all"] = {key: sum(row[key] for row in figure.values()) for key in next(iter(figure.values()))}
    return {
        role: {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}
        for role, row in figure.items()
    }


def _memory_mib(pid: int) -> tuple[float, float]:
    """Resident and proportional memory of a process; the latter 0 where it can't be read."""
    kib = {"Rss": 0, "Pss": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in kib:
                kib[name] = int(rest.split()[0])
    if not kib["Rss"]:
        raise DidNotWork(f"the memory of process {pid} can't be read")
    return kib["Rss"] / 1024, kib["Pss"] / 1024
