"""The start that the highest blocked job can count on, and who may pass it (EASY backfill).

The promise is the earliest moment at which the blocked job fits, from what is known of run times: what is
free or leaving now, live jobs at their declared end (an overrun ends now), and those that it outranks at the
end of their minimum runtime. A job of unknown run time never ends. Without a finite moment nothing is
promised and nobody is held back.

A job of lower rank may pass if at the promised moment it (a) gives way to the blocked job, (b) has ended, or
(c) leaves it room beside. Source of the rule: D. Lifka, "The ANL/IBM SP scheduling system" (JSSPP 1995).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from scheduler.model.policy import Order, Policy
from scheduler.model.snapshot import UNKNOWN, WHOLE_MILLI
from scheduler.planning.allocator import (
    NO_PENALTY,
    Claim,
    Found,
    Hold,
    Live,
    Node,
    Part,
    Penalty,
    Request,
    Spare,
    fits,
    fits_at,
    host_fits,
)
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.gangs import soonest
from scheduler.planning.preemption import outranks
from scheduler.planning.queue import Queue
from scheduler.planning.search import NODES_TRIED_MAX, Limits
from scheduler.planning.valuation import outranked, value_bar, value_bars
from scheduler.planning.world import NEVER, World


@dataclass(slots=True)
class Blocked:
    """A job that can't be served, and when and where it is promised to start; NEVER: nothing is promised."""

    request: Request
    start_us: int
    rooms: tuple["Room", ...] = ()

    @property
    def is_promised(self) -> bool:
        """Whether a start can be promised."""
        return self.start_us < NEVER


@dataclass(slots=True)
class Room:
    """What a promised node has at the promised moment, less what jobs that passed still hold by then."""

    request: Request  # what the blocked job wants there
    node: Node
    spare: Spare


def blocked(request: Request, world: World, order: Order, claims: Iterable[Claim]) -> Blocked:
    """The request with the earliest moment at which it fits; `claims` are those of higher rank.

    Looked for on the nodes that could have room first: a promise need not be the earliest to be kept.
    """
    best = Blocked(request, NEVER)
    releases = _Releases(request, world, order, claims)
    rows = _soonest_first(request, world, order, releases.rows)
    for row in _hopeful(rows, request, world, order, releases.rows):
        room = releases.room(request, row, best.start_us)
        if room is not None:
            best = Blocked(request, room[0], (room[1],))
    return best


def blocked_over(request: Request, world: World, order: Order, claims: Iterable[Claim]) -> Blocked:
    """The same for a gang over several nodes: the earliest moment at which all its parts fit."""
    best = Blocked(request, NEVER)
    releases = _Releases(request, world, order, claims)
    for way in world.kinds.divisions(request):
        rows = _soonest_first(way.whole, world, order, releases.rows, way.nodes, way.wholes + NODES_TRIED_MAX)
        rows = _hopeful(rows, way.least, world, order, releases.rows)
        moments = [
            {row: room[0] for row in rows if (room := releases.room(part, row, NEVER)) is not None}
            for part in (way.whole, way.least)
        ]
        chosen = soonest(way, *moments)
        if chosen is None:
            continue
        whole, rest = chosen
        start_us = max([moments[0][row] for row in whole] + [moments[1][row] for row in rest])
        if start_us < best.start_us:
            wanted = [(way.whole, row) for row in whole] + [(way.least, row) for row in rest]
            by_row = sorted(wanted, key=lambda each: each[1])
            rooms = tuple(releases.room_at(part, row, start_us) for part, row in by_row)
            best = Blocked(request, start_us, rooms)
    return best


class _Releases:
    """What nodes get back, and when, as far as a blocked request can count on it."""

    def __init__(self, request: Request, world: World, order: Order, claims: Iterable[Claim]) -> None:
        self._request = request
        self._world = world
        self._order = order
        self._claimed: dict[int, list[tuple[int, Hold]]] = {}
        for claim in claims:
            for part in claim.parts:
                self._claimed.setdefault(part.row, []).append(_claim_end(claim, part, world.now_us))

    @property
    def rows(self) -> list[int]:
        """Nodes on which something is claimed."""
        return sorted(self._claimed)

    def room(self, request: Request, row: int, before_us: int) -> tuple[int, Room] | None:
        """The earliest moment before this one at which the request fits there, and what there is then."""
        node, moment = self._world.node(row), self._world.now_us
        spare = node.spare_with(node.leaving)
        for at_us, hold in self._of(row, before_us):
            if at_us > moment and fits(request, node, spare):
                break
            moment = at_us
            spare.add(hold)
        return (moment, Room(request, node, spare)) if fits(request, node, spare) else None

    def room_at(self, request: Request, row: int, at_us: int) -> Room:
        """What there is for the request at this moment."""
        node = self._world.node(row)
        return Room(
            request, node, node.spare_with([*node.leaving, *(h for _, h in self._of(row, at_us + 1))])
        )

    def _of(self, row: int, before_us: int) -> list[tuple[int, Hold]]:
        """The releases of a node before a moment, in turn."""
        now_us = self._world.now_us
        releases = [
            (_release_us(self._request, live, self._order, now_us), live.hold)
            for live in self._world.live(row)
        ]
        releases += self._claimed.get(row, ())
        return sorted((r for r in releases if r[0] < before_us), key=lambda release: release[0])


def _soonest_first(
    request: Request,
    world: World,
    order: Order,
    claimed_rows: list[int],
    among: Any = True,
    most: int = NODES_TRIED_MAX,
) -> list[int]:
    """Rows of the nodes to look at, a bounded number: those first whose GPUs could be there soonest."""
    layout, jobs, now_us = world.layout, world.incumbents, world.now_us
    open_rows = rows_where(~world.drains & among)
    if len(open_rows) <= most:
        return open_rows.tolist()  # type: ignore[no-any-return]
    release_us = xp.full(layout.cells, now_us, dtype=xp.int64)
    xp.maximum.at(release_us, jobs.cell, _free_us(request, world, order)[jobs.holder])
    claimed = xp.asarray(claimed_rows, dtype=xp.int64)
    by_node = release_us.reshape(layout.row.shape)
    by_node[claimed] = now_us  # when claims end is looked at there
    suits = layout.is_open if request.models == UNKNOWN else layout.fits[request.models]
    if request.gpus > 1 and layout.whole is not None:
        suits = suits & layout.whole
    by_node = xp.where(suits, by_node, NEVER)[open_rows]
    wanted = min(max(request.gpus, 1), layout.width)
    free_us = xp.sort(by_node, axis=1)[:, wanted - 1]
    return open_rows[xp.lexsort(xp.stack([open_rows, free_us]))[:most]].tolist()  # type: ignore[no-any-return]


def _hopeful(
    rows: list[int], request: Request, world: World, order: Order, claimed_rows: list[int]
) -> list[int]:
    """Of these nodes those where anything is released at a moment that is known, or that fit as it is."""
    if world.is_small:
        return rows
    hosts = world.incumbents.hosts
    hopeful = world.soon.fit(request)
    hopeful[hosts.node[_free_us(request, world, order)[hosts.job] < NEVER]] = True
    hopeful[xp.asarray(claimed_rows, dtype=xp.int64)] = True
    looked_at = xp.asarray(rows, dtype=xp.int64)
    return looked_at[hopeful[looked_at]].tolist()  # type: ignore[no-any-return]


def _free_us(request: Request, world: World, order: Order) -> Any:
    """Shape (incumbents,): when each is gone at the latest, as far as the request can count on it; NEVER."""
    jobs = world.incumbents
    yields_us = xp.maximum(jobs.yields_us, world.now_us)
    return xp.minimum(jobs.ends_us, xp.where(jobs.outranked(request, order), yields_us, NEVER))


class _Started:
    """A request as an incumbent, once it has started."""

    def __init__(self, request: Request, policy: Policy) -> None:
        self.job_class, self.priority = request.job_class, request.priority
        self._request, self._policy = request, policy

    @property
    def value_bar(self) -> int:
        """What it takes to displace it; few ask, as class and priority mostly decide."""
        return value_bar(self._request.value, self._request.restart_loss_us, self._policy)


def gives_way(request: Request, to: Blocked, policy: Policy, start_us: int) -> bool:
    """Whether the request, started then, gives way to the blocked job by the promised moment (a).

    Without a promise its minimum runtime is no obstacle: it will be over.
    """
    in_time = not to.is_promised or start_us + request.min_runtime_us <= to.start_us
    if not (request.preemptible and in_time):
        return False
    return outranks(to.request, _Started(request, policy), policy.order)


def ends_in_time(request: Request, to: Blocked, start_us: int) -> bool:
    """Whether the request, started then, has ended by the promised moment (b)."""
    return request.expected_us != UNKNOWN and start_us + request.expected_us <= to.start_us


def stays(queue: Queue, to: Blocked, policy: Policy, now_us: int, may_end: bool) -> Any:
    """Bool, shape (jobs,): who, started now, doesn't give way (a) and, if that counts, doesn't end (b)."""
    jobs, request = queue.jobs, to.request
    bars = value_bars(jobs.value, jobs.restart_loss_us, policy)
    lower = outranked(request, policy.order, jobs.job_class, jobs.priority, bars) & jobs.preemptible
    if to.is_promised:
        lower &= now_us + jobs.min_runtime_us <= to.start_us
    if may_end:
        lower |= (jobs.expected_us != UNKNOWN) & (now_us + jobs.expected_us <= to.start_us)
    return ~lower


def beside(to: Blocked, yielding: Callable[[Node], list[Hold]]) -> Limits:
    """What a request may use of the promised nodes; `yielding` are the holds there that it may displace."""
    rooms = {room.node.row: room for room in to.rooms}
    known: dict[tuple[int, int], tuple[Node | None, Penalty]] = {}

    def on(request: Request, row: int) -> tuple[Node | None, Penalty]:
        # Limits are made for one request, whose parts differ by their GPUs.
        key = (row, request.gpus)
        if key not in known:
            known[key] = _beside(request, rooms[row], yielding)
        return known[key]

    return Limits(tuple(rooms), on)


def _beside(
    request: Request, to: Room, yielding: Callable[[Node], list[Hold]]
) -> tuple[Node | None, Penalty]:
    """What the request may use of a promised node, and what it had better not.

    At the promised moment (c) the blocked job needs some of the GPUs that serve it then, and can spare the
    rest. The request may use what doesn't serve the blocked job, and as many of the others as can be spared;
    the penalty makes it use the former first.
    """
    node, room = to.node, to.spare
    left = room.copy()
    left.take(request, ())
    if not host_fits(to.request, left):
        return None, NO_PENALTY
    serving = (
        [p for p in node.suitable(to.request) if fits_at(to.request, room, p)] if to.request.gpus else []
    )
    spared = len(serving) - (1 if to.request.is_share else to.request.gpus)
    penalty = dict.fromkeys(serving, 1)
    if spared >= request.gpus:
        return node, penalty
    if request.is_share and to.request.is_share:
        open_to = [position for position in serving if _still_serves(request, to.request, room, position)]
    elif spared:
        holds = yielding(node)
        open_to = sorted(serving, key=lambda position: _availability(node, holds, position))[:spared]
    else:
        open_to = []
    allowed = frozenset(range(len(node.gpus))).difference(serving).union(open_to)
    return node.only(allowed), penalty


def book(found: Found, to: Blocked) -> None:
    """Take from the promised moment's room what a job that passed still holds by then."""
    for room in to.rooms:
        for part in found.parts:
            if part.row == room.node.row:
                room.spare.take(part.request, part.positions)


def _still_serves(request: Request, blocked: Request, room: Spare, position: int) -> bool:
    left = room.copy()
    left.take(request, (position,))
    return fits_at(blocked, left, position)


def _availability(node: Node, yielding: list[Hold], position: int) -> tuple[bool, bool, bool, int]:
    """What can be had sooner sorts first: free, then leaving, then what can be displaced."""
    milli = [node.free.milli[position]]
    for holds in (node.leaving, yielding):
        milli.append(milli[-1] + sum(hold.parts[position][0] for hold in holds if position in hold.parts))
    return (milli[0] != WHOLE_MILLI, milli[1] != WHOLE_MILLI, milli[2] != WHOLE_MILLI, position)


def _release_us(request: Request, live: Live, order: Order, now_us: int) -> int:
    if live.yields_us < NEVER and outranks(request, live, order):
        return min(live.ends_us, max(now_us, live.yields_us))
    return live.ends_us


def _claim_end(claim: Claim, part: Part, now_us: int) -> tuple[int, Hold]:
    request = part.request
    start_us = max(now_us, claim.ready_us)
    end_us = NEVER if request.expected_us == UNKNOWN else start_us + request.expected_us
    mib = request.gpu_memory_mib if request.is_share else 0
    parts = {position: [request.share_milli, mib] for position in part.positions}
    return end_us, Hold(request.number, parts, request.cpus, request.memory_mib, 1, UNKNOWN, UNKNOWN, 0)
