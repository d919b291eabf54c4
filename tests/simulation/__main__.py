"""`make sim SEED=`: print the story of one seed, and where it fails the shortest one that does.

`SEED=0..199` plays them all, up to the first that fails; with `--first` that one is only named.
"""

import argparse
import re
import signal
import sys

from tests.simulation.script import drawn
from tests.simulation.shrink import played, told

# Processor time: one run takes a second or two; a defect may keep it from ending.
RUN_S_MAX = 60.0


class Endless(Exception):
    """A run does not come to an end."""


def main(arguments: list[str]) -> int:
    """Play the seeds that are named; returns 1 where something was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", type=_seeds, metavar="SEED", help="a whole number, or FIRST..LAST")
    parser.add_argument("--first", action="store_true", help="name the first seed that fails, and no more")
    said = parser.parse_args(arguments)
    signal.signal(signal.SIGPROF, _ring)
    for seed in said.seeds:
        script = drawn(seed)
        signal.setitimer(signal.ITIMER_PROF, RUN_S_MAX)
        try:
            log, violation = played(script)
        except Exception as error:
            if not said.first:
                raise
            log, violation = [], error
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        if len(said.seeds) == 1 and not said.first:
            print("\n".join(log))
        if violation is None:
            words = f"{len(script.faults)} faults, {len(script.arrivals)} jobs, all is well"
            print(f"seed {seed}: {words}", flush=True)
            continue
        print(f"seed {seed}: {violation or type(violation).__name__}", flush=True)
        if not said.first:
            print("looking for the shortest script ...", flush=True)
            print(told(script))
        return 1
    return 0


def _seeds(text: str) -> range:
    if not re.fullmatch(r"\d+(\.\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, and no FIRST..LAST")
    first, _, last = text.partition("..")
    return range(int(first), int(last or first) + 1)


def _ring(number: int, frame: object) -> None:
    raise Endless(f"the run did not end within {RUN_S_MAX:g} s of processor time")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
