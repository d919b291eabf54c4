"""What `wattshift simulate` reads: nodes, jobs, prices, grid events; each row checked before anything runs.

Nodes, prices and events are small and kept. Jobs may be many: they are read once, row by row, into a scratch
database that gives them back in the order of submission.
"""

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from scheduler.errors import InputError
from scheduler.model.gpus import model_matches
from scheduler.model.jobs import SHARE_MILLI_WHOLE, JobClass
from scheduler.model.policy import PRIORITY_MAX
from scheduler.model.settings import PRIORITY_DEFAULT
from scheduler.simulation import csv_files
from scheduler.simulation.boards import PROFILES, Profile
from scheduler.simulation.csv_files import Column, Problems, boolean, number, thousandths, whole

NODES_MAX = 100_000
GPUS_PER_NODE_MAX = 64
_GANG_GPUS_MAX = 65_536
SERIES_ROWS_MAX = 1_000_000
EVENTS_MAX = 10_000
# Thirty years: beyond that a time is a mistake, such as milliseconds for seconds.
TIME_S_MAX = 1e9
_W_MAX = 1e9
_MIB_MAX = 2**31
_CPUS_MAX = 1_000_000
_USD_MAX = 10_000.0
_NAME_CHARACTERS_MAX = 128
# A node that says nothing of them has enough for everybody.
_CPUS_DEFAULT_MILLI = _CPUS_MAX * 1000
_ROWS_AT_ONCE = 1000
# A GPU that no profile knows and whose row says nothing of it.
_UNKNOWN_GPU = Profile("GPU", 81_920, 60.0, 100.0, 400.0, 1500)

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node of nodes.csv. Watts and MiB are per GPU, but `base_w` and `memory_mib`."""

    node_id: str
    gpu_model: str
    gpus: int
    gpu_memory_mib: int  # that jobs may book
    cpus_milli: int
    memory_mib: int
    gpu_idle_w: float
    gpu_power_limit_w_min: float
    gpu_power_limit_w_max: float
    base_w: float


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job of jobs.csv. Times are seconds since the beginning; None = as its class says, or not known."""

    job_id: str
    submit_s: float
    job_class: JobClass
    duration_s: float
    gpus: int
    gpu_share_milli: int
    priority: int
    gpu_memory_mib: int | None
    cpus_milli: int | None
    memory_mib: int | None
    expected_s: float | None
    value_usd_per_gpu_hour: float | None
    deadline_s: float | None
    preemptible: bool | None
    grace_s: float | None
    min_runtime_s: float | None
    restart_loss_s: float | None
    gpu_models: tuple[str, ...]
    draw_w: float | None
    tenant: str

    @property
    def gpu_milli(self) -> int:
        """Thousandths of GPUs that it asks for."""
        return self.gpus * self.gpu_share_milli


@dataclass(frozen=True, slots=True)
class PriceRow:
    """From `start_s` on electricity costs so much; the scheduler learns it at `known_s`."""

    start_s: float
    usd_per_mwh: float
    known_s: float


@dataclass(frozen=True, slots=True)
class EventRow:
    """A grid event: the site may draw `site_power_w` at most; told `notice_s` before it begins."""

    event_id: str
    start_s: float
    end_s: float
    site_power_w: float
    notice_s: float
    emergency: bool


_time = number(0, TIME_S_MAX)
_text = csv_files.name(_NAME_CHARACTERS_MAX)


def _class(text: str) -> JobClass:
    found = JobClass.__members__.get(text.upper())
    if found is None:
        raise ValueError(f"must be one of {', '.join(JobClass.__members__)}")
    return found


def _models(text: str) -> tuple[str, ...]:
    models = tuple(model.strip() for model in _text(text).split("|"))
    if not all(models):
        raise ValueError("must be words of GPU names, separated by |")
    return models


def _share(text: str) -> int:
    return whole(0, SHARE_MILLI_WHOLE)(text) or SHARE_MILLI_WHOLE


NODE_COLUMNS = (
    Column("node_id", _text),
    Column("gpus", whole(0, GPUS_PER_NODE_MAX)),
    Column("gpu_model", _text, _UNKNOWN_GPU.model),
    Column("gpu_memory_mib", whole(1, _MIB_MAX), None),
    Column("cpus", thousandths(_CPUS_MAX), _CPUS_DEFAULT_MILLI),
    Column("memory_mib", whole(0, _MIB_MAX), _MIB_MAX),
    Column("gpu_idle_w", number(0, _W_MAX), None),
    Column("gpu_power_limit_w_min", number(0, _W_MAX), None),
    Column("gpu_power_limit_w_max", number(1, _W_MAX), None),
    Column("base_w", number(0, _W_MAX), 0.0),
)
JOB_COLUMNS = (
    Column("job_id", _text),
    Column("submit_s", _time),
    Column("class", _class),
    Column("duration_s", number(0, TIME_S_MAX, infinite=True)),
    Column("gpus", whole(0, _GANG_GPUS_MAX)),
    Column("gpu_share_milli", _share, SHARE_MILLI_WHOLE),
    Column("priority", whole(0, PRIORITY_MAX), PRIORITY_DEFAULT),
    Column("gpu_memory_mib", whole(0, _MIB_MAX), None),
    Column("cpus", thousandths(_CPUS_MAX), None),
    Column("memory_mib", whole(0, _MIB_MAX), None),
    Column("expected_s", _time, None),
    Column("value_usd_per_gpu_hour", number(0, _USD_MAX), None),
    Column("deadline_s", _time, None),
    Column("preemptible", boolean, None),
    Column("grace_s", _time, None),
    Column("min_runtime_s", _time, None),
    Column("restart_loss_s", _time, None),
    Column("gpu_models", _models, ()),
    Column("draw_w", number(1, _W_MAX), None),
    Column("tenant", _text, ""),
)
PRICE_COLUMNS = (
    Column("start_s", _time),
    Column("usd_per_mwh", number(-1e6, 1e6)),
    Column("known_s", _time, None),
)
EVENT_COLUMNS = (
    Column("event_id", _text),
    Column("start_s", _time),
    Column("end_s", _time),
    Column("site_power_w", number(0, _W_MAX)),
    Column("notice_s", _time, 0.0),
    Column("emergency", boolean, False),
)


def read_nodes(path: Path) -> list[NodeRow]:
    """The nodes of a file, in its order.

    Raises:
        InputError: Something in it is wrong; all of it is named.
    """
    problems = Problems(str(path))
    return _unique(
        (
            (line, node)
            for line, values in csv_files.rows(path, NODE_COLUMNS, problems)
            if (node := _node(line, values, problems)) is not None
        ),
        "node_id",
        NODES_MAX,
        problems,
    )


def _node(line: int, values: dict[str, Any], problems: Problems) -> NodeRow | None:
    profile = PROFILES.get(values["gpu_model"].upper(), _UNKNOWN_GPU)
    for column, default in (
        ("gpu_memory_mib", profile.memory_mib),
        ("gpu_power_limit_w_max", profile.power_limit_w_max),
    ):
        if values[column] is None:
            values[column] = default
    most_w = values["gpu_power_limit_w_max"]
    for column, default_w in (
        ("gpu_power_limit_w_min", profile.power_limit_w_min),
        ("gpu_idle_w", profile.idle_w),
    ):
        if values[column] is None:
            values[column] = min(default_w, most_w)
        elif values[column] > most_w:
            problems.add(line, column, f"must be at most gpu_power_limit_w_max ({most_w:g})")
            return None
    values["cpus_milli"] = values.pop("cpus")
    return NodeRow(**values)


def read_prices(path: Path) -> list[PriceRow]:
    """The prices of a file, in the order of time.

    Raises:
        InputError: Something in it is wrong; all of it is named.
    """
    problems, found = Problems(str(path)), list[PriceRow]()
    for line, values in csv_files.rows(path, PRICE_COLUMNS, problems):
        start_s = values["start_s"]
        if found and start_s <= found[-1].start_s:
            problems.add(
                line,
                "start_s",
                f"time runs backwards: {start_s:g} is not after {found[-1].start_s:g} of the row before; "
                "sort the rows by start_s and keep one of each",
            )
            continue
        if values["known_s"] is None:
            values["known_s"] = start_s
        found.append(PriceRow(**values))
        _limit(len(found), SERIES_ROWS_MAX, line, problems)
    return found


def read_events(path: Path) -> list[EventRow]:
    """The grid events of a file; they may overlap, and the tightest holds.

    Raises:
        InputError: Something in it is wrong; all of it is named.
    """
    problems = Problems(str(path))

    def events() -> Iterator[tuple[int, EventRow]]:
        for line, values in csv_files.rows(path, EVENT_COLUMNS, problems):
            event = EventRow(**values)
            if event.end_s <= event.start_s:
                problems.add(
                    line,
                    "end_s",
                    f"time runs backwards: must be after start_s ({event.start_s:g}), is {event.end_s:g}",
                )
            else:
                yield line, event

    return _unique(events(), "event_id", EVENTS_MAX, problems)


def _unique(found: Iterable[tuple[int, _Row]], column: str, rows_max: int, problems: Problems) -> list[_Row]:
    """The rows, each with a name of its own."""
    rows, lines = list[_Row](), dict[str, int]()
    for line, row in found:
        key = getattr(row, column)
        if key in lines:
            problems.add(line, column, f"{csv_files.shown(key)} is the {column} of line {lines[key]} already")
            continue
        lines[key] = line
        rows.append(row)
        _limit(len(rows), rows_max, line, problems)
    problems.check()
    return rows


def _limit(count: int, rows_max: int, line: int, problems: Problems) -> None:
    if count > rows_max:
        problems.add(line, "", f"there may be {rows_max} rows at most")
        problems.check()


# Jobs ------------------------------------------------------------------------------------------


class Room:
    """What the nodes have, to refuse a job that fits nowhere even if everything is empty.

    A gang that no node can hold takes several that are alike, and of each a part of its CPUs and memory.
    """

    def __init__(self, nodes: Iterable[NodeRow]) -> None:
        """Take the nodes; of those that are alike one is looked at, and how many there are."""
        self._count = Counter(_Shape(*map(node.__getattribute__, _Shape._fields)) for node in nodes)
        self.lack = lru_cache(maxsize=10_000)(self._lack)

    def _lack(
        self, gpus: int, models: tuple[str, ...], gpu_mib: int, cpus_milli: int, memory_mib: int
    ) -> tuple[str, str] | None:
        """The column that rules a job out, and why; None where it fits."""
        matching = list(self._count)
        if gpus:
            matching = [shape for shape in matching if shape.gpus and shape.has_one_of(models)]
            if not matching:
                return "gpu_models" if models else "gpus", "no node has such a GPU"
        else:
            gpu_mib = 0
        amounts = (
            ("gpu_memory_mib", gpu_mib),
            ("gpus", gpus),
            ("cpus_milli", cpus_milli),
            ("memory_mib", memory_mib),
        )
        too_wide = gpus > max((shape.gpus for shape in matching), default=0)
        spread = too_wide and any(self._count[shape] > 1 for shape in matching)
        for name, wanted in amounts:
            had = {shape: self._had(shape, name, gpus if spread else 0) for shape in matching}
            matching = [shape for shape in matching if had[shape] >= wanted]
            if not matching:
                most = max(had.values()) / (1000 if name == "cpus_milli" else 1)
                where = "what nodes that are alike have together" if spread else "what the largest node has"
                return name.removesuffix("_milli"), f"must be at most {most:g}, {where} that fits otherwise"
        return None

    def _had(self, shape: "_Shape", name: str, gang_gpus: int) -> int:
        """What a job could have of such a node; a gang over several of all those that it would take."""
        amount: int = getattr(shape, name)
        if not gang_gpus or name == "gpu_memory_mib":
            return amount
        if name == "gpus":
            return amount * self._count[shape]
        return amount * gang_gpus // shape.gpus


class _Shape(NamedTuple):
    """What of a node matters to whether a job fits."""

    gpu_model: str
    gpus: int
    gpu_memory_mib: int
    cpus_milli: int
    memory_mib: int

    def has_one_of(self, models: tuple[str, ...]) -> bool:
        """Whether its GPUs are of a model that is asked for."""
        return not models or any(model_matches(model, self.gpu_model) for model in models)


class JobStore:
    """The jobs of a file in a scratch database, from which they come in the order of submission."""

    def __init__(self) -> None:
        """Make the database: a temporary file that nobody else sees (SQLite's, of the empty name)."""
        self._db = sqlite3.connect("", isolation_level=None)
        # Nobody needs it after a crash.
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE jobs (submit_s REAL, line INTEGER, job_id TEXT, body BLOB)")
        self.count = 0
        self.last_submit_s = 0.0

    def load(self, path: Path, room: Room) -> None:
        """Read the jobs of a file.

        Raises:
            InputError: Something in it is wrong; all of it is named.
        """
        problems = Problems(str(path))
        checked = self._checked(path, room, problems)
        encode = msgspec.msgpack.encode
        self._db.execute("BEGIN")
        while batch := list(islice(checked, _ROWS_AT_ONCE)):
            self._db.executemany(
                "INSERT INTO jobs VALUES (?, ?, ?, ?)",
                [(job.submit_s, line, job.job_id, encode(job)) for line, job in batch],
            )
            self.count += len(batch)
        self._db.execute("COMMIT")
        self._refuse_twins(problems)
        self._db.execute("CREATE INDEX by_submission ON jobs (submit_s, line)")
        (self.last_submit_s,) = self._db.execute("SELECT max(submit_s) FROM jobs").fetchone()

    def __iter__(self) -> Iterator[JobRow]:
        decode = msgspec.msgpack.Decoder(JobRow).decode
        for (body,) in self._db.execute("SELECT body FROM jobs ORDER BY submit_s, line"):
            yield decode(body)

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    def _checked(self, path: Path, room: Room, problems: Problems) -> Iterator[tuple[int, JobRow]]:
        for line, values in csv_files.rows(path, JOB_COLUMNS, problems):
            job = _job(values)
            wrong = _job_problem(job) or room.lack(
                job.gpus, job.gpu_models, job.gpu_memory_mib or 0, job.cpus_milli or 0, job.memory_mib or 0
            )
            if wrong is None:
                yield line, job
            else:
                column, remedy = wrong
                problems.add(line, column, f"{remedy}, is {csv_files.shown(_cell(values, column))}")

    def _refuse_twins(self, problems: Problems) -> None:
        self._db.execute("CREATE INDEX by_id ON jobs (job_id, line)")
        twins = self._db.execute(
            "SELECT b.line, b.job_id, min(a.line) FROM jobs a JOIN jobs b USING (job_id)"
            " WHERE a.line < b.line GROUP BY b.line ORDER BY b.line LIMIT ?",
            (csv_files.PROBLEMS_SHOWN_MAX,),
        ).fetchall()
        for line, job_id, first in twins:
            problems.add(line, "job_id", f"{csv_files.shown(job_id)} is the job_id of line {first} already")
        problems.check()
        self._db.execute("DROP INDEX by_id")


def _job(values: dict[str, Any]) -> JobRow:
    fields = dict(values)
    fields["job_class"] = fields.pop("class")
    fields["cpus_milli"] = fields.pop("cpus")
    return JobRow(**fields)


def _job_problem(job: JobRow) -> tuple[str, str] | None:
    """What of a row contradicts the rest of it: the column and the remedy."""
    if job.gpu_share_milli < SHARE_MILLI_WHOLE and job.gpus != 1:
        return (
            "gpu_share_milli",
            f"a share is of one GPU, and gpus is {job.gpus}; leave it out or set gpus to 1",
        )
    if job.deadline_s is not None and job.deadline_s < job.submit_s:
        return "deadline_s", f"time runs backwards: must not be before submit_s ({job.submit_s:g})"
    if job.duration_s == 0:
        return "duration_s", "must be above 0"
    if job.deadline_s is not None and math.isinf(job.duration_s):
        return "deadline_s", "a job that never ends can't be complete by then; leave it out"
    return None


def _cell(values: dict[str, Any], column: str) -> str:
    """A value as its cell may have been written."""
    value = values[column]
    if isinstance(value, tuple):
        return "|".join(value)
    return f"{int(value) / 1000:g}" if column == "cpus" else f"{value:g}"


def write_rows(path: Path, columns: Iterable[Column], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a CSV file that `simulate` reads; what a row lacks stays empty.

    Raises:
        InputError: The file can't be written.
    """
    import csv

    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror}") from None
