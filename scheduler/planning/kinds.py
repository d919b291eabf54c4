"""Gangs that no node can hold, and the nodes over which they may be divided.

A gang that some node has enough GPUs for, open or not, stays on one node. Any other takes whole nodes of one
kind: all GPUs of as many nodes as it needs, of one model and of equally many GPUs. Where the count is no
multiple of a node, the rest is a part of one more node of the kind. CPUs and host memory are divided in
proportion to the GPUs, each part rounded up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from scheduler.model.snapshot import UNKNOWN, JobColumns
from scheduler.planning.allocator import Request
from scheduler.planning.arrays import lists, rows_where, xp
from scheduler.planning.hosts import part_of
from scheduler.planning.layout import Layout


@dataclass(frozen=True, slots=True)
class Kind:
    """Equal nodes."""

    gpus: int  # of each node
    first: int  # the first row
    nodes: Any  # bool, shape (nodes,)
    asked_for: int  # how many sets of models accept it: what few accept is given away first
    memory_mib: int  # of a GPU


class Division(NamedTuple):
    """How a gang is divided over nodes of a kind."""

    nodes: Any  # bool, shape (nodes,): those of the kind
    whole: Request  # what it wants of each of so many whole nodes
    wholes: int
    rest: Request | None  # and of one more

    @property
    def least(self) -> Request:
        """The smallest part."""
        return self.rest or self.whole

    def suffices(self, whole: Any, rest: Any) -> bool:
        """Whether so many nodes do, of which these could be whole and these could hold the rest.

        Where a whole one fits the rest fits as well.
        """
        if int((whole & self.nodes).sum()) < self.wholes:
            return False
        return self.rest is None or int((rest & self.nodes).sum()) > self.wholes


class Kinds:
    """The kinds of nodes of a layout. Nodes of mixed models, or cut into instances, are of none."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._most: dict[tuple[int, int], int] = {}
        there = layout.row != UNKNOWN
        self._gpus = there.sum(axis=1)
        self._made = self._kinds(there) if layout.width else ()

    def spans(self, request: Request) -> bool:
        """Whether no node could ever hold the gang, so that it may take several."""
        return request.gpus > max(1, self.most_on_one(request))

    def most_on_one(self, request: Request) -> int:
        """The most GPUs of its models and memory, open or not, that a node has."""
        wants = request.models, request.gpu_memory_mib
        known = self._most.get(wants)
        if known is None:
            sizes, most = self._layout.most_gpus_ever()
            size = sizes.searchsorted(xp.asarray([request.gpu_memory_mib], dtype=xp.int64))
            known = self._most[wants] = most[request.models, size].max().item()
        return known

    def spanning(self, jobs: JobColumns) -> Any:
        """Bool, shape (jobs,): the same of each."""
        sizes, most = self._layout.most_gpus_ever()
        return (jobs.gpus > 1) & (jobs.gpus > most[jobs.models, sizes.searchsorted(jobs.gpu_memory_mib)])

    def divisions(self, request: Request) -> list[Division]:
        """The ways to divide a gang, those over the fewest nodes first; of equals those without a rest."""
        ways = []
        for kind in self._made:
            count, left = divmod(request.gpus, kind.gpus)
            worth = (count + (left > 0), left > 0, kind.asked_for, kind.memory_mib, kind.first)
            rest = share_of(request, left) if left else None
            ways.append((worth, Division(kind.nodes, share_of(request, kind.gpus), count, rest)))
        return [division for _, division in sorted(ways, key=lambda way: way[0]) if division.wholes]

    def most_gpus(self, sizes: Any, nodes: Any) -> Any:
        """By set of models and least memory the largest gang that nodes of one kind in the mask could hold.

        As `Layout.most_gpus` has it of a single node; `sizes` are its.
        """
        layout = self._layout
        most = xp.zeros((len(layout.fits), len(sizes) + 1), dtype=xp.int64)
        for level in range(len(sizes)):
            large = layout.fits & (layout.memory_mib >= sizes[level]) & nodes[:, None]
            gpus = large.sum(axis=2)
            for kind in self._made:
                of_kind = xp.where(kind.nodes, gpus, 0)
                whole = of_kind == kind.gpus
                rest = xp.where(whole, 0, of_kind).max(axis=1)
                most[:, level] = xp.maximum(most[:, level], whole.sum(axis=1) * kind.gpus + rest)
        return most

    def _kinds(self, there: Any) -> tuple[Kind, ...]:
        layout = self._layout
        model = layout.model
        pure = ((model == model[:, :1]) | ~there).all(axis=1) & there[:, 0]
        if layout.whole is not None:  # a process uses one instance of a GPU: no gang has several
            pure &= (layout.whole | ~there).all(axis=1)
        # Both numbers as one: the same for nodes of a kind.
        names = xp.where(pure, (model[:, 0] - UNKNOWN) * (layout.width + 1) + self._gpus, UNKNOWN)
        made = []
        for name in xp.unique(names[pure]).tolist():
            nodes = names == name
            first = rows_where(nodes)[:1]
            ((row,), (gpus,)) = lists((xp.arange(len(nodes), dtype=xp.int64), self._gpus), first)
            gpu = layout.gpus(row)[0]
            made.append(Kind(gpus, row, nodes, gpu.asked_for, gpu.memory_mib))
        return tuple(made)


def share_of(request: Request, gpus: int) -> Request:
    """What a gang wants of a node on which it has so many of its GPUs."""
    return request._replace(
        gpus=gpus,
        cpus=part_of(request.cpus, gpus, request.gpus),
        memory_mib=part_of(request.memory_mib, gpus, request.gpus),
    )


def fits_over(divisions: list[Division], fit: Callable[[Request], Any], nodes: Any) -> bool:
    """Whether a gang fits on nodes in the mask, divided in one of these ways; `fit`: where a part does."""
    return any(way.suffices(fit(way.whole) & nodes, fit(way.least) & nodes) for way in divisions)
