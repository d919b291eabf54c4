"""The published policies that placement is compared with, as their simulator computes them.

Both are of the artifact of "Beware of Fragmentation" (Weng et al., USENIX ATC'23), read in
github.com/hkust-adsl/kubernetes-scheduler-simulator, `pkg/simulator/plugin`. Floats and their order of
summation matter: a score is truncated to an integer, so that the last bit of a sum can decide.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scheduler.model.snapshot import UNKNOWN, WHOLE_MILLI
from scheduler.planning.fragmentation import NO_POSITION
from scheduler.planning.pool import Pool

Column = Any

# What the simulator takes as the largest node.
CPU_MILLI_MAX = 128_000
GPU_MILLI_MAX = 8_000
SCORE_MAX = 100.0
TYPICAL_PERCENT = 95
_NOWHERE = -1
# Nodes whose fragmentation is computed at once: kinds x nodes x width stays in the cache.
_ROWS_MAX = 1024


class Task(NamedTuple):
    """A task of the experiment, in the words of a request. CPUs are thousandths, as in the data."""

    gpus: int
    share_milli: int
    gpu_memory_mib: int
    models: int
    cpus: int
    memory_mib: int


def usable_gpus(task: Task, pool: Pool, rows: Column) -> Column:
    """Bool, shape (rows, width): GPUs that have what the task wants of each."""
    usable = pool.milli[rows] >= task.share_milli
    if task.models != UNKNOWN:
        usable &= pool.fits[task.models][rows]
    return usable


def fitting(task: Task, pool: Pool, rows: Column) -> Column:
    """Places in `rows` of the nodes on which the task fits."""
    fits = (pool.cpus[rows] >= task.cpus) & (pool.memory_mib[rows] >= task.memory_mib)
    if task.gpus:
        fits &= usable_gpus(task, pool, rows).sum(axis=1) >= task.gpus
    return np.flatnonzero(fits)


class BestFit:
    """The node with the least left of CPUs and GPUs; on it the GPU with the least left.

    Upstream then stretches the scores of one task to 0..100, in integers. As at most 100 lie between the
    lowest and the highest, that keeps their order and their ties, and is left out.
    """

    def __init__(self, pool: Pool, tie_rank: Column) -> None:
        self._pool = pool
        self._tie_rank = tie_rank

    def changed(self, node: int) -> None:
        """Nothing is remembered."""

    def best(self, task: Task) -> tuple[int, int] | None:
        """The node, and for a share its GPU."""
        pool = self._pool
        rows = fitting(task, pool, np.arange(len(self._tie_rank)))
        if not len(rows):
            return None
        milli = pool.milli[rows].sum(axis=1) - task.gpus * task.share_milli
        left = (pool.cpus[rows] - task.cpus) / CPU_MILLI_MAX * 0.5 + milli / GPU_MILLI_MAX * 0.5
        score = ((1.0 - left) * SCORE_MAX).astype(np.int64)
        rows = rows[score == score.max()]
        node = int(rows[self._tie_rank[rows].argmin()])
        if task.gpus == 0 or task.share_milli == WHOLE_MILLI:
            return node, NO_POSITION
        usable = usable_gpus(task, pool, np.array([node]))[0]
        return node, int(np.where(usable, pool.milli[node], WHOLE_MILLI + 1).argmin())


class Fgd:
    """The node, and for a share the GPU, where the expected fragment grows least.

    Scores are kept by task and renewed where a node has changed; that changes no result.
    """

    def __init__(self, pool: Pool, tie_rank: Column, tasks: Sequence[Task], specs: Sequence[str]) -> None:
        typical, self._frequency = typical_tasks(tasks, specs)
        self._pool = pool
        self._tie_rank = tie_rank
        self._cpus = np.array([task.cpus for task in typical])[:, None]
        self._share_milli = np.array([task.share_milli for task in typical])[:, None]
        self._gpus = np.array([task.gpus for task in typical])[:, None]
        self._no_gpu = self._gpus == 0
        nodes = len(tie_rank)
        self._accepts = np.array(
            [
                np.ones(nodes, bool) if task.models == UNKNOWN else pool.fits[task.models].any(axis=1)
                for task in typical
            ]
        )
        self._changes = np.zeros(nodes, np.int64)
        self._last_change = 0
        self._fragment = self._fragments(np.arange(nodes), pool.cpus, pool.milli)
        self._known: dict[Task, tuple[Column, Column, int]] = {}

    def changed(self, node: int) -> None:
        """Renew what is known of the node."""
        self._last_change += 1
        self._changes[node] = self._last_change
        row = np.array([node])
        self._fragment[row] = self._fragments(row, self._pool.cpus[row], self._pool.milli[row])

    def best(self, task: Task) -> tuple[int, int] | None:
        """The node, and for a share its GPU."""
        nodes = len(self._tie_rank)
        scores, positions, at = self._known.get(task) or (
            np.full(nodes, _NOWHERE),
            np.full(nodes, _NOWHERE),
            -1,
        )
        stale = np.flatnonzero(self._changes > at)
        scores[stale], positions[stale] = self._scores(task, stale)
        self._known[task] = (scores, positions, self._last_change)
        if scores.max() == _NOWHERE:
            return None
        rows = np.flatnonzero(scores == scores.max())
        node = int(rows[self._tie_rank[rows].argmin()])
        return node, int(positions[node])

    def _scores(self, task: Task, rows: Column) -> tuple[Column, Column]:
        """Score and GPU position by node."""
        pool = self._pool
        scores, positions = np.full(len(rows), _NOWHERE), np.full(len(rows), NO_POSITION)
        places = fitting(task, pool, rows)
        if not len(places):
            return scores, positions
        rows = rows[places]
        cpus, milli, usable = pool.cpus[rows] - task.cpus, pool.milli[rows], usable_gpus(task, pool, rows)
        if task.gpus and task.share_milli < WHOLE_MILLI:
            node, at = np.nonzero(usable)
            after = milli[node]
            after[np.arange(len(node)), at] -= task.share_milli
            each = np.full(milli.shape, _NOWHERE)
            each[node, at] = self._score(rows[node], cpus[node], after)
            scores[places], positions[places] = each.max(axis=1), each.argmax(axis=1)
            return scores, positions
        taken = usable & (usable.cumsum(axis=1) <= task.gpus)
        scores[places] = self._score(rows, cpus, np.where(taken, 0, milli))
        return scores, positions

    def _score(self, rows: Column, cpus: Column, milli: Column) -> Column:
        gained = (self._fragment[rows] - self._fragments(rows, cpus, milli)) / WHOLE_MILLI
        return (1.0 / (1.0 + np.exp(-gained)) * SCORE_MAX).astype(np.int64)

    def _fragments(self, rows: Column, cpus: Column, milli: Column) -> Column:
        """Expected fragment of each node, in thousandths."""
        parts = range(0, len(rows), _ROWS_MAX)
        return np.concatenate(
            [
                self._fragment_of(*(column[at : at + _ROWS_MAX] for column in (rows, cpus, milli)))
                for at in parts
            ]
            or [np.zeros(0)]
        )

    def _fragment_of(self, rows: Column, cpus: Column, milli: Column) -> Column:
        # Shape (typical tasks, nodes) from here on.
        large = milli >= self._share_milli[:, :, None]
        gpus_fit = large.sum(axis=2) >= self._gpus
        cpus_fit = cpus >= self._cpus
        accepts = self._accepts[:, rows] & ~self._no_gpu
        frequency = self._frequency[:, None]
        whole = frequency * milli.sum(axis=1)
        too_small = frequency * np.where(large, 0, milli).sum(axis=2)
        # As upstream: a sum over the typical tasks by outcome, in their order, then a sum over outcomes.
        outcomes = (
            np.where(accepts & ~gpus_fit & ~cpus_fit, whole, 0.0),
            np.where(accepts & cpus_fit, np.where(gpus_fit, too_small, whole), 0.0),
            np.where(accepts & gpus_fit & ~cpus_fit, whole, 0.0),
            np.where(self._no_gpu & cpus_fit, whole, 0.0),
            np.where(self._no_gpu & ~cpus_fit, whole, 0.0),
            np.where(~accepts & ~self._no_gpu, whole, 0.0),
        )
        fragment = np.zeros(len(rows))
        for outcome in outcomes:
            fragment += outcome.cumsum(axis=0)[-1]  # adds one after the other; sum() would not
        return fragment


def typical_tasks(tasks: Sequence[Task], specs: Sequence[str]) -> tuple[list[Task], Column]:
    """The most frequent tasks that make up TYPICAL_PERCENT of all, memory left aside, and their frequency."""
    counts = Counter(
        (
            task.cpus,
            task.share_milli if task.gpus else 0,
            task.gpus,
            specs[task.models] if task.models >= 0 else "",
        )
        for task in tasks
    )
    ordered = sorted(counts.items(), key=lambda entry: (entry[1], entry[0]), reverse=True)
    typical, frequency, covered = [], [], 0
    for (cpus, share_milli, gpus, spec), count in ordered:
        if covered >= TYPICAL_PERCENT * len(tasks) / 100:
            break
        typical.append(Task(gpus, share_milli, 0, specs.index(spec) if spec else UNKNOWN, cpus, 0))
        frequency.append(count / len(tasks))
        covered += count
    if len(typical) == len(ordered):
        return typical, np.array(frequency)
    return typical, np.array(frequency) / (covered / len(tasks))
