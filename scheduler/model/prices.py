"""Electricity prices as values: a series, and what it says at a moment."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A year of days, or ten weeks of quarters of an hour.
PRICE_POINTS_MAX = 10_000
# Beyond what any market allows; a larger one is a wrong unit or a fault. USD per kWh.
PRICE_USD_PER_KWH_MAX = 100.0
# What was known of the past is kept so long, for energy that is yet to be read and booked.
PAST_KEPT_S = 3600.0
PAST_KEPT_MAX = 1000


@dataclass(frozen=True, slots=True)
class PricePoint:
    """A price from `start_s` until `end_s`; None = until the next point's start."""

    start_s: float
    usd_per_kwh: float
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """What a kilowatt-hour costs now, as far as anybody knows."""

    usd_per_kwh: float
    age_s: float  # for how long this price has been out of date; 0 while it is in force
    is_declared: bool = False  # too old, or none known: the configured stand-in


@dataclass(frozen=True, slots=True)
class PriceSeries:
    """Points by start. The last price without an end goes on until it is too old."""

    points: tuple[PricePoint, ...]

    def at(self, now_s: float, max_age_s: float, declared_usd_per_kwh: float) -> Price:
        """The price in force; the latest known one for `max_age_s`, then the declared one."""
        row = bisect.bisect_right(self.points, now_s, key=_start_s) - 1
        if row < 0:
            return Price(declared_usd_per_kwh, math.inf, is_declared=True)
        point = self.points[row]
        since_s = point.end_s if point.end_s is not None else point.start_s
        followed = row + 1 < len(self.points)
        in_force = now_s < point.end_s if point.end_s is not None else followed
        age_s = 0.0 if in_force else max(0.0, now_s - since_s)
        if not in_force and age_s >= max_age_s:
            return Price(declared_usd_per_kwh, age_s, is_declared=True)
        return Price(point.usd_per_kwh, age_s)

    def next_change_s(self, now_s: float, max_age_s: float) -> float | None:
        """When the price could be another without any news; None = never."""
        row = bisect.bisect_right(self.points, now_s, key=_start_s) - 1
        moments = [self.points[row + 1].start_s] if row + 1 < len(self.points) else []
        if row >= 0:
            point = self.points[row]
            if point.end_s is not None:
                moments += [point.end_s, point.end_s + max_age_s]
            elif row + 1 == len(self.points):
                moments.append(point.start_s + max_age_s)
        later = [moment for moment in moments if moment > now_s]
        return min(later, default=None)


def past(
    before: tuple[PricePoint, ...], points: Sequence[PricePoint], now_s: float
) -> tuple[PricePoint, ...]:
    """What was known of the time before now, as far as it is kept, each point with its end.

    `before` is what was known until the points came, and they say nothing of the time before that.
    """
    since_s = before[-1].end_s if before and before[-1].end_s is not None else -math.inf
    found = list(before)
    for place, point in enumerate(points):
        followed_s = points[place + 1].start_s if place + 1 < len(points) else now_s
        start_s, end_s = max(since_s, point.start_s), min(now_s, followed_s, point.end_s or math.inf)
        if start_s < end_s:
            found.append(PricePoint(start_s, point.usd_per_kwh, end_s))
    kept = [point for point in found if point.end_s is not None and point.end_s > now_s - PAST_KEPT_S]
    return tuple(kept[-PAST_KEPT_MAX:])


def checked(points: Iterable[PricePoint]) -> tuple[PricePoint, ...]:
    """The points by start, each ending at the latest where the next begins.

    Raises:
        ValueError: One is no price, ends before it starts, or two start at once; the words say which.
    """
    ordered = sorted(points, key=_start_s)
    if len(ordered) > PRICE_POINTS_MAX:
        raise ValueError(f"{len(ordered)} prices; at most {PRICE_POINTS_MAX} are kept: send the nearest")
    for number, point in enumerate(ordered, start=1):
        if not math.isfinite(point.start_s):
            raise ValueError(f"price {number}: the start is {point.start_s}; give a moment in time")
        if not math.isfinite(point.usd_per_kwh) or abs(point.usd_per_kwh) > PRICE_USD_PER_KWH_MAX:
            raise ValueError(
                f"price {number} is {point.usd_per_kwh:g} USD per kWh; it must lie between "
                f"-{PRICE_USD_PER_KWH_MAX:g} and {PRICE_USD_PER_KWH_MAX:g} (1 USD per kWh = 1000 USD per MWh)"
            )
        if point.end_s is not None and not point.end_s > point.start_s:
            raise ValueError(f"price {number} ends at {point.end_s:g} s, before it starts; swap them")
        if number > 1 and ordered[number - 2].start_s == point.start_s:
            raise ValueError(f"prices {number - 1} and {number} start at the same moment; leave one out")
    return tuple(ordered)


def _start_s(point: PricePoint) -> float:
    return point.start_s
