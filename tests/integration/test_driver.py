"""A real daemon whose driver is loaded anew, missing, upgraded or going away, with jobs on its GPUs."""

import getpass
import os
import signal
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.v1 import job_pb2, node_pb2, usage_service_pb2
from tests.fakes.nvml.fake import GIB, FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import PENDING, RUNNING, SUCCEEDED, Daemon, logged, until

pytestmark = needs_gcc

# No routine look at the process lists within a test: whoever it saw would count as foreign.
CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1
processes_period_s = 60

[policy]
handover_timeout_s = 600
"""
SLEEPS = "echo ready; exec sleep 600"
FREE = node_pb2.GPU_STATE_FREE
ALLOCATED = node_pb2.GPU_STATE_ALLOCATED
HANDOVER = node_pb2.GPU_STATE_HANDOVER
LOST = node_pb2.GPU_STATE_LOST
J_PER_WH = 3600
# More than the draw of these tests can come to, less than a counter of 32 bits that is taken for a full one.
ENERGY_J_MAX = 1e6


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, gpus=2, is_live=True)


def served(fake: FakeNvml) -> Daemon:
    daemon = Daemon(gpus="", config=CONFIG)
    daemon.environment = fake.environment()
    return daemon


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with served(fake) as daemon, logged(daemon):
        daemon.start()
        until("both GPUs are free", lambda: states(daemon) == [FREE, FREE])
        yield daemon


def states(daemon: Daemon) -> list[int]:
    return [gpu.state for gpu in daemon.get_node().gpus]


def read_again(daemon: Daemon, fake: FakeNvml) -> None:
    """Wait until the daemon shows readings of all GPUs that were taken from now on."""
    count = len(daemon.get_node().gpus)
    for index in range(count):
        fake.gpus[index].memory_temperature_celsius += 1
    wanted = [f'"{gpu.uuid}"}} {float(gpu.memory_temperature_celsius)!r}' for gpu in fake.gpus[:count]]

    def are_there() -> bool:
        lines = [line for line in daemon.metrics().splitlines() if "gpu_memory_temperature_celsius{" in line]
        return sorted(line.partition("gpu=")[2] for line in lines) == sorted(wanted)

    until("all GPUs are read anew", are_there)


def is_the_same(daemon: Daemon, before: job_pb2.Job) -> bool:
    """Whether the job runs on as it was: nobody stopped it or started it again."""
    now = daemon.get(before.id)
    first, then = before.attempts[0], now.attempts[0]
    return (now.state, now.attempt, then.pid, list(then.gpus)) == (RUNNING, 1, first.pid, list(first.gpus))


def energy_j(daemon: Daemon) -> dict[str, float]:
    """Energy by job, as it is billed."""
    request = usage_service_pb2.ListUsageRequest(group_by=usage_service_pb2.USAGE_GROUP_JOB)
    return {row.key: row.energy_wh * J_PER_WH for row in daemon.usage.ListUsage(request).usage}


# Loaded anew -----------------------------------------------------------------------------------


def test_jobs_run_on_through_a_reload_and_their_energy_is_counted_on(fake: FakeNvml, daemon: Daemon) -> None:
    fake.stop_clock()
    jobs = [daemon.run_ready(SLEEPS, gpus=1) for _ in range(2)]
    for index in range(2):
        fake.load(index, 1.0)
    read_again(daemon, fake)
    fake.advance(2.0)
    read_again(daemon, fake)
    before = daemon.get_node()
    fake.load_driver()
    read_again(daemon, fake)
    fake.advance(2.0)
    read_again(daemon, fake)
    after = daemon.get_node()
    assert [gpu.uuid for gpu in after.gpus] == [gpu.uuid for gpu in before.gpus]
    assert all(
        now.sampled_at.ToNanoseconds() > was.sampled_at.ToNanoseconds()
        for now, was in zip(after.gpus, before.gpus, strict=True)
    )
    assert (states(daemon), list(after.problems)) == ([ALLOCATED, ALLOCATED], [])
    assert all(is_the_same(daemon, job) for job in jobs)
    assert daemon.events("GpuMarked") == [], "counters that begin anew are no error of the GPU"
    for job in jobs:
        daemon.cancel(job.id)
        daemon.wait(job.id)
    until("their energy is booked", lambda: {job.id for job in jobs} <= energy_j(daemon).keys())
    used_j = energy_j(daemon)
    # 700 W for 2 s on the old counter and for 2 s on the new one, less what a reading shares out to idle that
    # began before the job did.
    assert all(0.85 * 2800 <= used_j[job.id] < ENERGY_J_MAX for job in jobs), used_j
    assert daemon.finish("true", gpus=2).state == SUCCEEDED


def test_a_reload_in_the_middle_of_a_sample_costs_that_sample_alone(fake: FakeNvml, daemon: Daemon) -> None:
    job = daemon.run_ready(SLEEPS, gpus=1)
    slow = fake.rule("nvmlDeviceGetTotalEnergyConsumption", hang=True)
    until("a sample of each GPU is under way", lambda: slow.inside == 2)
    fake.load_driver()
    fake.clear_rules()
    slow.hang = 0
    read_again(daemon, fake)
    assert is_the_same(daemon, job)
    assert sorted(states(daemon)) == [FREE, ALLOCATED]
    assert daemon.finish("true", gpus=1).state == SUCCEEDED


def test_a_reload_in_the_middle_of_a_hand_over_gives_no_gpu_on_that_is_still_held(
    fake: FakeNvml, daemon: Daemon
) -> None:
    victim = daemon.run_ready(SLEEPS, gpus=2)
    for index in range(2):
        fake.gpus[index].set_processes([(os.getpid(), GIB)])
    daemon.cancel(victim.id)
    daemon.wait(victim.id)
    successor = daemon.submit("sleep", "600", gpus=2)
    until("both wait to be proved free", lambda: states(daemon) == [HANDOVER, HANDOVER])
    lists = fake.rule("nvmlDeviceGetComputeRunningProcesses_v3", hang=True)
    until("a look is under way", lambda: lists.inside > 0)
    fake.load_driver()
    fake.clear_rules()
    lists.hang = 0
    looked = fake.rule("nvmlDeviceGetComputeRunningProcesses_v3")
    read_again(daemon, fake)
    until("both were looked at again", lambda: looked.calls > 4)
    assert states(daemon) == [HANDOVER, HANDOVER]
    assert daemon.get(successor.id).state == PENDING
    for index in range(2):
        fake.gpus[index].set_processes([])
    assert len(daemon.wait(successor.id, RUNNING).attempts[0].gpus) == 2
    assert daemon.get(victim.id).attempts[0].HasField("verified_at")


def test_an_upgrade_of_the_driver_is_read_by_another_process_while_jobs_run_on(
    fake: FakeNvml, daemon: Daemon
) -> None:
    job = daemon.run_ready(SLEEPS, gpus=1)
    before = daemon.nvml_child()
    fake.set_driver_version("575.51.03")
    fake.upgrade_driver()
    until("the new driver is read", lambda: daemon.get_node().driver_version == "575.51.03")
    read_again(daemon, fake)
    assert daemon.nvml_child() not in (before, 0)
    assert is_the_same(daemon, job)
    assert daemon.finish("true", gpus=1).state == SUCCEEDED


# Not there -------------------------------------------------------------------------------------


def not_ready(daemon: Daemon) -> str:
    """What /readyz says; empty while it is ready."""
    try:
        daemon.metrics("/readyz")
    except urllib.error.HTTPError as refused:
        return str(refused.read().decode().strip())
    return ""


def test_without_a_library_the_daemon_serves_and_finds_it_when_it_is_installed(fake: FakeNvml) -> None:
    fake.hide_library()
    with served(fake) as daemon, logged(daemon):
        daemon.start()
        said = (
            "no GPU can be read: ERROR_LIBRARY_NOT_FOUND: libnvidia-ml.so.1 is not on this machine; install"
        )
        node = daemon.get_node()
        assert (list(node.gpus), len(node.problems)) == ([], 1)
        assert node.problems[0].startswith(said)
        assert not_ready(daemon) == node.problems[0]
        assert daemon.metrics("/healthz") == "ok\n"
        assert "wattshift_gpu_info" not in daemon.metrics()
        shown = daemon.cli("gpus")
        assert (shown.returncode, shown.stderr.splitlines()) == (0, ["no GPUs", node.problems[0]])
        waits = daemon.submit("true", gpus=2)
        assert daemon.finish("true", gpus=0).state == SUCCEEDED
        assert daemon.get(waits.id).state == PENDING
        fake.show_library()
        assert daemon.wait(waits.id).state == SUCCEEDED
        assert (not_ready(daemon), len(daemon.get_node().gpus)) == ("", 2)
        log = daemon.log()
        assert (log.count(said), log.count("GPUs can be read: driver 570.86.15, 2 GPUs")) == (1, 1)


def test_a_driver_that_is_unloaded_stops_no_job_and_starts_none_until_it_is_back(
    fake: FakeNvml, daemon: Daemon
) -> None:
    job = daemon.run_ready(SLEEPS, gpus=1)
    fake.unload_driver()
    until("both GPUs are lost", lambda: states(daemon) == [LOST, LOST])
    node = daemon.get_node()
    assert {gpu.detail for gpu in node.gpus} == {"ERROR_DRIVER_NOT_LOADED"}
    assert "modprobe nvidia" in not_ready(daemon)
    waits = daemon.submit("true", gpus=1)
    read_nothing = daemon.log().count("ERROR_DRIVER_NOT_LOADED")
    assert (daemon.get(waits.id).state, is_the_same(daemon, job)) == (PENDING, True)
    fake.load_driver()
    assert daemon.wait(waits.id).state == SUCCEEDED
    assert is_the_same(daemon, job)
    until("all is as before", lambda: sorted(states(daemon)) == [FREE, ALLOCATED])
    assert (not_ready(daemon), read_nothing) == ("", 1)
    assert daemon.events("GpuMarked") == []


def test_a_library_that_goes_away_under_a_running_daemon_stops_no_job(fake: FakeNvml, daemon: Daemon) -> None:
    job = daemon.run_ready(SLEEPS, gpus=1)
    fake.hide_library()
    read_again(daemon, fake)  # who has it open keeps it
    os.kill(daemon.nvml_child(), signal.SIGKILL)
    until("it is missed", lambda: "ERROR_LIBRARY_NOT_FOUND" in not_ready(daemon))
    assert is_the_same(daemon, job)
    # The last known of a GPU is shown with its age, and nothing starts on it.
    waits = daemon.submit("true", gpus=1)
    assert daemon.get(waits.id).state == PENDING
    fake.show_library()
    assert daemon.wait(waits.id).state == SUCCEEDED
    assert is_the_same(daemon, job)


# Without rights --------------------------------------------------------------------------------


def test_without_the_right_to_set_limits_jobs_run_and_the_remedy_is_told(fake: FakeNvml) -> None:
    fake.set_privileged(False)
    with served(fake) as daemon, logged(daemon):
        daemon.start()
        until("both GPUs are free", lambda: states(daemon) == [FREE, FREE])
        assert daemon.finish("true", gpus=2).state == SUCCEEDED
        node = daemon.get_node()
        (told,) = node.limitations
        assert told.startswith("power limits can't be set on GPU 0, 1: ERROR_NO_PERMISSION; jobs run all")
        assert "CAP_SYS_ADMIN" in told
        assert (list(node.problems), not_ready(daemon)) == ([], "")
        assert daemon.cli("gpus").stderr.splitlines() == [told]
        assert daemon.metrics().count("wattshift_gpu_power_limit_settable{") == 2
        assert 'power_limit_settable{gpu="' + fake.gpus[0].uuid + '"} 0.0' in daemon.metrics()
        assert daemon.log().count(told) == 1
        # Given the right, it needs no more than to open the GPUs again.
        fake.set_privileged(True)
        fake.load_driver()
        until("nothing is limited", lambda: not daemon.get_node().limitations)
        assert daemon.cli("gpus").stderr == ""


def test_asking_for_the_right_changes_no_limit(fake: FakeNvml, daemon: Daemon) -> None:
    fake.gpus[0].limit_mw = 512_345
    fake.load_driver()
    fake.gpus[0].limit_mw = 512_345  # as an admin sets it at boot
    read_again(daemon, fake)
    assert [fake.gpus[index].limit_mw for index in range(2)] == [512_345, 700_000]
    assert daemon.get_node().limitations == []


# What it says on the metrics page --------------------------------------------------------------


def ages_s(daemon: Daemon) -> dict[str, float]:
    lines = [line for line in daemon.metrics().splitlines() if "gpu_sample_age_seconds{" in line]
    return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines}


def test_the_last_reading_of_a_gpu_that_hangs_stays_and_its_age_grows(fake: FakeNvml, daemon: Daemon) -> None:
    hung, other = fake.gpus[0].uuid, fake.gpus[1].uuid
    fake.gpus[0].memory_temperature_celsius = 77
    shown = f'wattshift_gpu_memory_temperature_celsius{{gpu="{hung}"}} 77.0'
    until("it is read", lambda: shown in daemon.metrics())
    rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=0, hang=True)
    # Twenty periods in which the other was read.
    until("its age has grown", lambda: ages_s(daemon)[hung] > 2.0 > ages_s(daemon)[other])
    assert shown in daemon.metrics()
    assert not_ready(daemon) == ""
    rule.hang = 0
    until("it is read again", lambda: ages_s(daemon)[hung] < 2.0)


def test_failures_without_a_name_share_one_label(fake: FakeNvml, daemon: Daemon) -> None:
    for index, code in enumerate((777, 778)):
        fake.rule("nvmlDeviceGetUtilizationRates", gpu=index, code=code)
    line = 'wattshift_telemetry_errors_total{code="ERROR_OTHER"}'
    until("both are counted", lambda: line in daemon.metrics())
    read_again(daemon, fake)
    assert "ERROR_77" not in daemon.metrics()
