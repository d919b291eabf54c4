"""What control learns of draws, and what it makes of sources, as values: no daemon."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.control.budget import Budget
from scheduler.control.draws import READINGS_MIN, Draws
from scheduler.control.inbox import LimitSet
from scheduler.control.limits import Limits
from scheduler.control.meters import Meters
from scheduler.model.actions import SetPowerLimit
from scheduler.model.gpus import GpuIdentity, GpuLimit, GpuSample
from scheduler.model.jobs import Job, JobClass, JobState
from scheduler.model.policy import Policy
from scheduler.model.power import BudgetInterval, BudgetKind, GridEvent, LimitKept, PowerState, ShedState
from scheduler.model.power_events import GridEventMoved, LimitsDecided, folded
from scheduler.model.reasons import Reason
from scheduler.model.settings import ChangedLimits, PowerConfig, StandingJob

NOTHING = PowerState()
SPEC = StandingJob("miner", ("/bin/true",)).spec(Policy())
JOB = Job("j1", 1, SPEC, "", 0.0, JobState.RUNNING, Reason.PROCESS_STARTED, 0.0, 1)
GPU = GpuIdentity("GPU-1", 0, "H100", 80_000, power_limit_w_min=200.0, power_limit_w_max=700.0)


class FakeLedger:
    """Folds power's events as the ledger does."""

    def __init__(self, power: PowerState = NOTHING) -> None:
        self.power = power
        self.events: list[Any] = []

    def apply(self, event: Any) -> None:
        self.events.append(event)
        self.power = folded(self.power, event)


def fed(
    draws: Draws, job: Job, watts: float, limit_w: float = 700.0, times: int = READINGS_MIN
) -> float | None:
    for at in range(times):
        if draws.see(job, GpuSample("GPU-1", float(at), power_w=watts), limit_w):
            draws.learn(draws.news([job]))
    return draws.natural_w(job)


# Draws ------------------------------------------------------------------------------------------


def test_a_draw_is_learned_from_enough_readings_and_its_class_with_it() -> None:
    draws = Draws(PowerState())
    assert fed(draws, JOB, 400.0, times=READINGS_MIN - 1) is None
    assert fed(draws, JOB, 400.0) == 400.0
    assert draws.natural_w(replace(JOB, id="j2")) == 400.0
    training = replace(JOB, id="j3", spec=replace(SPEC, job_class=JobClass.TRAINING))
    assert draws.natural_w(training) is None


def test_what_was_declared_counts_unless_more_is_seen() -> None:
    declared = replace(JOB, spec=replace(SPEC, draw_w=300.0))
    draws = Draws(PowerState())
    assert fed(draws, declared, 200.0) == 300.0
    assert fed(draws, declared, 320.0, times=200) == 320.0


def test_a_job_at_a_limit_that_was_to_be_enough_is_thought_to_want_more() -> None:
    draws = Draws(PowerState(draws_w={"j1": 300.0}))
    assert fed(draws, JOB, 329.0, limit_w=330.0) == 330.0 * 1.1


def test_a_job_whose_limit_was_lowered_on_purpose_teaches_nothing() -> None:
    draws = Draws(PowerState(draws_w={"j1": 300.0}))
    assert fed(draws, JOB, 210.0, limit_w=210.0) == 300.0
    assert fed(draws, JOB, 300.0, limit_w=300.0) == 300.0, "its margin alone was taken"


@pytest.mark.parametrize(("watts", "wanted_w"), [(300.0, 300.0), (302.0, 300.0), (305.5, 306.0 * 1.1)])
def test_a_limit_with_little_margin_tells_who_draws_as_ever_from_who_is_held_back(
    watts: float, wanted_w: float
) -> None:
    draws = Draws(PowerState(draws_w={"j1": 300.0}))
    assert fed(draws, JOB, watts, limit_w=306.0, times=200) == wanted_w


def test_a_flicker_is_no_news() -> None:
    draws = Draws(PowerState())
    fed(draws, JOB, 400.0)
    fed(draws, JOB, 405.0, times=200)
    assert draws.natural_w(JOB) == 400.0


def test_what_was_learned_of_a_job_goes_with_it() -> None:
    draws = Draws(PowerState(draws_w={"j1": 300.0, "MINING": 310.0}))
    assert draws.gone({"j2"}) == {"j1": 0.0}
    draws.learn(draws.gone({"j2"}))
    assert draws.natural_w(JOB) == 310.0


# Budgets ----------------------------------------------------------------------------------------


def budget_at(config: PowerConfig, state: PowerState, now_s: float, **more: float) -> Budget:
    budget = Budget(FakeLedger(state), "node")  # type: ignore[arg-type]
    budget.advance(config, now_s, more.get("most_w", 1e6))
    return budget


def event(budget_w: float, **fields: Any) -> GridEvent:
    said = {"start_s": 100.0, "end_s": 200.0, "emergency": False, "accepted_s": 0.0}
    return GridEvent(id="e", budget_w=budget_w, **{**said, **fields})


def test_the_tightest_source_wins() -> None:
    state = PowerState(
        budget=(BudgetInterval(0.0, 150.0, 900.0), BudgetInterval(140.0, None, 800.0)), events=(event(850.0),)
    )
    config = PowerConfig(budget_w=1000.0)
    assert [budget_at(config, state, at).in_force_w for at in (50.0, 120.0, 145.0, 250.0)] == [
        900,
        850,
        800,
        800,
    ]
    assert budget_at(config, PowerState(), 0.0).in_force_w == 1000
    assert budget_at(PowerConfig(), PowerState(), 0.0).in_force_w is None


def test_an_event_binds_from_the_begin_of_its_shed_to_its_end() -> None:
    def in_force(at_s: float, **fields: Any) -> float | None:
        return budget_at(PowerConfig(), PowerState(events=(event(500.0, **fields),)), at_s).in_force_w

    assert [in_force(at_s) for at_s in (99.0, 100.0, 199.0, 200.0)] == [None, 500, 500, None]
    assert in_force(95.0, shed_began_s=90.0) == 500
    assert in_force(150.0, state=ShedState.CANCELLED) is None


def test_a_lost_signal_leaves_the_safe_level_and_the_configured_one() -> None:
    state = PowerState(budget=(BudgetInterval(0.0, None, 2000.0),), budget_valid_until_s=10.0)
    config = PowerConfig(budget_w=1000.0, safe_budget_w=600.0)
    assert budget_at(config, state, 9.0).in_force_w == 1000
    lost = budget_at(config, state, 10.0)
    assert (lost.in_force_w, lost.tightest and lost.tightest.kind) == (600, BudgetKind.SAFE)
    assert budget_at(PowerConfig(budget_w=1000.0), state, 10.0).in_force_w == 1000


def test_watts_come_back_after_a_moment_of_the_nodes_own_and_at_the_rate_that_is_set() -> None:
    config = PowerConfig(budget_w=1000.0, return_w_per_s=10.0, return_jitter_s=8.0)
    ledger = FakeLedger(PowerState(events=(event(500.0),)))
    budget = Budget(ledger, "node")  # type: ignore[arg-type]
    for at in range(100, 400):
        budget.advance(config, float(at), 1e6)
        if at < 200:
            assert budget.in_force_w == 500
        elif at == 200:
            began_s = ledger.power.return_began_s
            assert 200 <= began_s <= 208
        elif budget.in_force_w != 1000:
            assert budget.in_force_w == 500 + 10 * max(0.0, at - began_s)
    assert budget.in_force_w == 1000
    assert ledger.power.returned_from_w is None
    budget.advance(PowerConfig(budget_w=300.0), 401.0, 1e6)
    assert budget.in_force_w == 300, "down is at once"


def test_a_budget_that_comes_back_lasts_until_all_of_it_is_there() -> None:
    config = PowerConfig(budget_w=1000.0, return_w_per_s=10.0)
    state = PowerState(events=(event(500.0),))
    assert budget_at(config, state, 150.0).until_s == 200
    assert budget_at(config, PowerState(), 150.0).until_s is None
    returning = PowerState(returned_from_w=500.0, return_began_s=205.0)
    assert budget_at(config, returning, 210.0).until_s == 255


def test_a_return_goes_on_after_a_restart() -> None:
    config = PowerConfig(budget_w=1000.0, return_w_per_s=10.0)
    state = PowerState(returned_from_w=500.0, return_began_s=100.0)
    assert budget_at(config, state, 120.0).in_force_w == 700


# Events and limits ------------------------------------------------------------------------------


def test_an_events_shed_is_told_from_its_begin_to_its_end() -> None:
    state = PowerState(events=(event(500.0),))
    for to, at_s in ((ShedState.SHEDDING, 99.0), (ShedState.MET, 100.5)):
        state = folded(state, GridEventMoved(at_s, "e", to, measured_w=480.0))
    (met,) = folded(state, GridEventMoved(200.0, "e", ShedState.MET, is_over=True)).events
    assert (met.shed_began_s, met.shed_ended_s, met.measured_w) == (99.0, 100.5, 480.0)
    assert (met.state, met.binds) == (ShedState.MET, False)


class World:
    """A board and what limits are asked of it."""

    def __init__(self, power: PowerState = NOTHING, changed: ChangedLimits = ChangedLimits.RESPECT) -> None:
        self.ledger = FakeLedger(power)
        self.board = SimpleNamespace(samples={}, identities=(GPU,), row={"GPU-1": 0})
        self.config = SimpleNamespace(power=PowerConfig(changed_limits=changed))
        self.meters = Meters()
        self.problems: dict[str, str] = {}
        self.spawned: list[Any] = []
        self.limits = Limits(self)  # type: ignore[arg-type]

    def spawn(self, work: Any) -> None:
        self.spawned.append(work)
        work.close()

    def sampled(self, watts: float, at_s: float) -> None:
        sample = GpuSample("GPU-1", at_s, power_w=100.0, power_limit_w=watts)
        self.board.samples["GPU-1"] = sample
        self.limits.read(sample, at_s)

    def order(self, watts: int) -> None:
        self.limits.order([SetPowerLimit("GPU-1", watts, Reason.POWER_LIMIT_LOWERED)], 1.0)


def test_a_board_gets_one_order_after_the_other_and_the_last_one_stays() -> None:
    world = World()
    world.sampled(650.0, 0.0)
    for watts in (200, 280, 290):
        world.order(watts)
        world.limits.send()
    assert len(world.spawned) == 1, "two on their way could arrive in any order"
    first = LimitSet("GPU-1", 200.0, GpuLimit(200.0, 200.0))
    world.limits.answered(first, 2.0)
    assert len(world.spawned) == 2
    world.limits.answered(first, 2.0)  # again, of a tick that was not kept
    world.sampled(200.0, 2.5)
    assert not world.problems, "what is on its way is ours"
    assert world.limits.in_force_w(GPU) == 290.0
    world.limits.answered(LimitSet("GPU-1", 290.0, GpuLimit(290.0, 290.0)), 3.0)
    world.sampled(290.0, 3.5)
    assert len(world.spawned) == 2
    assert world.limits.in_force_w(GPU) == 290.0
    assert not world.problems


def test_a_limit_is_journalled_with_what_was_found_before_it_is_set() -> None:
    world = World()
    world.sampled(650.0, 0.0)
    world.order(300)
    assert isinstance(world.ledger.events[0], LimitsDecided)
    assert world.ledger.power.limits == {"GPU-1": LimitKept(650.0, 300.0)}
    assert not world.spawned
    world.limits.send()
    assert len(world.spawned) == 1
    assert world.limits.in_force_w(GPU) == 650.0, "it counts as before until the board has answered"
    world.limits.answered(LimitSet("GPU-1", 300.0, GpuLimit(300.0, 300.0)), 2.0)
    assert world.limits.in_force_w(GPU) == 300.0
    assert world.limits.range_w(GPU) == (200.0, 650.0), "never more than what was found"


def test_a_rising_limit_counts_from_the_moment_it_is_asked_for() -> None:
    world = World(PowerState(limits={"GPU-1": LimitKept(700.0, 300.0)}))
    world.sampled(300.0, 0.0)
    world.order(600)
    world.limits.send()
    assert world.limits.in_force_w(GPU) == 600.0


def test_a_tick_that_was_not_kept_sets_nothing() -> None:
    world = World()
    world.sampled(700.0, 0.0)
    world.order(300)
    world.limits.clear()
    world.limits.send()
    assert not world.spawned


def test_a_board_that_refuses_is_counted_as_it_is_and_asked_again_later() -> None:
    world = World()
    world.sampled(700.0, 0.0)
    world.order(300)
    world.limits.send()
    world.limits.answered(LimitSet("GPU-1", 300.0, None, "ERROR_NO_PERMISSION", "not root"), 2.0)
    assert world.limits.range_w(GPU) == (700.0, 700.0)
    assert world.limits.refusals == {"GPU-1": "not root"}
    world.sampled(700.0, 8.0)
    assert world.limits.range_w(GPU) == (200.0, 700.0)


def test_a_limit_that_somebody_else_lowered_is_reported_and_respected() -> None:
    world = World(PowerState(limits={"GPU-1": LimitKept(700.0, 500.0)}))
    world.sampled(400.0, 1.0)
    assert "somebody else changed it; theirs is respected" in world.problems["power_limit GPU-1"]
    assert world.limits.range_w(GPU) == (200.0, 400.0)
    assert world.meters.power_limits_changed == 1
    world.sampled(400.0, 2.0)
    assert world.meters.power_limits_changed == 1, "told once"


def test_a_limit_that_somebody_else_changed_is_set_again_where_the_policy_says_so() -> None:
    world = World(PowerState(limits={"GPU-1": LimitKept(700.0, 500.0)}), ChangedLimits.REASSERT)
    world.sampled(400.0, 1.0)
    assert "ours is set again" in world.problems["power_limit GPU-1"]
    assert world.limits.range_w(GPU) == (200.0, 700.0)


def test_a_driver_that_was_loaded_anew_is_nobody_else() -> None:
    world = World(PowerState(limits={"GPU-1": LimitKept(700.0, 500.0)}))
    world.sampled(700.0, 1.0)
    assert not world.problems
