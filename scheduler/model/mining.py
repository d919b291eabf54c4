"""Mining as values: where a miner tells what it does, what a hash earns, and what accepted shares prove.

A hashrate is what a miner says of itself; a share that the pool accepted is work that is paid. So a hashrate
counts as long as shares keep coming, by the part of them that was accepted. How long none may come follows
from the rate at which they did: shares are a Poisson process. With n of them seen in T seconds, and nothing
known before, the next takes longer than t with probability (T / (T + t))^n (the predictive distribution of a
gap under a Gamma posterior of the rate). The wait is the t at which that is one in a million.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

HASHPRICES_MAX = 256
# On each GPU of a node an instance has a port of its own; so many GPUs and MIG instances no node has.
MINER_PORTS = 128
MINER_PORT_MAX = 65_535 - MINER_PORTS
ALGORITHM_CHARACTERS_MAX = 64
# Beyond what any unit earns in a day; a larger one is a wrong unit.
USD_PER_DAY_MAX = 1_000_000.0
HOURS_PER_DAY = 24.0

# A silence that happens by chance once in a million gaps proves that something is wrong: with a share every
# ten seconds on each of 8 GPUs that is two weeks of mining for each false alarm.
SILENCE_CHANCE = 1e-6
# A pool that makes shares harder bit by bit lets them come up to some hundred times more seldom.
PATIENCE_S_MIN = 600.0
# Before the first share nothing is known of the rate; and few shares tell little of it.
PATIENCE_S_UNKNOWN = 3600.0
PATIENCE_GAPS_MAX = 30.0
# Shares that are longer ago count ever less: the pool changes how hard they are.
SHARES_FORGOTTEN_S = 3600.0
# Between two looks no more than this counts as silence: who did not look did not see that none came.
LOOK_S_MAX = 60.0
# Fewer shares than these say nothing of which part is accepted.
SHARES_JUDGED_MIN = 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,63}")
_UNIT = re.compile(r"([kmgtpe]?)(h|sol|g)/s", re.IGNORECASE)
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}


class MinerApi(StrEnum):
    """Which miner's API it is."""

    T_REX = "t-rex"
    LOLMINER = "lolminer"
    RIGEL = "rigel"
    XMRIG = "xmrig"
    CGMINER = "cgminer"


@dataclass(frozen=True, slots=True)
class Miner:
    """Where a mining job's API listens, on 127.0.0.1, and what it mines."""

    api: MinerApi
    port: int  # of the instance on GPU 0; on GPU n it is n higher
    algorithm: str  # a row of the hashprices
    fee_ratio: float = 0.0  # of the shares' worth, kept by the pool and by the miner's author
    token_variable: str = ""  # of the job's environment: the variable that holds the API's token


@dataclass(frozen=True, slots=True)
class MinerReading:
    """What a miner says; None = it doesn't. Shares are counted since it started."""

    hashrate_hs: float | None = None
    accepted: int | None = None
    refused: int = 0  # rejected, stale, invalid


@dataclass(frozen=True, slots=True)
class Hashprice:
    """What one unit of hashrate earns in a day, before fees."""

    algorithm: str  # lower case
    unit: str
    usd_per_day: float
    at_s: float  # when that was so

    def usd_per_hour(self, hashrate_hs: float) -> float:
        """What a hashrate earns."""
        return self.usd_per_day / HOURS_PER_DAY * hashrate_hs / (unit_hs(self.unit) or math.inf)


class MinerDoubt(StrEnum):
    """What is not known of a miner, so that its value is not what it earns."""

    API = "api"  # it does not answer
    FIGURES = "figures"  # it answers, and says no hashrate or no shares
    SHARES = "shares"  # none accepted for longer than chance explains: worth nothing
    IMPLAUSIBLE = "implausible"  # it would be worth more than any miner is
    HASHPRICE = "hashprice"  # none of its algorithm, or too old a one
    PORT = "port"  # another job names the same


def unit_hs(unit: str) -> float | None:
    """Hashes a second of a unit such as `MH/s`, `ksol/s` or `g/s`; None: it is none."""
    found = _UNIT.fullmatch(unit.strip())
    return _PREFIXES[found[1].lower()] if found else None


def is_algorithm(name: str) -> bool:
    """Whether an algorithm may be called so."""
    return _NAME.fullmatch(name) is not None


def checked_hashprices(hashprices: Iterable[Hashprice]) -> tuple[Hashprice, ...]:
    """The hashprices by algorithm, in lower case.

    Raises:
        ValueError: One is none, or an algorithm has two; the words say which.
    """
    found: dict[str, Hashprice] = {}
    for place, one in enumerate(hashprices, start=1):
        if place > HASHPRICES_MAX:
            raise ValueError(f"more than {HASHPRICES_MAX} hashprices; send those that are mined here")
        if not is_algorithm(one.algorithm):
            raise ValueError(
                f"hashprice {place}: {one.algorithm[:80]!r} is no algorithm; give 1 to "
                f"{ALGORITHM_CHARACTERS_MAX} letters, digits and ._/+-"
            )
        if unit_hs(one.unit) is None:
            raise ValueError(
                f"hashprice {place} ({one.algorithm}): {one.unit[:40]!r} is no unit of hashrate; give one "
                "such as H/s, MH/s, TH/s, kSol/s, G/s"
            )
        if not math.isfinite(one.usd_per_day) or not 0.0 <= one.usd_per_day <= USD_PER_DAY_MAX:
            raise ValueError(
                f"hashprice {place} ({one.algorithm}) is {one.usd_per_day:g} USD a day for one {one.unit}; "
                f"it must lie between 0 and {USD_PER_DAY_MAX:g}"
            )
        if not math.isfinite(one.at_s):
            raise ValueError(f"hashprice {place} ({one.algorithm}): its time is no moment")
        name = one.algorithm.lower()
        if name in found:
            raise ValueError(f"{one.algorithm} has two hashprices; leave one out")
        found[name] = replace(one, algorithm=name)
    return tuple(found[name] for name in sorted(found))


@dataclass(frozen=True, slots=True)
class Proof:
    """What a miner's shares have proved so far. Seconds are those in which it was looked at.

    It outlives attempts: a miner whose shares stop can't begin anew by being started again.
    """

    at_s: float | None = None  # of the last reading of this attempt; None = none yet
    accepted: int = 0  # the miner's counters at that reading
    refused: int = 0
    shares: float = 0.0  # accepted ones, those of long ago for less than one
    refusals: float = 0.0
    over_s: float = 0.0  # in so many seconds, up to the last of them
    silent_s: float = 0.0  # since then
    accepted_sum: int = 0  # since it was first looked at, whatever its counters did
    refused_sum: int = 0

    @property
    def patience_s(self) -> float:
        """How long no share may be accepted until the hashrate counts for nothing."""
        if self.shares <= 0.0 or self.over_s <= 0.0:
            return PATIENCE_S_UNKNOWN
        # Beyond 1e300 the cap below holds anyway.
        exponent = min(690.0, -math.log(SILENCE_CHANCE) / self.shares)
        wait_s = self.over_s * math.expm1(exponent)
        cap_s = max(PATIENCE_S_UNKNOWN, PATIENCE_GAPS_MAX * self.over_s / self.shares)
        return max(PATIENCE_S_MIN, min(wait_s, cap_s))

    @property
    def is_barren(self) -> bool:
        """Whether shares have stopped."""
        return self.silent_s > self.patience_s

    @property
    def accepted_ratio(self) -> float:
        """Which part of the shares is accepted."""
        told = self.shares + self.refusals
        return self.shares / told if told >= SHARES_JUDGED_MIN else 1.0

    def after(self, reading: MinerReading, at_s: float) -> "Proof":
        """The proof with another reading. A counter that fell began anew: what it shows came since then."""
        if reading.accepted is None:
            return self
        if self.at_s is None:  # of what was before nobody knows when
            return replace(self, at_s=at_s, accepted=reading.accepted, refused=reading.refused)
        waited_s = min(max(0.0, at_s - self.at_s), LOOK_S_MAX)
        came = _since(self.accepted, reading.accepted)
        refused = _since(self.refused, reading.refused)
        counted = replace(
            self,
            at_s=at_s,
            accepted=reading.accepted,
            refused=reading.refused,
            refusals=self.refusals + refused,
            accepted_sum=self.accepted_sum + came,
            refused_sum=self.refused_sum + refused,
            silent_s=self.silent_s + waited_s,
        )
        if not came:
            return counted
        kept = math.exp(-counted.silent_s / SHARES_FORGOTTEN_S)
        return replace(
            counted,
            shares=self.shares * kept + came,
            refusals=self.refusals * kept + refused,
            over_s=self.over_s * kept + counted.silent_s,
            silent_s=0.0,
        )

    def begun_again(self) -> "Proof":
        """The proof when another attempt begins: its counters are other ones."""
        return replace(self, at_s=None, accepted=0, refused=0)

    def forgiven(self) -> "Proof":
        """The proof when it is tried again although shares had stopped."""
        return replace(self.begun_again(), silent_s=0.0)


def _since(before: int, now: int) -> int:
    return now - before if now >= before else now
