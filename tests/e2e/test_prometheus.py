"""The metrics page before the real promtool and the real Prometheus."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.v1 import node_service_pb2
from tests.harness.daemon import Daemon, until

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(
        shutil.which("promtool") is None or shutil.which("prometheus") is None,
        reason="no prometheus here (apt-get install prometheus)",
    ),
]
GPUS = "2xH100"
CONFIG = "[sampling]\nperiod_s = 0.1\n"

# What needs neither a power budget nor real GPUs.
SERIES = (
    "wattshift_gpu_info",
    "wattshift_gpu_utilization_ratio",
    "wattshift_gpu_memory_used_bytes",
    "wattshift_gpu_memory_total_bytes",
    "wattshift_gpu_power_watts",
    "wattshift_gpu_power_limit_watts",
    "wattshift_gpu_energy_joules_total",
    "wattshift_gpu_temperature_celsius",
    "wattshift_gpu_sm_clock_hertz",
    "wattshift_gpu_sample_age_seconds",
    "wattshift_gpu_state",
    "wattshift_jobs",
    "wattshift_job_transitions_total",
    "wattshift_job_queue_wait_seconds_bucket",
    "wattshift_preemptions_total",
    "wattshift_preemption_lost_gpu_seconds_total",
    "wattshift_preemption_stage_seconds_bucket",
    "wattshift_class_gpu_seconds_total",
    "wattshift_class_energy_joules_total",
    "wattshift_class_value_usd_total",
    "wattshift_energy_cost_usd_total",
    "wattshift_energy_unpriced_joules_total",
    "wattshift_plan_seconds_count",
    "wattshift_tick_seconds_count",
    "wattshift_journal_append_seconds_count",
    "wattshift_inbox_depth",
    "wattshift_rpc_requests_total",
    "wattshift_rpc_seconds_bucket",
)
LABELS = {
    "wattshift_gpu_state": {"gpu", "state"},
    "wattshift_jobs": {"class", "state"},
    "wattshift_job_transitions_total": {"class", "state", "reason"},
    "wattshift_preemptions_total": {"victim_class", "preemptor_class", "reason"},
    "wattshift_preemption_stage_seconds_count": {"stage", "victim_class"},
    "wattshift_class_gpu_seconds_total": {"class"},
    "wattshift_rpc_requests_total": {"method", "code"},
}


def act(daemon: Daemon) -> None:
    """A bit of everything that a dashboard would show."""
    daemon.run("sleep", "600", job_class="mining", gpus=2)
    daemon.finish("true", job_class="inference", gpus=1)
    daemon.node.CordonGpu(node_service_pb2.CordonGpuRequest(gpu="1"))


def test_promtool_finds_nothing_to_complain_about(daemon: Daemon) -> None:
    act(daemon)
    page = daemon.metrics()
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


class Prometheus:
    """A real server that scrapes the daemon ten times a second."""

    def __init__(self, directory: Path, target: str) -> None:
        config = directory / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 100ms, scrape_timeout: 100ms}\n"
            f"scrape_configs: [{{job_name: wattshift, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}",
                    "--web.listen-address=127.0.0.1:0", "--log.level=info",
                ],
                stderr=log,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip

    @property
    def address(self) -> str:
        """Where it listens, once it says so; empty before."""
        for line in self._log.read_text().splitlines():
            if "Listening on" in line and "address=" in line:
                return line.rpartition("address=")[2].strip('" ')
        return ""

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query."""
        url = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture
def prometheus(daemon: Daemon, tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path, f"127.0.0.1:{daemon.metrics_port}")
    try:
        until("prometheus listens", lambda: server.address)
        yield server
    finally:
        server.stop()


def test_a_real_prometheus_finds_every_series_of_the_contract(daemon: Daemon, prometheus: Prometheus) -> None:
    act(daemon)
    until("it is scraped", lambda: prometheus.query('up{job="wattshift"} == 1'))
    missing: list[str] = []

    def complete() -> bool:
        missing[:] = [name for name in SERIES if not prometheus.query(name)]
        return not missing

    try:
        until("every series is there", complete, 15.0)
    except AssertionError as error:
        raise AssertionError(f"missing: {missing}") from error
    for name, labels in LABELS.items():
        for series in prometheus.query(name):
            assert set(series["metric"]) - {"__name__", "instance", "job", "le"} == labels
    until("one mines", lambda: prometheus.query('sum(wattshift_jobs{class="mining"}) == 1'))
    states = prometheus.query("sum by (gpu) (wattshift_gpu_state)")
    assert [float(row["value"][1]) for row in states] == [1, 1]
    until("one GPU is cordoned", lambda: prometheus.query('sum(wattshift_gpu_state{state="cordoned"}) == 1'))
