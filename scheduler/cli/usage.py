"""`usage`: who used what."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from scheduler.cli import output, words
from scheduler.cli.session import Session, talks
from scheduler.cli.values import past_s, typed

if TYPE_CHECKING:
    from scheduler.cli.client import Client
    from scheduler.v1 import usage_service_pb2

GROUPS = ("job", "tenant", "class", "gpu")
PAGE_SIZE = 1000
ROWS_MAX = 100_000  # a year of jobs of a busy node; more is a question for --since
PAST = typed("time", lambda text: past_s(text, time.time()))
NUMBERS = ("GPU-HOURS", "ENERGY WH", "UNPRICED WH", "COST USD", "VALUE USD", "PROFIT USD", "PREEMPTIONS")


@click.command()
@click.option(
    "--by",
    "group_by",
    type=click.Choice(GROUPS, case_sensitive=False),
    default="class",
    show_default=True,
    help="One row for each.",
)
@click.option("--since", "start_s", type=PAST, help="From then on: 2026-01-31T18:00:00Z, or 2h (ago).")
@click.option("--until", "end_s", type=PAST, help="Until then, as --since [default: now].")
@talks
@click.pass_obj
def usage(session: Session, group_by: str, start_s: float | None, end_s: float | None) -> None:
    """Say who used what.

    GPU time, energy, its cost, value, and how often they gave way to others. What energy cost whose price
    nobody knew is in no COST and PROFIT.
    """
    from scheduler.v1 import usage_service_pb2

    request = usage_service_pb2.ListUsageRequest(
        group_by=f"USAGE_GROUP_{group_by.upper()}", page_size=PAGE_SIZE
    )
    if start_s is not None:
        request.start.FromMicroseconds(round(start_s * 1e6))
    if end_s is not None:
        request.end.FromMicroseconds(round(end_s * 1e6))
    with session.connect() as client:
        answer = _list(client, request)
    if session.json:
        output.print_message(answer)
        return
    rows = [
        (
            entry.key or words.NONE,
            f"{entry.gpu_seconds / words.HOUR_S:.3f}",
            f"{entry.energy_wh:.1f}",
            f"{entry.unpriced_energy_wh:.1f}" if entry.unpriced_energy_wh else words.NONE,
            words.usd(entry.cost_usd) if entry.HasField("cost_usd") else words.NONE,
            words.usd(entry.value_usd),
            words.usd(entry.profit_usd) if entry.HasField("profit_usd") else words.NONE,
            str(entry.preemptions),
        )
        for entry in answer.usage
    ]
    output.print_table(output.table((group_by.upper(), *NUMBERS), rows, right=NUMBERS))


def _list(client: Client, request: usage_service_pb2.ListUsageRequest) -> usage_service_pb2.ListUsageResponse:
    """Return all pages as one answer."""
    from scheduler.v1 import usage_service_pb2

    answer = usage_service_pb2.ListUsageResponse()
    while True:
        page = client.call(client.usage.ListUsage, request, usage_service_pb2.ListUsageResponse)
        answer.usage.extend(page.usage)
        answer.next_page_token = page.next_page_token
        if not page.next_page_token or len(answer.usage) >= ROWS_MAX:
            return answer
        request.page_token = page.next_page_token
