"""nvitop and nvitop-exporter, independent readers of the same fake driver."""

import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.nvml.fake import FakeNvml

NVITOP = Path(sys.executable).with_name("nvitop")
EXPORTER = Path(sys.executable).with_name("nvitop-exporter")

# By metric's name and GPU's UUID.
Figures = dict[tuple[str, str], float]


def is_there() -> bool:
    return shutil.which(NVITOP) is not None and shutil.which(EXPORTER) is not None


@contextlib.contextmanager
def exporter(fake: FakeNvml, interval_s: float) -> Iterator[tuple[str, int]]:
    """Run the exporter, which reads once in each interval; gives where it answers, and its PID."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [EXPORTER, "--bind-address", "127.0.0.1", "--port", str(port), "--interval", str(interval_s)]
    process = subprocess.Popen(command, env=fake.environment(), stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}/metrics", process.pid
    finally:
        process.kill()
        process.wait()


def figures_on(page: str, label: str = "uuid") -> Figures:
    """Return what a page says of GPUs, which the label names; what it does not know it calls NaN."""
    return {
        (sample.name, sample.labels[label]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if label in sample.labels and sample.value == sample.value
    }
