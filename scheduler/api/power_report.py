"""The report of a grid event as a message."""

import math
from collections.abc import Iterator
from typing import Any

from scheduler.api import convert
from scheduler.control.event_report import LIMITS, BackTest, Delivery, EventReport, Rebound
from scheduler.control.event_touched import Deed, Touched
from scheduler.model.jobs import JobClass
from scheduler.model.power import Baseline
from scheduler.model.power_events import GridEventMoved
from scheduler.v1 import power_report_pb2

_KINDS: dict[Deed, Any] = {
    deed: power_report_pb2.TouchKind.Value(f"TOUCH_KIND_{deed.value}") for deed in Deed
}


def report_message(report: EventReport) -> power_report_pb2.GridEventReport:
    """What became of a grid event, as clients see it."""
    event, back_test = report.event, report.back_test
    return power_report_pb2.GridEventReport(
        event=convert.grid_event(event),
        received_at=convert.timestamp(event.received_s),
        moves=[_move(one) for one in report.moves],
        first_fall_at=convert.timestamp(report.first_fall_s),
        ended_at=convert.timestamp(event.ended_s),
        baseline=None if report.baseline is None else _baseline(report.baseline),
        delivery=None if report.delivery is None else _delivery(report.delivery),
        rebound=None if report.rebound is None else _rebound(report.rebound),
        back_test=_back_test(back_test) if back_test.window_s else None,
        jobs=[_touched(one) for one in report.touched],
        draw=_seconds(report),
        missing=[
            power_report_pb2.TimeSpan(start=convert.timestamp(since_s), end=convert.timestamp(until_s))
            for since_s, until_s in report.missing
        ],
        other_events=report.others,
        cut=report.is_cut,
        limits=LIMITS,
    )


def _move(one: GridEventMoved) -> power_report_pb2.GridEventMove:
    return power_report_pb2.GridEventMove(
        at=convert.timestamp(one.at_s),
        state=convert.SHED_STATES[one.to],
        measured_w=one.measured_w,
        reasons=one.reasons,
        over=one.is_over,
    )


def _baseline(one: Baseline) -> power_report_pb2.GridEventBaseline:
    jobs = []
    for job in one.jobs:
        said = power_report_pb2.BaselineJob(job_id=job.job_id, gpus=job.gpus, draw_w=job.draw_w)
        setattr(said, "class", convert.job_class(JobClass[job.job_class]))
        jobs.append(said)
    return power_report_pb2.GridEventBaseline(
        at=convert.timestamp(one.at_s),
        site_w=one.site_w,
        jobs=jobs,
        idle_w=one.idle_w,
        base_w=one.base_w,
        pue=one.pue,
        pending=one.pending,
    )


def _delivery(one: Delivery) -> power_report_pb2.GridEventDelivery:
    return power_report_pb2.GridEventDelivery(
        start=convert.timestamp(one.since_s),
        end=convert.timestamp(one.until_s),
        seconds_known=one.known,
        seconds_missing=one.missing,
        asked_w=one.asked_w,
        mean_w=one.mean_w,
        least_w=one.least_w,
        delivered_wh=one.delivered_wh,
        over_wh=one.over_wh,
        seconds_short=one.short,
        short_wh=one.short_wh,
    )


def _rebound(one: Rebound) -> power_report_pb2.GridEventRebound:
    return power_report_pb2.GridEventRebound(
        end=convert.timestamp(one.until_s),
        seconds_known=one.known,
        most_w=one.most_w,
        most_at=convert.timestamp(one.most_at_s),
        above_wh=one.above_wh,
    )


def _back_test(one: BackTest) -> power_report_pb2.BaselineBackTest:
    return power_report_pb2.BaselineBackTest(
        windows=one.windows,
        window_s=one.window_s,
        bias_w=one.bias_w,
        error_p95_w=one.error_w,
        mean_draw_w=one.mean_w,
    )


def _touched(one: Touched) -> power_report_pb2.TouchedJob:
    said = power_report_pb2.TouchedJob(
        job_id=one.job_id,
        kind=_KINDS[one.deed],
        at=convert.timestamp(one.at_s),
        reason=one.reason,
        draw_w=one.draw_w,
        gpu=one.gpu,
        limit_w_before=one.limit_w_before,
        limit_w_least=one.limit_w_least,
        again_at=convert.timestamp(one.again_s),
    )
    if one.job_class:
        setattr(said, "class", convert.job_class(JobClass[one.job_class]))
    return said


def _seconds(report: EventReport) -> Iterator[power_report_pb2.DrawSecond]:
    for at_s, draw_w in enumerate(report.draw_w.tolist(), start=report.first_s):
        known_w = None if math.isnan(draw_w) else round(draw_w, 1)
        yield power_report_pb2.DrawSecond(at=convert.timestamp(at_s), draw_w=known_w)
