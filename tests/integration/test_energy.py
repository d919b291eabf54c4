"""Energy through the real daemon on the fake driver: to the millijoule, whatever happens to the daemon."""

import getpass
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.v1 import usage_service_pb2
from tests.fakes.nvml.fake import FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import Daemon, until

pytestmark = needs_gcc

CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1
"""
SLEEPS = "echo ready; exec sleep 600"
J_PER_WH = 3600
FIRST_J = 5_000_000
STEP_J = 2_000  # less than any board could use since the reading before, whatever the time between


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    fake = FakeNvml(tmp_path, gpus=2)
    for index in range(2):
        fake.gpus[index].energy_mj = FIRST_J * 1000
    return fake


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        daemon.start()
        until("both GPUs are read", lambda: [gpu.energy_j for gpu in daemon.get_node().gpus] == [FIRST_J] * 2)
        yield daemon


def draw(fake: FakeNvml, daemon: Daemon, times: int = 1) -> None:
    """Let both GPUs use energy, and wait until that is read."""
    for _ in range(times):
        for index in range(2):
            fake.gpus[index].energy_mj += STEP_J * 1000
        wanted = [fake.gpus[index].energy_mj / 1000 for index in range(2)]
        until("it is read", lambda: [gpu.energy_j for gpu in daemon.get_node().gpus] == wanted)  # noqa: B023


def used_j(daemon: Daemon, group: str) -> dict[str, float]:
    request = usage_service_pb2.ListUsageRequest(group_by=f"USAGE_GROUP_{group}")
    return {row.key: round(row.energy_wh * J_PER_WH, 3) for row in daemon.usage.ListUsage(request).usage}


def test_jobs_and_idle_add_up_to_the_counters_through_kills_and_restarts(
    fake: FakeNvml, daemon: Daemon
) -> None:
    uuids = [fake.gpus[index].uuid for index in range(2)]
    job = daemon.run_ready(SLEEPS, gpus=1)
    (held,) = job.attempts[-1].gpus
    draw(fake, daemon, 3)
    daemon.kill()
    for index in range(2):  # while no daemon ran
        fake.gpus[index].energy_mj += STEP_J * 1000
    daemon.start()
    draw(fake, daemon, 2)
    daemon.cancel(job.id)
    daemon.wait(job.id)
    draw(fake, daemon, 2)
    until("all of it is booked", lambda: daemon.get(job.id).energy_j > 0)
    assert daemon.terminate() == 0
    daemon.start()
    by_gpu, by_job, by_class = (used_j(daemon, group) for group in ("GPU", "JOB", "CLASS"))
    assert by_gpu == dict.fromkeys(uuids, 8 * STEP_J)
    assert sum(by_job.values()) == sum(by_class.values()) == pytest.approx(2 * 8 * STEP_J)
    ended = daemon.get(job.id)
    assert ended.energy_j == ended.attempts[-1].energy_j == by_job[job.id] == by_class["BATCH"]
    # It held the GPU for the six steps but for what of the first was before it, and of the seventh after it.
    assert 5 * STEP_J < ended.energy_j < 7 * STEP_J
    assert held in by_gpu
    assert f"energy      {ended.energy_j / J_PER_WH:.1f} Wh" in daemon.cli("show", job.id).stdout


def test_energy_survives_once_whatever_is_killed_when(fake: FakeNvml, daemon: Daemon) -> None:
    job = daemon.run_ready(SLEEPS, gpus=2)
    for _ in range(4):
        draw(fake, daemon)
        daemon.restart()
    daemon.cancel(job.id)
    daemon.wait(job.id)
    draw(fake, daemon)
    assert daemon.terminate() == 0
    daemon.start()
    assert sum(used_j(daemon, "CLASS").values()) == pytest.approx(2 * 5 * STEP_J)
    assert daemon.get(job.id).energy_j == used_j(daemon, "JOB")[job.id]


def test_a_reload_of_the_driver_books_nothing_twice_and_nothing_negative(
    fake: FakeNvml, daemon: Daemon
) -> None:
    draw(fake, daemon, 2)
    fake.unload_driver()
    until("it is gone", lambda: daemon.get_node().problems)
    for index in range(2):
        fake.gpus[index].energy_mj = 0
        fake.gpus[index].power_instant_mw = 1000  # next to nothing is drawn by the clock
    fake.load_driver()
    until("it is back", lambda: [gpu.energy_j for gpu in daemon.get_node().gpus] == [0, 0])
    draw(fake, daemon, 2)

    def counted() -> float:
        lines = daemon.metrics().splitlines()
        return sum(
            float(line.split()[1]) for line in lines if line.startswith("wattshift_gpu_energy_joules_total{")
        )

    # All four steps, and what was drawn between the last reading before and the first one after.
    until("it goes on", lambda: 2 * 4 * STEP_J <= counted() < 2 * 4 * STEP_J + 2 * 72 * 60)
    assert "ENERGY_COUNTER_RESET" in daemon.metrics()


def test_instances_have_their_part_of_their_gpus_counter(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2, profile="A100")
    fake.gpus[1].partition(3, 1)
    parts = [one.uuid for one in fake.gpus[1].instances if one.uuid]
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        daemon.start()
        until("all are there", lambda: len(daemon.get_node().gpus) == 3)
        job = daemon.run_ready(SLEEPS, gpus=1, gpu_models=["3g.40gb"])
        fake.gpus[1].energy_mj += 4_000_000

        def metrics() -> dict[str, float]:
            lines = (
                line.split() for line in daemon.metrics().splitlines() if "gpu_energy_joules_total{" in line
            )
            return {name.split('"')[1]: float(value) for name, value in lines}

        # Spread over the readings in between, each part of it is in whole millijoules; the sum is exact.
        until("it is split", lambda: round(sum(metrics().values()), 3) == 4000.0)
        assert [metrics()[uuid] for uuid in parts] == pytest.approx([3000.0, 1000.0], abs=0.1)
        assert not any(gpu.HasField("energy_j") for gpu in daemon.get_node().gpus if gpu.uuid in parts)
        daemon.cancel(job.id)
        daemon.wait(job.id)
        assert daemon.terminate() == 0
        daemon.start()
        booked_j = used_j(daemon, "GPU")
        assert booked_j == pytest.approx({fake.gpus[0].uuid: 0, parts[0]: 3000, parts[1]: 1000}, abs=0.1)
        assert sum(booked_j.values()) == pytest.approx(4000, abs=1e-6)
        assert 0 < daemon.get(job.id).energy_j <= 3000.1


def test_a_module_says_that_its_figures_are_the_modules(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2, profile="GH200")
    fake.become(1, "H100")
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        daemon.start()
        assert [gpu.power_scope for gpu in daemon.get_node().gpus] == ["module", "gpu"]
