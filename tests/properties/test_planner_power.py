"""R6 and what else holds of watts, against sums and searches that share no code with the planner."""

from dataclasses import replace
from itertools import pairwise, product

from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.model.actions import (
    WAIT_REASONS,
    Plan,
    PreemptJob,
    RequeueJob,
    ResumeJob,
    StartJob,
    StopJob,
)
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from scheduler.planning.freezing import FROZEN_US_MIN
from scheduler.planning.planner import digest, plan
from tests.fakes import worlds as plain
from tests.fakes.power import B, P, applied, limits, snapshot
from tests.fakes.worlds import (
    BATCH,
    HOUR_US,
    INFERENCE,
    MINING,
    PENDING,
    PREEMPTING,
    RUNNING,
    STOPPING,
    SUSPENDED,
    TRAINING,
    UNKNOWN,
    J,
    W,
    running,
)
from tests.properties.strategies import fleets, policies, worlds

MICRO_PER_HOUR = HOUR_US
NATURALS = (UNKNOWN, 60, 250, 300, 520, 700, 900)
RUNGS = {  # by class: lowered gently, lowered far, frozen, stopped
    MINING: (1, 4, 5, 6),
    BATCH: (2, 4, 7, 8),
    TRAINING: (3, 9, 10, 11),
    INFERENCE: (12, 13, 14, 15),
}


@st.composite
def powered(draw: st.DrawFn, *, pending: bool = True, gpus_max: int = 4, jobs_max: int = 8) -> P:
    tight = not pending
    one_node = worlds(plain=True, gpus_max=gpus_max, jobs_max=jobs_max)
    world = draw(one_node if tight else one_node | fleets(plain=True, jobs_max=jobs_max))
    if tight:
        world = replace(world, jobs=tuple(job for job in world.jobs if job.is_live))
    boards = {}
    for gpu in world.gpus:
        least = draw(st.sampled_from((100, 200)))
        most = draw(st.sampled_from((least, 400, 700)))
        limit = draw(st.integers(least, most))
        idle = draw(st.sampled_from((20, 70)))
        boards[gpu.uuid] = B(idle, limit, least, most, draw(st.sampled_from((UNKNOWN, idle, 300))))
    top = sum(board.limit_w_max for board in boards.values())
    miners = [job for job in world.jobs if job.job_class == MINING and job.share_milli == 1000 and job.gpus]
    yielding = [job for job in world.jobs if job.preemptible and job.gpus and draw(st.booleans())]
    return P(
        world=world,
        frozen_w={job.number: draw(st.sampled_from((90, 130, 260))) for job in yielding},
        suspend_us={
            job.number: world.now_us - draw(st.sampled_from((0, FROZEN_US_MIN)))
            for job in yielding
            if job.state in (RUNNING, SUSPENDED) and draw(st.booleans())
        },
        budget_w=draw(st.integers(-50, top * 3 // 4 if tight else top + 100)),
        boards=boards,
        best_w={job.number: draw(st.sampled_from((150, 250, 320))) for job in miners if draw(st.booleans())},
        natural_w={job.number: draw(st.sampled_from(NATURALS)) for job in world.jobs},
        is_emergency=draw(st.booleans()) and draw(st.booleans()),
        limits_inference=draw(st.booleans()),
        # While it leads, limits lie lower than the optimum has them.
        lead_milli=0 if tight else draw(st.sampled_from((0, 0, 30))),
    )


@st.composite
def starting(draw: st.DrawFn) -> P:
    """Some boards are held, some empty, and the budget is about as large as what is wanted."""
    count = draw(st.integers(2, 4))
    jobs: list[J] = []
    for number in range(1, count):
        if draw(st.booleans()):
            job_class = draw(st.sampled_from((TRAINING, BATCH, MINING, MINING)))
            value = draw(st.sampled_from((50_000, 500_000, 2_000_000)))
            ran_s = draw(st.sampled_from((0.0, 60.0, 7200.0)))
            held = running(number, f"GPU-{number}", job_class=job_class, value=value, ran_s=ran_s)
            jobs.append(replace(held, preemptible=draw(st.integers(0, 5)) > 0))
    for number in range(10, 10 + draw(st.integers(1, 4))):
        job_class = draw(st.sampled_from((INFERENCE, TRAINING, BATCH, MINING)))
        value = draw(st.sampled_from((50_000, 500_000, 2_000_000)))
        wanted = J(number, job_class=job_class, value=value, gpus=draw(st.sampled_from((1, 1, 2))))
        jobs.append(replace(wanted, preemptible=draw(st.booleans())))
    boards = {}
    for index in range(count):
        limit = draw(st.sampled_from((200, 330, 550, 700)))
        boards[f"GPU-{index}"] = B(limit_w=limit, measured_w=draw(st.sampled_from((UNKNOWN, 70, 300))))
    return P(
        world=W(jobs=tuple(jobs), gpus=plain.gpus(count)),
        budget_w=draw(st.integers(150, 700 * count)),
        boards=boards,
        natural_w={job.number: draw(st.sampled_from((UNKNOWN, 250, 300, 520))) for job in jobs},
        frozen_w={job.number: 130 for job in jobs if draw(st.booleans())},
        lead_milli=draw(st.sampled_from((0, 0, 30))),
    )


def any_powered() -> st.SearchStrategy[P]:
    return st.one_of(powered(), starting(), starting())


# A second opinion of what counts for how much ---------------------------------------------------


class Sums:
    """Watts of a world, from the rules and not from the planner."""

    def __init__(self, power: P, made: Plan) -> None:
        self.power = power
        self.world = power.world
        self.made = made
        self.told = {a.job for a in made.actions if isinstance(a, RequeueJob | StopJob | PreemptJob)}
        self.started = {a.job: a.gpus for a in made.actions if isinstance(a, StartJob)}
        self.set_w = limits(made)

    def stayers(self, uuid: str) -> list[J]:
        return [
            job
            for job in self.world.jobs
            if uuid in job.on and job.state not in (PREEMPTING, STOPPING) and job.number not in self.told
        ]

    def is_occupied(self, uuid: str) -> bool:
        return any(uuid in job.on for job in self.world.jobs) or any(
            over.uuid == uuid for over in self.world.handovers
        )

    def starters(self, uuid: str) -> list[J]:
        return [self.world.job(number) for number, gpus in self.started.items() if uuid in gpus]

    def full_w(self, uuid: str, jobs: list[J]) -> int:
        board = self.power.board(uuid)
        natural = 0
        for job in jobs:
            own = self.power.natural_w.get(job.number, UNKNOWN)
            natural += board.limit_w_max if own == UNKNOWN else min(own, board.limit_w_max)
        wanted = -(-natural * (1000 + self.power.margin_milli) // 1000)
        full = max(board.limit_w_min, min(board.limit_w_max, wanted))
        best = self.power.best_w.get(jobs[0].number) if len(jobs) == 1 else None
        return full if best is None else min(full, max(best, board.limit_w_min))

    def frozen_w(self, uuid: str, jobs: list[J]) -> int:
        """What a board draws with all of these frozen."""
        idle = self.power.board(uuid).idle_w
        added = sum(max(0, self.power.frozen_w[job.number] - idle) for job in jobs)
        return min(self.full_w(uuid, jobs), idle + added)

    def is_frozen(self, uuid: str, *, before: bool = False, soon: bool = False) -> bool:
        """Whether all on the board are known to be frozen, and none is told otherwise (by this plan).

        `soon`: also where somebody was told to be frozen and nobody has seen yet that he is.
        """
        told = set() if before else self.told | {a.job for a in self.made.actions if isinstance(a, ResumeJob)}
        there = [job for job in self.world.jobs if uuid in job.on]
        return (
            bool(there)
            and all(
                (job.state == SUSPENDED or soon)
                and job.preemptible
                and job.number not in told
                and job.number in self.power.suspend_us
                and job.number in self.power.frozen_w
                for job in there
            )
            and not any(over.uuid == uuid for over in self.world.handovers)
        )

    def held_w(self, uuid: str, *, before: bool = False, soon: bool = False) -> int:
        """The most that an occupied board draws now."""
        limit = self.power.board(uuid).limit_w
        if not self.is_frozen(uuid, before=before, soon=soon):
            return limit
        return min(limit, self.frozen_w(uuid, [job for job in self.world.jobs if uuid in job.on]))

    def empty_w(self, uuid: str) -> int:
        board = self.power.board(uuid)
        return max(board.idle_w, board.measured_w)

    @property
    def worst_w(self) -> int:
        """What may be drawn in the worst moment of carrying the plan out: no limit has fallen yet."""
        total = 0
        for gpu in self.world.gpus:
            limit = self.power.board(gpu.uuid).limit_w
            if self.is_frozen(gpu.uuid) and not self.starters(gpu.uuid):
                total += self.held_w(gpu.uuid)
            elif self.is_occupied(gpu.uuid) or self.starters(gpu.uuid):
                total += max(limit, self.set_w.get(gpu.uuid, 0))
            else:
                total += self.empty_w(gpu.uuid)
        return total

    @property
    def before_w(self) -> int:
        """What may be drawn before the plan; of who is stopped while frozen what the notice wakes him to."""
        return sum(
            self.held_w(gpu.uuid, before=not self.is_told(gpu.uuid))
            if self.is_occupied(gpu.uuid)
            else self.empty_w(gpu.uuid)
            for gpu in self.world.gpus
        )

    def is_told(self, uuid: str) -> bool:
        """Whether this plan stops anybody on the board."""
        return any(uuid in job.on and job.number in self.told for job in self.world.jobs)

    @property
    def rises(self) -> list[str]:
        return [
            uuid
            for uuid, watts in self.set_w.items()
            if watts > self.power.board(uuid).limit_w and self.stayers(uuid)
        ]

    @property
    def after_w(self) -> int:
        """What may be drawn when all is carried out and whoever stops has gone."""
        total = 0
        for gpu in self.world.gpus:
            board = self.power.board(gpu.uuid)
            if self.is_frozen(gpu.uuid, soon=True):
                total += self.held_w(gpu.uuid, soon=True)
            elif self.stayers(gpu.uuid) or self.starters(gpu.uuid):
                total += self.set_w.get(gpu.uuid, board.limit_w)
            else:
                total += board.idle_w
        return total


def may_stop(power: P, job: J) -> bool:
    started = power.world.now_us if job.started_us == UNKNOWN else job.started_us
    return job.preemptible and (power.is_emergency or started + job.min_runtime_us <= power.world.now_us)


def may_freeze(power: P, job: J) -> bool:
    return job.preemptible and job.number in power.frozen_w and job.state in (RUNNING, SUSPENDED)


def may_lower(power: P, job: J) -> bool:
    return power.limits_inference or job.job_class != INFERENCE


# R6 ---------------------------------------------------------------------------------------------


@given(any_powered(), policies())
def test_nothing_starts_and_no_limit_rises_beyond_the_budget_at_any_moment(power: P, policy: Policy) -> None:
    made = plan(snapshot(power), policy)
    sums = Sums(power, made)
    resumed = [action for action in made.actions if isinstance(action, ResumeJob)]
    if [number for number, gpus in sums.started.items() if gpus] or sums.rises or resumed:
        assert sums.worst_w <= power.budget_w
    else:
        assert sums.worst_w <= sums.before_w
    assert made.power is not None
    assert made.power.budget_w == power.budget_w


@given(any_powered(), policies())
def test_a_plan_ends_inside_the_budget_or_at_the_floor(power: P, policy: Policy) -> None:
    made, world = settled(power, policy)
    sums = Sums(world, made)
    if sums.after_w > power.budget_w:
        for gpu in power.world.gpus:
            if sums.is_frozen(gpu.uuid, soon=True):
                continue
            for job in (stayers := sums.stayers(gpu.uuid)):
                whole = [each for uuid in job.on for each in sums.stayers(uuid)]
                assert not all(may_stop(world, each) for each in whole), "somebody could still be stopped"
            if stayers and all(may_lower(world, job) for job in stayers):
                board = world.board(gpu.uuid)
                assert board.limit_w == board.limit_w_min


def settled(power: P, policy: Policy) -> tuple[Plan, P]:
    """The plan after which nothing is left to do while whoever stops is still there, and its world."""
    stopped: set[int] = set()
    for _ in range(3 * len(power.world.jobs) + 5):
        made = plan(snapshot(power), policy)
        if not made.actions:
            return made, power
        for action in made.actions:
            if isinstance(action, RequeueJob | PreemptJob):
                assert action.job not in stopped, "nobody is told to stop twice"
                stopped.add(action.job)
        power = applied(power, made)
    raise AssertionError("plans go on and on")


@given(any_powered(), policies())
def test_plans_come_to_rest(power: P, policy: Policy) -> None:
    settled(power, policy)


def still(power: P) -> P:
    """The world where every empty board was seen to draw what it should."""
    boards = {uuid: replace(board, measured_w=board.idle_w) for uuid, board in power.boards.items()}
    return replace(power, boards=boards)


def gone(power: P) -> P:
    """The world when everybody who was told has gone, and waits again."""
    jobs = tuple(
        replace(
            job, state=PENDING, on=(), node=UNKNOWN, started_us=UNKNOWN, preemptor=UNKNOWN, stop_us=UNKNOWN
        )
        if job.state == PREEMPTING
        else job
        for job in power.world.jobs
        if job.state != STOPPING
    )
    return replace(power, world=replace(power.world, jobs=jobs, handovers=()))


@given(any_powered(), policies())
def test_who_was_stopped_for_power_is_not_started_and_stopped_again(power: P, policy: Policy) -> None:
    """No thrash: with the same budget the world comes to rest though the stopped come back and wait."""
    jobs = tuple(
        replace(job, eligible_us=0, deadline_us=UNKNOWN, time_limit_us=UNKNOWN) for job in power.world.jobs
    )
    power = still(replace(power, world=replace(power.world, jobs=jobs)))
    for _ in range(3 * len(power.world.jobs) + 5):
        _, power = settled(power, policy)
        after = gone(power)
        if after == power:
            return
        power = after
    raise AssertionError("jobs are stopped and started for ever")


@given(any_powered(), policies(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(power: P, policy: Policy, random: st.randoms) -> None:
    world = power.world
    other = replace(
        power,
        world=replace(
            world,
            jobs=tuple(random.sample(world.jobs, len(world.jobs))),
            gpus=tuple(random.sample(world.gpus, len(world.gpus))),
        ),
    )
    one, two = plan(snapshot(power), policy), plan(snapshot(other), policy)
    assert one.actions == two.actions
    assert digest(one) == digest(two)
    assert one.power == two.power


# A shed -----------------------------------------------------------------------------------------


def units_of(power: P) -> list[tuple[tuple[J, ...], tuple[str, ...]]]:
    """Jobs that shed as one, with their GPUs."""
    found = {}
    for job in power.world.jobs:
        if job.on and job.state not in (PREEMPTING, STOPPING, PENDING):
            together = [
                each
                for each in power.world.jobs
                if set(each.on) & set(job.on) and each.state not in (PREEMPTING, STOPPING, PENDING)
            ]
            found[tuple(sorted(each.number for each in together))] = (tuple(together), job.on)
    return list(found.values())


def work(power: P, limit: int, natural: int) -> int:
    """Thousandths of the work, by straight lines between the curve's points."""
    draw = min(1000, limit * 1000 // natural)
    points = sorted(power.curve.points)
    if draw <= points[0][0]:
        return points[0][1] if draw == points[0][0] else 0
    for low, high in pairwise(points):
        if draw <= high[0]:
            return low[1] + (draw - low[0]) * (high[1] - low[1]) // (high[0] - low[0])
    return points[-1][1]


def lost(power: P, policy: Policy, job: J) -> int:
    """What a stop loses at once, micro-USD."""
    now = power.world.now_us
    started = now if job.started_us == UNKNOWN else job.started_us
    assumed = round(policy.assumed_checkpoint_interval_s * 1e6) // 2
    if job.checkpoint_us == UNKNOWN:
        unsaved = min(max(0, now - started), assumed)
    else:
        unsaved = max(0, now - max(job.checkpoint_us, started))
    gpu_ms = (unsaved + job.restart_loss_us) * job.share_milli * len(job.on) // 1_000_000
    return max(0, job.value) * gpu_ms // 3_600_000


def delayed(power: P, policy: Policy, jobs: tuple[J, ...], hourly: int, undone: int) -> int:
    """What is lost with so many thousandths of the hour's work, deadlines that are missed for it included."""
    now, stake, slack = power.world.now_us, 0, []
    for job in jobs:
        if UNKNOWN in (job.expected_us, job.deadline_us):
            continue
        left = max(0, job.expected_us - (0 if job.started_us == UNKNOWN else now - job.started_us))
        spare = job.deadline_us - now - left
        earns = left if policy.order is Order.VALUE else job.expected_us
        earned = max(0, job.value) * job.share_milli * len(job.on) // 1000 * (earns // 1000) // 3_600_000
        if spare >= 0 and earned:
            stake += earned
            slack.append(spare)
    delay = HOUR_US * undone // 1000
    is_late = undone > 5 and delay > min(slack, default=0)
    return max(hourly * undone // 1000, stake if is_late else 0)


def shed_options(
    power: P, policy: Policy, jobs: tuple[J, ...], gpus: tuple[str, ...]
) -> list[tuple[int, int, int]]:
    """(watts saved, micro-USD lost, rung) of all that could be done with a unit, limits watt by watt."""
    sums = Sums(power, plan_of_nothing())
    boards = [power.board(uuid) for uuid in gpus]
    full = [sums.full_w(uuid, list(jobs)) for uuid in gpus]
    natural = []
    for board in boards:
        own = [power.natural_w.get(job.number, UNKNOWN) for job in jobs]
        each = [board.limit_w_max if watts == UNKNOWN else min(watts, board.limit_w_max) for watts in own]
        natural.append(max(1, sum(each)))
    hourly = sum(max(0, job.value) * job.share_milli * len(job.on) // 1000 for job in jobs)
    all_of_it = delayed(power, policy, jobs, hourly, 1000)
    klass = min(job.job_class for job in jobs)
    gentle, far, freeze, stop = RUNGS[klass]
    whole = min(work(power, w, n) for w, n in zip(full, natural, strict=True))
    found = [(0, 0, 0)]
    if all(may_lower(power, job) for job in jobs):
        for level in (*range(1000, power.curve.least_milli, -50), power.curve.least_milli):
            limit = [
                max(board.limit_w_min, min(f, -(-n * level // 1000)))
                for board, f, n in zip(boards, full, natural, strict=True)
            ]
            if sum(limit) < sum(full):
                done = min(995, *(work(power, w, n) for w, n in zip(limit, natural, strict=True)))
                loss = delayed(power, policy, jobs, hourly, max(0, whole - done))
                found.append((sum(full) - sum(limit), loss, gentle if done >= 950 else far))
        if not all(may_stop(power, job) for job in jobs):
            least = [min(board.limit_w_min, f) for board, f in zip(boards, full, strict=True)]
            found.append((sum(full) - sum(least), all_of_it, far))
    if all(may_freeze(power, job) for job in jobs):
        frozen = [sums.frozen_w(uuid, list(jobs)) for uuid in gpus]
        found.append((sum(full) - sum(frozen), all_of_it, freeze))
    if all(may_stop(power, job) for job in jobs):
        saved = max(0, sum(full) - sum(board.idle_w for board in boards))
        found.append((saved, all_of_it + sum(lost(power, policy, job) for job in jobs), stop))
    return found


def plan_of_nothing() -> Plan:
    return Plan(actions=(), waits=None)


@given(powered(pending=False, gpus_max=3, jobs_max=6), policies())
def test_a_shed_loses_as_little_value_as_any_that_saves_as_much(power: P, policy: Policy) -> None:
    jobs = tuple(
        replace(job, deadline_us=max(job.deadline_us, power.world.now_us), time_limit_us=UNKNOWN)
        if job.deadline_us != UNKNOWN
        else replace(job, time_limit_us=UNKNOWN)
        for job in power.world.jobs
        if job.state not in (PREEMPTING, STOPPING)
    )
    power = still(replace(power, world=replace(power.world, jobs=jobs, handovers=())))
    power = replace(power, suspend_us={})  # who is frozen returns only when there is room at that moment
    units = units_of(power)
    sums = Sums(power, plan_of_nothing())
    full = sum(
        sums.full_w(gpu.uuid, sums.stayers(gpu.uuid))
        if sums.stayers(gpu.uuid)
        else power.board(gpu.uuid).idle_w
        for gpu in power.world.gpus
    )
    need = full - power.budget_w
    assume(need > 0)
    choices = [shed_options(power, policy, *unit) for unit in units]
    best = min(
        (
            (sum(o[1] for o in chosen), sum(o[2] for o in chosen))
            for chosen in product(*choices)
            if sum(o[0] for o in chosen) >= need
        ),
        default=None,
    )
    assume(best is not None)

    made, rest = settled(power, policy)

    stopped = {job.number for job in rest.world.jobs if job.state == PREEMPTING} & {
        job.number for jobs, _ in units for job in jobs
    }
    loss = 0
    for jobs, gpus in units:
        if jobs[0].number in stopped:
            assert all(job.number in stopped for job in jobs), "who sheds as one stops as one"
            loss += shed_options(power, policy, jobs, gpus)[-1][1]
        elif rest.suspend_us.keys() & {job.number for job in jobs} and not stopped:
            hourly = shed_options(power, policy, jobs, gpus)
            loss += next(
                option[1] for option in hourly if option[2] == RUNGS[min(j.job_class for j in jobs)][2]
            )
        elif rest.world == power.world:  # else limits wait for whoever goes
            loss += slowed(rest, policy, jobs, gpus)
    assert loss <= best[0]
    assert made.power is not None
    assert made.power.planned_w <= power.budget_w


def slowed(power: P, policy: Policy, jobs: tuple[J, ...], gpus: tuple[str, ...]) -> int:
    """What the unit loses over the horizon under the limits that are in force."""
    sums = Sums(power, plan_of_nothing())
    if all(power.board(uuid).limit_w >= sums.full_w(uuid, list(jobs)) for uuid in gpus):
        return 0
    done, whole = 995, 1000
    for uuid in gpus:
        board = power.board(uuid)
        own = [power.natural_w.get(job.number, UNKNOWN) for job in jobs]
        natural = max(1, sum(board.limit_w_max if w == UNKNOWN else min(w, board.limit_w_max) for w in own))
        done = min(done, work(power, board.limit_w, natural))
        whole = min(whole, work(power, sums.full_w(uuid, list(jobs)), natural))
    hourly = sum(max(0, job.value) * job.share_milli * len(job.on) // 1000 for job in jobs)
    return delayed(power, policy, jobs, hourly, max(0, whole - done))


@given(powered(pending=False), policies(), st.integers(1, 400))
def test_a_tighter_budget_never_leaves_more(power: P, policy: Policy, less: int) -> None:
    looser = plan(snapshot(power), policy)
    tighter = plan(snapshot(replace(power, budget_w=power.budget_w - less)), policy)
    assert looser.power is not None
    assert tighter.power is not None
    assert tighter.power.planned_w <= looser.power.planned_w


@given(any_powered(), policies())
def test_who_may_not_be_stopped_or_lowered_is_not(power: P, policy: Policy) -> None:
    made = plan(snapshot(power), policy)
    reasons = (Reason.SHED_FOR_POWER, Reason.SHED_IN_EMERGENCY)
    for action in made.actions:
        if isinstance(action, RequeueJob) and action.reason in reasons:
            assert may_stop(power, power.world.job(action.job))
    sums = Sums(power, made)
    for uuid, watts in limits(made).items():
        stayers = sums.stayers(uuid)
        if stayers and not all(may_lower(power, job) for job in stayers):
            assert watts >= min(power.board(uuid).limit_w, sums.full_w(uuid, stayers))


# Starts -----------------------------------------------------------------------------------------


@given(any_powered(), policies(backfill=True))
def test_nobody_waits_for_power_that_those_whom_it_outranks_could_leave(power: P, policy: Policy) -> None:
    """Promise 1: at full limits for all who stay, no set of jobs that it may displace is enough."""
    assume(policy.order is Order.CLASS)
    made, power = settled(power, policy)
    assume(not made.awaited)  # who is let in and waits for watts to fall has his watts already
    sums = Sums(power, made)
    waits = dict(zip(made.waits.numbers.tolist(), made.waits.reasons.tolist(), strict=True))
    as_ever = replace(power, is_emergency=False)  # minimum runtimes hold against starts in an emergency too
    full = sum(
        sums.full_w(gpu.uuid, sums.stayers(gpu.uuid))
        if sums.stayers(gpu.uuid)
        else power.board(gpu.uuid).idle_w
        for gpu in power.world.gpus
    )
    for number, code in waits.items():
        job = power.world.job(number)
        if (
            WAIT_REASONS[code] is not Reason.WAITING_FOR_POWER
            or number in made.awaited
            or job.share_milli < 1000
        ):
            continue
        saved = sum(
            max(0, sum(sums.full_w(uuid, list(jobs)) - power.board(uuid).idle_w for uuid in gpus))
            for jobs, gpus in units_of(power)
            if all(each.job_class > job.job_class and may_stop(as_ever, each) for each in jobs)
        )
        boards = [gpu for gpu in power.world.gpus if not sums.is_occupied(gpu.uuid)]
        needs = sorted(sums.full_w(gpu.uuid, [job]) - power.board(gpu.uuid).idle_w for gpu in boards)
        if len(needs) >= job.gpus:  # it may have been given the worst of them
            assert full - saved + sum(needs[-job.gpus :]) > power.budget_w
