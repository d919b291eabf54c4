"""`python -m tests.simulation.planted`: plant each bug in a copy of the tree, and see which seed finds it.

Prints the table of docs/TESTING.md, a row as soon as it is known. Words choose bugs whose names contain them;
`--seeds 200` says up to where to look. A bug that keeps a run from ending is found, too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.simulation.bugs import BUGS, ROOT, Bug

SEEDS = 200
_FOUND = re.compile(r"^seed (\d+): (.*)$", re.MULTILINE)


def found(bug: Bug, first: int, last: int) -> tuple[int, str] | None:
    """The first of these seeds that finds the bug, and how; None: none does.

    Raises:
        ValueError: The code has moved on, and the bug can't be planted.
        RuntimeError: The seeds could not be played, or the one that fails does so without the bug.
    """
    by = _first_that_fails(bug.file, bug.planted(), first, last)
    if by is not None:
        seed, how = by
        plainly = _first_that_fails(bug.file, (ROOT / bug.file).read_text(encoding="utf-8"), seed, seed)
        if plainly is not None:
            raise RuntimeError(f"{bug.name}: seed {seed} fails without it, too: {plainly[1]}; with it: {how}")
    return by


def _first_that_fails(file: str, text: str, first: int, last: int) -> tuple[int, str] | None:
    """The first of the seeds that fails with this text in the file, and how."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        shutil.copytree(ROOT / "scheduler", copy / "scheduler", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "tests").symlink_to(ROOT / "tests")
        (copy / file).write_text(text, encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-m", "tests.simulation", "--first", f"{first}..{last}"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
    told = _FOUND.findall(ended.stdout)
    if ended.returncode not in (0, 1) or (ended.returncode and not told):
        raise RuntimeError(f"the seeds could not be played:\n{ended.stdout}{ended.stderr}")
    return (int(told[-1][0]), told[-1][1]) if ended.returncode else None


def row(bug: Bug, by: tuple[int, str] | None, seeds: int) -> str:
    """The bug's row of the table."""
    seed, how = (str(by[0]), by[1]) if by else (f"none of {seeds}", "")
    return f"| `{bug.name}` | {bug.where}: {bug.what} | {seed} | {how[:100]} |"


def main(arguments: list[str]) -> int:
    """Plant the bugs that are named; returns 1 where fewer than nine of ten were found."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.planted", description=__doc__)
    parser.add_argument("words", nargs="*", help="bugs whose names contain one of these (all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds to look through ({SEEDS})")
    said = parser.parse_args(arguments)
    bugs = [bug for bug in BUGS if not said.words or any(word in bug.name for word in said.words)]
    if not bugs:
        parser.error(f"no bug is called so; there are {', '.join(bug.name for bug in BUGS)}")
    caught = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bug, by in zip(bugs, pool.map(lambda bug: found(bug, 0, said.seeds - 1), bugs), strict=True):
            caught += by is not None
            print(row(bug, by, said.seeds), flush=True)
    print(f"{caught} of {len(bugs)} bugs were found by seeds below {said.seeds}", file=sys.stderr)
    return 0 if caught >= 0.9 * len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
