"""Placement against a published experiment: GPU allocation and draw of a full cluster, as a Markdown table.

    python -m tests.benchmarks.openb [--data DIR] [--workloads W ...] [--policies P ...] [--seeds S ...]

The experiment is of "Beware of Fragmentation" (Weng et al., USENIX ATC'23). Tasks of a production cluster
arrive in a given order until they ask for 1.3 times its GPUs; none leaves, and one that fits nowhere is
dropped. The figure is the allocated share of all GPU thousandths, in percent, where 100 % and 130 % of the
cluster's have been asked for: the mean over the arrivals at which the cumulated request rounds to that.
Draw is by the power model of "Power- and Fragmentation-aware Online Scheduling" (Lettich et al., CCGrid'25),
at 50 % and 80 %, by the same mean.
"""

import argparse
import csv
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from scheduler.model.actions import StartJob
from scheduler.model.policy import Policy as Rules
from scheduler.model.snapshot import (
    NOT_DRAINING,
    OPEN,
    PENDING,
    UNKNOWN,
    WHOLE_MILLI,
    GpuColumns,
    HoldingColumns,
    JobColumns,
    MixColumns,
    NodeColumns,
    Snapshot,
)
from scheduler.planning.fragmentation import NO_POSITION, Fragmentation, WattColumns
from scheduler.planning.planner import plan
from scheduler.planning.pool import Pool
from tests.benchmarks.openb_policies import BestFit, Fgd, Task

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("WATTSHIFT_BENCH_DATA", ROOT.parent / "shared" / "data"))
SEEDS = (42, 43, 44, 45, 46)
WORKLOADS = ("default", "cpu200", "gpushare40", "gpuspec33", "multigpu20")
ALLOCATED_AT_PERCENT = (100, 130)
DRAW_AT_PERCENT = (50, 80)
# Idle and busy watts of one GPU.
GPU_W = {
    "T4": (10, 70),
    "A10": (30, 150),
    "G2": (30, 150),
    "P100": (25, 250),
    "V100M16": (30, 300),
    "V100M32": (30, 300),
    "G3": (50, 400),
}
# One CPU package: 16 cores of two threads.
PACKAGE_CPU_MILLI = 32_000
PACKAGE_W = (15, 120)
_ENDLESS_SLOTS = 1 << 30


class Policy(Protocol):
    """Chooses where a task goes, and is told when a node has changed."""

    def best(self, request: Task, /) -> tuple[int, int] | None: ...
    def changed(self, node: int, /) -> None: ...


@dataclass(frozen=True)
class Cluster:
    """The nodes of the experiment; `there` is where a node has a GPU."""

    models: tuple[str, ...]
    there: Any  # bool (nodes, width)
    cpu_milli: Any
    memory_mib: Any

    def pool(self, specs: Sequence[str]) -> Pool:
        """All of it, free, and which GPUs serve each specification of models."""
        serve = [[model in spec.split("|") for model in self.models] for spec in specs]
        fits = np.array(serve, bool).reshape(len(specs), len(self.models), 1) & self.there
        nodes = len(self.models)
        return Pool(
            milli=self.there * np.int64(WHOLE_MILLI),
            mib=np.zeros(self.there.shape, np.int64),
            cpus=self.cpu_milli.copy(),
            memory_mib=self.memory_mib.copy(),
            slots=np.full(nodes, _ENDLESS_SLOTS, np.int64),
            fits=fits,
            is_open=self.there,
        )

    def watts(self) -> WattColumns:
        """The power model's watts."""
        nodes = len(self.models)
        idle_w, busy_w = (np.array([GPU_W[model][i] for model in self.models])[:, None] for i in (0, 1))
        package_idle_w, package_busy_w = (np.full(nodes, each) for each in PACKAGE_W)
        return WattColumns(
            gpu_idle_w=idle_w * self.there,
            gpu_busy_w=busy_w * self.there,
            cpus=self.cpu_milli,
            package_cpus=np.full(nodes, PACKAGE_CPU_MILLI),
            package_idle_w=package_idle_w,
            package_busy_w=package_busy_w,
        )


@dataclass(frozen=True)
class Workload:
    """Tasks by name, the specifications of models that they name, and by seed the arrivals and tie ranks."""

    tasks: tuple[Task, ...]
    specs: tuple[str, ...]
    arrivals: dict[int, Any]
    tie_ranks: dict[int, Any]


@dataclass(frozen=True)
class Result:
    """Means at the percents that were asked for: allocation in percent of the cluster, draw in kW."""

    allocated_percent: dict[int, float]
    draw_kw: dict[int, float]


Make = Callable[[Cluster, Workload, Pool, int], Policy]


def read_cluster(folder: Path) -> Cluster:
    """The nodes of the data set."""
    rows = _rows(folder / "openb_node_list_gpu_node.csv")
    gpus, cpu_milli, memory_mib = (
        np.array([int(row[name]) for row in rows]) for name in ("gpu", "cpu_milli", "memory_mib")
    )
    there = np.arange(gpus.max()) < gpus[:, None]
    return Cluster(tuple(row["model"] for row in rows), there, cpu_milli, memory_mib)


def read_workload(folder: Path, name: str) -> Workload:
    """The tasks of a variant of the data set, in the order of their names."""
    rows = sorted(_rows(folder / f"openb_pod_list_{name}.csv"), key=lambda row: row["name"])
    specs = tuple(sorted({row.get("gpu_spec", "") for row in rows} - {""}))
    tasks = tuple(
        Task(
            gpus=int(row["num_gpu"]),
            share_milli=int(row["gpu_milli"]) if int(row["num_gpu"]) else WHOLE_MILLI,
            gpu_memory_mib=0,
            models=specs.index(row["gpu_spec"]) if row.get("gpu_spec") else UNKNOWN,
            cpus=int(row["cpu_milli"]),
            memory_mib=int(row["memory_mib"]),
        )
        for row in rows
    )
    with np.load(folder / f"arrival_order_{name}.npz") as stored:
        arrays = {key: stored[key].astype(np.int64) for key in stored}
    by_kind: dict[str, dict[int, Any]] = {"order": {}, "perm": {}}
    for key, array in arrays.items():
        kind, _, seed = key.partition("_")
        by_kind[kind][int(seed)] = array
    return Workload(tasks, specs, by_kind["order"], by_kind["perm"])


def mix_of(tasks: Iterable[Task]) -> MixColumns:
    """All kinds of requests among the tasks, the most frequent first, as columns."""
    kinds = sorted(Counter(tasks).items(), key=lambda entry: (-entry[1], entry[0]))
    columns = {name: np.array([getattr(task, name) for task, _ in kinds]) for name in Task._fields}
    return MixColumns(**columns, weight=np.array([count for _, count in kinds]))


def _ours(cluster: Cluster, workload: Workload, pool: Pool, seed: int) -> Policy:
    return Fragmentation(pool, mix_of(workload.tasks), tie_rank=workload.tie_ranks[seed])


def _ours_with_power(cluster: Cluster, workload: Workload, pool: Pool, seed: int) -> Policy:
    return Fragmentation(pool, mix_of(workload.tasks), cluster.watts(), workload.tie_ranks[seed])


def _planner(cluster: Cluster, workload: Workload, pool: Pool, seed: int) -> Policy:
    return OnePlan(cluster, workload, seed)


def _best_fit(cluster: Cluster, workload: Workload, pool: Pool, seed: int) -> Policy:
    return BestFit(pool, workload.tie_ranks[seed])


def _fgd(cluster: Cluster, workload: Workload, pool: Pool, seed: int) -> Policy:
    return Fgd(pool, workload.tie_ranks[seed], workload.tasks, workload.specs)


class OnePlan:
    """The planner itself: one plan of an empty cluster and of all tasks, which wait in the order of arrival.

    It knows of the workload what waits, and breaks ties by row.
    """

    def __init__(self, cluster: Cluster, workload: Workload, seed: int) -> None:
        tasks = [workload.tasks[index] for index in workload.arrivals[seed].tolist()]
        node, position = np.nonzero(cluster.there)
        width = cluster.there.shape[1]
        gpus = GpuColumns(
            uuid=tuple(f"{row * width + place:06d}" for row, place in zip(node, position, strict=True)),
            index=position,
            node=node,
            memory_mib=np.zeros(len(node), np.int64),
            state=np.full(len(node), OPEN),
        )
        nodes = len(cluster.models)
        snapshot = Snapshot(
            now_us=0,
            jobs=_waiting(tasks, len(workload.specs)),
            gpus=gpus,
            nodes=NodeColumns(
                cluster.cpu_milli,
                cluster.memory_mib,
                np.full(nodes, _ENDLESS_SLOTS),
                np.full(nodes, NOT_DRAINING),
            ),
            holdings=HoldingColumns(*(np.zeros(0, np.int64) for _ in range(4))),
            model_fits=np.vstack(
                [cluster.pool(workload.specs).fits[:, node, position], np.ones((1, len(node)), bool)]
            ),
        )
        self._choices: list[tuple[int, int] | None] = [None] * len(tasks)
        for action in plan(snapshot, Rules()).actions:
            assert isinstance(action, StartJob), "nothing runs that could give way"
            place = int(action.gpus[0]) % width if action.gpus else NO_POSITION
            self._choices[action.job - 1] = (action.node, place)
        self._arrived = 0

    def best(self, request: Task, /) -> tuple[int, int] | None:
        """What the plan says of the task that arrives next."""
        self._arrived += 1
        return self._choices[self._arrived - 1]

    def changed(self, node: int, /) -> None:
        """It was known beforehand."""


def _waiting(tasks: Sequence[Task], any_model: int) -> JobColumns:
    """The tasks as pending jobs of equal rank, numbered in the order of arrival."""
    constant = {
        "state": PENDING, "job_class": 1, "priority": 500, "value": 0, "preemptible": True, "eligible_us": 0,
        "min_runtime_us": 0, "grace_us": 0, "restart_loss_us": 0,
    }  # fmt: skip
    columns = {name: np.full(len(tasks), constant.get(name, UNKNOWN)) for name in JobColumns.__slots__}
    columns |= {name: np.array([getattr(task, name) for task in tasks]) for name in Task._fields}
    columns["models"] = np.where(columns["models"] == UNKNOWN, any_model, columns["models"])
    columns["preemptible"] = np.ones(len(tasks), bool)
    return JobColumns(**{**columns, "number": np.arange(1, len(tasks) + 1)})


POLICIES: dict[str, Make] = {
    "best_fit": _best_fit,
    "fgd": _fgd,
    "ours": _ours,
    "ours_with_power": _ours_with_power,
    "planner": _planner,
}


def replay(cluster: Cluster, workload: Workload, seed: int, make: Make) -> Result:
    """Let the tasks arrive and go where the policy says; returns what came of it."""
    pool, watts = cluster.pool(workload.specs), cluster.watts()
    policy = make(cluster, workload, pool, seed)
    capacity = int(pool.milli.sum())
    every_node = np.arange(len(cluster.models))
    draw_w = draw_of(pool, watts, every_node)
    arrived = allocated = 0
    total_w = int(draw_w.sum())
    history = []
    for index in workload.arrivals[seed].tolist():
        task = workload.tasks[index]
        asked = task.gpus * task.share_milli
        arrived += asked
        choice = policy.best(task)
        if choice is not None:
            book(pool, task, *choice)
            policy.changed(choice[0])
            allocated += asked
            now_w = int(draw_of(pool, watts, np.array([choice[0]]))[0])
            total_w += now_w - int(draw_w[choice[0]])
            draw_w[choice[0]] = now_w
        percent = (2 * 100 * arrived + capacity) // (2 * capacity)  # rounded, halves up
        history.append((percent, allocated, total_w))
    percents, allocations, draws = (np.array(column) for column in zip(*history, strict=True))
    at = {percent: percents == percent for percent in (*ALLOCATED_AT_PERCENT, *DRAW_AT_PERCENT)}
    return Result(
        {
            percent: float(allocations[at[percent]].mean()) * 100 / capacity
            for percent in ALLOCATED_AT_PERCENT
        },
        {percent: float(draws[at[percent]].mean()) / 1000 for percent in DRAW_AT_PERCENT},
    )


def book(pool: Pool, task: Task, node: int, position: int) -> None:
    """Take what the task needs; it must be there."""
    usable = pool.milli[node] >= task.share_milli
    if task.models != UNKNOWN:
        usable &= pool.fits[task.models][node]
    if task.gpus:
        taken = [position] if task.share_milli < WHOLE_MILLI else np.flatnonzero(usable)[: task.gpus]
        assert len(taken) == task.gpus, "the policy says where it fits"
        assert usable[taken].all(), "the policy says on which GPU"
        pool.milli[node, taken] -= task.share_milli
    pool.cpus[node] -= task.cpus
    pool.memory_mib[node] -= task.memory_mib
    assert min(pool.cpus[node], pool.memory_mib[node]) >= 0, "the policy says where it fits"


def draw_of(pool: Pool, watts: WattColumns, rows: Any) -> Any:
    """Watts that these nodes draw: a GPU or a CPU package draws its busy watts if any of it is used."""
    used = pool.milli[rows] < WHOLE_MILLI
    gpus_w = np.where(used, watts.gpu_busy_w[rows], watts.gpu_idle_w[rows]).sum(axis=1)
    packages = -(-watts.cpus[rows] // watts.package_cpus[rows])
    busy = -(-(watts.cpus[rows] - pool.cpus[rows]) // watts.package_cpus[rows])
    return gpus_w + busy * watts.package_busy_w[rows] + (packages - busy) * watts.package_idle_w[rows]


def published(folder: Path) -> dict[tuple[str, str, int], dict[int, float]]:
    """By workload, policy and seed the published allocation, in percent at each of ALLOCATED_AT_PERCENT."""
    return {
        (row["workload"], row["policy"], int(row["seed"])): {
            percent: float(row[f"allocated_percent_at_arrived_{percent}"]) for percent in ALLOCATED_AT_PERCENT
        }
        for row in _rows(folder / "published_allocation_percent.csv")
    }


def run(folder: Path, name: str, policy: str, seed: int) -> Result:
    """One replay from the files."""
    begun_s = time.perf_counter()
    result = replay(read_cluster(folder), read_workload(folder, name), seed, POLICIES[policy])
    took_s = time.perf_counter() - begun_s
    print(f"{name} {policy} {seed}: {result}, {took_s:.1f} s", file=sys.stderr, flush=True)
    return result


def table(folder: Path, results: dict[tuple[str, str, int], Result]) -> str:
    """Means over the seeds in Markdown, the published ones beside ours."""
    bars = published(folder)
    groups: dict[tuple[str, str], list[int]] = {}
    for workload, policy, seed in results:
        groups.setdefault((workload, policy), []).append(seed)
    lines = [
        "| workload | policy | % at 100 % | at 130 % | published | runs within 0.01 | kW at 50 % | at 80 % |",
        "|--|--|--:|--:|--:|--:|--:|--:|",
    ]
    for (workload, policy), seeds in groups.items():
        runs = [results[workload, policy, seed] for seed in seeds]
        allocated = [
            fmean(each.allocated_percent[percent] for each in runs) for percent in ALLOCATED_AT_PERCENT
        ]
        drawn = [fmean(each.draw_kw[percent] for each in runs) for percent in DRAW_AT_PERCENT]
        bar, close = "", ""
        if (workload, policy, seeds[0]) in bars:
            theirs = [bars[workload, policy, seed] for seed in seeds]
            means = [fmean(each[percent] for each in theirs) for percent in ALLOCATED_AT_PERCENT]
            bar = " / ".join(f"{mean:.2f}" for mean in means)
            close = f"{sum(map(_is_close, runs, theirs))} of {len(runs)}"
        lines.append(
            f"| {workload} | {policy} | {allocated[0]:.2f} | {allocated[1]:.2f} | {bar} | {close} "
            f"| {drawn[0]:.1f} | {drawn[1]:.1f} |"
        )
    return "\n".join(lines)


def _is_close(result: Result, bar: dict[int, float]) -> bool:
    return all(abs(result.allocated_percent[percent] - value) < 0.01 for percent, value in bar.items())


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> int:
    """Replay what is asked for and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds openb/ (%(default)s)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="NAME")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, metavar="SEED")
    options = parser.parse_args()
    folder = options.data / "openb"
    if not folder.is_dir():
        print(f"no data at {folder}: name the folder that holds openb/ with --data", file=sys.stderr)
        return 2
    wanted = [(w, p, s) for w in options.workloads for p in options.policies for s in options.seeds]
    with ProcessPoolExecutor() as processes:
        done = processes.map(run, [folder] * len(wanted), *zip(*wanted, strict=True))
        results = dict(zip(wanted, done, strict=True))
    print(table(folder, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
