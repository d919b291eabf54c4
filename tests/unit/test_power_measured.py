"""A shed is done when the measured watts say so: what can't be measured is never taken for little."""

import asyncio
from pathlib import Path

from scheduler.control.inbox import OfferGridEvent, Requeue, SetPowerBudget
from scheduler.control.power import LEAD_RATIO
from scheduler.control.sheds import GRACE_RATIO_MIN
from scheduler.model.actions import StartJob
from scheduler.model.jobs import JobClass, JobState
from scheduler.model.power import BudgetInterval, GridEvent, ShedState
from scheduler.model.reasons import Reason
from scheduler.model.settings import Config, PowerConfig, SamplingConfig
from scheduler.simulation.faults import Faults
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.harness.simulated import SimulatedNode

EACH_SECOND = Config(sampling=SamplingConfig(period_s=1.0))
BUDGET = Config(sampling=SamplingConfig(period_s=5.0), power=PowerConfig(budget_w=600.0))
NOTHING_AT_ALL = GridEvent("e", EPOCH_S, EPOCH_S + 60.0, 0.0, emergency=True, accepted_s=EPOCH_S)


def shed_of(tmp_path: Path, faults: Faults) -> GridEvent:
    """What became of an emergency that nobody can meet: even idle boards draw."""
    found: list[GridEvent] = []

    async def story() -> None:
        node = SimulatedNode(tmp_path, lambda _: Workload(), config=EACH_SECOND, wrap=faults.wrap)
        await node.daemon.start()
        await node.daemon.ask(OfferGridEvent(NOTHING_AT_ALL))
        await asyncio.sleep(20.0)
        found.extend(node.daemon.controller.ledger.power.events)
        node.daemon.stop()

    run(story())
    return found[0]


def test_boards_that_draw_too_much_fail_a_shed(tmp_path: Path) -> None:
    failed = shed_of(tmp_path, Faults())
    assert (failed.state, failed.measured_w) == (ShedState.FAILED, 70.0)


def test_a_driver_that_has_not_answered_yet_meets_no_shed(tmp_path: Path) -> None:
    failed = shed_of(tmp_path, Faults(is_driver_hanging=True))
    assert (failed.state, failed.measured_w) == (ShedState.FAILED, None)
    assert failed.reasons == ("no GPU can be read: ERROR_TIMEOUT",)


def test_a_board_of_which_nothing_is_known_counts_as_those_of_its_model_do(tmp_path: Path) -> None:
    async def story() -> None:
        node = SimulatedNode(tmp_path, lambda _: Workload(), gpus=2, config=EACH_SECOND)
        await node.daemon.start()
        power, first = node.daemon.controller.power, next(iter(node.machine.boards))
        assert idle_w(node) == [100, 100]
        node.machine.intrude(first)
        await asyncio.sleep(15.0)
        assert power.is_active is False
        assert idle_w(node)[1] == 70, "seen empty"
        for pid in list(node.machine.strangers):
            node.machine.leave(pid)
        await asyncio.sleep(5.0)
        assert idle_w(node) == [70, 70], "the first has not been empty for long enough"
        node.daemon.stop()

    run(story())


def test_a_clock_that_was_set_back_makes_no_limit_be_set_again_and_again(tmp_path: Path) -> None:
    """The last reading seems to be younger than the answer of the board until the next one comes."""

    async def story() -> None:
        node = SimulatedNode(tmp_path, lambda _: Workload(draw_w=300.0), config=BUDGET)
        await node.daemon.start()
        await node.submit(job_class=JobClass.MINING)
        await asyncio.sleep(7.5)
        node.machine.clock.step_s -= 86_400.0
        head = node.daemon.journal.head
        await node.daemon.ask(SetPowerBudget((BudgetInterval(0.0, None, 500.0),)))
        await asyncio.sleep(0.5)
        (board,) = node.machine.boards.values()
        assert board.power_limit_w == 500.0 * (1.0 - LEAD_RATIO)
        assert node.daemon.journal.head - head < 10
        node.daemon.stop()

    run(story())


def test_a_clock_that_was_set_back_keeps_no_board_from_being_seen_empty(tmp_path: Path) -> None:
    async def story() -> None:
        node = SimulatedNode(tmp_path, lambda _: Workload(), config=EACH_SECOND)
        await node.daemon.start()
        await asyncio.sleep(5.0)
        node.machine.clock.step_s -= 86_400.0
        await asyncio.sleep(15.0)
        assert idle_w(node) == [70]
        node.daemon.stop()

    run(story())


def idle_w(node: SimulatedNode) -> list[int]:
    controller = node.daemon.controller
    snapshot = controller.board.snapshot(controller.effects.clock.now_s(), controller.power.columns)
    assert snapshot.power is not None
    return [int(watts) for watts in snapshot.power.idle_w]


def test_no_start_makes_an_event_unreachable_that_was_accepted_for_later(tmp_path: Path) -> None:
    """No budget holds until then, and no limit is touched."""

    async def story() -> None:
        node = SimulatedNode(tmp_path, lambda _: Workload(draw_w=600.0), gpus=4)
        await node.daemon.start()
        now_s = node.machine.clock.now_s()
        event = GridEvent("later", now_s + 3600.0, now_s + 7200.0, 700.0, False, now_s, now_s)
        await node.daemon.ask(OfferGridEvent(event))
        for _ in range(4):
            await node.submit(job_class=JobClass.TRAINING, preemptible=False, draw_w=600.0)
        await asyncio.sleep(3.0)
        controller = node.daemon.controller
        jobs = sorted(controller.ledger.jobs.values(), key=lambda job: job.number)
        assert [job.state for job in jobs] == [JobState.RUNNING] * 3 + [JobState.PENDING]
        assert controller.reason(jobs[3]) is Reason.WAITING_FOR_POWER
        assert {board.power_limit_w for board in node.machine.boards.values()} == {700.0}
        floor_w, _ = controller.power.reachable(now_s, event.start_s, emergency=False)
        assert floor_w <= event.budget_w
        node.daemon.stop()

    run(story())


def graces_in_an_emergency(tmp_path: Path, above_floor_w: float) -> list[float]:
    """Of the jobs on four boards, one of which was told to go before it; all ignore it until they are killed.

    By notice; of the one that was told before, what it was left after the receipt.
    """
    found: list[float] = []

    async def story() -> None:
        node = SimulatedNode(
            tmp_path, lambda _: Workload(draw_w=600.0, stop_s=None), gpus=4, config=EACH_SECOND
        )
        await node.daemon.start()
        await asyncio.sleep(15.0)  # idle draw is known
        ids = [await node.submit(job_class=JobClass.TRAINING, draw_w=600.0, grace_s=60.0) for _ in range(4)]
        await asyncio.sleep(5.0)
        await node.daemon.ask(Requeue(ids[0]))
        await asyncio.sleep(5.0)
        now_s = node.machine.clock.now_s()
        floor_w, _ = node.daemon.controller.power.reachable(now_s, now_s, emergency=True)
        event = GridEvent("e", now_s, now_s + 60.0, floor_w + above_floor_w, True, now_s, now_s)
        await node.daemon.ask(OfferGridEvent(event))
        told = [notice for job_id in ids[1:] if (notice := node.job(job_id).attempts[0].notice)]
        found.extend(round(notice.deadline_s - notice.decided_s, 3) for notice in told)
        await asyncio.sleep(5.0)
        ended_s = node.job(ids[0]).attempts[0].exited_s
        assert ended_s is not None
        found.append(round(ended_s - now_s, 2))
        node.daemon.stop()

    run(story())
    return found


def test_an_emergency_leaves_its_graces_unless_the_target_is_so_near_the_floor_that_draws_would_settle_late(
    tmp_path: Path,
) -> None:
    grace_s = EACH_SECOND.power.emergency_grace_s
    roomy = graces_in_an_emergency(tmp_path / "roomy", 400.0)
    assert set(roomy) == {grace_s}
    near = graces_in_an_emergency(tmp_path / "near", 80.0)
    assert len(near) == 4
    assert all(GRACE_RATIO_MIN * grace_s < given_s < grace_s for given_s in near)
    at_floor = graces_in_an_emergency(tmp_path / "floor", 0.0)
    assert set(at_floor) == {GRACE_RATIO_MIN * grace_s}


def test_an_interval_that_somebody_stops_for_is_kept_from_its_first_moment(tmp_path: Path) -> None:
    """Whom it takes is told so early that his grace and the draw's way down are over when it begins."""
    grace_s, lead_s = 10.0, 40.0

    async def story() -> None:
        node = SimulatedNode(
            tmp_path, lambda _: Workload(draw_w=600.0, stop_s=None), gpus=2, config=EACH_SECOND
        )
        await node.daemon.start()
        await asyncio.sleep(15.0)  # idle draw is known
        ids = [
            await node.submit(
                job_class=JobClass.BATCH, draw_w=600.0, grace_s=grace, value_microusd_per_gpu_hour=value
            )
            for grace, value in ((grace_s, 100_000), (60.0, 4_000_000))
        ]
        start_s = node.machine.clock.now_s() + lead_s
        told = (BudgetInterval(start_s, start_s + 60.0, 700.0), BudgetInterval(start_s + 60.0, None, 1400.0))
        await node.daemon.ask(SetPowerBudget(told))
        await asyncio.sleep(lead_s - grace_s - 3.0)
        assert [node.state(job_id) for job_id in ids] == [JobState.RUNNING] * 2, "not before it must be"
        assert node.daemon.controller.power.budget.in_force_w is None
        await asyncio.sleep(grace_s + 3.0)
        now_s = node.machine.clock.now_s()
        assert sum(board.sample(now_s).power_w or 0.0 for board in node.machine.boards.values()) <= 700.0
        (notice,) = [notice for job_id in ids for one in node.job(job_id).attempts if (notice := one.notice)]
        assert notice.reason is Reason.SHED_FOR_POWER
        assert 0.0 <= start_s - notice.deadline_s <= 2.5
        node.daemon.stop()

    run(story())


def test_a_plan_that_only_keeps_a_promise_sets_no_limit_that_is_being_given_back(tmp_path: Path) -> None:
    at_once = PowerConfig(return_jitter_s=0.0, return_w_per_s=1e9)
    config = Config(sampling=SamplingConfig(period_s=60.0), power=at_once)

    async def story() -> None:
        node = SimulatedNode(tmp_path, lambda _: Workload(draw_w=600.0), gpus=2, config=config)
        await node.daemon.start()
        controller, now_s = node.daemon.controller, node.machine.clock.now_s()
        await node.daemon.ask(
            OfferGridEvent(GridEvent("later", now_s + 3600.0, now_s + 7200.0, 500.0, False, now_s, now_s))
        )
        await node.submit(job_class=JobClass.MINING, draw_w=600.0)
        await node.daemon.ask(SetPowerBudget((BudgetInterval(0.0, None, 500.0),)))
        await asyncio.sleep(70.0)
        assert min(board.power_limit_w for board in node.machine.boards.values()) < 500.0
        await node.daemon.ask(SetPowerBudget(()))
        await asyncio.sleep(2.0)
        assert not controller.power.is_active
        await node.submit(job_class=JobClass.BATCH, draw_w=600.0)
        assert controller.last_plan is not None
        assert [type(action) for action in controller.last_plan.actions] == [StartJob]
        await asyncio.sleep(120.0)
        assert {board.power_limit_w for board in node.machine.boards.values()} == {700.0}
        node.daemon.stop()

    run(story())
