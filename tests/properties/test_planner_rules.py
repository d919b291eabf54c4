"""The rules of planning, one by one, against an exhaustive search."""

from hypothesis import given, settings

from scheduler.model.actions import WAIT_REASONS, Plan, StartJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.planning.explain import preview
from scheduler.planning.planner import plan
from tests.fakes.worlds import W, snapshot
from tests.properties.oracle import Chosen, Oracle
from tests.properties.strategies import clusters, contested, fleets, full_clusters, policies, worlds

# An example takes milliseconds, and few worlds of a hundred show what a wrong comparison of ranks would do.
MANY = settings(max_examples=3 * settings.default.max_examples)
HANDOVER = WAIT_REASONS.index(Reason.WAITING_FOR_HANDOVER)


def claims(world: W, policy: Policy, made: Plan) -> dict[int, Chosen]:
    """What the plan lets each served job have: where it starts, or what a preview says that it waits for."""
    found = {a.job: Chosen(a.node, a.gpus, 0) for a in made.actions if isinstance(a, StartJob)}
    waits = zip(made.waits.numbers.tolist(), made.waits.reasons.tolist(), strict=True)
    for number in [number for number, reason in waits if reason == HANDOVER]:
        seen = preview(snapshot(world), policy, number)
        assert not seen.starts_now
        assert seen.start_within_us is not None
        # A job without GPUs waits for live jobs only: what an ended job still occupies is GPUs.
        node = world.gpu(seen.gpus[0]).node if seen.gpus else world.job(made.awaited[number][0]).node
        found[number] = Chosen(node, seen.gpus, world.now_us + seen.start_within_us)
    return found


def check(world: W, policy: Policy) -> None:
    made = plan(snapshot(world), policy)
    Oracle(world, policy).check(made, claims(world, policy, made))


@MANY
@given(worlds(), policies())
def test_every_job_is_served_in_the_least_disruptive_way_that_rank_allows(world: W, policy: Policy) -> None:
    check(world, policy)


@MANY
@given(worlds(plain=True), policies())
def test_the_same_holds_where_only_gpus_count(world: W, policy: Policy) -> None:
    check(world, policy)


@MANY
@given(fleets(), policies())
def test_the_same_holds_of_several_nodes(world: W, policy: Policy) -> None:
    check(world, policy)


@MANY
@given(fleets(plain=True), policies())
def test_the_same_holds_of_several_nodes_where_only_gpus_count(world: W, policy: Policy) -> None:
    check(world, policy)


@MANY
@given(contested(), policies())
def test_of_full_nodes_gangs_whole_jobs_and_shares_give_way_at_the_least_loss(
    world: W, policy: Policy
) -> None:
    check(world, policy)


@MANY
@given(clusters() | full_clusters(), policies())
def test_a_gang_that_no_node_can_hold_gets_whole_equal_nodes_and_few_of_them(
    world: W, policy: Policy
) -> None:
    check(world, policy)
