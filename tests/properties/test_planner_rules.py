"""DESIGN section 6, rule by rule, against an exhaustive search."""

from hypothesis import given

from scheduler.model.policy import Policy
from scheduler.planning.planner import Planner
from tests.fakes.worlds import W, snapshot
from tests.properties.oracle import Chosen, Oracle
from tests.properties.strategies import policies, worlds


def check(world: W, policy: Policy) -> None:
    planner = Planner(snapshot(world), policy)
    plan = planner.run()
    claims = {
        number: Chosen(claim.node, planner.world.uuids(claim.node, claim.positions), claim.ready_us)
        for number, claim in planner.claims.items()
    }
    Oracle(world, policy).check(plan, claims)


@given(worlds(), policies())
def test_every_job_is_served_in_the_least_disruptive_way_that_rank_allows(world: W, policy: Policy) -> None:
    check(world, policy)


@given(worlds(plain=True), policies())
def test_the_same_holds_where_only_gpus_count(world: W, policy: Policy) -> None:
    check(world, policy)
