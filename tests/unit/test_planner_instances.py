"""MIG instances: for jobs of one GPU; CUDA shows one to a program, so a job of several gets whole GPUs."""

from scheduler.model.actions import PreemptJob, StartJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.planning.explain import Obstacle, Remedy, RemedyKind, Rule, explain
from scheduler.planning.planner import plan
from tests.fakes.worlds import INFERENCE, MINING, G, J, N, Outcome, W, outcome, running, snapshot

POLICY = Policy()
FREE = Reason.STARTED_ON_FREE_GPUS


def planned(world: W) -> Outcome:
    return outcome(plan(snapshot(world), POLICY))


def instances(*numbers: int, **others: object) -> tuple[G, ...]:
    return tuple(G(f"MIG-{n}", n, memory_mib=40_000, instance=True, **others) for n in numbers)


def wholes(*numbers: int, **others: object) -> tuple[G, ...]:
    return tuple(G(f"GPU-{n}", n, **others) for n in numbers)


def test_a_job_of_several_gpus_gets_whole_ones_and_a_job_of_one_an_instance() -> None:
    world = W(jobs=(J(1), J(2, gpus=2), J(3)), gpus=(*instances(0, 1), *wholes(2, 3, 4)))
    assert planned(world) == Outcome(
        actions=(
            StartJob(1, ("MIG-0",), FREE),
            StartJob(2, ("GPU-2", "GPU-3"), FREE),
            StartJob(3, ("MIG-1",), FREE),
        )
    )


def test_a_share_fits_on_an_instance() -> None:
    world = W(jobs=(J(1, share_milli=500),), gpus=instances(0))
    assert planned(world) == Outcome(actions=(StartJob(1, ("MIG-0",), FREE),))


def test_a_job_of_several_gpus_waits_for_whole_ones_though_instances_are_free() -> None:
    busy = running(2, "GPU-2", job_class=INFERENCE, preemptible=False)
    world = W(jobs=(J(1, gpus=2), busy), gpus=(*instances(0, 1), *wholes(2, 3)))
    assert planned(world) == Outcome(waits={1: Reason.WAITING_FOR_GPUS})


def test_a_job_of_several_gpus_that_only_instances_could_serve_is_told_so_and_what_would_do() -> None:
    world = W(jobs=(J(1, gpus=2),), gpus=(*instances(0, 1, 2), *wholes(3)))
    assert planned(world) == Outcome(waits={1: Reason.NO_SUITABLE_GPU})
    told = explain(snapshot(world), POLICY, 1)
    assert told.obstacles == (Obstacle(Rule.INSTANCE, ("MIG-0", "MIG-1", "MIG-2")),)
    assert told.remedies == (Remedy(RemedyKind.FEWER_GPUS, 1),)


def test_opening_an_instance_is_no_remedy_for_a_job_of_several_gpus() -> None:
    closed = (*instances(0, is_open=False), *wholes(1, is_open=False))
    told = explain(snapshot(W(jobs=(J(1, gpus=2),), gpus=(*closed, *wholes(2)))), POLICY, 1)
    assert Remedy(RemedyKind.OPEN_GPUS, 1) in told.remedies
    without = explain(
        snapshot(W(jobs=(J(1, gpus=2),), gpus=(*instances(0, is_open=False), *wholes(2)))), POLICY, 1
    )
    assert not any(remedy.kind is RemedyKind.OPEN_GPUS for remedy in without.remedies)


def test_nobody_is_displaced_from_an_instance_for_a_job_of_several_gpus() -> None:
    miners = tuple(running(n + 10, f"MIG-{n}", job_class=MINING) for n in (0, 1))
    world = W(jobs=(J(1, INFERENCE, gpus=2), *miners), gpus=instances(0, 1))
    assert planned(world) == Outcome(waits={1: Reason.NO_SUITABLE_GPU})
    alone = planned(W(jobs=(J(1, INFERENCE), *miners), gpus=instances(0, 1)))
    assert [type(action) for action in alone.actions] == [PreemptJob]


def test_a_job_of_several_gpus_goes_to_the_node_that_has_whole_ones() -> None:
    world = W(
        jobs=(J(1, gpus=2),),
        gpus=(*instances(0, 1, 2, 3), *wholes(4, 5, node=1)),
        nodes=(N(), N()),
    )
    assert planned(world) == Outcome(actions=(StartJob(1, ("GPU-4", "GPU-5"), FREE, node=1),))
