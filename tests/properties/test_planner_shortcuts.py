"""What a plan remembers and bounds, and rates once for all alike nodes, saves work and changes nothing."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.model.policy import Order, Policy
from scheduler.model.snapshot import PENDING, UNKNOWN, Snapshot
from scheduler.planning import alike, backfill, fragmentation, horizon, kept, leaving, planner, search, world
from scheduler.planning.allocator import Found, Node, Request, find_leaving_on
from scheduler.planning.arrays import rows_where, xp
from scheduler.planning.kept import Kept
from scheduler.planning.planner import Memo, Planner, digest, plan
from scheduler.planning.preemption import choose_victims
from scheduler.planning.queue import request_of
from scheduler.planning.valuation import rank_key
from scheduler.simulation import worlds as drawn
from scheduler.simulation.changes import carried_out, changed
from tests.fakes.worlds import BATCH, HOUR_US, INFERENCE, MINING, NOW_US, RUNNING, G, J, N, W, snapshot
from tests.properties.strategies import contested, fleets, policies


class _Forgetful(Kept):
    """Computes everything anew whenever it is asked for."""

    def column(self, key: Hashable, made: Callable[[Any], Any]) -> Any:
        return made(xp.arange(self._nodes, dtype=xp.int64))


def _planned(made: Callable[[], Snapshot], policy: Policy, *patches: tuple[Any, str, Any]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for patched in patches:
            patch.setattr(*patched)
        return digest(plan(made(), policy))


# So that a few nodes are treated as a fleet is.
FLEET = ((world, "NODES_ALL_TRIED_MAX", 0), (alike, "NODES_FEW", 0))
# Nothing is remembered but what a node and its jobs are.
FORGETFUL = (
    *((module, "Kept", _Forgetful) for module in (fragmentation, horizon, leaving)),
    (Node, "choices", property(lambda _: {}, lambda *_: None)),
    (leaving.Turns, "is_before", lambda *_: False),
    (world.World, "is_hopeless", lambda *_: False),
    (backfill, "_hopeful", lambda rows, *_: rows),
)
TIGHT = (
    *((kept, "VALUES_MAX", 1), (alike, "ANSWERS_MAX", 1), (alike, "STATES_MAX", 1)),
    *((leaving, "GPU_STOPS", 1), (leaving, "NODE_STOPS", 1), (leaving, "CODE_BITS", 8)),
)

ALL_BITS = leaving.CODE_BITS


@given(st.one_of(fleets(), contested()), policies())
def test_few_nodes_get_the_same_plan_as_if_they_were_a_fleet(few: W, policy: Policy) -> None:
    assert _planned(lambda: snapshot(few), policy, *FLEET) == _planned(lambda: snapshot(few), policy)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("order", Order)
def test_what_a_plan_of_a_fleet_remembers_changes_nothing_and_nor_does_forgetting(
    seed: int, order: Order
) -> None:
    policy = Policy(order=order)
    expected = _planned(lambda: drawn.world(300, 120, seed), policy)
    for patches in (FLEET, (*FLEET, *FORGETFUL), (*FLEET, *TIGHT)):
        assert _planned(lambda: drawn.world(300, 120, seed), policy, *patches) == expected


@pytest.mark.parametrize("tight", [(), TIGHT])
def test_the_plan_before_saves_work_and_changes_nothing(tight: tuple[tuple[Any, str, Any], ...]) -> None:
    random, memo, policy = np.random.default_rng(0), Memo(), Policy()
    made = drawn.world(300, 120, 0)
    with pytest.MonkeyPatch.context() as patch:
        for patched in (*FLEET, *tight):
            patch.setattr(*patched)
        for _ in range(6):
            found = plan(made, policy, memo)
            assert digest(found) == digest(plan(made, policy))
            made = changed(carried_out(made, found), 20, random)


@pytest.mark.parametrize("tight", [(), TIGHT])
@pytest.mark.parametrize("seed", range(4))
def test_what_leaves_is_taken_where_the_last_stop_comes_first_as_if_each_node_were_looked_into(
    seed: int, tight: tuple[tuple[Any, str, Any], ...]
) -> None:
    ready_on: list[int] = []

    def compared(request: Request, of: world.World, limits: search.Limits | None = None) -> Found | None:
        found = search.find_leaving(request, of, limits)
        if limits is None:
            nodes = [node for node in of.nodes() if node.leaving and not node.drains]
            ready = {node.row: there[0] for node in nodes if (there := find_leaving_on(request, node))}
            first = min(ready, key=lambda row: (ready[row], row), default=None)
            assert first == (found and found.parts[0].row)
            turns = {row: of._leavers.code(turn) for row, turn in ready.items()}
            bounds = {row: turn for turn, row in of.turns.in_turn(request, of.leaves_for(request))}
            if tight:
                assert all(bounds[row] <= turn for row, turn in turns.items() if row in bounds)
            else:
                assert all(turns[row] in (turn, leaving._MINE) for row, turn in bounds.items())
            ready_on.append(len(ready))
        return found

    random, policy, made = np.random.default_rng(seed), Policy(), drawn.world(500, 200, seed)
    cpus = made.nodes.cpus // 4
    with pytest.MonkeyPatch.context() as patch:
        for patched in (*FLEET, *tight, (planner, "find_leaving", compared)):
            patch.setattr(*patched)
        for _ in range(6):
            made = changed(carried_out(made, plan(made, policy)), 30, random)
            # A third of the nodes drain, hosts are scarce, and many stops are nobody's gain.
            drain = random.integers(0, 3, len(made.nodes)) // 2
            nodes = replace(made.nodes, drain=drain, cpus=cpus)
            anybody = random.integers(0, 2, len(made.jobs)) == 0
            preemptor = np.where(anybody, UNKNOWN, made.jobs.preemptor)
            made = replace(made, nodes=nodes, jobs=replace(made.jobs, preemptor=preemptor))
    assert max(ready_on) > 1, "there was something to choose"


@pytest.mark.parametrize("bits", [ALL_BITS, 12])
def test_a_node_goes_before_another_by_code_only_if_it_does_by_turn(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "CODE_BITS", bits)
    made = drawn.world(4000, 2000, 0)
    made = replace(made, jobs=replace(made.jobs, preemptor=np.full(len(made.jobs), UNKNOWN)))
    of = Planner(made, Policy()).world
    holds = [(node.row, hold) for node in of.nodes() for hold in node.leaving]
    ready = [((True, hold.stop_us, hold.served, hold.number), row) for row, hold in holds]
    for turn, row in ready:
        for other, where in ready:
            before = of.turns.is_before(turn, row, of._leavers.code(other), where)
            is_sooner = (turn, row) < (other, where)
            assert before == is_sooner or (bits < ALL_BITS and not before)


@pytest.mark.parametrize("order", Order)
def test_what_may_go_is_known_as_if_all_nodes_were_looked_at_again(order: Order) -> None:
    compared = []

    def checked(request: Request, of: world.World, horizons: horizon.Horizons, *rest: Any) -> Found | None:
        known = horizons.of(request)
        if known is not None and not of.is_small:
            anew = horizon.Horizon(of, known._first, order)
            for name in ("milli", "mib", "cpus", "memory_mib", "slots"):
                assert (getattr(known.pool, name) == getattr(anew.pool, name)).all(), name
            # What was learned since is no less.
            assert (known.bounds(request) >= anew.bounds(request)).all()
            compared.append(request.number)
        return search.find_by_displacing(request, of, horizons, *rest)

    made, random, policy = drawn.world(400, 160, 0), np.random.default_rng(0), Policy(order=order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "find_by_displacing", checked)
        for _ in range(3):
            made = changed(carried_out(made, plan(made, policy)), 40, random)
    assert len(compared) > 20


def _host_lacking() -> W:
    """For its CPUs one job takes a dearer victim than others do for the same GPUs; another finds none."""
    gone = {"state": RUNNING, "node": 0, "started_us": NOW_US - HOUR_US, "cpus": 2}
    live = (J(1, MINING, on=("A",), value=50_000, **gone), J(2, BATCH, on=("B",), **gone | {"cpus": 20}))
    wants = tuple(J(number, INFERENCE, cpus=cpus) for number, cpus in ((3, 99), (4, 20)))
    return W(jobs=(*live, *wants), gpus=(G("A", 0), G("B", 1)), nodes=(N(cpus=22),))


@example(_host_lacking(), Policy())
@given(st.one_of(fleets(), contested()), policies())
def test_no_victims_cost_less_than_the_bound_and_where_there_is_none_nothing_helps(
    few: W, policy: Policy
) -> None:
    made = snapshot(few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "NODES_ALL_TRIED_MAX", 0)
        planner = Planner(made, policy)
    horizons = horizon.Horizons(planner.world, policy.order)
    pending = sorted(
        (request_of(made.jobs, row) for row in rows_where(made.jobs.state == PENDING).tolist()),
        key=lambda request: rank_key(
            policy.order, request.job_class, request.priority, request.value, request.number
        ),
    )
    # Each also wants less of the host: what was found out of its GPUs holds, and nothing else does.
    for request in (each for one in pending for each in (one, one._replace(cpus=0, memory_mib=0))):
        cheapest = search._Cheapest(request, planner.world, horizons)
        found = horizons.of(request)
        bounds = [world.NEVER] * len(made.nodes) if found is None else found.bounds(request).tolist()
        for node, bound in zip(planner.world.nodes(), bounds, strict=True):
            candidates = planner.candidates(request, node)
            chosen = choose_victims(request, node, candidates) if candidates else None
            loss = world.NEVER
            if chosen is not None and not node.drains:
                loss = sum(victim.loss_microusd for victim in chosen[1])
                assert bound <= loss
            cheapest.learn(node, candidates, loss)


def test_a_column_is_computed_where_a_node_changed_and_keeps_what_was_written_elsewhere() -> None:
    asked: list[list[int]] = []

    def made(rows: Any) -> Any:
        asked.append(rows.tolist())
        return rows * 10

    columns = Kept(4)
    columns.column("a", made)[1] = 7
    columns.changed(2)
    columns.changed(2)
    assert columns.column("a", made).tolist() == [0, 7, 20, 30]
    columns.changed(1)
    assert columns.column("a", made).tolist() == [0, 10, 20, 30]
    assert columns.column("a", made).tolist() == [0, 10, 20, 30]
    assert asked == [[0, 1, 2, 3], [2], [1]]


def test_the_column_that_was_asked_for_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "VALUES_MAX", 8)
    asked: list[str] = []
    columns = Kept(4)
    for key in "abacb":
        columns.column(key, lambda rows, key=key: asked.append(key) or rows)
    assert asked == ["a", "b", "c", "b"]
