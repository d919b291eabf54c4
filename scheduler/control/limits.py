"""Power limits of boards: which are in force, setting them in parallel, and giving back what was found.

What a limit was before is in the journal before it changes. A limit that is being set counts as the larger of
old and new until the board has answered.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.control.inbox import LimitSet
from scheduler.errors import GpuReadError
from scheduler.model.actions import SetPowerLimit
from scheduler.model.gpus import GpuIdentity, GpuSample
from scheduler.model.power_events import LimitChange, LimitsDecided
from scheduler.model.settings import ChangedLimits

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

log = logging.getLogger("wattshift.power")

# A board that could not be set is asked again after so long; one that never can be is not.
RETRY_S = 5.0
NEVER = frozenset({"ERROR_NOT_SUPPORTED", "ERROR_FUNCTION_NOT_FOUND"})
# What a board says of its limit may be rounded.
SAME_W = 1.0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a board said that its limit is now."""

    watts: float
    at_s: float
    known_s: float | None  # the time of the last reading then; it may be later, where the clock was set back

    def is_older(self, sample: GpuSample) -> bool:
        """Whether the reading was taken after the answer."""
        return sample.at_s > self.at_s and sample.at_s != self.known_s


class Limits:
    """The limits of all boards."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self._asked: dict[str, float] = {}  # on their way: the largest of those that a board may have now
        self._in_flight: dict[str, float] = {}
        self._next: dict[str, float] = {}  # for boards that have not answered yet: one order after the other
        self._answered: dict[str, _Answer] = {}  # until a newer reading
        self._refused: dict[str, tuple[str, float]] = {}  # why, and until when it is not tried again
        self._theirs: dict[str, float] = {}  # limits that somebody else set, and that are respected
        self._to_send: list[tuple[str, float]] = []
        self._told: dict[str, str] = {}  # by UUID: what kind of trouble the log has last

    def in_force_w(self, gpu: GpuIdentity) -> float:
        """The most that the board may draw now, as far as is known."""
        sample = self._control.board.samples.get(gpu.uuid)
        watts = sample.power_limit_w if sample is not None else None
        answered = self._answered.get(gpu.uuid)
        if answered is not None and (sample is None or not answered.is_older(sample)):
            watts = answered.watts
        if watts is None:
            watts = gpu.power_limit_w_default or gpu.power_limit_w_max
        if watts is None:  # an instance of MIG: its part of what its GPU draws is all that is known
            watts = sample.power_w or 0.0 if sample is not None else 0.0
        if sample is not None and sample.power_limit_w_enforced is not None and answered is None:
            watts = min(watts, sample.power_limit_w_enforced)
        return max(watts, self._asked.get(gpu.uuid, 0.0))

    def range_w(self, gpu: GpuIdentity) -> tuple[float, float]:
        """The least and the most that the board's limit may be set to; equal where it can't be set."""
        now_w = self.in_force_w(gpu)
        low, high = gpu.power_limit_w_min, gpu.power_limit_w_max
        if low is None or high is None or gpu.power_limit_refusal or gpu.uuid in self._refused:
            return now_w, now_w
        kept = self._control.ledger.power.limits.get(gpu.uuid)
        high = min(high, kept.found_w if kept else now_w, self._theirs.get(gpu.uuid, high))
        return min(low, high), high

    @property
    def refusals(self) -> dict[str, str]:
        """By UUID, why a board's limit can't be set."""
        known = {
            gpu.uuid: gpu.power_limit_refusal
            for gpu in self._control.board.identities
            if gpu.power_limit_refusal
        }
        return known | {uuid: why for uuid, (why, _) in self._refused.items()}

    # Setting ------------------------------------------------------------------------------------

    def order(self, actions: list[SetPowerLimit], now_s: float) -> None:
        """Journal what the plan wants of the limits; they are set after the commit."""
        changes = []
        for action in actions:
            gpu = self._control.board.identities[self._control.board.row[action.gpu]]
            if self._asked.get(action.gpu) == action.limit_w or action.gpu in self._refused:
                continue
            kept = self._control.ledger.power.limits.get(action.gpu)
            found_w = kept.found_w if kept is not None else self.in_force_w(gpu)
            changes.append(LimitChange(action.gpu, found_w, float(action.limit_w)))
        if changes:
            self._control.ledger.apply(LimitsDecided(now_s, tuple(changes)))
            self._to_send += [(change.uuid, change.limit_w) for change in changes]

    def clear(self) -> None:
        """The tick was not kept: nothing follows from it."""
        self._to_send.clear()

    def send(self) -> None:
        """Set what was journalled, every board at the same time."""
        for uuid, watts in self._to_send:
            self._asked[uuid] = max(watts, self._asked.get(uuid, 0.0))
            if uuid in self._in_flight:
                self._next[uuid] = watts
            else:
                self._begin(uuid, watts)
        self._to_send.clear()

    def _begin(self, uuid: str, watts: float) -> None:
        self._in_flight[uuid] = watts
        self._control.spawn(self._set(uuid, watts))

    async def _set(self, uuid: str, watts: float) -> None:
        begun_s = self._control.effects.clock.now_s()
        try:
            limit = await self._control.effects.gpus.set_power_limit(uuid, watts)
            took_s = self._control.effects.clock.now_s() - begun_s
            self._control.meters.power_limit_s.observe(max(0.0, took_s))
        except GpuReadError as error:
            self._control.inbox.put(LimitSet(uuid, watts, None, error.code, str(error)))
        else:
            self._control.inbox.put(LimitSet(uuid, watts, limit))

    def answered(self, result: LimitSet, now_s: float) -> None:
        """Take a board's answer."""
        if self._in_flight.get(result.uuid) != result.asked_w:
            return  # it was taken before, in a tick that was not kept
        del self._in_flight[result.uuid], self._asked[result.uuid]
        if (next_w := self._next.pop(result.uuid, None)) is not None:
            self._asked[result.uuid] = max(next_w, result.limit.power_limit_w or 0.0 if result.limit else 0.0)
            self._begin(result.uuid, next_w)
        if result.limit is None:
            forever = result.error in NEVER
            self._refused[result.uuid] = (result.message, float("inf") if forever else now_s + RETRY_S)
            self._control.meters.power_limit_errors[(result.error,)] += 1
            problem = f"the power limit of GPU {result.uuid} can't be set: {result.message}"
            self._complain(result.uuid, result.error, problem)
            return
        self._is_well(result.uuid)
        self._refused.pop(result.uuid, None)
        watts = result.limit.power_limit_w or result.asked_w
        known = self._control.board.samples.get(result.uuid)
        self._answered[result.uuid] = _Answer(watts, now_s, None if known is None else known.at_s)

    # Readings -----------------------------------------------------------------------------------

    def read(self, sample: GpuSample, now_s: float) -> None:
        """Look for a limit that is not ours any more."""
        uuid = sample.uuid
        answered = self._answered.get(uuid)
        if answered is not None and answered.is_older(sample):
            del self._answered[uuid]
        refused = self._refused.get(uuid)
        if refused is not None and now_s >= refused[1]:
            del self._refused[uuid]
        kept = self._control.ledger.power.limits.get(uuid)
        if kept is None or sample.power_limit_w is None or uuid in self._asked or uuid in self._answered:
            return
        seen_w = sample.power_limit_w
        if abs(seen_w - kept.set_w) <= SAME_W or refused is not None:
            return
        if abs(seen_w - kept.found_w) <= SAME_W:
            return  # the driver was loaded anew, and with it the limit: the next plan sets it again
        if abs(seen_w - self._theirs.get(uuid, -1.0)) <= SAME_W:
            return
        respects = self._control.config.power.changed_limits is ChangedLimits.RESPECT
        self._control.meters.power_limits_changed += 1
        self._control.problems[_problem(uuid)] = (
            f"the power limit of GPU {uuid} is {seen_w:g} W; it was set to {kept.set_w:g} W, so somebody "
            f"else changed it; {'theirs is respected' if respects else 'ours is set again'} "
            "(power.changed_limits)"
        )
        log.warning("%s", self._control.problems[_problem(uuid)])
        if respects:
            self._theirs[uuid] = seen_w

    def clock_was_set_back(self, now_s: float) -> None:
        """Believe readings again, and ask boards that refused as soon as ever."""
        self._answered.clear()
        for uuid, (why, until_s) in self._refused.items():
            if until_s != float("inf"):
                self._refused[uuid] = (why, min(until_s, now_s + RETRY_S))

    # Giving back --------------------------------------------------------------------------------

    async def give_back(self, uuids: list[str]) -> tuple[str, ...]:
        """Set these boards to what they were found with; returns those that were, to be journalled."""
        kept = self._control.ledger.power.limits
        wanted = {uuid: kept[uuid].found_w for uuid in uuids if uuid in kept}
        results = await asyncio.gather(*map(self._given_back, wanted, wanted.values()))
        return tuple(uuid for uuid, is_done in zip(wanted, results, strict=True) if is_done)

    def given_back(self, uuids: tuple[str, ...]) -> None:
        """Know nothing any more of boards that have their own limits back."""
        for uuid in uuids:
            self._theirs.pop(uuid, None)
            self._answered.pop(uuid, None)
            self._is_well(uuid)

    async def _given_back(self, uuid: str, watts: float) -> bool:
        try:
            await self._control.effects.gpus.set_power_limit(uuid, watts)
        except GpuReadError as error:
            problem = f"GPU {uuid} could not be given its power limit of {watts:g} W back: {error}"
            self._complain(uuid, f"back {error.code}", problem)
            return False
        return True

    def _complain(self, uuid: str, kind: str, problem: str) -> None:
        """Tell it while it lasts; in the log once, for it is tried again and again."""
        if self._told.get(uuid) != kind:
            log.error("%s", problem)
        self._told[uuid] = kind
        self._control.problems[_problem(uuid)] = problem

    def _is_well(self, uuid: str) -> None:
        self._told.pop(uuid, None)
        self._control.problems.pop(_problem(uuid), None)


def _problem(uuid: str) -> str:
    """Under which key the controller's problems tell of a board's limit."""
    return f"power_limit {uuid}"
