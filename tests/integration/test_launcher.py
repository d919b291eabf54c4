"""The launcher starts and ends real processes, as ordered, and says what became of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scheduler.effects.job_signals import children, descendants
from scheduler.effects.launcher import (
    Acknowledged,
    CheckpointSaved,
    Exited,
    Signalled,
    Started,
    StartFailed,
)
from tests.integration.launching import (
    ENVIRONMENT,
    PATIENCE_S,
    RAN_S,
    Bench,
    cgroups_are_writable,
    eventually,
    is_alive,
)

# A program that ignores SIGTERM, and so does the grandchild that it detaches (double fork, new session, no
# environment) and whose pid it says.
NASTY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
read_fd, write_fd = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write_fd, str(os.getpid()).encode())
        os.execve(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(1000)"], {})
    os._exit(0)
os.wait()
print("grandchild", os.read(read_fd, 100).decode(), flush=True)
time.sleep(1000)
"""


async def grandchild_of(bench: Bench, key: object) -> int:
    await bench.wrote(key, "grandchild")  # type: ignore[arg-type]
    return int(bench.output(key).split("grandchild")[1].split()[0])  # type: ignore[arg-type]


# Starting ----------------------------------------------------------------------------------------


async def test_a_job_runs_and_its_exit_code_is_told(bench: Bench) -> None:
    key = bench.start("sh", "-c", "echo out; echo err >&2; exit 3")
    exited = await bench.report(key, Exited)
    assert (exited.exit_code, exited.signal) == (3, None)
    assert [type(report) for report in bench.reports] == [Started, Exited]
    assert sorted(bench.output(key).split()) == ["err", "out"]


async def test_a_job_that_dies_of_a_signal_is_told_so(bench: Bench) -> None:
    key = bench.start("sh", "-c", "kill -SEGV $$")
    exited = await bench.report(key, Exited)
    assert (exited.exit_code, exited.signal) == (None, signal.SIGSEGV)


async def test_started_names_the_process_for_ever(bench: Bench) -> None:
    key = bench.start("sleep", "1000")
    started = await bench.started(key)
    fields = Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()
    assert started.pid_start_ticks == int(fields[19])
    assert Path(f"/proc/{started.pid}/comm").read_text() == "sleep\n"


async def test_the_environment_is_the_orders_and_three_paths(bench: Bench) -> None:
    ordered = {"PATH": "/usr/bin:/bin", "NAME": "värde with spaces", "EMPTY": ""}
    key = bench.start(
        sys.executable, "-c", "import os, json; print(json.dumps(dict(os.environ)))", environment=ordered
    )
    await bench.report(key, Exited)
    seen = json.loads(bench.output(key))
    seen.pop("LC_CTYPE", None)  # Python's own (PEP 538)
    directory = bench.attempt_dir(key)
    assert seen == {
        **ordered,
        "WATTSHIFT_CHECKPOINT_DIR": str(bench.checkpoint_dir(key)),
        "WATTSHIFT_NOTICE_FILE": str(directory / "notice.json"),
        "WATTSHIFT_ACK_FILE": str(directory / "ack"),
    }


async def test_a_job_starts_clean(bench: Bench) -> None:
    program = (
        "import os, resource, signal\n"
        "print(sorted(os.listdir('/proc/self/fd')))\n"
        "print([n for n in range(1, 65) if n not in (32, 33) and signal.getsignal(n) == signal.SIG_IGN])\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []), os.getpid() == os.getsid(0))\n"
        "print(os.readlink('/proc/self/fd/0'), os.getcwd())\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "print(open('/proc/self/oom_score_adj').read().strip())\n"
    )
    key = bench.start(sys.executable, "-c", program)
    await bench.report(key, Exited)
    fds, ignored, mask, stdin, files, oom = bench.output(key).splitlines()
    assert fds == "['0', '1', '2', '3']"  # 3 is the listing itself
    assert ignored == f"[{signal.SIGPIPE:d}, {signal.SIGXFSZ:d}]"  # Python's own
    assert mask == "set() True"
    assert stdin == f"/dev/null {bench.jobs_dir / key.job_id}"
    import resource

    assert files == str(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert oom == Path("/proc/self/oom_score_adj").read_text().strip()


async def test_the_command_is_found_on_the_jobs_own_path(bench: Bench, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "only-here"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    key = bench.start("only-here", environment={"PATH": f"/nonesuch:{program.parent}:/bin"})
    await bench.report(key, Exited)
    assert bench.output(key) == "found\n"


async def test_the_working_directory_is_the_orders(bench: Bench, tmp_path: Path) -> None:
    key = bench.start("pwd", working_directory=str(tmp_path))
    await bench.report(key, Exited)
    assert bench.output(key) == f"{tmp_path}\n"


@pytest.mark.parametrize(
    ("command", "working_directory", "what", "message"),
    [
        (("nonesuch-command",), "", "command", "nonesuch-command: No such file or directory"),
        (("/etc/passwd",), "", "command", "/etc/passwd: Permission denied"),
        (("/bin",), "", "command", "/bin: Permission denied"),
        (("true",), "/nonesuch", "working_directory", "/nonesuch: No such file or directory"),
        (("true",), "/etc/passwd", "working_directory", "/etc/passwd: Not a directory"),
        (("echo", "a\0b"), "", "command", "echo: embedded null byte"),
        (("echo", "x" * (1 << 18)), "", "command", "echo: Argument list too long"),
    ],
)
async def test_what_cannot_be_started_says_what_and_why(
    bench: Bench, command: tuple[str, ...], working_directory: str, what: str, message: str
) -> None:
    key = bench.start(*command, working_directory=working_directory)
    failed = await bench.report(key, StartFailed)
    assert (failed.what, failed.message) == (what, message)
    assert await bench.run("true", job="next") == (0, None)
    assert bench.of(key, Started) == bench.of(key, Exited) == []


async def test_an_order_too_long_for_the_line_fails_as_exec_would(bench: Bench) -> None:
    key = bench.start("echo", *["x" * 100_000] * 50)
    failed = await bench.report(key, StartFailed)
    assert (failed.what, os.strerror(failed.errno)) == ("command", "Argument list too long")


async def test_what_is_prepared_neither_runs_nor_shows_until_it_is_started(
    bench: Bench, tmp_path: Path
) -> None:
    began = tmp_path / "began"
    command = ("sh", "-c", f"touch {began}; echo new: $NEW")
    key = bench.prepare(*command)
    assert await bench.run("true", job="job-2") == (0, None)  # by then the preparation is done
    await eventually(bench.attempt_dir(key).exists, "preparation")
    assert not began.exists()
    assert not [report for report in bench.reports if report.key == key]
    bench.start(*command, environment={**ENVIRONMENT, "NEW": "known since"})
    assert (await bench.report(key, Exited)).exit_code == 0
    assert began.exists()
    assert bench.output(key) == "new: known since\n"
    assert [type(report) for report in bench.reports if report.key == key] == [Started, Exited]


async def test_what_was_prepared_can_be_taken_back(bench: Bench, tmp_path: Path) -> None:
    began = tmp_path / "began"
    key = bench.prepare("touch", str(began))
    await eventually(bench.attempt_dir(key).exists, "preparation")
    bench.client.forget(key)
    await eventually(lambda: not bench.attempt_dir(key).exists(), "end of the preparation")
    assert await bench.run("true", job="job-2") == (0, None)
    assert not began.exists()
    assert not [report for report in bench.reports if report.key == key]
    # It can be wanted after all.
    assert await bench.run("touch", str(began)) == (0, None)
    assert began.exists()


async def test_a_prepared_process_that_was_killed_is_a_start_that_failed(bench: Bench) -> None:
    key = bench.prepare("true")
    await eventually(bench.attempt_dir(key).exists, "preparation")
    waiting = [pid for pid in descendants(bench.pid) if not children(pid)]
    for pid in waiting:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not any(is_alive(pid) for pid in waiting), "end of what waited")
    bench.start("true")
    failed = await bench.report(key, StartFailed)
    assert failed.what == "fork"
    bench.client.forget(key)
    assert await bench.run("true", job="job-2") == (0, None)


async def test_a_start_said_twice_happens_once_and_is_answered_twice(bench: Bench) -> None:
    key = bench.start("sh", "-c", "echo once; sleep 1000")
    await bench.started(key)
    bench.start("sh", "-c", "echo again", job=key.job_id)
    await bench.until(lambda: len(bench.of(key, Started)) == 2, "second answer")
    assert bench.of(key, Started)[0] == bench.of(key, Started)[1]
    await bench.wrote(key, "once")
    assert "again" not in bench.output(key)


async def test_two_hundred_quick_jobs_all_report(bench: Bench) -> None:
    keys = [bench.start("/bin/true", job=f"quick-{number}") for number in range(200)]
    for key in keys:
        exited = await bench.report(key, Exited)
        assert exited.exit_code == 0
        assert [type(report) for report in bench.reports if report.key == key] == [Started, Exited]  # type: ignore[union-attr]


# The whole tree ----------------------------------------------------------------------------------


async def test_what_a_job_leaves_behind_ends_with_it(bench: Bench) -> None:
    key = bench.start(sys.executable, "-c", NASTY.replace("time.sleep(1000)\n", "sys.exit(7)\n"))
    exited = await bench.report(key, Exited)
    assert exited.exit_code == 7
    assert not is_alive(await grandchild_of(bench, key))


async def test_a_nasty_job_is_gone_with_its_grandchildren_soon_after_its_deadline(bench: Bench) -> None:
    key = bench.start(sys.executable, "-c", NASTY)
    grandchild = await grandchild_of(bench, key)
    main = (await bench.started(key)).pid
    assert is_alive(grandchild)
    begun_s = time.monotonic()
    bench.stop(key, grace_s=0.3)
    exited = await bench.report(key, Exited)
    took_s = time.monotonic() - begun_s
    assert (exited.exit_code, exited.signal) == (None, signal.SIGKILL)
    assert not is_alive(main)
    assert not is_alive(grandchild)
    assert 0.3 <= took_s < 1.3
    assert [type(report) for report in bench.reports] == [Started, Signalled, Exited]


async def test_a_tree_that_forks_all_the_time_is_killed_all_the_same(bench: Bench) -> None:
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('forking', flush=True)\n"
        "while True:\n"
        "    if os.fork():\n"
        "        os._exit(0)\n"
        "    os.setsid()\n"
    )
    key = bench.start("sh", "-c", f'{sys.executable} -S -c "{program}"; sleep 1000')
    await bench.wrote(key, "forking")
    bench.stop(key, grace_s=0.05)
    await bench.report(key, Exited)


async def test_end_grace_kills_the_whole_tree_now(bench: Bench) -> None:
    key = bench.start(sys.executable, "-c", NASTY)
    grandchild = await grandchild_of(bench, key)
    bench.client.end_grace(key)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGKILL
    assert not is_alive(grandchild)


# Stopping ----------------------------------------------------------------------------------------

# A launcher that reads nothing before it reaps, and a stop that waits for the start: all of it comes at once.
HURRIED = """
import os, sys
from scheduler.effects.job_cgroup import CgroupContainment
from scheduler.effects.job_files import JobUser
from scheduler.effects.job_spawn import Program, Spawner, StartLine
from scheduler.effects.job_tree import Listener
from scheduler.effects.launcher_loop import Loop

read, StartLine.read = StartLine.read, lambda line: False

class Stopping(Listener):
    def has_started(self, pid, start_ticks):
        heard.append("started")
        tree.terminate()
        tree.kill()
    def main_has_exited(self, status):
        heard.append(f"exited {status}")
    def is_empty(self):
        heard.append("empty")

heard = []
jobs_fd = os.open(sys.argv[1], os.O_RDONLY)
containment = CgroupContainment(jobs_fd, Spawner(JobUser(), jobs_fd, None))
tree = containment.tree(Loop(lambda: None), Stopping())
tree.load(Program(["true"], {"PATH": os.defpath}, "/", "job-1"), 1)
tree.go({})
pid, status = os.waitpid(-1, 0)
StartLine.read = read
containment.reaped(pid, status)
containment.all_reaped()
containment.close()
print(", ".join(heard))
"""


def test_who_ends_before_he_was_seen_is_stopped_no_more_and_told(tmp_path: Path) -> None:
    if not cgroups_are_writable(tmp_path):
        pytest.skip("no cgroup can be written here")
    done = subprocess.run(
        [sys.executable, "-c", HURRIED, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (done.stdout, done.stderr) == ("started, exited 0, empty\n", "")


@pytest.mark.parametrize("ran_s", RAN_S)
async def test_a_stop_gives_notice_before_it_signals(bench: Bench, ran_s: float) -> None:
    trap = 'trap "cat $WATTSHIFT_NOTICE_FILE; exit 5" TERM'
    program = f"{trap}; sleep {ran_s}; echo up; while :; do sleep 0.01; done"
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=30.0, reason="PREEMPTED", deadline_s=123.5, by="job-2")
    exited = await bench.report(key, Exited)
    assert exited.exit_code == 5
    notice = json.loads(next(line for line in bench.output(key).splitlines() if line.startswith("{")))
    assert notice == {"reason": "PREEMPTED", "deadline_s": 123.5, "by": "job-2"}
    assert [type(report) for report in bench.reports] == [Started, Signalled, Exited]


async def test_sigterm_reaches_every_process_and_wakes_the_stopped(bench: Bench) -> None:
    child = 'trap "echo child; exit" TERM; echo up; while :; do sleep 0.01; done'
    program = f"trap 'echo main; exit' TERM; (setsid sh -c '{child}' &); while :; do sleep 0.01; done"
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    os.kill((await bench.started(key)).pid, signal.SIGSTOP)
    bench.stop(key, grace_s=30.0)
    await bench.report(key, Exited)
    assert {"child", "main"} <= set(bench.output(key).split())


async def test_after_the_signal_a_child_may_outlive_the_main_process_until_the_deadline(bench: Bench) -> None:
    child = 'trap "sleep 0.2; echo saved; exit" TERM; echo up; while :; do sleep 0.01; done'
    key = bench.start("sh", "-c", f"setsid sh -c '{child}' & wait")
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=30.0)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGTERM
    assert "saved" in bench.output(key).split()


async def test_what_a_handler_forks_to_save_the_work_gets_no_sigterm(bench: Bench) -> None:
    # It takes a while to signal so many; and they must have come as far as their exec, or a shell's child
    # loses the signal.
    crowd = "for i in $(seq 150); do sleep 1000 & done; sleep 1"
    program = (
        f"trap \"sh -c 'sleep 0.1; echo saved'; exit\" TERM; {crowd}; echo up; while :; do sleep 0.01; done"
    )
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=10.0)
    await bench.report(key, Exited)
    assert "saved" in bench.output(key).split()


@pytest.mark.parametrize("ran_s", RAN_S)
async def test_the_acknowledgement_file_ends_the_grace(bench: Bench, ran_s: float) -> None:
    program = f'trap "touch $WATTSHIFT_ACK_FILE" TERM; sleep {ran_s}; echo up; while :; do sleep 0.01; done'
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=1000.0)
    await bench.report(key, Exited)
    assert [type(report) for report in bench.reports] == [Started, Signalled, Acknowledged, Exited]


@pytest.mark.parametrize("ran_s", RAN_S)
async def test_an_acknowledgement_from_before_the_notice_does_not_count(bench: Bench, ran_s: float) -> None:
    program = f'trap "" TERM; sleep {ran_s}; touch $WATTSHIFT_ACK_FILE; echo up; sleep 1000; sleep 1000'
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=0.2)
    await bench.report(key, Exited)
    assert bench.of(key, Acknowledged) == []


async def test_a_later_stop_can_shorten_the_grace_but_not_stretch_it(bench: Bench) -> None:
    key = bench.start("sh", "-c", 'trap "" TERM; echo up; while :; do sleep 1000; done')
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=1000.0, reason="first")
    await bench.report(key, Signalled)
    bench.stop(key, grace_s=0.2, reason="second")
    bench.stop(key, grace_s=500.0, reason="third")
    await bench.report(key, Exited)
    assert len(bench.of(key, Signalled)) == 1
    assert json.loads((bench.attempt_dir(key) / "notice.json").read_text())["reason"] == "second"


async def test_a_deadline_in_the_past_kills_at_once(bench: Bench) -> None:
    key = bench.start("sh", "-c", 'trap "" TERM; echo up; while :; do sleep 1000; done')
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=-5.0)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGKILL


async def test_a_stop_right_after_the_start_works(bench: Bench) -> None:
    key = bench.start("sleep", "1000")
    bench.stop(key, grace_s=30.0)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGTERM
    assert [type(report) for report in bench.reports] == [Started, Signalled, Exited]


async def test_stops_of_what_is_over_or_unknown_change_nothing(bench: Bench) -> None:
    key = bench.start("true")
    await bench.report(key, Exited)
    bench.stop(key, grace_s=1.0)
    bench.client.end_grace(key)
    bench.client.forget(key)
    bench.stop(key, grace_s=1.0)
    bench.client.forget(key)
    assert await bench.run("true", job="next") == (0, None)
    assert [type(report) for report in bench.reports if report.key == key] == [Started, Exited]  # type: ignore[union-attr]


async def test_the_stop_command_runs_and_the_exit_waits_for_it(bench: Bench) -> None:
    stop = ("sh", "-c", "echo stopping $NAME; sleep 0.2; echo stopped; exit 4")
    environment = {"PATH": "/usr/bin:/bin", "NAME": "it"}
    key = bench.start("sleep", "1000", environment=environment, stop_command=stop)
    await bench.started(key)
    bench.stop(key, grace_s=30.0)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGTERM
    assert bench.output(key).splitlines() == [
        "stopping it",
        "stopped",
        "wattshift: the stop command ended with exit code 4",
    ]


async def test_a_stop_command_is_given_no_more_than_the_deadline(bench: Bench) -> None:
    stop = (sys.executable, "-c", NASTY)
    key = bench.start("sleep", "1000", stop_command=stop)
    await bench.started(key)
    bench.stop(key, grace_s=1.0)
    grandchild = await grandchild_of(bench, key)
    await bench.report(key, Exited)
    assert not is_alive(grandchild)


async def test_an_acknowledgement_leaves_the_stop_command_its_time(bench: Bench) -> None:
    stop = ("sh", "-c", "sleep 0.3; echo container gone")
    program = 'trap "touch $WATTSHIFT_ACK_FILE" TERM; echo up; while :; do sleep 0.01; done'
    key = bench.start("sh", "-c", program, stop_command=stop)
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=1000.0)
    await bench.report(key, Exited)
    assert bench.of(key, Acknowledged)
    assert "container gone" in bench.output(key)


async def test_a_stop_command_that_cannot_start_is_told_in_the_log(bench: Bench) -> None:
    key = bench.start("sleep", "1000", stop_command=("nonesuch-command",))
    await bench.started(key)
    bench.stop(key, grace_s=30.0)
    await bench.report(key, Exited)
    assert "the stop command did not start (command): No such file or directory" in bench.output(key)


# Checkpoints -------------------------------------------------------------------------------------


async def test_a_touched_checkpoint_is_told(bench: Bench) -> None:
    key = bench.start("sh", "-c", "touch $WATTSHIFT_CHECKPOINT_DIR/checkpoint; sleep 1000")
    await bench.report(key, CheckpointSaved)
    (bench.checkpoint_dir(key) / "another").touch()
    os.utime(bench.checkpoint_dir(key) / "checkpoint")
    await bench.until(lambda: len(bench.of(key, CheckpointSaved)) == 2, "second checkpoint")


async def test_checkpoints_in_a_loop_are_told_ten_times_a_second(bench: Bench) -> None:
    program = (
        "for i in 1 2 3 4 5 6 7 8; do : > $WATTSHIFT_CHECKPOINT_DIR/checkpoint; done; echo done; sleep 1000"
    )
    key = bench.start("sh", "-c", program)
    await bench.until(lambda: len(bench.of(key, CheckpointSaved)) >= 2, "first and last checkpoint")
    first, last = bench.of(key, CheckpointSaved)[:2]
    assert last.at_s - first.at_s >= 0.09


async def test_the_checkpoint_directory_is_kept_for_the_next_attempt(bench: Bench) -> None:
    await bench.run("sh", "-c", "echo 17 > $WATTSHIFT_CHECKPOINT_DIR/step")
    key = bench.start("sh", "-c", "cat $WATTSHIFT_CHECKPOINT_DIR/step", attempt=2)
    await bench.report(key, Exited)
    assert bench.output(key) == "17\n"


async def test_directories_are_private(bench: Bench) -> None:
    key = bench.start("true")
    await bench.report(key, Exited)
    for directory in (bench.jobs_dir / key.job_id, bench.attempt_dir(key), bench.checkpoint_dir(key)):
        assert directory.stat().st_mode & 0o777 == 0o700


async def test_processes_that_wait_for_a_start_may_be_killed(bench: Bench) -> None:
    for number in range(3):
        assert await bench.run("true", job=f"job-{number}") == (0, None)
        waiting = children(bench.pid)  # the one that forks, and the one that was forked ahead
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError):  # the last job's supervisor ends by itself
                os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not set(children(bench.pid)) & set(waiting), "end of both")  # noqa: B023
    assert await bench.run("true", job="last") == (0, None)


async def test_a_killed_supervisor_takes_its_whole_tree_along(bench: Bench) -> None:
    if bench.containment != "supervisor":
        pytest.skip("cgroups need no supervisor")
    key = bench.start(sys.executable, "-c", NASTY)
    grandchild = await grandchild_of(bench, key)
    main = (await bench.started(key)).pid
    parent = int(Path(f"/proc/{main}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != bench.pid
    other = bench.start("sleep", "1000", job="other")
    await bench.started(other)
    os.kill(parent, signal.SIGKILL)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGKILL
    await eventually(lambda: not is_alive(grandchild), "end of the grandchild")
    assert bench.of(other, Exited) == []
