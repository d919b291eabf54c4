"""The array module that planning computes with, and the few operations that need care.

All columns are int64 or bool, so a comparison decides the same on every backend.
"""

from typing import Any

import numpy as xp

from scheduler.model.snapshot import UNKNOWN

__all__ = ["covered_sets", "lists", "rows_where", "unknown_as_zero", "xp"]


def rows_where(mask: Any) -> Any:
    """The rows where the mask holds, ascending."""
    return xp.flatnonzero(mask)


def unknown_as_zero(column: Any) -> Any:
    """The column with 0 where it is UNKNOWN."""
    return xp.where(column == UNKNOWN, 0, column)


def lists(columns: tuple[Any, ...], rows: Any) -> list[list[Any]]:
    """Each column's values at the rows as a plain list."""
    return [column[rows].tolist() for column in columns]


def covered_sets(model_fits: Any, model_set: int) -> Any:
    """Bool, shape (model sets,): the sets that allow no GPU which `model_set` does not allow."""
    return ~(model_fits & ~model_fits[model_set]).any(axis=1)
