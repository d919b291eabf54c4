"""The snapshot's live half as nodes, holds and live jobs that a plan can work on.

Only live jobs, GPUs and nodes become objects: they are few. Pending jobs stay columns (`queue.py`).
"""

from typing import Any

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
_LIVE_COLUMNS = (
    "number", "state", "job_class", "priority", "value", "cpus", "memory_mib", "preemptible",
    "min_runtime_us", "grace_us", "restart_loss_us", "expected_us", "started_us", "checkpoint_us", "node",
)  # fmt: skip


class World:
    """The nodes of a snapshot, and what of each is free, leaving and live.

    `stopping` are jobs that this plan stops or requeues for their own or the node's sake: they count as
    leaving already.
    """

    def __init__(self, snapshot: Snapshot, policy: Policy, stopping: frozenset[int]) -> None:
        self.now_us = snapshot.now_us
        self._policy = policy
        self.position: dict[int, tuple[int, int]] = {}  # by GPU row: node, position
        self.nodes = self._empty_nodes(snapshot)
        self.live: list[list[Live]] = [[] for _ in self.nodes]
        self._occupy(snapshot, stopping)
        # In an order of their own, whatever that of the rows (R8).
        for node, live in zip(self.nodes, self.live, strict=True):
            node.leaving.sort(key=lambda hold: (hold.number, sorted(hold.parts.items()), hold.preemptor))
            live.sort(key=lambda live: live.number)

    def leave(self, node: Node, number: int, preemptor: int) -> Live:
        """Let a live job leave for a preemptor; returns the victim."""
        live = self.live[node.row]
        victim = live.pop(next(place for place, each in enumerate(live) if each.number == number))
        victim.hold.preemptor = preemptor
        victim.hold.stop_us = self.now_us
        node.leaving.append(victim.hold)
        return victim

    def uuids(self, node: int, positions: tuple[int, ...]) -> tuple[str, ...]:
        """The UUIDs at these positions, by index."""
        return tuple(self.nodes[node].gpus[position].uuid for position in sorted(positions))

    def _empty_nodes(self, snapshot: Snapshot) -> list[Node]:
        gpus = snapshot.gpus
        columns = (gpus.node, gpus.index, gpus.memory_mib, gpus.state)
        serves = snapshot.model_fits.T.tolist()
        by_node: list[list[Gpu]] = [[] for _ in range(len(snapshot.nodes))]
        rows = zip(gpus.uuid, *(c.tolist() for c in columns), serves, strict=True)
        for row, (uuid, node, index, memory_mib, state, sets) in enumerate(rows):
            by_node[node].append(Gpu(row, uuid, index, memory_mib, state != CLOSED, tuple(sets)))
        for row, here in enumerate(by_node):
            here.sort(key=lambda gpu: (gpu.index, gpu.uuid))
            self.position.update((gpu.row, (row, position)) for position, gpu in enumerate(here))
        sizes = snapshot.nodes
        rows = zip(
            *(c.tolist() for c in (sizes.cpus, sizes.memory_mib, sizes.live_jobs_max, sizes.drain)),
            strict=True,
        )
        return [
            Node(
                row,
                tuple(by_node[row]),
                Spare(
                    [WHOLE_MILLI] * len(by_node[row]),
                    [g.memory_mib for g in by_node[row]],
                    cpus,
                    memory_mib,
                    slots,
                ),
                drain != NOT_DRAINING,
            )
            for row, (cpus, memory_mib, slots, drain) in enumerate(rows)
        ]

    def _occupy(self, snapshot: Snapshot, stopping: frozenset[int]) -> None:
        """Take what live jobs and hand-overs hold out of what is free."""
        jobs, holdings = snapshot.jobs, snapshot.holdings
        live_rows = rows_where(jobs.state != PENDING)
        held: dict[int, list[tuple[int, int, int]]] = {}
        columns = tuple(getattr(holdings, name) for name in _HOLDING_COLUMNS)
        notices: dict[int, tuple[int, int]] = {}
        live = set(live_rows.tolist())
        for job, gpu, milli, mib, preemptor, stop_us in zip(*(c.tolist() for c in columns), strict=True):
            if job in live:
                held.setdefault(job, []).append((gpu, milli, mib))
                notices[job] = (preemptor, stop_us)
            else:
                self._hand_over(gpu, milli, mib, preemptor, stop_us)
        values = lists(tuple(getattr(jobs, name) for name in _LIVE_COLUMNS), live_rows)
        for job, row in zip(live_rows.tolist(), zip(*values, strict=True), strict=True):
            self._settle(
                dict(zip(_LIVE_COLUMNS, row, strict=True)), held.get(job, []), notices.get(job), stopping
            )

    def _hand_over(self, gpu: int, milli: int, mib: int, preemptor: int, stop_us: int) -> None:
        """What an ended job still occupies leaves; it is no live job and has no CPUs."""
        row, position = self.position[gpu]
        node = self.nodes[row]
        part = [milli, mib if milli < WHOLE_MILLI else 0]
        hold = Hold(UNKNOWN, {position: part}, 0, 0, 0, preemptor, stop_us, self.now_us)
        node.free.remove(hold)
        node.leaving.append(hold)

    def _settle(
        self,
        job: dict[str, Any],
        held: list[tuple[int, int, int]],
        notice: tuple[int, int] | None,
        stopping: frozenset[int],
    ) -> None:
        """Give a live job its place: among what leaves, or among what stays."""
        node = self.nodes[job["node"]]
        parts: dict[int, list[int]] = {}
        milli_gpus = 0
        for gpu, milli, mib in held:
            milli_gpus += milli
            part = parts.setdefault(self.position[gpu][1], [0, 0])
            part[0] += milli
            part[1] += mib if milli < WHOLE_MILLI else 0
        number, state = job["number"], job["state"]
        preemptor, stop_us = notice or (UNKNOWN, UNKNOWN)
        hold = Hold(number, parts, job["cpus"], job["memory_mib"], 1, preemptor, stop_us, 0)
        node.free.remove(hold)
        if number in stopping:
            hold.preemptor = UNKNOWN
            hold.stop_us = self.now_us
        if number in stopping or state not in (STARTING, RUNNING, SUSPENDED):
            hold.ready_us = max(self.now_us, hold.stop_us + job["grace_us"])
            node.leaving.append(hold)
            return
        started_us = job["started_us"] if state != STARTING and job["started_us"] != UNKNOWN else self.now_us
        yields_us = started_us + job["min_runtime_us"] if job["preemptible"] else NEVER
        expected_us = job["expected_us"]
        lost_gpu_ms = self._lost_gpu_ms(job, started_us, milli_gpus)
        hold.ready_us = self.now_us + job["grace_us"]  # were it told to stop now
        self.live[node.row].append(
            Live(
                hold=hold,
                job_class=job["job_class"],
                priority=job["priority"],
                value_bar=value_bar(job["value"], job["restart_loss_us"], self._policy),
                may_yield=yields_us <= self.now_us,
                yields_us=yields_us,
                ends_us=NEVER if expected_us == UNKNOWN else max(self.now_us, started_us + expected_us),
                started_us=started_us,
                gpus=len(parts),
                lost_gpu_ms=lost_gpu_ms,
                loss_microusd=max(0, job["value"]) * lost_gpu_ms // _MS_PER_HOUR,
            )
        )

    def _lost_gpu_ms(self, job: dict[str, Any], started_us: int, milli_gpus: int) -> int:
        """GPU-milliseconds that a stop would lose: work since the last checkpoint and the restart loss.

        Without a known checkpoint half the assumed interval, so that silence never protects.
        """
        ran_us = max(0, self.now_us - started_us)
        if job["checkpoint_us"] != UNKNOWN:
            since_us = max(0, self.now_us - max(job["checkpoint_us"], started_us))
        else:
            since_us = min(ran_us, round(self._policy.assumed_checkpoint_interval_s * _MICRO) // 2)
        lost_gpu_ms: int = (since_us + job["restart_loss_us"]) * milli_gpus // (WHOLE_MILLI * _US_PER_MS)
        return lost_gpu_ms
