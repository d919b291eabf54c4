"""Budgets and grid events on the real daemon: simulated boards that draw, settle and obey their limits."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from scheduler.v1 import power_pb2, power_report_pb2, power_service_pb2, usage_service_pb2
from tests.harness.daemon import CANCELLED, PENDING, PREEMPTING, RUNNING, Daemon, reason_of, until
from tests.harness.miners import MINERS, mined

IDLE_W_UNKNOWN, LIMIT_W = 100.0, 700.0
MET = power_pb2.SHED_STATE_MET
LATER = Timestamp(seconds=int(time.time()) + 86_400)


@pytest.fixture(scope="module")
def node() -> Iterator[Daemon]:
    """A daemon that several tests ask, each of which leaves it without budget and event."""
    with Daemon(gpus="1xH100", config="[power]\nbase_w = 100.0\n").start() as daemon:
        yield daemon


def draws_at_most(daemon: Daemon, watts: float) -> bool:
    power = daemon.get_power()
    return power.HasField("draw_w") and power.draw_w <= watts


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
        assert power.floor_w <= 4 * IDLE_W_UNKNOWN, "what a board draws as it cools down is not its idle draw"
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
        assert f"the least that can be reached is {2 * IDLE_W_UNKNOWN:.0f} W" in failed.reasons[0]
        assert any("the power budget can't be kept" in text for text in daemon.get_node().problems)

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
        page = daemon.metrics()
        assert "\nwattshift_electricity_price_usd_per_kwh 0.06\n" in page
        assert "\nwattshift_electricity_price_age_seconds 0" in page
        until("all mine again", lambda: mined(daemon) == 2)

        prices.write_text("start,usd_per_kwh\n0,1e9\n")
        wrong = daemon.cli("power", "prices", str(prices))
        assert wrong.returncode == 2
        assert "1 USD per kWh = 1000 USD per MWh" in wrong.stderr


def test_an_emergency_cuts_the_grace_of_whoever_was_told_to_go_before_it() -> None:
    with Daemon(gpus="1xH100", config=MINERS).start() as daemon:
        deaf = daemon.run_ready("trap '' TERM; echo ready; while :; do sleep 0.1; done", grace_s=600.0)
        daemon.set_budget(100)
        daemon.wait(deaf.id, PREEMPTING)

        daemon.offer_event("e1", 100, until_s=60, emergency=True)

        waiting = daemon.wait(deaf.id, PENDING)
        assert waiting.attempts[0].exit_code == 128 + signal.SIGKILL
        until("it is met", lambda: daemon.grid_event("e1").state == MET)


def test_budget_and_event_outlive_a_kill_and_the_event_goes_on() -> None:
    with Daemon(gpus="2xH100", config=MINERS).start() as daemon:
        until("all mine", lambda: mined(daemon) == 2)
        daemon.set_budget(900)
        daemon.offer_event("e1", 200, until_s=600, emergency=True)
        until("it is met", lambda: daemon.grid_event("e1").state == MET)
        met = daemon.grid_event("e1")

        daemon.restart()

        assert daemon.grid_event("e1") == met
        kinds = [power_pb2.BudgetKind.Name(source.kind) for source in daemon.get_power().sources]
        assert kinds == ["BUDGET_KIND_EMERGENCY", "BUDGET_KIND_REQUESTED"]
        until("the draw is inside", lambda: draws_at_most(daemon, 200))
        assert mined(daemon) == 0

        cancelled = daemon.cancel_event("e1")
        assert cancelled.state == power_pb2.SHED_STATE_CANCELLED
        until("one mines again", lambda: mined(daemon) >= 1)
        assert daemon.get_power().budget_w <= 900


def cost_microusd(daemon: Daemon, group: str) -> dict[str, int]:
    """What energy cost, by key; of a row without a price nothing."""
    request = usage_service_pb2.ListUsageRequest(group_by=f"USAGE_GROUP_{group}")
    rows = daemon.usage.ListUsage(request, timeout=10).usage
    return {row.key: round(row.cost_usd * 1e6) for row in rows if row.HasField("cost_usd")}


def test_an_event_and_what_its_energy_cost_are_told_once_through_a_kill(tmp_path: Path) -> None:
    prices = tmp_path / "prices.csv"
    prices.write_text("start,end,usd_per_mwh\n2020-01-01T00:00:00Z,2100-01-01T00:00:00Z,9000\n")
    with Daemon(gpus="4xH100", config=MINERS).start() as daemon:
        daemon.cli("power", "prices", str(prices))
        gang = daemon.run("/bin/sleep", "1000", job_class="training", gpus=4)
        until("all draw", lambda: not draws_at_most(daemon, 2000))
        daemon.offer_event("e1", 1000, until_s=12, emergency=True)
        until("it is met", lambda: daemon.grid_event("e1").state == MET)
        first = daemon.report("e1")
        assert not first.HasField("ended_at")

        daemon.restart()

        until("it is over", lambda: daemon.grid_event("e1").over)
        until("the watts are back", lambda: not draws_at_most(daemon, 2000))
        report = daemon.report("e1")
        assert [move.state for move in report.moves] == [power_pb2.SHED_STATE_SHEDDING, MET, MET]
        assert (report.moves[0], report.baseline) == (first.moves[0], first.baseline)
        assert [job.job_id for job in report.baseline.jobs] == [gang.id]
        delivery = report.delivery
        assert delivery.mean_w > delivery.asked_w > 0
        assert delivery.seconds_known + delivery.seconds_missing == len(
            [
                second
                for second in report.draw
                if delivery.start.seconds <= second.at.seconds < delivery.end.seconds
            ]
        )
        known = {second.at.seconds: second.draw_w for second in first.draw if second.HasField("draw_w")}
        again = [second for second in report.draw if second.HasField("draw_w") and second.at.seconds in known]
        assert again, "what was drawn before the kill is known after it"
        # Which of the two depends on what had been learned of its draw by then.
        done = {job.kind for job in report.jobs if job.job_id == gang.id}
        assert done & {power_report_pb2.TOUCH_KIND_LIMITED, power_report_pb2.TOUCH_KIND_STOPPED}

        assert daemon.terminate() == 0
        told = json.loads(
            daemon.cli(
                "power", "report", "e1", "--offline", "--state-dir", str(daemon.state), "-o", "json"
            ).stdout
        )["report"]
        assert (told["baseline"]["site_w"], len(told["moves"])) == (report.baseline.site_w, 3)
        daemon.start()
        costs = {group: cost_microusd(daemon, group) for group in ("JOB", "CLASS", "TENANT", "GPU")}
        assert costs["CLASS"]["TRAINING"] == costs["JOB"][gang.id] > 0
        assert len({sum(found.values()) for found in costs.values()}) == 1
        booked = daemon.query("SELECT sum(energy_mj - unpriced_mj), sum(cost_microusd) FROM usage")[0]
        assert booked[1] == pytest.approx(booked[0] / 3.6e9 * 9.0 * 1e6, abs=5), "one for each of four boards"
        assert "wattshift_energy_unpriced_joules_total" in daemon.metrics()


def test_watts_come_back_bit_by_bit() -> None:
    slowly = MINERS.replace("return_w_per_s = 2000.0", "return_w_per_s = 1.0")
    with Daemon(gpus="2xH100", config=slowly).start() as daemon:
        until("all mine", lambda: mined(daemon) == 2)
        daemon.set_budget(200)
        until("all stopped", lambda: mined(daemon) == 0)

        daemon.set_budget(None)

        until("the budget rises", lambda: daemon.get_power().budget_w > 200.5)
        assert daemon.get_power().budget_w < 300
        assert mined(daemon) == 0


def test_a_lost_signal_falls_back_to_the_safe_level() -> None:
    safe = MINERS.replace("[power]", "[power]\nsafe_budget_w = 400.0")
    with Daemon(gpus="2xH100", config=safe).start() as daemon:
        daemon.set_budget(5000, valid_for_s=1.0)
        until("the safe level holds", lambda: daemon.get_power().budget_w == 400)
        (source,) = daemon.get_power().sources
        assert source.kind == power_pb2.BUDGET_KIND_SAFE
        daemon.set_budget(5000, valid_for_s=600.0)
        until("it comes back", lambda: daemon.get_power().budget_w > 400)


def test_a_released_node_has_the_limits_back_that_were_found() -> None:
    config = MINERS.partition("[[standing_jobs]]")[0]
    with Daemon(gpus="1xH100", config=config).start() as daemon:
        daemon.set_budget(400)
        job = daemon.run("/bin/sleep", "1000", draw_w=300.0)
        until("its limit is set", lambda: daemon.get_power().gpus[0].limit_w == 306)
        assert daemon.get_power().gpus[0].limit_w_found == LIMIT_W
        daemon.cancel(job.id)
        daemon.wait(job.id, CANCELLED)

        daemon.release()

        until("it is back", lambda: not daemon.get_power().gpus[0].HasField("limit_w_found"))


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (power_pb2.GridEvent(id="a b", budget_w=100, end=LATER), "event.id"),
        (power_pb2.GridEvent(id="e", budget_w=100), "event.end"),
        (power_pb2.GridEvent(id="e", budget_w=100, end=Timestamp(seconds=1)), "event.end"),
        (power_pb2.GridEvent(id="e", budget_w=100, start=LATER, end=LATER), "event.end"),
        (power_pb2.GridEvent(id="e", budget_w=float("nan"), end=LATER), "event.budget_w"),
        (power_pb2.GridEvent(id="e", budget_w=-1, end=LATER), "event.budget_w"),
        (power_pb2.GridEvent(id="e", budget_w=99, end=LATER), "event.budget_w"),
        (power_pb2.GridEvent(id="e", budget_w=1e12, end=LATER), "event.budget_w"),
    ],
)
def test_a_wrong_event_is_refused_with_its_field_named(
    node: Daemon, event: power_pb2.GridEvent, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        node.power.SubmitGridEvent(power_service_pb2.SubmitGridEventRequest(event=event), timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"{field}: ")
    assert not node.power.ListGridEvents(power_service_pb2.ListGridEventsRequest(), timeout=10).events


def test_the_same_event_twice_is_one_and_other_terms_are_refused(node: Daemon) -> None:
    end = Timestamp(seconds=LATER.seconds + 60)
    event = power_pb2.GridEvent(id="e", budget_w=500, start=LATER, end=end)
    request = power_service_pb2.SubmitGridEventRequest(event=event)
    first = node.power.SubmitGridEvent(request, timeout=10).event
    assert node.power.SubmitGridEvent(request, timeout=10).event == first
    request.event.budget_w = 600
    with pytest.raises(grpc.RpcError) as refused:
        node.power.SubmitGridEvent(request, timeout=10)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    node.cancel_event("e")
    with pytest.raises(grpc.RpcError) as unknown:
        node.cancel_event("nobody")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_metrics_page_tells_of_power(node: Daemon) -> None:
    node.set_budget(3000)
    until("it is in force", lambda: "wattshift_power_budget_watts 3000.0" in node.metrics())
    page = node.metrics()
    for name in ("draw_watts", "committed_watts", "over_budget_seconds_total", "limit_set_seconds_count"):
        assert f"\nwattshift_power_{name} " in page
    assert "\nwattshift_grid_event_active 0.0" in page
    assert "\nwattshift_grid_shed_seconds_count 0" in page
    node.set_budget(None)
