"""The snapshot's live half as nodes, holds and live jobs that a plan can work on.

Only live jobs, GPUs and nodes become objects: they are few. Pending jobs stay columns (`queue.py`).
"""

from typing import NamedTuple

from scheduler.model.policy import Policy
from scheduler.model.snapshot import (
    CLOSED,
    NOT_DRAINING,
    PENDING,
    RUNNING,
    STARTING,
    SUSPENDED,
    UNKNOWN,
    Snapshot,
)
from scheduler.planning.allocator import WHOLE_MILLI, Gpu, Hold, Node, Spare
from scheduler.planning.arrays import lists, rows_where
from scheduler.planning.preemption import Live
from scheduler.planning.valuation import value_bar

# Later than any moment that a snapshot can name.
NEVER = 1 << 62
_US_PER_MS = 1000
_MS_PER_HOUR = 3_600_000
_MICRO = 1_000_000
_HOLDING_COLUMNS = ("job", "gpu", "share_milli", "memory_mib", "preemptor", "stop_us")


class Layout:
    """What depends on the GPUs and the sets of models alone: it outlives a plan (`planner.Memo`)."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._key = _layout_key(snapshot)
        gpus = snapshot.gpus
        columns = (gpus.node, gpus.index, gpus.memory_mib, gpus.state)
        serves = snapshot.model_fits.T.tolist()
        by_node: list[list[Gpu]] = [[] for _ in range(len(snapshot.nodes))]
        rows = zip(gpus.uuid, *(column.tolist() for column in columns), serves, strict=True)
        for row, (uuid, node, index, memory_mib, state, sets) in enumerate(rows):
            by_node[node].append(Gpu(row, uuid, index, memory_mib, state != CLOSED, tuple(sets)))
        self.position: dict[int, tuple[int, int]] = {}  # by GPU row: node, position
        for node, here in enumerate(by_node):
            here.sort(key=lambda gpu: (gpu.index, gpu.uuid))
            self.position.update((gpu.row, (node, position)) for position, gpu in enumerate(here))
        self.gpus = tuple(tuple(here) for here in by_node)
        self.suitable: list[dict[tuple[int, int], tuple[int, ...]]] = [{} for _ in by_node]

    def holds_for(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot has the same GPUs and sets of models."""
        return self._key == _layout_key(snapshot)


def _layout_key(snapshot: Snapshot) -> tuple[object, ...]:
    gpus = snapshot.gpus
    columns = (gpus.node, gpus.index, gpus.memory_mib, gpus.state, snapshot.model_fits)
    return (len(snapshot.nodes), gpus.uuid, *(column.tobytes() for column in columns))


class World:
    """The nodes of a snapshot, and what of each is free, leaving and live.

    `stopping` are jobs that this plan stops or requeues for their own or the node's sake: they count as
    leaving already.
    """

    def __init__(
        self, snapshot: Snapshot, policy: Policy, stopping: frozenset[int], layout: Layout | None = None
    ) -> None:
        self.now_us = snapshot.now_us
        self._policy = policy
        self.layout = layout if layout is not None and layout.holds_for(snapshot) else Layout(snapshot)
        self.nodes = self._empty_nodes(snapshot)
        self.live: list[list[Live]] = [[] for _ in self.nodes]
        self._occupy(snapshot, stopping)
        # Hand-overs of ended jobs have no number: an order of their own, whatever that of the rows (R8).
        for node in self.nodes:
            node.leaving.sort(key=lambda hold: (hold.number, sorted(hold.parts.items()), hold.preemptor))

    def leave(self, node: Node, number: int, preemptor: int) -> Live:
        """Let a live job leave for a preemptor; returns the victim."""
        live = self.live[node.row]
        victim = live.pop(next(place for place, each in enumerate(live) if each.number == number))
        victim.hold.preemptor = preemptor
        victim.hold.stop_us = self.now_us
        node.leaving.append(victim.hold)
        return victim

    def serve(self, number: int, served: int) -> None:
        """Remember when the job was served, on what leaves for it."""
        for node in self.nodes:
            for hold in node.leaving:
                if hold.preemptor == number:
                    hold.served = served

    def uuids(self, node: int, positions: tuple[int, ...]) -> tuple[str, ...]:
        """The UUIDs at these positions, by index."""
        return tuple(self.nodes[node].gpus[position].uuid for position in sorted(positions))

    def _empty_nodes(self, snapshot: Snapshot) -> list[Node]:
        sizes = snapshot.nodes
        columns = (sizes.cpus, sizes.memory_mib, sizes.live_jobs_max, sizes.drain)
        nodes = []
        for row, (cpus, memory_mib, slots, drain) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True)
        ):
            gpus = self.layout.gpus[row]
            whole = [WHOLE_MILLI] * len(gpus)
            free = Spare(whole, [gpu.memory_mib for gpu in gpus], cpus, memory_mib, slots)
            nodes.append(Node(row, gpus, free, drain != NOT_DRAINING, [], self.layout.suitable[row]))
        return nodes

    def _occupy(self, snapshot: Snapshot, stopping: frozenset[int]) -> None:
        """Take what live jobs and hand-overs hold out of what is free."""
        jobs, holdings = snapshot.jobs, snapshot.holdings
        live_rows = rows_where(jobs.state != PENDING)
        held: dict[int, list[tuple[int, int, int]]] = {}  # by job row: GPU row, thousandths, MiB
        live = set(live_rows.tolist())
        for job, gpu, milli, mib, preemptor, stop_us in zip(
            *(getattr(holdings, name).tolist() for name in _HOLDING_COLUMNS), strict=True
        ):
            if job in live:
                held.setdefault(job, []).append((gpu, milli, mib))
            else:
                self._hand_over(gpu, milli, mib, preemptor, stop_us)
        columns = lists(tuple(getattr(jobs, name) for name in _Row._fields), live_rows)
        for row, values in zip(live_rows.tolist(), zip(*columns, strict=True), strict=True):
            job = _Row(*values)
            self._settle(job, held.get(row, []), job.number in stopping)

    def _hand_over(self, gpu: int, milli: int, mib: int, preemptor: int, stop_us: int) -> None:
        """What an ended job still occupies leaves; it is no live job and has no CPUs."""
        row, position = self.layout.position[gpu]
        node = self.nodes[row]
        part = [milli, mib if milli < WHOLE_MILLI else 0]
        hold = Hold(UNKNOWN, {position: part}, 0, 0, 0, preemptor, stop_us, self.now_us)
        node.free.remove(hold)
        node.leaving.append(hold)

    def _settle(self, job: "_Row", held: list[tuple[int, int, int]], stops: bool) -> None:
        """Give a live job its place: among what leaves, or among what stays."""
        node = self.nodes[job.node]
        parts: dict[int, list[int]] = {}
        milli_gpus = 0
        for gpu, milli, mib in held:
            milli_gpus += milli
            part = parts.setdefault(self.layout.position[gpu][1], [0, 0])
            part[0] += milli
            part[1] += mib if milli < WHOLE_MILLI else 0
        preemptor, stop_us = (UNKNOWN, self.now_us) if stops else (job.preemptor, job.stop_us)
        hold = Hold(job.number, parts, job.cpus, job.memory_mib, 1, preemptor, stop_us, 0)
        node.free.remove(hold)
        if stops or job.state not in (STARTING, RUNNING, SUSPENDED):
            hold.ready_us = max(self.now_us, stop_us + job.grace_us)
            node.leaving.append(hold)
            return
        hold.ready_us = self.now_us + job.grace_us  # were it told to stop now
        started_us = self.now_us if job.started_us == UNKNOWN else job.started_us
        yields_us = started_us + job.min_runtime_us if job.preemptible else NEVER
        lost_gpu_ms = self._lost_gpu_ms(job, started_us, milli_gpus)
        self.live[node.row].append(
            Live(
                hold=hold,
                job_class=job.job_class,
                priority=job.priority,
                value_bar=value_bar(job.value, job.restart_loss_us, self._policy),
                may_yield=yields_us <= self.now_us,
                yields_us=yields_us,
                ends_us=NEVER
                if job.expected_us == UNKNOWN
                else max(self.now_us, started_us + job.expected_us),
                started_us=started_us,
                gpus=len(parts),
                lost_gpu_ms=lost_gpu_ms,
                loss_microusd=max(0, job.value) * lost_gpu_ms // _MS_PER_HOUR,
            )
        )

    def _lost_gpu_ms(self, job: "_Row", started_us: int, milli_gpus: int) -> int:
        """GPU-milliseconds that a stop would lose: work since the last checkpoint and the restart loss.

        Without a known checkpoint half the assumed interval, so that silence never protects.
        """
        if job.checkpoint_us != UNKNOWN:
            since_us = max(0, self.now_us - max(job.checkpoint_us, started_us))
        else:
            ran_us = max(0, self.now_us - started_us)
            since_us = min(ran_us, round(self._policy.assumed_checkpoint_interval_s * _MICRO) // 2)
        return (since_us + job.restart_loss_us) * milli_gpus // (WHOLE_MILLI * _US_PER_MS)


class _Row(NamedTuple):
    """What is read of a live job."""

    number: int
    state: int
    job_class: int
    priority: int
    value: int
    cpus: int
    memory_mib: int
    preemptible: bool
    min_runtime_us: int
    grace_us: int
    restart_loss_us: int
    expected_us: int
    started_us: int
    checkpoint_us: int
    node: int
    preemptor: int
    stop_us: int
