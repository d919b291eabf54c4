"""MIG: instances as GPUs of their own, through the real pynvml from the fake, and with jobs on them."""

import getpass
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from scheduler.effects.gpus import GpuReadings
from scheduler.errors import GpuReadError
from scheduler.model.gpus import EVENTS_BEGIN, GpuEvent
from scheduler.v1 import node_pb2
from tests.fakes.nvml.fake import GIB, FakeNvml
from tests.fakes.nvml.reading import is_whole, needs_gcc, reading
from tests.harness.daemon import Daemon, until
from tests.harness.fixtures import Make

pytestmark = needs_gcc

UNKNOWN = 999
CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1
"""


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    """A whole A100, and one in three instances of 3, 2 and 1 sevenths."""
    fake = FakeNvml(tmp_path, gpus=2, profile="A100", is_live=True)
    fake.stop_clock()
    fake.gpus[1].partition(3, 2, 1)
    return fake


def instances_of(fake: FakeNvml) -> list[str]:
    return [one.uuid for one in fake.gpus[1].instances if one.uuid]


async def test_instances_are_gpus_of_their_own_beside_whole_ones(fake: FakeNvml) -> None:
    async with reading(fake) as read:
        whole, *parts = read.first.identities
        assert (whole.uuid, whole.parent_uuid, whole.slices) == (fake.gpus[0].uuid, "", None)
        assert [gpu.uuid for gpu in parts] == instances_of(fake)
        assert [(gpu.model, gpu.memory_total_mib, gpu.slices) for gpu in parts] == [
            ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40_960, 3),
            ("NVIDIA A100-SXM4-80GB MIG 2g.20gb", 20_480, 2),
            ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10_240, 1),
        ]
        assert {(gpu.parent_uuid, gpu.index, gpu.switch, gpu.island) for gpu in parts} == {
            (fake.gpus[1].uuid, 1, 0, None)
        }
        assert read.first.errors == {}


async def test_power_of_the_instances_is_their_gpus_and_the_counter_is_its_own(fake: FakeNvml) -> None:
    async with reading(fake) as read:
        fake.load(1, 1.0)
        fake.advance(10.0)
        readings = await read.until(lambda readings: readings.samples[0].energy_mj == 537_000)
        parts = readings.samples[1:]
        assert [sample.power_w for sample in parts] == [200.0, pytest.approx(400 / 3), pytest.approx(400 / 6)]
        assert [sample.energy_mj for sample in parts] == [4_000_000] * 3
        assert [sample.power_limit_w for sample in parts] == [None] * 3
        assert [sample.utilization_ratio for sample in parts] == [None] * 3


async def test_processes_and_memory_are_each_instances_own(fake: FakeNvml) -> None:
    gpu = fake.gpus[1]
    gpu.instances[1].memory_used = 3 * GIB
    gpu.set_processes([(os.getpid(), 2 * GIB)], instance=gpu.instances[1].instance)
    async with reading(fake) as read:
        found = [await read.gpus.holders(uuid) for uuid in instances_of(fake)]
        assert [[process.pid for process in holders.processes] for holders in found] == [
            [],
            [os.getpid()],
            [],
        ]
        assert [holders.memory_used_mib for holders in found] == [12, 3 * 1024, 12]
        assert [sample.memory_used_mib for sample in read.first.samples[1:]] == [12, 3 * 1024, 12]
        for uuid in (gpu.uuid, "MIG-none"):
            with pytest.raises(GpuReadError) as caught:
                await read.gpus.holders(uuid)
            assert caught.value.code == "ERROR_NOT_FOUND"
        with pytest.raises(GpuReadError) as caught:
            await read.gpus.set_power_limit(instances_of(fake)[0], 300.0)
        assert caught.value.code == "ERROR_NOT_SUPPORTED"


async def test_another_layout_is_noticed_and_old_handles_mean_nobody(fake: FakeNvml) -> None:
    before = instances_of(fake)
    async with reading(fake) as read:
        fake.gpus[1].partition(4, 3)
        readings = await read.until(lambda readings: len(readings.identities) == 3)
        assert [gpu.uuid for gpu in readings.identities[1:]] == instances_of(fake)
        with pytest.raises(GpuReadError):
            await read.gpus.holders(before[0])
        fake.gpus[1].partition()
        readings = await read.until(lambda readings: len(readings.identities) == 2)
        assert [gpu.uuid for gpu in readings.identities] == [fake.gpus[0].uuid, fake.gpus[1].uuid]


async def test_a_gpu_that_is_cut_and_has_no_instances_can_not_be_used(fake: FakeNvml) -> None:
    async with reading(fake) as read:
        fake.gpus[1].partition()
        fake.gpus[1].mig_mode = 1
        readings = await read.until(lambda readings: len(readings.identities) == 1)
        assert (readings.identities[0].uuid, readings.errors) == (fake.gpus[0].uuid, {})


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetAttributes_v2", "nvmlDeviceGetMigDeviceHandleByIndex", "nvmlDeviceGetMigMode"]
)
async def test_an_instance_that_can_not_be_looked_up_is_still_there(fake: FakeNvml, function: str) -> None:
    async with reading(fake) as read:
        rule = fake.rule(function, gpu=1, code=UNKNOWN)
        called = rule.calls
        await read.until(lambda _: rule.calls > called)
        readings = await read.next()
        assert readings.identities == read.first.identities
        if function != "nvmlDeviceGetMigMode":  # the count says the same
            assert readings.errors == dict.fromkeys(instances_of(fake), "ERROR_UNKNOWN")
            assert [sample.uuid for sample in readings.samples] == [fake.gpus[0].uuid]
        rule.code = 0
        await read.until(is_whole)


async def test_a_gpu_of_which_nobody_says_whether_it_is_cut_is_not_listed(fake: FakeNvml) -> None:
    rules = [
        fake.rule(function, gpu=1, code=UNKNOWN)
        for function in ("nvmlDeviceGetMigMode", "nvmlDeviceGetMaxMigDeviceCount")
    ]
    async with reading(fake) as read:
        assert [gpu.uuid for gpu in read.first.identities] == [fake.gpus[0].uuid]
        assert read.first.errors == {"index 1": "ERROR_UNKNOWN"}
        for rule in rules:
            rule.code = 0
        await read.until(lambda readings: len(readings.identities) == 4)


async def test_what_happens_to_the_gpu_happens_to_its_instances(fake: FakeNvml) -> None:
    async with reading(fake) as read:
        fake.xid(1, 95)
        readings = await read.until(lambda readings: bool(told(readings)))
        assert [(event.uuid, event.code) for event in told(readings)] == [
            (uuid, 95) for uuid in instances_of(fake)
        ]
        fake.event(1, 0x8, 31, instance=fake.gpus[1].instances[2].instance)
        readings = await read.until(lambda readings: bool(told(readings)))
        assert [(event.uuid, event.code) for event in told(readings)] == [(instances_of(fake)[2], 31)]
        fake.gpus[1].lost = 1
        readings = await read.until(lambda readings: bool(readings.errors))
        assert readings.errors == dict.fromkeys(instances_of(fake), "ERROR_GPU_IS_LOST")
        assert [sample.uuid for sample in readings.samples] == [fake.gpus[0].uuid]


def told(readings: GpuReadings) -> list[GpuEvent]:
    return [event for event in readings.events if event.kind != EVENTS_BEGIN]


# With jobs -------------------------------------------------------------------------------------


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        daemon.start()
        until("all are free", lambda: states(daemon) == [node_pb2.GPU_STATE_FREE] * 4)
        yield daemon


def states(daemon: Daemon) -> list[int]:
    return [gpu.state for gpu in daemon.get_node().gpus]


def uuids(daemon: Daemon) -> list[str]:
    return [gpu.uuid for gpu in daemon.get_node().gpus]


def test_a_job_runs_on_an_instance_and_sees_only_that(fake: FakeNvml, daemon: Daemon) -> None:
    job = daemon.finish("/bin/sh", "-c", "echo $CUDA_VISIBLE_DEVICES", gpus=1, gpu_models=["1g.10gb"])
    assert list(job.attempts[-1].gpus) == [instances_of(fake)[2]]
    assert daemon.output(job.id).strip() == instances_of(fake)[2]


def test_an_instance_says_whose_part_it_is_and_how_large(fake: FakeNvml, daemon: Daemon) -> None:
    whole, *parts = daemon.get_node().gpus
    assert (whole.parent_uuid, whole.HasField("slices")) == ("", False)
    assert {gpu.uuid: (gpu.parent_uuid, gpu.slices) for gpu in parts} == {
        uuid: (fake.gpus[1].uuid, slices) for uuid, slices in zip(instances_of(fake), (3, 2, 1), strict=True)
    }
    lines = {line.split()[1]: line for line in daemon.cli("gpus").stdout.splitlines()[1:]}
    for part in parts:
        count = f"{part.slices} slice{'s' if part.slices > 1 else ''}"
        # The fake's GPUs differ in their last digit only, so that it is named in full.
        assert f"  {count} of {fake.gpus[1].uuid}  " in lines[part.uuid]
    assert "slice" not in lines[whole.uuid]
    page = daemon.metrics()
    for part in parts:
        assert f'wattshift_gpu_slices{{gpu="{part.uuid}"}} {part.slices:.1f}\n' in page
        (info,) = (line for line in page.splitlines() if "gpu_info{" in line and part.uuid in line)
        assert f'parent="{fake.gpus[1].uuid}"' in info
    assert f'wattshift_gpu_slices{{gpu="{whole.uuid}"' not in page


def test_a_layout_that_an_admin_changes_after_a_release_is_the_new_one(
    fake: FakeNvml, daemon: Daemon
) -> None:
    before = instances_of(fake)
    fake.xid(1, 31)
    until("each has counted it", lambda: daemon.metrics().count('kind="xid_31"') == len(before))
    assert daemon.cli("release").returncode == 0
    fake.gpus[1].partition(7)
    assert daemon.cli("undrain").returncode == 0
    until("it is seen", lambda: uuids(daemon) == [fake.gpus[0].uuid, *instances_of(fake)])
    until("both are free", lambda: states(daemon) == [node_pb2.GPU_STATE_FREE] * 2)
    assert not set(before) & set(instances_of(fake))
    assert "GPU_STATE_LOST" not in str(daemon.get_node())
    assert not any(uuid in daemon.metrics() for uuid in before), "a label for each layout has no bound"


@pytest.mark.parametrize("is_left", [False, True])
def test_an_instance_that_a_new_layout_ended_is_gone_when_its_job_is(
    fake: FakeNvml, daemon: Daemon, is_left: bool
) -> None:
    """Its layout is changed while the job runs, or while what it left keeps the instance."""
    job = daemon.run("sleep", "600", gpus=1, gpu_models=["1g.10gb"])
    (uuid,) = job.attempts[-1].gpus
    if is_left:
        fake.gpus[1].instances[2].memory_used = 2 * GIB
        daemon.cancel(job.id)
        until("it is in hand-over", lambda: node_pb2.GPU_STATE_HANDOVER in states(daemon))
        fake.gpus[1].partition(7)
    else:
        fake.gpus[1].partition(7)
        until("it is lost", lambda: node_pb2.GPU_STATE_LOST in states(daemon))
        assert uuid in uuids(daemon)
        daemon.cancel(job.id)
    until("it is gone", lambda: uuids(daemon) == [fake.gpus[0].uuid, *instances_of(fake)])
    until("its job is proved gone", lambda: daemon.get(job.id).attempts[0].HasField("verified_at"))
    assert uuid not in daemon.metrics()


def test_a_job_of_several_gpus_is_refused_where_only_instances_would_do(daemon: Daemon) -> None:
    """One GPU is whole here, three are instances."""
    with pytest.raises(grpc.RpcError) as refused:
        daemon.submit("true", gpus=2)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "this node has 1 whole GPUs that fit, and a job of several gets no MIG instances" in str(
        refused.value.details()
    )


def test_a_job_of_several_gpus_waits_for_whole_ones_and_says_why_instances_will_not_do(
    fake: FakeNvml, make_daemon: Make
) -> None:
    fake.set_count(3)
    daemon = make_daemon(gpus="", config=CONFIG)
    daemon.environment = fake.environment()
    daemon.start()
    until("all are free", lambda: states(daemon) == [node_pb2.GPU_STATE_FREE] * 5)
    holder = daemon.run("sleep", "600", job_class="inference", gpus=1)
    # Placement gave it an instance: it is the whole ones that others may need.
    assert holder.attempts[-1].gpus[0] in instances_of(fake)
    assert daemon.cli("cordon", fake.gpus[0].uuid).returncode == 0
    waits = daemon.submit("true", job_class="inference", gpus=2)
    explained = daemon.cli("explain", waits.id).stdout
    assert "MIG instances, of which a CUDA program sees one" in explained
    assert "ask for 1 GPU instead of 2" in explained
    assert daemon.cli("uncordon", fake.gpus[0].uuid).returncode == 0
    done = daemon.wait(waits.id)
    assert sorted(done.attempts[-1].gpus) == sorted([fake.gpus[0].uuid, fake.gpus[2].uuid])
