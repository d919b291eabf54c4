"""What requests of a class could have of each node at most, and at what loss at least.

Whom a request may displace depends on its own rank; here everybody counts whom the first of its class may
displace, which is all that those after it may. So a node that does not do here will not do at all, and what
it costs here it costs at least: the few nodes where looking closely pays (`search.py`) are found without
looking at the others. A change on a node changes its row only.
"""

from typing import Any

from scheduler.model.policy import Order
from scheduler.planning.allocator import Node, Request, Spare
from scheduler.planning.arrays import some, xp
from scheduler.planning.kept import Kept
from scheduler.planning.pool import Pool, summed
from scheduler.planning.preemption import outranks
from scheduler.planning.world import NEVER, World


class Horizon:
    """Bounds of what a request, and those of its class that rank after it, can have."""

    def __init__(self, world: World, first: Request, order: Order) -> None:
        self._world = world
        self._first = first
        self._order = order
        jobs, soon = world.incumbents, world.soon
        nodes, width = soon.milli.shape
        self._bounds = Kept(nodes)
        goes = world.displaceable(first)
        holds, hosts = goes[jobs.holder], jobs.hosts.of(goes)
        cell, holder = jobs.cell[holds], jobs.holder[holds]
        self._pool = soon.plus(cell, jobs.milli[holds], jobs.mib[holds], hosts.node, hosts.amounts)
        self._going = self._pool.less(soon)  # what those have who may go
        # Nodes that are not in the columns as they are, and whether somebody there was told to go.
        self._changed: dict[int, tuple[Node, bool]] = {}
        loss, gpus = jobs.loss_microusd[holder], xp.bincount(jobs.holder, minlength=len(jobs.row))[holder]
        least = xp.full(nodes * width, NEVER, dtype=xp.int64)
        xp.minimum.at(least, cell, loss)
        # Of each GPU: the least loss of a holder; and by how many GPUs are wanted what its holders lose. A
        # job's loss counts in equal parts on as many of its GPUs: whoever takes some of them pays for all.
        self._least_loss = least.reshape(nodes, width)
        self._losses = {
            wanted: summed(cell, loss // xp.minimum(gpus, wanted), nodes * width).reshape(nodes, width)
            for wanted in sorted({*world.sizes_wanted, max(1, width)})
        }

    @property
    def pool(self) -> Pool:
        """What there is of each node, if all go who may."""
        self._flush()
        return self._pool

    def bounds(self, request: Request) -> Any:
        """Shape (nodes,): a loss that is not more than what the request takes there; NEVER: it can't be had.

        For its GPUs alone, so that it holds of all who want the same.
        """
        self._flush()
        return self._bounds.column(request.gpu_part, lambda rows: self._bounds_of(request, rows))

    def learn(self, request: Request, row: int, loss: int) -> None:
        """Take over the least loss that the request takes on a node; NEVER: it can't have its GPUs there.

        The host must lack nothing. Who ranks after it may displace no more than it may: so nobody of those
        who want the same GPUs of the node takes less, until it changes.
        """
        self.bounds(request)[row] = loss

    def changed(self, node: Node, *, somebody_goes: bool) -> None:
        """Take notice that a node gave something away, and whether somebody there was told to go."""
        before = self._changed.get(node.row)
        self._changed[node.row] = (node, somebody_goes or (before is not None and before[1]))

    def _flush(self) -> None:
        for row, (node, somebody_goes) in self._changed.items():
            if somebody_goes:
                self._look_again(node)
            self._pool.put(node, node.soon)
            self._pool.add(self._going, row)
            self._bounds.changed(row)
        self._changed.clear()

    def _look_again(self, node: Node) -> None:
        """Find out what those have who may still go, and what is lost with them."""
        row, width = node.row, self._pool.milli.shape[1]
        reach = Spare([0] * len(node.gpus), [0] * len(node.gpus), 0, 0, 0)
        least = [NEVER] * width
        losses = {wanted: [0] * width for wanted in self._losses}
        for each in self._world.live(row):
            if not (each.may_yield and outranks(self._first, each, self._order)):
                continue
            reach.add(each.hold)
            loss = each.loss_microusd
            for position in each.hold.parts:
                least[position] = min(least[position], loss)
                for wanted, sums in losses.items():
                    sums[position] += loss // min(wanted, each.gpus)
        self._going.put(node, reach)
        self._least_loss[row] = xp.asarray(least, dtype=xp.int64)
        for wanted, sums in losses.items():
            self._losses[wanted][row] = xp.asarray(sums, dtype=xp.int64)

    def _bounds_of(self, request: Request, rows: Any) -> Any:
        if request.gpus == 0:
            loss = xp.zeros(len(rows), dtype=xp.int64)
            return xp.where(self._world.drains[rows], NEVER, loss)
        usable = self._pool.usable(request, rows) & ~self._world.drains[rows][:, None]
        losses = self._least_loss if request.is_share else self._losses_of(request.gpus)
        losses = xp.where(self._world.soon.usable(request, rows), 0, losses[rows])
        if request.gpus == 1:
            return xp.where(usable, losses, NEVER).min(axis=1)
        # Far more than any real loss, and still no overflow in the sum over a node.
        losses = xp.where(usable, losses, NEVER // losses.shape[1])
        loss = xp.sort(losses, axis=1)[:, : request.gpus].sum(axis=1)
        return xp.where(usable.sum(axis=1) >= request.gpus, loss, NEVER)

    def _losses_of(self, gpus: int) -> Any:
        """What is lost of each GPU if so many are wanted, or all of a node. Shape (nodes, width)."""
        most = max(self._losses)
        return self._losses[next((wanted for wanted in self._losses if wanted >= gpus), most)]


class Horizons:
    """The horizon of the requests that are served now, made when it is first asked for."""

    def __init__(self, world: World, order: Order) -> None:
        self._world = world
        self._order = order
        self._class: int | None = None  # of the horizon that is made
        self._made: Horizon | None = None

    def of(self, request: Request) -> Horizon | None:
        """The horizon that bounds what the request could have; None: nobody may go for it.

        Requests come in the order of rank.
        """
        if self._class is None or (self._order is Order.CLASS and self._class != request.job_class):
            self._class, self._made = request.job_class, None
            if some(self._world.displaceable(request)):
                self._made = Horizon(self._world, request, self._order)
        return self._made

    def changed(self, node: Node, *, somebody_goes: bool) -> None:
        """Take notice that a node gave something away, and whether somebody there was told to go."""
        if self._made is not None:
            self._made.changed(node, somebody_goes=somebody_goes)
