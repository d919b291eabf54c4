"""The rules of planning, one by one, against an exhaustive search."""

from hypothesis import given, settings

from scheduler.model.policy import Policy
from scheduler.planning.planner import plan
from tests.fakes.worlds import W, snapshot
from tests.properties.checking import check
from tests.properties.strategies import clusters, contested, fleets, full_clusters, policies, worlds

# An example takes milliseconds, and few worlds of a hundred show what a wrong comparison of ranks would do.
MANY = settings(max_examples=3 * settings.default.max_examples)


def rules_hold(world: W, policy: Policy) -> None:
    check(world, policy, plan(snapshot(world), policy))


@MANY
@given(worlds(), policies())
def test_every_job_is_served_in_the_least_disruptive_way_that_rank_allows(world: W, policy: Policy) -> None:
    rules_hold(world, policy)


@MANY
@given(worlds(plain=True), policies())
def test_the_same_holds_where_only_gpus_count(world: W, policy: Policy) -> None:
    rules_hold(world, policy)


@MANY
@given(fleets(), policies())
def test_the_same_holds_of_several_nodes(world: W, policy: Policy) -> None:
    rules_hold(world, policy)


@MANY
@given(fleets(plain=True), policies())
def test_the_same_holds_of_several_nodes_where_only_gpus_count(world: W, policy: Policy) -> None:
    rules_hold(world, policy)


@MANY
@given(contested(), policies())
def test_of_full_nodes_gangs_whole_jobs_and_shares_give_way_at_the_least_loss(
    world: W, policy: Policy
) -> None:
    rules_hold(world, policy)


@MANY
@given(clusters() | full_clusters(), policies())
def test_a_gang_that_no_node_can_hold_gets_whole_equal_nodes_and_few_of_them(
    world: W, policy: Policy
) -> None:
    rules_hold(world, policy)
