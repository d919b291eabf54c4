"""The price gate: work that costs more energy than it is worth neither starts nor, past a bar, goes on."""

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.model.actions import Plan, RequeueJob, StartJob
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import DRAINING_STOP
from scheduler.planning.explain import explain
from scheduler.planning.planner import Planner, plan
from scheduler.planning.remedies import RemedyKind
from tests.fakes.worlds import (
    BATCH,
    HOUR_US,
    MINING,
    NOW_US,
    PENDING,
    RUNNING,
    SECOND_US,
    SUSPENDED,
    TRAINING,
    UNKNOWN,
    J,
    W,
    applied,
    gpus,
    outcome,
    running,
    snapshot,
)
from tests.properties.checking import planned_among
from tests.properties.strategies import any_worlds, policies

POLICY = Policy()
COSTS = (0, 49_999, 50_000, 50_001, 100_000, 700_000, 3_000_000, -60_000)


def planned(world: W, policy: Policy = POLICY) -> Plan:
    return plan(snapshot(world), policy)


@st.composite
def priced(draw: st.DrawFn) -> W:
    """Any world, and what the energy of each job costs."""
    world = draw(any_worlds())
    jobs = tuple(replace(job, energy_cost=draw(st.sampled_from(COSTS))) for job in world.jobs)
    return replace(world, jobs=jobs, has_price=True)


def is_steered(job: J, policy: Policy) -> bool:
    return job.job_class in (BATCH, MINING) or (job.job_class == TRAINING and policy.order is Order.VALUE)


def must_stop(job: J, policy: Policy, now_us: int) -> bool:
    """The rule, said again: an hour more costs more than the restart loss, and the job may be stopped."""
    restart_ms = min(job.restart_loss_us // 1000, 864_000_000)
    loss = -(-max(0, min(job.value, 10_000_000_000)) * restart_ms // 3_600_000)
    past = job.started_us == UNKNOWN or job.started_us + job.min_runtime_us <= now_us
    dear = job.energy_cost - job.value > loss
    return is_steered(job, policy) and job.state in (RUNNING, SUSPENDED) and job.preemptible and past and dear


@given(priced(), policies())
def test_exactly_those_stop_whose_energy_costs_more_than_a_restart(world: W, policy: Policy) -> None:
    assume(not any(node.drain == DRAINING_STOP for node in world.nodes))
    for_price = {
        a.job for a in planned(world, policy).actions if getattr(a, "reason", "") == "STOPPED_FOR_PRICE"
    }
    due = {job.number for job in world.jobs if must_stop(job, policy, world.now_us)}
    over = {
        a.job
        for a in planned(replace(world, has_price=False), policy).actions
        if type(a).__name__ == "StopJob"
    }
    assert for_price == due - over


@given(priced(), policies())
def test_nobody_starts_whose_energy_costs_more_than_it_is_worth(world: W, policy: Policy) -> None:
    made = outcome(planned(world, policy))
    started = {a.job for a in made.actions if isinstance(a, StartJob)}
    for job in world.jobs:
        if job.state == PENDING and is_steered(job, policy) and job.value <= job.energy_cost:
            assert job.number not in started
            assert made.waits.get(job.number, Reason.WAITING_FOR_PRICE) in (
                Reason.WAITING_FOR_PRICE,
                Reason.BACKING_OFF,
            )
        elif job.state == PENDING:
            assert made.waits.get(job.number) is not Reason.WAITING_FOR_PRICE


@given(priced(), policies())
def test_who_waits_for_the_price_is_as_good_as_not_there(world: W, policy: Policy) -> None:
    made = outcome(planned(world, policy))
    dear = {number for number, reason in made.waits.items() if reason is Reason.WAITING_FOR_PRICE}
    sets = tuple(dict.fromkeys([*world.model_sets, *(job.models for job in world.jobs)]))
    others = tuple(job for job in world.jobs if job.number not in dear)
    without = outcome(planned_among(replace(world, jobs=others, model_sets=sets), world, policy))
    assert without.actions == made.actions
    assert without.waits == {n: reason for n, reason in made.waits.items() if n not in dear}


@given(priced(), policies())
def test_a_plan_for_a_price_is_followed_by_no_further_action(world: W, policy: Policy) -> None:
    settled = applied(world, planned(world, policy))
    assert planned(settled, policy).actions == ()


@given(priced(), policies(), st.integers(0, 100))
def test_until_the_moment_named_time_alone_changes_nothing(world: W, policy: Policy, percent: int) -> None:
    settled = applied(world, planned(world, policy))
    calm = planned(settled, policy)
    until_us = settled.now_us + 1000 * HOUR_US if calm.wake_us is None else calm.wake_us - 1
    moment_us = settled.now_us + (until_us - settled.now_us) * percent // 100
    assert planned(replace(settled, now_us=moment_us), policy).actions == ()


@given(priced(), policies())
def test_free_energy_of_what_is_worth_something_changes_nothing(world: W, policy: Policy) -> None:
    jobs = tuple(replace(job, energy_cost=0, value=max(1, job.value)) for job in world.jobs)
    free = replace(world, jobs=jobs)
    assert outcome(planned(free, policy)) == outcome(planned(replace(free, has_price=False), policy))


@given(priced(), policies())
def test_what_explain_says_admits_who_waits_for_the_price(world: W, policy: Policy) -> None:
    waiting = [n for n, r in outcome(planned(world, policy)).waits.items() if r is Reason.WAITING_FOR_PRICE]
    assume(waiting)
    for number in waiting:
        for remedy in explain(snapshot(world), policy, number).remedies:
            job = world.job(number)
            match remedy.kind:
                case RemedyKind.CHEAPER_ENERGY:
                    changed = replace(job, energy_cost=remedy.amount)
                case RemedyKind.HIGHER_VALUE:
                    changed = replace(job, value=remedy.amount)
                case _:
                    raise AssertionError(remedy)
            jobs = tuple(changed if one.number == number else one for one in world.jobs)
            planner = Planner(snapshot(replace(world, jobs=jobs)), policy)
            planner.run()
            assert number in planner.claims, remedy


def test_a_miner_stops_past_its_bar_and_returns_below_its_worth() -> None:
    """Worth 0.06, five minutes to restart: it stops above 0.065 and starts below 0.06."""

    def mining(energy_cost: int, is_running: bool) -> list[object]:
        said = {
            "job_class": MINING,
            "value": 60_000,
            "restart_loss_us": 300_000_000,
            "energy_cost": energy_cost,
        }
        job = running(1, "GPU-0", **said) if is_running else J(1, **said)
        return list(planned(W(jobs=(job,), gpus=gpus(1), has_price=True)).actions)

    assert mining(65_000, is_running=True) == []
    assert mining(65_001, is_running=True) == [RequeueJob(1, Reason.STOPPED_FOR_PRICE)]
    assert mining(60_000, is_running=False) == []
    assert mining(59_999, is_running=False) == [StartJob(1, ("GPU-0",), Reason.STARTED_ON_FREE_GPUS)]


def test_who_may_not_be_preempted_goes_on_and_who_has_its_minimum_runtime_goes_on_till_its_end() -> None:
    said = {"job_class": BATCH, "value": 500_000, "energy_cost": 900_000, "ran_s": 100.0}
    fixed = running(1, "GPU-0", preemptible=False, **said)
    early = running(2, "GPU-1", min_runtime_us=100 * SECOND_US + 1, **said)
    due = running(3, "GPU-2", min_runtime_us=100 * SECOND_US, **said)
    made = planned(W(jobs=(fixed, early, due), gpus=gpus(3), has_price=True))
    assert made.actions == (RequeueJob(3, Reason.STOPPED_FOR_PRICE),)
    assert made.wake_us == NOW_US + 1
