"""The real daemon on the real driver: what the C fake stands for elsewhere. Skipped without a GPU.

They take every GPU of the machine for a minute, and change no setting of a card. Figures are printed (`-s`).
"""

import csv
import getpass
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.v1 import job_pb2, node_pb2
from tests.harness.daemon import FAILED, PENDING, RUNNING, Daemon, reason_of, until

NVIDIA_SMI = shutil.which("nvidia-smi")
PROGRAM = Path(__file__).with_name("cuda_program.py")
CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.2
"""
FREE = node_pb2.GPU_STATE_FREE
HELD_MIB = 8192
# A context's own memory beside what its program takes; a few hundred MiB by board and driver.
CONTEXT_MIB = 2048
# The driver's start without persistence mode, CUDA's start, and a busy machine.
PATIENCE_S = 60.0

Rows = dict[str, dict[str, str]]


def smi(*columns: str) -> Rows:
    """What nvidia-smi says of each GPU, by UUID."""
    assert NVIDIA_SMI
    query = f"--query-gpu=uuid,{','.join(columns)}"
    page = subprocess.run(
        [NVIDIA_SMI, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    ).stdout
    rows = csv.reader(page.splitlines(), skipinitialspace=True)
    return {uuid: dict(zip(columns, values, strict=True)) for uuid, *values in rows}


def has_gpu() -> bool:
    listed = NVIDIA_SMI and subprocess.run([NVIDIA_SMI, "-L"], capture_output=True, check=False).stdout
    return bool(listed and listed.startswith(b"GPU "))


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU here"),
]


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.start()
        until("every GPU is free", lambda: {gpu.state for gpu in gpus(daemon)} == {FREE}, PATIENCE_S)
        yield daemon


def gpus(daemon: Daemon) -> list[node_pb2.Gpu]:
    return list(daemon.get_node().gpus)


def command(mib: int = HELD_MIB, *options: str) -> list[str]:
    return [sys.executable, str(PROGRAM), str(mib), *options]


def holding(daemon: Daemon, *options: str, **fields: object) -> job_pb2.Job:
    """Run a job that holds memory on every GPU, until it says so."""
    everything = len(gpus(daemon))
    job = daemon.submit(*command(HELD_MIB, *options), gpus=everything, **fields)
    daemon.wait(job.id, RUNNING, timeout_s=PATIENCE_S)
    until(f"{job.id} holds its memory", lambda: "ready" in daemon.output(job.id), PATIENCE_S)
    return daemon.get(job.id)


def used_mib(daemon: Daemon) -> list[int]:
    return [gpu.memory_used_mib for gpu in gpus(daemon)]


def stages_ms(attempt: job_pb2.Attempt) -> dict[str, float]:
    """When each stage of a preemption was over, after its decision."""
    begun = attempt.notice.decided_at.ToMicroseconds()
    ends = {
        "signalled": attempt.signalled_at,
        "exited": attempt.exited_at,
        "verified": attempt.verified_at,
        "successor started": attempt.successor_started_at,
    }
    return {name: (end.ToMicroseconds() - begun) / 1000 for name, end in ends.items()}


def test_boards_are_what_nvidia_smi_says(daemon: Daemon) -> None:
    told = smi(
        "index", "name", "pci.bus_id", "memory.total", "memory.used", "power.limit", "power.min_limit",
        "power.max_limit", "temperature.gpu", "driver_version",
    )  # fmt: skip
    node = daemon.get_node()
    assert {gpu.uuid for gpu in node.gpus} == set(told)
    for gpu in node.gpus:
        row = told[gpu.uuid]
        assert (gpu.index, gpu.model, gpu.pci_bus_id, node.driver_version) == (
            int(row["index"]), row["name"], row["pci.bus_id"], row["driver_version"]
        )  # fmt: skip
        assert gpu.memory_total_mib == int(row["memory.total"])
        limits = gpu.power_limit_w, gpu.power_limit_w_min, gpu.power_limit_w_max
        assert limits == tuple(float(row[f"power.{name}"]) for name in ("limit", "min_limit", "max_limit"))
        assert gpu.temperature_celsius == pytest.approx(float(row["temperature.gpu"]), abs=5)
        assert list(gpu.telemetry_problems) == []


def test_a_gpu_is_handed_over_when_the_driver_shows_it_empty(daemon: Daemon) -> None:
    empty = used_mib(daemon)
    victim = holding(daemon, grace_s=5)
    until("its memory is seen", lambda: min(used_mib(daemon)) >= HELD_MIB)
    successor = holding(daemon, job_class="inference")
    assert max(used_mib(daemon)) < max(empty) + HELD_MIB + CONTEXT_MIB
    attempt = daemon.get(victim.id).attempts[0]
    assert attempt.preempted_by == successor.id
    assert attempt.exited_at.ToMicroseconds() <= attempt.verified_at.ToMicroseconds()
    assert attempt.verified_at.ToMicroseconds() <= attempt.successor_started_at.ToMicroseconds()
    print("hand-over, ms after the notice:", stages_ms(attempt))
    daemon.cancel(successor.id)
    daemon.wait_attempt(victim.id, 2)


def test_a_deaf_victim_with_locked_memory_is_killed_and_its_gpu_proved_free(daemon: Daemon) -> None:
    victim = holding(daemon, "--deaf", "--pin", "4096", grace_s=1)
    successor = holding(daemon, job_class="inference")
    attempt = daemon.get(victim.id).attempts[0]
    assert attempt.preempted_by == successor.id
    assert attempt.exit_code == 128 + 9
    assert max(used_mib(daemon)) < 2 * HELD_MIB
    print("hand-over of a deaf victim, ms after the notice:", stages_ms(attempt))


def test_a_stranger_on_a_gpu_is_named_and_its_gpu_left_alone(daemon: Daemon) -> None:
    with subprocess.Popen(command(), stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout
        assert stranger.stdout.readline() == b"ready\n"
        until("it is seen", lambda: {reason_of(gpu) for gpu in gpus(daemon)} == {"FOREIGN_PROCESS"})
        assert {process.pid for gpu in gpus(daemon) for process in gpu.processes} == {stranger.pid}
        waiting = daemon.submit("true", gpus=len(gpus(daemon)))
        assert daemon.get(waiting.id).state == PENDING
        stranger.kill()
    daemon.wait(waiting.id, timeout_s=PATIENCE_S)


def test_a_job_and_its_gpu_outlive_a_killed_daemon(daemon: Daemon) -> None:
    job = holding(daemon)
    daemon.restart()
    after = daemon.get(job.id)
    assert (after.state, after.attempts[-1].pid) == (RUNNING, job.attempts[-1].pid)
    assert {gpu.job_ids[0] for gpu in gpus(daemon)} == {job.id}
    assert min(used_mib(daemon)) >= HELD_MIB


def test_energy_of_jobs_and_idle_is_the_counters(daemon: Daemon) -> None:
    before = counters_j(daemon)
    job = holding(daemon)
    until("some energy is used", lambda: counters_j(daemon) > before + 2000 * len(gpus(daemon)), PATIENCE_S)
    daemon.cancel(job.id)
    daemon.wait(job.id)
    until("it is booked", lambda: daemon.get(job.id).energy_j > 0)
    assert daemon.get(job.id).energy_j < counters_j(daemon) - before
    booked, counted = until("all that is counted is booked", lambda: booked_and_counted(daemon), PATIENCE_S)
    print(f"energy: {booked:.0f} J booked, {counted:.0f} J counted")


def booked_and_counted(daemon: Daemon) -> tuple[float, float] | None:
    """Joules by class and by GPU once they agree, as they do until the counter is read again."""
    page = text_string_to_metric_families(daemon.metrics())
    totals = {family.name: sum(sample.value for sample in family.samples) for family in page}
    booked, counted = (totals.get(f"wattshift_{of}_energy_joules", 0.0) for of in ("class", "gpu"))
    return (booked, counted) if booked and booked == pytest.approx(counted, rel=0.001) else None


def counters_j(daemon: Daemon) -> float:
    return sum(gpu.energy_j for gpu in gpus(daemon))


def test_draw_is_what_nvidia_smi_says(daemon: Daemon) -> None:
    holding(daemon)

    def draws_w() -> tuple[dict[str, float], dict[str, float]]:
        told = smi("power.draw.instant")
        return (
            {gpu.uuid: gpu.power_w for gpu in gpus(daemon)},
            {uuid: float(row["power.draw.instant"]) for uuid, row in told.items()},
        )

    def agree() -> bool:
        ours, told = draws_w()
        return ours == pytest.approx(told, rel=0.1)

    until("we read what nvidia-smi reads", agree)
    print("draw, W, ours and nvidia-smi's:", *draws_w())


def test_a_share_is_handed_over_beside_its_neighbour(daemon: Daemon) -> None:
    ours = [daemon.submit(*command(1024), gpu_share_milli=500) for _ in range(2 * len(gpus(daemon)))]
    for job in ours:
        daemon.wait(job.id, RUNNING, timeout_s=PATIENCE_S)
    successor = daemon.submit(*command(1024), gpu_share_milli=500, job_class="inference")
    daemon.wait(successor.id, RUNNING, timeout_s=PATIENCE_S)
    now = [daemon.get(job.id) for job in ours]
    (victim,) = [job for job in now if job.attempts[0].preempted_by]
    assert victim.attempts[0].preempted_by == successor.id
    assert [job.attempt for job in now if job is not victim] == [1] * (len(ours) - 1)
    print("hand-over of a share, ms after the notice:", stages_ms(victim.attempts[0]))


def test_an_error_of_a_program_is_its_own(daemon: Daemon) -> None:
    job = daemon.submit(*command(64, "--fault"), gpus=1)
    ended = daemon.wait(job.id, timeout_s=PATIENCE_S)
    print(job_pb2.JobState.Name(ended.state), reason_of(ended), ended.detail, daemon.output(job.id))
    assert ended.state == FAILED
    until("the driver's XID is counted", lambda: xids(daemon) == {"xid_31"})
    assert {gpu.state for gpu in gpus(daemon)} == {FREE}


def xids(daemon: Daemon) -> set[str]:
    page = text_string_to_metric_families(daemon.metrics())
    return {
        sample.labels["kind"]
        for family in page
        for sample in family.samples
        if sample.name == "wattshift_gpu_errors_total" and sample.value and "xid" in sample.labels["kind"]
    }
