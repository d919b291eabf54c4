"""How many jobs a second: run to their end, and taken in."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from measure import MS_PER_S, DidNotWork, Figure, at_least, spread
from node import FINAL, GPUS, WAIT_S, Node, job

from scheduler.v1 import job_pb2, job_service_pb2

if TYPE_CHECKING:
    from bench import Bench

TRUE_JOBS = 500
TRUE_JOBS_PER_S = 400.0
CONCURRENT = 16
CONCURRENT_PER_S = 1_000.0
BATCH_JOBS = 1_000
BATCHED_PER_S = 15_000.0
_SUBMITTER = Path(__file__).with_name("submitter.py")


def true_jobs(bench: "Bench") -> Figure:
    """500 `/bin/true` of one GPU each through eight GPUs: from the one submission to the last SUCCEEDED."""
    rounds = 1 if bench.quick else 4
    rates, stamped, client = [], [], []
    with bench.node() as node:
        before = node.spent()
        for _ in range(rounds):
            watch = _Watch(node, TRUE_JOBS)
            own, begun_s = time.process_time(), time.perf_counter()
            node.submit_all(job(["/bin/true"]) for _ in range(TRUE_JOBS))
            ended = watch.wait()
            rates.append(TRUE_JOBS / (ended - begun_s))
            client.append(MS_PER_S * (time.process_time() - own) / TRUE_JOBS)
            stamped.append(TRUE_JOBS / watch.stamped_s())
        per_job = node.spent().per_operation(before, rounds * TRUE_JOBS)
    found = spread(rates, 1)
    return {
        "jobs_per_s": found,
        "jobs_per_s_by_the_daemons_stamps": spread(stamped, 1),
        "per_job": {**per_job, "client_cpu_ms": round(min(client), 3)},
        "targets": [at_least("jobs_per_s p50", found["p50"], TRUE_JOBS_PER_S, "jobs/s")],
    }


class _Watch:
    """A watch stream that sees jobs to their end, in a thread."""

    def __init__(self, node: Node, jobs: int) -> None:
        self._wanted = jobs
        self._last: dict[str, job_pb2.Job] = {}
        self._ended_s = 0.0
        synced = threading.Event()
        self._stream = node.jobs.WatchJobs(job_service_pb2.WatchJobsRequest(), timeout=4 * WAIT_S)
        self._thread = threading.Thread(target=self._read, args=(synced,), daemon=True)
        self._thread.start()
        if not synced.wait(WAIT_S):
            raise DidNotWork("the watch stream does not begin")

    def wait(self) -> float:
        """Wait for the last end; returns when it was seen."""
        self._thread.join(4 * WAIT_S)
        self._stream.cancel()
        wrong = [one.id for one in self._last.values() if one.state != job_pb2.JOB_STATE_SUCCEEDED]
        if len(self._last) != self._wanted or wrong:
            raise DidNotWork(f"{len(self._last)} of {self._wanted} jobs ended, not SUCCEEDED: {wrong[:8]}")
        return self._ended_s

    def stamped_s(self) -> float:
        """From the first submission to the last end, as the daemon has it."""
        stamps = [
            (one.submitted_at.ToNanoseconds(), one.finished_at.ToNanoseconds()) for one in self._last.values()
        ]
        return (max(end for _, end in stamps) - min(begin for begin, _ in stamps)) / 1e9

    def _read(self, synced: threading.Event) -> None:
        try:
            for change in self._stream:
                if change.synced:
                    synced.set()
                elif change.job.state in FINAL:
                    self._last[change.job.id] = change.job
                    if len(self._last) == self._wanted:
                        self._ended_s = time.perf_counter()
                        return
        except grpc.RpcError:
            return  # `wait` says what is missing


def submissions(bench: "Bench") -> Figure:
    """Durable submissions of jobs that can't start yet, since a gang holds every GPU.

    One by one from a process of its own (one channel, so many calls in flight), and 1,000 in a call.
    """
    figure: Figure = {}
    for name, concurrency in (("one_at_a_time", 1), ("sixteen_in_flight", CONCURRENT)):
        figure[name] = _one_by_one(bench, concurrency, 2 if bench.quick else 5)
    figure["batches_of_1000"] = _batches(bench, 5 if bench.quick else 20)
    figure["targets"] = [
        at_least("sixteen_in_flight", figure["sixteen_in_flight"]["per_s"], CONCURRENT_PER_S, "jobs/s"),
        at_least("batches p50", figure["batches_of_1000"]["per_s"]["p50"], BATCHED_PER_S, "jobs/s"),
    ]
    return figure


def _one_by_one(bench: "Bench", concurrency: int, seconds: int) -> Figure:
    with bench.node() as node:
        _hold_everything(bench, node)
        before = node.spent()
        client = subprocess.run(
            [sys.executable, _SUBMITTER, node.address, str(concurrency), str(seconds)],
            capture_output=True,
            text=True,
            check=False,
        )
        spent = node.spent()
        if client.returncode:
            raise DidNotWork(f"the submitting client failed: {client.stderr}")
        found: Figure = json.loads(client.stdout)
        pending = node.get_node().pending_jobs
        if pending != found["jobs"]:
            raise DidNotWork(f"{found['jobs']} submissions were acknowledged, {pending} jobs wait")
        return {**found, "per_job": spent.per_operation(before, found["jobs"])}


def _batches(bench: "Bench", rounds: int) -> Figure:
    rates, client = [], 0.0
    with bench.node() as node:
        _hold_everything(bench, node)
        before = node.spent()
        for number in range(rounds):
            request = job_service_pb2.SubmitJobsRequest(
                jobs=[
                    job_service_pb2.SubmitJobRequest(
                        spec=job(["/bin/true"]), request_id=f"batch-{number}-{row}"
                    )
                    for row in range(BATCH_JOBS)
                ]
            )
            own, begun_s = time.process_time(), time.perf_counter()
            answer = node.jobs.SubmitJobs(request, timeout=WAIT_S)
            rates.append(BATCH_JOBS / (time.perf_counter() - begun_s))
            client += time.process_time() - own
            if len(set(answer.job_ids)) != BATCH_JOBS:
                raise DidNotWork("a batch was not answered with as many ids")
        per_job = node.spent().per_operation(before, rounds * BATCH_JOBS)
        pending = node.get_node().pending_jobs
    jobs = rounds * BATCH_JOBS
    if pending != jobs:
        raise DidNotWork(f"{jobs} submissions were acknowledged, {pending} jobs wait")
    return {
        "per_s": spread(rates, 0),
        "first_per_s": round(rates[0]),
        "last_per_s": round(rates[-1]),
        "pending_at_the_end": pending,
        "per_job": per_job,
        "client_cpu_ms_per_operation": round(MS_PER_S * client / jobs, 4),
    }


def _hold_everything(bench: "Bench", node: Node) -> None:
    node.submit(job(bench.line.command("gang", stay=True), "INFERENCE", GPUS))
    bench.line.wait("gang")
