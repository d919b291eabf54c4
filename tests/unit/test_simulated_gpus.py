"""The simulated boards: limits are taken as a driver takes them, and cut the draw of who works."""

import os

import pytest

from scheduler.effects.launcher import AttemptKey
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuLimit, GpuSample
from scheduler.simulation.boards import PROFILES
from scheduler.simulation.gpus import SimulatedGpus


class HandClock:
    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


async def test_a_limit_cuts_the_draw_of_who_works_from_then_on() -> None:
    clock = HandClock()
    gpus = SimulatedGpus([PROFILES["H100"]], clock, node="n")
    first = await gpus.start(lambda _: None, 1000.0)
    uuid = first.identities[0].uuid
    gpus.hold(AttemptKey("1", 1), [uuid], os.getpid())

    def sample() -> GpuSample:
        clock.at_s += 60.0
        return gpus._readings().samples[0]

    assert sample().power_w == pytest.approx(560.0)
    assert await gpus.set_power_limit(uuid, 300.0) == GpuLimit(300.0, 300.0)
    limited = sample()
    assert (limited.power_w, limited.power_limit_w) == (pytest.approx(300.0), 300.0)
    with pytest.raises(GpuReadError) as caught:
        await gpus.set_power_limit(uuid, 199.0)
    assert caught.value.code == "ERROR_INVALID_ARGUMENT"
    await gpus.close()
