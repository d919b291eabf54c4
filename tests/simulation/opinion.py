"""The world as the journal and the machine have it, for a second opinion on what the loop planned.

The loop plans from columns that it keeps up to date by change, through crashes, rollbacks and restarts. Here
the same world is made anew from the jobs themselves, by other code (`tests/fakes/worlds.py`): the plan must
be the same, and the exhaustive search of `tests/properties/oracle.py` must agree with it.
"""

from scheduler.control.board import Occupant
from scheduler.control.loop import Controller
from scheduler.control.table import gave_way, microseconds
from scheduler.model.jobs import Job, JobState, job_number
from scheduler.model.policy import aged_priority
from scheduler.model.snapshot import DRAINING, DRAINING_STOP, NOT_DRAINING
from tests.fakes.worlds import PENDING, UNKNOWN, G, HandOver, J, N, W


def world_of(controller: Controller, now_s: float) -> W | None:
    """The world of the loop's node; None where it is about watts or prices, or a job's GPU was never seen."""
    ledger, board = controller.ledger, controller.board
    if board.power() is not None or ledger.table.energy is not None:
        return None
    jobs = tuple(_job(job, controller) for job in sorted(ledger.jobs.values(), key=lambda job: job.number))
    if any(uuid not in board.row for job in jobs for uuid in job.on):
        return None
    closed = {*ledger.marks, *board.foreign, *controller.telemetry.silent}
    gpus = tuple(
        G(
            uuid=gpu.uuid,
            index=gpu.index,
            memory_mib=board.bookable_mib(gpu),
            model=gpu.model,
            is_open=not board.released and gpu.uuid not in closed and board.is_present(gpu.uuid),
            numa=UNKNOWN if gpu.numa is None else gpu.numa,
        )
        for gpu in board.identities
    )
    drain = ledger.drain
    (size,) = board.sizes
    node = N(
        size.cpus,
        size.memory_mib,
        size.live_jobs_max,
        NOT_DRAINING if drain is None else DRAINING_STOP if drain.stop_jobs else DRAINING,
    )
    left = tuple(
        _left(controller, uuid, occupant)
        for uuid, occupants in board.occupants().items()
        if uuid in board.row
        for occupant in occupants
    )
    return W(jobs=jobs, gpus=gpus, nodes=(node,), handovers=left, now_us=microseconds(now_s))


def _job(job: Job, controller: Controller) -> J:
    spec, last = job.spec, job.last
    policy = controller.config.policy
    live = last if job.state is not JobState.PENDING else None
    preemptor, stop_us = gave_way(live.notice if live else None)
    expected_s = job.expected_attempt_s
    if expected_s is not None:
        expected_s += controller.power.slowed.behind_s(job)
    return J(
        number=job.number,
        job_class=int(spec.job_class),
        state=job.state.value if live else PENDING,
        on=live.gpus if live else (),
        priority=aged_priority(spec.job_class, spec.priority, job.preemptions, policy),
        value=spec.value_microusd_per_gpu_hour,
        gpus=spec.gpus,
        share_milli=spec.gpu_share_milli,
        gpu_memory_mib=spec.gpu_memory_mib,
        cpus=spec.cpus,
        memory_mib=spec.memory_mib,
        preemptible=spec.preemptible,
        eligible_us=microseconds(job.eligible_s),
        min_runtime_us=microseconds(spec.min_runtime_s),
        grace_us=microseconds(spec.grace_s),
        restart_loss_us=microseconds(spec.restart_loss_s),
        expected_us=microseconds(expected_s),
        deadline_us=microseconds(spec.deadline_s),
        time_limit_us=microseconds(spec.time_limit_s),
        started_us=microseconds(live.started_s) if live else UNKNOWN,
        checkpoint_us=microseconds(live.checkpoint_s) if live else UNKNOWN,
        node=live.node if live else UNKNOWN,
        preemptor=preemptor,
        stop_us=stop_us,
    )


def _left(controller: Controller, uuid: str, occupant: Occupant) -> HandOver:
    """What an ended attempt still has of a GPU, and for whom it went."""
    number = job_number(occupant.job_id) if occupant.job_id else None
    job = None if number is None else controller.ledger.job(number)
    attempt = None if job is None else next((a for a in job.attempts if a.number == occupant.attempt), None)
    preemptor, stop_us = gave_way(attempt.notice if attempt else None)
    return HandOver(uuid, occupant.share_milli, occupant.memory_mib, preemptor, stop_us)
