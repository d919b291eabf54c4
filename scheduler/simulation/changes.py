"""What happens to a world of `worlds.py` between two ticks: its plan is carried out, and then things change.

Rows of jobs stay in the order of their numbers.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np

from scheduler.model.actions import (
    FailJob,
    Plan,
    PreemptJob,
    RequeueJob,
    ResumeJob,
    SetPowerLimit,
    StartJob,
    StopJob,
    SuspendJob,
)
from scheduler.model.policy import Policy
from scheduler.model.snapshot import (
    PENDING,
    PREEMPTING,
    RUNNING,
    STARTING,
    STOPPING,
    UNKNOWN,
    HoldingColumns,
    JobColumns,
    Snapshot,
)
from scheduler.planning.arrays import on_backend
from scheduler.planning.planner import Memo, plan
from scheduler.simulation.worlds import SECOND_US, VALUE_PERCENT_RANGE, Columns, pending

SETTLING_S_MAX = 60


def carried_out(snapshot: Snapshot, plan: Plan) -> Snapshot:
    """The world right after every action of the plan was performed."""
    jobs = _columns(snapshot.jobs)
    starts = [action for action in plan.actions if isinstance(action, StartJob)]
    ends = [action.job for action in plan.actions if isinstance(action, FailJob)]
    for action in plan.actions:
        if isinstance(action, SetPowerLimit | SuspendJob | ResumeJob):
            continue  # these worlds have no power
        row = _row(jobs, action.job)
        match action:
            case StartJob(node=node):
                jobs["state"][row], jobs["node"][row] = STARTING, node
            case PreemptJob(preemptor=preemptor):
                jobs["state"][row], jobs["preemptor"][row] = PREEMPTING, preemptor
                jobs["stop_us"][row] = snapshot.now_us
            case RequeueJob():
                jobs["state"][row], jobs["stop_us"][row] = PREEMPTING, snapshot.now_us
            case StopJob():
                jobs["state"][row], jobs["stop_us"][row] = STOPPING, snapshot.now_us
            case FailJob():
                jobs["state"][row] = UNKNOWN
    holdings = _with_starts(snapshot, jobs, starts)
    return _without(
        snapshot, jobs, holdings, np.array([_row(jobs, number) for number in ends], dtype=np.int64)
    )


def changed(snapshot: Snapshot, changes: int, random: np.random.Generator) -> Snapshot:
    """The world a second later: so many changes, and what was starting runs.

    A third of the changes are ends of live jobs, a third arrivals, the rest waiting jobs whose value changes,
    each as far as there are such jobs; arrivals make up the number.
    """
    now_us, jobs = snapshot.now_us + SECOND_US, _a_second_later(snapshot)
    ends = _some(random, np.flatnonzero(jobs["state"] != PENDING), changes // 3)
    revalued = _some(random, np.flatnonzero(jobs["state"] == PENDING), changes // 3)
    percent = random.integers(*VALUE_PERCENT_RANGE, len(revalued))
    jobs["value"][revalued] = jobs["value"][revalued] * percent // 100
    first = int(jobs["number"].max(initial=0)) + 1
    arrivals = changes - len(ends) - len(revalued)
    come = pending(random, np.arange(first, first + arrivals, dtype=np.int64), now_us)
    jobs = {name: np.concatenate((column, come[name])) for name, column in jobs.items()}
    return _without(replace(snapshot, now_us=now_us), jobs, _columns(snapshot.holdings), ends)


def settled(snapshot: Snapshot, policy: Policy) -> Snapshot:
    """The world once a plan asks for nothing: each is carried out, and a second later who had to go is gone.

    After SETTLING_S_MAX it is taken as it is.
    """
    memo = Memo()
    for _ in range(SETTLING_S_MAX):
        made = plan(on_backend(snapshot), policy, memo)
        if not made.actions:
            break
        snapshot = _gone(carried_out(snapshot, made))
    return snapshot


def held_gpus(snapshot: Snapshot) -> int:
    """How many GPUs somebody holds, even in part or while leaving."""
    return len(np.unique(snapshot.holdings.gpu))


def _gone(snapshot: Snapshot) -> Snapshot:
    """The world a second later: who was told to stop has ended, or waits again, and all is handed over."""
    jobs, holdings = _a_second_later(snapshot), _columns(snapshot.holdings)
    waits_again = jobs["state"] == PREEMPTING
    jobs["state"][waits_again] = PENDING
    for name in ("node", "started_us", "checkpoint_us", "stop_us", "preemptor"):
        jobs[name][waits_again] = UNKNOWN
    held = holdings["job"] != UNKNOWN
    held[held] = ~waits_again[holdings["job"][held]]
    holdings = {name: column[held] for name, column in holdings.items()}
    ends = np.flatnonzero(jobs["state"] == STOPPING)
    return _without(replace(snapshot, now_us=snapshot.now_us + SECOND_US), jobs, holdings, ends)


def _a_second_later(snapshot: Snapshot) -> Columns:
    """The columns of its jobs: what was starting runs."""
    jobs = _columns(snapshot.jobs)
    starting = jobs["state"] == STARTING
    jobs["state"][starting], jobs["started_us"][starting] = RUNNING, snapshot.now_us + SECOND_US
    return jobs


def _with_starts(snapshot: Snapshot, jobs: Columns, starts: list[StartJob]) -> Columns:
    """The holdings, and those of the jobs that start."""
    row_of = {uuid: row for row, uuid in enumerate(snapshot.gpus.uuid)}
    job = np.array([_row(jobs, start.job) for start in starts for _ in start.gpus], dtype=np.int64)
    gpu = np.array([row_of[uuid] for start in starts for uuid in start.gpus], dtype=np.int64)
    none = np.full(len(job), UNKNOWN, dtype=np.int64)
    added = {
        "job": job,
        "gpu": gpu,
        "share_milli": jobs["share_milli"][job],
        "memory_mib": jobs["gpu_memory_mib"][job],
        "preemptor": none,
        "stop_us": none,
    }
    holdings = _columns(snapshot.holdings)
    return {name: np.concatenate((column, added[name])) for name, column in holdings.items()}


def _without(snapshot: Snapshot, jobs: Columns, holdings: Columns, ends: Any) -> Snapshot:
    """The world with these columns, without the jobs at the rows `ends` and what they hold."""
    stays = np.ones(len(jobs["number"]), dtype=bool)
    stays[ends] = False
    row_after = np.cumsum(stays) - 1
    held = (holdings["job"] == UNKNOWN) | stays[holdings["job"]]
    holdings = {name: column[held] for name, column in holdings.items()}
    holdings["job"] = np.where(holdings["job"] == UNKNOWN, UNKNOWN, row_after[holdings["job"]])
    return replace(
        snapshot,
        jobs=JobColumns(**{name: column[stays] for name, column in jobs.items()}),
        holdings=HoldingColumns(**holdings),
    )


def _columns(record: JobColumns | HoldingColumns) -> Columns:
    """Copies of all columns by name."""
    return {column.name: getattr(record, column.name).copy() for column in fields(record)}


def _row(jobs: Columns, number: int) -> int:
    return int(np.searchsorted(jobs["number"], number))


def _some(random: np.random.Generator, rows: Any, count: int) -> Any:
    """So many of the rows, or all where there are fewer."""
    return np.sort(random.permutation(rows)[:count])
