"""The node's power as somebody who looks at it sees it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.control.limits import SAME_W
from scheduler.model.gpus import GpuIdentity
from scheduler.model.power import LimitCause, Source
from scheduler.model.snapshot import UNKNOWN

if TYPE_CHECKING:
    from scheduler.control.loop import Controller


@dataclass(frozen=True, slots=True)
class GpuPowerView:
    """A board, in its own watts. None = not known, or never set by us."""

    uuid: str
    index: int
    draw_w: float | None
    limit_w: float
    limit_w_min: float
    limit_w_max: float
    limit_w_found: float | None
    refusal: str
    cause: LimitCause | None


@dataclass(frozen=True, slots=True)
class PowerView:
    """The site, in its watts. None = no budget; or not known, as a board has no fresh reading."""

    budget_w: float | None
    sources: tuple[Source, ...]
    draw_w: float | None
    committed_w: float
    floor_w: float
    shadow_microusd_per_wh: float
    gpus: tuple[GpuPowerView, ...]


def limit_cause(control: "Controller", gpu: GpuIdentity) -> LimitCause | None:
    """Why the board's limit is where it is; None where the job that it was set for has gone."""
    power = control.power
    kept, now_w = control.ledger.power.limits.get(gpu.uuid), power.limits.in_force_w(gpu)
    if kept is None or now_w >= kept.found_w - SAME_W:
        return LimitCause.FOUND
    held = control.board.holders(gpu.uuid)
    if not held:
        return None
    point_w = power.points.held_w.get(held[0].number, UNKNOWN) if len(held) == 1 else UNKNOWN
    if point_w != UNKNOWN:
        return LimitCause.OPERATING_POINT if now_w >= point_w - SAME_W else LimitCause.SHED
    natural_w = sum(power.draws.natural_w(job) or kept.found_w for job in held)
    full_w = natural_w * (1.0 + control.config.power.margin_ratio)
    return LimitCause.NATURAL if now_w >= min(full_w, kept.found_w) - SAME_W else LimitCause.SHED
