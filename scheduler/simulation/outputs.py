"""summary.json: what each class and the site got. Equal replays give equal bytes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scheduler.simulation.record import ClassTally
from scheduler.simulation.replay import Outcome
from scheduler.simulation.site import J_PER_KWH

_DECIMALS = 6
_MINUTE_S, _S_PER_HOUR = 60.0, 3600.0


def summary(outcome: Outcome) -> dict[str, Any]:
    """The figures of a replay. What nobody knows (the wait of a class without jobs) is null."""
    record = outcome.record
    site, tallies = record.site, record.tallies
    value_usd = sum(tally.value_usd for tally in tallies.values())
    figures = {
        "energy_kwh": site.energy_j / J_PER_KWH,
        "energy_cost_usd": site.cost_usd,
        "value_usd": value_usd,
        "profit_usd": value_usd - site.cost_usd,
        "over_budget_seconds": site.over_budget_s,
        "shed_seconds": site.shed_s,
        "unpriced_energy_kwh": site.unpriced_j / J_PER_KWH,
        "end_seconds": outcome.end_s,
    }
    return {
        "classes": {job_class.name.lower(): _figures(tally) for job_class, tally in tallies.items()},
        "site": {name: round(value, _DECIMALS) for name, value in figures.items()},
    }


def statistics(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The classes of a summary as a table for people: titles, and a row of cells for each."""
    head = (
        "CLASS", "JOBS", "DONE", "FAILED", "WAIT MEAN", "P50", "P99", "TIME TO DONE", "GPU-H", "LOST GPU-H",
        "GAVE WAY", "VALUE USD",
    )  # fmt: skip
    rows = [
        (
            name,
            str(each["jobs"]),
            str(each["completed"]),
            str(each["failed"]),
            *(_span(each[f"wait_seconds_{what}"]) for what in ("mean", "p50", "p99")),
            _span(each["completion_seconds_mean"]),
            f"{each['gpu_seconds'] / _S_PER_HOUR:.1f}",
            f"{each['lost_gpu_seconds'] / _S_PER_HOUR:.2f}",
            str(each["preemptions"]),
            f"{each['value_usd']:.2f}",
        )
        for name, each in found["classes"].items()
    ]
    return head, rows


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    return f"{seconds / _MINUTE_S:.1f} min" if seconds < _S_PER_HOUR else f"{seconds / _S_PER_HOUR:.1f} h"


def write_summary(path: Path, found: dict[str, Any]) -> None:
    """Write it for people and machines."""
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _figures(tally: ClassTally) -> dict[str, float | int | None]:
    return {
        "jobs": tally.jobs,
        "completed": tally.completed,
        "failed": tally.missed,
        "unfinished": tally.jobs - tally.completed - tally.missed,
        **_spread("wait_seconds", tally.waits_s),
        **_spread("completion_seconds", tally.completions_s),
        "gpu_seconds": round(tally.gpu_s, _DECIMALS),
        "lost_gpu_seconds": round(tally.lost_gpu_s, _DECIMALS),
        "preemptions": tally.preemptions,
        "value_usd": round(tally.value_usd, _DECIMALS),
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    mean = math.fsum(ordered) / len(ordered) if ordered else None
    found = {"mean": mean, "p50": percentile(ordered, 0.50), "p99": percentile(ordered, 0.99)}
    return {f"{name}_{key}": None if v is None else round(v, _DECIMALS) for key, v in found.items()}


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The least of the values that at least this share of them do not exceed; None where there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
