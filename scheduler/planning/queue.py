"""The pending jobs in the order of rank, each request shape tried once.

What is free or may be displaced only shrinks while jobs are served from the highest rank down, and a job of
lower rank may displace no more than one of higher rank. So once a request can't be served, no later request
that wants at least as much of everything can be: 100,000 equal jobs cost one try. The same holds of requests
refused for a promise, among those that neither end in time nor give way.
"""

from collections.abc import Iterator
from typing import Any

from scheduler.model.actions import WAIT_REASONS
from scheduler.model.policy import Order
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import CLOSED, NOT_DRAINING, PENDING, Snapshot
from scheduler.planning.allocator import Request
from scheduler.planning.arrays import covered_sets, lists, rows_where, unknown_as_zero, xp
from scheduler.planning.valuation import rank_order

WAIT_CODE: dict[Reason, int] = {reason: code for code, reason in enumerate(WAIT_REASONS)}
UNDECIDED = -1
# Codes of pending jobs that do not wait: they start or fail.
LEAVES = -2
# Requests taken out of the columns at a time: few at first, as one refusal often settles the rest.
_CHUNK_FIRST, _CHUNK_MAX = 16, 1024

_REQUEST_COLUMNS = (
    "number", "job_class", "priority", "value", "gpus", "share_milli", "gpu_memory_mib", "models", "cpus",
    "memory_mib", "preemptible", "min_runtime_us", "restart_loss_us", "expected_us", "grace_us",
)  # fmt: skip
_SHAPE_COLUMNS = ("gpus", "share_milli", "gpu_memory_mib", "models", "cpus", "memory_mib")


class Queue:
    """The pending rows of a snapshot; `codes` says of each what becomes of it."""

    def __init__(self, snapshot: Snapshot, order: Order) -> None:
        self._snapshot = snapshot
        self._order = order
        self._jobs = snapshot.jobs
        self.rows = rows_where(self._jobs.state == PENDING)
        self.codes = xp.full(len(self.rows), UNDECIDED, dtype=xp.int64)
        self._refused: list[Request] = []
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Any:
        """The pending rows of a column of jobs."""
        known = self._columns.get(name)
        if known is None:
            whole = getattr(self._jobs, name)
            known = self._columns[name] = whole if len(whole) == len(self.rows) else whole[self.rows]
        return known

    def fail_late(self) -> list[int]:
        """Take out the jobs that can't meet their deadline any more; their numbers, ascending."""
        deadline = self.column("deadline_us")
        late = deadline >= 0
        if not late.any():
            return []
        late &= self._snapshot.now_us + unknown_as_zero(self.column("expected_us")) > deadline
        self.codes[late] = LEAVES
        return sorted(self.column("number")[late].tolist())

    def set_aside(self) -> None:
        """Decide the jobs that nothing here can serve now: they back off, the nodes drain, no GPU suits."""
        undecided = self.codes == UNDECIDED
        self._set(undecided & (self.column("eligible_us") > self._snapshot.now_us), Reason.BACKING_OFF)
        drains = self._snapshot.nodes.drain != NOT_DRAINING
        if drains.all():
            self._set(self.codes == UNDECIDED, Reason.NODE_DRAINING)
            return
        suits = self._suits(~drains)
        wanting = self.column("gpus")
        if drains.any():
            elsewhere = (self.codes == UNDECIDED) & (suits < wanting) & (self._suits(drains) >= wanting)
            self._set(elsewhere, Reason.NODE_DRAINING)
        self._set((self.codes == UNDECIDED) & (suits < wanting), Reason.NO_SUITABLE_GPU)

    def requests(self) -> Iterator[tuple[int, Request]]:
        """Undecided requests with their position, from the highest rank down.

        The caller decides each before it asks for the next, by `start`, `wait` or `refuse`.
        """
        ranked = self._ranked()
        size = _CHUNK_FIRST
        while len(ranked):
            head, ranked = ranked[:size], ranked[size:]
            before = len(self._refused)
            columns = lists(tuple(self.column(name) for name in _REQUEST_COLUMNS), head)
            for position, values in zip(head.tolist(), zip(*columns, strict=True), strict=True):
                if self.codes[position] == UNDECIDED:
                    yield position, Request(*values)
            if len(self._refused) > before or size == _CHUNK_FIRST:
                ranked = ranked[self.codes[ranked] == UNDECIDED]
            size = min(2 * size, _CHUNK_MAX)

    def start(self, position: int) -> None:
        """The job starts."""
        self.codes[position] = LEAVES

    def wait(self, position: int, reason: Reason) -> None:
        """This job alone waits."""
        self.codes[position] = WAIT_CODE[reason]

    def refuse(self, request: Request, reason: Reason, among: Any | None = None) -> None:
        """The job and all that want at least as much wait; `among` restricts it to some positions."""
        self._refused.append(request)
        more = self.codes == UNDECIDED
        if among is not None:
            more &= among
        if request.gpus:
            more &= self.column("gpus") >= request.gpus
            if len(self._snapshot.model_fits) > 1:
                more &= covered_sets(self._snapshot.model_fits, request.models)[self.column("models")]
        if request.gpus and request.share_milli > 1:
            more &= self.column("share_milli") >= request.share_milli
        for name in ("gpu_memory_mib", "cpus", "memory_mib"):
            least = getattr(request, name)
            if least:
                more &= self.column(name) >= least
        self._set(more, reason)

    def _ranked(self) -> Any:
        left = rows_where(self.codes == UNDECIDED)
        columns = [self.column(name) for name in ("job_class", "priority", "value", "number")]
        if len(left) < len(self.rows):
            columns = [column[left] for column in columns]
        return left[rank_order(self._order, *columns)]

    def _set(self, where: Any, reason: Reason) -> None:
        self.codes[where] = WAIT_CODE[reason]

    def _suits(self, nodes: Any) -> Any:
        """Shape (pending,): the most GPUs of one of these nodes that serve the job by model and memory."""
        gpus, fits = self._snapshot.gpus, self._snapshot.model_fits
        usable = (gpus.state != CLOSED) & nodes[gpus.node]
        sizes = sorted(set(gpus.memory_mib[usable].tolist()))
        most = xp.zeros((len(fits), len(sizes) + 1), dtype=xp.int64)
        for level, size in enumerate(sizes):
            large = usable & (gpus.memory_mib >= size)
            for node in set(gpus.node[large].tolist()):
                count = fits[:, large & (gpus.node == node)].sum(axis=1)
                most[:, level] = xp.maximum(most[:, level], count)
        level = xp.searchsorted(xp.array(sizes, dtype=xp.int64), self.column("gpu_memory_mib"))
        return most[self.column("models"), level]
