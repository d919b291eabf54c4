"""The world at one moment as columns: what the planner sees, and all it sees.

Rows of `jobs` are the jobs that are not final, `gpus` the GPUs, `nodes` the nodes; `holdings`
pairs a live job with each GPU it holds. All columns are int64 or bool; times are microseconds
since the epoch, -1 where unknown; money is micro-USD. Capacity in use is derived from the live
jobs, never counted beside them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.errors import SnapshotError

UNKNOWN = -1

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
    node: Any  # where a live job is; UNKNOWN
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
class Snapshot:
    """The frozen world; it checks itself when it is built."""

    now_us: int
    jobs: JobColumns
    gpus: GpuColumns
    nodes: NodeColumns
    holdings: HoldingColumns
    model_fits: Any  # bool, shape (model sets, gpus): does GPU g serve jobs with this set of models

    def __post_init__(self) -> None:
        for name, columns in (
            ("jobs", self.jobs),
            ("gpus", self.gpus),
            ("nodes", self.nodes),
            ("holdings", self.holdings),
        ):
            rows = len(columns)
            for column in columns.__slots__:
                if len(getattr(columns, column)) != rows:
                    raise SnapshotError(f"{name}.{column} has not the {rows} rows of {name}")
        jobs, gpus, holdings = self.jobs, self.gpus, self.holdings
        if len(jobs):
            number, share = jobs.number, jobs.share_milli
            ordered = np.sort(number)
            if not (ordered[1:] > ordered[:-1]).all():
                raise SnapshotError("jobs.number is not unique")
            _within(number, share, 1, 1000, "share_milli")
            _within(number, jobs.state, PENDING, STOPPING, "state")
            _within(number, jobs.models, 0, len(self.model_fits) - 1, "model set")
            _check(number, (share == 1000) | (jobs.gpus == 1), "a share is of one GPU")
        if len(gpus):
            _within(gpus.index, gpus.node, 0, len(self.nodes) - 1, "node")
        if len(holdings):
            _within(holdings.gpu, holdings.gpu, 0, len(gpus) - 1, "GPU")
            _within(holdings.job, holdings.job, UNKNOWN, len(jobs) - 1, "job")
            held = np.bincount(holdings.gpu, weights=holdings.share_milli, minlength=len(gpus))
            _within(gpus.index, held, 0, 1000, "share held")
        if self.model_fits.shape[1:] != (len(gpus),):
            raise SnapshotError(f"model_fits has shape {self.model_fits.shape} for {len(gpus)} GPUs")


def _within(key: Any, values: Any, low: int, high: int, name: str) -> None:
    if values.min() < low or values.max() > high:
        _check(key, (values >= low) & (values <= high), f"{name} is not {low} to {high}")


def _check(key: Any, holds: Any, message: str) -> None:
    if not holds.all():
        row = int(np.flatnonzero(~holds)[0])
        raise SnapshotError(f"row {row} (key {int(key[row])}): {message}")
