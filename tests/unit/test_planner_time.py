"""Deadlines, limits, drains, promises: what time does to a plan, and when it has to be made again."""

import pytest

from scheduler.model.actions import FailJob, PreemptJob, Promise, RequeueJob, StartJob, StopJob
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import DRAINING_STOP
from scheduler.planning.explain import preview
from scheduler.planning.planner import Memo, digest, plan
from scheduler.planning.valuation import WAIT_US
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    RUNNING,
    SECOND_US,
    STARTING,
    SUSPENDED,
    TRAINING,
    UNKNOWN,
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
FREE = Reason.STARTED_ON_FREE_GPUS
PASSED = Reason.BACKFILLED
GPUS = Reason.WAITING_FOR_GPUS
PROMISED = Reason.WAITING_FOR_PROMISED_START
S = SECOND_US


def planned(world: W, policy: Policy = POLICY) -> Outcome:
    return outcome(plan(snapshot(world), policy))


def stays(number: int, *on: str, left_s: int | None = None, **others: object) -> J:
    """Inference that may not be preempted and says that it ends in `left_s`."""
    expected_us = UNKNOWN if left_s is None else (3600 + left_s) * S
    return running(number, *on, job_class=INFERENCE, preemptible=False, expected_us=expected_us, **others)


# Ends -------------------------------------------------------------------------------------------


def test_a_job_that_cannot_meet_its_deadline_any_more_fails_and_others_wake_the_planner() -> None:
    world = W(
        jobs=(
            J(1, deadline_us=NOW_US + 10 * S, expected_us=11 * S),
            J(2, deadline_us=NOW_US - 1),
            J(3, deadline_us=NOW_US + 10 * S, expected_us=4 * S),
            J(4, deadline_us=NOW_US + 8 * S),
        )
    )
    assert planned(world) == Outcome(
        actions=(FailJob(1, Reason.DEADLINE_UNREACHABLE), FailJob(2, Reason.DEADLINE_UNREACHABLE)),
        waits={3: Reason.NO_SUITABLE_GPU, 4: Reason.NO_SUITABLE_GPU},
        wake_us=NOW_US + 6 * S + 1,
    )


def test_by_value_the_planner_wakes_when_who_waits_can_wait_no_more() -> None:
    world = W(jobs=(J(1, deadline_us=NOW_US + 5000 * S, expected_us=1000 * S, restart_loss_us=60 * S),))
    assert planned(world).wake_us == NOW_US + 4000 * S + 1
    assert planned(world, Policy(order=Order.VALUE)).wake_us == NOW_US + 3940 * S + 1 - WAIT_US


@pytest.mark.parametrize(
    ("job", "stop", "wake_us"),
    [
        (running(1, "GPU-0", time_limit_us=3600 * S), Reason.TIME_LIMIT, None),
        (running(1, "GPU-0", time_limit_us=3601 * S), None, NOW_US + S),
        (running(1, "GPU-0", deadline_us=NOW_US - 1), Reason.DEADLINE_MISSED, None),
        (running(1, "GPU-0", deadline_us=NOW_US), None, NOW_US + 1),
        (running(1, "GPU-0", deadline_us=NOW_US - 1, state=SUSPENDED), Reason.DEADLINE_MISSED, None),
        (running(1, "GPU-0", time_limit_us=1, state=SUSPENDED), Reason.TIME_LIMIT, None),
        (running(1, "GPU-0", time_limit_us=1, state=STARTING), None, None),
        (running(1, "GPU-0", time_limit_us=1, deadline_us=NOW_US - 1), Reason.TIME_LIMIT, None),
    ],
)
def test_a_running_job_stops_at_its_limits(job: J, stop: Reason | None, wake_us: int | None) -> None:
    actions = (StopJob(1, stop),) if stop else ()
    assert planned(W(jobs=(job,), gpus=gpus(1))) == Outcome(actions=actions, wake_us=wake_us)


def test_what_a_job_at_its_limit_leaves_is_counted_on_at_once() -> None:
    late = running(1, "GPU-0", time_limit_us=S)
    world = W(jobs=(late, running(2, "GPU-1", job_class=MINING), J(3)), gpus=gpus(2))
    assert planned(world) == Outcome(
        actions=(StopJob(1, Reason.TIME_LIMIT),),
        waits={3: Reason.WAITING_FOR_HANDOVER},
        awaited={3: (1,)},
    )


def test_a_node_that_drains_with_its_jobs_requeues_all_of_them_and_starts_none() -> None:
    world = W(
        jobs=(
            stays(1, "GPU-0"),
            J(2, MINING, STARTING, ("GPU-1",), node=0),
            running(3, "GPU-2", state=SUSPENDED),
            running(4, "GPU-3", state="PREEMPTING"),
            running(5, "GPU-4", time_limit_us=S),
            J(6, INFERENCE),
        ),
        gpus=gpus(6),
        nodes=(N(drain=DRAINING_STOP),),
    )
    assert planned(world) == Outcome(
        actions=(
            RequeueJob(1, Reason.NODE_DRAINED),
            RequeueJob(2, Reason.NODE_DRAINED),
            RequeueJob(3, Reason.NODE_DRAINED),
            StopJob(5, Reason.TIME_LIMIT),
        ),
        waits={6: Reason.NODE_DRAINING},
    )


# Promises -----------------------------------------------------------------------------------------


def blocked_gang(*others: J, **about: object) -> W:
    """Two GPUs; one is held for 100 s more, and job 2 wants both."""
    about = {"gpus": 2, **about}
    return W(jobs=(stays(1, "GPU-0", left_s=100), J(2, **about), *others), gpus=gpus(2))


def test_a_blocked_gang_is_promised_the_end_of_the_job_before_it() -> None:
    assert planned(blocked_gang()) == Outcome(
        waits={2: GPUS}, promise=Promise(2, NOW_US + 100 * S), wake_us=NOW_US + 100 * S
    )


@pytest.mark.parametrize(
    ("job", "passes"),
    [
        (J(3, BATCH, preemptible=False, expected_us=100 * S), True),  # ends in time
        (J(3, BATCH, preemptible=False, expected_us=101 * S), False),
        (J(3, BATCH, preemptible=False), False),  # nobody knows when it ends
        (J(3, BATCH), True),  # gives way
        (J(3, TRAINING), False),  # equal: would not give way
        (J(3, TRAINING, value=1), True),  # worth less: would give way
        (J(3, BATCH, min_runtime_us=100 * S), True),
        (J(3, BATCH, min_runtime_us=101 * S), False),  # would not give way in time
        (J(3, BATCH, preemptible=False, gpus=0), True),  # takes none of what was promised
    ],
)
def test_who_may_pass_a_blocked_gang_that_was_promised_its_start(job: J, passes: bool) -> None:
    on = ("GPU-1",) if job.gpus else ()
    assert planned(blocked_gang(job)) == Outcome(
        actions=(StartJob(3, on, PASSED),) if passes else (),
        waits={2: GPUS} if passes else {2: GPUS, 3: PROMISED},
        promise=Promise(2, NOW_US + 100 * S),
        wake_us=NOW_US + 100 * S,
    )


def test_a_job_may_pass_where_the_blocked_one_still_fits_beside_it() -> None:
    world = W(
        jobs=(
            stays(1, "GPU-0", left_s=100),
            stays(2, "GPU-1", left_s=100),
            J(3, gpus=3),
            J(4, BATCH, preemptible=False),
            J(5, BATCH, preemptible=False),
        ),
        gpus=gpus(4),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(4, ("GPU-2",), PASSED),),
        waits={3: GPUS, 5: PROMISED},
        promise=Promise(3, NOW_US + 100 * S),
        wake_us=NOW_US + 100 * S,
    )


def test_a_job_that_would_have_to_displace_does_so_only_beside_what_was_promised() -> None:
    world = W(
        jobs=(
            stays(1, "GPU-0", left_s=100),
            running(2, "GPU-1", job_class=MINING),
            J(3, gpus=2),
            J(4, BATCH, preemptible=False, expected_us=1000 * S),
        ),
        gpus=gpus(2),
    )
    assert planned(world) == Outcome(
        waits={3: GPUS, 4: PROMISED}, promise=Promise(3, NOW_US + 100 * S), wake_us=NOW_US + 100 * S
    )


def test_a_job_that_ends_in_time_only_if_it_need_not_wait_for_a_grace_is_held_back() -> None:
    def world(grace_s: int) -> W:
        filler = running(2, "GPU-1", job_class=MINING, grace_us=grace_s * S)
        last = J(4, BATCH, preemptible=False, expected_us=90 * S)
        return W(jobs=(stays(1, "GPU-0", left_s=100), filler, J(3, gpus=2), last), gpus=gpus(2))

    assert planned(world(11)).waits == {3: GPUS, 4: PROMISED}
    assert planned(world(10)).waits == {3: GPUS, 4: Reason.WAITING_FOR_HANDOVER}


def test_nothing_is_promised_and_nobody_held_back_where_no_end_is_known() -> None:
    world = W(jobs=(stays(1, "GPU-0"), J(2, gpus=2), J(3, BATCH, preemptible=False)), gpus=gpus(2))
    assert planned(world) == Outcome(actions=(StartJob(3, ("GPU-1",), PASSED),), waits={2: GPUS})


def test_a_job_that_overruns_is_expected_to_end_now() -> None:
    world = W(jobs=(stays(1, "GPU-0", left_s=-5), J(2, gpus=2), J(3, BATCH, preemptible=False)), gpus=gpus(2))
    assert planned(world) == Outcome(waits={2: GPUS, 3: PROMISED}, promise=Promise(2, NOW_US))


def test_a_minimum_runtime_that_ends_earlier_than_the_job_is_promised() -> None:
    young = running(
        1, "GPU-0", job_class=MINING, ran_s=10, min_runtime_us=60 * S, expected_us=1000 * S, state=RUNNING
    )
    assert planned(W(jobs=(young, J(2)), gpus=gpus(1))) == Outcome(
        waits={2: GPUS}, promise=Promise(2, NOW_US + 50 * S), wake_us=NOW_US + 50 * S
    )


def test_the_plan_wakes_at_the_end_of_a_minimum_runtime_though_nothing_is_promised() -> None:
    young = running(2, "GPU-1", job_class=MINING, ran_s=10, min_runtime_us=60 * S)
    world = W(jobs=(stays(1, "GPU-0"), young, J(3, gpus=2), J(4)), gpus=gpus(2))
    assert planned(world) == Outcome(waits={3: GPUS, 4: GPUS}, wake_us=NOW_US + 50 * S)


def test_only_the_highest_blocked_job_is_promised_anything() -> None:
    world = blocked_gang(J(3, gpus=2, expected_us=S), J(4, BATCH, expected_us=100 * S, preemptible=False))
    assert planned(world) == Outcome(
        actions=(StartJob(4, ("GPU-1",), PASSED),),
        waits={2: GPUS, 3: GPUS},
        promise=Promise(2, NOW_US + 100 * S),
        wake_us=NOW_US + 100 * S,
    )


def test_the_promise_reckons_with_what_starts_before_it_in_the_same_plan() -> None:
    first = J(1, INFERENCE, preemptible=False, expected_us=30 * S)
    assert planned(W(jobs=(first, J(2, gpus=2)), gpus=gpus(2))) == Outcome(
        actions=(StartJob(1, ("GPU-0",), FREE),),
        waits={2: GPUS},
        promise=Promise(2, NOW_US + 30 * S),
        wake_us=NOW_US + 30 * S,
    )


def test_without_backfill_only_who_gives_way_passes_a_blocked_job_of_its_kind() -> None:
    strict = Policy(backfill=False)
    ends_in_time = J(3, BATCH, preemptible=False, expected_us=S)
    without_gpus = J(4, BATCH, preemptible=False, gpus=0)
    gives_way = J(5, MINING)
    plan = planned(blocked_gang(ends_in_time, without_gpus, gives_way), strict)
    assert plan.waits == {2: GPUS, 3: PROMISED}
    assert plan.actions == (StartJob(4, (), PASSED), StartJob(5, ("GPU-1",), PASSED))


def test_without_backfill_nobody_passes_where_nothing_can_be_promised_either() -> None:
    world = W(jobs=(stays(1, "GPU-0"), J(2, gpus=2), J(3, BATCH, preemptible=False)), gpus=gpus(2))
    assert planned(world, Policy(backfill=False)) == Outcome(waits={2: GPUS, 3: PROMISED})


def test_without_backfill_a_job_held_back_is_passed_by_nobody_of_its_kind() -> None:
    def world() -> W:
        cpu_only = {"gpus": 0, "preemptible": False}
        jobs = (stays(1, "GPU-0", left_s=100, cpus=1), J(2, gpus=2, cpus=6))
        return W(
            jobs=(*jobs, J(3, BATCH, cpus=3, **cpu_only), J(4, BATCH, cpus=1, **cpu_only)),
            gpus=gpus(2),
            nodes=(N(cpus=8),),
        )

    assert planned(world()).waits == {2: GPUS, 3: PROMISED}
    assert planned(world(), Policy(backfill=False)).waits == {2: GPUS, 3: PROMISED, 4: PROMISED}


def test_without_backfill_each_kind_has_a_blocked_job_of_its_own() -> None:
    world = W(
        jobs=(J(2, INFERENCE, gpus=0, cpus=10), J(3, cpus=10), J(4, BATCH, preemptible=False)),
        gpus=gpus(1),
        nodes=(N(cpus=8),),
    )
    cpus = Reason.WAITING_FOR_CPUS
    assert planned(world, Policy(backfill=False)).waits == {2: cpus, 3: cpus, 4: PROMISED}
    assert planned(world).waits == {2: cpus, 3: cpus}


def test_the_blocked_job_also_needs_its_cpus_at_the_promised_moment() -> None:
    world = W(
        jobs=(
            stays(1, gpus=0, cpus=4, left_s=100),
            J(2, gpus=0, cpus=6),
            J(3, BATCH, gpus=0, cpus=3, preemptible=False),
            J(4, BATCH, gpus=0, cpus=2, preemptible=False),
        ),
        nodes=(N(cpus=8),),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(4, (), PASSED),),
        waits={2: Reason.WAITING_FOR_CPUS, 3: PROMISED},
        promise=Promise(2, NOW_US + 100 * S),
        wake_us=NOW_US + 100 * S,
    )


def test_a_gang_passes_with_what_can_be_spared_and_what_the_blocked_job_does_not_want() -> None:
    models = ("H100", "H100", "H100", "A100")
    mixed = tuple(G(f"GPU-{n}", n, model=model) for n, model in enumerate(models))
    world = W(
        jobs=(
            stays(1, "GPU-0", left_s=100),
            stays(2, "GPU-2", left_s=100),
            J(3, gpus=2, models=("H100",)),
            J(4, BATCH, gpus=2, preemptible=False),
            J(5, BATCH, preemptible=False),
        ),
        gpus=mixed,
    )
    assert planned(world) == Outcome(
        actions=(StartJob(4, ("GPU-1", "GPU-3"), PASSED),),
        waits={3: GPUS, 5: GPUS},
        promise=Promise(3, NOW_US + 100 * S),
        wake_us=NOW_US + 100 * S,
    )


def test_a_share_passes_where_the_blocked_share_still_fits_on_the_same_gpu() -> None:
    world = W(
        jobs=(
            stays(1, "GPU-0", share_milli=500, left_s=100),
            J(2, share_milli=600),
            J(3, BATCH, share_milli=450, preemptible=False),
            J(4, BATCH, share_milli=400, preemptible=False),
        ),
        gpus=gpus(1),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(4, ("GPU-0",), PASSED),),
        waits={2: GPUS, 3: PROMISED},
        promise=Promise(2, NOW_US + 100 * S),
        wake_us=NOW_US + 100 * S,
    )


def test_a_promise_on_one_node_holds_nobody_back_on_another() -> None:
    """Both nodes are promised now, by an overrun: the first counts."""
    two = tuple(G(f"GPU-{n}", n, node=n // 2) for n in range(4))
    world = W(
        jobs=(
            stays(1, "GPU-0", left_s=-5),
            stays(2, "GPU-2", left_s=-5, node=1),
            J(3, gpus=2),
            J(4, BATCH, preemptible=False),
            J(5, BATCH, preemptible=False),
        ),
        gpus=two,
        nodes=(N(), N()),
    )
    assert planned(world) == Outcome(
        actions=(StartJob(4, ("GPU-3",), PASSED, node=1),),
        waits={3: GPUS, 5: PROMISED},
        promise=Promise(3, NOW_US),
    )


def test_a_second_blocked_job_of_another_kind_changes_no_promise() -> None:
    world = blocked_gang(J(3, gpus=0, cpus=1000))
    assert planned(world) == Outcome(
        waits={2: GPUS, 3: Reason.WAITING_FOR_CPUS},
        promise=Promise(2, NOW_US + 100 * S),
        wake_us=NOW_US + 100 * S,
    )


# Sameness -------------------------------------------------------------------------------------------


def test_a_plan_that_was_carried_out_is_followed_by_no_other() -> None:
    world = blocked_gang(J(3, BATCH), J(4, INFERENCE))
    settled = applied(world, plan(snapshot(world), POLICY))
    assert planned(settled).actions == ()


def test_the_order_of_the_rows_has_no_part_in_a_plan() -> None:
    world = W(
        jobs=(
            J(1, gpus=2),
            J(2, INFERENCE, share_milli=500),
            J(3, INFERENCE),
            J(4, BATCH, eligible_us=NOW_US + 1),
        ),
        gpus=gpus(6),
        handovers=tuple(HandOver(f"GPU-{n}", stop_us=NOW_US - S) for n in range(1, 6)),
    )
    turned = W(jobs=world.jobs[::-1], gpus=world.gpus[::-1], handovers=world.handovers[::-1])
    plans = [plan(snapshot(each), POLICY) for each in (world, turned)]
    assert outcome(plans[0]) == outcome(plans[1])
    assert digest(plans[0]) == digest(plans[1])
    claims = [preview(snapshot(each), POLICY, 3).gpus for each in (world, turned)]
    assert claims == [("GPU-1",), ("GPU-1",)]
    started = W(jobs=(J(1, gpus=3),), gpus=gpus(3)[::-1])
    assert planned(started).actions == (StartJob(1, ("GPU-0", "GPU-1", "GPU-2"), FREE),)


def test_a_digest_tells_plans_apart_and_equal_ones_not() -> None:
    def of(world: W, memo: Memo | None = None) -> str:
        return digest(plan(snapshot(world), POLICY, memo))

    one = W(jobs=(J(1), J(2)), gpus=gpus(1))
    other_wait = W(jobs=(J(1), J(2, eligible_us=NOW_US + 1)), gpus=gpus(1))
    other_gpu = W(jobs=(running(3, "GPU-0", preemptible=False), J(1), J(2)), gpus=gpus(2))
    assert len({of(one), of(other_wait), of(other_gpu)}) == 3
    assert of(one) == of(one, Memo())
    assert len(of(one)) == 32


def test_a_memo_of_other_gpus_is_not_believed() -> None:
    memo = Memo()
    plan(snapshot(W(jobs=(J(1),), gpus=gpus(3))), POLICY, memo)
    world = W(jobs=(J(1, gpus=2),), gpus=gpus(2, is_open=False))
    assert outcome(plan(snapshot(world), POLICY, memo)) == Outcome(waits={1: Reason.NO_SUITABLE_GPU})


def test_preemption_is_decided_with_the_loss_at_that_moment() -> None:
    world = W(jobs=(running(1, "GPU-0", job_class=MINING, value=3_600_000, ran_s=60), J(2)), gpus=gpus(1))
    assert planned(world).actions == (
        PreemptJob(1, 2, Reason.PREEMPTED_BY_HIGHER_RANK, lost_gpu_ms=60_000, loss_microusd=60_000),
    )
