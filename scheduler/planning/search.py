"""Room for a request among all nodes: free, coming free, or by displacing; columns say where looking pays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scheduler.planning.allocator import (
    NO_PENALTY,
    Found,
    Live,
    Node,
    Part,
    Penalty,
    Request,
    Turn,
    find_leaving_on,
    gpus_fit,
    host_fits,
    place,
)
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.fragmentation import NO_POSITION
from scheduler.planning.horizon import Horizons
from scheduler.planning.preemption import choose_victims
from scheduler.planning.world import NEVER, World

# Nodes on which the exact cheapest victims are looked for, those first whose bound (`horizon.py`) is least.
# The search ends at the first bound above the best found; the limit is for fleets of many equal bounds.
NODES_TRIED_MAX = 64

Candidates = Callable[[Node], list[Live]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may use of some nodes, so as not to delay a promised start there.

    `on` says it of a request and the row of a node: the node with what it may not use closed, or None.
    """

    rows: tuple[int, ...]
    on: Callable[[Request, int], tuple[Node | None, Penalty]]


def find_free(request: Request, world: World, limits: Limits | None = None) -> Found | None:
    """Room in what is free: where its GPUs are nearest, and where least room for others is lost.

    On a node that is limited by a promise only where there is no other.
    """
    if len(world.drains) == 1:
        return placed(request, *as_limited(request, world, 0, limits))
    found = world.best_free(request, () if limits is None else limits.rows)
    if found is None:
        return _on_limited(request, limits)
    row, position = found
    if position != NO_POSITION:
        return Found((Part(request, row, (position,)),), is_free=True)
    found_there = placed(request, world.node(row))
    assert found_there is not None, "the columns say that it fits"
    return found_there


def find_free_among(request: Request, world: World, gpus: Any, node: int) -> Found | None:
    """Room in what is free of some GPUs: on the node at this row, or on the first that has it.

    `gpus`: bool, shape (nodes, width).
    """
    fits = (world.free.usable(request) & gpus).sum(axis=1) >= request.gpus
    fits &= world.free.fit_host(request) & ~world.drains
    row = node if fits[node].item() else fits.argmax().item()
    return placed(request, world.node(row).only(frozenset(rows_where(gpus[row]).tolist())))


def find_leaving(request: Request, world: World, limits: Limits | None = None) -> Found | None:
    """Room in what is free and what leaves, on the node where the last stop it needs came first."""
    best: tuple[Turn, int, Found] | None = None
    own = world.leaves_for(request)
    for row in own:
        best = _sooner(request, world, limits, row, best)
    # Nothing is ready sooner than what its own victims leave.
    if not world.is_small and (best is None or best[0][0]):
        turns = world.turns
        for bound, row in turns.in_turn(request, own):
            if best is not None and turns.is_before(best[0], best[1], bound, row):
                break
            best = _sooner(request, world, limits, row, best)
    return None if best is None else best[2]


def _sooner(
    request: Request, world: World, limits: Limits | None, row: int, best: tuple[Turn, int, Found] | None
) -> tuple[Turn, int, Found] | None:
    """The best found so far, or room on this node, where the last stop it needs came earlier."""
    node, penalty = as_limited(request, world, row, limits)
    found = None if node is None else find_leaving_on(request, node, penalty)
    if found is None or (best is not None and (found[0], row) > best[:2]):
        return best
    return found[0], row, found[1]


def find_by_displacing(
    request: Request, world: World, horizons: Horizons, candidates: Candidates, limits: Limits | None = None
) -> Found | None:
    """Room that the cheapest victims leave, on the node where they are cheapest."""
    best: tuple[int, int, list[Live]] | None = None
    best_loss = NEVER
    cheapest = _Cheapest(request, world, horizons)
    for row, bound in cheapest.first():
        if bound > best_loss:
            break
        node, _ = as_limited(request, world, row, limits)
        if node is None:
            continue
        victims = candidates(node)
        chosen = choose_victims(request, node, victims) if victims else None
        loss = NEVER if chosen is None else sum([victim.loss_microusd for victim in chosen[1]])
        if limits is None or row not in limits.rows:
            cheapest.learn(node, victims, loss)
        if chosen is None:
            continue
        if best is None or (chosen[0], row) < best[:2]:
            best = (chosen[0], row, chosen[1])
            best_loss = loss
    if best is None:
        return None
    found = _where_they_leave(request, world, limits, best[1], best[2])
    return found._replace(victims=tuple(sorted(best[2], key=lambda victim: victim.number)))


def _where_they_leave(
    request: Request, world: World, limits: Limits | None, row: int, victims: list[Live]
) -> Found:
    """The room that the victims leave: on this node, or where the next plan will find it.

    A gang over several nodes leaves all of them, and on another the request may wait for fewer others.
    """
    numbers = {victim.number for victim in victims}
    best: tuple[Turn, Found] | None = None
    for each in sorted({row}.union(*(victim.rows for victim in victims))):
        node, penalty = as_limited(request, world, each, limits)
        if node is not None and not node.drains:
            leaving = (live.hold for live in world.live(each) if live.number in numbers)
            holds = [hold.told(request.number, world.now_us) for hold in leaving]
            found = find_leaving_on(request, node, penalty, holds)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
    assert best is not None, "the victims were chosen so that the request fits"
    return best[1]


def as_limited(
    request: Request, world: World, row: int, limits: Limits | None
) -> tuple[Node | None, Penalty]:
    """The node as the request may use it."""
    if limits is not None and row in limits.rows:
        return limits.on(request, row)
    return world.node(row), NO_PENALTY


def _on_limited(request: Request, limits: Limits | None) -> Found | None:
    """Room in what is free on what is left of the limited nodes."""
    if limits is None:
        return None
    found = (placed(request, *limits.on(request, row)) for row in limits.rows)
    return next((each for each in found if each is not None), None)


def placed(request: Request, node: Node | None, penalty: Penalty = NO_PENALTY) -> Found | None:
    """Room in what the node has free."""
    if node is None or node.drains:
        return None
    positions = place(request, node, node.free, penalty)
    return None if positions is None else Found((Part(request, node.row, positions),), is_free=True)


class _Cheapest:
    """The nodes that a request could have, by a loss that is not more than what it takes there."""

    def __init__(self, request: Request, world: World, horizons: Horizons) -> None:
        self._request = request
        self._world = world
        self._horizon = None if world.is_small else horizons.of(request)

    def first(self) -> Iterator[tuple[int, int]]:
        """Rows of the nodes to look at, a bounded number, each with its bound; of equals the first row."""
        if self._world.is_small:
            yield from ((node.row, 0) for node in self._world.nodes() if not node.drains)
        if self._horizon is None:
            return
        fits = self._horizon.pool.fit_host(self._request)
        bounds = xp.where(fits, self._horizon.bounds(self._request), NEVER)
        for _ in range(min(NODES_TRIED_MAX, len(bounds))):
            row: int = bounds.argmin().item()
            bound: int = bounds[row].item()
            if bound == NEVER:
                return
            yield row, bound
            bounds[row] = NEVER

    def learn(self, node: Node, candidates: list[Live], loss: int) -> None:
        """Remember for others that want the same GPUs what the request takes on a node; NEVER: it can't."""
        if self._horizon is None:
            return
        if loss < NEVER:
            says_of_gpus = host_fits(self._request, node.soon)
        else:
            everything = node.spare_with([*node.leaving, *(live.hold for live in candidates)])
            says_of_gpus = not gpus_fit(self._request, node, everything)
        if says_of_gpus:
            self._horizon.learn(self._request, node.row, loss)
