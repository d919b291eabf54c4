"""A miner that may be frozen gives up its watts in place: real daemon and processes, simulated boards."""

import os
import signal

from scheduler.planning.freezing import FROZEN_US_MIN
from scheduler.v1 import reason_pb2
from tests.harness.daemon import PENDING, RUNNING, WAIT_S, Daemon, reason_of, until
from tests.harness.freezing import (
    FREEZABLE,
    SUSPENDED,
    TIGHT_W,
    WIDE_W,
    a_frozen_miner,
    ended,
    is_stopped,
)


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
