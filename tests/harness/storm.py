"""A stream of submissions, cancels and preemptions, all from one seed, under which the daemon is killed.

Each job appends a line when it starts and ends with a code that is known before: what is true at the end can
be told without asking the daemon.
"""

import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from scheduler.v1 import job_pb2
from tests.harness.daemon import CANCELLED, FAILED, FINAL, POLL_S, SUCCEEDED, Daemon, spec, until

SCRIPT = 'echo "$WATTSHIFT_JOB_ID $WATTSHIFT_ATTEMPT" >> {lines}; sleep {seconds:.3f}; exit {code}'
CLASSES = ("mining", "batch", "batch", "training", "inference")
DRAIN_S = 60.0
CANCEL_RATIO = 0.15
JOBS_MAX = 150  # more would take a slow machine too long


@dataclass
class Storm:
    """What was asked, and what the daemon acknowledged."""

    daemon: Daemon
    seed: int
    chance: random.Random = field(init=False)
    codes: dict[str, int] = field(default_factory=dict)  # by request_id: the exit code to come
    wanted: dict[str, job_pb2.JobSpec] = field(default_factory=dict)
    acknowledged: dict[str, str] = field(default_factory=dict)  # request_id -> job id
    cancelled: set[str] = field(default_factory=set)  # ids; the cancel may have come too late

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    @property
    def lines(self) -> Path:
        """Where each start of a job leaves a line."""
        return self.daemon.directory / "lines"

    def blow(self, seconds: float) -> None:
        """Submit and cancel until the daemon is killed, that many seconds from now."""
        process = self.daemon.process
        assert process is not None
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        while process.poll() is None:
            if self.acknowledged and self.chance.random() < CANCEL_RATIO:
                self.cancel(self.chance.choice(sorted(self.acknowledged.values())))
            elif len(self.wanted) < JOBS_MAX:
                self.submit(self.new_request())
            else:
                time.sleep(POLL_S)
        killer.join()

    def new_request(self) -> str:
        """Make up a job."""
        request_id = f"r-{self.seed}-{len(self.wanted)}"
        self.codes[request_id] = self.chance.choice((0, 0, 3))
        script = SCRIPT.format(
            lines=self.lines, seconds=self.chance.uniform(0.0, 0.4), code=self.codes[request_id]
        )
        self.wanted[request_id] = spec(
            script=script,
            job_class=self.chance.choice(CLASSES),
            gpus=self.chance.choice((0, 1, 1, 2, 4)),
            grace_s=self.chance.choice((0.0, 0.1, 5.0)),
        )
        return request_id

    def submit(self, request_id: str) -> bool:
        """Submit, or submit again; False where nobody answered."""
        try:
            job = self.daemon.submit_spec(self.wanted[request_id], request_id)
        except grpc.RpcError:
            return False
        before = self.acknowledged.setdefault(request_id, job.id)
        assert before == job.id, f"{request_id} is {before} and {job.id}"
        return True

    def cancel(self, job_id: str) -> None:
        """Cancel a job that may be final."""
        self.cancelled.add(job_id)
        with contextlib.suppress(grpc.RpcError):  # it was final, or the daemon is gone
            self.daemon.cancel(job_id)

    def calm(self) -> list[job_pb2.Job]:
        """Say again what nobody acknowledged, wait until every job is final; returns the jobs."""
        for request_id in self.wanted:
            assert self.submit(request_id), "the daemon answers again"
        until("every job is final", lambda: not self.daemon.all_jobs(active_only=True), DRAIN_S)
        return self.daemon.all_jobs()

    def check(self, jobs: list[job_pb2.Job]) -> None:
        """Everything that was promised."""
        note = f"seed {self.seed}"
        by_id = {job.id: job for job in jobs}
        assert set(self.acknowledged.values()) == set(by_id), note
        assert len(set(self.acknowledged.values())) == len(self.wanted), note
        starts = Counter(self.lines.read_text().split("\n")[:-1]) if self.lines.exists() else Counter()
        assert [line for line, count in starts.items() if count > 1] == [], f"{note}: run twice"
        for request_id, job_id in self.acknowledged.items():
            job = by_id[job_id]
            assert job.state in FINAL, f"{note}: {job}"
            assert not any(attempt.lost for attempt in job.attempts), f"{note}: {job}"
            ran = {f"{job_id} {a.number}" for a in job.attempts if a.HasField("started_at")}
            # An attempt that was stopped before its shell came to write left no line.
            silent = {f"{job_id} {a.number}" for a in job.attempts if a.HasField("signalled_at")}
            told = {line for line in starts if line.split()[0] == job_id}
            assert ran - silent <= told <= ran, f"{note}: {job}"
            self._check_end(job, self.codes[request_id], note)

    def _check_end(self, job: job_pb2.Job, code: int, note: str) -> None:
        if job.state == CANCELLED:
            assert job.id in self.cancelled, f"{note}: {job}"
        else:
            assert job.exit_code == code, f"{note}: {job}"
            assert job.state == (FAILED if code else SUCCEEDED), f"{note}: {job}"
