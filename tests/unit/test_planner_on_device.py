"""The planner on arrays of a fake device: the same plans, and nothing that a GPU would suffer from is new."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness import device_arrays, on_device
from tests.harness.device_arrays import DeviceArray, DeviceLibrary

dev = DeviceLibrary()
REMEDY = "see what is new with tests/harness/on_device.py, and what is gone: take that out of the list"


# All of the planner's tests run again, in arrays that are many times slower.
@pytest.mark.timeout(600)
def test_the_planner_s_tests_hold_on_a_device_and_no_wait_for_one_is_new() -> None:
    failed, found = on_device.planner_tests_on_device()
    assert failed == ""
    assert found, "nothing was found: this test would check nothing"
    assert on_device.places(found) == on_device.allowed(), REMEDY


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> device_arrays.Findings:
    """What is found in this file, as if it were the planner's."""
    monkeypatch.setattr(device_arrays, "CODE", str(Path(__file__).parent))
    monkeypatch.setattr(device_arrays, "TESTS", "nowhere")
    monkeypatch.setattr(device_arrays, "findings", device_arrays.Findings())
    return device_arrays.findings


def numbers() -> Any:
    return dev.asarray([3, 1, 2])


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda a: bool(a.any()), "bool()"),
        (lambda a: 1 if a.max() > 2 else 0, "bool()"),
        (lambda a: int(a[0]), "int()"),
        (lambda a: float(a[0]), "float()"),
        (lambda a: range(a[1]), "used as an index"),
        (lambda a: list(a), "iteration"),
        (lambda a: 3 in a, "in"),
        (lambda a: np.array(a), "becomes a host's array"),
        (lambda a: a + np.arange(3), "meets a host's array"),
        (lambda a: np.arange(3) + a, "meets a host's array"),
        (lambda a: a[np.array([0])], "meets a host's array"),
        (lambda a: operator.setitem(a, slice(1), np.ones(1)), "meets a host's array"),
        (lambda a: operator.iadd(a, np.arange(3)), "meets a host's array"),
        (lambda a: dev.where(a > 1, a, np.zeros(3, np.int64)), "meets a host's array"),
        (lambda a: dev.concatenate((a, np.arange(3))), "meets a host's array"),
        (lambda a: dev.add.at(a, np.array([0]), 1), "meets a host's array"),
        (lambda a: a + (a > 1), "types: Only numeric dtypes are allowed in __add__"),
        (lambda a: a / 2, "types: Only floating-point dtypes are allowed in __truediv__"),
        (lambda a: a + dev.zeros(3), "types: int64 and float64 cannot be type promoted together"),
        (lambda a: dev.maximum(a, dev.ones(3)), "types: int64 and float64 cannot be type promoted together"),
    ],
)
def test_what_waits_for_a_device_or_fails_on_one_is_found_where_it_happens(
    found: device_arrays.Findings, use: Callable[[Any], Any], what: str
) -> None:
    use(numbers())
    assert [(place[0], place[3]) for place in found] == [("tests/unit/test_planner_on_device.py", what)]


@pytest.mark.parametrize(
    ("use", "result"),
    [
        (lambda a: a.tolist(), [3, 1, 2]),
        (lambda a: a[a > 1].tolist(), [3, 2]),
        (lambda a: a[dev.argsort(a, kind="stable")].tolist(), [1, 2, 3]),
        (lambda a: a[0].item(), 3),
        (lambda a: len(a), 3),
        (lambda a: dev.where(a > 1, 0, a).tolist(), [0, 1, 0]),
        (lambda a: (a + np.int64(1)).tolist(), [4, 2, 3]),
        (lambda a: (1 + a - abs(-a) // 2).tolist(), [3, 2, 2]),
        (lambda a: dev.maximum.accumulate(a).tolist(), [3, 3, 3]),
        (lambda a: np.sort(a).tolist(), [1, 2, 3]),
        (lambda a: a.astype(bool).sum().item(), 3),
        (lambda a: dev.concatenate((a, a)).tolist(), [3, 1, 2, 3, 1, 2]),
    ],
)
def test_what_stays_on_the_device_or_leaves_it_in_plain_words_is_no_finding(
    found: device_arrays.Findings, use: Callable[[Any], Any], result: Any
) -> None:
    assert use(numbers()) == result
    assert not found


def test_a_column_is_changed_in_place_and_through_its_slices() -> None:
    column = numbers()
    column[column > 1] = 7
    column += 1
    dev.add.at(column, dev.asarray([0, 0]), 10)
    assert column.tolist() == [28, 2, 8]


def test_a_scalar_of_an_array_is_an_array_as_on_a_gpu() -> None:
    assert isinstance(numbers()[0], DeviceArray)
    assert isinstance(numbers().sum(), DeviceArray)
