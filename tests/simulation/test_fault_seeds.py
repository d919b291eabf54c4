"""Whatever goes wrong, what must not happen does not, and all comes right again, for FAULT_SEEDS seeds."""

import os

import pytest

from tests.simulation.script import KINDS, drawn
from tests.simulation.shrink import played, told

SEEDS = int(os.environ.get("FAULT_SEEDS", "15"))


# One run takes half a second; a failure is made as short as can be before it is told.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_faults_fly_and_nothing_happens_that_must_not(seed: int) -> None:
    script = drawn(seed)
    _, violation = played(script)
    assert violation is None, told(script)


def test_the_same_seed_gives_the_same_story() -> None:
    log, _ = played(drawn(3))
    assert (len(log) > 100, played(drawn(3))[0]) == (True, log)
    assert played(drawn(4))[0] != log


def test_seeds_draw_every_kind_of_fault_and_each_is_off_in_many() -> None:
    scripts = [drawn(seed) for seed in range(200)]
    with_kind = {kind: sum(any(f.kind == kind for f in s.faults) for s in scripts) for kind in KINDS}
    assert {kind: count for kind, count in with_kind.items() if not 80 < count < 160} == {}


def test_most_seeds_that_are_to_freeze_jobs_do() -> None:
    seeds = [seed for seed in range(60) if drawn(seed).miners_freeze]
    assert len(seeds) > 60 // 6
    froze = [any(" SUSPENDED " in line for line in played(drawn(seed))[0]) for seed in seeds[:5]]
    assert sum(froze) >= 3
