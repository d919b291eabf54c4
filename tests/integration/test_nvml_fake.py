"""The fake driver itself, through the unmodified pynvml: what the other NVML tests rest on."""

import os
import time
from pathlib import Path

import pytest

from tests.fakes.nvml import command
from tests.fakes.nvml.fake import EVENT_MIG, EVENT_XID, GIB, FakeNvml
from tests.fakes.nvml.profiles import ABSENT, PROFILES
from tests.fakes.nvml.reading import needs_gcc
from tests.fakes.nvml.session import NvmlFailure, Session

pytestmark = needs_gcc

INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, TIMEOUT, GPU_IS_LOST = 2, 3, 4, 6, 10, 15
FIELD_POWER_CAPPED, FIELD_AVERAGE, FIELD_INSTANT = 74, 185, 186
SCOPE_GPU, SCOPE_MODULE = 0, 1


def field(session: Session, handle: str, number: int, scope: int = SCOPE_GPU) -> int | None:
    value = session.call("nvmlDeviceGetFieldValues", handle, [[number, scope]])[0]
    return None if value["nvmlReturn"] else value["value"]["ullVal"]


def fails_with(code: int, session: Session, function: str, *arguments: object) -> bool:
    with pytest.raises(NvmlFailure) as caught:
        session.call(function, *arguments)
    return caught.value.code == code


@pytest.fixture
def live(tmp_path: Path) -> FakeNvml:
    fake = FakeNvml(tmp_path, gpus=2, is_live=True)
    fake.stop_clock()
    return fake


def test_draw_follows_the_load_and_energy_is_its_integral(live: FakeNvml) -> None:
    live.load(0, 1.0)
    live.advance(10.0)
    live.load(0, 0.5)
    live.advance(4.0)
    with Session(live.environment()) as session:
        gpu, other = session.gpu(0), session.gpu(1)
        half_w = 71.8 + (700 - 71.8) / 2
        assert field(session, gpu, FIELD_INSTANT) == round(half_w * 1000)
        assert session.call("nvmlDeviceGetTotalEnergyConsumption", gpu) == round(
            1000 * (700 * 10 + half_w * 4)
        )
        assert session.call("nvmlDeviceGetTotalEnergyConsumption", other) == round(1000 * 71.8 * 14)
        assert session.call("nvmlDeviceGetUtilizationRates", gpu) == {"gpu": 50, "memory": 0}


def test_energy_stays_exact_when_more_changes_than_are_kept(live: FakeNvml) -> None:
    for _ in range(100):
        live.load(0, 1.0)
        live.advance(0.25)
        live.load(0, 0.0)
        live.advance(0.75)
    with Session(live.environment()) as session:
        energy_mj = session.call("nvmlDeviceGetTotalEnergyConsumption", session.gpu(0))
    assert energy_mj == round(1000 * 100 * (700 * 0.25 + 71.8 * 0.75))


def test_a_limit_takes_from_the_draw_and_says_that_it_binds(live: FakeNvml) -> None:
    live.load(0, 1.0)
    live.advance(2.0)
    with Session(live.environment()) as session:
        gpu = session.gpu(0)
        fast = session.call("nvmlDeviceGetClockInfo", gpu, 1)
        session.call("nvmlDeviceSetPowerManagementLimit", gpu, 300_000)
        live.advance(3.0)
        assert field(session, gpu, FIELD_INSTANT) == 300_000
        assert field(session, gpu, FIELD_POWER_CAPPED) == 3 * 10**9
        assert session.call("nvmlDeviceGetCurrentClocksEventReasons", gpu) == 0x4
        assert session.call("nvmlDeviceGetClockInfo", gpu, 1) < fast
        assert session.call("nvmlDeviceGetTotalEnergyConsumption", gpu) == 1000 * (700 * 2 + 300 * 3)


def test_somebody_elses_limit_binds_too_and_shows_as_the_enforced_one(live: FakeNvml) -> None:
    live.gpus[0].limit_outside_mw = 250_000
    live.load(0, 1.0)
    live.advance(1.0)
    with Session(live.environment()) as session:
        gpu = session.gpu(0)
        assert session.call("nvmlDeviceGetPowerManagementLimit", gpu) == 700_000
        assert session.call("nvmlDeviceGetEnforcedPowerLimit", gpu) == 250_000
        assert field(session, gpu, FIELD_INSTANT) == 250_000


def test_a_locked_clock_lowers_the_draw_below_the_limit(live: FakeNvml) -> None:
    live.load(0, 1.0)
    with Session(live.environment()) as session:
        gpu = session.gpu(0)
        session.call("nvmlDeviceSetGpuLockedClocks", gpu, 990, 990)
        live.advance(1.0)
        locked_mw = field(session, gpu, FIELD_INSTANT)
        assert locked_mw == round(71_800 + (700_000 - 71_800) / 4)
        assert session.call("nvmlDeviceGetClockInfo", gpu, 1) == 990
        session.call("nvmlDeviceResetGpuLockedClocks", gpu)
        live.advance(1.0)
        assert field(session, gpu, FIELD_INSTANT) == 700_000


def test_the_average_lags_the_instant_and_both_are_as_old_as_the_sensor(live: FakeNvml) -> None:
    live.load(0, 1.0)
    with Session(live.environment()) as session:
        gpu = session.gpu(0)
        live.advance(0.09)
        assert field(session, gpu, FIELD_INSTANT) == 71_800  # no new value yet
        live.advance(0.41)
        assert field(session, gpu, FIELD_INSTANT) == 700_000
        assert field(session, gpu, FIELD_AVERAGE) == (71_800 + 700_000) // 2
        assert session.call("nvmlDeviceGetPowerUsage", gpu) == (71_800 + 700_000) // 2


def test_a_sensor_that_looks_a_quarter_of_the_time_misses_what_happens_between(live: FakeNvml) -> None:
    for _ in range(3):
        live.load(0, 1.0)
        live.advance(0.05)
        live.load(0, 0.0)
        live.advance(0.05)
    with Session(live.environment()) as session:
        assert field(session, session.gpu(0), FIELD_INSTANT) == 71_800


def test_setters_check_range_permission_and_version(live: FakeNvml) -> None:
    with Session(live.environment()) as session:
        gpu = session.gpu(0)
        for out_of_range in (199_000, 701_000):
            assert fails_with(
                INVALID_ARGUMENT, session, "nvmlDeviceSetPowerManagementLimit", gpu, out_of_range
            )
        # pynvml's second version of the call never looks at the code that comes back.
        assert session.call("nvmlDeviceSetPowerManagementLimit_v2", gpu, SCOPE_GPU, 100_000) == 0
        assert session.call("nvmlDeviceGetPowerManagementLimit", gpu) == 700_000
        session.call("nvmlDeviceSetPowerManagementLimit_v2", gpu, SCOPE_GPU, 400_000, 1 << 24)
        assert session.call("nvmlDeviceGetPowerManagementLimit", gpu) == 700_000
        session.call("nvmlDeviceSetPowerManagementLimit_v2", gpu, SCOPE_GPU, 400_000)
        assert session.call("nvmlDeviceGetPowerManagementLimit", gpu) == 400_000
        live.set_privileged(False)
        assert fails_with(NO_PERMISSION, session, "nvmlDeviceSetPowerManagementLimit", gpu, 500_000)
        assert fails_with(NO_PERMISSION, session, "nvmlDeviceSetGpuLockedClocks", gpu, 990, 990)


def test_a_driver_that_is_loaded_anew_forgets_limits_and_counters(live: FakeNvml) -> None:
    live.load(0, 1.0)
    with Session(live.environment()) as session:
        session.call("nvmlDeviceSetPowerManagementLimit", session.gpu(0), 300_000)
    live.advance(5.0)
    live.load_driver()
    with Session(live.environment()) as session:
        gpu = session.gpu(0)
        assert session.call("nvmlDeviceGetTotalEnergyConsumption", gpu) == 0
        assert session.call("nvmlDeviceGetPowerManagementLimit", gpu) == 700_000


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_each_profile_answers_as_its_board(tmp_path: Path, profile: str) -> None:
    board = PROFILES[profile]
    with Session(FakeNvml(tmp_path, profile=profile).environment()) as session:
        gpu = session.gpu(0)
        assert session.call("nvmlDeviceGetName", gpu) == board.name
        low, default, high = (watts * 1000 for watts in board.limits_w)
        assert session.call("nvmlDeviceGetPowerManagementLimitConstraints", gpu) == [low, high]
        assert session.call("nvmlDeviceGetPowerManagementDefaultLimit", gpu) == default
        scope = board.figures()["power_scope"]
        for figure, number in (("power_instant_mw", FIELD_INSTANT), ("power_average_mw", FIELD_AVERAGE)):
            expected = board.figures()[figure]
            assert field(session, gpu, number, scope) == (None if expected == ABSENT else expected)
            assert field(session, gpu, number, 1 - scope) is None
        if board.figures()["remapped_corrected"] == ABSENT:
            assert fails_with(NOT_SUPPORTED, session, "nvmlDeviceGetRemappedRows", gpu)
        else:
            assert session.call("nvmlDeviceGetRemappedRows", gpu) == [0, 0, 0, 0]


def test_instances_are_found_and_have_no_power_of_their_own(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, profile="A100")
    fake.gpus[0].partition(3, 2, 1)
    fake.gpus[0].set_processes([(os.getpid(), GIB)], instance=2)
    with Session(fake.environment()) as session:
        gpu = session.gpu(0)
        assert session.call("nvmlDeviceGetMigMode", gpu) == [1, 1]
        assert session.call("nvmlDeviceGetMaxMigDeviceCount", gpu) == 7
        ones = [session.call("nvmlDeviceGetMigDeviceHandleByIndex", gpu, place) for place in range(3)]
        assert fails_with(NOT_FOUND, session, "nvmlDeviceGetMigDeviceHandleByIndex", gpu, 3)
        names = [session.call("nvmlDeviceGetName", one) for one in ones]
        assert names == [f"NVIDIA A100-SXM4-80GB MIG {size}" for size in ("3g.40gb", "2g.20gb", "1g.10gb")]
        assert [session.call("nvmlDeviceGetAttributes", one)["memorySizeMB"] for one in ones] == [
            40960,
            20480,
            10240,
        ]
        listed = [session.call("nvmlDeviceGetComputeRunningProcesses", one) for one in ones]
        assert [[process["pid"] for process in processes] for processes in listed] == [[], [os.getpid()], []]
        assert fails_with(NOT_SUPPORTED, session, "nvmlDeviceGetPowerUsage", ones[0])
        assert fails_with(NOT_SUPPORTED, session, "nvmlDeviceGetUtilizationRates", gpu)
        before = session.call("nvmlDeviceGetUUID", ones[0])
        fake.gpus[0].partition(7)
        assert session.call("nvmlDeviceGetUUID", ones[0]) != before  # an old handle, another instance
        assert fails_with(NOT_FOUND, session, "nvmlDeviceGetUUID", ones[1])


def test_events_come_once_to_whoever_asked_for_them_before(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    with Session(fake.environment()) as session:
        fake.xid(1, 31)
        listening = session.call("nvmlEventSetCreate")
        for index in range(2):
            session.call("nvmlDeviceRegisterEvents", session.gpu(index), EVENT_XID, listening)
        assert fails_with(TIMEOUT, session, "nvmlEventSetWait_v2", listening, 1)
        fake.xid(1, 79)
        fake.event(0, EVENT_MIG)
        event = session.call("nvmlEventSetWait_v2", listening, 1000)
        assert (event["eventType"], event["eventData"]) == (EVENT_XID, 79)
        assert session.call("nvmlDeviceGetIndex", event["device"]) == 1
        assert fails_with(TIMEOUT, session, "nvmlEventSetWait_v2", listening, 1)
        assert fails_with(NOT_SUPPORTED, session, "nvmlDeviceRegisterEvents", session.gpu(0), 0x80, listening)


def test_one_lost_gpu_spoils_the_search_by_uuid_and_nothing_else(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    fake.gpus[0].lost = 1
    with Session(fake.environment()) as session:
        uuid, bus_id = fake.gpus[1].uuid, fake.gpus[1].bus_id.decode()
        assert fails_with(GPU_IS_LOST, session, "nvmlDeviceGetHandleByUUID", uuid)
        assert session.call("nvmlDeviceGetUUID", session.gpu(1)) == uuid
        by_bus = session.call("nvmlDeviceGetHandleByPciBusId", bus_id)
        assert session.call("nvmlDeviceGetUUID", by_bus) == uuid


def test_process_utilization_is_what_is_newer_than_asked_for(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].set_processes([(os.getpid(), GIB)])
    fake.gpus[0].set_utilization(0, 0.64)
    with Session(fake.environment()) as session:
        (sample,) = session.call("nvmlDeviceGetProcessUtilization", session.gpu(0), 0)
        assert (sample["pid"], sample["smUtil"]) == (os.getpid(), 64)
        later_us = time.time_ns() // 1000
        assert fails_with(NOT_FOUND, session, "nvmlDeviceGetProcessUtilization", session.gpu(0), later_us)


def test_the_command_makes_a_driver_and_changes_it_while_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake_nvml(*arguments: str) -> None:
        command.main([str(tmp_path), *arguments])

    fake_nvml("new", "--gpus", "2", "--profile", "A100")
    fake_nvml("env")
    exports = dict(
        line.removeprefix("export ").split("=", 1) for line in capsys.readouterr().out.splitlines()
    )
    with Session({**os.environ, **exports}) as session:
        gpu = session.gpu(1)
        fake_nvml("set", "1", "power_instant_mw=222000", "energy_mj=absent")
        assert field(session, gpu, FIELD_INSTANT) == 222_000
        assert fails_with(NOT_SUPPORTED, session, "nvmlDeviceGetTotalEnergyConsumption", gpu)
        fake_nvml("processes", "1", f"{os.getpid()}:512")
        (process,) = session.call("nvmlDeviceGetComputeRunningProcesses", gpu)
        assert (process["pid"], process["usedGpuMemory"]) == (os.getpid(), 2**29)
        fake_nvml("rule", "nvmlDeviceGetName", "--gpu", "1", "--code", "15")
        assert fails_with(GPU_IS_LOST, session, "nvmlDeviceGetName", gpu)
        fake_nvml("clear")
        fake_nvml("mig", "1", "3", "3")
        assert session.call("nvmlDeviceGetMigMode", gpu) == [1, 1]
        fake_nvml("driver", "unload")
        assert fails_with(9, session, "nvmlDeviceGetName", gpu)
    with pytest.raises(SystemExit):
        fake_nvml("set", "0", "no_such_figure=1")
