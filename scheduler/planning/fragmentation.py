"""Which node a request should start on, so that what stays free is what the site will be asked for.

The idea is fragmentation gradient descent (FGD, Weng et al., USENIX ATC'23). Of a node, and of one kind of
request in the site's mix, the free GPU thousandths are a *fragment* as far as that kind can't use them: all
of them where it doesn't fit (GPUs, CPUs, host memory, a job slot), else those of the GPUs that are too small
for it. A node's fragmentation is the mean over the mix. A request goes where it adds least.

In this order, all of it integers, so that numpy and CuPy choose alike (R8):

1. *Cost*: what it adds to the fragmentation, in steps of QUANTUM_MILLI. Without steps a thousandth of a GPU
   would decide; with them nodes that are about equal are equal, and the next rules speak. With
   `WattColumns` the watts that it adds count as well, at W_PER_QUANTUM.
2. *Pressure*: GPUs of models that much of the mix asks for by name stay free for it.
3. *Best fit*: the node with the least left, its CPUs and GPUs each as a number of mean requests.
4. The tie rank: the row of the node where none is given.

Among the GPUs of a node a share goes by the same cost and pressure, then to the GPU with the least free.
Whole GPUs are assumed to be taken by pressure, then the smallest, then by position.

Before all of it: a gang goes where its GPUs can be nearest to each other.

Scores are kept by request shape and renewed only where a node has changed; nodes that are alike (`alike.py`)
are rated once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from scheduler.model.snapshot import UNKNOWN, WHOLE_MILLI, MixColumns
from scheduler.planning.alike import Numbering, States
from scheduler.planning.arrays import rows_where, some, xp
from scheduler.planning.kept import Kept
from scheduler.planning.pool import Pool, Shape

NO_POSITION: Final = -1
# FGD truncates 100 · sigmoid(change / 1000): at its steepest, around no change, a step is 40 thousandths.
QUANTUM_MILLI: Final = 40
# How many more watts are worth a quantum less of fragmentation. From 15 to 60 the published experiment gives
# nearly the same draw (docs/PLACEMENT.md); above, power is lost, and fragmentation gains little.
W_PER_QUANTUM: Final = 30
# A choice is one int64: nearness, cost, pressure, best fit and tie rank, the most important highest.
_NEAR_BITS = 2
_COST_BITS = 20
_PRESSURE_BITS = 3
_FIT_BITS = 17
_RANK_BITS = 20
_NEVER: Final = 1 << (_NEAR_BITS + _COST_BITS + _PRESSURE_BITS + _FIT_BITS + _RANK_BITS)
# What is left is told apart to this part of a mean request.
_FIT_PARTS = 100
_PRESSURE_PARTS = 10**12
# Cells of one intermediate (rows, kinds, width) array: a fleet is rated in parts of this size.
_CELLS_MAX = 1 << 20
# So that no weighted sum of thousandths leaves int64.
_WEIGHT_SUM_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class WattColumns:
    """What nodes draw, int64. A GPU is busy if any of it is used, a CPU package if any of its CPUs is."""

    gpu_idle_w: Any  # (nodes, width)
    gpu_busy_w: Any  # (nodes, width)
    cpus: Any  # (nodes,): that the node has, in the unit of `Pool.cpus`
    package_cpus: Any  # (nodes,): of one package
    package_idle_w: Any  # (nodes,)
    package_busy_w: Any  # (nodes,)

    def added_w(self, rows: Any, first_used: Any, cpus_before: Any, cpus_after: Any) -> Any:
        """Shape (rows,): watts more, if these CPUs stay free and GPUs are used for the first time.

        Args:
            rows: Shape (rows,). Nodes.
            first_used: Bool, shape (rows, width). GPUs that nobody used and that will be used.
            cpus_before: Shape (rows,). Free CPUs.
            cpus_after: Shape (rows,). Free CPUs then.
        """
        gpus_w = xp.where(first_used, self.gpu_busy_w[rows] - self.gpu_idle_w[rows], 0).sum(axis=1)
        woken = self._busy_packages(rows, cpus_after) - self._busy_packages(rows, cpus_before)
        return gpus_w + woken * (self.package_busy_w[rows] - self.package_idle_w[rows])

    def _busy_packages(self, rows: Any, cpus: Any) -> Any:
        return -((cpus - self.cpus[rows]) // self.package_cpus[rows])


class _Host(NamedTuple):
    """What is left of nodes beside their GPUs. Shape (rows,) each."""

    cpus: Any
    memory_mib: Any
    slots: Any

    def at(self, places: Any) -> "_Host":
        """The same of some of the rows."""
        return _Host(self.cpus[places], self.memory_mib[places], self.slots[places])


class _Asks(NamedTuple):
    """What the kinds of a mix ask of a GPU, each once. Shape (asks,), and of each kind which it is."""

    sets: Any  # of `_served`
    milli: Any
    mib: Any
    of_kind: Any  # (kinds,)


class Fragmentation:
    """Chooses nodes of a pool for requests, with a mix of requests in view.

    The pool is read when `best` is called. Whoever changes what is free on a node calls `changed` before
    the next `best`; `fits` and the shape of the pool stay as they are.

    Args:
        pool: What is free.
        mix: The requests to leave room for; its weights sum to less than 2^40.
        watts: What nodes draw; None: power does not count.
        tie_rank: Int64, shape (nodes,), unique, 0 to 2^20 - 1: which of equal nodes goes first, the lowest;
            None: by row.
        closed: Bool, shape (nodes,): nodes that must take nothing; None: none.
        nearness: Bool, shape (nodes, width, width) each: which GPUs are near each other, the nearest first.
        numbering: The states of the pool's nodes as somebody keeps them; None: they are made here.
    """

    def __init__(
        self,
        pool: Pool,
        mix: MixColumns,
        watts: WattColumns | None = None,
        tie_rank: Any = None,
        closed: Any = None,
        nearness: Sequence[Any] = (),
        numbering: Callable[[Pool], Numbering] | None = None,
    ) -> None:
        nodes = len(pool.cpus)
        assert nodes < 1 << _RANK_BITS, "the tie rank has its bits"
        assert len(nearness) < 1 << _NEAR_BITS, "and nearness its own"
        self._pool = pool
        self._mix = mix
        self._watts = watts
        self._is_open = xp.ones(nodes, dtype=bool) if closed is None else ~closed
        self._nearness = nearness
        # What power a node draws for it depends on more than its state.
        made = numbering or (lambda free: Numbering(free, nearness))
        alike = States(pool, mix, lambda: made(pool)) if watts is None else None
        self._alike = alike if alike is not None and alike.are_of_use else None
        self._kept = Kept(nodes)
        self._rank = xp.arange(nodes, dtype=xp.int64) if tie_rank is None else tie_rank
        # A mix may be empty: then all costs the same, and the rules after it decide.
        self._weight = max(1, mix.weight.sum().item())
        assert self._weight < _WEIGHT_SUM_MAX, "weighted sums are exact"
        self._cpus_asked = (mix.weight * mix.cpus).sum().item()
        self._milli_asked = (mix.weight * mix.gpus * mix.share_milli).sum().item()
        # Bool, shape (sets, nodes, width): GPUs of the models of a set.
        self._served, sets = _served(pool, mix)
        self._asks = _asks(mix, sets)
        self._pressure = _pressure(pool, mix)
        # Of each node and ask, where it is not stale: thousandths on GPUs that are large enough for it, and
        # how many such GPUs; of each node the weighted thousandths that are no fragment.
        self._large_milli = xp.zeros((nodes, len(self._asks.sets)), dtype=xp.int64)
        self._large_gpus = xp.zeros((nodes, len(self._asks.sets)), dtype=xp.int64)
        self._usable = xp.zeros(nodes, dtype=xp.int64)
        self._is_stale = xp.ones(nodes, dtype=bool)
        self._changed: set[int] = set()  # since the states were looked at

    def changed(self, node: int) -> None:
        """Take notice that what is free on this node is not what it was."""
        self._changed.add(node)
        self._is_stale[node] = True
        self._kept.changed(node)

    def best(self, request: Shape, without: Sequence[int] = ()) -> tuple[int, int] | None:
        """The node to start on, and for a share the position of its GPU, else NO_POSITION.

        None where it fits on no node, those at the rows `without` left out.
        """
        if not len(self._rank):
            return None
        if self._changed and self._alike is not None:
            self._alike.renew(xp.asarray(sorted(self._changed), dtype=xp.int64))
        self._changed.clear()
        shape = (
            request.gpus,
            request.share_milli,
            request.gpu_memory_mib,
            request.models,
            request.cpus,
            request.memory_mib,
        )
        rated = self._kept.column(shape, lambda rows: self._rated(request, rows))
        keys = rated[0]
        if without:
            keys = keys.copy()
            for row in without:
                keys[row] = _NEVER
        node: int = keys.argmin().item()
        return None if keys[node].item() == _NEVER else (node, rated[1, node].item())

    def fits_gpus(self, request: Shape) -> bool:
        """Whether the GPU part of the request fits on a node."""
        return some(self._gpus_fit(request))

    def _rated(self, request: Shape, rows: Any) -> Any:
        """Keys and positions of these nodes. Shape (2, rows)."""
        rated = _nowhere(len(rows))
        places = self._fitting(request, rows)
        if not len(places):
            return rated
        rows = rows[places]
        if self._alike is not None:
            heads = self._alike.answers(request, rows, lambda each: self._heads(request, each))
        else:
            heads = self._heads(request, rows)
        rated[0, places] = self._key(request, rows, heads[0])
        rated[1, places] = heads[1]
        return rated

    def _fitting(self, request: Shape, rows: Any) -> Any:
        """Where among these nodes the request fits."""
        places = rows_where(self._gpus_fit(request)[rows])
        return places[rows_where(self._pool.fit_host(request, rows[places]))]

    def _gpus_fit(self, request: Shape) -> Any:
        """Bool, shape (nodes,): where the GPU part of the request fits, and that are not closed."""
        wants = (request.gpus, request.share_milli, request.gpu_memory_mib, request.models)
        return self._kept.column(wants, lambda rows: self._gpus_fit_on(request, rows))

    def _gpus_fit_on(self, request: Shape, rows: Any) -> Any:
        fits = xp.zeros(len(rows), dtype=bool)
        # In a fleet that is busy few nodes have anything left at all.
        enough = self._free_milli()[rows] >= request.gpus * request.share_milli
        places = rows_where(enough & self._is_open[rows])
        fits[places] = self._pool.fit_gpus(request, rows[places])
        return fits

    def _free_milli(self) -> Any:
        """What is free of all GPUs of each node. Shape (nodes,)."""
        return self._kept.column("free_milli", lambda rows: self._pool.milli[rows].sum(axis=1))

    def _heads(self, request: Shape, rows: Any) -> Any:
        """What of their keys alike nodes share, and their positions. Shape (2, rows)."""
        return xp.concatenate([self._heads_of(request, part) for part in self._parts(rows)], axis=1)

    def _heads_of(self, request: Shape, rows: Any) -> Any:
        pool = self._pool
        self._prepare(rows)
        usable = self._usable_gpus(request, rows)
        after = _Host(
            pool.cpus[rows] - request.cpus, pool.memory_mib[rows] - request.memory_mib, pool.slots[rows] - 1
        )
        position = xp.full(len(rows), NO_POSITION, dtype=xp.int64)
        if request.gpus == 0:
            cost = self._cost(request, rows, self._usable_with(rows, after), usable, after)
            pressure = xp.zeros(len(rows), dtype=xp.int64)
        elif request.share_milli < WHOLE_MILLI:
            cost, pressure, position = self._rate_shares(request, rows, usable, after)
        else:
            cost, pressure = self._rate_whole(request, rows, usable, after)
        bound = 1 << (_COST_BITS - 1)
        cost = xp.clip(cost, -bound, bound - 1) + bound
        head = (self._far(request, rows, usable) << _COST_BITS) | cost
        return xp.stack([(head << _PRESSURE_BITS) | pressure, position])

    def _far(self, request: Shape, rows: Any, usable: Any) -> Any:
        """How far the request's GPUs are from each other at best, 0 for the nearest. Shape (rows,)."""
        far = xp.zeros(len(rows), dtype=xp.int64)
        if request.gpus > 1:
            is_near = xp.zeros(len(rows), dtype=bool)
            for same in self._nearness:
                together = (same[rows] & usable[:, None, :]).sum(axis=2)
                is_near |= ((together >= request.gpus) & usable).any(axis=1)
                far += xp.where(is_near, 0, 1)
        return far

    def _usable_gpus(self, request: Shape, rows: Any) -> Any:
        """Bool, shape (rows, width): GPUs that have what the request wants of each; none if it wants none."""
        pool = self._pool
        if request.gpus == 0:
            return xp.zeros((len(rows), pool.milli.shape[1]), dtype=bool)
        return pool.usable(request, rows)

    def _rate_shares(self, request: Shape, rows: Any, usable: Any, after: _Host) -> tuple[Any, Any, Any]:
        """Cost, pressure and position of the best GPU of each node for a share. Shape (rows,) each."""
        pool = self._pool
        places, at = xp.nonzero(usable)
        nodes = rows[places]
        milli, mib = pool.milli[nodes, at], pool.mib[nodes, at]
        left = self._usable_with_gpu(
            nodes, at, milli - request.share_milli, mib - request.gpu_memory_mib, after.at(places)
        )
        taken = xp.zeros((len(nodes), usable.shape[1]), dtype=bool)
        taken[xp.arange(len(nodes)), at] = True
        costs = xp.zeros(usable.shape, dtype=xp.int64)
        costs[places, at] = self._cost(request, nodes, left, taken, after.at(places))
        # One int64 again: cost, pressure, thousandths free (10 bits), position.
        order = (costs << _PRESSURE_BITS) + self._pressure[rows]
        order = (order << 10) + pool.milli[rows]
        order = order * usable.shape[1] + xp.arange(usable.shape[1])
        best = xp.where(usable, order, _NEVER).argmin(axis=1)
        each = xp.arange(len(rows))
        return costs[each, best], self._pressure[rows, best], best

    def _rate_whole(self, request: Shape, rows: Any, usable: Any, after: _Host) -> tuple[Any, Any]:
        """Cost and pressure of whole GPUs on each node. Shape (rows,) each."""
        pool = self._pool
        width = usable.shape[1]
        milli, mib = pool.milli[rows], pool.mib[rows]
        # The GPUs by pressure, size and position: unique, so that exactly as many are taken as are wanted.
        order = ((self._pressure[rows] << 32) + mib) * width + xp.arange(width)
        order = xp.where(usable, order, _NEVER)
        if request.gpus == 1:
            at = order.argmin(axis=1)
            taken = xp.arange(width) == at[:, None]
            none = xp.zeros(len(rows), dtype=xp.int64)
            left = self._usable_with_gpu(rows, at, none, none, after)
        else:
            taken = order <= xp.sort(order, axis=1)[:, request.gpus - 1, None]
            large = self._large(rows, xp.where(taken, 0, milli), mib)
            left = self._usable_weighted(*large, after)
        pressure = xp.where(taken, self._pressure[rows], 0).max(axis=1)
        return self._cost(request, rows, left, taken, after), pressure

    def _cost(self, request: Shape, rows: Any, left: Any, taken: Any, after: _Host) -> Any:
        """What it costs that these GPUs are taken and `left` stays usable (weighted). Shape (rows,)."""
        # What it takes is free no more, and so no fragment: the rest of what was usable and is not, is one.
        asked = request.gpus * request.share_milli * self._weight
        added = (self._usable[rows] - left - asked) // (QUANTUM_MILLI * self._weight)
        if self._watts is None:
            return added
        pool = self._pool
        first_used = taken & (pool.milli[rows] == WHOLE_MILLI)
        return added * W_PER_QUANTUM + self._watts.added_w(rows, first_used, pool.cpus[rows], after.cpus)

    def _key(self, request: Shape, rows: Any, heads: Any) -> Any:
        """The heads with best fit and tie rank below them. Shape (rows,)."""
        pool = self._pool
        cpus = pool.cpus[rows] - request.cpus
        milli = self._free_milli()[rows] - request.gpus * request.share_milli
        fit = xp.zeros(len(rows), dtype=xp.int64)
        for free, asked in ((cpus, self._cpus_asked), (milli, self._milli_asked)):
            if asked:
                fit += xp.maximum(free, 0) * (_FIT_PARTS * self._weight) // asked
        fit = xp.minimum(fit, (1 << _FIT_BITS) - 1)
        return (((heads << _FIT_BITS) | fit) << _RANK_BITS) | self._rank[rows]

    def _prepare(self, rows: Any) -> None:
        """Bring what is known of each of these nodes and each kind up to date."""
        rows = rows[rows_where(self._is_stale[rows])]
        if not len(rows):
            return
        pool = self._pool
        large = self._large(rows, pool.milli[rows], pool.mib[rows])
        self._large_milli[rows], self._large_gpus[rows] = large
        host = _Host(pool.cpus[rows], pool.memory_mib[rows], pool.slots[rows])
        self._usable[rows] = self._usable_weighted(*large, host)
        self._is_stale[rows] = False

    def _parts(self, rows: Any) -> Iterator[Any]:
        """The rows in parts whose intermediate arrays are of bounded size."""
        size = max(1, _CELLS_MAX // max(1, len(self._mix) * self._served.shape[2]))
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _large(self, rows: Any, milli: Any, mib: Any) -> tuple[Any, Any]:
        """By ask, thousandths on GPUs large enough for it, and how many those are. Shape (rows, asks)."""
        asks = self._asks
        large = self._served[asks.sets, rows[:, None]] & (milli[:, None] >= asks.milli[:, None])
        large &= (asks.mib == 0)[:, None] | (mib[:, None] >= asks.mib[:, None])
        return xp.where(large, milli[:, None], 0).sum(axis=2), large.sum(axis=2)

    def _usable_with(self, rows: Any, host: _Host) -> Any:
        """Weighted thousandths that are no fragment, if this is left of the hosts. Shape (rows,)."""
        return self._usable_weighted(self._large_milli[rows], self._large_gpus[rows], host)

    def _usable_with_gpu(self, rows: Any, at: Any, milli: Any, mib: Any, host: _Host) -> Any:
        """The same, if of the GPU at this position this much is left. Shape (rows,)."""
        pool, asks = self._pool, self._asks
        accepted = self._served[asks.sets, rows[:, None], at[:, None]]
        milli_before, mib_before = pool.milli[rows, at][:, None], pool.mib[rows, at][:, None]
        milli, mib = milli[:, None], mib[:, None]
        any_memory = asks.mib == 0
        before = accepted & (milli_before >= asks.milli) & (any_memory | (mib_before >= asks.mib))
        then = accepted & (milli >= asks.milli) & (any_memory | (mib >= asks.mib))
        large_milli = self._large_milli[rows] + xp.where(then, milli, 0) - xp.where(before, milli_before, 0)
        large_gpus = self._large_gpus[rows] + then.astype(xp.int64) - before.astype(xp.int64)
        return self._usable_weighted(large_milli, large_gpus, host)

    def _usable_weighted(self, large_milli: Any, large_gpus: Any, host: _Host) -> Any:
        """Weighted thousandths that are no fragment. Shape (rows,)."""
        mix, of_kind = self._mix, self._asks.of_kind
        fits = (large_gpus[:, of_kind] >= mix.gpus) & (mix.gpus > 0) & (host.slots >= 1)[:, None]
        fits &= (mix.cpus == 0) | (host.cpus[:, None] >= mix.cpus)
        fits &= (mix.memory_mib == 0) | (host.memory_mib[:, None] >= mix.memory_mib)
        return (xp.where(fits, large_milli[:, of_kind], 0) * mix.weight).sum(axis=1)


def _served(pool: Pool, mix: MixColumns) -> tuple[Any, Any]:
    """GPUs by who is served: shape (sets, nodes, width); and the row of it for each kind of the mix.

    A set is one of models, or any; and, where there are MIG instances, the same without those.
    """
    anything = xp.ones((1, *pool.milli.shape), dtype=bool)
    served = xp.concatenate([pool.fits, anything])
    sets = xp.where(mix.models == UNKNOWN, len(pool.fits), mix.models)
    if pool.whole is not None:
        sets = sets + xp.where(mix.gpus > 1, len(served), 0)
        served = xp.concatenate([served, served & pool.whole])
    return served, sets


def _asks(mix: MixColumns, sets: Any) -> _Asks:
    """What the mix asks of a GPU; `sets` are the rows of `_served` of its kinds."""
    known: dict[tuple[int, int, int], int] = {}
    by_kind = zip(sets.tolist(), mix.share_milli.tolist(), mix.gpu_memory_mib.tolist(), strict=True)
    of_kind = [known.setdefault(ask, len(known)) for ask in by_kind]
    columns = xp.asarray(list(known), dtype=xp.int64).reshape(len(known), 3)
    return _Asks(columns[:, 0], columns[:, 1], columns[:, 2], xp.asarray(of_kind, dtype=xp.int64))


def _nowhere(rows: int) -> Any:
    """Keys and positions of nodes on which it does not fit. Shape (2, rows)."""
    rated = xp.full((2, rows), _NEVER, dtype=xp.int64)
    rated[1] = NO_POSITION
    return rated


def _pressure(pool: Pool, mix: MixColumns) -> Any:
    """How much the mix asks for each GPU by its model, 0 to the most in its bits. Shape (nodes, width).

    What is asked for of a set of models is spread over all GPUs that serve it. Requests that take any model
    press on all alike and so on none.
    """
    pressure = xp.zeros(pool.milli.shape, dtype=xp.int64)
    asked_milli = (mix.weight * mix.gpus * mix.share_milli).tolist()
    by_models: dict[int, int] = {}
    for models, milli in zip(mix.models.tolist(), asked_milli, strict=True):
        by_models[models] = by_models.get(models, 0) + milli
    for models, gpus in enumerate(pool.fits.sum(axis=(1, 2)).tolist()):
        milli = by_models.get(models, 0)
        if milli and gpus:
            # In parts of all that is asked for, so that the weights' unit doesn't matter.
            pressure += xp.where(pool.fits[models], milli * _PRESSURE_PARTS // sum(asked_milli) // gpus, 0)
    highest = pressure.max().item() if pressure.size else 0
    return pressure * ((1 << _PRESSURE_BITS) - 1) // max(1, highest)
