"""What a job's change makes the daemon order."""

from dataclasses import dataclass, field, replace
from typing import Any

from scheduler.control.orders import PREPARED_AHEAD_MAX, Orders
from scheduler.effects.launcher import AttemptKey, StartOrder, StopOrder
from scheduler.model.jobs import Attempt, Job, JobState, Notice
from scheduler.model.reasons import Reason
from tests.harness.values import SPEC

RUNS = Attempt(number=1, gpus=("GPU-a",), gpu_share_milli=1000, decided_s=1.0, launcher_id="l", started_s=2.0)
NOTICE = Notice(Reason.PREEMPTED_BY_HIGHER_RANK, 3.0, 13.0, "j9")
ENDED = replace(RUNS, notice=NOTICE, exited_s=4.0, exit_code=0)
SECOND = Attempt(number=2, gpus=("GPU-b",), gpu_share_milli=1000, decided_s=4.0, launcher_id="l")


def job(state: JobState, *attempts: Attempt) -> Job:
    return Job(
        id="j1",
        number=1,
        spec=SPEC,
        request_id="",
        submitted_s=0.0,
        state=state,
        reason=Reason.SUBMITTED,
        state_since_s=0.0,
        revision=1,
        attempts=attempts,
        attempt=len(attempts),
    )


@dataclass
class World:
    """A launcher, a journal and a verifier that only listen."""

    said: list[Any] = field(default_factory=list)

    def prepare(self, order: StartOrder) -> None:
        self.said.append(("prepare", order.key, order.environment["CUDA_VISIBLE_DEVICES"]))

    def start(self, order: StartOrder) -> None:
        self.said.append(("start", order.key, order.environment["CUDA_VISIBLE_DEVICES"]))

    def stop(self, order: StopOrder) -> None:
        self.said.append(("stop", order.key, order.deadline_s))

    def freeze(self, key: AttemptKey) -> None:
        self.said.append(("freeze", key))

    def thaw(self, key: AttemptKey) -> None:
        self.said.append(("thaw", key))

    def end_grace(self, key: AttemptKey) -> None:
        self.said.append(("kill", key))

    def forget(self, key: AttemptKey) -> None:
        self.said.append(("forget", key))

    def watch(self, uuid: str, *, nobody_left: bool = False) -> None:
        self.said.append(("watch", uuid))

    def environment(self, number: int) -> dict[str, str]:
        return {}


def orders_of(before: Job | None, after: Job) -> list[Any]:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.follow(before, after)
    orders.send()
    said = list(world.said)
    orders.send()
    assert world.said == said, "nothing is said twice"
    return said


FIRST_KEY, SECOND_KEY = AttemptKey("j1", 1), AttemptKey("j1", 2)


def test_a_submission_orders_nothing() -> None:
    assert orders_of(None, job(JobState.PENDING)) == []


def test_a_new_attempt_is_started() -> None:
    fresh = replace(RUNS, started_s=None)
    assert orders_of(job(JobState.PENDING), job(JobState.STARTING, fresh)) == [("start", FIRST_KEY, "GPU-a")]


def test_a_job_that_only_reports_progress_orders_nothing() -> None:
    before, after = job(JobState.RUNNING, RUNS), job(JobState.RUNNING, replace(RUNS, checkpoint_s=9.0))
    assert orders_of(before, after) == []


def test_a_notice_is_a_stop_with_the_notices_deadline() -> None:
    noticed = replace(RUNS, notice=NOTICE)
    assert orders_of(job(JobState.RUNNING, RUNS), job(JobState.PREEMPTING, noticed)) == [
        ("stop", FIRST_KEY, 13.0)
    ]


def test_a_shed_freezes_and_its_end_thaws() -> None:
    runs, frozen = job(JobState.RUNNING, RUNS), job(JobState.RUNNING, replace(RUNS, suspend_s=3.0))
    assert orders_of(runs, frozen) == [("freeze", FIRST_KEY)]
    assert orders_of(frozen, runs) == [("thaw", FIRST_KEY)]


def test_whose_freeze_is_said_again_after_a_restart_and_who_is_to_go_is_only_told_that() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    frozen = replace(RUNS, suspend_s=3.0, suspended_s=3.1)
    suspended = job(JobState.SUSPENDED, frozen)
    orders.freeze(suspended, frozen)
    going = replace(RUNS, suspended_s=3.1, notice=NOTICE)
    orders.follow(suspended, job(JobState.PREEMPTING, going))
    orders.send()
    assert world.said == [("stop", FIRST_KEY, 13.0)]


def test_whose_start_is_said_again_after_a_restart_is_told_to_go_after_it() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    fresh, going = replace(RUNS, started_s=None), replace(RUNS, notice=NOTICE)
    orders.start(job(JobState.STARTING, fresh))
    orders.follow(job(JobState.STARTING, fresh), job(JobState.PREEMPTING, replace(going, started_s=None)))
    orders.stop(replace(job(JobState.PREEMPTING, going), id="j2"), going)
    orders.send()
    assert world.said == [
        ("stop", AttemptKey("j2", 1), 13.0),
        ("start", FIRST_KEY, "GPU-a"),
        ("stop", FIRST_KEY, 13.0),
    ]


def test_an_acknowledgement_ends_the_grace() -> None:
    noticed = replace(RUNS, notice=NOTICE)
    after = job(JobState.PREEMPTING, replace(noticed, acknowledged_s=3.5))
    assert orders_of(job(JobState.PREEMPTING, noticed), after) == [("kill", FIRST_KEY)]


def test_an_end_is_forgotten_by_the_launcher_and_its_gpus_are_looked_at() -> None:
    after = job(JobState.PENDING, ENDED)
    assert orders_of(job(JobState.PREEMPTING, replace(RUNS, notice=NOTICE)), after) == [
        ("watch", "GPU-a"),
        ("forget", FIRST_KEY),
    ]


def test_an_end_is_followed_even_where_the_next_attempt_begins_in_the_same_tick() -> None:
    before = job(JobState.PREEMPTING, replace(RUNS, notice=NOTICE))
    assert orders_of(before, job(JobState.STARTING, ENDED, SECOND)) == [
        ("start", SECOND_KEY, "GPU-b"),
        ("watch", "GPU-a"),
        ("forget", FIRST_KEY),
    ]


def test_a_verified_hand_over_orders_nothing() -> None:
    verified = replace(ENDED, verified_s=5.0)
    assert orders_of(job(JobState.PENDING, ENDED), job(JobState.PENDING, verified)) == []


def test_a_start_is_prepared_before_it_is_durable_and_is_the_same() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    fresh = job(JobState.STARTING, replace(RUNS, started_s=None))
    orders.prepare(fresh)
    assert world.said == [("prepare", FIRST_KEY, "GPU-a")]
    orders.follow(job(JobState.PENDING), fresh)
    orders.send()
    assert world.said == [("prepare", FIRST_KEY, "GPU-a"), ("start", FIRST_KEY, "GPU-a")]


def test_what_was_prepared_in_a_tick_that_is_not_kept_is_taken_back() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.prepare(job(JobState.STARTING, replace(RUNS, started_s=None)))
    orders.clear()
    orders.send()
    assert world.said == [("prepare", FIRST_KEY, "GPU-a"), ("forget", FIRST_KEY)]


PENDING = job(JobState.PENDING)


def test_a_preemptors_start_is_prepared_ahead_and_gets_its_gpus_when_it_starts() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.prepare_ahead(PENDING)
    orders.prepare_ahead(PENDING)
    orders.send()
    assert world.said == [("prepare", FIRST_KEY, "")], "once, and on no GPU yet"
    started = job(JobState.STARTING, replace(RUNS, started_s=None))
    orders.prepare(started)
    orders.follow(PENDING, started)
    orders.send()
    assert world.said[1:] == [("start", FIRST_KEY, "GPU-a")]


def test_what_is_expected_to_start_is_prepared_for_that_tick_only() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.expect(PENDING)
    assert world.said == [("prepare", FIRST_KEY, "")]
    orders.send()
    assert world.said[1:] == [("forget", FIRST_KEY)], "it did not start"
    orders.expect(PENDING)
    started = job(JobState.STARTING, replace(RUNS, started_s=None))
    orders.prepare(started)
    orders.follow(PENDING, started)
    orders.send()
    orders.send()
    assert world.said[2:] == [("prepare", FIRST_KEY, ""), ("start", FIRST_KEY, "GPU-a")]


def test_what_was_expected_in_a_tick_that_is_not_kept_is_taken_back() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.expect(PENDING)
    orders.clear()
    orders.send()
    assert world.said == [("prepare", FIRST_KEY, ""), ("forget", FIRST_KEY)]


def test_a_preemptor_that_ends_without_a_start_is_taken_back() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.prepare_ahead(PENDING)
    orders.send()
    orders.follow(PENDING, job(JobState.CANCELLED))
    orders.send()
    assert world.said[1:] == [("forget", FIRST_KEY)]


def test_what_was_prepared_ahead_outlives_a_later_tick_that_is_not_kept() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.prepare_ahead(PENDING)
    orders.send()
    orders.clear()
    assert world.said == [("prepare", FIRST_KEY, "")]


def test_only_so_many_starts_are_prepared_ahead() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    for number in range(2 * PREPARED_AHEAD_MAX):
        orders.prepare_ahead(replace(PENDING, number=number, id=f"j{number}"))
    assert len(world.said) == PREPARED_AHEAD_MAX


def test_with_a_new_launcher_nothing_is_prepared() -> None:
    world: Any = World()
    orders = Orders(world, world.environment, world, {}, lambda job, gpus: {})
    orders.prepare_ahead(PENDING)
    orders.send()
    orders.launcher_is_new()
    orders.follow(PENDING, job(JobState.CANCELLED))
    orders.send()
    assert world.said == [("prepare", FIRST_KEY, "")]
