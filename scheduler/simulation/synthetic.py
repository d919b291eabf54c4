"""A busy day made up from a seed, for those without a trace: nodes, jobs, prices, grid events as CSV files.

Inference follows the day, training and batch come at random (log-normal run times, as in published traces),
miners take what is left; the price has the two humps of a working day and a calm, windy hour below zero.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scheduler.simulation.boards import PROFILES
from scheduler.simulation.inputs import (
    EVENT_COLUMNS,
    JOB_COLUMNS,
    NODE_COLUMNS,
    PRICE_COLUMNS,
    NodeRow,
    read_nodes,
    write_rows,
)

_DAY_S, _HOUR_S = 86_400.0, 3600.0
_GPUS_DEFAULT = 8
# What arrives would fill the GPUs so many times, miners apart.
_LOAD = 0.9
_SHARE_BY_CLASS = {"INFERENCE": 0.25, "TRAINING": 0.40, "BATCH": 0.25}
# Median and sigma of the run time, s, and how a job's GPUs are drawn.
_RUN_TIMES = {"INFERENCE": (1800.0, 0.6), "TRAINING": (5400.0, 1.0), "BATCH": (900.0, 1.2)}
_RUN_S_MIN, _RUN_S_MAX = 60.0, 12 * _HOUR_S
_GANGS = {"INFERENCE": (1, 1, 1, 2), "TRAINING": (1, 2, 4, 8), "BATCH": (1, 1, 1, 2)}
_VALUES = {"INFERENCE": (3.0, 5.0), "TRAINING": (1.0, 3.0), "BATCH": (0.2, 0.9)}
# Of the board's largest limit.
_DRAW = {"INFERENCE": (0.45, 0.75), "TRAINING": (0.75, 0.98), "BATCH": (0.5, 0.9)}
_RESTART_LOSS_S = {"INFERENCE": 20, "TRAINING": 180, "BATCH": 30}
_MINING_DRAW, _MINING_VALUE = 0.55, 0.05
_DEADLINE_SHARE = 0.3  # of batch jobs
_PRICE_STEP_S = 900.0


def write(folder: Path, seed: int, nodes: Path | None) -> dict[str, Path]:
    """Write nodes.csv (unless nodes are given), jobs.csv, prices.csv and events.csv; returns the paths.

    Raises:
        InputError: The nodes' file is wrong, or a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    files = {name: folder / f"{name}.csv" for name in ("nodes", "jobs", "prices", "events")}
    if nodes is None:
        write_rows(files["nodes"], NODE_COLUMNS, [_node()])
    else:
        files["nodes"] = nodes
    found = [node for node in read_nodes(files["nodes"]) if node.gpus]
    write_rows(files["jobs"], JOB_COLUMNS, _jobs(found, chance))
    write_rows(files["prices"], PRICE_COLUMNS, _prices(chance))
    write_rows(files["events"], EVENT_COLUMNS, _events(found, chance))
    return files


def _node() -> dict[str, Any]:
    board = PROFILES["H100"]
    return {
        "node_id": "n0", "gpu_model": "H100", "gpus": _GPUS_DEFAULT, "gpu_memory_mib": board.memory_mib,
        "cpus": 128, "memory_mib": 1_048_576, "gpu_idle_w": board.idle_w,
        "gpu_power_limit_w_min": board.power_limit_w_min, "gpu_power_limit_w_max": board.power_limit_w_max,
        "base_w": 600,
    }  # fmt: skip


def _jobs(nodes: list[NodeRow], chance: random.Random) -> list[dict[str, Any]]:
    """A miner for each GPU, and whatever arrives on top, in the order of submission."""
    gpus = sum(node.gpus for node in nodes)
    widest = max((node.gpus for node in nodes), default=0)
    most_w = min((node.gpu_power_limit_w_max for node in nodes), default=0.0)
    rows = [
        {
            "job_id": f"mining-{number}", "submit_s": 0, "class": "MINING", "gpus": 1, "duration_s": "inf",
            "value_usd_per_gpu_hour": _MINING_VALUE, "draw_w": round(most_w * _MINING_DRAW),
        }
        for number in range(gpus)
    ]  # fmt: skip
    for job_class in _SHARE_BY_CLASS if gpus else ():
        rows += _arrivals(job_class, gpus, widest, most_w, chance)
    return sorted(rows, key=lambda row: (row["submit_s"], row["job_id"]))


def _arrivals(
    job_class: str, gpus: int, widest: int, most_w: float, chance: random.Random
) -> Iterator[dict[str, Any]]:
    left_s = _LOAD * _SHARE_BY_CLASS[job_class] * gpus * _DAY_S
    number = 0
    while left_s > 0:
        median_s, sigma = _RUN_TIMES[job_class]
        run_s = min(_RUN_S_MAX, max(_RUN_S_MIN, round(chance.lognormvariate(math.log(median_s), sigma))))
        wide = min(widest, chance.choice(_GANGS[job_class]))
        submit_s = round(_moment(job_class, chance))
        late_s = round(submit_s + run_s * chance.uniform(1.5, 6.0))
        has_deadline = job_class == "BATCH" and chance.random() < _DEADLINE_SHARE
        yield {
            "job_id": f"{job_class.lower()}-{number}", "submit_s": submit_s, "class": job_class, "gpus": wide,
            "duration_s": run_s, "expected_s": round(run_s * chance.uniform(1.0, 1.6)),
            "priority": chance.choice((400, 500, 500, 600)),
            "value_usd_per_gpu_hour": round(chance.uniform(*_VALUES[job_class]), 3),
            "deadline_s": late_s if has_deadline else None,
            "restart_loss_s": _RESTART_LOSS_S[job_class],
            "draw_w": round(most_w * chance.uniform(*_DRAW[job_class])),
            "tenant": chance.choice(("red", "green", "blue")),
        }  # fmt: skip
        left_s -= run_s * wide
        number += 1


def _moment(job_class: str, chance: random.Random) -> float:
    """When a job comes: inference by day, with the evening's peak; the rest at any time."""
    while True:
        moment_s = chance.uniform(0.0, _DAY_S)
        if job_class != "INFERENCE" or chance.random() < _busy(moment_s):
            return moment_s


def _busy(moment_s: float) -> float:
    """How busy people are at an hour, 0.15 at night to 1 in the evening."""
    hour = moment_s / _HOUR_S
    return 0.15 + 0.85 * max(_hump(hour, 11.0, 3.0), _hump(hour, 20.0, 2.5))


def _hump(hour: float, middle: float, width: float) -> float:
    return math.exp(-(((hour - middle) / width) ** 2))


def _prices(chance: random.Random) -> Iterator[dict[str, Any]]:
    for step in range(int(_DAY_S / _PRICE_STEP_S)):
        hour = step * _PRICE_STEP_S / _HOUR_S
        humps = 60.0 * _hump(hour, 8.0, 1.5) + 90.0 * _hump(hour, 19.0, 2.0) - 45.0 * _hump(hour, 13.0, 1.5)
        price = 35.0 + humps + chance.gauss(0.0, 4.0)
        yield {"start_s": round(step * _PRICE_STEP_S), "usd_per_mwh": round(price, 2)}


def _events(nodes: list[NodeRow], chance: random.Random) -> list[dict[str, Any]]:
    """A long voluntary curtailment in the evening, and a short emergency at some hour."""
    most_w = sum(node.gpus * node.gpu_power_limit_w_max + node.base_w for node in nodes)
    sudden_s = round(chance.uniform(9.0, 16.0) * _HOUR_S)
    return [
        {"event_id": "evening", "start_s": 18 * 3600, "end_s": 20 * 3600, "site_power_w": round(0.6 * most_w),
         "notice_s": 3600, "emergency": "false"},
        {"event_id": "sudden", "start_s": sudden_s, "end_s": sudden_s + 1200,
         "site_power_w": round(0.4 * most_w), "notice_s": 0, "emergency": "true"},
    ]  # fmt: skip
