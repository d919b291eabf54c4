"""What a GPU used between two readings, whatever its counter says."""

import pytest

from scheduler.control.energy import (
    BRIDGED_S_MAX,
    COUNTER_BACKWARDS,
    COUNTER_JUMPED,
    COUNTER_RESET,
    COUNTER_SILENT,
    GAP,
    PATIENCE_S,
    SILENT_S,
    EnergyMeter,
    Used,
)

WH_MJ = 3_600_000
OLD_MJ = 900 * WH_MJ  # a counter that has counted for hours


def whole(used: tuple[Used, ...]) -> Used:
    """What was used over all of the intervals, each of which begins where the one before ends."""
    assert [one.since_s for one in used[1:]] == [one.until_s for one in used[:-1]]
    return Used(used[0].since_s, used[-1].until_s, sum(one.energy_mj for one in used))


def test_the_counters_difference_is_what_was_used() -> None:
    meter = EnergyMeter(100.0, OLD_MJ, 500.0)
    assert meter.read(101.0, OLD_MJ + 471_123, 480.0) == (Used(100.0, 101.0, 471_123),)
    assert meter.read(103.5, OLD_MJ + 1_471_123, 480.0) == (Used(101.0, 103.5, 1_000_000),)
    assert meter.fault == ""


def test_the_same_reading_says_nothing_new() -> None:
    meter = EnergyMeter(100.0, OLD_MJ, 500.0)
    assert meter.read(100.0, OLD_MJ + 5, 500.0) == ()


def test_a_counter_that_is_read_rarely_is_spread_by_the_draw() -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 100.0)
    for second, power_w in ((1.0, 100.0), (2.0, 500.0), (3.0, 500.0)):
        assert meter.read(second, OLD_MJ, power_w) == ()
    assert meter.read(4.0, OLD_MJ + 1_200_001, 100.0) == (
        Used(0.0, 1.0, 100_000),
        Used(1.0, 2.0, 300_000),
        Used(2.0, 3.0, 500_001),
        Used(3.0, 4.0, 300_000),
    )
    meter.read(5.0, OLD_MJ + 1_200_001, None)
    meter.read(6.0, OLD_MJ + 1_200_001, None)
    last = meter.read(7.0, OLD_MJ + 1_500_001, None)
    assert last == (Used(4.0, 7.0, 300_000),), "nobody knows when"
    assert meter.fault == ""


def test_a_counter_stands_still_for_good_reason_where_nothing_is_drawn() -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 0.0)
    for second in range(1, 4 * int(SILENT_S)):
        meter.read(float(second), OLD_MJ, 0.0)
        assert meter.fault == ""
    meter.read(100.0, OLD_MJ, 80.0)
    meter.read(120.0, OLD_MJ, 80.0)
    assert meter.fault == COUNTER_SILENT


def test_a_gap_of_hours_is_what_the_counter_says() -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 700.0)
    assert meter.read(36_000.0, OLD_MJ + 3000 * WH_MJ, None) == (Used(0.0, 36_000.0, 3000 * WH_MJ),)


def test_without_a_counter_the_draw_is_integrated_as_straight_lines() -> None:
    meter = EnergyMeter(0.0, None, 100.0)
    assert meter.read(2.0, None, 300.0) == (Used(0.0, 2.0, 400_000),)
    assert meter.read(3.0, None, None) == (Used(2.0, 3.0, 300_000),), "the reading that there is"
    assert meter.read(4.0, None, 200.0) == (Used(3.0, 4.0, 200_000),)
    assert meter.fault == ""


@pytest.mark.parametrize(("period_s", "error_max"), [(60.0, 0.001), (10.0, 0.001), (3.7, 0.03)])
def test_a_load_that_comes_and_goes_is_integrated_as_near_as_the_page_says(
    period_s: float, error_max: float
) -> None:
    def watts(at_s: float) -> float:
        return 100.0 if at_s % period_s < period_s / 2 else 700.0

    seconds = round(100 * period_s)  # whole periods, of which each is 400 W on average
    meter = EnergyMeter(0.37, None, watts(0.37))
    used = [
        used
        for second in range(1, seconds + 1)
        for used in meter.read(second + 0.37, None, watts(second + 0.37))
    ]
    assert sum(one.energy_mj for one in used) == pytest.approx(400_000 * seconds, rel=error_max)


def test_without_a_counter_a_gap_is_bridged_only_so_far() -> None:
    meter = EnergyMeter(0.0, None, 100.0)
    assert meter.read(BRIDGED_S_MAX, None, 100.0) == (
        Used(0.0, BRIDGED_S_MAX, round(BRIDGED_S_MAX * 100_000)),
    )
    assert meter.read(2 * BRIDGED_S_MAX + 1, None, 100.0) == (Used(BRIDGED_S_MAX, 2 * BRIDGED_S_MAX + 1, 0),)
    assert meter.fault == GAP


def test_a_counter_that_began_anew_books_what_it_shows_or_what_was_drawn() -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 500.0)
    # Half of what was drawn is on the new counter: the other half was before the driver was loaded.
    assert meter.read(2.0, 500_000, 500.0) == (Used(0.0, 2.0, 1_000_000),)
    assert meter.fault == COUNTER_RESET
    assert meter.read(3.0, 1_000_000, 500.0) == (Used(2.0, 3.0, 500_000),)
    assert meter.fault == ""


def test_a_counter_that_began_anew_in_a_long_gap_books_what_it_shows() -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 500.0)
    assert meter.read(3600.0, 70 * WH_MJ, 500.0) == (Used(0.0, 3600.0, 70 * WH_MJ),)
    assert meter.fault == COUNTER_RESET


def test_until_its_holder_left_a_gpus_driver_was_the_old_one() -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 500.0)
    assert meter.read(3600.0, 70 * WH_MJ, 70.0, held_until_s=600.0) == (
        Used(0.0, 600.0, 600 * 500_000),
        Used(600.0, 3600.0, 70 * WH_MJ),
    )
    assert meter.fault == COUNTER_RESET


def test_after_a_reboot_the_counter_is_known_to_be_new() -> None:
    meter = EnergyMeter(0.0, 10 * WH_MJ, 500.0)
    meter.driver_is_new()
    assert meter.read(300.0, 15 * WH_MJ, 500.0) == (Used(0.0, 300.0, 15 * WH_MJ),)
    assert meter.fault == ""


def test_a_counter_of_32_bits_that_is_full_goes_on() -> None:
    meter = EnergyMeter(0.0, 2**32 - 300_000, 500.0)
    assert meter.read(1.0, 190_000, 500.0) == (Used(0.0, 1.0, 490_000),)
    assert meter.fault == ""


def test_one_that_shows_too_little_for_that_began_anew() -> None:
    meter = EnergyMeter(0.0, 2**32 - 5_000_000, 500.0)
    assert meter.read(1.0, 100_000, 500.0) == (Used(0.0, 1.0, 500_000),)
    assert meter.fault == COUNTER_RESET


@pytest.mark.parametrize(
    ("wrong_mj", "fault"),
    [
        (OLD_MJ - 1_000_000, COUNTER_BACKWARDS),
        (OLD_MJ + 10**12, COUNTER_JUMPED),
        (2**63 - 1, COUNTER_JUMPED),
        (-5, COUNTER_BACKWARDS),
    ],
)
def test_a_wrong_reading_costs_nothing_where_the_next_is_right(wrong_mj: int, fault: str) -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 500.0)
    assert meter.read(1.0, wrong_mj, 500.0) == ()
    assert meter.fault == fault
    assert whole(meter.read(2.0, OLD_MJ + 987_654, 500.0)) == Used(0.0, 2.0, 987_654)
    assert meter.fault == ""


@pytest.mark.parametrize(
    ("wrong_mj", "fault"), [(OLD_MJ // 2, COUNTER_BACKWARDS), (2 * OLD_MJ, COUNTER_JUMPED)]
)
def test_a_counter_that_stays_wrong_is_counted_from_and_the_draw_is_booked(wrong_mj: int, fault: str) -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 500.0)
    for second in range(1, int(PATIENCE_S)):
        assert meter.read(float(second), wrong_mj + second * 500_000, 500.0) == ()
    last_mj = wrong_mj + round(PATIENCE_S) * 500_000
    used = whole(meter.read(PATIENCE_S, last_mj, 500.0))
    assert used == Used(0.0, PATIENCE_S, round(PATIENCE_S * 500_000))
    assert meter.fault == fault
    assert meter.read(PATIENCE_S + 1, last_mj + 500_001, 500.0) == (
        Used(PATIENCE_S, PATIENCE_S + 1, 500_001),
    )


@pytest.mark.parametrize("stuck_mj", [OLD_MJ, None])
def test_a_counter_that_is_silent_for_a_while_says_afterwards_what_was_used(stuck_mj: int | None) -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 500.0)
    assert meter.read(SILENT_S - 1, stuck_mj, 500.0) == ()
    assert meter.fault == "", "it may only be slow"
    assert meter.read(SILENT_S, stuck_mj, 500.0) == ()
    assert meter.fault == COUNTER_SILENT
    used = whole(meter.read(SILENT_S + 20, OLD_MJ + 12_345_678, 500.0))
    assert used == Used(0.0, SILENT_S + 20, 12_345_678)


@pytest.mark.parametrize("stuck_mj", [OLD_MJ, None])
def test_while_a_counter_stays_silent_the_draw_is_booked(stuck_mj: int | None) -> None:
    meter = EnergyMeter(0.0, OLD_MJ, 500.0)
    used = [meter.read(float(second), stuck_mj, 500.0) for second in range(1, 3 * round(PATIENCE_S) + 1)]
    booked_mj = sum(one.energy_mj for reading in used for one in reading)
    assert booked_mj == 3 * PATIENCE_S * 500_000


def test_where_the_clock_was_set_back_the_counter_counts_all_the_same() -> None:
    meter = EnergyMeter(1000.0, OLD_MJ, 500.0)
    assert meter.read(400.0, OLD_MJ + 250_000, 500.0) == (Used(1000.0, 400.0, 250_000),)
    assert meter.read(401.0, OLD_MJ + 750_000, 500.0) == (Used(400.0, 401.0, 500_000),)


def test_nothing_negative_and_nothing_impossible_is_ever_booked() -> None:
    values = (None, 0, -1, 5, OLD_MJ, OLD_MJ + 1, 2**32 - 1, 2**32, 2**53, 2**63, 2**64 - 1)
    for first in values:
        for second in values:
            for third in values:
                meter = EnergyMeter(0.0, first, 500.0)
                for at_s, value in ((1.0, second), (2.0, third), (90.0, first), (91.0, second)):
                    for used in meter.read(at_s, value, 500.0):
                        assert 0 <= used.energy_mj <= 5_000_000 * (used.until_s - used.since_s + 1)


def test_a_clock_set_back_while_nobody_looked_costs_no_energy_and_no_waiting() -> None:
    meter = EnergyMeter(100_000.0, OLD_MJ, 700.0)
    # Twenty seconds at 700 W, and a day back: more than a second could have used.
    assert meter.read(13_620.0, OLD_MJ + 14_000_000, 700.0) == (Used(100_000.0, 13_620.0, 14_000_000),)
    assert meter.read(13_621.0, OLD_MJ + 14_700_000, 700.0) == (Used(13_620.0, 13_621.0, 700_000),)


def test_where_the_clock_was_set_back_a_counter_that_can_not_be_is_not_waited_for() -> None:
    meter = EnergyMeter(100_000.0, OLD_MJ, 700.0)
    (used,) = meter.read(13_620.0, OLD_MJ + 10**12, 700.0)
    assert (used.energy_mj, meter.fault) == (0, COUNTER_JUMPED)
    assert meter.read(13_621.0, OLD_MJ + 10**12 + 700_000, 700.0) == (Used(13_620.0, 13_621.0, 700_000),)
