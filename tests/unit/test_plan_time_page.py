"""The tool that measures plan time: which cells it tries, and what it writes where."""

import pytest

from tools import plan_time

CELL = {
    "plan_seconds_p50": 0.012345,
    "plan_seconds_p90": 0.02,
    "next_tick_seconds_p50": 0.5,
    "jobs_placed": 1234,
    "gpus_used": 8,
    "victims": 5,
    "plan_digest": "0",
    "peak_memory_mib": 41.6,
    "memory_floor_seconds": 0.0001,
}


def test_what_is_larger_in_both_directions_than_what_was_given_up_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def measured(jobs: int, gpus: int, *_: object) -> plan_time.Cell:
        tried.append((jobs, gpus))
        return None if (jobs, gpus) in ((1_000_000, 64), (10_000, 1_000)) else CELL

    monkeypatch.setattr(plan_time, "measured", measured)
    cells = plan_time.table(1.0, 0, "numpy")
    assert len(cells) == len(plan_time.JOBS) * len(plan_time.GPUS)
    given_up = {size for size, cell in cells.items() if cell is None}
    assert given_up - set(tried) == {
        (jobs, gpus)
        for gpus in (1_000, 10_000, 100_000)
        for jobs in (10_000, 100_000, 1_000_000)
        if (jobs, gpus) != (10_000, 1_000)
    }


def test_a_settled_fleet_is_measured_with_each_number_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(jobs: int, gpus: int, *more: object) -> plan_time.Cell:
        asked.append((jobs, gpus, *more[3:]))
        return None if more[-1] == "9" and jobs == 100 else CELL

    monkeypatch.setattr(plan_time, "measured", measured)
    monkeypatch.setattr(plan_time, "SETTLED", ((100, 8), (200, 8)))
    monkeypatch.setattr(plan_time, "SETTLED_CHANGES", (5, 9))
    assert plan_time.settled_times(1.0, 0, "numpy") == [
        "### Seconds of settled fleets, p50",
        "",
        "| jobs | GPUs | cold plan | tick, 5 changes | tick, 9 changes | floor |",
        "|--:|--:|--:|--:|--:|--:|",
        "| 100 | 8 | 0.012 | 0.5 | given up | 0.0001 |",
        "| 200 | 8 | 0.012 | 0.5 | 0.5 | 0.0001 |",
        "",
    ]
    assert asked == [
        (jobs, 8, "--settled", "--changes", changes) for jobs in (100, 200) for changes in ("5", "9")
    ]
    assert plan_time.settled_text([None, None]) == "given up | given up | given up | given up"


def test_a_cell_shows_times_and_what_was_placed_and_one_given_up_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_time, "JOBS", (1_000, 10_000))
    monkeypatch.setattr(plan_time, "GPUS", (8,))
    lines = plan_time.plan_times({(1_000, 8): CELL, (10_000, 8): None})
    assert lines == [
        "### Seconds: cold plan p50 / next tick p50",
        "",
        "| jobs | 8 GPUs | floor |",
        "|--:|--:|--:|",
        "| 1,000 | 0.012 / 0.5 | 0.0001 |",
        "| 10,000 | given up | – |",
        "",
        "### Jobs placed / victims / peak MiB",
        "",
        "| jobs | 8 GPUs |",
        "|--:|--:|",
        "| 1,000 | 1,234 / 5 / 42 |",
        "| 10,000 | – |",
        "",
    ]


def test_only_what_stands_between_the_marks_is_rewritten() -> None:
    page = plan_time.PAGE.read_text(encoding="utf-8")
    once = plan_time.rewritten(page, ["new"])
    assert f"{plan_time.BEGIN}\n\nnew\n{plan_time.END}" in once
    assert once.partition(plan_time.BEGIN)[0] == page.partition(plan_time.BEGIN)[0]
    assert once.partition(plan_time.END)[2] == page.partition(plan_time.END)[2]
    assert plan_time.rewritten(once, ["new"]) == once


def test_the_ticks_of_a_node_are_told_with_how_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_time, "NODE_SEEDS", 2)
    monkeypatch.setattr(plan_time, "NODE_TICKS", 3)
    taken_s = iter([0.001, 0.002, 0.003, 0.004, 0.005, 0.009])
    real = plan_time.timed
    monkeypatch.setattr(plan_time, "timed", lambda *world: (next(taken_s), real(*world)[1]))
    title, _, text, _ = plan_time.node_ticks()
    assert title.startswith("### A node of 8 GPUs, 1,0")
    assert text == "3 ticks in a row after 10 changes each, on 2 seeds: p50 3.50 ms; by seed 2.00 to 5.00."
