"""Each decision goes into the journal with all that it was made from, so that it can be made again.

A decision is a plan that acts, or that lets a job wait which has just come: another policy might have stopped
somebody for it.

A frame is what the planner saw, to the last bit, and not worked out again of other events: code that did so
could differ from what made the plan. All but some frames only say what changed since the one before, in a few
hundred bytes. A whole one comes first in the life of a daemon, after a tick that was not kept, under another
policy, and again after FRAMES_A_ROW, so that replays can begin there when what came before has aged out.
"""

from scheduler.control.ledger import Ledger
from scheduler.model.actions import Plan
from scheduler.model.events import PlanDecided
from scheduler.model.frames import FRAMES_A_ROW, Frame, PlanInputs, encode
from scheduler.model.policy import Policy
from scheduler.model.snapshot import Snapshot
from scheduler.planning.planner import digest


class Decisions:
    """The writer of decisions."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._frame: Frame | None = None  # the last one journalled
        self._policy: Policy | None = None
        self._looked_at = 0  # the highest number of a job that was there at the last decision

    def is_one(self, made: Plan) -> bool:
        """Whether the plan decides something: it acts, or lets a job wait that came since the last one."""
        waiting = made.waits.numbers  # ascending
        return bool(made.actions) or (len(waiting) > 0 and int(waiting[-1]) > self._looked_at)

    def record(self, now_s: float, snapshot: Snapshot, policy: Policy, made: Plan) -> None:
        """Journal the plan's digest and inputs; before anything is changed that the snapshot shows."""
        before = self._frame
        if before is not None and (policy is not self._policy or before.number + 1 == FRAMES_A_ROW):
            before = None
        data, frame = encode(PlanInputs(snapshot, self._ledger.table.said()), before)
        said = policy if before is None else None
        self._ledger.apply(PlanDecided(now_s, digest(made), data, said))
        self._frame, self._policy, self._looked_at = frame, policy, self._ledger.next_number - 1

    def forget(self) -> None:
        """The last ones were not kept: the next is whole."""
        self._frame, self._looked_at = None, 0
