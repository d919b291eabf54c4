"""The policy: every knob that a decision depends on, with unit and default."""

from dataclasses import dataclass, field
from enum import StrEnum

from scheduler.model.jobs import JobClass, OnPreempt
from scheduler.model.power import CurvePoint


class Order(StrEnum):
    """What rank looks at first."""

    CLASS = "class"
    VALUE = "value"


# A V100 at 300, 200 and 150 W, its clock left alone: 36 cells measured by GridPilot [arXiv 2605.26384].
COMPUTE_BOUND = ((1.0, 1.0), (0.951, 0.979), (0.711, 0.844))
MEMORY_BOUND = ((1.0, 1.0), (0.881, 0.967), (0.66, 0.83))
BURSTY = ((1.0, 1.0), (0.949, 0.98), (0.728, 0.854))


@dataclass(frozen=True, slots=True)
class ClassDefaults:
    """What a job of a class gets where it says nothing."""

    value_usd_per_gpu_hour: float
    grace_s: float
    min_runtime_s: float = 0.0
    preemptible: bool = True
    on_preempt: OnPreempt = OnPreempt.REQUEUE
    restart_loss_s: float = 0.0
    cpus: int = 0
    memory_mib: int = 0
    gpu_memory_mib: int = 0
    # Work against draw under a power limit, as parts of the unlimited ones; nothing is known below the last.
    power_curve: tuple[CurvePoint, ...] = COMPUTE_BOUND


CLASS_DEFAULTS = {
    JobClass.INFERENCE: ClassDefaults(
        value_usd_per_gpu_hour=4.0, grace_s=30.0, preemptible=False, power_curve=MEMORY_BOUND
    ),
    JobClass.TRAINING: ClassDefaults(value_usd_per_gpu_hour=2.0, grace_s=60.0),
    JobClass.BATCH: ClassDefaults(value_usd_per_gpu_hour=0.5, grace_s=10.0, power_curve=BURSTY),
    JobClass.MINING: ClassDefaults(value_usd_per_gpu_hour=0.05, grace_s=2.0, power_curve=MEMORY_BOUND),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """`[policy]` of the configuration, resolved."""

    order: Order = Order.CLASS
    # A challenger of equal priority must be worth the incumbent plus this share of it: 1.3 cut
    # preemptions by 10 to 25 % at no loss of value on 32 GPUs and real prices.
    hysteresis_ratio: float = 0.3
    # What a job that reports no checkpoint is assumed to do; half of it counts as lost.
    assumed_checkpoint_interval_s: float = 1800.0
    # Preemptions by jobs after which a job ages upward within its class, and by how much each.
    aging_after_preemptions: int = 3
    aging_priority_step: int = 250
    # Back-off after the second and each later preemption in a row: base, doubled, capped.
    preemption_backoff_s: float = 1.0
    preemption_backoff_s_max: float = 300.0
    # Back-off before a restart by the job's rule, and how often in a row.
    restart_backoff_s: float = 1.0
    restart_backoff_s_max: float = 300.0
    restart_attempts_max: int = 10
    # A job that ran this long has recovered: its failures in a row start again at zero.
    restart_reset_s: float = 600.0
    # A hand-over that takes longer is a fault: the GPU is quarantined and its holder named.
    handover_timeout_s: float = 60.0
    # Jobs with a process at a time: a bound on CPU-only jobs, which no GPU bounds.
    live_jobs_max: int = 512
    backfill: bool = True
    classes: dict[JobClass, ClassDefaults] = field(default_factory=lambda: dict(CLASS_DEFAULTS))


# Effective priority of a job that aged to the top of its class: nobody of its class outranks it.
AGED_PRIORITY_MAX = 1001
PRIORITY_MAX = 1000


def aged_priority(job_class: JobClass, priority: int, preemptions: int, policy: Policy) -> int:
    """The priority that a job has after so many preemptions by jobs; mining never ages."""
    beyond = preemptions - policy.aging_after_preemptions
    if job_class is JobClass.MINING or beyond < 0:
        return priority
    return min(AGED_PRIORITY_MAX, priority + policy.aging_priority_step * (beyond + 1))


def backoff_s(base_s: float, cap_s: float, count: int) -> float:
    """`base_s` doubled for each count after the first, at most `cap_s`; 0 for a count below 1."""
    return min(cap_s, base_s * 2.0 ** min(count - 1, 30)) if count >= 1 else 0.0
