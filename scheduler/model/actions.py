"""What a plan orders, each with its reason; and the plan."""

from dataclasses import dataclass, field
from typing import Any

from scheduler.model.power import PowerOutlook
from scheduler.model.reasons import Reason


@dataclass(frozen=True, slots=True)
class StartJob:
    """Start a pending job on these GPUs (UUIDs; none for a CPU-only job)."""

    job: int  # number
    gpus: tuple[str, ...]
    reason: Reason  # STARTED_ON_FREE_GPUS, STARTED_AFTER_PREEMPTION, BACKFILLED
    node: int = 0  # row of the snapshot's nodes


@dataclass(frozen=True, slots=True)
class PreemptJob:
    """A live job must give way to another: notice, grace, end."""

    job: int
    preemptor: int
    reason: Reason
    lost_gpu_ms: int  # GPU-milliseconds of work that the plan reckons lost
    loss_microusd: int


@dataclass(frozen=True, slots=True)
class StopJob:
    """A live job must end for its own sake: time limit, deadline."""

    job: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class RequeueJob:
    """A live job must give way for the node's sake (drain): it is requeued."""

    job: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class FailJob:
    """A pending job can't succeed any more."""

    job: int
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SetPowerLimit:
    """A board's limit changes; those that fall come before those that rise."""

    gpu: str  # UUID
    limit_w: int
    reason: Reason  # POWER_LIMIT_LOWERED, POWER_LIMIT_RAISED


@dataclass(frozen=True, slots=True)
class SuspendJob:
    """A running job is frozen where it is, for its watts."""

    job: int
    reason: Reason  # SHED_FOR_POWER, SHED_IN_EMERGENCY


@dataclass(frozen=True, slots=True)
class ResumeJob:
    """A job that was frozen, or told to be, runs again."""

    job: int
    reason: Reason  # RESUMED_AFTER_SHED


JobAction = StartJob | PreemptJob | StopJob | RequeueJob | FailJob | SuspendJob | ResumeJob
Action = JobAction | SetPowerLimit


@dataclass(frozen=True, slots=True)
class Wait:
    """Why pending jobs wait: parallel arrays over the snapshot's pending rows."""

    numbers: Any  # int64, shape (pending,)
    reasons: Any  # int64, index into WAIT_REASONS


# The reasons a pending job can wait for, in the order of the codes in `Wait.reasons`.
WAIT_REASONS: tuple[Reason, ...] = (
    Reason.BACKING_OFF,
    Reason.NODE_DRAINING,
    Reason.NO_SUITABLE_GPU,
    Reason.WAITING_FOR_GPUS,
    Reason.WAITING_FOR_GPU_MEMORY,
    Reason.WAITING_FOR_CPUS,
    Reason.WAITING_FOR_MEMORY,
    Reason.WAITING_FOR_HANDOVER,
    Reason.WAITING_FOR_PROMISED_START,
    Reason.WAITING_FOR_START_SLOT,
    Reason.WAITING_FOR_POWER,
    Reason.WAITING_FOR_PRICE,
)


@dataclass(frozen=True, slots=True)
class Promise:
    """The start that the highest blocked job can count on, from declared run times."""

    job: int
    start_us: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, why the rest waits, and when time alone could change the answer."""

    actions: tuple[Action, ...]
    waits: Wait
    promise: Promise | None = None
    wake_us: int | None = None
    # Whose stop each waiting job is counting on: preemptor -> victims still leaving.
    awaited: dict[int, tuple[int, ...]] = field(default_factory=dict)
    power: PowerOutlook | None = None  # None: nobody sets a budget
