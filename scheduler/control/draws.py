"""What jobs draw by nature, learned from readings: a high quantile, of the job and of its class.

A reading at the limit says only that the draw would be no less. So where a job is held back by a limit that
was thought to be enough, the estimate grows by a tenth until it is not held back any more; where the limit
was lowered on purpose nothing is learned.
"""

from collections import deque

from scheduler.model.gpus import GpuSample
from scheduler.model.jobs import Job
from scheduler.model.power import PowerState

# Readings of a job that count, one a second and GPU: two minutes.
READINGS_KEPT = 120
READINGS_MIN = 15
QUANTILE = 0.95
# A change smaller than both is no news: limits must not follow every flicker.
NEWS_RATIO = 0.05
NEWS_W = 5.0
# A board at this part of its limit is held back by it.
CAPPED_RATIO = 0.97
# How much more than its limit such a job is thought to want: news, whatever the margin.
GROWTH_RATIO = 0.1
# Jobs of a class whose draws count for one that nobody knows yet.
CLASS_JOBS_KEPT = 32


class Draws:
    """Estimates in watts per GPU; what is news goes into the journal."""

    def __init__(self, state: PowerState) -> None:
        self._known: dict[str, float] = dict(state.draws_w)
        self._readings: dict[str, deque[float]] = {}
        self._by_class: dict[str, deque[float]] = {}

    def natural_w(self, job: Job) -> float | None:
        """What the job draws per GPU: declared, or more if more was seen; learned; or its class's."""
        own = self._known.get(job.id)
        if job.spec.draw_w is not None:
            return max(job.spec.draw_w, own or 0.0)
        return own if own is not None else self._known.get(job.spec.job_class.name)

    def see(self, job: Job, sample: GpuSample, limit_w: float) -> bool:
        """Take a reading of a GPU that the job has to itself; whether there is enough to learn from."""
        if sample.power_w is None:
            return False
        readings = self._readings.setdefault(job.id, deque(maxlen=READINGS_KEPT))
        if sample.power_w >= CAPPED_RATIO * limit_w:
            thought_w = self.natural_w(job)
            if thought_w is None or limit_w <= thought_w:
                return False
            # A limit without its whole margin lies that near to what the job is known to want.
            wants_more = sample.power_w > (thought_w + limit_w) / 2.0
            readings.append(limit_w * (1.0 + GROWTH_RATIO) if wants_more else sample.power_w)
        else:
            readings.append(sample.power_w)
        return len(readings) >= READINGS_MIN

    def news(self, jobs: list[Job]) -> dict[str, float]:
        """What these jobs and their classes have been seen to draw, where it differs from what was known."""
        found: dict[str, float] = {}
        for job in jobs:
            watts = quantile(self._readings[job.id])
            if job.spec.draw_w is not None and watts <= job.spec.draw_w:
                continue
            if is_news(self._known.get(job.id), watts):
                found[job.id] = watts
                seen = self._by_class.setdefault(job.spec.job_class.name, deque(maxlen=CLASS_JOBS_KEPT))
                seen.append(watts)
                of_class = max(seen)
                if is_news(self._known.get(job.spec.job_class.name), of_class):
                    found[job.spec.job_class.name] = of_class
        return found

    def learn(self, draws_w: dict[str, float]) -> None:
        """Go by these from now on; 0 W = forget."""
        for name, watts in draws_w.items():
            if watts:
                self._known[name] = watts
            else:
                self._known.pop(name, None)
                self._readings.pop(name, None)

    def gone(self, alive: set[str]) -> dict[str, float]:
        """Jobs that are known and no more, to be forgotten."""
        for name in [name for name in self._readings if name not in alive]:
            del self._readings[name]
        return {name: 0.0 for name in self._known if name.startswith("j") and name not in alive}


def is_news(known: float | None, watts: float) -> bool:
    """Whether a draw differs enough from what was known to be gone by."""
    return known is None or abs(watts - known) > max(NEWS_W, NEWS_RATIO * known)


def quantile(readings: deque[float]) -> float:
    """The reading that no more than a twentieth of them exceed."""
    ordered = sorted(readings)
    return ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))]
