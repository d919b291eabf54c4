"""Commands that stay: waiting, following, watching; on pipes, on terminals, over restarts of the daemon."""

import base64
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from scheduler.cli import main
from scheduler.cli.exit_codes import ExitCode
from scheduler.v1 import job_pb2
from tests.fakes.daemon import FakeDaemon, job_of

Run = pytest.CaptureFixture[str]
COMMAND = (sys.executable, "-c", "import sys; from scheduler.cli import main; sys.exit(main())")
PATIENCE_S = 20.0
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "d.sock") as fake:
        monkeypatch.setenv("WATTSHIFT_ADDRESS", fake.address)
        yield fake


@contextlib.contextmanager
def meanwhile(*steps: Callable[[], None]) -> Iterator[None]:
    """Let the world go on, step by step, while a command waits."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for step in steps:
                step()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)
    assert failures == []


# Waiting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 137, 137), ("FAILED", None, 1), ("CANCELLED", None, 9),
     ("CANCELLED", 143, 143)],
)  # fmt: skip
def test_submit_wait_ends_as_the_job_does(
    daemon: FakeDaemon, capsys: Run, state: str, exit_code: int | None, code: int
) -> None:
    steps = (
        lambda: daemon.wait_until_heard("WatchJobs"),
        lambda: daemon.end("job-1", state, exit_code, "EXITED_NONZERO"),
    )
    with meanwhile(*steps):
        assert main(["submit", "-c", "batch", "--wait", "--name", "n", "--", "work"]) == code
    captured = capsys.readouterr()
    assert captured.out == "job-1\n"
    assert captured.err.startswith(f"job-1 n {state} after ")


def test_wait_ends_as_the_first_job_that_did_not_succeed(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1"))
    daemon.add(job_of("job-2"))
    daemon.add(job_of("job-3", "FAILED", exit_code=5))
    steps = (
        lambda: daemon.wait_until_heard("WatchJobs"),
        lambda: daemon.end("job-2", "FAILED", 4),
        lambda: daemon.end("job-1", "SUCCEEDED", 0),
    )
    with meanwhile(*steps):
        assert main(["wait", "job-1", "job-2", "job-3"]) == 4
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"job-1", "job-2", "job-3"}


def test_waiting_for_a_job_that_is_not_there_is_refused(daemon: FakeDaemon, capsys: Run) -> None:
    assert main(["wait", "job-7"]) == ExitCode.NOT_FOUND
    assert capsys.readouterr().err == "error: no job 'job-7'; `wattshift jobs --all` lists them\n"


def test_waiting_can_have_an_end(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1"))
    assert main(["wait", "--timeout", "0.2", "job-1"]) == ExitCode.TIMEOUT
    assert capsys.readouterr().err == "error: not finished after 0.2s; the jobs go on\n"


@contextlib.contextmanager
def waiting(daemon: FakeDaemon) -> Iterator[subprocess.Popen[str]]:
    """A `wait -o json` for job-1 that has seen it run."""
    daemon.add(job_of("job-1"))
    command = (*COMMAND, "wait", "job-1", "-o", "json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert json.loads(client.stdout.readline())["job"]["state"] == "JOB_STATE_RUNNING"
        yield client


def test_waiting_outlasts_a_restart_of_the_daemon_and_resumes(daemon: FakeDaemon) -> None:
    with waiting(daemon) as client:
        daemon.stop()
        daemon.restart()
        daemon.wait_until_heard("WatchJobs", 2)
        daemon.end("job-1", "FAILED", 3)
        out, err = client.communicate(timeout=PATIENCE_S)
    assert (client.returncode, err) == (3, "")
    *_, last = (json.loads(line) for line in out.splitlines())
    assert last["job"]["state"] == "JOB_STATE_FAILED"
    assert [request.since_revision for request in daemon.requests["WatchJobs"]] == [0, 1]


def test_waiting_begins_anew_where_the_daemon_no_longer_keeps_the_revision(daemon: FakeDaemon) -> None:
    with waiting(daemon) as client:
        daemon.stop()
        daemon.revision_kept_first = 100
        daemon.restart()
        daemon.wait_until_heard("WatchJobs", 3)
        daemon.end("job-1", "SUCCEEDED", 0)
        client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 0
    assert [request.since_revision for request in daemon.requests["WatchJobs"]] == [0, 1, 0]


def test_waiting_gives_up_a_daemon_that_stays_away(
    daemon: FakeDaemon, capsys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.cli.watching.RECONNECT_TIMEOUT_S", 0.3)
    daemon.add(job_of("job-1"))
    with meanwhile(lambda: daemon.wait_until_heard("WatchJobs"), daemon.stop):
        assert main(["--connect-timeout", "0.2", "wait", "job-1"]) == ExitCode.UNREACHABLE
    assert "no server answers at" in capsys.readouterr().err
    daemon.restart()


@pytest.mark.parametrize("mode", ["--wait", "--follow"])
def test_ctrl_c_leaves_the_job_alone_and_says_how_to_cancel_it(daemon: FakeDaemon, mode: str) -> None:
    command = (*COMMAND, "submit", "-c", "batch", mode, "--", "work")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        daemon.wait_until_heard("WatchJobs")
        client.send_signal(signal.SIGINT)
        _, said = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == ExitCode.INTERRUPTED
    assert said.endswith("the job goes on; to cancel it: wattshift cancel job-1\n")
    assert daemon.requests["CancelJob"] == []


def test_ctrl_c_elsewhere_is_silent(daemon: FakeDaemon) -> None:
    with subprocess.Popen(
        (*COMMAND, "jobs", "--watch"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        daemon.wait_until_heard("WatchJobs")
        client.send_signal(signal.SIGINT)
        _, said = client.communicate(timeout=PATIENCE_S)
    assert (client.returncode, said.strip()) == (ExitCode.INTERRUPTED, b"")


# Logs ------------------------------------------------------------------------------------------


def test_logs_writes_what_the_job_wrote_byte_for_byte(
    daemon: FakeDaemon, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    daemon.add(job_of("job-1"))
    written = bytes(range(256)) + b"no newline at the end"
    daemon.write("job-1", written)
    assert main(["logs", "job-1"]) == 0
    assert main(["logs", "job-1", "--tail", "3"]) == 0
    assert capfdbinary.readouterr().out == written + b"end"


def test_logs_in_json_is_a_message_a_line(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1", attempt=2))
    daemon.write("job-1", b"hello\n", attempt=2)
    assert main(["logs", "job-1", "-o", "json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    message = json.loads(line)
    assert base64.b64decode(message["data"]) == b"hello\n"
    assert message["attempt"] == 2


def started(job_id: str = "job-1", attempt: int = 1) -> job_pb2.Job:
    """A job whose newest attempt runs."""
    job = job_of(job_id, "RUNNING", attempt=attempt)
    job.attempts.add(number=attempt).started_at.FromNanoseconds(time.time_ns())
    return job


@pytest.mark.parametrize("attempt", [(), ("--attempt", "1")])
def test_a_followed_log_goes_on_after_a_restart_without_repeating_or_losing_a_byte(
    daemon: FakeDaemon, capsys: Run, attempt: tuple[str, ...]
) -> None:
    daemon.add(started())
    daemon.write("job-1", b"one\n")
    steps = (
        lambda: daemon.wait_until_heard("ReadLogs"),
        daemon.stop,
        lambda: daemon.write("job-1", b"two\n"),
        daemon.restart,
        lambda: daemon.wait_until_heard("ReadLogs", 3),  # the second counts what is kept
        lambda: daemon.write("job-1", b"three\n"),
        lambda: daemon.end("job-1", "SUCCEEDED", 0),
    )
    with meanwhile(*steps):
        assert main(["logs", "-f", *attempt, "job-1"]) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_log_followed_from_near_its_end_says_that_it_repeats_after_a_restart(
    daemon: FakeDaemon, capsys: Run
) -> None:
    daemon.add(started())
    daemon.write("job-1", b"one\ntwo\n")
    steps = (
        lambda: daemon.wait_until_heard("ReadLogs"),
        daemon.stop,
        daemon.restart,
        lambda: daemon.wait_until_heard("ReadLogs", 3),
        lambda: daemon.end("job-1", "SUCCEEDED", 0),
    )
    with meanwhile(*steps):
        assert main(["logs", "-f", "--tail", "4", "job-1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("one\ntwo\n")
    assert "[connected again; the last 65536 bytes may be repeated here]\n" in captured.err


def test_following_a_submission_shows_each_attempt_and_ends_as_the_job_does(
    daemon: FakeDaemon, capsys: Run
) -> None:
    def give_way() -> None:
        daemon.logs["job-1", 1].append(b"attempt 1\n")
        job = started(attempt=2)
        daemon.add(job)

    steps = (
        lambda: daemon.wait_until_heard("WatchJobs"),
        lambda: daemon.add(started()),
        lambda: daemon.wait_until_heard("ReadLogs"),
        give_way,
        lambda: daemon.wait_until_heard("ReadLogs", 2),
        lambda: daemon.write("job-1", b"attempt 2\n", attempt=2),
        lambda: daemon.end("job-1", "FAILED", 3, "EXITED_NONZERO"),
    )
    with meanwhile(*steps):
        assert main(["submit", "-c", "batch", "--follow", "--", "work"]) == 3
    captured = capsys.readouterr()
    assert captured.out == "attempt 1\nattempt 2\n"
    assert captured.err.startswith("job-1\njob-1 work FAILED after ")


def test_a_gap_in_a_log_is_told_beside_it(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(started())
    daemon.write("job-1", b"late\n")
    daemon.dropped_pieces = 1
    assert main(["logs", "job-1"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "late\n",
        "[output is missing here: the job wrote faster than it was read]\n",
    )


def test_following_a_job_that_never_started_ends_with_it(daemon: FakeDaemon, capsys: Run) -> None:
    steps = (lambda: daemon.wait_until_heard("WatchJobs"), lambda: daemon.end("job-1", "CANCELLED"))
    with meanwhile(*steps):
        assert main(["submit", "-c", "batch", "--follow", "--", "work"]) == ExitCode.CANCELLED
    assert daemon.requests["ReadLogs"] == []


# Watching --------------------------------------------------------------------------------------


def test_jobs_watch_shows_the_state_and_then_each_change_that_fits(daemon: FakeDaemon) -> None:
    daemon.add(job_of("job-1", "PENDING", "TRAINING", name="train"))
    daemon.add(job_of("job-2", "RUNNING", "MINING"))
    command = (*COMMAND, "jobs", "--watch", "-c", "training")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline().split()[:3] == ["ID", "NAME", "CLASS"]
        assert client.stdout.readline().split()[:4] == ["job-1", "train", "TRAINING", "PENDING"]
        daemon.add(job_of("job-2", "PREEMPTING", "MINING"))
        daemon.add(job_of("job-1", "RUNNING", "TRAINING", name="train"))
        line = client.stdout.readline()
        assert re.match(r"\d\d:\d\d:\d\d job-1  train  TRAINING  RUNNING", line)
        client.terminate()


def test_a_reader_that_closes_the_pipe_ends_the_command_silently(daemon: FakeDaemon) -> None:
    for number in range(2000):
        daemon.jobs[f"job-{number}"] = job_of(f"job-{number}", name="x" * 100)
    with subprocess.Popen((*COMMAND, "jobs"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        client.stdout.readline()
        client.stdout.close()
        assert client.stderr.read() == b""
        assert client.wait(PATIENCE_S) == ExitCode.PIPE


def test_top_once_is_plain_text(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1", "PENDING", name="waits"))
    daemon.add(job_of("job-2", "RUNNING", name="runs"))
    assert main(["top", "--once"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.startswith("node1 (simulated)  2 GPUs (1 allocated, 1 free)  0.72 of 1.40 kW  1 running")
    assert shown.index("runs") < shown.index("waits")


def test_top_once_in_json_is_the_node_and_the_jobs(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1"))
    assert main(["top", "--once", "-o", "json"]) == 0
    node, jobs = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert node["node"]["name"] == "node1"
    assert [job["id"] for job in jobs["jobs"]] == ["job-1"]


def test_top_in_json_prints_a_message_a_line(daemon: FakeDaemon) -> None:
    daemon.add(job_of("job-1"))
    with subprocess.Popen((*COMMAND, "top", "-o", "json"), stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        kinds: set[str] = set()
        while not {"node", "job"} <= kinds:
            kinds |= json.loads(client.stdout.readline()).keys()
        client.send_signal(signal.SIGINT)
        assert client.wait(PATIENCE_S) == 0


class Terminal:
    """A terminal with a command in it; `screen` is what the last frame shows."""

    def __init__(self, *arguments: str, width: int = 100, height: int = 20) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        environment = {**os.environ, "TERM": "xterm"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            (*COMMAND, *arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()

    def read_until(self, wanted: Callable[[str], bool]) -> None:
        """Read until the newest frame satisfies."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not wanted(self.screen):
            assert self._read(deadline_s), f"not shown in time; the screen is:\n{self.screen}"

    def _read(self, deadline_s: float) -> bool:
        """Read what there is; False when nothing comes any more."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline_s - time.monotonic()))
        with contextlib.suppress(OSError):  # EIO: the other side has closed
            data = os.read(self._master, 65536) if ready else b""
            self.text += data.decode()
            return bool(data)
        return False

    @property
    def screen(self) -> str:
        frames = self.text.split("\x1b[H")
        return ESCAPE.sub("", frames[-2] if len(frames) > 2 else frames[-1])

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def ended(self) -> int:
        """The exit code, after reading what was left to read."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self._read(deadline_s):
            pass
        os.close(self._master)
        return self.process.wait(PATIENCE_S)


def test_top_lives_over_a_restart_of_the_daemon_and_leaves_the_terminal_as_it_was(daemon: FakeDaemon) -> None:
    daemon.add(job_of("job-1", "RUNNING", name="train"))
    with Terminal("top") as terminal:
        terminal.read_until(lambda screen: "job-1" in screen and "train" in screen)
        daemon.add(job_of("job-2", "PENDING", name="next"))
        terminal.read_until(lambda screen: "next" in screen)
        daemon.stop()
        terminal.read_until(lambda screen: "no news: " in screen)
        daemon.restart()
        daemon.end("job-1", "SUCCEEDED", 0)
        terminal.read_until(
            lambda screen: "no news" not in screen and "train" not in screen and "next" in screen
        )
        terminal.press(b"q")
        assert terminal.ended() == 0
        assert terminal.text.startswith("\x1b[?1049h\x1b[?25l")
        assert terminal.text.endswith("\x1b[?25h\x1b[?1049l")


def test_top_shows_no_more_lines_than_the_window_has(daemon: FakeDaemon) -> None:
    for number in range(1, 31):
        daemon.add(job_of(f"job-{number}", name="n" * 60))
    with Terminal("top", width=70, height=12) as terminal:
        terminal.read_until(lambda screen: "more" in screen)
        lines = terminal.screen.split("\r\n")
        assert len(lines) == 12
        assert max(map(len, lines)) <= 70
        assert lines[-1] == "26 more"
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ended() == 0


def test_top_tells_at_once_that_no_daemon_answers(tmp_path: Path) -> None:
    with Terminal(
        "--address", f"unix://{tmp_path}/absent.sock", "--connect-timeout", "0.2", "top"
    ) as terminal:
        assert terminal.ended() == ExitCode.UNREACHABLE
        assert "\x1b[?1049h" not in terminal.text
        assert "no server answers at" in terminal.text


def test_tables_have_colours_on_a_terminal_only(daemon: FakeDaemon, capsys: Run) -> None:
    daemon.add(job_of("job-1", "RUNNING"))
    with Terminal("jobs") as terminal:
        assert terminal.ended() == 0
        assert "\x1b[32mRUNNING" in terminal.text
        assert main(["jobs"]) == 0
        assert "\x1b" not in capsys.readouterr().out
