"""The shortest script that still fails, by leaving out what it fails without; and its story."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from scheduler.simulation.node import START_S
from tests.simulation.script import Script
from tests.simulation.watching import Violation
from tests.simulation.world import play

# Runs spent on making a script shorter; each takes a fraction of a second.
RUNS_MAX = 200
# The journal's syncs cost nothing where its directory is memory.
IN_MEMORY = Path("/dev/shm")
_ROOT = Path(__file__).resolve().parents[2]

_NUMBERS = re.compile(r"[\d.]+|GPU-\S+")

# What a place may have that others have not.
_PLAIN: tuple[dict[str, Any], ...] = (
    {"miners": False},
    {"budget_w": None},
    {"pids": 0},
    {"start_s": START_S},
    {"sampling_s": 1.0},
)
_T = TypeVar("_T")


def played(script: Script) -> tuple[list[str], Violation | None]:
    """Play a script in a directory of its own."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as directory:
        return play(script, Path(directory))


def shrunk(script: Script) -> Script:
    """A script with as few faults, wishes and jobs as could be found that still violates the same."""
    left = RUNS_MAX
    wanted = _kind(played(script)[1])

    def fails(candidate: Script) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and _kind(played(candidate)[1]) == wanted

    for plain in _PLAIN:
        if fails(replace(script, **plain)):
            script = replace(script, **plain)
    script = replace(script, faults=_fewest(script.faults, lambda f: fails(replace(script, faults=f))))
    script = replace(script, wishes=_fewest(script.wishes, lambda w: fails(replace(script, wishes=w))))
    script = replace(script, arrivals=_fewest(script.arrivals, lambda a: fails(replace(script, arrivals=a))))
    return replace(script, faults=_fewest(script.faults, lambda f: fails(replace(script, faults=f))))


def _kind(violation: Violation | None) -> str:
    """What was violated, whoever it happened to."""
    return _NUMBERS.sub("", str(violation))


def _fewest(parts: tuple[_T, ...], fails: Callable[[tuple[_T, ...]], bool]) -> tuple[_T, ...]:
    """Leave out halves, then quarters, then single parts, as long as it still fails."""
    size = len(parts)
    while size >= 1 and parts:
        at = 0
        while at < len(parts):
            fewer = parts[:at] + parts[at + size :]
            if fails(fewer):
                parts = fewer
            else:
                at += size
        size //= 2
    return parts


def told(script: Script) -> str:
    """What a failing script is shrunk to, and the story of that."""
    short = shrunk(script)
    log, violation = played(short)
    enough = f"{len(short.faults)} of {len(script.faults)} faults and {len(short.arrivals)} jobs are enough"
    lines = [
        f"seed {script.seed} at commit {_commit()}: {violation}",
        f"{enough}, with {short}:",
        *(f"  fault {fault}" for fault in short.faults),
        *(f"  asked {wish}" for wish in short.wishes),
        *(f"  job   {arrival}" for arrival in short.arrivals),
        "The story:",
        *log,
    ]
    return "\n".join(lines)


def _commit() -> str:
    found = subprocess.run(
        ["git", "-c", f"safe.directory={_ROOT}", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
