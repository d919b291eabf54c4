"""Frozen jobs in plans: who is frozen rather than stopped, what that counts for, and when it runs again."""

from dataclasses import replace

from scheduler.model.actions import Action, PreemptJob, RequeueJob, ResumeJob, SetPowerLimit, SuspendJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.planning.floor import floor_w
from scheduler.planning.planner import plan
from tests.fakes.power import B, P, applied, snapshot
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    SECOND_US,
    SUSPENDED,
    TRAINING,
    J,
    W,
    gpus,
    running,
)

SHED, RESUMED = Reason.SHED_FOR_POWER, Reason.RESUMED_AFTER_SHED
LOWERED, RAISED = Reason.POWER_LIMIT_LOWERED, Reason.POWER_LIMIT_RAISED
MINER = {"job_class": MINING, "value": 50_000, "restart_loss_us": 300_000_000}
LONG_US = NOW_US - 30 * SECOND_US  # as docs/operating/power.md has it
FROZEN_W = 130


def actions(power: P) -> tuple[Action, ...]:
    return plan(snapshot(power), Policy()).actions


def site(*jobs: J, budget_w: int = 10_000, frozen: tuple[int, ...] = (), **others: object) -> P:
    """Jobs on a board each of 70 to 700 W; the `frozen` ones have been so for long, at the least limits."""
    boards = {uuid: B(limit_w=200 if job.number in frozen else 330) for job in jobs for uuid in job.on}
    jobs = tuple(replace(job, state=SUSPENDED) if job.number in frozen else job for job in jobs)
    return P(
        W(jobs=jobs, gpus=gpus(len(jobs))),
        budget_w=budget_w,
        boards=boards,
        natural_w={job.number: 300 for job in jobs},
        frozen_w={job.number: FROZEN_W for job in jobs},
        suspend_us=dict.fromkeys(frozen, LONG_US),
        **others,  # type: ignore[arg-type]
    )


def miner(number: int, **others: object) -> J:
    return running(number, f"GPU-{number - 1}", **{**MINER, **others})


def test_a_miner_is_frozen_where_lower_limits_do_not_do_and_its_board_is_held_down() -> None:
    made = actions(site(miner(1), budget_w=150))
    assert made == (SetPowerLimit("GPU-0", 200, LOWERED), SuspendJob(1, SHED))


def test_the_first_watts_are_taken_from_limits() -> None:
    assert actions(site(miner(1), budget_w=290)) == (SetPowerLimit("GPU-0", 290, LOWERED),)


def test_where_a_frozen_board_draws_too_much_the_miner_stops() -> None:
    assert RequeueJob(1, SHED) in actions(site(miner(1), budget_w=100))


def test_who_may_not_be_frozen_is_stopped() -> None:
    power = site(miner(1), budget_w=150)
    assert RequeueJob(1, SHED) in actions(replace(power, frozen_w={}))
    kept = replace(power.world.job(1), preemptible=False)
    made = actions(replace(power, world=W(jobs=(kept,), gpus=gpus(1))))
    assert made == (SetPowerLimit("GPU-0", 200, LOWERED),)


def test_mining_is_frozen_before_batch_is_and_nobody_is_stopped_for_that() -> None:
    batch = running(2, "GPU-1", job_class=BATCH, value=50_000)
    made = actions(site(miner(1), batch, budget_w=400))
    assert SuspendJob(1, SHED) in made
    assert not [action for action in made if isinstance(action, RequeueJob | SuspendJob) and action.job == 2]


def test_a_job_within_its_minimum_runtime_may_be_frozen_but_not_stopped() -> None:
    young = miner(1, ran_s=1, min_runtime_us=60_000_000)
    assert SuspendJob(1, SHED) in actions(site(young, budget_w=150))


def test_a_board_whose_limit_may_not_be_lowered_keeps_it_while_it_is_frozen() -> None:
    replica = running(1, "GPU-0", job_class=INFERENCE, value=4_000_000, restart_loss_us=3600 * SECOND_US)
    assert actions(site(replica, budget_w=150)) == (SuspendJob(1, SHED),)


def test_nobody_returns_while_draws_are_on_their_way_to_a_lower_budget() -> None:
    power = site(miner(1), frozen=(1,))
    assert not [one for one in actions(replace(power, lead_milli=50)) if isinstance(one, ResumeJob)]


def test_a_shared_board_is_frozen_only_if_all_on_it_may_be() -> None:
    shares = [replace(miner(number), on=("GPU-0",), share_milli=500) for number in (1, 2)]
    power = replace(site(*shares, budget_w=200), natural_w={1: 150, 2: 150})
    power = replace(power, world=replace(power.world, gpus=gpus(1)))
    assert {SuspendJob(1, SHED), SuspendJob(2, SHED)} <= set(actions(power))
    assert not [one for one in actions(replace(power, frozen_w={1: 130})) if isinstance(one, SuspendJob)]


def test_a_plan_that_was_carried_out_leaves_nothing_to_do() -> None:
    power = site(miner(1), miner(2), budget_w=380)
    made = plan(snapshot(power), Policy())
    assert [one for one in made.actions if isinstance(one, SuspendJob)]
    assert actions(applied(power, made)) == ()


def test_who_is_told_and_not_frozen_yet_counts_with_his_limit() -> None:
    """What he leaves is there for others once the launcher has said that nothing of it runs."""
    other = running(2, "GPU-1", job_class=TRAINING, value=2_000_000)
    power = replace(site(miner(1), other, budget_w=480), suspend_us={1: NOW_US})
    power = replace(power, boards={"GPU-0": B(limit_w=200), "GPU-1": B(limit_w=200)})
    assert actions(power) == (SetPowerLimit("GPU-1", 280, RAISED),)
    frozen = W(jobs=(replace(miner(1), state=SUSPENDED), other), gpus=gpus(2))
    assert actions(replace(power, world=frozen)) == (SetPowerLimit("GPU-1", 330, RAISED),)
    back = replace(power, world=frozen, suspend_us={})  # it was told to run, and is about to
    assert SetPowerLimit("GPU-1", 280, RAISED) in actions(back)


def test_when_the_watts_are_there_again_it_runs_and_its_limit_rises() -> None:
    made = actions(site(miner(1), frozen=(1,)))
    assert made == (SetPowerLimit("GPU-0", 330, RAISED), ResumeJob(1, RESUMED))


def test_the_most_valuable_runs_first_and_nobody_beyond_the_budget() -> None:
    cheap, dear = miner(1), miner(2, value=60_000)
    power = site(cheap, dear, frozen=(1, 2), budget_w=400)
    assert [one for one in actions(power) if isinstance(one, ResumeJob)] == [ResumeJob(2, RESUMED)]
    assert not [one for one in actions(replace(power, budget_w=320)) if isinstance(one, ResumeJob)]


def test_it_waits_until_others_limits_have_fallen() -> None:
    """Limits first: what is still allowed to others is not there for who returns."""
    other = running(2, "GPU-1", job_class=TRAINING, value=2_000_000)
    power = site(miner(1), other, frozen=(1,), budget_w=640)
    power = replace(power, boards={"GPU-0": B(limit_w=200), "GPU-1": B(limit_w=500)})
    made = actions(power)
    assert not [one for one in made if isinstance(one, ResumeJob)]
    assert SetPowerLimit("GPU-1", 330, LOWERED) in made or SetPowerLimit("GPU-1", 300, LOWERED) in made


def test_nobody_runs_again_before_he_was_frozen_for_a_while() -> None:
    power = replace(site(miner(1), frozen=(1,)), suspend_us={1: LONG_US + 1})
    made = plan(snapshot(power), Policy())
    assert made.actions == ()
    assert made.wake_us == NOW_US + 1


def test_a_clock_that_was_set_back_keeps_nobody_frozen() -> None:
    power = replace(site(miner(1), frozen=(1,)), suspend_us={1: NOW_US + 3600 * SECOND_US})
    assert ResumeJob(1, RESUMED) in actions(power)


def test_a_frozen_job_is_preempted_for_its_memory_by_whoever_needs_the_gpu() -> None:
    wanted = J(5, job_class=INFERENCE, gpus=1)
    power = site(miner(1), frozen=(1,))
    made = actions(replace(power, world=W(jobs=(*power.world.jobs, wanted), gpus=gpus(1))))
    assert [type(one) for one in made if getattr(one, "job", 0) == 1] == [PreemptJob]


def test_nobody_is_frozen_for_a_start() -> None:
    """A start that would freeze somebody waits, or stops whom it outranks."""
    equal = J(5, job_class=MINING, value=50_000, gpus=1, restart_loss_us=3600 * SECOND_US)
    world = W(jobs=(miner(1), equal), gpus=gpus(2))
    power = replace(
        site(miner(1), budget_w=400), world=world, natural_w={1: 300, 5: 300}, frozen_w={1: 130, 5: 130}
    )
    assert actions(power) == ()


def test_who_is_on_his_way_back_is_not_told_again() -> None:
    power = replace(site(miner(1), frozen=(1,)), suspend_us={})
    assert not [one for one in actions(power) if isinstance(one, SuspendJob | ResumeJob)]


def test_a_floor_counts_a_stop_that_is_in_time_and_no_freeze() -> None:
    def floor(power: P, lead_s: int) -> int:
        return floor_w(snapshot(power), NOW_US + lead_s * SECOND_US, emergency=False)

    young = miner(1, ran_s=1, min_runtime_us=60 * SECOND_US, grace_us=2 * SECOND_US)
    for power in (site(young), site(young, frozen=(1,))):
        assert floor(power, 61) == 70, "it can have stopped by then"
        assert floor(power, 30) == 200, "it may be woken, and draw that"
