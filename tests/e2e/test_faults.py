"""What breaks around the daemon: its launcher, the node, the disk, the journal, a second daemon."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from scheduler.v1 import job_pb2, node_pb2, node_service_pb2
from tests.harness.daemon import (
    CANCELLED,
    FAILED,
    LAUNCHERS_MAX,
    PENDING,
    PREEMPTING,
    RUNNING,
    SUCCEEDED,
    Daemon,
    logged,
    reason_of,
    until,
    word,
)
from tests.harness.fixtures import Make
from tests.harness.refusals import refusal

IGNORES_TERM = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def launcher_of(daemon: Daemon) -> int:
    """The launcher itself, not one of its supervisors."""
    held = set(daemon.launchers())
    return min(pid for pid in held if int(Path(f"/proc/{pid}/stat").read_text().split()[3]) not in held)


# The launcher ----------------------------------------------------------------------------------


def test_jobs_of_a_killed_launcher_are_lost_and_go_by_their_rule(make_daemon: Make) -> None:
    daemon = make_daemon(config="[policy]\nrestart_backoff_s = 0.05\n").start()
    never = daemon.run("sleep", "600")
    again = daemon.run("sleep", "600", restart=job_pb2.RESTART_RULE_ON_FAILURE)
    hides = daemon.run(script="setsid env -i sleep 601 & setsid env -i sleep 602 & wait")
    groups = set(daemon.cgroups())
    os.kill(launcher_of(daemon), signal.SIGKILL)
    for job in (never, hides):
        ended = daemon.wait(job.id)
        assert (ended.state, reason_of(ended), ended.attempts[0].lost) == (FAILED, "LAUNCHER_LOST", True)
        assert not ended.HasField("exit_code")
    back = daemon.wait_attempt(again.id, 2)
    assert back.attempts[0].lost
    assert daemon.job_processes() == {back.attempts[-1].pid}
    assert not groups & {group for group in daemon.cgroups() if group.name not in {"", *_base_names(groups)}}
    assert "the launcher" not in " ".join(daemon.get_node().problems)
    assert daemon.finish("true").state == SUCCEEDED


def _base_names(groups: set[Path]) -> set[str]:
    return {group.name for group in groups if group.name.startswith("wattshift-")}


def test_a_launcher_killed_while_the_daemon_is_down_is_noticed_at_its_start(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    job = daemon.run("sleep", "600")
    daemon.kill()
    os.kill(launcher_of(daemon), signal.SIGKILL)
    daemon.start()
    ended = daemon.wait(job.id)
    assert (ended.state, reason_of(ended), ended.attempts[0].lost) == (FAILED, "LAUNCHER_LOST", True)


def test_a_reboot_is_told_from_a_lost_launcher(make_daemon: Make) -> None:
    daemon = make_daemon(config="[policy]\nrestart_backoff_s = 0.05\n").start()
    never = daemon.run("sleep", "600")
    again = daemon.run("sleep", "600", restart=job_pb2.RESTART_RULE_ALWAYS)
    daemon.kill()
    os.kill(launcher_of(daemon), signal.SIGKILL)
    daemon.change_boot_id()
    daemon.start()
    ended = daemon.wait(never.id)
    assert (ended.state, reason_of(ended), ended.attempts[0].lost) == (FAILED, "NODE_REBOOTED", True)
    daemon.wait_attempt(again.id, 2)
    second = daemon.run("sleep", "600")
    os.kill(launcher_of(daemon), signal.SIGKILL)
    assert reason_of(daemon.wait(second.id)) == "LAUNCHER_LOST", "the node was not started anew since"
    daemon.cancel_all()


# The daemon, at bad moments --------------------------------------------------------------------


def test_a_daemon_killed_during_a_grace_comes_back_and_finishes_the_hand_over(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    victim = daemon.run_ready(IGNORES_TERM, job_class="mining", gpus=4, grace_s=1.5)
    preemptor = daemon.submit("sleep", "600", job_class="inference", gpus=4)
    assert daemon.get(victim.id).state == PREEMPTING
    until("it is signalled", lambda: daemon.get(victim.id).attempts[0].HasField("signalled_at"))
    deadline = daemon.get(victim.id).attempts[0].notice.deadline.ToNanoseconds()
    daemon.kill()
    pid = victim.attempts[0].pid
    until("the victim is gone without a daemon", lambda: pid not in daemon.processes())
    assert time.time_ns() >= deadline
    daemon.start()
    runs = daemon.wait(preemptor.id, RUNNING)
    attempt = daemon.get(victim.id).attempts[0]
    assert 0 <= attempt.exited_at.ToNanoseconds() - deadline < 1e9
    assert attempt.exit_code == 128 + signal.SIGKILL
    assert list(runs.attempts[0].preempted) == [victim.id]
    assert attempt.HasField("successor_started_at")


def test_an_order_to_stop_that_the_crash_swallowed_is_given_again(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    job = daemon.run("sleep", "600")
    launcher = launcher_of(daemon)
    os.kill(launcher, signal.SIGSTOP)  # the order stays in the socket and is lost with the daemon's end
    daemon.cancel(job.id)
    daemon.kill()
    os.kill(launcher, signal.SIGCONT)
    daemon.start()
    assert daemon.wait(job.id).state == CANCELLED


def test_an_accepted_job_survives_a_crash_before_its_start_was_ordered(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    launcher = launcher_of(daemon)
    os.kill(launcher, signal.SIGSTOP)
    job = daemon.submit("true")
    assert job.attempt == 1
    daemon.kill()
    os.kill(launcher, signal.SIGKILL)  # as if it had ended for want of work before the order came
    daemon.start()
    ended = daemon.wait(job.id)
    assert ended.state == SUCCEEDED, "it never ran: it must not fail for a rule about restarts"


def test_cordon_drain_and_quarantine_survive_a_crash(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    daemon.node.CordonGpu(node_service_pb2.CordonGpuRequest(gpu="1", reason="fan"))
    daemon.node.DrainNode(node_service_pb2.DrainNodeRequest())
    daemon.restart()
    node = daemon.get_node()
    assert node.draining
    gpu = node.gpus[1]
    assert (gpu.state, gpu.detail) == (node_pb2.GPU_STATE_CORDONED, "fan")
    assert daemon.submit("true").state == PENDING
    daemon.node.UndrainNode(node_service_pb2.UndrainNodeRequest())
    until("it ran", lambda: not daemon.all_jobs(active_only=True))
    for _ in range(3):
        daemon.run("sleep", "600")
    assert daemon.submit("true").state == PENDING, "the cordoned GPU stays empty"
    daemon.cancel_all()


def test_a_released_node_stays_released_through_a_crash(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    daemon.node.ReleaseNode(node_service_pb2.ReleaseNodeRequest())
    daemon.restart()
    assert daemon.get_node().released
    daemon.node.UndrainNode(node_service_pb2.UndrainNodeRequest())
    assert daemon.finish("true").state == SUCCEEDED


# A second daemon -------------------------------------------------------------------------------


def start_second(daemon: Daemon, state: Path, address: str) -> subprocess.CompletedProcess[str]:
    arguments = ["serve", "--simulate", "1xT4", "--config", str(daemon.config), "--state-dir", str(state)]
    return daemon.cli(*arguments, "--listen", address, "--metrics-listen", "127.0.0.1:0")


def test_a_second_daemon_on_the_same_state_is_refused_and_the_first_goes_on(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    job = daemon.run("sleep", "600")
    second = start_second(daemon, daemon.state, f"unix://{daemon.directory}/other.sock")
    assert second.returncode != 0
    assert "another wattshift daemon uses the state directory" in second.stderr
    assert "Traceback" not in second.stderr
    assert daemon.get(job.id).state == RUNNING
    assert daemon.finish("true").state == SUCCEEDED


def test_a_second_daemon_on_the_same_socket_is_refused_and_starts_nothing(make_daemon: Make) -> None:
    standing = '[[standing_jobs]]\nname = "miner"\ncommand = ["sleep", "603"]\n'
    daemon = make_daemon(gpus="1xT4", config=standing).start()
    until("it mines", lambda: daemon.running("miner"))
    before = daemon.job_processes()
    state = daemon.directory / "other"
    second = start_second(daemon, state, daemon.address)
    assert second.returncode != 0
    assert "another daemon listens there" in second.stderr
    assert "Traceback" not in second.stderr
    until("what it started is gone", lambda: daemon.job_processes() == before, 4.0)
    until("its launcher is gone", lambda: len(daemon.launchers()) <= LAUNCHERS_MAX, 4.0)
    assert daemon.running("miner")


def test_a_second_daemon_on_the_same_metrics_port_is_refused(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    second = daemon.cli(
        "serve", "--simulate", "1xT4", "--state-dir", str(daemon.directory / "other"),
        "--listen", f"unix://{daemon.directory}/other.sock",
        "--metrics-listen", f"127.0.0.1:{daemon.metrics_port}",
    )  # fmt: skip
    assert second.returncode != 0
    assert f"127.0.0.1:{daemon.metrics_port}" in second.stderr
    assert "Traceback" not in second.stderr
    until("its launcher is gone", lambda: len(daemon.launchers()) <= LAUNCHERS_MAX)


# The state directory ---------------------------------------------------------------------------


def refused_start(daemon: Daemon) -> str:
    """Start a daemon that must refuse; returns what it said."""
    before = len(daemon.log())
    process = daemon.spawn()
    status = process.wait(20)
    said = daemon.log()[before:]
    assert status != 0
    assert "Traceback" not in said, said
    return said


@pytest.fixture(scope="module")
def used_state() -> Iterator[Path]:
    """A state directory with some life in it, and nobody there."""
    with Daemon(gpus="1xT4") as daemon, logged(daemon):
        daemon.start()
        for code in range(3):
            daemon.finish(script=f"exit {code}")
        daemon.terminate()
        yield daemon.state


def damage(path: Path, how: str) -> None:
    if how == "a flipped byte in an event":
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            seq, body = db.execute(
                "SELECT seq, body FROM events ORDER BY seq DESC LIMIT 1 OFFSET 3"
            ).fetchone()
            changed = bytes(body).replace(b"j", b"k", 1)
            assert changed != bytes(body)
            db.execute("UPDATE events SET body = ? WHERE seq = ?", (changed, seq))
    elif how == "a lost event":
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("DELETE FROM events WHERE seq = (SELECT max(seq) - 2 FROM events)")
    elif how == "a lost tail":
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("DELETE FROM events WHERE seq > (SELECT max(seq) - 2 FROM events)")
    elif how == "half a file":
        os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)
    elif how == "an empty file":
        os.truncate(path, 0)
    elif how == "no database":
        path.write_bytes(b"hello, I am a letter, not a database\n" * 1000)
    elif how == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "another format":
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE meta SET value = 99 WHERE key = 'format'")
    else:
        assert how == "no events table"
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("DROP TABLE events")


DAMAGES = [
    "a flipped byte in an event",
    "a lost event",
    "a lost tail",
    "half a file",
    "no database",
    "zeros",
    "another format",
    "no events table",
    "an empty file",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_journal_is_refused_and_nothing_of_it_is_overwritten(
    make_daemon: Make, used_state: Path, how: str
) -> None:
    daemon = make_daemon(gpus="1xT4")
    shutil.copytree(used_state, daemon.state, ignore=shutil.ignore_patterns("*.sock"))
    path = daemon.state / "journal.sqlite"
    whole = path.read_bytes()
    damage(path, how)
    assert daemon.verify().returncode != 0
    broken = path.read_bytes()
    said = refused_start(daemon)
    assert str(path) in said
    assert path.read_bytes() == broken
    path.write_bytes(whole)  # the operator's copy
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    daemon.start()
    assert len(daemon.all_jobs()) == 3


def test_a_new_journal_does_not_give_a_job_what_another_left(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="1xT4").start()
    old = daemon.finish(script="echo precious > $WATTSHIFT_CHECKPOINT_DIR/model")
    daemon.terminate()
    for path in daemon.state.glob("journal.sqlite*"):  # as the refusals say: move it away to start anew
        path.unlink()
    daemon.start()
    new = daemon.finish(script="ls $WATTSHIFT_CHECKPOINT_DIR")
    assert new.id != old.id
    assert daemon.output(new.id) == ""


def test_verify_is_happy_beside_a_running_daemon(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    daemon.finish("true")
    daemon.run("sleep", "600")
    verified = daemon.verify()
    assert verified.returncode == 0, verified.stderr
    assert "OK" in verified.stdout


def test_a_state_directory_that_is_no_directory_is_refused_in_words(make_daemon: Make) -> None:
    daemon = make_daemon()
    daemon.state.write_text("")
    assert str(daemon.state) in refused_start(daemon)
    assert daemon.state.read_text() == ""
    daemon.state.unlink()


@pytest.mark.root
def test_a_state_directory_on_a_read_only_disk_is_refused_in_words(make_daemon: Make) -> None:
    daemon = make_daemon()
    with tmpfs(daemon.state):
        subprocess.run(["mount", "-o", "remount,ro", daemon.state], check=True)
        assert "can't be written" in refused_start(daemon)


@contextlib.contextmanager
def tmpfs(path: Path, size: str = "4m") -> Iterator[Path]:
    """A disk of its own at the path."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root and the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.root
def test_a_full_disk_refuses_submissions_keeps_jobs_and_loses_nothing(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="2xT4", config="[state]\nfree_mib_min = 1\n[sampling]\nperiod_s = 0.1\n")
    with tmpfs(daemon.state), logged(daemon):
        try:
            daemon.start()
            gate = daemon.directory / "gate"
            job = daemon.run(script=f"until [ -e {gate} ]; do sleep 0.02; done; exit 7")
            before = daemon.submit("true", request_id="before")
            daemon.wait(before.id)
            ballast = daemon.state / "ballast"
            fill_disk(ballast)
            told = until("submissions are refused", lambda: try_submit(daemon))
            assert told.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
            assert any(words in told.message for words in ("free_mib_min", "disk is full")), told
            assert daemon.get(job.id).state == RUNNING
            acknowledged = {one.id for one in daemon.all_jobs()}
            gate.touch()  # it ends while its end can't be written
            until("it is gone", lambda: job.attempts[0].pid not in daemon.processes())
            ballast.unlink()
            ended = daemon.wait(job.id)
            assert (ended.exit_code, ended.attempt) == (7, 1)
            last = until("submissions are taken again", lambda: submit_or_none(daemon))
            daemon.wait(last.id)
            daemon.restart()
            assert {one.id for one in daemon.all_jobs()} >= acknowledged | {last.id}
            assert daemon.submit("true", request_id="before").id == before.id
            assert "Traceback" not in daemon.log()
        finally:
            daemon.close()


def fill_disk(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def try_submit(daemon: Daemon) -> Any:
    try:
        daemon.submit("true", gpus=0)
    except grpc.RpcError:
        return refusal(lambda: daemon.submit("true", gpus=0))
    return None


def submit_or_none(daemon: Daemon) -> job_pb2.Job | None:
    try:
        return daemon.submit("true")
    except grpc.RpcError:
        return None


# The configuration -----------------------------------------------------------------------------


def test_a_configuration_with_an_unknown_key_is_refused_by_key_and_line(make_daemon: Make) -> None:
    daemon = make_daemon(config="[policy]\norder = 'class'\n\nhysteresis = 0.3\n")
    said = refused_start(daemon)
    assert "hysteresis" in said
    assert f"{daemon.config}:4" in said or "line 4" in said, said


def test_a_reload_with_an_error_keeps_the_old_settings_and_says_why(make_daemon: Make) -> None:
    daemon = make_daemon(config="[jobs]\npending_max = 5\n").start()
    daemon.config.write_text("[jobs]\npending_max = -5\n")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    until("it says why", lambda: "pending_max" in " ".join(daemon.get_node().problems))
    daemon.config.write_text("[jobs]\npending_max = 7\n")
    daemon.process.send_signal(signal.SIGHUP)
    until("all is well again", lambda: not daemon.get_node().problems)
    assert daemon.finish("true").state == SUCCEEDED


def test_a_reload_takes_standing_jobs_away_and_brings_them(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="2xT4").start()
    assert daemon.process is not None
    daemon.config.write_text('[[standing_jobs]]\nname = "miner"\ncommand = ["sleep", "604"]\n')
    daemon.process.send_signal(signal.SIGHUP)
    until("two mine", lambda: len(daemon.running("miner")) == 2)
    daemon.config.write_text("")
    daemon.process.send_signal(signal.SIGHUP)
    until("nobody mines", lambda: not daemon.all_jobs(active_only=True))
    assert {word(job.reason) for job in daemon.all_jobs()} == {"STANDING_JOB_REMOVED"}
