"""Every call of every GPU fails in every way that NVML has a word for: that GPU alone pays for it.

Each of sixteen GPUs but the last answers the same call with another code. What a GPU then says is what it
says otherwise, or absent, or its error by NVML's name; never a zero, and never its neighbour's.
"""

import asyncio
import dataclasses
import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler.effects import nvml
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.nvml import ABSENT, DEAD
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuSample
from tests.fakes.nvml import build
from tests.fakes.nvml.fake import ABSENT as ABSENT_FIGURE
from tests.fakes.nvml.fake import GPUS_MAX, MIB, OLD_DRIVER, FakeNvml
from tests.fakes.nvml.reading import Reading, eventually, is_whole, needs_gcc, reading, sample_of

pytestmark = needs_gcc

EFFECTS = Path(nvml.__file__).parent
# NVML's codes, and one that no library has yet.
NAMES = {
    1: "ERROR_UNINITIALIZED",
    2: "ERROR_INVALID_ARGUMENT",
    3: "ERROR_NOT_SUPPORTED",
    4: "ERROR_NO_PERMISSION",
    5: "ERROR_ALREADY_INITIALIZED",
    6: "ERROR_NOT_FOUND",
    7: "ERROR_INSUFFICIENT_SIZE",
    8: "ERROR_INSUFFICIENT_POWER",
    9: "ERROR_DRIVER_NOT_LOADED",
    10: "ERROR_TIMEOUT",
    11: "ERROR_IRQ_ISSUE",
    12: "ERROR_LIBRARY_NOT_FOUND",
    13: "ERROR_FUNCTION_NOT_FOUND",
    14: "ERROR_CORRUPTED_INFOROM",
    15: "ERROR_GPU_IS_LOST",
    16: "ERROR_RESET_REQUIRED",
    17: "ERROR_OPERATING_SYSTEM",
    18: "ERROR_LIB_RM_VERSION_MISMATCH",
    19: "ERROR_IN_USE",
    20: "ERROR_MEMORY",
    21: "ERROR_NO_DATA",
    22: "ERROR_VGPU_ECC_NOT_SUPPORTED",
    23: "ERROR_INSUFFICIENT_RESOURCES",
    24: "ERROR_FREQ_NOT_SUPPORTED",
    25: "ERROR_ARGUMENT_VERSION_MISMATCH",
    26: "ERROR_DEPRECATED",
    27: "ERROR_NOT_READY",
    28: "ERROR_GPU_NOT_FOUND",
    29: "ERROR_INVALID_STATE",
    30: "ERROR_RESET_TYPE_NOT_SUPPORTED",
    777: "ERROR_777",
    999: "ERROR_UNKNOWN",
}
# What is called only where a newer function, or a figure, is missing.
OLDER = (
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetGraphicsRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
    "nvmlDeviceGetPowerUsage",
)
# What only a GPU that is cut is asked.
OF_INSTANCES = (
    "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetMigDeviceHandleByIndex",
    "nvmlDeviceGetAttributes_v2",
    "nvmlDeviceGetGpuInstanceId",
)
OF_THE_LIBRARY = (
    "nvmlInitWithFlags",
    "nvmlShutdown",
    "nvmlSystemGetDriverVersion",
    "nvmlSystemGetCudaDriverVersion",
    "nvmlDeviceGetCount_v2",
    "nvmlEventSetCreate",
    "nvmlEventSetFree",
    "nvmlEventSetWait_v2",
)
# Other versions of what is called, which pynvml does not ask for.
NOT_CALLED = {"nvmlDeviceSetPowerManagementLimit_v2", "nvmlInit_v2", "nvmlSystemGetCudaDriverVersion_v2"}
NOT_FOUND = 6
# Only where a set of events is given up.
CALLED_SELDOM = ("nvmlEventSetFree",)
LAST = GPUS_MAX - 1
# What a GPU says by its second-best function.
SECOND_BEST: dict[str, Any] = {"memory_used_mib": 4 + 308, "power_w": 72.0}
# When it was read, what its setter answers, the first of its neighbours that can be read, what is doubted.
OF_THE_MOMENT = ("at_s", "power_limit_refusal", "island", "switch", "doubts")
# None of them a zero, which would hide that one stands for what is not told.
FIGURES = {
    "utilization_percent": 37,
    "memory_utilization_percent": 21,
    "encoder_percent": 11,
    "decoder_percent": 12,
    "fan_percent": 45,
    "power_capped_ns": 1_500_000_000,
    "ecc_corrected": 7,
    "ecc_uncorrected": 1,
    "remapped_corrected": 3,
    "remapped_uncorrected": 2,
    "remap_pending": 1,
    "link_kib": 10,
    "limit_mw": 650_000,
    "limit_default_mw": 650_000,
    "limit_enforced_mw": 650_000,
}


def _called() -> list[str]:
    """Return the library's functions that our code calls by any version of their name."""
    ours = "".join(path.read_text() for path in EFFECTS.glob("nvml*.py"))
    named = {re.sub(r"_v\d$", "", name) for name in re.findall(r'"(nvml[A-Z]\w+)"', ours)}
    theirs = "".join(path.read_text() for path in build.SOURCES)
    there = re.findall(r"^(?:int |LIST\(|GIVE32\()(nvml\w+)", theirs, re.MULTILINE)
    return sorted(name for name in there if re.sub(r"_v\d$", "", name) in named and name not in NOT_CALLED)


def _fake(tmp_path: Path, function: str, *, is_cut: bool = False) -> FakeNvml:
    older = (*OLD_DRIVER, "nvmlDeviceGetCurrentClocksEventReasons")
    fake = FakeNvml(tmp_path, gpus=GPUS_MAX, without=older if function in OLDER else ())
    for gpu in fake.gpus:
        for figure, value in FIGURES.items():
            setattr(gpu, figure, value)
        gpu.set_processes([(os.getpid(), 4 * MIB)])
        if function == "nvmlDeviceGetPowerUsage":
            gpu.power_instant_mw = ABSENT_FIGURE
        if is_cut:
            gpu.partition(3, 4)
    return fake


def _whole_uuid(index: int) -> str:
    return f"GPU-0000fa4e-0000-0000-0000-{index:012x}"


def _is_fresh(before: float, slow: frozenset[str]) -> Callable[[GpuReadings], bool]:
    """The last GPU, whose calls do not fail, was read since; none was only too slow but these."""
    return lambda readings: (
        any(sample.at_s > before for sample in readings.samples if sample.uuid in _uuids_of(readings, LAST))
        and all(name in slow for name, code in readings.errors.items() if code == "ERROR_TIMEOUT")
    )


def _is_as_before(whole: GpuReadings) -> Callable[[GpuReadings], bool]:
    """All is told again that was told first."""
    return lambda readings: (
        is_whole(readings)
        and readings.identities == whole.identities
        and _timeless(readings) == _timeless(whole)
    )


def _timeless(readings: GpuReadings) -> list[GpuSample]:
    return [dataclasses.replace(sample, at_s=0.0) for sample in readings.samples]


def _uuids_of(readings: GpuReadings, index: int) -> list[str]:
    return [identity.uuid for identity in readings.identities if identity.index == index]


def _rounds(count: int) -> Callable[[GpuReadings], bool]:
    """So many rounds have come."""
    left = itertools.count(1)
    return lambda _: next(left) >= count


async def _settled(read: Reading, whole: GpuReadings, batch: dict[int, int]) -> GpuReadings:
    """Return a round in which all has come that will come."""
    times_out = [index for index, code in batch.items() if NAMES[code] == "ERROR_TIMEOUT"]
    slow = {name for index in times_out for name in (*_uuids_of(whole, index), f"index {index}")}
    readings = whole
    for _ in range(2):
        readings = await read.until(_is_fresh(time.time(), frozenset(slow)))
    return readings


def _lacks(found: Any, whole: Any) -> list[str]:
    """Return the fields that are not told; all others are as they were, or the second best."""
    lacking = []
    for field in dataclasses.fields(found):
        now, before = getattr(found, field.name), getattr(whole, field.name)
        if now == before or field.name in OF_THE_MOMENT:
            continue
        if now is None or now == "" or (field.name == "memory_total_mib" and now == 0):
            lacking.append(field.name)
        else:
            assert now == SECOND_BEST[field.name], field.name
    return lacking


def _check(readings: GpuReadings, whole: GpuReadings, index: int, code: int) -> None:
    """See that a GPU whose calls answer with the code says nothing that is not so, and why."""
    uuids = _uuids_of(whole, index)
    for uuid in _uuids_of(readings, index):
        assert uuid in uuids
    told = {readings.errors.get(name, "") for name in (*uuids, f"index {index}")}
    assert told <= {"", NAMES[code], "IMPLAUSIBLE"}, (index, code)
    for uuid in uuids:
        sample, before = sample_of(readings, uuid), sample_of(whole, uuid)
        if sample is None:
            # An instance that is not found is no more: that is no failure.
            assert told != {""} or (uuid != _whole_uuid(index) and code == NOT_FOUND), (index, code)
        else:
            assert NAMES[code] not in DEAD or told == {""}
            _lacks(sample, before)
    for identity in readings.identities:
        if identity.index == index:
            _lacks(identity, next(one for one in whole.identities if one.uuid == identity.uuid))


async def _ask(read: Reading, uuid: str, code: int) -> None:
    """See that questions about the GPU are answered, or refused with the code."""
    for question in (read.gpus.holders(uuid), read.gpus.set_power_limit(uuid, 600.0)):
        (answer,) = await asyncio.gather(question, return_exceptions=True)
        if isinstance(answer, BaseException):
            assert isinstance(answer, GpuReadError), answer
            assert answer.code in (NAMES[code], "ERROR_NOT_FOUND", "ERROR_NOT_SUPPORTED", "NOT_KEPT")


def _cases() -> list[tuple[str, bool]]:
    of_gpus = [name for name in _called() if name not in OF_THE_LIBRARY]
    return [(name, name in OF_INSTANCES) for name in of_gpus] + [
        ("nvmlDeviceGetMigMode", True),
        ("nvmlDeviceGetUUID", True),
        ("nvmlDeviceGetName", True),
        ("nvmlDeviceGetMemoryInfo_v2", True),
    ]


@pytest.mark.parametrize(("function", "is_cut"), _cases())
async def test_a_call_of_a_gpu_that_fails_costs_that_gpu_alone_and_no_more_than_it_must(
    tmp_path: Path, function: str, is_cut: bool
) -> None:
    fake = _fake(tmp_path, function, is_cut=is_cut)
    async with reading(fake) as read:
        assert is_whole(read.first)
        whole = read.first
        codes = list(NAMES)
        for begin in range(0, len(codes), LAST):
            batch = dict(enumerate(codes[begin : begin + LAST]))
            if function == "nvmlDeviceGetMigMode" and is_cut:
                # That a board has no such mode is no failure, and contradicts that it is cut.
                batch = {index: code for index, code in batch.items() if NAMES[code] not in ABSENT}
            rules = [fake.rule(function, index, code) for index, code in batch.items()]
            fake.load_driver()
            readings = await _settled(read, whole, batch)
            for index, code in batch.items():
                _check(readings, whole, index, code)
                await _ask(read, _uuids_of(whole, index)[0], code)
            for uuid in _uuids_of(whole, LAST):
                assert uuid not in readings.errors
                assert _lacks(sample_of(readings, uuid), sample_of(whole, uuid)) == []
                assert is_cut or (await read.gpus.holders(uuid)).processes
            assert any(rule.calls for rule in rules), "nobody calls it"
            fake.clear_rules()
            fake.load_driver()
            await read.until(_is_as_before(whole))


@pytest.mark.parametrize("function", OF_THE_LIBRARY)
async def test_a_call_of_the_library_that_fails_ends_nothing_for_good(tmp_path: Path, function: str) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        assert is_whole(read.first)
        for code in NAMES:
            rule = fake.rule(function, code=code)
            fake.load_driver()
            await eventually(lambda rule=rule: function in CALLED_SELDOM or rule.calls > 0)
            readings = await read.until(_rounds(2))
            # Said to be the driver's, or harmless: no GPU is blamed for it.
            assert set(readings.errors.values()) <= {NAMES[code], "ERROR_UNINITIALIZED", "ERROR_TIMEOUT"}
            fake.clear_rules()
            fake.load_driver()
            await read.until(_is_as_before(read.first))
