"""The GPUs of all nodes by node and position: what depends on them alone, and outlives a plan."""

from functools import cached_property
from typing import Any

from scheduler.model.snapshot import CLOSED, UNKNOWN, Snapshot
from scheduler.planning.alike import Numbering
from scheduler.planning.allocator import Gpu
from scheduler.planning.arrays import lists, xp
from scheduler.planning.pool import Pool


class Layout:
    """What depends on the GPUs and the sets of models alone: it outlives a plan (`planner.Memo`)."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._key = _layout_key(snapshot)
        gpus, fits = snapshot.gpus, snapshot.model_fits
        nodes = len(snapshot.nodes)
        # Positions: by index, then UUID, so that the order of the rows changes nothing (R8).
        by_uuid = xp.asarray(sorted(range(len(gpus)), key=gpus.uuid.__getitem__), dtype=xp.int64)
        order = by_uuid[xp.lexsort(xp.stack([gpus.index[by_uuid], gpus.node[by_uuid]]))]
        counts = xp.bincount(gpus.node, minlength=nodes)
        starts = xp.cumsum(counts) - counts
        position = xp.arange(len(gpus), dtype=xp.int64) - starts[gpus.node[order]]
        self.width = int(counts.max()) if nodes else 0
        self.cells = nodes * self.width
        self.cell = xp.zeros(len(gpus), dtype=xp.int64)  # of each GPU: its place in a flat (nodes, width)
        self.cell[order] = gpus.node[order] * self.width + position
        shape = (nodes, self.width)
        self.row = self._spread(xp.arange(len(gpus), dtype=xp.int64), UNKNOWN, shape)
        self.memory_mib = self._spread(gpus.memory_mib, 0, shape)
        self.is_open = self._spread(gpus.state != CLOSED, False, shape)
        # Where there are MIG instances: bool (nodes, width), the others.
        instances = self._spread(gpus.instance, False, shape)
        self.whole = ~instances if instances.any() else None
        serving = xp.zeros((len(fits), self.cells), dtype=bool)
        serving[:, self.cell] = fits & (gpus.state != CLOSED)
        self.fits = serving.reshape(len(fits), *shape)
        self._snapshot = snapshot
        self._numbering: Numbering | None = None
        self._most: dict[bytes, tuple[Any, Any]] = {}
        self._gpus: dict[int, tuple[Gpu, ...]] = {}
        self._suitable: dict[int, dict[tuple[int, int, bool], tuple[int, ...]]] = {}

    def _spread(self, column: Any, missing: Any, shape: tuple[int, int]) -> Any:
        spread = xp.full(self.cells, missing, dtype=column.dtype)
        spread[self.cell] = column
        return spread.reshape(shape)

    @cached_property
    def nearness(self) -> list[Any]:
        """Where it tells GPUs of a node apart: bool (nodes, width, width), the nearest first."""
        gpus, shape, there = self._snapshot.gpus, self.row.shape, self.row != UNKNOWN
        pairs = there[:, :, None] & there[:, None, :]
        made = []
        for near in (gpus.island, gpus.switch, gpus.numa):
            group = self._spread(near, UNKNOWN, shape)
            same = (group[:, :, None] == group[:, None, :]) & (group != UNKNOWN)[:, :, None]
            if same.any() and not (same | ~pairs).all():
                made.append(same)
        return made

    @cached_property
    def model(self) -> Any:
        """Shape (nodes, width): the number of each GPU's model."""
        return self._spread(self._snapshot.gpus.model, UNKNOWN, self.row.shape)

    def holds_for(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot has the same GPUs and sets of models."""
        return self._key == _layout_key(snapshot)

    def numbering(self, free: Pool) -> Numbering:
        """The states of the nodes' GPUs, for `alike.States`, with so much free."""
        if self._numbering is None:
            self._numbering = Numbering(free, self.nearness)
        else:
            self._numbering.follow(free)
        return self._numbering

    def most_gpus(self, nodes: Any) -> tuple[Any, Any]:
        """By set of models and least memory, the most open GPUs that one of the nodes in the mask has.

        Returns the sizes, ascending, in MiB, and int64 of shape (model sets, sizes + 1): of at least that
        size; the last column is of GPUs larger than all, of which there are none. However many MIG instances
        a node has, they count as one: nobody gets two.
        """
        key = nodes.tobytes()
        known = self._most.get(key)
        if known is None:
            known = self._most[key] = self._most_of(self.fits & nodes[:, None], self.is_open & nodes[:, None])
        return known

    def most_gpus_ever(self) -> tuple[Any, Any]:
        """The same of all nodes and GPUs, open or not."""
        known = self._most.get(b"")
        if known is None:
            serving = xp.zeros((len(self.fits), self.cells), dtype=bool)
            serving[:, self.cell] = self._snapshot.model_fits
            there = self.row != UNKNOWN
            known = self._most[b""] = self._most_of(serving.reshape(self.fits.shape), there)
        return known

    def _most_of(self, fits: Any, gpus: Any) -> tuple[Any, Any]:
        sizes = xp.unique(self.memory_mib[gpus])
        most = xp.zeros((len(fits), len(sizes) + 1), dtype=xp.int64)
        for level in range(len(sizes)):
            large = fits & (self.memory_mib >= sizes[level])
            counts = large.sum(axis=2)
            if self.whole is not None:  # a job of several gets whole ones only
                counts = xp.maximum((large & self.whole).sum(axis=2), large.any(axis=2).astype(xp.int64))
            most[:, level] = counts.max(axis=1) if len(gpus) else 0
        return sizes, most

    def gpus(self, node: int) -> tuple[Gpu, ...]:
        """The node's GPUs in the order of their positions."""
        known = self._gpus.get(node)
        if known is None:
            gpus = self._snapshot.gpus
            rows = self.row[node][self.row[node] != UNKNOWN]
            uuid, columns = gpus.uuid, (gpus.index, gpus.memory_mib, gpus.state != CLOSED, gpus.instance)
            sizes = zip(*lists(columns, rows), strict=True)
            serves = self._snapshot.model_fits[:, rows].T.tolist()
            nears = zip(*lists((gpus.island, gpus.switch, gpus.numa), rows), strict=True)
            known = self._gpus[node] = tuple(
                Gpu(row, uuid[row], index, memory_mib, is_open, tuple(served), sum(served), near, is_instance)
                for row, (index, memory_mib, is_open, is_instance), served, near in zip(
                    rows.tolist(), sizes, serves, nears, strict=True
                )
            )
        return known

    def suitable(self, node: int) -> dict[tuple[int, int, bool], tuple[int, ...]]:
        """What `Node.suitable` has found out about the node."""
        return self._suitable.setdefault(node, {})


def _layout_key(snapshot: Snapshot) -> tuple[object, ...]:
    gpus = snapshot.gpus
    places = (gpus.node, gpus.index, gpus.island, gpus.switch, gpus.numa)
    columns = (
        *places,
        *(gpus.model, gpus.memory_mib, gpus.state, gpus.instance),
        snapshot.model_fits,
    )
    sizes = (len(snapshot.nodes), len(snapshot.model_fits))  # without GPUs there is nothing else to tell
    return (sizes, gpus.uuid, *(column.tobytes() for column in columns))
