"""A miner that may be frozen gives up its watts in place: real daemon and processes, simulated boards."""

import os
import signal
from pathlib import Path

from scheduler.planning.freezing import FROZEN_US_MIN
from scheduler.v1 import job_pb2, power_pb2, reason_pb2
from tests.harness.daemon import PENDING, RUNNING, WAIT_S, Daemon, reason_of, until
from tests.harness.miners import MINERS, mined

SUSPENDED = job_pb2.JOB_STATE_SUSPENDED
MET = power_pb2.SHED_STATE_MET
# A stop would cost more than a minute of mining: it is frozen instead.
FREEZABLE = f'{MINERS}on_preempt = "suspend"\nrestart_loss_s = 600\ndraw_w = 560\n'
# Two boards of 560 W, of which a limit takes 190 each at most: one more has to give.
TIGHT_W = 640.0
WIDE_W = 1400.0  # room for both


def frozen(daemon: Daemon) -> list[job_pb2.Job]:
    return [job for job in daemon.all_jobs(name="miner") if job.state == SUSPENDED]


def a_frozen_miner(daemon: Daemon) -> job_pb2.Job:
    """One of two miners, frozen by a grid event that is met."""
    until("all mine", lambda: mined(daemon) == 2)
    until("they draw", lambda: daemon.get_power().draw_w > 1000)
    daemon.offer_event("e1", TIGHT_W, until_s=600)
    (job,) = until("one is frozen", lambda: frozen(daemon))
    until("the event is met", lambda: daemon.grid_event("e1").state == MET)
    return job


def is_stopped(pid: int) -> bool:
    """Whether a process stands still: by a signal, or with its cgroup."""
    if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt":
        return True
    groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    (path,) = [line.removeprefix("0::/") for line in groups if line.startswith("0::/")]
    events = [Path(mount, path, "cgroup.events") for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")]
    return any("frozen 1" in file.read_text() for file in events if file.exists())


def test_a_grid_event_freezes_a_miner_and_its_end_brings_the_same_process_back() -> None:
    with Daemon(gpus="2xH100", config=FREEZABLE).start() as daemon:
        job = a_frozen_miner(daemon)
        pid = job.attempts[-1].pid

        assert reason_of(job) == "SHED_FOR_POWER"
        assert is_stopped(pid)
        power = daemon.get_power()
        assert power.draw_w <= TIGHT_W
        assert power.committed_w <= TIGHT_W
        assert not [one for one in daemon.all_jobs(name="miner") if one.state == PENDING]
        assert 'wattshift_jobs{class="mining",state="suspended"} 1.0' in daemon.metrics()
        told = daemon.cli("show", job.id).stdout
        assert "SUSPENDED" in told.upper()
        assert "It is frozen (shed for power)" in daemon.cli("explain", job.id).stdout

        daemon.cancel_event("e1")

        back = daemon.wait(job.id, RUNNING)
        assert (back.attempts[-1].pid, len(back.attempts)) == (pid, 1)
        until("it draws again", lambda: daemon.get_power().draw_w > 1000)
        assert not is_stopped(pid)


def test_a_frozen_miner_outlives_a_killed_daemon_and_the_next_one_thaws_it_within_its_budget() -> None:
    config = FREEZABLE.replace("[power]\n", f"[power]\nbudget_w = {WIDE_W}\n")
    with Daemon(gpus="2xH100", config=config).start() as daemon:
        job = a_frozen_miner(daemon)
        pid = job.attempts[-1].pid

        daemon.kill()
        assert is_stopped(pid)
        daemon.restart()

        assert daemon.get(job.id).state == SUSPENDED
        assert is_stopped(pid)
        daemon.cancel_event("e1")
        # Not before it was frozen for a while: the budget goes on, and may move to and fro.
        assert (
            daemon.wait(job.id, RUNNING, timeout_s=2 * WAIT_S + FROZEN_US_MIN / 1e6).attempts[-1].pid == pid
        )
        until("it has its watts again", lambda: daemon.get_power().draw_w > 1000)


def test_a_frozen_job_that_must_go_is_woken_to_hear_it() -> None:
    with Daemon(gpus="2xH100", config=FREEZABLE).start() as daemon:
        job = a_frozen_miner(daemon)
        daemon.requeue(job.id)
        first = until("it has left", lambda: ended(daemon, job.id))
        assert first.exit_code == 0, "it heard the signal"
        assert first.end_reason == reason_pb2.REASON_REQUEUED_BY_OPERATOR


def test_a_frozen_job_that_somebody_kills_is_told_so_and_comes_back() -> None:
    with Daemon(gpus="2xH100", config=FREEZABLE).start() as daemon:
        job = a_frozen_miner(daemon)
        os.kill(job.attempts[-1].pid, signal.SIGKILL)
        first = until("its end is told", lambda: ended(daemon, job.id))
        assert first.exit_code == 128 + signal.SIGKILL
        daemon.cancel_event("e1")
        assert daemon.wait_attempt(job.id, 2).state == RUNNING


def ended(daemon: Daemon, job_id: str) -> job_pb2.Attempt | None:
    """The job's first attempt, once it has an exit code."""
    first = daemon.get(job_id).attempts[0]
    return first if first.HasField("exit_code") else None
