"""`power report`: what became of a grid event, from the daemon or straight from its journal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scheduler import paths
from scheduler.cli import output, words
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.session import Session, talks
from scheduler.errors import NotFound

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from scheduler.v1 import power_report_pb2, power_service_pb2

# Seconds here are counted from the begin of the shed.
JOB_TITLES = ("AT S", "JOB", "CLASS", "WHAT", "WATTS", "REMARK")
JOB_NUMBERS = ("AT S", "WATTS")
DRAW_TITLES = ("FROM S", "TO S", "MEAN W", "LEAST W", "MOST W", "MISSING S")
# The draw is shown in so many stretches of time.
ROWS_MAX = 24
GAPS_SHOWN = 8


@click.command()
@click.argument("event_id", metavar="ID")
@click.option("--offline", is_flag=True, help="Without a daemon: read the journal itself.")
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="With --offline: the daemon's [default: as the daemon's].",
)
@talks
@click.pass_obj
def report(session: Session, event_id: str, offline: bool, state_dir: Path | None) -> None:
    """Report a grid event: what was asked and when, what the site drew, what was delivered, by whom.

    With -o json the draw is there second by second.
    """
    if state_dir is not None and not offline:
        raise click.UsageError("--state-dir needs --offline")
    answer = _offline(event_id, state_dir) if offline else _ask(session, event_id)
    if session.json:
        output.print_message(answer)
        return
    shown = answer.report
    for line in _lines(shown):
        print(words.clean(line))
    if shown.jobs:
        print()
        began_s = words.epoch_s(shown.event.shed_began_at)
        rows = [_job(job, began_s) for job in shown.jobs]
        output.print_table(output.table(JOB_TITLES, rows, right=JOB_NUMBERS))
    if shown.draw:
        print()
        output.print_table(output.table(DRAW_TITLES, _draw(shown), right=DRAW_TITLES))
    print()
    for line in shown.limits:
        print(line)


def _ask(session: Session, event_id: str) -> power_service_pb2.GetGridEventReportResponse:
    from scheduler.v1 import power_service_pb2

    request = power_service_pb2.GetGridEventReportRequest(event_id=event_id)
    with session.connect() as client:
        answer: power_service_pb2.GetGridEventReportResponse = client.call(
            client.power.GetGridEventReport, request, power_service_pb2.GetGridEventReportResponse
        )
    return answer


def _offline(event_id: str, state_dir: Path | None) -> power_service_pb2.GetGridEventReportResponse:
    from scheduler.api.power_report import report_message
    from scheduler.control.event_report import event_report
    from scheduler.effects.journal_history import open_history
    from scheduler.v1 import power_service_pb2

    with open_history(state_dir or paths.for_daemon().state_dir) as history:
        try:
            found = event_report(history, event_id, time.time())
        except NotFound as error:
            raise CliError(ExitCode.NOT_FOUND, str(error)) from error
    return power_service_pb2.GetGridEventReportResponse(report=report_message(found))


def _lines(report: power_report_pb2.GridEventReport) -> Iterator[str]:
    """The report in a few lines, in the order in which it happened."""
    event = report.event
    kind = "emergency" if event.emergency else "voluntary"
    yield f"event       {event.id}, {kind}: at most {event.budget_w:.0f} W"
    yield f"asked       from {words.moment(event.start)} to {words.moment(event.end)}"
    if report.HasField("received_at"):
        yield f"received    {words.moment(report.received_at)}"
    yield f"accepted    {words.moment(event.accepted_at)}, reachable then: {event.floor_w:.0f} W"
    if not event.HasField("shed_began_at"):
        yield f"shed        has not begun; the event is {words.word(event, 'state')}"
        return
    began = event.shed_began_at
    yield f"shed began  {words.moment(began)}"
    if report.HasField("first_fall_at"):
        yield f"fell        {_after(report.first_fall_at, began)}: the first whole second below the baseline"
    for move in report.moves:
        state = words.word(move, "state")
        if state in ("MET", "FAILED") and not move.over:
            measured = f" at {move.measured_w:.0f} W" if move.HasField("measured_w") else ""
            why = f": {'; '.join(move.reasons)}" if move.reasons else ""
            yield f"{state.lower():<11} {_after(move.at, began)}{measured}{why}"
    if report.HasField("ended_at"):
        cancelled = ", cancelled" if words.word(event, "state") == "CANCELLED" else ""
        yield f"ended       {words.moment(report.ended_at)}{cancelled}"
    else:
        yield "ended       not yet"
    yield from _figures(report)


def _figures(report: power_report_pb2.GridEventReport) -> Iterator[str]:
    if not report.HasField("baseline") or not report.baseline.HasField("site_w"):
        yield "baseline    not known: a board had no reading when the shed began"
    else:
        yield f"baseline    {_baseline(report.baseline)}"
    if report.HasField("delivery"):
        one = report.delivery
        missing = f", {one.seconds_missing} s missing" if one.seconds_missing else ""
        yield (
            f"delivered   {one.mean_w:.0f} W on average of {one.asked_w:.0f} W asked, "
            f"{one.least_w:.0f} W at least"
        )
        yield (
            f"            {one.delivered_wh:.1f} Wh in {one.seconds_known} s{missing}; "
            f"{one.over_wh:.1f} Wh beyond what was asked"
        )
        yield f"short       {one.seconds_short} s above the event's watts, by {one.short_wh:.2f} Wh"
    if report.HasField("rebound"):
        back = report.rebound
        yield (
            f"rebound     {back.most_w:.0f} W at most, {_after(back.most_at, report.ended_at)} later; "
            f"{back.above_wh:.1f} Wh above the baseline in {back.seconds_known} s"
        )
    yield f"back-test   {_back_test(report.back_test)}"
    if report.other_events:
        yield f"meanwhile   in force, too: {', '.join(report.other_events)}"
    if report.missing:
        began = report.event.shed_began_at
        gaps = [f"{_seconds(began, gap.start)} to {_seconds(began, gap.end)}" for gap in report.missing]
        more = f", and {len(gaps) - GAPS_SHOWN} more" if len(gaps) > GAPS_SHOWN else ""
        total = sum(_seconds(gap.start, gap.end) for gap in report.missing)
        yield f"missing     {total} s of the draw: {', '.join(gaps[:GAPS_SHOWN])}{more} s"
    if report.cut:
        yield "cut         only its first day is reported"


def _baseline(one: power_report_pb2.GridEventBaseline) -> str:
    jobs = [job.draw_w for job in one.jobs if job.HasField("draw_w")]
    unread = len(one.jobs) - len(jobs)
    parts = [
        f"{words.count(len(jobs), 'job')} {sum(jobs):.0f} W",
        f"idle boards {one.idle_w:.0f} W",
        f"base {one.base_w:.0f} W",
        f"x PUE {one.pue:g}",
    ]
    if unread:
        parts.insert(1, f"{words.count(unread, 'job')} not measured yet")
    waiting = f"; {words.count(one.pending, 'job')} waited" if one.pending else ""
    return f"{one.site_w:.0f} W: {', '.join(parts)}{waiting}"


def _back_test(one: power_report_pb2.BaselineBackTest) -> str:
    tried = f"{words.count(one.windows, 'window')} of {words.span(one.window_s)} without an event"
    if not one.HasField("error_p95_w"):
        return f"not enough history: {tried}, ten are needed"
    share = f" ({one.error_p95_w / one.mean_draw_w:.1%})" if one.mean_draw_w > 0 else ""
    return (
        f"the baseline was off by {one.bias_w:+.0f} W on average, by at most {one.error_p95_w:.0f} W{share} "
        f"in 95 of 100: {tried}"
    )


def _job(one: power_report_pb2.TouchedJob, began_s: float) -> tuple[str, ...]:
    kind = words.word(one, "kind").lower()
    remark = one.reason.lower().replace("_", " ")
    if kind == "limited":
        before, least = one.limit_w_before, one.limit_w_least
        remark = f"{before:.0f} W to {least:.0f} W on {words.gpu_name(one.gpu)}"
    elif one.HasField("again_at"):
        remark += f"; started again {_after(one.again_at, one.at)} later"
    return (
        f"{words.epoch_s(one.at) - began_s:.1f}",
        one.job_id,
        words.word(one, "class") or words.NONE,
        kind,
        f"{one.draw_w:.0f}" if one.HasField("draw_w") else words.NONE,
        remark,
    )


def _draw(report: power_report_pb2.GridEventReport) -> Iterator[tuple[str, ...]]:
    """The draw in stretches of equal length; what is missing altogether is one."""
    began, step = report.event.shed_began_at, math.ceil(len(report.draw) / ROWS_MAX)
    stretches = [report.draw[place : place + step] for place in range(0, len(report.draw), step)]
    for is_known, run in groupby(stretches, lambda part: any(one.HasField("draw_w") for one in part)):
        for stretch in run if is_known else [list(chain.from_iterable(run))]:
            known = [one.draw_w for one in stretch if one.HasField("draw_w")]
            first_s, missing = _seconds(began, stretch[0].at), len(stretch) - len(known)
            figures = (sum(known) / len(known), min(known), max(known)) if known else ()
            yield (
                str(first_s),
                str(first_s + len(stretch)),
                *(f"{watts:.0f}" for watts in figures),
                *([] if known else [words.NONE] * 3),
                str(missing) if missing else words.NONE,
            )


def _after(one: Timestamp, other: Timestamp) -> str:
    return f"{words.epoch_s(one) - words.epoch_s(other):.1f} s"


def _seconds(start: Timestamp, end: Timestamp) -> int:
    return round(words.epoch_s(end) - words.epoch_s(start))
