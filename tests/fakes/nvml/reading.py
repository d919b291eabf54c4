"""`NvmlGpus` on the fake driver, with its rounds in a queue: what the NVML tests look through."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from scheduler.effects.gpus import GpuReadings
from scheduler.effects.nvml_client import NvmlGpus, NvmlLimits
from scheduler.model.gpus import GpuSample
from tests.fakes.nvml import build
from tests.fakes.nvml.fake import FakeNvml

needs_gcc = pytest.mark.skipif(not build.is_possible(), reason="no gcc to compile the fake NVML with")

PERIOD_S = 0.02
# A bound, not a wait: what is awaited comes in milliseconds, on a busy machine in seconds.
PATIENCE_S = 30.0
LOOK_AGAIN_S = 0.001
LIMITS = NvmlLimits(round_s=0.5, backoff_s_first=0.01, backoff_s_max=0.1)


class Reading:
    """A started `NvmlGpus`: its first round, and the ones since."""

    def __init__(self, gpus: NvmlGpus) -> None:
        self.gpus = gpus
        self.first = GpuReadings((), (), {})
        self.rounds: asyncio.Queue[GpuReadings] = asyncio.Queue()

    async def next(self) -> GpuReadings:
        async with asyncio.timeout(PATIENCE_S):
            return await self.rounds.get()

    async def until(self, is_met: Callable[[GpuReadings], bool]) -> GpuReadings:
        """Return the first round from now on for which it holds."""
        while not self.rounds.empty():
            self.rounds.get_nowait()
        last = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not is_met(last := await self.rounds.get()):
                    pass
        except TimeoutError:
            raise AssertionError(f"not met within {PATIENCE_S} s; last round: {last}") from None
        return last


@contextlib.asynccontextmanager
async def reading(
    fake: FakeNvml, limits: NvmlLimits = LIMITS, period_s: float = PERIOD_S
) -> AsyncIterator[Reading]:
    result = Reading(NvmlGpus(limits, fake.environment()))
    try:
        result.first = await result.gpus.start(result.rounds.put_nowait, period_s)
        yield result
    finally:
        await result.gpus.close()


async def eventually(is_met: Callable[[], bool]) -> None:
    """Return once it holds; for what no round tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_met():  # noqa: ASYNC110 - other processes set no asyncio.Event
            await asyncio.sleep(LOOK_AGAIN_S)


def sample_of(readings: GpuReadings, uuid: str) -> GpuSample | None:
    return next((sample for sample in readings.samples if sample.uuid == uuid), None)


def is_whole(readings: GpuReadings) -> bool:
    """Whether every GPU was opened and read, and there is one."""
    read = {sample.uuid for sample in readings.samples}
    opened = {identity.uuid for identity in readings.identities}
    return bool(opened) and read == opened and not readings.errors
