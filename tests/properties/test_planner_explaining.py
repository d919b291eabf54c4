"""Explanations agree with plans, and a remedy that is offered works when it is taken."""

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import NOT_DRAINING
from scheduler.planning.explain import Remedy, RemedyKind, explain, preview
from scheduler.planning.planner import plan
from tests.fakes.worlds import NOW_US, PENDING, J, W, outcome, snapshot
from tests.properties.dividing import suits
from tests.properties.strategies import any_worlds, policies

CHANGED = {
    RemedyKind.FEWER_GPUS: "gpus",
    RemedyKind.LESS_GPU_MEMORY: "gpu_memory_mib",
    RemedyKind.FEWER_CPUS: "cpus",
    RemedyKind.LESS_MEMORY: "memory_mib",
    RemedyKind.HIGHER_PRIORITY: "priority",
    RemedyKind.HIGHER_VALUE: "value",
    RemedyKind.HIGHER_CLASS: "job_class",
    RemedyKind.SHORTER_DURATION: "expected_us",
}


def taken(world: W, job: J, remedy: Remedy) -> W:
    """The world in which somebody did what the remedy says."""
    sets = tuple(dict.fromkeys([*world.model_sets, *(other.models for other in world.jobs)]))
    world = replace(world, model_sets=sets)
    kind, amount = remedy.kind, remedy.amount
    if kind is RemedyKind.UNDRAIN_NODE:
        return replace(world, nodes=tuple(replace(node, drain=NOT_DRAINING) for node in world.nodes))
    if kind is RemedyKind.OPEN_GPUS:
        opened = [gpu for gpu in world.gpus if not gpu.is_open and suits(job, gpu)][:amount]
        gpus = tuple(replace(gpu, is_open=gpu.is_open or gpu in opened) for gpu in world.gpus)
        return replace(world, gpus=gpus)
    if kind is RemedyKind.CLEAR_BACKOFF:
        changed = replace(job, eligible_us=NOW_US)
    elif kind is RemedyKind.ANY_MODEL:
        changed = replace(job, models=())
    elif kind is RemedyKind.BE_PREEMPTIBLE:
        changed = replace(job, preemptible=True)
    else:
        changed = replace(job, **{CHANGED[kind]: amount})
    return replace(world, jobs=tuple(changed if other is job else other for other in world.jobs))


@given(any_worlds(), policies(), st.data())
def test_an_explanation_agrees_with_the_plan_and_its_remedies_work(
    world: W, policy: Policy, data: st.DataObject
) -> None:
    made = outcome(plan(snapshot(world), policy))
    pending = sorted(made.waits)
    assume(pending)
    number = data.draw(st.sampled_from(pending))
    job = world.job(number)
    found = explain(snapshot(world), policy, number)
    assert found.reason is made.waits[number]
    assert found.awaited == made.awaited.get(number, ())
    named = [uuid for obstacle in found.obstacles for uuid in obstacle.gpus]
    assert len(named) == len(set(named))
    for remedy in found.remedies:
        after = outcome(plan(snapshot(taken(world, job, remedy)), policy))
        reason = after.waits.get(number)
        assert reason in (None, Reason.WAITING_FOR_HANDOVER), remedy


@given(any_worlds(), policies(), st.data())
def test_a_preview_says_what_the_plan_does(world: W, policy: Policy, data: st.DataObject) -> None:
    pending = [job.number for job in world.jobs if job.state == PENDING]
    assume(pending)
    number = data.draw(st.sampled_from(pending))
    made = plan(snapshot(world), policy)
    found = preview(snapshot(world), policy, number)
    starts = [action.gpus for action in made.actions if action.job == number and hasattr(action, "gpus")]
    victims = [action.job for action in made.actions if getattr(action, "preemptor", None) == number]
    assert found.starts_now == bool(starts)
    assert [victim.number for victim in found.victims] == victims
    if starts:
        assert found.gpus == starts[0]
        assert found.reason is None
    else:
        fails = Reason.DEADLINE_UNREACHABLE
        assert found.reason is outcome(made).waits.get(number, fails)
