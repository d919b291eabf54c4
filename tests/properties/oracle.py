"""A second opinion on a plan, by exhaustive search over small worlds, written from the rules.

It shares no code with the planner. It goes through the pending jobs in the order of rank, searches all ways
to serve each, demands that the plan did the least disruptive one, then takes the plan's own choice of GPUs
as given and goes on. So it proves, one job at a time: R1 nothing over-committed, R2 all or nothing, R3 nobody
displaced by an equal or lower rank, R4 nobody left out, R5 and the order of victims, and the EASY rule of R9.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations, product
from math import inf

from scheduler.model.actions import WAIT_REASONS, FailJob, Plan, PreemptJob, RequeueJob, StartJob, StopJob
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from tests.fakes.worlds import (
    PENDING,
    PREEMPTING,
    RUNNING,
    STARTING,
    STOPPING,
    SUSPENDED,
    UNKNOWN,
    J,
    W,
)
from tests.properties.amounts import MIB, MILLI, NOTHING, Amount, used_by
from tests.properties.dividing import Way, by_node, part, spans, suits, ways

LACKS = frozenset(
    {
        Reason.WAITING_FOR_GPUS,
        Reason.WAITING_FOR_GPU_MEMORY,
        Reason.WAITING_FOR_CPUS,
        Reason.WAITING_FOR_MEMORY,
        Reason.WAITING_FOR_START_SLOT,
    }
)


@dataclass(frozen=True)
class Chosen:
    """What the plan let a job claim: which GPUs, and when the last of it is ready."""

    node: int  # of a job without GPUs
    uuids: tuple[str, ...]
    ready_us: int


def first_ready(moments: list[float], way: Way) -> tuple[list[tuple[float, int]], ...]:
    """What sorts ways by how soon their nodes are ready: the whole ones, then the one with the rest."""
    size = max(count for _, count in way)
    nodes = [(moment, node, count) for moment, (node, count) in zip(moments, way, strict=True)]
    whole = sorted((moment, node) for moment, node, count in nodes if count == size)
    return whole, [(moment, node) for moment, node, count in nodes if count < size]


def rank(order: Order, job: J) -> tuple[int, ...]:
    """The smaller, the higher the job ranks."""
    if order is Order.CLASS:
        return (job.job_class, -job.priority, -job.value, job.number)
    return (-job.value, job.job_class, -job.priority, job.number)


class Oracle:
    """The state of a world while its plan is checked."""

    def __init__(self, world: W, policy: Policy) -> None:
        self.world = world
        self.policy = policy
        self.now_us = world.now_us
        self.due = self.stops_due()
        stopping = set(self.due)
        self.free = [
            Amount(
                {gpu.uuid: [1000, gpu.memory_mib] for gpu in world.gpus if gpu.node == row},
                [node.cpus, node.memory_mib, node.live_jobs_max],
            )
            for row, node in enumerate(world.nodes)
        ]
        self.leaving = [NOTHING for _ in world.nodes]
        self.live: list[J] = []
        for job in world.jobs:
            if job.state == PENDING:
                continue
            leaves = job.state in (PREEMPTING, STOPPING) or job.number in stopping
            for node, held in self.held(job).items():
                self.free[node] = self.free[node].plus(held, -1)
                if leaves:
                    self.leaving[node] = self.leaving[node].plus(held)
            if not leaves:
                self.live.append(job)
        for over in world.handovers:
            node = world.gpu(over.uuid).node
            mib = over.memory_mib if over.share_milli < 1000 else 0
            held = Amount({over.uuid: [over.share_milli, mib]}, [0, 0, 0])
            self.free[node] = self.free[node].plus(held, -1)
            self.leaving[node] = self.leaving[node].plus(held)
        self.given: list[tuple[J, Chosen]] = []
        self.first_blocked: J | None = None
        self.strict: dict[bool, J] = {}
        self.promised_us: int | None = None
        # By promised node: what the blocked job wants there, and what there is at that moment.
        self.rooms: dict[int, tuple[J, Amount]] = {}

    # What jobs have -------------------------------------------------------------------------------

    def divided(self, job: J, node: int, uuids: tuple[str, ...]) -> dict[int, tuple[J, tuple[str, ...]]]:
        """What the job is, and which GPUs it has, on each of its nodes."""
        nodes = by_node(self.world, uuids)
        if len(nodes) < 2:
            return {next(iter(nodes), node): (job, uuids)}
        return {row: (part(job, len(on)), on) for row, on in nodes.items()}

    def used(self, job: J, node: int, uuids: tuple[str, ...]) -> dict[int, Amount]:
        return {row: used_by(*each) for row, each in self.divided(job, node, uuids).items()}

    def held(self, live: J) -> dict[int, Amount]:
        return self.used(live, live.node, live.on)

    # What is due whatever the queue ------------------------------------------------------------

    def stops_due(self) -> dict[int, Reason]:
        due: dict[int, Reason] = {}
        for job in self.world.jobs:
            limit, deadline = job.time_limit_us, job.deadline_us
            if (
                job.state in (RUNNING, SUSPENDED)
                and limit != UNKNOWN
                and job.started_us + limit <= self.now_us
            ):
                due[job.number] = Reason.TIME_LIMIT
            elif job.state in (RUNNING, SUSPENDED) and deadline != UNKNOWN and deadline < self.now_us:
                due[job.number] = Reason.DEADLINE_MISSED
            elif job.state in (STARTING, RUNNING, SUSPENDED) and any(
                self.world.nodes[node].drain == 2 for node in self.held(job)
            ):
                due[job.number] = Reason.NODE_DRAINED
        return due

    def is_late(self, job: J) -> bool:
        expected_us = 0 if job.expected_us == UNKNOWN else job.expected_us
        return job.deadline_us != UNKNOWN and self.now_us + expected_us > job.deadline_us

    def set_aside(self, job: J) -> Reason | None:
        if job.eligible_us > self.now_us:
            return Reason.BACKING_OFF
        open_nodes = [row for row, node in enumerate(self.world.nodes) if node.drain == 0]
        if not open_nodes:
            return Reason.NODE_DRAINING
        if spans(self.world, job):
            for nodes, reason in ((open_nodes, None), (range(len(self.world.nodes)), Reason.NODE_DRAINING)):
                if any(
                    all(row in nodes and len(self.suiting(job, row)) >= count for row, count in way)
                    for way in chain.from_iterable(ways(self.world, job))
                ):
                    return reason
            return Reason.NO_SUITABLE_GPU
        suiting = [len(self.suiting(job, row)) for row in range(len(self.world.nodes))]
        if max(suiting[row] for row in open_nodes) >= job.gpus:
            return None
        return Reason.NODE_DRAINING if max(suiting) >= job.gpus else Reason.NO_SUITABLE_GPU

    # Who may do what -----------------------------------------------------------------------------

    def rank(self, job: J) -> tuple[int, ...]:
        return rank(self.policy.order, job)

    def outranks(self, challenger: J, incumbent: J) -> bool:
        """Worth the incumbent, and the larger of 0.3 of it and its restart loss spread over an hour."""
        spread = max(0, incumbent.value) * incumbent.restart_loss_us / 3_600_000_000
        margin = max(self.policy.hysteresis_ratio * abs(incumbent.value), spread)
        worth_it = challenger.value > incumbent.value and challenger.value >= incumbent.value + margin
        if self.policy.order is Order.VALUE:
            return worth_it
        if challenger.job_class != incumbent.job_class:
            return challenger.job_class < incumbent.job_class
        if challenger.priority != incumbent.priority:
            return challenger.priority > incumbent.priority
        return worth_it

    def protected_until(self, job: J) -> int:
        began_us = self.now_us if job.state == STARTING or job.started_us == UNKNOWN else job.started_us
        return began_us + job.min_runtime_us

    def victims(self, challenger: J, node: int) -> list[J]:
        return [
            job
            for job in self.live
            if node in self.held(job)
            and job.preemptible
            and self.protected_until(job) <= self.now_us
            and self.outranks(challenger, job)
        ]

    def lost_gpu_ms(self, job: J) -> int:
        began_us = self.now_us if job.state == STARTING or job.started_us == UNKNOWN else job.started_us
        if job.checkpoint_us != UNKNOWN:
            since_us = max(0, self.now_us - max(job.checkpoint_us, began_us))
        else:
            since_us = min(self.now_us - began_us, int(self.policy.assumed_checkpoint_interval_s * 1e6 / 2))
        return (since_us + job.restart_loss_us) * len(job.on) * job.share_milli // 1_000_000

    def loss(self, job: J) -> int:
        return max(0, job.value) * self.lost_gpu_ms(job) // 3_600_000 + self.at_risk(job)

    def at_risk(self, job: J) -> int:
        """What a job earns that would miss its deadline; half if it has an hour, a third if it has two."""
        if UNKNOWN in (job.deadline_us, job.expected_us):
            return 0
        ran_us = 0 if job.started_us == UNKNOWN else self.now_us - job.started_us
        left_us = max(0, job.expected_us - ran_us)
        slack_us = job.deadline_us - self.now_us - left_us
        if slack_us < 0:
            return 0
        earned_us = left_us if self.policy.order is Order.VALUE else job.expected_us
        hourly = max(0, job.value) * len(job.on) * job.share_milli // 1000
        return hourly * (earned_us // 1000) // 3_600_000 * 60 // (60 + slack_us // 60_000_000)

    # Where it fits -------------------------------------------------------------------------------

    def suiting(self, job: J, node: int) -> list[str]:
        return [gpu.uuid for gpu in self.world.gpus if gpu.node == node and gpu.is_open and suits(job, gpu)]

    def spots(self, job: J, node: int, amount: Amount) -> Iterator[tuple[str, ...]]:
        """Every set of GPUs on which the job fits."""
        cpus, memory_mib, slots = amount.host
        if slots < 1 or (job.cpus and job.cpus > cpus) or (job.memory_mib and job.memory_mib > memory_mib):
            return
        ready = []
        for uuid in self.suiting(job, node):
            milli, mib = amount.gpus[uuid]
            if job.share_milli == 1000:
                fits = milli == 1000
            else:
                fits = milli >= job.share_milli and (not job.gpu_memory_mib or mib >= job.gpu_memory_mib)
            if fits:
                ready.append(uuid)
        yield from combinations(ready, job.gpus)

    def fits(self, job: J, node: int, amount: Amount) -> bool:
        return next(self.spots(job, node, amount), None) is not None

    def without(self, node: int, victims: tuple[J, ...]) -> Amount:
        """What is free, leaving, or would leave with these victims."""
        amount = self.free[node].plus(self.leaving[node])
        for victim in victims:
            amount = amount.plus(self.held(victim).get(node, NOTHING))
        return amount

    def spots_over(self, job: J, amounts: dict[int, Amount]) -> Iterator[tuple[Way, tuple[str, ...]]]:
        """Every way to divide a gang over nodes and every set of GPUs on which it fits, best kind first."""
        for way in chain.from_iterable(ways(self.world, job)):
            if all(node in amounts for node, _ in way):
                places = [list(self.spots(part(job, count), node, amounts[node])) for node, count in way]
                yield from ((way, tuple(chain(*uuids))) for uuids in product(*places))

    def fits_over(self, job: J, victims: tuple[J, ...] | None) -> bool:
        """Whether a gang over several nodes fits; None: on what is free alone."""
        amounts = {
            node: self.free[node] if victims is None else self.without(node, victims)
            for node in self.open_nodes()
        }
        return next(self.spots_over(job, amounts), None) is not None

    def victim_sets(self, victims: list[J]) -> list[tuple[J, ...]]:
        """Every set of victims, the best first: least loss, fewest GPUs, fewest jobs, youngest, number."""
        candidates = sorted(
            victims,
            key=lambda v: (
                -(self.now_us if v.state == STARTING or v.started_us == UNKNOWN else v.started_us),
                v.number,
            ),
        )
        places = range(len(candidates))
        loss = [self.loss(v) for v in candidates]
        sets = chain.from_iterable(combinations(places, size) for size in range(len(candidates) + 1))
        ordered = sorted(
            sets,
            key=lambda chosen: (
                sum(loss[place] for place in chosen),
                sum(len(candidates[place].on) for place in chosen),
                len(chosen),
                [place not in chosen for place in places],
            ),
        )
        return [tuple(candidates[place] for place in chosen) for chosen in ordered]

    def open_nodes(self) -> list[int]:
        return [row for row, node in enumerate(self.world.nodes) if node.drain == 0]

    # The promise -----------------------------------------------------------------------------------

    def block(self, job: J) -> None:
        """Remember who is blocked; promise the first of them the earliest moment at which it fits."""
        self.strict.setdefault(job.gpus > 0, job)
        if self.first_blocked is not None:
            return
        self.first_blocked = job
        best = inf
        if spans(self.world, job):
            for kind in ways(self.world, job):
                ready = [
                    (max(moments), moments, way)
                    for way in kind
                    if all(node in self.open_nodes() for node, _ in way)
                    and (moments := [self.earliest(job, part(job, n), node) for node, n in way])
                ]
                # Of a kind the nodes that are ready first, the whole ones before the rest.
                for moment, _, way in sorted(
                    ready, key=lambda each: (each[0], first_ready(each[1], each[2]))
                ):
                    if moment < best:
                        best, self.promised_us = moment, int(moment)
                        parts = {node: part(job, count) for node, count in way}
                        self.rooms = {n: (each, self.room(job, n, moment)) for n, each in parts.items()}
            return
        for node in self.open_nodes():
            moment = self.earliest(job, job, node)
            if moment < best:
                best, self.promised_us = moment, int(moment)
                self.rooms = {node: (job, self.room(job, node, moment))}

    def earliest(self, blocked: J, wanted: J, node: int) -> float:
        """The first moment at which this fits on the node; infinity: never."""
        moments = {self.now_us, *(at for at, _ in self.releases(blocked, node) if at < inf)}
        fit = (at for at in sorted(moments) if self.fits(wanted, node, self.room(blocked, node, at)))
        return next(fit, inf)

    def room(self, blocked: J, node: int, moment: float) -> Amount:
        """What the blocked job can count on there at the moment."""
        room = self.free[node].plus(self.leaving[node])
        for at, amount in self.releases(blocked, node):
            if at <= moment:
                room = room.plus(amount)
        return room

    def releases(self, blocked: J, node: int) -> list[tuple[float, Amount]]:
        lives = [(self.release_us(blocked, live), self.held(live)) for live in self.live]
        claims = [(self.end_us(j, each), self.used(j, each.node, each.uuids)) for j, each in self.given]
        return [(at, held[node]) for at, held in (*lives, *claims) if node in held]

    def release_us(self, blocked: J, live: J) -> float:
        began_us = self.now_us if live.state == STARTING or live.started_us == UNKNOWN else live.started_us
        ends = inf if live.expected_us == UNKNOWN else max(self.now_us, began_us + live.expected_us)
        if live.preemptible and self.outranks(blocked, live):
            return min(ends, max(self.now_us, self.protected_until(live)))
        return ends

    def end_us(self, job: J, chosen: Chosen) -> float:
        return inf if job.expected_us == UNKNOWN else max(self.now_us, chosen.ready_us) + job.expected_us

    def gives_way(self, job: J, blocked: J, start_us: int) -> bool:
        at = self.promised_us if self.promised_us and blocked is self.first_blocked else inf
        return job.preemptible and self.outranks(blocked, job) and start_us + job.min_runtime_us <= at

    def not_to_be_passed(self, job: J) -> J | None:
        """Without backfill: the blocked job of its kind that this one may pass only by giving way to it."""
        return None if self.policy.backfill else self.strict.get(job.gpus > 0)

    def may_go_beside(self, job: J) -> bool:
        """Whether room beside the job that was promised a start is enough for it to start."""
        strict = self.not_to_be_passed(job)
        if strict is None:
            return True
        return strict is not self.first_blocked and self.gives_way(job, strict, self.now_us)

    def harmless(self, job: J, nodes: Iterable[int], start_us: int) -> bool:
        """Whether, started there and then, it can't delay what a blocked job was promised."""
        strict = self.not_to_be_passed(job)
        if strict is not None and not self.gives_way(job, strict, start_us):
            return False
        if self.first_blocked is None or self.promised_us is None or not self.rooms.keys() & set(nodes):
            return True
        if self.gives_way(job, self.first_blocked, start_us):
            return True
        return job.expected_us != UNKNOWN and start_us + job.expected_us <= self.promised_us

    def leaves_room(self, job: J, node: int, uuids: tuple[str, ...]) -> bool:
        """Whether the blocked job still fits beside it at the promised moment."""
        return all(
            self.fits(self.rooms[row][0], row, self.rooms[row][1].plus(amount, -1))
            for row, amount in self.used(job, node, uuids).items()
            if row in self.rooms
        )

    # The check -----------------------------------------------------------------------------------

    def check(self, plan: Plan, claims: dict[int, Chosen]) -> None:
        """Go through the plan; an AssertionError says what is wrong with it."""
        stops = {a.job: a.reason for a in plan.actions if isinstance(a, StopJob | RequeueJob)}
        assert stops == self.due
        fails = {a.job for a in plan.actions if isinstance(a, FailJob)}
        pending = [job for job in self.world.jobs if job.state == PENDING]
        assert fails == {job.number for job in pending if self.is_late(job)}
        starts = {a.job: a.gpus for a in plan.actions if isinstance(a, StartJob)}
        victims: dict[int, list[PreemptJob]] = {}
        for action in plan.actions:
            if isinstance(action, PreemptJob):
                victims.setdefault(action.preemptor, []).append(action)
        waits = {
            number: WAIT_REASONS[code]
            for number, code in zip(plan.waits.numbers.tolist(), plan.waits.reasons.tolist(), strict=True)
        }
        assert sorted([*starts, *waits, *fails]) == sorted(job.number for job in pending)
        for job in sorted((j for j in pending if j.number not in fails), key=self.rank):
            expected = self.set_aside(job)
            if expected is not None:
                assert waits.get(job.number) is expected
                continue
            self.check_job(job, starts, victims.pop(job.number, []), waits, claims.get(job.number))
        assert victims == {}, "victims for nobody"
        promised = None if plan.promise is None else (plan.promise.job, plan.promise.start_us)
        own = None if self.promised_us is None or self.first_blocked is None else self.first_blocked.number
        assert promised == (None if own is None else (own, self.promised_us))

    def check_job(
        self,
        job: J,
        starts: dict[int, tuple[str, ...]],
        preempts: list[PreemptJob],
        waits: dict[int, Reason],
        chosen: Chosen | None,
    ) -> None:
        stage, best = self.best(job)
        reason = waits.get(job.number)
        if stage == "none":
            # One that wants as much as a job that was held back is held back with it, and not looked at.
            held_back = self.first_blocked is not None and reason is Reason.WAITING_FOR_PROMISED_START
            assert reason in LACKS or held_back, f"{job.number} can't be served, yet {reason}"
            self.block(job)
            return
        if chosen is None:
            assert reason is Reason.WAITING_FOR_PROMISED_START, (
                f"{job.number} could be served: {stage}, yet {reason}"
            )
            self.check_held_back(job, stage)
            self.strict.setdefault(job.gpus > 0, job)
            return
        self.check_served(job, stage, best, starts, preempts, chosen)

    def best(self, job: J) -> tuple[str, tuple[J, ...]]:
        """The least disruptive way to serve the job, if nobody else counted, and its victims."""
        nodes = self.open_nodes()
        if spans(self.world, job):
            if self.fits_over(job, None):
                return "free", ()
            everybody = [live for live in self.live if any(live in self.victims(job, n) for n in nodes)]
            if not self.fits_over(job, tuple(everybody)):
                return "none", ()
            chosen = next(chosen for chosen in self.victim_sets(everybody) if self.fits_over(job, chosen))
            return ("displace" if chosen else "leaving"), chosen
        if any(self.fits(job, node, self.free[node]) for node in nodes):
            return "free", ()
        if any(self.fits(job, node, self.without(node, ())) for node in nodes):
            return "leaving", ()
        found = []
        for node in nodes:
            if not self.fits(job, node, self.without(node, tuple(self.victims(job, node)))):
                continue
            sets = self.victim_sets(self.victims(job, node))
            chosen = next(c for c in sets if self.fits(job, node, self.without(node, c)))
            cost = (sum(self.loss(v) for v in chosen), sum(len(v.on) for v in chosen), len(chosen), node)
            found.append((cost, chosen))
        return ("displace", min(found, key=lambda each: each[0])[1]) if found else ("none", ())

    def check_held_back(self, job: J, stage: str) -> None:
        """It must be able to do harm wherever it could start, and leave no room beside it anywhere."""
        if spans(self.world, job):
            nodes = self.open_nodes()
            for way, _ in self.spots_over(job, {node: self.free[node] for node in nodes}):
                harmless = self.harmless(job, [node for node, _ in way], self.now_us)
                assert not harmless, f"{job.number} held back for nothing"
            everything = {node: self.without(node, tuple(self.victims(job, node))) for node in nodes}
            for _, uuids in self.spots_over(job, everything) if self.may_go_beside(job) else ():
                assert not self.leaves_room(job, UNKNOWN, uuids), f"{job.number} would leave room on {uuids}"
            return
        for node in self.open_nodes():
            if stage == "free" and self.fits(job, node, self.free[node]):
                assert not self.harmless(job, [node], self.now_us), f"{job.number} held back for nothing"
            if self.may_go_beside(job):
                everything = self.without(node, tuple(self.victims(job, node)))
                for uuids in self.spots(job, node, everything):
                    assert not self.leaves_room(job, node, uuids), f"{job.number} would leave room on {uuids}"

    def check_served(
        self,
        job: J,
        stage: str,
        best: tuple[J, ...],
        starts: dict[int, tuple[str, ...]],
        preempts: list[PreemptJob],
        chosen: Chosen,
    ) -> None:
        uuids = chosen.uuids
        parts = self.divided(job, chosen.node, uuids)
        assert parts.keys() <= set(self.open_nodes())
        assert len(set(uuids)) == job.gpus
        assert all(set(on) <= set(self.suiting(job, node)) for node, (_, on) in parts.items())
        if spans(self.world, job):
            way = {node: len(on) for node, (_, on) in parts.items()}
            assert any(way == dict(each) for each in chain.from_iterable(ways(self.world, job)))
        else:
            assert len(parts) == 1, "a gang that fits on one node stays on one"
        victims = tuple(v for v in self.live if v.number in {p.job for p in preempts})
        assert len(victims) == len(preempts)
        may_go = [victim for node in parts for victim in self.victims(job, node)]
        assert set(victims) <= set(may_go), "displaced without the right to"
        for preempt in preempts:
            victim = next(v for v in victims if v.number == preempt.job)
            assert (preempt.lost_gpu_ms, preempt.loss_microusd) == (
                self.lost_gpu_ms(victim),
                self.loss(victim),
            )
        harmless = self.harmless(job, parts, max(self.now_us, chosen.ready_us))
        if harmless and not self.restricted(job):
            assert set(victims) == set(best), f"{job.number}: {stage} {best} is better than {victims}"
            assert (job.number in starts) == (stage == "free")
            if stage == "free" and spans(self.world, job):
                free = {node: self.free[node] for node in self.open_nodes()}
                fewest = min(len(way) for way, _ in self.spots_over(job, free))
                assert len(parts) == fewest, f"{job.number} is on {len(parts)} nodes, not {fewest}"
        elif not harmless:
            assert self.may_go_beside(job)
            assert self.leaves_room(job, chosen.node, uuids), f"{job.number} delays the promised start"
        if job.number in starts:
            in_order = [
                (self.world.gpu(uuid).node, self.world.gpu(uuid).index) for uuid in starts[job.number]
            ]
            assert in_order == sorted(in_order)
            for node, (wanted, on) in parts.items():
                assert set(on) in [set(spot) for spot in self.spots(wanted, node, self.free[node])]
        self.check_needed(job, chosen, victims)
        self.give(job, chosen, victims)

    def restricted(self, job: J) -> bool:
        """Whether some way to serve the job now could have done harm, so that another was taken."""
        return any(
            not self.harmless(job, [node], start_us)
            for node in self.open_nodes()
            for start_us in (self.now_us, self.now_us + 30_000_000)
        )

    def check_needed(self, job: J, chosen: Chosen, victims: tuple[J, ...]) -> None:
        """R5: without any one of its victims it could not be served (beside the blocked job)."""
        parts = self.divided(job, chosen.node, chosen.uuids)
        if self.restricted(job):
            return
        for victim in victims:
            fewer = tuple(v for v in victims if v is not victim)
            needless = all(self.fits(each, n, self.without(n, fewer)) for n, (each, _) in parts.items())
            assert not needless, f"victim {victim.number} of {job.number} is needless"

    def give(self, job: J, chosen: Chosen, victims: tuple[J, ...]) -> None:
        """Take the job's needs out of what is free first, then of what leaves."""
        parts = self.used(job, chosen.node, chosen.uuids)
        stays = not self.harmless(job, parts, max(self.now_us, chosen.ready_us))
        for victim in victims:
            self.live.remove(victim)
            for node, held in self.held(victim).items():
                self.leaving[node] = self.leaving[node].plus(held)
        was_free = [self.take(job, node, need) for node, need in parts.items()]
        is_free = all(was_free)
        assert is_free == (chosen.ready_us == 0), f"{job.number} is ready {chosen.ready_us}, free: {is_free}"
        for node in self.rooms.keys() & parts.keys() if stays else ():
            blocked, room = self.rooms[node]
            self.rooms[node] = blocked, room.plus(parts[node], -1)
        self.given.append((job, chosen))

    def take(self, job: J, node: int, need: Amount) -> bool:
        """Take what is needed of a node; whether all of it was free."""
        free, leaving = self.free[node], self.leaving[node]
        from_free = Amount(
            {
                uuid: [min(max(free.gpus[uuid][i], 0), amount[i]) for i in (MILLI, MIB)]
                for uuid, amount in need.gpus.items()
            },
            [min(max(have, 0), want) for have, want in zip(free.host, need.host, strict=True)],
        )
        rest = need.plus(from_free, -1)
        # R1: what is not free must be leaving, and nobody else's.
        assert all(left >= 0 for left in self.free_after(free, from_free) + self.free_after(leaving, rest))
        self.free[node] = free.plus(from_free, -1)
        self.leaving[node] = leaving.plus(rest, -1)
        return not any(chain(rest.host, *rest.gpus.values()))

    def free_after(self, have: Amount, taken: Amount) -> list[int]:
        """What is left of each resource of which something is taken."""
        left = [h - t for h, t in zip(have.host, taken.host, strict=True) if t]
        for uuid, amount in taken.gpus.items():
            left += [have.gpus[uuid][i] - amount[i] for i in (MILLI, MIB) if amount[i]]
        return left
