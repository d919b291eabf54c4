"""An amount of every node's resources as columns."""

from dataclasses import dataclass
from typing import Any


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
