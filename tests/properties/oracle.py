"""A second opinion on a plan, by exhaustive search over small worlds, written from DESIGN sections 5 and 6.

It shares no code with the planner. It goes through the pending jobs in the order of rank, searches all ways
to serve each, demands that the plan did the least disruptive one, then takes the plan's own choice of GPUs
as given and goes on. So it proves, one job at a time: R1 nothing over-committed, R2 all or nothing, R3 nobody
displaced by an equal or lower rank, R4 nobody left out, R5 and the order of victims, and the EASY rule of R9.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations
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

LACKS = frozenset(
    {
        Reason.WAITING_FOR_GPUS,
        Reason.WAITING_FOR_GPU_MEMORY,
        Reason.WAITING_FOR_CPUS,
        Reason.WAITING_FOR_MEMORY,
        Reason.WAITING_FOR_START_SLOT,
    }
)
MILLI, MIB = 0, 1


@dataclass(frozen=True)
class Chosen:
    """What the plan let a job claim: which GPUs, and when the last of it is ready."""

    node: int
    uuids: tuple[str, ...]
    ready_us: int


class Amount:
    """Resources of one node: per GPU [thousandths, MiB], then CPUs, memory, job slots."""

    def __init__(self, gpus: dict[str, list[int]], host: list[int]) -> None:
        self.gpus = gpus
        self.host = host

    def plus(self, other: "Amount", sign: int = 1) -> "Amount":
        gpus = {uuid: list(amount) for uuid, amount in self.gpus.items()}
        for uuid, amount in other.gpus.items():
            have = gpus.setdefault(uuid, [0, 0])
            have[MILLI] += sign * amount[MILLI]
            have[MIB] += sign * amount[MIB]
        return Amount(gpus, [a + sign * b for a, b in zip(self.host, other.host, strict=True)])


def used_by(job: J, uuids: tuple[str, ...]) -> Amount:
    mib = job.gpu_memory_mib if job.share_milli < 1000 else 0
    return Amount({uuid: [job.share_milli, mib] for uuid in uuids}, [job.cpus, job.memory_mib, 1])


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
        nothing = Amount({}, [0, 0, 0])
        self.leaving = [nothing for _ in world.nodes]
        self.live: list[J] = []
        for job in world.jobs:
            if job.state == PENDING:
                continue
            self.free[job.node] = self.free[job.node].plus(used_by(job, job.on), -1)
            if job.state in (PREEMPTING, STOPPING) or job.number in stopping:
                self.leaving[job.node] = self.leaving[job.node].plus(used_by(job, job.on))
            else:
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
        self.promise: tuple[int, int] | None = None  # start, node
        self.room: Amount | None = None

    # What is due whatever the queue ------------------------------------------------------------

    def stops_due(self) -> dict[int, Reason]:
        due: dict[int, Reason] = {}
        for job in self.world.jobs:
            limit, deadline = job.time_limit_us, job.deadline_us
            if job.state == RUNNING and limit != UNKNOWN and job.started_us + limit <= self.now_us:
                due[job.number] = Reason.TIME_LIMIT
            elif job.state in (RUNNING, SUSPENDED) and deadline != UNKNOWN and deadline <= self.now_us:
                due[job.number] = Reason.DEADLINE_MISSED
            elif job.state in (STARTING, RUNNING, SUSPENDED) and self.world.nodes[job.node].drain == 2:
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
            if job.node == node
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
        return max(0, job.value) * self.lost_gpu_ms(job) // 3_600_000

    # Where it fits -------------------------------------------------------------------------------

    def suiting(self, job: J, node: int) -> list[str]:
        return [
            gpu.uuid
            for gpu in self.world.gpus
            if gpu.node == node
            and gpu.is_open
            and (not job.models or gpu.model in job.models)
            and gpu.memory_mib >= job.gpu_memory_mib
            and not (job.gpus > 1 and gpu.instance)
        ]

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
            amount = amount.plus(used_by(victim, victim.on))
        return amount

    def victim_sets(self, job: J, node: int) -> list[tuple[J, ...]]:
        """Every set of victims, the best first: least loss, fewest GPUs, fewest jobs, youngest, number."""
        candidates = sorted(
            self.victims(job, node),
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
        for node in self.open_nodes():
            here = [live for live in self.live if live.node == node]
            releases = [(self.release_us(job, live), used_by(live, live.on)) for live in here]
            releases += [
                (self.end_us(other, chosen), used_by(other, chosen.uuids))
                for other, chosen in self.given
                if chosen.node == node
            ]
            for moment in sorted({self.now_us, *(at for at, _ in releases if at < inf)}):
                room = self.free[node].plus(self.leaving[node])
                for at, amount in releases:
                    if at <= moment:
                        room = room.plus(amount)
                if moment < best and self.fits(job, node, room):
                    best, self.promise, self.room = moment, (int(moment), node), room
                    break

    def release_us(self, blocked: J, live: J) -> float:
        began_us = self.now_us if live.state == STARTING or live.started_us == UNKNOWN else live.started_us
        ends = inf if live.expected_us == UNKNOWN else max(self.now_us, began_us + live.expected_us)
        if live.preemptible and self.outranks(blocked, live):
            return min(ends, max(self.now_us, self.protected_until(live)))
        return ends

    def end_us(self, job: J, chosen: Chosen) -> float:
        return inf if job.expected_us == UNKNOWN else max(self.now_us, chosen.ready_us) + job.expected_us

    def gives_way(self, job: J, blocked: J, start_us: int) -> bool:
        at = self.promise[0] if self.promise and blocked is self.first_blocked else inf
        return job.preemptible and self.outranks(blocked, job) and start_us + job.min_runtime_us <= at

    def is_strict(self, job: J) -> J | None:
        """Without backfill: the blocked job of its kind that this one may pass only by giving way to it."""
        return None if self.policy.backfill else self.strict.get(job.gpus > 0)

    def harmless(self, job: J, node: int, start_us: int) -> bool:
        """Whether, started there and then, it can't delay what a blocked job was promised."""
        strict = self.is_strict(job)
        if strict is not None and not self.gives_way(job, strict, start_us):
            return False
        if self.first_blocked is None or self.promise is None or self.promise[1] != node:
            return True
        if self.gives_way(job, self.first_blocked, start_us):
            return True
        return job.expected_us != UNKNOWN and start_us + job.expected_us <= self.promise[0]

    def leaves_room(self, job: J, node: int, uuids: tuple[str, ...]) -> bool:
        """Whether the blocked job still fits beside it at the promised moment."""
        if self.first_blocked is None or self.promise is None or self.promise[1] != node:
            return True
        assert self.room is not None
        return self.fits(self.first_blocked, node, self.room.plus(used_by(job, uuids), -1))

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
        own = None if self.promise is None or self.first_blocked is None else self.first_blocked.number
        assert promised == (None if own is None or self.promise is None else (own, self.promise[0]))

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
        if any(self.fits(job, node, self.free[node]) for node in nodes):
            return "free", ()
        if any(self.fits(job, node, self.without(node, ())) for node in nodes):
            return "leaving", ()
        found = []
        for node in nodes:
            if not self.fits(job, node, self.without(node, tuple(self.victims(job, node)))):
                continue
            chosen = next(
                c for c in self.victim_sets(job, node) if self.fits(job, node, self.without(node, c))
            )
            cost = (sum(self.loss(v) for v in chosen), sum(len(v.on) for v in chosen), len(chosen), node)
            found.append((cost, chosen))
        return ("displace", min(found, key=lambda each: each[0])[1]) if found else ("none", ())

    def check_held_back(self, job: J, stage: str) -> None:
        """It must be able to do harm wherever it could start, and leave no room beside it anywhere."""
        for node in self.open_nodes():
            if stage == "free" and self.fits(job, node, self.free[node]):
                assert not self.harmless(job, node, self.now_us), f"{job.number} held back for nothing"
            if self.is_strict(job) is None:
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
        node, uuids = chosen.node, chosen.uuids
        assert self.world.nodes[node].drain == 0
        assert len(set(uuids)) == job.gpus
        assert set(uuids) <= set(self.suiting(job, node))
        victims = tuple(v for v in self.live if v.number in {p.job for p in preempts})
        assert len(victims) == len(preempts)
        assert set(victims) <= set(self.victims(job, node)), "displaced without the right to"
        for preempt in preempts:
            victim = next(v for v in victims if v.number == preempt.job)
            assert (preempt.lost_gpu_ms, preempt.loss_microusd) == (
                self.lost_gpu_ms(victim),
                self.loss(victim),
            )
        if self.harmless(job, node, max(self.now_us, chosen.ready_us)) and not self.restricted(job):
            assert set(victims) == set(best), f"{job.number}: {stage} {best} is better than {victims}"
            assert (job.number in starts) == (stage == "free")
        elif not self.harmless(job, node, max(self.now_us, chosen.ready_us)):
            assert self.is_strict(job) is None
            assert self.leaves_room(job, node, uuids), f"{job.number} delays the promised start"
        if job.number in starts:
            assert starts[job.number] == tuple(sorted(uuids, key=lambda uuid: self.world.gpu(uuid).index))
            assert set(uuids) in [set(spot) for spot in self.spots(job, node, self.free[node])]
        self.check_needed(job, node, victims)
        self.give(job, chosen, victims)

    def restricted(self, job: J) -> bool:
        """Whether some way to serve the job now could have done harm, so that another was taken."""
        return any(
            not self.harmless(job, node, start_us)
            for node in self.open_nodes()
            for start_us in (self.now_us, self.now_us + 30_000_000)
        )

    def check_needed(self, job: J, node: int, victims: tuple[J, ...]) -> None:
        """R5: without any one of its victims it could not be served (beside the blocked job)."""
        stays = not self.harmless(job, node, self.now_us)
        for victim in victims:
            fewer = self.without(node, tuple(v for v in victims if v is not victim))
            ways = [u for u in self.spots(job, node, fewer) if not stays or self.leaves_room(job, node, u)]
            assert self.restricted(job) or ways == [], f"victim {victim.number} of {job.number} is needless"

    def give(self, job: J, chosen: Chosen, victims: tuple[J, ...]) -> None:
        """Take the job's needs out of what is free first, then of what leaves."""
        node = chosen.node
        stays = not self.harmless(job, node, max(self.now_us, chosen.ready_us))
        for victim in victims:
            self.live.remove(victim)
            self.leaving[node] = self.leaving[node].plus(used_by(victim, victim.on))
        need = used_by(job, chosen.uuids)
        free, leaving = self.free[node], self.leaving[node]
        from_free = Amount(
            {
                uuid: [min(max(free.gpus[uuid][i], 0), amount[i]) for i in (MILLI, MIB)]
                for uuid, amount in need.gpus.items()
            },
            [min(max(have, 0), want) for have, want in zip(free.host, need.host, strict=True)],
        )
        rest = need.plus(from_free, -1)
        is_free = not any(chain(rest.host, *rest.gpus.values()))
        assert is_free == (chosen.ready_us == 0), f"{job.number} is ready {chosen.ready_us}, free: {is_free}"
        # R1: what is not free must be leaving, and nobody else's.
        assert all(left >= 0 for left in self.free_after(free, from_free) + self.free_after(leaving, rest))
        self.free[node] = free.plus(from_free, -1)
        self.leaving[node] = leaving.plus(rest, -1)
        if stays and self.promise is not None and self.promise[1] == node:
            assert self.room is not None
            self.room = self.room.plus(need, -1)
        self.given.append((job, chosen))

    def free_after(self, have: Amount, taken: Amount) -> list[int]:
        """What is left of each resource of which something is taken."""
        left = [h - t for h, t in zip(have.host, taken.host, strict=True) if t]
        for uuid, amount in taken.gpus.items():
            left += [have.gpus[uuid][i] - amount[i] for i in (MILLI, MIB) if amount[i]]
        return left
