"""CuPy on a real GPU plans, bit for bit, what numpy plans. Skipped without a GPU and the extra `cuda`."""

from collections.abc import Iterator

import numpy as np
import pytest

from scheduler.errors import BackendUnavailable
from scheduler.model.policy import Order, Policy
from scheduler.model.snapshot import Snapshot
from scheduler.planning import arrays
from scheduler.planning.arrays import Backend, choose, on_backend
from scheduler.planning.planner import Memo, digest, plan
from scheduler.simulation.changes import carried_out, changed
from scheduler.simulation.worlds import world

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SIZES = ((1, 1), (50, 8), (1_000, 64), (20_000, 64), (2_000, 400))
SEEDS = (1, 2)
POLICIES = tuple(Policy(order=order, backfill=backfill) for order in Order for backfill in (True, False))
TICKS = 3
CHANGES = 100


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    try:
        choose(Backend.CUPY, jobs=1, gpu_is_set_aside=True)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    arrays.bind(np)
    yield
    arrays.bind(np)


def planned_on(backend: Backend, snapshot: Snapshot, policy: Policy, memo: Memo | None = None) -> str:
    choose(backend, jobs=len(snapshot.jobs), gpu_is_set_aside=True)
    return digest(plan(on_backend(snapshot), policy, memo))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.order}-{policy.backfill}")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("jobs", "gpus"), SIZES)
def test_a_gpu_plans_what_numpy_plans(jobs: int, gpus: int, seed: int, policy: Policy) -> None:
    snapshot = world(jobs, gpus, seed)
    expected = planned_on(Backend.NUMPY, snapshot, policy)
    assert planned_on(Backend.CUPY, snapshot, policy) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gpu_plans_tick_by_tick_what_numpy_plans(seed: int) -> None:
    random = np.random.default_rng(seed)
    snapshot, policy = world(1_000, 64, seed), Policy()
    memos = {backend: Memo() for backend in (Backend.NUMPY, Backend.CUPY)}
    for _ in range(TICKS):
        digests = [planned_on(backend, snapshot, policy, memo) for backend, memo in memos.items()]
        assert digests[0] == digests[1]
        choose(Backend.NUMPY, jobs=len(snapshot.jobs), gpu_is_set_aside=True)
        snapshot = changed(carried_out(snapshot, plan(snapshot, policy)), CHANGES, random)
