"""Independent witnesses: nvitop and nvitop-exporter read the same driver, and see what we see."""

import asyncio
import contextlib
import os
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

from scheduler.effects.gpus import GpuReadings
from tests.fakes.nvml.fake import GIB, MIB, FakeNvml
from tests.fakes.nvml.reading import needs_gcc, reading
from tests.harness import nvitop
from tests.harness.nvitop import NVITOP, Figures, exporter, figures_on

PATIENCE_S = 30.0
LOOK_AGAIN_S = 0.05
COMPARED = (
    "gpu_utilization_Percentage",
    "gpu_memory_used_MiB",
    "gpu_memory_total_MiB",
    "gpu_clock_sm_MHz",
    "gpu_power_usage_W",
    "gpu_power_limit_W",
    "gpu_temperature_C",
)
BOARDS = ("A100", "H100", "RTX4090", "T4")

pytestmark = [
    needs_gcc,
    pytest.mark.skipif(not nvitop.is_there(), reason="no nvitop (it is in the dev extra)"),
]


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    """Four boards at work, time standing still, one process of ours on the first."""
    fake = FakeNvml(tmp_path, gpus=len(BOARDS), is_live=True)
    for index, board in enumerate(BOARDS):
        fake.become(index, board, is_live=True)
    fake.stop_clock()
    for index in range(len(BOARDS)):
        fake.load(index, 0.25 * (index + 1))
        fake.gpus[index].memory_used = (index + 1) * GIB + 4 * MIB
    fake.advance(5.0)
    fake.gpus[0].set_processes([(os.getpid(), GIB)])
    return fake


async def our_round(fake: FakeNvml) -> GpuReadings:
    async with reading(fake) as read:
        return read.first


async def figures_of(url: str) -> Figures:
    """Return the exporter's figures once it has all GPUs and the process."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(OSError):
                page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
                figures = figures_on(page)
                names = [name for name, _ in figures]
                if names.count("gpu_power_usage_W") == len(BOARDS) and "process_gpu_memory_MiB" in names:
                    return figures
            await asyncio.sleep(LOOK_AGAIN_S)


async def test_nvitop_exporter_reads_the_same_figures_as_we_do(fake: FakeNvml) -> None:
    ours = await our_round(fake)
    with exporter(fake, 0.25) as (url, _):
        theirs = await figures_of(url)
    total_mib = {gpu.uuid: gpu.memory_total_mib for gpu in ours.identities}
    assert len(ours.samples) == len(BOARDS)
    for sample in ours.samples:
        uuid = sample.uuid
        assert sample.utilization_ratio is not None
        assert {
            "gpu_utilization_Percentage": 100 * sample.utilization_ratio,
            "gpu_memory_used_MiB": sample.memory_used_mib,
            "gpu_memory_total_MiB": total_mib[uuid],
            "gpu_clock_sm_MHz": sample.sm_clock_mhz,
            "gpu_power_usage_W": pytest.approx(sample.power_w, abs=0.001),
            "gpu_power_limit_W": sample.power_limit_w,
            "gpu_temperature_C": sample.temperature_celsius,
        } == {name: value for (name, gpu), value in theirs.items() if gpu == uuid and name in COMPARED}
    assert theirs["process_gpu_memory_MiB", ours.samples[0].uuid] == GIB // MIB


async def test_nvitop_shows_the_same_gpus_draw_and_processes_as_we_do(fake: FakeNvml) -> None:
    ours = await our_round(fake)
    shown = await asyncio.to_thread(
        subprocess.run, [NVITOP, "-1", "--no-unicode"], env=fake.environment(), capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "FunctionNotFound" not in shown.stderr
    rows = re.findall(r"\|\s+(\S+)\s+(\d+)C\s+P0\s+(\d+)W / (\d+)W", shown.stdout)
    assert [(int(celsius), int(draw), int(limit)) for _, celsius, draw, limit in rows] == [
        (sample.temperature_celsius, round(sample.power_w or 0), sample.power_limit_w)
        for sample in ours.samples
    ]
    assert [gpu.pci_bus_id for gpu in ours.identities] == re.findall(
        r"([0-9A-F]{8}:[0-9A-F]{2}:00\.0)", shown.stdout
    )
    assert ours.driver_version in shown.stdout
    assert re.search(rf"\|\s+0\s+{os.getpid()} C\s+\S+\s+1024MiB", shown.stdout), shown.stdout
