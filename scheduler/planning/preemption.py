"""Who may displace whom, what a victim loses, and which victims cost least.

A victim is preemptible, STARTING, RUNNING or SUSPENDED, past its minimum runtime (a STARTING job counts
from now), and ranks strictly lower by the hysteresis: under order "class" a later class always; in the
same class a lower priority; at equal priority a value so much smaller that the challenger's reaches the
incumbent's bar (`valuation.value_bar`). Under "value" the bar alone.

The set of victims is the one of least total loss; of those the one with fewest GPUs, then fewest jobs,
then the youngest, then the smallest number. A stop loses the work since the last checkpoint and the
restart loss, at the job's value, and what is at risk of its deadline (`valuation.at_risk`). That is a
covering problem: the set must free what the request lacks of GPUs (or of one GPU's thousandths and
memory), CPUs, host memory and slots. On a node each GPU is held either by one whole job or by shares, so
the items are disjoint and dynamic programming over "how much of each lack is covered" is exact. No victim
of such a set is needless (R5): without it the set would be cheaper and still fit.
"""

from itertools import combinations
from typing import Protocol

from scheduler.model.policy import Order
from scheduler.model.snapshot import WHOLE_MILLI
from scheduler.planning.allocator import (
    Live,
    Node,
    Request,
    Spare,
    fits,
    gpus_fit,
    host_fits,
    lack_of_host,
    share_fits,
)

# Steps of filling the covering table (0.7 µs each); beyond it the choice is greedy. 16 GPUs without a lack of
# CPUs or memory take at most 272, so only hosts with many differently sized CPU jobs come here.
COVER_STEPS_MAX = 10_000
# Share holders of one GPU whose every subset is tried when CPUs or memory of the host are lacking too.
SUBSET_HOLDERS_MAX = 6
_GPU_BITS, _JOB_BITS = 20, 20

Gain = tuple[int, ...]  # how much of each lack is covered
Option = tuple[Gain, int]  # gain, cost


class Incumbent(Protocol):
    """What decides who may displace a job."""

    @property
    def job_class(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def value_bar(self) -> int: ...


def outranks(request: Request, live: Incumbent, order: Order) -> bool:
    """Whether the request ranks above the live job by the hysteresis."""
    if order is Order.CLASS:
        if request.job_class != live.job_class:
            return request.job_class < live.job_class
        if request.priority != live.priority:
            return request.priority > live.priority
    return request.value >= live.value_bar


def choose_victims(request: Request, node: Node, candidates: list[Live]) -> tuple[int, list[Live]] | None:
    """The cheapest set of candidates without which the request fits on the node, and its cost; None: no set.

    Costs compare between nodes by loss, then GPUs, then jobs.
    """
    host_lack = lack_of_host(request, node.soon)
    # All that the choice depends on, until the node changes: many requests want the same of it.
    memory_mib = request.gpu_memory_mib if request.is_share else 0
    wants = (request.gpus, request.share_milli, memory_mib, node.suitable(request))
    asked = (*wants, host_lack, tuple([live.index for live in candidates]))
    if asked in node.choices:
        return node.choices[asked]
    chosen = node.choices[asked] = _chosen(request, node, candidates)
    return chosen


def _chosen(request: Request, node: Node, candidates: list[Live]) -> tuple[int, list[Live]] | None:
    table = Costs(candidates)
    best = least_cost(request, node, node.soon, table.candidates, table)
    return None if best is None else (best >> len(candidates), table.victims(best))


def least_cost(
    request: Request, node: Node, spare: Spare, candidates: list[Live], table: "Costs"
) -> int | None:
    """What the cheapest set of candidates costs with which the request fits; None: no set.

    `spare` is what the node has without them; the table may know of more jobs.
    """
    everything = spare.copy()
    for live in candidates:
        everything.add(live.hold)
    if not fits(request, node, everything):
        return None
    host_lack = lack_of_host(request, spare)
    problems: list[tuple[Gain, list[list[Option]]] | None]
    if request.gpus == 0:
        problems = [_host_problem(candidates, table, host_lack)]
    elif request.is_share:
        problems = [
            _share_problem(request, candidates, table, spare, position, host_lack)
            for position in node.suitable(request)
            if share_fits(request, everything, position)
        ]
    else:
        problems = [_whole_problem(request, node, candidates, table, spare, everything, host_lack)]
    costs = []
    for problem in problems:
        cost = None if problem is None else cover(*problem)
        if cost is None:
            cost = _greedy(request, node, candidates, table, everything)
        costs.append(cost)
    return min(costs)


class Costs:
    """Costs as one integer each that adds up and compares by loss, GPUs, jobs, then youth.

    The lowest bits hold, negated, a bit for each candidate, the youngest the highest: of equal sums the one
    with the youngest victims is least, and the bits tell who is in the set.
    """

    def __init__(self, candidates: list[Live]) -> None:
        self.candidates = sorted(candidates, key=lambda live: (live.started_us, -live.number))
        self.bits = len(candidates)
        self.cost = {live.number: self._cost(live, bit) for bit, live in enumerate(self.candidates)}

    def _cost(self, live: Live, bit: int) -> int:
        ranked = (live.loss_microusd << _GPU_BITS | live.gpus) << _JOB_BITS | 1
        return (ranked << self.bits) - (1 << bit)

    def victims(self, cost: int) -> list[Live]:
        """The set whose costs add up to this."""
        chosen = -cost & ((1 << self.bits) - 1)
        return [live for bit, live in enumerate(self.candidates) if chosen >> bit & 1]


def cover(lack: Gain, items: list[list[Option]]) -> int | None:
    """The least cost of at most one option an item that covers the lack; None: the table grew too large.

    The lack must be coverable. Cells are keyed by what is covered, capped at the lack.
    """
    needed = [i for i, amount in enumerate(lack) if amount]
    lack = tuple(lack[i] for i in needed)
    cells: dict[Gain, int] = {(0,) * len(lack): 0}
    steps = 0
    for options in items:
        steps += len(cells) * len(options)
        if steps > COVER_STEPS_MAX:
            return None
        grown = dict(cells)
        for gain, cost in options:
            for covered, spent in cells.items():
                key = tuple(
                    [min(c + gain[i], most) for c, i, most in zip(covered, needed, lack, strict=True)]
                )
                total = spent + cost
                known = grown.get(key)
                if known is None or total < known:
                    grown[key] = total
        cells = grown
    return cells[lack]


def _host_gain(live: Live) -> Gain:
    return (live.hold.cpus, live.hold.memory_mib, live.hold.slots)


def _host_problem(candidates: list[Live], table: Costs, host_lack: Gain) -> tuple[Gain, list[list[Option]]]:
    return host_lack, [[(_host_gain(live), table.cost[live.number])] for live in candidates]


def _share_problem(
    request: Request, candidates: list[Live], table: Costs, spare: Spare, position: int, host_lack: Gain
) -> tuple[Gain, list[list[Option]]]:
    """Cover one GPU's lack of thousandths and memory, and the host's."""
    lack_mib = request.gpu_memory_mib - spare.mib[position] if request.gpu_memory_mib else 0
    lack = (max(0, request.share_milli - spare.milli[position]), max(0, lack_mib), *host_lack)
    items: list[list[Option]] = []
    for live in candidates:
        milli, mib = live.hold.parts.get(position, (0, 0))
        if milli or any(host_lack):
            items.append([((milli, mib, *_host_gain(live)), table.cost[live.number])])
    return lack, items


def _whole_problem(
    request: Request,
    node: Node,
    candidates: list[Live],
    table: Costs,
    spare: Spare,
    everything: Spare,
    host_lack: Gain,
) -> tuple[Gain, list[list[Option]]] | None:
    """Cover a lack of whole GPUs, and the host's; None: a GPU has too many holders to try their subsets."""
    suitable = node.suitable(request)
    ready = sum(spare.milli[position] == WHOLE_MILLI for position in suitable)
    gainable = {
        position
        for position in suitable
        if spare.milli[position] != WHOLE_MILLI and everything.milli[position] == WHOLE_MILLI
    }
    lack = (max(0, request.gpus - ready), *host_lack)
    sharers: dict[int, list[Live]] = {}
    items: list[list[Option]] = []
    for live in candidates:
        parts = live.hold.parts
        if (
            len(parts) == 1
            and (position := next(iter(parts))) in gainable
            and parts[position][0] < WHOLE_MILLI
        ):
            sharers.setdefault(position, []).append(live)
            continue
        gain = len(gainable.intersection(parts))
        if gain or any(host_lack):
            items.append([((gain, *_host_gain(live)), table.cost[live.number])])
    for holders in sharers.values():
        least = 1 if any(host_lack) else len(holders)
        if least == 1 and len(holders) > SUBSET_HOLDERS_MAX:
            return None
        items.append(
            [
                _together(subset, table, int(size == len(holders)))
                for size in range(least, len(holders) + 1)
                for subset in combinations(holders, size)
            ]
        )
    return lack, items


def _together(holders: tuple[Live, ...], table: Costs, gpus: int) -> Option:
    host = [sum(amounts) for amounts in zip(*map(_host_gain, holders), strict=True)]
    return (gpus, *host), sum(table.cost[live.number] for live in holders)


def _greedy(request: Request, node: Node, candidates: list[Live], table: Costs, everything: Spare) -> int:
    """Displace all, then take back the dearest first as long as the request still fits: none is needless."""
    spare = everything.copy()
    kept = 0
    for live in sorted(candidates, key=lambda live: -table.cost[live.number]):
        spare.remove(live.hold)
        if host_fits(request, spare) and gpus_fit(request, node, spare):
            continue
        spare.add(live.hold)
        kept += table.cost[live.number]
    return kept
