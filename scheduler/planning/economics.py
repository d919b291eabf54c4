"""The price gate: work that earns less than its energy costs does not run.

It holds for the classes that price may steer; all others run whatever a kilowatt-hour costs. A job starts as
soon as its value net of energy is positive. It is stopped only where going on for an hour would cost more
than the restart loss that a stop makes: on 200 days of real prices that keeps 99.9 % of what a miner with
perfect foresight earns (`docs/PRICES.md`).
"""

from typing import Any

from scheduler.model.jobs import JobClass
from scheduler.model.snapshot import PENDING, RUNNING, SUSPENDED, UNKNOWN, Snapshot
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.valuation import restart_cost

PRICE_STEERED = (JobClass.BATCH, JobClass.MINING)


def too_dear_to_start(snapshot: Snapshot) -> Any:
    """Bool, shape (jobs,): the pending jobs that would cost more energy than they are worth."""
    jobs = snapshot.jobs
    return _steered(snapshot) & (jobs.state == PENDING) & (jobs.value <= 0)


def too_dear_to_go_on(snapshot: Snapshot) -> tuple[Any, Any]:
    """Rows of the live jobs to stop for the price, and when those that may not be stopped yet may be, us."""
    jobs = snapshot.jobs
    assert snapshot.gross_value is not None
    live = (jobs.state == RUNNING) | (jobs.state == SUSPENDED)
    cost = restart_cost(snapshot.gross_value, jobs.restart_loss_us)
    dear = rows_where(_steered(snapshot) & live & jobs.preemptible & (jobs.value < -cost))
    started_us = jobs.started_us[dear]
    yields_us = xp.where(started_us == UNKNOWN, 0, started_us + jobs.min_runtime_us[dear])
    return dear[yields_us <= snapshot.now_us], yields_us[yields_us > snapshot.now_us]


def _steered(snapshot: Snapshot) -> Any:
    steered = xp.zeros(len(snapshot.jobs), dtype=bool)
    for job_class in PRICE_STEERED:
        steered |= snapshot.jobs.job_class == int(job_class)
    return steered
