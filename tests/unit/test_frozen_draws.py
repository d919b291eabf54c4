"""What boards draw with frozen jobs on them, learned from readings: as values, without a daemon."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.control.frozen import FROZEN_AFTER_S, FROZEN_EXTRA_W, READINGS_MIN, Frozen
from scheduler.model.gpus import GpuIdentity, GpuSample
from scheduler.model.jobs import Attempt, Job, JobClass, JobState, OnPreempt
from scheduler.model.policy import Policy
from scheduler.model.power import PowerState
from scheduler.model.reasons import Reason
from scheduler.model.settings import StandingJob

H100 = GpuIdentity("GPU-1", 0, "H100", 80_000, power_limit_w_min=200.0, power_limit_w_max=700.0)
A100 = replace(H100, uuid="GPU-2", index=1, model="A100", power_limit_w_max=400.0)
IDLE_W = {"GPU-1": 70.0, "GPU-2": 50.0}
LIMIT_W = 330.0
FROZEN_S = 100.0  # when the job was frozen
SPEC = replace(
    StandingJob("miner", ("/bin/true",)).spec(Policy()), on_preempt=OnPreempt.SUSPEND, preemptible=True
)
ATTEMPT = Attempt(1, ("GPU-1",), 1000, 0.0, "launcher-1", suspend_s=FROZEN_S, suspended_s=FROZEN_S)
JOB = Job("j1", 1, SPEC, "", 0.0, JobState.SUSPENDED, Reason.SHED_FOR_POWER, FROZEN_S, 1, attempts=(ATTEMPT,))
NOTHING = PowerState()


def frozen(known: PowerState = NOTHING, held: tuple[Job, ...] = (JOB,)) -> Frozen:
    board = SimpleNamespace(
        identities=(H100, A100),
        row={"GPU-1": 0, "GPU-2": 1},
        holders=lambda uuid: [job for job in held if uuid in job.attempts[-1].gpus],
    )
    limits = SimpleNamespace(
        in_force_w=lambda _: LIMIT_W, range_w=lambda gpu: (gpu.power_limit_w_min, gpu.power_limit_w_max)
    )
    idle = SimpleNamespace(of=lambda gpu: IDLE_W[gpu.uuid])
    ledger: Any = SimpleNamespace(power=known, jobs={job.number: job for job in held})
    return Frozen(ledger, board, limits, idle)  # type: ignore[arg-type]


def seen(
    frozen: Frozen,
    watts: float | None,
    *,
    job: Job = JOB,
    times: int = READINGS_MIN,
    from_s: float = FROZEN_S + FROZEN_AFTER_S,
) -> list[dict[str, float]]:
    """The news of so many readings, one a second."""
    samples = (GpuSample("GPU-1", from_s + at, power_w=watts) for at in range(times))
    return [news for sample in samples if (news := frozen.see(job, H100, sample))]


def on_both(job: Job = JOB) -> Job:
    return replace(job, attempts=(replace(ATTEMPT, gpus=("GPU-1", "GPU-2")),))


def test_until_it_was_seen_a_frozen_board_counts_with_idle_draw_and_a_context() -> None:
    assert frozen().of(JOB) == IDLE_W["GPU-1"] + FROZEN_EXTRA_W


def test_what_was_seen_often_enough_is_news_once_and_counts_from_then_on() -> None:
    world = frozen()
    assert not seen(world, 131.0, times=READINGS_MIN - 1)
    assert seen(world, 131.0) == [{"FROZEN MINING H100": 131.0}]
    assert (world.of(JOB), world.counted_w(1)) == (131.0, 135)  # plans see steps


def test_what_the_last_daemon_learned_counts_at_once_and_names_of_jobs_are_something_else() -> None:
    world = frozen(PowerState(draws_w={"FROZEN MINING H100": 131.0, "MINING": 310.0, "j1": 320.0}))
    assert world.of(JOB) == 131.0
    assert not seen(world, 133.0), "a flicker is no news"
    assert seen(world, 90.0, times=200), "and what lasts is"


def test_what_was_queued_before_runs_out_first_and_teaches_nothing() -> None:
    world = frozen()
    assert not seen(world, 450.0, times=4, from_s=FROZEN_S)
    assert seen(world, 131.0) == [{"FROZEN MINING H100": 131.0}]


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(replace(JOB, state=JobState.RUNNING), id="it runs"),
        pytest.param(replace(JOB, attempts=(replace(ATTEMPT, suspended_s=None),)), id="it is only told to"),
    ],
)
def test_who_is_not_frozen_teaches_nothing(job: Job) -> None:
    assert not seen(frozen(), 131.0, job=job)


def test_a_board_that_can_not_be_read_teaches_nothing() -> None:
    assert not seen(frozen(), None)


def test_each_class_and_model_has_its_own_and_a_gang_counts_with_its_greediest_board() -> None:
    world = frozen()
    seen(world, 131.0)
    batch = replace(JOB, spec=replace(SPEC, job_class=JobClass.BATCH))
    assert world.of(batch) == IDLE_W["GPU-1"] + FROZEN_EXTRA_W
    assert world.of(on_both()) == IDLE_W["GPU-2"] + FROZEN_EXTRA_W


def test_who_waits_for_a_board_counts_with_the_worst_that_it_could_have() -> None:
    waits = replace(JOB, state=JobState.PENDING, attempts=())
    assert frozen(held=(waits,)).of(waits) == IDLE_W["GPU-1"] + FROZEN_EXTRA_W


@pytest.mark.parametrize("change", [{"on_preempt": OnPreempt.REQUEUE}, {"preemptible": False}, {"gpus": 0}])
def test_who_may_not_be_frozen_has_no_such_draw(change: dict[str, Any]) -> None:
    job = replace(JOB, spec=replace(SPEC, **change))
    assert frozen(held=(job,)).counted_w(1) is None


def test_a_frozen_board_counts_with_no_more_than_its_largest_limit() -> None:
    assert frozen(PowerState(draws_w={"FROZEN MINING A100": 900.0})).of(on_both()) == 400.0


def test_a_held_board_counts_with_its_limit_until_all_its_holders_are_frozen() -> None:
    known = PowerState(draws_w={"FROZEN MINING H100": 131.0})
    assert frozen(known).held_w(H100) == 131.0
    runs = replace(JOB, id="j2", number=2, state=JobState.RUNNING)
    assert frozen(known, held=(JOB, runs)).held_w(H100) == LIMIT_W
    both = frozen(known, held=(JOB, replace(JOB, id="j2", number=2)))
    assert both.held_w(H100) == IDLE_W["GPU-1"] + 2 * (131.0 - IDLE_W["GPU-1"])
    told = replace(JOB, attempts=(replace(ATTEMPT, suspend_s=None),))
    assert frozen(known, held=(told,)).held_w(H100) == LIMIT_W, "it is to run again"
