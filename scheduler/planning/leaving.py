"""What leaves the nodes without a further decision, and when it is the turn of what a request needs of it.

Jobs that were told to stop, and what ended ones still occupy, leave in turn (`allocator.Turn`): a request
takes what its own victims leave first, then what leaves otherwise, the oldest stop first. For all requests
but the one that a hold's preemptor is, the turns are the same. So they are columns: of each GPU and of each
host what is there after none, one, two ... of the stops on it. Which node is ready first (`search.py`) is
told without looking into the others.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from scheduler.model.snapshot import UNKNOWN, Snapshot
from scheduler.planning.allocator import FOR_NOBODY, NOT_SERVED, Hold, Node, Request, Turn
from scheduler.planning.arrays import lists, rows_where, unknown_as_zero, xp
from scheduler.planning.hosts import Hosts
from scheduler.planning.kept import Kept
from scheduler.planning.layout import Layout
from scheduler.planning.pool import Pool, summed

# Stops on a GPU, and on a node, that are told apart; what leaves later counts with the last of these. Then a
# node may seem to be ready sooner than it is, and is looked into for nothing.
GPU_STOPS, NODE_STOPS = 3, 12
# Of an int64 without its sign, and without one for NEVER.
CODE_BITS = 61
# Later than any code of a turn.
_NEVER = 1 << 62
# The codes of what is free, and of what the request's own victims leave.
_FREE, _MINE = 0, -1


class Leavers:
    """Who leaves, as the snapshot has it.

    Args:
        snapshot: The world.
        layout: Its GPUs by node.
        hosts: What the jobs that were told to go have of the nodes beside GPUs.
        held: Rows of the holdings that go away.
        holder: Shape (holdings,). The row of the live job that holds it; UNKNOWN where it has ended.
        mib: Shape (holdings,). Memory that shares have booked.
        stopping: Jobs that this plan stops.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        layout: Layout,
        hosts: Hosts,
        held: Any,
        holder: Any,
        mib: Any,
        stopping: frozenset[int],
    ) -> None:
        holdings, jobs = snapshot.holdings, snapshot.jobs
        self.snapshot = snapshot
        self.layout = layout
        self.hosts = hosts
        self.holder, self.cell = holder[held], layout.cell[holdings.gpu[held]]
        self.milli, self.mib = holdings.share_milli[held], mib[held]
        self._ended = (holdings.preemptor[held], holdings.stop_us[held])
        preemptor, stop_us = jobs.preemptor[hosts.job], jobs.stop_us[hosts.job]
        if stopping:
            stops = xp.isin(jobs.number[hosts.job], xp.asarray(sorted(stopping), dtype=xp.int64))
            preemptor = xp.where(stops, UNKNOWN, preemptor)
            stop_us = xp.where(stops, snapshot.now_us, stop_us)
        self._told = (preemptor, stop_us)

    def on(self, row: int) -> list[Hold]:
        """What leaves a node."""
        jobs, now_us, width = self.snapshot.jobs, self.snapshot.now_us, self.layout.width
        holds = []
        parts: dict[int, dict[int, list[int]]] = {}
        (held, first_held), (hosted, first_hosted) = self._places
        here = held[int(first_held[row]) : int(first_held[row + 1])]
        columns = (self.holder, self.cell, self.milli, self.mib, *self._ended)
        for holder, cell, milli, mib, preemptor, stop_us in zip(*lists(columns, here), strict=True):
            position = cell - row * width
            if holder == UNKNOWN:  # no live job and no CPUs
                part = {position: [milli, mib]}
                holds.append(Hold(UNKNOWN, part, 0, 0, 0, preemptor, stop_us, now_us))
            else:
                part_of = parts.setdefault(holder, {}).setdefault(position, [0, 0])
                part_of[0] += milli
                part_of[1] += mib
        hosts = self.hosts
        there = hosted[int(first_hosted[row]) : int(first_hosted[row + 1])]
        leavers = hosts.job[there]
        for job, cpus, memory_mib, preemptor, stop_us, number, grace_us in zip(
            leavers.tolist(),
            *lists((hosts.cpus, hosts.memory_mib, *self._told), there),
            *lists((jobs.number, jobs.grace_us), leavers),
            strict=True,
        ):
            ready_us = max(now_us, stop_us + grace_us)
            holds.append(Hold(number, parts.get(job, {}), cpus, memory_mib, 1, preemptor, stop_us, ready_us))
        for hold in holds:
            if hold.preemptor == UNKNOWN:
                hold.served = FOR_NOBODY
        # Hand-overs of ended jobs have no number: an order of their own, whatever that of the rows (R8).
        holds.sort(key=lambda hold: (hold.number, sorted(hold.parts.items()), hold.preemptor))
        return holds

    @cached_property
    def rows_for(self) -> dict[int, list[int]]:
        """By preemptor the rows of the nodes on which somebody leaves for it."""
        ended = rows_where(self.holder == UNKNOWN)
        preemptors = xp.concatenate([self._told[0], self._ended[0][ended]])
        nodes = xp.concatenate([self.hosts.node, self.cell[ended] // max(self.layout.width, 1)])
        known = rows_where(preemptors != UNKNOWN)
        rows: dict[int, set[int]] = {}
        for preemptor, row in zip(*lists((preemptors, nodes), known), strict=True):
            rows.setdefault(preemptor, set()).add(row)
        return {preemptor: sorted(of_preemptor) for preemptor, of_preemptor in rows.items()}

    @cached_property
    def _places(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """The holdings by node and where each node's begin; the same of the hosts."""
        nodes = len(self.snapshot.nodes)
        return by_node(self.cell // max(self.layout.width, 1), nodes), by_node(self.hosts.node, nodes)

    # Turns as codes -----------------------------------------------------------------------------

    @cached_property
    def _scale(self) -> "_Scale":
        """How turns are written as codes."""
        jobs = self.snapshot.jobs
        now = xp.asarray([self.snapshot.now_us], dtype=xp.int64)
        stops = xp.unique(xp.concatenate([self._told[1], self._ended[1], now])).tolist()
        least, most = (jobs.number.min().item(), jobs.number.max().item()) if len(jobs) else (0, 0)
        return _Scale(stops, least, most, len(jobs))

    def code(self, turn: Turn) -> int:
        """The turn as a number; a sooner one has a smaller one, or one that is equal (`is_coarse`)."""
        is_others, stop_us, served, number = turn
        return self._scale.code(stop_us, served, number) if is_others else _MINE

    @property
    def is_coarse(self) -> bool:
        """Whether turns that differ may have the same code."""
        return self._scale.dropped > 0

    def codes(self) -> tuple[Any, Any]:
        """The codes of the holdings, and of the hosts, while no preemptor was served."""
        scale, jobs = self._scale, self.snapshot.jobs
        told = scale.codes(*self._told, jobs.number[self.hosts.job])
        none = xp.full(len(self.holder), UNKNOWN, dtype=xp.int64)
        ended = scale.codes(*self._ended, none)
        if not len(told):
            return ended, told
        of_job = xp.zeros(len(jobs), dtype=xp.int64)
        of_job[self.hosts.job] = told
        return xp.where(self.holder == UNKNOWN, ended, of_job[unknown_as_zero(self.holder)]), told


class _Scale:
    """Turns as numbers: when the stop was decided, how the preemptor ranks, the number."""

    def __init__(self, stops_us: list[int], least: int, most: int, served_max: int) -> None:
        self._stops_us = xp.asarray(stops_us, dtype=xp.int64)
        self._rank = {stop_us: rank for rank, stop_us in enumerate(stops_us)}
        self._least = least
        number_bits = (most - least + 1).bit_length()
        self._served_bits = (served_max + 1).bit_length()
        bits = len(stops_us).bit_length() + self._served_bits + number_bits
        # Where that is too much for one number, job numbers that are close to each other count as equal.
        self.dropped = min(max(0, bits - CODE_BITS), number_bits)
        self._number_bits = number_bits - self.dropped

    def code(self, stop_us: int, served: int, number: int) -> int:
        """One turn."""
        nobody = (1 << self._served_bits) - 1
        head = self._rank[stop_us] << self._served_bits | (nobody if served == NOT_SERVED else served)
        tail = 0 if number == UNKNOWN else number - self._least + 1
        return (head << self._number_bits | tail >> self.dropped) + 1

    def codes(self, preemptor: Any, stop_us: Any, number: Any) -> Any:
        """The turns while no preemptor was served."""
        rank = self._stops_us.searchsorted(stop_us)
        served = xp.where(preemptor == UNKNOWN, FOR_NOBODY, (1 << self._served_bits) - 1)
        head = (rank << self._served_bits) | served
        tail = xp.where(number == UNKNOWN, 0, number - self._least + 1)
        return ((head << self._number_bits) | (tail >> self.dropped)) + 1


class Turns:
    """When each node is ready for a request, as far as it takes what leaves for others in turn.

    Whoever changes what is free or leaves on a node calls `put` before the next look.
    """

    def __init__(self, leavers: Leavers, free: Pool, leaving: Any, drains: Any) -> None:
        """Take who leaves, what is free, and of each node whether anything leaves and whether it drains."""
        nodes = len(drains)
        self._leavers = leavers
        self._free = free
        self._leaving, self._drains = leaving, drains
        gpu_codes, codes = leavers.codes()
        gpu_amounts = ((free.milli, leavers.milli), (free.mib, leavers.mib))
        # Shape (3, nodes, width, stops + 1): the code of each stop, and thousandths and MiB after it.
        self._gpus = _levels(leavers.cell, gpu_codes, gpu_amounts, GPU_STOPS)
        hosts = leavers.hosts
        host_amounts = zip((free.cpus, free.memory_mib, free.slots), hosts.amounts, strict=True)
        # Shape (4, nodes, stops + 1): the same of CPUs, host memory and job slots.
        self._hosts = _levels(hosts.node, codes, tuple(host_amounts), NODE_STOPS)
        self._kept = Kept(nodes)  # by what is wanted of GPUs, and by all that is wanted

    def put(self, node: Node) -> None:
        """Take over what a node has and what leaves it."""
        row, free, code = node.row, node.free, self._leavers.code
        width = len(node.gpus)
        gpus = _filled((free.milli, free.mib), GPU_STOPS)
        host = _filled(((free.cpus,), (free.memory_mib,), (free.slots,)), NODE_STOPS)
        in_turn = sorted(
            [(code((True, hold.stop_us, hold.served, hold.number)), hold) for hold in node.leaving],
            key=lambda each: each[0],
        )
        for turn, hold in in_turn:
            _add(host, 0, turn, (hold.cpus, hold.memory_mib, hold.slots), NODE_STOPS)
            for position, part in hold.parts.items():
                _add(gpus, position, turn, part, GPU_STOPS)
        self._hosts[:, row] = xp.asarray(host, dtype=xp.int64)
        self._gpus[:, row, :width] = xp.asarray(gpus, dtype=xp.int64).reshape(3, width, GPU_STOPS + 1)
        self._kept.changed(row)

    def in_turn(self, request: Request, without: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Codes of turns and rows of nodes: the request is ready there not before that, the soonest first.

        The nodes at the rows `without` are left out, as are those where what it needs does not leave.
        """
        kind = (*request.gpu_part, request.cpus, request.memory_mib)
        ready = self._kept.column(kind, lambda rows: self._ready_on(request, rows)).copy()
        for row in without:
            ready[row] = _NEVER
        for _ in range(len(ready)):
            row = ready.argmin().item()
            soonest: int = ready[row].item()
            if soonest == _NEVER:
                return
            yield soonest, row
            ready[row] = _NEVER

    def is_before(self, turn: Turn, row: int, bound: int, other: int) -> bool:
        """Whether a node that is ready at this turn goes before one that is not ready before the bound."""
        code = self._leavers.code(turn)
        return code < bound or (code == bound and row < other and not self._leavers.is_coarse)

    def _ready_on(self, request: Request, rows: Any) -> Any:
        """The code of the stop after which all it needs is there; NEVER. Shape (rows,)."""
        turns = self._kept.column(request.gpu_part, lambda some: self._gpu_turns(request, some))[rows]
        there = rows_where(turns < _NEVER)
        turns[there] = xp.maximum(turns[there], self._host_turns(request, rows[there]))
        return turns

    def _gpu_turns(self, request: Request, rows: Any) -> Any:
        """The code of the stop after which the request's GPUs are there; NEVER. Shape (rows,)."""
        free, turns = self._free, xp.full(len(rows), _NEVER, dtype=xp.int64)
        if request.gpus > free.milli.shape[1]:
            return turns
        there = rows_where(self._leaving[rows] & ~self._drains[rows])
        if request.gpus == 0:
            turns[there] = _FREE
            return turns
        rows = rows[there]
        fits = self._gpus[1, rows] >= request.share_milli
        if request.gpu_memory_mib:
            fits &= self._gpus[2, rows] >= request.gpu_memory_mib
        by_gpu = xp.where(fits, self._gpus[0, rows], _NEVER).min(axis=2)
        by_gpu = xp.where(free.suitable(request, rows), by_gpu, _NEVER)
        last = by_gpu.min(axis=1) if request.gpus == 1 else xp.sort(by_gpu, axis=1)[:, request.gpus - 1]
        turns[there] = last
        return turns

    def _host_turns(self, request: Request, rows: Any) -> Any:
        """The same of CPUs, host memory and a job slot."""
        fits = self._hosts[3, rows] >= 1
        if request.cpus:
            fits &= self._hosts[1, rows] >= request.cpus
        if request.memory_mib:
            fits &= self._hosts[2, rows] >= request.memory_mib
        return xp.where(fits, self._hosts[0, rows], _NEVER).min(axis=1)


def by_node(node: Any, nodes: int) -> tuple[Any, Any]:
    """The order by node, and where in that each node's begin."""
    order = node.argsort(kind="stable")
    return order, node[order].searchsorted(xp.arange(nodes + 1, dtype=xp.int64))


def _levels(place: Any, code: Any, amounts: tuple[tuple[Any, Any], ...], stops: int) -> Any:
    """Codes of the first stops at each place, then each amount after none, one, two ... of them.

    `amounts` are pairs of what is there without any, by place, and what each entry adds.
    """
    shape = amounts[0][0].shape
    size = amounts[0][0].size
    order = xp.lexsort(xp.stack([code, place]))
    place, code = place[order], code[order]
    turn = xp.arange(len(order), dtype=xp.int64) - place.searchsorted(place)
    slot = place * (stops + 1) + xp.minimum(turn, stops - 1) + 1
    codes = xp.full(size * (stops + 1), _NEVER, dtype=xp.int64)
    codes[slot[turn < stops]] = code[turn < stops]
    codes = codes.reshape(*shape, stops + 1)
    codes[..., 0] = _FREE
    columns = [codes]
    for free, added in amounts:
        after = summed(slot, added[order], size * (stops + 1)).reshape(*shape, stops + 1)
        after[..., 0] += free
        columns.append(after.cumsum(axis=-1))
    return xp.stack(columns)


def _filled(amounts: Sequence[Sequence[int]], stops: int) -> list[list[int]]:
    """The same as lists, by place, where nothing leaves yet."""
    codes = ([_FREE] + [_NEVER] * stops) * len(amounts[0])
    return [codes, *([amount for amount in each for _ in range(stops + 1)] for each in amounts)]


def _add(levels: list[list[int]], place: int, turn: int, amounts: Sequence[int], stops: int) -> None:
    """Add a stop after the others at its place, to the last where there are enough."""
    if not any(amounts):
        return
    first, end = place * (stops + 1) + 1, (place + 1) * (stops + 1)
    codes = levels[0]
    while first < end - 1 and codes[first] != _NEVER:
        first += 1
    if codes[first] == _NEVER:
        codes[first] = turn
    for column, amount in zip(levels[1:], amounts, strict=True):
        if amount:
            column[first:end] = [column[first] + amount] * (end - first)
