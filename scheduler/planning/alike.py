"""Nodes that are alike: what is found out of one of them holds of all.

In a fleet thousands of nodes are in a few hundred states as far as a question goes. What of a node matters
to placement (`fragmentation.py`) is what is free on each of its GPUs, whom and what each GPU is near, and
between which amounts that are asked for its free CPUs and host memory lie. A *state* numbers that.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from scheduler.model.snapshot import MixColumns
from scheduler.planning.arrays import lists, rows_where, xp
from scheduler.planning.pool import Pool, Shape

# So few nodes are rated each by itself: that costs less than to find out which are alike.
NODES_FEW = 64
# States of GPUs that are told apart; beyond, all are numbered anew. Each is some 300 bytes.
STATES_MAX = 1 << 17
# Answers remembered for all questions together, 16 bytes for each of their columns and 8 for the state.
ANSWERS_MAX = 1 << 21
_NUMBER_BITS = 17
# Slots that are told apart: none, one, and more.
_SLOTS = 3
_KEY_BITS = 62
_CHUNK_BITS = 32


class Numbering:
    """What is free on the GPUs of each node, and whom they serve, as a number; equal nodes have equal ones.

    It outlives a plan: the next one numbers only the nodes that are not as they were.
    """

    def __init__(self, pool: Pool, nearness: Sequence[Any]) -> None:
        self.of = xp.zeros(len(pool.cpus), dtype=xp.int64)  # by node
        self._sorts = _sorts(pool, nearness)
        self._numbers: dict[Hashable, int] = {}
        self._milli, self._mib = pool.milli - 1, pool.mib.copy()  # as they were numbered: not yet at all
        self.follow(pool)

    def follow(self, pool: Pool) -> None:
        """Number the nodes of another pool, of the same GPUs."""
        other = (pool.milli != self._milli) | (pool.mib != self._mib)
        self.renew(pool, rows_where(other.any(axis=1)))

    def renew(self, pool: Pool, rows: Any) -> bool:
        """Look at these nodes again; whether all were numbered anew, so that no number means what it did."""
        numbers = self._numbers
        is_anew = len(numbers) + len(rows) > STATES_MAX and len(rows) < len(self.of)
        if is_anew:
            numbers.clear()
            rows = xp.arange(len(self.of), dtype=xp.int64)
        states = [
            numbers.setdefault((self._sorts[row], *milli, *mib), len(numbers))
            for row, milli, mib in zip(rows.tolist(), *lists((pool.milli, pool.mib), rows), strict=True)
        ]
        self.of[rows] = xp.asarray(states, dtype=xp.int64)
        self._milli[rows], self._mib[rows] = pool.milli[rows], pool.mib[rows]
        return is_anew


class States:
    """The state of each node of a pool, renewed by whoever changes it, and what is known of the states."""

    def __init__(self, pool: Pool, mix: MixColumns, numbering: Callable[[], Numbering]) -> None:
        """Take the pool, the mix, and how to come by the numbering where it is of use."""
        self._pool = pool
        self._cpus = xp.unique(mix.cpus)
        self._memory_mib = xp.unique(mix.memory_mib)
        levels = (len(self._cpus) + 1) * (len(self._memory_mib) + 1)
        fits = (levels**2 * _SLOTS).bit_length() + _NUMBER_BITS <= _KEY_BITS
        self.are_of_use = fits and len(pool.cpus) > NODES_FEW
        self._levels = levels
        self._numbering = numbering() if self.are_of_use else None
        self._known: dict[Hashable, tuple[Any, Any]] = {}
        self._answers = 0

    def renew(self, rows: Any) -> None:
        """Look at these nodes again."""
        assert self._numbering is not None, "they are of use"
        if self._numbering.renew(self._pool, rows):
            self._forget()

    def answers(self, request: Shape, rows: Any, found: Callable[[Any], Any]) -> Any:
        """What is known of these nodes for the request, int64 of shape (columns, rows).

        `found` finds it out of some rows; it is asked once for each state. The request's host part fits, and
        what is found depends on it only by the state that it leaves.
        """
        states = self._seen_by(request, rows)
        wants = (request.gpus, request.share_milli, request.gpu_memory_mib, request.models)
        known = self._known.get(wants)
        if known is not None:
            seen, answers = known
            places = xp.minimum(seen.searchsorted(states), len(seen) - 1)
            missing = rows_where(seen[places] != states)
            if not len(missing):
                return answers[:, places]
            new, first = xp.unique(states[missing], return_index=True)
            first = missing[first]
        else:
            new, first = xp.unique(states, return_index=True)
        more = found(rows[first])
        self._answers += len(new)
        if known is not None:
            new = xp.concatenate([seen, new])
            order = new.argsort(kind="stable")
            new, more = new[order], xp.concatenate([answers, more], axis=1)[:, order]
        if self._answers > ANSWERS_MAX:
            self._forget()
        self._known[wants] = (new, more)
        return more[:, new.searchsorted(states)]

    def _seen_by(self, request: Shape, rows: Any) -> Any:
        """The nodes' states with what the host has now and would have left. Shape (rows,)."""
        pool, numbering = self._pool, self._numbering
        assert numbering is not None, "they are of use"
        cpus, memory_mib = pool.cpus[rows], pool.memory_mib[rows]
        now = self._level(cpus, memory_mib)
        then = self._level(cpus - request.cpus, memory_mib - request.memory_mib)
        key = (numbering.of[rows] * self._levels + now) * self._levels + then
        return key * _SLOTS + xp.minimum(pool.slots[rows], _SLOTS - 1)

    def _level(self, cpus: Any, memory_mib: Any) -> Any:
        level = self._cpus.searchsorted(cpus, side="right") * (len(self._memory_mib) + 1)
        return level + self._memory_mib.searchsorted(memory_mib, side="right")

    def _forget(self) -> None:
        self._known.clear()
        self._answers = 0


def _sorts(pool: Pool, nearness: Sequence[Any]) -> list[tuple[int, ...]]:
    """Of each node what never changes: whom each GPU serves, and which GPUs are near each other."""
    nodes = len(pool.cpus)
    if not nodes:
        return []
    served = [pool.fits[models] for models in range(len(pool.fits))]
    whole = [] if pool.whole is None else [pool.whole]
    parts = [part.reshape(nodes, -1) for part in (pool.is_open, *whole, *served, *nearness)]
    bits = xp.concatenate(parts, axis=1).astype(xp.int64)
    words = [
        (chunk << xp.arange(chunk.shape[1], dtype=xp.int64)).sum(axis=1).tolist()
        for start in range(0, bits.shape[1], _CHUNK_BITS)
        for chunk in (bits[:, start : start + _CHUNK_BITS],)
    ]
    return list(zip(*words, strict=True)) if words else [()] * nodes
