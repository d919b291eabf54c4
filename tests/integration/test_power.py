"""Budgets and grid events on the real daemon: simulated boards that draw, settle and obey their limits."""

from pathlib import Path

import grpc
import pytest

from scheduler.v1 import power_pb2
from tests.harness.daemon import PENDING, RUNNING, Daemon, reason_of, until

MINER = "trap 'exit 0' TERM; while :; do sleep 0.2 & wait; done"
MINERS = f"""
[sampling]
period_s = 0.1
processes_period_s = 1.0

[power]
return_jitter_s = 0.0
return_w_per_s = 2000.0

[[standing_jobs]]
name = "miner"
class = "mining"
command = ["/bin/sh", "-c", "{MINER}"]
"""
IDLE_W, LIMIT_W = 70.0, 700.0
MET = power_pb2.SHED_STATE_MET


def draws_at_most(daemon: Daemon, watts: float) -> bool:
    power = daemon.get_power()
    return power.HasField("draw_w") and power.draw_w <= watts


def mined(daemon: Daemon) -> int:
    return len(daemon.running("miner"))


def test_a_budget_sheds_until_the_measured_draw_is_inside_and_its_end_brings_the_work_back(
    tmp_path: Path,
) -> None:
    with Daemon(gpus="4xH100", config=MINERS).start() as daemon:
        until("all mine", lambda: mined(daemon) == 4)
        until("they draw", lambda: not draws_at_most(daemon, 1800))

        daemon.set_budget(1200)

        until("the draw is inside the budget", lambda: draws_at_most(daemon, 1200))
        power = daemon.get_power()
        assert power.committed_w <= power.budget_w == 1200
        waiting = [job for job in daemon.all_jobs(name="miner") if job.state == PENDING]
        assert {reason_of(job) for job in waiting} == {"WAITING_FOR_POWER"}

        daemon.set_budget(None)

        until("all mine again", lambda: mined(daemon) == 4)
        until("the limits are back", lambda: all(gpu.limit_w == LIMIT_W for gpu in daemon.get_power().gpus))
        until(
            "nothing is kept of them",
            lambda: not any(gpu.HasField("limit_w_found") for gpu in daemon.get_power().gpus),
        )


def test_an_emergency_is_taken_whatever_it_asks_and_met_by_measured_watts() -> None:
    with Daemon(gpus="2xH100", config=MINERS).start() as daemon:
        until("all mine", lambda: mined(daemon) == 2)

        event = daemon.offer_event("e1", 50, until_s=60, emergency=True)
        assert event.floor_w > 50
        until("everybody has gone", lambda: mined(daemon) == 0)
        failed = until(
            "it says that it can't be met",
            lambda: (e := daemon.grid_event("e1")).state == power_pb2.SHED_STATE_FAILED and e,
        )
        assert f"the least that can be reached is {2 * IDLE_W:.0f} W" in failed.reasons[0]

        daemon.offer_event("e2", 200, until_s=60, emergency=True)
        met = until("it is met", lambda: (e := daemon.grid_event("e2")).state == MET and e)
        assert met.measured_w <= 200


def test_a_voluntary_event_that_cant_be_met_is_refused_with_the_floor() -> None:
    with Daemon(gpus="2xH100", config=MINERS).start() as daemon:
        job = daemon.run("/bin/sleep", "1000", job_class="inference")

        with pytest.raises(grpc.RpcError) as refused:
            daemon.offer_event("e1", 300, until_s=60, start_s=30)

        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert job.id in refused.value.details()
        assert daemon.get(job.id).state == RUNNING
        accepted = daemon.offer_event("e1", 1000, until_s=60, start_s=30)
        assert accepted.state == power_pb2.SHED_STATE_SCHEDULED


def test_prices_steer_the_miners_and_come_from_the_command_line(tmp_path: Path) -> None:
    """At 60 USD/MWh a board of 500 W must earn 0.03 USD an hour; the miner earns 0.05."""
    config = MINERS + "draw_w = 500.0\n"
    prices = tmp_path / "prices.csv"
    with Daemon(gpus="2xH100", config=config).start() as daemon:
        until("all mine", lambda: mined(daemon) == 2)
        assert "No price is known" in daemon.cli("power", "prices").stdout

        prices.write_text("start,usd_per_mwh\n2020-01-01T00:00:00Z,60\n2020-01-01T01:00:00Z,5000\n")
        shown = daemon.cli("power", "prices", str(prices)).stdout

        # The last of them is years old: the declared price stands in for it.
        assert "declared" in shown
        until("nobody mines", lambda: mined(daemon) == 0)
        waiting = [job for job in daemon.all_jobs(name="miner") if job.state == PENDING]
        assert {reason_of(job) for job in waiting} == {"WAITING_FOR_PRICE"}
        explained = daemon.cli("explain", waiting[0].id).stdout
        assert "a lower price" in explained
        assert "energy that costs at most 0.0500 USD per GPU-hour" in explained

        prices.write_text("start,end,usd_per_mwh\n2020-01-01T00:00:00Z,2100-01-01T00:00:00Z,60\n")
        assert "0.06000 USD/kWh" in daemon.cli("power", "prices", str(prices)).stdout
        until("all mine again", lambda: mined(daemon) == 2)

        prices.write_text("start,usd_per_kwh\n0,1e9\n")
        wrong = daemon.cli("power", "prices", str(prices))
        assert wrong.returncode == 2
        assert "1 USD per kWh = 1000 USD per MWh" in wrong.stderr
