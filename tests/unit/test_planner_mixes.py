"""Gangs, whole jobs and shares among each other: who gives way to whom, and how a share is handed over."""

from dataclasses import replace

from scheduler.model.actions import PreemptJob, StartJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.planning.planner import plan
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    PREEMPTING,
    SECOND_US,
    TRAINING,
    G,
    HandOver,
    J,
    N,
    Outcome,
    W,
    gpus,
    outcome,
    running,
    snapshot,
)

DISPLACED = Reason.PREEMPTED_BY_HIGHER_RANK
HANDOVER = Reason.WAITING_FOR_HANDOVER


def planned(world: W) -> Outcome:
    return outcome(plan(snapshot(world), Policy()))


def miner(number: int, *on: str, share_milli: int = 1000, **others: object) -> J:
    """A miner that has just saved its work: it loses nothing."""
    said = {"job_class": MINING, "value": 3_600_000, "checkpoint_us": NOW_US, "share_milli": share_milli}
    return running(number, *on, **{**said, **others})


def kept(number: int, *on: str, **others: object) -> J:
    return running(number, *on, job_class=INFERENCE, preemptible=False, **others)


def test_a_gang_displaces_whole_jobs_and_shares_together_and_nobody_else() -> None:
    shares = (miner(2, "GPU-1", share_milli=400), miner(3, "GPU-1", share_milli=600))
    world = W(
        jobs=(miner(1, "GPU-0"), *shares, kept(4, "GPU-2"), saved(miner(5, "GPU-3"), 9), J(6, gpus=2)),
        gpus=gpus(4),
    )
    assert planned(world) == Outcome(
        actions=tuple(PreemptJob(number, 6, DISPLACED, 0, 0) for number in (1, 2, 3)),
        waits={6: HANDOVER},
        awaited={6: (1, 2, 3)},
    )


def test_a_gang_leaves_the_gpu_whose_sharers_together_lose_more_than_a_whole_job() -> None:
    shares = (miner(2, "GPU-1", share_milli=500), saved(miner(3, "GPU-1", share_milli=500), 20))
    world = W(jobs=(miner(1, "GPU-0"), *shares, saved(miner(4, "GPU-2"), 9), J(5, gpus=2)), gpus=gpus(3))
    # Half a GPU loses 10 GPU-seconds in 20 s, the whole one 9.
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 5, DISPLACED, 0, 0), PreemptJob(4, 5, DISPLACED, 9000, 9000)),
        waits={5: HANDOVER},
        awaited={5: (1, 4)},
    )


def test_a_gang_that_needs_one_more_gpu_takes_it_from_a_gang_and_the_rest_serves_a_share() -> None:
    gang = miner(1, "GPU-0", "GPU-1", "GPU-2")
    world = W(jobs=(gang, kept(2, "GPU-3"), J(3, gpus=2), J(4, BATCH, share_milli=250)), gpus=gpus(4))
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 3, DISPLACED, 0, 0),),
        waits={3: HANDOVER, 4: HANDOVER},
        awaited={3: (1,), 4: (1,)},
    )


def test_a_share_spares_the_gang_where_a_single_job_loses_no_more() -> None:
    gang, single = miner(1, "GPU-0", "GPU-1"), miner(2, "GPU-2")
    world = W(jobs=(gang, single, J(3, BATCH, share_milli=250)), gpus=gpus(3))
    assert planned(world) == Outcome(
        actions=(PreemptJob(2, 3, DISPLACED, 0, 0),), waits={3: HANDOVER}, awaited={3: (2,)}
    )


def test_a_share_spares_the_gang_where_another_share_loses_less() -> None:
    gang, share = saved(miner(1, "GPU-0", "GPU-1"), 5), saved(miner(2, "GPU-2", share_milli=500), 10)
    world = W(
        jobs=(gang, share, kept(3, "GPU-2", share_milli=500), J(4, BATCH, share_milli=250)), gpus=gpus(3)
    )
    # Two GPUs lose 10 GPU-seconds in 5 s, half a GPU 5 in 10.
    assert planned(world) == Outcome(
        actions=(PreemptJob(2, 4, DISPLACED, 5000, 5000),), waits={4: HANDOVER}, awaited={4: (2,)}
    )


def test_a_share_displaces_a_gang_only_where_everybody_else_loses_more() -> None:
    gang, single = saved(miner(1, "GPU-0", "GPU-1"), 1), saved(miner(2, "GPU-2"), 60)
    world = W(jobs=(gang, single, J(3, BATCH, share_milli=250)), gpus=gpus(3))
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 3, DISPLACED, 2000, 2000),), waits={3: HANDOVER}, awaited={3: (1,)}
    )


def test_a_gang_of_another_node_is_spared_too() -> None:
    gang, share = miner(1, "GPU-0", "GPU-1"), replace(miner(2, "GPU-8", share_milli=750), node=1)
    world = W(
        jobs=(gang, share, J(3, BATCH, share_milli=500)),
        gpus=(*gpus(2), G("GPU-8", 2, node=1)),
        nodes=(N(), N()),
    )
    assert planned(world) == Outcome(
        actions=(PreemptJob(2, 3, DISPLACED, 0, 0),), waits={3: HANDOVER}, awaited={3: (2,)}
    )


def test_a_share_is_handed_over_while_its_neighbour_runs_on() -> None:
    """Decided, ended, verified: three plans, and only the last one starts the successor."""
    neighbour = kept(1, "GPU-0", share_milli=400, gpu_memory_mib=30_000)
    victim = miner(2, "GPU-0", share_milli=600, gpu_memory_mib=40_000)
    wanted = J(3, BATCH, share_milli=500, gpu_memory_mib=45_000)
    world = W(jobs=(neighbour, victim, wanted), gpus=gpus(1))
    assert planned(world) == Outcome(
        actions=(PreemptJob(2, 3, DISPLACED, 0, 0),), waits={3: HANDOVER}, awaited={3: (2,)}
    )
    leaves = replace(victim, state=PREEMPTING, preemptor=3, stop_us=NOW_US)
    stopping = replace(world, jobs=(neighbour, leaves, wanted), now_us=NOW_US + SECOND_US)
    assert planned(stopping) == Outcome(waits={3: HANDOVER}, awaited={3: (2,)})
    # Its processes are gone, its memory not yet; the victim itself waits again and gets nothing of it.
    requeued = J(2, MINING, share_milli=600, gpu_memory_mib=40_000)
    ended = replace(
        stopping,
        jobs=(neighbour, wanted, requeued),
        handovers=(HandOver("GPU-0", 600, 40_000, preemptor=3, stop_us=NOW_US),),
    )
    assert planned(ended) == Outcome(waits={2: Reason.WAITING_FOR_GPUS, 3: HANDOVER}, awaited={3: ()})
    verified = replace(ended, handovers=())
    assert planned(verified) == Outcome(
        actions=(StartJob(3, ("GPU-0",), Reason.STARTED_ON_FREE_GPUS),),
        waits={2: Reason.WAITING_FOR_GPUS},
    )


def test_a_thousandth_too_much_is_too_much() -> None:
    half = kept(1, "GPU-0", share_milli=500)
    assert planned(W(jobs=(half, J(2, share_milli=500)), gpus=gpus(1))).waits == {}
    assert planned(W(jobs=(half, J(2, share_milli=501)), gpus=gpus(1))) == Outcome(
        waits={2: Reason.WAITING_FOR_GPUS}
    )


def test_a_share_waits_for_the_handover_of_which_it_lacks_only_memory() -> None:
    over = HandOver("GPU-0", 250, 60_000)
    small = J(1, TRAINING, share_milli=250, gpu_memory_mib=20_000)
    large = J(2, TRAINING, share_milli=250, gpu_memory_mib=20_001)
    world = W(gpus=gpus(1), handovers=(over,))
    assert planned(world.with_jobs(small)).actions == (StartJob(1, ("GPU-0",), Reason.STARTED_ON_FREE_GPUS),)
    assert planned(world.with_jobs(large)) == Outcome(waits={2: HANDOVER}, awaited={2: ()})


def saved(job: J, ago_s: int) -> J:
    """The job, which last saved its work so long ago."""
    return replace(job, checkpoint_us=NOW_US - ago_s * SECOND_US)
