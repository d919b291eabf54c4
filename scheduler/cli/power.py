"""`power`: the budget, grid events, and what of them is met."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scheduler.cli import output, words
from scheduler.cli.hashprices import hashprices
from scheduler.cli.power_report import report
from scheduler.cli.session import Session, talks
from scheduler.cli.values import DURATION_S, time_s, typed, watts
from scheduler.errors import FeedError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from scheduler.v1 import power_pb2

WATTS = typed("watts", watts)
MOMENT = typed("time", lambda text: time_s(text, time.time()))
GPU_TITLES = ("GPU", "DRAW W", "LIMIT W", "RANGE W", "FOUND W", "REMARK")
GPU_NUMBERS = ("GPU", "DRAW W", "LIMIT W", "RANGE W", "FOUND W")
EVENT_TITLES = ("EVENT", "STATE", "START", "END", "BUDGET W", "MEASURED W", "SHED", "REMARK")
# Why a limit is where it is, where that is not plain.
CAUSES = {
    "NATURAL": "its job's draw and a margin",
    "OPERATING_POINT": "its miner earns most there",
    "SHED": "gives up watts for the budget",
}
PRICE_TITLES = ("FROM", "UNTIL", "USD/KWH")
EVENT_NUMBERS = ("BUDGET W", "MEASURED W", "SHED")


@click.group()
def power() -> None:
    """Show and set what the site may draw."""


power.add_command(report)
power.add_command(hashprices)


@power.command()
@talks
@click.pass_obj
def status(session: Session) -> None:
    """Show the budget, the measured draw, and each GPU's part."""
    from scheduler.v1 import power_service_pb2

    with session.connect() as client:
        request = power_service_pb2.GetPowerRequest()
        answer = client.call(client.power.GetPower, request, power_service_pb2.GetPowerResponse)
    _print(session, answer, answer.power)


@power.command()
@click.argument("budget", type=WATTS, required=False, metavar="WATTS")
@click.option("--from", "start_s", type=MOMENT, help="From then on: 2026-01-31T18:00:00Z, or +30m.")
@click.option("--until", "end_s", type=MOMENT, help="Until then, as --from [default: until it is replaced].")
@click.option(
    "--valid-for",
    "valid_for_s",
    type=DURATION_S,
    help="Without being set again within this, the declared safe level holds.",
)
@click.option("--none", "clear", is_flag=True, help="Set none any more.")
@talks
@click.pass_obj
def budget(
    session: Session,
    budget: float | None,
    start_s: float | None,
    end_s: float | None,
    valid_for_s: float | None,
    clear: bool,
) -> None:
    """Set what the site may draw, in watts with fans and all; it replaces what was set before.

    The configuration's budget and grid events hold beside it: the tightest binds.
    """
    from scheduler.v1 import power_service_pb2

    if (budget is None) != clear:
        raise click.UsageError("give watts, or --none")
    request = power_service_pb2.SetPowerBudgetRequest(valid_for_s=valid_for_s or 0.0)
    if budget is not None:
        interval = request.intervals.add(budget_w=budget)
        _set_times(interval, start_s, end_s)
    with session.connect() as client:
        answer = client.call(client.power.SetPowerBudget, request, power_service_pb2.SetPowerBudgetResponse)
    _print(session, answer, answer.power)


@power.group()
def event() -> None:
    """Offer, cancel and list grid events: a grid's calls for less."""


@event.command()
@click.argument("event_id", metavar="ID")
@click.option("--budget", "budget_w", type=WATTS, required=True, help="What the site may draw meanwhile.")
@click.option("--from", "start_s", type=MOMENT, help="When it starts [default: now].")
@click.option("--until", "end_s", type=MOMENT, required=True, help="When it ends: a time, or +15m.")
@click.option("--emergency", is_flag=True, help="At once and whatever it takes; never refused.")
@talks
@click.pass_obj
def submit(
    session: Session, event_id: str, budget_w: float, start_s: float | None, end_s: float, emergency: bool
) -> None:
    """Offer a grid event; one that can't be met is refused, with the least that could be."""
    from scheduler.v1 import power_service_pb2

    request = power_service_pb2.SubmitGridEventRequest()
    request.event.id, request.event.budget_w, request.event.emergency = event_id, budget_w, emergency
    _set_times(request.event, start_s, end_s)
    with session.connect() as client:
        answer = client.call(client.power.SubmitGridEvent, request, power_service_pb2.SubmitGridEventResponse)
    _print_events(session, answer, [answer.event])


@event.command()
@click.argument("event_id", metavar="ID")
@talks
@click.pass_obj
def cancel(session: Session, event_id: str) -> None:
    """End a grid event that is scheduled or in force."""
    from scheduler.v1 import power_service_pb2

    request = power_service_pb2.CancelGridEventRequest(event_id=event_id)
    with session.connect() as client:
        answer = client.call(client.power.CancelGridEvent, request, power_service_pb2.CancelGridEventResponse)
    _print_events(session, answer, [answer.event])


@event.command(name="list")
@click.option("--all", "every", is_flag=True, help="Also those that are over or cancelled.")
@talks
@click.pass_obj
def list_(session: Session, every: bool) -> None:
    """List grid events, and how their sheds went."""
    from scheduler.v1 import power_service_pb2

    request = power_service_pb2.ListGridEventsRequest(all=every)
    with session.connect() as client:
        answer = client.call(client.power.ListGridEvents, request, power_service_pb2.ListGridEventsResponse)
    _print_events(session, answer, answer.events)


@power.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--none", "clear", is_flag=True, help="Know none any more: energy costs nothing.")
@talks
@click.pass_obj
def prices(session: Session, file: Path | None, clear: bool) -> None:
    """Show what electricity costs, or set it from a FILE (- = standard input).

    FILE is CSV with the columns start and usd_per_kwh (or usd_per_mwh), or JSON with the same names; it
    replaces what was set before. Times are Unix seconds or 2026-01-31T18:00:00Z.
    """
    from scheduler.effects.feed import FEED_BYTES_MAX
    from scheduler.effects.price_feed import parse_prices
    from scheduler.v1 import power_service_pb2

    if file is not None and clear:
        raise click.UsageError("give a FILE, or --none")
    request = power_service_pb2.SetPricesRequest()
    if file is not None:
        try:
            with click.open_file(str(file), "rb") as opened:
                points = parse_prices(opened.read(FEED_BYTES_MAX + 1), str(file))
        except OSError as error:
            raise click.UsageError(f"{file} can't be read: {error.strerror}") from error
        except FeedError as error:
            raise click.UsageError(str(error)) from error
        for point in points:
            message = request.prices.add(usd_per_kwh=point.usd_per_kwh)
            _set_times(message, point.start_s, point.end_s)
    with session.connect() as client:
        answer: Message
        if file is None and not clear:
            answer = client.call(
                client.power.GetPower, power_service_pb2.GetPowerRequest(), power_service_pb2.GetPowerResponse
            )
        else:
            answer = client.call(client.power.SetPrices, request, power_service_pb2.SetPricesResponse)
    _print_price(session, answer, answer.power.price)


def _set_times(
    message: power_pb2.BudgetInterval | power_pb2.GridEvent | power_pb2.PricePoint,
    start_s: float | None,
    end_s: float | None,
) -> None:
    if start_s is not None:
        message.start.FromMicroseconds(round(start_s * 1e6))
    if end_s is not None:
        message.end.FromMicroseconds(round(end_s * 1e6))


def _print(session: Session, answer: Message, power: power_pb2.Power) -> None:
    if session.json:
        output.print_message(answer)
        return
    for line in _summary(power):
        print(words.clean(line))
    names = words.gpu_names(gpu.uuid for gpu in power.gpus)
    rows = [
        (
            names[gpu.uuid],
            f"{gpu.draw_w:.0f}" if gpu.HasField("draw_w") else words.NONE,
            f"{gpu.limit_w:.0f}",
            f"{gpu.limit_w_min:.0f}-{gpu.limit_w_max:.0f}",
            f"{gpu.limit_w_found:.0f}" if gpu.HasField("limit_w_found") else words.NONE,
            gpu.refusal or CAUSES.get(words.word(gpu, "limit_cause"), ""),
        )
        for gpu in sorted(power.gpus, key=lambda gpu: gpu.index)
    ]
    output.print_table(output.table(GPU_TITLES, rows, right=GPU_NUMBERS))


def _summary(power: power_pb2.Power) -> list[str]:
    """What holds, in a few lines."""
    budget = f"{math.floor(power.budget_w)} W" if power.HasField("budget_w") else "none"
    draw = f"{power.draw_w:.0f} W" if power.HasField("draw_w") else "not known: a GPU has no fresh reading"
    lines = [
        f"budget     {budget}",
        f"draw       {draw}",
        f"committed  {power.committed_w:.0f} W",
        f"floor      {power.floor_w:.0f} W",
    ]
    if power.HasField("price"):
        lines.append(f"price      {_price_line(power.price)}")
    if power.HasField("openadr"):
        lines += _openadr_lines(power.openadr)
    for source in power.sources:
        kind = words.word(source, "kind").lower().replace("_", " ")
        name = f" {source.event_id}" if source.event_id else ""
        until = f" until {words.moment(source.until)}" if source.HasField("until") else ""
        lines.append(f"source     {kind}{name}: {source.budget_w:.0f} W{until}")
    return lines


def _openadr_lines(openadr: power_pb2.OpenAdr) -> list[str]:
    """How it stands with the VTN."""
    answered = openadr.HasField("contact_age_s")
    contact = f"answered {words.span(openadr.contact_age_s)} ago" if answered else "has not answered yet"
    lost = ", contact lost: limits run out, the subscription holds" if openadr.lost else ""
    lines = [f"openadr    {openadr.vtn}, program {openadr.program}: {contact}{lost}"]
    lines += [f"problem    {text}" for text in openadr.problems]
    if openadr.unused:
        lines.append(f"not used   {', '.join(openadr.unused)}")
    return lines


def _price_line(price: power_pb2.ElectricityPrice) -> str:
    """The price in force in words."""
    if not price.HasField("age_s"):
        state = ", declared: none is known yet"
    elif price.declared:
        state = f", declared: the last known one is {words.span(price.age_s)} old"
    else:
        state = f", {words.span(price.age_s)} out of date" if price.age_s else ""
    return f"{price.usd_per_kwh:.5f} USD/kWh{state}"


def _print_price(session: Session, answer: Message, price: power_pb2.ElectricityPrice) -> None:
    if session.json:
        output.print_message(answer)
        return
    if not price.ListFields():
        click.echo("No price is known: energy costs nothing. `wattshift power prices FILE` sets some.")
        return
    click.echo(f"price      {_price_line(price)}")
    click.echo(words.clean(f"source     {price.source or 'set by clients'}"))
    if price.problem:
        click.echo(words.clean(f"problem    {price.problem}"))
    rows = [
        (
            words.moment(one.start),
            words.moment(one.end) if one.HasField("end") else words.NONE,
            f"{one.usd_per_kwh:.5f}",
        )
        for one in price.prices
    ]
    output.print_table(output.table(PRICE_TITLES, rows, right=PRICE_TITLES[2:]))


def _print_events(session: Session, answer: Message, events: Iterable[power_pb2.GridEvent]) -> None:
    if session.json:
        output.print_message(answer)
        return
    rows = [
        (
            event.id,
            ("OVER, " if event.over else "") + words.word(event, "state"),
            words.moment(event.start),
            words.moment(event.end),
            f"{event.budget_w:.0f}",
            f"{event.measured_w:.0f}" if event.HasField("measured_w") else words.NONE,
            _shed(event),
            "; ".join(event.reasons) or ("emergency" if event.emergency else ""),
        )
        for event in events
    ]
    output.print_table(output.table(EVENT_TITLES, rows, right=EVENT_NUMBERS))


def _shed(event: power_pb2.GridEvent) -> str:
    """How long the shed took until it was met or given up."""
    if not event.HasField("shed_began_at") or not event.HasField("shed_ended_at"):
        return words.NONE
    return f"{words.epoch_s(event.shed_ended_at) - words.epoch_s(event.shed_began_at):.1f} s"
