"""A cluster that fills up through `wattshift simulate`: processor time, memory, and how full it gets.

    python -m tests.benchmarks.saturation [--data DIR] [--seed 42] [--out DIR]

The experiment of "Beware of Fragmentation" (Weng et al., USENIX ATC'23) under the scheduler's real loop:
1,213 nodes with 6,212 GPUs, a task a second in the published order until they ask for 1.3 times the GPUs, and
none leaves. There one that fits nowhere is dropped; here it waits, and each tick looks whether it fits now.
Allocation is of all GPU thousandths, in percent, where 100 % and 130 % of them have been asked for.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import numpy as np

from scheduler.simulation import converters
from tests.benchmarks.openb import ALLOCATED_AT_PERCENT, DATA, SEEDS, published

ASKED_PERCENT = 130
PROGRAM = "import sys; from scheduler.cli import main; sys.exit(main())"
# Targets: seconds of processor time, GiB.
CPU_S_MAX = 120
PEAK_GIB_MAX = 2
_KIB_PER_GIB = 1 << 20


def write_inputs(folder: Path, target: Path, seed: int) -> None:
    """Make nodes.csv and jobs.csv of the published order of arrival."""
    nodes, tasks = folder / "openb_node_list_gpu_node.csv", folder / "openb_pod_list_default.csv"
    order = np.load(folder / "arrival_order_default.npz")[f"order_{seed}"].tolist()
    converters.openb_nodes(nodes, target / "nodes.csv")
    converters.openb_filling(nodes, tasks, target / "jobs.csv", ASKED_PERCENT, lambda _: order)


def allocated_percent(timeline: Path, gpus_milli: int) -> dict[int, float]:
    """Allocation where so many percent have been asked for: the mean over the arrivals that round to that."""
    with timeline.open(newline="") as file:
        rows = [
            (int(row["arrived_gpu_milli"]), int(row["allocated_gpu_milli"])) for row in csv.DictReader(file)
        ]
    # What was allocated by the time that the next came.
    settled = dict(rows)
    return {
        percent: fmean(
            held * 100 / gpus_milli
            for asked, held in settled.items()
            if (2 * 100 * asked + gpus_milli) // (2 * gpus_milli) == percent
        )
        for percent in ALLOCATED_AT_PERCENT
    }


def simulate(inputs: Path, out: Path) -> tuple[float, float]:
    """Run `wattshift simulate` as a process of its own; returns its processor seconds and its peak GiB."""
    files = [f"--{name}={inputs / name}.csv" for name in ("nodes", "jobs")]
    running = subprocess.Popen([sys.executable, "-c", PROGRAM, "simulate", *files, f"--out={out}"])
    _, status, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise SystemExit(f"simulate ended with exit code {running.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / _KIB_PER_GIB


def main() -> int:
    """Fill the cluster and print what it took and what came of it; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds openb/ (%(default)s)")
    parser.add_argument("--seed", type=int, choices=SEEDS, default=SEEDS[0])
    parser.add_argument("--out", type=Path, help="keep inputs and results there")
    options = parser.parse_args()
    folder = options.data / "openb"
    if not folder.is_dir():
        print(f"no data at {folder}: name the folder that holds openb/ with --data", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        write_inputs(folder, out, options.seed)
        cpu_s, peak_gib = simulate(out, out / "results")
        with (out / "nodes.csv").open(newline="") as file:
            gpus_milli = sum(int(row["gpus"]) for row in csv.DictReader(file)) * 1000
        reached = allocated_percent(out / "results" / "timeline.csv", gpus_milli)
    bar = published(folder)["default", "fgd", options.seed]
    print("| | reached | target or published |\n|--|--:|--:|")
    print(f"| processor time, s | {cpu_s:.0f} | {CPU_S_MAX} |")
    print(f"| peak memory, GiB | {peak_gib:.2f} | {PEAK_GIB_MAX} |")
    for percent, value in reached.items():
        print(f"| allocated at {percent} %, % (FGD) | {value:.2f} | {bar[percent]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
