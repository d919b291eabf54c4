"""Tables that somebody else renews: a file or a URL, read whole, in CSV or JSON.

CSV has a header; JSON is an array of objects with the same names. What the rows mean is their reader's:
`price_feed.py` makes electricity prices of them, `hashprice_feed.py` hashprices.
"""

import asyncio
import csv
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from scheduler.errors import FeedError

# A year of quarters of an hour takes 2 MiB.
FEED_BYTES_MAX = 4 << 20
FETCH_S_MAX = 20.0
_USER_AGENT = "wattshift"

Row = Mapping[str, object]
_T = TypeVar("_T")


class Source(Protocol):
    """Where a table is read."""

    @property
    def name(self) -> str:
        """The source for a person: a path, or a URL without what is secret in it."""

    async def read(self) -> bytes:
        """All of it, one byte more than `FEED_BYTES_MAX` at the most.

        Raises:
            FeedError: It could not be read; the words say why.
        """


class FileSource:
    """A file."""

    def __init__(self, path: Path) -> None:
        """Take the file's path."""
        self._path = path

    @property
    def name(self) -> str:
        return str(self._path)

    async def read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                return file.read(FEED_BYTES_MAX + 1)
        except OSError as error:
            raise FeedError(f"{self.name} can't be read: {error.strerror}") from error


class UrlSource:
    """A URL, http or https."""

    def __init__(self, url: str, timeout_s: float = FETCH_S_MAX) -> None:
        """Take the address, and how long a fetch may take in all."""
        self._url = url
        self._timeout_s = timeout_s

    @property
    def name(self) -> str:
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"

    async def read(self) -> bytes:
        try:
            # The thread of a server that dribbles ends by its own time-out; nobody waits for it.
            return await asyncio.wait_for(asyncio.to_thread(self._read), self._timeout_s)
        except TimeoutError as error:
            raise FeedError(f"{self.name} did not answer within {self._timeout_s:g} s") from error
        except urllib.error.HTTPError as error:
            error.close()
            raise FeedError(f"{self.name} answered {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            raise FeedError(f"{self.name} can't be read: {error}") from error

    def _read(self) -> bytes:
        request = urllib.request.Request(self._url, headers={"User-Agent": _USER_AGENT})
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # the scheme is checked
            body: bytes = answer.read(FEED_BYTES_MAX + 1)
            return body


@dataclass(frozen=True, slots=True)
class Feed(Generic[_T]):
    """A source, and what is made of it."""

    source: Source
    parse: Callable[[bytes, str], _T]  # of the bytes and the source's name

    @property
    def name(self) -> str:
        """The source for a person."""
        return self.source.name

    async def fetch(self) -> _T:
        """Read the whole table.

        Raises:
            FeedError: It could not be read, or is none of these; the words say why.
        """
        return self.parse(await self.source.read(), self.name)


def feed_of(source: str, parse: Callable[[bytes, str], _T]) -> Feed[_T] | None:
    """The feed that a setting names: an absolute path or a URL; None where it is empty."""
    if not source:
        return None
    return Feed(FileSource(Path(source)) if source.startswith("/") else UrlSource(source), parse)


def rows(body: bytes, name: str, required: frozenset[str], columns: frozenset[str]) -> Iterable[Row]:
    """The rows of a table, in CSV with `required` and no other than `columns` in its header, or in JSON.

    Raises:
        FeedError: It is too large.
        ValueError: It is no table (`csv.Error`, `RecursionError` too).
    """
    if len(body) > FEED_BYTES_MAX:
        raise FeedError(
            f"{name} is larger than {FEED_BYTES_MAX >> 20} MiB; let it send the nearest prices only"
        )
    text = body.decode()
    if text.lstrip()[:1] in ("[", "{"):
        found = json.loads(text)
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(f"JSON must be an array of objects with {', '.join(sorted(required))}")
        return found
    reader = csv.DictReader(io.StringIO(text))
    header = set(reader.fieldnames or ())
    if not required <= header <= columns:
        raise ValueError(f"the header must be of {', '.join(sorted(columns))}, is {text[:40]!r}")
    return reader


def number(value: object) -> float:
    """The number in a cell; `ValueError` where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is no number") from None


def moment(value: object) -> float:
    """Unix seconds of the moment in a cell; `ValueError` where there is none."""
    try:
        return number(value)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is no time; write Unix seconds or 2026-01-31T12:00:00+00:00") from None
    if found.tzinfo is None:
        raise ValueError(f"{value!r} has no offset from UTC; append one, such as Z or -06:00")
    return found.timestamp()
