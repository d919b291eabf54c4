"""What a place is asked for, as far as its own jobs tell."""

from dataclasses import replace
from typing import Any

from scheduler.model.snapshot import JobColumns, MixColumns
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.hosts import part_of

# The kinds asked for most often. Of 457 kinds that name models, 64 cost the published experiment half a point
# of allocation, 128 a tenth (docs/PLACEMENT.md); each costs time on every node.
KINDS_MAX = 128
# So many jobs tell what all ask for.
JOBS_MAX = 20_000
# Of an int64 without its sign. A sort by one number takes a third of one by six columns.
_KEY_BITS = 63
_SHAPE = ("gpus", "share_milli", "gpu_memory_mib", "cpus", "memory_mib", "models")


def mix_of(jobs: JobColumns) -> MixColumns:
    """The kinds of requests among live and pending jobs, and how many of each."""
    columns = [getattr(jobs, name) for name in _SHAPE]
    if len(jobs) > JOBS_MAX:
        # Every so manieth by number, so that the order of the rows changes nothing (R8).
        told = xp.argsort(jobs.number, kind="stable")[:: -(-len(jobs) // JOBS_MAX)]
        columns = [column[told] for column in columns]
    rows = _ordered(columns) if len(jobs) else xp.zeros(0, dtype=xp.int64)
    columns = [column[rows] for column in columns]
    first = xp.ones(len(rows), dtype=bool)
    if len(rows):
        first[1:] = xp.stack([column[1:] != column[:-1] for column in columns]).any(axis=0)
    starts = rows_where(first)
    ends = xp.concatenate([starts[1:], xp.asarray([len(rows)], dtype=xp.int64)]) if len(starts) else starts
    weight = ends - starts
    often = xp.argsort(-weight, kind="stable")[:KINDS_MAX]
    kinds = starts[often]
    asked = {name: column[kinds] for name, column in zip(_SHAPE, columns, strict=True)}
    return MixColumns(**asked, weight=weight[often])


def _ordered(columns: list[Any]) -> Any:
    """The rows in the order of the columns, the last first: by one number each, where they fit into that."""
    stacked = xp.stack(columns)
    least, most = stacked.min(axis=1).tolist(), stacked.max(axis=1).tolist()
    spans = [(high - low).bit_length() for low, high in zip(least, most, strict=True)]
    if sum(spans) > _KEY_BITS:
        return xp.lexsort(stacked)
    key = xp.zeros(len(columns[0]), dtype=xp.int64)
    for column, low, span in reversed(list(zip(columns, least, spans, strict=True))):
        key = (key << span) | (column - low)
    return xp.argsort(key, kind="stable")


def as_parts(mix: MixColumns, width: int) -> MixColumns:
    """The mix with gangs that are larger than any node as what they ask of a whole one of so many GPUs."""
    over = mix.gpus > width
    if not over.any():
        return mix
    all_gpus = xp.maximum(mix.gpus, 1)
    return replace(
        mix,
        gpus=xp.where(over, width, mix.gpus),
        cpus=xp.where(over, part_of(mix.cpus, width, all_gpus), mix.cpus),
        memory_mib=xp.where(over, part_of(mix.memory_mib, width, all_gpus), mix.memory_mib),
    )
