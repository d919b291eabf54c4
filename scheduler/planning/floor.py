"""The floor: the least that the boards can be brought to draw, by which events are accepted or refused."""

from scheduler.model.jobs import JobClass
from scheduler.model.snapshot import PENDING, PREEMPTING, STOPPING, UNKNOWN, Snapshot
from scheduler.planning.arrays import rows_where, xp


def floor_w(snapshot: Snapshot, by_us: int, *, emergency: bool) -> int:
    """The least that the boards can draw by then; an emergency waits for no grace and no minimum runtime.

    Who may be stopped gives way to idle draw; of the others limits fall to the boards' minimum, if they may.
    """
    power, jobs, holdings = snapshot.power, snapshot.jobs, snapshot.holdings
    assert power is not None
    started_us = xp.where(jobs.started_us == UNKNOWN, snapshot.now_us, jobs.started_us)
    gone_us = xp.maximum(snapshot.now_us, started_us + jobs.min_runtime_us) + jobs.grace_us
    told_us = xp.where(jobs.stop_us == UNKNOWN, snapshot.now_us, jobs.stop_us) + jobs.grace_us
    goes = (jobs.state == PREEMPTING) | (jobs.state == STOPPING)
    in_time = xp.where(goes, told_us, gone_us) <= by_us
    stops = (jobs.preemptible | goes) & (in_time | emergency)
    held = rows_where(holdings.job != UNKNOWN)
    job = holdings.job[held]
    stuck = held[~stops[job] & (jobs.state[job] != PENDING)]
    count = len(snapshot.gpus)
    lowered = jobs.job_class[holdings.job[stuck]] != int(JobClass.INFERENCE)
    if power.limits_inference:
        lowered |= True
    is_stuck = xp.bincount(holdings.gpu[stuck], minlength=count) > 0
    is_firm = xp.bincount(holdings.gpu[stuck[~lowered]], minlength=count) > 0
    least_w = xp.where(is_firm, power.limit_w, xp.minimum(power.limit_w_min, power.limit_w))
    return int(xp.where(is_stuck, least_w, power.idle_w).sum())
