"""Room for a gang over several nodes: free, coming free, or by displacing.

How such a gang is divided says `kinds.py`. Each of its parts is looked for as a request of one node is
(`search.py`); here is what chooses the nodes.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from scheduler.planning.allocator import Found, Hold, Live, Node, Request, Turn, find_leaving_on
from scheduler.planning.arrays import lists, rows_where, xp
from scheduler.planning.horizon import Horizons
from scheduler.planning.kinds import Division
from scheduler.planning.preemption import Costs, least_cost
from scheduler.planning.search import NODES_TRIED_MAX, Candidates, Limits, as_limited, placed
from scheduler.planning.world import World

# Of nodes that share gangs over several, so many groups of equal ones have every subset tried.
GROUPS_MAX = 8

# What leaves besides, by node.
Told = dict[int, list[Hold]]
# How many whole nodes, how many nodes with a rest -> the least cost.
Options = dict[tuple[int, int], int]


def find_free_over(request: Request, world: World, limits: Limits | None = None) -> Found | None:
    """Room in what is free, on the fewest nodes; on those that a promise limits where there are no others.

    Whole nodes by row; the rest where the fewest GPUs are free, by row.
    """
    for way in world.kinds.divisions(request):
        parts = _free(way, world, limits)
        if parts is not None:
            return _together(parts)
    return None


def find_leaving_over(
    request: Request, world: World, limits: Limits | None = None, told: Told | None = None
) -> Found | None:
    """Room in what is free and what leaves, where the last stop it needs comes first.

    Of equal moments on the fewest nodes. `told` are live jobs' holds, as if they were told to go.
    """
    told = told or {}
    if not told and not (world.leaving & ~world.drains).any():
        return None
    best: tuple[Turn, list[Found]] | None = None
    for way in world.kinds.divisions(request):
        rows = _leaving_rows(way, world, limits, told)
        ready = [
            {
                row: found
                for row in rows
                if (found := _leaving_on(part, world, row, limits, told.get(row, ()))) is not None
            }
            for part in (way.whole, way.rest)
            if part is not None
        ]
        turns = [{row: found[0] for row, found in each.items()} for each in ready]
        chosen = soonest(way, turns[0], turns[-1])
        if chosen is None:
            continue
        whole, rest = chosen
        all_parts = [ready[0][row] for row in whole] + [ready[-1][row] for row in rest]
        last = max(turn for turn, _ in all_parts)
        if best is None or last < best[0]:
            best = (last, [found for _, found in all_parts])
    return None if best is None else _together(best[1])


def find_over_by_displacing(
    request: Request, world: World, horizons: Horizons, candidates: Candidates, limits: Limits | None = None
) -> Found | None:
    """Room that the cheapest victims leave, of all divisions and all nodes."""
    looks = [
        _Look(way, request, world, horizons, candidates, limits) for way in world.kinds.divisions(request)
    ]
    lives = {live.number: live for look in looks for each in look.live.values() for live in each}
    if not lives:
        return None
    table = Costs(list(lives.values()))
    costs = [cost for look in looks if (cost := look.least_cost(table)) is not None]
    if not costs:
        return None
    victims = {live.number: live for live in table.victims(min(costs))}

    def found_with(numbers: Iterable[int]) -> Found | None:
        told: Told = {}
        for number in numbers:
            for row in victims[number].rows:
                hold = next(live.hold for live in world.live(row) if live.number == number)
                told.setdefault(row, []).append(hold.told(request.number, world.now_us))
        return find_leaving_over(request, world, limits, told)

    if not all(look.is_exact for look in looks):
        # Who need not go stays, the dearest first.
        for number in sorted(victims, key=lambda number: -table.cost[number]):
            if found_with(victims.keys() - {number}) is not None:
                del victims[number]
    found = found_with(victims)
    assert found is not None, "the victims were chosen so that the request fits"
    return found._replace(victims=tuple(victims[number] for number in sorted(victims)))


def soonest(way: Division, whole: dict[int, Any], rest: dict[int, Any]) -> tuple[list[int], list[int]] | None:
    """The rows of the whole nodes and of the rest, those that are ready first; None: too few are ever.

    `whole` and `rest` say when each node is ready for such a part. The first so many whole nodes and the
    first of the others for the rest are together ready as soon as any: a node that could be whole could hold
    the rest as well.
    """
    first = sorted(whole, key=lambda row: (whole[row], row))[: way.wholes]
    if len(first) < way.wholes:
        return None
    if way.rest is None:
        return first, []
    others = [row for row in rest if row not in first]
    return (first, [min(others, key=lambda row: (rest[row], row))]) if others else None


def _together(found: Iterable[Found]) -> Found:
    by_node = sorted(found, key=lambda each: each.parts[0].row)
    parts = tuple(part for each in by_node for part in each.parts)
    return Found(parts, ready_us=max(each.ready_us for each in by_node))


def _free(way: Division, world: World, limits: Limits | None) -> list[Found] | None:
    """Room for each part in what is free."""
    open_to = way.nodes & ~world.drains
    whole = open_to & world.free.fit(way.whole)
    rest = open_to & world.free.fit(way.least)
    held_back: list[int] = []
    for row in () if limits is None else limits.rows:
        held_back += [row] if rest[row] else []
        whole[row] = rest[row] = False
    taken = rows_where(whole)[: way.wholes].tolist()
    found = [_there(placed(way.whole, world.node(row))) for row in taken]
    for row in held_back:
        if len(found) < way.wholes:
            each = placed(way.whole, *as_limited(way.whole, world, row, limits))
            if each is not None:
                found.append(each)
                taken.append(row)
    if len(found) < way.wholes or way.rest is None:
        return found if len(found) == way.wholes else None
    rest[xp.asarray(taken, dtype=xp.int64)] = False
    rows = rows_where(rest)
    if len(rows):
        left = world.free.usable(way.rest, rows).sum(axis=1)
        row = rows[xp.lexsort(xp.stack([rows, left]))][:1].tolist()[0]
        return [*found, _there(placed(way.rest, world.node(row)))]
    for row in held_back:
        each = placed(way.rest, *as_limited(way.rest, world, row, limits))
        if row not in taken and each is not None:
            return [*found, each]
    return None


def _there(found: Found | None) -> Found:
    assert found is not None, "the columns say that it fits"
    return found


def _leaving_rows(way: Division, world: World, limits: Limits | None, told: Told) -> list[int]:
    """Nodes where a part may fit: those where something leaves, and so many others as are wanted at most."""
    open_to = way.nodes & ~world.drains
    fits = open_to & world.soon.fit(way.least)
    free = fits & world.free.fit(way.whole)
    some_free = rows_where(fits & ~free & world.free.fit(way.least))[: way.wholes + 1].tolist()
    looked_at = {*rows_where(free)[: way.wholes + 1].tolist(), *some_free}
    looked_at.update(rows_where(fits & world.leaving).tolist())
    looked_at.update(row for row in told if bool(open_to[row]))
    if limits is not None:
        looked_at.update(row for row in limits.rows if bool(fits[row]))
    return sorted(looked_at)


def _leaving_on(
    request: Request, world: World, row: int, limits: Limits | None, told: Sequence[Hold]
) -> tuple[Turn, Found] | None:
    node, penalty = as_limited(request, world, row, limits)
    return None if node is None else find_leaving_on(request, node, penalty, told)


class _Node(NamedTuple):
    """A node as each part may use it; None: not at all."""

    whole: Node | None
    rest: Node | None


class _Look:
    """Whom to displace for a gang divided in one way: the set of least cost, of all sets of nodes."""

    def __init__(
        self,
        way: Division,
        request: Request,
        world: World,
        horizons: Horizons,
        candidates: Candidates,
        limits: Limits | None,
    ) -> None:
        self._way = way
        self._world = world
        self.is_exact = True
        rows = _likely(way, request, world, horizons)
        self._nodes: dict[int, _Node] = {}
        self.live: dict[int, list[Live]] = {}  # whom it may displace, by node
        for row in rows:
            parts = (way.whole, way.least)
            nodes = _Node(*(as_limited(part, world, row, limits)[0] for part in parts))
            if nodes.rest is not None:
                self._nodes[row] = nodes
                self.live[row] = candidates(nodes.rest)

    def least_cost(self, table: Costs) -> int | None:
        """What the cheapest victims cost; None: nobody's going would do."""
        way, most = self._way, (self._way.wholes, 0 if self._way.rest is None else 1)
        # What is cheapest for so many parts on the nodes looked at until now.
        cheapest: Options = {(0, 0): 0}
        lots = self._linked()
        left = sum(map(len, lots))
        for rows in lots:
            left -= len(rows)
            options = self._options(rows, table)
            grown = dict(cheapest)
            for (whole, rest), cost in cheapest.items():
                for (more, also), added in options.items():
                    key = (min(whole + more, most[0]), rest + also)
                    if key[1] <= most[1] and whole + more <= way.wholes:
                        grown[key] = min(cost + added, grown.get(key, cost + added))
            # Who has too few whole nodes to get there with all that are left never will.
            cheapest = {key: cost for key, cost in grown.items() if key[0] + left >= way.wholes}
        return cheapest.get(most)

    def _linked(self) -> list[list[int]]:
        """Rows in lots such that nobody who may be displaced is on nodes of two."""
        lots: dict[int, list[int]] = {}
        for row, lives in self.live.items():
            lot = [row]
            for other in {each for live in lives for each in live.rows if each in lots}:
                if lots[other] is not lot:
                    lot += lots[other]
                    lots.update(dict.fromkeys(lot, lot))
            lots.update(dict.fromkeys(lot, lot))
        return [sorted(lot) for lot in {id(lot): lot for lot in lots.values()}.values()]

    def _options(self, rows: list[int], table: Costs) -> Options:
        """The least cost of each number of parts on nodes of one lot."""
        whole: dict[frozenset[int], list[int]] = {}  # nodes by who has to go for all of it
        for row in rows:
            victims = self._victims(row, frozenset(), table, is_whole=True)
            if victims is not None:
                whole.setdefault(victims, []).append(row)
        options: Options = {(0, 0): 0}

        def offer(key: tuple[int, int], cost: int) -> None:
            options[key] = min(cost, options.get(key, cost))

        for chosen in self._subsets(list(whole), table):
            going = frozenset[int]().union(*chosen)
            cost = sum(table.cost[number] for number in going)
            cleared = [row for victims in chosen for row in whole[victims]]
            for count in range(min(len(cleared), self._way.wholes) + 1):
                offer((count, 0), cost)
            for row in rows if self._way.rest is not None else ():
                more = self._victims(row, going, table, is_whole=False)
                if more is not None:
                    total = cost + sum(table.cost[number] for number in more)
                    left = len(cleared) - (row in cleared)
                    for count in range(min(left, self._way.wholes) + 1):
                        offer((count, 1), total)
        return options

    def _subsets(self, groups: list[frozenset[int]], table: Costs) -> list[tuple[frozenset[int], ...]]:
        """Whom to let go together: every subset is tried, or of many groups each alone and the first few."""
        if len(groups) <= GROUPS_MAX:
            return [each for size in range(len(groups) + 1) for each in combinations(groups, size)]
        self.is_exact = False
        groups.sort(key=lambda group: sum(table.cost[number] for number in group))
        return [(), *((group,) for group in groups), *(tuple(groups[:n]) for n in range(2, len(groups) + 1))]

    def _victims(
        self, row: int, going: frozenset[int], table: Costs, *, is_whole: bool
    ) -> frozenset[int] | None:
        """Who has to go for a part on this node, where these go anyway; None: nobody's going would do."""
        node = self._nodes[row].whole if is_whole else self._nodes[row].rest
        if node is None:
            return None
        here = {live.number: live for live in self.live[row]}
        gone = [here[number].hold for number in going if number in here]
        staying = [live for number, live in here.items() if number not in going]
        part = self._way.whole if is_whole else self._way.least
        cost = least_cost(part, node, node.spare_with([*node.leaving, *gone]), staying, table)
        return None if cost is None else frozenset(live.number for live in table.victims(cost))


def _likely(way: Division, request: Request, world: World, horizons: Horizons) -> list[int]:
    """Rows of nodes that may have to give way, a bounded number: those first that lose least at least."""
    horizon = horizons.of(request)
    if horizon is None:
        return []
    chosen: set[int] = set()
    for part, wanted in ((way.whole, way.wholes), (way.least, 1)):
        rows = rows_where(way.nodes & ~world.drains & horizon.pool.fit(part))
        bounds = horizon.bounds(part)[rows]
        first = xp.lexsort(xp.stack([rows, bounds]))[: wanted + NODES_TRIED_MAX]
        chosen.update(lists((rows,), first)[0])
    return sorted(chosen)
