"""`make sim SEED=`: print the story of one seed, and where it fails the shortest one that does."""

import sys

from tests.simulation.script import drawn
from tests.simulation.shrink import played, told


def main(arguments: list[str]) -> int:
    """Play the seed that is named; returns 1 where something was violated."""
    if len(arguments) != 1 or not arguments[0].isdecimal():
        print("usage: python -m tests.simulation SEED (a whole number)", file=sys.stderr)
        return 2
    script = drawn(int(arguments[0]))
    log, violation = played(script)
    print("\n".join(log))
    if violation is None:
        print(f"seed {script.seed}: {len(script.faults)} faults, {len(script.arrivals)} jobs, all is well")
        return 0
    print(f"seed {script.seed}: {violation}\nlooking for the shortest script ...", flush=True)
    print(told(script))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
