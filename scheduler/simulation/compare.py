"""Two policies side by side: the figures of their replays, and their reports on one page."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from scheduler.simulation.report import STYLE

_SITE = (
    "value_usd", "energy_cost_usd", "profit_usd", "energy_kwh", "over_budget_seconds", "shed_seconds",
)  # fmt: skip
_CLASS = (
    "completed", "failed", "wait_seconds_mean", "wait_seconds_p99", "completion_seconds_mean",
    "lost_gpu_seconds", "preemptions",
)  # fmt: skip


def differences(found: Mapping[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles, and a row for each figure that somebody has: of what, its name, both values, the change."""
    first, second = found.values()
    rows = [_row("site", name, first["site"][name], second["site"][name]) for name in _SITE]
    for label, figures in first["classes"].items():
        other = second["classes"][label]
        if figures["jobs"]:
            rows += [_row(label, name, figures[name], other[name]) for name in _CLASS]
    return ("OF", "FIGURE", *(name.upper() for name in found), "CHANGE"), rows


def write_page(folder: Path, found: Mapping[str, dict[str, Any]]) -> None:
    """Write compare.html into the folder that has each replay's results in one named like its policy."""
    head, rows = differences(found)
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    frames = "".join(
        f'<div><h2><a href="{escape(name)}/report.html">{escape(name)}</a></h2>'
        f'<iframe src="{escape(name)}/report.html" title="{escape(name)}"></iframe></div>'
        for name in found
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Wattshift: two policies</title>'
        f"<style>{STYLE} body {{max-width: none}} iframe {{width: 100%; height: 2400px; border: 0}}</style>"
        f"</head><body><h1>Two policies</h1><table><tr>{titles}</tr>{body}</table>"
        f'<div class="halves">{frames}</div></body></html>\n'
    )
    (folder / "compare.html").write_text(page, encoding="utf-8")


def _row(of: str, name: str, first: float | None, second: float | None) -> tuple[str, ...]:
    return of, name, _shown(first), _shown(second), _change(first, second)


def _change(first: float | None, second: float | None) -> str:
    """In percent, or as a difference where the first is so small that percents say nothing."""
    if first is None or second is None:
        return "-"
    if _shown(first) == _shown(second):
        return "="
    if abs(first) < 1.0:
        return f"{second - first:+,.2f}"
    return f"{(second - first) / abs(first):+.1%}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}".removesuffix(".00")
