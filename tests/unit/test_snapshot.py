"""A snapshot that contradicts itself can't be built, and the error names the row; odd worlds are ordinary."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scheduler.errors import SnapshotError
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import HoldingColumns, Snapshot
from scheduler.planning.planner import plan
from tests.fakes.power import B, P
from tests.fakes.power import snapshot as powered
from tests.fakes.worlds import (
    PREEMPTING,
    G,
    HandOver,
    J,
    N,
    Outcome,
    W,
    gpus,
    outcome,
    running,
    snapshot,
)

# Job 1 (row 0) and half of job 2 (row 1) run on node 0, job 3 (row 2) on node 1; job 4 (row 3) waits.
SHARE = {"share_milli": 500, "gpu_memory_mib": 30_000}
WORLD = W(
    jobs=(
        running(1, "GPU-0", "GPU-1"),
        running(2, "GPU-2", **SHARE),
        replace(running(3, "GPU-3"), node=1),
        J(4),
    ),
    gpus=(*gpus(3), G("GPU-3", 3, node=1)),
    nodes=(N(), N()),
    handovers=(HandOver("GPU-2", 500, 30_000),),
)


def changed(table: str, column: str, row: int, value: float) -> Snapshot:
    """WORLD's snapshot with one value in its place."""
    good = snapshot(WORLD)
    columns = getattr(good, table)
    values = getattr(columns, column)
    values = values.astype(float) if isinstance(value, float) else values.copy()
    values[row] = value
    return replace(good, **{table: replace(columns, **{column: values})})


def holding(good: Snapshot, *rows: tuple[int, int, int, int]) -> Snapshot:
    """The snapshot with these holdings more: job row, GPU row, thousandths, MiB."""
    columns = good.holdings
    added = np.array(rows, dtype=np.int64).T
    names = ("job", "gpu", "share_milli", "memory_mib")
    every = {name: np.concatenate([getattr(columns, name), a]) for name, a in zip(names, added, strict=True)}
    return replace(good, holdings=HoldingColumns(**every))


def test_the_world_that_the_tests_break_is_whole() -> None:
    assert len(snapshot(WORLD).holdings) == 5


@pytest.mark.parametrize(
    ("table", "column", "row", "value", "message"),
    [
        ("jobs", "value", 2, float("nan"), "jobs row 2: value is nan; the column is float64, not int64"),
        ("jobs", "priority", 0, float("inf"), "jobs row 0: priority is inf; the column is float64"),
        ("jobs", "gpus", 3, 1.5, "gpus is .*; the column is float64, not int64"),
        ("jobs", "number", 3, 2, r"jobs row 1 \(job 2\): the number is not unique"),
        ("jobs", "state", 3, 6, r"jobs row 3 \(job 4\): state is 6, not 0 to 5"),
        ("jobs", "state", 3, -1, r"jobs row 3 \(job 4\): state is -1, less than 0"),
        ("jobs", "job_class", 1, 4, r"jobs row 1 \(job 2\): job_class is 4, not 0 to 3"),
        ("jobs", "models", 1, 1, r"jobs row 1 \(job 2\): models is 1, not 0 to 0"),
        ("jobs", "share_milli", 3, 0, r"jobs row 3 \(job 4\): share_milli is 0, not 1 to 1000"),
        ("jobs", "gpus", 1, 2, r"jobs row 1 \(job 2\): asks for a share of 2 GPUs"),
        ("jobs", "gpus", 3, -1, r"jobs row 3 \(job 4\): gpus is -1, less than 0"),
        ("jobs", "cpus", 3, -8, r"jobs row 3 \(job 4\): cpus is -8, less than 0"),
        ("jobs", "memory_mib", 0, -1, r"jobs row 0 \(job 1\): memory_mib is -1, less than 0"),
        ("jobs", "gpu_memory_mib", 0, -1, r"jobs row 0 \(job 1\): gpu_memory_mib is -1, less than 0"),
        ("jobs", "min_runtime_us", 0, -1, r"jobs row 0 \(job 1\): min_runtime_us is -1, less than 0"),
        ("jobs", "grace_us", 0, -5, r"jobs row 0 \(job 1\): grace_us is -5, less than 0"),
        ("jobs", "restart_loss_us", 0, -5, r"jobs row 0 \(job 1\): restart_loss_us is -5, less than 0"),
        ("jobs", "node", 2, 2, r"jobs row 2 \(job 3\): runs on node 2 of 2"),
        ("jobs", "node", 2, -1, r"jobs row 2 \(job 3\): runs on node -1 of 2"),
        ("gpus", "node", 3, 2, r"gpus row 3 \(GPU-3\): node is 2, not 0 to 1"),
        ("gpus", "node", 3, -1, r"gpus row 3 \(GPU-3\): node is -1, not 0 to "),
        ("gpus", "state", 1, 2, r"gpus row 1 \(GPU-1\): state is 2, not 0 to 1"),
        ("gpus", "memory_mib", 1, -1, r"gpus row 1 \(GPU-1\): memory_mib is -1, less than 0"),
        ("nodes", "cpus", 1, -1, r"nodes row 1 \(node 1\): cpus is -1, less than 0"),
        ("nodes", "live_jobs_max", 0, -1, r"nodes row 0 \(node 0\): live_jobs_max is -1, less than 0"),
        ("nodes", "drain", 1, 3, r"nodes row 1 \(node 1\): drain is 3, not 0 to 2"),
        ("holdings", "gpu", 0, 4, r"holdings row 0 \(GPU row 4\): gpu is 4, not 0 to 3"),
        ("holdings", "gpu", 0, -1, r"holdings row 0 \(GPU row -1\): gpu is -1, not 0 to 3"),
        ("holdings", "job", 2, 4, r"holdings row 2 \(GPU-2\): job is 4, not -1 to 3"),
        ("holdings", "job", 0, -2, r"holdings row 0 \(GPU-0\): job is -2, not -1 to 3"),
        ("holdings", "job", 3, 3, r"holdings row 3 \(GPU-3\): held by job 4, which is pending"),
        ("holdings", "job", 3, 0, r"holdings row 0 \(GPU-0\): job 1 holds 3 GPUs of 2"),
        ("jobs", "node", 2, 0, r"holdings row 3 \(GPU-3\): on node 1, held by job 3 on node 0"),
        ("jobs", "node", 0, 1, r"holdings row 0 \(GPU-0\): on node 0, held by job 1 on node 1"),
        ("holdings", "job", 2, 0, r"holdings row 2 \(GPU-2\): job 1 holds another share than its 1000"),
        ("holdings", "share_milli", 2, 0, r"holdings row 2 \(GPU-2\): share_milli is 0, not 1 to 1000"),
        ("holdings", "share_milli", 4, 501, r"holdings row 2 \(GPU-2\): 1001 thousandths of it are held"),
        ("holdings", "memory_mib", 4, -1, r"holdings row 4 \(GPU-2\): memory_mib is -1, less than 0"),
        ("holdings", "memory_mib", 4, 50_001, r"holdings row 2 \(GPU-2\): 80001 MiB of it are held"),
    ],
)  # fmt: skip
def test_a_snapshot_that_contradicts_itself_names_the_row(
    table: str, column: str, row: int, value: float, message: str
) -> None:
    with pytest.raises(SnapshotError, match=message):
        changed(table, column, row, value)


def test_a_gang_may_hold_gpus_of_several_nodes_of_which_its_own_is_one() -> None:
    gang = replace(running(1, "GPU-0", "GPU-3"), node=1)
    world = W(jobs=(gang,), gpus=(*gpus(3), G("GPU-3", 3, node=1)), nodes=(N(), N()))
    assert len(snapshot(world).holdings) == 2
    with pytest.raises(SnapshotError, match=r"holdings row 0 \(GPU-0\): on node 0, held by job 1 on node 2"):
        snapshot(replace(world, jobs=(replace(gang, node=2),), nodes=(N(), N(), N())))


def test_a_job_that_holds_more_gpus_than_it_wants_is_named() -> None:
    good = snapshot(replace(WORLD, gpus=(*WORLD.gpus, G("GPU-4", 4, node=1)), handovers=()))
    with pytest.raises(SnapshotError, match=r"holdings row 3 \(GPU-3\): job 3 holds 2 GPUs of 1"):
        holding(good, (2, 4, 1000, 0))


def test_a_gpu_of_which_two_jobs_together_have_more_memory_than_there_is_is_named() -> None:
    with pytest.raises(SnapshotError, match=r"\(GPU-2\): 90000 MiB of it are held; it has 80000"):
        snapshot(replace(WORLD, handovers=(HandOver("GPU-2", 500, 60_000),)))


def test_what_a_closed_gpu_says_of_its_memory_is_not_held_against_its_jobs() -> None:
    lost = replace(WORLD.gpu("GPU-2"), memory_mib=0, is_open=False)
    world = replace(WORLD, gpus=tuple(lost if gpu.uuid == "GPU-2" else gpu for gpu in WORLD.gpus))
    assert len(snapshot(world).holdings) == 5


def test_two_gpus_of_one_name_are_named() -> None:
    with pytest.raises(SnapshotError, match=r"gpus row 2 \(GPU-0\): has the UUID of row 0"):
        snapshot(W(gpus=(*gpus(2), G("GPU-0", 2))))


@pytest.mark.parametrize("now_us", [float("nan"), 1.5e15, None])
def test_a_moment_that_is_no_whole_number_is_refused(now_us: Any) -> None:
    with pytest.raises(SnapshotError, match="now_us is"):
        replace(snapshot(WORLD), now_us=now_us)


def test_columns_of_unequal_length_and_fits_of_other_gpus_are_refused() -> None:
    good = snapshot(WORLD)
    with pytest.raises(SnapshotError, match=r"jobs.value has 3 rows, jobs has 4"):
        replace(good, jobs=replace(good.jobs, value=good.jobs.value[:3]))
    with pytest.raises(SnapshotError, match=r"model_fits is bool of shape \(1, 3\) for 4 GPUs"):
        replace(good, model_fits=good.model_fits[:, :3])
    with pytest.raises(SnapshotError, match="model_fits is float64"):
        replace(good, model_fits=good.model_fits.astype(float))


HELD = running(1, "GPU-0", "GPU-1")


@pytest.mark.parametrize(
    ("world", "waits"),
    [
        (W(), {}),
        (W(nodes=()), {}),
        (W(nodes=(), jobs=(J(1),)), {1: Reason.NODE_DRAINING}),
        (W(jobs=(J(1), J(2, gpus=4))), {1: Reason.NO_SUITABLE_GPU, 2: Reason.NO_SUITABLE_GPU}),
        (W(gpus=gpus(4)), {}),
        (W(gpus=gpus(2, is_open=False)), {}),
        (W(gpus=gpus(2, is_open=False), jobs=(HELD, J(2))), {2: Reason.NO_SUITABLE_GPU}),
        (W(gpus=(*gpus(1), G("GPU-9", node=1)), nodes=(N(), N(), N())), {}),
        (W(gpus=gpus(2), jobs=(replace(HELD, state=PREEMPTING),)), {}),
    ],
)
def test_nothing_to_give_and_nobody_to_serve_are_ordinary(world: W, waits: dict[int, Reason]) -> None:
    assert outcome(plan(snapshot(world), Policy())) == Outcome(waits=waits)


def test_watts_that_cant_be_name_their_row() -> None:
    power = P(W(gpus=gpus(1)), boards={"GPU-0": B(limit_w_min=800)})
    with pytest.raises(SnapshotError, match="power row 0: limit_w_max is 700"):
        powered(power)
    with pytest.raises(SnapshotError, match="power row 0: idle_w is -1"):
        powered(replace(power, boards={"GPU-0": B(idle_w=-1)}))
    fine = powered(replace(power, boards={}))
    with pytest.raises(SnapshotError, match=r"power.natural_w has 1 rows; there are 0"):
        replace(fine, power=replace(fine.power, natural_w=np.array([1])))
