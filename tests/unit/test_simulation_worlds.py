"""Worlds for benchmarks: what is in them, that a seed is a world, and how a tick changes them."""

from dataclasses import fields

import numpy as np
import pytest

from scheduler.model.jobs import JobClass
from scheduler.model.policy import Policy
from scheduler.model.snapshot import (
    CLOSED,
    DRAINING,
    PENDING,
    PREEMPTING,
    RUNNING,
    STARTING,
    STOPPING,
    UNKNOWN,
    Snapshot,
)
from scheduler.planning.planner import digest, plan
from scheduler.simulation.changes import carried_out, changed, held_gpus, settled
from scheduler.simulation.worlds import NODE_GPUS, SECOND_US, world

POLICY = Policy()
# Large enough that everything which is drawn is there.
JOBS, GPUS, SEED = 20_000, 3_000, 2


@pytest.fixture(scope="module")
def large() -> Snapshot:
    return world(JOBS, GPUS, SEED)


def columns(snapshot: Snapshot) -> dict[str, list[int]]:
    parts = (snapshot.jobs, snapshot.gpus, snapshot.nodes, snapshot.holdings)
    return {
        f"{type(part).__name__}.{field.name}": np.asarray(getattr(part, field.name)).tolist()
        for part in parts
        for field in fields(part)
    }


@pytest.mark.parametrize(("jobs", "gpus"), [(1, 1), (2, 9), (7, 16), (1000, 100)])
def test_a_world_has_as_many_jobs_and_gpus_as_were_asked_for(jobs: int, gpus: int) -> None:
    made = world(jobs, gpus, SEED)
    assert len(made.jobs) == jobs
    assert len(made.gpus) == gpus
    assert np.bincount(made.gpus.node).max() <= NODE_GPUS
    assert made.jobs.number.tolist() == list(range(1, jobs + 1))
    assert (made.jobs.state != PENDING).sum() <= jobs // 2


def test_equal_seeds_give_equal_worlds_and_plans_and_different_ones_differ() -> None:
    one, again, other = (world(500, 60, seed) for seed in (4, 4, 5))
    assert columns(one) == columns(again)
    assert columns(one) != columns(other)
    assert digest(plan(one, POLICY)) == digest(plan(again, POLICY))
    assert digest(plan(one, POLICY)) != digest(plan(other, POLICY))


def test_every_class_shape_and_state_occurs(large: Snapshot) -> None:
    jobs = large.jobs
    assert set(jobs.job_class.tolist()) == set(map(int, JobClass))
    assert set(jobs.gpus.tolist()) == {0, 1, 2, 4, 8}
    assert {250, 500, 1000} <= set(jobs.share_milli.tolist())
    assert set(jobs.state.tolist()) == set(range(6))
    assert set(jobs.models.tolist()) == set(range(len(large.model_fits)))
    assert jobs.preemptible.any()
    assert not jobs.preemptible.all()
    assert (large.gpus.state == CLOSED).any()
    assert (large.nodes.drain == DRAINING).any()
    assert (large.holdings.job == UNKNOWN).any()


def test_part_of_the_gpus_is_held_by_jobs_on_their_own_node(large: Snapshot) -> None:
    held = large.holdings.job != UNKNOWN
    job, gpu = large.holdings.job[held], large.holdings.gpu[held]
    assert 0.5 < len(np.unique(gpu)) / GPUS < 0.8
    assert (large.jobs.node[job] == large.gpus.node[gpu]).all()
    assert (np.bincount(job, minlength=JOBS)[large.jobs.state != PENDING] > 0).all()
    live = large.jobs.state != PENDING
    assert np.bincount(job, minlength=JOBS)[live].tolist() == large.jobs.gpus[live].tolist()
    for amount in ("cpus", "memory_mib"):
        node = large.jobs.node[live]
        taken = np.bincount(node, weights=getattr(large.jobs, amount)[live], minlength=len(large.nodes))
        assert (taken <= getattr(large.nodes, amount)).all(), amount


def test_a_preempted_job_gives_way_to_a_waiting_one(large: Snapshot) -> None:
    preemptors = large.jobs.preemptor[large.jobs.state == PREEMPTING]
    assert len(preemptors)
    rows = np.searchsorted(large.jobs.number, preemptors)
    assert (large.jobs.state[rows] == PENDING).all()
    assert (large.jobs.job_class[rows] == JobClass.INFERENCE).all()


def test_a_plan_that_was_carried_out_starts_and_stops_nothing_more() -> None:
    before = world(600, 64, SEED)
    first = plan(before, POLICY)
    assert {type(action).__name__ for action in first.actions} >= {"StartJob", "PreemptJob", "FailJob"}
    after = carried_out(before, first)
    assert held_gpus(after) >= held_gpus(before)
    assert plan(after, POLICY).actions == ()


def test_a_second_later_a_third_has_ended_a_third_has_come_and_a_third_is_worth_something_else() -> None:
    before = carried_out(start := world(600, 64, SEED), plan(start, POLICY))
    after = changed(before, 30, np.random.default_rng(SEED))
    assert after.now_us == before.now_us + SECOND_US
    old = dict(zip(before.jobs.number.tolist(), before.jobs.value.tolist(), strict=True))
    new = dict(zip(after.jobs.number.tolist(), after.jobs.value.tolist(), strict=True))
    assert len(old.keys() - new.keys()) == 10
    assert len(new.keys() - old.keys()) == 10
    # A value of which 100 % is drawn stays what it is.
    assert 8 <= sum(old[number] != new[number] for number in old.keys() & new.keys()) <= 10
    assert (before.jobs.state == STARTING).any()
    assert not (after.jobs.state == STARTING).any()
    assert (after.jobs.started_us[after.jobs.state == RUNNING] != UNKNOWN).all()
    held = after.holdings.job[after.holdings.job != UNKNOWN]
    assert (after.jobs.state[held] != PENDING).all()


def test_in_a_settled_world_nobody_leaves_and_nothing_is_left_to_do() -> None:
    before = world(600, 64, SEED)
    after = settled(before, POLICY)
    assert plan(after, POLICY).actions == ()
    assert not np.isin(after.jobs.state, (STARTING, PREEMPTING, STOPPING)).any()
    assert (after.holdings.job != UNKNOWN).all()
    held = np.bincount(after.holdings.job, minlength=len(after.jobs))
    assert ((held > 0) <= (after.jobs.state != PENDING)).all()
    waits = after.jobs.state == PENDING
    assert (after.jobs.node[waits] == UNKNOWN).all()
    assert (after.jobs.started_us[~waits] <= after.now_us).all()
    # Some have waited again since, and others hold what they had.
    pending_before = set(before.jobs.number[before.jobs.state == PENDING].tolist())
    assert set(after.jobs.number[waits].tolist()) - pending_before
    assert held_gpus(after) > held_gpus(before)
    assert columns(after) == columns(settled(before, POLICY))


def test_where_nothing_can_end_more_jobs_come() -> None:
    before = world(1, 1, SEED)
    after = changed(before, 30, np.random.default_rng(SEED))
    assert after.jobs.number.tolist() == list(range(1, 31))
