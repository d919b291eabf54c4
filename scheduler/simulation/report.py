"""report.html: a replay on one page that needs nothing else: figures, charts, what was not simulated."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scheduler.model.jobs import SHARE_MILLI_WHOLE, JobClass
from scheduler.simulation import charts
from scheduler.simulation.charts import Series, figure
from scheduler.simulation.outputs import statistics
from scheduler.simulation.record import TIMELINE_COLUMNS, Sample
from scheduler.simulation.replay import Outcome

# More points than a screen has pixels show nothing more.
BUCKETS_MAX = 460
# Waits shorter than this are drawn as this: the axis is logarithmic.
_WAIT_S_FIRST = 0.1
# Told apart by those who don't see red and green alike (Okabe and Ito).
_COLOURS = {
    JobClass.INFERENCE: "#0072b2",
    JobClass.TRAINING: "#009e73",
    JobClass.BATCH: "#e69f00",
    JobClass.MINING: "#a0a0a0",
}
_INK, _RED, _BLUE, _GREEN = "#333333", "#d55e00", "#0072b2", "#009e73"
STYLE = """
body {font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff}
body {max-width: 980px; margin: 24px auto; padding: 0 16px}
h1 {font-size: 22px; margin: 0 0 4px} h2 {font-size: 16px; margin: 28px 0 6px} p {margin: 4px 0}
.tiles {display: grid; grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)); gap: 8px; margin: 14px 0}
.tile {border: 1px solid #ddd; border-radius: 6px; padding: 8px 10px}
.tile b {display: block; font-size: 18px} .tile small {color: #666}
table {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums}
th, td {padding: 3px 6px; font-size: 13px; text-align: right; border-bottom: 1px solid #eee}
th {font-weight: 600; color: #555} th:first-child, td:first-child {text-align: left}
.scroll {overflow-x: auto} th, td {white-space: nowrap}
figure {margin: 18px 0 0} figcaption small {color: #666; margin: 0 10px 0 4px}
svg {width: 100%; height: auto; display: block}
.key {margin-right: 12px; white-space: nowrap; font-size: 12px}
.key i {display: inline-block; width: 11px; height: 11px; margin-right: 4px; border-radius: 2px}
text {font: 11px system-ui, sans-serif; fill: #555} .unit {fill: #888}
.grid {stroke: #e8e8e8} .axis {stroke: #999}
.halves {display: grid; grid-template-columns: 1fr 1fr; gap: 20px}
@media (max-width: 700px) {.halves {grid-template-columns: 1fr}}
.notes {background: #fff8e6; border: 1px solid #f0dca8; border-radius: 6px; padding: 8px 12px; margin: 14px 0}
"""


@dataclass(frozen=True, slots=True)
class Buckets:
    """The timeline in equal stretches of time; each column's mean over them, None where it is empty."""

    times_s: tuple[float, ...]  # the middle of each
    end_s: float
    columns: dict[str, list[float | None]]


def write_report(folder: Path, outcome: Outcome, found: dict[str, Any], gpus: int) -> None:
    """Write report.html into the folder, where timeline.csv is already."""
    record = outcome.record
    buckets = read_buckets(folder / "timeline.csv", outcome.end_s)
    parts = [
        _tiles(found, gpus, outcome.end_s),
        _notes(outcome.refusals),
        _table(found),
        "<h2>Over time</h2>",
        _gpus(buckets, gpus),
        _queue(buckets),
        *_power(buckets),
        _money(record.samples),
        "<h2>By class</h2>",
        _waits({job_class: record.tallies[job_class].waits_s for job_class in JobClass}),
        _preemptions(record.samples),
        _losses(found),
    ]
    title = f"{gpus} GPUs, {charts.clock(outcome.end_s)} simulated"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Wattshift simulation</title>'
        f"<style>{STYLE}</style></head><body><h1>Wattshift simulation</h1><p>{escape(title)}</p>"
        f"{''.join(parts)}</body></html>\n"
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def read_buckets(timeline: Path, end_s: float) -> Buckets:
    """A timeline's means over at most `BUCKETS_MAX` stretches until the end."""
    names = TIMELINE_COLUMNS[1:]
    width_s = max(end_s, 1e-3) / BUCKETS_MAX
    sums = {name: [0.0] * BUCKETS_MAX for name in names}
    spans_s = {name: [0.0] * BUCKETS_MAX for name in names}
    with timeline.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        row = next(rows)
        for following in _until_end(rows, end_s):
            start_s, stop_s = float(row["time_s"]), float(following["time_s"])
            values = {name: float(row[name]) for name in names if row[name]}
            _spread(values, start_s, min(stop_s, end_s), width_s, sums, spans_s)
            row = following
    means = {
        name: [
            total / span_s if span_s else None
            for total, span_s in zip(sums[name], spans_s[name], strict=True)
        ]
        for name in names
    }
    return Buckets(tuple((i + 0.5) * width_s for i in range(BUCKETS_MAX)), end_s, means)


def _until_end(rows: Iterable[dict[str, str]], end_s: float) -> Iterable[dict[str, str]]:
    """The rows, and one more at the end."""
    yield from rows
    yield {"time_s": str(end_s)}


def _spread(
    values: dict[str, float],
    start_s: float,
    stop_s: float,
    width_s: float,
    sums: dict[str, list[float]],
    spans_s: dict[str, list[float]],
) -> None:
    """Add what held from start to stop to the stretches that it touches."""
    first, last = int(start_s / width_s), min(BUCKETS_MAX - 1, int(stop_s / width_s))
    for bucket in range(first, last + 1):
        span_s = min(stop_s, (bucket + 1) * width_s) - max(start_s, bucket * width_s)
        if span_s > 0.0:
            for name, value in values.items():
                sums[name][bucket] += value * span_s
                spans_s[name][bucket] += span_s


def _tiles(found: dict[str, Any], gpus: int, end_s: float) -> str:
    site, classes = found["site"], found["classes"].values()
    used = sum(each["gpu_seconds"] for each in classes) / (gpus * end_s) if gpus and end_s else 0.0
    tiles = (
        (f"{site['value_usd']:,.2f}", "value, USD"),
        (f"{site['energy_cost_usd']:,.2f}", "cost of energy, USD"),
        (f"{site['profit_usd']:,.2f}", "profit, USD"),
        (f"{site['energy_kwh']:,.1f}", "energy, kWh"),
        (f"{used:.1%}", "of GPU time used"),
        (
            f"{sum(each['completed'] for each in classes):,}",
            f"of {sum(e['jobs'] for e in classes):,} jobs completed",
        ),
        (f"{sum(each['preemptions'] for each in classes):,}", "preemptions"),
        (charts.clock(site["over_budget_seconds"]), "above the budget"),
    )
    inside = "".join(
        f'<div class="tile"><b>{escape(a)}</b><small>{escape(b)}</small></div>' for a, b in tiles
    )
    return f'<div class="tiles">{inside}</div>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<div class="notes">{"".join(f"<p>{escape(note)}</p>" for note in notes)}</div>'


def _table(found: dict[str, Any]) -> str:
    head, rows = statistics(found)
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{titles}</tr>{body}</table></div>'


def _gpus(buckets: Buckets, gpus: int) -> str:
    series = [
        Series(
            job_class.name.lower(),
            _COLOURS[job_class],
            [
                None if value is None else value / SHARE_MILLI_WHOLE
                for value in buckets.columns[f"{job_class.name.lower()}_gpu_milli"]
            ],
        )
        for job_class in JobClass
    ]
    svg = charts.stacked(buckets.times_s, series, buckets.end_s, gpus, "GPUs")
    return figure("GPUs", f"held by each class, of {gpus}", series, svg)


def _queue(buckets: Buckets) -> str:
    series = [
        Series("waiting", _RED, buckets.columns["pending_jobs"]),
        Series("running", _BLUE, buckets.columns["running_jobs"]),
    ]
    return figure(
        "Queue",
        "jobs that wait and jobs that run",
        series,
        charts.lines(buckets.times_s, series, buckets.end_s, "jobs"),
    )


def _power(buckets: Buckets) -> Iterable[str]:
    kw = {
        name: [None if value is None else value / 1000.0 for value in buckets.columns[name]]
        for name in ("draw_w", "budget_w")
    }
    draw = Series("draw", _GREEN, kw["draw_w"])
    budget = Series("budget", _RED, kw["budget_w"], dashed=True)
    shown = [draw, budget] if any(value is not None for value in budget.values) else [draw]
    yield figure(
        "Power", "of the site, at the meter", shown, charts.lines(buckets.times_s, shown, buckets.end_s, "kW")
    )
    price = Series("price", _INK, buckets.columns["usd_per_mwh"])
    if any(value is not None for value in price.values):
        svg = charts.lines(buckets.times_s, [price], buckets.end_s, "USD/MWh", height=charts.HEIGHT // 2 + 20)
        yield figure("Price", "of electricity", [price], svg)


def _money(samples: Sequence[Sample]) -> str:
    times_s = [sample.time_s for sample in samples]
    series = [
        Series("value", _BLUE, [sample.value_usd for sample in samples]),
        Series("cost of energy", _RED, [sample.cost_usd for sample in samples]),
        Series("profit", _GREEN, [sample.value_usd - sample.cost_usd for sample in samples], dashed=True),
    ]
    words = "since the beginning; a job pays when it is complete, mining as it works"
    return figure("Value and cost", words, series, charts.lines(times_s, series, times_s[-1], "USD"))


def _waits(waits_s: dict[JobClass, Sequence[float]]) -> str:
    found = [
        (Series(f"{job_class.name.lower()} ({len(waits)})", _COLOURS[job_class], ()), sorted(waits))
        for job_class, waits in waits_s.items()
    ]
    words = "share of the jobs that waited at most so long for their first start"
    return figure("Waits", words, [one for one, _ in found], charts.shares(found, _WAIT_S_FIRST))


def _preemptions(samples: Sequence[Sample]) -> str:
    series = [
        Series(job_class.name.lower(), _COLOURS[job_class], [sample.preemptions[place] for sample in samples])
        for place, job_class in enumerate(JobClass)
    ]
    times_s = [sample.time_s for sample in samples]
    svg = charts.stacked(times_s, series, times_s[-1], 1.0, "preemptions")
    return figure("Preemptions", "since the beginning, by the class that gave way", series, svg)


def _losses(found: dict[str, Any]) -> str:
    labels = [job_class.name.lower() for job_class in JobClass]
    lost = [found["classes"][label]["lost_gpu_seconds"] / 3600.0 for label in labels]
    times = [float(found["classes"][label]["preemptions"]) for label in labels]
    hours = Series("GPU-hours", _RED, lost)
    counts = Series("times", _BLUE, times)
    return (
        '<div class="halves">'
        + figure(
            "Lost work", "GPU-hours of restarts", [], charts.bars([hours], labels, lambda v: f"{v:.2f} h")
        )
        + figure("Gave way", "times", [], charts.bars([counts], labels, lambda v: f"{v:.0f}"))
        + "</div>"
    )
