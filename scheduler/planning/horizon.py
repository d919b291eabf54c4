"""What requests of a class could have of each node at most, and at what loss at least.

Whom a request may displace depends on its own rank; here everybody counts whom any request of its class may
displace. So a node that does not do here will not do at all, and what it costs here it costs at least: the
few nodes where looking closely pays (`search.py`) are found without looking at the others. A change on a node
changes its row only.
"""

from typing import Any

from scheduler.model.policy import Order
from scheduler.model.snapshot import WHOLE_MILLI
from scheduler.planning.allocator import Live, Node, Request
from scheduler.planning.arrays import xp
from scheduler.planning.pool import Pool, summed
from scheduler.planning.world import NEVER, World


class Horizon:
    """Bounds of what requests of one class can have."""

    def __init__(self, world: World, job_class: int | None) -> None:
        """Count everybody who may go, of this class and the later ones; None = of all."""
        self._job_class = job_class
        jobs, soon = world.incumbents, world.soon
        goes = jobs.may_yield if job_class is None else jobs.may_yield & (jobs.job_class >= job_class)
        holds, hosts = goes[jobs.holder], jobs.hosts.of(goes)
        cell, holder = jobs.cell[holds], jobs.holder[holds]
        self.pool: Pool = soon.plus(cell, jobs.milli[holds], jobs.mib[holds], hosts.node, hosts.amounts)
        # A job's loss in equal parts on its GPUs: whoever takes some of them pays for all.
        gpus = xp.bincount(jobs.holder, minlength=len(jobs.row))
        part = (jobs.loss_microusd // xp.maximum(gpus, 1))[holder]
        shape = soon.milli.shape
        clear = summed(cell, part, shape[0] * shape[1]).reshape(shape)
        self._whole_loss = _sums(clear, soon.milli, self.pool.milli)
        least = xp.full(shape[0] * shape[1], NEVER, dtype=xp.int64)
        xp.minimum.at(least, cell, part)
        self._share_loss = (
            least.reshape(shape).min(axis=1) if shape[1] else xp.zeros(shape[0], dtype=xp.int64)
        )

    def bounds(self, request: Request, rows: Any) -> Any:
        """Shape (rows,): a loss that is not more than what the request takes there, victims' only."""
        if request.gpus == 0:
            return xp.zeros(len(rows), dtype=xp.int64)
        if request.is_share:
            return self._share_loss[rows]
        return self._whole_loss[rows, request.gpus - 1]

    def changed(self, node: Node, live: list[Live]) -> None:
        """Look at a node again that gave something away or got it back."""
        row, width = node.row, self.pool.milli.shape[1]
        going = [
            each
            for each in live
            if each.may_yield and (self._job_class is None or each.job_class >= self._job_class)
        ]
        soon = node.spare_with(node.leaving)
        reach = soon.copy()
        clear = [0] * width
        share_loss = NEVER
        for each in going:
            reach.add(each.hold)
            part = each.loss_microusd // max(each.gpus, 1)
            for position in each.hold.parts:
                clear[position] += part
                share_loss = min(share_loss, part)
        self.pool.put(node, reach)
        losses = [NEVER] * width
        for position, gpu in enumerate(node.gpus):
            if gpu.is_open and reach.milli[position] == WHOLE_MILLI:
                losses[position] = 0 if soon.milli[position] == WHOLE_MILLI else clear[position]
        losses.sort()
        total = 0
        for count, loss in enumerate(losses):
            total = min(NEVER, total + loss)
            self._whole_loss[row, count] = total
        self._share_loss[row] = share_loss


class Horizons:
    """The horizons of a plan, made when they are first asked for."""

    def __init__(self, world: World, order: Order) -> None:
        self._world = world
        self._order = order
        self._made: dict[int | None, Horizon] = {}

    def of(self, request: Request) -> Horizon:
        """The horizon that bounds what the request could have."""
        key = request.job_class if self._order is Order.CLASS else None
        known = self._made.get(key)
        if known is None:
            known = self._made[key] = Horizon(self._world, key)
        return known

    def changed(self, node: Node) -> None:
        """Look at a node again that gave something away or got it back."""
        for horizon in self._made.values():
            horizon.changed(node, self._world.live(node.row))


def _sums(clear: Any, soon: Any, reach: Any) -> Any:
    """Shape (nodes, width): the least loss with which so many whole GPUs and one can be had."""
    loss = xp.where(soon == WHOLE_MILLI, 0, clear)
    # Far more than any real loss, and still no overflow in the sum over a node.
    unreachable = NEVER // max(loss.shape[1], 1)
    loss = xp.where(reach == WHOLE_MILLI, loss, unreachable)
    return xp.cumsum(xp.sort(loss, axis=1), axis=1)
