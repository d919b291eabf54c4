"""A real daemon under test, in a directory of its own: start, kill, look, and leave nothing behind."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from measure import MS_PER_S, CpuTime, DidNotWork, Figure, cost, cpu_time

from scheduler.v1 import (
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    node_pb2,
    node_service_pb2,
    node_service_pb2_grpc,
)

WATTSHIFT = Path(sys.executable).with_name("wattshift")
GPUS = 8
WAIT_S = 30.0
CALL_S_MAX = 60.0
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
FINAL = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
_POLL_S = 0.002
_CHANNEL_OPTIONS = (
    # gRPC's own first pause after a failed connect is a second, which would be measured as ours.
    ("grpc.initial_reconnect_backoff_ms", 10),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A node that comes back at the same address must be met on a connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Process:
    """One of the node's own processes."""

    role: str  # daemon, launcher, supervisor
    pid: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What a node has used since it began."""

    cpu: dict[str, CpuTime]  # by role; the launcher's includes all that it has waited for
    work: dict[str, tuple[float, float]]  # count and seconds, by part of the loop

    def per_operation(self, before: "Spent", operations: int) -> Figure:
        """What each of so many operations has cost since `before`."""
        figure: Figure = {
            role: cost(spent.since(before.cpu[role]), operations) for role, spent in self.cpu.items()
        }
        for name, (count, total_s) in self.work.items():
            times = count - before.work[name][0]
            figure[f"{name}s"] = round(times / operations, 3)
            figure[f"{name}_ms_mean"] = round(MS_PER_S * (total_s - before.work[name][1]) / max(times, 1), 3)
        return figure


class Node:
    """A daemon on eight simulated GPUs with real processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.address = f"unix://{directory / 'sock'}"
        self.daemon: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        directory.mkdir()

    # Life -------------------------------------------------------------------------------------

    def start(self) -> float:
        """Start the daemon; returns the seconds until GetNode answered."""
        begun = time.perf_counter()
        with (self.directory / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen(
                [
                    WATTSHIFT, "serve", "--simulate", f"{GPUS}xH100", "--state-dir", self.state_dir,
                    "--listen", self.address, "--metrics-listen", "127.0.0.1:0",
                ],
                stdout=subprocess.DEVNULL,
                stderr=log,
            )  # fmt: skip
        until("the daemon listens", self._listens)
        self._channel = grpc.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
        self.jobs: Any = job_service_pb2_grpc.JobServiceStub(self._channel)
        self.node: Any = node_service_pb2_grpc.NodeServiceStub(self._channel)
        self.node.GetNode(node_service_pb2.GetNodeRequest(), wait_for_ready=True, timeout=WAIT_S)
        return time.perf_counter() - begun

    def crash(self) -> None:
        """SIGKILL the daemon."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        self._close_channel()

    def stop(self) -> None:
        """Stop every job, the daemon and its launcher, whatever has happened."""
        if self.daemon is None:
            return
        if self._channel is not None:
            with suppress(grpc.RpcError, DidNotWork):
                self.node.DrainNode(node_service_pb2.DrainNodeRequest(stop_jobs=True), timeout=CALL_S_MAX)
                until("all jobs are stopped", lambda: not self.get_node().live_jobs)
            self._close_channel()
        self.daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.daemon.wait(10)
        self.daemon.kill()
        self.daemon.wait()
        self.daemon = None
        for pid in naming(self.state_dir, ("cmdline",)):  # a launcher that is told so ends its jobs
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _listens(self) -> bool:
        assert self.daemon is not None
        if self.daemon.poll() is not None:
            raise DidNotWork(f"the daemon ended: {(self.directory / 'daemon.log').read_text()[-2000:]}")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.address.removeprefix("unix://"))
            except OSError:
                return False
        return True

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # Looks ------------------------------------------------------------------------------------

    def get(self, job_id: str) -> job_pb2.Job:
        """One job."""
        request = job_service_pb2.GetJobRequest(job_id=job_id)
        found: job_pb2.Job = self.jobs.GetJob(request, timeout=CALL_S_MAX).job
        return found

    def get_node(self) -> node_pb2.Node:
        """The node."""
        found: node_pb2.Node = self.node.GetNode(node_service_pb2.GetNodeRequest(), timeout=CALL_S_MAX).node
        return found

    def listed(self, **which: Any) -> Iterator[job_pb2.Job]:
        """All jobs of a listing, page by page."""
        request = job_service_pb2.ListJobsRequest(page_size=1000, **which)
        while True:
            page = self.jobs.ListJobs(request, timeout=CALL_S_MAX)
            yield from page.jobs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def running(self) -> dict[str, job_pb2.Job]:
        """Running jobs by id."""
        return {job.id: job for job in self.listed(states=[job_pb2.JOB_STATE_RUNNING], active_only=True)}

    def processes(self) -> list[Process]:
        """The daemon, its launcher and the supervisors; not the jobs."""
        assert self.daemon is not None
        launchers = [pid for pid in naming(self.state_dir, ("cmdline",)) if pid != self.daemon.pid]
        parents = {pid: parent(pid) for pid in sorted(launchers)}
        return [Process("daemon", self.daemon.pid)] + [
            Process("supervisor" if above in launchers else "launcher", pid)
            for pid, above in parents.items()
            if above  # else it was about to become a job, and has ended
        ]

    def spent(self) -> Spent:
        """What the node has used until now."""
        return Spent(
            cpu={
                process.role: cpu_time(process.pid)
                for process in self.processes()
                if process.role in ("daemon", "launcher")
            },
            work=self._work(),
        )

    def _work(self) -> dict[str, tuple[float, float]]:
        """The loop's own histograms: count and sum in seconds, by what was timed."""
        bound = re.findall(r"metrics on (http://\S+)", (self.directory / "daemon.log").read_text())
        with urllib.request.urlopen(bound[-1], timeout=CALL_S_MAX) as page:
            text = page.read().decode()
        values = {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}
        return {
            name: (values[f"wattshift_{name}_seconds_count"], values[f"wattshift_{name}_seconds_sum"])
            for name in ("tick", "plan", "journal_append")
        }

    # Deeds ------------------------------------------------------------------------------------

    def submit(self, spec: job_pb2.JobSpec, request_id: str = "") -> job_pb2.Job:
        """Submit one job."""
        request = job_service_pb2.SubmitJobRequest(spec=spec, request_id=request_id)
        accepted: job_pb2.Job = self.jobs.SubmitJob(request, timeout=CALL_S_MAX).job
        return accepted

    def submit_all(self, specs: Iterable[job_pb2.JobSpec]) -> list[str]:
        """Submit jobs in one call; returns their ids."""
        request = job_service_pb2.SubmitJobsRequest(
            jobs=[job_service_pb2.SubmitJobRequest(spec=spec) for spec in specs]
        )
        return list(self.jobs.SubmitJobs(request, timeout=CALL_S_MAX).job_ids)

    def cancel(self, job_id: str) -> None:
        """Cancel a job; returns when that is on disk."""
        self.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=CALL_S_MAX)

    def wait_until_final(self, job_id: str) -> job_pb2.Job:
        """Wait for a job's end."""
        seen: list[job_pb2.Job] = []

        def has_ended() -> bool:
            seen.append(self.get(job_id))
            return seen[-1].state in FINAL

        until(f"{job_id} ends", has_ended)
        return seen[-1]

    def fill(self, line: "StartLine", job_class: str) -> list[str]:
        """Start jobs that stay until every GPU is held; returns the ids of all running jobs."""
        missing = GPUS - len(self.running())
        if missing:
            self.submit_all(job(line.command(f"fill{i}", stay=True), job_class) for i in range(missing))
        until("every GPU is held", lambda: len(self.running()) == GPUS)
        line.clear()
        return list(self.running())


class StartLine:
    """The FIFO on which jobs say when their main began, and the program that does so."""

    def __init__(self, directory: Path) -> None:
        """Make the FIFO and compile the program."""
        self._program = directory / "started"
        self._fifo = directory / "started.fifo"
        source = Path(__file__).with_name("started.c")
        built = subprocess.run(
            ["gcc", "-O1", "-static", "-o", self._program, source],
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise DidNotWork(f"gcc does not compile {source.name}: {built.stderr}")
        os.mkfifo(self._fifo)
        # Open both ways, so that a job that writes never waits for a reader.
        self._fd = os.open(self._fifo, os.O_RDWR | os.O_NONBLOCK)
        self._text = b""

    def command(self, tag: str, *, stay: bool = False) -> list[str]:
        """What a job runs."""
        return [str(self._program), str(self._fifo), tag, *(["stay"] if stay else [])]

    def wait(self, tag: str) -> int:
        """Wait until that job's main has begun; returns when, in CLOCK_MONOTONIC's nanoseconds."""
        deadline_s = time.monotonic() + WAIT_S
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            select.select([self._fd], [], [], remaining_s)
            self._read()
            for line in self._text.splitlines(keepends=True):
                name, _, began_ns = line.decode().partition(" ")
                if name == tag and began_ns.endswith("\n"):
                    self.clear()
                    return int(began_ns)
        raise DidNotWork(f"{tag}'s main began not within {WAIT_S:g} s")

    def clear(self) -> None:
        """Forget what was said."""
        self._read()
        self._text = b""

    def close(self) -> None:
        """Let go of the FIFO."""
        os.close(self._fd)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            self._text += os.read(self._fd, 65536)


def job(command: list[str], job_class: str = "BATCH", gpus: int = 1, **fields: Any) -> job_pb2.JobSpec:
    """A job as a client describes it."""
    spec = job_pb2.JobSpec(command=command, gpus=gpus, **fields)
    setattr(spec, "class", job_pb2.JobClass.Value(f"JOB_CLASS_{job_class}"))
    return spec


def until(what: str, holds: Callable[[], bool]) -> None:
    """Wait for something that must happen soon."""
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > deadline_s:
            raise DidNotWork(f"{what}: not within {WAIT_S:g} s")
        time.sleep(_POLL_S)


def naming(directory: Path, files: tuple[str, ...] = ("cmdline", "environ")) -> list[int]:
    """Processes that name a directory in their command line or environment, without this one."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(OSError):
                text = b"".join((process / name).read_bytes() for name in files)
                if str(directory).encode() in text:
                    found.append(int(process.name))
    return found


def parent(pid: int) -> int:
    """The parent's pid; 0 where the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
