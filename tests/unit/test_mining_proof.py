"""What accepted shares prove: the wait until their stop means something, counters, hashprices."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.effects.feed import FEED_BYTES_MAX
from scheduler.effects.hashprice_feed import parse_hashprices
from scheduler.errors import FeedError
from scheduler.model.mining import (
    HASHPRICES_MAX,
    PATIENCE_S_MIN,
    PATIENCE_S_UNKNOWN,
    SILENCE_CHANCE,
    Hashprice,
    MinerReading,
    Proof,
    checked_hashprices,
    unit_hs,
)

LOOK_S = 10.0


def mined(gap_s: float, looks: int, seed: int = 1, proof: Proof | None = None) -> Proof:
    """The proof of a miner whose shares come by chance, one in so many seconds."""
    chance, proof = random.Random(seed), proof or Proof()
    at_s, accepted, next_s = (
        proof.at_s or 0.0,
        proof.accepted,
        (proof.at_s or 0.0) + chance.expovariate(1 / gap_s),
    )
    for _ in range(looks):
        at_s += LOOK_S
        while next_s <= at_s:
            accepted += 1
            next_s += chance.expovariate(1 / gap_s)
        proof = proof.after(MinerReading(30e6, accepted), at_s)
    return proof


def silent(proof: Proof, seconds: float) -> Proof:
    """The proof after so long without a share."""
    assert proof.at_s is not None
    for _ in range(round(seconds / LOOK_S)):
        proof = proof.after(MinerReading(30e6, proof.accepted), proof.at_s + LOOK_S)
    return proof


def test_without_a_share_ever_it_takes_the_declared_hour() -> None:
    proof = Proof().after(MinerReading(30e6, 0), 0.0)
    assert proof.patience_s == PATIENCE_S_UNKNOWN
    assert not silent(proof, PATIENCE_S_UNKNOWN).is_barren
    assert silent(proof, PATIENCE_S_UNKNOWN + LOOK_S).is_barren


@pytest.mark.parametrize("shares", [30, 100, 300])
def test_the_wait_is_that_of_a_gap_once_in_a_million(shares: int) -> None:
    """The gap's predictive distribution: what is integrated here over all rates is the formula's."""
    gap_s = 120.0
    proof = Proof(at_s=0.0, shares=float(shares), over_s=shares * gap_s)
    # P(gap > t) = E[exp(-rate t)] over Gamma(n, T), by chance.
    chance = random.Random(7)
    over = [
        math.exp(-chance.gammavariate(shares, 1 / (shares * gap_s)) * proof.patience_s)
        for _ in range(200_000)
    ]
    assert sum(over) / len(over) == pytest.approx(SILENCE_CHANCE, rel=0.5)


def test_few_shares_make_for_a_longer_wait_than_many_and_seldom_ones_for_a_longer_than_frequent() -> None:
    few, many = (Proof(at_s=0.0, shares=n, over_s=60.0 * n).patience_s for n in (5.0, 500.0))
    assert few > 2 * many
    assert many == pytest.approx(-math.log(SILENCE_CHANCE) * 60.0, rel=0.05)
    assert Proof(at_s=0.0, shares=500.0, over_s=500.0).patience_s == PATIENCE_S_MIN


@pytest.mark.parametrize("gap_s", [5.0, 30.0, 120.0, 600.0])
def test_a_miner_whose_shares_come_by_chance_is_not_doubted_for_days_and_one_that_stops_is_found(
    gap_s: float,
) -> None:
    proof = Proof()
    for day in range(5):
        for hour in range(24):
            proof = mined(gap_s, 360, seed=24 * day + hour, proof=proof)
            assert not proof.is_barren
    assert silent(proof, proof.patience_s + 2 * LOOK_S).is_barren
    assert proof.patience_s <= max(PATIENCE_S_UNKNOWN, 60 * gap_s)


def test_a_pool_that_makes_shares_harder_is_followed() -> None:
    proof = mined(1.0, 30)
    for gap_s in (10.0, 40.0):  # of the hour before nothing is left after some hours
        proof = mined(gap_s, 2000, seed=3, proof=proof)
        assert not proof.is_barren
    assert proof.over_s / proof.shares == pytest.approx(40.0, rel=0.3)


def test_a_share_brings_it_back_at_once() -> None:
    proof = silent(mined(10.0, 100), 3600.0)
    assert proof.is_barren
    assert not proof.after(MinerReading(30e6, proof.accepted + 1), proof.at_s + LOOK_S).is_barren


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=30))
def test_counters_that_begin_anew_count_what_they_show(pairs: list[tuple[int, int]]) -> None:
    proof, at_s, came, refused = Proof(), 0.0, 0, 0
    before = pairs[0]
    for pair in pairs:
        proof = proof.after(MinerReading(1.0, *pair), at_s)
        at_s += LOOK_S
        came += pair[0] - before[0] if pair[0] >= before[0] else pair[0]
        refused += pair[1] - before[1] if pair[1] >= before[1] else pair[1]
        before = pair
    assert (proof.accepted_sum, proof.refused_sum) == (came, refused)
    assert 0.0 <= proof.accepted_ratio <= 1.0
    assert proof.silent_s >= 0.0


def test_another_attempt_goes_on_where_the_last_one_was_silent() -> None:
    proof = silent(Proof().after(MinerReading(30e6, 0), 0.0), 3000.0)
    again = proof.begun_again().after(MinerReading(30e6, 0), 9000.0)
    assert again.silent_s == proof.silent_s
    assert silent(again, 700.0).is_barren
    assert proof.forgiven().silent_s == 0.0


def test_time_in_which_nobody_looked_is_no_silence_and_a_clock_set_back_none_either() -> None:
    proof = mined(10.0, 100)
    later = proof.after(MinerReading(30e6, proof.accepted), proof.at_s + 86_400.0)
    assert later.silent_s <= proof.silent_s + 60.0
    back = later.after(MinerReading(30e6, proof.accepted), 0.0)
    assert back.silent_s == later.silent_s


def test_a_part_of_the_shares_that_is_refused_takes_its_part_of_the_hashrate() -> None:
    proof = Proof().after(MinerReading(30e6, 0, 0), 0.0).after(MinerReading(30e6, 90, 10), LOOK_S)
    assert proof.accepted_ratio == pytest.approx(0.9)
    assert proof.after(MinerReading(None, None), 2 * LOOK_S) == proof, "who says nothing proves nothing"


# Hashprices -------------------------------------------------------------------------------------


def test_units_of_hashrate() -> None:
    units = ("H/s", "kH/s", "Mh/s", "TH/s", "sol/s", "kSol/s", "g/s", " GH/s ")
    assert [unit_hs(text) for text in units] == [
        1.0, 1e3, 1e6, 1e12, 1.0, 1e3, 1.0, 1e9,
    ]  # fmt: skip
    assert [unit_hs(text) for text in ("", "MH", "xH/s", "MH/s/s", "W")] == [None] * 5


def test_what_a_hashrate_earns() -> None:
    assert Hashprice("kawpow", "MH/s", 0.024, 0.0).usd_per_hour(30e6) == pytest.approx(0.03)


def test_csv_and_json_make_the_same_hashprices() -> None:
    wanted = (Hashprice("kawpow", "MH/s", 0.0105, 1_767_225_600.0), Hashprice("rx/0", "kH/s", 0.031, 2e9))
    csv = b"algorithm,unit,usd_per_day,at\nRX/0,kH/s,0.031,\nkawpow,MH/s,0.0105,2026-01-01T00:00:00Z\n"
    assert parse_hashprices(csv, "f", 2e9) == wanted
    json = (
        b'[{"algorithm": "rx/0", "unit": "kH/s", "usd_per_day": "0.031"},'
        b'{"algorithm": "kawpow", "unit": "MH/s", "usd_per_day": 0.0105, "at": 1767225600}]'
    )
    assert parse_hashprices(json, "f", 2e9) == wanted


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "header must be of algorithm"),
        (b"<html>", "header must be"),
        (b"algorithm,unit,usd_per_day\n", "no hashprice in it"),
        (b"algorithm,unit,usd_per_day\nkawpow,MH/s,dear\n", "row 1: 'dear' is no number"),
        (b"algorithm,unit,usd_per_day\nkawpow,MH,1\n", "no unit of hashrate"),
        (b"algorithm,unit,usd_per_day\nkawpow,MH/s,nan\n", "must lie between 0"),
        (b"algorithm,unit,usd_per_day\nkawpow,MH/s,1e9\n", "must lie between 0"),
        (b"algorithm,unit,usd_per_day\nkawpow,MH/s,-1\n", "must lie between 0"),
        (b"algorithm,unit,usd_per_day\nkawpow,MH/s,1\nKawPow,MH/s,2\n", "two hashprices"),
        (b"algorithm,unit,usd_per_day\nkaw pow,MH/s,1\n", "no algorithm"),
        (b"algorithm,unit,usd_per_day,at\nkawpow,MH/s,1,yesterday\n", "no time"),
        (b'[{"algorithm": 5, "unit": "H/s", "usd_per_day": 1}]', "needs an algorithm"),
        (b'{"kawpow": 1}', "array of objects"),
        (b"x" * (FEED_BYTES_MAX + 1), "larger than"),
    ],
)
def test_what_is_no_table_of_hashprices_is_refused_with_the_row(body: bytes, words: str) -> None:
    with pytest.raises(FeedError, match=words):
        parse_hashprices(body, "f", 0.0)


def test_hashprices_have_a_limit_and_none_is_of_the_future() -> None:
    with pytest.raises(ValueError, match="more than 256"):
        checked_hashprices(Hashprice(f"a{n}", "H/s", 1.0, 0.0) for n in range(HASHPRICES_MAX + 1))
    (one,) = parse_hashprices(b"algorithm,unit,usd_per_day,at\nk,H/s,1,9e9\n", "f", 100.0)
    assert one.at_s == 100.0
