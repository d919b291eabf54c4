"""Watts in plans: limits, sheds and starts, a world at a time."""

from dataclasses import replace

import pytest

from scheduler.model.actions import Plan, PreemptJob, RequeueJob, SetPowerLimit, StartJob
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from scheduler.planning.explain import Obstacle, Remedy, RemedyKind, Rule, explain
from scheduler.planning.planner import plan
from tests.fakes.power import B, P, applied, limits, snapshot
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    SECOND_US,
    TRAINING,
    G,
    J,
    N,
    Outcome,
    W,
    gpus,
    outcome,
    running,
)

LOWERED, RAISED = Reason.POWER_LIMIT_LOWERED, Reason.POWER_LIMIT_RAISED
MINER = {"job_class": MINING, "value": 50_000}
HOUR_US = 3600 * SECOND_US


def planned(power: P) -> Outcome:
    return outcome(plan(snapshot(power), Policy()))


def started(made: Plan) -> list[tuple[int, tuple[str, ...]]]:
    return [(action.job, action.gpus) for action in made.actions if isinstance(action, StartJob)]


def miners(count: int) -> tuple[J, ...]:
    return tuple(running(n + 1, f"GPU-{n}", **MINER) for n in range(count))


def test_without_a_budget_no_limit_is_touched() -> None:
    world = W(jobs=miners(2), gpus=gpus(2))
    made = plan(replace(snapshot(P(world)), power=None), Policy())
    assert made.actions == ()
    assert made.power is None


def test_a_limit_lies_a_margin_above_what_the_job_draws() -> None:
    power = P(W(jobs=miners(2), gpus=gpus(2)), natural_w={1: 300, 2: 690})
    assert planned(power).actions == (SetPowerLimit("GPU-0", 330, LOWERED),)


def test_a_job_of_which_nothing_is_known_counts_with_all_that_its_board_may_draw() -> None:
    power = P(W(jobs=miners(1), gpus=gpus(1)), boards={"GPU-0": B(limit_w=400)})
    assert planned(power).actions == (SetPowerLimit("GPU-0", 700, RAISED),)


def test_the_first_watts_are_taken_from_all_who_mine_before_one_stops() -> None:
    power = P(W(jobs=miners(2), gpus=gpus(2)), budget_w=600, natural_w={1: 300, 2: 300})
    made = planned(power)
    assert limits(plan(snapshot(power), Policy())) == {"GPU-0": 300, "GPU-1": 300}
    assert not [action for action in made.actions if isinstance(action, RequeueJob)]


def test_while_draws_fall_limits_that_bind_lie_lower_and_none_rises() -> None:
    power = P(W(jobs=miners(2), gpus=gpus(2)), budget_w=600, natural_w={1: 310, 2: 310}, lead_milli=30)
    planned_w = limits(plan(snapshot(replace(power, lead_milli=0)), Policy()))
    assert sum(planned_w.values()) == 600
    lower_w = {gpu: watts * 97 // 100 for gpu, watts in planned_w.items()}
    assert limits(plan(snapshot(power), Policy())) == lower_w
    enough = replace(power, budget_w=700)
    assert limits(plan(snapshot(enough), Policy())) == {"GPU-0": 341, "GPU-1": 341}, "these bind nobody"
    low = power.with_limits({**lower_w, "GPU-0": 200})
    assert not plan(snapshot(low), Policy()).actions
    assert limits(plan(snapshot(replace(low, lead_milli=0)), Policy())) == planned_w


def test_a_start_counts_with_the_limit_that_it_gets_while_none_rises() -> None:
    cooling = B(limit_w=500, measured_w=500)  # closed, and somebody has just left it
    boards = {"GPU-0": cooling, "GPU-1": B(limit_w=600), "GPU-2": B(limit_w=600)}
    there = (replace(gpus(1)[0], is_open=False), *gpus(3)[1:])
    jobs = tuple(J(number, job_class=MINING, preemptible=True) for number in (1, 2))
    power = P(W(jobs=jobs, gpus=there), budget_w=1700, boards=boards, lead_milli=30)
    made = plan(snapshot(power), Policy())
    assert [action.job for action in made.actions if isinstance(action, StartJob)] == [1, 2]
    assert limits(made) == {}
    assert plan(snapshot(applied(power, made)), Policy()).actions == ()


def test_mining_stops_before_training_is_slowed_by_much() -> None:
    jobs = (running(1, "GPU-0", job_class=TRAINING), running(2, "GPU-1", **MINER))
    power = P(W(jobs=jobs, gpus=gpus(2)), budget_w=400, natural_w={1: 300, 2: 300})
    made = planned(power)
    assert RequeueJob(2, Reason.SHED_FOR_POWER) in made.actions
    assert RequeueJob(1, Reason.SHED_FOR_POWER) not in made.actions


def test_of_equal_jobs_the_youngest_stops_unless_a_stop_costs_it_more() -> None:
    power = P(W(jobs=miners(2), gpus=gpus(2)), budget_w=400, natural_w={1: 300, 2: 300})
    assert RequeueJob(2, Reason.SHED_FOR_POWER) in planned(power).actions
    first, second = miners(2)
    dear = replace(second, restart_loss_us=HOUR_US // 2)
    kept = planned(replace(power, world=W(jobs=(first, dear), gpus=gpus(2))))
    assert [action for action in kept.actions if isinstance(action, RequeueJob)] == [
        RequeueJob(1, Reason.SHED_FOR_POWER)
    ]


def test_a_gang_is_lowered_and_stopped_whole() -> None:
    gang = running(1, "GPU-0", "GPU-1", job_class=BATCH, value=500_000)
    power = P(W(jobs=(gang,), gpus=gpus(2)), budget_w=580, natural_w={1: 300})
    assert limits(plan(snapshot(power), Policy())) == {"GPU-0": 290, "GPU-1": 290}
    assert planned(replace(power, budget_w=300)).actions[-1] == RequeueJob(1, Reason.SHED_FOR_POWER)


def test_below_the_boards_minimum_only_stopping_helps() -> None:
    power = P(W(jobs=miners(1), gpus=gpus(1)), budget_w=190, natural_w={1: 210})
    assert RequeueJob(1, Reason.SHED_FOR_POWER) in planned(power).actions


def test_a_limit_that_cant_be_set_is_never_counted_on() -> None:
    boards = {"GPU-0": B(limit_w_min=700)}
    power = P(W(jobs=miners(1), gpus=gpus(1)), budget_w=600, boards=boards, natural_w={1: 300})
    assert planned(power).actions == (RequeueJob(1, Reason.SHED_FOR_POWER),)


def test_what_may_not_be_stopped_is_lowered_as_far_as_its_board_goes() -> None:
    job = running(1, "GPU-0", job_class=TRAINING, preemptible=False)
    power = P(W(jobs=(job,), gpus=gpus(1)), budget_w=150, natural_w={1: 600})
    assert planned(power).actions == (SetPowerLimit("GPU-0", 200, LOWERED),)


def test_inference_is_lowered_only_where_the_policy_says_so() -> None:
    job = running(1, "GPU-0", job_class=INFERENCE, preemptible=False)
    power = P(W(jobs=(job,), gpus=gpus(1)), budget_w=500, natural_w={1: 600})
    assert limits(plan(snapshot(power), Policy())) == {"GPU-0": 660}
    lowered = replace(power, limits_inference=True)
    assert limits(plan(snapshot(lowered), Policy())) == {"GPU-0": 500}


def test_a_start_waits_until_limits_have_fallen_and_then_comes() -> None:
    world = W(jobs=(*miners(1), J(2, **MINER)), gpus=gpus(2))
    power = P(world, budget_w=700, natural_w={1: 300, 2: 300})
    first = planned(power)
    assert first.waits == {2: Reason.WAITING_FOR_POWER}
    assert limits(plan(snapshot(power), Policy())) == {"GPU-0": 330, "GPU-1": 330}
    second = planned(applied(power, plan(snapshot(power), Policy())))
    assert second.actions == (StartJob(2, ("GPU-1",), Reason.STARTED_ON_FREE_GPUS),)


def test_a_start_that_doesnt_fit_waits_for_power_and_lowers_nobody_of_a_higher_class() -> None:
    jobs = (running(1, "GPU-0", job_class=TRAINING), J(2, **MINER))
    power = P(W(jobs=jobs, gpus=gpus(2)), budget_w=500, natural_w={1: 300, 2: 300})
    power = power.with_limits({"GPU-0": 330})
    made = planned(power)
    assert made.actions == ()
    assert made.waits == {2: Reason.WAITING_FOR_POWER}


@pytest.mark.parametrize(("order", "live"), [(Order.VALUE, [1, 2]), (Order.CLASS, [1, 3])])
def test_who_starts_takes_watts_as_rank_says_and_is_not_displaced_for_it(
    order: Order, live: list[int]
) -> None:
    """By value, too: else who is kept out for his class displaces who was let in, again and again."""
    jobs = (
        running(1, "GPU-0", job_class=TRAINING, value=100_000),
        J(2, job_class=BATCH, value=900_000),
        J(3, job_class=TRAINING, value=90_000),
    )
    power = P(W(jobs=jobs, gpus=gpus(2)), budget_w=620, natural_w={1: 300, 2: 300, 3: 300})
    power, policy = power.with_limits({"GPU-0": 330, "GPU-1": 330}), Policy(order=order)
    for _ in range(4):
        made = plan(snapshot(power), policy)
        assert not [action for action in made.actions if isinstance(action, PreemptJob)]
        power = applied(power, made)
    assert [job.number for job in power.world.jobs if job.is_live] == live


def test_a_job_of_higher_rank_takes_the_watts_of_lower_ones_and_no_more() -> None:
    world = W(jobs=(*miners(2), J(3, job_class=TRAINING)), gpus=gpus(3))
    power = P(world, budget_w=560, natural_w={1: 290, 2: 290, 3: 300}).with_limits(
        {f"GPU-{n}": 319 for n in range(3)}
    )
    made = planned(power)
    preempted = [action.job for action in made.actions if hasattr(action, "preemptor")]
    assert preempted == [2]
    assert made.waits == {3: Reason.WAITING_FOR_POWER}
    assert made.awaited == {3: (2,)}


def test_an_emergency_holds_everybody_down_until_whoever_stops_has_gone() -> None:
    jobs = (running(1, "GPU-0", job_class=TRAINING), running(3, "GPU-1", **MINER))
    power = P(W(jobs=jobs, gpus=gpus(2)), budget_w=450, natural_w={1: 300, 3: 300}, is_emergency=True)
    made = planned(power)
    assert RequeueJob(3, Reason.SHED_IN_EMERGENCY) in made.actions
    assert limits(plan(snapshot(power), Policy())) == {"GPU-0": 200, "GPU-1": 200}


def test_a_minimum_runtime_holds_but_in_an_emergency() -> None:
    job = running(1, "GPU-0", ran_s=10, min_runtime_us=60 * SECOND_US, **MINER)
    power = P(W(jobs=(job,), gpus=gpus(1)), budget_w=100, natural_w={1: 300})
    assert planned(power).actions == (SetPowerLimit("GPU-0", 200, LOWERED),)
    emergency = planned(replace(power, is_emergency=True))
    assert emergency.actions[-1] == RequeueJob(1, Reason.SHED_IN_EMERGENCY)


def test_no_start_makes_an_accepted_event_unreachable() -> None:
    job = J(1, job_class=INFERENCE, preemptible=False)
    power = P(W(jobs=(job,), gpus=gpus(1)), natural_w={1: 300}, promised_w=200, promised_us=NOW_US + HOUR_US)
    assert planned(power).waits == {1: Reason.WAITING_FOR_POWER}
    assert planned(replace(power, promised_w=330)).waits == {}
    preemptible = replace(power, world=W(jobs=(replace(job, preemptible=True),), gpus=gpus(1)))
    assert planned(preemptible).waits == {}


def test_an_empty_board_that_still_draws_counts_with_what_it_draws() -> None:
    power = P(W(jobs=(J(1, **MINER),), gpus=gpus(2)), budget_w=500, natural_w={1: 300})
    power = power.with_limits({"GPU-0": 330, "GPU-1": 330})
    assert planned(power).waits == {}
    boards = {**power.boards, "GPU-1": replace(power.boards["GPU-1"], measured_w=250)}
    assert planned(replace(power, boards=boards)).waits == {1: Reason.WAITING_FOR_POWER}


def test_a_start_relies_on_a_board_that_came_free_a_moment_ago_but_no_rising_limit_does() -> None:
    """Nobody has read GPU-2 since; once somebody has, it counts with what it draws."""
    jobs = (running(1, "GPU-0", **MINER), J(2, job_class=TRAINING))
    power = P(W(jobs=jobs, gpus=gpus(3)), budget_w=800, natural_w={1: 300, 2: 300})
    power = power.with_limits({"GPU-0": 200, "GPU-1": 330, "GPU-2": 330})
    made = plan(snapshot(power), Policy())
    assert [job for job, _ in started(outcome(made))] == [2]
    assert limits(made) == {}
    boards = {**power.boards, "GPU-2": replace(power.boards["GPU-2"], measured_w=70)}
    assert limits(plan(snapshot(replace(power, boards=boards)), Policy())) == {"GPU-0": 330}
    boards = {**power.boards, "GPU-2": replace(power.boards["GPU-2"], measured_w=200)}
    assert limits(plan(snapshot(replace(power, boards=boards)), Policy())) == {"GPU-0": 270}


def test_who_begins_gets_the_limit_with_which_it_was_counted_whatever_was_not_seen_yet() -> None:
    power = P(W(jobs=(J(1, job_class=TRAINING),), gpus=gpus(2)), budget_w=450, natural_w={1: 300})
    made = plan(snapshot(power.with_limits({"GPU-0": 329, "GPU-1": 700})), Policy())
    assert [job for job, _ in started(outcome(made))] == [1]
    assert limits(made) == {"GPU-0": 330}


def test_where_value_decides_nobody_is_stopped_for_watts_that_are_worth_more_where_they_are() -> None:
    """Job 2 outranks the gang, which may wait a little, and would lose ten hours' work with its deadline."""
    due = {"started_us": NOW_US, "checkpoint_us": NOW_US, "expected_us": 10 * HOUR_US}
    gang = running(1, "GPU-0", "GPU-1", job_class=TRAINING, value=1_000_000, **due)
    tight = replace(gang, deadline_us=NOW_US + 10 * HOUR_US + HOUR_US // 2)
    challenger = J(2, job_class=BATCH, value=3_000_000)
    power = P(W(jobs=(gang, challenger), gpus=gpus(3)), budget_w=500, natural_w={1: 300, 2: 300})
    power = power.with_limits({"GPU-0": 200, "GPU-1": 200, "GPU-2": 330})
    by_value = Policy(order=Order.VALUE)
    assert stopped(plan(snapshot(power), by_value)) == [1]
    power = replace(power, world=replace(power.world, jobs=(tight, challenger)))
    assert stopped(plan(snapshot(power), by_value)) == []
    assert outcome(plan(snapshot(power), by_value)).waits == {2: Reason.WAITING_FOR_POWER}


def stopped(made: Plan) -> list[int]:
    return [action.job for action in made.actions if isinstance(action, PreemptJob)]


def test_the_shadow_price_is_what_the_last_watt_costs() -> None:
    power = P(W(jobs=miners(1), gpus=gpus(1)), budget_w=250, natural_w={1: 300})
    made = plan(snapshot(power), Policy())
    assert made.power is not None
    # From 270 to 210 W a miner of 0.05 USD/h loses 12 % of its work: 6,000 micro-USD for 60 Wh.
    assert 50 < made.power.shadow_microusd_per_wh < 200
    relaxed = plan(snapshot(replace(power, budget_w=1000)), Policy())
    assert relaxed.power is not None
    assert relaxed.power.shadow_microusd_per_wh == 0


def test_explain_says_what_is_missing_and_what_would_do() -> None:
    jobs = (running(1, "GPU-0", job_class=TRAINING), J(2, **MINER))
    power = P(W(jobs=jobs, gpus=gpus(2)), budget_w=500, natural_w={1: 300, 2: 300})
    power = power.with_limits({"GPU-0": 330, "GPU-1": 330})
    found = explain(snapshot(power), Policy(), 2)
    assert found.reason is Reason.WAITING_FOR_POWER
    assert found.obstacles == (Obstacle(Rule.POWER, lacking=160),)
    kinds = {remedy.kind: remedy.amount for remedy in found.remedies}
    # At 210 of 300 W it does most of its work, and that is let in first.
    assert kinds[RemedyKind.MORE_POWER] == 40
    assert RemedyKind.LESS_DRAW not in kinds, "no board takes a limit as low as that"
    enough = explain(snapshot(replace(power, budget_w=540)), Policy(), 2)
    assert enough.obstacles == enough.remedies == ()
    declared = explain(snapshot(replace(power, budget_w=530)), Policy(), 2)
    assert Remedy(RemedyKind.LESS_DRAW, 285) in declared.remedies


def test_a_share_that_joins_one_just_started_is_judged_like_one_that_joins_later() -> None:
    """Who can't be stopped within his minimum runtime can once it is over, whichever plan started him."""
    said = {"value": 100_000, "min_runtime_us": 60 * SECOND_US}
    shares = (J(1, share_milli=250, priority=700, **said), J(2, share_milli=500, **said))
    power = P(W(jobs=shares, gpus=gpus(3)), budget_w=736, boards={"GPU-0": B(limit_w=596)})
    first = plan(snapshot(power), Policy())
    again = plan(snapshot(applied(power, first)), Policy())
    assert [action.job for action in first.actions if isinstance(action, StartJob)] == [1]
    assert not [action for action in again.actions if not isinstance(action, SetPowerLimit)]


def test_nobody_starts_at_watts_for_which_it_would_be_stopped_once_it_may_be() -> None:
    guarded = J(1, min_runtime_us=8 * SECOND_US, **MINER)
    power = P(W(jobs=(guarded,), gpus=gpus(1)), budget_w=400)
    assert planned(power) == Outcome(waits={1: Reason.WAITING_FOR_POWER})
    # It is not let in beside one that runs and can't be stopped yet, either.
    held = running(2, "GPU-0", ran_s=1, min_runtime_us=8 * SECOND_US, share_milli=250, **MINER)
    wanted = J(1, share_milli=250, **MINER)
    power = P(W(jobs=(wanted, held), gpus=gpus(1)), budget_w=400, boards={"GPU-0": B(limit_w=400)})
    made = planned(power)
    assert not [action for action in made.actions if isinstance(action, StartJob)]


def test_who_starts_first_counts_with_the_limit_that_the_whole_plan_gives_it() -> None:
    wanted = (J(1, **MINER), J(2, **MINER))
    boards = {"GPU-0": B(limit_w=490), "GPU-1": B(limit_w=490)}
    power = P(W(jobs=wanted, gpus=gpus(2)), budget_w=980, boards=boards)
    made = plan(snapshot(power), Policy())
    assert [action.job for action in made.actions if isinstance(action, StartJob)] == [1, 2]
    assert plan(snapshot(applied(power, made)), Policy()).actions == ()


def test_who_waits_for_watts_of_now_begins_in_the_plan_that_lowers_it() -> None:
    """The first counts with its full limit until the second is let in; GPU 1 was left a moment ago."""
    wanted = (J(1, **MINER), J(2, **MINER))
    boards = {"GPU-0": B(limit_w=490), "GPU-1": B(limit_w=490, measured_w=400)}
    power = P(W(jobs=wanted, gpus=gpus(2)), budget_w=980, boards=boards)
    made = plan(snapshot(power), Policy())
    assert [action.job for action in made.actions if isinstance(action, StartJob)] == [1, 2]
    assert not plan(snapshot(applied(power, made)), Policy()).actions


def test_watts_that_a_higher_job_waits_for_are_taken_by_no_lower_one() -> None:
    """Two boards cool down; job 1 is to have the one by itself, and job 2 started on theirs would move it."""
    there = tuple(replace(gpu, numa=gpu.index // 2, is_open=gpu.index != 2) for gpu in gpus(4))
    world = W(jobs=(J(1, **MINER), J(2, **MINER)), gpus=there)
    boards = {"GPU-0": B(limit_w=630, measured_w=285), "GPU-1": B(limit_w=630, measured_w=461)}
    power = P(world, budget_w=1400, boards=boards)
    made = plan(snapshot(power), Policy())
    assert started(made) == []
    assert started(plan(snapshot(applied(power, made)), Policy())) == []


def test_a_board_that_takes_less_serves_whom_the_budget_keeps_from_another() -> None:
    jobs = (running(1, "GPU-0", job_class=TRAINING), J(2, job_class=BATCH, value=4_000_000))
    boards = {"GPU-0": B(limit_w=605), "GPU-2": B(limit_w=605, limit_w_max=605)}
    power = P(W(jobs=jobs, gpus=gpus(3)), budget_w=1300, boards=boards, natural_w={1: 550})
    made = plan(snapshot(power), Policy())
    assert started(made) == [(2, ("GPU-2",))]
    assert started(plan(snapshot(applied(power, made)), Policy())) == []


def test_a_share_too_goes_where_the_budget_lets_it() -> None:
    """Or a miner takes the watts first, gives way for its sake, comes back, and so for ever."""
    jobs = (J(1, INFERENCE, share_milli=250), J(2, **MINER))
    boards = {"GPU-0": B(limit_w_max=700), "GPU-1": B(limit_w=200, limit_w_max=200)}
    power = P(W(jobs=jobs, gpus=gpus(2)), budget_w=400, boards=boards)
    made = plan(snapshot(power), Policy())
    assert started(made) == [(1, ("GPU-1",))]
    assert not plan(snapshot(applied(power, made)), Policy()).actions


def test_another_node_too_serves_whom_the_budget_keeps_from_one() -> None:
    boards = {"GPU-0": B(limit_w_max=700), "GPU-1": B(limit_w=200, limit_w_max=200)}
    there = (G("GPU-0", 0, 0), G("GPU-1", 1, 1))
    world = W(jobs=(J(1, INFERENCE), J(2, **MINER)), gpus=there, nodes=(N(), N()))
    made = plan(snapshot(P(world, budget_w=400, boards=boards)), Policy())
    assert [(action.job, action.node) for action in made.actions if isinstance(action, StartJob)] == [(1, 1)]


def test_a_share_is_tried_beside_others_where_it_takes_fewer_watts_than_where_it_fits_best() -> None:
    """The smallest gap that holds it is on a board that would need more watts for it than there are."""
    jobs = (
        running(1, "GPU-0", job_class=INFERENCE, share_milli=700),
        running(2, "GPU-1", job_class=INFERENCE, share_milli=500),
        J(3, INFERENCE, share_milli=250),
    )
    naturals = {1: 300, 2: 690, 3: 300}
    power = P(W(jobs=jobs, gpus=gpus(2)), budget_w=1100, boards={"GPU-0": B(limit_w=330)}, natural_w=naturals)
    made = plan(snapshot(power), Policy())
    assert started(made) == [(3, ("GPU-1",))]
