"""An amount of every node's resources as columns, and which nodes a request fits on."""

from dataclasses import dataclass
from typing import Any, Protocol

from scheduler.model.snapshot import UNKNOWN
from scheduler.planning.allocator import Node, Spare
from scheduler.planning.arrays import xp


class Shape(Protocol):
    """What is asked for. `gpus` whole ones, or 1 with `share_milli` below 1000, or 0; 0 MiB, 0 CPUs = any."""

    @property
    def gpus(self) -> int: ...
    @property
    def share_milli(self) -> int: ...
    @property
    def gpu_memory_mib(self) -> int: ...
    @property
    def models(self) -> int: ...
    @property
    def cpus(self) -> int: ...
    @property
    def memory_mib(self) -> int: ...


@dataclass(slots=True)
class Pool:
    """What there is of each node, by node and position. Shape (nodes, width): the most GPUs that a node has.

    What can't be given out is zero: GPUs that are closed, positions without one.
    """

    milli: Any  # int64 (nodes, width): thousandths of each GPU
    mib: Any  # int64 (nodes, width): MiB of its memory that shares may still book
    cpus: Any  # int64 (nodes,); may be negative
    memory_mib: Any  # int64 (nodes,)
    slots: Any  # int64 (nodes,): jobs that may start
    fits: Any  # bool (model sets, nodes, width): open GPUs that serve jobs with this set of models
    is_open: Any  # bool (nodes, width)
    # Bool (nodes, width): no MIG instances, which serve requests of one GPU only; None: nothing is one.
    whole: Any = None

    def usable(self, request: Shape, rows: Any = ...) -> Any:
        """Bool, shape (rows, width): GPUs that have what the request wants of each."""
        usable = self.milli[rows] >= request.share_milli
        if request.gpu_memory_mib:
            # Of a GPU that is wholly free all memory is, so that this is its size.
            usable &= self.mib[rows] >= request.gpu_memory_mib
        return usable & self.suitable(request, rows)

    def suitable(self, request: Shape, rows: Any = ...) -> Any:
        """Bool, shape (rows, width): open GPUs of its models, whatever they have; no instances for a gang."""
        suitable = (self.is_open if request.models == UNKNOWN else self.fits[request.models])[rows]
        if request.gpus > 1 and self.whole is not None:
            suitable = suitable & self.whole[rows]
        return suitable

    def fit_gpus(self, request: Shape, rows: Any = ...) -> Any:
        """Bool, shape (rows,): where the GPU part of the request fits."""
        if request.gpus == 0:
            return xp.ones(self.cpus[rows].shape, dtype=bool)
        if request.gpus == 1:
            return self.usable(request, rows).any(axis=1)
        return self.usable(request, rows).sum(axis=1) >= request.gpus

    def fit_host(self, request: Shape, rows: Any = ...) -> Any:
        """Bool, shape (rows,): where CPUs, host memory and a job slot are there; 0 is not accounted."""
        fit = self.slots[rows] >= 1
        if request.cpus:
            fit &= self.cpus[rows] >= request.cpus
        if request.memory_mib:
            fit &= self.memory_mib[rows] >= request.memory_mib
        return fit

    def fit(self, request: Shape, rows: Any = ...) -> Any:
        """Bool, shape (rows,): where the request fits in the amount."""
        return self.fit_gpus(request, rows) & self.fit_host(request, rows)

    def copy(self) -> "Pool":
        """An independent amount of the same nodes."""
        return Pool(
            self.milli.copy(),
            self.mib.copy(),
            self.cpus.copy(),
            self.memory_mib.copy(),
            self.slots.copy(),
            self.fits,
            self.is_open,
            self.whole,
        )

    def put(self, node: Node, spare: Spare) -> None:
        """Take over what a node has."""
        row, count = node.row, len(node.gpus)
        for column, amounts in ((self.milli, spare.milli), (self.mib, spare.mib)):
            open_only = [amount if gpu.is_open else 0 for amount, gpu in zip(amounts, node.gpus, strict=True)]
            column[row, :count] = xp.asarray(open_only, dtype=xp.int64)
        self.cpus[row] = spare.cpus
        self.memory_mib[row] = spare.memory_mib
        self.slots[row] = spare.slots

    def plus(self, cells: Any, milli: Any, mib: Any, nodes: Any, host: tuple[Any, Any, Any]) -> "Pool":
        """This and more: thousandths and MiB at flat GPU cells; CPUs, MiB and slots at nodes."""
        shape = self.milli.shape
        more_milli = summed(cells, milli, shape[0] * shape[1]).reshape(shape)
        more_mib = summed(cells, mib, shape[0] * shape[1]).reshape(shape)
        cpus, memory_mib, slots = (summed(nodes, amount, shape[0]) for amount in host)
        return Pool(
            self.milli + xp.where(self.is_open, more_milli, 0),
            self.mib + xp.where(self.is_open, more_mib, 0),
            self.cpus + cpus,
            self.memory_mib + memory_mib,
            self.slots + slots,
            self.fits,
            self.is_open,
            self.whole,
        )

    def less(self, other: "Pool") -> "Pool":
        """What this is more than another amount of the same nodes."""
        return Pool(
            self.milli - other.milli,
            self.mib - other.mib,
            self.cpus - other.cpus,
            self.memory_mib - other.memory_mib,
            self.slots - other.slots,
            self.fits,
            self.is_open,
            self.whole,
        )

    def add(self, other: "Pool", row: int) -> None:
        """Put in what another amount has of one node."""
        self.milli[row] += other.milli[row]
        self.mib[row] += other.mib[row]
        self.cpus[row] += other.cpus[row]
        self.memory_mib[row] += other.memory_mib[row]
        self.slots[row] += other.slots[row]


def summed(places: Any, amounts: Any, size: int) -> Any:
    """Int64, shape (size,): the sum of the amounts at each place. Exact below 2^53, which no node has."""
    return xp.bincount(places, weights=amounts, minlength=size).astype(xp.int64)
