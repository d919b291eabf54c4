"""Prometheus' text format, version 0.0.4.

Written here and not by prometheus_client, whose objects took 8 µs a line: eight GPUs are some 550 lines, and
now half a microsecond each. What stands before a value changes rarely and is kept.
"""

import functools
from collections.abc import Iterable, Mapping

from prometheus_client.metrics_core import Metric

from scheduler.control.meters import Histogram, Labels

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "wattshift_"
# Beginnings of lines; 64 GPUs in seven instances each have fewer.
LINES_KEPT_MAX = 65_536
# Their values are words of enums, which dashboards write in lower case.
WORDS = frozenset({"class", "state", "reason", "victim_class", "preemptor_class"})

Values = Iterable[tuple[Labels, float]]


class Page:
    """One answer to a scrape. A family without values is not on it: what is absent is not zero."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def gauge(self, name: str, text: str, values: Values, labels: Labels = ()) -> None:
        """Add a gauge; `values` by their label values."""
        lines = [f"{_start(name, labels, key)}{float(value)!r}\n" for key, value in values]
        self._add(name, "gauge", text, lines)

    def counter(self, name: str, text: str, values: Values, labels: Labels = ()) -> None:
        """Add a counter; its name ends in `_total`, as the format wants it."""
        name = f"{name}_total"
        lines = [f"{_start(name, labels, key)}{float(value)!r}\n" for key, value in values]
        self._add(name, "counter", text, lines)

    def histogram(
        self, name: str, text: str, values: Mapping[Labels, Histogram], labels: Labels = ()
    ) -> None:
        """Add a histogram with its sum and count."""
        lines = []
        for key, histogram in sorted(values.items()):
            running = 0
            for start, count in zip(
                _buckets(name, labels, key, histogram.bounds), histogram.counts, strict=True
            ):
                running += count
                lines.append(f"{start}{running}\n")
            lines.append(f"{_start(f'{name}_sum', labels, key)}{histogram.total!r}\n")
            lines.append(f"{_start(f'{name}_count', labels, key)}{running}\n")
        self._add(name, "histogram", text, lines)

    def family(self, metric: Metric) -> None:
        """Add one of prometheus_client's, without labels, under its own name."""
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        self._parts.append(f"# HELP {name} {metric.documentation}\n# TYPE {name} {metric.type}\n")
        self._parts += [f"{sample.name} {float(sample.value)!r}\n" for sample in metric.samples]

    def _add(self, name: str, kind: str, text: str, lines: list[str]) -> None:
        if lines:
            self._parts.append(f"# HELP {PREFIX}{name} {text}\n# TYPE {PREFIX}{name} {kind}\n")
            self._parts += lines

    def encoded(self) -> bytes:
        """Return all of it."""
        return "".join(self._parts).encode()


@functools.lru_cache(LINES_KEPT_MAX)
def _start(name: str, labels: Labels, values: Labels) -> str:
    """Return a line up to its value; labels in their alphabet's order."""
    pairs = ",".join(
        f'{label}="{value.lower() if label in WORDS else _escaped(value)}"'
        for label, value in sorted(zip(labels, values, strict=True))
    )
    return f"{PREFIX}{name}{{{pairs}}} " if pairs else f"{PREFIX}{name} "


@functools.lru_cache(LINES_KEPT_MAX)
def _buckets(name: str, labels: Labels, values: Labels, bounds: tuple[float, ...]) -> tuple[str, ...]:
    """Return the lines of the buckets up to their values."""
    limits = (*map(str, bounds), "+Inf")
    return tuple(_start(f"{name}_bucket", (*labels, "le"), (*values, limit)) for limit in limits)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
