"""The replay of the published experiment, on a cluster of three nodes that a person can follow."""

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import openb
from tests.benchmarks.openb import (
    POLICIES,
    Cluster,
    Workload,
    book,
    draw_of,
    read_cluster,
    read_workload,
    replay,
)
from tests.benchmarks.openb_policies import Fgd, Task, typical_tasks

SEED = 42
NODES = """sn,cpu_milli,memory_mib,gpu,model
n0,32000,1000,2,T4
n1,64000,1000,1,G3
n2,16000,1000,1,P100
"""
TASKS = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec
t2,1000,10,1,500,T4|P100
t0,1000,10,2,1000,
t1,1000,10,0,0,
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "openb_node_list_gpu_node.csv").write_text(NODES)
    (tmp_path / "openb_pod_list_small.csv").write_text(TASKS)
    arrivals = np.array([1, 2, 0, 2, 2, 0], np.uint16)
    np.savez(tmp_path / "arrival_order_small.npz", order_42=arrivals, perm_42=np.array([2, 1, 0], np.uint16))
    return tmp_path


def test_tasks_are_in_the_order_of_their_names_and_name_their_models_by_set(folder: Path) -> None:
    workload = read_workload(folder, "small")
    assert workload.specs == ("T4|P100",)
    assert workload.tasks == (
        Task(2, 1000, 0, -1, 1000, 10),
        Task(0, 1000, 0, -1, 1000, 10),
        Task(1, 500, 0, 0, 1000, 10),
    )
    assert {seed: order.tolist() for seed, order in workload.arrivals.items()} == {SEED: [1, 2, 0, 2, 2, 0]}
    assert {seed: rank.tolist() for seed, rank in workload.tie_ranks.items()} == {SEED: [2, 1, 0]}


def test_a_cluster_is_free_where_it_has_gpus_and_serves_whom_its_models_are_named_by(folder: Path) -> None:
    free = read_cluster(folder).pool(("T4|P100",))
    assert free.milli.tolist() == [[1000, 1000], [1000, 0], [1000, 0]]
    assert free.fits.tolist() == [[[True, True], [False, False], [True, False]]]
    assert free.cpus.tolist() == [32_000, 64_000, 16_000]


def test_draw_counts_touched_gpus_and_woken_packages(folder: Path) -> None:
    cluster = read_cluster(folder)
    free = cluster.pool(())
    every = np.arange(3)
    # 2 T4 and a package; a G3 and two packages; a P100 and a package, all idle.
    assert draw_of(free, cluster.watts(), every).tolist() == [2 * 10 + 15, 50 + 2 * 15, 25 + 15]
    book(free, Task(1, 500, 0, -1, 33_000, 10), 1, 0)
    assert draw_of(free, cluster.watts(), every).tolist() == [2 * 10 + 15, 400 + 2 * 120, 25 + 15]


def test_figures_are_means_over_the_arrivals_at_which_the_cumulated_request_rounds_to_the_percent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openb, "ALLOCATED_AT_PERCENT", (0, 63, 75, 138))
    monkeypatch.setattr(openb, "DRAW_AT_PERCENT", (0, 13))
    result = replay(read_cluster(folder), read_workload(folder, "small"), SEED, POLICIES["best_fit"])
    # Of 4000 thousandths: a CPU task (0), half a GPU (12.5), two (62.5), half a one (75); then half a one
    # (87.5), where all that serves it is taken, and two (137.5) fit nowhere. Halves round up.
    assert result.allocated_percent == {0: 0.0, 63: 62.5, 75: 75.0, 138: 75.0}
    # The CPU task and the first half go to the smallest node, the last one.
    idle_w, package_w, p100_w = 35 + 80 + 40, 120 - 15, 250 - 25
    assert result.draw_kw == {0: (idle_w + package_w) / 1000, 13: (idle_w + package_w + p100_w) / 1000}


def test_what_does_not_fit_is_not_booked(folder: Path) -> None:
    free = read_cluster(folder).pool(("T4|P100",))
    for task, node, position in (
        (Task(2, 1000, 0, -1, 0, 0), 1, -1),
        (Task(1, 500, 0, 0, 0, 0), 1, 0),
        (Task(0, 1000, 0, -1, 32_001, 0), 0, -1),
        (Task(0, 1000, 0, -1, 0, 1_001), 0, -1),
    ):
        with pytest.raises(AssertionError, match="the policy says"):
            book(free, task, node, position)


def test_typical_tasks_are_the_most_frequent_and_their_frequencies_sum_to_one() -> None:
    often, seldom, rare = (
        Task(1, 500, 0, 0, 1000, 7),
        Task(0, 1000, 0, -1, 2000, 9),
        Task(8, 1000, 0, -1, 1, 0),
    )
    tasks = [often] * 60 + [seldom] * 36 + [rare] * 4
    typical, frequency = typical_tasks(tasks, ("T4",))
    assert typical == [Task(1, 500, 0, 0, 1000, 0), Task(0, 0, 0, -1, 2000, 0)]
    assert frequency.tolist() == pytest.approx([60 / 96, 36 / 96])


def test_fgd_leaves_a_whole_gpu_whole() -> None:
    cluster = Cluster(("T4", "T4"), np.ones((2, 1), bool), np.array([9000, 9000]), np.array([100, 100]))
    free = cluster.pool(())
    share, whole = Task(1, 300, 0, -1, 1000, 0), Task(1, 1000, 0, -1, 1000, 0)
    policy = Fgd(free, np.array([0, 1]), [share, whole], ())
    book(free, share, 1, 0)
    policy.changed(1)
    assert policy.best(share) == (1, 0)
    assert policy.best(whole) == (0, -1)


def test_the_table_sets_means_beside_the_published_ones(folder: Path) -> None:
    (folder / "published_allocation_percent.csv").write_text(
        "workload,policy,seed,allocated_percent_at_arrived_100,allocated_percent_at_arrived_130\n"
        "small,fgd,42,90.00,91.00\nsmall,fgd,43,92.00,93.00\n"
    )
    near = openb.Result({100: 90.004, 130: 91.0}, {50: 1.0, 80: 2.0})
    far = openb.Result({100: 91.0, 130: 93.0}, {50: 2.0, 80: 4.0})
    results = {("small", "fgd", 42): near, ("small", "fgd", 43): far, ("small", "ours", 42): near}
    assert openb.table(folder, results).splitlines()[2:] == [
        "| small | fgd | 90.50 | 92.00 | 91.00 / 92.00 | 1 of 2 | 1.5 | 3.0 |",
        "| small | ours | 90.00 | 91.00 |  |  | 1.0 | 2.0 |",
    ]


def test_the_mix_counts_each_kind_of_request() -> None:
    often, seldom = Task(1, 500, 0, 0, 1000, 7), Task(0, 1000, 0, -1, 2000, 9)
    workload = Workload((seldom, often, often), ("T4",), {}, {})
    mix = openb.mix_of(workload.tasks)
    assert {name: getattr(mix, name).tolist() for name in mix.__slots__} == {
        "gpus": [1, 0],
        "share_milli": [500, 1000],
        "gpu_memory_mib": [0, 0],
        "cpus": [1000, 2000],
        "memory_mib": [7, 9],
        "models": [0, -1],
        "weight": [2, 1],
    }


def test_one_plan_of_all_that_arrives_allocates_as_much_as_the_replay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openb, "ALLOCATED_AT_PERCENT", (0, 63, 75, 138))
    monkeypatch.setattr(openb, "DRAW_AT_PERCENT", (0, 13))
    cluster, workload = read_cluster(folder), read_workload(folder, "small")
    planned = replay(cluster, workload, SEED, POLICIES["planner"])
    assert planned.allocated_percent == {0: 0.0, 63: 62.5, 75: 75.0, 138: 75.0}
