"""What one round of readings says, through the real pynvml from the fake driver."""

import dataclasses
import time
from pathlib import Path

import pytest

from scheduler.effects.gpus import GpuReadings
from scheduler.model.gpus import GpuIdentity, GpuSample
from tests.fakes.nvml.fake import ABSENT, GPU_FIGURES, GPUS_MAX, KIB, MIB, OLD_DRIVER, FakeNvml
from tests.fakes.nvml.reading import LIMITS, is_whole, needs_gcc, reading, sample_of

pytestmark = needs_gcc

UNKNOWN = 999
NO_PERMISSION = 4
INVALID_ARGUMENT = 2
FUNCTION_NOT_FOUND = 13


async def first_round(fake: FakeNvml) -> GpuReadings:
    async with reading(fake) as read:
        return read.first


async def only_sample(fake: FakeNvml) -> GpuSample:
    (sample,) = (await first_round(fake)).samples
    return sample


async def test_a_round_holds_all_that_a_gpu_reports(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    gpu = fake.gpus[0]
    gpu.memory_used, gpu.utilization_percent, gpu.energy_mj = 1234 * MIB + 5, 37, 2**53 + 1
    gpu.power_instant_mw, gpu.power_average_mw, gpu.limit_mw = 612_345, 600_000, 650_000
    gpu.limit_enforced_mw, gpu.temperature_celsius, gpu.sm_clock_mhz = 640_000, 71, 1980
    gpu.minor_number, gpu.power_capped_ns, gpu.clock_reasons = 3, 1_500_000_000, 0x4
    gpu.ecc_corrected, gpu.ecc_uncorrected, gpu.recovery_action = 7, 1, 1
    gpu.remapped_corrected, gpu.remapped_uncorrected, gpu.remap_pending = 3, 2, 1
    gpu.memory_utilization_percent, gpu.encoder_percent, gpu.decoder_percent = 21, 11, 12
    gpu.fan_percent, gpu.link_kib = 45, 10
    before_s = time.time()
    readings = await first_round(fake)
    assert before_s <= readings.samples[0].at_s <= time.time()
    assert dataclasses.replace(readings, events=()) == GpuReadings(
        identities=(
            GpuIdentity(
                uuid="GPU-0000fa4e-0000-0000-0000-000000000000",
                index=0,
                model="NVIDIA H100 80GB HBM3",
                memory_total_mib=81559,
                pci_bus_id="00000000:10:00.0",
                island=0,
                numa=None,
                switch=None,  # nobody is there to be compared with
                minor_number=3,
                power_limit_w_min=200.0,
                power_limit_w_max=700.0,
                power_limit_w_default=700.0,
                power_scope="gpu",
                sm_clock_mhz_max=1980,
                temperature_celsius_slowdown=87,
                temperature_celsius_shutdown=92,
                compute_capability="9.0",
                driver_version="570.86.15",
                cuda_version="12.8",
            ),
        ),
        samples=(
            GpuSample(
                uuid="GPU-0000fa4e-0000-0000-0000-000000000000",
                at_s=readings.samples[0].at_s,
                memory_used_mib=1234,
                utilization_ratio=0.37,
                memory_utilization_ratio=0.21,
                encoder_utilization_ratio=0.11,
                decoder_utilization_ratio=0.12,
                power_w=612.345,
                power_w_average=600.0,
                power_limit_w=650.0,
                power_limit_w_enforced=640.0,
                power_capped_s=1.5,
                energy_mj=2**53 + 1,
                temperature_celsius=71.0,
                memory_temperature_celsius=38.0,
                sm_clock_mhz=1980,
                memory_clock_mhz=2619,
                fan_speed_ratio=0.45,
                clock_reasons=0x4,
                ecc_corrected=7,
                ecc_uncorrected=1,
                rows_remapped_corrected=3,
                rows_remapped_uncorrected=2,
                is_remap_pending=True,
                has_remap_failed=False,
                recovery_action=1,
                nvlink_tx_bytes=18 * 10 * KIB,
                nvlink_rx_bytes=18 * 10 * KIB,
            ),
        ),
        errors={},
        driver_version="570.86.15",
    )


async def test_rounds_go_on_and_follow_the_gpu(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake) as read:
        fake.gpus[0].power_instant_mw = 333_000
        later = await read.until(lambda readings: readings.samples[0].power_w == 333.0)
        assert later.samples[0].at_s > read.first.samples[0].at_s


async def test_what_a_gpu_does_not_report_is_absent_and_not_zero(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    for figure in GPU_FIGURES:
        setattr(fake.gpus[0], figure, ABSENT)
    readings = await first_round(fake)
    uuid = fake.gpus[0].uuid
    assert readings.errors == {}
    assert readings.samples == (GpuSample(uuid, readings.samples[0].at_s),)
    assert readings.identities == (
        GpuIdentity(
            uuid,
            index=0,
            model="NVIDIA H100 80GB HBM3",
            memory_total_mib=0,
            pci_bus_id="00000000:10:00.0",
            island=0,
            driver_version="570.86.15",
            cuda_version="12.8",
        ),
    )


@pytest.mark.parametrize("code", [3, 13, 25, 26])
async def test_each_of_the_four_codes_makes_a_field_absent(tmp_path: Path, code: int) -> None:
    fake = FakeNvml(tmp_path)
    fake.rule("nvmlDeviceGetTotalEnergyConsumption", code=code)
    readings = await first_round(fake)
    assert readings.errors == {}
    assert readings.samples[0].energy_mj is None
    assert readings.samples[0].power_w == 71.8


async def test_a_zero_that_is_measured_stays_a_zero(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].utilization_percent = fake.gpus[0].energy_mj = fake.gpus[0].memory_used = 0
    sample = await only_sample(fake)
    assert (sample.utilization_ratio, sample.energy_mj, sample.memory_used_mib) == (0.0, 0, 0)


async def test_an_old_driver_is_read_through_its_older_functions(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, without=OLD_DRIVER)
    sample = await only_sample(fake)
    assert sample.memory_used_mib == 4 + 308  # the older struct counts the driver's reserve
    assert sample.temperature_celsius == 31.0


async def test_a_new_driver_is_read_without_the_deprecated_functions(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, without=("nvmlDeviceGetTemperature", "nvmlDeviceGetMemoryInfo"))
    sample = await only_sample(fake)
    assert (sample.memory_used_mib, sample.temperature_celsius) == (4, 31.0)


@pytest.mark.parametrize("code", [INVALID_ARGUMENT, FUNCTION_NOT_FOUND, UNKNOWN])
async def test_power_is_the_average_where_the_instant_field_fails(tmp_path: Path, code: int) -> None:
    fake = FakeNvml(tmp_path)
    fake.rule("nvmlDeviceGetFieldValues", code=code)
    readings = await first_round(fake)
    assert (readings.samples[0].power_w, readings.errors) == (72.0, {})


async def test_power_is_the_average_where_the_instant_field_says_that_it_is_absent(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].power_instant_mw = ABSENT
    assert (await only_sample(fake)).power_w == 72.0


async def test_the_limit_is_the_enforced_one_where_the_requested_one_is_absent(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].limit_mw, fake.gpus[0].limit_enforced_mw = ABSENT, 500_000
    assert (await only_sample(fake)).power_limit_w == 500.0


async def test_a_field_that_fails_costs_that_field_and_is_reported(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    whole = await only_sample(fake)
    fake.rule("nvmlDeviceGetUtilizationRates", code=UNKNOWN)
    async with reading(fake) as read:
        (sample,) = read.first.samples
        lacks = {"utilization_ratio": None, "memory_utilization_ratio": None}
        assert sample == dataclasses.replace(whole, **lacks, at_s=sample.at_s)
        assert read.first.errors == {sample.uuid: "ERROR_UNKNOWN"}


async def test_a_code_that_pynvml_does_not_know_is_reported_by_its_number(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.rule("nvmlDeviceGetUtilizationRates", code=777)
    assert (await first_round(fake)).errors == {fake.gpus[0].uuid: "ERROR_777"}


async def test_a_failing_detail_of_its_identity_does_not_keep_a_gpu_out(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.rule("nvmlDeviceGetPowerManagementDefaultLimit", code=UNKNOWN)
    fake.rule("nvmlDeviceGetPciInfo_v3", code=UNKNOWN)
    (identity,) = (await first_round(fake)).identities
    assert (identity.power_limit_w_default, identity.pci_bus_id) == (None, "")


@pytest.mark.parametrize(("lost", "code"), [(True, 0), (False, 16)])
async def test_a_lost_gpu_is_named_while_the_others_go_on(tmp_path: Path, lost: bool, code: int) -> None:
    fake = FakeNvml(tmp_path, gpus=3)
    uuids = [fake.gpus[index].uuid for index in range(3)]
    async with reading(fake) as read:
        assert is_whole(read.first)
        fake.gpus[1].lost = lost
        rule = fake.rule("nvmlDeviceGetMemoryInfo_v2", gpu=1, code=code)
        readings = await read.until(lambda readings: bool(readings.errors))
        name = "ERROR_GPU_IS_LOST" if lost else "ERROR_RESET_REQUIRED"
        assert readings.errors == {uuids[1]: name}
        assert [sample.uuid for sample in readings.samples] == [uuids[0], uuids[2]]
        assert readings.identities == read.first.identities
        fake.gpus[1].lost = rule.code = 0
        await read.until(is_whole)


async def test_a_gpu_that_may_not_be_opened_is_named_by_its_index(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    rule = fake.rule("nvmlDeviceGetHandleByIndex_v2", gpu=0, code=NO_PERMISSION)
    async with reading(fake) as read:
        assert read.first.errors == {"index 0": "ERROR_NO_PERMISSION"}
        assert [identity.index for identity in read.first.identities] == [1]
        rule.code = 0
        readings = await read.until(is_whole)
        assert [identity.index for identity in readings.identities] == [0, 1]


async def test_a_node_with_sixteen_gpus_is_read_whole_and_in_order(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=GPUS_MAX)
    readings = await first_round(fake)
    assert is_whole(readings)
    uuids = [fake.gpus[index].uuid for index in range(GPUS_MAX)]
    assert [identity.uuid for identity in readings.identities] == uuids
    assert [identity.index for identity in readings.identities] == list(range(GPUS_MAX))
    assert [sample.uuid for sample in readings.samples] == uuids


async def test_a_gpu_keeps_its_readings_when_its_index_moves_between_starts(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=3)
    for index in range(3):
        fake.gpus[index].power_instant_mw = 100_000 + 1000 * index
    before = await first_round(fake)
    fake.reorder(2, 0, 1)
    after = await first_round(fake)
    power_w = {sample.uuid: sample.power_w for sample in before.samples}
    assert sorted(power_w.values()) == [100.0, 101.0, 102.0]
    assert {sample.uuid: sample.power_w for sample in after.samples} == power_w
    assert [identity.uuid for identity in after.identities] == [
        before.identities[place].uuid for place in (2, 0, 1)
    ]


async def test_gpus_are_read_side_by_side(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=4)
    # None comes back before all are inside: one after the other, the round would never be whole.
    rules = [fake.rule("nvmlDeviceGetUtilizationRates", gpu=index, hang=True) for index in range(4)]
    async with reading(fake, dataclasses.replace(LIMITS, first_round_s=0.01)) as read:
        await read.until(lambda _: [rule.inside for rule in rules] == [1, 1, 1, 1])
        for rule in rules:
            rule.hang = 0
        await read.until(is_whole)


async def test_a_gpu_that_hangs_costs_only_itself_and_nothing_is_stacked_on_it(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=3)
    hung = fake.gpus[1].uuid
    others = [fake.gpus[0].uuid, fake.gpus[2].uuid]
    sampled = [fake.rule("nvmlDeviceGetTotalEnergyConsumption", gpu=index) for index in range(2)]
    async with reading(fake) as read:
        rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=1, hang=True)
        await read.until(lambda readings: readings.errors == {hung: "ERROR_TIMEOUT"})
        before = sampled[1].calls
        for _ in range(20):
            fake.gpus[0].energy_mj += 1
            energy_mj = fake.gpus[0].energy_mj
            fresh = await read.until(
                lambda readings, energy_mj=energy_mj: readings.samples[0].energy_mj == energy_mj
            )
            assert [sample.uuid for sample in fresh.samples] == others
            assert fresh.errors == {hung: "ERROR_TIMEOUT"}
            assert len(fresh.identities) == 3
        assert (rule.inside, rule.calls) == (1, 1)
        other_before = sampled[0].calls
        rule.hang = 0
        await read.until(is_whole)
        assert sample_of(await read.until(is_whole), hung) is not None
        # The one that hung, and one that a round may have begun since: no backlog.
        assert sampled[1].calls - before <= sampled[0].calls - other_before + 2


async def test_a_gpu_that_hangs_while_it_is_opened_costs_only_itself(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    rule = fake.rule("nvmlDeviceGetHandleByIndex_v2", gpu=1, hang=True)
    async with reading(fake, dataclasses.replace(LIMITS, first_round_s=0.2)) as read:
        readings = await read.until(lambda readings: len(readings.samples) == 1)
        assert readings.errors == {"index 1": "ERROR_TIMEOUT"}
        rule.hang = 0
        await read.until(is_whole)
