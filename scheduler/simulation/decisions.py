"""The decisions of a journal, made again from what they were made from; and what another policy decides.

A decision is the same when the digest of its plan is, which says every action, wait and promise. Another
policy gets the very inputs that the daemon had: it is asked what it would have done in that moment, not what
would have come of it later. What a policy makes of a job (its priority with age, its worth by what is left of
it) is made by that policy; what a job was given once, such as its grace or a back-off, stays.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never

import msgspec
import numpy as np

from scheduler.control.worth import value_of_not_waiting
from scheduler.effects.journal_file import DATABASE_NAME, DECODERS, anchor, head
from scheduler.effects.journal_read import chain, opened
from scheduler.errors import FrameError, JournalCorrupt
from scheduler.model.actions import (
    WAIT_REASONS,
    Action,
    FailJob,
    Plan,
    PreemptJob,
    RequeueJob,
    ResumeJob,
    SetPowerLimit,
    StartJob,
    StopJob,
    SuspendJob,
)
from scheduler.model.events import DaemonStarted, PlanDecided
from scheduler.model.frames import Frame, PlanInputs, decode, inputs_of
from scheduler.model.jobs import JobClass, job_id
from scheduler.model.policy import Order, Policy, aged_priority
from scheduler.model.power import curve_of
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import Snapshot
from scheduler.planning.planner import digest, plan

_KINDS = (DaemonStarted.__name__, PlanDecided.__name__)


@dataclass(frozen=True, slots=True)
class Deed:
    """What a plan does with one job, or with one GPU's power limit."""

    action: str  # START, PREEMPT, STOP, REQUEUE, FAIL, LIMIT; WAIT of who stays pending, NONE of who goes on
    gpus: tuple[str, ...] = ()  # UUIDs
    preemptor: str = ""  # job id
    limit_w: int | None = None
    reason: Reason | None = None

    @property
    def effect(self) -> tuple[object, ...]:
        """What comes of it: all but the reason."""
        return self.action, tuple(sorted(self.gpus)), self.preemptor, self.limit_w


@dataclass(frozen=True, slots=True)
class Otherwise:
    """A job or GPU with which the other policy does something else."""

    job: str  # id; empty where it is about a GPU
    job_class: JobClass | None
    gpu: str  # UUID, where it is about a power limit
    then: Deed
    other: Deed


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision, made again."""

    event: int  # its number in the journal
    at_s: float
    version: str  # of the daemon that made it; empty where its start has aged out
    stored_digest: str
    snapshot: Snapshot
    digest: str  # of the plan as it is made now
    deeds: tuple[tuple[str, Deed], ...]  # of that plan, by job id or UUID
    part: float  # of the journal that is done, 0 to 1
    # Where the other policy does something else: jobs first. A reason is no difference.
    otherwise: tuple[Otherwise, ...]

    @property
    def is_same(self) -> bool:
        """Whether the plan is what it was, to the last bit."""
        return self.digest == self.stored_digest


@dataclass(slots=True)
class Totals:
    """What a whole journal came to."""

    decisions: int = 0
    same: int = 0
    skipped: int = 0  # told against a frame that has aged out
    otherwise: int = 0  # decisions in which the other policy does something else
    then: Counter[str] = field(default_factory=Counter)  # actions of the policies in force, by kind
    other: Counter[str] = field(default_factory=Counter)  # of the other policy


_Deeds = dict[int | str, Deed]  # by the job's number or the GPU's UUID


class Decisions:
    """The decisions of a journal, in the order in which they were made."""

    def __init__(self, journal: Path, other: Policy | None = None) -> None:
        """Take a state directory or a journal's file, and a policy to compare with."""
        self._path = journal / DATABASE_NAME if journal.is_dir() else journal
        self._other = other
        self._frame: Frame | None = None
        self._policy: Policy | None = None
        self._version = ""
        self.totals = Totals()

    def again(self) -> Iterator[Decision]:
        """Make each decision again.

        Raises:
            JournalError: There is no journal, or it has another format.
            JournalCorrupt: An event is missing, was changed, or can't be read.
        """
        with opened(self._path) as db:
            first, last = anchor(db, self._path)[0], head(db, self._path)[0]
            before = first
            try:
                for seq, kind, body in chain(db, self._path):
                    if seq != before + 1:
                        self._frame = None
                    before = seq
                    if kind in _KINDS:
                        part = min(1.0, (seq - first) / max(1, last - first))
                        if (decision := self._read(seq, kind, body, part)) is not None:
                            yield decision
            except JournalCorrupt as error:
                raise JournalCorrupt(
                    f"{self._path}: {error}. What comes before it was replayed; "
                    "`wattshift journal verify` says more, docs/operating/runbook.md what to do"
                ) from error

    def _read(self, seq: int, kind: str, body: bytes, part: float) -> Decision | None:
        try:
            event = DECODERS[kind].decode(body)
            if isinstance(event, DaemonStarted):
                self._version = event.version
                return None
            assert isinstance(event, PlanDecided)
            if event.policy is not None:
                self._frame, self._policy = None, event.policy
            elif self._frame is None:
                self.totals.skipped += 1
                return None
            self._frame = decode(event.frame, self._frame)
            return self._made(seq, event, inputs_of(self._frame), part)
        except (msgspec.MsgspecError, FrameError) as error:
            raise JournalCorrupt(f"event {seq} ({kind}) can't be read: {error}") from error

    def _made(self, seq: int, event: PlanDecided, inputs: PlanInputs, part: float) -> Decision:
        assert self._policy is not None
        made = plan(inputs.snapshot, self._policy)
        other = None
        if self._other is not None:
            other = plan(under(inputs, self._policy, self._other), self._other)
        deeds = _deeds(made)
        decision = Decision(
            seq,
            event.at_s,
            self._version,
            event.plan_digest,
            inputs.snapshot,
            digest(made),
            tuple((_name(subject), deed) for subject, deed in deeds.items()),
            part,
            () if other is None else _differences(inputs.snapshot, made, other),
        )
        totals = self.totals
        totals.decisions += 1
        totals.same += decision.is_same
        totals.otherwise += bool(decision.otherwise)
        totals.then.update(deed.action for deed in deeds.values())
        if other is not None:
            totals.other.update(deed.action for deed in _deeds(other).values())
        return decision


def under(inputs: PlanInputs, then: Policy, other: Policy) -> Snapshot:
    """The snapshot as it would have been had another policy been in force at that moment."""
    snapshot, said = inputs.snapshot, inputs.said
    jobs, nodes, power, gross = snapshot.jobs, snapshot.nodes, snapshot.power, snapshot.gross_value
    priority = said.priority.copy()
    for row in np.flatnonzero(said.preemptions).tolist():
        job_class, count = JobClass(jobs.job_class[row]), int(said.preemptions[row])
        priority[row] = aged_priority(job_class, int(priority[row]), count, other)
    value = said.value
    if other.order is Order.VALUE:
        said_jobs = replace(jobs, value=value)
        ratio = other.hysteresis_ratio
        value = value_of_not_waiting(said_jobs, said.whole_us, snapshot.now_us, snapshot.gpus, ratio)
    cost: Any = 0
    if gross is not None:
        gross, cost = value, gross - jobs.value
    if other.live_jobs_max != then.live_jobs_max:
        nodes = replace(nodes, live_jobs_max=np.full(len(nodes), other.live_jobs_max, dtype=np.int64))
    if power is not None:
        curves = (curve_of(other.classes[job_class].power_curve) for job_class in JobClass)
        power = replace(power, curves=tuple(curves))
    jobs = replace(jobs, priority=priority, value=value - cost)
    return replace(snapshot, jobs=jobs, nodes=nodes, power=power, gross_value=gross)


def _differences(snapshot: Snapshot, made: Plan, other: Plan) -> tuple[Otherwise, ...]:
    first, second = _deeds(made), _deeds(other)
    found = []
    for subject in sorted(first.keys() | second.keys(), key=lambda one: (isinstance(one, str), one)):
        then = first.get(subject) or _no_deed(subject, made)
        now = second.get(subject) or _no_deed(subject, other)
        if then.effect == now.effect:
            continue
        if isinstance(subject, str):
            found.append(Otherwise("", None, subject, then, now))
        else:
            (job_class,) = snapshot.jobs.job_class[snapshot.jobs.number == subject].tolist()
            found.append(Otherwise(job_id(subject), JobClass(job_class), "", then, now))
    return tuple(found)


def _deeds(made: Plan) -> _Deeds:
    return dict(map(_deed, made.actions))


def _deed(action: Action) -> tuple[int | str, Deed]:
    reason = action.reason
    match action:
        case StartJob():
            return action.job, Deed("START", action.gpus, reason=reason)
        case PreemptJob():
            return action.job, Deed("PREEMPT", preemptor=job_id(action.preemptor), reason=reason)
        case StopJob():
            return action.job, Deed("STOP", reason=reason)
        case RequeueJob():
            return action.job, Deed("REQUEUE", reason=reason)
        case FailJob():
            return action.job, Deed("FAIL", reason=reason)
        case SuspendJob():
            return action.job, Deed("SUSPEND", reason=reason)
        case ResumeJob():
            return action.job, Deed("RESUME", reason=reason)
        case SetPowerLimit():
            return action.gpu, Deed("LIMIT", limit_w=action.limit_w, reason=reason)
        case _:
            assert_never(action)


def _name(subject: int | str) -> str:
    return subject if isinstance(subject, str) else job_id(subject)


def _no_deed(subject: int | str, made: Plan) -> Deed:
    """Of whom the plan does nothing with: why he waits, if he does."""
    (rows,) = (made.waits.numbers == subject).nonzero() if isinstance(subject, int) else ([],)
    if not len(rows):
        return Deed("NONE")
    return Deed("WAIT", reason=WAIT_REASONS[int(made.waits.reasons[rows[0]])])
