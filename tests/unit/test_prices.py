"""Prices: what a series says at a moment, and what a feed may send."""

import contextlib
import http.server
import json
import math
import operator
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.effects.feed import FEED_BYTES_MAX, FETCH_S_MAX, Feed, FileSource, Source, UrlSource
from scheduler.effects.price_feed import parse_prices as parse
from scheduler.errors import FeedError
from scheduler.model.prices import PRICE_POINTS_MAX, Price, PricePoint, PriceSeries, checked

HOUR_S = 3600.0


def series(*points: PricePoint) -> PriceSeries:
    return PriceSeries(checked(points))


def test_each_price_holds_until_the_next_and_the_last_until_it_is_too_old() -> None:
    prices = series(PricePoint(100.0, 0.03), PricePoint(1000.0, -0.01))
    assert prices.at(99.9, HOUR_S, 0.5) == Price(0.5, math.inf, is_declared=True)
    assert prices.at(100.0, HOUR_S, 0.5) == Price(0.03, 0.0)
    assert prices.at(999.9, HOUR_S, 0.5) == Price(0.03, 0.0)
    assert prices.at(999.0 + HOUR_S, HOUR_S, 0.5) == Price(-0.01, HOUR_S - 1.0)
    assert prices.at(1000.0 + HOUR_S, HOUR_S, 0.5) == Price(0.5, HOUR_S, is_declared=True)


def test_a_price_with_an_end_is_never_old_before_it() -> None:
    prices = series(PricePoint(0.0, 0.2, 1e6))
    assert prices.at(999_999.0, 60.0, 0.5) == Price(0.2, 0.0)
    assert prices.at(1_000_059.0, 60.0, 0.5) == Price(0.2, 59.0)
    assert prices.at(1_000_060.0, 60.0, 0.5).is_declared


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 12) | st.none()),
        max_size=6,
        unique_by=operator.itemgetter(0),
    ),
    st.integers(0, 10),
    st.integers(-5, 60),
)
def test_between_the_moments_named_nothing_changes(
    rows: list[tuple[int, int | None]], max_age_s: int, now_s: int
) -> None:
    prices = series(*(PricePoint(s, s / 100, None if d is None else s + d) for s, d in rows))
    until_s = prices.next_change_s(now_s, max_age_s)
    before = prices.at(now_s, max_age_s, 9.0)
    for later_s in range(now_s, now_s + 100):
        if until_s is not None and later_s >= until_s:
            break
        then = prices.at(later_s, max_age_s, 9.0)
        assert (then.usd_per_kwh, then.is_declared) == (before.usd_per_kwh, before.is_declared)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([PricePoint(0.0, math.nan)], "price 1 is nan"),
        ([PricePoint(0.0, 1e9)], "1 USD per kWh = 1000 USD per MWh"),
        ([PricePoint(0.0, 0.1, 0.0)], "before it starts"),
        ([PricePoint(5.0, 0.1), PricePoint(5.0, 0.2)], "same moment"),
        ([PricePoint(math.inf, 0.1)], "moment in time"),
        ([PricePoint(float(n), 0.1) for n in range(PRICE_POINTS_MAX + 1)], "at most 10000"),
    ],
)
def test_what_is_no_price_is_refused(points: list[PricePoint], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checked(points)


def test_csv_and_json_in_either_unit_and_either_way_to_say_a_time() -> None:
    wanted = (PricePoint(1_767_225_600.0, 0.03), PricePoint(1_767_226_500.0, -0.0125))
    csv = b"usd_per_mwh,start\n30,1767225600\n-12.5,2026-01-01T00:15:00Z\n"
    assert parse(csv, "f") == wanted
    rows = [
        {"start": "2025-12-31T18:00:00-06:00", "usd_per_kwh": 0.03},
        {"start": 1767226500, "usd_per_mwh": -12.5},
    ]
    assert parse(json.dumps(rows).encode(), "f") == wanted
    assert parse(b"start,end,usd_per_kwh\n0,60,1\n", "f") == (PricePoint(0.0, 1.0, 60.0),)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "header must be"),
        (b"<html>No</html>", "header must be"),
        (b"start,usd_per_kwh\n", "no price in it"),
        (b"start,usd_per_kwh\n1,one\n", "row 1: 'one' is no number"),
        (b"start,usd_per_kwh\n1\n", "row 1 needs one of"),
        (b"start,usd_per_kwh\nyesterday,1\n", "row 1: 'yesterday' is no time"),
        (b"start,usd_per_kwh\n2026-01-01T00:00:00,1\n", "no offset from UTC"),
        (b"start,usd_per_kwh,colour\n1,1,red\n", "header must be"),
        (b'{"prices": []}', "array of objects"),
        (b"[1, 2]", "array of objects"),
        (b"[" * 100_000, "no series of prices"),
        (b'[{"start": 1, "usd_per_kwh": true}]', "True is no number"),
        (b'[{"start": 1, "usd_per_kwh": 1, "usd_per_mwh": 1}]', "one of"),
        (b"\xff\xfe", "no series of prices"),
        (b"x" * (FEED_BYTES_MAX + 1), "larger than 4 MiB"),
    ],
)
def test_what_is_no_series_is_refused_with_the_row(body: bytes, words: str) -> None:
    with pytest.raises(FeedError, match=words):
        parse(body, "f")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_series_or_a_feed_error(body: bytes) -> None:
    with contextlib.suppress(FeedError):
        assert parse(body, "f")


async def fetched(source: Source) -> tuple[PricePoint, ...]:
    return await Feed(source, parse).fetch()


async def test_a_file_is_read_and_a_missing_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    with pytest.raises(FeedError, match="No such file"):
        await fetched(FileSource(path))
    path.write_text("start,usd_per_kwh\n0,0.5\n")
    assert await fetched(FileSource(path)) == (PricePoint(0.0, 0.5),)


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/good":
                self._say(200, b"start,usd_per_mwh\n0,50\n")
            case "/html":
                self._say(200, b"<html>Service</html>")
            case "/500":
                self._say(500, b"no")
            case "/huge":
                self.send_response(200)
                self.end_headers()
                try:
                    for _ in range(1024):
                        self.wfile.write(b"x" * (1 << 20))
                except OSError:
                    pass
            case _:
                time.sleep(1.0)  # longer than the fetch may take

    def _say(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/html", "no series"),
        ("/500", "answered 500"),
        ("/huge", "larger than"),
        ("/hangs?key=secret", "did not answer within"),
    ],
)
async def test_a_url_that_is_no_feed_says_why_and_keeps_what_is_secret(
    server: str, path: str, words: str
) -> None:
    with pytest.raises(FeedError, match=words) as caught:
        await fetched(UrlSource(server + path, timeout_s=0.5))
    assert "secret" not in str(caught.value)


async def test_a_url_that_is_a_feed_is_read(server: str) -> None:
    assert await fetched(UrlSource(server + "/good")) == (PricePoint(0.0, 0.05),)


async def test_a_url_where_nobody_listens_says_so() -> None:
    with pytest.raises(FeedError, match="can't be read"):
        await fetched(UrlSource("http://127.0.0.1:9", timeout_s=5.0))
    assert FETCH_S_MAX < 60
