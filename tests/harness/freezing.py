"""Jobs that a shed freezes rather than stops, for tests through the real daemon and launcher."""

from pathlib import Path
from typing import Any

from scheduler.v1 import job_pb2, power_pb2
from tests.harness.daemon import Daemon, until
from tests.harness.miners import MINER, MINERS, mined

SUSPENDED = job_pb2.JOB_STATE_SUSPENDED
MET = power_pb2.SHED_STATE_MET
# A stop would cost more than a minute of mining: it is frozen instead.
RESTART_LOSS_S, DRAW_W = 600.0, 560.0
FREEZABLE = f'{MINERS}on_preempt = "suspend"\nrestart_loss_s = {RESTART_LOSS_S}\ndraw_w = {DRAW_W}\n'
# Two boards of 560 W, of which a limit takes 190 each at most: one more has to give.
TIGHT_W = 640.0
WIDE_W = 1400.0  # room for both


def frozen(daemon: Daemon) -> list[job_pb2.Job]:
    """The jobs that are frozen."""
    return daemon.all_jobs(states=[SUSPENDED])


def a_frozen_miner(daemon: Daemon) -> job_pb2.Job:
    """One of two standing miners, frozen by a grid event that is met."""
    until("all mine", lambda: mined(daemon) == 2)
    return frozen_by_event(daemon)


def a_frozen_job(daemon: Daemon, **fields: Any) -> job_pb2.Job:
    """One of two jobs that were submitted, frozen likewise."""
    for _ in range(2):
        daemon.run(
            script=MINER,
            job_class="mining",
            on_preempt=job_pb2.ON_PREEMPT_SUSPEND,
            restart_loss_s=RESTART_LOSS_S,
            draw_w=DRAW_W,
            **fields,
        )
    return frozen_by_event(daemon)


def frozen_by_event(daemon: Daemon) -> job_pb2.Job:
    """The one job that a grid event has frozen, once it is met."""
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


def ended(daemon: Daemon, job_id: str) -> job_pb2.Attempt | None:
    """The job's first attempt, once it has an exit code."""
    first = daemon.get(job_id).attempts[0]
    return first if first.HasField("exit_code") else None
