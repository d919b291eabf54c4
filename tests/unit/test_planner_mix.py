"""What the jobs of a snapshot ask for, most often first."""

from itertools import permutations

import pytest

from scheduler.planning import mix
from scheduler.planning.mix import mix_of
from tests.fakes.worlds import G, J, W, running, snapshot

JOBS = (
    J(1, gpus=8, cpus=16),
    J(2, share_milli=500, gpu_memory_mib=10_000),
    running(3, "GPU-0", node=0),
    J(4, share_milli=500, gpu_memory_mib=10_000),
    J(5, gpus=8, cpus=16),
    J(6, gpus=8, cpus=16),
)


def kinds(*jobs: J) -> list[tuple[int, ...]]:
    """GPUs, thousandths, GPU memory, CPUs, weight of each kind."""
    found = mix_of(snapshot(W(jobs=jobs, gpus=(G("GPU-0"),))).jobs)
    columns = (found.gpus, found.share_milli, found.gpu_memory_mib, found.cpus, found.weight)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_equal_requests_are_one_kind_and_the_most_frequent_is_first() -> None:
    assert kinds(*JOBS) == [(8, 1000, 0, 16, 3), (1, 500, 10_000, 0, 2), (1, 1000, 0, 0, 1)]


def test_without_jobs_nothing_is_asked_for() -> None:
    assert kinds() == []


def test_the_order_of_the_rows_changes_nothing() -> None:
    assert {tuple(kinds(*order)) for order in permutations(JOBS)} == {tuple(kinds(*JOBS))}


def test_of_many_jobs_every_so_manieth_by_number_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "JOBS_MAX", 2)
    # The first and the fourth.
    assert sorted(kinds(*JOBS)) == [(1, 500, 10_000, 0, 1), (8, 1000, 0, 16, 1)]


def test_only_the_most_frequent_kinds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "KINDS_MAX", 1)
    assert kinds(*JOBS) == [(8, 1000, 0, 16, 3)]
