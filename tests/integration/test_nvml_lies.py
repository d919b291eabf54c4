"""Libraries that lie: what can't be is reported by its name, and costs no more than itself."""

import dataclasses
import getpass
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.effects.gpus import GpuReadings
from scheduler.effects.nvml_fields import NVLINKS_MAX
from scheduler.effects.nvml_mig import SLOTS_MAX
from scheduler.v1 import node_pb2
from tests.fakes.nvml.fake import MIB, FakeNvml
from tests.fakes.nvml.reading import is_whole, needs_gcc, reading
from tests.harness.daemon import Daemon, until

pytestmark = needs_gcc

ALL_ONES = 2**32 - 1
CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1
"""
SLEEPS = "echo ready; exec sleep 600"


async def first_round(fake: FakeNvml) -> GpuReadings:
    async with reading(fake) as read:
        return read.first


@pytest.mark.parametrize(
    ("figure", "value", "field", "said"),
    [
        ("memory_used", 90_000 * MIB, "memory_used_mib", 90_000),
        ("utilization_percent", 101, "utilization_ratio", 1.01),
        ("memory_utilization_percent", 101, "memory_utilization_ratio", 1.01),
        ("encoder_percent", 200, "encoder_utilization_ratio", 2.0),
        ("decoder_percent", 200, "decoder_utilization_ratio", 2.0),
        ("fan_percent", ALL_ONES, "fan_speed_ratio", ALL_ONES / 100),
        ("power_instant_mw", 0, "power_w", 0.0),
        ("power_instant_mw", ALL_ONES, "power_w", ALL_ONES / 1000),
        ("power_average_mw", ALL_ONES, "power_w_average", ALL_ONES / 1000),
        ("limit_enforced_mw", ALL_ONES, "power_limit_w_enforced", ALL_ONES / 1000),
        ("energy_mj", 2**64 - 3, "energy_mj", 2**64 - 3),
        ("temperature_celsius", ALL_ONES, "temperature_celsius", -1.0),
        ("temperature_celsius", 2**31 - 1, "temperature_celsius", 2.0**31 - 1),
        ("memory_temperature_celsius", ALL_ONES, "memory_temperature_celsius", float(ALL_ONES)),
        ("sm_clock_mhz", ALL_ONES, "sm_clock_mhz", ALL_ONES),
        ("memory_clock_mhz", ALL_ONES, "memory_clock_mhz", ALL_ONES),
        ("ecc_uncorrected", ALL_ONES, "ecc_uncorrected", ALL_ONES),
        ("recovery_action", ALL_ONES, "recovery_action", ALL_ONES),
    ],
)
async def test_a_figure_that_can_not_be_is_left_out_and_named_and_nothing_else_is(
    tmp_path: Path, figure: str, value: int, field: str, said: float
) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    honest = (await first_round(fake)).samples[0]
    setattr(fake.gpus[0], figure, value)
    readings = await first_round(fake)
    liar, other = readings.samples
    expected = dataclasses.replace(honest, at_s=liar.at_s, doubts=f"{field}={said}", **{field: None})
    assert liar == expected
    assert (other.doubts, readings.errors) == ("", {liar.uuid: "IMPLAUSIBLE"})


@pytest.mark.parametrize(
    ("figure", "value", "field", "left"),
    [
        ("memory_total", 2**63, "memory_total_mib", 0),
        ("limit_max_mw", ALL_ONES, "power_limit_w_max", None),
        ("sm_clock_max_mhz", ALL_ONES, "sm_clock_mhz_max", None),
        ("shutdown_celsius", ALL_ONES, "temperature_celsius_shutdown", None),
        ("minor_number", ALL_ONES, "minor_number", None),
    ],
)
async def test_an_identity_that_can_not_be_is_left_out_and_named(
    tmp_path: Path, figure: str, value: int, field: str, left: int | None
) -> None:
    fake = FakeNvml(tmp_path)
    setattr(fake.gpus[0], figure, value)
    readings = await first_round(fake)
    assert getattr(readings.identities[0], field) == left
    assert readings.samples[0].doubts.partition("=")[0] == field
    assert readings.samples[0].power_w == 71.8


async def test_a_gpu_that_claims_links_without_end_is_read_all_the_same(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].links_claimed = ALL_ONES - 1
    asked = fake.rule("nvmlDeviceGetNvLinkState")
    readings = await first_round(fake)
    assert (readings.identities[0].island, readings.errors) == (0, {})
    assert asked.calls == NVLINKS_MAX


async def test_a_gpu_that_claims_instances_without_end_is_read_all_the_same(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].partition(3, 4)
    fake.gpus[0].mig_instances_max = ALL_ONES - 1
    asked = fake.rule("nvmlDeviceGetMigDeviceHandleByIndex")
    readings = await first_round(fake)
    assert [gpu.slices for gpu in readings.identities] == [3, 4]
    assert asked.calls == SLOTS_MAX


async def test_a_lie_that_ends_is_forgotten(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].power_instant_mw = 0
    async with reading(fake) as read:
        assert read.first.samples[0].doubts == "power_w=0.0"
        fake.gpus[0].power_instant_mw = 300_000
        readings = await read.until(is_whole)
        assert (readings.samples[0].doubts, readings.samples[0].power_w) == ("", 300.0)


async def test_an_instance_that_uses_more_memory_than_it_has_costs_only_itself(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, profile="A100")
    fake.gpus[0].partition(3, 4)
    fake.gpus[0].instances[0].memory_used = 2**60
    readings = await first_round(fake)
    liar, other = readings.samples
    assert (liar.memory_used_mib, other.memory_used_mib) == (None, 12)
    assert readings.errors == {liar.uuid: "IMPLAUSIBLE"}


async def test_a_lie_about_memory_is_no_baseline_for_hand_overs(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].memory_used = 90_000 * MIB
    async with reading(fake) as read:
        assert (await read.gpus.holders(fake.gpus[0].uuid)).memory_used_mib is None
        fake.gpus[0].memory_used = 4 * MIB
        assert (await read.gpus.holders(fake.gpus[0].uuid)).memory_used_mib == 4


# Names -----------------------------------------------------------------------------------------


async def test_a_uuid_that_comes_twice_is_one_gpu_and_an_error(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=3)
    fake.gpus[2].uuid_bytes = fake.gpus[0].uuid.encode()
    readings = await first_round(fake)
    uuids = [fake.gpus[0].uuid, fake.gpus[1].uuid]
    assert [gpu.uuid for gpu in readings.identities] == [sample.uuid for sample in readings.samples] == uuids
    assert readings.errors == {"index 2": "UUID_TWICE"}


@pytest.mark.parametrize("uuid", [b"", b"GPU-1,GPU-2", b"GPU 1", b"\x1b[2J", b"GPU-\xc3\xa4"])
async def test_a_uuid_that_no_program_could_be_given_keeps_its_gpu_out(tmp_path: Path, uuid: bytes) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    fake.gpus[0].uuid_bytes = uuid
    readings = await first_round(fake)
    assert [gpu.index for gpu in readings.identities] == [1]
    assert readings.errors == {"index 0": "IMPLAUSIBLE"}


async def test_a_name_that_would_steer_a_terminal_is_made_harmless(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].name = b"\x1b[2JNVIDIA H100" + b"x" * 80
    readings = await first_round(fake)
    assert readings.identities[0].model == "?[2JNVIDIA H100" + "x" * 80


@pytest.mark.parametrize("name", [b"N" * 200, b"NVIDIA \xff\xfe", b""])
async def test_a_name_that_can_not_be_read_costs_the_name(tmp_path: Path, name: bytes) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].name = name
    readings = await first_round(fake)
    assert readings.identities[0].model == ""
    assert readings.samples[0].doubts == "model="
    assert readings.errors == {fake.gpus[0].uuid: "IMPLAUSIBLE"}


# How many GPUs there are -----------------------------------------------------------------------


async def test_a_gpu_that_comes_or_goes_while_we_look_is_noticed(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=3)
    async with reading(fake) as read:
        first, second, third = (fake.gpus[index].uuid for index in range(3))
        # Its place is taken by the one behind it.
        fake.reorder(0, 2)
        fake.set_count(2)
        readings = await read.until(lambda readings: len(readings.identities) == 2)
        assert [gpu.uuid for gpu in readings.identities] == [first, third]
        fake.reorder(0, 1)
        fake.gpus[2].uuid_bytes = second.encode()
        fake.set_count(3)
        readings = await read.until(lambda readings: is_whole(readings) and len(readings.identities) == 3)
        assert [gpu.uuid for gpu in readings.identities] == [first, third, second]


async def test_a_count_that_comes_and_goes_opens_nothing_anew(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    counted = fake.rule("nvmlDeviceGetCount_v2")
    opened = fake.rule("nvmlDeviceGetHandleByIndex_v2")
    async with reading(fake) as read:
        before = (opened.calls, counted.calls)
        for turn in range(6):
            fake.set_count(1 + turn % 2)
            seen = counted.calls
            await read.until(lambda _, seen=seen: counted.calls > seen)  # type: ignore[misc]
        fake.set_count(2)
        await read.until(is_whole)
        assert opened.calls == before[0]
        assert counted.calls > before[1]


async def test_an_absurd_count_is_as_many_gpus_as_can_be_opened(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    fake.set_count(ALL_ONES)
    readings = await first_round(fake)
    assert {gpu.uuid for gpu in readings.identities} >= {fake.gpus[0].uuid, fake.gpus[1].uuid}
    assert len(readings.identities) + len(readings.errors) == 64


# With the real daemon --------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, gpus=3)


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        yield daemon


def gpu_of(daemon: Daemon, uuid: str) -> node_pb2.Gpu:
    return next(gpu for gpu in daemon.get_node().gpus if gpu.uuid == uuid)


def test_lies_are_shown_and_logged_once_and_jobs_run_all_the_same(fake: FakeNvml, daemon: Daemon) -> None:
    liar, honest = fake.gpus[0], fake.gpus[1]
    fake.gpus[2].uuid_bytes = liar.uuid.encode()
    liar.name = b"N" * 200
    liar.sm_clock_mhz = liar.temperature_celsius = ALL_ONES
    liar.power_instant_mw = 0
    liar.memory_used = 2**62
    daemon.start()
    held = {daemon.run_ready(SLEEPS, gpus=1).attempts[-1].gpus[0] for _ in range(2)}
    assert held == {liar.uuid, honest.uuid}
    gpu = gpu_of(daemon, liar.uuid)
    (told,) = gpu.telemetry_problems
    assert told == (
        "IMPLAUSIBLE: memory_used_mib=4398046511104, model=, power_w=0.0, sm_clock_mhz=4294967295, "
        "temperature_celsius=-1.0"
    )
    for field in ("power_w", "sm_clock_mhz", "temperature_celsius", "memory_used_mib"):
        assert not gpu.HasField(field)
        assert gpu_of(daemon, honest.uuid).HasField(field)
    assert gpu.HasField("energy_j")
    assert list(gpu_of(daemon, honest.uuid).telemetry_problems) == []
    (problem,) = daemon.get_node().problems
    assert problem == "GPU at index 2 is not used: UUID_TWICE"
    shown = daemon.cli("gpus").stdout
    assert "IMPLAUSIBLE: memory_used_mib=4398046511104" in shown
    until("it is counted", lambda: 'telemetry_errors_total{code="UUID_TWICE"}' in daemon.metrics())
    assert 'telemetry_errors_total{code="IMPLAUSIBLE"}' in daemon.metrics()
    for name in ("wattshift_gpu_power_watts", "wattshift_gpu_sm_clock_hertz"):
        assert f'{name}{{gpu="{liar.uuid}"' not in daemon.metrics()
    log = daemon.log()
    assert (log.count("UUID_TWICE"), log.count("IMPLAUSIBLE")) == (1, 1)
    liar.sm_clock_mhz = liar.temperature_celsius = 30
    liar.power_instant_mw, liar.memory_used = 300_000, MIB
    until(
        "it is well again but for its name",
        lambda: list(gpu_of(daemon, liar.uuid).telemetry_problems) == ["IMPLAUSIBLE: model="],
    )


def test_a_counter_that_goes_backwards_is_shown_and_books_nothing_negative(
    fake: FakeNvml, daemon: Daemon
) -> None:
    liar = fake.gpus[0]
    liar.energy_mj = 10**12
    daemon.start()
    until("it is read", lambda: gpu_of(daemon, liar.uuid).energy_j == 10**9)
    liar.energy_mj = 10**12 - 10**9
    until("it is seen", lambda: list(gpu_of(daemon, liar.uuid).telemetry_problems))
    assert list(gpu_of(daemon, liar.uuid).telemetry_problems) == ["ENERGY_COUNTER_BACKWARDS"]
    assert list(gpu_of(daemon, fake.gpus[1].uuid).telemetry_problems) == []
    until("it is counted", lambda: "ENERGY_COUNTER_BACKWARDS" in daemon.metrics())
    liar.energy_mj = 10**12 + 1_000_000
    until("it is well again", lambda: not gpu_of(daemon, liar.uuid).telemetry_problems)
    assert f'wattshift_gpu_energy_joules_total{{gpu="{liar.uuid}"}} 1000.0' in daemon.metrics()
