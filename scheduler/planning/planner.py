"""The planner: a snapshot and a policy in, a plan out; pure, and it never fails on a snapshot that was built.

Stages, least disruptive first: jobs that are over are stopped or failed; then the pending jobs are served in
the order of rank, each from what is free, else from what is coming free, else by displacing.
"""

import json
from dataclasses import astuple, dataclass
from hashlib import blake2b

from scheduler.model.actions import (
    Action,
    FailJob,
    Plan,
    PreemptJob,
    Promise,
    RequeueJob,
    StartJob,
    StopJob,
    Wait,
)
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import DRAINING_STOP, RUNNING, STARTING, SUSPENDED, UNKNOWN, Snapshot
from scheduler.planning.allocator import Claim, Node, Request, claim_free, claim_leaving, fits, gpus_fit
from scheduler.planning.arrays import rows_where, unknown_as_zero, xp
from scheduler.planning.preemption import Live, choose_victims, outranks
from scheduler.planning.queue import LEAVES, Queue
from scheduler.planning.world import NEVER, World


@dataclass(slots=True)
class Memo:
    """What one plan leaves to the next to save work; with any memo, or none, the plan is the same."""


def plan(snapshot: Snapshot, policy: Policy, memo: Memo | None = None) -> Plan:  # noqa: ARG001
    """What to do now, why the rest waits, and when time alone could change the answer."""
    return Planner(snapshot, policy).run()


def digest(plan: Plan) -> str:
    """A hash that equal plans share, on every machine: 32 hexadecimal digits."""
    actions = [(type(action).__name__, *astuple(action)) for action in plan.actions]
    awaited = sorted(plan.awaited.items())
    promise = None if plan.promise is None else astuple(plan.promise)
    text = json.dumps([actions, promise, plan.wake_us, awaited], separators=(",", ":"))
    hashed = blake2b(text.encode(), digest_size=16)
    for column in (plan.waits.numbers, plan.waits.reasons):
        hashed.update(column.astype("<i8").tobytes())
    return hashed.hexdigest()


class Planner:
    """One pass over one snapshot."""

    def __init__(self, snapshot: Snapshot, policy: Policy) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self.now_us = snapshot.now_us
        self.claims: dict[int, Claim] = {}
        self.promise: Promise | None = None
        self._actions: list[Action] = []
        self._stops: list[Action] = []
        self._wakes: list[int] = []

    def run(self) -> Plan:
        """Serve everyone."""
        stopping = self._stop_what_is_over()
        self.world = World(self._snapshot, self._policy, stopping)
        self.queue = Queue(self._snapshot, self._policy.order)
        fails = [FailJob(number, Reason.DEADLINE_UNREACHABLE) for number in self.queue.fail_late()]
        self._actions += fails
        if len(self.queue):
            self.queue.set_aside()
            for position, request in self.queue.requests():
                self._serve(position, request)
        preempts = [action for action in self._actions if isinstance(action, PreemptJob)]
        starts = [action for action in self._actions if isinstance(action, StartJob)]
        return Plan(
            actions=(*self._stops, *fails, *preempts, *starts),
            waits=self._waits(),
            promise=self.promise,
            wake_us=self._wake_us(),
            awaited={number: claim.awaited for number, claim in self.claims.items() if not claim.is_free},
        )

    def _stop_what_is_over(self) -> frozenset[int]:
        """Order the stops that are due; the numbers of the jobs that they stop."""
        jobs, now_us = self._snapshot.jobs, self.now_us
        running = jobs.state == RUNNING
        started = xp.where(jobs.started_us == UNKNOWN, now_us, jobs.started_us)
        limited = running & (jobs.time_limit_us != UNKNOWN) & (started + jobs.time_limit_us <= now_us)
        missed = (
            (running | (jobs.state == SUSPENDED))
            & (jobs.deadline_us != UNKNOWN)
            & (jobs.deadline_us <= now_us)
        )
        order: dict[int, Action] = {}
        draining = rows_where(self._snapshot.nodes.drain == DRAINING_STOP)
        if len(draining):
            live = (jobs.state == STARTING) | running | (jobs.state == SUSPENDED)
            for number in jobs.number[live & xp.isin(jobs.node, draining)].tolist():
                order[number] = RequeueJob(number, Reason.NODE_DRAINED)
        for where, reason in ((missed, Reason.DEADLINE_MISSED), (limited, Reason.TIME_LIMIT)):
            if where.any():
                order.update((number, StopJob(number, reason)) for number in jobs.number[where].tolist())
        self._stops = [order[number] for number in sorted(order)]
        return frozenset(order)

    def _serve(self, position: int, request: Request) -> None:
        """Give the request what it needs, or the reason why it has to wait."""
        claim = claim_free(request, self.world.nodes)
        if claim is None:
            claim = self._claim_leaving(request)
        if claim is None:
            claim = self._displace(request)
        if claim is None:
            self.queue.refuse(request, self._lack(request))
            return
        self.claims[request.number] = claim
        if claim.is_free:
            gpus = self.world.uuids(claim.node, claim.positions)
            self._actions.append(StartJob(request.number, gpus, Reason.STARTED_ON_FREE_GPUS))
            self.queue.start(position)
        else:
            self.queue.wait(position, Reason.WAITING_FOR_HANDOVER)

    def _claim_leaving(self, request: Request) -> Claim | None:
        for node in self.world.nodes:
            claim = claim_leaving(request, node)
            if claim is not None:
                return claim
        return None

    def _displace(self, request: Request) -> Claim | None:
        """Displace the cheapest victims on the cheapest node and claim their capacity."""
        best: tuple[int, Node, list[Live]] | None = None
        for node in self.world.nodes:
            candidates = self._candidates(request, node)
            chosen = choose_victims(request, node, candidates) if candidates and not node.drains else None
            if chosen is not None and (best is None or chosen[0] < best[0]):
                best = (chosen[0], node, chosen[1])
        if best is None:
            return None
        _, node, victims = best
        for victim in sorted(victims, key=lambda live: live.number):
            self.world.live[node.row].remove(victim)
            victim.hold.preemptor = request.number
            victim.hold.stop_us = self.now_us
            node.leaving.append(victim.hold)
            self._actions.append(
                PreemptJob(
                    victim.number,
                    request.number,
                    Reason.PREEMPTED_BY_HIGHER_RANK,
                    victim.lost_gpu_ms,
                    victim.loss_microusd,
                )
            )
        claim = claim_leaving(request, node)
        assert claim is not None, "the victims were chosen so that the request fits"
        return claim

    def _candidates(self, request: Request, node: Node) -> list[Live]:
        order = self._policy.order
        return [
            live for live in self.world.live[node.row] if live.may_yield and outranks(request, live, order)
        ]

    def _lack(self, request: Request) -> Reason:
        """What a request that can't be served lacks, on the node that is nearest to serving it."""
        found = {self._lack_on(request, node) for node in self.world.nodes if not node.drains}
        return next(reason for reason in _NEAREST_FIRST if reason in found)

    def _lack_on(self, request: Request, node: Node) -> Reason:
        holds = [*node.leaving, *(live.hold for live in self._candidates(request, node))]
        spare = node.spare_with(holds)
        if not gpus_fit(request, node, spare):
            spare.mib = [NEVER] * len(spare.mib)
            if request.is_share and gpus_fit(request, node, spare):
                return Reason.WAITING_FOR_GPU_MEMORY
            return Reason.WAITING_FOR_GPUS
        for reason, name in _HOST_LACKS:
            short = spare.copy()
            setattr(short, name, NEVER)
            if fits(request, node, short):
                return reason
        return Reason.WAITING_FOR_CPUS if request.cpus > spare.cpus else Reason.WAITING_FOR_MEMORY

    def _waits(self) -> Wait:
        codes = self.queue.codes
        waiting = rows_where(codes != LEAVES)
        numbers = self.queue.column("number")[waiting]
        by_number = xp.argsort(numbers)
        return Wait(numbers[by_number], codes[waiting][by_number])

    def _wake_us(self) -> int | None:
        """The next moment at which time alone could change the plan."""
        jobs, now_us = self._snapshot.jobs, self.now_us
        running = jobs.state == RUNNING
        moments: list[int] = [] if self.promise is None else [self.promise.start_us]
        queue = self.queue
        deadline = queue.column("deadline_us")
        late_us = deadline - unknown_as_zero(queue.column("expected_us")) + 1
        waits = queue.codes != LEAVES
        for where, moment in (
            (running & (jobs.time_limit_us != UNKNOWN), jobs.started_us + jobs.time_limit_us),
            ((jobs.state == RUNNING) | (jobs.state == SUSPENDED), jobs.deadline_us),
            (waits, queue.column("eligible_us")),
            (waits & (deadline != UNKNOWN), late_us),
        ):
            soon = moment[where & (moment > now_us)]
            if len(soon):
                moments.append(int(soon.min()))
        if waits.any():
            moments += [live.yields_us for node in self.world.live for live in node if live.yields_us < NEVER]
        return min((moment for moment in moments if moment > now_us), default=None)


_HOST_LACKS = (
    (Reason.WAITING_FOR_CPUS, "cpus"),
    (Reason.WAITING_FOR_MEMORY, "memory_mib"),
    (Reason.WAITING_FOR_START_SLOT, "slots"),
)
# Where nodes lack different things: the one that lacks least says why the job waits.
_NEAREST_FIRST = (
    Reason.WAITING_FOR_START_SLOT,
    Reason.WAITING_FOR_MEMORY,
    Reason.WAITING_FOR_CPUS,
    Reason.WAITING_FOR_GPU_MEMORY,
    Reason.WAITING_FOR_GPUS,
)
