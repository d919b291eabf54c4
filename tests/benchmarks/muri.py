"""Completion times against a published simulator: one virtual cluster's training jobs on 8 nodes of 8 GPUs.

    python -m tests.benchmarks.muri [--data DIR] [--policies P ...] [--until SECONDS]

The trace and the figures beside ours are of the simulator of Muri (Zhao et al., SIGCOMM'22), which knows how
long each job runs, as ours is told by `expected_s`. A restart costs what it charges for a job's model and
GPUs, but only a job that starts again pays; there every running job does at every event.
"""

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.model.policy import Order, Policy
from scheduler.simulation import csv_files, outputs
from scheduler.simulation.converters import PHILLY_COLUMNS, philly_jobs
from scheduler.simulation.csv_files import Problems
from scheduler.simulation.inputs import JOB_COLUMNS, JobStore, NodeRow, Room, write_rows
from scheduler.simulation.replay import World, replay

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("WATTSHIFT_BENCH_DATA", ROOT.parent / "shared" / "data"))
NODES = tuple(
    NodeRow(f"n{row}", "V100", 8, 32_000, 10**8, 10**8, 40.0, 100.0, 300.0, 0.0) for row in range(8)
)
# Mean completion time in s, as published for this trace.
PUBLISHED_S = {
    "shortest remaining time first": 1_370_603,
    "shortest remaining service first": 980_141,
    "Tiresias": 3_330_371,
    "Themis": 1_823_179,
}
# What the published simulator charges for a restart, s, by model for 1, 2, 4, 8, 16 and 32 GPUs.
RESTART_S = {
    "vgg16": (7, 7, 8, 9, 9, 10), "vgg19": (7, 7, 8, 9, 10, 10), "resnet18": (4, 5, 5, 7, 7, 7),
    "shufflenet_v2_x1_0": (4, 4, 5, 5, 7, 8), "bert": (10,) * 6, "gpt2": (10,) * 6,
    "a2c": (38, 39, 39, 46, 46, 46), "dqn": (5, 5, 6, 6, 8, 8),
}  # fmt: skip
RESTART_S_OTHER = 10
S_PER_HOUR = 3600.0
# Keeps values within what a job may be worth.
VALUE_SCALE_USD = 100.0
VALUE_USD_MAX = 10_000.0


@dataclass(frozen=True)
class Case:
    """A policy, and what a job is worth per GPU-hour to it."""

    policy: Policy
    worth: Callable[[float, int], float] | None  # of hours and GPUs; None = what its class says


def _by_service(hours: float, gpus: int) -> float:
    return VALUE_SCALE_USD / (hours * gpus)


def _by_time(hours: float, gpus: int) -> float:
    return VALUE_SCALE_USD / hours


CASES = {
    "default": Case(Policy(), None),
    "value = 1/service": Case(Policy(order=Order.VALUE), _by_service),
    "value = 1/service, no hysteresis": Case(Policy(order=Order.VALUE, hysteresis_ratio=0.0), _by_service),
    "value = 1/time": Case(Policy(order=Order.VALUE), _by_time),
}


def write_jobs(trace: Path, target: Path, worth: Callable[[float, int], float] | None) -> None:
    """Make a jobs.csv of the trace."""
    problems = Problems(str(trace))
    models = {row["job_id"]: row["model_name"] for _, row in csv_files.rows(trace, PHILLY_COLUMNS, problems)}
    philly_jobs(trace, target, restart_loss_s=0.0, value_by_service=False)
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        gpus = int(row["gpus"])
        charges = RESTART_S.get(models[row["job_id"]])
        row["restart_loss_s"] = str(RESTART_S_OTHER if charges is None else charges[gpus.bit_length() - 1])
        if worth is not None:
            usd = min(VALUE_USD_MAX, worth(float(row["duration_s"]) / S_PER_HOUR, gpus))
            row["value_usd_per_gpu_hour"] = f"{usd:.6f}"
    write_rows(target, JOB_COLUMNS, rows)


def measure(trace: Path, case: Case, until_s: float | None = None) -> dict[str, Any]:
    """The summary of the trainings under a case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jobs(trace, folder / "jobs.csv", case.worth)
        store = JobStore()
        store.load(folder / "jobs.csv", Room(NODES))
        outcome = replay(World(NODES, policy=case.policy, until_s=until_s), store, folder)
        store.close()
        training: dict[str, Any] = outputs.summary(outcome)["classes"]["training"]
        return training


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--policies", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--until", type=float)
    arguments = parser.parse_args()
    trace = arguments.data / "philly_muri" / "trace1.csv"
    if not trace.is_file():
        print(f"{trace} is not there; name its folder's parent with --data", file=sys.stderr)
        return 2
    print("| policy | mean completion time, s | completed | preemptions | lost GPU-h |\n|--|--|--|--|--|")
    for name, seconds in PUBLISHED_S.items():
        print(f"| {name} (published) | {seconds:,} | 1,494 | | |")
    for name in arguments.policies:
        found = measure(trace, CASES[name], arguments.until)
        mean_s = found["completion_seconds_mean"]
        shown = "-" if mean_s is None else f"{mean_s:,.0f}"
        print(
            f"| ours, {name} | {shown} | {found['completed']:,} | {found['preemptions']:,} "
            f"| {found['lost_gpu_seconds'] / S_PER_HOUR:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
