"""What boards and drivers that differ say, through the real pynvml from the fake driver."""

import asyncio
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.effects.gpus import GpuReadings
from scheduler.effects.nvml_events import EVENTS_KEPT_MAX, EventLog
from scheduler.effects.nvml_topology import joined
from scheduler.errors import GpuReadError
from scheduler.model.gpus import EVENTS_BEGIN, GpuEvent, GpuLimit, GpuProcess, GpuSample
from tests.fakes.nvml.fake import FakeNvml
from tests.fakes.nvml.profiles import ABSENT, PROFILES
from tests.fakes.nvml.reading import LIMITS, Reading, eventually, is_whole, needs_gcc, reading

pytestmark = needs_gcc

# What these have not, beside what only Blackwell has.
SMOOTHING = {"is_power_smoothed", "ramp_down_w_per_s"}
FANS = {"fan_speed_ratio"}
LINKS = {"nvlink_tx_bytes", "nvlink_rx_bytes"}
ROWS = {"rows_remapped_corrected", "rows_remapped_uncorrected", "is_remap_pending", "has_remap_failed"}
LACKS = {
    "A100": {"power_w_average"} | SMOOTHING | FANS,
    "H100": SMOOTHING | FANS,
    "H200": SMOOTHING | FANS,
    "B200": {"ramp_down_w_per_s"} | FANS,  # none while it is not smoothed
    "GH200": SMOOTHING | FANS | LINKS,
    "T4": {"power_w_average", "memory_temperature_celsius", "recovery_action"}
    | ROWS
    | SMOOTHING
    | FANS
    | LINKS,
    "RTX4090": {"memory_temperature_celsius", "recovery_action", "ecc_corrected", "ecc_uncorrected"}
    | ROWS
    | SMOOTHING
    | LINKS,
}
WITHOUT_FIELDS = ("nvmlDeviceGetFieldValues",)


async def first_round(fake: FakeNvml) -> GpuReadings:
    async with reading(fake) as read:
        return read.first


def absent(sample: GpuSample) -> set[str]:
    return {field.name for field in dataclasses.fields(sample) if getattr(sample, field.name) is None}


@pytest.mark.parametrize("profile", sorted(PROFILES))
async def test_each_board_lacks_what_it_lacks_and_nothing_else(tmp_path: Path, profile: str) -> None:
    readings = await first_round(FakeNvml(tmp_path, profile=profile))
    assert readings.errors == {}
    assert absent(readings.samples[0]) == LACKS[profile]
    assert readings.identities[0].model == PROFILES[profile].name
    assert readings.identities[0].power_limit_w_min == PROFILES[profile].limits_w[0]


async def test_power_of_a_module_is_read_and_said_to_be_the_modules(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, profile="GH200")
    fake.gpus[0].power_instant_mw, fake.gpus[0].power_average_mw = 612_000, 600_000
    readings = await first_round(fake)
    assert readings.identities[0].power_scope == "module"
    assert readings.identities[0].numa == 1  # the GPU is a node of its own
    assert (readings.samples[0].power_w, readings.samples[0].power_w_average) == (612.0, 600.0)


async def test_a_driver_without_field_values_gives_the_rest(tmp_path: Path) -> None:
    readings = await first_round(FakeNvml(tmp_path, without=WITHOUT_FIELDS))
    (sample,) = readings.samples
    assert readings.errors == {}
    assert (sample.power_w, sample.energy_mj, sample.power_w_average) == (72.0, 1_000_000, None)
    assert readings.identities[0].power_scope == ""


@pytest.mark.parametrize(
    ("override_mw_per_s", "expected_w_per_s"), [(2**32 - 1, 200.0), (50_000, 50.0), (0, 0.0)]
)
async def test_a_smoothed_gpu_says_how_fast_it_may_shed(
    tmp_path: Path, override_mw_per_s: int, expected_w_per_s: float
) -> None:
    fake = FakeNvml(tmp_path, profile="B200")
    fake.gpus[0].smoothing_enabled = 1
    fake.gpus[0].ramp_down_override_mw_per_s = override_mw_per_s
    (sample,) = (await first_round(fake)).samples
    assert (sample.is_power_smoothed, sample.ramp_down_w_per_s) == (True, expected_w_per_s)


# Places ----------------------------------------------------------------------------------------


async def test_gpus_know_their_island_and_their_switch(tmp_path: Path) -> None:
    readings = await first_round(FakeNvml(tmp_path, gpus=6))
    assert [gpu.island for gpu in readings.identities] == [0] * 6
    assert [gpu.switch for gpu in readings.identities] == [0, 0, 2, 2, 4, 4]


async def test_two_bridged_pairs_are_two_islands(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=5, profile="RTX4090")
    for one, other in ((1, 3), (2, 4)):
        for mine, theirs in ((one, other), (other, one)):
            fake.gpus[mine].links[0].remote_bus_id = fake.gpus[theirs].bus_id
    readings = await first_round(fake)
    assert [gpu.island for gpu in readings.identities] == [None, 1, 2, 1, 2]


async def test_a_driver_that_tells_no_distances_leaves_them_unknown(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=3)
    for index in range(3):
        fake.gpus[index].pcie_switch = ABSENT
    assert [gpu.switch for gpu in (await first_round(fake)).identities] == [None] * 3


async def test_a_gpu_that_comes_later_joins_its_neighbours(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    fake.gpus[1].lost = 1
    async with reading(fake) as read:
        assert [(gpu.index, gpu.switch) for gpu in read.first.identities] == [(0, None)]
        fake.gpus[1].lost = 0
        readings = await read.until(is_whole)
        assert [(gpu.index, gpu.switch) for gpu in readings.identities] == [(0, 0), (1, 0)]


def test_what_hangs_together_has_one_name_whatever_the_order() -> None:
    links = {"c": ("s2",), "a": ("s1",), "b": ("s1", "s2"), "x": ("y",), "y": ("x",)}
    names = joined(links)
    assert {names[one] for one in "abc"} == {"a"}
    assert {names[one] for one in "xy"} == {"x"}
    assert joined(dict(reversed(links.items()))) == names


# Limits ----------------------------------------------------------------------------------------


async def test_a_limit_that_is_set_is_read_back_and_lowers_the_draw(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2, is_live=True)
    fake.stop_clock()
    fake.load(1, 1.0)
    async with reading(fake) as read:
        assert await read.gpus.set_power_limit(fake.gpus[1].uuid, 350.0) == GpuLimit(350.0, 350.0)
        fake.advance(1.0)
        readings = await read.until(lambda readings: readings.samples[1].power_w == 350.0)
        one, other = readings.samples
        assert (other.power_limit_w, other.power_limit_w_enforced, other.clock_reasons) == (350.0, 350.0, 4)
        assert (one.power_w, one.power_limit_w) == (71.8, 700.0)
        assert other.power_capped_s == 1.0


async def test_a_gpu_has_one_writer_and_each_reads_back_its_own_limit(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake, dataclasses.replace(LIMITS, set_s=60.0, holders_s=0.3)) as read:
        rule = fake.rule("nvmlDeviceSetPowerManagementLimit", gpu=0, hang=True)
        wanted_w = (300.0, 400.0, 350.0)
        sets = [asyncio.create_task(read.gpus.set_power_limit(fake.gpus[0].uuid, w)) for w in wanted_w]
        await eventually(lambda: rule.inside == 1)
        with pytest.raises(GpuReadError):  # by now the others wait, too
            await read.gpus.holders(fake.gpus[0].uuid)
        assert (rule.inside, rule.calls) == (1, 1)
        rule.hang = 0
        assert [(await one).power_limit_w for one in sets] == list(wanted_w)


async def test_somebody_elses_lower_limit_shows_after_a_set(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].limit_outside_mw = 300_000
    async with reading(fake) as read:
        assert await read.gpus.set_power_limit(fake.gpus[0].uuid, 500.0) == GpuLimit(500.0, 300.0)


@pytest.mark.parametrize(
    ("profile", "is_deaf", "is_privileged", "limit_w", "code"),
    [
        ("H100", False, True, 199.0, "ERROR_INVALID_ARGUMENT"),
        ("H100", False, False, 500.0, "ERROR_NO_PERMISSION"),
        ("H100", True, True, 500.0, "NOT_KEPT"),
    ],
)
async def test_a_limit_that_is_not_taken_is_an_error(
    tmp_path: Path, profile: str, is_deaf: bool, is_privileged: bool, limit_w: float, code: str
) -> None:
    fake = FakeNvml(tmp_path, profile=profile)
    fake.gpus[0].deaf = is_deaf
    fake.set_privileged(is_privileged)
    async with reading(fake) as read:
        with pytest.raises(GpuReadError) as caught:
            await read.gpus.set_power_limit(fake.gpus[0].uuid, limit_w)
        assert caught.value.code == code
        assert is_whole(read.first), "whoever may not set may read"


async def test_a_set_that_hangs_is_an_error_in_bounded_time_and_costs_only_its_gpu(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake, dataclasses.replace(LIMITS, set_s=0.2)) as read:
        rule = fake.rule("nvmlDeviceSetPowerManagementLimit", gpu=0, hang=True)
        with pytest.raises(GpuReadError) as caught:
            await read.gpus.set_power_limit(fake.gpus[0].uuid, 500.0)
        assert caught.value.code == "ERROR_TIMEOUT"
        assert await read.gpus.set_power_limit(fake.gpus[1].uuid, 500.0) == GpuLimit(500.0, 500.0)
        rule.hang = 0
        await read.until(is_whole)


async def test_a_gpu_that_is_lost_while_its_limit_is_set_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    lost, other = fake.gpus[0].uuid, fake.gpus[1].uuid
    async with reading(fake) as read:
        rule = fake.rule("nvmlDeviceSetPowerManagementLimit", gpu=0, hang=True)
        setting = asyncio.create_task(read.gpus.set_power_limit(lost, 400.0))
        await eventually(lambda: rule.inside == 1)
        fake.gpus[0].lost = 1
        rule.hang = 0
        with pytest.raises(GpuReadError) as caught:
            await setting
        assert caught.value.code == "ERROR_GPU_IS_LOST"
        readings = await read.until(lambda readings: readings.errors == {lost: "ERROR_GPU_IS_LOST"})
        assert [sample.uuid for sample in readings.samples] == [other]
        assert await read.gpus.set_power_limit(other, 400.0) == GpuLimit(400.0, 400.0)


# Processes -------------------------------------------------------------------------------------


async def test_a_process_says_how_busy_it_keeps_its_gpu_where_that_is_known(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    gpu = fake.gpus[0]
    gpu.set_processes([(os.getpid(), ABSENT)])
    gpu.set_utilization(0, 0.64)
    async with reading(fake) as read:

        async def only_process() -> GpuProcess:
            (process,) = (await read.gpus.holders(gpu.uuid)).processes
            return process

        first, second = await only_process(), await only_process()
        assert (first.memory_mib, first.utilization_ratio) == (None, 0.64)
        assert second.utilization_ratio is None, "no sample is newer than the one before"
        gpu.set_utilization(0, 0.25)
        assert (await only_process()).utilization_ratio == 0.25


# Events ----------------------------------------------------------------------------------------


async def test_an_xid_is_told_once_with_its_gpu_and_number(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        fake.xid(1, 79)
        readings = await read.until(lambda readings: bool(told(readings)))
        (event,) = told(readings)
        assert (event.uuid, event.kind, event.code) == (fake.gpus[1].uuid, "xid", 79)
        assert event.at_s > read.first.samples[0].at_s
        fake.xid(0, 31)
        later = await read.until(lambda readings: bool(told(readings)))
        assert [(event.uuid, event.code) for event in told(later)] == [(fake.gpus[0].uuid, 31)]


def told(readings: GpuReadings) -> list[GpuEvent]:
    """What the driver told; not from when on it was heard."""
    return [event for event in readings.events if event.kind != EVENTS_BEGIN]


def begins(readings: GpuReadings) -> list[str]:
    """The GPUs that are heard from here on."""
    return [event.uuid for event in readings.events if event.kind == EVENTS_BEGIN]


async def test_a_gpu_that_hangs_does_not_keep_the_events_of_another_back(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=0, hang=True)
        await eventually(lambda: rule.inside == 1)
        fake.xid(1, 48)
        readings = await read.until(lambda readings: bool(told(readings)))
        assert [event.uuid for event in told(readings)] == [fake.gpus[1].uuid]
        rule.hang = 0


async def test_a_gpu_that_hangs_while_it_is_registered_costs_only_itself(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=3)
    rule = fake.rule("nvmlDeviceRegisterEvents", gpu=0, hang=True)
    later = [fake.rule("nvmlDeviceGetName", gpu=index, hang=True) for index in (1, 2)]
    async with reading(fake, dataclasses.replace(LIMITS, first_round_s=0.2)) as read:
        await eventually(lambda: rule.inside == 1)
        for one in later:
            one.hang = 0
        readings = await read.until(lambda readings: len(readings.samples) == 2)
        assert readings.errors == {fake.gpus[0].uuid: "ERROR_TIMEOUT"}
        fake.xid(2, 31)
        readings = await read.until(lambda readings: bool(told(readings)))
        assert [event.uuid for event in told(readings)] == [fake.gpus[2].uuid]
        rule.hang = 0
        await read.until(is_whole)


@pytest.mark.parametrize("code", [15, 999])
async def test_a_wait_that_fails_condemns_no_gpu_and_events_go_on(tmp_path: Path, code: int) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        registered = [fake.rule("nvmlDeviceRegisterEvents", gpu=index) for index in range(2)]
        rule = fake.rule("nvmlEventSetWait_v2", code=code)
        await eventually(lambda: rule.calls > 0)
        rule.code = 0
        await eventually(lambda: all(one.calls > 0 for one in registered))
        await read.until(is_whole)
        fake.xid(0, 13)
        readings = await read.until(lambda readings: bool(told(readings)))
        assert is_whole(readings)


async def heard(read: Reading, is_met: Callable[[list[GpuEvent]], bool]) -> list[GpuEvent]:
    """All events from now on, until they are what is waited for; no round is passed over."""
    events: list[GpuEvent] = []
    while not is_met(events):
        events += (await read.next()).events
    return events


def are_heard_anew(*uuids: str) -> Callable[[list[GpuEvent]], bool]:
    return lambda events: sorted(e.uuid for e in events if e.kind == EVENTS_BEGIN) == sorted(uuids)


def is_told(code: int) -> Callable[[list[GpuEvent]], bool]:
    return lambda events: any(event.code == code for event in events)


async def test_each_time_that_a_gpu_is_heard_anew_is_told(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    both = [fake.gpus[0].uuid, fake.gpus[1].uuid]
    async with reading(fake) as read:
        assert sorted(begins(read.first)) == both
        assert begins(await read.next()) == []
        rule = fake.rule("nvmlEventSetWait_v2", code=999)
        await eventually(lambda: rule.calls > 0)
        rule.code = 0
        await heard(read, are_heard_anew(*both))
        fake.load_driver()
        await heard(read, are_heard_anew(*both))


async def test_a_gpu_that_could_not_be_registered_is_tried_again_and_named_meanwhile(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    rule = fake.rule("nvmlDeviceRegisterEvents", gpu=0, code=999)
    async with reading(fake) as read:
        assert read.first.errors == {fake.gpus[0].uuid: "ERROR_UNKNOWN"}
        assert begins(read.first) == [fake.gpus[1].uuid]
        assert len(read.first.samples) == 2
        rule.code = 0
        await heard(read, lambda events: any(event.uuid == fake.gpus[0].uuid for event in events))
        fake.xid(0, 79)
        await heard(read, is_told(79))


async def test_a_driver_that_gives_no_set_at_first_is_heard_later(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    rule = fake.rule("nvmlEventSetCreate", code=999)
    async with reading(fake) as read:
        assert (is_whole(read.first), begins(read.first)) == (True, [])
        rule.code = 0
        await heard(read, are_heard_anew(fake.gpus[0].uuid))


async def test_what_was_told_before_a_reload_does_not_hide_what_is_told_after_it(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake) as read:
        for code in (13, 31, 43):
            fake.xid(0, code)
            await heard(read, is_told(code))
        fake.load_driver()
        await heard(read, are_heard_anew(fake.gpus[0].uuid))
        fake.xid(0, 62)  # the second event of this driver
        await heard(read, is_told(62))


def test_an_event_is_told_until_it_is_known_to_have_arrived() -> None:
    log = EventLog(lambda: None)
    first = GpuEvent("GPU-a", 1.0, "xid", 79)
    log.put(first)
    assert [(number, event) for number, event, _ in log.after(0)] == [(1, first)]
    log.put(first)
    assert [number for number, _, _ in log.after(0)] == [1, 2]
    assert [number for number, _, _ in log.after(1)] == [2]


def test_events_that_can_not_be_kept_are_at_least_known_to_have_been_there() -> None:
    told: list[int] = []
    log = EventLog(lambda: told.append(1))
    for _ in range(EVENTS_KEPT_MAX):
        log.put(GpuEvent("GPU-a", 1.0, "xid", 13))
    log.put(GpuEvent("GPU-b", 1.0, "xid", 79))
    assert len(told) == 1, "one wake is enough"
    assert len(log.after(0)) == EVENTS_KEPT_MAX
    (number, event, _) = log.after(EVENTS_KEPT_MAX)[0]
    assert (number, event.uuid, event.kind) == (EVENTS_KEPT_MAX + 1, "GPU-b", EVENTS_BEGIN)


def test_that_a_gpu_is_heard_wakes_nobody_and_keeps_nobody_from_being_woken() -> None:
    told: list[int] = []
    log = EventLog(lambda: told.append(1))
    log.put(GpuEvent("GPU-a", 1.0, EVENTS_BEGIN, 0))
    assert told == []
    log.put(GpuEvent("GPU-a", 1.0, "xid", 79))
    assert told == [1]


async def test_a_driver_without_events_is_read_all_the_same(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, without=("nvmlEventSetCreate",))
    assert is_whole(await first_round(fake))


async def test_events_are_heard_again_after_the_driver_was_reloaded(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    registered = fake.rule("nvmlDeviceRegisterEvents")
    async with reading(fake) as read:
        before = registered.calls
        fake.load_driver()
        await eventually(lambda: registered.calls > before)
        await read.until(is_whole)
        fake.xid(0, 62)
        readings = await read.until(lambda readings: bool(told(readings)))
        assert [event.code for event in told(readings)] == [62]
