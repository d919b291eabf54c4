"""How a plan changes with its world: by nothing where only names change, for the better with one more GPU."""

from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.model.actions import Plan, PreemptJob, StartJob
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from scheduler.planning.planner import Memo, digest, plan
from tests.fakes.worlds import (
    MINING,
    SECOND_US,
    UNKNOWN,
    J,
    W,
    applied,
    gpus,
    outcome,
    snapshot,
)
from tests.properties.checking import planned_among
from tests.properties.oracle import rank
from tests.properties.strategies import SHARES, any_worlds, contested, crowds, fleets, policies

MOMENTS = ("eligible_us", "deadline_us", "started_us", "checkpoint_us", "stop_us")


def planned(world: W, policy: Policy) -> Plan:
    return plan(snapshot(world), policy)


def with_sets(world: W) -> W:
    """The world with the models that all its jobs name: they have a part in placement; jobs go, they stay."""
    sets = dict.fromkeys([*world.model_sets, *(job.models for job in world.jobs)])
    return replace(world, model_sets=tuple(sets))


def renamed(world: W, number: Any, uuid: Any, model: Any) -> W:
    """The world with every number, UUID and model under another name."""

    def whom(preemptor: int) -> int:
        return preemptor if preemptor == UNKNOWN else number(preemptor)

    jobs = tuple(
        replace(
            job,
            number=number(job.number),
            on=tuple(uuid(name) for name in job.on),
            models=tuple(model(name) for name in job.models),
            preemptor=whom(job.preemptor),
        )
        for job in world.jobs
    )
    return replace(
        world,
        jobs=jobs,
        gpus=tuple(replace(gpu, uuid=uuid(gpu.uuid), model=model(gpu.model)) for gpu in world.gpus),
        handovers=tuple(
            replace(over, uuid=uuid(over.uuid), preemptor=whom(over.preemptor)) for over in world.handovers
        ),
        model_sets=tuple(tuple(model(name) for name in names) for names in world.model_sets),
    )


@given(any_worlds(), policies(), st.integers(1, 9), st.integers(0, 1000))
def test_other_names_in_the_same_order_change_nothing(
    world: W, policy: Policy, stride: int, first: int
) -> None:
    numbers = {first + stride * number: number for number in range(200)}
    there = {number: name for name, number in numbers.items()}
    other = renamed(with_sets(world), there.__getitem__, lambda u: f"MIG-{u}x", lambda m: f"NVIDIA {m} 80GB")
    made = outcome(planned(other, policy))
    actions = []
    for action in made.actions:
        action = replace(action, job=numbers[action.job])
        if isinstance(action, StartJob):
            action = replace(action, gpus=tuple(name[4:-1] for name in action.gpus))
        if isinstance(action, PreemptJob):
            action = replace(action, preemptor=numbers[action.preemptor])
        actions.append(action)
    back = replace(
        made,
        actions=tuple(actions),
        waits={numbers[number]: reason for number, reason in made.waits.items()},
        promise=made.promise and replace(made.promise, job=numbers[made.promise.job]),
        awaited={numbers[n]: tuple(numbers[each] for each in on) for n, on in made.awaited.items()},
    )
    assert back == outcome(planned(with_sets(world), policy))


@given(any_worlds(), policies(), st.integers(-(10**9), 10**9))
def test_only_how_long_ago_counts_not_the_date(world: W, policy: Policy, later_s: int) -> None:
    shift_us = later_s * SECOND_US

    def moved(thing: Any, *moments: str) -> Any:
        there = {name: getattr(thing, name) for name in moments}
        return replace(thing, **{name: at + shift_us for name, at in there.items() if at > 0})

    other = replace(
        moved(world, "now_us"),
        jobs=tuple(moved(job, *MOMENTS) for job in world.jobs),
        handovers=tuple(moved(over, "stop_us") for over in world.handovers),
    )
    made, then = outcome(planned(world, policy)), outcome(planned(other, policy))
    promise = made.promise and replace(made.promise, start_us=made.promise.start_us + shift_us)
    wake_us = None if made.wake_us is None else made.wake_us + shift_us
    assert then == replace(made, promise=promise, wake_us=wake_us)


@given(any_worlds(), any_worlds(), policies(), policies())
def test_a_memo_of_any_other_plan_changes_nothing(before: W, world: W, policy: Policy, other: Policy) -> None:
    memo = Memo()
    plan(snapshot(before), other, memo)
    assert digest(plan(snapshot(world), policy, memo)) == digest(planned(world, policy))


def check_needed(world: W, policy: Policy) -> None:
    """Take back each victim in turn: without it, and without stops anew, its preemptor is not served."""
    world = with_sets(world)
    preempts = [a for a in planned(world, policy).actions if isinstance(a, PreemptJob)]
    assume(preempts)
    for preempt in preempts:
        top = rank(policy.order, world.job(preempt.preemptor))
        alone = replace(world, jobs=tuple(j for j in world.jobs if j.is_live or rank(policy.order, j) <= top))
        made = planned_among(alone, world, policy)
        assert preempt in made.actions, "jobs of lower rank had a part in it"
        spared = replace(made, actions=tuple(each for each in made.actions if each != preempt))
        again = outcome(planned_among(applied(alone, spared), world, policy))
        more = [a for a in again.actions if isinstance(a, PreemptJob) and a.preemptor == preempt.preemptor]
        waits = again.waits.get(preempt.preemptor)
        assert more or waits not in (None, Reason.WAITING_FOR_HANDOVER), f"{preempt.job} was needless"


@given(contested() | fleets(), policies())
def test_without_any_one_of_its_victims_a_job_is_not_served(world: W, policy: Policy) -> None:
    check_needed(world, policy)


@given(crowds(), policies())
def test_nobody_of_a_crowd_too_large_for_a_search_stops_needlessly(world: W, policy: Policy) -> None:
    check_needed(world, policy)


def cost(world: W, made: Plan) -> tuple[int, int, int]:
    """What the victims of a plan lose: value, then GPUs, then their number."""
    preempts = [a for a in made.actions if isinstance(a, PreemptJob)]
    return (
        sum(a.loss_microusd for a in preempts),
        sum(len(world.job(a.job).on) for a in preempts),
        len(preempts),
    )


@given(contested(), policies(), st.data())
def test_no_victim_could_have_been_spared_for_cheaper_ones(
    world: W, policy: Policy, data: st.DataObject
) -> None:
    wanted = data.draw(st.sampled_from([job for job in world.jobs if not job.is_live]))
    alone = replace(world, jobs=(*(job for job in world.jobs if job.is_live), wanted))
    made = planned(alone, policy)
    assume(made.awaited)
    for victim in made.awaited[wanted.number]:
        stays = replace(alone.job(victim), preemptible=False)
        spared = replace(alone, jobs=tuple(stays if j.number == victim else j for j in alone.jobs))
        other = planned(spared, policy)
        if other.awaited:
            assert cost(alone, made) <= cost(spared, other), f"{victim} is dearer than the others"


@st.composite
def offers(draw: st.DrawFn) -> tuple[J, ...]:
    """Jobs that wait, each worth something, of run times that nobody knows."""
    jobs = []
    for number in range(1, draw(st.integers(1, 10)) + 1):
        share = draw(st.sampled_from((1000, 1000, *SHARES)))
        jobs.append(
            J(
                number,
                draw(st.integers(0, MINING)),
                value=draw(st.integers(0, 20)) * 100_000,
                gpus=draw(st.integers(1, 5)) if share == 1000 else 1,
                share_milli=share,
            )
        )
    return tuple(jobs)


def value_of(world: W, made: Plan) -> int:
    """What the jobs that start are worth together, in micro-USD per hour and thousandth of a GPU."""
    started = [world.job(action.job) for action in made.actions if isinstance(action, StartJob)]
    return sum(job.value * job.gpus * job.share_milli for job in started)


@given(offers(), st.integers(0, 7))
def test_under_order_value_one_more_equal_gpu_never_lowers_the_value(jobs: tuple[J, ...], count: int) -> None:
    # Of what waits. Who runs already gives way by its loss, not by its value: docs/PREEMPTION_ENDS.md.
    policy = Policy(order=Order.VALUE)
    values = []
    for number in (count, count + 1):
        world = W(jobs=jobs, gpus=gpus(number))
        values.append(value_of(world, planned(world, policy)))
    assert values[0] <= values[1]
