"""What it costs to read GPUs, in the NVML child alone, on the fake driver."""

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from measure import DidNotWork, Figure, at_least, at_most, cpu_time

from scheduler.effects.nvml_protocol import LINE_BYTES_MAX, Message, decode, encode
from tests.fakes.nvml.fake import FakeNvml

if TYPE_CHECKING:
    from bench import Bench

GPUS = 8
SAMPLE_CPU_MS = 5.0
CALL_DELAY_S = 0.001
OF_SLOWEST_RATIO = 1.5
OTHERS_RATE_RATIO = 0.95
PERIOD_S = 0.1
PATIENT_S = 30.0


class Child:
    """A real NVML child, asked as the daemon asks it but one request at a time."""

    def __init__(self, fake: FakeNvml) -> None:
        """Start it; it sees the fake driver."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "scheduler.effects.nvml_child", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=fake.environment(),
            )
        self._end = ours
        self._lines = ours.makefile("rb")
        decode(self._lines.readline(LINE_BYTES_MAX))
        self._asked = 0

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid

    def sample(self, within_s: float) -> Message:
        """Return one round."""
        self._asked += 1
        request = {"do": "sample", "within_s": within_s, "stuck_s": 1e9, "events_after": 0, "list": 0}
        self._end.sendall(encode({"id": self._asked, **request}))
        return decode(self._lines.readline(LINE_BYTES_MAX))

    def close(self) -> None:
        """End it."""
        self._lines.close()
        self._end.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def child_of(fake: FakeNvml, gpus: int) -> Iterator[Child]:
    """Return a child that has all GPUs open."""
    child = Child(fake)
    try:
        first = child.sample(PATIENT_S)
        if len(first["samples"]) != gpus or first["errors"]:
            raise DidNotWork(f"the first round of {gpus} GPUs: {first['errors']}")
        yield child
    finally:
        child.close()


def nvml_child(bench: "Bench") -> Figure:
    """The NVML child: processor time of a full sample, slow calls side by side, one GPU that hangs."""
    rounds = 50 if bench.quick else 300
    figure = {**_cpu(bench, rounds), **_side_by_side(bench, rounds // 10), **_hanging(bench, rounds // 5)}
    figure["targets"] = [
        at_most("full sample of 8 GPUs", figure["sample_cpu_ms"], SAMPLE_CPU_MS, "ms of CPU"),
        at_most(
            "8 slow GPUs against the slowest", figure["of_slowest_ratio"], OF_SLOWEST_RATIO, "of its time"
        ),
        at_least(
            "rate of others beside one that hangs", figure["others_rate_ratio"], OTHERS_RATE_RATIO, "of it"
        ),
    ]
    return figure


def _fake(bench: "Bench", name: str, gpus: int) -> FakeNvml:
    folder = bench.directory / name
    folder.mkdir()
    return FakeNvml(folder, gpus=gpus, is_live=True)


def _cpu(bench: "Bench", rounds: int) -> Figure:
    """Processor time of a round, less what the child takes while nothing is asked."""
    with child_of(_fake(bench, "nvml-cpu", GPUS), GPUS) as child:
        begun_s, before = time.perf_counter(), cpu_time(child.pid).used_s
        time.sleep(rounds * PERIOD_S / 10)
        idle = (cpu_time(child.pid).used_s - before) / (time.perf_counter() - begun_s)
        begun_s, before = time.perf_counter(), cpu_time(child.pid).used_s
        for _ in range(rounds):
            child.sample(1.0)
        took_s = time.perf_counter() - begun_s
        used_s = cpu_time(child.pid).used_s - before - idle * took_s
    return {
        "sample_cpu_ms": round(1000 * used_s / rounds, 3),
        "sample_wall_ms": round(1000 * took_s / rounds, 3),
        "idle_cpu_percent": round(100 * idle, 2),
    }


def _side_by_side(bench: "Bench", rounds: int) -> Figure:
    """Wall time of a round in which each call takes 1 ms more: of all GPUs, and of one alone."""
    wall_ms: dict[int, float] = {}
    for gpus in (1, GPUS):
        fake = _fake(bench, f"nvml-slow-{gpus}", gpus)
        with child_of(fake, gpus) as child:
            fake.rule("*", delay_s=CALL_DELAY_S)
            counted = fake.rule("*", gpu=0)
            times_s = []
            for _ in range(rounds):
                begun_s = time.perf_counter()
                child.sample(PATIENT_S)
                times_s.append(time.perf_counter() - begun_s)
            wall_ms[gpus] = 1000 * statistics.median(times_s)
    return {
        "calls_per_gpu": counted.calls // rounds,
        "slow_sample_ms_of_one": round(wall_ms[1], 2),
        "slow_sample_ms_of_eight": round(wall_ms[GPUS], 2),
        "of_slowest_ratio": round(wall_ms[GPUS] / wall_ms[1], 3),
    }


def _hanging(bench: "Bench", rounds: int) -> Figure:
    """Samples of the other seven in so many periods, before and while one GPU hangs for ever."""
    fake = _fake(bench, "nvml-hang", GPUS)
    with child_of(fake, GPUS) as child:

        def samples_of_others() -> int:
            seen = 0
            due_s = time.perf_counter()
            for _ in range(rounds):
                seen += sum(hung not in sample for sample in child.sample(PERIOD_S)["samples"])
                due_s += PERIOD_S
                time.sleep(max(0.0, due_s - time.perf_counter()))
            return seen

        hung = fake.gpus[0].uuid
        begun_s = time.perf_counter()
        before = samples_of_others() / (time.perf_counter() - begun_s)
        rule = fake.rule("nvmlDeviceGetMemoryInfo_v2", gpu=0, hang=True)
        begun_s = time.perf_counter()
        beside = samples_of_others() / (time.perf_counter() - begun_s)
        rule.hang = 0
    return {
        "others_samples_per_s": round(before, 2),
        "others_samples_per_s_beside_a_hang": round(beside, 2),
        "others_rate_ratio": round(beside / before, 3),
    }
