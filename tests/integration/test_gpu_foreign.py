"""A real daemon on the fake driver: processes that it did not start, and what is done about them."""

import contextlib
import getpass
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.nvml.fake import GIB, FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import PENDING, RUNNING, Daemon, reason_of, until
from tests.harness.fixtures import Make
from tests.integration.test_gpu_handover import (
    EMPTY,
    FREE,
    QUARANTINED,
    SLEEPS,
    gpus,
    hold,
    looked_again,
    pid_of,
    served,
)

pytestmark = needs_gcc

FOREIGN = "FOREIGN_PROCESS"
USER = getpass.getuser()


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path)


@contextlib.contextmanager
def stranger(folder: Path, name: str = "notebook", script: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of that name, which Wattshift knows nothing of."""
    path = folder / name
    shutil.copy(shutil.which("bash") if script else shutil.which("cat"), path)  # type: ignore[arg-type]
    command = [path, "-c", f"{script}\nread"] if script else [path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if script:  # its traps are set
        assert process.stdout
        assert process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def rule(action: str, **whose: str) -> str:
    lines = [f'{key} = "{value}"' for key, value in whose.items()]
    return "\n".join(("[[foreign.rules]]", *lines, f'action = "{action}"', ""))


def is_foreign(daemon: Daemon) -> bool:
    return reason_of(gpus(daemon)[0]) == FOREIGN


def foreign_processes(daemon: Daemon) -> str:
    line = next(
        line for line in daemon.metrics().splitlines() if line.startswith("wattshift_gpu_foreign_processes{")
    )
    return line.rpartition(" ")[2]


def test_a_stranger_protects_its_gpu_and_is_named_wherever_one_looks(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    daemon = served(make_daemon, fake)
    assert foreign_processes(daemon) == "0.0"
    with stranger(tmp_path) as process:
        hold(fake, (process.pid, 2 * GIB))
        until("it is seen", lambda: is_foreign(daemon))
        named = f"pid {process.pid} ({USER}, notebook, 2048 MiB)"
        gpu = gpus(daemon)[0]
        assert gpu.detail == named
        assert [(p.pid, p.user, p.command, p.memory_mib) for p in gpu.processes] == [
            (process.pid, USER, "notebook", 2048)
        ]
        assert named in daemon.cli("gpus").stdout
        waits = daemon.submit("true", gpus=1)
        assert daemon.get(waits.id).state == PENDING
        assert f"GPU 0 is foreign ({named})" in daemon.cli("explain", waits.id).stdout
        assert f"GPU 0 is foreign ({named})" in daemon.cli("preview", "-c", "batch", "true").stdout
        assert foreign_processes(daemon) == "1.0"
    hold(fake)
    daemon.wait(waits.id)
    assert foreign_processes(daemon) == "0.0"


def test_what_a_stranger_leaves_behind_must_be_gone_too(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    daemon = served(make_daemon, fake)
    with stranger(tmp_path) as process:
        hold(fake, (process.pid, 30 * GIB))
        until("it is seen", lambda: is_foreign(daemon))
    hold(fake, used=EMPTY + 30 * GIB)
    waits = daemon.submit("true", gpus=1)
    looked_again(fake)
    assert daemon.get(waits.id).state == PENDING
    hold(fake)
    daemon.wait(waits.id)


def test_a_stranger_on_a_gpu_when_the_daemon_starts_is_foreign_at_once(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    with stranger(tmp_path) as process:
        hold(fake, (process.pid, 2 * GIB))
        daemon = make_daemon(gpus="", config=f'[jobs]\nuser = "{USER}"\n')
        daemon.environment = fake.environment()
        daemon.start()
        until("it is seen", lambda: is_foreign(daemon))


@pytest.mark.parametrize("whose", [{"user": USER}, {"command": "notebook"}])
def test_who_is_ignored_by_a_rule_keeps_nobody_out(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path, whose: dict[str, str]
) -> None:
    daemon = served(make_daemon, fake, more=rule("ignore", **whose))
    with stranger(tmp_path) as process:
        hold(fake, (process.pid, 2 * GIB))
        looked_again(fake)
        job = daemon.run_ready(SLEEPS, gpus=1)
        hold(fake, (process.pid, 2 * GIB), (pid_of(job), GIB))
        daemon.cancel(job.id)
        hold(fake, (process.pid, 3 * GIB))  # it may grow
        until("it is free", lambda: gpus(daemon)[0].state == FREE)


def test_who_is_sent_away_is_asked_first_and_then_made_to_go(make_daemon: Make, tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2)  # a clean look at the other one must not start it over
    daemon = served(make_daemon, fake, more=rule("evict", command="notebook"))
    with stranger(tmp_path, script="trap '' TERM; echo trapped") as stubborn:
        hold(fake, (stubborn.pid, 2 * GIB))
        until("it is ended", lambda: stubborn.poll() is not None)
        assert stubborn.returncode == -signal.SIGKILL
    hold(fake)
    until("it is free", lambda: gpus(daemon)[0].state == FREE)
    with stranger(tmp_path) as meek:
        hold(fake, (meek.pid, 2 * GIB))
        until("it is ended", lambda: meek.poll() is not None)
        assert meek.returncode == -signal.SIGTERM


def test_who_is_sent_away_is_so_while_a_hand_over_runs(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    daemon = served(make_daemon, fake, more=rule("evict", user=USER, command="notebook"))
    job = daemon.run_ready(SLEEPS, gpus=1)
    with stranger(tmp_path) as process:
        daemon.cancel(job.id)
        hold(fake, (process.pid, 2 * GIB))
        until("it is ended", lambda: process.poll() is not None)
    hold(fake)
    until("it is free", lambda: gpus(daemon)[0].state == FREE)


def test_a_stranger_of_before_does_not_hold_up_what_a_job_left(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    daemon = served(make_daemon, fake)
    job = daemon.run_ready(SLEEPS, gpus=1)
    with stranger(tmp_path) as process:
        hold(fake, (pid_of(job), GIB), (process.pid, 2 * GIB))
        until("it is seen", lambda: len(gpus(daemon)[0].processes) == 1)
        daemon.cancel(job.id)
        hold(fake, (process.pid, 2 * GIB))
        until("the job's end is proved", lambda: daemon.get(job.id).attempts[0].HasField("verified_at"))
        assert is_foreign(daemon)
        assert gpus(daemon)[0].state != QUARANTINED
    hold(fake)
    until("it is free", lambda: gpus(daemon)[0].state == FREE)


def test_a_share_beside_a_stranger_goes_on_and_nobody_joins_them(
    make_daemon: Make, fake: FakeNvml, tmp_path: Path
) -> None:
    daemon = served(make_daemon, fake)
    share = {"gpus": 1, "gpu_share_milli": 250}
    stays = daemon.run_ready(SLEEPS, **share)
    with stranger(tmp_path) as process:
        hold(fake, (pid_of(stays), GIB), (process.pid, 2 * GIB))
        until("it is seen", lambda: len(gpus(daemon)[0].processes) == 1)
        waits = daemon.submit(script=SLEEPS, **share)
        looked_again(fake)
        assert (daemon.get(stays.id).state, daemon.get(waits.id).state) == (RUNNING, PENDING)
    hold(fake, (pid_of(stays), GIB))
    daemon.wait(waits.id, RUNNING)
