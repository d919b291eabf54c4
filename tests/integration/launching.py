"""A real launcher to test: its client with all that it reported, and what it left on the machine."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from scheduler.effects.job_attempt import NOTICE_AHEAD_S
from scheduler.effects.job_cgroup import CgroupContainment, CgroupsUnusable, own_cgroup
from scheduler.effects.job_files import JobUser
from scheduler.effects.job_spawn import Spawner
from scheduler.effects.launcher import (
    AttemptKey,
    Exited,
    HeldAttempt,
    LauncherHello,
    Report,
    Started,
    StartFailed,
    StartOrder,
    StopOrder,
)
from scheduler.effects.launcher_client import LauncherClient

PATIENCE_S = 20.0  # for what takes milliseconds on a quiet machine
# How long a job ran before it is stopped: what its notice needs is made ready a moment after the start.
RAN_S = (0.0, 5 * NOTICE_AHEAD_S)
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin"}

R = TypeVar("R")


def cgroups_are_writable(directory: Path) -> bool:
    """Say whether a launcher could put jobs into cgroups here; leaves nothing behind."""
    jobs_fd = os.open(directory, os.O_RDONLY)
    try:
        CgroupContainment(jobs_fd, Spawner(JobUser(), jobs_fd, None)).close()
    except CgroupsUnusable:
        return False
    finally:
        os.close(jobs_fd)
    return True


class Bench:
    """One launcher, through its client; every report is kept."""

    def __init__(self, directory: Path, containment: str, **options: object) -> None:
        self.directory = directory
        self.socket_path = directory / "launcher.sock"
        self.jobs_dir = directory / "jobs"
        self.containment = containment
        self.options = options
        self.reports: list[Report] = []
        self._news = asyncio.Event()
        self.client = self.new_client()
        self.hello: LauncherHello | None = None

    def new_client(self) -> LauncherClient:
        return LauncherClient(
            self.socket_path,
            self.jobs_dir,
            containment=self.containment,
            **self.options,  # type: ignore[arg-type]
        )

    async def connect(self) -> LauncherHello:
        self.hello = await self.client.connect(self.take)
        return self.hello

    def take(self, report: Report) -> None:
        self.reports.append(report)
        self._news.set()

    @property
    def pid(self) -> int:
        assert self.hello is not None
        return self.hello.pid

    def start(
        self,
        *command: str,
        job: str = "job-1",
        attempt: int = 1,
        environment: dict[str, str] | None = None,
        working_directory: str = "",
        stop_command: tuple[str, ...] = (),
    ) -> AttemptKey:
        key = AttemptKey(job, attempt)
        order = StartOrder(key, command, environment or ENVIRONMENT, working_directory, stop_command)
        self.client.start(order)
        return key

    def prepare(self, *command: str) -> AttemptKey:
        key = AttemptKey("job-1", 1)
        self.client.prepare(StartOrder(key, command, ENVIRONMENT, "", ()))
        return key

    def stop(self, key: AttemptKey, grace_s: float, **notice: str | float) -> None:
        self.client.stop(StopOrder(key, time.time() + grace_s, notice))

    def of(self, key: AttemptKey, kind: type[R]) -> list[R]:
        return [report for report in self.reports if isinstance(report, kind) and report.key == key]  # type: ignore[attr-defined]

    async def report(self, key: AttemptKey, kind: type[R]) -> R:
        """The attempt's first report of that kind, now or when it comes."""
        await self.until(lambda: bool(self.of(key, kind)), f"{kind.__name__} of {key}")
        return self.of(key, kind)[0]

    async def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for reports until it is so."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not is_so():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"no {what} within {PATIENCE_S} s; last: {self.reports[-8:]}") from None

    async def run(
        self, *command: str, job: str = "job-1", **options: object
    ) -> tuple[int | None, int | None]:
        """Start, wait, forget; the exit code and signal."""
        key = self.start(*command, job=job, **options)  # type: ignore[arg-type]
        await self.until(lambda: bool(self.of(key, Exited) or self.of(key, StartFailed)), f"end of {key}")
        exited = await self.report(key, Exited)
        self.client.forget(key)
        return exited.exit_code, exited.signal

    async def started(self, key: AttemptKey) -> Started:
        return await self.report(key, Started)

    def output(self, key: AttemptKey) -> str:
        path = self.attempt_dir(key) / "output.log"
        return path.read_text() if path.exists() else ""

    def attempt_dir(self, key: AttemptKey) -> Path:
        return self.jobs_dir / key.job_id / str(key.attempt)

    def checkpoint_dir(self, key: AttemptKey) -> Path:
        return self.jobs_dir / key.job_id / "checkpoint"

    async def wrote(self, key: AttemptKey, text: str) -> None:
        """Wait until the job's output holds this."""
        await eventually(lambda: text in self.output(key), f"{text!r} in the output of {key}")


async def eventually(is_so: Callable[[], bool], what: str) -> None:
    """Wait, by looking, for what nobody reports."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"no {what} within {PATIENCE_S} s"
        await asyncio.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Say whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def processes_mentioning(text: str) -> list[int]:
    """The processes with this text in their arguments or environment."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            known = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
            if text.encode() in known and is_alive(int(directory.name)):
                found.append(int(directory.name))
    return found


@contextlib.asynccontextmanager
async def a_launcher(directory: Path, containment: str, **options: object) -> AsyncIterator[Bench]:
    """A connected launcher; afterwards neither it nor anything that it started is there any more."""
    directory.mkdir(parents=True, exist_ok=True)
    bench = Bench(directory, containment, **options)
    try:
        await bench.connect()
        yield bench
    finally:
        await end(bench)


async def end(bench: Bench) -> None:
    """Have the launcher kill its jobs and end, and prove that nothing is left."""
    await bench.client.close()
    # A test may have killed its launcher and left cgroups: a new one clears them.
    last = bench.new_client()
    said = await last.connect(lambda report: None)
    for held in said.attempts:
        last.end_grace(held.key)
    pid = said.pid
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    await eventually(lambda: not is_alive(pid), "end of the launcher")
    await last.close()
    assert processes_mentioning(str(bench.directory)) == []
    if said.containment == "cgroup":
        status = bench.jobs_dir.stat()
        assert not Path(own_cgroup(), f"wattshift-{status.st_dev:x}-{status.st_ino:x}").exists()


def kinds(held: HeldAttempt) -> list[str]:
    """What a held attempt's reports are called."""
    return [type(report).__name__ for report in held.reports]
