"""What a person types, turned into what the interfaces take: durations, sizes, times, shares.

Each parser raises ValueError with a message that shows the right form; `typed` makes a click type of one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import click

Value = TypeVar("Value")

SECONDS_OF = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
BYTES_OF = {
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
WATTS = re.compile(r"(\d+(?:\.\d+)?)\s*(|W|kW|MW)")
WATTS_OF = {"": 1.0, "W": 1.0, "kW": 1e3, "MW": 1e6}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
MIB = 1 << 20
SHARE_MILLI_WHOLE = 1000
MINER_APIS = ("t-rex", "lolminer", "rigel", "xmrig", "cgminer")
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def duration_s(text: str) -> float:
    """Return the seconds of `90`, `1.5`, `90s`, `15m`, `1h30m` or `2d`."""
    if DURATION.fullmatch(text):
        return sum(float(number) * SECONDS_OF[unit] for number, unit in DURATION_PART.findall(text))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{text!r} is not a duration; write seconds or 90s, 15m, 2h, 1h30m, 1d")
    return seconds


def size_mib(text: str) -> int:
    """Return the MiB of `40960`, `40GiB`, `40G` (binary, as in GiB) or `40GB` (decimal), rounded up."""
    match = SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else ""
    if match and not unit and match[1].isdecimal():
        return int(match[1])
    if not match or unit not in BYTES_OF:
        raise ValueError(f"{text!r} is not a size; write MiB as a number, or 512MiB, 40GiB, 1.5TiB")
    return math.ceil(float(match[1]) * BYTES_OF[unit] / MIB)


def share_milli(text: str) -> int:
    """Return the thousandths of a GPU of `500` (thousandths) or `0.5` (a fraction)."""
    try:
        milli = round(float(text) * SHARE_MILLI_WHOLE) if "." in text else int(text)
    except ValueError:
        milli = 0
    if not 1 <= milli <= SHARE_MILLI_WHOLE:
        raise ValueError(
            f"{text!r} is not a share of a GPU; write thousandths, 1 to 1000, or a fraction as 0.5"
        )
    return milli


def time_s(text: str, now_s: float) -> float:
    """Return the Unix time of an RFC 3339 time or of `+2h` (from now); local where no offset is given."""
    if text.startswith("+"):
        return now_s + duration_s(text[1:])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a time; write 2026-01-31T18:00:00Z or +2h") from None
    return (moment if moment.tzinfo else moment.astimezone()).timestamp()


def past_s(text: str, now_s: float) -> float:
    """Return the Unix time of an RFC 3339 time or of `2h` (ago); local where no offset is given."""
    try:
        return now_s - duration_s(text)
    except ValueError:
        pass
    try:
        return time_s(text, now_s)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time; write 2026-01-31T18:00:00Z, or 2h for two hours ago"
        ) from None


def watts(text: str) -> float:
    """Return the watts of `3000`, `3000W`, `3kW` or `1.5MW`."""
    match = WATTS.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a power; write watts as a number, or 3000W, 3kW, 1.5MW")
    return float(match[1]) * WATTS_OF[match[2]]


def environment_of(entries: Iterable[str], source: str) -> dict[str, str]:
    """Return the variables that `KEY=VALUE` sets and `KEY` takes over from the caller.

    Args:
        source: What to name in a message: the option or the file.
    """
    environment: dict[str, str] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not ENVIRONMENT_NAME.fullmatch(key):
            raise ValueError(f"{source}: {entry!r}: write KEY=VALUE, or KEY to pass yours on")
        if not equals:
            if key not in os.environ:
                raise ValueError(f"{source}: {key} is not set here; set it or write {key}=VALUE")
            value = os.environ[key]
        environment[key] = value
    return environment


def environment_file(path: Path) -> dict[str, str]:
    """Return the variables of a file: an entry a line as in `environment_of`, empty lines and # skipped."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return environment_of((line for line in lines if line and not line.startswith("#")), str(path))


def typed(name: str, parse: Callable[[str], Value]) -> click.types.FuncParamType[str, Value]:
    """Return a click type called `name` that turns a parser's ValueError into a usage error."""

    def convert(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    convert.__name__ = name  # what the help shows
    return click.types.FuncParamType(convert)


DURATION_S = typed("duration", duration_s)
SIZE_MIB = typed("size", size_mib)
SHARE_MILLI = typed("share", share_milli)


def miner(text: str) -> tuple[str, int, str]:
    """Return the API's name as the protocol has it, its port and the algorithm of `t-rex:4067:kawpow`."""
    api, _, rest = text.partition(":")
    port, _, algorithm = rest.partition(":")
    if api.lower() not in MINER_APIS or not port.isascii() or not port.isdecimal() or not algorithm:
        apis = ", ".join(MINER_APIS)
        raise ValueError(
            f"{text!r} is not a miner; write API:PORT:ALGORITHM as t-rex:4067:kawpow, API one of {apis}"
        )
    return f"MINER_API_{api.upper().replace('-', '_')}", int(port), algorithm
