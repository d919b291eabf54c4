"""What `wattshift simulate` says that energy cost and work earned is what the daemon's ledger booked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scheduler.control.loop import Controller
from scheduler.effects.journal import UsageRow
from scheduler.model.settings import PowerConfig
from scheduler.simulation import replay as replaying
from scheduler.simulation.inputs import JobStore, NodeRow, PriceRow, Room
from scheduler.simulation.node import START_S, MachineGpus
from scheduler.simulation.outputs import summary
from scheduler.simulation.replay import World, replay

MJ_PER_KWH = 3_600_000_000
READ_EVERY_S = 60.0  # a price's edge is a reading, too: what is between is at one price
UNTIL_S = 7200.0
NODES = (
    NodeRow("n0", "H100", 2, 80_000, 8_000, 100_000, 50.0, 200.0, 700.0, 120.0),
    NodeRow("n1", "H100", 1, 80_000, 8_000, 100_000, 70.0, 200.0, 700.0, 80.0),
)
HEADER = (
    "job_id,submit_s,class,gpus,duration_s,value_usd_per_gpu_hour,draw_w,restart_loss_s,gpu_share_milli\n"
)
# A gang, two that share a board, one that gives way and comes back; mining that the price stops twice.
JOBS = """\
gang,0,TRAINING,2,1500,2.5,450,300,
half,0,BATCH,1,2000,0.7,500,60,500
other,30,BATCH,1,1000,0.9,300,60,250
hurry,600,INFERENCE,1,900,4,650,0,
late,3000,BATCH,1,500,0.5,250,120,
m1,0,MINING,1,inf,0.05,350,100,
m2,10,MINING,1,inf,0.06,300,100,
"""
PRICES = tuple(
    PriceRow(start_s, usd_per_mwh, 0.0)
    for start_s, usd_per_mwh in (
        (0.0, 40.0), (600.0, 900.0), (1200.0, -25.0), (2400.0, 55.5), (4800.0, 700.0), (6000.0, 12.25),
    )
)  # fmt: skip


class Ledger:
    """What the daemon of a replay had booked when it ended."""

    def __init__(self) -> None:
        self.rows: dict[str, UsageRow] = {}


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """The books of the replays in this test, read often enough to be exact and kept to the end."""
    kept, stop = Ledger(), Controller.stop

    def read_and_stop(control: Controller) -> None:
        gpus = control.effects.gpus
        assert isinstance(gpus, MachineGpus)
        control.board.read(gpus.readings())
        control.accounts.read(control.effects.clock.now_s())
        stop(control)
        journal = control.effects.journal
        kept.rows = {row.key: row for row in journal.usage("class", 0.0, 1e12, None, 100)}

    monkeypatch.setattr(Controller, "stop", read_and_stop)
    monkeypatch.setattr(replaying, "SAMPLING_PERIOD_S", READ_EVERY_S)
    state = replace(replaying._STATE, finished_jobs_kept_s=1e9, finished_jobs_kept_max=10**9)
    monkeypatch.setattr(replaying, "_STATE", state)
    return kept


def replayed(folder: Path, jobs: str, power: PowerConfig) -> dict[str, Any]:
    path = folder / "jobs.csv"
    path.write_text(HEADER + jobs)
    store = JobStore()
    store.load(path, Room(NODES))
    outcome = replay(World(NODES, PRICES, power=power, until_s=UNTIL_S), store, folder)
    store.close()
    return summary(outcome)


@pytest.mark.parametrize("pue", [1.0, 1.37])
def test_energy_and_its_cost_are_the_ledgers(tmp_path: Path, ledger: Ledger, pue: float) -> None:
    found = replayed(tmp_path, JOBS, PowerConfig(pue=pue))

    rows, site = ledger.rows, found["site"]
    assert set(rows) == {"INFERENCE", "TRAINING", "BATCH", "MINING", "IDLE", "BASE"}
    assert found["classes"]["batch"]["preemptions"] + found["classes"]["mining"]["preemptions"]
    energy_kwh = sum(row.energy_mj for row in rows.values()) / MJ_PER_KWH * pue
    assert energy_kwh == pytest.approx(site["energy_kwh"], abs=2e-6)
    assert not any(row.unpriced_mj for row in rows.values())
    cost_usd = sum(row.cost_microusd for row in rows.values()) / 1e6
    assert cost_usd == pytest.approx(site["energy_cost_usd"], abs=6e-6), (
        "a micro-USD for each of four accounts"
    )
    assert rows["BASE"].energy_mj == pytest.approx(site["end_seconds"] * 200.0 * 1000, abs=1)


def test_value_is_the_ledgers_where_all_work_is_done_at_full_speed(tmp_path: Path, ledger: Ledger) -> None:
    jobs = "a,0,TRAINING,2,1500,2.5,450,,\nb,60,BATCH,1,2000,0.7,500,,500\nm,2500,MINING,1,inf,3.6,300,100,"
    found = replayed(tmp_path, jobs, PowerConfig())

    for name in ("training", "batch", "mining"):
        booked_usd = ledger.rows[name.upper()].value_microusd / 1e6
        # The ledger counts from the decision on, the summary from the program's first line.
        early_usd = START_S * 2 * 3.6 / 3600
        rounded_usd = 1e-6 * UNTIL_S / READ_EVERY_S
        assert booked_usd == pytest.approx(found["classes"][name]["value_usd"], abs=early_usd + rounded_usd)


def test_the_ledger_pays_for_time_and_the_summary_for_work(tmp_path: Path, ledger: Ledger) -> None:
    """Restart losses, and what never completes, are where the two rules of value differ."""
    jobs = "m,0,MINING,2,inf,3.6,300,100,\nb,1000,BATCH,2,500,0.9,250,,\nnever,5000,BATCH,2,9999,0.9,250,,"
    found = replayed(tmp_path, jobs, PowerConfig())

    mining, batch = found["classes"]["mining"], found["classes"]["batch"]
    assert mining["lost_gpu_seconds"] == pytest.approx(200.0, abs=0.1)
    lost_usd = mining["lost_gpu_seconds"] * 3.6 / 3600
    assert ledger.rows["MINING"].value_microusd / 1e6 == pytest.approx(
        mining["value_usd"] + lost_usd, abs=1e-3
    )
    unfinished_usd = 2 * (UNTIL_S - 5000.0) * 0.9 / 3600
    assert batch["unfinished"] == 1
    assert ledger.rows["BATCH"].value_microusd / 1e6 == pytest.approx(
        batch["value_usd"] + unfinished_usd, abs=1e-3
    )
