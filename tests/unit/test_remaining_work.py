"""Remaining work: what is saved of ended attempts, how long the next takes, what it is worth by value."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from scheduler.control.worth import value_of_what_is_left
from scheduler.model.events import fold, submitted
from scheduler.model.jobs import Job, JobClass, JobState, RestartRule
from scheduler.model.policy import Order, Policy
from scheduler.model.settings import Config
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.fakes.worlds import NOW_US, SECOND_US, J, W, gpus, running, snapshot
from tests.harness import values
from tests.harness.simulated import SimulatedNode

UNKNOWN = -1
HOUR_S = 3600.0


def job_after(*events: object, **spec: object) -> Job:
    job = submitted(values.submission(1, **spec), 1)
    for event in events:
        job = fold(job, event, job.revision + 1)  # type: ignore[arg-type]
    return job


def test_what_was_saved_shortens_the_next_attempt_and_the_restart_lengthens_it() -> None:
    said = {"expected_duration_s": 1000.0, "restart_loss_s": 50.0}
    waiting = job_after(**said)
    assert waiting.expected_attempt_s == 1000.0
    live = job_after(values.start(1), values.started(1, at_s=10.0), **said)
    assert live.expected_attempt_s == 1000.0
    told = fold(live, values.stop(1, at_s=310.0), 4)
    gone = fold(told, values.end(1, JobState.PENDING, at_s=320.0), 5)
    assert gone.worked_s == pytest.approx(310.0)  # nobody said when it was signalled: till its end
    assert gone.expected_attempt_s == pytest.approx(690.0 + 50.0)


def test_of_an_attempt_that_failed_only_its_checkpoint_is_saved() -> None:
    live = job_after(values.start(1), values.started(1, at_s=10.0), restart=RestartRule.ON_FAILURE)
    failed = fold(live, values.end(1, JobState.PENDING, at_s=320.0), 4)
    assert failed.worked_s == 0.0


def test_the_less_is_left_the_more_an_hour_of_it_is_worth() -> None:
    world = W(
        jobs=(
            J(1, value=2_000_000, expected_us=3600 * SECOND_US),
            running(2, "GPU-0", ran_s=2700, value=2_000_000, expected_us=3600 * SECOND_US),
            running(3, "GPU-1", ran_s=9999, value=2_000_000, expected_us=3600 * SECOND_US),
            J(4, value=2_000_000),
        ),
        gpus=gpus(2),
    )
    whole = np.array([3600 * SECOND_US] * 3 + [UNKNOWN])
    worth = value_of_what_is_left(snapshot(world).jobs, whole, NOW_US)
    # The third is late, and counts as a minute from its end.
    assert worth.tolist() == [2_000_000, 8_000_000, 120_000_000, 2_000_000]


def test_who_will_be_late_is_worth_nothing_and_a_deadline_itself_is_in_time() -> None:
    hour = 3600 * SECOND_US
    declared = {"value": 2_000_000, "expected_us": hour}
    world = W(
        jobs=(
            running(1, "GPU-0", ran_s=1800, deadline_us=NOW_US + hour // 2, **declared),
            running(2, "GPU-1", ran_s=1800, deadline_us=NOW_US + hour // 2 - 1, **declared),
            J(3, deadline_us=NOW_US + hour - 1, **declared),
            J(4, value=2_000_000, deadline_us=NOW_US),
        ),
        gpus=gpus(2),
    )
    worth = value_of_what_is_left(snapshot(world).jobs, np.array([hour] * 3 + [UNKNOWN]), NOW_US)
    assert worth.tolist() == [4_000_000, 0, 0, 2_000_000]


def test_by_value_a_job_near_its_end_is_not_displaced_and_a_deadline_counts_what_is_left(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        work = {"j1": 2 * HOUR_S, "j2": HOUR_S, "j3": HOUR_S}
        node = SimulatedNode(
            tmp_path,
            lambda job_id: Workload(duration_s=work[job_id], restart_loss_s=60.0),
            config=Config(policy=Policy(order=Order.VALUE)),
        )
        await node.daemon.start()

        async def submit(hours: float, value: int, deadline_s: float | None = None) -> None:
            await node.submit(
                job_class=JobClass.BATCH,
                expected_duration_s=hours * HOUR_S,
                value_microusd_per_gpu_hour=value,
                restart_loss_s=60.0,
                deadline_s=deadline_s,
            )

        def state(number: int) -> JobState:
            return node.state(f"j{number}")

        await submit(2, 1_000_000, EPOCH_S + 4 * HOUR_S)
        await asyncio.sleep(0.5 * HOUR_S)
        await submit(1, 2_000_000)  # 1.33 an hour of what is left of the first, and 30 % more
        await asyncio.sleep(60.0)
        assert (state(1), state(2)) == (JobState.PENDING, JobState.RUNNING)
        # It needs 1.5 h and has 2.5 when its turn comes; the whole of it would not fit any more at 2.1.
        await asyncio.sleep(1.2 * HOUR_S)
        assert (state(1), state(2)) == (JobState.RUNNING, JobState.SUCCEEDED)
        await asyncio.sleep(1.2 * HOUR_S)
        await submit(1, 5_000_000)  # a quarter of an hour is left of the first: worth 8 an hour
        await asyncio.sleep(60.0)
        assert (state(1), state(3)) == (JobState.RUNNING, JobState.PENDING)
        await asyncio.sleep(0.5 * HOUR_S)
        assert (state(1), state(3)) == (JobState.SUCCEEDED, JobState.RUNNING)
        node.daemon.stop()

    run(story())
