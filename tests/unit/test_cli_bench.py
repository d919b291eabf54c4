"""`wattshift bench allocator`: one JSON object, whatever is asked; refusals that name the option."""

import json
import sys
from dataclasses import fields

import numpy as np
import pytest

from scheduler.cli import main
from scheduler.cli.exit_codes import ExitCode
from scheduler.model.policy import Policy
from scheduler.model.snapshot import Snapshot
from scheduler.planning.planner import digest, plan
from scheduler.simulation import plan_time
from scheduler.simulation.changes import changed, held_gpus, settled
from scheduler.simulation.plan_time import PlanTime
from scheduler.simulation.worlds import world

FIELDS = (
    "plan_seconds_p50",
    "plan_seconds_p90",
    "next_tick_seconds_p50",
    "jobs_placed",
    "gpus_used",
    "victims",
    "plan_digest",
    "peak_memory_mib",
    "memory_floor_seconds",
)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_time, "REPEATS_MAX", 2)
    monkeypatch.setattr(plan_time, "_BUFFER_BYTES", 1 << 20)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float | str]:
    assert main(["bench", "allocator", *arguments]) == ExitCode.OK
    found: dict[str, float | str] = json.loads(capsys.readouterr().out)
    return found


def test_all_figures_are_there_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--jobs", "300", "--gpus", "24", "--seed", "7", "--backend", "numpy")
    assert tuple(found) == FIELDS == tuple(field.name for field in fields(PlanTime))
    made = plan(world(300, 24, 7), Policy())
    kinds = [type(action).__name__ for action in made.actions]
    assert found["plan_digest"] == digest(made)
    assert found["victims"] == kinds.count("PreemptJob") > 0
    assert found["jobs_placed"] == kinds.count("StartJob") + len(made.awaited) > 0
    assert 0 < float(found["gpus_used"]) <= 24
    assert 0 < float(found["plan_seconds_p50"]) <= float(found["plan_seconds_p90"])
    for name in ("next_tick_seconds_p50", "memory_floor_seconds", "peak_memory_mib"):
        assert float(found[name]) > 0, name


def test_equal_seeds_give_equal_plans_and_different_seeds_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--jobs", "200", "--gpus", "16")
    counted = ("jobs_placed", "gpus_used", "victims", "plan_digest")
    one, again, other = (measured(capsys, *sizes, "--seed", seed) for seed in ("1", "1", "2"))
    assert [one[name] for name in counted] == [again[name] for name in counted]
    assert one["plan_digest"] != other["plan_digest"]


def test_one_job_and_one_gpu_are_a_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(capsys, "--jobs", "1", "--gpus", "1")["gpus_used"] in (0, 1)


def test_a_settled_world_has_nothing_left_to_do_until_things_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[int] = []

    def noted(snapshot: Snapshot, count: int, random: np.random.Generator) -> Snapshot:
        changes.append(count)
        return changed(snapshot, count, random)

    monkeypatch.setattr(plan_time, "changed", noted)
    found = measured(capsys, "--jobs", "300", "--gpus", "24", "--seed", "7", "--settled", "--changes", "5")
    assert found["jobs_placed"] == found["victims"] == 0
    made = settled(world(300, 24, 7), Policy())
    assert found["plan_digest"] == digest(plan(made, Policy()))
    assert found["gpus_used"] == held_gpus(made)
    assert set(changes) == {5}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--jobs", "0"),
        ("--jobs", "many"),
        ("--jobs", "10000001"),
        ("--gpus", "0"),
        ("--gpus", "1000001"),
        ("--seed", "-1"),
        ("--changes", "-1"),
        ("--backend", "torch"),
    ],
)
def test_what_is_out_of_range_is_refused_by_the_option_s_name(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert main(["bench", "allocator", option, value]) == ExitCode.INVALID
    said = capsys.readouterr()
    assert said.out == ""
    assert f"'{option}'" in said.err


def test_cupy_that_is_not_there_is_refused_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["bench", "allocator", "--backend", "cupy"]) == ExitCode.INVALID
    said = capsys.readouterr()
    assert said.out == ""
    assert "'--backend'" in said.err
    assert "pip install 'wattshift[cuda]'" in said.err


def test_the_peak_of_memory_is_that_since_it_was_forgotten() -> None:
    np.ones(200 << 17)  # 200 MiB, gone at once
    high_mib = plan_time.peak_memory_mib()
    plan_time.forget_peak_memory()
    assert plan_time.peak_memory_mib() < high_mib - 100
