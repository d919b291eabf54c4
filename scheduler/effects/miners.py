"""What miners say of themselves: T-Rex, lolMiner, Rigel and XMRig over HTTP, the cgminer family over TCP.

All on 127.0.0.1, within a deadline and a size. A field that is missing, or is no number, is one that the
miner doesn't say; only an answer that is none at all is an error. [README files of T-Rex, lolMiner and Rigel;
xmrig `doc/API.md`; cgminer `API-README`; UselessGuru/UG-Miner `Includes/MinerAPIs`]
"""

import asyncio
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from scheduler.errors import FeedError
from scheduler.model.mining import Miner, MinerApi, MinerReading, unit_hs

HOST = "127.0.0.1"
ANSWER_S_MAX = 15.0
# Rigs of 16 GPUs answer with some 30 KiB.
ANSWER_BYTES_MAX = 512 << 10
HEAD_BYTES_MAX = 16 << 10
TOKEN_CHARACTERS_MAX = 4096
# Beyond every network's; a larger one is no hashrate.
HASHRATE_HS_MAX = 1e24
SHARES_MAX = 1 << 53
_OK = 200
_PIECE_BYTES = 64 << 10
# Of cgminer's averages those that are neither nervous nor of yesterday first.
_SPANS = ("5m", "1m", "15m", "5s", "20s", "av")
_RATE_KEY = re.compile(r"([KMGTPE]?)HS (\w+)")


async def read_miner(miner: Miner, port: int, token: str, timeout_s: float = ANSWER_S_MAX) -> MinerReading:
    """What the miner on this port says now.

    Raises:
        FeedError: It does not answer, or not as such a miner does; the words say why.
    """
    name = f"{miner.api.value} on {HOST}:{port}"
    try:
        async with asyncio.timeout(timeout_s):
            body = await _exchange(miner.api, port, token)
    except TimeoutError as error:
        raise FeedError(f"{name} did not answer within {timeout_s:g} s") from error
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise FeedError(f"{name} can't be read: {error}"[:256]) from error
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FeedError(f"{name} did not answer in JSON: {error}"[:256]) from error
    if not isinstance(said, dict):
        raise FeedError(
            f"{name} did not answer as such a miner does; is that its API, and the right miner_api?"
        )
    return reading_of(miner.api, said, miner.algorithm)


def reading_of(api: MinerApi, said: Any, algorithm: str) -> MinerReading:
    """What such a miner's JSON object says."""
    return _READERS[api](said, algorithm.lower())


# The answers -------------------------------------------------------------------------------------


def _t_rex(said: Any, _: str) -> MinerReading:
    refused = _sum(said, ("rejected_count", "invalid_count"))
    return MinerReading(_rate(said.get("hashrate")), _count(said.get("accepted_count")), refused)


def _lolminer(said: Any, algorithm: str) -> MinerReading:
    algorithms = said.get("Algorithms")
    found = [one for one in algorithms if isinstance(one, dict)] if isinstance(algorithms, list) else []
    one = _chosen({str(each.get("Algorithm", "")).lower(): each for each in found}, algorithm)
    unit = unit_hs(str(one.get("Performance_Unit", "")))
    value = _rate(one.get("Total_Performance"))
    hashrate = None if unit is None or value is None else _rate(value * unit)
    refused = _sum(one, ("Total_Rejected", "Total_Stales"))
    return MinerReading(hashrate, _count(one.get("Total_Accepted")), refused)


def _rigel(said: Any, algorithm: str) -> MinerReading:
    hashrates, stats = _table(said.get("hashrate")), _table(said.get("solution_stat"))
    one = _chosen({name.lower(): _table(stat) for name, stat in stats.items()}, algorithm)
    rate = _chosen({name.lower(): {"hashrate": rate} for name, rate in hashrates.items()}, algorithm)
    refused = _sum(one, ("rejected", "invalid"))
    return MinerReading(_rate(rate.get("hashrate")), _count(one.get("accepted")), refused)


def _xmrig(said: Any, _: str) -> MinerReading:
    results, total = _table(said.get("results")), _table(said.get("hashrate")).get("total")
    spans = total if isinstance(total, list) else []
    # 10 s, 60 s and 15 min; each is null until it is over.
    rates = [_rate(rate) for rate in (*spans[1:2], *spans[:1], *spans[2:3])]
    good, all_ = _count(results.get("shares_good")), _count(results.get("shares_total"))
    refused = max(0, all_ - good) if good is not None and all_ is not None else 0
    return MinerReading(next((rate for rate in rates if rate is not None), None), good, refused)


def _cgminer(said: Any, _: str) -> MinerReading:
    summaries = said.get("SUMMARY")
    one = _table(summaries[0]) if isinstance(summaries, list) and summaries else {}
    rates: dict[str, float] = {}
    for key, value in one.items():
        found, rate = _RATE_KEY.fullmatch(key), _rate(value)
        if found is not None and rate is not None:
            rates[found[2]] = rate * (unit_hs(f"{found[1]}H/s") or math.nan)
    hashrate = next((_rate(rates[span]) for span in _SPANS if span in rates), None)
    return MinerReading(hashrate, _count(one.get("Accepted")), _sum(one, ("Rejected", "Stale")))


_READERS: dict[MinerApi, Callable[[Any, str], MinerReading]] = {
    MinerApi.T_REX: _t_rex,
    MinerApi.LOLMINER: _lolminer,
    MinerApi.RIGEL: _rigel,
    MinerApi.XMRIG: _xmrig,
    MinerApi.CGMINER: _cgminer,
}
_PATHS = {
    MinerApi.T_REX: "/summary",
    MinerApi.LOLMINER: "/summary",
    MinerApi.RIGEL: "/stat",
    MinerApi.XMRIG: "/2/summary",
}


def _chosen(by_algorithm: Mapping[str, Any], algorithm: str) -> Any:
    """What is said of the algorithm: the only one that there is, or the one of this name, or nothing."""
    if len(by_algorithm) == 1:
        return next(iter(by_algorithm.values()))
    return by_algorithm.get(algorithm, {})


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A number, also one that is written as text: `"13,500.00"`."""
    if isinstance(value, str):
        try:
            value = float(value.replace(",", ""))
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -math.inf < value < math.inf else None


def _rate(value: Any) -> float | None:
    rate = _number(value)
    return rate if rate is not None and 0.0 <= rate <= HASHRATE_HS_MAX else None


def _count(value: Any) -> int | None:
    count = _number(value)
    return int(count) if count is not None and 0 <= count <= SHARES_MAX else None


def _sum(said: Any, names: Iterable[str]) -> int:
    return sum(_count(said.get(name)) or 0 for name in names)


# The exchange ------------------------------------------------------------------------------------


async def _exchange(api: MinerApi, port: int, token: str) -> bytes:
    """Ask, and return the body of the answer."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=HEAD_BYTES_MAX)
    try:
        if api is MinerApi.CGMINER:
            writer.write(b'{"command":"summary"}')
            return (await _to_the_end(reader, b"\0")).rstrip(b"\0")
        # 1.0, so that the answer is not cut into chunks and the connection ends with it.
        head = [f"GET {_PATHS[api]} HTTP/1.0", f"Host: {HOST}:{port}", "Accept: application/json"]
        if not token.isprintable() or not token.isascii():
            raise ValueError("the token has characters that no header takes")
        if token:
            head.append(f"Authorization: Bearer {token}")
        writer.write("\r\n".join([*head, "Connection: close", "", ""]).encode())
        return await _http_body(reader)
    finally:
        writer.transport.abort()  # whoever still sends is not waited for


async def _http_body(reader: asyncio.StreamReader) -> bytes:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdecimal():
        raise ValueError("that is no HTTP")
    if int(words[1]) != _OK:
        raise ValueError(f"it answered {' '.join(words[1:])}")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:])
    }
    if headers.get("transfer-encoding", "identity").lower() == "chunked":
        return await _chunks(reader)
    length = headers.get("content-length", "")
    if not length.isdecimal():
        return await _to_the_end(reader)
    if len(length) > 12 or int(length) > ANSWER_BYTES_MAX:
        raise ValueError(_TOO_LARGE)
    return await reader.readexactly(int(length))


_TOO_LARGE = f"the answer is larger than {ANSWER_BYTES_MAX >> 10} KiB"


async def _to_the_end(reader: asyncio.StreamReader, end: bytes = b"") -> bytes:
    """All that comes until the connection ends, or this byte."""
    pieces, size = [], 0
    while piece := await reader.read(_PIECE_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            raise ValueError(_TOO_LARGE)
        if end and piece.endswith(end):
            break
    return b"".join(pieces)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    pieces, size = [], 0
    while length := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        size += length
        if length < 0 or size > ANSWER_BYTES_MAX:
            raise ValueError(_TOO_LARGE)
        pieces.append((await reader.readexactly(length + 2))[:-2])
    return b"".join(pieces)
