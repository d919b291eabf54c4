"""Standing jobs: as many instances of each as the node has GPUs, kept alive; nobody submits them."""

from typing import TYPE_CHECKING

from scheduler.control.commands import environment_digest
from scheduler.control.inbox import Submission
from scheduler.model.jobs import Job, JobState
from scheduler.model.reasons import Reason

if TYPE_CHECKING:
    from scheduler.control.loop import Controller


class StandingJobs:
    """Keeps the instances of `[[standing_jobs]]` in step with the configuration and the GPUs."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._dirty = True

    def reload(self) -> None:
        """Look again: the configuration or the GPUs changed, or an instance ended."""
        self._dirty = True

    def reconcile(self, now_s: float) -> None:
        """Add the instances that are missing and end those that nobody wants any more."""
        if not self._dirty:
            return
        self._dirty = False
        control = self._controller
        instances: dict[str, list[Job]] = {}
        for job in control.ledger.jobs.values():
            if job.standing and job.state is not JobState.STOPPING:
                instances.setdefault(job.standing, []).append(job)
        count = len(control.board.identities)
        for standing in control.config.standing_jobs:
            digest = environment_digest(control.effects.journal.salt(), standing.environment)
            spec = standing.spec(control.config.policy, digest)
            present = sorted(instances.pop(standing.name, []), key=lambda job: job.number)
            same = [job for job in present if job.spec == spec]
            # GPUs not yet seen (no driver) must not end what runs on them.
            wanted = max(count, sum(job.holds for job in same))
            for job in [job for job in present if job.spec != spec] + same[wanted:]:
                control.commands.cancel(job, Reason.STANDING_JOB_REMOVED, now_s)
            for _ in range(wanted - len(same)):
                control.commands.accept_standing(Submission(spec, standing.environment), standing.name, now_s)
        for job in [job for jobs in instances.values() for job in jobs]:
            control.commands.cancel(job, Reason.STANDING_JOB_REMOVED, now_s)
