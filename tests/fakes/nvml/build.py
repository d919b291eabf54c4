"""Compiles the fake library once per source and choice of missing functions."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
HEADER = HERE / "state.h"
SOURCES = (HERE / "library.c", HERE / "device.c", HERE / "draw.c")
CACHE = HERE.resolve().parents[2] / ".pytest_cache" / "fake-nvml"  # git ignores it, `make clean` ends it
LIBRARY = "libnvidia-ml.so.1"
# The same code under a name that nobody mistakes for the driver's, for whoever only writes the state.
WRITER = "libfake-nvml-writer.so"
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")


def is_possible() -> bool:
    return shutil.which("gcc") is not None


def build(without: Iterable[str] = (), name: str = LIBRARY) -> Path:
    """Return the library. The functions in `without` are missing in it, as in an older driver's."""
    # Renamed, a function is not found under its name: so any of them can be missing.
    hidden = tuple(f"-D{function}=missing_{function}" for function in sorted(without))
    text = b"".join(path.read_bytes() for path in (HEADER, *SOURCES))
    digest = hashlib.sha256(text + "\0".join((*FLAGS, *hidden, name)).encode()).hexdigest()[:16]
    library = CACHE / digest / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fresh = Path(folder) / name
            command = ["gcc", *FLAGS, *hidden, f"-Wl,-soname,{name}", "-o", fresh, *SOURCES]
            subprocess.run(command, check=True)
            os.replace(fresh, library)  # noqa: PTH105 - tests in parallel: the last one wins, whole
    return library


@functools.cache
def writer() -> ctypes.CDLL:
    """Return the functions that change a state as the library itself would."""
    library = ctypes.CDLL(str(build(name=WRITER)))
    unsigned, wide, state = ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p
    for function, arguments in (
        (library.fake_create, (state,)),
        (library.fake_draw_changed, (state, unsigned)),
        (library.fake_forget, (state,)),
        (library.fake_event, (state, unsigned, wide, wide, unsigned)),
    ):
        function.argtypes, function.restype = arguments, None
    return library


if __name__ == "__main__":
    print(build())
