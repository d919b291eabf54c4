"""Why a pending job waits and what would have to change; what would happen if a job were submitted.

Both ask the planner itself: a remedy is offered only if a plan of the changed world serves the job, and it is
the smallest such change of its kind. Everything is facts as values; the api puts them into words.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from scheduler.model.actions import PreemptJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import Snapshot
from scheduler.planning.allocator import Gpu, Live, Node, Request, Spare, lack_of_host
from scheduler.planning.arrays import lists, rows_where
from scheduler.planning.case import Case, row_of
from scheduler.planning.kinds import Division
from scheduler.planning.preemption import outranks
from scheduler.planning.remedies import Remedy, RemedyKind, remedies
from scheduler.planning.world import NEVER

__all__ = [
    "Explanation",
    "Obstacle",
    "Preview",
    "PreviewVictim",
    "Remedy",
    "RemedyKind",
    "Rule",
    "explain",
    "preview",
]


class Rule(StrEnum):
    """What keeps a GPU, or a share of the host, from a job."""

    DRAINS = "DRAINS"  # its node takes nothing new
    CLOSED = "CLOSED"  # cordoned, quarantined, foreign or lost
    MODEL = "MODEL"  # not of a model that the job accepts
    INSTANCE = "INSTANCE"  # a MIG instance, and the job wants several GPUs
    GPU_MEMORY_SIZE = "GPU_MEMORY_SIZE"  # has less memory than the job wants
    NOT_PREEMPTIBLE = "NOT_PREEMPTIBLE"  # held by a job that may not be preempted
    RANK = "RANK"  # held by a job that it doesn't outrank by enough
    MINIMUM_RUNTIME = "MINIMUM_RUNTIME"  # held by a job that is protected until a moment
    # Free for a gang over several nodes, but on a node that it can't have whole, nor the rest of it there.
    NODE_NOT_WHOLE = "NODE_NOT_WHOLE"
    CLAIMED = "CLAIMED"  # given in this plan to a job that goes before it, or promised to one
    CPUS = "CPUS"
    MEMORY = "MEMORY"
    START_SLOTS = "START_SLOTS"
    POWER = "POWER"  # what it may draw is more than the budget, or an accepted event, leaves


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What one rule keeps from the job: GPUs by UUID, or an amount that the host lacks."""

    rule: Rule
    gpus: tuple[str, ...] = ()
    jobs: tuple[int, ...] = ()  # numbers of the jobs that are in the way
    until_us: int | None = None  # MINIMUM_RUNTIME: when the first of them loses its protection
    lacking: int = 0  # CPUs, MiB, slots or watts of boards
    nodes: int = 1  # on how many nodes the GPUs are, or on how many this is lacking


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a pending job is not served. `reason` is None where the plan starts it."""

    number: int
    reason: Reason | None
    obstacles: tuple[Obstacle, ...]
    remedies: tuple[Remedy, ...]
    awaited: tuple[int, ...]  # numbers of the jobs whose stop it waits for
    gpus: tuple[str, ...]  # those that come free for it
    expected_start_us: int | None  # from declared run times; None = not known
    ahead: int  # waiting jobs of higher rank
    behind_promise_of: int | None  # number of the job whose promised start it may not delay
    eligible_us: int | None  # when its back-off ends


@dataclass(frozen=True, slots=True)
class PreviewVictim:
    """A job that would have to stop."""

    number: int
    gpus: tuple[str, ...]
    grace_us: int
    lost_gpu_ms: int
    loss_microusd: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What a plan would do with a job. `gpus` are those it gets, now or when the victims are gone."""

    number: int
    starts_now: bool
    gpus: tuple[str, ...]
    victims: tuple[PreviewVictim, ...]
    reason: Reason | None  # why it would wait or fail
    start_within_us: int | None  # graces that have to run first, at most; None where it isn't served
    expected_start_us: int | None
    # The GPUs in its way because they are closed, where no open one could serve it.
    closed: tuple[str, ...] = ()


def explain(snapshot: Snapshot, policy: Policy, number: int) -> Explanation:
    """Why the pending job with this number waits; `number` must be of a pending row."""
    case = Case(snapshot, policy, number)
    reason = case.reason
    waits = reason is not None and number not in case.planner.claims
    promise = case.plan.promise
    held_back = reason is Reason.WAITING_FOR_PROMISED_START and promise is not None
    claim = case.planner.claims.get(number)
    return Explanation(
        number=number,
        reason=reason,
        obstacles=tuple(_obstacles(case)) if waits else (),
        remedies=tuple(remedies(case)) if waits else (),
        awaited=case.plan.awaited.get(number, ()),
        gpus=() if claim is None else case.planner.world.uuids(claim.parts),
        expected_start_us=case.expected_start_us,
        ahead=case.ahead,
        behind_promise_of=promise.job if held_back and promise is not None else None,
        eligible_us=int(snapshot.jobs.eligible_us[case.row]) if reason is Reason.BACKING_OFF else None,
    )


def preview(snapshot: Snapshot, policy: Policy, number: int) -> Preview:
    """What would happen to the pending job with this number, and who would stop for it."""
    case = Case(snapshot, policy, number)
    claim = case.planner.claims.get(number)
    victims = []
    for action in case.plan.actions:
        if isinstance(action, PreemptJob) and action.preemptor == number:
            row = row_of(snapshot, action.job)
            gpus = snapshot.holdings.gpu[snapshot.holdings.job == row].tolist()
            uuids = tuple(sorted(snapshot.gpus.uuid[gpu] for gpu in gpus))
            grace_us = int(snapshot.jobs.grace_us[row])
            victims.append(
                PreviewVictim(action.job, uuids, grace_us, action.lost_gpu_ms, action.loss_microusd)
            )
    obstacles = _obstacles(case) if case.reason is Reason.NO_SUITABLE_GPU else []
    return Preview(
        number=number,
        starts_now=claim is not None and claim.is_free,
        gpus=() if claim is None else case.planner.world.uuids(claim.parts),
        victims=tuple(victims),
        reason=case.reason,
        start_within_us=None if claim is None else max(0, claim.ready_us - snapshot.now_us),
        expected_start_us=case.expected_start_us,
        closed=next((one.gpus for one in obstacles if one.rule is Rule.CLOSED), ()),
    )


# Obstacles -------------------------------------------------------------------------------------


def _obstacles(case: Case) -> list[Obstacle]:
    """What each rule keeps from the job; each GPU counts once, for the first rule that keeps it."""
    power = case.planner.power
    if case.reason is Reason.WAITING_FOR_POWER and power is not None:
        lacking_w = power.lacking_w.get(case.number, max(power.lacking_w.values(), default=0))
        return [Obstacle(Rule.POWER, lacking=lacking_w)]
    gpus: dict[Rule, list[tuple[str, int]]] = {}
    holders: dict[Rule, set[int]] = {}
    until_us: int | None = None
    for node in case.planner.world.nodes():
        usable: list[str] = []
        for position, gpu in enumerate(node.gpus if case.request.gpus else ()):
            rule, jobs = _rule_of(case, node, position, gpu)
            if rule is None:
                usable.append(gpu.uuid)
                continue
            gpus.setdefault(rule, []).append((gpu.uuid, node.row))
            holders.setdefault(rule, set()).update(live.number for live in jobs)
            if rule is Rule.MINIMUM_RUNTIME:
                until_us = min([live.yields_us for live in jobs] + ([] if until_us is None else [until_us]))
        if usable and case.ways and not any(_could_use(way, node.row, len(usable)) for way in case.ways):
            gpus.setdefault(Rule.NODE_NOT_WHOLE, []).extend((uuid, node.row) for uuid in usable)
    found = [
        Obstacle(
            rule,
            tuple(sorted(uuid for uuid, _ in gpus[rule])),
            tuple(sorted(holders.get(rule, ()))),
            until_us if rule is Rule.MINIMUM_RUNTIME else None,
            nodes=len({row for _, row in gpus[rule]}),
        )
        for rule in Rule
        if rule in gpus
    ]
    return found + _host_obstacles(case)


def _could_use(way: Division, row: int, gpus: int) -> bool:
    """Whether a gang divided like this could take so many GPUs of the node: all of them, or its rest."""
    return bool(way.nodes[row]) and (
        gpus == way.whole.gpus or (way.rest is not None and gpus >= way.rest.gpus)
    )


def _rule_of(case: Case, node: Node, position: int, gpu: Gpu) -> tuple[Rule | None, list[Live]]:
    """The first rule that keeps this GPU from the job, and the jobs in the way; None: it could be used."""
    request = case.request
    if node.drains:
        return Rule.DRAINS, []
    if not gpu.is_open:
        return Rule.CLOSED, []
    if not gpu.serves[request.models]:
        return Rule.MODEL, []
    if gpu.is_instance and request.gpus > 1:
        return Rule.INSTANCE, []
    if gpu.memory_mib < request.gpu_memory_mib:
        return Rule.GPU_MEMORY_SIZE, []
    milli = node.free.milli[position]
    mib = node.free.mib[position]
    in_the_way: dict[Rule, list[Live]] = {}
    leaving = [hold for hold in node.leaving if position in hold.parts]
    for live in case.planner.world.live(node.row):
        if position not in live.hold.parts:
            continue
        rule = _protection(case, live)
        if rule is None:
            leaving.append(live.hold)
        else:
            in_the_way.setdefault(rule, []).append(live)
    milli += sum(hold.parts[position][0] for hold in leaving)
    mib += sum(hold.parts[position][1] for hold in leaving)
    if milli >= request.share_milli and (not request.is_share or mib >= request.gpu_memory_mib):
        return None, []
    for rule in (Rule.NOT_PREEMPTIBLE, Rule.RANK, Rule.MINIMUM_RUNTIME):
        if rule in in_the_way:
            return rule, in_the_way[rule]
    return Rule.CLAIMED, []


def _protection(case: Case, live: Live) -> Rule | None:
    """Why the job may not displace this one; None: it may."""
    if live.yields_us == NEVER:
        return Rule.NOT_PREEMPTIBLE
    if not outranks(case.request, live, case.policy.order):
        return Rule.RANK
    return None if live.may_yield else Rule.MINIMUM_RUNTIME


def _host_obstacles(case: Case) -> list[Obstacle]:
    """What the host of the node that is nearest to serving the job lacks, of a gang's the last it needs."""
    if not case.ways:
        return _hosts_lack(case, case.request, True, 1)
    way = case.ways[0]
    whole = _hosts_lack(case, way.whole, way.nodes, way.wholes)
    return whole or _hosts_lack(case, way.least, way.nodes, way.wholes + 1)


def _hosts_lack(case: Case, part: Request, among: Any, wanted: int) -> list[Obstacle]:
    """What so many of these nodes lack of their hosts, those taken that lack least."""
    world = case.planner.world
    reach = world.within_reach(case.request).pool
    amounts = lists((reach.cpus, reach.memory_mib, reach.slots), rows_where(~world.drains & among))
    lacks = [lack_of_host(part, Spare([], [], *each)) for each in zip(*amounts, strict=True)]
    if len(lacks) < wanted:
        return []
    least = sorted(lacks, key=lambda each: (sum(map(bool, each)), each))[wanted - 1]
    rules = (Rule.CPUS, Rule.MEMORY, Rule.START_SLOTS)
    return [
        Obstacle(rule, lacking=least[place], nodes=sum(each[place] > 0 for each in lacks))
        for place, rule in enumerate(rules)
        if least[place]
    ]
