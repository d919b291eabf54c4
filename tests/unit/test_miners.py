"""Miners' APIs as they answer and as they misbehave: real servers on loopback."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.effects.miners import ANSWER_S_MAX, HASHRATE_HS_MAX, read_miner, reading_of
from scheduler.errors import FeedError
from scheduler.model.mining import Miner, MinerApi, MinerReading
from tests.harness.rigs import Rig

ALL = pytest.mark.parametrize("api", MinerApi)


async def read(rig: Rig, token: str = "", timeout_s: float = 20.0, algorithm: str = "kawpow") -> MinerReading:
    return await read_miner(Miner(rig.api, rig.port, algorithm), rig.port, token, timeout_s)


@ALL
async def test_each_miner_says_its_hashrate_and_its_shares(api: MinerApi) -> None:
    with Rig(api, hashrate_hs=31.5e6, accepted=12, refused=3) as rig:
        assert await read(rig) == MinerReading(31.5e6, 12, 3)


async def test_a_token_goes_along_and_without_it_the_answer_says_what_is_wrong() -> None:
    with Rig(MinerApi.XMRIG, token="secret") as rig:
        assert (await read(rig, "secret")).accepted == 0
        with pytest.raises(FeedError, match="answered 401 Unauthorized") as caught:
            await read(rig, "other")
        assert "other" not in str(caught.value)
        with pytest.raises(FeedError, match="no header takes"):
            await read(rig, "secret\r\nX-Other: 1")


async def test_a_unit_that_changes_changes_nothing() -> None:
    with Rig(MinerApi.LOLMINER, hashrate_hs=61.4e6) as rig:
        for unit in ("Mh/s", "kh/s", "h/s", "Gh/s"):
            rig.unit = unit
            assert (await read(rig)).hashrate_hs == pytest.approx(61.4e6)
        rig.unit = "furlongs"
        assert (await read(rig)) == MinerReading(None, 0, 0)


@pytest.mark.parametrize(
    ("api", "overrides", "wanted"),
    [
        (MinerApi.T_REX, {"hashrate": None, "accepted_count": "7"}, MinerReading(None, 7)),
        (MinerApi.T_REX, {"hashrate": -1, "accepted_count": -1}, MinerReading(None, None)),
        (
            MinerApi.T_REX,
            {"hashrate": 2 * HASHRATE_HS_MAX, "accepted_count": 1e300},
            MinerReading(None, None),
        ),
        (MinerApi.T_REX, {"hashrate": True, "accepted_count": [1]}, MinerReading(None, None)),
        (MinerApi.LOLMINER, {"Algorithms": None}, MinerReading(None, None)),
        (MinerApi.LOLMINER, {"Algorithms": [1, "two"]}, MinerReading(None, None)),
        (MinerApi.RIGEL, {"hashrate": 5, "solution_stat": {}}, MinerReading(None, None)),
        (MinerApi.XMRIG, {"hashrate": {"total": [None, None, None]}}, MinerReading(None, 0)),
        (MinerApi.XMRIG, {"hashrate": {"total": [5.0, None, None]}}, MinerReading(5.0, 0)),
        (MinerApi.XMRIG, {"hashrate": {"total": []}, "results": 3}, MinerReading(None, None)),
        (MinerApi.CGMINER, {"SUMMARY": []}, MinerReading(None, None)),
        (
            MinerApi.CGMINER,
            {"SUMMARY": [{"GHS 5s": "13,500.00", "GHS av": 13_000, "Accepted": 4}]},
            MinerReading(13.5e12, 4),
        ),
        (MinerApi.CGMINER, {"SUMMARY": [{"KHS av": 910.5, "Accepted": 4}]}, MinerReading(910.5e3, 4)),
    ],
)
async def test_what_is_missing_or_no_number_is_not_said(
    api: MinerApi, overrides: dict[str, Any], wanted: MinerReading
) -> None:
    with Rig(api, overrides=overrides) as rig:
        assert await read(rig) == wanted


async def test_of_two_algorithms_that_of_the_job_counts() -> None:
    both = {
        "hashrate": {"kawpow": 30e6, "zil": 90e6},
        "solution_stat": {"kawpow": {"accepted": 5}, "zil": {"accepted": 1}},
    }
    with Rig(MinerApi.RIGEL, overrides=both) as rig:
        assert await read(rig, algorithm="KawPow") == MinerReading(30e6, 5)
        assert await read(rig, algorithm="octopus") == MinerReading(None, None)


@ALL
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("html", "did not answer in JSON"),
        ("garbage", "can't be read|did not answer in JSON"),
        ("closes", "can't be read|did not answer in JSON"),
        ("hangs", "did not answer within 0.4 s"),
        ("huge", "larger than 512 KiB"),
    ],
)
async def test_a_server_that_misbehaves_is_given_up_with_the_reason(
    api: MinerApi, mode: str, words: str
) -> None:
    with Rig(api, mode=mode) as rig, pytest.raises(FeedError, match=words):
        await read(rig, timeout_s=0.4 if mode == "hangs" else 20.0)


@pytest.mark.parametrize(
    ("mode", "words"),
    [("500", "answered 500"), ("dribbles", "did not answer within"), ("huge-length", "larger than 512 KiB")],
)
async def test_http_that_misbehaves_is_given_up_with_the_reason(mode: str, words: str) -> None:
    with Rig(MinerApi.T_REX, mode=mode) as rig, pytest.raises(FeedError, match=words):
        await read(rig, timeout_s=0.4 if mode == "dribbles" else 10.0)


async def test_an_answer_in_chunks_is_read() -> None:
    with Rig(MinerApi.RIGEL, mode="chunked", accepted=3) as rig:
        assert (await read(rig)).accepted == 3


async def test_a_port_where_nobody_listens_says_so() -> None:
    with Rig(MinerApi.T_REX) as rig:
        pass
    with pytest.raises(FeedError, match=r"t-rex on 127\.0\.0\.1"):
        await read(rig)
    assert ANSWER_S_MAX == 15.0


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
NESTED = st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=5), PLAIN, max_size=3)
JSON = (
    PLAIN | NESTED | st.lists(NESTED, max_size=3) | st.dictionaries(st.text(max_size=5), NESTED, max_size=3)
)


@given(
    st.sampled_from(MinerApi),
    st.dictionaries(
        st.sampled_from(
            [
                "hashrate",
                "accepted_count",
                "Algorithms",
                "solution_stat",
                "results",
                "SUMMARY",
                "rejected_count",
            ]
        ),
        JSON,
    ),
)
def test_whatever_json_a_miner_sends_makes_a_reading(api: MinerApi, said: dict[str, Any]) -> None:
    reading = reading_of(api, said, "kawpow")
    assert reading.hashrate_hs is None or 0 <= reading.hashrate_hs <= HASHRATE_HS_MAX
    assert reading.accepted is None or reading.accepted >= 0
    assert reading.refused >= 0
