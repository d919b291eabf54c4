"""One pending job in one world, and the plan that was made of it: what explanations and previews look at."""

from dataclasses import replace

from scheduler.model.actions import WAIT_REASONS, FailJob, Plan
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import PENDING, Snapshot
from scheduler.planning.allocator import Request
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.kinds import Division
from scheduler.planning.planner import Planner
from scheduler.planning.queue import WAIT_CODE, request_of
from scheduler.planning.valuation import ranked_above
from scheduler.planning.world import NEVER


class Case:
    """A pending job and its plan. Pending jobs of lower rank are left out: they have no part in it."""

    def __init__(self, snapshot: Snapshot, policy: Policy, number: int) -> None:
        self.policy = policy
        self.number = number
        self.row = row_of(snapshot, number)
        jobs = snapshot.jobs
        assert jobs.state[self.row] == PENDING, "only a pending job waits"
        self._above = ranked_above(policy.order, jobs, self.row)
        lower = (jobs.state == PENDING) & ~self._above
        lower[self.row] = False
        eligible_us = xp.where(lower, NEVER, jobs.eligible_us)
        self.snapshot = replace(snapshot, jobs=replace(jobs, eligible_us=eligible_us))
        self.planner = Planner(self.snapshot, policy)
        self.plan: Plan = self.planner.run()
        self.request: Request = request_of(jobs, self.row)
        # How it can be divided, if it is a gang over several nodes.
        self.ways: list[Division] = []
        if len(snapshot.nodes) > 1 and self.planner.world.kinds.spans(self.request):
            self.ways = self.planner.world.kinds.divisions(self.request)

    @property
    def reason(self) -> Reason | None:
        """Why the job waits or fails; None where it starts."""
        for action in self.plan.actions:
            if isinstance(action, FailJob) and action.job == self.number:
                return action.reason
        code = int(self.planner.queue.codes[self.row])
        return WAIT_REASONS[code] if code >= 0 else None

    @property
    def expected_start_us(self) -> int | None:
        """When the job starts as far as declared run times tell; None = not known."""
        claim = self.planner.claims.get(self.number)
        if claim is not None:
            return max(self.snapshot.now_us, claim.ready_us)
        promise = self.plan.promise
        return promise.start_us if promise is not None and promise.job == self.number else None

    @property
    def ahead(self) -> int:
        """Jobs of higher rank that wait and could start if there were room."""
        codes = self.planner.queue.codes
        aside = (
            Reason.BACKING_OFF,
            Reason.WAITING_FOR_PRICE,
            Reason.NODE_DRAINING,
            Reason.NO_SUITABLE_GPU,
        )
        waiting = (codes >= 0) & ~xp.isin(
            codes, xp.asarray([WAIT_CODE[reason] for reason in aside], dtype=xp.int64)
        )
        return int((waiting & self._above).sum())


def row_of(snapshot: Snapshot, number: int) -> int:
    """The row of the job with this number."""
    rows = rows_where(snapshot.jobs.number == number)
    assert len(rows) == 1, f"no job {number} in the snapshot"
    return int(rows[0])
