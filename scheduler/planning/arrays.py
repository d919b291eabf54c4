"""The array library that planning computes with, numpy or CuPy, and the few operations that need care.

`xp` stands for the library. It is numpy until `choose` binds it to another one, once, before anything is
planned; whoever imports `xp` sees the change. All columns are int64 or bool, so a comparison decides the
same on every library.
"""

from enum import StrEnum
from typing import Any

import numpy as np

from scheduler.errors import BackendUnavailable
from scheduler.model.snapshot import UNKNOWN, Snapshot

__all__ = [
    "Backend",
    "bind",
    "choose",
    "covered_sets",
    "finish",
    "lists",
    "on_backend",
    "pool_mib",
    "release",
    "rows_where",
    "unknown_as_zero",
    "xp",
]

# The most that a plan may take of the GPU that is set aside for it. A million jobs are 0.2 GiB of columns,
# and what is derived from them is some ten times that.
POOL_MIB_MAX = 4096
# From how many jobs a plan on CuPy was measured to be faster than on numpy. None: it was slower wherever it
# was measured (docs/PLAN_TIME.md). A CUDA context would cost hundreds of MiB and tens of watts besides.
CUPY_WINS_FROM_JOBS: int | None = None
_MIB = 1 << 20


class Backend(StrEnum):
    """Which array library plans."""

    NUMPY = "numpy"
    CUPY = "cupy"
    AUTO = "auto"  # whichever was measured to be faster for so many jobs, where a GPU is set aside


class _Library:
    """A library's names, each looked up there once: after that as fast as in the module itself."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_module"], name)
        self.__dict__[name] = value
        return value

    def bind(self, module: Any) -> Any:
        """Stand for another library; returns the one before."""
        before = self._module
        self.__dict__.clear()
        self._module = module
        return before


xp: Any = _Library(np)


def choose(backend: Backend, jobs: int, gpu_is_set_aside: bool) -> Backend:
    """Bind `xp` for worlds of so many jobs; returns NUMPY or CUPY.

    CuPy takes the GPU that CUDA names first, and at most POOL_MIB_MAX of it.

    Raises:
        BackendUnavailable: CUPY was asked for, and CuPy or a GPU that it can use is missing.
    """
    if backend is Backend.AUTO:
        wins = CUPY_WINS_FROM_JOBS is not None and jobs >= CUPY_WINS_FROM_JOBS
        backend = Backend.CUPY if wins and gpu_is_set_aside else Backend.NUMPY
    if backend is Backend.NUMPY:
        bind(np)
    else:
        cupy = _cupy()
        cupy.get_default_memory_pool().set_limit(size=POOL_MIB_MAX * _MIB)
        bind(cupy)
    return backend


def bind(module: Any) -> Any:
    """Let `xp` stand for a library; returns the one before."""
    return xp.bind(module)


def on_backend(snapshot: Snapshot) -> Snapshot:
    """The snapshot with its columns where `xp` computes; itself where that is numpy.

    It was checked when it was built, so the copy isn't checked again.
    """
    return snapshot if xp.__name__ == "numpy" else _moved(snapshot)


def finish() -> None:
    """Wait until everything that was asked of the library is done; CuPy only queues it."""
    if xp.__name__ == "cupy":
        xp.cuda.get_current_stream().synchronize()


def pool_mib() -> float:
    """The most GPU memory that CuPy has held at once for arrays since `release`; 0 on numpy."""
    if xp.__name__ != "cupy":
        return 0.0
    # Nothing else hands memory back to the driver, so what is held now is the most that was.
    return float(xp.get_default_memory_pool().total_bytes()) / _MIB


def release() -> None:
    """Hand back to the driver what CuPy holds beyond its living arrays; numpy keeps nothing."""
    if xp.__name__ == "cupy":
        xp.get_default_memory_pool().free_all_blocks()


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


def _cupy() -> Any:
    """CuPy, where it is installed and sees a GPU."""
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable(
            f"CuPy can't be loaded ({error}); install it with: pip install 'wattshift[cuda]'"
        ) from None
    if not cupy.cuda.is_available():
        raise BackendUnavailable(
            "CuPy finds no GPU that it can use; see that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES "
            "doesn't hide it"
        )
    return cupy


def _moved(record: Any) -> Any:
    """A record of the snapshot with its columns moved."""
    moved = object.__new__(type(record))
    for name in record.__slots__:
        value = getattr(record, name)
        if isinstance(value, np.ndarray):
            value = xp.asarray(value)
        elif hasattr(value, "__slots__"):
            value = _moved(value)
        object.__setattr__(moved, name, value)
    return moved
