"""Worlds of any size for benchmarks and tests: `world(jobs, gpus, seed)`.

Nodes have 8 GPUs, the last one what is left, all of one of three models. Each node is let in one of the
patterns of PATTERNS, about two thirds of all GPUs in sum: gangs of 8, 4, 2 and 1, shares, and gaps. At most
half of the jobs are live; they hold the lowest numbers. The rest wait. Classes, shapes, values and times are
drawn independently by the weights below. One GPU and one node in a hundred take nothing new (the first node
always does), one free GPU in 200 is in hand-over, one waiting job in 50 backs off.

Everything is drawn as integers from one PCG64 stream, so that a seed is the same world on every machine with
the same numpy.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from scheduler.model.jobs import SHARE_MILLI_WHOLE, JobClass
from scheduler.model.policy import CLASS_DEFAULTS, PRIORITY_MAX, Policy
from scheduler.model.snapshot import (
    CLOSED,
    DRAINING,
    NOT_DRAINING,
    OPEN,
    PENDING,
    PREEMPTING,
    RUNNING,
    STARTING,
    STOPPING,
    SUSPENDED,
    UNKNOWN,
    GpuColumns,
    HoldingColumns,
    JobColumns,
    NodeColumns,
    Snapshot,
)

Columns = dict[str, Any]
Weighted = Sequence[tuple[int, int]]  # value, weight

NODE_GPUS = 8
SECOND_US = 1_000_000
NOW_US = 1_700_000_000 * SECOND_US
# What a node has for each of its GPUs.
CPUS_PER_GPU = 16
MEMORY_MIB_PER_GPU = 131_072
# H100 80GB, A100 80GB, L40S: memory that jobs may book, and how many nodes of ten have it.
MODEL_MEMORY_MIB = (81_559, 81_920, 46_068)
NVLINK_MODELS = (0, 1)  # all GPUs of such a node are one island
SWITCH_GPUS, NUMA_GPUS = 2, 4
MODELS: Weighted = ((0, 5), (1, 3), (2, 2))
# Which models a set accepts: any, H100, H100 or A100, L40S.
MODEL_SETS = ((0, 1, 2), (0,), (0, 1), (2,))
# How a node is let: first GPU, GPUs, thousandths of each; and how often.
PATTERNS: tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...] = (
    (2, ()),
    (2, ((0, 8, 1000),)),
    (2, ((0, 4, 1000), (4, 4, 1000))),
    (3, ((0, 4, 1000), (4, 2, 1000), (6, 1, 1000))),
    (3, ((0, 2, 1000), (2, 2, 1000), (4, 1, 1000), (5, 1, 1000), (6, 1, 500), (6, 1, 250))),
    (3, tuple((gpu, 1, 1000) for gpu in range(6))),
    (2, ((0, 1, 300), (0, 1, 300), (0, 1, 300), *((gpu, 1, 1000) for gpu in range(1, 8)))),
    (2, ((0, 2, 1000),)),
)
CLASSES: Weighted = (
    (JobClass.INFERENCE, 10),
    (JobClass.TRAINING, 30),
    (JobClass.BATCH, 45),
    (JobClass.MINING, 15),
)
# GPUs of a waiting job, by class; a negative number is a share of one GPU, in thousandths.
SHAPES: dict[JobClass, Weighted] = {
    JobClass.INFERENCE: ((-250, 2), (-500, 2), (1, 4), (2, 2)),
    JobClass.TRAINING: ((1, 2), (2, 2), (4, 3), (8, 3)),
    JobClass.BATCH: ((0, 1), (-250, 1), (-500, 2), (1, 12), (2, 4)),
    JobClass.MINING: ((1, 1),),
}
PRIORITIES: Weighted = ((500, 6), (100, 1), (900, 1), (PRIORITY_MAX, 1), (250, 1))
VALUE_PERCENT_RANGE = (50, 201)  # of what the class is worth by default
GPU_MEMORY_MIB: Weighted = ((0, 6), (20_000, 1), (40_000, 2), (70_000, 1))
MODEL_SET_WEIGHTS: Weighted = ((0, 7), (1, 1), (2, 1), (3, 1))
# For each of a job's GPUs.
CPUS: Weighted = ((0, 3), (1, 1), (4, 4), (8, 2))
MEMORY_MIB: Weighted = ((0, 3), (16_384, 4), (65_536, 3))
MIN_RUNTIME_S: Weighted = ((0, 6), (60, 1), (600, 2), (3600, 1))
RESTART_LOSS_S: Weighted = ((0, 5), (60, 3), (600, 2))
EXPECTED_S: Weighted = ((UNKNOWN, 4), (300, 1), (3600, 3), (14_400, 1), (86_400, 1))
TIME_LIMIT_S: Weighted = ((UNKNOWN, 19), (172_800, 1))
DEADLINE_IN_S: Weighted = ((UNKNOWN, 97), (7200, 1), (43_200, 1), (259_200, 1))
BACKS_OFF_S: Weighted = ((0, 98), (5, 1), (60, 1))
LIVE_STATES: Weighted = ((RUNNING, 94), (STARTING, 2), (SUSPENDED, 1), (PREEMPTING, 2), (STOPPING, 1))
RAN_S_MAX = 43_200
STOPPING_S_MAX = 5
_PREEMPTIBLE_PERCENT = 95
_CLOSED_ONE_IN, _HANDOVER_ONE_IN = 100, 200


def world(jobs: int, gpus: int, seed: int) -> Snapshot:
    """A world of so many jobs, live and waiting, and so many GPUs."""
    random = np.random.default_rng(seed)
    nodes = -(-gpus // NODE_GPUS)
    gpu_node = np.arange(gpus, dtype=np.int64) // NODE_GPUS
    model = _drawn(random, MODELS, nodes)[gpu_node]
    memory_mib = np.array(MODEL_MEMORY_MIB, dtype=np.int64)[model]
    live, holdings = _live(random, jobs // 2, nodes, memory_mib)
    numbers = np.arange(len(live["number"]) + 1, jobs + 1, dtype=np.int64)
    waiting = pending(random, numbers, NOW_US)
    _name_preemptors(random, live, waiting)
    _hand_over(random, holdings, gpus)
    closed = random.integers(0, _CLOSED_ONE_IN, gpus) == 0
    return Snapshot(
        now_us=NOW_US,
        jobs=JobColumns(**{name: np.concatenate((live[name], waiting[name])) for name in live}),
        gpus=GpuColumns(
            uuid=tuple(f"GPU-{row:08d}" for row in range(gpus)),
            index=np.arange(gpus, dtype=np.int64) % NODE_GPUS,
            node=gpu_node,
            memory_mib=memory_mib,
            state=np.where(closed, CLOSED, OPEN),
            island=np.where(np.isin(model, NVLINK_MODELS), 0, UNKNOWN),
            switch=np.arange(gpus, dtype=np.int64) % NODE_GPUS // SWITCH_GPUS,
            numa=np.arange(gpus, dtype=np.int64) % NODE_GPUS // NUMA_GPUS,
            model=model,
        ),
        nodes=_nodes(random, np.bincount(gpu_node, minlength=nodes)),
        holdings=HoldingColumns(**holdings),
        model_fits=np.stack([np.isin(model, models) for models in MODEL_SETS]),
    )


def pending(random: np.random.Generator, number: Any, now_us: int) -> Columns:
    """The columns of waiting jobs with these numbers."""
    rows = len(number)
    job_class = _drawn(random, CLASSES, rows)
    shape = np.zeros(rows, dtype=np.int64)
    for each, shapes in SHAPES.items():
        of_class = job_class == each
        shape[of_class] = _drawn(random, shapes, int(of_class.sum()))
    share_milli = np.where(shape < 0, -shape, SHARE_MILLI_WHOLE)
    gpus = np.where(shape < 0, 1, shape)
    wanted_mib = _drawn(random, GPU_MEMORY_MIB, rows)
    models = np.where(gpus > 0, _drawn(random, MODEL_SET_WEIGHTS, rows), 0)
    columns = _common(random, number, job_class, gpus)
    deadline_us = _seconds_us(random, DEADLINE_IN_S, rows)
    columns |= {
        "state": np.full(rows, PENDING, dtype=np.int64),
        "share_milli": share_milli,
        "gpu_memory_mib": np.where(gpus > 0, wanted_mib * share_milli // SHARE_MILLI_WHOLE, 0),
        "models": models,
        "eligible_us": now_us + _seconds_us(random, BACKS_OFF_S, rows),
        "deadline_us": np.where(deadline_us == UNKNOWN, UNKNOWN, now_us + deadline_us),
    }
    return _complete(columns)


def _common(random: np.random.Generator, number: Any, job_class: Any, gpus: Any) -> Columns:
    """The columns that are drawn alike for live and waiting jobs."""
    rows = len(number)
    classes = [CLASS_DEFAULTS[each] for each in JobClass]
    value = np.array([round(each.value_usd_per_gpu_hour * 1_000_000) for each in classes], dtype=np.int64)
    grace_us = np.array([round(each.grace_s * SECOND_US) for each in classes], dtype=np.int64)
    usually = np.array([each.preemptible for each in classes])[job_class]
    as_usual = random.integers(0, 100, rows) < _PREEMPTIBLE_PERCENT
    per_gpu = np.maximum(gpus, 1)
    return {
        "number": number,
        "job_class": job_class,
        "gpus": gpus,
        "priority": _drawn(random, PRIORITIES, rows),
        "value": value[job_class] * random.integers(*VALUE_PERCENT_RANGE, rows) // 100,
        "cpus": _drawn(random, CPUS, rows) * per_gpu,
        "memory_mib": _drawn(random, MEMORY_MIB, rows) * per_gpu,
        "preemptible": usually == as_usual,
        "min_runtime_us": _seconds_us(random, MIN_RUNTIME_S, rows),
        "grace_us": grace_us[job_class],
        "restart_loss_us": _seconds_us(random, RESTART_LOSS_S, rows),
        "expected_us": _seconds_us(random, EXPECTED_S, rows),
        "time_limit_us": _seconds_us(random, TIME_LIMIT_S, rows),
    }


def _live(random: np.random.Generator, jobs_max: int, nodes: int, memory_mib: Any) -> tuple[Columns, Columns]:
    """The columns of live jobs, and of what they hold."""
    node, first, gpus, share_milli = _let(random, nodes, len(memory_mib))
    kept = np.sort(random.permutation(len(node))[:jobs_max])
    node, first, gpus, share_milli = node[kept], first[kept], gpus[kept], share_milli[kept]
    rows = len(kept)
    job_class = _drawn(random, CLASSES, rows)
    job_class[(job_class == JobClass.MINING) & (gpus > 1)] = JobClass.TRAINING
    columns = _common(random, np.arange(1, rows + 1, dtype=np.int64), job_class, gpus)
    state = _drawn(random, LIVE_STATES, rows)
    started_us = NOW_US - random.integers(0, RAN_S_MAX, rows) * SECOND_US
    saved_us = started_us + (NOW_US - started_us) // SECOND_US * random.integers(0, SECOND_US, rows)
    saves = random.integers(0, 2, rows) == 0
    leaves = (state == PREEMPTING) | (state == STOPPING)
    stop_us = NOW_US - random.integers(1, STOPPING_S_MAX + 1, rows) * SECOND_US
    is_share = share_milli < SHARE_MILLI_WHOLE
    gpu = node * NODE_GPUS + first
    columns |= {
        "state": state,
        "share_milli": share_milli,
        "gpu_memory_mib": np.where(is_share, memory_mib[gpu] * share_milli // SHARE_MILLI_WHOLE, 0),
        "started_us": np.where(state == STARTING, UNKNOWN, started_us),
        "checkpoint_us": np.where((state == STARTING) | ~saves, UNKNOWN, saved_us),
        "node": node,
        "stop_us": np.where(leaves, stop_us, UNKNOWN),
    }
    job = np.repeat(np.arange(rows, dtype=np.int64), gpus)
    within = np.arange(len(job), dtype=np.int64) - np.repeat(np.cumsum(gpus) - gpus, gpus)
    holdings = {
        "job": job,
        "gpu": gpu[job] + within,
        "share_milli": share_milli[job],
        "memory_mib": columns["gpu_memory_mib"][job],
        "preemptor": np.full(len(job), UNKNOWN, dtype=np.int64),
        "stop_us": np.full(len(job), UNKNOWN, dtype=np.int64),
    }
    return _complete(columns), holdings


def _let(random: np.random.Generator, nodes: int, gpus: int) -> tuple[Any, Any, Any, Any]:
    """Node, first GPU on it, GPUs and thousandths of each live job, node by node."""
    pattern = _drawn(random, [(row, weight) for row, (weight, _) in enumerate(PATTERNS)], nodes)
    parts = np.array([part for _, each in PATTERNS for part in each], dtype=np.int64)
    sizes = np.array([len(each) for _, each in PATTERNS], dtype=np.int64)
    begins = np.cumsum(sizes) - sizes
    jobs = sizes[pattern]
    node = np.repeat(np.arange(nodes, dtype=np.int64), jobs)
    within = np.arange(len(node), dtype=np.int64) - np.repeat(np.cumsum(jobs) - jobs, jobs)
    first, count, share_milli = parts[begins[pattern[node]] + within].T
    exists = node * NODE_GPUS + first + count <= gpus  # the last node may be smaller
    return node[exists], first[exists], count[exists], share_milli[exists]


def _name_preemptors(random: np.random.Generator, live: Columns, waiting: Columns) -> None:
    """Say of each job that is being preempted for whom: a waiting inference job, if there is one."""
    ours = waiting["number"][waiting["job_class"] == JobClass.INFERENCE]
    leaving = np.flatnonzero(live["state"] == PREEMPTING)
    if len(ours):
        live["preemptor"][leaving] = ours[random.integers(0, len(ours), len(leaving))]


def _hand_over(random: np.random.Generator, holdings: Columns, gpus: int) -> None:
    """Let some of the free GPUs still be occupied by jobs that have ended."""
    is_free = np.ones(gpus, dtype=bool)
    is_free[holdings["gpu"]] = False
    occupied = np.flatnonzero(is_free & (random.integers(0, _HANDOVER_ONE_IN, gpus) == 0))
    ended = {
        "job": UNKNOWN,
        "gpu": occupied,
        "share_milli": SHARE_MILLI_WHOLE,
        "memory_mib": 0,
        "preemptor": UNKNOWN,
        "stop_us": NOW_US - SECOND_US,
    }
    for name, values in ended.items():
        added = np.full(len(occupied), values, dtype=np.int64)
        holdings[name] = np.concatenate((holdings[name], added))


def _nodes(random: np.random.Generator, gpus: Any) -> NodeColumns:
    """The nodes that have so many GPUs each."""
    drains = random.integers(0, _CLOSED_ONE_IN, len(gpus)) == 0
    drains[:1] = False
    return NodeColumns(
        cpus=gpus * CPUS_PER_GPU,
        memory_mib=gpus * MEMORY_MIB_PER_GPU,
        live_jobs_max=np.full(len(gpus), Policy().live_jobs_max, dtype=np.int64),
        drain=np.where(drains, DRAINING, NOT_DRAINING),
    )


def _complete(columns: Columns) -> Columns:
    """All columns of jobs in their order; what is not said does not apply."""
    unsaid = {"eligible_us": 0, "models": 0}
    rows = len(columns["number"])
    return {
        column.name: columns[column.name]
        if column.name in columns
        else np.full(rows, unsaid.get(column.name, UNKNOWN), dtype=np.int64)
        for column in fields(JobColumns)
    }


def _drawn(random: np.random.Generator, weighted: Weighted, rows: int) -> Any:
    """Int64, shape (rows,): values by their weights."""
    values, weights = zip(*weighted, strict=True)
    every = np.repeat(np.array(values, dtype=np.int64), weights)
    return every[random.integers(0, len(every), rows)]


def _seconds_us(random: np.random.Generator, weighted_s: Weighted, rows: int) -> Any:
    """The same for durations, in microseconds; UNKNOWN stays UNKNOWN."""
    return _drawn(random, [(s if s == UNKNOWN else s * SECOND_US, weight) for s, weight in weighted_s], rows)
