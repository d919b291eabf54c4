"""Where jobs start, and why they wait where nobody may be displaced."""

from scheduler.model.actions import StartJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import DRAINING
from scheduler.planning.planner import Planner, plan
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    SECOND_US,
    G,
    J,
    N,
    Outcome,
    W,
    gpus,
    outcome,
    running,
    snapshot,
)

POLICY = Policy()
FREE = Reason.STARTED_ON_FREE_GPUS


def planned(world: W) -> Outcome:
    return outcome(plan(snapshot(world), POLICY))


def held(number: int, *on: str, **others: object) -> J:
    """A job that stays: inference that may not be preempted."""
    return running(number, *on, job_class=INFERENCE, preemptible=False, **others)


def test_an_empty_world_has_an_empty_plan() -> None:
    assert planned(W()) == Outcome()


def test_jobs_start_on_free_gpus_by_index_in_the_order_of_rank() -> None:
    world = W(jobs=(J(1, MINING), J(2, BATCH, gpus=2), J(3, INFERENCE)), gpus=gpus(4))
    assert planned(world) == Outcome(
        actions=(
            StartJob(3, ("GPU-0",), FREE),
            StartJob(2, ("GPU-1", "GPU-2"), FREE),
            StartJob(1, ("GPU-3",), FREE),
        )
    )


def test_equal_jobs_start_in_the_order_of_submission() -> None:
    world = W(jobs=(J(7), J(5), J(6)), gpus=gpus(2))
    assert planned(world) == Outcome(
        actions=(StartJob(5, ("GPU-0",), FREE), StartJob(6, ("GPU-1",), FREE)),
        waits={7: Reason.WAITING_FOR_GPUS},
    )


def test_a_gang_starts_whole_or_not_at_all() -> None:
    world = W(jobs=(held(1, "GPU-0"), J(2, gpus=4)), gpus=gpus(4))
    assert planned(world) == Outcome(waits={2: Reason.WAITING_FOR_GPUS})


def test_a_smaller_job_of_unknown_duration_passes_a_gang_that_nothing_can_be_promised() -> None:
    world = W(jobs=(held(1, "GPU-0"), J(2, gpus=4), J(3, BATCH)), gpus=gpus(4))
    assert planned(world) == Outcome(
        actions=(StartJob(3, ("GPU-1",), Reason.BACKFILLED),), waits={2: Reason.WAITING_FOR_GPUS}
    )


def test_a_share_goes_where_it_leaves_the_least_and_whole_gpus_stay_whole() -> None:
    world = W(
        jobs=(
            held(1, "GPU-1", share_milli=250),
            held(2, "GPU-2", share_milli=500),
            J(3, share_milli=500),
            J(4, gpus=1),
        ),
        gpus=gpus(3),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(3, ("GPU-2",), FREE), StartJob(4, ("GPU-0",), FREE)),
    )


def test_shares_book_their_gpu_memory_and_the_second_that_does_not_fit_waits_for_it() -> None:
    world = W(
        jobs=(
            held(1, "GPU-0", share_milli=300, gpu_memory_mib=50_000),
            J(2, share_milli=300, gpu_memory_mib=40_000),
            J(3, share_milli=300, gpu_memory_mib=30_000),
        ),
        gpus=gpus(1),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(3, ("GPU-0",), Reason.BACKFILLED),), waits={2: Reason.WAITING_FOR_GPU_MEMORY}
    )


def test_a_share_without_declared_memory_is_not_accounted() -> None:
    world = W(
        jobs=(held(1, "GPU-0", share_milli=300, gpu_memory_mib=80_000), J(2, share_milli=300)), gpus=gpus(1)
    )
    assert planned(world) == Outcome(actions=(StartJob(2, ("GPU-0",), FREE),))


def test_a_whole_gpu_must_have_the_memory_that_the_job_wants() -> None:
    small, large = G("GPU-0", 0, memory_mib=40_000), G("GPU-1", 1)
    wants = J(2, gpu_memory_mib=70_000)
    assert planned(W(jobs=(wants,), gpus=(small, large))).actions == (StartJob(2, ("GPU-1",), FREE),)
    assert planned(W(jobs=(held(1, "GPU-1"), wants), gpus=(small, large))) == Outcome(
        waits={2: Reason.WAITING_FOR_GPU_MEMORY}
    )
    assert planned(W(jobs=(wants,), gpus=(small,))) == Outcome(waits={2: Reason.NO_SUITABLE_GPU})


def test_a_job_starts_only_on_a_model_that_it_accepts() -> None:
    mixed = (G("GPU-0", 0, model="A100"), G("GPU-1", 1, model="H100"))
    world = W(jobs=(J(1, models=("H100",)), J(2, models=("H100",)), J(3, models=("B200",))), gpus=mixed)
    assert planned(world) == Outcome(
        actions=(StartJob(1, ("GPU-1",), FREE),),
        waits={2: Reason.WAITING_FOR_GPUS, 3: Reason.NO_SUITABLE_GPU},
    )


def test_a_job_that_waits_for_one_model_does_not_stand_for_those_that_want_another() -> None:
    mixed = (G("GPU-0", 0, model="A100"), G("GPU-1", 1, model="H100"))
    world = W(jobs=(held(1, "GPU-1"), J(2, models=("H100",)), J(3, models=("A100",))), gpus=mixed)
    assert planned(world) == Outcome(
        actions=(StartJob(3, ("GPU-0",), Reason.BACKFILLED),), waits={2: Reason.WAITING_FOR_GPUS}
    )


def test_a_job_that_takes_any_model_leaves_the_wanted_one_to_others() -> None:
    mixed = (G("GPU-0", 0, model="H100"), G("GPU-1", 1, model="A100"))
    world = W(jobs=(J(1), J(2, models=("H100",))), gpus=mixed)
    assert planned(world).actions == (StartJob(1, ("GPU-1",), FREE), StartJob(2, ("GPU-0",), FREE))


def test_a_job_that_wants_little_memory_leaves_the_large_gpu_to_others() -> None:
    sizes = (G("GPU-0", 0), G("GPU-1", 1, memory_mib=40_000))
    world = W(jobs=(J(1, gpu_memory_mib=10_000), J(2, gpu_memory_mib=70_000)), gpus=sizes)
    assert planned(world).actions == (StartJob(1, ("GPU-1",), FREE), StartJob(2, ("GPU-0",), FREE))


def test_nothing_starts_on_a_closed_gpu_and_what_runs_there_goes_on() -> None:
    closed = (G("GPU-0", 0, is_open=False), G("GPU-1", 1, is_open=False))
    world = W(jobs=(running(1, "GPU-0", job_class=MINING), J(2, INFERENCE)), gpus=closed)
    assert planned(world) == Outcome(waits={2: Reason.NO_SUITABLE_GPU})


def test_nothing_starts_on_a_draining_node() -> None:
    world = W(jobs=(running(1, "GPU-0"), J(2, INFERENCE)), gpus=gpus(2), nodes=(N(drain=DRAINING),))
    assert planned(world) == Outcome(waits={2: Reason.NODE_DRAINING})


def test_a_job_without_gpus_starts_as_long_as_cpus_memory_and_slots_are_there() -> None:
    cpu_only = {"gpus": 0}
    world = W(
        jobs=(
            J(1, INFERENCE, cpus=3, memory_mib=10, preemptible=False, **cpu_only),
            J(2, BATCH, cpus=2, **cpu_only),
            J(3, BATCH, memory_mib=95, **cpu_only),
            J(4, BATCH, cpus=1, memory_mib=90, **cpu_only),
            J(5, BATCH, **cpu_only),
        ),
        nodes=(N(cpus=4, memory_mib=100, live_jobs_max=2),),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(1, (), FREE), StartJob(4, (), Reason.BACKFILLED)),
        waits={2: Reason.WAITING_FOR_CPUS, 3: Reason.WAITING_FOR_MEMORY, 5: Reason.WAITING_FOR_START_SLOT},
    )


def test_what_a_job_does_not_account_for_never_keeps_it_waiting() -> None:
    # More is in use than the node has, say after its size was configured down.
    world = W(
        jobs=(
            held(1, cpus=8, memory_mib=80, gpus=0),
            J(2, INFERENCE, gpus=0, cpus=1, memory_mib=1),
            J(3, INFERENCE, gpus=0, cpus=1),
            J(4, INFERENCE, gpus=0, memory_mib=1),
            J(5),
        ),
        gpus=gpus(1),
        nodes=(N(cpus=4, memory_mib=40),),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(5, ("GPU-0",), Reason.BACKFILLED),),
        waits={2: Reason.WAITING_FOR_CPUS, 3: Reason.WAITING_FOR_CPUS, 4: Reason.WAITING_FOR_MEMORY},
    )


def test_a_job_that_backs_off_waits_for_its_moment_and_the_plan_names_it() -> None:
    world = W(jobs=(J(1, eligible_us=NOW_US + 5 * SECOND_US), J(2, eligible_us=NOW_US)), gpus=gpus(2))
    assert planned(world) == Outcome(
        actions=(StartJob(2, ("GPU-0",), FREE),),
        waits={1: Reason.BACKING_OFF},
        wake_us=NOW_US + 5 * SECOND_US,
    )


def test_a_gang_stays_on_one_node_and_goes_where_it_leaves_the_fewest_whole_gpus() -> None:
    two = tuple(G(f"GPU-{index}", index, node=int(index >= 4)) for index in range(6))
    world = W(jobs=(J(1, gpus=2), J(2, gpus=3), J(3, gpus=2)), gpus=two, nodes=(N(), N()))
    assert planned(world) == Outcome(
        actions=(
            StartJob(1, ("GPU-4", "GPU-5"), FREE, node=1),
            StartJob(2, ("GPU-0", "GPU-1", "GPU-2"), FREE),
        ),
        waits={3: Reason.WAITING_FOR_GPUS},
    )


def test_ten_thousand_equal_jobs_are_refused_by_one_try() -> None:
    many = tuple(J(number, BATCH, cpus=number % 3) for number in range(2, 10_002))
    world = W(jobs=(held(1, "GPU-0"), *many), gpus=gpus(1))
    planner = Planner(snapshot(world), POLICY)
    planner.queue.set_aside(planner.world)
    tries = 0
    for _, request in planner.queue.requests():
        tries += 1
        planner.refuse(request)
    assert tries == 1
    assert set(planned(world).waits.values()) == {Reason.WAITING_FOR_GPUS}
