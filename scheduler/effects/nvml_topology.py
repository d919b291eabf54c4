"""Which GPUs of a node sit together: below one PCIe switch, or joined by NVLinks."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from scheduler.effects.nvml import OpenGpu
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuIdentity


class Neighbours:
    """Takes GPUs as they are opened, from any thread, and knows what they told of each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: list[OpenGpu] = []
        self._beside: dict[str, set[str]] = {}  # UUIDs below the same switch; no entry = it does not say
        self._cached: tuple[tuple[GpuIdentity, ...], tuple[GpuIdentity, ...]] = ((), ())

    def add(self, gpu: OpenGpu) -> None:
        """Ask the GPU, in its own lane, how far each one is that was opened before."""
        with self._lock:
            others = tuple(self._opened)
            self._opened.append(gpu)
        for other in others:
            try:
                is_beside = gpu.is_beside(other)
            except GpuReadError:  # one of the two is gone, which its own lane will say
                continue
            if is_beside is not None:
                self._note(gpu.identity.uuid, other.identity.uuid, is_beside)

    def _note(self, one: str, other: str, is_beside: bool) -> None:
        with self._lock:
            self._cached = ((), ())
            for mine, theirs in ((one, other), (other, one)):
                self._beside.setdefault(mine, set()).update([theirs] if is_beside else [])

    def place(self, identities: tuple[GpuIdentity, ...]) -> tuple[GpuIdentity, ...]:
        """Return them with their NVLink islands and PCIe switches, each numbered by its first index."""
        with self._lock:
            if self._cached[0] != identities:
                links = {gpu.identity.pci_bus_id: gpu.linked_to for gpu in self._opened}
                self._cached = (identities, _placed(identities, links, self._beside))
            return self._cached[1]


def _placed(
    identities: Sequence[GpuIdentity],
    links: Mapping[str, tuple[str, ...]],
    beside: Mapping[str, set[str]],
) -> tuple[GpuIdentity, ...]:
    index = {gpu.uuid: gpu.index for gpu in identities}
    islands = joined({bus_id: ends for bus_id, ends in links.items() if ends})
    first: dict[str, int] = {}
    for gpu in identities:
        if gpu.pci_bus_id in islands:
            root = islands[gpu.pci_bus_id]
            first[root] = min(gpu.index, first.get(root, gpu.index))
    return tuple(
        replace(
            gpu,
            island=first.get(islands.get(gpu.pci_bus_id, "")),
            switch=min((index[one] for one in (gpu.uuid, *beside[gpu.uuid]) if one in index), default=None)
            if gpu.uuid in beside
            else None,
        )
        for gpu in identities
    )


def joined(links: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return for each end of a link the name of all that hangs together with it.

    Args:
        links: By bus id, the bus ids at the other ends: GPUs that have links, switches that have none.
    """
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for one, ends in sorted(links.items()):
        for other in ends:
            low, high = sorted((find(one), find(other)))
            root[high] = low
    return {name: find(name) for name in root}
