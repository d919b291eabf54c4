"""The real daemon under test: simulated GPUs, real processes, a directory of its own, nothing left behind.

Waits are polls with a bound (`until`), so that a busy machine makes a test slow, never wrong.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from scheduler.effects.journal_verify import verify
from scheduler.v1 import (
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    node_pb2,
    node_service_pb2,
    node_service_pb2_grpc,
    power_pb2,
    power_report_pb2,
    power_service_pb2,
    power_service_pb2_grpc,
    reason_pb2,
    usage_service_pb2_grpc,
)

WATTSHIFT = Path(sys.executable).with_name("wattshift")
WAIT_S = 20.0
CALL_S = 10.0
POLL_S = 0.01
# Itself, the small copy that forks for it, and what that has forked ahead; a supervisor that is left in each
# test would soon be more.
LAUNCHERS_MAX = 5
CGROUPS = Path("/sys/fs/cgroup")

PENDING = job_pb2.JOB_STATE_PENDING
STARTING = job_pb2.JOB_STATE_STARTING
RUNNING = job_pb2.JOB_STATE_RUNNING
PREEMPTING = job_pb2.JOB_STATE_PREEMPTING
STOPPING = job_pb2.JOB_STATE_STOPPING
SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED
FAILED = job_pb2.JOB_STATE_FAILED
CANCELLED = job_pb2.JOB_STATE_CANCELLED
FINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})

_T = TypeVar("_T")


class NotSeen(AssertionError):
    """Something that should have happened did not, within the bound."""


def until(what: str, holds: Callable[[], _T], timeout_s: float = WAIT_S) -> _T:
    """Wait until `holds()` is true; returns what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        if time.monotonic() > deadline:
            raise NotSeen(f"{what} (waited {timeout_s:g} s)")
        time.sleep(POLL_S)
    return found


def spec(*command: str, script: str = "", job_class: str = "batch", **fields: Any) -> job_pb2.JobSpec:
    """A job: a command, or a shell script."""
    words = list(command) or ["/bin/sh", "-c", script]
    message = job_pb2.JobSpec(command=words, **fields)
    setattr(message, "class", job_pb2.JobClass.Value(f"JOB_CLASS_{job_class.upper()}"))
    return message


def reason_of(message: Any) -> str:
    """The reason of a job, an attempt's end or a GPU, in one word."""
    return word(message.reason)


def word(reason: int) -> str:
    """A reason in one word."""
    return reason_pb2.Reason.Name(reason).removeprefix("REASON_")


class Daemon:
    """One daemon, its launcher and its jobs; a context that leaves nothing behind.

    Without `gpus` it reads them through NVML, as far as its `environment` has one.
    """

    def __init__(self, *, gpus: str = "4xH100", config: str = "", directory: Path | None = None) -> None:
        # Unix sockets have short paths, and pytest's directories long ones.
        self.directory = directory or Path(tempfile.mkdtemp(prefix="ws-"))
        self.gpus = gpus
        self.state = self.directory / "state"
        self.address = f"unix://{self.directory / 'd.sock'}"
        self.log_path = self.directory / "daemon.log"
        self.config = self.directory / "wattshift.toml"
        self.config.write_text(config)
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = dict(os.environ)
        self.channel: grpc.Channel | None = None

    # Life -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close(check=kind is None)
        finally:
            self._sweep()

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process and wait for nothing."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    WATTSHIFT, "serve", *(("--simulate", self.gpus) if self.gpus else ()),
                    "--config", self.config, "--state-dir", self.state, "--listen", self.address,
                    "--metrics-listen", "127.0.0.1:0",
                ],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        return self.process

    def start(self) -> Self:
        """Start it and wait until it answers."""
        self.spawn()
        self.connect()
        self.await_answer()
        return self

    def await_answer(self) -> None:
        """Wait until it answers."""
        until("the daemon answers", self._answers)

    def connect(self) -> None:
        """Open a channel of our own, without the back-off of an old one."""
        if self.channel is not None:
            self.channel.close()
        self.channel = self.open_channel()
        self.jobs = job_service_pb2_grpc.JobServiceStub(self.channel)
        self.node = node_service_pb2_grpc.NodeServiceStub(self.channel)
        self.power = power_service_pb2_grpc.PowerServiceStub(self.channel)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(self.channel)

    def open_channel(self, *options: tuple[str, int]) -> grpc.Channel:
        """A further connection to this daemon; the caller closes it."""
        quick = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100))
        return grpc.insecure_channel(self.address, options=(*quick, *options))

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise NotSeen(f"the daemon ended with {self.process.returncode}:\n{self.log()}")
        try:
            self.node.GetNode(node_service_pb2.GetNodeRequest(), timeout=1)
        except grpc.RpcError:
            return False
        return True

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(WAIT_S)

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(WAIT_S)

    def restart(self) -> None:
        """kill -9, then start again."""
        self.kill()
        self.start()

    @property
    def is_up(self) -> bool:
        """Whether the daemon's process runs."""
        return self.process is not None and self.process.poll() is None

    # Jobs -------------------------------------------------------------------------------------

    def submit(self, *command: str, request_id: str = "", **fields: Any) -> job_pb2.Job:
        """Submit a job made by `spec`."""
        return self.submit_spec(spec(*command, **fields), request_id)

    def submit_spec(self, wanted: job_pb2.JobSpec, request_id: str = "") -> job_pb2.Job:
        """Submit a job; returns it as the daemon answered, planned already."""
        request = job_service_pb2.SubmitJobRequest(spec=wanted, request_id=request_id)
        return self.jobs.SubmitJob(request, timeout=CALL_S).job

    def get(self, job_id: str) -> job_pb2.Job:
        """The job now."""
        return self.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=CALL_S).job

    def get_node(self) -> node_pb2.Node:
        """The node now."""
        return self.node.GetNode(node_service_pb2.GetNodeRequest(), timeout=CALL_S).node

    def preview(self, wanted: job_pb2.JobSpec) -> job_service_pb2.PreviewJobResponse:
        """What would happen to such a job."""
        return self.jobs.PreviewJob(job_service_pb2.PreviewJobRequest(spec=wanted), timeout=CALL_S)

    def get_power(self) -> power_pb2.Power:
        """The node's power now."""
        return self.power.GetPower(power_service_pb2.GetPowerRequest(), timeout=CALL_S).power

    def set_budget(self, budget_w: float | None, valid_for_s: float = 0.0) -> power_pb2.Power:
        """Set what the site may draw; None: nothing from here any more."""
        intervals = [] if budget_w is None else [power_pb2.BudgetInterval(budget_w=budget_w)]
        request = power_service_pb2.SetPowerBudgetRequest(intervals=intervals, valid_for_s=valid_for_s)
        return self.power.SetPowerBudget(request, timeout=CALL_S).power

    def offer_event(
        self, event_id: str, budget_w: float, until_s: float, *, start_s: float = 0.0, emergency: bool = False
    ) -> power_pb2.GridEvent:
        """Offer a grid event; times are seconds from now."""
        event = power_pb2.GridEvent(id=event_id, budget_w=budget_w, emergency=emergency)
        if start_s:
            event.start.FromMicroseconds(round((time.time() + start_s) * 1e6))
        event.end.FromMicroseconds(round((time.time() + until_s) * 1e6))
        request = power_service_pb2.SubmitGridEventRequest(event=event)
        return self.power.SubmitGridEvent(request, timeout=CALL_S).event

    def cancel_event(self, event_id: str) -> power_pb2.GridEvent:
        """End a grid event."""
        request = power_service_pb2.CancelGridEventRequest(event_id=event_id)
        return self.power.CancelGridEvent(request, timeout=CALL_S).event

    def release(self) -> node_pb2.Node:
        """Let go of every GPU."""
        return self.node.ReleaseNode(node_service_pb2.ReleaseNodeRequest(), timeout=CALL_S).node

    def grid_event(self, event_id: str) -> power_pb2.GridEvent:
        """A grid event as it is now, over or not."""
        request = power_service_pb2.ListGridEventsRequest(all=True)
        events = self.power.ListGridEvents(request, timeout=CALL_S).events
        return next(event for event in events if event.id == event_id)

    def report(self, event_id: str) -> power_report_pb2.GridEventReport:
        """What became of a grid event."""
        request = power_service_pb2.GetGridEventReportRequest(event_id=event_id)
        return self.power.GetGridEventReport(request, timeout=CALL_S).report

    def cancel(self, job_id: str) -> job_pb2.Job:
        """Cancel a job."""
        return self.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=CALL_S).job

    def requeue(self, job_id: str) -> job_pb2.Job:
        """Requeue a job."""
        return self.jobs.RequeueJob(job_service_pb2.RequeueJobRequest(job_id=job_id), timeout=CALL_S).job

    def acknowledge(self, job_id: str) -> job_pb2.Job:
        """Say for a job that it is ready to be stopped."""
        request = job_service_pb2.AcknowledgePreemptionRequest(job_id=job_id)
        return self.jobs.AcknowledgePreemption(request, timeout=CALL_S).job

    def all_jobs(self, **filters: Any) -> list[job_pb2.Job]:
        """All jobs that match, over all pages, newest first."""
        found: list[job_pb2.Job] = []
        token = ""
        while True:
            request = job_service_pb2.ListJobsRequest(page_size=1000, page_token=token, **filters)
            page = self.jobs.ListJobs(request, timeout=CALL_S)
            found += page.jobs
            token = page.next_page_token
            if not token:
                return found

    def running(self, name: str = "") -> list[job_pb2.Job]:
        """The jobs that run."""
        return self.all_jobs(states=[RUNNING], name=name)

    def wait(self, job_id: str, *states: int, timeout_s: float = WAIT_S) -> job_pb2.Job:
        """Wait until the job is in one of these states (none given: final)."""
        wanted = frozenset(states) or FINAL
        names = "/".join(job_pb2.JobState.Name(state).removeprefix("JOB_STATE_") for state in sorted(wanted))
        seen = [self.get(job_id)]

        def arrived() -> bool:
            seen[0] = self.get(job_id)
            return seen[0].state in wanted

        try:
            until(f"{job_id} is {names}", arrived, timeout_s)
        except NotSeen as error:
            raise NotSeen(f"{error}; it is:\n{seen[0]}\n{self.story()}") from None
        return seen[0]

    def wait_attempt(self, job_id: str, number: int, state: int = RUNNING) -> job_pb2.Job:
        """Wait until the job is in this state in this attempt."""

        def arrived() -> job_pb2.Job | None:
            job = self.get(job_id)
            return job if (job.attempt, job.state) == (number, state) else None

        found = until(f"attempt {number} of {job_id} is in state {state}", arrived)
        assert found is not None
        return found

    def run(self, *command: str, **fields: Any) -> job_pb2.Job:
        """Submit a job and wait until it runs."""
        return self.wait(self.submit(*command, **fields).id, RUNNING)

    def run_ready(self, script: str, **fields: Any) -> job_pb2.Job:
        """Submit a script and wait until it has written something: its traps are set."""
        job = self.run(script=script, **fields)
        until(f"{job.id} says that it is ready", lambda: self.output(job.id))
        return job

    def finish(self, *command: str, **fields: Any) -> job_pb2.Job:
        """Submit a job and wait until it is final."""
        return self.wait(self.submit(*command, **fields).id)

    def output(self, job_id: str, attempt: int = 0, **fields: Any) -> str:
        """What an attempt wrote."""
        request = job_service_pb2.ReadLogsRequest(job_id=job_id, attempt=attempt, **fields)
        return b"".join(piece.data for piece in self.jobs.ReadLogs(request, timeout=WAIT_S)).decode()

    def files(self, job_id: str, attempt: int = 1) -> Path:
        """The directory of an attempt."""
        return self.state / "jobs" / job_id / str(attempt)

    # Looks ------------------------------------------------------------------------------------

    def log(self) -> str:
        """The daemon's log."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def metrics(self, path: str = "/metrics") -> str:
        """A page of the metrics listener."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=CALL_S) as page:
            return str(page.read().decode())

    @property
    def metrics_port(self) -> int:
        """The port that the daemon took."""
        lines = [line for line in self.log().splitlines() if "metrics on http://" in line]
        return int(lines[-1].rpartition("/metrics")[0].rpartition(":")[2])

    def story(self) -> str:
        """The GPUs, the last events and the log's end, for a person who looks for what went wrong."""
        gpus = [
            f"GPU {gpu.index}: {word(gpu.reason)} {gpu.detail} {gpu.job_ids}" for gpu in self.get_node().gpus
        ]
        events = [f"{body.pop('at_s'):.3f} {kind} {body}" for kind, body in self.events()]
        return "\n".join((*gpus, *events, "The daemon's log:", *self.log().splitlines()[-40:]))

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the journal, read beside the daemon."""
        with contextlib.closing(sqlite3.connect(f"file:{self.state}/journal.sqlite?mode=ro", uri=True)) as db:
            return db.execute(sql, values).fetchall()

    def events(self, *kinds: str) -> list[tuple[str, dict[str, Any]]]:
        """The journal's events, of these kinds or all."""
        rows = self.query("SELECT kind, body FROM events ORDER BY seq")
        return [(kind, json.loads(body)) for kind, body in rows if not kinds or kind in kinds]

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command against this daemon."""
        return subprocess.run(
            [WATTSHIFT, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "WATTSHIFT_ADDRESS": self.address},
            timeout=WAIT_S,
        )

    def verify(self) -> subprocess.CompletedProcess[str]:
        """`wattshift journal verify`."""
        return self.cli("journal", "verify", "--state-dir", str(self.state))

    def processes(self) -> dict[int, str]:
        """Every process that names this directory in its arguments or environment, but not the daemon."""
        mark = str(self.directory).encode()
        own = {os.getpid(), self.process.pid if self.process is not None else 0}
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in own:
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if mark in words or mark in (entry / "environ").read_bytes():
                    found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def job_processes(self) -> set[int]:
        """Processes of jobs, and of other daemons in this directory."""
        return {pid for pid, words in self.processes().items() if "launcher_process" not in words}

    def nvml_child(self) -> int:
        """The process that reads the GPUs; 0 where there is none at the moment."""
        assert self.process is not None
        own = self.process.pid
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split():
                if b"nvml_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        return 0

    def launchers(self) -> list[int]:
        """Processes of the launcher: itself, and supervisors where there are no cgroups."""
        return [pid for pid, words in self.processes().items() if "launcher_process" in words]

    def cgroups(self) -> list[Path]:
        """The cgroups of this daemon's jobs, the launcher's own base among them."""
        try:
            status = (self.state / "jobs").stat()
        except OSError:
            return []
        name = f"wattshift-{status.st_dev:x}-{status.st_ino:x}"
        # Not by glob: others' cgroups come and go while we look.
        return [Path(path) for path, _, _ in os.walk(CGROUPS) if name in Path(path).parts]

    def reboot(self) -> None:
        """End the daemon, its launcher and every job; the next start is under another boot."""
        self.kill()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until("nothing runs any more", lambda: not self.processes())
        self.change_boot_id()

    def change_boot_id(self) -> None:
        """Let the last start have been under another boot; while no daemon runs."""
        with contextlib.closing(sqlite3.connect(self.state / "journal.sqlite")) as db, db:
            (text,) = db.execute("SELECT value FROM meta WHERE key = 'node'").fetchone()
            node = {**json.loads(text), "boot_id": "00000000-0000-0000-0000-000000000000"}
            db.execute("UPDATE meta SET value = ? WHERE key = 'node'", (json.dumps(node).encode(),))

    # The end ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """After a test: end its jobs, undo what it did to the node, check that nothing of it is left."""
        if not self.is_up:
            self.start()
        self.node.UndrainNode(node_service_pb2.UndrainNodeRequest(), timeout=CALL_S)
        for gpu in self.get_node().gpus:
            if gpu.state in (node_pb2.GPU_STATE_CORDONED, node_pb2.GPU_STATE_QUARANTINED):
                self.node.UncordonGpu(node_service_pb2.UncordonGpuRequest(gpu=gpu.uuid), timeout=CALL_S)
        self.cancel_all()
        if not self.all_jobs(active_only=True):
            until("no process is left but the launcher's", lambda: not self.job_processes())
            until("no supervisor is left", lambda: len(self.launchers()) <= LAUNCHERS_MAX)
        self.check_chain()

    def cancel_all(self) -> None:
        """End every job that no configuration keeps alive, without its grace."""
        until("every job of the test is final", lambda: not self._hurry())

    def _hurry(self) -> list[job_pb2.Job]:
        left = [job for job in self.all_jobs(active_only=True) if not job.standing_job]
        for job in left:
            with contextlib.suppress(grpc.RpcError):  # it may end in between
                if job.state in (PREEMPTING, STOPPING):
                    self.acknowledge(job.id)
                if job.state != STOPPING:
                    self.cancel(job.id)
        return left

    def check_chain(self) -> None:
        """The journal's chain is whole."""
        verified = verify(self.state)
        assert verified.ok, verified.problem

    def close(self, *, check: bool = True) -> None:
        """Drain, stop, and check that nothing is left."""
        if not self.is_up and check and (self.state / "journal.sqlite").exists() and self.launchers():
            self.start()
        if self.is_up:
            self.connect()
            with contextlib.suppress(grpc.RpcError):
                self.node.DrainNode(node_service_pb2.DrainNodeRequest(stop_jobs=True), timeout=CALL_S)
                until("all jobs have stopped", self._is_empty, WAIT_S if check else 3.0)
            self.terminate()
        if self.channel is not None:
            self.channel.close()
        for pid in self.launchers():  # it would end by itself in two seconds
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if check:
            until("no process is left", lambda: not self.processes())
            until("no cgroup is left", lambda: not self.cgroups())
            if (self.state / "journal.sqlite").exists():
                self.check_chain()

    def _is_empty(self) -> bool:
        for job in self.all_jobs(states=[PREEMPTING, STOPPING]):
            with contextlib.suppress(grpc.RpcError):
                self.acknowledge(job.id)
        return not self.get_node().live_jobs

    def _sweep(self) -> None:
        """Whatever the test broke: no process survives it, and the directory goes."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        deadline = time.monotonic() + 5.0
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        for group in sorted(self.cgroups(), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def logged(daemon: Daemon) -> Iterator[None]:
    """Show the daemon's log where the block fails."""
    try:
        yield
    except BaseException as error:
        error.add_note("The daemon's log:\n" + "\n".join(daemon.log().splitlines()[-60:]))
        raise
