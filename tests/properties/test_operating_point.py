"""A miner's best limit against a search of the curve, and what a plan makes of it."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.actions import RequeueJob, SetPowerLimit, StartJob
from scheduler.model.policy import COMPUTE_BOUND, MEMORY_BOUND, Policy
from scheduler.model.power import UNLIMITED_W, Curve
from scheduler.model.snapshot import UNKNOWN
from scheduler.planning.economics import DEAD_BAND_MILLI, operating_point
from scheduler.planning.planner import plan
from tests.fakes import power as fakes
from tests.fakes import worlds as plain
from tests.fakes.power import B, P
from tests.fakes.worlds import MINING, PENDING, TRAINING, J
from tests.properties.strategies import policies
from tests.properties.test_planner_power import powered


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    draws = sorted(draw(st.sets(st.integers(200, 999), max_size=4)), reverse=True)
    works = sorted(
        draw(st.lists(st.integers(0, 1000), min_size=len(draws), max_size=len(draws))), reverse=True
    )
    return Curve(((1000, 1000), *zip(draws, works, strict=True)))


CASES = {
    "curve": curves(),
    "natural_w": st.integers(1, 800),
    "gross": st.integers(0, 3_000_000),
    "microusd_per_kwh": st.integers(-500_000, 2_000_000),
    "least_w": st.integers(0, 400),
}


def net(curve: Curve, natural_w: int, gross: int, price: int, watts: int) -> float:
    """What is earned at a draw, by straight lines between the points; micro-USD an hour."""
    part = 1000 * watts / natural_w
    work = next(
        high[1] - (high[0] - part) * (high[1] - low[1]) / (high[0] - low[0])
        for high, low in pairwise(((1001.0, 1000), *curve.points))
        if part >= low[0]
    )
    return gross * min(1000.0, work) / 1000 - watts * price / 1000


@given(**CASES)
def test_no_limit_on_the_curve_earns_more(
    curve: Curve, natural_w: int, gross: int, microusd_per_kwh: int, least_w: int
) -> None:
    best = operating_point(curve, natural_w, gross, microusd_per_kwh, least_w)
    lowest_w = max(least_w, -(-natural_w * curve.least_milli // 1000))
    all_w = [natural_w, *range(lowest_w, natural_w)]
    most = max(net(curve, natural_w, gross, microusd_per_kwh, watts) for watts in all_w)
    # Work is in whole thousandths, and a limit in whole watts lies up to one above its corner.
    coarse = gross * (1 + 1000 / natural_w) / 1000 + abs(microusd_per_kwh) / 1000 + 2
    assert best.net >= most - coarse
    chosen_w = natural_w if best.limit_w == UNKNOWN else best.limit_w
    assert chosen_w in all_w
    assert abs(best.net - net(curve, natural_w, gross, microusd_per_kwh, chosen_w)) <= coarse


@given(**CASES)
def test_of_the_corners_it_is_the_best_exactly(
    curve: Curve, natural_w: int, gross: int, microusd_per_kwh: int, least_w: int
) -> None:
    best = operating_point(curve, natural_w, gross, microusd_per_kwh, least_w)
    tried = {UNKNOWN: gross - (2 * natural_w * microusd_per_kwh + 1000) // 2000}
    for draw, _ in curve.points:
        watts = max(least_w, -(-natural_w * draw // 1000))
        if watts < natural_w:
            work = curve.work_milli(watts * 1000 // natural_w)
            tried[watts] = gross * work // 1000 - (2 * watts * microusd_per_kwh + 1000) // 2000
    assert best.net == max(tried.values())
    assert tried[best.limit_w] == best.net


@given(**CASES, steps=st.lists(st.integers(-30_000, 30_000), max_size=12))
def test_the_present_limit_stays_unless_another_is_clearly_better(
    curve: Curve, natural_w: int, gross: int, microusd_per_kwh: int, least_w: int, steps: list[int]
) -> None:
    at_w = UNKNOWN
    for step in steps:
        microusd_per_kwh += step
        best = operating_point(curve, natural_w, gross, microusd_per_kwh, least_w)
        now = operating_point(curve, natural_w, gross, microusd_per_kwh, least_w, at_w)
        assert best.net - now.net <= gross * DEAD_BAND_MILLI // 1000
        if now.limit_w != at_w:
            assert now == best
        at_w = now.limit_w


@given(curves(), st.integers(100, 800), st.integers(0, 3_000_000))
def test_dearer_energy_never_raises_the_limit(curve: Curve, natural_w: int, gross: int) -> None:
    limits = [
        natural_w
        if (point := operating_point(curve, natural_w, gross, price, 0)).limit_w == UNKNOWN
        else point.limit_w
        for price in range(-100_000, 1_000_000, 50_000)
    ]
    assert limits == sorted(limits, reverse=True)


def test_a_v100_has_three_useful_states() -> None:
    """Break-even 60 USD/MWh at full draw: full below 17 USD/MWh, then two efficient points, off at 75."""
    gross = 60 * 223  # micro-USD an hour at 223 W
    curve = Curve(tuple((round(1000 * draw), round(1000 * work)) for draw, work in MEMORY_BOUND))

    def at(usd_per_mwh: int) -> tuple[int, bool]:
        point = operating_point(curve, 223, gross, 1000 * usd_per_mwh, 100)
        return point.limit_w, point.net > 0

    assert [at(price) for price in (-20, 10, 25, 50, 70, 74, 80)] == [
        (UNKNOWN, True), (UNKNOWN, True), (197, True), (148, True), (148, True), (148, True), (148, False),
    ]  # fmt: skip
    compute = Curve(tuple((round(1000 * draw), round(1000 * work)) for draw, work in COMPUTE_BOUND))
    assert operating_point(compute, 223, gross, 50_000, 100).limit_w == 159
    assert operating_point(compute, 223, gross, 50_000, 180).limit_w == 180, (
        "never below what the board takes"
    )


# In a plan --------------------------------------------------------------------------------------


def unlimited(power: P) -> P:
    """Nobody sets a budget: only miners are limited, and no draw is on its way to a lower one."""
    no_event = replace(power, promised_w=None, is_emergency=False, lead_milli=0)
    return replace(no_event, budget_w=UNLIMITED_W, margin_milli=UNLIMITED_W)


@given(powered(), policies())
def test_without_a_budget_points_change_limits_and_nothing_else(power: P, policy: Policy) -> None:
    world, power = power.world, replace(power, suspend_us={})  # nobody is frozen without a budget
    made = plan(fakes.snapshot(unlimited(power)), policy)
    bare = plan(plain.snapshot(world), policy)
    assert [one for one in made.actions if not isinstance(one, SetPowerLimit)] == list(bare.actions)
    assert made.promise == bare.promise
    assert made.waits.numbers.tolist() == bare.waits.numbers.tolist()
    assert made.waits.reasons.tolist() == bare.waits.reasons.tolist()
    assert made.power is not None
    started = {uuid: one.job for one in made.actions if isinstance(one, StartJob) for uuid in one.gpus}
    for uuid, watts in fakes.limits(made).items():
        board = power.board(uuid)
        on = [
            job.number
            for job in world.jobs
            if uuid in job.on and job.state in ("STARTING", "RUNNING", "SUSPENDED")
        ]
        on += [started[uuid]] if uuid in started else []
        points_w = [
            min(board.limit_w_max, max(best_w, board.limit_w_min)) for best_w in power.best_w.values()
        ]
        best_w = power.best_w.get(on[0]) if len(on) == 1 else None
        if not on:  # who claims it waits for other boards
            assert watts in (board.limit_w_max, *points_w)
        elif best_w is None:
            assert watts == board.limit_w_max, "who is no such miner gets all that the board takes"
        else:
            assert watts == min(board.limit_w_max, max(best_w, board.limit_w_min))


@given(powered())
def test_under_a_budget_too_no_limit_rises_above_the_best_point(power: P) -> None:
    made = plan(fakes.snapshot(power), Policy())
    for uuid, watts in fakes.limits(made).items():
        board, on = power.board(uuid), [job for job in power.world.jobs if uuid in job.on]
        if len(on) == 1 and on[0].number in power.best_w and watts > board.limit_w:
            assert watts <= max(power.best_w[on[0].number], board.limit_w_min)


def test_a_miner_starts_at_its_best_point_and_training_takes_the_board_whole() -> None:
    miner = J(1, job_class=MINING, value=50_000)
    power = unlimited(P(plain.W(jobs=(miner,), gpus=plain.gpus(1)), natural_w={1: 400}, best_w={1: 352}))
    first = plan(fakes.snapshot(power), Policy())
    assert fakes.limits(first) == {"GPU-0": 352}
    after = fakes.applied(power, first)
    assert not plan(fakes.snapshot(after), Policy()).actions, "then it rests"
    gone = replace(after, world=plain.W(jobs=(J(2, job_class=TRAINING, state=PENDING),), gpus=plain.gpus(1)))
    assert fakes.limits(plan(fakes.snapshot(replace(gone, best_w={})), Policy())) == {"GPU-0": 700}


def test_a_shed_goes_on_from_the_best_point() -> None:
    """Two miners of 400 W; with the points they draw what the budget leaves, and nobody is stopped."""
    jobs = tuple(plain.running(n, f"GPU-{n}", job_class=MINING, value=50_000) for n in range(2))
    jobs = tuple(replace(job, number=job.number + 1) for job in jobs)
    power = P(
        plain.W(jobs=jobs, gpus=plain.gpus(2)),
        budget_w=700,
        natural_w={1: 400, 2: 400},
        best_w={1: 352, 2: 352},
        boards={f"GPU-{n}": B(limit_w=352) for n in range(2)},
    )
    made = plan(fakes.snapshot(power), Policy())
    assert not [one for one in made.actions if isinstance(one, RequeueJob)]
    assert sum(fakes.limits(made).get(f"GPU-{n}", 352) for n in range(2)) <= 700
