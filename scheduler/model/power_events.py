"""What happens to power, as events of the journal, and the fold that makes the power state of them."""

from dataclasses import dataclass, replace

from scheduler.model.mining import Hashprice
from scheduler.model.power import (
    GRID_EVENTS_OVER_KEPT,
    Baseline,
    BudgetInterval,
    GridEvent,
    LimitKept,
    PowerState,
    ShedState,
)
from scheduler.model.prices import PricePoint, past


@dataclass(frozen=True, slots=True)
class PowerBudgetSet:
    """A client said what the site may draw; no interval: nothing from that source."""

    at_s: float
    intervals: tuple[BudgetInterval, ...]
    valid_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class GridEventAccepted:
    """A grid event was taken on."""

    at_s: float
    event: GridEvent


@dataclass(frozen=True, slots=True)
class GridEventMoved:
    """A grid event began, was met or failed, ended, or was cancelled."""

    at_s: float
    id: str
    to: ShedState
    measured_w: float | None = None
    reasons: tuple[str, ...] = ()
    is_over: bool = False
    baseline: Baseline | None = None  # when its shed began


@dataclass(frozen=True, slots=True)
class GridEventDelayed:
    """While a grid event was in force these jobs were seen to wait for power."""

    at_s: float
    id: str
    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrawRecorded:
    """What the site drew, second by second, up to now; None = no reading of all boards in that second."""

    at_s: float
    first_s: int  # Unix time of the first second
    draw_w: tuple[float | None, ...]
    baseline_w: float | None = None  # what the site would go on drawing, as it was reckoned at `at_s`


@dataclass(frozen=True, slots=True)
class LimitChange:
    """A GPU's limit is about to be set; `found_w` is what it was before anybody here set it."""

    uuid: str
    found_w: float
    limit_w: float


@dataclass(frozen=True, slots=True)
class LimitsDecided:
    """Limits that are set once this is on disk."""

    at_s: float
    limits: tuple[LimitChange, ...]


@dataclass(frozen=True, slots=True)
class LimitsRestored:
    """These GPUs have the limits back that they were found with."""

    at_s: float
    uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrawsLearned:
    """What jobs and classes were seen to draw, per GPU; 0 W = forgotten."""

    at_s: float
    draws_w: dict[str, float]


@dataclass(frozen=True, slots=True)
class BudgetReturns:
    """The budget rose and is given back bit by bit, from these watts on; None: all of it is there."""

    at_s: float
    from_w: float | None
    began_s: float


@dataclass(frozen=True, slots=True)
class PricesSet:
    """What electricity costs from now on; no point: nobody knows, and the price gate is off."""

    at_s: float
    points: tuple[PricePoint, ...]
    source: str = ""  # the file or URL; empty = a client


@dataclass(frozen=True, slots=True)
class HashpricesSet:
    """What hashrate earns from now on; none: mining is worth what the configuration says."""

    at_s: float
    hashprices: tuple[Hashprice, ...]
    source: str = ""  # the file or URL; empty = a client


@dataclass(frozen=True, slots=True)
class HashratesLearned:
    """What jobs and standing jobs have proved to hash, in hashes a second; 0 = forgotten."""

    at_s: float
    hashrates_hs: dict[str, float]


PowerEvent = (
    PowerBudgetSet
    | GridEventAccepted
    | GridEventMoved
    | GridEventDelayed
    | DrawRecorded
    | LimitsDecided
    | LimitsRestored
    | DrawsLearned
    | BudgetReturns
    | PricesSet
    | HashpricesSet
    | HashratesLearned
)


def folded(state: PowerState, event: PowerEvent) -> PowerState:
    """The state after the event."""
    match event:
        case PowerBudgetSet():
            return replace(state, budget=event.intervals, budget_valid_until_s=event.valid_until_s)
        case GridEventAccepted():
            others = tuple(one for one in state.events if one.id != event.event.id)
            return replace(state, events=(*others, event.event))
        case GridEventMoved():
            return _moved(state, event)
        case GridEventDelayed() | DrawRecorded():
            return state
        case LimitsDecided():
            limits = dict(state.limits)
            for change in event.limits:
                limits[change.uuid] = LimitKept(change.found_w, change.limit_w)
            return replace(state, limits=limits)
        case LimitsRestored():
            return replace(
                state, limits={u: kept for u, kept in state.limits.items() if u not in event.uuids}
            )
        case DrawsLearned():
            draws = {name: w for name, w in {**state.draws_w, **event.draws_w}.items() if w}
            return replace(state, draws_w=draws)
        case PricesSet():
            before = past(state.prices_past, state.prices, event.at_s)
            return replace(state, prices=event.points, prices_from=event.source, prices_past=before)
        case HashpricesSet():
            return replace(state, hashprices=event.hashprices, hashprices_from=event.source)
        case HashratesLearned():
            hashrates = {name: hs for name, hs in {**state.hashrates_hs, **event.hashrates_hs}.items() if hs}
            return replace(state, hashrates_hs=hashrates)
        case BudgetReturns():
            return replace(state, returned_from_w=event.from_w, return_began_s=event.began_s)


def _moved(state: PowerState, event: GridEventMoved) -> PowerState:
    events = [_event_moved(one, event) if one.id == event.id else one for one in state.events]
    over = [one for one in events if not one.binds][:-GRID_EVENTS_OVER_KEPT]
    return replace(state, events=tuple(one for one in events if one not in over))


def _event_moved(one: GridEvent, event: GridEventMoved) -> GridEvent:
    if event.is_over:
        return replace(one, state=event.to, is_over=True, ended_s=event.at_s)
    if event.to is ShedState.CANCELLED:
        return replace(one, state=event.to, ended_s=event.at_s)
    if event.to is ShedState.SHEDDING:
        return replace(one, state=event.to, shed_began_s=event.at_s)
    return replace(
        one, state=event.to, shed_ended_s=event.at_s, measured_w=event.measured_w, reasons=event.reasons
    )
