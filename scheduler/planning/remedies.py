"""What would have to change for a waiting job to be served: the smallest change of each kind.

A remedy is offered only if a plan of the changed world serves the job.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from scheduler.model.jobs import JobClass
from scheduler.model.policy import PRIORITY_MAX
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import CLOSED, NOT_DRAINING, OPEN, PENDING, UNKNOWN, Snapshot
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.case import Case
from scheduler.planning.planner import Planner

# Changes that are tried one by one, where a search by halves could miss one.
TRIED_MAX = 32


class RemedyKind(StrEnum):
    """What could be changed."""

    CLEAR_BACKOFF = "CLEAR_BACKOFF"
    UNDRAIN_NODE = "UNDRAIN_NODE"
    OPEN_GPUS = "OPEN_GPUS"  # amount: how many of the closed ones
    FEWER_GPUS = "FEWER_GPUS"  # amount: the most that would do
    LESS_GPU_MEMORY = "LESS_GPU_MEMORY"  # amount: the most MiB that would do
    FEWER_CPUS = "FEWER_CPUS"
    LESS_MEMORY = "LESS_MEMORY"
    ANY_MODEL = "ANY_MODEL"
    HIGHER_PRIORITY = "HIGHER_PRIORITY"  # amount: the least that would do
    HIGHER_VALUE = (
        "HIGHER_VALUE"  # amount: the least micro-USD per GPU-hour that would do, energy not taken off
    )
    CHEAPER_ENERGY = "CHEAPER_ENERGY"  # amount: the most micro-USD per GPU-hour for its energy that would do
    HIGHER_CLASS = "HIGHER_CLASS"  # amount: the lowest class that would do
    BE_PREEMPTIBLE = "BE_PREEMPTIBLE"
    SHORTER_DURATION = "SHORTER_DURATION"  # amount: the longest declared duration in µs that would do
    MORE_POWER = "MORE_POWER"  # amount: the fewest watts of boards more that would do
    LESS_DRAW = "LESS_DRAW"  # amount: the most watts per GPU that would do


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change that would get the job served in the next plan."""

    kind: RemedyKind
    amount: int = 0


def remedies(case: Case) -> list[Remedy]:
    """The smallest change of each kind that would get the job served at once or after a hand-over."""
    if case.reason is Reason.BACKING_OFF:
        return [Remedy(RemedyKind.CLEAR_BACKOFF)] if _served(case, eligible_us=0) else []
    if case.reason is Reason.NODE_DRAINING:
        return [Remedy(RemedyKind.UNDRAIN_NODE)] if _is_served(_undrained(case), case) else []
    if case.reason is Reason.WAITING_FOR_PRICE:
        return [remedy for look in (_cheaper_energy, _higher_value) if (remedy := look(case)) is not None]
    if case.reason is Reason.WAITING_FOR_POWER:
        return [remedy for look in _LOOKS_AT_POWER if (remedy := look(case)) is not None]
    return [remedy for look in _LOOKS if (remedy := look(case)) is not None]


def _open_gpus(case: Case) -> Remedy | None:
    gpus = case.snapshot.gpus
    closed = rows_where(gpus.state == CLOSED)
    suits = case.snapshot.model_fits[case.request.models] & (gpus.memory_mib >= case.request.gpu_memory_mib)
    if case.request.gpus > 1:
        suits = suits & ~gpus.instance
    wanted = [row for row in closed.tolist() if suits[row]]

    def opened(count: int) -> bool:
        state = gpus.state.copy()
        state[wanted[:count]] = OPEN
        return _is_served(replace(case.snapshot, gpus=replace(gpus, state=state)), case)

    return _smallest(RemedyKind.OPEN_GPUS, range(1, len(wanted) + 1), opened)


def _fewer_gpus(case: Case) -> Remedy | None:
    def serves(count: int) -> bool:
        return _served(case, gpus=count)

    counts = range(case.request.gpus - 1, 0, -1)
    if not case.ways:
        return _smallest(RemedyKind.FEWER_GPUS, counts, serves)
    # On several nodes still, or on one: there it may not find what it finds on several.
    on_one = case.planner.world.kinds.most_on_one(case.request)
    several, one = counts[: max(0, len(counts) - on_one)], counts[-on_one:] if on_one else ()
    if case.request.cpus or case.request.memory_mib:
        # Fewer GPUs want more of the host for each.
        found = _first(RemedyKind.FEWER_GPUS, several, serves)
    else:
        found = _smallest(RemedyKind.FEWER_GPUS, several, serves)
    return found or _smallest(RemedyKind.FEWER_GPUS, one, serves)


def _less_gpu_memory(case: Case) -> Remedy | None:
    wanted = case.request.gpu_memory_mib
    world = case.planner.world
    reach = world.within_reach(case.request).pool
    levels = {*world.layout.memory_mib.flatten().tolist(), *reach.mib.flatten().tolist()}
    amounts = sorted((level for level in levels if 0 < level < wanted), reverse=True)
    # Of a gang over several nodes less may make one that must find all on one.
    look = _first if case.ways else _smallest
    return look(RemedyKind.LESS_GPU_MEMORY, amounts, lambda mib: _served(case, gpu_memory_mib=mib))


def _fewer_cpus(case: Case) -> Remedy | None:
    counts = range(case.request.cpus - 1, 0, -1)
    return _smallest(RemedyKind.FEWER_CPUS, counts, lambda count: _served(case, cpus=count))


def _less_memory(case: Case) -> Remedy | None:
    amounts = range(case.request.memory_mib - 1, 0, -1)
    return _smallest(RemedyKind.LESS_MEMORY, amounts, lambda mib: _served(case, memory_mib=mib))


def _any_model(case: Case) -> Remedy | None:
    fits = case.snapshot.model_fits
    if case.request.gpus == 0 or fits[case.request.models].all():
        return None
    every = xp.concatenate([fits, xp.ones((1, fits.shape[1]), dtype=bool)])
    changed = _changed(case.snapshot, case.row, models=len(fits), model_fits=every)
    return Remedy(RemedyKind.ANY_MODEL) if _is_served(changed, case) else None


def _higher_priority(case: Case) -> Remedy | None:
    priorities = range(case.request.priority + 1, PRIORITY_MAX + 1)
    return _smallest(RemedyKind.HIGHER_PRIORITY, priorities, lambda p: _served(case, priority=p))


def _higher_value(case: Case) -> Remedy | None:
    """Values that make a difference are the bars of live jobs, and just above those of pending ones."""
    jobs = case.snapshot.jobs
    bars = set(case.planner.world.incumbents.value_bar.tolist())
    above = jobs.value[(jobs.state == PENDING) & (jobs.value >= case.request.value)]
    bars.update((xp.unique(above) + 1).tolist())
    if case.reason is Reason.WAITING_FOR_PRICE:
        bars.add(1)
    amounts = sorted(bar for bar in bars if bar > case.request.value)
    found = _smallest(RemedyKind.HIGHER_VALUE, amounts, lambda value: _served(case, value=value))
    return found and replace(found, amount=found.amount + _energy_cost(case))


def _cheaper_energy(case: Case) -> Remedy | None:
    """Energy that costs less than the job is worth, if it is worth anything; then it must find room, too."""
    most = case.request.value + _energy_cost(case) - 1
    return Remedy(RemedyKind.CHEAPER_ENERGY, most) if _served(case, value=1) else None


def _energy_cost(case: Case) -> int:
    """What the job's energy costs, micro-USD per GPU-hour."""
    gross = case.snapshot.gross_value
    return 0 if gross is None else int(gross[case.row]) - case.request.value


def _higher_class(case: Case) -> Remedy | None:
    classes = range(case.request.job_class - 1, JobClass.INFERENCE - 1, -1)
    return _smallest(RemedyKind.HIGHER_CLASS, classes, lambda each: _served(case, job_class=each))


def _be_preemptible(case: Case) -> Remedy | None:
    served = not case.request.preemptible and _served(case, preemptible=True)
    return Remedy(RemedyKind.BE_PREEMPTIBLE) if served else None


def _shorter_duration(case: Case) -> Remedy | None:
    """A job that is held back for a promised start may pass if it ends before."""
    promise = case.plan.promise
    if promise is None or case.reason is not Reason.WAITING_FOR_PROMISED_START:
        return None
    longest_us = promise.start_us - case.snapshot.now_us
    served = longest_us > 0 and _served(case, expected_us=longest_us)
    return Remedy(RemedyKind.SHORTER_DURATION, longest_us) if served else None


def _more_power(case: Case) -> Remedy | None:
    power = case.snapshot.power
    assert power is not None

    def raised(watts: int) -> bool:
        promised_w = None if power.promised_w is None else power.promised_w + watts
        more = replace(power, budget_w=power.budget_w + watts, promised_w=promised_w)
        return _is_served(replace(case.snapshot, power=more), case)

    most_w = int(power.limit_w_max.sum()) + max(0, -power.budget_w)
    return _smallest(RemedyKind.MORE_POWER, range(1, most_w + 1), raised)


def _less_draw(case: Case) -> Remedy | None:
    power = case.snapshot.power
    assert power is not None

    def lowered(watts: int) -> bool:
        natural_w = power.natural_w.copy()
        natural_w[case.row] = watts
        return _is_served(replace(case.snapshot, power=replace(power, natural_w=natural_w)), case)

    draws_w = int(power.natural_w[case.row])
    draws_w = int(power.limit_w_max.max()) if draws_w == UNKNOWN else draws_w
    return _smallest(RemedyKind.LESS_DRAW, range(draws_w - 1, 0, -1), lowered)


_LOOKS: tuple[Callable[[Case], Remedy | None], ...] = (
    _open_gpus,
    _fewer_gpus,
    _less_gpu_memory,
    _fewer_cpus,
    _less_memory,
    _any_model,
    _shorter_duration,
    _be_preemptible,
    _higher_priority,
    _higher_value,
    _higher_class,
)


_LOOKS_AT_POWER = (
    _more_power,
    _less_draw,
    _fewer_gpus,
    _be_preemptible,
    _higher_priority,
    _higher_value,
    _higher_class,
)


def _smallest(kind: RemedyKind, amounts: Sequence[int], serves: Callable[[int], bool]) -> Remedy | None:
    """The first of the amounts, smallest change first, that serves; more of a change never serves less."""
    if not amounts or not serves(amounts[-1]):
        return None
    low, high = 0, len(amounts) - 1
    while low < high:
        middle = (low + high) // 2
        if serves(amounts[middle]):
            high = middle
        else:
            low = middle + 1
    return Remedy(kind, amounts[low])


def _first(kind: RemedyKind, amounts: Sequence[int], serves: Callable[[int], bool]) -> Remedy | None:
    """The same where more of a change may serve less: one after the other, a bounded number."""
    return next((Remedy(kind, amount) for amount in amounts[:TRIED_MAX] if serves(amount)), None)


def _served(case: Case, **columns: int) -> bool:
    """Whether a plan would serve the job if it said this instead."""
    return _is_served(_changed(case.snapshot, case.row, **columns), case)


def _is_served(snapshot: Snapshot, case: Case) -> bool:
    planner = Planner(snapshot, case.policy, case.planner.world.layout)
    planner.run()
    return case.number in planner.claims


def _changed(snapshot: Snapshot, row: int, model_fits: Any | None = None, **columns: int) -> Snapshot:
    arrays = {name: getattr(snapshot.jobs, name).copy() for name in columns}
    for name, value in columns.items():
        arrays[name][row] = value
    fits = snapshot.model_fits if model_fits is None else model_fits
    return replace(snapshot, jobs=replace(snapshot.jobs, **arrays), model_fits=fits)


def _undrained(case: Case) -> Snapshot:
    nodes = case.snapshot.nodes
    return replace(
        case.snapshot, nodes=replace(nodes, drain=xp.full(len(nodes), NOT_DRAINING, dtype=xp.int64))
    )
