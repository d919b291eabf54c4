"""A real daemon on nodes of no GPU and of sixteen, and on GPUs that move, come and go between its starts.

Whatever happens to the index: jobs, marks, baselines and CUDA_VISIBLE_DEVICES go by UUID.
"""

import getpass
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.v1 import job_pb2, node_pb2
from tests.fakes.nvml.fake import GIB, GPUS_MAX, MIB, FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import CANCELLED, PENDING, RUNNING, SUCCEEDED, Daemon, logged, until

pytestmark = needs_gcc

CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1
processes_period_s = 0.1

[policy]
handover_timeout_s = 600
restart_backoff_s = 0.05
"""
SHOWS = "echo $CUDA_VISIBLE_DEVICES; exec sleep 600"
FREE = node_pb2.GPU_STATE_FREE
ALLOCATED = node_pb2.GPU_STATE_ALLOCATED
CORDONED = node_pb2.GPU_STATE_CORDONED
QUARANTINED = node_pb2.GPU_STATE_QUARANTINED
RESERVE_MIB = 1500


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, gpus=4)


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon, logged(daemon):
        daemon.environment = fake.environment()
        yield daemon.start()


def states(daemon: Daemon) -> dict[str, int]:
    return {gpu.uuid: gpu.state for gpu in daemon.get_node().gpus}


def indices(daemon: Daemon) -> dict[str, int]:
    return {gpu.uuid: gpu.index for gpu in daemon.get_node().gpus}


def uuids(fake: FakeNvml, count: int) -> list[str]:
    return [gpu.uuid for gpu in fake.gpus[:count]]


def all_free(daemon: Daemon, count: int) -> None:
    until(f"{count} GPUs are free", lambda: list(states(daemon).values()) == [FREE] * count)


# How many --------------------------------------------------------------------------------------


def test_a_gang_takes_all_of_sixteen_gpus(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=GPUS_MAX)
    with Daemon(gpus="", config=CONFIG) as daemon, logged(daemon):
        daemon.environment = fake.environment()
        daemon.start()
        all_free(daemon, 16)
        job = daemon.run_ready(SHOWS, gpus=16)
        assert daemon.output(job.id).strip().split(",") == list(job.attempts[0].gpus)
        assert sorted(job.attempts[0].gpus) == sorted(uuids(fake, 16))
        assert list(states(daemon).values()) == [ALLOCATED] * 16
        shown = daemon.cli("gpus").stdout.splitlines()[1:]
        assert [line.split()[0] for line in shown] == [str(index) for index in range(16)]
        for name in ("gpu_info", "gpu_power_watts", "gpu_sample_age_seconds"):
            assert daemon.metrics().count(f"wattshift_{name}{{") == 16
        daemon.cancel(job.id)
        all_free(daemon, 16)
        pairs = [daemon.run("sleep", "600", gpus=2) for _ in range(8)]
        assert len({uuid for pair in pairs for uuid in pair.attempts[0].gpus}) == 16


def test_a_node_without_gpus_says_so_and_runs_what_needs_none(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=0)
    with Daemon(gpus="", config=CONFIG) as daemon, logged(daemon):
        daemon.environment = fake.environment()
        daemon.start()
        node = daemon.get_node()
        assert (list(node.gpus), node.driver_version) == ([], "570.86.15")
        (problem,) = node.problems
        assert problem.startswith("no GPU can be read: ERROR_GPU_NOT_FOUND: the driver has none; `lspci")
        assert daemon.finish("/bin/sh", "-c", "test -z $CUDA_VISIBLE_DEVICES", gpus=0).state == SUCCEEDED
        waits = daemon.submit("true", gpus=1)
        assert daemon.get(waits.id).state == PENDING
        assert "wattshift_gpu_" not in daemon.metrics()
        fake.set_count(1)  # as one appears that is plugged in, or bound to the driver again
        assert daemon.wait(waits.id).state == SUCCEEDED
        assert daemon.get_node().problems == []


# Which is which --------------------------------------------------------------------------------


def test_after_a_reboot_with_another_order_every_verdict_is_on_its_own_gpu(
    fake: FakeNvml, daemon: Daemon
) -> None:
    cordoned, broken, full, roomy = uuids(fake, 4)
    fake.gpus[2].memory_used = RESERVE_MIB * MIB
    all_free(daemon, 4)
    assert daemon.cli("cordon", "0", "--reason", "noisy fan").returncode == 0
    fake.xid(1, 54)
    until("one is quarantined", lambda: states(daemon)[broken] == QUARANTINED)
    job = daemon.run_ready(SHOWS, gpus=2, restart=job_pb2.RESTART_RULE_ALWAYS)
    assert set(job.attempts[0].gpus) == {full, roomy}
    daemon.reboot()
    fake.reorder(3, 2, 1, 0)
    fake.load_driver()
    daemon.start()
    again = daemon.wait_attempt(job.id, 2)
    assert indices(daemon) == {roomy: 0, full: 1, broken: 2, cordoned: 3}
    assert states(daemon) == {roomy: ALLOCATED, full: ALLOCATED, broken: QUARANTINED, cordoned: CORDONED}
    assert {gpu.uuid: gpu.detail.partition(" (")[0] for gpu in daemon.get_node().gpus if gpu.detail} == {
        broken: "XID 54",
        cordoned: "noisy fan",
    }
    assert set(again.attempts[1].gpus) == {full, roomy}
    until("it shows what it sees", lambda: daemon.output(job.id, attempt=2).strip())
    assert daemon.output(job.id, attempt=2).strip().split(",") == list(again.attempts[1].gpus)
    daemon.cancel(job.id)
    until("both are free", lambda: [states(daemon)[uuid] for uuid in (full, roomy)] == [FREE, FREE])
    # What the driver keeps for itself there is the one's and not the index's.
    big = daemon.run(
        "sleep", "600", gpus=1, gpu_memory_mib=fake.gpus[0].memory_total // MIB - RESERVE_MIB // 2
    )
    assert list(big.attempts[0].gpus) == [roomy]
    # An operator's index is the present one.
    assert daemon.cli("uncordon", "3").returncode == 0
    until("it is open", lambda: states(daemon)[cordoned] == FREE)


def test_a_job_that_outlives_the_daemon_holds_the_same_gpu_at_another_index(
    fake: FakeNvml, daemon: Daemon
) -> None:
    all_free(daemon, 4)
    job = daemon.run_ready(SHOWS, gpus=1)
    (held,) = job.attempts[0].gpus
    index = uuids(fake, 4).index(held)
    fake.gpus[index].set_processes([(job.attempts[0].pid, GIB)])
    fake.gpus[index].memory_used += GIB
    assert daemon.terminate() == 0
    fake.reorder(3, 2, 1, 0)
    fake.load_driver()
    daemon.start()
    until("the others are free", lambda: sorted(states(daemon).values()) == [FREE] * 3 + [ALLOCATED])
    assert (states(daemon)[held], indices(daemon)[held]) == (ALLOCATED, 3 - index)
    now = daemon.get(job.id)
    assert (now.state, now.attempt, now.attempts[0].pid) == (RUNNING, 1, job.attempts[0].pid)
    others = daemon.run("sleep", "600", gpus=3)
    assert held not in others.attempts[0].gpus


def test_an_order_that_changes_under_the_daemon_changes_nothing_else(fake: FakeNvml, daemon: Daemon) -> None:
    all_free(daemon, 4)
    cordoned = fake.gpus[3].uuid
    assert daemon.cli("cordon", "3").returncode == 0
    job = daemon.run_ready(SHOWS, gpus=1)
    (held,) = job.attempts[0].gpus
    fake.unload_driver()
    until("the driver is away", lambda: daemon.get_node().problems)
    fake.reorder(3, 0, 1, 2)
    fake.load_driver()
    until("all are read by their new places", lambda: indices(daemon).get(cordoned) == 0)
    until("two are free", lambda: list(states(daemon).values()).count(FREE) == 2)
    assert (states(daemon)[cordoned], states(daemon)[held]) == (CORDONED, ALLOCATED)
    assert (daemon.get(job.id).state, daemon.get(job.id).attempt) == (RUNNING, 1)
    rest = daemon.run_ready(SHOWS, gpus=2)
    assert set(rest.attempts[0].gpus) == set(uuids(fake, 4)) - {cordoned, held}
    assert daemon.output(rest.id).strip().split(",") == list(rest.attempts[0].gpus)


# Coming and going ------------------------------------------------------------------------------


def test_a_gpu_that_is_added_over_a_restart_is_used_beside_the_others(fake: FakeNvml, daemon: Daemon) -> None:
    all_free(daemon, 4)
    job = daemon.run_ready(SHOWS, gpus=4)
    assert daemon.terminate() == 0
    fake.set_count(5)
    daemon.start()
    added = fake.gpus[4].uuid
    until("it is free", lambda: states(daemon).get(added) == FREE)
    assert list(daemon.run("sleep", "600", gpus=1).attempts[0].gpus) == [added]
    assert daemon.get(job.id).attempts[0].pid == job.attempts[0].pid


def test_a_gpu_that_is_removed_over_a_restart_ends_no_job_and_is_known_again_when_it_is_back(
    fake: FakeNvml, daemon: Daemon
) -> None:
    all_free(daemon, 4)
    removed, others = fake.gpus[3].uuid, uuids(fake, 3)
    for index in range(3):
        assert daemon.cli("cordon", str(index)).returncode == 0
    job = daemon.run_ready(SHOWS, gpus=1)
    assert list(job.attempts[0].gpus) == [removed]
    assert daemon.terminate() == 0
    fake.set_count(3)
    daemon.start()
    until("the others are read", lambda: states(daemon) == dict.fromkeys(others, CORDONED))
    now = daemon.get(job.id)
    assert (now.state, now.attempts[0].pid, list(now.attempts[0].gpus)) == (
        RUNNING,
        job.attempts[0].pid,
        [removed],
    )
    (problem,) = daemon.get_node().problems
    assert problem.startswith(f"GPU {removed} of {job.id} is not in the driver's list")
    assert daemon.metrics("/readyz") == "ready\n"
    # Nobody gets it meanwhile, and its job ends as any other does.
    waits = daemon.submit("true", gpus=1)
    daemon.cancel(job.id)
    assert daemon.wait(job.id).state == CANCELLED
    until("nobody misses it", lambda: not daemon.get_node().problems)
    assert daemon.get(waits.id).state == PENDING
    assert daemon.terminate() == 0
    fake.set_count(4)
    daemon.start()
    assert list(daemon.wait(waits.id).attempts[0].gpus) == [removed]
    until("it is free again", lambda: states(daemon)[removed] == FREE)


def test_marks_of_a_gpu_that_is_away_are_there_when_it_is_back(fake: FakeNvml, daemon: Daemon) -> None:
    all_free(daemon, 4)
    away = fake.gpus[3].uuid
    assert daemon.cli("cordon", "3", "--reason", "to the shop").returncode == 0
    for count, known in ((3, None), (4, CORDONED)):
        assert daemon.terminate() == 0
        fake.set_count(count)
        daemon.start()
        until("the others are free", lambda: list(states(daemon).values()).count(FREE) == 3)
        assert states(daemon).get(away) == known
    assert daemon.get_node().gpus[3].detail == "to the shop"
    assert daemon.submit("sleep", "600", gpus=4).state == PENDING
