"""The price gate: work that earns less than its energy costs does not run.

It holds for the classes that price may steer; all others run whatever a kilowatt-hour costs. Where value
decides who runs, training is one of them. A job starts as soon as its value net of energy is positive. It
is stopped only where going on for an hour would cost more than the restart loss that a stop makes: on 200
days of real prices that keeps 99.9 % of what a miner with perfect foresight earns (`docs/PRICES.md`).

Mining has three useful states, not two: at full draw, at less, and off. As energy becomes dearer the best
limit slides down the curve of work against draw, from one of its corners to the next, until off is better.
"""

from typing import Any, NamedTuple

from scheduler.model.jobs import JobClass
from scheduler.model.policy import Order
from scheduler.model.power import Curve
from scheduler.model.snapshot import PENDING, RUNNING, SUSPENDED, UNKNOWN, Snapshot
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.valuation import restart_cost

PRICE_STEERED = {
    Order.CLASS: (JobClass.BATCH, JobClass.MINING),
    Order.VALUE: (JobClass.TRAINING, JobClass.BATCH, JobClass.MINING),
}
# A limit stays where it is while another would earn no more than this part of the gross value more.
DEAD_BAND_MILLI = 5
_MILLI = 1000


class Point(NamedTuple):
    """A power limit to mine at, and what is earned there net of energy, micro-USD per GPU-hour."""

    limit_w: int  # UNKNOWN = the full one
    net: int


def operating_point(
    curve: Curve,
    natural_w: int,
    gross: int,
    microusd_per_kwh: int,
    least_w: int,
    present_w: int | None = None,
) -> Point:
    """Where a miner earns most: at its full limit, or at one of the corners of its curve.

    What is earned is straight between two corners, so that the best lies at one, or at the board's least
    limit. `gross` is in micro-USD per GPU-hour at full draw. `present_w` is where it is now (UNKNOWN: full),
    and stays where nothing else is better by more than the dead band. Of equals the larger limit.
    """
    points = [Point(UNKNOWN, gross - _cost(natural_w, microusd_per_kwh))]
    for draw_milli, _ in curve.points[1:]:
        limit_w = max(least_w, -(-natural_w * draw_milli // _MILLI))
        if limit_w < natural_w:
            earned = gross * curve.work_milli(limit_w * _MILLI // natural_w) // _MILLI
            points.append(Point(limit_w, earned - _cost(limit_w, microusd_per_kwh)))
    best = max(points, key=lambda point: point.net)
    for point in points:
        if point.limit_w == present_w and best.net - point.net <= gross * DEAD_BAND_MILLI // _MILLI:
            return point
    return best


def _cost(watts: int, microusd_per_kwh: int) -> int:
    """Micro-USD an hour, rounded."""
    return (2 * watts * microusd_per_kwh + _MILLI) // (2 * _MILLI)


def too_dear_to_start(snapshot: Snapshot, order: Order) -> Any:
    """Bool, shape (jobs,): the pending jobs that would cost more energy than they are worth."""
    jobs = snapshot.jobs
    return _steered(snapshot, order) & (jobs.state == PENDING) & (jobs.value <= 0)


def too_dear_to_go_on(snapshot: Snapshot, order: Order) -> tuple[Any, Any]:
    """Rows of the live jobs to stop for the price, and when those that may not be stopped yet may be, us."""
    jobs = snapshot.jobs
    assert snapshot.gross_value is not None
    live = (jobs.state == RUNNING) | (jobs.state == SUSPENDED)
    cost = restart_cost(snapshot.gross_value, jobs.restart_loss_us)
    dear = rows_where(_steered(snapshot, order) & live & jobs.preemptible & (jobs.value < -cost))
    started_us = jobs.started_us[dear]
    yields_us = xp.where(started_us == UNKNOWN, 0, started_us + jobs.min_runtime_us[dear])
    return dear[yields_us <= snapshot.now_us], yields_us[yields_us > snapshot.now_us]


def _steered(snapshot: Snapshot, order: Order) -> Any:
    steered = xp.zeros(len(snapshot.jobs), dtype=bool)
    for job_class in PRICE_STEERED[order]:
        steered |= snapshot.jobs.job_class == int(job_class)
    return steered
