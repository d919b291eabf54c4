"""Model values as protobuf messages, and protobuf messages as model values; total in both directions."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from scheduler.control.board import GpuView
from scheduler.effects.journal import UsageRow
from scheduler.errors import FieldViolation, InvalidRequest
from scheduler.model.gpus import GpuState
from scheduler.model.jobs import (
    SHARE_MILLI_WHOLE,
    Attempt,
    Job,
    JobClass,
    JobSpec,
    JobState,
    OnPreempt,
    RestartRule,
)
from scheduler.model.policy import PRIORITY_MAX, Policy
from scheduler.model.reasons import Reason
from scheduler.model.settings import MICROUSD_PER_USD, PRIORITY_DEFAULT, JobsConfig
from scheduler.v1 import job_pb2, node_pb2, reason_pb2, usage_pb2

NAME_CHARS_MAX = 128
TENANT_CHARS_MAX = 64
REQUEST_ID_CHARS_MAX = 128
COMMAND_WORDS_MAX = 1024
COMMAND_BYTES_MAX = 128 * 1024  # Linux takes no longer single string
GPUS_MAX = 4096
MODELS_MAX = 16
VALUE_USD_MAX = 1_000_000.0
DURATION_S_MAX = 10 * 365 * 86_400.0
MEMORY_MIB_MAX = 1 << 40
DRAW_W_MAX = 100_000.0
CPUS_MAX = 1_000_000
_INT32_MAX = 2**31 - 1

_T = TypeVar("_T")

_CLASSES: dict[JobClass, Any] = {cls: job_pb2.JobClass.Value(f"JOB_CLASS_{cls.name}") for cls in JobClass}
_CLASSES_BACK = {value: cls for cls, value in _CLASSES.items()}
_STATES: dict[JobState, Any] = {
    state: job_pb2.JobState.Value(f"JOB_STATE_{state.value}") for state in JobState
}
_STATES_BACK = {value: state for state, value in _STATES.items()}
_REASONS: dict[Reason, Any] = {reason: reason_pb2.Reason.Value(f"REASON_{reason.value}") for reason in Reason}
_GPU_STATES: dict[GpuState, Any] = {
    state: node_pb2.GpuState.Value(f"GPU_STATE_{state.name}") for state in GpuState
}
_ON_PREEMPT: dict[OnPreempt, Any] = {
    kind: job_pb2.OnPreempt.Value(f"ON_PREEMPT_{kind.value}") for kind in OnPreempt
}
_ON_PREEMPT_BACK = {0: OnPreempt.REQUEUE} | {value: kind for kind, value in _ON_PREEMPT.items()}
_RESTART: dict[RestartRule, Any] = {
    rule: job_pb2.RestartRule.Value(f"RESTART_RULE_{rule.value}") for rule in RestartRule
}
_RESTART_BACK = {0: RestartRule.NEVER} | {value: rule for rule, value in _RESTART.items()}


class Violations:
    """Collects what is wrong, so that a caller learns all of it at once."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self.found.append(FieldViolation(field, description))

    def number(self, field: str, value: float, low: float, high: float, unit: str) -> float:
        """The value, if it is a number between low and high; low otherwise, noted."""
        if not math.isfinite(value) or not low <= value <= high:
            self.add(field, f"is {value:g}; give {low:g} to {high:g} {unit}".rstrip())
            return low
        return value

    def text(self, field: str, value: str, chars_max: int) -> str:
        """The text, if it is short enough and has no control characters."""
        if len(value) > chars_max:
            self.add(field, f"has {len(value)} characters; give at most {chars_max}")
        elif any(ord(char) < 32 or ord(char) == 127 for char in value):
            self.add(field, "has control characters; leave them out")
        return value

    def words(self, field: str, words: tuple[str, ...]) -> tuple[str, ...]:
        """argv, if an exec can take it."""
        if len(words) > COMMAND_WORDS_MAX:
            self.add(field, f"has {len(words)} words; give at most {COMMAND_WORDS_MAX}")
        for index, word in enumerate(words):
            if "\0" in word:
                self.add(f"{field}[{index}]", "has a NUL byte; no program can receive it")
        if sum(len(word.encode(errors="surrogatepass")) + 1 for word in words) > COMMAND_BYTES_MAX:
            self.add(field, f"is longer than {COMMAND_BYTES_MAX} bytes; put the data into a file")
        return words

    def check(self) -> None:
        """Raise InvalidRequest if anything is wrong."""
        if self.found:
            raise InvalidRequest(*self.found)


def job_spec(
    message: job_pb2.JobSpec,
    policy: Policy,
    limits: JobsConfig,
    now_s: float,
    prefix: str = "spec.",
) -> tuple[JobSpec, dict[str, str]]:
    """The job that a message describes, defaults filled in, and its environment.

    Raises:
        InvalidRequest: Fields are wrong; each is named, under `prefix`.
    """
    found = Violations()
    command = found.words(prefix + "command", tuple(message.command))
    if not command or not command[0]:
        found.add(prefix + "command", "is empty; give the program and its arguments")
    job_class = _CLASSES_BACK.get(getattr(message, "class"))
    if job_class is None:
        found.add(prefix + "class", f"is unknown; give one of {', '.join(c.name for c in JobClass)}")
        job_class = JobClass.BATCH
    defaults = policy.classes[job_class]
    environment = _environment(message, limits, found, prefix)
    share, gpus = _request(message, found, prefix)
    _enums(message, found, prefix)

    def seconds(name: str, default: float, high: float = DURATION_S_MAX) -> float:
        value = getattr(message, name) if message.HasField(name) else default
        return found.number(prefix + name, value, 0.0, high, "seconds")

    def positive(name: str) -> float | None:
        if not message.HasField(name):
            return None
        return found.number(prefix + name, getattr(message, name), 0.001, DURATION_S_MAX, "seconds")

    def whole(name: str, default: int, high: int, unit: str) -> int:
        value = getattr(message, name) if message.HasField(name) else default
        return int(found.number(prefix + name, value, 0, high, unit))

    value_usd = defaults.value_usd_per_gpu_hour
    if message.HasField("value_usd_per_gpu_hour"):
        value_usd = found.number(
            prefix + "value_usd_per_gpu_hour",
            message.value_usd_per_gpu_hour,
            0.0,
            VALUE_USD_MAX,
            "USD per GPU-hour",
        )
    spec = JobSpec(
        name=found.text(prefix + "name", message.name, NAME_CHARS_MAX) or _base_name(command),
        command=command,
        job_class=job_class,
        priority=whole("priority", PRIORITY_DEFAULT, PRIORITY_MAX, ""),
        value_microusd_per_gpu_hour=round(value_usd * MICROUSD_PER_USD),
        gpus=gpus,
        gpu_share_milli=share,
        gpu_memory_mib=whole("gpu_memory_mib", defaults.gpu_memory_mib, MEMORY_MIB_MAX, "MiB"),
        gpu_models=_models(message, found, prefix),
        cpus=whole("cpus", defaults.cpus, CPUS_MAX, "CPUs"),
        memory_mib=whole("memory_mib", defaults.memory_mib, MEMORY_MIB_MAX, "MiB"),
        preemptible=message.preemptible if message.HasField("preemptible") else defaults.preemptible,
        on_preempt=_ON_PREEMPT_BACK.get(message.on_preempt, OnPreempt.REQUEUE),
        grace_s=seconds("grace_s", defaults.grace_s, limits.grace_s_max),
        min_runtime_s=seconds("min_runtime_s", defaults.min_runtime_s),
        restart_loss_s=seconds("restart_loss_s", defaults.restart_loss_s),
        exit_zero_is_done=message.exit_zero_is_done,
        restart=_RESTART_BACK.get(message.restart, RestartRule.NEVER),
        working_directory=_directory(message.working_directory, found, prefix),
        stop_command=found.words(prefix + "stop_command", tuple(message.stop_command)),
        expected_duration_s=positive("expected_duration_s"),
        deadline_s=_deadline(message, found, prefix, now_s),
        time_limit_s=positive("time_limit_s"),
        draw_w=found.number(prefix + "draw_w", message.draw_w, 0.0, DRAW_W_MAX, "W")
        if message.HasField("draw_w")
        else None,
        pinned_memory_mib=int(
            found.number(prefix + "pinned_memory_mib", message.pinned_memory_mib, 0, _INT32_MAX, "MiB")
        ),
        tenant=found.text(prefix + "tenant", message.tenant, TENANT_CHARS_MAX),
    )
    found.check()
    return spec, environment


def with_environment_digest(spec: JobSpec, digest: str) -> JobSpec:
    """The specification with the salted digest of its environment."""
    return replace(spec, environment_digest=digest)


def _environment(
    message: job_pb2.JobSpec, limits: JobsConfig, found: Violations, prefix: str
) -> dict[str, str]:
    environment = dict(message.environment)
    size = 0
    for name, value in environment.items():
        size += len(name.encode(errors="surrogatepass")) + len(value.encode(errors="surrogatepass")) + 2
        if not name or "=" in name or "\0" in name or "\0" in value:
            shown = name.replace("\0", "\\0")[:NAME_CHARS_MAX]
            found.add(
                f"{prefix}environment[{shown}]", "names are not empty, without '='; nothing holds a NUL byte"
            )
    if size > limits.environment_bytes_max:
        found.add(
            prefix + "environment",
            f"has {size} bytes; jobs.environment_bytes_max is {limits.environment_bytes_max}. Use a file",
        )
    return environment


def _request(message: job_pb2.JobSpec, found: Violations, prefix: str) -> tuple[int, int]:
    share = message.gpu_share_milli or SHARE_MILLI_WHOLE
    gpus = message.gpus if message.HasField("gpus") else 1
    found.number(prefix + "gpus", gpus, 0, GPUS_MAX, "GPUs")
    found.number(prefix + "gpu_share_milli", share, 1, SHARE_MILLI_WHOLE, "thousandths of a GPU")
    if share < SHARE_MILLI_WHOLE and gpus != 1:
        found.add(
            prefix + "gpu_share_milli",
            f"is a share of one GPU, but gpus is {gpus}; give gpus = 1 or no share",
        )
    ok = 0 <= gpus <= GPUS_MAX and 1 <= share <= SHARE_MILLI_WHOLE
    return (share, gpus) if ok else (SHARE_MILLI_WHOLE, 1)


def _enums(message: job_pb2.JobSpec, found: Violations, prefix: str) -> None:
    if message.on_preempt not in _ON_PREEMPT_BACK:
        found.add(prefix + "on_preempt", f"is unknown; give one of {', '.join(k.value for k in OnPreempt)}")
    if message.restart not in _RESTART_BACK:
        found.add(prefix + "restart", f"is unknown; give one of {', '.join(r.value for r in RestartRule)}")


def _models(message: job_pb2.JobSpec, found: Violations, prefix: str) -> tuple[str, ...]:
    if len(message.gpu_models) > MODELS_MAX:
        found.add(prefix + "gpu_models", f"names {len(message.gpu_models)} models; give at most {MODELS_MAX}")
    for index, model in enumerate(message.gpu_models):
        found.text(f"{prefix}gpu_models[{index}]", model, NAME_CHARS_MAX)
        if not model.strip():
            found.add(f"{prefix}gpu_models[{index}]", "is empty; name a model such as H100")
    return tuple(sorted(set(message.gpu_models)))


def _directory(path: str, found: Violations, prefix: str) -> str:
    if path and (not path.startswith("/") or "\0" in path or len(path) > os.pathconf("/", "PC_PATH_MAX")):
        found.add(prefix + "working_directory", "is not an absolute path; begin with /")
    return path


def _deadline(message: job_pb2.JobSpec, found: Violations, prefix: str, now_s: float) -> float | None:
    if not message.HasField("deadline"):
        return None
    deadline_s = message.deadline.seconds + message.deadline.nanos / 1e9
    if deadline_s <= now_s:
        found.add(prefix + "deadline", "is in the past; give a moment to come, or none")
    found.number(prefix + "deadline", deadline_s, 0.0, now_s + DURATION_S_MAX, "seconds since 1970")
    return deadline_s


def _base_name(command: tuple[str, ...]) -> str:
    name = command[0].rpartition("/")[2] if command else ""
    return "".join(char if char.isprintable() else "?" for char in name)[:NAME_CHARS_MAX]


# Outward ---------------------------------------------------------------------------------------


def timestamp(at_s: float | None) -> Timestamp | None:
    """A time as protobuf says it; None stays unset."""
    if at_s is None:
        return None
    nanos = round(at_s * 1e6) * 1000
    return Timestamp(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def seconds(stamp: Timestamp) -> float:
    """Unix seconds of a timestamp."""
    return float(stamp.seconds + stamp.nanos / 1e9)


def reason(value: Reason) -> Any:
    """A reason as protobuf says it."""
    return _REASONS[value]


def job_class(value: JobClass) -> Any:
    """A class as protobuf says it."""
    return _CLASSES[value]


def job_classes(values: Iterable[int], field: str) -> tuple[int, ...]:
    """The classes that a filter names."""
    return tuple(int(_known(_CLASSES_BACK, value, field)) for value in values)


def job_states(values: Iterable[int], field: str) -> tuple[str, ...]:
    """The states that a filter names."""
    return tuple(_known(_STATES_BACK, value, field).value for value in values)


def _known(table: Mapping[int, _T], value: int, field: str) -> _T:
    known = table.get(value)
    if known is None:
        raise InvalidRequest(FieldViolation(field, f"has the unknown value {value}"))
    return known


def job(value: Job, priority: int) -> job_pb2.Job:
    """A job as clients see it, with its aged priority; never the values of its environment."""
    spec = value.spec
    message = job_pb2.Job(
        id=value.id,
        name=spec.name,
        state=_STATES[value.state],
        reason=_REASONS[value.reason],
        detail=value.detail,
        state_since=timestamp(value.state_since_s),
        priority=priority,
        attempts=[attempt(one) for one in value.attempts],
        attempt=value.attempt,
        submitted_at=timestamp(value.submitted_s),
        finished_at=timestamp(value.finished_s),
        eligible_at=timestamp(value.eligible_s or None),
        preemptions=value.preemptions,
        standing_job=value.standing,
        request_id=value.request_id,
        revision=value.revision,
        spec=spec_message(spec),
        exit_code=value.exit_code,
    )
    setattr(message, "class", _CLASSES[spec.job_class])
    return message


def attempt(value: Attempt) -> job_pb2.Attempt:
    """One start of a job."""
    notice = None
    if value.notice is not None:
        notice = job_pb2.Notice(
            reason=_REASONS[value.notice.reason],
            decided_at=timestamp(value.notice.decided_s),
            deadline=timestamp(value.notice.deadline_s),
        )
    return job_pb2.Attempt(
        number=value.number,
        gpus=value.gpus,
        gpu_share_milli=value.gpu_share_milli,
        pid=value.pid or 0,
        decided_at=timestamp(value.decided_s),
        started_at=timestamp(value.started_s),
        notice=notice,
        preempted_by=value.preempted_by,
        preempted=value.preempted,
        signalled_at=timestamp(value.signalled_s),
        acknowledged_at=timestamp(value.acknowledged_s),
        exited_at=timestamp(value.exited_s),
        verified_at=timestamp(value.verified_s),
        successor_started_at=timestamp(value.successor_started_s),
        checkpoint_at=timestamp(value.checkpoint_s),
        exit_code=value.exit_code,
        lost=value.lost,
        end_reason=_REASONS[value.end_reason] if value.end_reason else reason_pb2.REASON_UNSPECIFIED,
    )


def spec_message(spec: JobSpec) -> job_pb2.JobSpec:
    """A specification as it was accepted."""
    message = job_pb2.JobSpec(
        name=spec.name,
        command=spec.command,
        working_directory=spec.working_directory,
        stop_command=spec.stop_command,
        priority=spec.priority,
        value_usd_per_gpu_hour=spec.value_microusd_per_gpu_hour / MICROUSD_PER_USD,
        gpus=spec.gpus,
        gpu_share_milli=spec.gpu_share_milli if spec.is_share else 0,
        gpu_memory_mib=spec.gpu_memory_mib,
        gpu_models=spec.gpu_models,
        cpus=spec.cpus,
        memory_mib=spec.memory_mib,
        preemptible=spec.preemptible,
        on_preempt=_ON_PREEMPT[spec.on_preempt],
        grace_s=spec.grace_s,
        min_runtime_s=spec.min_runtime_s,
        restart_loss_s=spec.restart_loss_s,
        exit_zero_is_done=spec.exit_zero_is_done,
        expected_duration_s=spec.expected_duration_s,
        deadline=timestamp(spec.deadline_s),
        time_limit_s=spec.time_limit_s,
        restart=_RESTART[spec.restart],
        draw_w=spec.draw_w,
        pinned_memory_mib=spec.pinned_memory_mib,
        tenant=spec.tenant,
    )
    setattr(message, "class", _CLASSES[spec.job_class])
    return message


def gpu(view: GpuView) -> node_pb2.Gpu:
    """A GPU; what it does not report stays unset."""
    identity, sample = view.identity, view.sample
    message = node_pb2.Gpu(
        uuid=identity.uuid,
        index=identity.index,
        model=identity.model,
        pci_bus_id=identity.pci_bus_id,
        state=_GPU_STATES[view.state],
        reason=_REASONS[view.reason],
        detail=view.detail,
        state_since=timestamp(view.since_s),
        job_ids=view.job_ids,
        free_share_milli=view.free_share_milli,
        memory_total_mib=identity.memory_total_mib,
        power_limit_w_min=identity.power_limit_w_min,
        power_limit_w_max=identity.power_limit_w_max,
        processes=[
            node_pb2.GpuProcess(pid=p.pid, memory_mib=p.memory_mib, user=p.user, command=p.command)
            for p in view.foreign
        ],
    )
    if sample is not None:
        message.MergeFrom(
            node_pb2.Gpu(
                memory_used_mib=sample.memory_used_mib,
                utilization_ratio=sample.utilization_ratio,
                power_w=sample.power_w,
                power_limit_w=sample.power_limit_w,
                energy_j=None if sample.energy_mj is None else sample.energy_mj / 1000.0,
                temperature_celsius=sample.temperature_celsius,
                sm_clock_mhz=sample.sm_clock_mhz,
                sampled_at=timestamp(sample.at_s),
            )
        )
    return message


def usage(row: UsageRow) -> usage_pb2.Usage:
    """A sum of usage."""
    return usage_pb2.Usage(
        key=row.key,
        gpu_seconds=row.gpu_ms / 1000.0,
        energy_wh=row.energy_mj / 3_600_000.0,
        value_usd=row.value_microusd / MICROUSD_PER_USD,
        preemptions=row.preemptions,
    )
