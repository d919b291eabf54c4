"""Which array library plans, and what is said where the one that was asked for is missing."""

import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

from scheduler.errors import BackendUnavailable
from scheduler.planning import arrays
from scheduler.planning.arrays import POOL_MIB_MAX, Backend, choose, on_backend, xp
from tests.fakes.worlds import J, W, gpus, snapshot


@pytest.fixture(autouse=True)
def numpy_afterwards() -> Iterator[None]:
    yield
    arrays.bind(np)


def fake_cupy(*, has_gpu: bool) -> types.ModuleType:
    """CuPy as far as choosing it goes; its pool remembers its limit, its arrays are numpy's."""

    class Pool:
        limit = 0

        def set_limit(self, *, size: int) -> None:
            self.limit = size

    pool = Pool()
    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(is_available=lambda: has_gpu)
    module.get_default_memory_pool = lambda: pool
    module.asarray = lambda values: np.array(values).view(OnGpu)
    return module


class OnGpu(np.ndarray):
    pass


def test_without_a_choice_numpy_plans() -> None:
    assert xp.where is np.where


def test_cupy_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'wattshift\[cuda\]'"):
        choose(Backend.CUPY, jobs=10, gpu_is_set_aside=True)
    assert xp.where is np.where


def test_cupy_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(has_gpu=False))
    with pytest.raises(BackendUnavailable, match="finds no GPU"):
        choose(Backend.CUPY, jobs=10, gpu_is_set_aside=True)
    assert xp.where is np.where


def test_cupy_is_bound_with_a_bounded_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy(has_gpu=True)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert choose(Backend.CUPY, jobs=10, gpu_is_set_aside=True) is Backend.CUPY
    assert xp.cuda is cupy.cuda
    assert cupy.get_default_memory_pool().limit == POOL_MIB_MAX << 20
    assert choose(Backend.NUMPY, jobs=10, gpu_is_set_aside=True) is Backend.NUMPY
    assert xp.where is np.where


@pytest.mark.parametrize(
    ("wins_from", "gpu_is_set_aside", "chosen"),
    [
        (None, True, Backend.NUMPY),
        (1000, False, Backend.NUMPY),
        (1001, True, Backend.NUMPY),
        (1000, True, Backend.CUPY),
    ],
)
def test_auto_takes_cupy_only_where_it_was_measured_to_win_and_a_gpu_is_set_aside(
    monkeypatch: pytest.MonkeyPatch, wins_from: int | None, gpu_is_set_aside: bool, chosen: Backend
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(has_gpu=True))
    monkeypatch.setattr(arrays, "CUPY_WINS_FROM_JOBS", wins_from)
    assert choose(Backend.AUTO, jobs=1000, gpu_is_set_aside=gpu_is_set_aside) is chosen


def test_a_snapshot_moves_whole_to_where_the_library_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(has_gpu=True))
    here = snapshot(W(jobs=(J(1), J(2)), gpus=gpus(2)))
    assert on_backend(here) is here
    choose(Backend.CUPY, jobs=2, gpu_is_set_aside=True)
    there = on_backend(here)
    parts = ((here.jobs, there.jobs), (here.gpus, there.gpus), (here.nodes, there.nodes))
    for before, after in (*parts, (here.holdings, there.holdings), (here, there)):
        for name in before.__slots__:
            one, two = getattr(before, name), getattr(after, name)
            if isinstance(one, np.ndarray):
                assert isinstance(two, OnGpu), name
                assert two.tolist() == one.tolist(), name
    assert (there.now_us, there.gpus.uuid) == (here.now_us, here.gpus.uuid)
