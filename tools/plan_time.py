"""Measure plan time over jobs x GPUs and write the figures into docs/PLAN_TIME.md.

    plan_time.py [--limit-s 60] [--seed 0] [--backend numpy]

Each cell of the table is one `wattshift bench allocator` in a process of its own. One that isn't done within
the limit is given up, and so are, without a try, all that are larger in both directions. Then some worlds are
planned once more under a profiler.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from scheduler.model.policy import Policy
from scheduler.model.snapshot import PENDING
from scheduler.planning.planner import Memo, plan
from scheduler.simulation.changes import carried_out, changed
from scheduler.simulation.plan_time import timed
from scheduler.simulation.worlds import world

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/PLAN_TIME.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
JOBS = (1_000, 10_000, 100_000, 1_000_000)
GPUS = (8, 64, 1_000, 10_000, 100_000)
# Fleets that are planned once nothing more is left to do in them, and what changes there between two ticks.
SETTLED = ((100_000, 1_000), (100_000, 10_000), (1_000_000, 10_000), (1_000_000, 100_000))
SETTLED_CHANGES = (1_000, 10_000)
# One with many jobs for few GPUs, one with many nodes.
PROFILED = ((100_000, 64), (10_000, 1_000))
PROFILE_ROWS = 10
# A node on which a thousand jobs wait, and what changes there between two ticks.
NODE_JOBS, NODE_GPUS, NODE_CHANGES = 1_050, 8, 10
NODE_SEEDS, NODE_TICKS = 30, 12
COMMAND = "import sys; from scheduler.cli import main; sys.exit(main())"

Cell = dict[str, Any] | None  # None: given up


def main() -> None:
    """Measure everything and rewrite the measured part of the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit-s", type=float, default=60.0, help="give a cell up after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    options = parser.parse_args()
    cells = table(options.limit_s, options.seed, options.backend)
    lines = [
        *where(options.backend, options.limit_s, options.seed),
        *plan_times(cells),
        *settled_times(options.limit_s, options.seed, options.backend),
        *node_ticks(),
        *profiles(options.seed),
    ]
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")


def rewritten(text: str, lines: list[str]) -> str:
    """The page with these lines between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *lines, END + after])


def table(limit_s: float, seed: int, backend: str) -> dict[tuple[int, int], Cell]:
    """What the bench prints, by jobs and GPUs."""
    cells: dict[tuple[int, int], Cell] = {}
    for gpus in GPUS:
        for jobs in JOBS:
            hopeless = any(cell is None and j <= jobs and g <= gpus for (j, g), cell in cells.items())
            cells[jobs, gpus] = None if hopeless else measured(jobs, gpus, seed, backend, limit_s)
            print(jobs, gpus, cells[jobs, gpus], file=sys.stderr, flush=True)
    return cells


def measured(jobs: int, gpus: int, seed: int, backend: str, limit_s: float, *more: str) -> Cell:
    """What the bench prints of one world, with more options."""
    size = ("--jobs", str(jobs), "--gpus", str(gpus), "--seed", str(seed), "--backend", backend)
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "bench", "allocator", *size, *more],
            capture_output=True,
            text=True,
            check=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def where(backend: str, limit_s: float, seed: int) -> list[str]:
    """What the figures depend on beside the code, and the code."""
    processor = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    on = f"Python {platform.python_version()}, {processor}, {len(os.sched_getaffinity(0))} cores"
    limits = f"seed {seed}, each cell given up after {limit_s:g} s"
    return [
        f"Commit {commit or 'unknown'}, {backend} ({_version(backend)}), {on}, load at the end {load}.",
        f"World: {limits}.",
        "",
    ]


def _version(backend: str) -> str:
    return version("numpy" if backend == "numpy" else "cupy-cuda12x")


def plan_times(cells: dict[tuple[int, int], Cell]) -> list[str]:
    """The table: a row for each number of jobs, a column for each number of GPUs."""
    lines = [
        "### Seconds: cold plan p50 / next tick p50",
        "",
        "| jobs | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " | floor |",
        "|--:|" + "--:|" * (len(GPUS) + 1),
    ]
    for jobs in JOBS:
        row = [cells[jobs, gpus] for gpus in GPUS]
        floors = [cell["memory_floor_seconds"] for cell in row if cell]
        floor = f"{min(floors):.2g}" if floors else "–"
        lines.append(f"| {jobs:,} | " + " | ".join(cell_text(cell) for cell in row) + f" | {floor} |")
    lines += ["", "### Jobs placed / victims / peak MiB", "", *lines[2:3], *lines[3:4]]
    lines[-2] = lines[-2].removesuffix(" floor |")
    lines[-1] = lines[-1].removesuffix("--:|")
    for jobs in JOBS:
        texts = [quality_text(cells[jobs, gpus]) for gpus in GPUS]
        lines.append(f"| {jobs:,} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def cell_text(cell: Cell) -> str:
    """Times of one cell."""
    if cell is None:
        return "given up"
    return f"{cell['plan_seconds_p50']:.2g} / {cell['next_tick_seconds_p50']:.2g}"


def quality_text(cell: Cell) -> str:
    """What the plan of one cell achieves, and what it took of memory."""
    if cell is None:
        return "–"
    return f"{cell['jobs_placed']:,} / {cell['victims']:,} / {cell['peak_memory_mib']:.0f}"


def settled_times(limit_s: float, seed: int, backend: str) -> list[str]:
    """The table of settled fleets: a row for each."""
    ticks = " | ".join(f"tick, {changes:,} changes" for changes in SETTLED_CHANGES)
    lines = [
        "### Seconds of settled fleets, p50",
        "",
        f"| jobs | GPUs | cold plan | {ticks} | floor |",
        "|--:" * (len(SETTLED_CHANGES) + 4) + "|",
    ]
    for jobs, gpus in SETTLED:
        cells = [
            measured(jobs, gpus, seed, backend, limit_s, "--settled", "--changes", str(changes))
            for changes in SETTLED_CHANGES
        ]
        print(jobs, gpus, "settled", cells, file=sys.stderr, flush=True)
        lines.append(f"| {jobs:,} | {gpus:,} | {settled_text(cells)} |")
    return [*lines, ""]


def settled_text(cells: list[Cell]) -> str:
    """The cold plan, the ticks and the floor of one fleet."""
    known = [cell for cell in cells if cell is not None]
    cold, floor = (
        f"{min(cell[name] for cell in known):.2g}" if known else "given up"
        for name in ("plan_seconds_p50", "memory_floor_seconds")
    )
    ticks = ["given up" if cell is None else f"{cell['next_tick_seconds_p50']:.2g}" for cell in cells]
    return " | ".join([cold, *ticks, floor])


def node_ticks() -> list[str]:
    """How long ticks of a node take on which many jobs wait and little changes, one after the other."""
    policy, waiting = Policy(), []
    by_seed: list[list[float]] = []
    for seed in range(NODE_SEEDS):
        snapshot, memo, random = world(NODE_JOBS, NODE_GPUS, seed), Memo(), np.random.default_rng(seed)
        last = plan(snapshot, policy, memo)
        by_seed.append([])
        for _ in range(NODE_TICKS):
            snapshot = changed(carried_out(snapshot, last), NODE_CHANGES, random)
            waiting.append(int((snapshot.jobs.state == PENDING).sum()))
            taken_s, last = timed(snapshot, policy, memo)
            by_seed[-1].append(taken_s)
    p50, *by_seed_p50 = (1000 * median(taken) for taken in ([t for each in by_seed for t in each], *by_seed))
    figures = f"p50 {p50:.2f} ms; by seed {min(by_seed_p50):.2f} to {max(by_seed_p50):.2f}"
    return [
        f"### A node of {NODE_GPUS} GPUs, {min(waiting):,} to {max(waiting):,} jobs waiting",
        "",
        f"{NODE_TICKS} ticks in a row after {NODE_CHANGES} changes each, on {NODE_SEEDS} seeds: {figures}.",
        "",
    ]


def profiles(seed: int) -> list[str]:
    """Where the time of some cold plans goes, by function: own time, callees left out."""
    lines = []
    for jobs, gpus in PROFILED:
        snapshot = world(jobs, gpus, seed)
        profile = cProfile.Profile()
        profile.runcall(plan, snapshot, Policy())
        stats = pstats.Stats(profile)
        # Of each place: primitive calls, calls, own time, time with callees, callers.
        places = stats.stats.items()  # type: ignore[attr-defined]
        total_s = sum(own_s for _, (_, _, own_s, _, _) in places)
        lines += [
            f"### Profile: {jobs:,} jobs, {gpus:,} GPUs",
            "",
            f"{total_s:.2f} s under the profiler, which makes small calls look dearer than they are.",
            "",
            "| file | own time | | function | calls | own time |",
            "|--|--:|--|--|--:|--:|",
        ]
        by_file: Counter[str] = Counter()
        for (file, _, _), (_, _, own_s, _, _) in places:
            by_file[Path(file).name if file.endswith(".py") else "built in"] += own_s
        files = sorted(by_file.items(), key=lambda entry: (-entry[1], entry[0]))[:PROFILE_ROWS]
        functions = sorted(places, key=_own_time_first)[:PROFILE_ROWS]
        for (whole, file_s), ((file, line, name), (_, calls, own_s, _, _)) in zip(
            files, functions, strict=False
        ):
            place = f"{Path(file).name}: {name}" if line else name
            shares = f"{file_s / total_s:.0%} | | `{place}` | {calls:,} | {own_s / total_s:.0%}"
            lines.append(f"| `{whole}` | {shares} |")
        lines.append("")
    return lines


def _own_time_first(entry: tuple[Any, Any]) -> tuple[Any, ...]:
    place, (_, _, own_s, _, _) = entry
    return (-own_s, place)


if __name__ == "__main__":
    main()
