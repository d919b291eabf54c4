"""Miners that tell what they mine, on the real daemon: real servers answer on loopback."""

import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from scheduler.model.mining import MinerApi
from scheduler.v1 import power_pb2, power_service_pb2
from tests.harness.daemon import RUNNING, Daemon, until
from tests.harness.miners import MINER
from tests.harness.rigs import Rig

TOKEN = "a secret"
CONFIG = f"""
[sampling]
period_s = 0.1
processes_period_s = 1.0

[mining]
operating_point = "full"

[[standing_jobs]]
name = "miner"
command = ["/bin/sh", "-c", "echo port $WATTSHIFT_MINER_PORT; {MINER}"]
environment = {{ XMRIG_TOKEN = "{TOKEN}" }}
draw_w = 500.0
miner_api = "xmrig"
miner_port = PORT
miner_algorithm = "randomx"
miner_fee_ratio = 0.01
miner_token_variable = "XMRIG_TOKEN"
"""


def two_ports() -> int:
    """The lower of two neighbouring ports that nobody has."""
    for port in range(21_000, 60_000, 2):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


@pytest.fixture
def rigs() -> Iterator[tuple[Rig, Rig]]:
    """Two XMRigs at neighbouring ports, the second twice as fast."""
    port = two_ports()
    with (
        Rig(MinerApi.XMRIG, port, hashrate_hs=10e3, token=TOKEN) as first,
        Rig(MinerApi.XMRIG, port + 1, hashrate_hs=20e3, token=TOKEN) as second,
    ):
        yield first, second


def mining(daemon: Daemon) -> power_pb2.Mining:
    return daemon.get_power().mining


@pytest.mark.timeout(180)
def test_hashprices_and_what_miners_say_make_their_value(rigs: tuple[Rig, Rig], tmp_path: Path) -> None:
    hashprices = tmp_path / "hashprices.csv"
    config = CONFIG.replace("PORT", str(rigs[0].port))
    with Daemon(gpus="2xH100", config=config).start() as daemon:
        until(
            "both answer",
            lambda: [one.HasField("hashrate_hs") for one in mining(daemon).miners] == [True] * 2,
        )
        assert rigs[0].asked[0].startswith(b"GET /2/summary HTTP/1.0\r\n")
        assert {one.value_usd_per_gpu_hour for one in mining(daemon).miners} == {0.05}
        assert "No hashprice is known" in daemon.cli("power", "hashprices").stdout

        hashprices.write_text("algorithm,unit,usd_per_day\nRandomX,kH/s,0.12\n")
        shown = daemon.cli("power", "hashprices", str(hashprices)).stdout
        assert "randomx" in shown
        assert "set by clients" in shown
        for rig in rigs:
            rig.accepted = 5

        # A look takes ten seconds, and three of them make a hashrate.
        earned = [0.0495, 0.099]  # 10 and 20 kH/s at 0.12 USD a day, less a hundredth
        until(
            "their shares have proved what they say",
            lambda: [round(one.value_usd_per_gpu_hour, 6) for one in mining(daemon).miners] == earned,
            timeout_s=120.0,
        )
        page = daemon.metrics()
        assert page.count("\nwattshift_mining_hashrate_hashes_per_second{") == 2
        assert "} 0.099\n" in page.partition("wattshift_mining_value_usd_per_gpu_hour{")[2]
        assert page.count('result="accepted"} 5') == 2
        assert '\nwattshift_mining_doubts{doubt="shares"} 0' in page
        assert "\nwattshift_mining_hashprice_age_seconds " in page
        assert "20 kH/s" in daemon.cli("power", "hashprices").stdout
        assert TOKEN not in daemon.log_path.read_text()

        daemon.restart()
        until("the values are back", lambda: daemon.get_power().mining.hashprices)
        assert [round(one.value_usd_per_gpu_hour, 6) for one in mining(daemon).miners] in ([], earned)


def test_what_is_no_hashprice_and_no_miner_is_refused_with_its_field() -> None:
    with Daemon(gpus="1xH100").start() as daemon:
        wrong = power_service_pb2.SetHashpricesRequest(
            hashprices=[power_pb2.Hashprice(algorithm="kawpow", unit="parsecs", usd_per_day=1.0)]
        )
        with pytest.raises(grpc.RpcError) as refused:
            daemon.power.SetHashprices(wrong)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no unit of hashrate" in refused.value.details()

        submit = ("submit", "--class", "mining", "--miner", "t-rex:4067:kawpow", "--", "/bin/sleep", "1000")
        job_id = daemon.cli(*submit).stdout.split()[0]
        until("it runs", lambda: daemon.get(job_id).state == RUNNING)
        assert daemon.get(job_id).spec.miner.port == 4067
        for bad, words in (
            (("--class", "batch"), "is of a mining job with whole GPUs"),
            (("--class", "mining", "--share", "0.5"), "is of a mining job with whole GPUs"),
        ):
            refused_cli = daemon.cli("submit", *bad, "--miner", "t-rex:4067:kawpow", "--", "/bin/true")
            assert refused_cli.returncode != 0
            assert words in refused_cli.stderr
        wrong_words = daemon.cli("submit", "--class", "mining", "--miner", "phoenix:1:x", "--", "/bin/true")
        assert "write API:PORT:ALGORITHM" in wrong_words.stderr
