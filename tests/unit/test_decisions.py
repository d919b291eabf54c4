"""A daemon's decisions can be made again from its journal; a changed planner, policy or journal shows."""

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scheduler.cli import main
from scheduler.cli.exit_codes import ExitCode
from scheduler.control import loop
from scheduler.control.inbox import Cordon, Drain, OfferGridEvent, SetPowerBudget, SetPrices, Undrain
from scheduler.effects.journal_file import DATABASE_NAME
from scheduler.effects.journal_verify import verify
from scheduler.errors import JournalCorrupt
from scheduler.model.actions import FailJob
from scheduler.model.jobs import JobClass, JobState
from scheduler.model.policy import Order, Policy
from scheduler.model.power import BudgetInterval, GridEvent
from scheduler.model.prices import PricePoint
from scheduler.model.reasons import Reason
from scheduler.model.settings import Config, SamplingConfig, StandingJob, StateConfig
from scheduler.planning.planner import plan
from scheduler.simulation import decisions as replays
from scheduler.simulation.decisions import Decision, Decisions, Deed
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.harness.simulated import SimulatedNode

CONFIG = Config(
    sampling=SamplingConfig(period_s=1.0), standing_jobs=(StandingJob("miner", ("mine", "coins")),)
)
BY_VALUE = Policy(order=Order.VALUE)


class World(SimulatedNode):
    def __init__(self, tmp_path: Path, config: Config = CONFIG, gpus: int = 4) -> None:
        super().__init__(tmp_path, lambda _: Workload(duration_s=40.0, stop_s=1.0), gpus=gpus, config=config)

    def set_policy(self, policy: Policy) -> None:
        """As SIGHUP does."""
        self.daemon.config = replace(self.daemon.config, policy=policy)
        self.daemon.controller.reload(self.daemon.config)


def played(tmp_path: Path, story: Callable[[World], Awaitable[None]], **options: Any) -> None:
    """A story of a daemon, which ends in good order."""

    async def whole() -> None:
        world = World(tmp_path, **options)
        await world.daemon.start()
        await story(world)
        world.daemon.stop()

    run(whole())


async def everything(world: World) -> None:
    """Preemptions, prices, a budget, an emergency, a drain, other policies, a crash and a power loss."""
    ask = world.daemon.ask
    await asyncio.sleep(5.0)
    await ask(SetPrices((PricePoint(EPOCH_S, 0.3), PricePoint(EPOCH_S + 10.0, 0.01))))
    await asyncio.sleep(10.0)
    for number in range(6):
        await world.submit(
            job_class=(JobClass.TRAINING, JobClass.BATCH)[number % 2],
            gpus=1 + number % 3,
            expected_duration_s=40.0,
        )
        await asyncio.sleep(3.0)
    await asyncio.sleep(20.0)
    await ask(SetPowerBudget((BudgetInterval(EPOCH_S, None, 1500.0),)))
    await world.submit(job_class=JobClass.INFERENCE, gpus=2, preemptible=False)
    await asyncio.sleep(10.0)
    world.daemon.crash()
    await world.daemon.start()
    await asyncio.sleep(10.0)
    world.set_policy(BY_VALUE)
    await world.submit(job_class=JobClass.BATCH, gpus=4, value_microusd_per_gpu_hour=90_000_000)
    await asyncio.sleep(10.0)
    now_s = world.daemon.controller.effects.clock.now_s()
    await ask(OfferGridEvent(GridEvent("e", now_s, now_s + 20.0, 500.0, True, now_s)))
    await asyncio.sleep(40.0)
    await ask(SetPowerBudget(()))
    await ask(Cordon("0", "a fan"))
    await asyncio.sleep(10.0)
    world.daemon.reboot()
    await world.daemon.start()
    await asyncio.sleep(20.0)
    await ask(Drain(stop_jobs=True))
    await asyncio.sleep(5.0)
    await ask(Undrain())
    world.set_policy(replace(BY_VALUE, hysteresis_ratio=0.0))
    await asyncio.sleep(60.0)


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a daemon to which everything happened; tests that change it take a copy."""
    directory = tmp_path_factory.mktemp("eventful")
    played(directory, everything)
    return directory


def copied(journal: Path, directory: Path) -> Path:
    with closing(sqlite3.connect(journal / DATABASE_NAME)) as db:
        db.execute("VACUUM INTO ?", (str(directory / DATABASE_NAME),))
    return directory


def again(journal: Path, other: Policy | None = None) -> list[Decision]:
    return list(Decisions(journal, other).again())


def test_every_decision_of_an_eventful_life_is_the_same_again(eventful: Path) -> None:
    found = again(eventful)
    assert len(found) > 20
    assert [decision.event for decision in found if not decision.is_same] == []
    kinds = {deed.action for decision in found for _, deed in decision.deeds}
    assert kinds == {"START", "PREEMPT", "REQUEUE", "LIMIT"}
    reasons = {deed.reason for decision in found for _, deed in decision.deeds}
    assert {Reason.PREEMPTED_BY_HIGHER_RANK, Reason.STOPPED_FOR_PRICE, Reason.NODE_DRAINED} <= reasons
    assert reasons & {Reason.SHED_FOR_POWER, Reason.SHED_IN_EMERGENCY}


def test_what_jobs_said_makes_the_columns_that_the_plans_had(eventful: Path) -> None:
    """Else what is shown of another policy would be our mistake."""
    decisions = Decisions(eventful)
    with pytest.MonkeyPatch.context() as patch:
        made = replays.plan
        seen: list[tuple[Any, Any]] = []

        def spied(snapshot: Any, policy: Policy) -> Any:
            seen.append((snapshot, policy))
            return made(snapshot, policy)

        patch.setattr(replays, "plan", spied)
        inputs = []
        read = replays.inputs_of
        patch.setattr(replays, "inputs_of", lambda frame: inputs.append(read(frame)) or inputs[-1])
        list(decisions.again())
    assert len(seen) == len(inputs) > 20
    for (snapshot, policy), one in zip(seen, inputs, strict=True):
        same = replays.under(one, policy, policy)
        assert same.jobs.priority.tolist() == snapshot.jobs.priority.tolist()
        assert same.jobs.value.tolist() == snapshot.jobs.value.tolist()
        assert same.power is None or same.power.curves == snapshot.power.curves
    assert any(one.said.preemptions.any() for one in inputs)
    assert any(policy.order is Order.VALUE for _, policy in seen)


def test_a_planner_that_was_changed_is_noticed(eventful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the least that can differ: the moment at which it would plan again."""

    def changed(snapshot: Any, policy: Policy) -> Any:
        made = plan(snapshot, policy)
        return made if made.wake_us is None else replace(made, wake_us=made.wake_us + 1)

    monkeypatch.setattr(replays, "plan", changed)
    found = again(eventful)
    different = [decision for decision in found if not decision.is_same]
    assert 0 < len(different) < len(found)


def test_beside_another_policy_each_shows_what_it_does_with_whom(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.submit(job_class=JobClass.TRAINING, value_microusd_per_gpu_hour=1_400_000)  # j1
        await asyncio.sleep(5.0)
        await world.submit(job_class=JobClass.TRAINING, value_microusd_per_gpu_hour=1_500_000)  # j2 waits
        await asyncio.sleep(1.0)
        await world.submit(job_class=JobClass.BATCH, value_microusd_per_gpu_hour=9_000_000)  # j3 waits
        await asyncio.sleep(50.0)

    played(tmp_path, story, config=Config(), gpus=1)
    decisions = Decisions(tmp_path, Policy(order=Order.VALUE))
    found = list(decisions.again())
    (uuid,) = found[0].snapshot.gpus.uuid
    started = Deed("START", (uuid,), reason=Reason.STARTED_ON_FREE_GPUS)
    waits = Deed("WAIT", reason=Reason.WAITING_FOR_GPUS)
    displaced = Deed("PREEMPT", preemptor="j3", reason=Reason.PREEMPTED_BY_HIGHER_RANK)
    # By value j3 would have displaced j1 when it came. When the GPU came free j2 had it, by value j3 would.
    assert [{one.job: (one.then, one.other) for one in decision.otherwise} for decision in found] == [
        {},
        {},
        {"j1": (Deed("NONE"), displaced)},
        {"j2": (started, waits), "j3": (waits, started)},
    ]
    totals = decisions.totals
    assert (totals.decisions, totals.same, totals.otherwise) == (4, 4, 2)
    assert (totals.then, totals.other) == ({"START": 2}, {"START": 2, "PREEMPT": 1})


def test_a_job_that_waits_is_one_decision_and_no_further_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = 0

    def counted(*arguments: Any) -> Any:
        nonlocal plans
        plans += 1
        return plan(*arguments)

    monkeypatch.setattr(loop, "plan", counted)

    async def story(world: World) -> None:
        await world.submit()
        await asyncio.sleep(10.0)
        await world.submit()  # waits
        before = plans
        await asyncio.sleep(15.0)  # readings, each of which wakes the loop
        assert plans == before > 0

    played(tmp_path, story, config=Config(sampling=SamplingConfig(period_s=1.0)), gpus=1)
    assert [[deed.action for _, deed in decision.deeds] for decision in again(tmp_path)] == [["START"], []]


def test_a_policy_that_is_asked_sees_jobs_aged_by_its_own_rule(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.submit(job_class=JobClass.BATCH, priority=400)  # j1, displaced once
        await asyncio.sleep(2.0)
        await world.submit(job_class=JobClass.TRAINING)  # j2
        await asyncio.sleep(10.0)
        await world.submit(job_class=JobClass.BATCH, priority=500)  # j3: before j1, unless j1 has aged
        await asyncio.sleep(40.0)

    played(tmp_path, story, config=Config(), gpus=1)
    quickly = Policy(aging_after_preemptions=1, aging_priority_step=200)
    (told,) = [d.otherwise for d in again(tmp_path, quickly) if d.otherwise]
    assert [(one.job, one.then.action, one.other.action) for one in told] == [
        ("j1", "WAIT", "START"),
        ("j3", "START", "WAIT"),
    ]


def test_a_reason_alone_is_no_other_decision() -> None:
    first = Deed("FAIL", reason=Reason.DEADLINE_MISSED)
    assert first.effect == replace(first, reason=Reason.DEADLINE_UNREACHABLE).effect
    assert first.effect != Deed("STOP", reason=Reason.DEADLINE_MISSED).effect
    assert {FailJob: "FAIL"}[FailJob] == first.action


def test_a_tick_that_was_not_kept_leaves_a_journal_that_replays(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(3.0)
        for failure in ("write", "fsync", "write"):
            world.daemon.disk.failure = failure
            with pytest.raises(Exception, match="nothing was accepted"):
                await world.submit(job_class=JobClass.TRAINING)
            await asyncio.sleep(3.0)
            world.daemon.disk.failure = ""
            await world.submit(job_class=JobClass.TRAINING)
            await asyncio.sleep(5.0)

    played(tmp_path, story)
    decisions = Decisions(tmp_path)
    assert all(decision.is_same for decision in decisions.again())
    assert decisions.totals.decisions >= 4


def test_where_the_beginning_has_aged_out_a_replay_begins_at_the_next_whole_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.control.decisions.FRAMES_A_ROW", 10)

    async def story(world: World) -> None:
        for _ in range(25):
            await world.submit(job_class=JobClass.BATCH)
            await asyncio.sleep(50.0)
        assert world.daemon.journal.expire(EPOCH_S, 0.0, 10).more

    kept = StateConfig(journal_segment_events_max=67, journal_segments_kept_max=2)
    played(tmp_path, story, config=Config(state=kept), gpus=1)
    decisions = Decisions(tmp_path)
    assert all(decision.is_same for decision in decisions.again())
    # The second row and the begun third are whole; of the first only the end is left.
    assert decisions.totals.decisions == 15
    assert 0 < decisions.totals.skipped < 10
    assert verify(tmp_path).ok


def test_a_body_that_was_changed_is_named(eventful: Path, tmp_path: Path) -> None:
    journal = copied(eventful, tmp_path)
    with closing(sqlite3.connect(journal / DATABASE_NAME)) as db, db:
        seqs = [seq for (seq,) in db.execute("SELECT seq FROM events WHERE kind = 'PlanDecided'")]
        middle = seqs[len(seqs) // 2]
        (body,) = db.execute("SELECT body FROM events WHERE seq = ?", (middle,)).fetchone()
        event = json.loads(body)
        event["plan_digest"] = "0" * 32
        db.execute("UPDATE events SET body = ? WHERE seq = ?", (json.dumps(event).encode(), middle))
    decisions = Decisions(journal)
    with pytest.raises(JournalCorrupt, match=rf"event {middle} \(PlanDecided\) does not match its hash"):
        list(decisions.again())
    assert decisions.totals.decisions == len(seqs) // 2


def test_events_that_age_out_meanwhile_are_left_out(eventful: Path, tmp_path: Path) -> None:
    """As a replay beside a running daemon meets it."""
    journal = copied(eventful, tmp_path)
    every = again(eventful)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduler.effects.journal_read._PIECE", 10)
        decisions = Decisions(journal)
        replayed = decisions.again()
        first = next(replayed)
        with closing(sqlite3.connect(journal / DATABASE_NAME)) as db, db:
            gone = every[len(every) // 2].event
            (its_hash,) = db.execute("SELECT hash FROM events WHERE seq = ?", (gone,)).fetchone()
            db.execute("DELETE FROM events WHERE seq <= ?", (gone,))
            db.execute("UPDATE meta SET value = ? WHERE key = 'anchor'", (gone.to_bytes(8) + its_hash,))
        rest = list(replayed)
    assert first.event == every[0].event
    assert decisions.totals.skipped > 0
    assert rest[-1].event == every[-1].event
    assert all(decision.is_same for decision in rest)


def test_a_journal_without_decisions_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(5.0)

    played(tmp_path, story, config=Config())
    assert main(["simulate", "--replay-journal", str(tmp_path)]) == ExitCode.FAILED
    assert "the daemon has not decided anything yet. Try again when it has" in capsys.readouterr().err


def test_a_plan_whose_inputs_cant_be_stored_is_not_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrived is kept all the same."""

    async def story(world: World) -> None:
        def broken(*_: object) -> tuple[bytes, Any]:
            raise OverflowError("a number of more than 64 bits")

        with monkeypatch.context() as patch:
            patch.setattr("scheduler.control.decisions.encode", broken)
            job = await world.submit()
            assert world.state(job) is JobState.PENDING
            assert "no plan could be made" in world.daemon.controller.problems["planner"]
        await asyncio.sleep(60.0)
        assert world.state(job) is JobState.SUCCEEDED
        assert "planner" not in world.daemon.controller.problems

    played(tmp_path, story, config=Config())
    assert all(decision.is_same for decision in again(tmp_path))


def test_what_a_simulation_throws_away_is_not_written(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.daemon._keeps_decisions = False
        await world.daemon.start()
        await asyncio.sleep(5.0)
        world.daemon.stop()

    run(story())
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as db:
        kinds = {kind for (kind,) in db.execute("SELECT DISTINCT kind FROM events")}
    assert "StartDecided" in kinds
    assert "PlanDecided" not in kinds
