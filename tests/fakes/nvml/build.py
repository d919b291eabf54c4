"""Compiles the fake library once per source and choice of missing functions."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
CACHE = (
    Path(__file__).resolve().parents[3] / ".pytest_cache" / "fake-nvml"
)  # git ignores it, `make clean` ends it
LIBRARY = "libnvidia-ml.so.1"
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def is_possible() -> bool:
    return shutil.which("gcc") is not None


def build(without: Iterable[str] = ()) -> Path:
    """Return the library. The functions in `without` are missing in it, as in an older driver's."""
    # Renamed, a function is not found under its name: so any of them can be missing.
    hidden = tuple(f"-D{name}=missing_{name}" for name in sorted(without))
    digest = hashlib.sha256(SOURCE.read_bytes() + "\0".join((*FLAGS, *hidden)).encode()).hexdigest()[:16]
    library = CACHE / digest / LIBRARY
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fresh = Path(folder) / LIBRARY
            subprocess.run(
                ["gcc", *FLAGS, *hidden, f"-Wl,-soname,{LIBRARY}", "-o", fresh, SOURCE], check=True
            )
            os.replace(fresh, library)  # noqa: PTH105 - tests in parallel: the last one wins, whole
    return library


if __name__ == "__main__":
    print(build())
