"""Public traces as the files that `simulate` reads; their cells are checked like those of our own files.

Alibaba's openb: a cluster's nodes and tasks. Philly-style: a job a row, in milliseconds, as simulators of
training clusters pass them on. Azure's LLM inference: a request a row; replicas that serve them are made.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scheduler.errors import InputError
from scheduler.model.jobs import SHARE_MILLI_WHOLE
from scheduler.simulation import csv_files
from scheduler.simulation.csv_files import Column, Problems, number, whole
from scheduler.simulation.inputs import GPUS_PER_NODE_MAX, JOB_COLUMNS, NODE_COLUMNS, write_rows

_TIME_MAX = 1e15
_CPU_MILLI_MAX = 10**9
_MIB_MAX = 2**31
_TEXT = csv_files.name(128)
# Watts of the cluster's GPUs, idle and busy, as the comparison of placements has them (docs/PLACEMENT.md).
_OPENB_W = {
    "T4": (10, 70), "A10": (30, 150), "G2": (30, 150), "P100": (25, 250), "V100M16": (30, 300),
    "V100M32": (30, 300), "G3": (50, 400),
}  # fmt: skip
_OPENB_GPU_MIB = {
    "T4": 15_360, "A10": 23_028, "G2": 23_028, "P100": 16_280, "V100M16": 16_160, "V100M32": 32_510,
    "G3": 81_920,
}  # fmt: skip
# Latency-sensitive services, guaranteed and burstable work, best effort.
_CLASS_BY_QOS = {"LS": "INFERENCE", "Guaranteed": "TRAINING", "Burstable": "TRAINING", "BE": "BATCH"}
_MS_PER_S = 1000.0
_S_PER_HOUR = 3600.0
# What a job that needs one GPU-hour is worth, USD per GPU-hour, where value falls with the service needed:
# a millionth of a dollar, which is as fine as values are, still tells apart jobs of 10,000 GPU-hours.
_VALUE_OF_AN_HOUR_USD = 100.0
_VALUE_USD_MAX = 10_000.0
# Of the curve of requests: two years of minutes.
_WINDOWS_MAX = 1_000_000

OPENB_NODE_COLUMNS = (
    Column("sn", _TEXT),
    Column("cpu_milli", whole(0, _CPU_MILLI_MAX)),
    Column("memory_mib", whole(0, _MIB_MAX)),
    Column("gpu", whole(0, GPUS_PER_NODE_MAX)),
    Column("model", _TEXT, ""),
)
OPENB_TASK_COLUMNS = (
    Column("name", _TEXT),
    Column("cpu_milli", whole(0, _CPU_MILLI_MAX)),
    Column("memory_mib", whole(0, _MIB_MAX)),
    Column("num_gpu", whole(0, GPUS_PER_NODE_MAX)),
    Column("gpu_milli", whole(0, SHARE_MILLI_WHOLE)),
    Column("gpu_spec", _TEXT, ""),
    Column("qos", _TEXT, ""),
    Column("pod_phase", _TEXT, ""),
    Column("creation_time", number(0, _TIME_MAX), None),
    Column("deletion_time", number(0, _TIME_MAX), None),
    Column("scheduled_time", number(0, _TIME_MAX), None),
)
PHILLY_COLUMNS = (
    Column("job_id", _TEXT),
    Column("num_gpu", whole(1, GPUS_PER_NODE_MAX)),
    Column("submit_time", number(0, _TIME_MAX)),
    Column("duration", number(1, _TIME_MAX)),
    *(
        Column(name, _TEXT, "")
        for name in (
            "iterations", "model_name", "batch_size", "interval", "iteration_time", "resource_time_0",
            "resource_time_1", "resource_time_2", "priority",
        )
    ),
)  # fmt: skip


def _timestamp(text: str) -> float:
    """Seconds since 1970 of `2023-11-16 18:17:03.9799600`, in UTC."""
    try:
        # Ten-millionths are more than datetime takes.
        whole_part, _, fraction = text.partition(".")
        moment = datetime.strptime(whole_part, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
    except ValueError:
        raise ValueError("must be a time such as 2023-11-16 18:17:03.9799600") from None


AZURE_COLUMNS = (
    Column("TIMESTAMP", _timestamp),
    Column("ContextTokens", whole(0, 10**9)),
    Column("GeneratedTokens", whole(0, 10**9)),
)


def openb_nodes(source: Path, target: Path) -> None:
    """Make a nodes.csv of openb's list of nodes.

    Raises:
        InputError: The list is wrong, or the target can't be written.
    """
    problems = Problems(str(source))
    write_rows(
        target,
        NODE_COLUMNS,
        (_openb_node(row) for _, row in csv_files.rows(source, OPENB_NODE_COLUMNS, problems)),
    )


def _openb_node(row: dict[str, Any]) -> dict[str, Any]:
    model = row["model"]
    idle_w, busy_w = _OPENB_W.get(model, (None, None))
    return {
        "node_id": row["sn"],
        "gpu_model": model or None,
        "gpus": row["gpu"],
        "gpu_memory_mib": _OPENB_GPU_MIB.get(model),
        "cpus": row["cpu_milli"] / 1000,
        "memory_mib": row["memory_mib"],
        "gpu_idle_w": idle_w,
        "gpu_power_limit_w_min": idle_w,
        "gpu_power_limit_w_max": busy_w,
    }


def openb_jobs(source: Path, target: Path) -> None:
    """Make a jobs.csv of openb's list of tasks; one that never ran, or never ended, is left out.

    Raises:
        InputError: The list is wrong or has no times, or the target can't be written.
    """
    problems = Problems(str(source))
    rows = [row for _, row in csv_files.rows(source, OPENB_TASK_COLUMNS, problems)]
    timed = [row for row in rows if _ran_s(row) is not None]
    if not timed:
        raise InputError(f"{source}: no task has creation_time, scheduled_time and deletion_time")
    first_s = min(row["creation_time"] for row in timed)
    write_rows(target, JOB_COLUMNS, (openb_job(row, row["creation_time"] - first_s) for row in timed))


def openb_filling(
    nodes: Path, tasks: Path, target: Path, percent: int, order: Callable[[int], Iterable[int]]
) -> None:
    """Make a jobs.csv that fills openb's nodes: a task a second, drawn with repetition, and none ever ends.

    All are of one class and worth the same, so that nobody gives way.

    Args:
        nodes: openb's list of nodes.
        tasks: openb's list of tasks.
        target: The file to make.
        percent: Tasks come as long as they ask for no more than so much of all the nodes' GPUs.
        order: In which so many tasks come, each by its place in the order of names; may be endless.

    Raises:
        InputError: A list is wrong or has no GPU in it, or the target can't be written.
    """
    gpus = sum(row["gpu"] for _, row in csv_files.rows(nodes, OPENB_NODE_COLUMNS, Problems(str(nodes))))
    by_name = sorted(
        (row for _, row in csv_files.rows(tasks, OPENB_TASK_COLUMNS, Problems(str(tasks)))),
        key=lambda row: str(row["name"]),
    )
    for source, has_any in ((nodes, gpus), (tasks, any(row["num_gpu"] for row in by_name))):
        if not has_any:
            raise InputError(f"{source}: there is no GPU in the list, so that nothing fills up")
    milli = percent * gpus * SHARE_MILLI_WHOLE // 100
    write_rows(target, JOB_COLUMNS, _filling(by_name, order(len(by_name)), milli))


def _filling(tasks: list[dict[str, Any]], order: Iterable[int], milli_max: int) -> Iterator[dict[str, Any]]:
    """Tasks that ask for no more thousandths of GPUs than these, all together."""
    asked_milli = 0
    for second, place in enumerate(order):
        job = openb_job(tasks[place], float(second), math.inf)
        asked_milli += job["gpus"] * (job["gpu_share_milli"] or SHARE_MILLI_WHOLE)
        if asked_milli > milli_max:
            return
        yield job | {"job_id": f"{second}-{job['job_id']}", "class": "BATCH"}


def openb_job(row: dict[str, Any], submit_s: float, duration_s: float | None = None) -> dict[str, Any]:
    """One task of openb as a row of jobs.csv; it runs as long as it did, unless a duration is given."""
    share = row["gpu_milli"] if row["num_gpu"] == 1 else SHARE_MILLI_WHOLE
    return {
        "job_id": row["name"],
        "submit_s": submit_s,
        "class": _CLASS_BY_QOS.get(row["qos"], "BATCH"),
        "gpus": row["num_gpu"],
        "gpu_share_milli": share if share < SHARE_MILLI_WHOLE else None,
        "cpus": row["cpu_milli"] / 1000,
        "memory_mib": row["memory_mib"],
        "duration_s": _ran_s(row) if duration_s is None else duration_s,
        "gpu_models": row["gpu_spec"],
    }


def _ran_s(row: dict[str, Any]) -> float | None:
    """How long a task ran; None where it did not, or nobody knows."""
    begun_s, ended_s = row["scheduled_time"], row["deletion_time"]
    if begun_s is None or ended_s is None or row["creation_time"] is None or ended_s <= begun_s:
        return None
    return float(ended_s - begun_s)


def philly_jobs(source: Path, target: Path, *, restart_loss_s: float, value_by_service: bool) -> None:
    """Make a jobs.csv of a Philly-style list: training jobs whose run times are known.

    With `value_by_service` a job is worth more per GPU-hour the less GPU time it needs, so that the order
    "value" serves the smallest first.

    Raises:
        InputError: The list is wrong, or the target can't be written.
    """
    problems = Problems(str(source))
    rows = (row for _, row in csv_files.rows(source, PHILLY_COLUMNS, problems))
    write_rows(target, JOB_COLUMNS, (_philly_job(row, restart_loss_s, value_by_service) for row in rows))


def _philly_job(row: dict[str, Any], restart_loss_s: float, value_by_service: bool) -> dict[str, Any]:
    duration_s = row["duration"] / _MS_PER_S
    service_h = duration_s * row["num_gpu"] / _S_PER_HOUR
    value_usd = min(_VALUE_USD_MAX, _VALUE_OF_AN_HOUR_USD / service_h)
    return {
        "job_id": row["job_id"],
        "submit_s": row["submit_time"] / _MS_PER_S,
        "class": "TRAINING",
        "gpus": row["num_gpu"],
        "duration_s": duration_s,
        "expected_s": duration_s,
        "value_usd_per_gpu_hour": f"{value_usd:.6f}" if value_by_service else None,
        "restart_loss_s": restart_loss_s,
        "tenant": row["model_name"],
    }


def azure_jobs(
    source: Path, target: Path, *, tokens_per_s: float, context_weight: float, window_s: float
) -> None:
    """Make a jobs.csv of requests to a language model: the replicas, of one GPU each, that serve them.

    In each window the tokens that came (a token of context counts `context_weight`) ask for so many replicas;
    replica k is a job for as long as at least k are asked for.

    Raises:
        InputError: The list is wrong, time runs backwards in it, or the target can't be written.
    """
    problems = Problems(str(source))
    work = _work_by_window(source, problems, context_weight, window_s)
    wanted = [math.ceil(tokens / (tokens_per_s * window_s)) for tokens in work]
    write_rows(target, JOB_COLUMNS, _replicas(wanted, window_s))


def _work_by_window(source: Path, problems: Problems, context_weight: float, window_s: float) -> list[float]:
    work: list[float] = []
    first_s = before_s = None
    for line, row in csv_files.rows(source, AZURE_COLUMNS, problems):
        at_s = row["TIMESTAMP"]
        if first_s is None or before_s is None:
            first_s = before_s = at_s
        if at_s < before_s:
            problems.add(line, "TIMESTAMP", "time runs backwards; sort the requests by TIMESTAMP")
            continue
        before_s = at_s
        window = int((at_s - first_s) / window_s)
        if window >= _WINDOWS_MAX:
            problems.add(line, "TIMESTAMP", f"is more than {_WINDOWS_MAX} windows after the first")
            break
        work += [0.0] * (window + 1 - len(work))
        work[window] += context_weight * row["ContextTokens"] + row["GeneratedTokens"]
    problems.check()
    return work


def _replicas(wanted: list[int], window_s: float) -> Iterator[dict[str, Any]]:
    """A job for each time that a replica is wanted without a break, in the order of submission."""
    ends = _ends(wanted)
    for window, (before, now) in enumerate(zip([0, *wanted], wanted, strict=False)):
        for replica in range(before, now):
            yield {
                "job_id": f"replica-{replica}-{window}",
                "submit_s": window * window_s,
                "class": "INFERENCE",
                "gpus": 1,
                "duration_s": (ends[window, replica] - window) * window_s,
            }


def _ends(wanted: list[int]) -> dict[tuple[int, int], int]:
    """The window in which a replica that begins in a window is not wanted any more."""
    begun: list[int] = []
    ends: dict[tuple[int, int], int] = {}
    for window, count in enumerate([*wanted, 0]):
        while len(begun) > count:
            ends[begun.pop(), len(begun)] = window
        begun += [window] * (count - len(begun))
    return ends
