"""Long random runs of a small node: no cycle of preemptions, nobody starves."""

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.model.policy import Policy
from scheduler.planning.planner import plan
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    RUNNING,
    SECOND_US,
    STOPPING,
    SUSPENDED,
    TRAINING,
    UNKNOWN,
    J,
    N,
    W,
    gpus,
    outcome,
    running,
    snapshot,
)
from tests.properties.runs import Run
from tests.properties.strategies import policies, worlds

# Four preemptions take the poorest to the top of its class; the rest is room for back-off.
ARRIVALS_MAX = 100


def without_limits(world: W) -> W:
    return replace(
        world, jobs=tuple(replace(job, time_limit_us=UNKNOWN, deadline_us=UNKNOWN) for job in world.jobs)
    )


@given(worlds(), policies())
def test_without_arrivals_and_ends_preemptions_cease(world: W, policy: Policy) -> None:
    world = without_limits(world)
    run = Run(world, policy, {job.number: None for job in world.jobs})
    run.settle()


@given(worlds(plain=True), policies(), st.data())
def test_every_job_that_the_empty_node_could_run_is_done_in_the_end(
    world: W, policy: Policy, data: st.DataObject
) -> None:
    feasible = [job for job in without_limits(world).jobs if job.is_live or job.gpus <= len(world.gpus)]
    jobs = tuple(replace(job, state=RUNNING) if job.state == SUSPENDED else job for job in feasible)
    world = replace(world, jobs=jobs)
    needs = {job.number: data.draw(st.sampled_from((1, 20, 300))) * SECOND_US for job in world.jobs}
    run = Run(world, policy, needs)
    run.settle()
    assert run.world.jobs == ()
    assert run.done == {job.number for job in jobs if job.state != STOPPING}


@given(
    st.sampled_from((BATCH, TRAINING)),
    st.integers(0, 1000),
    st.integers(1, 30),
    st.integers(10, 200),
)
def test_a_stream_of_richer_jobs_of_its_class_does_not_starve_a_job(
    job_class: int, priority: int, every_s: int, needs_s: int
) -> None:
    policy = Policy()
    poor = J(1, job_class, priority=priority, value=1000, grace_us=0)
    run = Run(W(jobs=(poor,), gpus=gpus(1)), policy, {1: needs_s * SECOND_US})
    limit = policy.aging_after_preemptions - (priority - 1001) // policy.aging_priority_step
    for number in range(2, ARRIVALS_MAX):
        run.plan()
        if 1 in run.done:
            break
        rich = J(number, job_class, priority=priority, value=1000 + 1000 * number**2, grace_us=0)
        run.submit(rich, every_s * SECOND_US // 2)
        next_us = run.next_us()
        horizon_us = run.world.now_us + every_s * SECOND_US
        run.pass_to(horizon_us if next_us is None else max(run.world.now_us + 1, min(next_us, horizon_us)))
    run.settle()
    assert 1 in run.done
    assert run.preempted[1] <= limit


@st.composite
def fillers(draw: st.DrawFn, number: int) -> tuple[J, int]:
    """A job of lower rank than any training, and how long it really takes: never longer than it says."""
    said_s = draw(st.sampled_from((5, 20, 60, 200)))
    job = J(
        number,
        draw(st.sampled_from((BATCH, MINING))),
        gpus=draw(st.integers(1, 3)),
        preemptible=draw(st.booleans()),
        min_runtime_us=draw(st.sampled_from((0, 0, 30))) * SECOND_US,
        expected_us=draw(st.sampled_from((said_s * SECOND_US, UNKNOWN))),
        grace_us=2 * SECOND_US,
    )
    return job, draw(st.sampled_from((said_s, max(1, said_s // 2)))) * SECOND_US


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(5, 90)), min_size=1, max_size=4),
    st.integers(2, 4),
    st.data(),
)
def test_a_gang_starts_when_it_was_promised_however_many_jobs_of_lower_rank_arrive(
    before: list[tuple[int, int]], wanted: int, data: st.DataObject
) -> None:
    jobs, needs, free = [], {}, [f"GPU-{n}" for n in range(4)]
    for number, (count, left_s) in enumerate(before, start=1):
        if count <= len(free):
            on, free = tuple(free[:count]), free[count:]
            said = {"job_class": INFERENCE, "preemptible": False, "expected_us": (10 + left_s) * SECOND_US}
            jobs.append(running(number, *on, ran_s=10, **said))
            needs[number] = (10 + left_s) * SECOND_US
    assume(len(free) < wanted)
    gang = J(50, TRAINING, gpus=wanted, expected_us=30 * SECOND_US)
    run = Run(W(jobs=(*jobs, gang), gpus=gpus(4), nodes=(N(),)), Policy(), {**needs, 50: 30 * SECOND_US})
    promised = outcome(plan(snapshot(run.world), run.policy)).promise
    assert promised is not None
    for number in range(100, 120):
        run.submit(*data.draw(fillers(number)))
        run.plan()
        if 50 in run.started_us:
            break
        next_us = run.next_us()
        later_us = run.world.now_us + data.draw(st.integers(1, 20)) * SECOND_US
        run.pass_to(later_us if next_us is None else min(max(next_us, run.world.now_us + 1), later_us))
    run.settle()
    # Who gives way at the promised moment has its grace of 2 s.
    assert run.started_us[50] <= max(promised.start_us, NOW_US) + 2 * SECOND_US
