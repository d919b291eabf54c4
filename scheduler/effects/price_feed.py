"""Where prices come from: a file or a URL, read whole, in CSV or JSON.

CSV has a header with `start` and one of `usd_per_kwh`, `usd_per_mwh`; JSON is an array of objects with the
same names. `end` may be there. Times are Unix seconds or RFC 3339 with an offset.
"""

import asyncio
import csv
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from scheduler.errors import FeedError
from scheduler.model.prices import PricePoint, checked

# A year of quarters of an hour takes 2 MiB.
FEED_BYTES_MAX = 4 << 20
FETCH_S_MAX = 20.0
_KWH_PER_MWH = 1000.0
_USER_AGENT = "wattshift"
_COLUMNS = frozenset({"start", "end", "usd_per_kwh", "usd_per_mwh"})


class PriceFeed(Protocol):
    """A source of prices."""

    @property
    def name(self) -> str:
        """The source for a person: a path, or a URL without what is secret in it."""

    async def fetch(self) -> tuple[PricePoint, ...]:
        """Read the whole series.

        Raises:
            FeedError: It could not be read, or is no series of prices; the words say why.
        """


class FilePrices:
    """Prices in a file that somebody else renews."""

    def __init__(self, path: Path) -> None:
        """Take the file's path."""
        self._path = path

    @property
    def name(self) -> str:
        return str(self._path)

    async def fetch(self) -> tuple[PricePoint, ...]:
        try:
            with self._path.open("rb") as file:
                body = file.read(FEED_BYTES_MAX + 1)
        except OSError as error:
            raise FeedError(f"{self.name} can't be read: {error.strerror}") from error
        return parse(body, self.name)


class UrlPrices:
    """Prices behind a URL, http or https."""

    def __init__(self, url: str, timeout_s: float = FETCH_S_MAX) -> None:
        """Take the address, and how long a fetch may take in all."""
        self._url = url
        self._timeout_s = timeout_s

    @property
    def name(self) -> str:
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"

    async def fetch(self) -> tuple[PricePoint, ...]:
        try:
            # The thread of a server that dribbles ends by its own time-out; nobody waits for it.
            body = await asyncio.wait_for(asyncio.to_thread(self._read), self._timeout_s)
        except TimeoutError as error:
            raise FeedError(f"{self.name} did not answer within {self._timeout_s:g} s") from error
        except urllib.error.HTTPError as error:
            error.close()
            raise FeedError(f"{self.name} answered {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            raise FeedError(f"{self.name} can't be read: {error}") from error
        return parse(body, self.name)

    def _read(self) -> bytes:
        request = urllib.request.Request(self._url, headers={"User-Agent": _USER_AGENT})
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # the scheme is checked
            body: bytes = answer.read(FEED_BYTES_MAX + 1)
            return body


def parse(body: bytes, name: str) -> tuple[PricePoint, ...]:
    """The series that a feed sent.

    Raises:
        FeedError: It is none; the words name the row and what is wrong with it.
    """
    if len(body) > FEED_BYTES_MAX:
        raise FeedError(
            f"{name} is larger than {FEED_BYTES_MAX >> 20} MiB; let it send the nearest prices only"
        )
    try:
        text = body.decode()
        rows = _from_json(text) if text.lstrip()[:1] in ("[", "{") else _from_csv(text)
        points = checked(_point(number, row) for number, row in enumerate(rows, start=1))
    except (ValueError, csv.Error, RecursionError) as error:
        raise FeedError(f"{name} is no series of prices: {error}") from error
    if not points:
        raise FeedError(f"{name} has no price in it")
    return points


def _from_json(text: str) -> Iterable[Mapping[str, object]]:
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("JSON must be an array of objects with start and usd_per_kwh")
    return found


def _from_csv(text: str) -> Iterable[Mapping[str, object]]:
    reader = csv.DictReader(io.StringIO(text))
    header = set(reader.fieldnames or ())
    if not {"start"} < header or not header <= _COLUMNS:
        raise ValueError(f"the header must be start and usd_per_kwh (or usd_per_mwh), is {text[:40]!r}")
    return reader


def _point(number: int, row: Mapping[str, object]) -> PricePoint:
    per_kwh, per_mwh = row.get("usd_per_kwh"), row.get("usd_per_mwh")
    if (per_kwh is None) == (per_mwh is None):
        raise ValueError(f"row {number} needs one of usd_per_kwh and usd_per_mwh")
    try:
        price = _number(per_kwh) if per_kwh is not None else _number(per_mwh) / _KWH_PER_MWH
        end = row.get("end")
        return PricePoint(_moment(row.get("start")), price, None if end in (None, "") else _moment(end))
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is no number") from None


def _moment(value: object) -> float:
    """Unix seconds of a moment."""
    try:
        return _number(value)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is no time; write Unix seconds or 2026-01-31T12:00:00+00:00") from None
    if moment.tzinfo is None:
        raise ValueError(f"{value!r} has no offset from UTC; append one, such as Z or -06:00")
    return moment.timestamp()
