"""What plans were made from, as bytes: whole, or as what changed since the frame before.

A frame holds a snapshot to the last bit, so that the plan that was made of it can be made again. Beside the
snapshot stands what jobs said of themselves where a policy makes a column of it, so that it can be told what
another policy would have seen.

All columns are rows of a few tables of int64. Of each table a frame has the cells that changed and the
columns that were appended, as differences to what was there before; a job that leaves gives its place to the
last one, so that this is little however many there are. The numbers are laid out byte by byte, all lowest
bytes first, and deflated: most are zero above the lowest.
"""

import json
import zlib
from dataclasses import dataclass
from operator import add, attrgetter, is_, sub
from typing import Any, NamedTuple

import numpy as np

from scheduler.errors import FrameError, SnapshotError
from scheduler.model.power import Curve
from scheduler.model.snapshot import (
    GpuColumns,
    HoldingColumns,
    JobColumns,
    MixColumns,
    NodeColumns,
    PowerColumns,
    Snapshot,
)

# Frames in a row, of which only the first is whole. Where that ages out the rest of its row says nothing any
# more, and the shortest journal that may be configured keeps 1,000 events; a whole frame of 1,000 jobs has as
# many bytes as a hundred others.
FRAMES_A_ROW = 256
# A million jobs are 240 MiB of columns.
BYTES_MAX = 1 << 30

_JOBS = tuple(JobColumns.__dataclass_fields__)
_GPUS = tuple(name for name in GpuColumns.__dataclass_fields__ if name != "uuid")
_NODES = tuple(NodeColumns.__dataclass_fields__)
_HOLDINGS = tuple(HoldingColumns.__dataclass_fields__)
_MIX = tuple(MixColumns.__dataclass_fields__)
_BOARDS = ("idle_w", "limit_w", "limit_w_min", "limit_w_max", "measured_w")
_POWER = (
    "budget_w",
    "promised_us",
    "is_emergency",
    "horizon_us",
    "margin_milli",
    "lead_milli",
    "limits_inference",
)
_WATTS = ("natural_w", "best_w", "frozen_w", "suspend_us")  # of jobs
_BOOLS = frozenset({"preemptible", "instance", "is_emergency", "limits_inference"})
_INT64 = np.dtype("<i8")
_NUMBER_BYTES = _INT64.itemsize
_SIGN_BIT = 63
_LENGTH_BYTES = 4
# The fastest: the next ones save a tenth of the bytes for twice the time. Its table is small, as most frames
# are, and so is the window over a small one: to clear them would cost more than to pack it.
_LEVEL, _MEMORY_LEVEL = 1, 4
_WINDOW_BITS_MIN, _WINDOW_BITS_MAX = 9, 15


@dataclass(frozen=True, slots=True, eq=False)
class SaidColumns:
    """Shape (jobs,) each: what jobs said where a policy makes a column of the snapshot of it."""

    priority: Any  # without aging
    preemptions: Any  # by jobs, until now
    value: Any  # micro-USD per GPU-hour, before energy
    whole_us: Any  # duration of all the work of a job that pays at its end; UNKNOWN


_SAID = tuple(SaidColumns.__dataclass_fields__)


@dataclass(frozen=True, slots=True, eq=False)
class PlanInputs:
    """What a plan was made from, beside the policy."""

    snapshot: Snapshot
    said: SaidColumns


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Inputs as tables: what the next frame is told against."""

    number: int  # in its row; 0 is whole
    moment: tuple[int, ...]  # the time, what is there, and the numbers of `PowerColumns`
    tables: tuple[Any, ...]  # int64, shape (rows, columns) each
    names: tuple[tuple[str, ...], tuple[Curve, ...]]  # UUIDs; curves by class
    lasting: tuple[Any, ...] = (None, None, None)  # what three of the tables were made of


def encode(inputs: PlanInputs, before: Frame | None) -> tuple[bytes, Frame]:
    """The inputs as bytes, whole or told against the frame `before`; and the frame for the next one."""
    snapshot = inputs.snapshot
    lasting = (snapshot.gpus, snapshot.nodes, snapshot.model_fits)
    moment, tables, names = _moment(snapshot), _tables(inputs, before), _names(snapshot)
    old = _NO_FRAME if before is None else before
    heads = [0 if before is None else before.number + 1, *map(sub, moment, old.moment)]
    pieces: list[Any] = []
    for was, now in zip(old.tables, tables, strict=True):
        _tell(was, now, heads, pieces)
    numbers = np.concatenate((heads, *pieces), dtype=_INT64)
    # The sign goes to the lowest bit: small numbers below zero have few bytes that are not zero, too.
    folded = (numbers << 1) ^ (numbers >> _SIGN_BIT)
    planes = folded.view(np.uint8).reshape(-1, _NUMBER_BYTES).T.tobytes()
    named = b"" if before is not None and before.names == names else _encode_names(names)
    text = len(named).to_bytes(_LENGTH_BYTES) + named + planes
    window_bits = max(_WINDOW_BITS_MIN, min(_WINDOW_BITS_MAX, len(text).bit_length()))
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, window_bits, _MEMORY_LEVEL)
    data = packer.compress(text) + packer.flush()
    return data, Frame(heads[0], moment, tables, names, lasting)


def decode(data: bytes, before: Frame | None) -> Frame:
    """The frame of the bytes; `before` is the one that came before it.

    Raises:
        FrameError: They are no frame, or not the one that follows `before`.
    """
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, BYTES_MAX)
        if not unpacker.eof:
            raise FrameError(f"it is cut off, or larger than {BYTES_MAX >> 20} MiB")
        end = _LENGTH_BYTES + int.from_bytes(text[:_LENGTH_BYTES])
        named = text[_LENGTH_BYTES:end]
        planes = np.frombuffer(text[end:], dtype=np.uint8).reshape(_NUMBER_BYTES, -1)
        folded = np.ascontiguousarray(planes.T).view("<u8").ravel()
        numbers = _Numbers((folded >> 1).view(_INT64) ^ -(folded & 1).view(_INT64))
        (number,) = numbers.take(1).tolist()
        if number and (before is None or number != before.number + 1):
            raise FrameError("the frame that it is told against is missing")
        old = before if number and before is not None else _NO_FRAME
        moment = tuple(map(add, old.moment, numbers.take(len(old.moment)).tolist()))
        heads = [_Head(*numbers.take(len(_Head._fields)).tolist()) for _ in old.tables]
        tables = tuple(_told(was, head, numbers) for was, head in zip(old.tables, heads, strict=True))
        return Frame(number, moment, tables, _decode_names(named) if named else old.names)
    except (zlib.error, ValueError, IndexError, OverflowError) as error:
        raise FrameError(f"it is no frame of a plan's inputs: {error}") from error


def inputs_of(frame: Frame) -> PlanInputs:
    """What the frame holds.

    Raises:
        FrameError: It contradicts itself.
    """
    gpus, nodes, fits, jobs, boards, holdings, mix = frame.tables
    now_us, has_gross, has_mix, has_power, has_promise, promised_w, *plain = frame.moment
    uuid, curves = frame.names
    try:
        own, said, others = np.split(jobs, (len(_JOBS), len(_JOBS) + len(_SAID)))
        columns = iter(others)
        power = None
        if has_power:
            power = PowerColumns(
                **_values(_POWER, plain),
                promised_w=promised_w if has_promise else None,
                curves=curves,
                **dict(zip(_BOARDS, boards, strict=True)),
                **{name: next(columns) for name in _WATTS},
            )
        snapshot = Snapshot(
            now_us=now_us,
            jobs=JobColumns(**_values(_JOBS, own)),
            gpus=GpuColumns(uuid=uuid, **_values(_GPUS, gpus)),
            nodes=NodeColumns(*nodes),
            holdings=HoldingColumns(*holdings),
            model_fits=fits.T.astype(bool),
            mix=MixColumns(*mix) if has_mix else None,
            power=power,
            gross_value=next(columns) if has_gross else None,
        )
    except (SnapshotError, ValueError, TypeError, IndexError, StopIteration) as error:
        raise FrameError(f"it contradicts itself: {error}") from error
    return PlanInputs(snapshot, SaidColumns(*said))


# Tables ---------------------------------------------------------------------------------------------


def _tables(inputs: PlanInputs, before: Frame | None) -> tuple[Any, ...]:
    """All columns, copied: GPUs, nodes, model fits, jobs, boards, holdings, mix."""
    snapshot = inputs.snapshot
    gpus, nodes, fits = snapshot.gpus, snapshot.nodes, snapshot.model_fits
    power, gross, mix = snapshot.power, snapshot.gross_value, snapshot.mix
    # Whoever makes snapshots replaces these three, and never writes into them.
    if before is not None and all(map(is_, (gpus, nodes, fits), before.lasting)):
        lasting = before.tables[: len(before.lasting)]
    else:
        # Of what fits there is a row a GPU, so that another set of models is another column.
        lasting = (_table(_of_gpus(gpus)), _table(_of_nodes(nodes)), np.array(fits.T, dtype=np.int64))
    of_jobs = (*_of_jobs(snapshot.jobs), *_of_said(inputs.said))
    if power is not None:
        of_jobs += _of_watts(power)
    if gross is not None:
        of_jobs += (gross,)
    return (
        *lasting,
        _table(of_jobs),
        _NOTHING if power is None else _table(_of_boards(power)),
        _table(_of_holdings(snapshot.holdings)),
        _NOTHING if mix is None else _table(_of_mix(mix)),
    )


def _table(columns: tuple[Any, ...]) -> Any:
    return np.concatenate(columns, dtype=np.int64).reshape(len(columns), len(columns[0]))


_of_jobs, _of_said, _of_gpus = attrgetter(*_JOBS), attrgetter(*_SAID), attrgetter(*_GPUS)
_of_boards, _of_power, _of_nodes = attrgetter(*_BOARDS), attrgetter(*_POWER), attrgetter(*_NODES)
_of_watts = attrgetter(*_WATTS)
_of_holdings, _of_mix = attrgetter(*_HOLDINGS), attrgetter(*_MIX)


def _moment(snapshot: Snapshot) -> tuple[int, ...]:
    power, promised_w = snapshot.power, None if snapshot.power is None else snapshot.power.promised_w
    return (
        int(snapshot.now_us),
        snapshot.gross_value is not None,
        snapshot.mix is not None,
        power is not None,
        promised_w is not None,
        promised_w or 0,
        *(_NO_POWER if power is None else _of_power(power)),
    )


def _values(names: tuple[str, ...], values: Any) -> dict[str, Any]:
    """The values by name; truths again where they were."""
    named = dict(zip(names, values, strict=True))
    for name in _BOOLS & named.keys():
        named[name] = named[name].astype(bool) if isinstance(named[name], np.ndarray) else bool(named[name])
    return named


def _names(snapshot: Snapshot) -> tuple[tuple[str, ...], tuple[Curve, ...]]:
    return snapshot.gpus.uuid, () if snapshot.power is None else snapshot.power.curves


def _encode_names(names: tuple[tuple[str, ...], tuple[Curve, ...]]) -> bytes:
    uuids, curves = names
    return json.dumps([uuids, [curve.points for curve in curves]], separators=(",", ":")).encode()


def _decode_names(text: bytes) -> tuple[tuple[str, ...], tuple[Curve, ...]]:
    uuids, curves = json.loads(text)
    return tuple(uuids), tuple(Curve(tuple((draw, work) for draw, work in points)) for points in curves)


# Changes --------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """What a frame says of a table first."""

    rows: int
    columns: int
    kept: int  # columns of before that are still there
    cells: int  # of those, that changed


def _tell(was: Any, now: Any, heads: list[int], pieces: list[Any]) -> None:
    """Say what makes `now` of `was`: changed cells by place and value; new columns less the one before."""
    rows, columns = now.shape
    kept = min(columns, was.shape[1]) if len(was) == rows else 0
    cells = _NO_CELLS
    if kept and now is not was:
        cells = (now[:, :kept] != was[:, :kept]).ravel().nonzero()[0]
        if len(cells):
            pieces += (cells, now[np.divmod(cells, kept)])
    heads += (rows, columns, kept, len(cells))
    if columns > kept:
        before = now[:, kept - 1 : -1] if kept else np.pad(now[:, :-1], ((0, 0), (1, 0)))
        pieces.append((now[:, kept:] - before).ravel())


def _told(was: Any, head: _Head, numbers: "_Numbers") -> Any:
    """What `_tell` said, done."""
    rows, columns, kept, count = head
    if not 0 <= kept <= columns or (kept and (rows != len(was) or kept > was.shape[1])):
        raise FrameError("it is told against another frame")
    cells, values = numbers.take(count), numbers.take(count)
    added = numbers.take(rows * (columns - kept)).reshape(rows, columns - kept)
    if not count and (rows, columns) == was.shape:
        return was
    now = np.zeros((rows, columns), dtype=np.int64)  # as large as what was read, whatever is said
    now[:, :kept] = was[:, :kept] if kept else 0
    now[np.divmod(cells, max(1, kept))] = values
    now[:, kept:] = np.cumsum(added, axis=1) + (now[:, kept - 1 : kept] if kept else 0)
    return now


class _Numbers:
    """Numbers that are taken one after the other."""

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers
        self._at = 0

    def take(self, count: int) -> Any:
        """The next ones."""
        begin, self._at = self._at, self._at + count
        if count < 0 or self._at > len(self._numbers):
            raise FrameError("it is shorter than it says")
        return self._numbers[begin : self._at]


_NOTHING = np.zeros((0, 0), dtype=np.int64)
_NO_CELLS = np.zeros(0, dtype=np.int64)
_NO_POWER = (0,) * len(_POWER)
_NO_FRAME = Frame(0, (0,) * (6 + len(_POWER)), (_NOTHING,) * 7, ((), ()))
