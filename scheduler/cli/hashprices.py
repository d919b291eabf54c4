"""`power hashprices`: what mining earns, and what the miners say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scheduler.cli import output, words
from scheduler.cli.session import Session, talks
from scheduler.errors import FeedError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from scheduler.v1 import power_pb2, power_service_pb2

PRICE_TITLES = ("ALGORITHM", "UNIT", "USD/DAY", "AT")
MINER_TITLES = ("JOB", "GPU", "ALGORITHM", "HASHRATE", "PROVED", "SHARES", "REFUSED", "USD/H", "REMARK")
MINER_NUMBERS = ("HASHRATE", "PROVED", "SHARES", "REFUSED", "USD/H")
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--none", "clear", is_flag=True, help="Know none any more: mining is worth what jobs say.")
@talks
@click.pass_obj
def hashprices(session: Session, file: Path | None, clear: bool) -> None:
    """Show what mining earns and what the miners say, or set hashprices from a FILE (- = standard input).

    FILE is CSV with the columns algorithm, unit and usd_per_day (what one unit of hashrate, such as MH/s,
    earns in a day), perhaps at, or JSON with the same names; it replaces what was set before.
    """
    from scheduler.v1 import power_service_pb2

    if file is not None and clear:
        raise click.UsageError("give a FILE, or --none")
    request = power_service_pb2.SetHashpricesRequest()
    if file is not None:
        _read(file, request)
    with session.connect() as client:
        answer: Message
        if file is None and not clear:
            answer = client.call(
                client.power.GetPower, power_service_pb2.GetPowerRequest(), power_service_pb2.GetPowerResponse
            )
        else:
            answer = client.call(client.power.SetHashprices, request, power_service_pb2.SetHashpricesResponse)
    if session.json:
        output.print_message(answer)
    else:
        _print(answer.power.mining)


def _read(file: Path, request: power_service_pb2.SetHashpricesRequest) -> None:
    from scheduler.effects.feed import FEED_BYTES_MAX
    from scheduler.effects.hashprice_feed import parse_hashprices

    try:
        with click.open_file(str(file), "rb") as opened:
            found = parse_hashprices(opened.read(FEED_BYTES_MAX + 1), str(file), time.time())
    except OSError as error:
        raise click.UsageError(f"{file} can't be read: {error.strerror}") from error
    except FeedError as error:
        raise click.UsageError(str(error)) from error
    for one in found:
        message = request.hashprices.add(algorithm=one.algorithm, unit=one.unit, usd_per_day=one.usd_per_day)
        message.at.FromMicroseconds(round(one.at_s * 1e6))


def _print(mining: power_pb2.Mining) -> None:
    if not mining.hashprices and not mining.source:
        click.echo(
            "No hashprice is known: mining is worth what jobs say. "
            "`wattshift power hashprices FILE` sets some."
        )
    else:
        click.echo(words.clean(f"source     {mining.source or 'set by clients'}"))
    if mining.problem:
        click.echo(words.clean(f"problem    {mining.problem}"))
    rows = [
        (one.algorithm, one.unit, f"{one.usd_per_day:.6g}", words.moment(one.at)) for one in mining.hashprices
    ]
    if rows:
        output.print_table(output.table(PRICE_TITLES, rows, right=PRICE_TITLES[2:3]))
    if mining.miners:
        output.print_table(output.table(MINER_TITLES, map(_row, mining.miners), right=MINER_NUMBERS))


def _row(one: power_pb2.MinerStatus) -> tuple[str, ...]:
    return (
        one.job_id,
        ", ".join(words.gpu_names(one.gpus).values()) or words.NONE,
        one.algorithm,
        _rate(one.hashrate_hs) if one.HasField("hashrate_hs") else words.NONE,
        _rate(one.proved_hashrate_hs) if one.HasField("proved_hashrate_hs") else words.NONE,
        str(one.accepted_shares),
        str(one.refused_shares),
        f"{one.value_usd_per_gpu_hour:.4f}",
        one.problem,
    )


def _rate(hashrate_hs: float) -> str:
    """A hashrate with a prefix that makes it short."""
    for prefix in _PREFIXES:
        if hashrate_hs < 1000 or prefix == _PREFIXES[-1]:
            break
        hashrate_hs /= 1000
    return f"{hashrate_hs:.4g} {prefix}H/s"
