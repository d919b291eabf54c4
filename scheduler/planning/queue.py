"""The pending jobs in the order of rank, each request shape tried once.

What is free or may be displaced only shrinks while jobs are served from the highest rank down, and a job of
lower rank may displace no more than one of higher rank. So once a request can't be served, no later request
that wants at least as much of everything can be: 100,000 equal jobs cost one try. The same holds of requests
refused for a promise, among those that neither end in time nor give way.

Everything here is by job row, over the snapshot's own columns: no column is copied or gathered.
"""

from collections.abc import Iterator
from typing import Any

from scheduler.model.actions import WAIT_REASONS
from scheduler.model.policy import Order
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import NOT_DRAINING, PENDING, UNKNOWN, JobColumns, Snapshot
from scheduler.planning.allocator import Request
from scheduler.planning.arrays import covered_sets, lists, rows_where, some, unknown_as_zero, xp
from scheduler.planning.economics import too_dear_to_start
from scheduler.planning.valuation import first_ranked
from scheduler.planning.world import World

WAIT_CODE: dict[Reason, int] = {reason: code for code, reason in enumerate(WAIT_REASONS)}
# Codes below zero are of jobs that don't wait: not decided yet, starting or failing, not pending at all.
UNDECIDED, LEAVES, LIVE = -1, -2, -3
# Requests taken out of the columns at a time: few at first, as one refusal often settles the rest.
_CHUNK_FIRST, _CHUNK_MAX = 64, 4096

_REQUEST_COLUMNS = (
    "number", "job_class", "priority", "value", "gpus", "share_milli", "gpu_memory_mib", "models", "cpus",
    "memory_mib", "preemptible", "min_runtime_us", "restart_loss_us", "expected_us", "grace_us",
)  # fmt: skip


def request_of(jobs: JobColumns, row: int) -> Request:
    """The job at this row as a request."""
    return Request(*(getattr(jobs, name)[row].item() for name in _REQUEST_COLUMNS))


class Queue:
    """The pending rows of a snapshot's jobs; `codes` says of each row what becomes of it."""

    def __init__(self, snapshot: Snapshot, order: Order) -> None:
        self._snapshot = snapshot
        self._order = order
        self.jobs = snapshot.jobs
        self.codes = xp.where(self.jobs.state == PENDING, UNDECIDED, LIVE)
        self._of_models: dict[int, Any] = {}  # bool, shape (jobs,): who accepts no GPU that a set does not
        # Bool, shape (jobs,): gangs that no node can hold; None: there are none that could start.
        self.spanning: Any | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether any pending job is left to decide."""
        return some(self.codes == UNDECIDED)

    def fail_late(self, rows: Any) -> list[int]:
        """Take out the jobs that can't meet their deadline any more; their numbers, ascending.

        `rows`: where there are deadlines, at least.
        """
        if not len(rows):
            return []
        jobs = self.jobs
        deadline_us = jobs.deadline_us[rows]
        late = (deadline_us != UNKNOWN) & (self.codes[rows] == UNDECIDED)
        late &= self._snapshot.now_us + unknown_as_zero(jobs.expected_us[rows]) > deadline_us
        rows = rows[late]
        self.codes[rows] = LEAVES
        return sorted(jobs.number[rows].tolist())

    def set_aside(self, world: World) -> None:
        """Decide the jobs that wait whatever is free: backing off, too dear, a drain, no GPU that suits."""
        self._decide(self.jobs.eligible_us > self._snapshot.now_us, Reason.BACKING_OFF)
        if self._snapshot.gross_value is not None:
            self._decide(too_dear_to_start(self._snapshot, self._order), Reason.WAITING_FOR_PRICE)
        drains = self._snapshot.nodes.drain != NOT_DRAINING
        if drains.all():
            self._decide(self.codes == UNDECIDED, Reason.NODE_DRAINING)
            return
        too_few = self._too_few(world, ~drains)
        if too_few is None:
            return
        if some(drains):
            elsewhere = self._too_few(world, xp.ones(len(drains), dtype=bool))
            self._decide(too_few if elsewhere is None else too_few & ~elsewhere, Reason.NODE_DRAINING)
        self._decide(too_few, Reason.NO_SUITABLE_GPU)

    def requests(self) -> Iterator[tuple[int, Request]]:
        """Undecided requests with their row, from the highest rank down.

        The caller decides each before it asks for the next, by `start`, `wait` or `refuse`.
        """
        jobs, size = self.jobs, _CHUNK_FIRST
        columns = tuple(getattr(jobs, name) for name in _REQUEST_COLUMNS)
        while len(rows := rows_where(self.codes == UNDECIDED)):
            head = first_ranked(rows, size, self._order, jobs)
            for row, values in zip(head.tolist(), zip(*lists(columns, head), strict=True), strict=True):
                if self.codes[row] == UNDECIDED:
                    yield row, Request._make(values)
                    assert self.codes[row] != UNDECIDED, "each request is decided before the next"
            size = min(4 * size, _CHUNK_MAX)

    def start(self, row: int) -> None:
        """The job starts."""
        self.codes[row] = LEAVES

    def wait(self, row: int, reason: Reason) -> None:
        """This job alone waits."""
        self.codes[row] = WAIT_CODE[reason]

    def refuse(
        self, least: Request, reason: Reason, among: Any | None = None, *, spans: bool = False
    ) -> None:
        """All undecided jobs that want at least as much wait; `among` restricts it to some rows.

        `spans`: it is a gang over several nodes. Those are told apart: where none of six GPUs finds a node,
        one of sixteen may still find two, as those are others. Among them who wants more GPUs, and as much
        of the host for each, finds room only where who wants fewer does.
        """
        jobs = self.jobs
        more = self.codes == UNDECIDED
        if among is not None:
            more &= among
        if self.spanning is not None:
            more &= self.spanning if spans else ~self.spanning
        if least.gpus:
            more &= jobs.gpus >= least.gpus
            if least.models != UNKNOWN and len(self._snapshot.model_fits) > 1:
                more &= self._accepting_no_more(least.models)
            if least.share_milli > 1:
                more &= jobs.share_milli >= least.share_milli
        for name in ("gpu_memory_mib", "cpus", "memory_mib"):
            amount = getattr(least, name)
            if amount and spans and name != "gpu_memory_mib":
                more &= getattr(jobs, name) * least.gpus >= amount * jobs.gpus
            elif amount:
                more &= getattr(jobs, name) >= amount
        self.codes[more] = WAIT_CODE[reason]

    def _accepting_no_more(self, models: int) -> Any:
        """Bool, shape (jobs,): the jobs that accept no GPU which this set of models does not allow."""
        known = self._of_models.get(models)
        if known is None:
            covered = covered_sets(self._snapshot.model_fits, models)
            known = self._of_models[models] = covered[self.jobs.models]
        return known

    def _decide(self, where: Any, reason: Reason) -> None:
        if some(where):
            self.codes[where & (self.codes == UNDECIDED)] = WAIT_CODE[reason]

    def _too_few(self, world: World, nodes: Any) -> Any | None:
        """The jobs for which these nodes have too few open GPUs by model and memory; None: nobody."""
        jobs = self.jobs
        sizes, most = world.layout.most_gpus(nodes)
        if len(sizes) and jobs.gpu_memory_mib.max() <= sizes[0] and jobs.gpus.max() <= most[:, 0].min():
            return None
        level = sizes.searchsorted(jobs.gpu_memory_mib)
        # One index into the flat array takes half of what two take.
        too_few = most.ravel()[jobs.models * most.shape[1] + level] < jobs.gpus
        if len(nodes) > 1:
            spanning = world.kinds.spanning(jobs) & (self.codes == UNDECIDED)
            if some(spanning):
                self.spanning = spanning
                of_several = world.kinds.most_gpus(sizes, nodes)[jobs.models, level] < jobs.gpus
                too_few = xp.where(spanning, of_several, too_few)
        return too_few
