"""The world at one moment as columns: what the planner sees, and all it sees.

Rows of `jobs` are the jobs that are not final, `gpus` the GPUs, `nodes` the nodes; `holdings`
pairs a live job with each GPU it holds. All columns are int64 or bool; times are microseconds
since the epoch, -1 where unknown; money is micro-USD. Capacity in use is derived from the live
jobs, never counted beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np

from scheduler.errors import SnapshotError
from scheduler.model.power import Curve

UNKNOWN = -1
WHOLE_MILLI = 1000

# Codes of JobColumns.state
PENDING, STARTING, RUNNING, SUSPENDED, PREEMPTING, STOPPING = range(6)

# Codes of GpuColumns.state
OPEN, CLOSED = range(2)

# Codes of NodeColumns.drain
NOT_DRAINING, DRAINING, DRAINING_STOP = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class JobColumns:
    """Shape (jobs,) each."""

    number: Any  # unique, ascending with submission
    state: Any
    job_class: Any  # JobClass
    priority: Any  # with aging
    value: Any  # micro-USD per GPU-hour, net of energy where a price is known
    gpus: Any  # whole GPUs, or 1 with share < 1000; 0 = CPU only
    share_milli: Any  # 1..1000
    gpu_memory_mib: Any  # per GPU; 0 = not accounted
    models: Any  # row of `Snapshot.model_fits`
    cpus: Any
    memory_mib: Any
    preemptible: Any  # bool
    eligible_us: Any  # back-off: no start before
    min_runtime_us: Any  # duration for which a started attempt is left alone
    grace_us: Any
    restart_loss_us: Any
    expected_us: Any  # declared duration of an attempt; UNKNOWN
    deadline_us: Any  # UNKNOWN
    time_limit_us: Any  # duration; UNKNOWN
    started_us: Any  # of the live attempt; UNKNOWN before it runs
    checkpoint_us: Any  # last one known of the live attempt; UNKNOWN
    node: Any  # where a live job is, of a gang over several nodes one that it holds GPUs of; UNKNOWN
    preemptor: Any  # number of the job that a stopping one gives way to; UNKNOWN
    stop_us: Any  # when the stop of a stopping job was decided; UNKNOWN

    def __len__(self) -> int:
        return len(self.number)


@dataclass(frozen=True, slots=True, eq=False)
class GpuColumns:
    """Shape (gpus,) each; `uuid` is a tuple in the same order."""

    uuid: tuple[str, ...]
    index: Any  # order in which equal GPUs are handed out
    node: Any  # row of NodeColumns
    memory_mib: Any  # that jobs may book: total less the baseline
    # OPEN: may be given out as far as nobody holds it. CLOSED: cordoned, quarantined, foreign or
    # lost: nothing new starts there.
    state: Any
    # Which GPUs of a node are near each other: equal numbers share an NVLink island, a PCIe switch, a NUMA
    # node. UNKNOWN is near nobody. Left out they are UNKNOWN for every row.
    island: Any = None
    switch: Any = None
    numa: Any = None
    # Equal numbers are of one model. Left out they are UNKNOWN, and so equal, for every row.
    model: Any = None
    # Bool: a MIG instance. CUDA shows one to a process and nothing else beside it, so that a job of several
    # GPUs gets none. Left out: no row is one.
    instance: Any = None

    def __post_init__(self) -> None:
        for name in ("island", "switch", "numa", "model"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.full(len(self.uuid), UNKNOWN, dtype=np.int64))
        if self.instance is None:
            object.__setattr__(self, "instance", np.zeros(len(self.uuid), dtype=bool))
        # Here and not in the snapshot: they outlive many.
        _check_gpus(_Table("gpus", self, lambda row: self.uuid[row]), self)

    def __len__(self) -> int:
        return len(self.uuid)


@dataclass(frozen=True, slots=True, eq=False)
class NodeColumns:
    """Shape (nodes,) each."""

    cpus: Any
    memory_mib: Any
    live_jobs_max: Any
    drain: Any  # NOT_DRAINING, DRAINING: nothing starts, DRAINING_STOP: what runs gives way too

    def __len__(self) -> int:
        return len(self.cpus)


@dataclass(frozen=True, slots=True, eq=False)
class HoldingColumns:
    """Shape (holdings,) each: job row `job` holds GPU row `gpu`.

    A gang over several nodes holds GPUs of each of them. Its CPUs and host memory are there in proportion to
    the GPUs, rounded up, and it takes a place for a live job on each.

    `job` is UNKNOWN for what an ended job still occupies until its hand-over is verified; of those the last
    two columns say what `JobColumns` says of a stopping job. Left out they are UNKNOWN for every row.
    """

    job: Any
    gpu: Any
    share_milli: Any
    memory_mib: Any
    preemptor: Any = None
    stop_us: Any = None

    def __post_init__(self) -> None:
        for name in ("preemptor", "stop_us"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.full(len(self.job), UNKNOWN, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.job)


@dataclass(frozen=True, slots=True, eq=False)
class MixColumns:
    """Shape (kinds,) each: the requests that the site expects; what stays free is to serve them."""

    gpus: Any  # whole GPUs, or 1 with share < 1000; 0 = CPU only
    share_milli: Any  # 1..1000
    gpu_memory_mib: Any  # per GPU; 0 = not accounted
    cpus: Any
    memory_mib: Any
    models: Any  # row of `Snapshot.model_fits`; UNKNOWN = any
    weight: Any  # how often it is asked for; positive, in any unit

    def __len__(self) -> int:
        return len(self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class PowerColumns:
    """What a plan knows of power: whole watts of boards; UNKNOWN where not known."""

    budget_w: int  # that all boards may draw together: what the site may, less PUE and base; may be negative
    promised_w: int | None  # the least that an accepted event will leave to the boards; None = no event
    promised_us: int  # when that event begins
    is_emergency: bool
    horizon_us: int  # for how long a shed is reckoned to last
    margin_milli: int  # by how much an unshed limit lies above the natural draw
    lead_milli: int  # by how much a limit that binds lies below its plan, while draws fall to a lower budget
    limits_inference: bool
    curves: tuple[Curve, ...]  # by class
    # Shape (gpus,) each.
    idle_w: Any  # what a GPU counts for while no job holds it
    limit_w: Any  # in force
    limit_w_min: Any  # as large as the maximum where a limit can't be set
    limit_w_max: Any
    measured_w: Any  # what an empty board was seen to draw; UNKNOWN: not read since it came free, or occupied
    # Shape (jobs,).
    natural_w: Any  # per GPU, declared or learned; UNKNOWN
    # Where a miner earns most, if that is below its full limit; UNKNOWN. Left out it is so for every row.
    best_w: Any = None
    # What each of its boards draws while it is frozen; UNKNOWN of who may not be. And since when it is to be
    # frozen; UNKNOWN of who is to run. Left out both are so for every row.
    frozen_w: Any = None
    suspend_us: Any = None

    def __post_init__(self) -> None:
        for name in ("best_w", "frozen_w", "suspend_us"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.full(len(self.natural_w), UNKNOWN, dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The frozen world; it checks itself when it is built.

    Raises:
        SnapshotError: It contradicts itself; the message names the table, the row and the fact.
    """

    now_us: int
    jobs: JobColumns
    gpus: GpuColumns
    nodes: NodeColumns
    holdings: HoldingColumns
    model_fits: Any  # bool, shape (model sets, gpus): does GPU g serve jobs with this set of models
    mix: MixColumns | None = None  # None: what the jobs of this snapshot ask for
    power: PowerColumns | None = None  # None: nobody sets a budget
    # Shape (jobs,): what a GPU-hour of each earns before its energy, micro-USD; `JobColumns.value` is what is
    # left. None: no price is known, and energy costs nothing.
    gross_value: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.now_us, int | np.integer):
            raise SnapshotError(f"now_us is {self.now_us}, not a whole number of microseconds")
        jobs, gpus, nodes, holdings = self.jobs, self.gpus, self.nodes, self.holdings
        of_jobs = _Table("jobs", jobs, lambda row: f"job {jobs.number[row]}")
        of_gpus = _Table("gpus", gpus, lambda row: gpus.uuid[row])
        of_nodes = _Table("nodes", nodes, lambda row: f"node {row}")
        of_holdings = _Table("holdings", holdings, lambda row: gpus.uuid[holdings.gpu[row]])
        for table in (of_jobs, of_nodes, of_holdings):
            table.check_shape()
        if self.model_fits.shape[1:] != (len(gpus),) or self.model_fits.dtype != _BOOL:
            raise SnapshotError(
                f"model_fits is {self.model_fits.dtype} of shape {self.model_fits.shape} for {len(gpus)} GPUs"
            )
        _check_nodes(of_nodes, nodes)
        if len(gpus):
            of_gpus.within("node", 0, len(nodes) - 1)
        _check_jobs(of_jobs, jobs, len(nodes), len(self.model_fits))
        _check_holdings(of_holdings, holdings, jobs, gpus)
        if self.power is not None:
            _check_power(self.power, len(gpus), len(jobs))
        gross = self.gross_value
        if gross is not None and (gross.shape != (len(jobs),) or gross.dtype != _INT64):
            raise SnapshotError(f"gross_value is {gross.dtype} of shape {gross.shape} for {len(jobs)} jobs")


# The checks run each tick: whole columns in as few passes as will do, and words only for a row that fails
# (0.13 ms on a node of 8 GPUs and 13 jobs, 2.9 ms at 100,000 jobs; a sort of the numbers alone took 4).
_INT64, _BOOL = np.dtype(np.int64), np.dtype(bool)
# Up to so many rows Python's own `min` takes less than the call of numpy's.
_FEW_ROWS = 32
_JOB_CLASS_LAST = 3
_NOT_NEGATIVE = (
    "state",
    "job_class",
    "models",
    "gpus",
    "gpu_memory_mib",
    "cpus",
    "memory_mib",
    "min_runtime_us",
    "grace_us",
    "restart_loss_us",
)


class _Table(NamedTuple):
    """Columns with the name and the label of a row that errors state."""

    name: str
    columns: Any
    label: Callable[[int], str]

    def check_shape(self) -> None:
        """Every column has the rows of the table, and whole numbers or truths in them."""
        rows = len(self.columns)
        for name in self.columns.__slots__:
            column = getattr(self.columns, name)
            if len(column) != rows:
                raise SnapshotError(f"{self.name}.{name} has {len(column)} rows, {self.name} has {rows}")
            if type(column) is tuple or column.dtype is _INT64 or not rows:
                continue
            if column.dtype not in (_INT64, _BOOL):
                row = int(np.argmin(np.isfinite(column))) if column.dtype.kind == "f" else 0
                raise SnapshotError(
                    f"{self.name} row {row}: {name} is {column[row]}; the column is {column.dtype}, not int64"
                )

    def check(self, holds: Any, message: Callable[[int], str]) -> None:
        """Every row holds; else an error that names the first that does not."""
        if not holds.all():
            row = int(np.flatnonzero(~holds)[0])
            raise SnapshotError(f"{self.name} row {row} ({self.label(row)}): {message(row)}")

    def within(self, name: str, low: int, high: int) -> None:
        """Every value of the column is one of these."""
        values = getattr(self.columns, name)
        if _least(values) < low or _most(values) > high:
            holds = (values >= low) & (values <= high)
            self.check(holds, lambda row: f"{name} is {values[row]}, not {low} to {high}")

    def at_most(self, **highest: int) -> None:
        """No value of a column is above its bound; `not_negative` has looked at the other end."""
        for name, high in highest.items():
            if _most(getattr(self.columns, name)) > high:
                self.within(name, 0, high)

    def not_negative(self, *names: str) -> None:
        """No value of the columns is below 0."""
        columns = {name: getattr(self.columns, name) for name in names}
        # The sign of all in one pass: it is a bit like any other.
        if _least(reduce(np.bitwise_or, columns.values())) < 0:
            for name, values in columns.items():
                self.check(values >= 0, partial(_below_zero, name, values))


def _least(values: Any) -> Any:
    return min(values.tolist()) if len(values) <= _FEW_ROWS else values.min()


def _most(values: Any) -> Any:
    return max(values.tolist()) if len(values) <= _FEW_ROWS else values.max()


def _below_zero(name: str, values: Any, row: int) -> str:
    return f"{name} is {values[row]}, less than 0"


def _check_nodes(table: _Table, nodes: NodeColumns) -> None:
    if len(nodes):
        table.not_negative("cpus", "memory_mib", "live_jobs_max", "drain")
        table.at_most(drain=DRAINING_STOP)


def _check_gpus(table: _Table, gpus: GpuColumns) -> None:
    table.check_shape()
    if not len(gpus):
        return
    table.not_negative("state", "memory_mib")
    table.at_most(state=CLOSED)
    if len(set(gpus.uuid)) != len(gpus):
        first = {uuid: row for row, uuid in reversed(list(enumerate(gpus.uuid)))}
        unique = np.array([first[uuid] == row for row, uuid in enumerate(gpus.uuid)])
        table.check(unique, lambda row: f"has the UUID of row {first[gpus.uuid[row]]}")


def _check_jobs(table: _Table, jobs: JobColumns, nodes: int, model_sets: int) -> None:
    if not len(jobs):
        return
    number = jobs.number
    if not (number[1:] > number[:-1]).all():
        ordered = np.sort(number)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        table.check(~np.isin(number, twice), lambda _: "the number is not unique")
    table.not_negative(*_NOT_NEGATIVE)
    table.at_most(state=STOPPING, job_class=_JOB_CLASS_LAST, models=model_sets - 1)
    table.within("share_milli", 1, WHOLE_MILLI)
    if (jobs.share_milli != WHOLE_MILLI).any():
        whole = (jobs.share_milli == WHOLE_MILLI) | (jobs.gpus == 1)
        table.check(whole, lambda row: f"asks for a share of {jobs.gpus[row]} GPUs; a share is of one")
    live = np.flatnonzero(jobs.state != PENDING)
    node = jobs.node[live]
    if len(live) and (node.min() < 0 or node.max() >= nodes):
        here = np.ones(len(jobs), dtype=bool)
        here[live] = (node >= 0) & (node < nodes)
        table.check(here, lambda row: f"runs on node {jobs.node[row]} of {nodes}")


def _check_holdings(table: _Table, holdings: HoldingColumns, jobs: JobColumns, gpus: GpuColumns) -> None:
    """Who holds a GPU is there, live and on its node, with its own share; and nothing is held twice."""
    if not len(holdings):
        return
    table._replace(label=lambda row: f"GPU row {holdings.gpu[row]}").within("gpu", 0, len(gpus) - 1)
    table.within("job", UNKNOWN, len(jobs) - 1)
    table.within("share_milli", 1, WHOLE_MILLI)
    table.not_negative("memory_mib")
    over = holdings.job == UNKNOWN
    if not over.all():
        _check_holders(table, holdings, jobs, gpus, over)
    gpu, mib = holdings.gpu, holdings.memory_mib
    held = np.bincount(gpu, weights=holdings.share_milli, minlength=len(gpus))
    table.check((held <= WHOLE_MILLI)[gpu], lambda row: f"{held[gpu[row]]:.0f} thousandths of it are held")
    # What a GPU that is lost says of itself proves nothing; its jobs are adopted all the same.
    most = np.where(gpus.state == OPEN, gpus.memory_mib, held_mib := np.bincount(gpu, mib, len(gpus)))
    table.check(
        (held_mib <= most)[gpu],
        lambda row: f"{held_mib[gpu[row]]:.0f} MiB of it are held; it has {gpus.memory_mib[gpu[row]]}",
    )


def _check_holders(
    table: _Table, holdings: HoldingColumns, jobs: JobColumns, gpus: GpuColumns, over: Any
) -> None:
    """`over` are the rows of ended jobs: they have no row in `jobs`."""
    job, gpu = np.where(over, 0, holdings.job), holdings.gpu
    number, state, share, node = jobs.number, jobs.state[job], jobs.share_milli[job], jobs.node[job]
    where = gpus.node[gpu]
    live, here, own = state != PENDING, node == where, share == holdings.share_milli
    if not (over | (live & here & own)).all():
        table.check(over | live, lambda row: f"held by job {number[job[row]]}, which is pending")
        # A gang may hold GPUs of several nodes; its own node is one of them.
        at_home = np.bincount(job[here & ~over], minlength=len(jobs)) > 0
        table.check(
            over | here | at_home[job],
            lambda row: f"on node {where[row]}, held by job {number[job[row]]} on node {node[row]}",
        )
        table.check(
            over | own, lambda row: f"job {number[job[row]]} holds another share than its {share[row]}"
        )
    counts = np.bincount(holdings.job[~over])
    asked = jobs.gpus[: len(counts)]
    if (counts > asked).any():
        table.check(
            over | (counts <= asked)[np.minimum(job, len(counts) - 1)],
            lambda row: f"job {number[job[row]]} holds {counts[job[row]]} GPUs of {asked[job[row]]}",
        )


_OF_GPUS = ("idle_w", "limit_w", "limit_w_min", "limit_w_max", "measured_w")


def _check_power(power: PowerColumns, gpus: int, jobs: int) -> None:
    of_jobs = ("natural_w", "best_w", "frozen_w", "suspend_us")
    for name in (*_OF_GPUS, *of_jobs):
        column, rows = getattr(power, name), jobs if name in of_jobs else gpus
        if len(column) != rows:
            raise SnapshotError(f"power.{name} has {len(column)} rows; there are {rows}")
        least = UNKNOWN if name in ("measured_w", *of_jobs) else 0
        _check_watts(name, column, column >= least)
    _check_watts("limit_w_max", power.limit_w_max, power.limit_w_max >= power.limit_w_min)


def _check_watts(name: str, column: Any, holds: Any) -> None:
    if not holds.all():
        row = int(np.flatnonzero(~holds)[0])
        raise SnapshotError(f"power row {row}: {name} is {column[row]}")
