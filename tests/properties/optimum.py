"""The exact optimum of one planning step, as a mixed-integer program, and what a plan is worth.

**Worth of a plan**, in micro-USD: what all jobs that hold GPUs after it earn in one hour, less what its
victims lose. A job earns its value for each GPU-hour, a share its part; a victim loses its work since the
last checkpoint and its restart loss, priced at its value. The hour is the one over which
the planner spreads a restart loss. Plan and optimum are judged by this one function, `worth_microusd`.

**What the program may choose**: who is served, on which GPUs, and who is displaced for whom. It serves jobs
in the order of rank, like the planner, but may leave out whom it likes (`Rules.ANY`), or only those that do
not fit when it is their turn, with all that they may displace gone (`Rules.BY_RANK`, which is R4). Always:

* R1: what a job takes is there at its turn: GPUs, thousandths, GPU memory, CPUs, host memory, slots.
* R2: all of its GPUs or none. R3: each victim may be displaced by the job that displaces it.
* R5: no victim is needless: without any one of them the job would not have fitted at its turn.

So what the planner does is one of the choices of `BY_RANK`, and those are some of the choices of `ANY`. It
looks at one node. Promises (R9) are no part of it: worlds that are compared must have none that binds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from itertools import combinations
from math import gcd, inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from scheduler.model.actions import Plan, PreemptJob, StartJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from tests.fakes.worlds import J, W, outcome
from tests.properties.oracle import Amount, Oracle, used_by

WHOLE_MILLI = 1000
MICRO = 1_000_000
HOST = ("cpus", "memory_mib", "slots")
# Where a GPU's amounts stand in the oracle's lists.
MILLI, MIB = 0, 1
# scipy's statuses of a program that was solved, and of one that ran into its limit of time.
SOLVED, OUT_OF_TIME = 0, 1
SOLVE_S_MAX = 60.0


class Rules(Enum):
    """Whom a step may leave out."""

    ANY = "any"
    BY_RANK = "by rank"


@dataclass(frozen=True)
class Decision:
    """What a step comes to: who is served, and who gives way to whom (victim, preemptor)."""

    served: frozenset[int]
    displaced: frozenset[tuple[int, int]]


@dataclass(frozen=True)
class Optimum:
    """The best decision found, its worth, and what no decision exceeds; the same where it was proved."""

    decision: Decision
    microusd: int
    microusd_max: int


def decided(plan: Plan) -> Decision:
    """What a plan comes to; who waits for a hand-over is served."""
    waits = outcome(plan).waits.items()
    served = {action.job for action in plan.actions if isinstance(action, StartJob)}
    served |= {number for number, reason in waits if reason is Reason.WAITING_FOR_HANDOVER}
    displaced = {(a.job, a.preemptor) for a in plan.actions if isinstance(a, PreemptJob)}
    return Decision(frozenset(served), frozenset(displaced))


def worth_microusd(world: W, policy: Policy, decision: Decision) -> int:
    """What the jobs that stay or are served earn in an hour, less what the victims lose."""
    facts = Oracle(world, policy)
    victims = {victim for victim, _ in decision.displaced}
    stay = [job for job in facts.live if job.number not in victims]
    served = [world.job(number) for number in decision.served]
    lost = sum(facts.loss(job) for job in facts.live if job.number in victims)
    return sum(map(hourly_microusd, (*stay, *served))) - lost


def hourly_microusd(job: J) -> int:
    """What the job earns in an hour."""
    return job.value * job.gpus * job.share_milli // WHOLE_MILLI


def optimum(world: W, policy: Policy, rules: Rules, fixed: Decision | None = None) -> Optimum | None:
    """The decision of most worth; None where the rules allow none, which needs a `fixed` one."""
    return Step(world, policy, rules, fixed).solve()


def exhaustive_microusd(world: W, policy: Policy, rules: Rules) -> int:
    """The worth of the best decision, by trying all: for worlds of a few jobs."""
    facts = Oracle(world, policy)
    pending = _eligible(facts)

    def best(turn: int, room: Amount, live: list[J]) -> int:
        if turn == len(pending):
            return sum(map(hourly_microusd, live))
        job, found = pending[turn], []
        may_go = [victim for victim in facts.victims(job, 0) if victim in live]
        for victims in _subsets(may_go):
            if not facts.fits(job, 0, _with(room, victims)):
                continue
            fewer = (tuple(v for v in victims if v is not kept) for kept in victims)
            if any(facts.fits(job, 0, _with(room, others)) for others in fewer):
                continue
            rest = [other for other in live if other not in victims]
            earned = hourly_microusd(job) - sum(map(facts.loss, victims))
            for uuids in facts.spots(job, 0, _with(room, victims)):
                left = _with(room, victims).plus(used_by(job, uuids), -1)
                found.append(earned + best(turn + 1, left, rest))
        if rules is Rules.ANY or not found:
            found.append(best(turn + 1, room, live))
        return max(found)

    return best(0, facts.without(0, ()), list(facts.live))


def _subsets(jobs: list[J]) -> Iterable[tuple[J, ...]]:
    return (chosen for size in range(len(jobs) + 1) for chosen in combinations(jobs, size))


def _with(room: Amount, victims: Iterable[J]) -> Amount:
    return reduce(lambda amount, victim: amount.plus(used_by(victim, victim.on)), victims, room)


def _eligible(facts: Oracle) -> list[J]:
    """The pending jobs that can be served at all, from the highest rank down."""
    assert facts.open_nodes() == [0], "one node that takes jobs"
    pending = [job for job in facts.world.jobs if not job.is_live and not facts.is_late(job)]
    return sorted((job for job in pending if facts.set_aside(job) is None), key=facts.rank)


class Sum:
    """A linear expression."""

    def __init__(self, const: float = 0) -> None:
        self.const = const
        self.factors: dict[int, float] = {}

    def add(self, other: "Sum | int", factor: float = 1) -> "Sum":
        """Add a multiple of another expression, or of the variable of this number; returns itself."""
        terms = {other: 1.0} if isinstance(other, int) else other.factors
        self.const += 0 if isinstance(other, int) else factor * other.const
        for variable, by in terms.items():
            self.factors[variable] = self.factors.get(variable, 0) + factor * by
        return self


class Program:
    """Variables and rows of a mixed-integer program that maximises."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.integral: list[bool] = []
        self.gain: dict[int, float] = {}
        self.rows: list[tuple[Sum, float, float]] = []

    def binary(self) -> int:
        """A variable that is 0 or 1."""
        return self.variable(0, 1, integral=True)

    def variable(self, lower: float, upper: float, *, integral: bool) -> int:
        """A variable between two bounds."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.integral.append(integral)
        return len(self.upper) - 1

    def at_most(self, left: Sum, right: Sum) -> None:
        """Demand left <= right."""
        self.rows.append((Sum().add(left).add(right, -1), -inf, 0))

    def equal(self, left: Sum, right: Sum) -> None:
        """Demand left = right."""
        self.rows.append((Sum().add(left).add(right, -1), 0, 0))

    def solve(self) -> tuple[list[bool], float] | None:
        """Which variables are not 0 at the best, and a bound of its gain; None where the rows contradict."""
        gain = np.zeros(len(self.upper))
        gain[list(self.gain)] = list(self.gain.values())
        entries = [
            (row, variable, factor)
            for row, (terms, _, _) in enumerate(self.rows)
            for variable, factor in terms.factors.items()
        ]
        at_row, at_column, factors = zip(*entries, strict=True)
        matrix = csr_array((factors, (at_row, at_column)), shape=(len(self.rows), len(self.upper)))
        low = [least - terms.const for terms, least, _ in self.rows]
        high = [most - terms.const for terms, _, most in self.rows]
        found = milp(
            -gain,
            integrality=np.array(self.integral),
            bounds=Bounds(np.array(self.lower), np.array(self.upper)),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": 0.0, "time_limit": SOLVE_S_MAX},
        )
        if found.x is None:
            assert found.status not in (SOLVED, OUT_OF_TIME), found.message
            return None
        return (found.x > 0.5).tolist(), -found.mip_dual_bound


# What there is an amount of: the thousandths or the MiB of a bin of GPUs, or something of the host.
Key = tuple[int, int] | str
Amounts = Callable[[Key], Sum]


class Step:
    """One planning step of a world as a program.

    GPUs are put in *bins*: where the world has no shares those that nothing tells apart (who may use them,
    who holds them) share one and are counted; else each is one by itself. Amounts are in units of their
    greatest common divisor: "less than" is "at most one unit less". Jobs have their turns in order of rank;
    `_room` is what is free when it is the present one's turn, `_gone` who was displaced before it.
    """

    def __init__(self, world: W, policy: Policy, rules: Rules, fixed: Decision | None) -> None:
        self._facts = facts = Oracle(world, policy)
        self._world, self._policy, self._rules, self._fixed = world, policy, rules, fixed
        self._pending = _eligible(facts)
        self._may_go = {job.number: facts.victims(job, 0) for job in self._pending}
        self._suiting = {job.number: set(facts.suiting(job, 0)) for job in self._pending}
        self._measure()
        self._program = Program()
        self._room = {key: Sum(amount) for key, amount in self._there.items()}
        self._gone = {victim.number: Sum() for victim in self._movable}
        self._used = [Sum() for _ in self._bins]
        self._alike = self._find_alike()
        self._is_served: dict[int, int] = {}
        self._displaces: dict[tuple[int, int], int] = {}
        for job in self._pending:
            self._turn(job)

    def solve(self) -> Optimum | None:
        """The best decision."""
        found = self._program.solve() if self._pending else ([], 0.0)
        if found is None:
            return None
        chosen, gain_usd_max = found
        decision = Decision(
            frozenset(number for number, variable in self._is_served.items() if chosen[variable]),
            frozenset(pair for pair, variable in self._displaces.items() if chosen[variable]),
        )
        worth = worth_microusd(self._world, self._policy, decision)
        kept = sum(map(hourly_microusd, self._facts.live))
        return Optimum(decision, worth, max(worth, kept + round(gain_usd_max * MICRO)))

    # The world in bins and units ---------------------------------------------------------------

    def _measure(self) -> None:
        """Make the bins; say in units what is there, what each victim has, what each pending job needs."""
        facts = self._facts
        movable = {victim.number: victim for victims in self._may_go.values() for victim in victims}
        self._movable = [movable[number] for number in sorted(movable)]
        self._counted = all(job.share_milli == WHOLE_MILLI for job in (*self._pending, *facts.live))
        self._bins = self._make_bins() if self._counted else [(gpu.uuid,) for gpu in facts.world.gpus]
        self._keys: list[Key] = [(place, kind) for place in range(len(self._bins)) for kind in (MILLI, MIB)]
        self._keys += HOST
        there = self._amounts(facts.without(0, ()))
        held = {victim.number: self._amounts(used_by(victim, victim.on)) for victim in self._movable}
        needs = {job.number: self._need(job) for job in self._pending}
        unit: dict[int | str, int] = {}
        for kind in (MILLI, MIB, *HOST):
            keys = [key for key in self._keys if _kind(key) == kind]
            found = [has[key] for has in (there, *held.values()) for key in keys]
            unit[kind] = gcd(*found, *(need[kind] for need in needs.values())) or 1
        self._there = {key: there[key] // unit[_kind(key)] for key in self._keys}
        self._held = {
            number: {key: has[key] // unit[_kind(key)] for key in self._keys if has[key]}
            for number, has in held.items()
        }
        self._needs = {n: {kind: need[kind] // unit[kind] for kind in need} for n, need in needs.items()}
        self._there_max = {
            key: self._there[key] + sum(has.get(key, 0) for has in self._held.values()) for key in self._keys
        }
        wanted = {kind: sum(need[kind] for need in self._needs.values()) for kind in HOST}
        self._scarce = [kind for kind in HOST if wanted[kind] > self._there[kind]]

    def _make_bins(self) -> list[tuple[str, ...]]:
        """The GPUs that anybody may get, those that nothing tells apart together."""
        holder = {uuid: victim.number for victim in self._movable for uuid in victim.on}
        free = {uuid for uuid, has in self._facts.without(0, ()).gpus.items() if has[MILLI] == WHOLE_MILLI}
        bins: dict[tuple[object, ...], list[str]] = {}
        for gpu in self._world.gpus:
            if gpu.uuid in holder or gpu.uuid in free:
                users = frozenset(number for number, uuids in self._suiting.items() if gpu.uuid in uuids)
                bins.setdefault((holder.get(gpu.uuid), users), []).append(gpu.uuid)
        return [tuple(uuids) for uuids in bins.values()]

    def _find_alike(self) -> dict[int, int]:
        """Of empty bins that nothing tells apart each but the first, with the one before it."""
        before: dict[tuple[object, ...], int] = {}
        alike: dict[int, int] = {}
        held = {key[0] for has in self._held.values() for key in has}
        for place, uuids in enumerate(self._bins):
            users = frozenset(number for number, suiting in self._suiting.items() if uuids[0] in suiting)
            kind = (users, self._there[place, MILLI], self._there[place, MIB])
            if place not in held:
                if kind in before:
                    alike[place] = before[kind]
                before[kind] = place
        return alike

    def _amounts(self, amount: Amount) -> dict[Key, int]:
        of_bins = {
            (place, kind): sum(amount.gpus.get(uuid, [0, 0])[kind] for uuid in uuids)
            for place, uuids in enumerate(self._bins)
            for kind in (MILLI, MIB)
        }
        return {**of_bins, **dict(zip(HOST, amount.host, strict=True))}

    def _need(self, job: J) -> dict[int | str, int]:
        """What the job takes of each of its GPUs and of the host."""
        mib = job.gpu_memory_mib if job.share_milli < WHOLE_MILLI else 0
        return {MILLI: job.share_milli, MIB: mib, "cpus": job.cpus, "memory_mib": job.memory_mib, "slots": 1}

    def _bins_of(self, job: J) -> list[int]:
        suiting = self._suiting[job.number]
        return [place for place, uuids in enumerate(self._bins) if uuids[0] in suiting]

    def _reasons(self, job: J) -> list[str | None]:
        """For the lack of what the job could fail to fit: GPUs (None), or something of the host."""
        need = self._needs[job.number]
        return [*([None] if job.gpus else []), *(kind for kind in self._scarce if need[kind])]

    # A job's turn ------------------------------------------------------------------------------

    def _turn(self, job: J) -> None:
        """Let the job be served or not, and bring what is free and gone up to date."""
        program, number = self._program, job.number
        served = self._is_served[number] = program.binary()
        program.gain[served] = hourly_microusd(job) / MICRO
        may_go = {victim.number: program.binary() for victim in self._may_go[number]}
        for victim in self._may_go[number]:
            displaces = may_go[victim.number]
            self._displaces[victim.number, number] = displaces
            program.gain[displaces] = -(hourly_microusd(victim) + self._facts.loss(victim)) / MICRO
            program.at_most(Sum().add(displaces), Sum().add(served))
        self._fix(number, served, may_go)
        if self._rules is Rules.BY_RANK:
            self._leave_out_only_who_does_not_fit(job, Sum().add(served))
        if may_go:
            self._spare_the_needless(job, may_go)
        self._take(job, served, may_go)

    def _fix(self, number: int, served: int, may_go: dict[int, int]) -> None:
        if self._fixed is None:
            return
        self._program.equal(Sum().add(served), Sum(number in self._fixed.served))
        for victim, displaces in may_go.items():
            self._program.equal(Sum().add(displaces), Sum((victim, number) in self._fixed.displaced))

    def _take(self, job: J, served: int, may_go: dict[int, int]) -> None:
        """What is free after the turn: victims' amounts come, the job's go; never less than nothing."""
        program, need = self._program, self._needs[job.number]
        on = {
            place: program.variable(0, min(job.gpus, len(self._bins[place])), integral=True)
            for place in (self._bins_of(job) if job.gpus else ())
        }
        placed = Sum()
        for variable in on.values():
            placed.add(variable)
        program.equal(placed, Sum().add(served, job.gpus))
        for place, variable in on.items():
            self._used[place].add(variable)
            if place in self._alike:  # of GPUs that are alike the first is used first: one order is enough
                program.at_most(Sum().add(variable), self._used[self._alike[place]])
        for key in self._keys:
            taken = Sum()
            if isinstance(key, str):
                taken.add(served, need[key])
            elif key[0] in on:
                taken.add(on[key[0]], need[key[1]])
            freed = [number for number in may_go if key in self._held[number]]
            if not freed and not any(taken.factors.values()):
                continue
            # A node that lost CPUs to its config may have less than none; who needs none may start.
            least = min(0, self._there[key])
            left = program.variable(least, self._there_max[key], integral=False)
            program.equal(Sum().add(left), self._after(key, may_go).add(taken, -1))
            if least < 0 and any(taken.factors.values()):
                program.at_most(Sum(least).add(served, -least), Sum().add(left))
            self._room[key] = Sum().add(left)
        for victim, displaces in may_go.items():
            gone = program.variable(0, 1, integral=False)
            program.equal(Sum().add(gone), Sum().add(self._gone[victim]).add(displaces))
            self._gone[victim] = Sum().add(gone)

    def _after(self, key: Key, may_go: dict[int, int], kept: int | None = None) -> Sum:
        """What is free at the turn once the job's victims have left, one of them kept."""
        amount = Sum().add(self._room[key])
        for victim, displaces in may_go.items():
            if victim != kept and key in self._held[victim]:
                amount.add(displaces, self._held[victim][key])
        return amount

    # The rules ---------------------------------------------------------------------------------

    def _leave_out_only_who_does_not_fit(self, job: J, served: Sum) -> None:
        """R4: unless it is served, the job does not fit with all gone that it may displace."""

        def everything(key: Key) -> Sum:
            amount = Sum().add(self._room[key])
            for victim in self._may_go[job.number]:
                has = self._held[victim.number].get(key, 0)
                if has:
                    amount.add(Sum(1).add(self._gone[victim.number], -1), has)
            return amount

        for reason, unless in self._some_reason(job, served):
            if reason is None:
                self._too_few_gpus(job, everything, unless)
            else:
                self._too_little(everything(reason), self._needs[job.number][reason], reason, unless)

    def _spare_the_needless(self, job: J, may_go: dict[int, int]) -> None:
        """R5: with any one victim kept the job does not fit at its turn."""
        fits = self._fits_after(job, may_go)
        for victim, displaces in may_go.items():

            def but_one(key: Key, kept: int = victim) -> Sum:
                return self._after(key, may_go, kept)

            for reason, unless in self._some_reason(job, Sum(1).add(displaces, -1)):
                if reason is not None:
                    self._too_little(but_one(reason), self._needs[job.number][reason], reason, unless)
                elif self._counted:
                    self._too_few_gpus(job, but_one, unless)
                else:
                    self._too_few_but_its_own(job, victim, fits, but_one, unless)

    def _some_reason(self, job: J, unless: Sum) -> list[tuple[str | None, Sum]]:
        """The reasons for which the job may not fit, each with what lifts it: one holds, `unless` is 1."""
        reasons = self._reasons(job)
        if len(reasons) == 1:
            return [(reasons[0], unless)]
        holds = {reason: self._program.binary() for reason in reasons}
        some = Sum().add(unless)
        for variable in holds.values():
            some.add(variable)
        self._program.at_most(Sum(1), some)
        return [(reason, Sum(1).add(variable, -1)) for reason, variable in holds.items()]

    def _too_few_gpus(self, job: J, amounts: Amounts, unless: Sum) -> None:
        """Too few GPUs fit the job, unless the last is 1."""
        places = self._bins_of(job)
        if self._counted:
            gpus = Sum()
            for place in places:
                gpus.add(amounts((place, MILLI)))
            most = sum(len(self._bins[place]) for place in places)
            self._program.at_most(gpus, Sum(job.gpus - 1).add(unless, most - job.gpus + 1))
        elif job.gpus == 1:
            for place in places:
                self._does_not_fit(job, place, amounts, unless)
        else:
            fits = Sum()
            for place in places:
                fits.add(self._fits_at(job, place, amounts))
            self._program.at_most(fits, Sum(job.gpus - 1).add(unless, len(places) - job.gpus + 1))

    def _fits_after(self, job: J, may_go: dict[int, int]) -> dict[int, int]:
        """By bin: a variable that is 1 where the job fits once its victims have left; not where we count."""
        if self._counted or not job.gpus:
            return {}
        return {
            place: self._fits_at(job, place, lambda key: self._after(key, may_go))
            for place in self._bins_of(job)
        }

    def _too_few_but_its_own(
        self, job: J, victim: int, fits: dict[int, int], but_one: Amounts, unless: Sum
    ) -> None:
        """Without what this victim leaves too few GPUs fit: those it is not on, and those it shares."""
        elsewhere = Sum()
        for place, variable in fits.items():
            if (place, MILLI) not in self._held[victim]:
                elsewhere.add(variable)
            elif job.share_milli < WHOLE_MILLI:
                self._does_not_fit(job, place, but_one, unless)
        self._program.at_most(elsewhere, Sum(job.gpus - 1).add(unless, len(fits)))

    def _fits_at(self, job: J, place: int, amounts: Amounts) -> int:
        """A variable that is 1 if the job fits on this GPU."""
        fits = self._program.binary()
        self._does_not_fit(job, place, amounts, Sum().add(fits))
        return fits

    def _does_not_fit(self, job: J, place: int, amounts: Amounts, unless: Sum) -> None:
        """Too few thousandths or too little memory is left on the GPU, unless the last is 1."""
        need, milli, mib = self._needs[job.number], (place, MILLI), (place, MIB)
        unless_milli = Sum().add(unless)
        if need[MIB]:
            is_memory = self._program.binary()
            unless_mib = Sum(1).add(is_memory, -1).add(unless)
            self._too_little(amounts(mib), need[MIB], mib, unless_mib)
            unless_milli.add(is_memory)
        self._too_little(amounts(milli), need[MILLI], milli, unless_milli)

    def _too_little(self, amount: Sum, need: int, key: Key, unless: Sum) -> None:
        """The amount is less than the need, unless the last is 1 or more."""
        most = max(0, self._there_max[key] - need + 1)
        self._program.at_most(amount, Sum(need - 1).add(unless, most))


def _kind(key: Key) -> int | str:
    return key if isinstance(key, str) else key[1]
