"""Who holds a GPU, through the real pynvml from the fake driver."""

import asyncio
import contextlib
import dataclasses
import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.effects.job_signals import start_ticks
from scheduler.effects.nvml_child import LANE_WAITING_MAX
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuProcess
from tests.fakes.nvml.fake import ABSENT, GIB, OLD_DRIVER, FakeNvml
from tests.fakes.nvml.reading import LIMITS, PATIENCE_S, Reading, eventually, is_whole, needs_gcc, reading

pytestmark = needs_gcc

PID_NONE = 2**32 - 1
NOT_SUPPORTED = 3
# A reading of a fake that hangs: what is tested is that it ends.
IMPATIENT = dataclasses.replace(LIMITS, holders_s=0.2)


@contextlib.contextmanager
def running(*command: str | Path, user: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, user=user)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def holders_of_first(fake: FakeNvml) -> GpuHolders:
    async with reading(fake) as read:
        return await read.gpus.holders(fake.gpus[0].uuid)


async def holders_at_last(read: Reading, uuid: str) -> GpuHolders:
    """Return the first answer of a GPU that may be slow at first."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(GpuReadError):
                return await read.gpus.holders(uuid)


def wait_unreaped(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def pid_of_nobody() -> int:
    """Return the PID of a process that has ended and is gone."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


async def test_holders_are_named_with_user_and_command(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    with running("cat") as cat:
        fake.gpus[1].memory_used = 5 * GIB
        fake.gpus[1].set_processes([(cat.pid, 3 * GIB)])
        async with reading(fake) as read:
            before_s = time.time()
            holders = await read.gpus.holders(fake.gpus[1].uuid)
            assert before_s <= holders.at_s <= time.time()
            named = GpuProcess(cat.pid, 3 * 1024, "compute", getpass.getuser(), "cat")
            assert holders == GpuHolders(
                uuid=fake.gpus[1].uuid,
                at_s=holders.at_s,
                processes=(dataclasses.replace(named, start_ticks=start_ticks(cat.pid)),),
                memory_used_mib=5 * 1024,
            )
            assert (await read.gpus.holders(fake.gpus[0].uuid)).processes == ()


async def test_a_process_that_comes_or_goes_is_seen_at_the_next_look(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake) as read:
        for processes in ([], [(os.getpid(), GIB)], []):
            fake.gpus[0].set_processes(processes)
            holders = await read.gpus.holders(fake.gpus[0].uuid)
            assert [process.pid for process in holders.processes] == [pid for pid, _ in processes]


async def test_entries_that_name_no_process_are_unknown_holders(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    me, gone = os.getpid(), pid_of_nobody()
    fake.gpus[0].set_processes([(0, GIB), (PID_NONE, 2 * GIB), (me, 3 * GIB), (gone, 4 * GIB)])
    holders = await holders_of_first(fake)
    assert [(process.pid, process.memory_mib) for process in holders.processes] == [
        (0, 1024),
        (0, 2048),
        (0, 4096),
        (me, 3072),
    ]
    assert all(process.user == process.command == "" for process in holders.processes if not process.pid)
    assert [process.listed_pid for process in holders.processes] == [0, PID_NONE, gone, None]


async def test_a_zombie_still_holds_its_gpu_under_its_own_name(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    with running("true") as zombie:
        wait_unreaped(zombie.pid)
        fake.gpus[0].set_processes([(zombie.pid, GIB)])
        (process,) = (await holders_of_first(fake)).processes
    assert (process.pid, process.command) == (zombie.pid, "true")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start a process as another user")
async def test_a_process_of_another_user_is_named_by_that_user(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    with running("cat", user="nobody") as cat:
        fake.gpus[0].set_processes([(cat.pid, GIB)])
        (process,) = (await holders_of_first(fake)).processes
    assert (process.user, process.command) == ("nobody", "cat")


async def test_memory_that_a_driver_does_not_tell_is_absent(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].memory_used = ABSENT
    fake.gpus[0].set_processes([(os.getpid(), ABSENT)])
    holders = await holders_of_first(fake)
    assert holders.memory_used_mib is None
    assert [process.memory_mib for process in holders.processes] == [None]


async def test_a_process_in_several_lists_is_one_holder(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    me, parent = os.getpid(), os.getppid()
    with running("cat") as cat:
        fake.gpus[0].set_processes([(me, 2 * GIB)])
        fake.gpus[0].set_processes([(parent, ABSENT), (me, GIB), (0, GIB)], "graphics")
        fake.gpus[0].set_processes([(cat.pid, GIB), (me, ABSENT)], "mps")
        holders = await holders_of_first(fake)
    assert {(process.pid, process.kind, process.memory_mib) for process in holders.processes} == {
        (0, "graphics", 1024),
        (me, "compute", 2048),
        (parent, "graphics", None),
        (cat.pid, "compute", 1024),
    }
    assert [process.pid for process in holders.processes] == sorted((0, me, parent, cat.pid))


async def test_a_list_that_grows_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    # Sized as empty there is room for five.
    fake.gpus[0].set_processes([(os.getpid(), GIB), *((0, GIB) for _ in range(11))])
    fake.gpus[0].short_sizings = 2
    holders = await holders_of_first(fake)
    assert len(holders.processes) == 12
    assert fake.gpus[0].short_sizings == 0


async def test_a_list_that_never_fits_is_an_error_and_not_a_free_gpu(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.gpus[0].set_processes([(0, GIB)] * 12)
    fake.gpus[0].short_sizings = 1000
    with pytest.raises(GpuReadError) as caught:
        await holders_of_first(fake)
    assert caught.value.code == "ERROR_INSUFFICIENT_SIZE"


async def test_a_gpu_without_a_list_of_compute_processes_is_an_error_and_not_free(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.rule("nvmlDeviceGetComputeRunningProcesses_v3", code=NOT_SUPPORTED)
    fake.rule("nvmlDeviceGetComputeRunningProcesses_v2", code=NOT_SUPPORTED)
    with pytest.raises(GpuReadError) as caught:
        await holders_of_first(fake)
    assert caught.value.code == "ERROR_NOT_SUPPORTED"


async def test_a_gpu_without_graphics_and_mps_lists_is_read_all_the_same(tmp_path: Path) -> None:
    lists = [f"nvmlDeviceGet{kind}RunningProcesses" for kind in ("Graphics", "MPSCompute")]
    fake = FakeNvml(tmp_path, without=[f"{name}_v{version}" for name in lists for version in (2, 3)])
    fake.gpus[0].set_processes([(os.getpid(), GIB)])
    assert [process.pid for process in (await holders_of_first(fake)).processes] == [os.getpid()]


async def test_an_old_driver_lists_its_processes_through_the_older_functions(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, without=OLD_DRIVER)
    fake.gpus[0].set_processes([(os.getpid(), GIB)])
    fake.gpus[0].set_processes([(os.getppid(), GIB)], "graphics")
    holders = await holders_of_first(fake)
    assert {process.pid for process in holders.processes} == {os.getpid(), os.getppid()}


async def test_an_executable_that_was_deleted_keeps_its_name(tmp_path: Path) -> None:
    program = tmp_path / "a long name with blanks"
    shutil.copy(shutil.which("cat") or "", program)
    fake = FakeNvml(tmp_path)
    with running(program) as process:
        program.unlink()
        fake.gpus[0].set_processes([(process.pid, GIB)])
        (holder,) = (await holders_of_first(fake)).processes
    assert holder.command == "a long name with blanks"


async def test_an_unknown_gpu_is_not_found(tmp_path: Path) -> None:
    async with reading(FakeNvml(tmp_path)) as read:
        with pytest.raises(GpuReadError) as caught:
            await read.gpus.holders("GPU-00000000-0000-0000-0000-000000000000")
    assert caught.value.code == "ERROR_NOT_FOUND"


async def test_holders_of_a_lost_gpu_are_an_error_by_its_name(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake) as read:
        fake.gpus[0].lost = 1
        with pytest.raises(GpuReadError) as caught:
            await read.gpus.holders(fake.gpus[0].uuid)
    assert caught.value.code == "ERROR_GPU_IS_LOST"


async def test_only_the_gpu_that_is_asked_for_is_read(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    asked, other = (fake.rule("nvmlDeviceGetComputeRunningProcesses_v3", gpu=index) for index in range(2))
    async with reading(fake) as read:
        await read.next()
        assert asked.calls == 0, "process lists hold the driver's lock: no part of a sample"
        await read.gpus.holders(fake.gpus[0].uuid)
    assert (asked.calls, other.calls) == (1, 0)


async def test_holders_are_answered_while_a_round_waits_for_another_gpu(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    patient = dataclasses.replace(LIMITS, round_s=PATIENCE_S)
    async with reading(fake, patient, period_s=PATIENCE_S) as read:
        await read.gpus.release()
        answered = fake.rule("nvmlDeviceGetTotalEnergyConsumption", gpu=0)
        waited_for = fake.rule("nvmlDeviceGetTotalEnergyConsumption", gpu=1, hang=True)
        await read.gpus.acquire()
        await eventually(lambda: answered.calls == 1 and waited_for.inside == 1)
        assert read.rounds.empty()
        assert (await read.gpus.holders(fake.gpus[0].uuid)).processes == ()
        assert waited_for.inside == 1
        assert read.rounds.empty()
        waited_for.hang = 0
        assert is_whole(await read.next())


async def test_holders_of_a_gpu_that_hangs_are_an_error_in_bounded_time(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    hung, other = fake.gpus[0].uuid, fake.gpus[1].uuid
    lists = fake.rule("nvmlDeviceGetComputeRunningProcesses_v3", gpu=0)
    async with reading(fake, IMPATIENT) as read:
        rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=0, hang=True)
        await eventually(lambda: rule.inside == 1)
        failures = []
        for _ in range(3):
            with pytest.raises(GpuReadError) as caught:
                await read.gpus.holders(hung)
            failures.append(caught.value)
        assert [failure.code for failure in failures] == ["ERROR_TIMEOUT"] * 3
        # Once it is known to hang longer than anybody waits, it is not waited for.
        assert "has not come back for" in str(failures[-1])
        assert rule.inside == 1
        expired_s = time.monotonic() + 2 * IMPATIENT.holders_s
        await eventually(lambda: time.monotonic() > expired_s)
        rule.hang = 0
        await read.until(is_whole)
        assert lists.calls == 0, "what nobody waits for any more is not asked"
        for uuid in (hung, other):
            assert (await holders_at_last(read, uuid)).processes == ()


async def test_a_lane_has_room_for_eight_and_refuses_the_rest(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    uuid = fake.gpus[0].uuid
    async with reading(fake, dataclasses.replace(LIMITS, holders_s=PATIENCE_S)) as read:
        rule = fake.rule("nvmlDeviceGetUtilizationRates", hang=True)
        await eventually(lambda: rule.inside == 1)
        asked = [asyncio.create_task(read.gpus.holders(uuid)) for _ in range(LANE_WAITING_MAX + 5)]
        await eventually(lambda: sum(task.done() for task in asked) == 5)
        rule.hang = 0
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [GpuHolders] * LANE_WAITING_MAX + [GpuReadError] * 5


async def test_a_process_list_that_hangs_makes_only_its_own_gpu_stale(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    hung = fake.gpus[0].uuid
    rule = fake.rule("nvmlDeviceGetComputeRunningProcesses_v3", gpu=0, hang=True)
    async with reading(fake, IMPATIENT) as read:
        with pytest.raises(GpuReadError):
            await read.gpus.holders(hung)
        readings = await read.until(lambda readings: bool(readings.errors))
        assert readings.errors == {hung: "ERROR_TIMEOUT"}
        assert [sample.uuid for sample in readings.samples] == [fake.gpus[1].uuid]
        rule.hang = 0
        await read.until(lambda readings: len(readings.samples) == 2)
