"""A real daemon on the fake driver: what keeps GPUs from the next job, and how they come back."""

import contextlib
import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.v1 import job_pb2, node_pb2
from tests.fakes.nvml.fake import ABSENT, GIB, FakeNvml
from tests.fakes.nvml.profiles import MIB
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import PENDING, RUNNING, Daemon, reason_of, spec, until, word
from tests.harness.fixtures import Make

pytestmark = needs_gcc

SLEEPS = "echo ready; exec sleep 600"
# Takes a moment to go, in which the test can say what it leaves behind.
LINGERS = "trap 'sleep 1; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
ALLOCATED = node_pb2.GPU_STATE_ALLOCATED
FREE = node_pb2.GPU_STATE_FREE
HANDOVER = node_pb2.GPU_STATE_HANDOVER
QUARANTINED = node_pb2.GPU_STATE_QUARANTINED
EMPTY = 4 * MIB
# What ends a hand-over that must not end by time.
PATIENT_S = 600
# The driver as it is for whoever has to look often that something did not happen.
LOOKS = 5


def config(handover_timeout_s: float, more: str = "", looks_every_s: int = 1) -> str:
    return f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1
processes_period_s = {looks_every_s}

[policy]
handover_timeout_s = {handover_timeout_s}
{more}"""


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path)


def served(
    make: Make, fake: FakeNvml, handover_timeout_s: float = PATIENT_S, more: str = "", looks_every_s: int = 1
) -> Daemon:
    daemon = make(gpus="", config=config(handover_timeout_s, more, looks_every_s))
    daemon.environment = fake.environment()
    daemon.start()
    until("every GPU is free", lambda: {gpu.state for gpu in gpus(daemon)} == {FREE})
    return daemon


def gpus(daemon: Daemon) -> list[node_pb2.Gpu]:
    return list(daemon.get_node().gpus)


def hold(fake: FakeNvml, *processes: tuple[int, int], used: int | None = None) -> None:
    """Put processes with their memory on the GPU."""
    fake.gpus[0].set_processes(processes)
    fake.gpus[0].memory_used = EMPTY + sum(size for _, size in processes) if used is None else used


def pid_of(job: job_pb2.Job) -> int:
    return int(job.attempts[-1].pid)


def looked_again(fake: FakeNvml) -> None:
    """Return after some more looks at the process lists."""
    rule = fake.rule("nvmlDeviceGetComputeRunningProcesses_v3")
    until("it was looked at again", lambda: rule.calls >= LOOKS)
    rule.function = b""


@contextlib.contextmanager
def program(folder: Path, name: str) -> Iterator[int]:
    """Run a program of that name for as long as it is wanted; its PID."""
    path = folder / name
    shutil.copy(shutil.which("cat") or "", path)
    with subprocess.Popen([path], stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


# Whole GPUs ------------------------------------------------------------------------------------


def test_the_successor_waits_for_the_victims_entry_and_then_for_its_memory(
    make_daemon: Make, fake: FakeNvml
) -> None:
    daemon = served(make_daemon, fake)
    victim = daemon.run_ready(SLEEPS, job_class="mining", gpus=1)
    hold(fake, (pid_of(victim), 30 * GIB))
    successor = daemon.submit(script=SLEEPS, job_class="inference", gpus=1)
    until("the victim is gone", lambda: daemon.get(victim.id).attempts[0].HasField("exited_at"))
    looked_again(fake)  # the driver still lists it
    assert (gpus(daemon)[0].state, daemon.get(successor.id).state) == (HANDOVER, PENDING)
    hold(fake, used=EMPTY + 30 * GIB)
    looked_again(fake)  # it does no more, but the memory is not back
    assert (gpus(daemon)[0].state, daemon.get(successor.id).state) == (HANDOVER, PENDING)
    explained = daemon.cli("explain", successor.id).stdout
    assert "waits until they are proved free, within about" in explained
    hold(fake)
    daemon.wait(successor.id, RUNNING)
    attempt = daemon.get(victim.id).attempts[0]
    assert attempt.verified_at.ToNanoseconds() > attempt.exited_at.ToNanoseconds()


def test_memory_that_stays_ends_in_quarantine_and_the_gpu_returns_when_it_is_back(
    make_daemon: Make, fake: FakeNvml
) -> None:
    daemon = served(make_daemon, fake, handover_timeout_s=1)
    job = daemon.run_ready(SLEEPS, gpus=1)
    hold(fake, (pid_of(job), 30 * GIB))
    daemon.cancel(job.id)
    hold(fake, used=EMPTY + 30 * GIB)
    until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
    gpu = gpus(daemon)[0]
    assert (reason_of(gpu), gpu.detail) == (
        "HANDOVER_TIMED_OUT",
        f"still held by {30 * 1024 + 4} MiB in use and no process to name",
    )
    waits = daemon.submit("true", gpus=1)
    assert gpu.detail in daemon.cli("explain", waits.id).stdout
    assert not daemon.get(job.id).attempts[0].HasField("verified_at")
    hold(fake)
    daemon.wait(waits.id)
    assert daemon.get(job.id).attempts[0].HasField("verified_at")


def test_a_process_that_outlives_its_job_is_named_and_nothing_is_booked_twice(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    daemon = served(make_daemon, fake, handover_timeout_s=1, looks_every_s=3)
    with program(tmp_path, "trainer") as pid:
        job = daemon.run_ready(LINGERS, gpus=1)
        looked_again(fake)  # the next routine look comes when the job is gone
        daemon.cancel(job.id)
        hold(fake, (pid, 2 * GIB))  # a container's, say, which nobody saw before
        waits = daemon.submit("true", gpus=1)
        until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
        named = f"pid {pid} ({getpass.getuser()}, trainer, 2048 MiB)"
        assert gpus(daemon)[0].detail == f"still held by {named}"
        assert named in daemon.cli("gpus").stdout
        assert daemon.get(waits.id).state == PENDING
    hold(fake)
    daemon.wait(waits.id)


def test_an_operator_may_end_the_quarantine_but_not_the_proof(make_daemon: Make, fake: FakeNvml) -> None:
    daemon = served(make_daemon, fake, handover_timeout_s=1)
    job = daemon.run_ready(LINGERS, gpus=1)
    daemon.cancel(job.id)
    hold(fake, used=9 * GIB)
    until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
    assert daemon.cli("uncordon", "0").returncode == 0
    assert gpus(daemon)[0].state in (HANDOVER, QUARANTINED)
    until("it is quarantined again", lambda: gpus(daemon)[0].state == QUARANTINED)
    hold(fake)
    until("it is free", lambda: gpus(daemon)[0].state == FREE)


def test_a_hand_over_goes_on_through_a_restart_of_the_daemon(make_daemon: Make, fake: FakeNvml) -> None:
    daemon = served(make_daemon, fake)
    job = daemon.run_ready(SLEEPS, job_class="mining", gpus=1)
    hold(fake, (pid_of(job), 30 * GIB))
    daemon.requeue(job.id)
    until("its process is gone", lambda: daemon.get(job.id).attempts[0].HasField("exited_at"))
    daemon.restart()
    looked_again(fake)
    assert (gpus(daemon)[0].state, daemon.get(job.id).state) == (HANDOVER, PENDING)
    hold(fake, used=EMPTY + GIB)
    looked_again(fake)  # the baseline of before is known: a GiB is too much
    assert (gpus(daemon)[0].state, daemon.get(job.id).state) == (HANDOVER, PENDING)
    hold(fake)
    daemon.wait_attempt(job.id, 2)


def test_how_long_the_memory_will_take_is_told_before(make_daemon: Make, fake: FakeNvml) -> None:
    daemon = served(make_daemon, fake, handover_timeout_s=20)
    job = daemon.run_ready(SLEEPS, job_class="mining", gpus=1, grace_s=10, pinned_memory_mib=231_743)
    wanted = ("--class", "inference", "--", "true")
    found = daemon.preview(spec("true", job_class="inference", gpus=1))
    (victim,) = found.victims
    assert victim.job_id == job.id
    assert round(victim.handover_s, 1) == 25.9
    assert round(found.start_within_s, 1) == 35.9
    assert found.summary == (
        f"{job.id} would stop for it; it would start on 1 GPU within 36 s, of which about 26 s are to prove "
        f"the GPUs free. The hand-over from {job.id} is expected to take longer than "
        "policy.handover_timeout_s (20 s): their GPUs would be quarantined until they are free."
    )
    assert "26s" in daemon.cli("preview", *wanted).stdout


# Shares ----------------------------------------------------------------------------------------


def test_a_share_is_given_on_when_what_its_holder_had_is_back(make_daemon: Make, fake: FakeNvml) -> None:
    daemon = served(make_daemon, fake)
    half = {"gpus": 1, "gpu_share_milli": 500}
    stays, goes = (daemon.run_ready(SLEEPS, job_class="training", **half) for _ in range(2))
    neighbour = (pid_of(stays), 10 * GIB)
    hold(fake, neighbour, (pid_of(goes), 20 * GIB))
    daemon.cancel(goes.id)
    waits = daemon.submit(script=SLEEPS, **half)
    until("it is gone", lambda: daemon.get(goes.id).attempts[0].HasField("exited_at"))
    looked_again(fake)
    assert daemon.get(waits.id).state == PENDING
    hold(fake, neighbour, used=EMPTY + 30 * GIB)
    looked_again(fake)
    assert daemon.get(waits.id).state == PENDING
    hold(fake, neighbour)
    daemon.wait(waits.id, RUNNING)
    assert daemon.get(stays.id).attempt == 1


def test_where_a_neighbours_memory_is_not_known_the_lists_decide(make_daemon: Make, fake: FakeNvml) -> None:
    daemon = served(make_daemon, fake)
    half = {"gpus": 1, "gpu_share_milli": 500}
    stays, goes = (daemon.run_ready(SLEEPS, **half) for _ in range(2))
    fake.gpus[0].set_processes([(pid_of(stays), ABSENT), (pid_of(goes), ABSENT)])
    fake.gpus[0].memory_used = 30 * GIB
    daemon.cancel(goes.id)
    waits = daemon.submit(script=SLEEPS, **half)
    until("it is gone", lambda: daemon.get(goes.id).attempts[0].HasField("exited_at"))
    looked_again(fake)
    assert daemon.get(waits.id).state == PENDING
    fake.gpus[0].set_processes([(pid_of(stays), ABSENT)])
    daemon.wait(waits.id, RUNNING)


# MIG, MPS, Xorg --------------------------------------------------------------------------------


def test_an_instance_is_given_on_by_its_own_memory_and_processes(make_daemon: Make, tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, profile="A100")
    fake.gpus[0].partition(3, 3)
    first, second = fake.gpus[0].instances[:2]
    daemon = served(make_daemon, fake)
    jobs = {job.attempts[-1].gpus[0]: job for job in (daemon.run_ready(SLEEPS, gpus=1) for _ in range(2))}
    goes, stays = jobs[first.uuid], jobs[second.uuid]
    fake.gpus[0].set_processes([(pid_of(stays), 5 * GIB)], instance=second.instance)
    fake.gpus[0].set_processes([(pid_of(goes), 9 * GIB)], instance=first.instance)
    second.memory_used += 5 * GIB
    first.memory_used += 9 * GIB
    daemon.cancel(goes.id)
    waits = daemon.submit(script=SLEEPS, gpus=1)
    until("it is gone", lambda: daemon.get(goes.id).attempts[0].HasField("exited_at"))
    fake.gpus[0].set_processes([], instance=first.instance)
    looked_again(fake)
    assert daemon.get(waits.id).state == PENDING
    first.memory_used -= 9 * GIB
    assert list(daemon.wait(waits.id, RUNNING).attempts[-1].gpus) == [first.uuid]


def test_what_clients_left_on_their_mps_server_keeps_the_gpu_and_the_server_does_not(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    daemon = served(make_daemon, fake, handover_timeout_s=1)
    with program(tmp_path, "nvidia-cuda-mps-server") as server:
        job = daemon.run_ready(SLEEPS, gpus=1)
        hold(fake, (server, 12 * GIB))
        fake.gpus[0].set_processes([(pid_of(job), 0)], "mps")
        daemon.cancel(job.id)
        fake.gpus[0].set_processes([], "mps")
        until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
        named = f"pid {server} ({getpass.getuser()}, nvidia-cuda-mps-server, {12 * 1024} MiB)"
        assert named in gpus(daemon)[0].detail
        hold(fake, (server, 30 * MIB))
        until("it is free", lambda: gpus(daemon)[0].state == FREE)
        assert daemon.run_ready(SLEEPS, gpus=1).state == RUNNING


def test_a_rig_with_a_desktop_is_schedulable_and_its_desktop_is_not_the_baseline(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    with program(tmp_path, "Xorg") as xorg:
        fake.become(0, "RTX4090")
        total_mib = fake.gpus[0].memory_total // MIB
        fake.gpus[0].set_processes([(xorg, 300 * MIB)], "graphics")
        fake.gpus[0].memory_used = EMPTY + 300 * MIB
        daemon = served(make_daemon, fake)
        fits = daemon.run_ready(SLEEPS, gpus=1, gpu_memory_mib=total_mib - 4)
        fake.gpus[0].set_processes([(xorg, 700 * MIB)], "graphics")  # somebody opened a window
        hold(fake, (pid_of(fits), GIB), used=EMPTY + 700 * MIB + GIB)
        daemon.cancel(fits.id)
        again = daemon.submit(script=SLEEPS, gpus=1)
        until("it is gone", lambda: daemon.get(fits.id).attempts[0].HasField("exited_at"))
        hold(fake, used=EMPTY + 700 * MIB + GIB)
        looked_again(fake)
        assert daemon.get(again.id).state == PENDING
        hold(fake, used=EMPTY + 700 * MIB)
        daemon.wait(again.id, RUNNING)
        assert gpus(daemon)[0].state == ALLOCATED


def test_where_memory_is_the_systems_too_the_lists_decide(make_daemon: Make, fake: FakeNvml) -> None:
    fake.become(0, "GH200")
    daemon = served(make_daemon, fake)
    job = daemon.run_ready(SLEEPS, gpus=1)
    hold(fake, (pid_of(job), 30 * GIB))
    daemon.cancel(job.id)
    hold(fake, used=EMPTY + 30 * GIB)  # pages that the system keeps
    until("it is free", lambda: gpus(daemon)[0].state == FREE)


# PIDs that are nobody's ------------------------------------------------------------------------


def test_an_entry_of_a_process_that_is_gone_ends_in_quarantine_with_its_pid(
    make_daemon: Make, fake: FakeNvml
) -> None:
    daemon = served(make_daemon, fake, handover_timeout_s=1)
    job = daemon.run_ready(SLEEPS, gpus=1)
    hold(fake, (pid_of(job), 2 * GIB))
    daemon.cancel(job.id)
    until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
    assert gpus(daemon)[0].detail == (
        f"still held by pid {pid_of(job)}, which has ended or is another process by now (2048 MiB)"
    )
    hold(fake)
    until("it is free", lambda: gpus(daemon)[0].state == FREE)


@pytest.mark.parametrize("pid", [0, 2**32 - 1])
def test_a_scrambled_entry_keeps_the_gpu_for_a_bounded_time(
    make_daemon: Make, fake: FakeNvml, pid: int
) -> None:
    daemon = served(make_daemon, fake, handover_timeout_s=1)
    job = daemon.run_ready(SLEEPS, gpus=1)
    hold(fake, (pid, 2 * GIB))
    daemon.cancel(job.id)
    until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
    assert gpus(daemon)[0].detail == "still held by a process that can't be named (2048 MiB)"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to choose a process's PID")
def test_whoever_took_over_the_pid_of_a_stale_entry_is_neither_blamed_nor_evicted(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    evicts = '[[foreign.rules]]\ncommand = "cat"\naction = "evict"\n'
    daemon = served(make_daemon, fake, handover_timeout_s=3, more=evicts)
    job = daemon.run_ready(SLEEPS, gpus=1)
    pid = pid_of(job)
    hold(fake, (pid, 2 * GIB))
    looked_again(fake)
    daemon.cancel(job.id)
    until("it is gone", lambda: not Path(f"/proc/{pid}").exists())
    with process_with(pid) as innocent:
        until("it is quarantined", lambda: gpus(daemon)[0].state == QUARANTINED)
        looked_again(fake)
        assert gpus(daemon)[0].detail == (
            f"still held by pid {pid}, which has ended or is another process by now (2048 MiB)"
        )
        assert innocent.poll() is None
    assert word(gpus(daemon)[0].reason) == "HANDOVER_TIMED_OUT"


@contextlib.contextmanager
def process_with(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that has this PID."""
    for _ in range(1000):  # others start processes, too
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        if process.pid == pid:
            break
        process.kill()
        process.communicate()
    else:
        pytest.skip(f"PID {pid} could not be had")
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
