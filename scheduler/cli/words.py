"""Values as a person reads them: spans of time, sizes, states, reasons."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    from scheduler.v1 import job_pb2, node_pb2

NONE = "-"
MINUTE_S = 60
HOUR_S = 3600
DAY_S = 86400
SPAN_S_WITH_TENTHS = 10  # a shorter span shows tenths of a second
STAGE_MS_WITH_TENTHS = 10
MIB_PER_GIB = 1024
J_PER_WH = 3600
WH_PER_KWH = 1000
SHARE_MILLI_WHOLE = 1000
# Characters of a UUID's random part that a table shows, unless two GPUs of the node share them.
UUID_DIGITS_MIN = 8
CAPITALS = {"gpu": "GPU", "gpus": "GPUs", "cpus": "CPUs"}
FINAL_STATES = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


def clean(text: str) -> str:
    """Return text with what isn't printable escaped: names come from others, and a terminal obeys."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def span(seconds: float) -> str:
    """Return a length of time in its two largest units: 0.4s, 12s, 3m12s, 2h05m, 3d04h."""
    seconds = max(0.0, seconds)
    if round(seconds, 1) < SPAN_S_WITH_TENTHS:
        return f"{round(seconds, 1):g}s"
    whole = round(seconds)
    if whole < MINUTE_S:
        return f"{whole}s"
    if whole < HOUR_S:
        return f"{whole // MINUTE_S}m{whole % MINUTE_S:02d}s"
    if whole < DAY_S:
        return f"{whole // HOUR_S}h{whole % HOUR_S // MINUTE_S:02d}m"
    return f"{whole // DAY_S}d{whole % DAY_S // HOUR_S:02d}h"


def milliseconds(seconds: float) -> str:
    """Return a stage's length in ms, short ones with a tenth."""
    value = seconds * 1000
    return f"{value:.1f} ms" if abs(value) < STAGE_MS_WITH_TENTHS else f"{value:.0f} ms"


def epoch_s(timestamp: Timestamp) -> float:
    """Return Unix seconds."""
    return timestamp.seconds + timestamp.nanos / 1e9


def since(timestamp: Timestamp) -> str:
    """Return the span from then until now; never negative, whatever the two clocks say."""
    return span(time.time() - epoch_s(timestamp))


def moment(timestamp: Timestamp) -> str:
    """Return local date and time with milliseconds and offset."""
    return datetime.fromtimestamp(epoch_s(timestamp)).astimezone().isoformat(" ", timespec="milliseconds")


def word(message: Message, field: str) -> str:
    """Return an enum field's value without its prefix: RUNNING of JOB_STATE_RUNNING; "" where unset.

    A value that this client does not know, of a newer server, is shown as its number.
    """
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert kind is not None, f"{field} is no enum"
    values = kind.values_by_number
    number = getattr(message, field)
    if number == 0:
        return ""
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return values[number].name.removeprefix(prefix) if number in values else str(number)


def reason(message: Message, field: str = "reason") -> str:
    """Return a reason as words: `waiting for GPUs` of REASON_WAITING_FOR_GPUS; "" where unset."""
    return spoken(word(message, field))


def spoken(name: str) -> str:
    """Return an enum's name as words."""
    return " ".join(CAPITALS.get(part, part) for part in name.lower().split("_"))


def because(message: job_pb2.Job | node_pb2.Gpu) -> str:
    """Return the reason of a job or GPU in words, with the facts behind it where there are any."""
    detail = clean(message.detail)
    return ": ".join(part for part in (reason(message), detail) if part)


def gpu_name(uuid: str, digits: int = UUID_DIGITS_MIN) -> str:
    """Return the beginning of a UUID that people read: GPU-1a2b3c4d."""
    kind, dash, rest = uuid.partition("-")
    return f"{kind}{dash}{rest[:digits]}".rstrip("-")


def gpu_names(uuids: Iterable[str]) -> dict[str, str]:
    """Return the shortest names, one length for all, that tell these UUIDs apart."""
    known = list(dict.fromkeys(uuids))
    longest = max((len(uuid) for uuid in known), default=0)
    for digits in range(UUID_DIGITS_MIN, longest):
        names = {uuid: gpu_name(uuid, digits) for uuid in known}
        if len(set(names.values())) == len(known):
            return names
    return {uuid: uuid for uuid in known}


def gpus_asked(gpus: int, share_milli: int) -> str:
    """Return what a job asks for: `4`, `0.5` of one, `-` for none."""
    if 0 < share_milli < SHARE_MILLI_WHOLE:
        return f"{share_milli / SHARE_MILLI_WHOLE:g}"
    return str(gpus) if gpus else NONE


def gib(mib: float) -> str:
    """Return MiB in GiB, a tenth only below 10 GiB."""
    value = mib / MIB_PER_GIB
    return f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"


def size(mib: int) -> str:
    """Return a size with its unit: 512 MiB, 40 GiB."""
    return f"{mib} MiB" if mib < MIB_PER_GIB else f"{gib(mib)} GiB"


def energy(joules: float) -> str:
    """Return energy in the largest unit of which there is one: 812 J, 35.2 Wh, 4.56 kWh."""
    if joules < J_PER_WH:
        return f"{joules:.0f} J"
    wh = joules / J_PER_WH
    return f"{wh:.1f} Wh" if wh < WH_PER_KWH else f"{wh / WH_PER_KWH:.2f} kWh"


def usd(amount: float) -> str:
    """Return money to a hundredth of a cent, whole cents with two digits."""
    text = f"{amount:,.4f}"
    return text.removesuffix("00")


def count(number: int, thing: str) -> str:
    """Return `1 GPU`, `2 GPUs`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
