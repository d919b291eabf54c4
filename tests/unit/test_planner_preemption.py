"""Who gives way to whom, which victims are chosen, and who gets what they leave."""

from dataclasses import replace

import pytest

from scheduler.model.actions import PreemptJob, StartJob
from scheduler.model.jobs import JobClass
from scheduler.model.policy import Order, Policy, aged_priority
from scheduler.model.reasons import Reason
from scheduler.planning import preemption
from scheduler.planning.explain import preview
from scheduler.planning.planner import plan
from tests.fakes.worlds import (
    BATCH,
    HOUR_US,
    INFERENCE,
    MINING,
    NOW_US,
    PREEMPTING,
    SECOND_US,
    STARTING,
    STOPPING,
    SUSPENDED,
    TRAINING,
    G,
    HandOver,
    J,
    N,
    Outcome,
    W,
    applied,
    gpus,
    outcome,
    running,
    snapshot,
)

POLICY = Policy()
DISPLACED = Reason.PREEMPTED_BY_HIGHER_RANK
HANDOVER = Reason.WAITING_FOR_HANDOVER
MINER_VALUE = 50_000


def planned(world: W, policy: Policy = POLICY) -> Outcome:
    return outcome(plan(snapshot(world), policy))


def miner(number: int, *on: str, **others: object) -> J:
    return running(
        number, *on, **{"job_class": MINING, "value": MINER_VALUE, "checkpoint_us": NOW_US, **others}
    )


def victims(plan: Outcome) -> list[int]:
    return [action.job for action in plan.actions if isinstance(action, PreemptJob)]


def test_a_job_of_a_later_class_gives_way_and_the_preemptor_waits_for_the_handover() -> None:
    world = W(jobs=(miner(1, "GPU-0"), J(2, BATCH)), gpus=gpus(1))
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 2, DISPLACED, lost_gpu_ms=0, loss_microusd=0),),
        waits={2: HANDOVER},
        awaited={2: (1,)},
    )


def test_just_the_gpus_needed_are_freed_and_free_ones_are_used_first() -> None:
    world = W(jobs=(miner(1, "GPU-0"), miner(2, "GPU-1"), miner(3, "GPU-3"), J(4, gpus=2)), gpus=gpus(4))
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 4, DISPLACED, 0, 0),), waits={4: HANDOVER}, awaited={4: (1,)}
    )


@pytest.mark.parametrize(
    ("incumbent", "challenger", "gives_way"),
    [
        ({"job_class": TRAINING}, {"job_class": INFERENCE}, True),
        ({"job_class": INFERENCE}, {"job_class": TRAINING, "priority": 1000, "value": 9_000_000}, False),
        ({"priority": 400}, {"priority": 401}, True),
        ({"priority": 401}, {"priority": 400, "value": 9_000_000}, False),
        ({"value": 1_000_000}, {"value": 1_300_000}, True),
        ({"value": 1_000_000}, {"value": 1_299_999}, False),
        ({"value": 0}, {"value": 0}, False),
        ({"value": 0}, {"value": 1}, True),
        ({"value": -1_000_000}, {"value": -700_000}, True),
        ({"value": -1_000_000}, {"value": -700_001}, False),
        # Half an hour of restart loss is worth half its value: more than 0.3.
        ({"value": 1_000_000, "restart_loss_us": HOUR_US // 2}, {"value": 1_500_000}, True),
        ({"value": 1_000_000, "restart_loss_us": HOUR_US // 2}, {"value": 1_499_999}, False),
        ({"preemptible": False, "job_class": MINING}, {"job_class": INFERENCE}, False),
    ],
)
def test_who_gives_way_under_order_class(incumbent: dict, challenger: dict, gives_way: bool) -> None:
    world = W(jobs=(running(1, "GPU-0", **incumbent), J(2, **challenger)), gpus=gpus(1))
    assert victims(planned(world)) == ([1] if gives_way else [])


@pytest.mark.parametrize(
    ("incumbent", "challenger", "gives_way"),
    [
        ({"job_class": INFERENCE, "value": 1_000_000}, {"job_class": MINING, "value": 1_300_000}, True),
        ({"job_class": MINING, "value": 1_000_000}, {"job_class": INFERENCE, "value": 1_299_999}, False),
        ({"priority": 0, "value": 1_000_000}, {"priority": 1000, "value": 1_000_000}, False),
    ],
)
def test_under_order_value_only_the_value_counts(incumbent: dict, challenger: dict, gives_way: bool) -> None:
    world = W(jobs=(running(1, "GPU-0", **incumbent), J(2, **challenger)), gpus=gpus(1))
    assert victims(planned(world, Policy(order=Order.VALUE))) == ([1] if gives_way else [])


@pytest.mark.parametrize("order", list(Order))
def test_who_would_miss_its_deadline_loses_all_it_works_for(order: Order) -> None:
    """Job 1 has nothing unsaved; by its deadline, which leaves it a minute, it earns an hour's value."""
    due = {"started_us": NOW_US - HOUR_US // 2, "expected_us": HOUR_US, "checkpoint_us": NOW_US}
    soon = miner(1, "GPU-0", deadline_us=NOW_US + HOUR_US // 2 + 60 * SECOND_US, **due)
    other = miner(2, "GPU-1", restart_loss_us=HOUR_US // 10)
    challenger = J(3, INFERENCE, value=4_000_000)
    world = W(jobs=(soon, other, challenger), gpus=gpus(2))
    policy = Policy(order=order)
    assert victims(planned(world, policy)) == [2]
    unhurried = replace(soon, deadline_us=NOW_US + 1000 * HOUR_US)
    (preempt,) = planned(replace(world, jobs=(unhurried, other, challenger)), policy).actions
    assert isinstance(preempt, PreemptJob)
    assert preempt.job == 1
    earned_us = HOUR_US if order is Order.CLASS else HOUR_US // 2
    assert preempt.loss_microusd == MINER_VALUE * earned_us // HOUR_US * 60 // (60 + 999 * 60 + 30)
    late = replace(soon, deadline_us=NOW_US + 60 * SECOND_US)
    assert victims(planned(replace(world, jobs=(late, other, challenger)), policy)) == [1]


def test_the_hysteresis_of_the_policy_counts() -> None:
    world = W(jobs=(running(1, "GPU-0", value=1_000_000), J(2, value=1_000_001)), gpus=gpus(1))
    assert victims(planned(world, Policy(hysteresis_ratio=0.0))) == [1]


@pytest.mark.parametrize(
    ("live", "gives_way"),
    [
        (miner(1, "GPU-0", ran_s=59, min_runtime_us=60 * SECOND_US), False),
        (miner(1, "GPU-0", ran_s=60, min_runtime_us=60 * SECOND_US), True),
        (J(1, MINING, STARTING, ("GPU-0",), node=0), True),
        (J(1, MINING, STARTING, ("GPU-0",), node=0, min_runtime_us=1), False),
        (miner(1, "GPU-0", state=SUSPENDED), True),
    ],
)
def test_a_job_inside_its_minimum_runtime_is_left_alone(live: J, gives_way: bool) -> None:
    world = W(jobs=(live, J(2, INFERENCE)), gpus=gpus(1))
    assert victims(planned(world)) == ([1] if gives_way else [])


def test_the_plan_wakes_when_a_minimum_runtime_is_over() -> None:
    world = W(jobs=(miner(1, "GPU-0", ran_s=10, min_runtime_us=60 * SECOND_US), J(2, gpus=1)), gpus=gpus(1))
    plan = planned(world)
    assert plan.wake_us == NOW_US + 50 * SECOND_US
    assert plan.promise is not None
    assert plan.promise.start_us == NOW_US + 50 * SECOND_US


def test_the_victims_are_those_who_lose_least_not_the_fewest() -> None:
    # A gang that saved an hour ago against two single jobs that saved a minute ago.
    gang = miner(1, "GPU-0", "GPU-1", checkpoint_us=NOW_US - HOUR_US)
    singles = [miner(n, f"GPU-{n}", checkpoint_us=NOW_US - 60 * SECOND_US) for n in (2, 3)]
    world = W(jobs=(gang, *singles, J(4, gpus=2)), gpus=gpus(4))
    assert planned(world) == Outcome(
        actions=(PreemptJob(2, 4, DISPLACED, 60_000, 833), PreemptJob(3, 4, DISPLACED, 60_000, 833)),
        waits={4: HANDOVER},
        awaited={4: (2, 3)},
    )


def test_a_job_that_reports_no_checkpoint_is_not_protected_by_its_silence() -> None:
    # Silent for ten hours: reckoned with half the assumed interval, 15 minutes. The other saved an hour ago.
    silent = miner(1, "GPU-0", ran_s=36_000, checkpoint_us=-1)
    saved = miner(2, "GPU-1", ran_s=36_000, checkpoint_us=NOW_US - HOUR_US)
    world = W(jobs=(silent, saved, J(3)), gpus=gpus(2))
    assert planned(world).actions == (PreemptJob(1, 3, DISPLACED, 900_000, 12_500),)


def test_a_silent_job_that_has_just_begun_loses_only_what_it_ran() -> None:
    world = W(jobs=(miner(1, "GPU-0", ran_s=60, checkpoint_us=-1), J(3)), gpus=gpus(1))
    assert planned(world).actions == (PreemptJob(1, 3, DISPLACED, 60_000, 833),)


def test_the_restart_loss_is_part_of_the_loss() -> None:
    dear = miner(1, "GPU-0", restart_loss_us=600 * SECOND_US)
    cheap = miner(2, "GPU-1", checkpoint_us=NOW_US - 500 * SECOND_US)
    world = W(jobs=(dear, cheap, J(3)), gpus=gpus(2))
    assert victims(planned(world)) == [2]


def test_the_loss_is_priced_at_the_value_of_the_victim() -> None:
    dear = miner(1, "GPU-0", value=2_000_000, checkpoint_us=NOW_US - 100 * SECOND_US)
    cheap = miner(2, "GPU-1", value=500_000, checkpoint_us=NOW_US - 300 * SECOND_US)
    world = W(jobs=(dear, cheap, J(3)), gpus=gpus(2))
    assert planned(world).actions == (PreemptJob(2, 3, DISPLACED, 300_000, 41_666),)


def test_of_equal_losses_fewest_gpus_then_the_youngest_then_the_smallest_number() -> None:
    gang = miner(1, "GPU-0", "GPU-1")
    old, young, twin = miner(2, "GPU-2"), miner(4, "GPU-3", ran_s=9), miner(3, "GPU-4", ran_s=9)
    world = W(jobs=(gang, old, young, twin, J(9)), gpus=gpus(5))
    assert victims(planned(world)) == [3]
    assert victims(planned(W(jobs=(gang, old, young, J(9)), gpus=gpus(4)))) == [4]
    assert victims(planned(W(jobs=(gang, old, J(9)), gpus=gpus(3)))) == [2]


def test_a_gang_goes_whole_and_what_is_left_of_it_serves_the_next() -> None:
    world = W(jobs=(miner(1, "GPU-0", "GPU-1", "GPU-2"), J(2, INFERENCE), J(3, gpus=2)), gpus=gpus(3))
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 2, DISPLACED, 0, 0),),
        waits={2: HANDOVER, 3: HANDOVER},
        awaited={2: (1,), 3: (1,)},
    )


def test_the_node_where_the_victims_lose_least_is_chosen() -> None:
    two = (G("GPU-0", 0), G("GPU-1", 1, node=1))
    dear = miner(1, "GPU-0", checkpoint_us=NOW_US - 90 * SECOND_US)
    cheap = miner(2, "GPU-1", checkpoint_us=NOW_US - 60 * SECOND_US, node=1)
    assert victims(planned(W(jobs=(dear, cheap, J(3)), gpus=two, nodes=(N(), N())))) == [2]


def test_no_victim_is_taken_where_all_of_them_would_not_be_enough() -> None:
    stays = running(1, "GPU-0", job_class=INFERENCE, preemptible=False)
    world = W(jobs=(stays, miner(2, "GPU-1"), J(3, gpus=2)), gpus=gpus(2))
    assert planned(world) == Outcome(waits={3: Reason.WAITING_FOR_GPUS})


def test_what_a_victim_leaves_is_kept_for_its_preemptor() -> None:
    """A freed place is not taken by a third job while the preemptor still waits [kueue#13797]."""
    leaving = miner(1, "GPU-0", state=PREEMPTING, preemptor=2, stop_us=NOW_US - SECOND_US)
    world = W(jobs=(leaving, J(2, INFERENCE, gpus=2), J(3, INFERENCE)), gpus=gpus(2))
    assert planned(world) == Outcome(waits={2: HANDOVER, 3: Reason.WAITING_FOR_GPUS}, awaited={2: (1,)})


def test_the_preemptor_also_waits_for_the_verified_handover_of_a_job_that_has_ended() -> None:
    world = W(jobs=(J(2, INFERENCE), J(3, BATCH)), gpus=gpus(1), handovers=(HandOver("GPU-0", preemptor=2),))
    assert planned(world) == Outcome(waits={2: HANDOVER, 3: Reason.WAITING_FOR_GPUS}, awaited={2: ()})


def test_the_freed_gpu_goes_to_the_preemptor_once_the_handover_is_verified() -> None:
    world = W(jobs=(J(2, INFERENCE), J(3, BATCH)), gpus=gpus(1))
    assert planned(world) == Outcome(
        actions=(StartJob(2, ("GPU-0",), Reason.STARTED_ON_FREE_GPUS),), waits={3: Reason.WAITING_FOR_GPUS}
    )


def test_a_job_that_ends_by_itself_spares_the_victim() -> None:
    ending = miner(1, "GPU-0", state=STOPPING, stop_us=NOW_US)
    world = W(jobs=(ending, miner(2, "GPU-1"), J(3)), gpus=gpus(2))
    assert planned(world) == Outcome(waits={3: HANDOVER}, awaited={3: (1,)})


def test_each_preemptor_keeps_its_own_victims_gpu() -> None:
    """Else the first would take the second's, which would displace again: one victim too many."""
    mixed = (G("GPU-0", 0, model="H100"), G("GPU-1", 1, model="A100"))
    first, second = J(3, INFERENCE), J(4, TRAINING, models=("H100",))
    later = miner(1, "GPU-0", state=PREEMPTING, preemptor=4, stop_us=NOW_US - SECOND_US)
    earlier = miner(2, "GPU-1", state=PREEMPTING, preemptor=3, stop_us=NOW_US - SECOND_US)
    world = W(jobs=(later, earlier, first, second), gpus=mixed)
    assert planned(world) == Outcome(waits={3: HANDOVER, 4: HANDOVER}, awaited={3: (2,), 4: (1,)})


def test_a_job_waits_for_the_oldest_stop_and_leaves_later_ones_to_whom_they_were_made_for() -> None:
    mixed = (G("GPU-0", 0, model="H100"), G("GPU-1", 1, model="A100"))
    older = miner(2, "GPU-1", state=STOPPING, stop_us=NOW_US - 9 * SECOND_US)
    newer = miner(1, "GPU-0", state=PREEMPTING, preemptor=4, stop_us=NOW_US - SECOND_US)
    world = W(jobs=(older, newer, J(3, INFERENCE), J(4, models=("H100",))), gpus=mixed)
    assert planned(world) == Outcome(waits={3: HANDOVER, 4: HANDOVER}, awaited={3: (2,), 4: (1,)})


def test_of_stops_decided_at_once_those_for_higher_ranks_count_first() -> None:
    """Job 4 claims what job 3's victims leave over, before job 5 has victims; and so in the next plan."""
    mixed = (G("GPU-0", 0, model="A100"), G("GPU-1", 1, model="A100"), G("GPU-2", 2, model="H100"))
    gang, single = miner(2, "GPU-0", "GPU-1"), miner(1, "GPU-2", checkpoint_us=NOW_US - HOUR_US)
    first, second = J(3, INFERENCE, priority=900, models=("A100",)), J(4, INFERENCE)
    world = W(jobs=(gang, single, first, second, J(5, models=("H100",))), gpus=mixed)
    made = plan(snapshot(world), POLICY)
    claims = {3: (2,), 4: (2,), 5: (1,)}
    assert outcome(made).awaited == claims
    assert planned(applied(world, made)) == Outcome(waits=dict.fromkeys(claims, HANDOVER), awaited=claims)


def test_a_job_keeps_the_gpu_of_the_older_stop_though_it_needs_the_cpus_of_the_newer() -> None:
    older = miner(2, "GPU-1", state=STOPPING, stop_us=NOW_US - 9 * SECOND_US)
    newer = miner(1, "GPU-0", state=PREEMPTING, preemptor=4, stop_us=NOW_US - SECOND_US, cpus=4)
    world = W(jobs=(older, newer, J(3, INFERENCE, cpus=4), J(4)), gpus=gpus(2), nodes=(N(cpus=4),))
    assert planned(world) == Outcome(waits={3: HANDOVER, 4: HANDOVER}, awaited={3: (1, 2), 4: (1,)})
    assert preview(snapshot(world), POLICY, 3).gpus == ("GPU-1",)


def test_a_gang_goes_where_the_singles_together_would_lose_more() -> None:
    gang = miner(1, "GPU-0", "GPU-1", checkpoint_us=NOW_US - 50 * SECOND_US)
    singles = [miner(n, f"GPU-{n}", checkpoint_us=NOW_US - 60 * SECOND_US) for n in (2, 3)]
    world = W(jobs=(gang, *singles, J(4, gpus=2)), gpus=gpus(4))
    assert victims(planned(world)) == [1]


def test_one_share_gives_way_for_its_cpus_and_its_neighbour_stays() -> None:
    shares = [
        miner(n, "GPU-1", share_milli=500, cpus=4, checkpoint_us=NOW_US - n * SECOND_US) for n in (1, 2)
    ]
    world = W(jobs=(*shares, J(3, cpus=4)), gpus=gpus(2), nodes=(N(cpus=8),))
    assert victims(planned(world)) == [1]


def test_a_greedy_choice_takes_back_the_dearest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "COVER_STEPS_MAX", 0)
    lost = {1: 30, 2: 10, 3: 20}
    jobs = [miner(n, f"GPU-{n}", checkpoint_us=NOW_US - s * SECOND_US) for n, s in lost.items()]
    world = W(jobs=(*jobs, J(4)), gpus=gpus(4)[1:])
    assert victims(planned(world)) == [2]


def test_shares_give_way_on_the_gpu_where_the_loss_is_least() -> None:
    def share(number: int, uuid: str, share_milli: int, lost_s: int) -> J:
        saved_us = NOW_US - lost_s * SECOND_US
        return miner(number, uuid, share_milli=share_milli, checkpoint_us=saved_us)

    world = W(
        jobs=(
            share(1, "GPU-0", 500, 1000),
            share(2, "GPU-0", 500, 1000),
            share(3, "GPU-1", 250, 900),
            share(4, "GPU-1", 250, 900),
            share(5, "GPU-1", 500, 2000),
            J(6, BATCH, share_milli=500),
        ),
        gpus=gpus(2),
    )
    # 500 of GPU-0 lose 500 GPU-seconds; two quarters of GPU-1 lose 225 each.
    assert victims(planned(world)) == [3, 4]


def test_a_share_that_lacks_only_memory_displaces_who_holds_it() -> None:
    world = W(
        jobs=(
            miner(1, "GPU-0", share_milli=300, gpu_memory_mib=10_000),
            miner(2, "GPU-0", share_milli=300, gpu_memory_mib=60_000, checkpoint_us=NOW_US - HOUR_US),
            J(3, BATCH, share_milli=300, gpu_memory_mib=60_000),
        ),
        gpus=gpus(1),
    )
    assert victims(planned(world)) == [2]


def test_a_whole_gpu_is_freed_of_all_its_shares() -> None:
    world = W(
        jobs=(
            *(miner(n, "GPU-0", share_milli=250) for n in (1, 2)),
            running(3, "GPU-1", job_class=INFERENCE, preemptible=False, share_milli=100),
            miner(4, "GPU-1", share_milli=100),
            J(5),
        ),
        gpus=gpus(2),
    )
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 5, DISPLACED, 0, 0), PreemptJob(2, 5, DISPLACED, 0, 0)),
        waits={5: HANDOVER},
        awaited={5: (1, 2)},
    )


def test_a_job_without_gpus_displaces_for_cpus_and_takes_no_more_than_it_needs() -> None:
    small = [miner(n, cpus=2, gpus=0) for n in (1, 2, 3)]
    world = W(jobs=(*small, J(4, BATCH, cpus=5, gpus=0)), nodes=(N(cpus=8),))
    assert len(victims(planned(world))) == 2


def test_a_gpu_job_that_lacks_cpus_displaces_the_job_that_has_both() -> None:
    world = W(
        jobs=(
            miner(1, "GPU-0", cpus=1),
            miner(2, "GPU-1", cpus=8, checkpoint_us=NOW_US - HOUR_US),
            J(3, cpus=6),
        ),
        gpus=gpus(2),
        nodes=(N(cpus=9),),
    )
    assert victims(planned(world)) == [2]


def test_many_holders_of_cpus_are_chosen_greedily_and_none_is_needless() -> None:
    """Too many different sums of CPUs and memory for the table: take back the dearest that are not needed."""
    hoard = [
        miner(n, gpus=0, cpus=2**n, memory_mib=3**n, checkpoint_us=NOW_US - n * SECOND_US)
        for n in range(1, 15)
    ]
    need = J(99, BATCH, gpus=0, cpus=20_000, memory_mib=4_000_000)
    world = W(jobs=(*hoard, need), nodes=(N(cpus=2**15, memory_mib=3**15),))
    chosen = {job.number: job for job in hoard if job.number in victims(planned(world))}
    free_cpus = 2**15 - sum(job.cpus for job in hoard)
    free_mib = 3**15 - sum(job.memory_mib for job in hoard)

    def enough(jobs: list[J]) -> bool:
        cpus, mib = sum(job.cpus for job in jobs), sum(job.memory_mib for job in jobs)
        return free_cpus + cpus >= need.cpus and free_mib + mib >= need.memory_mib

    assert enough(list(chosen.values()))
    assert not any(
        enough([job for job in chosen.values() if job is not spared]) for spared in chosen.values()
    )


def test_a_slot_is_freed_for_a_job_of_higher_rank() -> None:
    world = W(jobs=(miner(1, gpus=0), J(2, BATCH)), gpus=gpus(1), nodes=(N(live_jobs_max=1),))
    assert planned(world) == Outcome(
        actions=(PreemptJob(1, 2, DISPLACED, 0, 0),), waits={2: HANDOVER}, awaited={2: (1,)}
    )


def test_a_job_preempted_often_enough_is_displaced_by_nobody_of_its_class() -> None:
    aged = aged_priority(JobClass.BATCH, 500, POLICY.aging_after_preemptions + 2, POLICY)
    old = running(1, "GPU-0", job_class=BATCH, value=100_000, priority=aged)
    rich = J(2, BATCH, priority=1000, value=9_000_000)
    assert victims(planned(W(jobs=(old, rich), gpus=gpus(1)))) == []
    assert victims(planned(W(jobs=(old, J(2, TRAINING, value=0)), gpus=gpus(1)))) == [1]


def test_the_same_world_after_the_preemption_needs_no_second_one() -> None:
    world = W(jobs=(miner(1, "GPU-0"), miner(2, "GPU-1"), J(3, gpus=2), J(4, BATCH)), gpus=gpus(2))
    first = plan(snapshot(world), POLICY)
    assert victims(outcome(first)) == [1, 2]
    assert planned(applied(world, first)).actions == ()
