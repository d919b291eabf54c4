"""What a scrape of the metrics page costs, beside nvitop-exporter on the same fake driver.

Compared is all processor time of the processes concerned: the daemon with its NVML child, which schedule,
keep accounts and serve gRPC besides, and the exporter. Both read all GPUs once a second, whoever scrapes. So
there are three figures: scrapes one upon the other; readings with a scrape each second; readings alone.
"""

import getpass
import time
import urllib.request
from typing import TYPE_CHECKING

from measure import MS_PER_S, DidNotWork, Figure, at_most, cpu_time

from tests.fakes.nvml.fake import FakeNvml
from tests.harness import nvitop
from tests.harness.daemon import Daemon, until

if TYPE_CHECKING:
    from bench import Bench

GPUS = 8
OF_THEIRS_RATIO = 0.2
READ_PERIOD_S = 1.0  # both read their GPUs once in it, whether somebody scrapes or not
# One after the other, so that what else the machine does meets both.
BLOCKS = 5


def scrape(bench: "Bench") -> Figure:
    """Processor time of a scrape, of the daemon with its NVML child and of nvitop-exporter."""
    if not nvitop.is_there():
        raise DidNotWork("no nvitop-exporter (it is in the dev extra)")
    folder = bench.directory / "nvml-scrape"
    directory = folder / "daemon"
    directory.mkdir(parents=True)
    fake = FakeNvml(folder, gpus=GPUS, is_live=True)
    for index in range(GPUS):
        fake.load(index, 0.5)
    config = f'[jobs]\nuser = "{getpass.getuser()}"\n[sampling]\nperiod_s = {READ_PERIOD_S}\n'
    with (
        Daemon(gpus="", config=config, directory=directory) as daemon,
        nvitop.exporter(fake, READ_PERIOD_S) as (theirs_url, theirs_pid),
    ):
        daemon.environment = fake.environment()
        daemon.start()
        assert daemon.process is not None
        ours_url = f"http://127.0.0.1:{daemon.metrics_port}/metrics"
        until("the daemon has read all", lambda: _page(ours_url).count("gpu_sm_clock_hertz{") == GPUS)
        until("the exporter has read all", lambda: _page(theirs_url).count("gpu_power_usage_W{") == GPUS)
        ours, theirs = (ours_url, (daemon.process.pid, daemon.nvml_child())), (theirs_url, (theirs_pid,))
        at_once = _compare(ours, theirs, 40 if bench.quick else 200, pace_s=0.0)
        seconds = 2 if bench.quick else 12
        each_second = _compare(ours, theirs, seconds, pace_s=READ_PERIOD_S)
        unscraped = _compare(ours, theirs, seconds, pace_s=READ_PERIOD_S, is_scraped=False)
    ratio = at_once["of_theirs_ratio"]
    return {
        "one_after_the_other": at_once,
        "one_a_second_with_the_reading": each_second,
        "a_second_of_reading": unscraped,
        "targets": [at_most("a scrape of 8 GPUs", ratio, OF_THEIRS_RATIO, "of nvitop-exporter's CPU")],
    }


def _compare(
    ours: tuple[str, tuple[int, ...]],
    theirs: tuple[str, tuple[int, ...]],
    scrapes: int,
    pace_s: float,
    is_scraped: bool = True,
) -> Figure:
    """Scrape each so many times in each block, or only let as much time pass."""
    used_s = {ours: 0.0, theirs: 0.0}
    for _ in range(BLOCKS):
        for each in used_s:
            url, pids = each
            before_s = cpu_time(*pids).used_s
            for _ in range(scrapes):
                due_s = time.monotonic() + pace_s
                if is_scraped:
                    _page(url)
                time.sleep(max(0.0, due_s - time.monotonic()))
            used_s[each] += cpu_time(*pids).used_s - before_s
    per_scrape_ms = {each: MS_PER_S * spent_s / (BLOCKS * scrapes) for each, spent_s in used_s.items()}
    return {
        "scrapes": BLOCKS * scrapes,
        "cpu_ms": round(per_scrape_ms[ours], 3),
        "cpu_ms_of_nvitop_exporter": round(per_scrape_ms[theirs], 3),
        "of_theirs_ratio": round(per_scrape_ms[ours] / per_scrape_ms[theirs], 3),
        "figures": _figures(_page(ours[0])),
        "figures_of_nvitop_exporter": _figures(_page(theirs[0])),
    }


def _figures(page: str) -> int:
    return sum(not line.startswith("#") for line in page.splitlines())


def _page(url: str) -> str:
    try:
        with urllib.request.urlopen(url) as answer:
            return str(answer.read().decode())
    except OSError:  # it does not listen yet
        return ""
