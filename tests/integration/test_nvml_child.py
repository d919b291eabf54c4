"""The life of the NVML child: drivers that come and go, calls that hang, processes that end."""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.effects import nvml_client
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.nvml_client import NvmlGpus
from scheduler.errors import GpuReadError
from tests.fakes.nvml import build
from tests.fakes.nvml.fake import FakeNvml
from tests.fakes.nvml.reading import LIMITS, PATIENCE_S, eventually, is_whole, needs_gcc, reading

pytestmark = needs_gcc

SNAPPY = dataclasses.replace(LIMITS, silence_s=1.0, stuck_s=0.2, end_s=0.2)
UNINITIALIZED = 1
UNKNOWN = 999


def driver_says(name: str) -> Callable[[GpuReadings], bool]:
    return lambda readings: readings.errors == {"driver": name}


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_files(pid: int) -> set[str]:
    files = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            files.add(str(descriptor.readlink()))
    return files


# Drivers that come and go ----------------------------------------------------------------------


async def test_a_library_that_appears_later_is_found(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    fake.hide_library()
    async with reading(fake) as read:
        assert read.first == GpuReadings((), (), {"driver": "ERROR_LIBRARY_NOT_FOUND"})
        with pytest.raises(GpuReadError) as caught:
            await read.gpus.holders(fake.gpus[0].uuid)
        assert caught.value.code == "ERROR_LIBRARY_NOT_FOUND"
        fake.show_library()
        assert len((await read.until(is_whole)).identities) == 2


async def test_a_driver_that_is_loaded_later_is_found(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.unload_driver()
    async with reading(fake) as read:
        assert read.first == GpuReadings((), (), {"driver": "ERROR_DRIVER_NOT_LOADED"})
        fake.load_driver()
        await read.until(is_whole)


async def test_a_driver_without_gpus_says_so_until_some_come(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=0)
    opened, closed = fake.rule("nvmlInitWithFlags"), fake.rule("nvmlShutdown")
    async with reading(fake) as read:
        assert read.first == GpuReadings((), (), {"driver": "ERROR_GPU_NOT_FOUND"}, "570.86.15")
        await read.next()
        fake.set_count(3)
        assert len((await read.until(is_whole)).identities) == 3
        # Initialising is counted by the library: what is opened more often than closed stays open.
        assert opened.calls == closed.calls + 1 > 1


async def test_a_driver_that_is_reloaded_is_opened_again(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        child = fake.opened_by
        fake.unload_driver()
        gone = await read.until(driver_says("ERROR_DRIVER_NOT_LOADED"))
        assert (gone.identities, gone.samples) == ((), ())
        fake.gpus[0].energy_mj = 1
        fake.load_driver()
        back = await read.until(is_whole)
        assert [sample.energy_mj for sample in back.samples] == [1, 1_000_000]
        assert fake.opened_by == child, "a reload is no reason for another process"


async def test_handles_that_a_reload_between_two_rounds_killed_are_opened_again(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        opened = fake.rule("nvmlInitWithFlags")
        fake.load_driver()
        while opened.calls == 0:
            assert (await read.next()).errors.get("driver", "ERROR_TIMEOUT") == "ERROR_TIMEOUT"
        await read.until(is_whole)


async def test_a_gpu_that_alone_says_that_the_driver_is_gone_costs_only_itself(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        opened = fake.rule("nvmlInitWithFlags")
        fake.rule("nvmlDeviceGetUtilizationRates", gpu=0, code=UNINITIALIZED)
        readings = await read.until(lambda readings: bool(readings.errors))
        assert readings.errors == {fake.gpus[0].uuid: "ERROR_UNINITIALIZED"}
        assert [sample.uuid for sample in readings.samples] == [fake.gpus[1].uuid]
        assert opened.calls == 0


async def test_an_upgraded_driver_is_read_by_another_process(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        child = fake.opened_by
        fake.upgrade_driver()
        await read.until(driver_says("ERROR_LIB_RM_VERSION_MISMATCH"))
        await read.until(is_whole)
        assert fake.opened_by != child
        await eventually(lambda: not is_alive(child))


async def test_a_driver_that_goes_away_while_a_gpu_hangs_is_read_by_another_process(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake, SNAPPY) as read:
        child = fake.opened_by
        rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=0, hang=True)
        await read.until(lambda readings: len(readings.samples) == 1)
        fake.load_driver()
        await eventually(lambda: fake.opened_by != child)
        rule.hang = 0
        await read.until(is_whole)
        await eventually(lambda: not is_alive(child))


async def test_a_library_that_fails_to_open_is_tried_again(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    rule = fake.rule("nvmlInitWithFlags", code=UNKNOWN)
    async with reading(fake) as read:
        assert read.first == GpuReadings((), (), {"driver": "ERROR_UNKNOWN"})
        rule.code = 0
        await read.until(is_whole)


# Calls that hang -------------------------------------------------------------------------------


async def test_a_driver_that_hangs_later_says_nothing_about_the_gpus(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake, SNAPPY) as read:
        rule = fake.rule("nvmlInitWithFlags", hang=True)
        fake.load_driver()
        hung = await read.until(driver_says("ERROR_TIMEOUT"))
        assert (hung.identities, hung.samples) == (read.first.identities, ())
        rule.hang = 0
        await read.until(is_whole)


async def test_start_is_bounded_when_the_library_hangs(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    rule = fake.rule("nvmlInitWithFlags", hang=True)
    async with reading(fake, dataclasses.replace(LIMITS, first_round_s=0.1)) as read:
        assert read.first == GpuReadings((), (), {"driver": "ERROR_TIMEOUT"})
        await eventually(lambda: rule.inside == 1)
        await read.next()
        rule.hang = 0
        await read.until(is_whole)
        assert rule.calls == 1


@pytest.mark.parametrize(
    ("function", "calls_of_one_child"), [("nvmlInitWithFlags", 1), ("nvmlDeviceGetUtilizationRates", 2)]
)
async def test_a_child_in_which_everything_hangs_is_replaced(
    tmp_path: Path, function: str, calls_of_one_child: int
) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    rule = fake.rule(function, hang=True)
    async with reading(fake, dataclasses.replace(SNAPPY, first_round_s=0.1)) as read:
        # None is stacked on one that hangs, so more calls come from another process.
        await eventually(lambda: rule.calls > calls_of_one_child)
        rule.hang = 0
        await read.until(is_whole)


async def test_one_gpu_that_hangs_is_no_reason_for_another_process(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake, SNAPPY) as read:
        child = fake.opened_by
        rule = fake.rule("nvmlDeviceGetUtilizationRates", gpu=0, hang=True)
        await read.until(lambda readings: len(readings.samples) == 1)
        hung_s = time.monotonic()
        while time.monotonic() - hung_s < 2 * SNAPPY.stuck_s:
            assert len((await read.next()).samples) == 1
        assert (fake.opened_by, rule.inside) == (child, 1)


@pytest.mark.parametrize("function", ["nvmlDeviceGetUtilizationRates", "nvmlShutdown"])
async def test_close_is_bounded_while_a_call_hangs(tmp_path: Path, function: str) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    rule = fake.rule(function)
    async with reading(fake, SNAPPY) as read:
        child = fake.opened_by
        rule.hang = 1
        if function != "nvmlShutdown":
            await eventually(lambda: rule.inside == 2)
        async with asyncio.timeout(PATIENCE_S):
            await read.gpus.close()
        assert not is_alive(child)


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetComputeRunningProcesses_v3"]
)
async def test_close_lets_calls_come_back_and_shuts_the_library_down(tmp_path: Path, function: str) -> None:
    fake = FakeNvml(tmp_path)
    shutdown = fake.rule("nvmlShutdown")
    async with reading(fake) as read:
        call = fake.rule(function, hang=True, delay_s=0.1)
        holders = asyncio.create_task(read.gpus.holders(fake.gpus[0].uuid))
        await eventually(lambda: call.inside == 1)
        call.hang = 0  # but it takes a while from here
        await read.gpus.close()
        assert (call.inside, shutdown.inside, shutdown.calls) == (0, 0, 1)
        await asyncio.wait([holders])
        assert holders.exception() is None or isinstance(holders.exception(), GpuReadError)


async def test_close_twice_and_without_a_start_is_harmless() -> None:
    gpus = NvmlGpus()
    await gpus.close()
    await gpus.close()


# Release and acquire ---------------------------------------------------------------------------


async def test_release_lets_go_of_everything_until_acquire(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake) as read:
        child = fake.opened_by
        await read.gpus.release()
        assert not is_alive(child)
        await asyncio.sleep(0)  # a round that was on its way to the receiver
        while not read.rounds.empty():
            read.rounds.get_nowait()
        with pytest.raises(GpuReadError) as caught:
            await read.gpus.holders(fake.gpus[0].uuid)
        assert caught.value.code == "ERROR_UNINITIALIZED"
        fake.upgrade_driver()  # what a release is for
        assert read.rounds.empty()
        await read.gpus.acquire()
        assert is_whole(await read.next())
        assert (await read.gpus.holders(fake.gpus[0].uuid)).processes == ()


async def test_release_and_acquire_twice_are_as_good_as_once(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake) as read:
        await read.gpus.release()
        await read.gpus.release()
        await read.gpus.acquire()
        await read.until(is_whole)
        child = fake.opened_by
        await read.gpus.acquire()
        await read.until(is_whole)
        assert fake.opened_by == child


# Processes that end ----------------------------------------------------------------------------


async def test_a_child_that_is_killed_is_replaced(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)
    async with reading(fake) as read:
        for _ in range(3):
            child = fake.opened_by
            os.kill(child, signal.SIGKILL)
            failed = await read.until(driver_says("ERROR_UNINITIALIZED"))
            assert failed.identities == read.first.identities, "it says nothing about the GPUs"
            assert failed.samples == ()
            await read.until(is_whole)
            assert fake.opened_by != child


async def test_holders_asked_of_a_child_that_dies_are_an_error(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake, dataclasses.replace(LIMITS, holders_s=PATIENCE_S)) as read:
        rule = fake.rule("nvmlDeviceGetComputeRunningProcesses_v3", hang=True)
        asked = asyncio.create_task(read.gpus.holders(fake.gpus[0].uuid))
        await eventually(lambda: rule.inside == 1)
        os.kill(fake.opened_by, signal.SIGKILL)
        with pytest.raises(GpuReadError) as caught:
            await asked
        assert caught.value.code == "ERROR_UNINITIALIZED"


async def test_a_child_that_is_silent_is_killed_and_replaced(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake, SNAPPY) as read:
        child = fake.opened_by
        os.kill(child, signal.SIGSTOP)
        await read.until(driver_says("ERROR_TIMEOUT"))
        await eventually(lambda: fake.opened_by != child)
        await eventually(lambda: not is_alive(child))


async def test_children_that_do_not_end_are_not_joined_by_ever_more(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    limits = dataclasses.replace(SNAPPY, end_s=PATIENCE_S, left_behind_max=0)
    async with reading(fake, limits) as read:
        child = fake.opened_by
        os.kill(child, signal.SIGSTOP)
        await read.until(driver_says("ERROR_TIMEOUT"))
        for _ in range(20):
            assert (await read.next()).samples == ()
        assert fake.opened_by == child
        os.kill(child, signal.SIGKILL)
        await eventually(lambda: fake.opened_by != child)


async def test_a_child_of_another_version_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeNvml(tmp_path)
    monkeypatch.setattr(nvml_client, "PROTOCOL_VERSION", nvml_client.PROTOCOL_VERSION + 1)
    async with reading(fake) as read:
        assert read.first == GpuReadings((), (), {"driver": "ERROR_UNINITIALIZED"})
        told = nvml_client.PROTOCOL_VERSION - 1
        assert f"it speaks protocol {told}, not {told + 1}" in caplog.text
        monkeypatch.undo()
        await read.until(is_whole)


async def test_a_system_that_refuses_a_process_is_no_reason_to_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeNvml(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing here"))
    async with reading(fake) as read:
        assert read.first == GpuReadings((), (), {"driver": "ERROR_OPERATING_SYSTEM"})
        monkeypatch.undo()
        await read.until(is_whole)


async def test_a_child_that_never_starts_is_tried_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeNvml(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing here"))
    backoffs_s = [0.05, 0.1, 0.2, 0.2]
    limits = dataclasses.replace(LIMITS, backoff_s_first=0.05, backoff_s_max=0.2)
    async with reading(fake, limits):
        await eventually(lambda: len(caplog.records) > len(backoffs_s))
    said = [float(message.split("replaced in ")[1].split(" s:")[0]) for message in caplog.messages]
    assert said[: len(backoffs_s)] == backoffs_s
    at_s = [record.created for record in caplog.records]
    between_s = [after - before for before, after in itertools.pairwise(at_s)]
    assert all(gap_s > 0.9 * backoff_s for gap_s, backoff_s in zip(between_s, backoffs_s, strict=False))


@pytest.mark.parametrize(
    ("version", "is_distrusted"),
    [("535.54.03", True), ("535.98", False), ("570.86.15", False), ("535.129.03", False)],
)
async def test_a_driver_that_scrambles_its_lists_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str, is_distrusted: bool
) -> None:
    fake = FakeNvml(tmp_path)
    fake.set_driver_version(version)
    async with reading(fake) as read:
        for _ in range(3):
            assert (await read.next()).driver_version == version
    assert [version in message for message in caplog.messages] == [True] * is_distrusted


async def test_a_receiver_that_raises_does_not_end_the_sampling(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    raised: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))

    def receive(readings: GpuReadings) -> None:
        raise ValueError("not today")

    gpus = NvmlGpus(LIMITS, fake.environment())
    await gpus.start(receive, 0.01)
    await eventually(lambda: len(raised) >= 3)
    await gpus.close()


# What the child is -----------------------------------------------------------------------------


async def test_the_child_holds_no_file_of_the_daemon(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    journal = tmp_path / "journal"
    with journal.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        async with reading(fake):
            files = open_files(fake.opened_by)
    assert str(journal) not in files
    assert len([name for name in files if name.startswith("socket:")]) == 1


async def test_the_child_is_not_signalled_with_the_daemon(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    async with reading(fake) as read:
        child = fake.opened_by
        assert os.getpgid(child) != os.getpgid(0)
        os.kill(child, signal.SIGTERM)
        os.kill(child, signal.SIGINT)
        await read.until(is_whole)
        assert fake.opened_by == child


async def test_the_child_ends_when_the_daemon_is_killed(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    daemon = """
import asyncio
from scheduler.effects.nvml_client import NvmlGpus
async def main():
    await NvmlGpus().start(lambda readings: None, 0.01)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", daemon, env=fake.environment())
    await eventually(lambda: fake.opened_by != 0)
    assert is_alive(fake.opened_by)
    process.kill()
    await process.wait()
    await eventually(lambda: not is_alive(fake.opened_by))


def test_the_daemon_never_loads_pynvml_and_the_child_nothing_big() -> None:
    def loaded_by(module: str, *names: str) -> list[str]:
        program = f"import sys, {module}; print(*(n for n in {names!r} if n in sys.modules))"
        return subprocess.check_output([sys.executable, "-c", program], text=True).split()

    assert loaded_by("scheduler.effects.nvml_client", "pynvml", "ctypes", "scheduler.effects.nvml") == []
    assert loaded_by("scheduler.effects.nvml_child", "pynvml", "asyncio", "grpc", "numpy", "logging") == []


def test_the_fake_is_what_the_child_is_shown(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    environment = fake.environment()
    assert (Path(environment["LD_LIBRARY_PATH"]) / build.LIBRARY).resolve().exists()
