"""Electricity prices of a table: `start` and one of `usd_per_kwh`, `usd_per_mwh`; `end` may be there.

Times are Unix seconds or RFC 3339 with an offset.
"""

import csv

from scheduler.effects.feed import Row, moment, number, rows
from scheduler.errors import FeedError
from scheduler.model.prices import PricePoint, checked

_KWH_PER_MWH = 1000.0
_REQUIRED = frozenset({"start"})
_COLUMNS = frozenset({"start", "end", "usd_per_kwh", "usd_per_mwh"})


def parse_prices(body: bytes, name: str) -> tuple[PricePoint, ...]:
    """The series that a feed sent.

    Raises:
        FeedError: It is none; the words name the row and what is wrong with it.
    """
    try:
        table = rows(body, name, _REQUIRED, _COLUMNS)
        points = checked(_point(place, row) for place, row in enumerate(table, start=1))
    except (ValueError, csv.Error, RecursionError) as error:
        raise FeedError(f"{name} is no series of prices: {error}") from error
    if not points:
        raise FeedError(f"{name} has no price in it")
    return points


def _point(place: int, row: Row) -> PricePoint:
    per_kwh, per_mwh = row.get("usd_per_kwh"), row.get("usd_per_mwh")
    if (per_kwh is None) == (per_mwh is None):
        raise ValueError(f"row {place} needs one of usd_per_kwh and usd_per_mwh")
    try:
        price = number(per_kwh) if per_kwh is not None else number(per_mwh) / _KWH_PER_MWH
        end = row.get("end")
        return PricePoint(moment(row.get("start")), price, None if end in (None, "") else moment(end))
    except ValueError as error:
        raise ValueError(f"row {place}: {error}") from error
