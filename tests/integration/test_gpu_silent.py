"""A real daemon on the fake driver: GPUs whose calls do not come back are given to nobody until they do."""

import getpass
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.v1 import job_service_pb2, node_pb2
from tests.fakes.nvml.fake import GIB, FakeNvml, Rule
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import PENDING, RUNNING, Daemon, logged, reason_of, until

pytestmark = needs_gcc

# How long a hand-over is waited for, and how often is looked by routine: neither within a test that does not
# say so, so that what is seen is seen by the proof.
PATIENT_S, LOOKS_S = 600.0, 600.0
FREE = node_pb2.GPU_STATE_FREE
ALLOCATED = node_pb2.GPU_STATE_ALLOCATED
HANDOVER = node_pb2.GPU_STATE_HANDOVER
FOREIGN = node_pb2.GPU_STATE_FOREIGN
QUARANTINED = node_pb2.GPU_STATE_QUARANTINED
WHY = "it does not answer: ERROR_TIMEOUT"


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, gpus=2)


def config(handover_timeout_s: float, processes_period_s: float) -> str:
    return f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1
processes_period_s = {processes_period_s}

[policy]
handover_timeout_s = {handover_timeout_s}
"""


@pytest.fixture
def daemon(fake: FakeNvml, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon with all GPUs free; a test may give other times."""
    text = config(*getattr(request, "param", (PATIENT_S, LOOKS_S)))
    with Daemon(gpus="", config=text) as daemon, logged(daemon):
        daemon.environment = fake.environment()
        daemon.start()
        until("all GPUs are free", lambda: set(states(daemon)) == {FREE})
        yield daemon
        fake.clear_rules()


def states(daemon: Daemon) -> list[int]:
    return [gpu.state for gpu in daemon.get_node().gpus]


def hang(fake: FakeNvml, daemon: Daemon, index: int = 0) -> Rule:
    """Let a call to the GPU not come back, and wait until that is noticed."""
    rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=index, hang=True)
    until("it is silent", lambda: daemon.get_node().gpus[index].detail == WHY)
    return rule


def explained(daemon: Daemon, job_id: str) -> list[str]:
    answer = daemon.jobs.ExplainJob(job_service_pb2.ExplainJobRequest(job_id=job_id))
    return [obstacle.detail for obstacle in answer.obstacles]


def test_a_free_gpu_that_hangs_is_given_to_nobody_until_it_is_proved_free(
    fake: FakeNvml, daemon: Daemon
) -> None:
    rule = hang(fake, daemon)
    assert states(daemon) == [HANDOVER, FREE]
    first = daemon.run("sleep", "600", gpus=1)
    assert list(first.attempts[-1].gpus) == [fake.gpus[1].uuid]
    second = daemon.submit("sleep", "600", gpus=1)
    assert daemon.get(second.id).state == PENDING
    assert f"GPU 0 is handover ({WHY})" in explained(daemon, second.id)
    rule.hang = 0
    assert list(daemon.wait(second.id, RUNNING).attempts[-1].gpus) == [fake.gpus[0].uuid]


def test_who_took_a_gpu_while_it_hung_is_seen_before_it_is_given_to_anybody(
    fake: FakeNvml, daemon: Daemon
) -> None:
    rule = hang(fake, daemon)
    waits = daemon.submit("sleep", "600", gpus=2)
    fake.gpus[0].set_processes([(os.getpid(), GIB)])
    rule.hang = 0
    until("the stranger is seen", lambda: states(daemon) == [FOREIGN, FREE])
    assert daemon.get(waits.id).state == PENDING


def test_nobody_waits_for_a_gpu_that_hangs_where_another_can_be_had(fake: FakeNvml, daemon: Daemon) -> None:
    miner = daemon.run("sleep", "600", job_class="mining", gpus=1, grace_s=0.1)
    held = [gpu.uuid for gpu in fake.gpus[:2]].index(miner.attempts[-1].gpus[0])
    hang(fake, daemon, 1 - held)
    job = daemon.run("sleep", "600", job_class="inference", gpus=1)
    assert list(job.attempts[-1].gpus) == list(miner.attempts[-1].gpus)


@pytest.mark.parametrize("daemon", [(1.0, 0.2)], indirect=True)
def test_a_gpu_that_hangs_for_long_is_quarantined_and_comes_back_by_itself(
    fake: FakeNvml, daemon: Daemon
) -> None:
    rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=0, hang=True)
    until("it is quarantined", lambda: states(daemon)[0] == QUARANTINED)
    gpu = daemon.get_node().gpus[0]
    assert (reason_of(gpu), gpu.detail) == ("HANDOVER_TIMED_OUT", "it can't be read: ERROR_TIMEOUT")
    rule.hang = 0
    until("it is back", lambda: states(daemon) == [FREE, FREE])


def test_a_job_on_a_gpu_that_hangs_runs_on_and_nobody_joins_it(fake: FakeNvml, daemon: Daemon) -> None:
    share = {"gpus": 1, "gpu_share_milli": 300}
    first = daemon.run("sleep", "600", **share)
    held = [gpu.uuid for gpu in fake.gpus[:2]].index(first.attempts[-1].gpus[0])
    rule = hang(fake, daemon, held)
    assert states(daemon)[held] == ALLOCATED
    beside = daemon.run("sleep", "600", **share)
    assert list(beside.attempts[-1].gpus) == [fake.gpus[1 - held].uuid]
    assert daemon.get(first.id).attempt == 1
    whole = daemon.submit("true", gpus=1)
    assert f"GPU {held} is allocated ({WHY})" in explained(daemon, whole.id)
    rule.hang = 0
    until("it answers", lambda: not daemon.get_node().gpus[held].detail)
    more = daemon.run("sleep", "600", gpus=1, gpu_share_milli=700)
    assert daemon.get(more.id).state == RUNNING


def test_instances_of_a_gpu_that_hangs_are_given_to_nobody(fake: FakeNvml, daemon: Daemon) -> None:
    fake.gpus[0].partition(3, 4)
    until("the instances are free", lambda: states(daemon) == [FREE] * 3)
    rule = hang(fake, daemon)
    until("all of them are silent", lambda: states(daemon) == [HANDOVER, HANDOVER, FREE])
    for _ in range(2):
        daemon.submit("sleep", "600", gpus=1)
    until("one runs", lambda: len(daemon.running()) == 1)
    assert list(daemon.running()[0].attempts[-1].gpus) == [fake.gpus[1].uuid]
    rule.hang = 0
    until("both run", lambda: len(daemon.running()) == 2)
