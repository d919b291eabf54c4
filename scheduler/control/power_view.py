"""The node's power as somebody who looks at it sees it."""

from dataclasses import dataclass

from scheduler.model.power import LimitCause, Source


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
