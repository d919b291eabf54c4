"""Options of a unit, the cheapest set of them, curves: what the shed optimisation is made of."""

import csv
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.jobs import JobClass
from scheduler.model.policy import BURSTY, COMPUTE_BOUND, MEMORY_BOUND
from scheduler.model.power import Curve, curve_of, draw_w
from scheduler.planning.shedding import (
    CELLS_MAX,
    Option,
    Unit,
    cheapest,
    given_back,
    least_slack_us,
    options,
)

HOUR_US = 3_600_000_000
V100 = Path(__file__).resolve().parents[3] / "shared/data/energy/v100_power_cap_clock_throughput_36cells.csv"
CURVE = Curve(((1000, 1000), (900, 970), (700, 850)))


def unit(**fields: object) -> Unit:
    said = {
        "gpus": (0,), "jobs": (1,), "job_class": int(JobClass.MINING), "value": 50_000, "loss": 0,
        "may_stop": True, "yields": True, "may_lower": True, "full_w": (330,), "natural_w": (300,),
        "least_w": (200,), "idle_w": (70,),
    }  # fmt: skip
    return Unit(**{**said, **fields})  # type: ignore[arg-type]


def test_a_board_draws_the_least_of_what_its_job_its_limit_and_its_clock_allow() -> None:
    assert draw_w(300, 700) == 300
    assert draw_w(300, 200) == 200
    assert draw_w(300, 200, clock_w=150) == 150


def test_a_curve_runs_straight_between_its_points_and_ends_at_the_last() -> None:
    assert [CURVE.work_milli(draw) for draw in (1200, 1000, 950, 900, 800, 700, 300)] == [
        1000, 1000, 985, 970, 910, 850, 850,
    ]  # fmt: skip
    assert CURVE.least_milli == 700


def test_options_go_from_full_limits_along_the_curve_to_a_stop() -> None:
    found = options(unit(), CURVE, HOUR_US)
    assert [option.limits_w for option in found] == [
        (330,), (300,), (285,), (270,), (255,), (240,), (225,), (210,), None,
    ]  # fmt: skip
    assert [option.gain_w for option in found] == [0, 30, 45, 60, 75, 90, 105, 120, 260]
    assert found[-2].cost // 16 == 7_500  # 15 % of the work of 0.05 USD an hour
    assert found[-1].cost // 16 == 50_000


def test_of_a_miner_at_its_best_point_only_what_is_given_up_from_there_counts() -> None:
    found = options(unit(full_w=(270,)), CURVE, HOUR_US)  # 900 thousandths of its draw, 970 of its work
    assert [option.limits_w for option in found] == [(270,), (255,), (240,), (225,), (210,), None]
    assert found[-2].cost // 16 == 6_000  # from 97 to 85 % of the work of 0.05 USD an hour


def test_who_would_be_too_late_loses_all_that_its_deadline_pays() -> None:
    due = unit(stake=400_000, slack_us=1000 * 1_000_000)
    costs = {option.limits_w: option.cost // 16 for option in options(due, CURVE, HOUR_US)}
    plain = {option.limits_w: option.cost // 16 for option in options(unit(), CURVE, HOUR_US)}
    # At 210 W it does 850 thousandths of the hour's work: 540 s behind, which it can be. A stop is an hour.
    in_time = [watts for watts, cost in costs.items() if cost == plain[watts]]
    assert in_time == [(330,), (300,), (285,), (270,), (255,), (240,), (225,), (210,)]
    assert costs[None] == 400_000
    tight = {o.limits_w: o.cost // 16 for o in options(unit(stake=400_000, slack_us=0), CURVE, HOUR_US)}
    assert tight[(330,)] == 0
    assert tight[(300,)] == plain[(300,)], "the margin is no delay"
    assert {cost for limits, cost in tight.items() if limits not in ((330,), (300,))} == {400_000}
    assert options(unit(value=900_000, stake=400_000), CURVE, HOUR_US)[-1].cost // 16 == 900_000


def test_a_unit_is_due_when_the_first_of_its_jobs_is() -> None:
    assert least_slack_us([(0, 0), (5, 700), (5, 900)]) == 700
    assert least_slack_us([(0, 0)]) == 0


def test_nothing_is_offered_below_what_a_curve_knows_or_a_board_takes() -> None:
    assert options(unit(least_w=(280,)), CURVE, HOUR_US)[-2].limits_w == (280,)
    assert options(unit(may_lower=False), CURVE, HOUR_US)[1:] == [Option(260, 50_000 * 16 + 6, None)]
    pinned = options(unit(may_stop=False), CURVE, HOUR_US)[-1]
    assert (pinned.limits_w, pinned.cost // 16) == ((200,), 50_000), "all work counts as lost there"


def test_a_limit_above_the_draw_saves_nothing() -> None:
    assert [option.limits_w for option in options(unit(least_w=(330,)), CURVE, HOUR_US)] == [(330,), None]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 50)), min_size=0, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 150),
)
def test_the_cheapest_set_is_the_one_that_a_search_of_all_finds(
    choices: list[list[tuple[int, int]]], need_w: int
) -> None:
    units = [[Option(0, 0, (1,)), *(Option(gain, cost, None) for gain, cost in unit)] for unit in choices]
    found = cheapest(units, need_w)
    fitting = [c for c in product(*units) if sum(option.gain_w for option in c) >= need_w]
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(option.gain_w for option in found.options) >= need_w
    assert sum(o.cost for o in found.options) == min(sum(option.cost for option in c) for c in fitting)


def test_a_site_is_shed_in_coarser_steps_that_still_cover_the_need() -> None:
    units = [[Option(0, 0, (1,)), Option(501 + n % 7, 10 + n % 5, None)] for n in range(400)]
    need_w = 20 * CELLS_MAX
    found = cheapest(units, need_w)
    assert found is not None
    saved = sum(option.gain_w for option in found.options)
    assert need_w <= saved <= need_w * 1.05


def test_what_was_saved_too_much_goes_back_to_who_is_worth_most_and_a_gang_shares_it() -> None:
    miner, gang = unit(), unit(gpus=(1, 2), jobs=(2,), value=4_000_000, full_w=(330, 330))
    lowered = [Option(120, 0, (210,)), Option(240, 0, (210, 210))]
    assert [o.limits_w for o in given_back((miner, gang), lowered, 41)] == [(211,), (230, 230)]


@pytest.mark.skipif(not V100.exists(), reason="needs the published table beside the project")
@pytest.mark.parametrize(
    ("load", "curve"),
    [
        ("matmul_compute_bound", COMPUTE_BOUND),
        ("inference_memory_bound", MEMORY_BOUND),
        ("bursty_alternating", BURSTY),
    ],
)
def test_the_default_curves_are_the_published_ones(load: str, curve: tuple[tuple[float, float], ...]) -> None:
    with V100.open() as file:
        rows = [row for row in csv.DictReader(file) if row["workload"] == load]
    figures = ("pcap_w", "sm_target_mhz", "power_mean_w", "iters_per_s")
    at = {
        (int(limit), int(clock)): (float(watts), float(work))
        for limit, clock, watts, work in ([row[name] for name in figures] for row in rows)
    }
    watts, work = at[300, 1380]
    for (draw, done), limit in zip(curve, (300, 200, 150), strict=True):
        assert draw == pytest.approx(at[limit, 1380][0] / watts, abs=0.001)
        assert done == pytest.approx(at[limit, 1380][1] / work, abs=0.001)
    # The lowest clock is a trap: what it leaves of the work is less than what it leaves of the watts. Nothing
    # that a plan may choose is: a stop would save more for each unit of work.
    trap_w, trap_work = at[300, 405]
    assert trap_work / work < trap_w / watts
    for milli in range(curve_of(curve).least_milli, 1001):
        assert curve_of(curve).work_milli(milli) >= milli - 1
