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
from operator import attrgetter
from typing import Any

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
_POWER = ("budget_w", "promised_us", "is_emergency", "horizon_us", "margin_milli", "limits_inference")
_BOOLS = frozenset({"preemptible", "instance", "is_emergency", "limits_inference"})
_TABLES = 8
_INT64 = np.dtype("<i8")
_NUMBER_BYTES = _INT64.itemsize
_LENGTH_BYTES = 4
# The fastest: the next ones save a tenth of the bytes for twice the time.
_LEVEL = 1


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
    tables: tuple[Any, ...]  # int64, shape (rows, columns) each
    names: tuple[tuple[str, ...], tuple[Curve, ...]]  # UUIDs; curves by class
    lasting: tuple[Any, ...] = (None, None, None)  # what three of the tables were made of


def encode(inputs: PlanInputs, before: Frame | None) -> tuple[bytes, Frame]:
    """The inputs as bytes, whole or told against the frame `before`; and the frame for the next one."""
    snapshot = inputs.snapshot
    tables, names = _tables(inputs, before), _names(snapshot)
    number = 0 if before is None else before.number + 1
    pieces = [np.array([number])]
    for at, now in enumerate(tables):
        pieces += _change(None if before is None else before.tables[at], now)
    said = b"" if before is not None and before.names == names else _encode_names(names)
    text = len(said).to_bytes(_LENGTH_BYTES) + said + _laid_out(np.concatenate(pieces))
    lasting = (snapshot.gpus, snapshot.nodes, snapshot.model_fits)
    return zlib.compress(text, _LEVEL), Frame(number, tables, names, lasting)


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
        said = text[_LENGTH_BYTES:end]
        numbers = _Numbers(_read_out(text[end:]))
        (number,) = numbers.take(1).tolist()
        if number:
            if before is None or number != before.number + 1:
                raise FrameError("the frame that it is told against is missing")
            old, names = before.tables, before.names
        else:
            old, names = tuple(np.zeros((0, 0), dtype=np.int64) for _ in range(_TABLES)), ((), ())
        tables = tuple(_changed(was, numbers) for was in old)
        return Frame(number, tables, _decode_names(said) if said else names)
    except (zlib.error, ValueError, IndexError, OverflowError) as error:
        raise FrameError(f"it is no frame of a plan's inputs: {error}") from error


def inputs_of(frame: Frame) -> PlanInputs:
    """What the frame holds.

    Raises:
        FrameError: It contradicts itself.
    """
    moment, gpus, nodes, fits, jobs, boards, holdings, mix = frame.tables
    try:
        now_us, has_gross, has_mix, has_power, has_promise, promised_w, *plain = moment[:, 0].tolist()
        own, said = jobs[: len(_JOBS)], jobs[len(_JOBS) : len(_JOBS) + len(_SAID)]
        natural_w, gross_value = jobs[len(_JOBS) + len(_SAID) :]
        uuid, curves = frame.names
        power = PowerColumns(
            **_values(_POWER, plain),
            promised_w=promised_w if has_promise else None,
            curves=curves,
            **dict(zip(_BOARDS, boards, strict=True)),
            natural_w=natural_w,
        )
        snapshot = Snapshot(
            now_us=now_us,
            jobs=JobColumns(**_values(_JOBS, own)),
            gpus=GpuColumns(uuid=uuid, **_values(_GPUS, gpus)),
            nodes=NodeColumns(*nodes),
            holdings=HoldingColumns(*holdings),
            model_fits=fits.T.astype(bool),
            mix=MixColumns(*mix) if has_mix else None,
            power=power if has_power else None,
            gross_value=gross_value if has_gross else None,
        )
    except (SnapshotError, ValueError, TypeError, IndexError) as error:
        raise FrameError(f"it contradicts itself: {error}") from error
    return PlanInputs(snapshot, SaidColumns(*said))


# Tables ---------------------------------------------------------------------------------------------


def _tables(inputs: PlanInputs, before: Frame | None) -> tuple[Any, ...]:
    """All columns, copied: moment, GPUs, nodes, model fits, jobs, boards, holdings, mix."""
    snapshot = inputs.snapshot
    power, gross = snapshot.power, snapshot.gross_value
    no_value = np.zeros(len(snapshot.jobs), dtype=np.int64)
    # Whoever makes snapshots replaces these three, and never writes into them.
    lasting = (snapshot.gpus, snapshot.nodes, snapshot.model_fits)
    if before is not None and all(a is b for a, b in zip(lasting, before.lasting, strict=True)):
        kept = before.tables[1 : 1 + len(lasting)]
    else:
        # Of what fits there is a row a GPU, so that another set of models is another column.
        fits = np.array(snapshot.model_fits.T, dtype=np.int64)
        kept = (_table(_of_gpus(snapshot.gpus)), _table(_of_nodes(snapshot.nodes)), fits)
    of_jobs = (no_value if power is None else power.natural_w, no_value if gross is None else gross)
    return (
        _moment(snapshot),
        *kept,
        _table((*_of_jobs(snapshot.jobs), *_of_said(inputs.said), *of_jobs)),
        _NO_BOARDS if power is None else _table(_of_boards(power)),
        _table(_of_holdings(snapshot.holdings)),
        _NO_MIX if snapshot.mix is None else _table(_of_mix(snapshot.mix)),
    )


def _table(columns: tuple[Any, ...]) -> Any:
    return np.concatenate(columns, dtype=np.int64).reshape(len(columns), len(columns[0]))


_of_jobs, _of_said, _of_gpus = attrgetter(*_JOBS), attrgetter(*_SAID), attrgetter(*_GPUS)
_of_boards, _of_power, _of_nodes = attrgetter(*_BOARDS), attrgetter(*_POWER), attrgetter(*_NODES)
_of_holdings, _of_mix = attrgetter(*_HOLDINGS), attrgetter(*_MIX)
_NO_BOARDS = np.zeros((len(_BOARDS), 0), dtype=np.int64)
_NO_MIX = np.zeros((len(_MIX), 0), dtype=np.int64)


def _moment(snapshot: Snapshot) -> Any:
    power, promised_w = snapshot.power, None if snapshot.power is None else snapshot.power.promised_w
    numbers = [
        snapshot.now_us,
        snapshot.gross_value is not None,
        snapshot.mix is not None,
        power is not None,
        promised_w is not None,
        promised_w or 0,
        *((0,) * len(_POWER) if power is None else _of_power(power)),
    ]
    return np.array(numbers, dtype=np.int64).reshape(len(numbers), 1)


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


def _change(was: Any, now: Any) -> list[Any]:
    """What makes `now` of `was`: 0 for nothing, or 1, the new shape, kept columns, cells and new columns."""
    if now is was:
        return [_UNCHANGED]
    rows, columns = now.shape
    kept = min(columns, was.shape[1]) if was is not None and len(was) == rows else 0
    cells = differences = added = _NOTHING
    if kept:
        cells = (now[:, :kept] != was[:, :kept]).ravel().nonzero()[0]
    if len(cells):
        row, column = np.divmod(cells, kept)
        differences = now[row, column] - was[row, column]
    elif was is not None and was.shape == now.shape:
        return [_UNCHANGED]
    if columns > kept:
        new = now[:, kept:]
        added = (new - (now[:, kept - 1 : -1] if kept else np.pad(now[:, :-1], ((0, 0), (1, 0))))).ravel()
    return [np.array([1, rows, columns, kept, len(cells)]), cells, differences, added]


def _changed(was: Any, numbers: "_Numbers") -> Any:
    """What `_change` told, done."""
    (is_changed,) = numbers.take(1).tolist()
    if not is_changed:
        return was
    rows, columns, kept, count = numbers.take(4).tolist()
    if not 0 <= kept <= columns or (kept and (rows != len(was) or kept > was.shape[1])):
        raise FrameError("it is told against another frame")
    cells, differences = numbers.take(count), numbers.take(count)
    added = numbers.take(rows * (columns - kept)).reshape(rows, columns - kept)
    now = np.zeros((rows, columns), dtype=np.int64)  # as large as was read, whatever was said
    now[:, :kept] = was[:, :kept] if kept else 0
    row, column = np.divmod(cells, max(1, kept))
    now[row, column] += differences
    now[:, kept:] = np.cumsum(added, axis=1) + (now[:, kept - 1 : kept] if kept else 0)
    return now


_NOTHING = np.zeros(0, dtype=np.int64)
_UNCHANGED = np.zeros(1, dtype=np.int64)


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


def _laid_out(numbers: Any) -> bytes:
    """The numbers byte by byte; small ones, also below zero, have few bytes that are not zero."""
    folded = (numbers << 1) ^ (numbers >> 63)
    planes: bytes = folded.astype(_INT64).view(np.uint8).reshape(-1, _NUMBER_BYTES).T.tobytes()
    return planes


def _read_out(planes: bytes) -> Any:
    """The numbers that `_laid_out` laid out."""
    stacked = np.frombuffer(planes, dtype=np.uint8).reshape(_NUMBER_BYTES, -1)
    folded = np.ascontiguousarray(stacked.T).view("<u8").ravel()
    return (folded >> np.uint64(1)).astype(np.int64) ^ -(folded & np.uint64(1)).astype(np.int64)
