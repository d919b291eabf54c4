"""How often the energy counter is asked for."""

from collections.abc import Iterator
from itertools import count

import pytest

from scheduler.effects.nvml_energy import PERIOD_S_MAX, EnergyCounter


class Driver:
    """Answers with a number of its own each time; an answer costs processor time."""

    def __init__(self, cost_s: float) -> None:
        self.spent_s, self._cost_s = 0.0, cost_s
        self._numbers: Iterator[int | None] = count(1)

    def ask(self) -> int | None:
        self.spent_s += self._cost_s
        return next(self._numbers)

    def answers(self, *values: int | None) -> None:
        self._numbers = iter(values)


@pytest.mark.parametrize(
    ("cost_s", "asked_at"),
    [
        (0.000_05, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (0.002, [0, 2, 4, 6, 8, 10]),
        (0.004, [0, 4, 8]),
        (0.9, [0, 5, 10]),
    ],
)
def test_a_counter_is_asked_for_as_often_as_its_cost_allows(cost_s: float, asked_at: list[int]) -> None:
    driver = Driver(cost_s)
    counter = EnergyCounter(lambda: driver.spent_s)
    told = [counter.read(1000.0 + second, driver.ask) for second in range(12)]
    assert [second for second in range(12) if told[second] not in told[:second]] == asked_at


def test_a_counter_that_failed_or_a_clock_that_was_set_back_is_no_reason_to_wait() -> None:
    driver = Driver(0.9)
    counter = EnergyCounter(lambda: driver.spent_s)
    driver.answers(None, 7, 8)
    assert [counter.read(at_s, driver.ask) for at_s in (0.0, 1.0, 2.0)] == [None, 7, 7]
    assert counter.read(-100.0, driver.ask) == 8
    assert counter.read(-100.0 + PERIOD_S_MAX / 2, driver.ask) == 8
