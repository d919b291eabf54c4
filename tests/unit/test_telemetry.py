"""Which GPUs are silent: rounds of readings in which some answer and some do not."""

import pytest

from scheduler.control.meters import Meters
from scheduler.control.telemetry import Telemetry, fresh_s
from scheduler.effects.gpus import GpuReadings
from scheduler.model.gpus import GpuIdentity, GpuSample

PERIOD_S = 1.0
MODEL = "NVIDIA H100 80GB HBM3"
GPUS = tuple(GpuIdentity(uuid, index, MODEL, 81_559) for index, uuid in enumerate(("GPU-a", "GPU-b")))


class Rounds:
    """Rounds of two GPUs, a period apart."""

    def __init__(self) -> None:
        self.telemetry = Telemetry(Meters())
        self.now_s = 1000.0
        self.take("GPU-a", "GPU-b")

    def take(
        self,
        *answering: str,
        after_s: float = PERIOD_S,
        there: tuple[GpuIdentity, ...] = GPUS,
        driver: str = "",
    ) -> frozenset[str]:
        """A round in which these answer; returns who is silent from then on."""
        self.now_s += after_s
        errors = {gpu.uuid: "ERROR_TIMEOUT" for gpu in there if gpu.uuid not in answering}
        samples = tuple(GpuSample(uuid, self.now_s) for uuid in answering)
        readings = GpuReadings(there, samples, {"driver": driver} if driver else errors)
        return self.telemetry.listen(readings, self.now_s, PERIOD_S)

    def until_silent(self) -> int:
        """How many rounds in a row the first GPU misses until it is silent."""
        for number in range(1, 100):
            if self.take("GPU-b"):
                return number
        raise AssertionError("it never is")


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


def test_a_gpu_is_silent_when_its_last_reading_says_nothing_of_now(rounds: Rounds) -> None:
    assert rounds.until_silent() == 1 + fresh_s(PERIOD_S) / PERIOD_S
    assert rounds.telemetry.silent == {"GPU-a": "ERROR_TIMEOUT"}
    assert rounds.take("GPU-b") == frozenset(), "it is told once"


def test_a_slow_sample_now_and_then_makes_no_gpu_silent(rounds: Rounds) -> None:
    for _ in range(20):
        rounds.take("GPU-b")
        rounds.take("GPU-b")
        rounds.take("GPU-a", "GPU-b")
    assert rounds.telemetry.silent == {}


def test_one_answer_after_a_silence_is_not_trusted_and_two_in_a_row_are(rounds: Rounds) -> None:
    rounds.until_silent()
    for _ in range(20):
        rounds.take("GPU-a", "GPU-b")
        rounds.take("GPU-b")
    assert set(rounds.telemetry.silent) == {"GPU-a"}
    rounds.take("GPU-a", "GPU-b")
    rounds.take("GPU-a", "GPU-b")
    assert rounds.telemetry.silent == {}


def test_rounds_that_come_one_upon_the_other_make_no_gpu_silent(rounds: Rounds) -> None:
    """Events wake the reader every few milliseconds, while a sample takes as long as it does."""
    for _ in range(200):
        rounds.take("GPU-b", after_s=0.005)
    assert rounds.telemetry.silent == {}


@pytest.mark.parametrize("step_s", [86_400.0, -86_400.0])
def test_neither_a_clock_that_is_set_nor_a_pause_makes_a_gpu_silent(rounds: Rounds, step_s: float) -> None:
    rounds.take("GPU-a", "GPU-b", after_s=step_s)
    rounds.take("GPU-b", after_s=step_s)
    assert rounds.telemetry.silent == {}


def test_a_clock_that_was_set_back_delays_nothing_for_long(rounds: Rounds) -> None:
    rounds.take("GPU-b")
    rounds.take("GPU-b", after_s=-86_400.0)
    assert rounds.until_silent() == fresh_s(PERIOD_S) / PERIOD_S


def test_a_driver_that_hangs_silences_all_and_is_named(rounds: Rounds) -> None:
    for _ in range(5):
        rounds.take(driver="ERROR_TIMEOUT")
    assert rounds.telemetry.silent == dict.fromkeys(("GPU-a", "GPU-b"), "ERROR_TIMEOUT")


def test_a_gpu_that_is_not_there_is_not_silent(rounds: Rounds) -> None:
    rounds.until_silent()
    rounds.take("GPU-b", there=GPUS[1:])
    assert rounds.telemetry.silent == {}
