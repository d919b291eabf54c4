"""Small pools and mixes in plain values for tests of placement."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from scheduler.model.snapshot import UNKNOWN, WHOLE_MILLI, MixColumns
from scheduler.planning.fragmentation import WattColumns
from scheduler.planning.pool import Pool

GPU_MIB = 1_000


@dataclass(frozen=True)
class Gpu:
    """A GPU and what of it is free; a closed one serves nobody. `serves`: sets of models, by number."""

    milli: int = WHOLE_MILLI
    mib: int = GPU_MIB
    serves: frozenset[int] = frozenset()
    is_open: bool = True
    is_instance: bool = False
    idle_w: int = 50
    busy_w: int = 250


@dataclass(frozen=True)
class Node:
    """A node and what of it is free. `cpus_there` is how many CPUs it has, in packages of `package_cpus`."""

    gpus: tuple[Gpu, ...] = ()
    cpus: int = 100
    memory_mib: int = 1_000
    slots: int = 10
    cpus_there: int = 100
    package_cpus: int = 20


@dataclass(frozen=True)
class Ask:
    """A request."""

    gpus: int = 1
    share_milli: int = WHOLE_MILLI
    gpu_memory_mib: int = 0
    models: int = UNKNOWN
    cpus: int = 0
    memory_mib: int = 0


PACKAGE_IDLE_W, PACKAGE_BUSY_W = 15, 120


def pool(nodes: Sequence[Node], sets: int = 0) -> Pool:
    """The nodes as columns, with this many sets of models."""
    width = max((len(node.gpus) for node in nodes), default=0)
    there = [
        [(row, position, gpu) for position, gpu in enumerate(node.gpus) if gpu.is_open]
        for row, node in enumerate(nodes)
    ]
    shape = (len(nodes), width)
    columns = Pool(
        milli=np.zeros(shape, np.int64),
        mib=np.zeros(shape, np.int64),
        cpus=np.array([node.cpus for node in nodes], np.int64),
        memory_mib=np.array([node.memory_mib for node in nodes], np.int64),
        slots=np.array([node.slots for node in nodes], np.int64),
        fits=np.zeros((sets, *shape), bool),
        is_open=np.zeros(shape, bool),
        whole=np.ones(shape, bool),
    )
    for row, position, gpu in (each for gpus in there for each in gpus):
        columns.milli[row, position] = gpu.milli
        columns.mib[row, position] = gpu.mib
        columns.is_open[row, position] = True
        columns.whole[row, position] = not gpu.is_instance
        for models in gpu.serves:
            columns.fits[models, row, position] = True
    return columns


def mix(kinds: Sequence[tuple[Ask, int]]) -> MixColumns:
    """Requests and their weights as columns."""
    columns = {
        field.name: np.array([getattr(ask, field.name) for ask, _ in kinds], np.int64)
        for field in fields(Ask)
    }
    return MixColumns(**columns, weight=np.array([weight for _, weight in kinds], np.int64))


def watts(nodes: Sequence[Node]) -> WattColumns:
    """What the nodes draw."""
    width = max((len(node.gpus) for node in nodes), default=0)
    idle_w, busy_w = np.zeros((2, len(nodes), width), np.int64)
    for row, node in enumerate(nodes):
        for position, gpu in enumerate(node.gpus):
            idle_w[row, position], busy_w[row, position] = gpu.idle_w, gpu.busy_w
    return WattColumns(
        gpu_idle_w=idle_w,
        gpu_busy_w=busy_w,
        cpus=np.array([node.cpus_there for node in nodes], np.int64),
        package_cpus=np.array([node.package_cpus for node in nodes], np.int64),
        package_idle_w=np.full(len(nodes), PACKAGE_IDLE_W, np.int64),
        package_busy_w=np.full(len(nodes), PACKAGE_BUSY_W, np.int64),
    )


def take(free: Pool, ask: Ask, node: int, positions: Sequence[int]) -> None:
    """Take what the request needs out of the pool, in place."""
    _book(free, ask, node, positions, 1)


def put_back(free: Pool, ask: Ask, node: int, positions: Sequence[int]) -> None:
    """Undo `take`."""
    _book(free, ask, node, positions, -1)


def _book(free: Pool, ask: Ask, node: int, positions: Sequence[int], times: int) -> None:
    for position in positions:
        free.milli[node, position] -= times * ask.share_milli
        if ask.share_milli < WHOLE_MILLI:
            free.mib[node, position] -= times * ask.gpu_memory_mib
    free.cpus[node] -= times * ask.cpus
    free.memory_mib[node] -= times * ask.memory_mib
    free.slots[node] -= times
