"""Small charts as inline SVG: areas and lines over time, bars; no script, no library, no font."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 920
HEIGHT = 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 10, 26
_TICKS_Y = 4
_TICKS_X = 8
_STEPS_OF_TEN = (1.0, 2.0, 2.5, 5.0, 10.0)
# Steps that a person reads off a clock or a calendar, s.
_STEPS_S = (
    1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 21600, 43200,
    86400, 172800, 432000, 864000, 1728000, 4320000, 8640000, 17280000, 43200000, 86400000,
)  # fmt: skip
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


@dataclass(frozen=True, slots=True)
class Series:
    """Values over the chart's x; None = there is none here, and the line has a gap."""

    name: str
    colour: str
    values: Sequence[float | None]
    dashed: bool = False
    stepped: bool = False


def figure(title: str, words: str, legend: Sequence[Series], svg: str) -> str:
    """A chart with its title, what it shows in words, and a legend."""
    keys = "".join(
        f'<span class="key"><i style="background:{one.colour}"></i>{escape(one.name)}</span>'
        for one in legend
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <small>{escape(words)}</small>{keys}</figcaption>"
        f"{svg}</figure>"
    )


def stacked(times_s: Sequence[float], series: Sequence[Series], end_s: float, top: float, unit: str) -> str:
    """Areas on top of each other, from 0 to the end; `top` is the least that the axis shows."""
    floor = [0.0] * len(times_s)
    sums: list[list[float]] = []
    for one in series:
        floor = [low + (value or 0.0) for low, value in zip(floor, one.values, strict=True)]
        sums.append(floor)
    frame = _Frame.over_time(end_s, 0.0, max([top, *(floor or [0.0])]), unit)
    parts = []
    below = [0.0] * len(times_s)
    for one, above in zip(series, sums, strict=True):
        forth = [frame.point(x, y) for x, y in zip(times_s, above, strict=True)]
        back = [frame.point(x, y) for x, y in zip(times_s, below, strict=True)]
        parts.append(f'<polygon points="{" ".join(forth + back[::-1])}" fill="{one.colour}"/>')
        below = above
    return frame.svg("".join(parts))


def lines(
    times_s: Sequence[float], series: Sequence[Series], end_s: float, unit: str, height: int = HEIGHT
) -> str:
    """Lines over time, from 0 to the end."""
    found = [value for one in series for value in one.values if value is not None]
    frame = _Frame.over_time(end_s, min([0.0, *found]), max([0.0, *found]), unit, height)
    return frame.svg("".join(_line(frame, times_s, one) for one in series))


def shares(at_most: Sequence[tuple[Series, Sequence[float]]], first: float) -> str:
    """For each series, which share of its values is at most x; x is logarithmic seconds from `first` on."""
    last = max([first * 10, *(values[-1] for _, values in at_most if values)])
    frame = _Frame.logarithmic(first, last)
    parts = []
    for one, values in at_most:
        if values:
            count = len(values)
            picks = sorted({*range(0, count, max(1, count // 200)), count - 1})
            xs = [first, *(max(first, values[pick]) for pick in picks), last]
            ys = [0.0, *((pick + 1) / count * 100.0 for pick in picks), 100.0]
            parts.append(_line(frame, xs, Series(one.name, one.colour, ys, stepped=True)))
    return frame.svg("".join(parts))


def bars(series: Sequence[Series], labels: Sequence[str], shown: Callable[[float], str]) -> str:
    """Horizontal bars, a label and a bar a value; one series after the other for each label."""
    row, left = 22, 110
    most = max([value or 0.0 for one in series for value in one.values], default=0.0) or 1.0
    parts, y = [], 4
    for place, label in enumerate(labels):
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        for one in series:
            value = one.values[place] or 0.0
            length = value / most * (WIDTH / 2 - left - 120)
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{row - 6}" fill="{one.colour}"/>'
            )
            parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 13}">{escape(shown(value))}</text>')
            y += row
    return f'<svg viewBox="0 0 {WIDTH // 2} {y + 4}" role="img">{"".join(parts)}</svg>'


def clock(seconds: float) -> str:
    """A time since the beginning, as short as it can be said."""
    if seconds >= _DAY_S:
        days, rest = divmod(round(seconds), _DAY_S)
        return f"{days}d" if not rest else f"{days}d{round(rest / _HOUR_S)}h"
    if seconds >= _HOUR_S:
        return f"{seconds / _HOUR_S:g}h" if seconds % _HOUR_S == 0 else f"{seconds / _HOUR_S:.1f}h"
    if seconds >= _MINUTE_S:
        return f"{seconds / _MINUTE_S:.3g}min"
    return f"{seconds:.3g}s"


def number(value: float) -> str:
    """A figure for an axis or a table: three digits and a k, M or G."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if letter == 'k' else scale):.4g}{letter}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _line(frame: "_Frame", xs: Sequence[float], one: Series) -> str:
    path, before = [], None
    for x, value in zip(xs, one.values, strict=True):
        if value is None:
            before = None
            continue
        if before is None:
            path.append("M" + frame.point(x, value))
        elif one.stepped:
            path.append(f"H{frame.x(x):.1f}V{frame.y(value):.1f}")
        else:
            path.append("L" + frame.point(x, value))
        before = value
    dash = ' stroke-dasharray="6 4"' if one.dashed else ""
    return f'<path d="{"".join(path)}" fill="none" stroke="{one.colour}" stroke-width="1.6"{dash}/>'


@dataclass(frozen=True, slots=True)
class _Frame:
    """Axes, their ticks, and where a value is."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    unit: str
    height: int = HEIGHT
    is_logarithmic: bool = False

    @classmethod
    def over_time(cls, end_s: float, low: float, high: float, unit: str, height: int = HEIGHT) -> "_Frame":
        span_s = max(end_s, 1.0)
        step_s = next((s for s in _STEPS_S if span_s / s <= _TICKS_X + 0.5), _STEPS_S[-1])
        x_ticks = [(float(i * step_s), clock(i * step_s)) for i in range(int(span_s // step_s) + 1)]
        low, high, y_ticks = _scale(low, high)
        return cls(0.0, span_s, low, high, tuple(x_ticks), y_ticks, unit, height)

    @classmethod
    def logarithmic(cls, low: float, high: float) -> "_Frame":
        steps = [s for s in _STEPS_S if low <= s <= high]
        thinned = steps[:: max(1, math.ceil(len(steps) / _TICKS_X))]
        ticks = tuple((float(s), clock(s)) for s in thinned)
        y_ticks = tuple((float(share), str(share)) for share in (0, 25, 50, 75, 100))
        return cls(low, high, 0.0, 100.0, ticks, y_ticks, "%", is_logarithmic=True)

    def x(self, value: float) -> float:
        """Where a value is from the left."""
        if self.is_logarithmic:
            share = math.log(value / self.x_low) / math.log(self.x_high / self.x_low)
        else:
            share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Where a value is from the top."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def point(self, x: float, y: float) -> str:
        """Both, as SVG writes it."""
        return f"{self.x(x):.1f},{self.y(y):.1f} "

    def svg(self, inside: str) -> str:
        """The chart."""
        right, bottom = WIDTH - _RIGHT, self.height - _BOTTOM
        grid = [
            f'<line x1="{_LEFT}" x2="{right}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{escape(text)}</text>'
            for y, text in self.y_ticks
        ]
        ticks = [
            f'<line x1="{self.x(x):.1f}" x2="{self.x(x):.1f}" y1="{bottom}" y2="{bottom + 4}" class="axis"/>'
            f'<text x="{self.x(x):.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>'
            for x, text in self.x_ticks
        ]
        unit = f'<text x="{_LEFT + 4}" y="{_TOP + 9}" class="unit">{escape(self.unit)}</text>'
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img">{"".join(grid)}{inside}{"".join(ticks)}'
            f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" class="axis"/>{unit}</svg>'
        )


def _scale(low: float, high: float) -> tuple[float, float, tuple[tuple[float, str], ...]]:
    """An axis from a round number to a round number, and its ticks."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / _TICKS_Y))
    step = next(power * s for s in _STEPS_OF_TEN if span / (power * s) <= _TICKS_Y + 0.001)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    ticks = tuple((i * step, number(i * step)) for i in range(first, last + 1))
    return first * step, last * step, ticks
