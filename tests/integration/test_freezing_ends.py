"""A frozen job that comes to an end, by whatever: a reboot, a drain, a release, a cancel, its time limit."""

import grpc
import pytest

from scheduler.v1 import job_pb2, node_pb2, node_service_pb2
from tests.harness.daemon import (
    CALL_S,
    CANCELLED,
    FAILED,
    PENDING,
    RUNNING,
    STOPPING,
    WAIT_S,
    Daemon,
    logged,
    reason_of,
    until,
    word,
)
from tests.harness.freezing import (
    FREEZABLE,
    SUSPENDED,
    TIGHT_W,
    WIDE_W,
    a_frozen_job,
    a_frozen_miner,
    ended,
    frozen,
    is_stopped,
)
from tests.harness.miners import MINERS, mined

# No standing jobs: these come and go by command.
BARE = MINERS.partition("[[standing_jobs]]")[0]
FREE = node_pb2.GPU_STATE_FREE


def drain(daemon: Daemon, *, stop_jobs: bool) -> None:
    daemon.node.DrainNode(node_service_pb2.DrainNodeRequest(stop_jobs=stop_jobs), timeout=CALL_S)


def limits_found(daemon: Daemon) -> list[float | None]:
    """By GPU, the limit that is owed; None: it has its own."""
    gpus = daemon.get_power().gpus
    return [gpu.limit_w_found if gpu.HasField("limit_w_found") else None for gpu in gpus]


def heard(job: job_pb2.Job) -> bool:
    """Whether the job's last attempt was woken, heard its notice and ended by itself."""
    last = job.attempts[-1]
    return last.HasField("signalled_at") and last.exit_code == 0


def test_a_cancel_wakes_a_frozen_job_to_hear_it_and_the_watts_stay_within_the_event() -> None:
    with Daemon(gpus="2xH100", config=BARE).start() as daemon, logged(daemon):
        job = a_frozen_job(daemon)
        pid = job.attempts[-1].pid
        assert daemon.cancel(job.id).state == STOPPING
        gone = daemon.wait(job.id)
        assert (gone.state, heard(gone)) == (CANCELLED, True)
        assert pid not in daemon.processes()
        until("its board is free", lambda: [gpu.state for gpu in daemon.get_node().gpus].count(FREE) == 1)
        power = daemon.get_power()
        assert max(power.draw_w, power.committed_w) <= TIGHT_W
        assert len(daemon.running()) == 1


def test_the_time_limit_of_a_frozen_job_runs_on_and_wakes_it_to_hear_its_end() -> None:
    with Daemon(gpus="2xH100", config=BARE).start() as daemon, logged(daemon):
        job = a_frozen_job(daemon, time_limit_s=6.0)
        gone = daemon.wait(job.id)
        assert (gone.state, reason_of(gone), heard(gone)) == (FAILED, "TIME_LIMIT", True)
        last = gone.attempts[-1]
        held_s = (last.exited_at.ToNanoseconds() - last.started_at.ToNanoseconds()) / 1e9
        assert held_s >= 6.0


def test_a_drain_that_stops_nobody_lets_a_frozen_job_be_and_its_watts_wake_it() -> None:
    with Daemon(gpus="2xH100", config=BARE).start() as daemon, logged(daemon):
        job = a_frozen_job(daemon)
        pid = job.attempts[-1].pid
        drain(daemon, stop_jobs=False)
        assert (daemon.get(job.id).state, is_stopped(pid)) == (SUSPENDED, True)
        daemon.cancel_event("e1")
        back = daemon.wait(job.id, RUNNING)
        assert (back.attempts[-1].pid, back.attempt) == (pid, 1)


def test_a_drain_that_stops_jobs_wakes_the_frozen_one_too() -> None:
    with Daemon(gpus="2xH100", config=FREEZABLE).start() as daemon, logged(daemon):
        job = a_frozen_miner(daemon)
        drain(daemon, stop_jobs=True)
        first = until("it has left", lambda: ended(daemon, job.id))
        assert first.exit_code == 0, "it heard the signal"
        assert word(first.end_reason) == "NODE_DRAINED"
        until("nobody is live", lambda: not daemon.get_node().live_jobs)


def test_a_release_waits_for_a_frozen_job_like_any_other_and_then_gives_its_limit_back() -> None:
    with Daemon(gpus="2xH100", config=BARE).start() as daemon, logged(daemon):
        job = a_frozen_job(daemon)
        assert None not in limits_found(daemon)
        with pytest.raises(grpc.RpcError) as refused:
            daemon.release()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert job.id in refused.value.details()
        assert daemon.get(job.id).state == SUSPENDED
        drain(daemon, stop_jobs=True)
        until("nobody is live", lambda: not daemon.get_node().live_jobs)
        assert heard(daemon.get(job.id))
        daemon.release()
        until("the limits are as they were", lambda: limits_found(daemon) == [None, None])


def test_a_reboot_takes_a_frozen_job_along_and_it_comes_back_with_its_watts() -> None:
    config = FREEZABLE.replace("[power]\n", f"[power]\nbudget_w = {WIDE_W}\n")
    with Daemon(gpus="2xH100", config=config).start() as daemon, logged(daemon):
        job = a_frozen_miner(daemon)
        daemon.reboot()
        daemon.start()

        first = daemon.get(job.id).attempts[0]
        assert (word(first.end_reason), first.lost) == ("NODE_REBOOTED", True)
        assert not frozen(daemon)
        # The event goes on: there are watts for one.
        until("one mines", lambda: mined(daemon) == 1)
        until("the other waits for them", lambda: "WAITING_FOR_POWER" in waiting(daemon))
        assert daemon.get_power().committed_w <= TIGHT_W
        daemon.cancel_event("e1")
        until("both mine", lambda: mined(daemon) == 2, 2 * WAIT_S)
        assert daemon.verify().returncode == 0


def waiting(daemon: Daemon) -> list[str]:
    return [reason_of(job) for job in daemon.all_jobs(states=[PENDING])]
