"""Power as values: budgets and grid events, limits that we set, and what a plan sees of them.

Watts of the site (budgets, events) contain what is not GPU boards: `(boards + base_w) x PUE`. A plan knows
boards only, in whole watts, so that choices compare integers.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from scheduler.model.mining import Hashprice
from scheduler.model.prices import PricePoint

# A curve's point: part of the natural draw, and the part of the work that is done at it.
CurvePoint = tuple[float, float]
# Intervals of a budget and grid events that are kept at a time: a year of days, and then some.
BUDGET_INTERVALS_MAX = 1024
GRID_EVENTS_MAX = 256
GRID_EVENTS_OVER_KEPT = 64
# An event that lasts longer is a standing limit, such as a subscription: its report ends here.
GRID_EVENT_REPORTED_S = 86_400.0
_MILLI = 1000
# A plan's budget where nobody sets one: more than the boards of any site draw.
UNLIMITED_W = 1_000_000_000


class ShedState(StrEnum):
    """Where a grid event stands."""

    SCHEDULED = "SCHEDULED"
    SHEDDING = "SHEDDING"  # in force; the measured draw is not there yet
    MET = "MET"  # in force, and measured at or below its watts
    FAILED = "FAILED"  # in force, time is up, and the measured draw is above
    CANCELLED = "CANCELLED"


class BudgetKind(StrEnum):
    """Where a budget comes from."""

    CONFIGURED = "CONFIGURED"
    REQUESTED = "REQUESTED"  # SetPowerBudget
    SAFE = "SAFE"  # the declared level, while the signal of a source is lost
    GRID_EVENT = "GRID_EVENT"
    EMERGENCY = "EMERGENCY"


class LimitCause(StrEnum):
    """Why a GPU's power limit is where it is."""

    FOUND = "FOUND"  # as it was found, or back there
    NATURAL = "NATURAL"  # what its job draws by nature, and a margin
    OPERATING_POINT = "OPERATING_POINT"  # its miner earns most there
    SHED = "SHED"  # it gives up watts for the budget


@dataclass(frozen=True, slots=True)
class BudgetInterval:
    """What the site may draw from `start_s` until `end_s`; None = until it is replaced."""

    start_s: float
    end_s: float | None
    budget_w: float


@dataclass(frozen=True, slots=True)
class GridEvent:
    """A grid's call for less: the site draws at most `budget_w` from `start_s` until `end_s`."""

    id: str
    start_s: float
    end_s: float
    budget_w: float
    emergency: bool
    accepted_s: float
    received_s: float | None = None  # when it came; it was accepted with the transaction after that
    # What the plan could reach at best when the event came, and why not less.
    floor_w: float = 0.0
    state: ShedState = ShedState.SCHEDULED
    # Of its shed: when it began, when it was met or given up, at which measured watts, what was in the way.
    shed_began_s: float | None = None
    shed_ended_s: float | None = None
    measured_w: float | None = None
    reasons: tuple[str, ...] = ()
    is_over: bool = False
    ended_s: float | None = None  # when it was over, or cancelled

    @property
    def binds(self) -> bool:
        """Whether it still has a say: neither over nor cancelled."""
        return not self.is_over and self.state is not ShedState.CANCELLED


@dataclass(frozen=True, slots=True)
class BaselineJob:
    """A job that holds GPUs, and what it draws: in watts of its boards."""

    job_id: str
    job_class: str
    gpus: tuple[str, ...]
    draw_w: float | None  # None = a board of its has not been read since it came


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the site would go on drawing, were nothing shed: all that runs or is admitted, as measured.

    Each board counts with its mean over the last minute, or since who holds it now came.
    """

    at_s: float
    site_w: float | None  # None = a board has no reading
    jobs: tuple[BaselineJob, ...] = ()
    idle_w: float = 0.0  # of the boards that nobody holds
    base_w: float = 0.0
    pue: float = 1.0
    limits_w: dict[str, float] = field(default_factory=dict)  # in force, by UUID
    pending: int = 0  # jobs that wait


@dataclass(frozen=True, slots=True)
class LimitKept:
    """A GPU's power limit: as it was found, and as we set it."""

    found_w: float
    set_w: float


@dataclass(frozen=True, slots=True)
class Source:
    """A budget that could bind now."""

    kind: BudgetKind
    budget_w: float
    until_s: float | None
    name: str = ""  # the event's id


@dataclass(frozen=True, slots=True)
class PowerState:
    """What outlives a restart of the daemon."""

    budget: tuple[BudgetInterval, ...] = ()
    budget_valid_until_s: float | None = None  # the signal is lost from then on; None = it can't be lost
    events: tuple[GridEvent, ...] = ()
    limits: dict[str, LimitKept] = field(default_factory=dict)  # by UUID
    draws_w: dict[str, float] = field(default_factory=dict)  # learned: by job id, or "CLASS model"
    # A budget that rose is given back bit by bit from here on; None: nothing is being given back.
    returned_from_w: float | None = None
    return_began_s: float = 0.0
    prices: tuple[PricePoint, ...] = ()
    prices_from: str = ""  # the file or URL; empty = a client set them
    prices_past: tuple[PricePoint, ...] = ()  # that were known for the time before those, each with its end
    hashprices: tuple[Hashprice, ...] = ()
    hashprices_from: str = ""
    hashrates_hs: dict[str, float] = field(default_factory=dict)  # proved: by job id, or standing job


@dataclass(frozen=True, slots=True)
class Curve:
    """Work against draw as thousandths of the natural ones, the larger draw first; (1000, 1000) is first.

    Below its last point nothing is known, and no plan goes there.
    """

    points: tuple[tuple[int, int], ...]

    def work_milli(self, draw_milli: int) -> int:
        """The work that is done at a draw, between the points in proportion; at the ends as there."""
        higher = self.points[0]
        for point in self.points:
            if draw_milli >= point[0]:
                if point == higher:
                    return point[1]
                rise = (draw_milli - point[0]) * (higher[1] - point[1])
                return point[1] + rise // (higher[0] - point[0])
            higher = point
        return self.points[-1][1]

    @property
    def least_milli(self) -> int:
        """The least draw of which something is known."""
        return self.points[-1][0]


def curve_of(points: tuple[CurvePoint, ...]) -> Curve:
    """A configured curve in thousandths."""
    return Curve(tuple((round(draw * _MILLI), round(work * _MILLI)) for draw, work in points))


def draw_w(natural_w: float, limit_w: float, clock_w: float | None = None) -> float:
    """What a board draws: the least of what its job would, its limit, and what a lowered clock allows."""
    return min(natural_w, limit_w) if clock_w is None else min(natural_w, limit_w, clock_w)


@dataclass(frozen=True, slots=True)
class PowerOutlook:
    """What a plan reckons with, in whole watts of boards."""

    budget_w: int
    committed_w: int  # now: limits of occupied GPUs, as they are in force, and idle draw of the others
    planned_w: int  # once limits are set and whoever stops has gone
    floor_w: int  # at best
    # Value lost for each Wh that is not there, at the margin: micro-USD.
    shadow_microusd_per_wh: float = 0.0
