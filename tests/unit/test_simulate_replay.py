"""Small workloads replayed whole: what ran where and when, what it earned, what it drew, when it is over."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler.model.jobs import JobClass
from scheduler.model.policy import CLASS_DEFAULTS, Order, Policy
from scheduler.model.settings import PowerConfig
from scheduler.simulation.inputs import EventRow, JobStore, NodeRow, PriceRow, Room
from scheduler.simulation.outputs import percentile, summary
from scheduler.simulation.replay import CLASSES, World, replay

HEADER = (
    "job_id,submit_s,class,gpus,duration_s,value_usd_per_gpu_hour,draw_w,restart_loss_s,deadline_s,gpu_share_milli,"
    "priority,expected_s,preemptible,cpus"
)
Replayed = tuple[dict[str, Any], list[dict[str, str]], list[dict[str, str]]]
Replay = Callable[..., Replayed]


def node(name: str = "n0", gpus: int = 1, base_w: float = 100.0) -> NodeRow:
    return NodeRow(name, "H100", gpus, 80_000, 8_000, 100_000, 50.0, 200.0, 700.0, base_w)


@pytest.fixture
def replayed(tmp_path: Path) -> Replay:
    """Replays rows on nodes: the summary, attempts.csv and timeline.csv."""

    def run(rows: str, *nodes: NodeRow, **world: Any) -> Replayed:
        jobs = tmp_path / "jobs.csv"
        lines = [line.strip() for line in rows.strip().splitlines()]
        jobs.write_text("\n".join([HEADER, *(line + "," * (13 - line.count(",")) for line in lines)]))
        nodes = nodes or (node(),)
        store = JobStore()
        store.load(jobs, Room(nodes))
        outcome = replay(World(tuple(nodes), **world), store, tmp_path)
        store.close()
        files = (tmp_path / "attempts.csv", tmp_path / "timeline.csv")
        attempts, timeline = (list(csv.DictReader(path.read_text().splitlines())) for path in files)
        return {**summary(outcome), "refusals": outcome.refusals}, attempts, timeline

    return run


def test_a_job_runs_for_as_long_as_it_says_and_pays_when_it_is_complete(replayed: Replay) -> None:
    prices = (PriceRow(0.0, 100.0, 0.0), PriceRow(510.0, -40.0, 0.0))
    found, attempts, timeline = replayed("a,10,BATCH,1,1000,0.9,400", prices=prices)
    batch, site = found["classes"]["batch"], found["site"]
    assert attempts == [
        {
            "job_id": "a", "attempt": "1", "node_id": "n0", "gpus": "0", "gpu_share_milli": "1000",
            "start_s": "10.000", "end_s": "1010.000", "end_reason": "EXITED_ZERO",
        }
    ]  # fmt: skip
    assert (batch["jobs"], batch["completed"], batch["wait_seconds_p99"]) == (1, 1, 0.0)
    assert batch["completion_seconds_mean"] == pytest.approx(1000.0, abs=1e-5)
    assert batch["gpu_seconds"] == pytest.approx(1000.0, abs=1e-5)
    assert batch["value_usd"] == pytest.approx(0.25)
    # 350 W more than idle for 1000 s; the last settling is not over when the simulation is.
    joules = 150.0 * site["end_seconds"] + 350.0 * 1000.0
    assert site["energy_kwh"] == pytest.approx(joules / 3.6e6, rel=1e-3)
    cost_usd = (150.0 * 510.0 + 350.0 * 500.0) / 3.6e9 * 100.0 - 500.0 * 500.0 / 3.6e9 * 40.0
    assert site["energy_cost_usd"] == pytest.approx(cost_usd, rel=5e-3)
    assert site["profit_usd"] == pytest.approx(0.25 - cost_usd, rel=1e-3)
    assert [(row["time_s"], row["running_jobs"], row["draw_w"], row["usd_per_mwh"]) for row in timeline] == [
        ("0.000", "0", "150.0", "100.0000"),
        ("10.000", "1", "500.0", "100.0000"),
        ("510.000", "1", "500.0", "-40.0000"),
        ("1010.000", "0", "150.0", "-40.0000"),
    ]


def test_what_happens_in_one_moment_is_known_together(replayed: Replay) -> None:
    """The GPU that comes free at 100 s is there for who comes then; no time is lost between."""
    rows = "a,0,BATCH,1,100,,,60\nlong,0,BATCH,1,900,,,60\nnew,100,TRAINING,1,800,,,,900,,,800"
    found, attempts, _ = replayed(rows, node(gpus=2))
    assert sum(each["preemptions"] for each in found["classes"].values()) == 0
    assert {row["job_id"]: (row["start_s"], row["end_reason"]) for row in attempts} == {
        "a": ("0.000", "EXITED_ZERO"),
        "long": ("0.000", "EXITED_ZERO"),
        "new": ("100.000", "EXITED_ZERO"),
    }
    assert found["classes"]["training"]["completed"] == 1


def test_a_limit_costs_what_the_policys_curve_says_and_in_proportion_without_one(replayed: Replay) -> None:
    events = (EventRow("e", 0.0, 10_000.0, 500.0, 0.0, True),)
    row = "a,1,TRAINING,1,1000,,500"  # 400 W are left to it
    _, (plain,), _ = replayed(row, events=events, until_s=5000.0)
    assert float(plain["end_s"]) - float(plain["start_s"]) == pytest.approx(1250.0, rel=0.01)
    classes = {**CLASSES, JobClass.TRAINING: CLASS_DEFAULTS[JobClass.TRAINING]}
    _, (named,), _ = replayed(row, events=events, until_s=5000.0, policy=Policy(classes=classes))
    work = 0.844 + (0.8 - 0.711) / (0.951 - 0.711) * (0.979 - 0.844)
    assert float(named["end_s"]) - float(named["start_s"]) == pytest.approx(1000.0 / work, rel=0.01)


def test_a_victim_goes_on_where_it_was_after_its_restart_loss(replayed: Replay) -> None:
    found, attempts, _ = replayed("low,0,BATCH,1,1000,,,60\nhigh,400,INFERENCE,1,100")
    assert [(row["job_id"], row["attempt"], row["end_reason"]) for row in attempts] == [
        ("low", "1", "PREEMPTED_BY_HIGHER_RANK"),
        ("high", "1", "EXITED_ZERO"),
        ("low", "2", "EXITED_ZERO"),
    ]
    batch = found["classes"]["batch"]
    assert (batch["preemptions"], batch["lost_gpu_seconds"]) == (1, pytest.approx(60.0, abs=1e-3))
    assert float(attempts[2]["end_s"]) == pytest.approx(400.0 + 100.0 + 60.0 + 600.0, abs=0.02)
    assert found["classes"]["inference"]["wait_seconds_mean"] < 0.01  # it stops at once, whatever its grace


def test_mining_earns_by_the_second_of_useful_work_and_is_over_when_nothing_can_change(
    replayed: Replay,
) -> None:
    rows = "m,0,MINING,1,inf,3.6,,50\nb,1000,BATCH,1,500,0"
    found, attempts, _ = replayed(rows)
    assert [row["end_reason"] for row in attempts] == [
        "PREEMPTED_BY_HIGHER_RANK", "EXITED_ZERO", "SIMULATION_ENDED",
    ]  # fmt: skip
    assert found["site"]["end_seconds"] == pytest.approx(1500.0, abs=0.05)
    assert found["classes"]["mining"]["value_usd"] == pytest.approx(1.0, abs=1e-4)
    assert found["classes"]["mining"]["unfinished"] == 1


def test_until_cuts_off_what_runs(replayed: Replay) -> None:
    rows = "m,0,MINING,1,inf,3.6,,50\nb,1000,BATCH,1,500,7.2\nlate,9000,BATCH,1,1"
    found, attempts, timeline = replayed(rows, until_s=1700.0)
    assert found["site"]["end_seconds"] == pytest.approx(1700.0)
    # 1000 s before, and of the 200 s after it 50 s to get going again.
    assert found["classes"]["mining"]["value_usd"] == pytest.approx(1.15, abs=1e-4)
    assert found["classes"]["mining"]["lost_gpu_seconds"] == pytest.approx(50.0, abs=1e-3)
    assert found["classes"]["batch"]["value_usd"] == pytest.approx(1.0)
    assert (attempts[-1]["end_s"], attempts[-1]["end_reason"]) == ("1700.000", "SIMULATION_ENDED")
    assert all(float(row["time_s"]) <= 1700.0 for row in timeline)


def test_what_is_complete_too_late_earns_nothing(replayed: Replay) -> None:
    rows = "late,0,BATCH,1,1000,3.6,,,900\nlucky,2000,BATCH,1,1000,3.6,,,3001"
    found, attempts, _ = replayed(rows)
    batch = found["classes"]["batch"]
    assert (batch["completed"], batch["failed"], batch["value_usd"]) == (1, 1, pytest.approx(1.0))
    assert [row["end_reason"] for row in attempts] == ["DEADLINE_MISSED", "EXITED_ZERO"]
    assert float(attempts[0]["end_s"]) == pytest.approx(900.0, abs=0.01)


def test_it_is_over_when_who_waits_would_wait_for_ever(replayed: Replay) -> None:
    found, attempts, _ = replayed("first,0,INFERENCE,1,inf\nsecond,5,INFERENCE,1,100")
    assert found["site"]["end_seconds"] == pytest.approx(5.0, abs=0.01)
    assert found["classes"]["inference"]["unfinished"] == 2
    assert [row["job_id"] for row in attempts] == ["first"]


def test_shares_are_side_by_side_and_draw_by_share(replayed: Replay) -> None:
    rows = "a,0,BATCH,1,100,3.6,450,,,600\nb,0,BATCH,1,100,3.6,250,,,400\nc,0,BATCH,1,100,3.6,,,,500"
    found, attempts, timeline = replayed(rows)
    shares = {row["job_id"]: (row["gpu_share_milli"], row["start_s"]) for row in attempts}
    assert shares == {"a": ("600", "0.000"), "b": ("400", "0.000"), "c": ("500", "100.000")}
    assert float(timeline[0]["draw_w"]) == pytest.approx(150.0 + 0.6 * 400 + 0.4 * 200)
    assert max(int(row["allocated_gpu_milli"]) for row in timeline) == 1000
    assert timeline[-1]["arrived_gpu_milli"] == "1500"
    assert found["classes"]["batch"]["gpu_seconds"] == pytest.approx(150.0, abs=1e-3)
    assert found["classes"]["batch"]["value_usd"] == pytest.approx(0.15)


def test_all_nodes_are_planned_for_at_once(replayed: Replay) -> None:
    nodes = (node("small", 1), node("wide", 4), node("cpus", 0))
    cpus = "BATCH,0,50,,,,,,,,,7.5"
    rows = f"gang,0,TRAINING,4,100\none,0,TRAINING,1,100\ncpu,0,{cpus}\ncpu2,0,{cpus}"
    found, attempts, _ = replayed(rows, *nodes)
    places = {row["job_id"]: (row["node_id"], row["gpus"]) for row in attempts}
    assert places["gang"] == ("wide", "0|1|2|3")
    assert places["one"] == ("small", "0")
    assert len({places["cpu"][0], places["cpu2"][0]}) == 2
    assert places["cpu"][1] == ""
    assert found["site"]["energy_kwh"] > 3 * 100.0 * 100.0 / 3.6e6


def test_the_timeline_tells_of_the_same_gpus_as_the_attempts(replayed: Replay) -> None:
    rows = "\n".join(
        f"{name}{n},{n * 97 % 1000},{job_class},{1 + n % 3},{50 + n * 31 % 400},,{200 + n}"
        for n in range(30)
        for name, job_class in (("t", "TRAINING"), ("b", "BATCH"), ("m", "MINING"))
    )
    found, attempts, timeline = replayed(rows, node(gpus=4))
    assert sum(each["completed"] for each in found["classes"].values()) == 90
    for row in timeline:
        time_s = float(row["time_s"])
        held = sum(
            1000 * len(attempt["gpus"].split("|"))
            for attempt in attempts
            if float(attempt["start_s"]) - 0.0005 <= time_s < float(attempt["end_s"]) - 0.0005
        )
        assert int(row["allocated_gpu_milli"]) == held
        by_class = sum(int(row[f"{name}_gpu_milli"]) for name in found["classes"])
        assert by_class == held <= 4000
    used_s = sum((float(a["end_s"]) - float(a["start_s"])) * len(a["gpus"].split("|")) for a in attempts)
    booked_s = sum(each["gpu_seconds"] for each in found["classes"].values())
    assert used_s == pytest.approx(booked_s, abs=0.5)


def test_a_grid_event_sheds_and_its_watts_come_back(replayed: Replay) -> None:
    events = (EventRow("e", 50.0, 80.0, 500.0, 0.0, True),)
    found, attempts, timeline = replayed("a,0,BATCH,1,100,,500", events=events)
    shed = [(row["time_s"], float(row["draw_w"])) for row in timeline if row["budget_w"]]
    assert shed[0][0] == "50.000"
    assert all(200.0 <= watts <= 500.0 for _, watts in shed), "an emergency begins with the least limits"
    assert shed[-1][1] > 450.0
    assert 0.1 < found["site"]["over_budget_seconds"] < 3.0
    assert found["site"]["shed_seconds"] == found["site"]["over_budget_seconds"]
    # It works at four fifths of its speed for 30 s, and until the watts come back after the event.
    late_s = float(attempts[0]["end_s"]) - 100.0
    assert 6.0 <= late_s < 12.0


def test_a_configured_budget_holds_all_the_time(replayed: Replay) -> None:
    rows = "a,0,BATCH,1,100,,500\nb,0,BATCH,1,100,,500"
    found, _, timeline = replayed(rows, node(gpus=2), power=PowerConfig(budget_w=800.0, pue=1.1))
    assert {row["budget_w"] for row in timeline} == {"800.0"}
    assert max(float(row["draw_w"]) for row in timeline) <= 800.0
    assert found["site"]["over_budget_seconds"] == 0.0
    assert found["classes"]["batch"]["completed"] == 2


def test_a_refused_event_is_told(tmp_path: Path, replayed: Replay) -> None:
    events = (
        EventRow("e", 50.0, 80.0, 120.0, 10.0, False),
        EventRow("f", 90.0, 95.0, 160.0, 10.0, False),
    )
    found, _, _ = replayed("a,0,INFERENCE,1,200,,500", events=events)
    assert "grid event e was refused" in found["refusals"][0]
    assert len(found["refusals"]) == 2
    assert found["site"]["over_budget_seconds"] == pytest.approx(35.0, abs=0.1)


def test_miners_follow_the_price_as_soon_as_it_is_known(replayed: Replay) -> None:
    # It earns 0.035 USD an hour at 0.7 kW: 50 USD/MWh is its break-even.
    prices = (PriceRow(0.0, 20.0, 0.0), PriceRow(1000.0, 400.0, 1300.0), PriceRow(3000.0, -5.0, 0.0))
    prices += (PriceRow(4000.0, -5.0, 0.0),)  # until then something could change
    found, attempts, _ = replayed("m,0,MINING,1,inf,0.035", prices=prices)
    times = [(row["start_s"], row["end_s"], row["end_reason"]) for row in attempts]
    assert times == [
        ("0.000", "1300.000", "STOPPED_FOR_PRICE"),
        ("3000.000", "4000.000", "SIMULATION_ENDED"),
    ]
    # The true price counts, known or not.
    kwh = (800.0 * 1000.0, 800.0 * 300.0 + 150.0 * 1700.0, 800.0 * 1000.0)
    cost_usd = (kwh[0] * 20.0 + kwh[1] * 400.0 - kwh[2] * 5.0) / 3.6e9
    assert found["site"]["energy_cost_usd"] == pytest.approx(cost_usd, rel=0.01)


def test_many_prices_are_told_bit_by_bit(replayed: Replay) -> None:
    prices = tuple(PriceRow(60.0 * n, 20.0 if n % 200 < 100 else 400.0, 0.0) for n in range(620))
    _, attempts, _ = replayed("m,0,MINING,1,inf,0.035", prices=prices, until_s=37_200.0)
    assert [row["start_s"] for row in attempts] == [f"{12_000 * n}.000" for n in range(4)]
    assert [row["end_s"] for row in attempts[:3]] == [f"{12_000 * n + 6_000}.000" for n in range(3)]


def test_the_policy_decides(replayed: Replay) -> None:
    rows = "t,0,TRAINING,1,100,1.0\nb,10,BATCH,1,100,9.0"
    by_class, _, _ = replayed(rows)
    by_value, _, _ = replayed(rows, policy=Policy(order=Order.VALUE))
    preemptions = [found["classes"]["training"]["preemptions"] for found in (by_class, by_value)]
    assert preemptions == [0, 1]


def test_many_jobs_may_come_in_one_moment(replayed: Replay) -> None:
    rows = "\n".join(f"j{n},7,BATCH,0,30,,,,,,,,,1" for n in range(1200))
    found, attempts, _ = replayed(rows, node(gpus=0))
    assert found["classes"]["batch"]["completed"] == len(attempts) == 1200
    assert found["site"]["end_seconds"] == pytest.approx(7.0 + 1200 / 8 * 30.0, abs=2.0)


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([3.0], 0.99)) == (50.0, 99.0, 3.0)
    assert percentile([], 0.5) is None
