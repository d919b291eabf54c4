"""Daemons and launchers die, come twice, speak nonsense: jobs and exit codes survive what they can."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.effects import launcher_wire
from scheduler.effects.launcher import (
    AttemptKey,
    CheckpointSaved,
    Exited,
    LauncherGone,
    Report,
    Signalled,
    Started,
)
from scheduler.effects.launcher_client import LauncherClient
from scheduler.errors import LauncherError
from tests.integration.launching import (
    ENVIRONMENT,
    PATIENCE_S,
    Bench,
    a_launcher,
    cgroups_are_writable,
    eventually,
    is_alive,
    kinds,
)

LAUNCHER = Path(launcher_wire.__file__).with_name("launcher_process.py")
# A daemon that starts a job and does not live to see it end.
DAEMON = """
import asyncio, sys
from pathlib import Path
from scheduler.effects.launcher import AttemptKey, Started, StartOrder
from scheduler.effects.launcher_client import LauncherClient

async def main():
    state, containment, *command = sys.argv[1:]
    started = asyncio.Event()
    client = LauncherClient(Path(state, "launcher.sock"), Path(state, "jobs"), containment=containment)
    await client.connect(lambda report: isinstance(report, Started) and started.set())
    client.start(StartOrder(AttemptKey("job-1", 1), tuple(command), {"PATH": "/usr/bin:/bin"}, "", ()))
    await started.wait()
    print("started", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
DETACHES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("grandchild", os.getpid(), flush=True)
        os.execve(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(1000)"], {})
    os._exit(0)
os.wait()
time.sleep(1000)
"""


@contextlib.contextmanager
def a_daemon(bench: Bench, *command: str) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-c", DAEMON, str(bench.directory), bench.containment, *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "started\n"
        yield daemon
        daemon.kill()


# The daemon dies ---------------------------------------------------------------------------------


async def test_a_job_outlives_a_killed_daemon_and_the_next_one_hears_its_exit(
    bench: Bench, tmp_path: Path
) -> None:
    await bench.client.close()
    end = tmp_path / "end"
    os.mkfifo(end)
    with a_daemon(bench, "sh", "-c", f"read line < {end}; exit 9") as daemon:
        daemon.kill()
    with end.open("w") as fifo:
        fifo.write("now\n")
    key = AttemptKey("job-1", 1)
    hello = await bench.connect()
    if [kinds(held) for held in hello.attempts] != [["Started", "Exited"]]:
        assert [kinds(held) for held in hello.attempts] == [["Started"]]
        assert (await bench.report(key, Exited)).exit_code == 9
    else:
        exited = hello.attempts[0].reports[1]
        assert isinstance(exited, Exited)
        assert exited.exit_code == 9
    bench.client.forget(key)


async def test_the_hello_holds_every_report_until_the_attempt_is_forgotten(bench: Bench) -> None:
    key = bench.start(
        "sh", "-c", "touch $WATTSHIFT_CHECKPOINT_DIR/checkpoint; read line < /dev/null; sleep 1000"
    )
    await bench.report(key, CheckpointSaved)
    bench.stop(key, grace_s=30.0)
    exited = await bench.report(key, Exited)
    launcher_id = bench.hello.launcher_id if bench.hello else ""
    for _ in range(2):
        await bench.client.close()
        hello = await bench.connect()
        assert hello.launcher_id == launcher_id
        (held,) = hello.attempts
        assert held.key == key
        assert set(kinds(held)) == {"Started", "CheckpointSaved", "Signalled", "Exited"}
        assert held.reports[0] == bench.of(key, Started)[0]
        assert held.reports[-1] == exited
    bench.client.forget(key)
    await bench.client.close()
    assert (await bench.connect()).attempts == ()


async def test_a_deadline_is_kept_without_a_daemon(bench: Bench) -> None:
    key = bench.start("sh", "-c", 'trap "" TERM; echo up; while :; do sleep 1000; done')
    await bench.wrote(key, "up")
    pid = (await bench.started(key)).pid
    bench.stop(key, grace_s=0.4)
    await bench.report(key, Signalled)
    await bench.client.close()
    await eventually(lambda: not is_alive(pid), "SIGKILL")
    hello = await bench.connect()
    assert kinds(hello.attempts[0])[:2] == ["Started", "Signalled"]
    if "Exited" not in kinds(hello.attempts[0]):
        await bench.report(key, Exited)


async def test_a_new_daemon_replaces_the_old_which_is_told_that_its_line_broke(bench: Bench) -> None:
    key = bench.start("sleep", "1000")
    await bench.started(key)
    second = bench.new_client()
    reports: list[Report] = []
    hello = await second.connect(reports.append)
    assert [held.key for held in hello.attempts] == [key]
    await bench.until(lambda: isinstance(bench.reports[-1], LauncherGone), "LauncherGone")
    bench.client.end_grace(key)  # goes nowhere, and harms nothing
    second.end_grace(key)
    await eventually(lambda: any(isinstance(report, Exited) for report in reports), "exit")
    assert [type(report) for report in bench.reports] == [Started, LauncherGone]
    await second.close()


async def test_without_jobs_and_daemon_the_launcher_ends(bench: Bench) -> None:
    assert await bench.run("true") == (0, None)
    pid = bench.pid
    await bench.client.close()
    await eventually(lambda: not is_alive(pid), "end of the launcher")
    hello = await bench.connect()
    assert hello.pid != pid


async def test_a_launcher_whose_socket_is_removed_ends_when_nothing_runs(bench: Bench) -> None:
    key = bench.start("sleep", "1000")
    await bench.started(key)
    over = bench.start("true", job="over")
    await bench.report(over, Exited)
    await bench.client.close()
    bench.socket_path.unlink()
    job_pid = bench.of(key, Started)[0].pid
    assert is_alive(bench.pid)
    os.kill(job_pid, signal.SIGKILL)
    await eventually(lambda: not is_alive(bench.pid), "end of the launcher")


# The launcher dies -------------------------------------------------------------------------------


async def test_a_killed_launcher_takes_all_jobs_along(bench: Bench) -> None:
    key = bench.start(sys.executable, "-c", DETACHES)
    await bench.wrote(key, "grandchild")
    grandchild = int(bench.output(key).split()[1])
    main = (await bench.started(key)).pid
    launcher_pid = bench.pid
    os.kill(launcher_pid, signal.SIGKILL)
    await bench.until(lambda: isinstance(bench.reports[-1], LauncherGone), "LauncherGone")
    await eventually(lambda: not is_alive(main), "end of the main process")
    if bench.containment == "supervisor":
        await eventually(lambda: not is_alive(grandchild), "end of the grandchild")
    hello = await bench.connect()
    assert not is_alive(grandchild)
    assert hello.pid != launcher_pid
    assert hello.attempts == ()
    assert await bench.run("true", job="next") == (0, None)


async def test_a_launcher_killed_with_reports_unread_takes_all_jobs_along(bench: Bench) -> None:
    end = bench.directory / "end"
    os.mkfifo(end)
    leaves = DETACHES.replace("time.sleep(1000)\n", f"open({str(end)!r}).read()\n")
    assert leaves != DETACHES
    key = bench.start(sys.executable, "-c", leaves)
    await bench.wrote(key, "grandchild")
    grandchild = int(bench.output(key).split()[1])
    main = (await bench.started(key)).pid
    os.kill(bench.pid, signal.SIGSTOP)
    await asyncio.to_thread(end.write_text, "go on")
    await eventually(lambda: not is_alive(main), "end of the main process")
    os.kill(bench.pid, signal.SIGKILL)
    await bench.until(lambda: isinstance(bench.reports[-1], LauncherGone), "LauncherGone")
    if bench.containment == "supervisor":
        await eventually(lambda: not is_alive(grandchild), "end of the grandchild")
    await bench.connect()
    assert not is_alive(grandchild)


async def test_sigterm_stops_the_jobs_with_notice_and_ends_the_launcher(bench: Bench) -> None:
    program = 'trap "cat $WATTSHIFT_NOTICE_FILE; exit 5" TERM; echo up; while :; do sleep 0.01; done'
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    os.kill(bench.pid, signal.SIGTERM)
    exited = await bench.report(key, Exited)
    assert exited.exit_code == 5
    assert '"reason": "launcher_stopped"' in bench.output(key)
    await bench.until(lambda: isinstance(bench.reports[-1], LauncherGone), "LauncherGone")


async def test_a_second_sigterm_kills_the_jobs_now(bench: Bench) -> None:
    key = bench.start("sh", "-c", 'trap "" TERM; echo up; while :; do sleep 1000; done')
    await bench.wrote(key, "up")
    os.kill(bench.pid, signal.SIGTERM)
    await bench.report(key, Signalled)
    os.kill(bench.pid, signal.SIGTERM)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGKILL
    await bench.until(lambda: isinstance(bench.reports[-1], LauncherGone), "LauncherGone")


# Two launchers, strange paths, wrong settings ----------------------------------------------------


async def test_a_second_launcher_on_the_same_socket_refuses(bench: Bench) -> None:
    second = await asyncio.create_subprocess_exec(
        sys.executable,
        str(LAUNCHER),
        "--socket",
        str(bench.socket_path),
        "--jobs-dir",
        str(bench.jobs_dir),
        stderr=subprocess.PIPE,
    )
    _, said = await second.communicate()
    assert second.returncode == 1
    assert f"another launcher serves {bench.socket_path}" in said.decode()
    assert await bench.run("true") == (0, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--socket", "s"], "--socket and --jobs-dir are needed"),
        (["--socket"], "--socket has no value"),
        (["--sock", "s"], "--sock is not known"),
        (["--socket", "s", "--jobs-dir", "j", "--log-bytes", "many"], "--log-bytes many: a whole number"),
        (["--socket", "s", "--jobs-dir", "j", "--log-files", "0"], "--log-files 0: a whole number"),
        (["--socket", "s", "--jobs-dir", "j", "--containment", "hope"], "--containment is auto"),
    ],
)
def test_a_wrong_command_line_is_told_in_words(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


async def test_paths_may_be_longer_than_a_sockets_address(tmp_path: Path, containment: str) -> None:
    deep = tmp_path / ("long" * 30) / ("longer" * 20)
    async with a_launcher(deep, containment) as bench:
        assert await bench.run("true") == (0, None)


async def test_the_socket_is_its_users_alone(bench: Bench) -> None:
    assert bench.socket_path.stat().st_mode & 0o777 == 0o600


async def test_a_launcher_of_another_jobs_directory_is_refused(bench: Bench, tmp_path: Path) -> None:
    other = LauncherClient(bench.socket_path, tmp_path / "elsewhere")
    with pytest.raises(LauncherError, match=r"serves .*/state/jobs, not .*/elsewhere"):
        await other.connect(lambda report: None)


async def test_a_launcher_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("not a directory")
    client = LauncherClient(tmp_path / "launcher.sock", tmp_path / "jobs")
    with pytest.raises(LauncherError, match=r"the launcher did not start: .*jobs"):
        await client.connect(lambda report: None)
    await client.close()


async def test_no_launcher_is_started_where_systemd_owns_it(tmp_path: Path) -> None:
    client = LauncherClient(tmp_path / "launcher.sock", tmp_path / "jobs", spawn=False)
    with pytest.raises(LauncherError, match="is its unit running"):
        await client.connect(lambda report: None)


async def test_a_socket_from_systemd_is_served(tmp_path: Path, containment: str) -> None:
    path = tmp_path / "launcher.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # What systemd does: the socket as descriptor 3, and the pid of the process that is to take it.
        starter = (
            "import os, sys\n"
            "os.dup2(int(sys.argv[1]), 3)\n"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
            "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])\n"
        )
        launcher = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            starter,
            str(listener.fileno()),
            str(LAUNCHER),
            "--socket",
            str(path),
            "--jobs-dir",
            str(tmp_path / "jobs"),
            "--containment",
            containment,
            pass_fds=[listener.fileno()],
        )
        client = LauncherClient(path, tmp_path / "jobs", spawn=False)
        reports: list[Report] = []
        hello = await client.connect(reports.append)
        assert hello.pid == launcher.pid
        await client.close()
        assert await asyncio.wait_for(launcher.wait(), PATIENCE_S) == 0
        assert path.is_socket()  # systemd's, not the launcher's to remove


async def test_where_processes_cannot_be_born_in_a_cgroup_they_join_it(tmp_path: Path) -> None:
    if not cgroups_are_writable(tmp_path):
        pytest.skip("no cgroup v2 is writable here")
    # Linux before 5.7, or a container whose filter knows no clone3.
    program = (
        "from scheduler.effects import job_cgroup, launcher_setup\n"
        "job_cgroup._prove = lambda path: False\n"
        "launcher_setup.run()\n"
    )
    options = ["--socket", str(tmp_path / "launcher.sock"), "--jobs-dir", str(tmp_path / "jobs")]
    launcher = await asyncio.create_subprocess_exec(sys.executable, "-c", program, *options)
    await eventually((tmp_path / "launcher.sock").is_socket, "launcher")
    bench = Bench(tmp_path, "auto", spawn=False)
    await bench.connect()
    key = bench.start("sh", "-c", "cat /proc/self/cgroup; setsid sleep 1000 & exit 3")
    assert (await bench.report(key, Exited)).exit_code == 3
    assert f"/{launcher.pid}-" in bench.output(key)
    bench.client.forget(key)
    await bench.client.close()
    assert await asyncio.wait_for(launcher.wait(), PATIENCE_S) == 0


# Nonsense on the line ----------------------------------------------------------------------------


async def talk(path: Path, *lines: bytes) -> list[dict[str, Any]]:
    """Say these lines to the launcher; all that it answers until it hangs up."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    with contextlib.suppress(ConnectionError):
        for line in lines:
            writer.write(line)
            await writer.drain()
        writer.write_eof()
    answers = []
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE_S):
            while line := await reader.readline():
                answers.append(json.loads(line))
    writer.close()
    return answers


HELLO = launcher_wire.encode(launcher_wire.hello())
PREPARE = {
    "order": "prepare",
    "job_id": "bad",
    "attempt": 1,
    "command": ["true"],
    "environment": ENVIRONMENT,
    "working_directory": "",
    "stop_command": [],
}


START = {"order": "start", "job_id": "bad", "attempt": 1}
TOO_MUCH = {"A": "x" * 20_000}


@pytest.mark.parametrize(
    "lines",
    [
        [b"\xff\xfe\x00garbage\n"],
        [b"[]\n"],
        [b"{}\n"],
        [b"[" * 100_000 + b"\n"],
        [b'{"order": "hello", "oldest": 7, "newest": 9}\n'],
        [b"x" * 1000 for _ in range(launcher_wire.LINE_BYTES_MAX // 1000 + 1)],
        [HELLO, b'{"order": "start", "job_id": "never-prepared", "attempt": 1, "environment": {}}\n'],
        [HELLO, launcher_wire.encode(PREPARE), b'{"order": "start", "job_id": "bad", "attempt": 1}\n'],
        [HELLO, launcher_wire.encode(PREPARE), launcher_wire.encode({**START, "environment": TOO_MUCH})],
        [HELLO, b'{"order": "dance", "job_id": "held", "attempt": 1}\n'],
        [HELLO, launcher_wire.encode({**PREPARE, "job_id": "../../etc"})],
        [HELLO, launcher_wire.encode({**PREPARE, "job_id": ".."})],
        [HELLO, launcher_wire.encode({**PREPARE, "job_id": ""})],
        [HELLO, launcher_wire.encode({**PREPARE, "attempt": -1})],
        [HELLO, launcher_wire.encode({**PREPARE, "attempt": True})],
        [HELLO, launcher_wire.encode({**PREPARE, "command": []})],
        [HELLO, launcher_wire.encode({**PREPARE, "command": "true"})],
        [HELLO, launcher_wire.encode({**PREPARE, "environment": {"A": 1}})],
        [HELLO, launcher_wire.encode({**PREPARE, "working_directory": None})],
        [HELLO, b'{"order": "stop", "job_id": "held", "attempt": 1, "deadline_s": "soon", "notice": {}}\n'],
        [HELLO, b'{"order": "stop", "job_id": "held", "attempt": 1, "deadline_s": NaN, "notice": {}}\n'],
    ],
    ids=lambda lines: lines[-1][:40].decode("latin-1").strip(),
)
async def test_nonsense_ends_the_connection_and_nothing_else(tmp_path: Path, lines: list[bytes]) -> None:
    async with a_launcher(tmp_path / "state", "supervisor") as bench:
        key = bench.start("sleep", "1000", job="held")
        pid = (await bench.started(key)).pid
        answers = await talk(bench.socket_path, *lines)
        assert answers[-1]["report"] == "refused"
        assert answers[-1]["message"]
        assert is_alive(pid)
        await bench.client.close()
        hello = await bench.connect()
        assert [held.key for held in hello.attempts] == [key]


async def test_versions_that_do_not_meet_are_a_clear_error(tmp_path: Path) -> None:
    async with a_launcher(tmp_path / "state", "supervisor") as bench:
        (answer,) = await talk(bench.socket_path, b'{"order": "hello", "oldest": 7, "newest": 9}\n')
        assert "the daemon speaks launcher protocol 7 to 9, this launcher 3 to 3" in answer["message"]


async def test_newer_fields_are_ignored_and_a_newer_daemon_is_answered_in_the_old_version(
    tmp_path: Path,
) -> None:
    async with a_launcher(tmp_path / "state", "supervisor") as bench:
        (answer,) = await talk(
            bench.socket_path, b'{"order": "hello", "oldest": 1, "newest": 9, "colour": "blue"}\n'
        )
        assert answer["version"] == 3


async def test_silent_connections_do_not_add_up(tmp_path: Path) -> None:
    async with a_launcher(tmp_path / "state", "supervisor") as bench:
        silent = [await asyncio.open_unix_connection(str(bench.socket_path)) for _ in range(20)]
        assert await bench.run("true") == (0, None)
        async with asyncio.timeout(PATIENCE_S):
            assert await silent[0][0].read() == b""  # the oldest were hung up on
        assert len(list(Path(f"/proc/{bench.pid}/fd").iterdir())) < 25
        for _, writer in silent:
            writer.close()


async def test_what_was_prepared_ends_with_the_daemon_that_wanted_it(bench: Bench) -> None:
    key = bench.prepare("true")
    await eventually(bench.attempt_dir(key).exists, "preparation")
    await bench.client.close()
    hello = await bench.connect()
    assert hello.attempts == ()
    assert not bench.attempt_dir(key).exists()
    assert await bench.run("true") == (0, None)  # the same attempt, for the new daemon


async def test_a_daemon_that_read_nothing_finds_everything_when_it_comes_back(
    bench: Bench, tmp_path: Path
) -> None:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(bench.socket_path))
    with peer:
        peer.sendall(HELLO)
        for number in range(50):
            which = {"job_id": f"unread-{number}", "attempt": 1}
            command = ["touch", str(tmp_path / f"began-{number}")]
            peer.sendall(launcher_wire.encode({**PREPARE, **which, "command": command}))
            peer.sendall(launcher_wire.encode({"order": "start", **which, "environment": {}}))
        keys = {AttemptKey(f"unread-{number}", 1) for number in range(50)}
        await eventually(lambda: len(list(tmp_path.glob("began-*"))) == 50, "start of every attempt")
    await bench.client.close()
    hello = await bench.connect()
    assert {held.key for held in hello.attempts} == keys


# Installed without a venv around -----------------------------------------------------------------


def test_it_starts_from_a_copy_of_the_package_alone(tmp_path: Path) -> None:
    package = LAUNCHER.parent.parent
    copy = tmp_path / "site-packages" / "scheduler"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    program = copy / "effects" / "launcher_process.py"
    done = subprocess.run([sys.executable, "-I", "-S", str(program)], capture_output=True, text=True, cwd="/")
    assert "--socket and --jobs-dir are needed" in done.stderr
