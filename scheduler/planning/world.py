"""The snapshot as what a plan works on: columns of what is free, leaving and live, and nodes made of them.

Everything is columns; a node becomes objects (`Node`, `Live`) when a plan has to look into it, and few are.
What such a node gives away or gets back goes into the columns at once (`changed`).

Three layers: *free*, what nobody has; *soon*, that and what leaves without a further decision; and on top of
it what incumbents hold, the live jobs that stay unless they are displaced.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scheduler.model.policy import Order, Policy
from scheduler.model.snapshot import (
    NOT_DRAINING,
    PENDING,
    PREEMPTING,
    STOPPING,
    UNKNOWN,
    WHOLE_MILLI,
    Snapshot,
)
from scheduler.planning.allocator import Hold, Live, Node, Part, Request, Spare
from scheduler.planning.arrays import lists, rows_where, some, xp
from scheduler.planning.fragmentation import Fragmentation
from scheduler.planning.hosts import Hosts, hosts_of
from scheduler.planning.kinds import Kinds
from scheduler.planning.layout import Layout
from scheduler.planning.leaving import Leavers, Turns, by_node
from scheduler.planning.mix import as_parts, mix_of
from scheduler.planning.pool import Pool, summed
from scheduler.planning.valuation import at_risk, at_stake, lost_work, outranked, value_bars, value_of

# Later than any moment that a snapshot can name.
NEVER = 1 << 62
# So few nodes are looked at one by one, as objects: that costs less than columns that would leave some out.
NODES_ALL_TRIED_MAX = 2


@dataclass(slots=True)
class Incumbents:
    """The live jobs that stay unless they are displaced, as `Live` has them. Shape (incumbents,) each."""

    row: Any  # of `JobColumns`
    number: Any
    job_class: Any
    priority: Any
    value_bar: Any
    may_yield: Any  # bool; false once it was told to go
    yields_us: Any
    ends_us: Any
    started_us: Any
    ready_us: Any
    lost_gpu_ms: Any
    loss_microusd: Any
    hosts: Hosts  # what they have of the nodes beside GPUs; `job` is an index of the columns above
    # What they hold: shape (holdings,) each, sorted by holder, which is an index of the columns above.
    holder: Any
    cell: Any
    milli: Any
    mib: Any  # of shares; a whole GPU's memory goes with it
    first: Any  # shape (incumbents + 1,): where the holdings of each begin

    def outranked(self, request: Request, order: Order) -> Any:
        """Bool, shape (incumbents,): who ranks low enough to be displaced by the request."""
        return outranked(request, order, self.job_class, self.priority, self.value_bar)


@dataclass(frozen=True, slots=True)
class Reach:
    """What a request could have if all went whom it may displace."""

    pool: Pool
    outranked: Any  # bool, shape (incumbents,)


class World:
    """The nodes of a snapshot, and what of each is free, leaving and live.

    `stopping` are jobs that this plan stops or requeues for their own or the node's sake: they count as
    leaving already.
    """

    def __init__(
        self, snapshot: Snapshot, policy: Policy, stopping: frozenset[int], layout: Layout | None = None
    ) -> None:
        self.now_us = snapshot.now_us
        self._snapshot = snapshot
        self._policy = policy
        self._stopping = stopping
        self.layout = layout if layout is not None and layout.holds_for(snapshot) else Layout(snapshot)
        self.drains = snapshot.nodes.drain != NOT_DRAINING
        self.is_small = len(self.drains) <= NODES_ALL_TRIED_MAX
        self._nodes: dict[int, Node] = {}
        self._live: dict[int, list[Live]] = {}
        self._served: dict[int, int] = {}
        self._leaving_for: dict[int, list[Hold]] = {}  # by preemptor, of the nodes that were looked into
        # What no free GPUs serve. They only shrink: they never will.
        self._nowhere_free: set[tuple[int, ...]] = set()
        self._displaceable: tuple[tuple[int, int, int], Any] | None = None  # by whoever asked last, by rank
        self._reaches: dict[bytes, Reach] = {}  # by who may be displaced
        self._changed: dict[int, Node] = {}  # since the columns were looked at
        self._soon: Pool | None = None
        self._turns: Turns | None = None
        self._served_since: list[int] = []  # whose turns are not in it
        self._turns_changed: set[int] = set()  # rows of nodes that are not in it as they are
        self._placement: Fragmentation | None = None
        self._split(snapshot)
        self._free = self._made_free(snapshot)

    # Layers that not every plan needs -----------------------------------------------------------

    @property
    def free(self) -> Pool:
        """What nobody has."""
        self._flush()
        return self._free

    @property
    def soon(self) -> Pool:
        """What is free, and what leaves without a further decision."""
        self._flush()
        if self._soon is None:
            self._soon = self._made_soon()
        return self._soon

    @property
    def placement(self) -> Fragmentation:
        """Chooses among the nodes on which something free fits."""
        self._flush()
        if self._placement is None:
            mix = self._snapshot.mix
            mix = mix_of(self._snapshot.jobs) if mix is None else mix
            mix = as_parts(mix, self.layout.width)
            layout = self.layout
            self._placement = Fragmentation(
                self._free, mix, closed=self.drains, nearness=layout.nearness, numbering=layout.numbering
            )
        return self._placement

    @property
    def turns(self) -> Turns:
        """When each node is ready for a request that takes what leaves."""
        self._flush()
        rows = self._leavers.rows_for
        others = self._turns_changed.union(*(rows.get(number, ()) for number in self._served_since))
        self._served_since.clear()
        self._turns_changed.clear()
        if self._turns is None:
            self._turns = Turns(self._leavers, self._free, self.leaving, self.drains)
            others |= self._nodes.keys()
        for row in others:
            self._turns.put(self.node(row))
        return self._turns

    def leaves_for(self, request: Request) -> list[int]:
        """Rows of the nodes on which somebody leaves for the request; in a small world for anybody."""
        if self.is_small:
            return [node.row for node in self.nodes() if node.leaving and not node.drains]
        return [row for row in self._leavers.rows_for.get(request.number, ()) if not self.drains[row]]

    @cached_property
    def incumbents(self) -> Incumbents:
        """The live jobs that stay unless they are displaced."""
        return self._made_incumbents(self._snapshot)

    @cached_property
    def _leavers(self) -> Leavers:
        """Who leaves, as the snapshot has it."""
        goes = self._hosts.of(self._goes)
        held = rows_where(self._goes_away)
        return Leavers(self._snapshot, self.layout, goes, held, self._holder, self._mib, self._stopping)

    @cached_property
    def kinds(self) -> Kinds:
        """The kinds of nodes, for gangs over several."""
        return Kinds(self.layout)

    @cached_property
    def sizes_wanted(self) -> list[int]:
        """How many GPUs of a node pending jobs want."""
        jobs = self._snapshot.jobs
        counts = xp.bincount(xp.where(jobs.state == PENDING, xp.clip(jobs.gpus, 0, self.layout.width), 0))
        return (rows_where(counts[1:]) + 1).tolist()  # type: ignore[no-any-return]

    # Nodes as objects ---------------------------------------------------------------------------

    def node(self, row: int) -> Node:
        """The node at this row."""
        known = self._nodes.get(row)
        if known is None:
            known = self._nodes[row] = self._made_node(row)
        return known

    def nodes(self) -> Iterator[Node]:
        """All nodes: for those who explain, and look at everything."""
        return (self.node(row) for row in range(len(self.drains)))

    def live(self, row: int) -> list[Live]:
        """The live jobs of a node that stay unless they are displaced."""
        known = self._live.get(row)
        if known is None:
            known = self._live[row] = self._made_live(row)
        return known

    # Changes ------------------------------------------------------------------------------------

    def leave(self, victim: Live, preemptor: int) -> None:
        """Let a live job leave all its nodes for a preemptor."""
        for each in victim.rows:
            node, live = self.node(each), self.live(each)
            place = next(place for place, one in enumerate(live) if one.number == victim.number)
            hold = live.pop(place).hold
            hold.preemptor = preemptor
            hold.stop_us = self.now_us
            node.leaving.append(hold)
            self.leaving[each] = True
            self._leaving_for.setdefault(preemptor, []).append(hold)
        self.incumbents.may_yield[victim.index] = False
        self._displaceable = None

    def serve(self, number: int, served: int) -> None:
        """Remember when the job was served, on what leaves for it."""
        self._served[number] = served
        self._served_since.append(number)
        for hold in self._leaving_for.get(number, ()):
            hold.served = served

    def changed(self, node: Node) -> None:
        """Take over into the columns, when they are looked at next, what the node gave away or got back."""
        node.changed()
        self._changed[node.row] = node

    def _flush(self) -> None:
        if not self._changed:
            return
        for node in self._changed.values():
            self._free.put(node, node.free)
            if self._soon is not None:
                self._soon.put(node, node.soon)
            if self._placement is not None:
                self._placement.changed(node.row)
            if self._turns is not None and node.leaving:
                self._turns_changed.add(node.row)
        self._changed.clear()
        self._reaches.clear()

    # Looks --------------------------------------------------------------------------------------

    def best_free(self, request: Request, without: Sequence[int] = ()) -> tuple[int, int] | None:
        """Where the request fits into what is free: the node to start on and `Fragmentation.best`'s position.

        None where it fits on no node, those at the rows `without` left out.
        """
        wants = request.gpu_part
        if wants in self._nowhere_free:
            return None
        if self._placement is None:
            # To know that it fits nowhere is much cheaper than to make what chooses.
            fits = self.free.fit_gpus(request) & ~self.drains
            if not some(fits):
                self._nowhere_free.add(wants)
                return None
            if not some(fits & self.free.fit_host(request)):
                return None
        found = self.placement.best(request, without)
        if found is None and not self.placement.fits_gpus(request):
            self._nowhere_free.add(wants)
        return found

    def displaceable(self, request: Request) -> Any:
        """Bool, shape (incumbents,): whom the request may displace. Not to be changed."""
        jobs = self.incumbents
        rank = (request.job_class, request.priority, request.value)
        if self._displaceable is None or self._displaceable[0] != rank:
            self._displaceable = rank, jobs.outranked(request, self._policy.order) & jobs.may_yield
        return self._displaceable[1]

    def within_reach(self, request: Request) -> "Reach":
        """What is free, leaves, or is held by jobs that the request may displace."""
        self._flush()
        outranked = self.displaceable(request)
        key = outranked.tobytes()
        known = self._reaches.get(key)
        if known is None:
            known = self._reaches[key] = self._made_reach(outranked)
        return known

    def is_hopeless(self, request: Request) -> bool:
        """Whether the request fits nowhere, whoever goes, by what was found out when another one was refused.

        It is said only while nothing has changed since then: to find it out costs more than to look for room.
        """
        if self.is_small or self._changed or not self._reaches:
            return False
        known = self._reaches.get(self.displaceable(request).tobytes())
        return known is not None and not some(known.pool.fit(request) & ~self.drains)

    def _made_reach(self, outranked: Any) -> "Reach":
        jobs = self.incumbents
        if not some(outranked):
            return Reach(self.soon, outranked)
        if self.is_small:
            reach, goes = self.soon.copy(), outranked.tolist()
            for node in self.nodes():
                going = [live.hold for live in self.live(node.row) if goes[live.index]]
                reach.put(node, node.spare_with([*node.leaving, *going]))
            return Reach(reach, outranked)
        holds = outranked[jobs.holder]
        hosts = jobs.hosts.of(outranked)
        more = self.soon.plus(jobs.cell[holds], jobs.milli[holds], jobs.mib[holds], hosts.node, hosts.amounts)
        return Reach(more, outranked)

    def uuids(self, parts: Iterable[Part]) -> tuple[str, ...]:
        """The UUIDs of the parts, by node and index."""
        found: list[str] = []
        for _, row, positions in parts:
            if positions:
                gpus = self.layout.gpus(row)
                found += [gpus[position].uuid for position in sorted(positions)]
        return tuple(found)

    @cached_property
    def _places(self) -> tuple[Any, Any]:
        """Rows of the incumbents' hosts by node, and where in that each node's begin."""
        return by_node(self.incumbents.hosts.node, len(self.drains))

    # From the snapshot --------------------------------------------------------------------------

    def _split(self, snapshot: Snapshot) -> None:
        """Tell jobs that stay from those that leave, and whose each holding is."""
        jobs, holdings = snapshot.jobs, snapshot.holdings
        live = jobs.state != PENDING
        told = (jobs.state == PREEMPTING) | (jobs.state == STOPPING)
        if self._stopping:
            told |= xp.isin(jobs.number, xp.asarray(sorted(self._stopping), dtype=xp.int64))
        self._live_rows = live
        self._stays = live & ~told
        self._goes = live & told
        held = (holdings.job != UNKNOWN) & live[holdings.job] if len(jobs) else holdings.job != UNKNOWN
        self._holder = xp.where(held, holdings.job, UNKNOWN)  # UNKNOWN: what an ended job still occupies
        self._cell = self.layout.cell[holdings.gpu]
        self._mib = xp.where(holdings.share_milli < WHOLE_MILLI, holdings.memory_mib, 0)
        self._hosts = hosts_of(snapshot, live, self._holder)

    def _made_incumbents(self, snapshot: Snapshot) -> Incumbents:
        jobs, policy, now_us = snapshot.jobs, self._policy, self.now_us
        rows = rows_where(self._stays)
        held = rows_where(self._holder != UNKNOWN)
        held = held[self._stays[self._holder[held]]]
        held = held[self._holder[held].argsort(kind="stable")]
        holder = rows.searchsorted(self._holder[held])
        milli = snapshot.holdings.share_milli[held]
        started_us = xp.where(jobs.started_us[rows] == UNKNOWN, now_us, jobs.started_us[rows])
        preemptible = jobs.preemptible[rows]
        yields_us = xp.where(preemptible, started_us + jobs.min_runtime_us[rows], NEVER)
        hosts = self._hosts.of(self._stays)
        expected_us = jobs.expected_us[rows]
        gpu_milli = summed(holder, milli, len(rows))
        lost_gpu_ms = lost_work(snapshot, policy, rows, started_us, gpu_milli)
        lost_microusd = value_of(xp.maximum(jobs.value[rows], 0), lost_gpu_ms)
        return Incumbents(
            row=rows,
            number=jobs.number[rows],
            job_class=jobs.job_class[rows],
            priority=jobs.priority[rows],
            value_bar=value_bars(jobs.value[rows], jobs.restart_loss_us[rows], policy),
            may_yield=yields_us <= now_us,
            yields_us=yields_us,
            ends_us=xp.where(expected_us == UNKNOWN, NEVER, xp.maximum(now_us, started_us + expected_us)),
            started_us=started_us,
            ready_us=now_us + jobs.grace_us[rows],  # were it told to stop now
            lost_gpu_ms=lost_gpu_ms,
            loss_microusd=lost_microusd + at_risk(*at_stake(snapshot, policy.order, rows, gpu_milli)),
            hosts=hosts._replace(job=rows.searchsorted(hosts.job)),
            holder=holder,
            cell=self._cell[held],
            milli=milli,
            mib=self._mib[held],
            first=holder.searchsorted(xp.arange(len(rows) + 1, dtype=xp.int64)),
        )

    def _made_free(self, snapshot: Snapshot) -> Pool:
        layout, jobs, sizes, hosts = self.layout, snapshot.jobs, snapshot.nodes, self._hosts
        milli = snapshot.holdings.share_milli
        self._goes_away = (self._holder == UNKNOWN) | ~self._stays[self._holder] if len(jobs) else milli > 0
        self.leaving = xp.zeros(len(sizes), dtype=bool)
        self.leaving[hosts.of(self._goes).node] = True
        self.leaving[self._cell[self._goes_away] // max(layout.width, 1)] = True
        whole = xp.where(layout.row == UNKNOWN, 0, WHOLE_MILLI)
        shape = whole.shape
        # Closed GPUs, too: a node's own account has them.
        self._milli = whole - summed(self._cell, milli, layout.cells).reshape(shape)
        self._mib_free = layout.memory_mib - summed(self._cell, self._mib, layout.cells).reshape(shape)
        nodes = len(sizes)
        return Pool(
            xp.where(layout.is_open, self._milli, 0),
            xp.where(layout.is_open, self._mib_free, 0),
            sizes.cpus - summed(hosts.node, hosts.cpus, nodes),
            sizes.memory_mib - summed(hosts.node, hosts.memory_mib, nodes),
            sizes.live_jobs_max - xp.bincount(hosts.node, minlength=nodes),
            layout.fits,
            layout.is_open,
            layout.whole,
        )

    def _made_soon(self) -> Pool:
        if self.is_small:
            soon, known = self._free.copy(), self.nodes()
        else:
            goes, hosts = rows_where(self._goes_away), self._hosts.of(self._goes)
            milli = self._snapshot.holdings.share_milli[goes]
            soon = self._free.plus(self._cell[goes], milli, self._mib[goes], hosts.node, hosts.amounts)
            known = iter(self._nodes.values())
        for node in known:
            soon.put(node, node.soon)
        return soon

    def _made_node(self, row: int) -> Node:
        gpus = self.layout.gpus(row)
        count = len(gpus)
        free = Spare(
            self._milli[row, :count].tolist(),
            self._mib_free[row, :count].tolist(),
            int(self._free.cpus[row]),
            int(self._free.memory_mib[row]),
            int(self._free.slots[row]),
        )
        leaving = self._leavers.on(row) if self.leaving[row] else []
        for hold in leaving:
            hold.served = self._served.get(hold.preemptor, hold.served)
            self._leaving_for.setdefault(hold.preemptor, []).append(hold)
        return Node(row, gpus, free, bool(self.drains[row]), leaving, self.layout.suitable(row))

    def _made_live(self, row: int) -> list[Live]:
        jobs, width = self.incumbents, self.layout.width
        by_node, first_on_node = self._places
        here = by_node[int(first_on_node[row]) : int(first_on_node[row + 1])]
        members = jobs.hosts.job[here]
        firsts, counts = jobs.first[members], jobs.first[members + 1] - jobs.first[members]
        # The holdings of one after those of the other, and where those of each begin.
        ends = counts.cumsum()
        starts = ends - counts
        places = xp.arange(int(counts.sum()), dtype=xp.int64)
        holdings = (firsts - starts)[ends.searchsorted(places, side="right")] + places
        held = list(zip(*lists((jobs.cell, jobs.milli, jobs.mib), holdings), strict=True))
        made = []
        for index, cpus, memory_mib, start, count, values in zip(
            members.tolist(),
            *lists((jobs.hosts.cpus, jobs.hosts.memory_mib), here),
            starts.tolist(),
            counts.tolist(),
            zip(*lists(tuple(getattr(jobs, name) for name in _LIVE_COLUMNS), members), strict=True),
            strict=True,
        ):
            parts: dict[int, list[int]] = {}
            rows: tuple[int, ...] = (row,)
            for cell, milli, mib in held[start : start + count]:
                node, position = divmod(cell, width)
                if node != row:
                    rows = (*rows, node)
                elif position in parts:
                    parts[position][0] += milli
                    parts[position][1] += mib
                else:
                    parts[position] = [milli, mib]
            number, ready_us, *rest = values
            hold = Hold(number, parts, cpus, memory_mib, 1, UNKNOWN, UNKNOWN, ready_us)
            made.append(Live(index, rows if len(rows) == 1 else tuple(sorted(set(rows))), hold, count, *rest))
        return made


# Of `Incumbents`: what a job's hold has, then what the job has, in the order of `Live`.
_LIVE_COLUMNS = (
    "number", "ready_us", "job_class", "priority", "value_bar", "may_yield", "yields_us", "ends_us",
    "started_us", "lost_gpu_ms", "loss_microusd",
)  # fmt: skip
