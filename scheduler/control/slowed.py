"""How far power limits have set live attempts back: the work that they would have done at full speed.

An estimate from the class's curve of work against draw, which plans need: a job that was held back is not as
near to its end as the clock says, and may not meet its deadline any more. A daemon that starts again knows
nothing of the time before.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scheduler.model.jobs import Job, JobState


@dataclass(slots=True)
class _Slowed:
    attempt: int
    behind_s: float
    at_s: float  # counted up to then
    speed: float  # since then


class Slowed:
    """Of each live attempt that a limit holds back, or has held back."""

    def __init__(self) -> None:
        self._by_number: dict[int, _Slowed] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def behind_s(self, job: Job) -> float:
        """How much later than at full speed the job's live attempt will be done; seconds."""
        found = self._by_number.get(job.number)
        return found.behind_s if found is not None and found.attempt == job.attempt and job.holds else 0.0

    def advance(self, jobs: Iterable[Job], speed: Callable[[Job], float], now_s: float) -> list[Job]:
        """Count up to now, and go by these speeds from now on; returns the jobs that fell behind."""
        fell, kept = [], {}
        for job in jobs:
            if job.state not in (JobState.RUNNING, JobState.SUSPENDED) or not job.attempts[-1].gpus:
                continue
            known, now_speed = self._by_number.get(job.number), speed(job)
            if known is None or known.attempt != job.attempt:
                if now_speed < 1.0:
                    kept[job.number] = _Slowed(job.attempt, 0.0, now_s, now_speed)
                continue
            lost_s = (1.0 - known.speed) * max(0.0, now_s - known.at_s)
            kept[job.number] = _Slowed(job.attempt, known.behind_s + lost_s, now_s, now_speed)
            if lost_s:
                fell.append(job)
        stopping = {number: known for number, known in self._by_number.items() if number not in kept}
        self._by_number = stopping | kept
        return fell

    def forget(self, number: int) -> None:
        """Drop what is known of a job whose attempt has ended."""
        self._by_number.pop(number, None)
