"""The planner: a snapshot and a policy in, a plan out; pure, and it never fails on a snapshot that was built.

Jobs that are over are stopped, or fail. Then the pending jobs are served in the order of rank, each in the
least disruptive way that there is:

1. All it needs is free: it starts.
2. What is free and what is coming free will do: it waits for the hand-over, and what it claims is kept from
   all that rank lower. That is the reservation for a preemptor; nothing of it is remembered between plans.
3. Victims are told to go, and it claims what they leave. A victim goes whole; what the claim does not need
   of it counts as coming free for the next.
4. It can't be served. The highest such job is promised a start (`backfill.py`), and who ranks lower may not
   delay it.

Nothing starts on a draining node. Jobs that back off, and those that no open GPU could ever serve, are no
part of this: they block nobody.
"""

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from scheduler.model.actions import (
    Action,
    FailJob,
    Plan,
    PreemptJob,
    Promise,
    RequeueJob,
    ResumeJob,
    StartJob,
    StopJob,
    SuspendJob,
    Wait,
)
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import DRAINING_STOP, RUNNING, STARTING, SUSPENDED, UNKNOWN, Snapshot
from scheduler.planning.allocator import Claim, Found, Live, Node, Request, claim
from scheduler.planning.arrays import rows_where, some, unknown_as_zero, xp
from scheduler.planning.backfill import (
    Blocked,
    beside,
    blocked,
    blocked_over,
    book,
    ends_in_time,
    gives_way,
    stays,
)
from scheduler.planning.economics import too_dear_to_go_on
from scheduler.planning.gangs import find_free_over, find_leaving_over, find_over_by_displacing
from scheduler.planning.horizon import Horizons
from scheduler.planning.lack import lack, lack_over, least_lacking, least_lacking_over
from scheduler.planning.layout import Layout
from scheduler.planning.power import UNBOUNDED, Admission, PowerStage
from scheduler.planning.preemption import outranks
from scheduler.planning.queue import WAIT_CODE, Queue
from scheduler.planning.search import Limits, find_by_displacing, find_free, find_free_among, find_leaving
from scheduler.planning.valuation import WAIT_US
from scheduler.planning.world import NEVER, World


@dataclass(slots=True)
class Memo:
    """What one plan leaves to the next to save work; with any memo, or none, the plan is the same."""

    layout: Layout | None = None


def plan(snapshot: Snapshot, policy: Policy, memo: Memo | None = None) -> Plan:
    """What to do now, why the rest waits, and when time alone could change the answer."""
    memo = memo or Memo()
    planner = Planner(snapshot, policy, memo.layout)
    memo.layout = planner.world.layout
    return planner.run()


def digest(plan: Plan) -> str:
    """A hash that equal plans share, on every machine: 32 hexadecimal digits."""
    actions = [(type(action).__name__, *_fields(action)) for action in plan.actions]
    awaited = sorted(plan.awaited.items())
    promise = None if plan.promise is None else _fields(plan.promise)
    text = json.dumps([actions, promise, plan.wake_us, awaited], separators=(",", ":"))
    hashed = blake2b(text.encode(), digest_size=16)
    for column in (plan.waits.numbers, plan.waits.reasons):
        hashed.update(column.astype("<i8").tobytes())
    return hashed.hexdigest()


def _fields(record: Action | Promise) -> list[Any]:
    return [getattr(record, name) for name in record.__slots__]


class Planner:
    """One pass over one snapshot."""

    def __init__(self, snapshot: Snapshot, policy: Policy, layout: Layout | None = None) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self.now_us = snapshot.now_us
        self.claims: dict[int, Claim] = {}
        self.promise: Promise | None = None
        self._stops: list[Action] = []
        self._preempts: list[PreemptJob] = []
        self._starts: list[StartJob] = []
        self._for_power: dict[int, int] = {}  # rows by number of those that wait for nothing but watts
        self._first_blocked: Blocked | None = None
        # Without backfill: the first job that waits of those that want GPUs, and of those that want none.
        self._strict: dict[bool, Blocked] = {}
        self._staying: dict[tuple[int, bool], Any] = {}  # by blocked job: what `stays` found
        self._dear_later_us: Any = xp.zeros(0, dtype=xp.int64)
        jobs = snapshot.jobs
        self._timed = rows_where((jobs.time_limit_us != UNKNOWN) | (jobs.deadline_us != UNKNOWN))
        stopping = self._stop_what_is_over()
        self.power: PowerStage | None = None
        if snapshot.power is not None:
            self.power = PowerStage(snapshot, policy, stopping)
            stopping |= {shed.job for shed in self.power.sheds}
        self.world = World(snapshot, policy, stopping, layout)
        self._horizons = Horizons(self.world, policy.order)
        self.queue = Queue(snapshot, policy.order)

    def run(self) -> Plan:
        """Serve everyone."""
        fails = [FailJob(number, Reason.DEADLINE_UNREACHABLE) for number in self.queue.fail_late(self._timed)]
        if self.queue.is_waiting:
            self.queue.set_aside(self.world)
            for row, request in self.queue.requests():
                self._serve(row, request)
        self._start_late()
        power = self.power
        return Plan(
            actions=(
                *(power.limits() if power else ()),
                *(power.sheds if power else ()),
                *self._freezes(),
                *self._stops,
                *fails,
                *self._preempts,
                *self._starts,
            ),
            waits=self._waits(),
            promise=self.promise,
            wake_us=self._wake_us(),
            awaited={number: given.awaited for number, given in self.claims.items() if not given.is_free},
            power=power.outlook if power else None,
        )

    def _freezes(self) -> list[SuspendJob | ResumeJob]:
        """Who is frozen and who runs again, but for those that go."""
        gone = {preempt.job for preempt in self._preempts}
        return [action for action in self.power.freezes() if action.job not in gone] if self.power else []

    def candidates(self, request: Request, node: Node) -> list[Live]:
        """The live jobs of a node that the request may displace."""
        order = self._policy.order
        return [
            live for live in self.world.live(node.row) if live.may_yield and outranks(request, live, order)
        ]

    def refuse(self, request: Request) -> None:
        """Let a request that can't be served wait, and with it all that would fail for the same lack."""
        reach, nodes = self.world.within_reach(request).pool, ~self.world.drains
        among = None if self._policy.backfill else self._kind(request)
        if self.spans(request):
            reason = lack_over(request, reach, nodes, self.world.kinds)
            self.queue.refuse(least_lacking_over(request, reason), reason, among, spans=True)
            return
        reason = lack(request, reach, nodes)
        self.queue.refuse(least_lacking(request, reason, reach, nodes), reason, among)

    def spans(self, request: Request) -> bool:
        """Whether it is a gang over several nodes."""
        return self.queue.spanning is not None and self.world.kinds.spans(request)

    def _stop_what_is_over(self) -> frozenset[int]:
        """Order the stops that are due; the numbers of the jobs that they stop."""
        jobs, now_us, timed = self._snapshot.jobs, self.now_us, self._timed
        order: dict[int, Action] = {}
        draining = rows_where(self._snapshot.nodes.drain == DRAINING_STOP)
        if len(draining):
            live = (jobs.state == STARTING) | (jobs.state == RUNNING) | (jobs.state == SUSPENDED)
            for number in jobs.number[live & self._is_on(draining)].tolist():
                order[number] = RequeueJob(number, Reason.NODE_DRAINED)
        if self._snapshot.gross_value is not None:
            dear, self._dear_later_us = too_dear_to_go_on(self._snapshot, self._policy.order)
            for number in jobs.number[dear].tolist():
                order[number] = RequeueJob(number, Reason.STOPPED_FOR_PRICE)
        if len(timed):
            live = (jobs.state[timed] == RUNNING) | (jobs.state[timed] == SUSPENDED)
            started_us, limit_us = jobs.started_us[timed], jobs.time_limit_us[timed]
            ran_us = xp.where(started_us == UNKNOWN, 0, now_us - started_us)
            limited = live & (limit_us != UNKNOWN) & (ran_us >= limit_us)
            deadline_us = jobs.deadline_us[timed]
            missed = live & (deadline_us != UNKNOWN) & (deadline_us < now_us)  # done by then is in time
            for where, reason in ((missed, Reason.DEADLINE_MISSED), (limited, Reason.TIME_LIMIT)):
                numbers = jobs.number[timed[where]].tolist()
                order.update((number, StopJob(number, reason)) for number in numbers)
        self._stops = [order[number] for number in sorted(order)]
        return frozenset(order)

    def _is_on(self, nodes: Any) -> Any:
        """Bool, shape (jobs,): the live jobs that are on one of these nodes, with a part at least."""
        jobs, gpus, holdings = self._snapshot.jobs, self._snapshot.gpus, self._snapshot.holdings
        there = xp.isin(jobs.node, nodes)
        there[holdings.job[(holdings.job != UNKNOWN) & xp.isin(gpus.node[holdings.gpu], nodes)]] = True
        return there

    def _serve(self, row: int, request: Request) -> None:
        """Give the request what it needs, or the reason why it has to wait."""
        found = self._find(request)
        if found is None:
            self._block(request)
            self.refuse(request)
            return
        holder = self._held_back_by(request, found)
        if holder is not None:
            found = self._find_beside(request, holder)
            if found is None:
                self._hold_back(row, request, holder)
                return
        admission = self._admit(row, request, found)
        if admission is None and holder is None:
            found, admission = self._find_frugal(row, request, found)
        if admission is None:
            self._refuse_for_power(row, request)
            return
        if holder is not None:
            book(found, holder)
        self._commit(row, request, found, admission)

    def _find(self, request: Request, limits: Limits | None = None) -> Found | None:
        """Room for the request, the least disruptive there is."""
        free, leaving, by_displacing = find_free, find_leaving, find_by_displacing
        if self.spans(request):
            free, leaving, by_displacing = find_free_over, find_leaving_over, find_over_by_displacing
        elif self.world.is_hopeless(request):
            return None
        return (
            free(request, self.world, limits)
            or leaving(request, self.world, limits)
            or by_displacing(
                request, self.world, self._horizons, lambda node: self.candidates(request, node), limits
            )
        )

    def _find_beside(self, request: Request, holder: Blocked) -> Found | None:
        """Room that the blocked job can spare at the promised moment."""
        if self._is_strict(request, holder) or not holder.rooms:
            return None
        limits = beside(holder, lambda node: [live.hold for live in self.candidates(request, node)])
        return self._find(request, limits)

    def _admit(self, row: int, request: Request, found: Found) -> Admission | None:
        """How the request fits the power budget; None: it doesn't."""
        if self.power is None or not request.gpus:
            return UNBOUNDED
        rows = self.world.layout.row
        gpus = [rows[part.row][position] for part in found.parts for position in part.positions]

        def may_displace() -> set[int]:
            others = self.world.displaceable(request)
            return set(self.world.incumbents.number[others].tolist())

        leaving = tuple(victim.number for victim in found.victims)
        return self.power.admit(request, row, tuple(map(int, gpus)), leaving, may_displace)

    def _find_frugal(self, row: int, request: Request, found: Found) -> tuple[Found, Admission | None]:
        """Other free GPUs with which it fits the budget, first on its node: boards take different watts."""
        power, gpus, node = self.power, self.world.layout.row, found.parts[0].row
        if power is None or found.victims or found.ready_us or len(found.parts) > 1:
            return found, None
        other: Found | None = found
        while other is not None:  # each time fewer are left
            part = other.parts[0]
            taken = gpus[part.row][xp.asarray(part.positions, dtype=xp.int64)]
            frugal = power.takes_less(row, taken)[unknown_as_zero(gpus)] & (gpus != UNKNOWN)
            other = find_free_among(request, self.world, frugal, node)
            if other is not None and (admission := self._admit(row, request, other)) is not None:
                return other, admission
        return found, None

    def _refuse_for_power(self, row: int, request: Request) -> None:
        """Let a request that doesn't fit the budget wait, and all that are alike and worth no more."""
        assert self.power is not None
        self.queue.wait(row, Reason.WAITING_FOR_POWER)
        among = self.power.no_better(self.queue.jobs, row)
        self.queue.refuse(request, Reason.WAITING_FOR_POWER, among, spans=self.spans(request))
        if not self._policy.backfill:
            self._strict.setdefault(True, Blocked(request, NEVER))

    def _commit(self, row: int, request: Request, found: Found, admission: Admission) -> None:
        """Start the job, or let it wait for what it claims."""
        world, number = self.world, request.number
        rows, left = [part.row for part in found.parts], set[int]()
        for_power = list(map(self._live_job, admission.victims))
        for victim in (*found.victims, *for_power) if for_power else found.victims:
            world.leave(victim, number)
            left.update(victim.rows)
            cause = (number, Reason.PREEMPTED_BY_HIGHER_RANK)
            self._preempts.append(PreemptJob(victim.number, *cause, victim.lost_gpu_ms, victim.loss_microusd))
        given = self.claims[number] = claim(request, found, world.node)
        waits = Reason.WAITING_FOR_HANDOVER
        if given.is_free and not admission.starts_now:
            given.is_free, waits = False, Reason.WAITING_FOR_POWER
            given.awaited = tuple(sorted({*admission.victims, *self._leaving_for(number)}))
            given.ready_us = max((victim.hold.ready_us for victim in for_power), default=0)
            self._for_power[number] = row
        world.serve(number, len(self.claims))
        for touched in sorted(left.union(rows)) if left or len(rows) > 1 else rows:
            node = world.node(touched)
            world.changed(node)
            self._horizons.changed(node, somebody_goes=touched in left)
        if not given.is_free:
            self.queue.wait(row, waits)
            return
        self._start(row, given)

    def _start(self, row: int, given: Claim) -> None:
        reason = Reason.STARTED_ON_FREE_GPUS if self._first_blocked is None else Reason.BACKFILLED
        self._starts.append(
            StartJob(given.request.number, self.world.uuids(given.parts), reason, given.parts[0].row)
        )
        self.queue.start(row)

    def _start_late(self) -> None:
        """Start those for whose watts there was no room when they were served, and is now."""
        for number in self.power.begin_late() if self.power is not None else ():
            given = self.claims[number]
            given.is_free, given.awaited = True, ()
            self._start(self._for_power.pop(number), given)

    def _live_job(self, number: int) -> Live:
        """The live job with this number."""
        jobs = self._snapshot.jobs
        node = int(jobs.node[jobs.number == number][0])
        return next(live for live in self.world.live(node) if live.number == number)

    def _leaving_for(self, number: int) -> list[int]:
        """The jobs that go for this one, told by an earlier plan."""
        jobs = self._snapshot.jobs
        return jobs.number[jobs.preemptor == number].tolist()  # type: ignore[no-any-return]

    def _block(self, request: Request) -> None:
        """Remember the highest job that can't be served, and what it can count on."""
        order = self._policy.order
        if self._first_blocked is None:
            promised = blocked_over if self.spans(request) else blocked
            self._first_blocked = promised(request, self.world, order, self.claims.values())
            if self._first_blocked.is_promised:
                self.promise = Promise(request.number, self._first_blocked.start_us)
            self._strict[request.gpus > 0] = self._first_blocked
        self._strict.setdefault(request.gpus > 0, Blocked(request, NEVER))

    def _held_back_by(self, request: Request, found: Found) -> Blocked | None:
        """The blocked job that a start as found could delay, if there is one."""
        first = self._first_blocked
        if first is None and not self._strict:
            return None
        start_us = max(self.now_us, found.ready_us)
        strict = None if self._policy.backfill else self._strict.get(request.gpus > 0)
        if strict is not None and not gives_way(request, strict, self._policy, start_us):
            return strict
        if first is None or not first.is_promised:
            return None
        harmless = ends_in_time(request, first, start_us) or gives_way(request, first, self._policy, start_us)
        return None if harmless else first

    def _hold_back(self, row: int, request: Request, holder: Blocked) -> None:
        """Let the job wait, and with it all that want as much and could delay the blocked job as well."""
        may_end = not self._is_strict(request, holder)
        key = (holder.request.number, may_end)
        among = self._staying.get(key)
        if among is None:
            among = stays(self.queue, holder, self._policy, self.now_us, may_end)
            self._staying[key] = among
        if not self._policy.backfill:
            among = among & self._kind(request)
            self._strict.setdefault(request.gpus > 0, Blocked(request, NEVER))
        if among[row]:
            spans = self.spans(request)
            self.queue.refuse(request, Reason.WAITING_FOR_PROMISED_START, among, spans=spans)
        else:
            self.queue.wait(row, Reason.WAITING_FOR_PROMISED_START)

    def _is_strict(self, request: Request, holder: Blocked) -> bool:
        """Whether nothing but giving way lets the request pass."""
        return not self._policy.backfill and (request.gpus > 0) == (holder.request.gpus > 0)

    def _kind(self, request: Request) -> Any:
        """The pending jobs that want GPUs like this one, or none like this one."""
        wants = self.queue.jobs.gpus > 0
        return wants if request.gpus else ~wants

    def _waits(self) -> Wait:
        codes = self.queue.codes
        waiting = rows_where(codes >= 0)
        numbers = self.queue.jobs.number[waiting]
        by_number = xp.argsort(numbers, kind="stable")
        return Wait(numbers[by_number], codes[waiting[by_number]])

    def _wake_us(self) -> int | None:
        """The next moment at which time alone could change the plan."""
        jobs, now_us, codes, timed = self._snapshot.jobs, self.now_us, self.queue.codes, self._timed
        promised = [] if self.promise is None else [xp.asarray([self.promise.start_us])]
        backing_off = rows_where(codes == WAIT_CODE[Reason.BACKING_OFF])
        if self.power is not None and (thaw_us := self.power.freezing.wake_us) is not None:
            promised.append(xp.asarray([thaw_us]))
        moments = [*promised, jobs.eligible_us[backing_off], self._dear_later_us]
        if len(timed):
            live = (jobs.state[timed] == RUNNING) | (jobs.state[timed] == SUSPENDED)
            limited = timed[live & (jobs.time_limit_us[timed] != UNKNOWN)]
            dated = jobs.deadline_us[timed] != UNKNOWN
            waiting = timed[dated & (codes[timed] >= 0)]
            late_us = jobs.deadline_us[waiting] + 1 - unknown_as_zero(jobs.expected_us[waiting])
            moments += [
                jobs.started_us[limited] + jobs.time_limit_us[limited],
                jobs.deadline_us[timed[dated & live]] + 1,
                late_us,
            ]
            if self._policy.order is Order.VALUE:  # who can't wait any more is worth more
                moments.append(late_us - jobs.restart_loss_us[waiting] - WAIT_US)
        if some(codes >= 0):
            moments.append(self.world.incumbents.yields_us)
        moment_us = xp.concatenate(moments)
        moment_us = moment_us[(moment_us > now_us) & (moment_us < NEVER)]
        return int(moment_us.min()) if len(moment_us) else None
