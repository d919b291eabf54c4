"""OpenADR from end to end: a VTN process, the real daemon, boards that draw and obey their limits."""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.v1 import power_pb2, power_service_pb2
from tests.harness.daemon import Daemon, until
from tests.harness.miners import MINERS, mined
from tests.harness.vtn import CLIENT_ID, PROGRAM, SECRET, Vtn, event

MET = power_pb2.SHED_STATE_MET
FOUR_IDLE_W = 280.0


@pytest.fixture
def vtn() -> Iterator[Vtn]:
    with Vtn() as process:
        yield process


@pytest.fixture
def openadr(vtn: Vtn, tmp_path: Path) -> str:
    """The table that names the VTN."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    return f"""
[openadr]
vtn_url = "{vtn.url}"
client_id = "{CLIENT_ID}"
client_secret_file = "{secret}"
program = "{PROGRAM}"
poll_s = 1.0
contact_lost_s = 2.0
normal_w = 2000.0
"""


def inside(daemon: Daemon, watts: float) -> bool:
    power = daemon.get_power()
    return power.HasField("draw_w") and power.draw_w <= watts


def binding(daemon: Daemon) -> dict[str, Any]:
    """The grid events that are not over, by the first two words of their ids."""
    request = power_service_pb2.ListGridEventsRequest()
    events = daemon.power.ListGridEvents(request, timeout=10).events
    return {"-".join(one.id.split("-")[:2]): one for one in events}


def set_config(daemon: Daemon, text: str) -> None:
    assert daemon.process is not None
    daemon.config.write_text(text)
    daemon.process.send_signal(1)


def test_an_event_sheds_measured_watts_and_its_end_brings_the_work_back(vtn: Vtn, openadr: str) -> None:
    with Daemon(gpus="4xH100", config=MINERS + openadr).start() as daemon:
        until("all mine", lambda: mined(daemon) == 4)
        until("they draw", lambda: not inside(daemon, 1800))

        vtn.events(event("cap 1", "IMPORT_CAPACITY_LIMIT", 1.2))

        limit = until(
            "the limit is met", lambda: (e := binding(daemon).get("openadr-limit")) and e.state == MET and e
        )
        assert limit.measured_w <= limit.budget_w == 1200
        assert daemon.get_power().budget_w == 1200

        vtn.events(event("cap 1", "IMPORT_CAPACITY_LIMIT", 0.8))
        until("the change is followed", lambda: daemon.get_power().budget_w == 800 and inside(daemon, 800))

        vtn.events()
        until("all mine again", lambda: mined(daemon) == 4)
        assert binding(daemon) == {}
        assert "openadr" not in daemon.get_node().problems


def test_an_emergency_ends_by_itself(vtn: Vtn, openadr: str) -> None:
    with Daemon(gpus="4xH100", config=MINERS + openadr).start() as daemon:
        until("all mine", lambda: mined(daemon) == 4)
        vtn.events(event("e", "SIMPLE", 3, lasts="PT8S"))
        until("nobody mines", lambda: mined(daemon) == 0)
        until("the draw is that of idle boards", lambda: inside(daemon, FOUR_IDLE_W + 1))
        assert binding(daemon)["openadr-dispatch"].emergency
        until("all mine again", lambda: mined(daemon) == 4)


def test_a_notification_is_followed_at_once(vtn: Vtn, openadr: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    webhook = f'webhook_listen = "127.0.0.1:{port}"\nwebhook_url = "http://127.0.0.1:{port}/openadr"\n'
    config = openadr.replace("poll_s = 1.0", "poll_s = 3600.0").replace("contact_lost_s = 2.0", webhook)
    config = config.replace("normal_w", "contact_lost_s = 7200.0\nnormal_w")
    with Daemon(gpus="4xH100", config=MINERS + config).start() as daemon:
        until("it has subscribed", lambda: vtn.tell("look")["subscriptions"])
        vtn.events(event("e", "CONTROL_LEVEL_OFFSET", 5))
        until("half is left", lambda: daemon.get_power().budget_w == 1000)
        vtn.events()
        until("nothing is left of it", lambda: not binding(daemon))


def test_prices_of_the_vtn_are_those_of_the_node(vtn: Vtn, openadr: str) -> None:
    with Daemon(gpus="1xH100", config=openadr).start() as daemon:
        vtn.events(event("p", "PRICE", 87.5, units="MWH"))
        until("it has a price", lambda: daemon.get_power().price.usd_per_kwh == pytest.approx(0.0875))
        vtn.events()
        until("the price is withdrawn", lambda: not daemon.get_power().HasField("price"))


def test_when_contact_is_lost_limits_run_out_and_the_subscription_holds(vtn: Vtn, openadr: str) -> None:
    config = MINERS + openadr + "subscription_w = 1500.0\n"
    with Daemon(gpus="4xH100", config=config).start() as daemon:
        until("the subscription holds", lambda: daemon.get_power().budget_w == 1500)
        vtn.events(event("l", "IMPORT_CAPACITY_LIMIT", 1.8, lasts="PT12S"))
        until("the limit holds", lambda: daemon.get_power().budget_w == 1800)
        vtn.kill()
        until("contact is lost", lambda: daemon.get_power().openadr.lost)
        assert daemon.get_power().budget_w == 1800
        daemon.restart()  # and knows it from the journal alone
        until("the limit has run out", lambda: daemon.get_power().budget_w == 1500)
        until("they are inside", lambda: inside(daemon, 1500))
        assert "Connection refused" in "".join(daemon.get_node().problems)

        vtn.start()
        vtn.events(event("l", "IMPORT_CAPACITY_LIMIT", 1.0))
        until("it is followed again", lambda: daemon.get_power().budget_w == 1000)
        assert not daemon.get_power().openadr.lost
        assert daemon.get_power().openadr.contact_age_s < 20


def test_without_a_subscription_the_safe_level_holds_while_contact_is_lost(vtn: Vtn, openadr: str) -> None:
    config = MINERS.replace("[power]", "[power]\nsafe_budget_w = 900.0") + openadr
    with Daemon(gpus="2xH100", config=config).start() as daemon:
        until("it answers", lambda: daemon.get_power().openadr.HasField("contact_age_s"))
        assert not daemon.get_power().HasField("budget_w")
        vtn.tell("fault", "500")
        until("the safe level holds", lambda: daemon.get_power().budget_w == 900)
        vtn.tell("fault", "")
        until("it holds no more", lambda: not binding(daemon))


def test_a_vtn_that_fails_in_any_way_takes_nothing_away(vtn: Vtn, openadr: str) -> None:
    with Daemon(gpus="2xH100", config=MINERS + openadr.replace("= 2.0", "= 600.0")).start() as daemon:
        vtn.events(event("l", "IMPORT_CAPACITY_LIMIT", 0.9))
        until("the limit holds", lambda: daemon.get_power().budget_w == 900)
        for fault, words in (("500", "answered 500"), ("html", "JSON"), ("huge", "8 MiB")):
            vtn.tell("fault", fault)
            until(
                f"{fault} is said", lambda words=words: words in "".join(daemon.get_power().openadr.problems)
            )
            assert daemon.get_power().budget_w == 900
        vtn.tell("fault", "")
        vtn.tell("revoke")
        until("all is well", lambda: not daemon.get_power().openadr.problems)


def test_what_can_not_be_followed_is_named_where_an_operator_looks(vtn: Vtn, openadr: str) -> None:
    with Daemon(gpus="2xH100", config=MINERS + openadr).start() as daemon:
        vtn.events(
            event("a", "SIMPLE", 1),
            event("b", "IMPORT_CAPACITY_LIMIT", 1, units="KVA"),
            event("c", "GHG", 300, units="GHG"),
            event("d", "DISPATCH_SETPOINT", 0.05),
        )
        text = until(
            "it is said",
            lambda: (
                re.search(r"event 'd'.* 1[45]\d W is held", out := daemon.cli("power", "status").stdout)
                and out
            ),
        )
        assert f"openadr    {vtn.url}, program {PROGRAM}: answered" in text
        assert "problem    SIMPLE 1 means nothing here yet: set [openadr] simple_moderate_w" in text
        assert (
            "problem    event b: IMPORT_CAPACITY_LIMIT: the units are KVA; W, KW, MW are understood" in text
        )
        assert "problem    the dispatch of event 'd' (50 W) can't be reached: 1" in text
        assert "not used   GHG" in text
        assert "units are KVA" in "".join(daemon.get_node().problems)
        assert "wattshift_openadr_contact_age_seconds" in daemon.metrics()
        until("it is polled again", lambda: vtn.count("GET /events") > 4)
        assert daemon.log().count("units are KVA") == 1


def test_a_reload_names_another_vtn_or_none(vtn: Vtn, openadr: str) -> None:
    with Daemon(gpus="2xH100", config=MINERS).start() as daemon:
        vtn.events(event("l", "IMPORT_CAPACITY_LIMIT", 0.9, after_s=-time.time() % 60))
        assert not daemon.get_power().HasField("openadr")
        set_config(daemon, MINERS + openadr)
        until("the limit is there", lambda: "openadr-limit" in binding(daemon))
        set_config(daemon, MINERS)
        until("it is gone", lambda: not binding(daemon))
        assert not daemon.get_power().HasField("openadr")
