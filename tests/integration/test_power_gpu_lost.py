"""A GPU falls off the bus while its power limit is being changed: the real daemon on the fake driver."""

import getpass
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.v1 import node_pb2, power_pb2
from tests.fakes.nvml.fake import FakeNvml, Rule
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import RUNNING, Daemon, logged, until, word

pytestmark = needs_gcc

CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1

[power]
return_jitter_s = 0.0
return_w_per_s = 100000.0
"""
GPUS = 3
W = 1000  # the driver counts in mW
FOUND_W = 650  # as an admin set it before
DRAW_W = 400.0
LIMIT_W = 408  # of that draw, and the margin
# Two boards at 408 W and an empty one fit in the first, which is less than all at 650; then one must go down.
BUDGET_W, SHED_W = 1100.0, 800.0
SLOW_S = 1.0  # a call in which the GPU is lost
FREE = node_pb2.GPU_STATE_FREE
LOST = node_pb2.GPU_STATE_LOST
MET = power_pb2.SHED_STATE_MET
SET, READ_BACK = "nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetPowerManagementLimit"


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    fake = FakeNvml(tmp_path, gpus=GPUS, is_live=True)
    for index in range(GPUS):
        fake.gpus[index].limit_mw = FOUND_W * W
    return fake


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon, logged(daemon):
        daemon.environment = fake.environment()
        daemon.start()
        until("all GPUs are free", lambda: [gpu.state for gpu in daemon.get_node().gpus] == [FREE] * GPUS)
        yield daemon
        fake.clear_rules()
        for index in range(GPUS):
            fake.gpus[index].lost = 0


def limits_w(fake: FakeNvml) -> list[int]:
    return [gpu.limit_mw // W for gpu in fake.gpus[:GPUS]]


def kept_w(daemon: Daemon) -> list[float | None]:
    """By GPU, the limit that the journal says was found."""
    gpus = daemon.get_power().gpus
    return [gpu.limit_w_found if gpu.HasField("limit_w_found") else None for gpu in gpus]


def problems(daemon: Daemon, uuid: str) -> list[str]:
    return [text for text in daemon.get_node().problems if uuid in text and "limit" in text]


def two_jobs(daemon: Daemon, fake: FakeNvml) -> dict[int, str]:
    """Two jobs that draw what they declare, under a budget that all fits in; their ids by GPU."""
    daemon.set_budget(BUDGET_W)
    jobs = [daemon.run("sleep", "600", job_class="training", draw_w=DRAW_W) for _ in range(2)]
    uuids = [gpu.uuid for gpu in fake.gpus[:GPUS]]
    held = {uuids.index(job.attempts[-1].gpus[0]): job.id for job in jobs}
    for index in held:
        fake.load(index, 0.5)
    until("their limits are set", lambda: all(limits_w(fake)[index] == LIMIT_W for index in held))
    return held


def lose_in(fake: FakeNvml, index: int, function: str, rule: Rule, before_w: int) -> None:
    """Lose the GPU while that call of the change is under way."""
    if function == SET:
        until("the limit is being set", lambda: rule.inside)
    else:
        until("it was set and is not read back yet", lambda: limits_w(fake)[index] != before_w)
    fake.gpus[index].lost = 1
    fake.xid(index, 79)
    rule.function = b""


def is_inside(daemon: Daemon, budget_w: float) -> bool:
    power = daemon.get_power()
    return power.HasField("draw_w") and max(power.draw_w, power.committed_w) <= budget_w


@pytest.mark.parametrize("function", [SET, READ_BACK])
def test_a_gpu_that_is_lost_in_mid_shed_costs_neither_the_budget_nor_the_shed_nor_its_own_limit(
    fake: FakeNvml, daemon: Daemon, function: str
) -> None:
    lost, other = held = two_jobs(daemon, fake)
    uuid = fake.gpus[lost].uuid
    rule = fake.rule(function, gpu=lost, delay_s=SLOW_S)

    daemon.offer_event("call", SHED_W, 600.0, emergency=True)
    lose_in(fake, lost, function, rule, LIMIT_W)

    until("it is lost", lambda: daemon.get_node().gpus[lost].state == LOST)
    until("the shed is met", lambda: daemon.grid_event("call").state == MET)
    assert is_inside(daemon, SHED_W)
    moved = until("its job gave way", lambda: daemon.get(held[lost]).attempts[0].HasField("exited_at"))
    assert moved
    assert word(daemon.get(held[lost]).attempts[0].notice.reason) == "GPU_FAILED"
    stays = daemon.get(held[other])
    assert (stays.state, stays.attempt) == (RUNNING, 1)
    # What was found is in the journal from before the change, and the refusal is told.
    assert kept_w(daemon)[lost] == FOUND_W
    assert any("ERROR_GPU_IS_LOST" in text for text in problems(daemon, uuid))

    daemon.cancel_event("call")
    daemon.set_budget(None)
    until("the others have theirs back", lambda: limits_w(fake)[other] == FOUND_W)
    until("that one is owed", lambda: kept_w(daemon) == [FOUND_W if i == lost else None for i in range(GPUS)])
    told = until("it is said", lambda: [text for text in problems(daemon, uuid) if "W back" in text])
    assert f"its power limit of {FOUND_W} W back" in told[0]

    fake.gpus[lost].lost = 0
    until("it has its limit back", lambda: limits_w(fake)[lost] == FOUND_W)
    until("nothing is owed", lambda: kept_w(daemon) == [None] * GPUS)
    until("nothing is left to say", lambda: not problems(daemon, uuid))
    assert daemon.verify().returncode == 0


@pytest.mark.parametrize("function", [SET, READ_BACK])
def test_a_gpu_that_is_lost_in_mid_return_is_owed_its_limit_through_a_crash(
    fake: FakeNvml, daemon: Daemon, function: str
) -> None:
    lost, other = held = two_jobs(daemon, fake)
    rule = fake.rule(function, gpu=lost, delay_s=SLOW_S)

    daemon.set_budget(None)
    lose_in(fake, lost, function, rule, LIMIT_W)

    until("the other has its limit back", lambda: limits_w(fake)[other] == FOUND_W)
    moved = daemon.wait_attempt(held[lost], 2)
    assert list(moved.attempts[-1].gpus) == [fake.gpus[GPUS - lost - other].uuid]
    assert daemon.get(held[other]).attempt == 1
    assert kept_w(daemon)[lost] == FOUND_W
    assert not [body for _, body in daemon.events("LimitsRestored") if fake.gpus[lost].uuid in body["uuids"]]

    fake.gpus[lost].limit_mw = LIMIT_W * W  # whatever became of the change
    daemon.kill()
    fake.gpus[lost].lost = 0
    daemon.start()
    until("it has its limit back", lambda: limits_w(fake)[lost] == FOUND_W)
    until("nothing is owed", lambda: kept_w(daemon) == [None] * GPUS)
