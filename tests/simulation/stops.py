"""Nobody is told to stop without a cause; each cause is looked for where it would be, outside the loop."""

from typing import TYPE_CHECKING

from scheduler.model.jobs import Attempt, Job, JobState, job_number
from scheduler.model.reasons import Reason
from tests.simulation.watching import Watch

if TYPE_CHECKING:
    from tests.simulation.world import World

# The daemon counts whole microseconds.
ROUNDING_S = 0.001


class Stops(Watch):
    """Watches the notices that jobs get."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self._asked: set[tuple[Reason, str]] = set()  # by operators: why, and which job
        self._hurt: set[str] = set()  # GPUs with which something was wrong

    def asked(self, reason: Reason, job_id: str) -> None:
        """An operator is about to ask for a stop."""
        self._asked.add((reason, job_id))

    def hurt(self, uuid: str) -> None:
        """Something is wrong with a GPU."""
        self._hurt.add(uuid)

    def seen(self, before: Job | None, job: Job) -> None:
        """Look at a job that changed: every notice that it has got since has a cause."""
        told = {attempt.number for attempt in before.attempts if attempt.notice} if before is not None else ()
        for attempt in job.attempts:
            if attempt.notice is not None and attempt.number not in told:
                self._has_cause(job, attempt)
        if job.state is JobState.PREEMPTING:
            self._demand(job.attempts[-1].notice is not None, f"{job.id} gives way and nobody told it why")

    def _has_cause(self, job: Job, attempt: Attempt) -> None:
        notice = attempt.notice
        assert notice is not None
        controller = self._world.daemon.controller
        ran_s = None if attempt.started_s is None else notice.decided_s - attempt.started_s
        power = controller.ledger.power
        match notice.reason:
            case Reason.PREEMPTED_BY_HIGHER_RANK:
                self._gives_way(job, attempt, ran_s)
                return
            case Reason.REQUEUED_BY_OPERATOR | Reason.CANCELLED_BY_REQUEST:
                holds = (notice.reason, job.id) in self._asked
            case Reason.NODE_DRAINED:
                holds = controller.ledger.drain is not None and controller.ledger.drain.stop_jobs
            case Reason.TIME_LIMIT:
                limit_s = job.spec.time_limit_s
                holds = limit_s is not None and ran_s is not None and ran_s >= limit_s - ROUNDING_S
            case Reason.DEADLINE_MISSED:
                deadline_s = job.spec.deadline_s
                holds = deadline_s is not None and notice.decided_s >= deadline_s - ROUNDING_S
            case Reason.STOPPED_FOR_PRICE:
                holds = bool(power.prices)
            case Reason.GPU_FAILED:
                holds = not self._hurt.isdisjoint(attempt.gpus)
            case Reason.SHED_FOR_POWER:
                holds = self._world.invariants.watts.has_budget()
            case Reason.SHED_IN_EMERGENCY:
                holds = self._world.invariants.watts.had_emergency(notice.decided_s)
            case Reason.STANDING_JOB_REMOVED:
                holds = bool(job.standing)
            case _:
                holds = False
        self._demand(holds, f"{job.id} is told to stop ({notice.reason}), and there is no cause")

    def _gives_way(self, job: Job, attempt: Attempt, ran_s: float | None) -> None:
        """R3, and the minimum runtime; what the clock was set back by, a job may seem not to have run."""
        notice = attempt.notice
        assert notice is not None
        controller, rank = self._world.daemon.controller, self._world.invariants.plans.rank
        number = job_number(notice.preempted_by)
        preemptor = controller.ledger.job(number) if number is not None else None
        self._demand(preemptor is not None, f"{job.id} gives way to {notice.preempted_by!r}, which is no job")
        assert preemptor is not None
        self._demand(job.spec.preemptible, f"{job.id} gives way and is not preemptible")
        self._demand(
            rank(preemptor)[:3] < rank(job)[:3],
            f"{job.id} gives way to {preemptor.id}, which does not outrank it",
        )
        least_s = job.spec.min_runtime_s
        self._demand(
            not least_s or (ran_s is not None and ran_s >= least_s - ROUNDING_S),
            f"{job.id} gives way after {ran_s} s of its minimum runtime of {least_s} s",
        )
