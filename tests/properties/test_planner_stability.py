"""A plan changes nothing when made again, whatever the order of the rows, until the moment that it names."""

from dataclasses import replace

from hypothesis import assume, example, given
from hypothesis import strategies as st

from scheduler.model.actions import WAIT_REASONS, Plan
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.planning.planner import Memo, digest, plan
from tests.fakes.worlds import SECOND_US, J, W, applied, snapshot
from tests.properties.checking import planned_among
from tests.properties.strategies import any_worlds, policies

YEAR_US = 365 * 24 * 3600 * SECOND_US


def planned(world: W, policy: Policy) -> Plan:
    return plan(snapshot(world), policy)


def as_values(plan: Plan) -> tuple[object, ...]:
    """The plan as plain values that compare."""
    waits = list(zip(plan.waits.numbers.tolist(), plan.waits.reasons.tolist(), strict=True))
    return plan.actions, waits, plan.promise, plan.wake_us, plan.awaited


def waiting_for_handover(plan: Plan) -> set[int]:
    code = WAIT_REASONS.index(Reason.WAITING_FOR_HANDOVER)
    return {
        n for n, r in zip(plan.waits.numbers.tolist(), plan.waits.reasons.tolist(), strict=True) if r == code
    }


@given(any_worlds(), policies())
def test_a_plan_that_was_carried_out_is_followed_by_no_further_action(world: W, policy: Policy) -> None:
    first = planned(world, policy)
    second = planned(applied(world, first), policy)
    assert second.actions == ()
    assert second.waits.numbers.tolist() == first.waits.numbers.tolist()
    assert waiting_for_handover(second) == waiting_for_handover(first)
    assert second.awaited == first.awaited


@given(any_worlds(), policies(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(world: W, policy: Policy, random: st.randoms) -> None:
    def shuffled(rows: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(random.sample(rows, len(rows)))

    sets = tuple(dict.fromkeys([*world.model_sets, *(job.models for job in world.jobs)]))
    other = W(
        jobs=shuffled(world.jobs),
        gpus=shuffled(world.gpus),
        nodes=world.nodes,
        handovers=shuffled(world.handovers),
        model_sets=shuffled(sets),
    )
    one, two = planned(world, policy), planned(other, policy)
    assert as_values(one) == as_values(two)
    assert digest(one) == digest(two)


@example(W(jobs=(J(1, gpus=0),)), W(jobs=(J(1, gpus=0, models=("H100",)),)), Policy())  # no GPUs
@given(any_worlds(), any_worlds(), policies())
def test_a_memo_saves_work_and_changes_nothing(before: W, world: W, policy: Policy) -> None:
    memo = Memo()
    plan(snapshot(before), policy, memo)
    again = snapshot(world)
    with_memo = plan(again, policy, memo)
    twice = plan(again, policy, memo)
    assert as_values(with_memo) == as_values(twice) == as_values(plan(snapshot(world), policy))
    assert digest(with_memo) == digest(twice)


@given(any_worlds(), policies(), st.integers(0, 100))
def test_until_the_moment_named_time_alone_changes_nothing(world: W, policy: Policy, percent: int) -> None:
    settled = applied(world, planned(world, policy))
    calm = planned(settled, policy)
    assert calm.wake_us is None or calm.wake_us > settled.now_us
    until_us = settled.now_us + 10 * YEAR_US if calm.wake_us is None else calm.wake_us - 1
    moment_us = settled.now_us + (until_us - settled.now_us) * percent // 100
    assert planned(replace(settled, now_us=moment_us), policy).actions == ()


@given(any_worlds(), policies(backfill=True))
def test_whoever_passes_a_blocked_job_does_not_delay_its_promised_start(world: W, policy: Policy) -> None:
    first = planned(world, policy)
    assume(first.promise is not None)
    assert first.promise is not None
    second = planned(applied(world, first), policy)
    assert second.promise is not None
    assert second.promise.job == first.promise.job
    assert second.promise.start_us <= first.promise.start_us


@given(any_worlds(), policies(backfill=True))
def test_jobs_of_lower_rank_have_no_part_in_what_is_promised(world: W, policy: Policy) -> None:
    with_all = planned(world, policy)
    assume(with_all.promise is not None)
    assert with_all.promise is not None
    order = policy.order.value
    top = world.job(with_all.promise.job)

    def rank(job: object) -> tuple[int, ...]:
        klass, priority, value, number = job.job_class, job.priority, job.value, job.number
        return (klass, -priority, -value, number) if order == "class" else (-value, klass, -priority, number)

    above = tuple(job for job in world.jobs if job.is_live or rank(job) <= rank(top))
    # The sets of models that jobs name stay, too.
    sets = tuple(dict.fromkeys([*world.model_sets, *(job.models for job in world.jobs)]))
    without = replace(world, jobs=above, model_sets=sets)
    assert planned_among(without, world, policy).promise == with_all.promise
