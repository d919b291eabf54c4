"""Small worlds with power: what boards and jobs draw, and what becomes of it when a plan is carried out."""

from dataclasses import dataclass, field, fields, replace

import numpy as np

from scheduler.model.actions import FailJob, Plan, SetPowerLimit, StartJob, SuspendJob
from scheduler.model.power import Curve
from scheduler.model.snapshot import PowerColumns, Snapshot
from scheduler.planning.arrays import on_backend
from tests.fakes import worlds
from tests.fakes.worlds import HOUR_US, UNKNOWN, Short, W

CURVE = Curve(((1000, 1000), (900, 970), (700, 850)))


@dataclass(frozen=True, repr=False)
class B(Short):
    """A board, in watts; `measured_w` UNKNOWN = not read since it came free."""

    idle_w: int = 70
    limit_w: int = 700
    limit_w_min: int = 200
    limit_w_max: int = 700
    measured_w: int = UNKNOWN


@dataclass(frozen=True, repr=False)
class P(Short):
    """A world with power. Boards by UUID and natural draws by job number; who is not named is as `B` says,
    and draws nobody knows what."""

    world: W = field(default_factory=W)
    budget_w: int = 10_000
    boards: dict[str, B] = field(default_factory=dict)
    natural_w: dict[int, int] = field(default_factory=dict)
    promised_w: int | None = None
    promised_us: int = UNKNOWN
    is_emergency: bool = False
    limits_inference: bool = False
    margin_milli: int = 100
    lead_milli: int = 0
    curve: Curve = CURVE
    horizon_us: int = HOUR_US
    best_w: dict[int, int] = field(default_factory=dict)  # by number of a miner that earns most at less
    frozen_w: dict[int, int] = field(default_factory=dict)  # by number of who may be frozen
    suspend_us: dict[int, int] = field(default_factory=dict)  # by number: since when it is to be frozen

    def board(self, uuid: str) -> B:
        return self.boards.get(uuid, B())

    def with_limits(self, limits_w: dict[str, int]) -> "P":
        boards = {uuid: replace(self.board(uuid), limit_w=watts) for uuid, watts in limits_w.items()}
        return replace(self, boards={**self.boards, **boards})


def snapshot(power: P) -> Snapshot:
    """The world as the planner sees it."""
    boards = [power.board(gpu.uuid) for gpu in power.world.gpus]
    natural = [power.natural_w.get(job.number, UNKNOWN) for job in power.world.jobs]
    columns = PowerColumns(
        budget_w=power.budget_w,
        promised_w=power.promised_w,
        promised_us=power.promised_us,
        is_emergency=power.is_emergency,
        horizon_us=power.horizon_us,
        margin_milli=power.margin_milli,
        lead_milli=power.lead_milli,
        limits_inference=power.limits_inference,
        curves=(power.curve,) * 4,
        natural_w=np.array(natural, dtype=np.int64),
        **{
            name: np.array(
                [getattr(power, name).get(job.number, UNKNOWN) for job in power.world.jobs], dtype=np.int64
            )
            for name in ("best_w", "frozen_w", "suspend_us")
        },
        **{f.name: np.array([getattr(b, f.name) for b in boards], dtype=np.int64) for f in fields(B)},
    )
    return replace(worlds.snapshot(power.world), power=on_backend(columns))


def limits(plan: Plan) -> dict[str, int]:
    """The limits that a plan sets, by UUID."""
    return {action.gpu: action.limit_w for action in plan.actions if isinstance(action, SetPowerLimit)}


def applied(power: P, plan: Plan) -> P:
    """The world right after every action of the plan was performed and every board and tree has answered."""
    suspend_us = dict(power.suspend_us)
    for action in plan.actions:
        if isinstance(action, SuspendJob):
            suspend_us[action.job] = power.world.now_us
        elif not isinstance(action, SetPowerLimit | StartJob | FailJob):
            suspend_us.pop(action.job, None)  # it runs again, or was told to go
    world = worlds.applied(power.world, plan)
    return replace(power, world=world, suspend_us=suspend_us).with_limits(limits(plan))
