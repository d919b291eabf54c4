"""Who can't wait goes first: what not waiting is worth, and what comes of it on a GPU."""

import asyncio
from pathlib import Path

import numpy as np

from scheduler.control.worth import value_of_not_waiting
from scheduler.model.jobs import JobClass, JobState
from scheduler.model.policy import Order, Policy
from scheduler.model.settings import Config
from scheduler.planning.valuation import at_stake
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.fakes.worlds import NOW_US, SECOND_US, J, W, gpus, running, snapshot
from tests.harness.simulated import SimulatedNode

UNKNOWN = -1
HOUR_S = 3600.0
HOUR = 3600 * SECOND_US
MINUTE = 60 * SECOND_US


def worth(world: W, *whole_us: int) -> list[int]:
    seen = snapshot(world)
    return list(value_of_not_waiting(seen.jobs, np.array(whole_us), NOW_US, seen.gpus, 0.3).tolist())


def due(slack_us: int, hours: int = 4) -> dict[str, int]:
    return {"expected_us": hours * HOUR, "deadline_us": NOW_US + hours * HOUR + slack_us}


def test_who_would_be_late_by_waiting_a_quarter_hour_counts_with_all_that_he_would_lose() -> None:
    world = W(
        jobs=(
            J(1, value=2_000_000, **due(10 * HOUR)),
            J(2, value=1_500_000, **due(15 * MINUTE - 1)),
            J(3, value=1_600_000, **due(15 * MINUTE)),
            J(4, value=1_200_000, expected_us=4 * HOUR),
        ),
        gpus=gpus(2),
    )
    # Two GPUs go for 1.5 now and three quarters of it later: of the second's four hours 0.375 each are lost,
    # 1.3125 of it beyond the half hour that is being paid.
    assert worth(world, *[4 * HOUR] * 4) == [2_000_000, 1_500_000 + 2_625_000, 1_600_000, 1_200_000]


def test_who_is_worth_less_than_gpus_go_for_later_gains_nothing_by_haste() -> None:
    jobs = (J(1, value=2_000_000), J(2, value=1_900_000), J(3, value=1_400_000, **due(0)))
    world = W(jobs=jobs, gpus=gpus(1))
    assert worth(world, UNKNOWN, UNKNOWN, 4 * HOUR) == [2_000_000, 1_900_000, 1_400_000]
    # With a GPU for each of them nothing else would come of it.
    alone = W(jobs=jobs, gpus=gpus(3))
    assert worth(alone, UNKNOWN, UNKNOWN, 4 * HOUR) == [2_000_000, 1_900_000, 8 * 1_400_000]


def test_miners_and_those_too_late_make_no_gpu_dear() -> None:
    world = W(
        jobs=(
            J(1, value=9_000_000, job_class=JobClass.MINING),
            J(2, value=9_000_000, **due(-1)),
            J(3, value=1_000_000, **due(0)),
        ),
        gpus=gpus(1),
    )
    assert worth(world, UNKNOWN, 4 * HOUR, 4 * HOUR) == [9_000_000, 0, 8_000_000]


def test_nobody_is_worth_or_stakes_anything_else_once_he_starts() -> None:
    """Else who is let in would be stopped by the next plan, and so on without end."""
    for minutes in range(0, 40, 2):
        said = {"value": 1_000_000, "restart_loss_us": 6 * MINUTE, **due(minutes * MINUTE)}
        found = []
        for first in (J(1, **said), running(1, "GPU-0", ran_s=0, **said)):
            world = W(jobs=(first, J(2, **said)), gpus=gpus(1))
            stakes = at_stake(snapshot(world), Order.VALUE, np.arange(2), np.full(2, 1000))
            found.append((worth(world, 4 * HOUR, 4 * HOUR), *(each.tolist() for each in stakes)))
        assert found[0] == found[1]
        is_due = minutes < 15 + 6
        assert found[0][0][0] == (1_000_000 + 7 * 250_000 if is_due else 1_000_000)


def test_inference_never_waits_for_who_is_only_in_a_hurry() -> None:
    def worths(**others: int) -> list[int]:
        serving = [J(n, job_class=JobClass.INFERENCE, value=v) for n, v in ((1, 3_900_000), (2, 0))]
        world = W(jobs=(*serving, J(3, **{"value": 2_000_000, **due(0), **others})), gpus=gpus(4))
        return worth(world, UNKNOWN, UNKNOWN, 4 * HOUR)

    assert worths() == [3_900_000, 0, 2_999_998], "30 % more than that is less than inference is worth"
    assert worths(restart_loss_us=30 * MINUTE) == [3_900_000, 0, 2_599_998], "a half more"
    assert worths(value=5_000_000) == [3_900_000, 0, 8 * 5_000_000], "it is before both by what it pays"


def test_what_is_at_stake_is_not_counted_twice() -> None:
    # The value of who can't wait holds eight half hours of it already.
    world = W(jobs=(J(1, value=8_000_000, **due(0)), J(2, value=1_000_000, **due(HOUR))), gpus=gpus(1))
    stake, _ = at_stake(snapshot(world), Order.VALUE, np.array([0, 1]), np.array([1000, 1000]))
    assert stake.tolist() == [4_000_000, 4_000_000]


def test_by_value_who_has_time_gives_way_to_who_has_none_and_both_are_done(tmp_path: Path) -> None:
    async def story() -> None:
        node = SimulatedNode(
            tmp_path,
            lambda _: Workload(duration_s=2 * HOUR_S, restart_loss_s=60.0),
            config=Config(policy=Policy(order=Order.VALUE)),
        )
        await node.daemon.start()

        async def submit(value: int, deadline_h: float) -> None:
            await node.submit(
                job_class=JobClass.BATCH,
                expected_duration_s=2 * HOUR_S,
                value_microusd_per_gpu_hour=value,
                restart_loss_s=60.0,
                deadline_s=EPOCH_S + deadline_h * HOUR_S,
            )

        def states() -> list[JobState]:
            return [node.state(name) for name in ("j1", "j2")]

        await submit(2_000_000, 6.0)
        await asyncio.sleep(0.5 * HOUR_S)
        await submit(3_000_000, 3.0)  # worth what is left of the first, and half an hour to spare
        await asyncio.sleep(60.0)
        assert states() == [JobState.RUNNING, JobState.PENDING]
        await asyncio.sleep(0.25 * HOUR_S)
        assert states() == [JobState.PENDING, JobState.RUNNING]
        await asyncio.sleep(4 * HOUR_S)
        assert states() == [JobState.SUCCEEDED, JobState.SUCCEEDED]
        node.daemon.stop()

    run(story())
