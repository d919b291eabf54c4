"""A hunt for a cycle of preemptions by docs/PREEMPTION_ENDS.md; HUNT_RUNS is how many seeds of each kind."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import pytest

from tests.fakes.worlds import RUNNING, SECOND_US, J, W
from tests.properties.hunting import (
    Hunt,
    arrival,
    cluster_world,
    equal_world,
    mixed_world,
    potential,
    random_policy,
)
from tests.properties.oracle import rank

RUNS = int(os.environ.get("HUNT_RUNS", "60"))
SEEDS = range(RUNS)
TICKS_MAX = 3000
STORM_TICKS = 60
# What wakes a plan: the end of a grace, of a hand-over, of a back-off and of a minimum runtime; an end.
TICKS_PER_START_MAX = 6

# A long hunt takes minutes.
pytestmark = pytest.mark.timeout(3600)


@contextmanager
def seeded(seed: int) -> Iterator[Random]:
    """Chance from the seed, which a failure names."""
    try:
        yield Random(seed)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def started(random: Random, hunt: Hunt) -> Hunt:
    hunt.handover_us = random.choice((0, 0, 5, 90)) * SECOND_US
    return hunt


def above(hunt: Hunt, job: J) -> list[J]:
    """The jobs of higher rank, while nobody ages."""
    order = hunt.policy.order
    return [other for other in hunt.world.jobs if rank(order, other) < rank(order, job)]


def test_a_job_of_one_gpu_is_displaced_at_most_once_for_each_higher_job_that_waited() -> None:
    displaced = 0
    for seed in SEEDS:
        with seeded(seed) as random:
            world = equal_world(random, 1)
            waited = {job.number for job in world.jobs if job.state != RUNNING}
            hunt = started(random, Hunt(world, random_policy(random, ages=False), random))
            hunt.rest(TICKS_MAX)
            for job in hunt.world.jobs:
                most = sum(other.number in waited for other in above(hunt, job))
                assert hunt.preempted[job.number] <= most, f"job {job.number} of {world}"
            assert hunt.shifts == hunt.slips == 0
            displaced += sum(hunt.preempted.values())
    assert displaced, "nobody was displaced: this hunt would see nothing"


def test_on_equal_gpus_the_potential_of_whole_jobs_never_falls_and_bounds_how_often_each_gives_way() -> None:
    rises = 0
    for seed in SEEDS:
        with seeded(seed) as random:
            world = equal_world(random, 4)
            # Nobody is held back: with backfill only a promise does it, and no minimum runtime, no promise.
            world = replace(world, jobs=tuple(replace(job, min_runtime_us=0) for job in world.jobs))
            policy = replace(random_policy(random, ages=False), backfill=True)
            hunt = started(random, Hunt(world, policy, random))
            ranked = [job.number for job in sorted(world.jobs, key=lambda job: rank(hunt.policy.order, job))]
            before = potential(hunt, ranked)
            for _ in range(TICKS_MAX):
                actions = hunt.tick()
                after = potential(hunt, ranked)
                assert after > before or (after == before and not hunt.displaces)
                rises, before = rises + hunt.displaces, after
                next_us = hunt.next_us()
                if next_us is None and not actions:
                    break
                hunt.pass_to(max(hunt.world.now_us, hunt.world.now_us if next_us is None else next_us))
            else:
                raise AssertionError("no rest")
            for job in hunt.world.jobs:
                assert hunt.preempted[job.number] <= 2 ** len(above(hunt, job)) - 1
    assert rises, "nobody was displaced: this hunt would see nothing"


@pytest.mark.parametrize("made", [mixed_world, cluster_world])
def test_whatever_the_jobs_want_they_come_to_rest_and_give_way_no_more_often_than_is_proved(
    made: Callable[[Random], W],
) -> None:
    displaced = 0
    for seed in SEEDS:
        with seeded(seed) as random:
            world = made(random)
            hunt = started(random, Hunt(world, random_policy(random, ages=False), random))
            hunt.rest(TICKS_MAX)
            assert hunt.ticks <= TICKS_PER_START_MAX * (len(world.jobs) + hunt.starts)
            for job in hunt.world.jobs:
                higher = len(above(hunt, job))
                extra = (hunt.shifts + hunt.slips) if higher else 0
                assert hunt.preempted[job.number] <= 3**higher - 1 + extra, f"job {job.number} of {world}"
            displaced += sum(hunt.preempted.values())
    assert displaced, "nobody was displaced: this hunt would see nothing"


@pytest.mark.parametrize("made", [mixed_world, cluster_world])
def test_after_a_storm_of_arrivals_and_ends_with_aging_they_come_to_rest_too(
    made: Callable[[Random], W],
) -> None:
    displaced = 0
    for seed in SEEDS:
        with seeded(seed) as random:
            hunt = started(random, Hunt(made(random), random_policy(random, ages=True), random))
            for number in range(100, 100 + STORM_TICKS):
                hunt.tick()
                if random.random() < 0.5:
                    job = arrival(random, number, hunt.world)
                    job = replace(job, eligible_us=hunt.world.now_us + random.choice((0, 0, 5)) * SECOND_US)
                    hunt.submit(job, random.choice((None, 5 * SECOND_US, 30 * SECOND_US, 200 * SECOND_US)))
                next_us, later_us = hunt.next_us(), hunt.world.now_us + random.randint(1, 60) * SECOND_US
                hunt.pass_to(later_us if next_us is None else max(hunt.world.now_us, min(next_us, later_us)))
            hunt.needs_us = dict.fromkeys(hunt.needs_us)
            stormy, starts = hunt.ticks, hunt.starts
            hunt.rest(TICKS_MAX)
            calm = TICKS_PER_START_MAX * (len(hunt.world.jobs) + hunt.starts - starts)
            assert hunt.ticks - stormy <= calm
            displaced += sum(hunt.preempted.values())
    assert displaced, "nobody was displaced: this hunt would see nothing"
