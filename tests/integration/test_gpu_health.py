"""A real daemon on the fake driver: GPUs that fail in each state, and what becomes of the jobs on them."""

import getpass
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.v1 import job_service_pb2, node_pb2
from tests.fakes.nvml.fake import ABSENT, GIB, GPU_FIGURES, FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import FAILED, PENDING, RUNNING, Daemon, reason_of, until, word

pytestmark = needs_gcc

# What the daemon itself knows of a GPU.
OF_ANY_GPU = {"info", "state", "sample_age_seconds", "foreign_processes"}
CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1

[policy]
handover_timeout_s = 1
"""
SLEEPS = "echo ready; exec sleep 600"
QUARANTINED = node_pb2.GPU_STATE_QUARANTINED
LOST = node_pb2.GPU_STATE_LOST
FREE = node_pb2.GPU_STATE_FREE


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, gpus=2)


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        daemon.start()
        until("both GPUs are free", lambda: [gpu.state for gpu in gpus(daemon)] == [FREE, FREE])
        yield daemon


def gpus(daemon: Daemon) -> list[node_pb2.Gpu]:
    return list(daemon.get_node().gpus)


def place(fake: FakeNvml, uuid: str) -> int:
    return [fake.gpus[index].uuid for index in range(2)].index(uuid)


def test_a_job_on_a_gpu_that_falls_off_the_bus_goes_on_on_another(fake: FakeNvml, daemon: Daemon) -> None:
    job = daemon.run_ready(SLEEPS, job_class="inference", gpus=1)
    (uuid,) = job.attempts[-1].gpus
    fake.gpus[place(fake, uuid)].lost = 1
    fake.xid(place(fake, uuid), 79)
    moved = daemon.wait_attempt(job.id, 2)
    assert list(moved.attempts[-1].gpus) == [fake.gpus[1 - place(fake, uuid)].uuid]
    assert word(moved.attempts[0].notice.reason) == "GPU_FAILED"
    gpu = gpus(daemon)[place(fake, uuid)]
    assert gpu.state == LOST
    until(
        "it is counted",
        lambda: f'wattshift_gpu_errors_total{{gpu="{uuid}",kind="xid_79"}} 1.0' in daemon.metrics(),
    )


def test_a_job_that_fails_of_its_own_error_says_what_its_gpu_reported(
    fake: FakeNvml, daemon: Daemon, tmp_path: Path
) -> None:
    fails = tmp_path / "fails"
    script = f"echo ready; while [ ! -e {fails} ]; do sleep 0.02; done; exit 3"
    job = daemon.run_ready(script, gpus=1)
    (uuid,) = job.attempts[-1].gpus
    fake.xid(place(fake, uuid), 31)
    until("the XID was heard", lambda: 'kind="xid_31"' in daemon.metrics())
    fails.touch()
    assert daemon.wait(job.id, FAILED).detail == f"exit code 3; GPU {uuid} reported XID 31"
    until("the GPU stays in use", lambda: gpus(daemon)[place(fake, uuid)].state == FREE)


def test_a_job_that_dies_of_its_gpus_error_is_started_again_elsewhere(fake: FakeNvml, daemon: Daemon) -> None:
    job = daemon.run_ready("echo ready; trap 'exit 3' TERM; while :; do sleep 0.02; done", gpus=1)
    (uuid,) = job.attempts[-1].gpus
    fake.xid(place(fake, uuid), 119)
    again = daemon.wait_attempt(job.id, 2)
    assert (again.attempts[0].exit_code, word(again.attempts[0].end_reason)) == (3, "GPU_FAILED")
    assert list(again.attempts[-1].gpus) != [uuid]


def test_a_gpu_that_is_lost_while_it_is_free_is_given_to_nobody(fake: FakeNvml, daemon: Daemon) -> None:
    fake.xid(0, 79)
    fake.gpus[0].lost = 1
    until("it is seen", lambda: gpus(daemon)[0].state == LOST)
    first = daemon.run_ready(SLEEPS, gpus=1)
    assert list(first.attempts[-1].gpus) == [fake.gpus[1].uuid]
    second = daemon.submit("true", gpus=1)
    assert daemon.get(second.id).state == PENDING


def test_a_gpu_that_is_lost_in_mid_hand_over_is_quarantined_and_its_victim_is_not_held_up(
    fake: FakeNvml, daemon: Daemon
) -> None:
    job = daemon.run_ready(SLEEPS, job_class="mining", gpus=1)
    (uuid,) = job.attempts[-1].gpus
    index = place(fake, uuid)
    fake.gpus[index].set_processes([(os.getpid(), GIB)])  # who keeps it from being proved free
    daemon.requeue(job.id)
    until("it has ended", lambda: daemon.get(job.id).attempts[0].HasField("exited_at"))
    fake.gpus[index].lost = 1
    again = daemon.wait_attempt(job.id, 2)
    assert list(again.attempts[-1].gpus) == [fake.gpus[1 - index].uuid]
    until("it is marked", lambda: gpus(daemon)[index].state == LOST)
    fake.gpus[index].lost = 0
    until("it is back", lambda: gpus(daemon)[index].state == QUARANTINED)
    assert reason_of(gpus(daemon)[index]) in ("GPU_NEEDS_REBOOT", "HANDOVER_TIMED_OUT")


def test_a_gpu_that_falls_off_the_bus_in_mid_hand_over_is_proved_free_when_it_is_back(
    fake: FakeNvml, daemon: Daemon
) -> None:
    job = daemon.run_ready(SLEEPS, gpus=1)
    (uuid,) = job.attempts[-1].gpus
    index = place(fake, uuid)
    empty = int(fake.gpus[index].memory_used)
    fake.gpus[index].memory_used = 9 * GIB
    daemon.cancel(job.id)
    until("it is in hand-over", lambda: gpus(daemon)[index].state == node_pb2.GPU_STATE_HANDOVER)
    fake.xid(index, 79)
    fake.gpus[index].lost = 1
    until("it is lost", lambda: gpus(daemon)[index].state == LOST)
    assert not daemon.get(job.id).attempts[0].HasField("verified_at")
    fake.gpus[index].memory_used = empty
    fake.gpus[index].lost = 0
    until("it is back", lambda: gpus(daemon)[index].state == QUARANTINED)
    assert reason_of(gpus(daemon)[index]) == "GPU_NEEDS_REBOOT"
    until("the victim is proved gone", lambda: daemon.get(job.id).attempts[0].HasField("verified_at"))
    until("it was well for long enough", lambda: gpus(daemon)[index].state == FREE)


def test_xids_that_follow_our_own_kill_leave_the_gpu_free(fake: FakeNvml, daemon: Daemon) -> None:
    job = daemon.run_ready(SLEEPS, gpus=1)
    index = place(fake, job.attempts[-1].gpus[0])
    daemon.cancel(job.id)
    fake.xid(index, 45)
    fake.xid(index, 43)
    until("both were heard", lambda: 'kind="own_kill"} 2.0' in daemon.metrics())
    until("it is free", lambda: gpus(daemon)[index].state == FREE)


def test_a_gap_in_what_is_heard_of_a_gpu_is_counted_and_told_with_the_end_of_its_job(
    fake: FakeNvml, daemon: Daemon, tmp_path: Path
) -> None:
    fails = tmp_path / "fails"
    script = f"echo ready; while [ ! -e {fails} ]; do sleep 0.02; done; exit 3"
    job = daemon.run_ready(script, gpus=1)
    (uuid,) = job.attempts[-1].gpus
    assert "events_missed" not in daemon.metrics()
    wait = fake.rule("nvmlEventSetWait_v2", code=999)
    until("the set is broken", lambda: wait.calls)
    wait.function = b""
    counted = f'wattshift_gpu_errors_total{{gpu="{uuid}",kind="events_missed"}} 1.0'
    until("the gap is counted", lambda: counted in daemon.metrics())
    fails.touch()
    missed = f"GPU {uuid} reported nothing for a moment, in which XIDs may have been missed"
    assert daemon.wait(job.id, FAILED).detail == f"exit code 3; {missed}"
    assert gpus(daemon)[place(fake, uuid)].state != QUARANTINED


def test_what_a_gpu_reports_of_power_and_health_is_on_the_metrics_page(
    fake: FakeNvml, daemon: Daemon
) -> None:
    fake.become(0, "RTX4090")  # which has no verdict, no rows, no sensor at its memory
    figures = {
        "limit_outside_mw": 600_000,
        "power_average_mw": 500_000,
        "power_capped_ns": 2_500_000_000,
        "clock_reasons": 0x84,
        "remap_pending": 1,
        "memory_temperature_celsius": 91,
    }
    for figure, value in figures.items():
        setattr(fake.gpus[1], figure, value)

    def page() -> dict[str, float]:
        lines = [line for line in daemon.metrics().splitlines() if fake.gpus[1].uuid in line]
        parts = (line.rpartition(" ") for line in lines)
        return {name.partition("{")[0]: float(value) for name, _, value in parts}

    expected = {
        "wattshift_gpu_power_average_watts": 500.0,
        "wattshift_gpu_power_limit_watts": 700.0,
        "wattshift_gpu_power_limit_enforced_watts": 600.0,
        "wattshift_gpu_power_capped_seconds_total": 2.5,
        "wattshift_gpu_clock_reasons": 132.0,
        "wattshift_gpu_remap_pending": 1.0,
        "wattshift_gpu_recovery_action": 0.0,
        "wattshift_gpu_memory_temperature_celsius": 91.0,
        "wattshift_gpu_memory_clock_hertz": 2.619e9,
    }
    until("all of it is there", lambda: expected.items() <= page().items())
    absent = ("gpu_recovery_action", "gpu_remap_pending", "gpu_memory_temperature_celsius")
    assert not any(f'{name}{{gpu="{fake.gpus[0].uuid}"' in daemon.metrics() for name in absent)


def test_what_a_gpu_does_not_report_has_no_series_and_no_zero(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    fake.gpus[0].fan_percent, fake.gpus[0].smoothing_enabled = 45, 0
    for figure in GPU_FIGURES:
        setattr(fake.gpus[1], figure, ABSENT)

    def names(daemon: Daemon, index: int) -> set[str]:
        label = f'gpu="{fake.gpus[index].uuid}"'
        lines = daemon.metrics().splitlines()
        return {line.partition("{")[0].removeprefix("wattshift_gpu_") for line in lines if label in line}

    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        daemon.start()
        until("both were read", lambda: names(daemon, 0) > OF_ANY_GPU <= names(daemon, 1))
        job = daemon.run("sleep", "600", gpus=2)
        daemon.cancel(job.id)
        until("its energy is booked", lambda: [gpu.state for gpu in gpus(daemon)] == [FREE, FREE])
        assert names(daemon, 1) == OF_ANY_GPU
        assert len(names(daemon, 0) - OF_ANY_GPU) >= 30


def test_a_quarantined_gpu_says_why_and_an_operator_may_end_it(fake: FakeNvml, daemon: Daemon) -> None:
    fake.xid(0, 54)
    until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
    gpu = gpus(daemon)[0]
    assert (reason_of(gpu), gpu.detail.partition(" (")[0]) == ("GPU_NEEDS_SERVICE", "XID 54")
    waits = daemon.submit(script=SLEEPS, gpus=2)
    answer = daemon.jobs.ExplainJob(job_service_pb2.ExplainJobRequest(job_id=waits.id))
    assert f"GPU 0 is quarantined ({gpu.detail})" in [obstacle.detail for obstacle in answer.obstacles]
    daemon.cancel(waits.id)
    assert daemon.cli("uncordon", gpu.uuid).returncode == 0
    until("it is free again", lambda: gpus(daemon)[0].state == FREE)
    assert daemon.run_ready(SLEEPS, gpus=2).state == RUNNING
