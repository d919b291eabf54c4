"""How a gang that no node can hold may be divided, written from the rules: every way, by search."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from tests.fakes.worlds import G, J, W

Way = tuple[tuple[int, int], ...]  # nodes, each with how many GPUs of the gang


def suits(job: J, gpu: G) -> bool:
    """Whether the job may ever have the GPU; who wants several can do nothing with a MIG instance."""
    if job.gpus > 1 and gpu.instance:
        return False
    return (not job.models or gpu.model in job.models) and gpu.memory_mib >= job.gpu_memory_mib


def spans(world: W, job: J) -> bool:
    """Whether no node has enough GPUs for the gang, open or not."""
    most = max(
        (sum(gpu.node == row and suits(job, gpu) for gpu in world.gpus) for row in range(len(world.nodes))),
        default=0,
    )
    return job.gpus > max(1, most)


def kinds(world: W) -> list[list[int]]:
    """Lots of equal nodes: one model, equally many GPUs, none of them a MIG instance."""
    found: dict[tuple[str, int], list[int]] = {}
    for row in range(len(world.nodes)):
        gpus = [gpu for gpu in world.gpus if gpu.node == row]
        models = {gpu.model for gpu in gpus}
        if len(models) == 1 and not any(gpu.instance for gpu in gpus):
            found.setdefault((models.pop(), len(gpus)), []).append(row)
    return list(found.values())


def ways(world: W, job: J) -> Iterator[list[Way]]:
    """Every way to divide the gang, those of each kind of nodes together, the best kind first.

    The best takes the fewest nodes, then leaves no rest; then it is the one that fewer sets of models accept,
    has smaller GPUs, comes first.
    """
    sets = {*world.model_sets, *(other.models for other in world.jobs)}

    def worth(rows: list[int]) -> tuple[int, ...]:
        gpus = sorted((g for g in world.gpus if g.node == rows[0]), key=lambda g: (g.index, g.uuid))
        count, rest = divmod(job.gpus, len(gpus))
        accepting = sum(not models or gpus[0].model in models for models in sets)
        return (count + bool(rest), bool(rest), accepting, gpus[0].memory_mib, rows[0])

    for rows in sorted(kinds(world), key=worth):
        size = sum(gpu.node == rows[0] for gpu in world.gpus)
        count, rest = divmod(job.gpus, size)
        whole = [tuple((row, size) for row in chosen) for chosen in combinations(rows, count)]
        if rest:
            whole = [(*way, (row, rest)) for way in whole for row in rows if (row, size) not in way]
        if count:
            yield whole


def part(job: J, gpus: int) -> J:
    """What the gang wants of a node on which it has so many GPUs."""
    cpus, memory_mib = (-(-amount * gpus // job.gpus) for amount in (job.cpus, job.memory_mib))
    return replace(job, gpus=gpus, cpus=cpus, memory_mib=memory_mib)


def by_node(world: W, uuids: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """The GPUs by their nodes."""
    nodes = sorted({world.gpu(uuid).node for uuid in uuids})
    return {row: tuple(uuid for uuid in uuids if world.gpu(uuid).node == row) for row in nodes}
