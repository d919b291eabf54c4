"""Explanations and previews: the planner's facts in a person's words."""

from collections.abc import Iterable
from typing import assert_never

from google.protobuf.timestamp_pb2 import Timestamp

from scheduler.api import convert
from scheduler.control.loop import Controller
from scheduler.model.jobs import FINAL_STATES, Job, JobClass, JobSpec, JobState, job_id
from scheduler.model.reasons import Reason
from scheduler.model.settings import MICROUSD_PER_USD
from scheduler.planning.explain import Explanation, Obstacle, Preview, Remedy, RemedyKind, Rule
from scheduler.v1 import job_pb2, job_service_pb2

_US = 1_000_000
_WHOLE_SECONDS_FROM = 10.0
_NAMED_MAX = 5  # jobs or GPUs that a sentence names before it only counts

_OBSTACLES = {
    Rule.DRAINS: (Reason.NODE_DRAINING, "the node takes nothing new"),
    Rule.CLOSED: (Reason.GPU_CLOSED, ""),  # each has its own words
    Rule.MODEL: (Reason.GPU_MODEL_DIFFERS, "of another model than the job accepts"),
    Rule.INSTANCE: (
        Reason.GPU_IS_INSTANCE,
        "MIG instances, of which a CUDA program sees one: a job of several GPUs gets whole ones",
    ),
    Rule.GPU_MEMORY_SIZE: (Reason.GPU_MEMORY_TOO_SMALL, "with less memory than the job wants"),
    Rule.NOT_PREEMPTIBLE: (Reason.HELD_NOT_PREEMPTIBLE, "held by jobs that may not be preempted"),
    Rule.RANK: (Reason.HELD_BY_RANK, "held by jobs that this one does not outrank by enough"),
    Rule.MINIMUM_RUNTIME: (Reason.HELD_WITHIN_MINIMUM_RUNTIME, "held by jobs within their minimum runtime"),
    Rule.NODE_NOT_WHOLE: (
        Reason.NODE_NOT_WHOLE,
        "on nodes that it can't have whole: a gang over several nodes takes all GPUs of nodes of one model",
    ),
    Rule.CLAIMED: (Reason.CLAIMED_BY_HIGHER_RANK, "claimed by or promised to a job that goes first"),
    Rule.CPUS: (Reason.WAITING_FOR_CPUS, "CPUs are missing on the node"),
    Rule.MEMORY: (Reason.WAITING_FOR_MEMORY, "MiB of host memory are missing on the node"),
    Rule.POWER: (Reason.WAITING_FOR_POWER, "W of boards are missing in the budget"),
    Rule.START_SLOTS: (Reason.WAITING_FOR_START_SLOT, "places for jobs with a process are missing"),
}

_WAITS = {
    Reason.BACKING_OFF: "It backs off",
    Reason.NODE_DRAINING: "The node drains: nothing starts",
    Reason.WAITING_FOR_PRICE: "Its energy would cost more than it is worth: it waits for a lower price",
    Reason.NO_SUITABLE_GPU: "The GPUs that are open now could never serve it",
    Reason.WAITING_FOR_GPUS: "It waits for GPUs",
    Reason.WAITING_FOR_GPU_MEMORY: "It waits for GPU memory",
    Reason.WAITING_FOR_CPUS: "It waits for CPUs",
    Reason.WAITING_FOR_MEMORY: "It waits for host memory",
    Reason.WAITING_FOR_HANDOVER: "Its GPUs are on their way: it waits until they are proved free",
    Reason.WAITING_FOR_PROMISED_START: "It would delay the start that a higher-ranked job was promised",
    Reason.WAITING_FOR_POWER: "It waits for power: what it may draw doesn't fit the budget",
    Reason.WAITING_FOR_START_SLOT: "As many jobs have a process as the node allows",
    Reason.DEADLINE_UNREACHABLE: "It can't meet its deadline any more and fails",
}


def preview(control: Controller, spec: JobSpec) -> job_service_pb2.PreviewJobResponse:
    """What would happen if the job were submitted now."""
    found, free_in_s = control.preview(spec)
    victims = [_victim(control, one.number) for one in found.victims]
    start_within_s = max((found.start_within_us or 0) / _US, free_in_s)
    slow = [one.number for one in found.victims if _takes_too_long(control, one.number)]
    for message, one in zip(victims, found.victims, strict=True):
        message.gpus.extend(one.gpus)
        message.grace_s = one.grace_us / _US
        message.lost_gpu_seconds = one.lost_gpu_ms / 1000
        message.loss_usd = one.loss_microusd / MICROUSD_PER_USD
    return job_service_pb2.PreviewJobResponse(
        starts_now=found.starts_now,
        gpus=found.gpus,
        victims=victims,
        reason=convert.reason(found.reason) if found.reason else None,
        start_within_s=start_within_s,
        expected_start=_moment(found.expected_start_us),
        summary=_preview_summary(control, found, victims, start_within_s) + _slow_remark(control, slow),
    )


def explain(control: Controller, job: Job, message: job_pb2.Job) -> job_service_pb2.ExplainJobResponse:
    """Why a job is where it is, and what would have to change."""
    if job.state is not JobState.PENDING:
        return job_service_pb2.ExplainJobResponse(
            job=message,
            reason=convert.reason(job.reason),
            since=convert.timestamp(job.state_since_s),
            summary=_story(job),
        )
    found = control.explain(job)
    return job_service_pb2.ExplainJobResponse(
        job=message,
        reason=convert.reason(found.reason or Reason.SUBMITTED),
        since=convert.timestamp(job.queued_since_s),
        summary=_wait_summary(control, job, found),
        obstacles=[_obstacle(control, one) for one in found.obstacles],
        remedies=[_remedy(one, job.spec) for one in found.remedies],
        awaited=[job_id(number) for number in found.awaited],
        expected_start=_moment(found.expected_start_us),
        ahead=found.ahead,
    )


def _victim(control: Controller, number: int) -> job_service_pb2.Victim:
    job = control.ledger.jobs[number]
    handover_s = control.occupancy.forecast.handover_s(job)
    message = job_service_pb2.Victim(job_id=job.id, name=job.spec.name, handover_s=handover_s)
    setattr(message, "class", convert.job_class(job.spec.job_class))
    return message


def _takes_too_long(control: Controller, number: int) -> bool:
    handover_s = control.occupancy.forecast.handover_s(control.ledger.jobs[number])
    return handover_s > control.config.policy.handover_timeout_s


def _slow_remark(control: Controller, slow: list[int]) -> str:
    """What becomes of GPUs whose hand-over is expected to take longer than it may."""
    if not slow:
        return ""
    return (
        f" The hand-over from {_names(map(job_id, slow))} is expected to take longer than "
        f"policy.handover_timeout_s ({control.config.policy.handover_timeout_s:g} s): their GPUs would be "
        "quarantined until they are free."
    )


def _preview_summary(
    control: Controller, found: Preview, victims: list[job_service_pb2.Victim], start_within_s: float
) -> str:
    where = f" on {_count(len(found.gpus), 'GPU')}" if found.gpus else ""
    if found.starts_now:
        return f"It would start at once{where}; nobody would stop."
    if victims:
        names = _names(victim.job_id for victim in victims)
        handover_s = max(victim.handover_s for victim in victims)
        return (
            f"{names} would stop for it; it would start{where} within {_seconds(start_within_s)}, "
            f"of which about {_seconds(handover_s)} are to prove the GPUs free."
        )
    if found.reason is Reason.WAITING_FOR_HANDOVER:
        return f"{_WAITS[found.reason]}, within about {_seconds(start_within_s)}."
    if found.closed:
        return f"{_WAITS[Reason.NO_SUITABLE_GPU]}: {_closed(control, frozenset(found.closed))}."
    return f"{_WAITS.get(found.reason, 'It would wait')}." if found.reason else f"It would start{where}."


def _wait_summary(control: Controller, job: Job, found: Explanation) -> str:
    if found.reason is None:
        return "It starts with the next plan."
    now_s = control.effects.clock.now_s()
    words = _WAITS.get(found.reason, found.reason.value)
    if found.reason is Reason.WAITING_FOR_HANDOVER:
        free_in_s = control.occupancy.forecast.until_free_s(found.gpus, (), now_s)
        words += f", within about {_seconds(free_in_s)}"
    if found.reason is Reason.BACKING_OFF and found.eligible_us is not None:
        cause = job.eligible_reason.value.lower().replace("_", " ")
        words += f" for {max(0.0, found.eligible_us / _US - now_s):.1f} s more, after it was {cause}"
    if found.behind_promise_of is not None:
        words += f" ({job_id(found.behind_promise_of)})"
    if found.awaited:
        words += f"; stopping for it: {_names(job_id(number) for number in found.awaited)}"
    wants = f" It wants {_request(job.spec)}."
    ahead = f" {_count(found.ahead, 'waiting job')} ahead of it." if found.ahead else ""
    return words + "." + wants + ahead


def _story(job: Job) -> str:
    """A job that does not wait, in a sentence or two."""
    last = job.last
    reason = job.reason.value.lower().replace("_", " ")
    if job.state in FINAL_STATES:
        code = "" if job.exit_code is None else f", exit code {job.exit_code}"
        return f"It ended {job.state.value}: {reason}{code}" + (f" ({job.detail})." if job.detail else ".")
    if last is not None and last.notice is not None:
        cause = f" for {last.preempted_by}" if last.preempted_by else ""
        left_s = last.notice.deadline_s - last.notice.decided_s
        return f"It gives way{cause}: {reason}; it has {left_s:g} s of grace from the notice on."
    if job.state is JobState.SUSPENDED:
        return f"It is frozen ({reason}): it keeps its GPUs, and runs again when the budget has room for it."
    cause = ""
    if last is not None and last.preempted:
        cause = f"; {_names(last.preempted)} stopped for it"
    return f"It is {job.state.value}: {reason}{cause}."


def _request(spec: JobSpec) -> str:
    parts = [_count(spec.gpus, "GPU")]
    if spec.is_share:
        parts = [f"{spec.gpu_share_milli} thousandths of a GPU"]
    if spec.gpu_models:
        parts.append(f"of {' or '.join(spec.gpu_models)}")
    if spec.gpu_memory_mib:
        parts.append(f"{spec.gpu_memory_mib} MiB on each")
    if spec.cpus:
        parts.append(f"{spec.cpus} CPUs")
    if spec.memory_mib:
        parts.append(f"{spec.memory_mib} MiB of memory")
    return ", ".join(parts)


def _obstacle(control: Controller, obstacle: Obstacle) -> job_service_pb2.Obstacle:
    reason, words = _OBSTACLES[obstacle.rule]
    detail = f"{obstacle.lacking} {words}" if obstacle.lacking else words
    if obstacle.rule is Rule.CLOSED:
        detail = _closed(control, frozenset(obstacle.gpus))
    if obstacle.jobs:
        detail += f": {_names(job_id(number) for number in obstacle.jobs)}"
    return job_service_pb2.Obstacle(
        reason=convert.reason(reason), gpus=len(obstacle.gpus), nodes=obstacle.nodes, detail=detail
    )


def _closed(control: Controller, uuids: frozenset[str]) -> str:
    """Each closed GPU with its state and the facts behind it: who holds it, what it reported."""
    views = [v for v in control.board.views(control.effects.clock.now_s()) if v.identity.uuid in uuids]
    return _names(
        (
            f"GPU {view.identity.index} is {view.state.value}" + (f" ({view.detail})" if view.detail else "")
            for view in views
        ),
        "; ",
    )


def _remedy(remedy: Remedy, spec: JobSpec) -> str:
    amount = remedy.amount
    match remedy.kind:
        case RemedyKind.CLEAR_BACKOFF:
            return "end its back-off: `wattshift requeue`"
        case RemedyKind.UNDRAIN_NODE:
            return "end the drain: `wattshift undrain`"
        case RemedyKind.OPEN_GPUS:
            return f"open {_count(amount, 'closed GPU')}: `wattshift gpus` says why it is closed"
        case RemedyKind.FEWER_GPUS:
            return f"ask for {_count(amount, 'GPU')} instead of {spec.gpus}"
        case RemedyKind.LESS_GPU_MEMORY:
            return f"ask for at most {amount} MiB of GPU memory instead of {spec.gpu_memory_mib}"
        case RemedyKind.FEWER_CPUS:
            return f"ask for at most {amount} CPUs instead of {spec.cpus}"
        case RemedyKind.LESS_MEMORY:
            return f"ask for at most {amount} MiB of host memory instead of {spec.memory_mib}"
        case RemedyKind.ANY_MODEL:
            return "accept any GPU model"
        case RemedyKind.HIGHER_PRIORITY:
            return f"a priority of at least {amount} instead of {spec.priority}"
        case RemedyKind.HIGHER_VALUE:
            return f"a value of at least {amount / MICROUSD_PER_USD:.2f} USD per GPU-hour"
        case RemedyKind.CHEAPER_ENERGY:
            return f"energy that costs at most {amount / MICROUSD_PER_USD:.4f} USD per GPU-hour"
        case RemedyKind.HIGHER_CLASS:
            return f"the class {JobClass(amount).name} instead of {spec.job_class.name}"
        case RemedyKind.BE_PREEMPTIBLE:
            return "be preemptible"
        case RemedyKind.SHORTER_DURATION:
            return f"declare an expected duration of at most {amount / _US:g} s"
        case RemedyKind.MORE_POWER:
            return f"a budget that leaves the GPU boards {amount} W more: `wattshift power status`"
        case RemedyKind.LESS_DRAW:
            return f"declare a draw of at most {amount} W per GPU: its power limit keeps it there"
        case _:
            assert_never(remedy.kind)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < _WHOLE_SECONDS_FROM else f"{seconds:.0f} s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _names(ids: Iterable[str], between: str = ", ") -> str:
    named = list(ids)
    more = len(named) - _NAMED_MAX
    return between.join(named[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def _moment(at_us: int | None) -> Timestamp | None:
    return None if at_us is None else convert.timestamp(at_us / _US)
