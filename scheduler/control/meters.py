"""Counters and histograms of what the daemon did: plain numbers that the metrics page reads."""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

# From a tick on a quiet node (0.2 ms) to a grace of a minute.
SECONDS_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2,
    0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0,
)  # fmt: skip
# A queue is waited in for hours.
WAIT_BUCKETS = (0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)

Labels = tuple[str, ...]


@dataclass(slots=True)
class Histogram:
    """Observations in buckets; `counts` has one more entry than `bounds`, for what is beyond them."""

    bounds: tuple[float, ...] = SECONDS_BUCKETS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def _wait_histogram() -> Histogram:
    return Histogram(WAIT_BUCKETS)


@dataclass(slots=True)
class Meters:
    """Everything that accumulates; each dictionary is keyed by its label values."""

    job_transitions: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
    queue_wait_s: defaultdict[Labels, Histogram] = field(default_factory=lambda: defaultdict(_wait_histogram))
    preemptions: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
    preemption_lost_gpu_s: defaultdict[Labels, float] = field(default_factory=lambda: defaultdict(float))
    preemption_stage_s: defaultdict[Labels, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    class_gpu_s: defaultdict[Labels, float] = field(default_factory=lambda: defaultdict(float))
    gpu_energy_j: defaultdict[Labels, float] = field(default_factory=lambda: defaultdict(float))
    class_energy_j: defaultdict[Labels, float] = field(default_factory=lambda: defaultdict(float))
    class_value_usd: defaultdict[Labels, float] = field(default_factory=lambda: defaultdict(float))
    energy_cost_usd: float = 0.0  # at prices above zero
    energy_credit_usd: float = 0.0  # at prices below
    energy_unpriced_j: float = 0.0
    allocated_idle_s: defaultdict[Labels, float] = field(default_factory=lambda: defaultdict(float))
    gpu_errors: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
    telemetry_errors: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
    rpc_requests: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
    rpc_s: defaultdict[Labels, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    plan_s: Histogram = field(default_factory=Histogram)
    tick_s: Histogram = field(default_factory=Histogram)
    journal_append_s: Histogram = field(default_factory=Histogram)
    tick_failures: int = 0
    mining_shares: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
    power_over_budget_s: float = 0.0
    power_limit_errors: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
    power_limits_changed: int = 0
    power_limit_s: Histogram = field(default_factory=Histogram)
    grid_shed_s: Histogram = field(default_factory=Histogram)
    grid_sheds: defaultdict[Labels, int] = field(default_factory=lambda: defaultdict(int))
