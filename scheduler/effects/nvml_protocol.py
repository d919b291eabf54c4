"""What the daemon and its NVML child say to each other: one JSON object a line, over a socket pair.

    child:   {"protocol": 4}                                                     once, first
    daemon:  {"id": 1, "do": "sample", "within_s": 1.0, "stuck_s": 60.0, "events_after": 0, "list": 0}
    child:   {"id": 1, "list": 1, "identities": [{...}], "samples": [[...]], "errors": {...},
              "driver_version": "...", "replace_me": false, "events": [[1, {...}]]}
    daemon:  {"id": 2, "do": "holders", "uuid": "GPU-...", "within_s": 2.0}
    child:   {"id": 2, "holders": {...}}, or {"id": 2, "error": "ERROR_TIMEOUT", "message": "..."}
    daemon:  {"id": 3, "do": "set_power_limit", "uuid": "GPU-...", "power_limit_w": 300.0, "within_s": 2.0}
    child:   {"id": 3, "limit": {...}}, or an error as above

    child:   {"wake": true}                   there are events: ask for a sample now, not at your next time

Answers come in any order. Events are numbered, and told until a request says that they arrived. Lists of GPUs
are numbered, too, and told once (then `"identities": null`). A sample is a row: its fields in their order,
without names. The end of the stream, from either side, is the end of the child. The version is checked
although both ends are one package: an upgrade exchanges the files beneath a daemon that runs.
"""

import json
from operator import attrgetter
from typing import Any

from scheduler.model.gpus import GpuEvent, GpuHolders, GpuIdentity, GpuLimit, GpuProcess, GpuSample

PROTOCOL_VERSION = 4
# 16 GPUs take 3 KiB a round; 512 processes with the longest names, every letter escaped, 850 KiB.
LINE_BYTES_MAX = 2**20
TIMEOUT = "ERROR_TIMEOUT"  # a call that hangs: NVML's own word for it

Message = dict[str, Any]
Value = GpuIdentity | GpuProcess | GpuEvent | GpuLimit
Row = list[Any]


def encode(message: Message) -> bytes:
    """Return the message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Return the message of a line.

    Raises:
        ValueError: It is not one of ours.
    """
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"not an object: {line[:80]!r}")
    return message


def value_to_json(value: Value) -> Message:
    """Return the fields of a flat value by name."""
    return {name: getattr(value, name) for name in value.__slots__}


def sample_to_row(sample: GpuSample) -> Row:
    """Return the fields of a sample in their order."""
    return list(_fields_of_sample(sample))


def sample_from_row(row: Row) -> GpuSample:
    """Return what `sample_to_row` was given.

    Raises:
        TypeError: A field is missing, or there is one too many.
    """
    if len(row) != len(GpuSample.__slots__):
        raise TypeError(f"a sample has {len(GpuSample.__slots__)} fields, not {len(row)}")
    return GpuSample(*row)


_fields_of_sample = attrgetter(*GpuSample.__slots__)


def holders_to_json(holders: GpuHolders) -> Message:
    """Return the holders with their processes as objects."""
    return {
        "uuid": holders.uuid,
        "at_s": holders.at_s,
        "processes": [value_to_json(process) for process in holders.processes],
        "memory_used_mib": holders.memory_used_mib,
    }


def holders_from_json(fields: Message) -> GpuHolders:
    """Return what `holders_to_json` was given.

    Raises:
        TypeError, KeyError: A field is missing or unknown.
    """
    processes = tuple(GpuProcess(**process) for process in fields["processes"])
    return GpuHolders(fields["uuid"], fields["at_s"], processes, fields["memory_used_mib"])
