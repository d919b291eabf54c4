"""The metrics page: a Collector over the controller's last state and its meters.

Nothing is kept here: a label combination that is gone in the state is gone on the page.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.control.board import GpuView
from scheduler.control.loop import Controller
from scheduler.control.meters import Histogram, Labels
from scheduler.model.gpus import GpuSample, GpuState
from scheduler.model.jobs import JobClass, JobState

_MIB = 1 << 20

# Gauges of a GPU: name, help, and the value in base units out of a sample.
_SAMPLED: tuple[tuple[str, str, Callable[[GpuSample], float | None]], ...] = (
    (
        "gpu_utilization_ratio",
        "Part of the last period in which a kernel ran.",
        lambda s: s.utilization_ratio,
    ),
    ("gpu_memory_used_bytes", "GPU memory in use.", lambda s: _scaled(s.memory_used_mib, _MIB)),
    ("gpu_power_watts", "Board draw.", lambda s: s.power_w),
    ("gpu_power_limit_watts", "Board power limit in force.", lambda s: s.power_limit_w),
    ("gpu_temperature_celsius", "Temperature of the GPU.", lambda s: s.temperature_celsius),
    ("gpu_sm_clock_hertz", "Clock of the multiprocessors.", lambda s: _scaled(s.sm_clock_mhz, 1e6)),
    ("gpu_power_average_watts", "Board draw over about a second.", lambda s: s.power_w_average),
    (
        "gpu_power_limit_enforced_watts",
        "Limit that holds; below the one that was asked for, somebody else caps too.",
        lambda s: s.power_limit_w_enforced,
    ),
    (
        "gpu_memory_temperature_celsius",
        "Temperature of the GPU's memory.",
        lambda s: s.memory_temperature_celsius,
    ),
    ("gpu_memory_clock_hertz", "Clock of the GPU's memory.", lambda s: _scaled(s.memory_clock_mhz, 1e6)),
    ("gpu_clock_reasons", "What holds the clock back: NVML's bits.", lambda s: s.clock_reasons),
    (
        "gpu_remap_pending",
        "1 where a row of memory is remapped at the next reset.",
        lambda s: s.is_remap_pending,
    ),
    (
        "gpu_recovery_action",
        "What the driver says that the GPU needs, 0 = nothing.",
        lambda s: s.recovery_action,
    ),
)


class NodeCollector(Collector):
    """Renders what DESIGN calls the metrics contract."""

    def __init__(self, controller: Controller) -> None:
        self._control = controller

    def collect(self) -> Iterable[Metric]:
        """All metric families, now."""
        control = self._control
        now_s = control.effects.clock.now_s()
        views = control.board.views(now_s)
        yield from self._gpus(views, now_s)
        yield from self._jobs()
        yield from self._meters()
        openadr = control.openadr.view(now_s)
        age_s = None if openadr is None else openadr.contact_age_s
        yield _gauge(
            "openadr_contact_age_seconds",
            "Time since the OpenADR VTN answered last; absent without one, and before it answered.",
            [] if age_s is None else [((), age_s)],
        )
        yield _gauge("inbox_depth", "Items that wait for the next tick.", [((), len(control.inbox))])
        yield _gauge("problems", "Problems that an operator should look at.", [((), len(control.problems))])
        yield _gauge("build_info", "This daemon.", [((control.site.version,), 1)], ("version",))

    def _gpus(self, views: list[GpuView], now_s: float) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "wattshift_gpu_info", "A GPU of this node.", labels=("gpu", "index", "model", "driver")
        )
        for view in views:
            one = view.identity
            info.add_metric((one.uuid, str(one.index), one.model, one.driver_version), 1)
        yield info
        samples = [(view.identity.uuid, view.sample) for view in views if view.sample is not None]
        for name, text, read in _SAMPLED:
            found = [((uuid,), value) for uuid, sample in samples if (value := read(sample)) is not None]
            yield _gauge(name, text, found, ("gpu",))
        yield _gauge(
            "gpu_memory_total_bytes",
            "GPU memory.",
            [((v.identity.uuid,), v.identity.memory_total_mib * _MIB) for v in views],
            ("gpu",),
        )
        yield _gauge(
            "gpu_sample_age_seconds",
            "Age of the last reading; it grows while a GPU does not answer.",
            [((uuid,), max(0.0, now_s - sample.at_s)) for uuid, sample in samples],
            ("gpu",),
        )
        yield _counter(
            "gpu_energy_joules",
            "Energy that the GPU counted since its driver was loaded.",
            {(uuid,): s.energy_mj / 1000.0 for uuid, s in samples if s.energy_mj is not None},
            ("gpu",),
        )
        yield _counter(
            "gpu_power_capped_seconds",
            "Time for which the power limit held the clock back, since the driver was loaded.",
            {(uuid,): s.power_capped_s for uuid, s in samples if s.power_capped_s is not None},
            ("gpu",),
        )
        state = GaugeMetricFamily(
            "wattshift_gpu_state", "1 for the GPU's present state.", labels=("gpu", "state")
        )
        for view in views:
            for one_state in GpuState:
                state.add_metric((view.identity.uuid, one_state.value), float(view.state is one_state))
        yield state

    def _jobs(self) -> Iterable[Metric]:
        jobs = Counter((job.spec.job_class, job.state) for job in self._control.ledger.jobs.values())
        active = [
            state
            for state in JobState
            if state not in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
        ]
        yield _gauge(
            "jobs",
            "Jobs that are not finished.",
            [((c.name.lower(), s.value.lower()), jobs[c, s]) for c in JobClass for s in active],
            ("class", "state"),
        )

    def _meters(self) -> Iterable[Metric]:
        m = self._control.meters
        classes = ("victim_class", "preemptor_class", "reason")
        yield _counter(
            "job_transitions",
            "Moves of jobs between states.",
            m.job_transitions,
            ("class", "state", "reason"),
        )
        yield _histogram("job_queue_wait_seconds", "From queued to started.", m.queue_wait_s, ("class",))
        yield _counter("preemptions", "Jobs that gave way to another.", m.preemptions, classes)
        yield _counter(
            "preemption_lost_gpu_seconds",
            "Work since the last checkpoint that preemptions cost, as planned.",
            m.preemption_lost_gpu_s,
            classes,
        )
        yield _histogram(
            "preemption_stage_seconds",
            "Each stage of a preemption from the one before; total: from decision to successor's start.",
            m.preemption_stage_s,
            ("stage", "victim_class"),
        )
        yield _counter("class_gpu_seconds", "GPU time held.", m.class_gpu_s, ("class",))
        yield _counter("class_energy_joules", "Energy by who held the GPU.", m.class_energy_j, ("class",))
        yield _counter("class_value_usd", "Value of the GPU time held.", m.class_value_usd, ("class",))
        yield _counter(
            "gpu_allocated_idle_seconds",
            "Time held with nothing running on it.",
            m.allocated_idle_s,
            ("gpu",),
        )
        yield _counter("gpu_errors", "Errors that the GPU reported.", m.gpu_errors, ("gpu", "kind"))
        yield _counter("telemetry_errors", "Readings that failed.", m.telemetry_errors, ("code",))
        yield _histogram("plan_seconds", "Time to make a plan.", {(): m.plan_s}, ())
        yield _histogram("tick_seconds", "Time of a whole turn of the loop.", {(): m.tick_s}, ())
        yield _histogram(
            "journal_append_seconds", "Time to make a tick durable.", {(): m.journal_append_s}, ()
        )
        yield _counter("tick_failures", "Turns of the loop that failed.", {(): m.tick_failures}, ())
        yield _counter("rpc_requests", "RPCs by outcome.", m.rpc_requests, ("method", "code"))
        yield _histogram("rpc_seconds", "Time of an RPC; of a stream, its life.", m.rpc_s, ("method", "code"))


def registry(collector: NodeCollector) -> CollectorRegistry:
    """A registry with the node's metrics and those of the process."""
    made = CollectorRegistry()
    made.register(collector)
    ProcessCollector(registry=made)
    return made


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _lower(labels: Labels, names: tuple[str, ...]) -> Labels:
    """Label values as dashboards write them: words of enums in lower case, but gRPC's codes and methods."""
    keep = {"gpu", "method", "code", "version"}
    return tuple(value if name in keep else value.lower() for name, value in zip(names, labels, strict=True))


def _gauge(
    name: str, text: str, values: Iterable[tuple[Labels, float]], labels: tuple[str, ...] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"wattshift_{name}", text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _counter(
    name: str, text: str, values: Mapping[Labels, float], labels: tuple[str, ...]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"wattshift_{name}", text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(_lower(key, labels), value)
    return family


def _histogram(
    name: str, text: str, values: Mapping[Labels, Histogram], labels: tuple[str, ...]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"wattshift_{name}", text, labels=labels)
    for key, histogram in sorted(values.items()):
        buckets, running = [], 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), running))
        family.add_metric(_lower(key, labels), buckets, histogram.total)
    return family
