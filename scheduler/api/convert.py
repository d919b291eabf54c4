"""Model values as protobuf messages."""

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from scheduler.control.board import GpuView
from scheduler.effects.journal import UsageRow
from scheduler.model.gpus import GpuIdentity, GpuSample, GpuState
from scheduler.model.jobs import Attempt, Job, JobClass, JobSpec, JobState, OnPreempt, RestartRule
from scheduler.model.mining import Miner, MinerApi
from scheduler.model.power import GridEvent, ShedState
from scheduler.model.reasons import Reason
from scheduler.model.settings import MICROUSD_PER_USD
from scheduler.v1 import job_pb2, node_pb2, power_pb2, reason_pb2, usage_pb2

MJ_PER_J = 1000.0
MJ_PER_WH = 3_600_000.0

_CLASSES: dict[JobClass, Any] = {cls: job_pb2.JobClass.Value(f"JOB_CLASS_{cls.name}") for cls in JobClass}
_STATES: dict[JobState, Any] = {
    state: job_pb2.JobState.Value(f"JOB_STATE_{state.value}") for state in JobState
}
_REASONS: dict[Reason, Any] = {reason: reason_pb2.Reason.Value(f"REASON_{reason.value}") for reason in Reason}
_GPU_STATES: dict[GpuState, Any] = {
    state: node_pb2.GpuState.Value(f"GPU_STATE_{state.name}") for state in GpuState
}
_ON_PREEMPT: dict[OnPreempt, Any] = {
    kind: job_pb2.OnPreempt.Value(f"ON_PREEMPT_{kind.value}") for kind in OnPreempt
}
_RESTART: dict[RestartRule, Any] = {
    rule: job_pb2.RestartRule.Value(f"RESTART_RULE_{rule.value}") for rule in RestartRule
}
SHED_STATES: dict[ShedState, Any] = {
    state: power_pb2.ShedState.Value(f"SHED_STATE_{state.value}") for state in ShedState
}
_MINER_APIS: dict[MinerApi, Any] = {api: job_pb2.MinerApi.Value(f"MINER_API_{api.name}") for api in MinerApi}


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


def miner_api(value: MinerApi) -> Any:
    """A miner's API as protobuf says it."""
    return _MINER_APIS[value]


def job(value: Job, priority: int, why: Reason) -> job_pb2.Job:
    """A job as clients see it, with its aged priority and what it waits for; never its environment."""
    spec = value.spec
    message = job_pb2.Job(
        id=value.id,
        name=spec.name,
        state=_STATES[value.state],
        reason=_REASONS[why],
        detail=value.detail if why is value.reason else "",
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
        energy_j=value.energy_mj / MJ_PER_J,
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
        energy_j=value.energy_mj / MJ_PER_J,
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
        miner=None if spec.miner is None else _miner(spec.miner),
    )
    setattr(message, "class", _CLASSES[spec.job_class])
    return message


def _miner(miner: Miner) -> job_pb2.Miner:
    return job_pb2.Miner(
        api=_MINER_APIS[miner.api],
        port=miner.port,
        algorithm=miner.algorithm,
        fee_ratio=miner.fee_ratio,
        token_variable=miner.token_variable,
    )


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
        parent_uuid=identity.parent_uuid,
        slices=identity.slices,
        processes=[
            node_pb2.GpuProcess(pid=p.pid, memory_mib=p.memory_mib, user=p.user, command=p.command)
            for p in view.foreign
        ],
        telemetry_problems=view.telemetry_problems,
        power_scope=identity.power_scope,
    )
    if sample is not None:
        message.MergeFrom(
            node_pb2.Gpu(
                memory_used_mib=sample.memory_used_mib,
                utilization_ratio=sample.utilization_ratio,
                power_w=sample.power_w,
                power_limit_w=sample.power_limit_w,
                energy_j=_energy_j(identity, sample),
                temperature_celsius=sample.temperature_celsius,
                sm_clock_mhz=sample.sm_clock_mhz,
                sampled_at=timestamp(sample.at_s),
            )
        )
    return message


def _energy_j(identity: GpuIdentity, sample: GpuSample) -> float | None:
    """What the GPU's own counter shows; an instance's sample has its whole GPU's."""
    if sample.energy_mj is None or identity.parent_uuid:
        return None
    return sample.energy_mj / MJ_PER_J


def usage(row: UsageRow) -> usage_pb2.Usage:
    """A sum of usage; the cost of energy whose price nobody knew stays unset, it is not zero."""
    is_priced = row.unpriced_mj < row.energy_mj or not row.energy_mj
    cost_microusd = row.cost_microusd if is_priced else None
    return usage_pb2.Usage(
        key=row.key,
        gpu_seconds=row.gpu_ms / 1000.0,
        energy_wh=row.energy_mj / MJ_PER_WH,
        value_usd=row.value_microusd / MICROUSD_PER_USD,
        preemptions=row.preemptions,
        cost_usd=_usd(cost_microusd),
        unpriced_energy_wh=row.unpriced_mj / MJ_PER_WH,
        profit_usd=_usd(None if cost_microusd is None else row.value_microusd - cost_microusd),
    )


def _usd(microusd: int | None) -> float | None:
    return None if microusd is None else microusd / MICROUSD_PER_USD


def grid_event(event: GridEvent) -> power_pb2.GridEvent:
    """A grid event as clients see it."""
    return power_pb2.GridEvent(
        id=event.id,
        start=timestamp(event.start_s),
        end=timestamp(event.end_s),
        budget_w=event.budget_w,
        emergency=event.emergency,
        floor_w=event.floor_w,
        state=SHED_STATES[event.state],
        accepted_at=timestamp(event.accepted_s),
        shed_began_at=timestamp(event.shed_began_s),
        shed_ended_at=timestamp(event.shed_ended_s),
        measured_w=event.measured_w,
        reasons=event.reasons,
        over=event.is_over,
    )
