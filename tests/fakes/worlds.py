"""Small worlds in plain values for tests of the planner, and what a plan makes of them."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from scheduler.model import snapshot as columns
from scheduler.model.actions import (
    WAIT_REASONS,
    Action,
    FailJob,
    Plan,
    PreemptJob,
    Promise,
    RequeueJob,
    ResumeJob,
    SetPowerLimit,
    StartJob,
    StopJob,
    SuspendJob,
)
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import GpuColumns, HoldingColumns, JobColumns, NodeColumns, Snapshot

NOW_US = 1_700_000_000_000_000
SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
UNKNOWN = -1

INFERENCE, TRAINING, BATCH, MINING = range(4)
PENDING, STARTING, RUNNING, SUSPENDED, PREEMPTING, STOPPING = (
    "PENDING",
    "STARTING",
    "RUNNING",
    "SUSPENDED",
    "PREEMPTING",
    "STOPPING",
)
STATES = (PENDING, STARTING, RUNNING, SUSPENDED, PREEMPTING, STOPPING)


class Short:
    """Shows only what differs from the defaults, as code."""

    def __repr__(self) -> str:
        said = [
            f"{f.name}={value!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) != f.default
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # how Hypothesis asks for it
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class J(Short):
    """A job. `on`: UUIDs of the GPUs that a live one holds; `node` is where a live one runs."""

    number: int
    job_class: int = TRAINING
    state: str = PENDING
    on: tuple[str, ...] = ()
    priority: int = 500
    value: int = 2_000_000
    gpus: int = 1
    share_milli: int = 1000
    gpu_memory_mib: int = 0
    models: tuple[str, ...] = ()
    cpus: int = 0
    memory_mib: int = 0
    preemptible: bool = True
    eligible_us: int = 0
    min_runtime_us: int = 0
    grace_us: int = 10 * SECOND_US
    restart_loss_us: int = 0
    expected_us: int = UNKNOWN
    deadline_us: int = UNKNOWN
    time_limit_us: int = UNKNOWN
    started_us: int = UNKNOWN
    checkpoint_us: int = UNKNOWN
    node: int = UNKNOWN
    preemptor: int = UNKNOWN
    stop_us: int = UNKNOWN
    energy_cost: int = 0  # micro-USD per GPU-hour; counts where the world has a price

    @property
    def is_live(self) -> bool:
        return self.state != PENDING


@dataclass(frozen=True, repr=False)
class G(Short):
    uuid: str
    index: int = 0
    node: int = 0
    memory_mib: int = 80_000
    model: str = "H100"
    is_open: bool = True
    island: int = UNKNOWN
    switch: int = UNKNOWN
    numa: int = UNKNOWN
    instance: bool = False


@dataclass(frozen=True, repr=False)
class N(Short):
    cpus: int = 64
    memory_mib: int = 1_000_000
    live_jobs_max: int = 100
    drain: int = columns.NOT_DRAINING


@dataclass(frozen=True, repr=False)
class HandOver(Short):
    """What an ended job still occupies of a GPU."""

    uuid: str
    share_milli: int = 1000
    memory_mib: int = 0
    preemptor: int = UNKNOWN
    stop_us: int = UNKNOWN


@dataclass(frozen=True, repr=False)
class W(Short):
    jobs: tuple[J, ...] = ()
    gpus: tuple[G, ...] = ()
    nodes: tuple[N, ...] = (N(),)
    handovers: tuple[HandOver, ...] = ()
    now_us: int = NOW_US
    has_price: bool = False
    # Sets of models in the order of their rows in `model_fits`; the jobs' own are appended.
    model_sets: tuple[tuple[str, ...], ...] = field(default=((),))

    def job(self, number: int) -> J:
        return next(job for job in self.jobs if job.number == number)

    def gpu(self, uuid: str) -> G:
        return next(gpu for gpu in self.gpus if gpu.uuid == uuid)

    def with_jobs(self, *jobs: J) -> "W":
        return replace(self, jobs=(*self.jobs, *jobs))


def gpus(count: int, **others: Any) -> tuple[G, ...]:
    """GPU-0, GPU-1, ... of one node."""
    return tuple(G(uuid=f"GPU-{index}", index=index, **others) for index in range(count))


def running(number: int, *on: str, ran_s: float = 3600, **others: Any) -> J:
    """A job that has run for `ran_s` on these GPUs of node 0."""
    said = {"state": RUNNING, "gpus": len(on), "node": 0, "started_us": NOW_US - round(ran_s * SECOND_US)}
    return J(number, on=on, **{**said, **others})


def snapshot(world: W) -> Snapshot:
    """The world as the planner sees it."""
    models = sorted({gpu.model for gpu in world.gpus})
    sets = list(dict.fromkeys([*world.model_sets, *(job.models for job in world.jobs)]))
    fits = [[not models or gpu.model in models for gpu in world.gpus] for models in sets]
    holdings = [
        (row, world.gpus.index(world.gpu(uuid)), job.share_milli, job.gpu_memory_mib, UNKNOWN, UNKNOWN)
        for row, job in enumerate(world.jobs)
        for uuid in job.on
    ]
    holdings += [
        (UNKNOWN, world.gpus.index(world.gpu(h.uuid)), h.share_milli, h.memory_mib, h.preemptor, h.stop_us)
        for h in world.handovers
    ]
    jobs, gross = world.jobs, None
    if world.has_price:
        gross = _ints(job.value for job in jobs)
        jobs = tuple(replace(job, value=job.value - job.energy_cost) for job in jobs)
    return Snapshot(
        now_us=world.now_us,
        jobs=_job_columns(jobs, sets),
        gross_value=gross,
        gpus=GpuColumns(
            tuple(gpu.uuid for gpu in world.gpus),
            *(_ints(getattr(gpu, name) for gpu in world.gpus) for name in ("index", "node", "memory_mib")),
            _ints(columns.OPEN if gpu.is_open else columns.CLOSED for gpu in world.gpus),
            *(_ints(getattr(gpu, name) for gpu in world.gpus) for name in ("island", "switch", "numa")),
            _ints(models.index(gpu.model) for gpu in world.gpus),
            np.array([gpu.instance for gpu in world.gpus], dtype=bool),
        ),
        nodes=NodeColumns(
            *(_ints(getattr(node, name.name) for node in world.nodes) for name in fields(NodeColumns))
        ),
        holdings=HoldingColumns(*np.array(holdings, dtype=np.int64).reshape(-1, 6).T),
        model_fits=np.array(fits, dtype=bool).reshape(len(sets), len(world.gpus)),
    )


def applied(world: W, plan: Plan) -> W:
    """The world right after every action of the plan was performed."""
    jobs = {job.number: job for job in world.jobs}
    for action in plan.actions:
        if isinstance(action, SetPowerLimit):
            continue  # `power.py` beside this one has them
        job = jobs[action.job]
        match action:
            case StartJob(gpus=on, node=node):
                assert job.state == PENDING
                assert not on or node == min(world.gpu(uuid).node for uuid in on)
                jobs[job.number] = replace(job, state=STARTING, on=on, node=node)
            case PreemptJob(preemptor=preemptor):
                assert job.state in (STARTING, RUNNING, SUSPENDED)
                jobs[job.number] = replace(job, state=PREEMPTING, preemptor=preemptor, stop_us=world.now_us)
            case RequeueJob():
                jobs[job.number] = replace(job, state=PREEMPTING, stop_us=world.now_us)
            case StopJob():
                jobs[job.number] = replace(job, state=STOPPING, stop_us=world.now_us)
            case SuspendJob():
                assert job.state in (RUNNING, SUSPENDED)
                jobs[job.number] = replace(job, state=SUSPENDED)
            case ResumeJob():
                assert job.state in (RUNNING, SUSPENDED)
                jobs[job.number] = replace(job, state=RUNNING)
            case FailJob():
                assert job.state == PENDING
                del jobs[job.number]
    return replace(world, jobs=tuple(jobs.values()))


def _job_columns(jobs: tuple[J, ...], sets: list[tuple[str, ...]]) -> JobColumns:
    special = {"state": lambda job: STATES.index(job.state), "models": lambda job: sets.index(job.models)}
    arrays = {
        column.name: np.array(
            [special.get(column.name, lambda job, name=column.name: getattr(job, name))(job) for job in jobs],
            dtype=bool if column.name == "preemptible" else np.int64,
        )
        for column in fields(JobColumns)
    }
    return JobColumns(**arrays)


def _ints(values: Any) -> Any:
    return np.array(list(values), dtype=np.int64)


@dataclass(frozen=True)
class Outcome:
    """A whole plan as values that compare."""

    actions: tuple[Action, ...] = ()
    waits: dict[int, Reason] = field(default_factory=dict)
    promise: Promise | None = None
    wake_us: int | None = None
    awaited: dict[int, tuple[int, ...]] = field(default_factory=dict)


def outcome(plan: Plan) -> Outcome:
    """What a plan says."""
    waits = zip(plan.waits.numbers.tolist(), plan.waits.reasons.tolist(), strict=True)
    reasons = {number: WAIT_REASONS[code] for number, code in waits}
    return Outcome(plan.actions, reasons, plan.promise, plan.wake_us, plan.awaited)
