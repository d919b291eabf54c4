"""What is decided for whole columns is what would be decided for each job alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.policy import Order, Policy
from scheduler.planning import valuation
from scheduler.planning.arrays import covered_sets
from scheduler.planning.backfill import Blocked, ends_in_time, gives_way, stays
from scheduler.planning.queue import Queue, request_of
from scheduler.planning.valuation import (
    first_ranked,
    packed_ranks,
    rank_key,
    ranked_above,
    value_bar,
    value_bars,
)
from scheduler.planning.world import NEVER
from tests.fakes.worlds import NOW_US, SECOND_US, J, W, snapshot
from tests.properties.strategies import policies

# More rows than are sorted as plain tuples.
ROWS = 90
HUGE = 1 << 61


@st.composite
def queues(draw: st.DrawFn) -> W:
    """Many pending jobs with many ties; sometimes values so far apart that ranks can't be packed."""
    values = draw(st.sampled_from(((0, 1, 1000, 1300, -7), (-HUGE, 0, HUGE))))
    random = draw(st.randoms(use_true_random=False))
    numbers = random.sample(range(1, 10 * ROWS), ROWS)
    return W(
        jobs=tuple(
            J(
                number,
                job_class=random.randrange(4),
                priority=random.choice((1, 500, 1001)),
                value=random.choice(values),
                preemptible=random.random() < 0.7,
                min_runtime_us=random.choice((0, 5, 50)) * SECOND_US,
                expected_us=random.choice((-1, 0, 20 * SECOND_US, 90 * SECOND_US)),
                restart_loss_us=random.choice((0, 600, 1_000_000)) * SECOND_US,
            )
            for number in numbers
        )
    )


@given(queues(), st.sampled_from(Order))
def test_the_first_by_rank_are_the_same_however_they_are_found(world: W, order: Order) -> None:
    jobs = snapshot(world).jobs
    rows = np.arange(len(jobs))
    keys = [rank_key(order, job.job_class, job.priority, job.value, job.number) for job in world.jobs]
    expected = sorted(range(ROWS), key=keys.__getitem__)
    packed = packed_ranks(order, jobs.job_class, jobs.priority, jobs.value, jobs.number)
    spread = max(job.value for job in world.jobs) - min(job.value for job in world.jobs)
    assert (packed is None) == (spread > HUGE)
    few = rows[:40]
    in_order = [row for row in expected if row < 40]
    for count in range(1, ROWS + 1):
        assert first_ranked(rows, count, order, jobs).tolist() == expected[:count]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(valuation, "packed_ranks", lambda *_: None)
            assert first_ranked(rows, count, order, jobs).tolist() == expected[:count]
        assert first_ranked(few, count, order, jobs).tolist() == in_order[:count]


@given(queues(), st.sampled_from(Order), st.integers(0, ROWS - 1))
def test_who_ranks_above_a_job_has_a_smaller_key(world: W, order: Order, row: int) -> None:
    keys = [rank_key(order, job.job_class, job.priority, job.value, job.number) for job in world.jobs]
    assert ranked_above(order, snapshot(world).jobs, row).tolist() == [key < keys[row] for key in keys]


@given(
    st.lists(st.tuples(st.integers(-HUGE, HUGE), st.integers(0, 10**13)), min_size=1, max_size=20),
    st.sampled_from((0.0, 0.3, 1.0, 2.5)),
)
def test_the_bars_of_a_column_are_those_of_its_values(pairs: list[tuple[int, int]], ratio: float) -> None:
    policy = Policy(hysteresis_ratio=ratio)
    columns = np.array(pairs, dtype=np.int64).T
    expected = [value_bar(value, loss_us, policy) for value, loss_us in pairs]
    assert value_bars(columns[0], columns[1], policy).tolist() == expected


@given(queues(), policies(), st.sampled_from((0, 30 * SECOND_US, None)), st.booleans())
def test_who_could_delay_a_promise_is_the_same_for_a_column_and_for_each_job(
    world: W, policy: Policy, after_us: int | None, may_end: bool
) -> None:
    snap = snapshot(world)
    queue = Queue(snap, policy.order)
    requests = [request_of(snap.jobs, row) for row in range(ROWS)]
    start_us = NEVER if after_us is None else NOW_US + after_us
    first = Blocked(requests[0]._replace(job_class=1, priority=500), start_us)
    may_end = may_end and first.is_promised
    expected = [
        not gives_way(request, first, policy, NOW_US)
        and not (may_end and ends_in_time(request, first, NOW_US))
        for request in requests
    ]
    assert stays(queue, first, policy, NOW_US, may_end).tolist() == expected


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_a_set_of_models_covers_those_that_allow_no_more_gpus(
    fits: list[list[bool]], data: st.DataObject
) -> None:
    model_set = data.draw(st.integers(0, len(fits) - 1))
    expected = [
        all(mine or not theirs for mine, theirs in zip(fits[model_set], row, strict=True)) for row in fits
    ]
    assert covered_sets(np.array(fits), model_set).tolist() == expected
