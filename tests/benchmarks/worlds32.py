"""What is earned of what could be: sixteen worlds of 32 GPUs, real prices and surprise curtailments.

    python -m tests.benchmarks.worlds32 [--data DIR] [--worlds NAME ...] [--seeds N ...]
                                        [--order value|class] [--bound-only]

One node of 32 GPUs over two days: inference that must run, training and batch that pay only if they are done
by their deadlines, miners on the rest. The score is the profit of all but inference over a bound that nothing
reaches: the optimum of a linear programme that knows everything beforehand, cuts jobs into pieces, splits
gangs and restarts at no loss. It is computed here, with HiGHS, and compared with the one that came with the
worlds.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("WATTSHIFT_BENCH_DATA", ROOT.parent / "shared" / "data"))
END_S = 172_800.0
S_PER_HOUR = 3600.0
W_PER_MW = 1e6


class Work(NamedTuple):
    """A job of the linear programme."""

    gpus: int
    draw_w: float  # per GPU
    value: float  # USD per GPU-hour
    begin_s: float
    end_s: float  # by when it is worth anything
    duration_s: float


class Step(NamedTuple):
    """A stretch of time in which nothing changes."""

    begin_s: float
    length_s: float
    usd_per_wh: float
    watts: float  # of the site, at most


class Scored(NamedTuple):
    """One world."""

    name: str
    seed: int
    bound_usd: float
    given_usd: float  # the bound that came with the world
    earned_usd: float | None


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def steps(folder: Path, edges: set[float]) -> list[Step]:
    """The two days between the moments at which a price, a curtailment or a job begins or ends."""
    prices = [
        (float(row["start_s"]), float(row["usd_per_mwh"]) / W_PER_MW) for row in _rows(folder / "prices.csv")
    ]
    events = [
        (float(row["start_s"]), float(row["end_s"]), float(row["site_power_w"]))
        for row in _rows(folder / "events.csv")
    ]
    edges |= {at for at, _ in prices} | {at for event in events for at in event[:2]} | {0.0, END_S}
    moments = sorted(at for at in edges if 0.0 <= at <= END_S)
    starts = [at for at, _ in prices]
    return [
        Step(
            begin,
            end - begin,
            prices[bisect_right(starts, begin) - 1][1],
            min((watts for from_s, to_s, watts in events if from_s <= begin < to_s), default=float("inf")),
        )
        for begin, end in pairwise(moments)
    ]


def bound_usd(folder: Path) -> float:
    """The most that all but inference could earn, net of energy, USD."""
    works, must = [], []
    for row in _rows(folder / "jobs.csv"):
        begin_s = float(row["submit_s"])
        mines = row["class"] == "MINING"
        end_s = min(END_S, float(row["deadline_s"] or END_S))
        length_s = END_S if mines else float(row["duration_s"])
        work = Work(
            int(row["gpus"]),
            float(row["draw_w"]),
            float(row["value_usd_per_gpu_hour"]),
            begin_s,
            end_s,
            length_s,
        )
        if row["class"] == "INFERENCE":
            must.append(work._replace(end_s=min(END_S, begin_s + length_s)))
        else:
            works.append(work)
    (node,) = _rows(folder / "nodes.csv")
    edges = {at for work in (*works, *must) for at in (work.begin_s, work.end_s)}
    times = steps(folder, edges)
    gpus, watts = np.empty(len(times)), np.empty(len(times))
    for place, step in enumerate(times):
        live = [work for work in must if work.begin_s <= step.begin_s < work.end_s]
        gpus[place] = int(node["gpus"]) - sum(work.gpus for work in live)
        watts[place] = step.watts - sum(work.gpus * work.draw_w for work in live)
    gains: list[float] = []
    longest: list[float] = []
    cells: list[float] = []
    rows: list[int] = []
    columns: list[int] = []
    for number, work in enumerate(works):
        for place, step in enumerate(times):
            if not work.begin_s <= step.begin_s < work.end_s:
                continue
            net = work.value - work.draw_w * step.usd_per_wh
            if net <= 0.0:
                continue
            column = len(gains)
            gains.append(-net * work.gpus / S_PER_HOUR)  # for each second that it runs
            longest.append(step.length_s)
            rows += [number, len(works) + place, len(works) + len(times) + place]
            columns += [column] * 3
            cells += [1.0, work.gpus, work.gpus * work.draw_w]
    lengths = np.array([step.length_s for step in times])
    finite = np.where(np.isfinite(watts), np.maximum(watts, 0.0), 1e9)
    most = np.concatenate([[work.duration_s for work in works], gpus * lengths, finite * lengths])
    shape = (len(most), len(gains))
    found = linprog(
        gains,
        A_ub=csr_matrix((cells, (rows, columns)), shape=shape),
        b_ub=most,
        bounds=list(zip([0.0] * len(longest), longest, strict=True)),
        method="highs",
    )
    assert found.success, found.message
    return float(-found.fun)


def earned_usd(folder: Path, order: str) -> float:
    """What the site earned under `wattshift simulate`, inference included, USD."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        (out / "policy.toml").write_text(f'[policy]\norder = "{order}"\n')
        inputs = [
            part
            for what in ("nodes", "jobs", "prices", "events")
            for part in (f"--{what}", folder / f"{what}.csv")
        ]
        command = [
            Path(sys.executable).parent / "wattshift",
            "simulate",
            *inputs,
            "--policy",
            out / "policy.toml",
        ]
        command += ["--until", str(int(END_S) + 1), "--out", out / "out"]
        subprocess.run(
            list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return float(json.loads((out / "out" / "summary.json").read_text())["site"]["profit_usd"])


def score(worlds: Path, name: str, seed: int, order: str | None) -> Scored:
    """One world; without an order its bound alone."""
    folder = worlds / name / f"seed{seed}"
    given = next(row for row in _rows(worlds / name / "bounds.csv") if int(row["seed"]) == seed)
    earned = None
    if order is not None:
        earned = earned_usd(folder, order) - float(given["inference_profit_usd"])
    return Scored(name, seed, bound_usd(folder), float(given["lp_bound_usd_without_inference"]), earned)


def main() -> int:
    """Print a row a world, and the mean and the worst of each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--worlds", nargs="*", default=["slack1.0_load1.5", "slack0.2_load0.8"])
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(8)))
    parser.add_argument("--order", choices=["value", "class"], default="value")
    parser.add_argument("--bound-only", action="store_true")
    arguments = parser.parse_args()
    worlds = arguments.data / "worlds32"
    if not worlds.is_dir():
        print(f"{worlds} is not there; name its parent with --data", file=sys.stderr)
        return 2
    order = None if arguments.bound_only else arguments.order
    print("| world | seed | bound, USD | bound as given, USD | earned, USD | part |\n|--|--|--|--|--|--|")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in arguments.worlds:
            parts = []
            for one in pool.map(lambda seed, name=name: score(worlds, name, seed, order), arguments.seeds):
                shown = ["-", "-"]
                if one.earned_usd is not None:
                    parts.append(one.earned_usd / one.given_usd)
                    shown = [f"{one.earned_usd:.2f}", f"{parts[-1]:.4f}"]
                row = (one.name, one.seed, f"{one.bound_usd:.2f}", f"{one.given_usd:.2f}", *shown)
                print("|", " | ".join(map(str, row)), "|", flush=True)
            if parts:
                print(
                    f"| {name} | mean, worst | | | | {statistics.mean(parts):.4f}, {min(parts):.4f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
