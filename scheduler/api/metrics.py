"""The metrics page, made of the controller's last state and its meters.

Nothing is kept here: a label combination that is gone in the state is gone on the page.
"""

from collections import Counter
from collections.abc import Mapping

from prometheus_client import ProcessCollector

from scheduler.api.exposition import Page
from scheduler.api.gpu_metrics import GPU, put_gpus
from scheduler.api.mining_metrics import put_mining
from scheduler.api.power_metrics import put_power
from scheduler.control.loop import Controller
from scheduler.control.meters import Labels
from scheduler.model.jobs import FINAL_STATES, JobClass, JobState

_ACTIVE = tuple(state for state in JobState if state not in FINAL_STATES)


class NodeMetrics:
    """Renders the page of metrics."""

    def __init__(self, controller: Controller) -> None:
        self._control = controller
        self._process = ProcessCollector(registry=None)

    def page(self) -> bytes:
        """Return all metrics as they are now, those of the process last."""
        control = self._control
        now_s = control.effects.clock.now_s()
        page = Page()
        put_gpus(page, control.board.views(now_s), control.meters.gpu_energy_j, now_s)
        self._put_jobs(page)
        put_power(page, control, now_s)
        put_mining(page, control, now_s)
        self._put_meters(page)
        openadr = control.openadr.view(now_s)
        age_s = None if openadr is None else openadr.contact_age_s
        page.gauge(
            "openadr_contact_age_seconds",
            "Time since the OpenADR VTN answered last; absent without one, and before it answered.",
            [] if age_s is None else [((), age_s)],
        )
        page.gauge("inbox_depth", "Items that wait for the next tick.", [((), len(control.inbox))])
        page.gauge("problems", "Problems that an operator should look at.", [((), len(control.problems))])
        page.gauge("build_info", "This daemon.", [((control.site.version,), 1)], ("version",))
        for metric in self._process.collect():
            page.family(metric)
        return page.encoded()

    def _put_jobs(self, page: Page) -> None:
        jobs = Counter((job.spec.job_class, job.state) for job in self._control.ledger.jobs.values())
        page.gauge(
            "jobs",
            "Jobs that are not finished.",
            (((c.name, s.value), jobs[c, s]) for c in JobClass for s in _ACTIVE),
            ("class", "state"),
        )

    def _put_meters(self, page: Page) -> None:
        m = self._control.meters
        classes = ("victim_class", "preemptor_class", "reason")
        page.counter(
            "job_transitions",
            "Moves of jobs between states.",
            sorted(m.job_transitions.items()),
            ("class", "state", "reason"),
        )
        page.histogram("job_queue_wait_seconds", "From queued to started.", m.queue_wait_s, ("class",))
        page.counter("preemptions", "Jobs that gave way to another.", sorted(m.preemptions.items()), classes)
        page.counter(
            "preemption_lost_gpu_seconds",
            "Work since the last checkpoint that preemptions cost, as planned.",
            sorted(m.preemption_lost_gpu_s.items()),
            classes,
        )
        page.histogram(
            "preemption_stage_seconds",
            "Each stage of a preemption from the one before; total: from decision to successor's start.",
            m.preemption_stage_s,
            ("stage", "victim_class"),
        )
        page.counter("class_gpu_seconds", "GPU time held.", sorted(m.class_gpu_s.items()), ("class",))
        page.counter(
            "class_energy_joules", "Energy by who held the GPU.", sorted(m.class_energy_j.items()), ("class",)
        )
        page.counter(
            "class_value_usd", "Value of the GPU time held.", sorted(m.class_value_usd.items()), ("class",)
        )
        page.counter(
            "gpu_allocated_idle_seconds",
            "Time held with nothing running on it.",
            self._known(m.allocated_idle_s),
            GPU,
        )
        page.counter(
            "gpu_errors", "Errors that the GPU reported.", self._known(m.gpu_errors), ("gpu", "kind")
        )
        page.counter("telemetry_errors", "Readings that failed.", _named(m.telemetry_errors), ("code",))
        page.histogram("plan_seconds", "Time to make a plan.", {(): m.plan_s})
        page.histogram("tick_seconds", "Time of a whole turn of the loop.", {(): m.tick_s})
        page.histogram("journal_append_seconds", "Time to make a tick durable.", {(): m.journal_append_s})
        page.counter("tick_failures", "Turns of the loop that failed.", [((), m.tick_failures)])
        page.counter("rpc_requests", "RPCs by outcome.", sorted(m.rpc_requests.items()), ("method", "code"))
        page.histogram("rpc_seconds", "Time of an RPC; of a stream, its life.", m.rpc_s, ("method", "code"))

    def _known(self, by_gpu: Mapping[Labels, float]) -> list[tuple[Labels, float]]:
        """Return what the GPUs have that there are: instances of MIG come and go for good."""
        row = self._control.board.row
        return [(labels, value) for labels, value in sorted(by_gpu.items()) if labels[0] in row]


def _named(by_code: Mapping[Labels, float]) -> list[tuple[Labels, float]]:
    """Return sums by code; numbers without a name, of which a library may have any, are one."""
    sums: Counter[Labels] = Counter()
    for (code,), count in by_code.items():
        sums[("ERROR_OTHER" if code.removeprefix("ERROR_").isdecimal() else code,)] += int(count)
    return sorted(sums.items())
