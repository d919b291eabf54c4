"""How soon a job runs: on a free GPU, by preemption, and through the command."""

import os
import random
import subprocess
import time
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp
from measure import MS_PER_S, NS_PER_MS, DidNotWork, Figure, Rounds, at_most, latency_targets, spread
from node import GPUS, WATTSHIFT, Node, job

if TYPE_CHECKING:
    from bench import Bench

START_MS = 4.0
ONE_VICTIM_MS = 6.0
EIGHT_VICTIMS_MS = 12.0
COMMAND_MS = 200.0
PAUSE_S_MAX = 0.04


def start(bench: "Bench") -> Figure:
    """Submit, acknowledged, in the job's main: on a free GPU, one after the other."""
    figure = _start(bench, 0.0)
    return {**figure, "targets": latency_targets(figure["submit_to_main_ms"], START_MS)}


def start_after_a_pause(bench: "Bench") -> Figure:
    """As `start`, but on a node that had nothing to do for a while: caches are cold, processors asleep."""
    return _start(bench, PAUSE_S_MAX)


def _start(bench: "Bench", pause_s_max: float) -> Figure:
    rounds = 50 if bench.quick else 200
    pauses = random.Random(1)
    acknowledged, stages = [], _Stages()
    with bench.node() as node:
        started = Rounds(bench.yardstick)
        before, own = node.spent(), time.process_time()
        for number in range(rounds):
            tag = f"start{number}"
            spec = job(bench.line.command(tag))
            wall_s, begun_ns = time.time(), time.monotonic_ns()
            submitted = node.submit(spec)
            acknowledged.append((time.monotonic_ns() - begun_ns) / NS_PER_MS)
            started.add((bench.line.wait(tag) - begun_ns) / NS_PER_MS)
            done = node.wait_until_final(submitted.id)
            stages.add("sent to accepted", wall_s, _s(done.submitted_at))
            stages.add("accepted to start reported", _s(done.submitted_at), _s(done.attempts[0].started_at))
            time.sleep(pauses.uniform(pause_s_max / 2, pause_s_max))
        own = time.process_time() - own
        per_job = node.spent().per_operation(before, rounds)
    started_ms = started.spread()
    return {
        "submit_to_acknowledged_ms": spread(acknowledged),
        "submit_to_main_ms": started_ms,
        "stages_ms": stages.spreads(),
        "per_job": {**per_job, "client_cpu_ms": round(MS_PER_S * own / rounds, 3)},
    }


def preempt_one(bench: "Bench") -> Figure:
    """Submit to the job's main where one of eight BATCH jobs must give way, and dies at once."""
    return _preempt(bench, "INFERENCE", 1, ONE_VICTIM_MS, 20 if bench.quick else 100)


def preempt_eight(bench: "Bench") -> Figure:
    """Submit to the gang's main where all eight BATCH jobs must give way, and die at once."""
    return _preempt(bench, "TRAINING", GPUS, EIGHT_VICTIMS_MS, 8 if bench.quick else 40)


def _preempt(bench: "Bench", job_class: str, gpus: int, target_ms: float, rounds: int) -> Figure:
    stages = _Stages()
    with bench.node() as node:
        started = Rounds(bench.yardstick)
        before = node.spent()
        for number in range(rounds):
            victims = set(node.fill(bench.line, "BATCH"))
            tag = f"preempt{number}"
            spec = job(bench.line.command(tag, stay=True), job_class, gpus)
            begun_ns = time.monotonic_ns()
            preemptor = node.submit(spec)
            started.add((bench.line.wait(tag) - begun_ns) / NS_PER_MS)
            stopped = _stages_of(node, preemptor.id, stages)
            if len(stopped) != gpus or not stopped <= victims:
                raise DidNotWork(f"{gpus} jobs had to give way, not {sorted(stopped)}")
            for job_id in (*stopped, preemptor.id):  # victims first: they would start again
                node.cancel(job_id)
        per_round = node.spent().per_operation(before, rounds)
    started_ms = started.spread()
    return {
        "submit_to_main_ms": started_ms,
        "stages_ms": stages.spreads(),
        "per_round": per_round,
        "targets": latency_targets(started_ms, target_ms),
    }


def _stages_of(node: Node, job_id: str, stages: "_Stages") -> set[str]:
    """Note how long each stage of a hand-over took, the slowest victim's; returns the victims' ids."""
    preemptor = node.get(job_id)
    while not preemptor.attempts[-1].HasField("started_at"):
        preemptor = node.get(job_id)
    attempt = preemptor.attempts[-1]
    gave_way = [
        one for victim in attempt.preempted for one in node.get(victim).attempts if one.preempted_by == job_id
    ]
    submitted_s = _s(preemptor.submitted_at)
    decided_s = max(_s(one.notice.decided_at) for one in gave_way)
    signalled_s = max(_s(one.signalled_at) for one in gave_way)
    exited_s = max(_s(one.exited_at) for one in gave_way)
    verified_s = max(_s(one.verified_at) for one in gave_way)
    stages.add("accepted to decided", submitted_s, decided_s)
    stages.add("decided to signalled", decided_s, signalled_s)
    stages.add("signalled to exited", signalled_s, exited_s)
    stages.add("exited to verified", exited_s, verified_s)
    stages.add("verified to successor reported", verified_s, _s(attempt.started_at))
    return set(attempt.preempted)


def command(bench: "Bench") -> Figure:
    """Wall time of the `wattshift` command, from its start to its end, against an idle node."""
    rounds = 5 if bench.quick else 15
    runs = {
        "submit": ["submit", "--class", "batch", "--", "/bin/true"],
        "jobs": ["jobs"],
    }
    figure: Figure = {}
    with bench.node() as node:
        for name, arguments in runs.items():
            took = []
            for _ in range(rounds):
                begun_s = time.perf_counter()
                done = subprocess.run(
                    [WATTSHIFT, *arguments],
                    env={**os.environ, "WATTSHIFT_ADDRESS": node.address},
                    capture_output=True,
                    check=False,
                )
                took.append(MS_PER_S * (time.perf_counter() - begun_s))
                if done.returncode:
                    raise DidNotWork(f"wattshift {name}: {done.stderr.decode()}")
            figure[f"{name}_ms"] = spread(took)
    bare = []
    for _ in range(rounds):
        begun_s = time.perf_counter()
        subprocess.run([WATTSHIFT.with_name("python"), "-c", "import grpc"], check=True)
        bare.append(MS_PER_S * (time.perf_counter() - begun_s))
    figure["python_with_import_grpc_ms"] = spread(bare)
    figure["targets"] = [
        at_most(f"{name} p50", figure[f"{name}_ms"]["p50"], COMMAND_MS, "ms") for name in runs
    ]
    return figure


class _Stages:
    """Durations by stage, in milliseconds, of the daemon's own timestamps."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def add(self, stage: str, since_s: float, until_s: float) -> None:
        self._found.setdefault(stage, []).append(MS_PER_S * (until_s - since_s))

    def spreads(self) -> Figure:
        return {stage: spread(values) for stage, values in self._found.items()}


def _s(stamp: Timestamp) -> float:
    return stamp.ToNanoseconds() / 1e9
