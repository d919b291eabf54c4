"""Columns over the nodes that are kept from request to request, and renewed only where a node changed."""

from collections.abc import Callable, Hashable
from typing import Any

from scheduler.planning.arrays import rows_where, xp

# Nodes of all columns together, 8 or 16 bytes each: 1,000 kinds of request on 12,500 nodes are 12.5 million.
# The column that was asked for longest ago goes first.
VALUES_MAX = 1 << 24


class Kept:
    """A column for each key, as the caller computes it; who changes a node says so."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._changed_at = xp.zeros(nodes, dtype=xp.int64)
        self._changes = 0
        self._columns: dict[Hashable, tuple[Any, int]] = {}  # with the last change that is in it

    def changed(self, row: int) -> None:
        """Take notice that what was computed of this node holds no more."""
        self._changes += 1
        self._changed_at[row] = self._changes

    def column(self, key: Hashable, made: Callable[[Any], Any]) -> Any:
        """Int64, shape (..., nodes): the column, or columns, of this key, up to date.

        `made` computes the values of some rows, shape (..., rows). The caller may write values into the
        column: they stay until the node changes.
        """
        known = self._columns.pop(key, None)
        if known is None:
            column = made(xp.arange(self._nodes, dtype=xp.int64))
        else:
            column, at = known
            if at < self._changes:
                rows = rows_where(self._changed_at > at)
                column[..., rows] = made(rows)
        self._columns[key] = (column, self._changes)
        if len(self._columns) > max(1, VALUES_MAX // max(1, self._nodes)):
            del self._columns[next(iter(self._columns))]
        return column
