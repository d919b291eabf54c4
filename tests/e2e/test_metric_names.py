"""The table of other exporters' names in docs/operating/metrics.md, against what both really serve."""

import getpass
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.nvml.fake import GIB, KIB, MIB, FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness import nvitop
from tests.harness.daemon import Daemon, until
from tests.harness.nvitop import Figures, exporter, figures_on

pytestmark = [
    needs_gcc,
    pytest.mark.skipif(not nvitop.is_there(), reason="no nvitop (it is in the dev extra)"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs/operating/metrics.md"
CONFIG = f'[jobs]\nuser = "{getpass.getuser()}"\n[sampling]\nperiod_s = 0.1\nprocesses_period_s = 0.1\n'
# Between them these report all that any board does: links, fans, smoothing.
BOARDS = ("H100", "RTX4090", "B200")
# What one of theirs is in our unit.
FACTORS = {"Percentage": 0.01, "MiB": MIB, "MHz": 1e6, "W": 1.0, "C": 1.0}
# A counter here and a rate there.
IS_RATE = "MiBps"
PREFIX = "wattshift_"


@dataclass(frozen=True)
class Row:
    ours: list[str]
    theirs: list[str]
    dcgm: list[str]
    remark: str


def table() -> list[Row]:
    text = PAGE.read_text().partition("## Names of other exporters")[2]
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    names = [[re.findall(r"`(\w+)`", cell) for cell in cells[:3]] for cells in rows]
    return [Row(*each, remark=cells[3].strip()) for each, cells in zip(names, rows, strict=True)]


@dataclass(frozen=True)
class Served:
    page: str
    ours: Figures
    theirs: Figures


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Both exporters' figures of the same GPUs at work, time standing still."""
    fake = FakeNvml(tmp_path_factory.mktemp("nvml"), gpus=len(BOARDS), is_live=True)
    for index, board in enumerate(BOARDS):
        fake.become(index, board, is_live=True)
    fake.stop_clock()
    for index in range(len(BOARDS)):
        gpu = fake.gpus[index]
        fake.load(index, 0.25 * (index + 1))
        gpu.memory_used, gpu.link_kib = (index + 1) * GIB, 7 * KIB
        gpu.encoder_percent, gpu.decoder_percent, gpu.memory_utilization_percent = 11, 12, 13
    fake.gpus[2].smoothing_enabled = 1
    fake.advance(5.0)
    fake.gpus[0].set_processes([(os.getpid(), GIB)])
    with Daemon(gpus="", config=CONFIG) as daemon, exporter(fake, 0.25) as (url, _):
        daemon.environment = fake.environment()
        daemon.start()
        until("all GPUs are read", lambda: daemon.metrics().count("gpu_sm_clock_hertz{") == len(BOARDS))
        fake.xid(0, 31)
        until("the XID was heard", lambda: 'kind="xid_31"' in daemon.metrics())

        def theirs() -> Figures | None:
            try:
                found = figures_on(urllib.request.urlopen(url).read().decode())
            except OSError:
                return None
            names = [name for name, _ in found]
            whole = names.count("gpu_power_usage_W") == len(BOARDS) and "process_gpu_memory_MiB" in names
            return found if whole else None

        figures = until("the exporter has read all", theirs)
        assert figures is not None
        page = daemon.metrics()
        yield Served(page, figures_on(page, "gpu"), figures)


def test_every_figure_of_nvitop_exporter_is_in_the_table_and_no_other(served: Served) -> None:
    named = [name for row in table() for name in row.theirs]
    assert sorted(named) == sorted({name for name, _ in served.theirs})


def test_every_metric_that_the_table_names_of_ours_is_served(served: Served) -> None:
    named = [PREFIX + name for row in table() for name in row.ours]
    assert len(named) == len(set(named))
    assert set(named) - {name for name, _ in served.ours} == set()


def test_a_row_without_a_metric_of_ours_says_why() -> None:
    rows = table()
    assert len(rows) > 30
    assert [row for row in rows if not row.ours and len(row.remark) < 10] == []
    assert [row for row in rows if not (row.theirs or row.dcgm)] == []


def test_every_metric_of_a_gpu_that_is_served_is_documented(served: Served) -> None:
    text = PAGE.read_text().partition("## Names of other exporters")[0]
    documented = {PREFIX + name for name in re.findall(r"`(\w+)`", text)}
    assert {name for name, _ in served.ours} - documented == set()


def test_one_figure_by_two_names_is_one_figure(served: Served) -> None:
    compared = []
    for row in table():
        if len(row.ours) != 1 or len(row.theirs) != 1 or row.theirs[0].endswith(IS_RATE):
            continue
        name, factor = row.theirs[0], FACTORS[row.theirs[0].rpartition("_")[2]]
        theirs = {uuid: value * factor for (each, uuid), value in served.theirs.items() if each == name}
        ours = {uuid: value for (each, uuid), value in served.ours.items() if each == PREFIX + row.ours[0]}
        assert ours == pytest.approx(theirs), name
        compared.append(name)
    assert len(compared) >= 11
    assert "gpu_fan_speed_Percentage" in compared


def test_links_are_counted_where_there_are_some(served: Served) -> None:
    sent = {
        uuid: value for (name, uuid), value in served.ours.items() if name.endswith("transmitted_bytes_total")
    }
    assert list(sent.values()) == [18 * 7 * KIB * KIB] * 2, "a board without links has no such figure"


@pytest.mark.prometheus
@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (apt-get install prometheus)")
def test_promtool_finds_nothing_to_complain_about(served: Served) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=served.page, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
