"""Which jobs a grid event touched, and what was done to each: read off the events of its time."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from scheduler.model.events import (
    AttemptEnded,
    AttemptResumed,
    Event,
    StartDecided,
    StopDecided,
    SuspendDecided,
)
from scheduler.model.jobs import Job, job_number
from scheduler.model.power import Baseline, GridEvent
from scheduler.model.power_events import GridEventDelayed, LimitsDecided
from scheduler.model.reasons import Reason

_SHED = frozenset({Reason.SHED_FOR_POWER, Reason.SHED_IN_EMERGENCY})


class Deed(StrEnum):
    """What was done to a job, or what it did."""

    LIMITED = "LIMITED"  # a power limit below it was lowered
    FROZEN = "FROZEN"  # for power; it kept its boards
    STOPPED = "STOPPED"  # for power
    DELAYED = "DELAYED"  # it waited for power
    LEFT = "LEFT"  # it ended for other reasons: its watts are no work of the event


@dataclass(frozen=True, slots=True)
class Touched:
    """A job, or its part of one board, and what was done to it."""

    job_id: str
    job_class: str  # empty = not known any more
    deed: Deed
    at_s: float
    reason: str = ""
    draw_w: float | None = None  # in the baseline, of its boards
    gpu: str = ""
    limit_w_before: float | None = None
    limit_w_least: float | None = None
    again_s: float | None = None  # when it was started again


def touched(
    event: GridEvent,
    baseline: Baseline | None,
    happened: Iterable[Event],
    ended_s: float,
    job_of: Callable[[int], Job | None],
) -> tuple[Touched, ...]:
    """The jobs that an event touched until it ended, in the order in which it did."""
    looking = _Looking(event, baseline, ended_s)
    for one in happened:
        looking.see(one)
    return tuple(_named(one, job_of) for one in looking.found())


class _Looking:
    """Goes through the events of the time."""

    def __init__(self, event: GridEvent, baseline: Baseline | None, ended_s: float) -> None:
        jobs = baseline.jobs if baseline is not None else ()
        assert event.shed_began_s is not None
        self._event_id, self._since_s, self._ended_s = event.id, event.shed_began_s, ended_s
        self._before_w = baseline.limits_w if baseline is not None else {}
        self._draws_w = {job.job_id: job.draw_w for job in jobs}
        self._classes = {job.job_id: job.job_class for job in jobs}
        self._holder = {uuid: job.job_id for job in jobs for uuid in job.gpus}
        self._told: dict[str, str] = {}  # who must go, and why
        self._limited: dict[tuple[str, str], Touched] = {}
        self._others: dict[tuple[str, Deed], Touched] = {}

    def found(self) -> list[Touched]:
        """All, by time; the limits of boards fall, of course, whose jobs were stopped or frozen."""
        stopped_s: dict[str, float] = {}
        for (job_id, deed), one in self._others.items():
            if deed in (Deed.STOPPED, Deed.FROZEN):
                stopped_s[job_id] = min(one.at_s, stopped_s.get(job_id, math.inf))
        found = [
            one
            for one in (*self._limited.values(), *self._others.values())
            if one.deed not in (Deed.DELAYED, Deed.LIMITED) or one.at_s < stopped_s.get(one.job_id, math.inf)
        ]
        return sorted(found, key=lambda one: (one.at_s, one.job_id, one.gpu))

    def see(self, one: Event) -> None:
        """Take the next event."""
        match one:
            case StartDecided():
                stopped = self._others.get((one.job_id, Deed.STOPPED))
                if stopped is not None and stopped.again_s is None:
                    self._others[one.job_id, Deed.STOPPED] = replace(stopped, again_s=one.at_s)
                if one.at_s >= self._since_s:
                    for uuid in one.gpus:
                        self._holder.pop(uuid, None)  # whoever held it has left
            case AttemptResumed():
                frozen = self._others.get((one.job_id, Deed.FROZEN))
                if frozen is not None and frozen.again_s is None:
                    self._others[one.job_id, Deed.FROZEN] = replace(frozen, again_s=one.at_s)
            case _ if not self._since_s <= one.at_s <= self._ended_s:
                pass
            case StopDecided():
                self._told[one.job_id] = one.notice.reason.value
                if one.notice.reason in _SHED:
                    self._note(one.job_id, Deed.STOPPED, one.at_s, one.notice.reason.value)
            case SuspendDecided():
                self._note(one.job_id, Deed.FROZEN, one.at_s, one.reason.value)
            case AttemptEnded() if one.job_id in self._draws_w:
                is_shed = (one.job_id, Deed.STOPPED) in self._others
                if not is_shed:
                    reason = self._told.get(one.job_id, one.reason.value)
                    self._note(one.job_id, Deed.LEFT, one.at_s, reason)
            case GridEventDelayed() if one.id == self._event_id:
                for job_id in one.job_ids:
                    self._note(job_id, Deed.DELAYED, one.at_s, Reason.WAITING_FOR_POWER.value)
            case LimitsDecided():
                for change in one.limits:
                    self._limit(change.uuid, change.limit_w, one.at_s)
            case _:
                pass

    def _note(self, job_id: str, deed: Deed, at_s: float, reason: str) -> None:
        if (job_id, deed) not in self._others:
            self._others[job_id, deed] = Touched(
                job_id, self._classes.get(job_id, ""), deed, at_s, reason, self._draws_w.get(job_id)
            )

    def _limit(self, uuid: str, limit_w: float, at_s: float) -> None:
        """A limit below whoever held the board from the begin on."""
        job_id, before_w = self._holder.get(uuid), self._before_w.get(uuid)
        if job_id is None or before_w is None or limit_w >= before_w:
            return
        known = self._limited.get((job_id, uuid))
        if known is None:
            known = Touched(
                job_id,
                self._classes[job_id],
                Deed.LIMITED,
                at_s,
                draw_w=self._draws_w[job_id],
                gpu=uuid,
                limit_w_before=before_w,
                limit_w_least=limit_w,
            )
        assert known.limit_w_least is not None
        self._limited[job_id, uuid] = replace(known, limit_w_least=min(limit_w, known.limit_w_least))


def _named(one: Touched, job_of: Callable[[int], Job | None]) -> Touched:
    """With its class, where only the job itself says that."""
    if one.job_class:
        return one
    number = job_number(one.job_id)
    job = None if number is None else job_of(number)
    return one if job is None else replace(one, job_class=job.spec.job_class.name)
