"""What each committed step of a job means for those who only look: counters and histograms."""

from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.model.jobs import Attempt, Job, JobState, job_number
from scheduler.model.reasons import Reason


class Observer:
    """Feeds the meters; never steers."""

    def __init__(self, ledger: Ledger, meters: Meters) -> None:
        self._ledger = ledger
        self._meters = meters

    def see(self, before: Job | None, after: Job) -> None:
        """Take note of a committed change."""
        label = after.spec.job_class.name
        if before is None or before.state is not after.state:
            self._meters.job_transitions[label, after.state.value, after.reason.value] += 1
            if after.state is JobState.STARTING:
                self._meters.queue_wait_s[(label,)].observe(
                    after.attempts[-1].decided_s - after.queued_since_s
                )
        earlier = {a.number: a for a in before.attempts} if before is not None else {}
        for attempt in after.attempts[-2:]:
            self._see_attempt(earlier.get(attempt.number), attempt, label)

    def _see_attempt(self, was: Attempt | None, now: Attempt, label: str) -> None:
        notice = now.notice
        if notice is None or notice.reason is not Reason.PREEMPTED_BY_HIGHER_RANK:
            return
        if was is None or was.notice is None:
            number = job_number(notice.preempted_by)
            preemptor = self._ledger.job(number) if number is not None else None
            other = preemptor.spec.job_class.name if preemptor else "UNKNOWN"
            self._meters.preemptions[label, other, notice.reason.value] += 1
        stages = (
            ("signalled", notice.decided_s, was and was.signalled_s, now.signalled_s),
            ("exited", now.signalled_s, was and was.exited_s, now.exited_s),
            ("verified", now.exited_s, was and was.verified_s, now.verified_s),
            ("successor_started", now.verified_s, was and was.successor_started_s, now.successor_started_s),
            ("total", notice.decided_s, was and was.successor_started_s, now.successor_started_s),
        )
        for stage, since_s, old_s, new_s in stages:
            if new_s is not None and old_s is None and since_s is not None:
                self._meters.preemption_stage_s[stage, label].observe(max(0.0, new_s - since_s))
