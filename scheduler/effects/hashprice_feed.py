"""Hashprices of a table: `algorithm`, `unit` and `usd_per_day`, what one unit of hashrate earns in a day.

`at` may be there: when that was so, in Unix seconds or RFC 3339 with an offset; else it is so now.
"""

import csv

from scheduler.effects.feed import Row, moment, number, rows
from scheduler.errors import FeedError
from scheduler.model.mining import Hashprice, checked_hashprices

_REQUIRED = frozenset({"algorithm", "unit", "usd_per_day"})
_COLUMNS = _REQUIRED | {"at"}


def parse_hashprices(body: bytes, name: str, now_s: float) -> tuple[Hashprice, ...]:
    """The hashprices that a feed sent.

    Raises:
        FeedError: They are none; the words name the row and what is wrong with it.
    """
    try:
        table = rows(body, name, _REQUIRED, _COLUMNS)
        found = checked_hashprices(_hashprice(place, row, now_s) for place, row in enumerate(table, start=1))
    except (ValueError, csv.Error, RecursionError) as error:
        raise FeedError(f"{name} is no table of hashprices: {error}") from error
    if not found:
        raise FeedError(f"{name} has no hashprice in it")
    return found


def _hashprice(place: int, row: Row, now_s: float) -> Hashprice:
    algorithm, unit, at = row.get("algorithm"), row.get("unit"), row.get("at")
    if not isinstance(algorithm, str) or not isinstance(unit, str):
        raise ValueError(f"row {place} needs an algorithm and a unit")
    try:
        at_s = now_s if at in (None, "") else min(now_s, moment(at))
        return Hashprice(algorithm.strip(), unit.strip(), number(row.get("usd_per_day")), at_s)
    except ValueError as error:
        raise ValueError(f"row {place}: {error}") from error
