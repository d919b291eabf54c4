"""A plan held against the exhaustive search, and against that of other jobs."""

from dataclasses import replace

from scheduler.model.actions import WAIT_REASONS, Plan, StartJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.planning.case import Case
from scheduler.planning.explain import preview
from scheduler.planning.mix import mix_of
from scheduler.planning.planner import plan
from tests.fakes.worlds import W, snapshot
from tests.properties.oracle import Chosen, Oracle

HANDOVER = WAIT_REASONS.index(Reason.WAITING_FOR_HANDOVER)


def check(world: W, policy: Policy, made: Plan) -> None:
    """Go through the plan; an AssertionError says what is wrong with it."""
    Oracle(world, policy).check(made, claims(world, policy, made))


def planned_among(world: W, everybody: W, policy: Policy) -> Plan:
    """The plan of some of a world's jobs; what all of them ask for has its part in placement."""
    return plan(replace(snapshot(world), mix=mix_of(snapshot(everybody).jobs)), policy)


def claims(world: W, policy: Policy, made: Plan) -> dict[int, Chosen]:
    """What the plan lets each served job have: where it starts, or what a preview says that it waits for."""
    found = {a.job: Chosen(a.node, a.gpus, 0) for a in made.actions if isinstance(a, StartJob)}
    waits = zip(made.waits.numbers.tolist(), made.waits.reasons.tolist(), strict=True)
    for number in [number for number, reason in waits if reason == HANDOVER]:
        seen = preview(snapshot(world), policy, number)
        assert not seen.starts_now
        assert seen.start_within_us is not None
        # Of a job without GPUs nobody is told yet which node it will be on.
        own = None if seen.gpus else Case(snapshot(world), policy, number).planner.claims[number]
        node = world.gpu(seen.gpus[0]).node if own is None else own.parts[0].row
        found[number] = Chosen(node, seen.gpus, world.now_us + seen.start_within_us)
    return found
