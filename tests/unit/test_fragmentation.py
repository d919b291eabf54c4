"""Where a request goes so that what stays free can still be asked for."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from scheduler.planning import alike, fragmentation, kept
from scheduler.planning.fragmentation import NO_POSITION, Fragmentation
from tests.fakes.pools import Ask, Gpu, Node, mix, pool, take, watts

WHOLE = Ask()
ANY_MIX = ((WHOLE, 1),)
Choice = tuple[int, int] | None


def share(milli: int, **others: int) -> Ask:
    return Ask(share_milli=milli, **others)


def node(*free_milli: int, **others: int) -> Node:
    return Node(gpus=tuple(Gpu(milli) for milli in free_milli), **others)


def best(
    nodes: Sequence[Node], ask: Ask, kinds: Sequence[tuple[Ask, int]] = ANY_MIX, sets: int = 0
) -> Choice:
    return Fragmentation(pool(nodes, sets), mix(kinds)).best(ask)


def best_by_power(nodes: Sequence[Node], ask: Ask, kinds: Sequence[tuple[Ask, int]] = ANY_MIX) -> Choice:
    return Fragmentation(pool(nodes), mix(kinds), watts(nodes)).best(ask)


def test_a_share_goes_to_a_gpu_that_is_no_longer_whole() -> None:
    assert best((node(1000), node(600)), share(300)) == (1, 0)


def test_a_share_goes_where_what_stays_is_still_asked_for_though_another_gpu_fits_better() -> None:
    # 600 - 200 leaves nothing for shares of 500, 700 - 200 does.
    kinds = ((share(500), 1),)
    assert best((node(600), node(700)), share(200), kinds) == (1, 0)
    assert best((node(600), node(700)), share(100), kinds) == (0, 0)


def test_on_a_node_a_share_goes_to_the_gpu_that_it_breaks_least_and_then_to_the_fullest() -> None:
    assert best((node(1000, 900, 400, 500, 400),), share(400)) == (0, 2)
    # 500 - 400 strands 100 for those that want 500, 400 - 400 strands nothing.
    assert best((node(1000, 500, 900),), share(400), ((share(500), 1),)) == (0, 2)


def test_whole_gpus_have_no_position_and_go_where_the_fewest_are_broken_up() -> None:
    kinds = ((Ask(gpus=4), 1), (Ask(gpus=2), 1))
    four, three = node(1000, 1000, 1000, 1000), node(1000, 1000, 1000, 0)
    assert best((four, three), Ask(gpus=1), kinds) == (1, NO_POSITION)
    assert best((four, three), Ask(gpus=3), kinds) == (1, NO_POSITION)
    assert best((four, three), Ask(gpus=4), kinds) == (0, NO_POSITION)
    assert best((four, three), Ask(gpus=5), kinds) is None


def test_a_job_without_gpus_goes_where_no_free_gpu_needs_the_cpus() -> None:
    kinds = ((Ask(cpus=4), 1),)
    nodes = (node(1000, cpus=4), node(0, cpus=4))
    assert best(nodes, Ask(gpus=0, cpus=1), kinds) == (1, NO_POSITION)
    assert best(nodes, Ask(gpus=0), ((WHOLE, 1),)) == (1, NO_POSITION)


def test_a_gpu_that_nobody_can_use_any_more_for_want_of_host_memory_or_slots_is_a_fragment() -> None:
    scarce, ample = node(1000, 1000, memory_mib=10), node(1000, 1000, memory_mib=20)
    assert best((scarce, ample), Ask(memory_mib=10), ((Ask(memory_mib=10), 1),)) == (1, NO_POSITION)
    last, another = node(1000, 1000, slots=1), node(1000, 1000, slots=2)
    assert best((last, another), WHOLE) == (1, NO_POSITION)


def test_gpu_memory_that_the_mix_needs_is_left_together() -> None:
    booked = Node(gpus=(Gpu(900, mib=300),))
    roomy = Node(gpus=(Gpu(900, mib=900),))
    small = share(100, gpu_memory_mib=100)
    assert best((roomy, booked), small, ((share(100, gpu_memory_mib=500), 1),)) == (1, 0)
    nine, ten = Node((Gpu(900, mib=900),)), Node((Gpu(900, mib=1_000),))
    half = share(100, gpu_memory_mib=500)
    assert best((nine, ten), half, ((half, 1),)) == (1, 0)


@pytest.mark.parametrize(
    ("ask", "fits"),
    [
        (share(600), True),
        (share(601), False),
        (share(600, gpu_memory_mib=400), True),
        (share(600, gpu_memory_mib=401), False),
        (share(600, cpus=3), True),
        (share(600, cpus=4), False),
        (share(600, memory_mib=30), True),
        (share(600, memory_mib=31), False),
        (share(600, models=0), True),
        (share(600, models=1), False),
        (WHOLE, False),
        (Ask(gpus=0, cpus=3), True),
        (Ask(gpus=0, cpus=4), False),
    ],
)
def test_a_request_fits_where_all_it_wants_is_there(ask: Ask, fits: bool) -> None:
    gpu = Gpu(600, mib=400, serves=frozenset({0}))
    assert (best((Node((gpu,), cpus=3, memory_mib=30),), ask, sets=2) is not None) == fits
    assert best((Node((gpu,), cpus=3, memory_mib=30, slots=0),), ask, sets=2) is None


def test_what_a_request_does_not_account_for_never_keeps_it_out() -> None:
    overcommitted = Node((Gpu(600, mib=-1),), cpus=-2, memory_mib=-5)
    assert best((overcommitted,), share(600)) == (0, 0)


@pytest.mark.parametrize("overcommitted", [{"cpus": -2}, {"memory_mib": -5}, {"mib": -1}])
def test_what_the_mix_does_not_account_for_is_no_fragment_where_it_is_overcommitted(
    overcommitted: dict[str, int],
) -> None:
    host = {name: value for name, value in overcommitted.items() if name != "mib"}
    mib = overcommitted.get("mib", 1_000)
    small_whole = Node((Gpu(mib=mib),), **host)
    roomy_used = Node((Gpu(900, mib=mib), Gpu(mib=mib), Gpu(mib=mib)), **host)
    assert best((small_whole, roomy_used), share(100)) == (1, 0)
    assert best((small_whole, roomy_used), share(100), ((share(1), 1),)) == (0, 0)


def test_a_closed_gpu_takes_nothing_and_counts_for_nothing() -> None:
    closed = Node((Gpu(is_open=False), Gpu(is_open=False)))
    assert best((closed,), share(1)) is None
    assert best((closed, node(1000)), WHOLE) == (1, NO_POSITION)


def test_gpus_that_are_asked_for_by_name_are_left_to_those_who_ask() -> None:
    kinds = ((Ask(models=0), 3), (Ask(models=1), 1), (WHOLE, 6))
    nodes = tuple(Node((Gpu(serves=frozenset(sets)),)) for sets in ((0,), (1,), ()))
    assert best(nodes, WHOLE, kinds, sets=2) == (2, NO_POSITION)
    assert best(nodes[:2], WHOLE, kinds, sets=2) == (1, NO_POSITION)
    assert best(nodes, Ask(models=0), kinds, sets=2) == (0, NO_POSITION)


def test_on_a_node_a_share_leaves_the_gpu_that_is_asked_for_by_name() -> None:
    kinds = ((share(100, models=0), 1), (share(100), 100))
    mixed = Node((Gpu(300, serves=frozenset({0})), Gpu(400)))
    assert best((mixed,), share(100), kinds, sets=1) == (0, 1)


def test_of_gpus_that_cost_alike_a_share_leaves_the_one_that_is_asked_for_by_name() -> None:
    # To break up either costs about 18 thousandths, for those who want a whole one.
    kinds = ((WHOLE, 2), (share(100, models=0), 1), (share(1), 97))
    mixed = Node((Gpu(serves=frozenset({0})), Gpu()))
    assert best((mixed,), share(100), kinds, sets=1) == (0, 1)


def test_whole_gpus_are_taken_from_those_that_nobody_names_and_then_from_the_small() -> None:
    named, plain = Gpu(serves=frozenset({0})), Gpu()
    # 20 thousandths for breaking up a pair on the first, 10 on the second: both below the quantum.
    kinds = ((Ask(models=0), 1), (Ask(gpus=2), 2), (share(1), 97))
    assert best((Node((named, named)), Node((named, plain))), WHOLE, kinds, sets=1) == (1, NO_POSITION)
    large, small = Gpu(mib=1_000), Gpu(mib=500)
    kinds = ((Ask(gpu_memory_mib=1_000), 1),)
    assert best((Node((large, large)), Node((large, small))), WHOLE, kinds) == (1, NO_POSITION)


def test_a_gang_costs_what_all_its_gpus_cost() -> None:
    nodes = (node(1000, 1000, 1000, 1000), node(1000, 1000, 1000))
    assert best(nodes, Ask(gpus=2), ((Ask(gpus=3), 1),)) == (1, NO_POSITION)
    assert best(nodes, Ask(gpus=1), ((Ask(gpus=3), 1),)) == (0, NO_POSITION)


def test_less_than_a_quantum_is_nothing_and_the_best_fit_decides() -> None:
    # To break up one of two whole GPUs costs 0.01 * 900 + 0.01 * 1900 = 28 thousandths, one of three 18.
    kinds = ((WHOLE, 1), (Ask(gpus=2), 1), (share(1), 98))
    assert best((node(1000, 1000, 1000), node(1000, 1000)), share(100), kinds) == (1, 0)
    # With twice as many who want whole GPUs it is 56 and 36, on either side of the quantum of 40.
    kinds = ((WHOLE, 2), (Ask(gpus=2), 2), (share(1), 96))
    assert best((node(1000, 1000, 1000), node(1000, 1000)), share(100), kinds) == (0, 0)


def test_a_quantum_more_is_more_than_any_best_fit() -> None:
    # Five in a hundred want whole GPUs: to break one up costs 45 thousandths, above the quantum of 40.
    small_whole, roomy_used = node(1000), node(900, 1000, 1000, 1000)
    assert best((small_whole, roomy_used), share(100), ((WHOLE, 5), (share(1), 95))) == (1, 0)
    assert best((small_whole, roomy_used), share(100), ((share(1), 1),)) == (0, 0)


def test_best_fit_weighs_cpus_and_gpus_by_what_the_mix_asks_of_each() -> None:
    many_cpus, many_gpus = node(1000, cpus=40), node(1000, 1000, cpus=20)
    by_gpus = ((Ask(gpus=1, cpus=1, models=0), 1),)
    by_cpus = ((Ask(gpus=1, cpus=40, models=0), 1),)
    # Set 0 is served by no GPU, so that nothing is ever usable and all nodes cost alike.
    assert best((many_gpus, many_cpus), WHOLE, by_cpus, sets=1) == (1, NO_POSITION)
    assert best((many_cpus, many_gpus), WHOLE, by_gpus, sets=1) == (1, NO_POSITION)


def test_more_cpus_in_use_than_there_are_leave_as_little_as_none() -> None:
    nodes = (node(1000, 1000, cpus=-50), node(1000, cpus=0))
    assert best(nodes, WHOLE, ((Ask(cpus=1, models=0), 1),), sets=1) == (1, NO_POSITION)


def test_few_gpus_that_are_asked_for_by_name_are_left_before_many_that_more_ask_for() -> None:
    # On either kind those who name the other lose nothing: 20 or 30 thousandths less, the same quantum.
    kinds = ((Ask(models=0), 3), (Ask(models=1), 2), (share(1), 95))
    rare, common = (Node((Gpu(serves=frozenset({models})),)) for models in (1, 0))
    assert best((rare, common, common, common, common), WHOLE, kinds, sets=2) == (1, NO_POSITION)
    assert best((rare, common), WHOLE, kinds, sets=2) == (0, NO_POSITION)


def test_equal_nodes_go_by_row_or_by_the_rank_that_is_given() -> None:
    nodes = (node(1000), node(1000), node(1000))
    assert best(nodes, WHOLE) == (0, NO_POSITION)
    ranked = Fragmentation(pool(nodes), mix(ANY_MIX), tie_rank=np.array([2, 0, 1]))
    assert ranked.best(WHOLE) == (1, NO_POSITION)


def test_only_the_nodes_that_may_be_chosen_are() -> None:
    nodes = pool((node(1000), node(1000), node(600)))
    placement = Fragmentation(nodes, mix(ANY_MIX))
    assert placement.best(WHOLE, without=(0,)) == (1, NO_POSITION)
    assert placement.best(WHOLE) == (0, NO_POSITION)
    placement = Fragmentation(nodes, mix(ANY_MIX), closed=np.array([True, False, False]))
    assert placement.best(WHOLE) == (1, NO_POSITION)
    assert placement.best(WHOLE, without=(1,)) is None


def test_nodes_that_look_alike_are_told_apart_by_what_a_request_would_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alike, "NODES_FEW", 0)
    # Beside a request of 2 CPUs nobody who wants 3 finds room on the first node.
    nodes = pool((node(1000, 1000, cpus=4), node(1000, 1000, 1000)))
    placement = Fragmentation(nodes, mix(((Ask(cpus=3), 1),)))
    assert placement.best(WHOLE) == (0, NO_POSITION)
    assert placement.best(Ask(cpus=2)) == (1, NO_POSITION)
    # And with one job slot nobody at all does.
    nodes = pool((node(1000, 1000, slots=1), node(1000, 1000, slots=2), node(1000, 1000, 1000)))
    assert Fragmentation(nodes, mix(ANY_MIX)).best(WHOLE) == (1, NO_POSITION)


def test_a_gang_goes_first_where_its_gpus_are_near_each_other() -> None:
    nodes = pool((node(1000, 1000), node(1000, 1000, 1000, 1000), node(0, 1000, 1000)))
    near = np.zeros((3, 4, 4), dtype=bool)
    near[1, :2, :2] = True  # two of its four
    nearer = np.zeros((3, 4, 4), dtype=bool)
    placement = Fragmentation(nodes, mix(((Ask(gpus=2), 1),)), nearness=(nearer, near))
    assert placement.best(Ask(gpus=2)) == (1, NO_POSITION)
    nearer[2, 1:3, 1:3] = True
    placement = Fragmentation(nodes, mix(((Ask(gpus=2), 1),)), nearness=(nearer, near))
    assert placement.best(Ask(gpus=2)) == (2, NO_POSITION)
    assert placement.best(Ask(gpus=3)) == (1, NO_POSITION)


def test_what_was_booked_counts_from_the_next_request_on() -> None:
    free = pool((node(1000), node(700)))
    placement = Fragmentation(free, mix(ANY_MIX))
    choices = []
    for _ in range(4):
        choice = placement.best(share(350))
        assert choice is not None
        choices.append(choice)
        take(free, share(350), choice[0], choice[1:])
        placement.changed(choice[0])
    assert choices == [(1, 0), (1, 0), (0, 0), (0, 0)]
    assert placement.best(share(350)) is None
    free.milli[1, 0] = 1000
    placement.changed(1)
    assert placement.best(share(350)) == (1, 0)


def test_watts_count_against_fragmentation() -> None:
    frugal, hungry = Gpu(idle_w=10, busy_w=70), Gpu(idle_w=50, busy_w=400)
    assert best_by_power((Node((hungry,)), Node((frugal,))), WHOLE) == (1, NO_POSITION)
    # A used GPU draws no more for another share.
    used = Gpu(900, idle_w=50, busy_w=400)
    assert best_by_power((Node((frugal,)), Node((used,))), share(100)) == (1, 0)
    # 900 - 500 strands 400 for those that want 450: for 20 in a hundred 80 thousandths, two quanta, which
    # weigh like the 60 W that the other GPU would draw more, and it has less left; for 30 it is three.
    nodes = (Node((frugal,)), Node((used,)))
    few, many = (((share(450), weight), (share(1), 100 - weight)) for weight in (20, 30))
    assert best_by_power(nodes, share(500), few) == (1, 0)
    assert best_by_power(nodes, share(500), many) == (0, 0)


def test_a_cpu_package_that_runs_anyway_is_filled_first() -> None:
    # 20 CPUs a package: the second node has 5 of a package left that is in use, the first would wake one.
    nodes = (Node(cpus=20, cpus_there=40), Node(cpus=25, cpus_there=40))
    assert best_by_power(nodes, Ask(gpus=0, cpus=5)) == (1, NO_POSITION)
    assert best_by_power(nodes, Ask(gpus=0, cpus=6)) == (0, NO_POSITION)


def test_a_package_that_wakes_no_longer_draws_its_idle_watts() -> None:
    # A package more is 120 - 15 W, which is less than the 110 W more of the unused GPU.
    unused, used = Gpu(idle_w=10, busy_w=120), Gpu(900)
    nodes = (Node((unused,), cpus=90), Node((used,), cpus=80))
    assert best_by_power(nodes, share(100, cpus=5), ((share(1), 1),)) == (1, 0)


def test_the_unit_of_the_weights_does_not_matter() -> None:
    kinds = ((Ask(models=0), 3), (Ask(gpus=2), 2), (share(300), 7))
    nodes = (node(1000, 700), Node((Gpu(serves=frozenset({0})), Gpu())), node(1000, 1000, 300))
    for ask in (WHOLE, share(200), share(300), Ask(gpus=2)):
        large = tuple((kind, weight * 10**9) for kind, weight in kinds)
        assert best(nodes, ask, kinds, sets=1) == best(nodes, ask, large, sets=1) is not None


def test_without_a_mix_the_best_fit_is_taken() -> None:
    assert best((node(1000), node(600)), share(300), ()) == (0, 0)
    assert best((), WHOLE) is None


def test_scores_of_shapes_long_not_asked_for_are_forgotten_and_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "VALUES_MAX", 4)
    placement = Fragmentation(pool((node(1000), node(600))), mix(ANY_MIX))
    asks = [share(milli) for milli in (100, 200, 300, 100, 200, 300)]
    assert [placement.best(ask) for ask in asks] == [(1, 0)] * 6
    assert len(placement._kept._columns) == 2


def test_a_large_pool_is_prepared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(1000), node(1000, 1000), node(700, 600, 1000), node(600, 1000), node(800)]
    kinds = ((WHOLE, 2), (share(500), 3), (Ask(gpus=2), 1))
    asks = [share(milli) for milli in range(50, 1000, 50)]
    at_once = [best(nodes, ask, kinds) for ask in asks]
    monkeypatch.setattr(fragmentation, "_CELLS_MAX", 3)
    assert [best(nodes, ask, kinds) for ask in asks] == at_once
    assert len(set(at_once)) > 3


def test_requests_that_differ_in_one_thing_are_not_taken_for_one_another() -> None:
    gpu = Gpu(mib=500, serves=frozenset({0}))
    placement = Fragmentation(pool((Node((gpu,), cpus=4, memory_mib=40),), 2), mix(ANY_MIX))
    fits = Ask(gpu_memory_mib=500, models=0, cpus=4, memory_mib=40)
    assert placement.best(fits) == (0, NO_POSITION)
    for name, value in (
        ("gpus", 2),
        ("share_milli", 900),
        ("gpu_memory_mib", 501),
        ("models", 1),
        ("cpus", 5),
        ("memory_mib", 41),
    ):
        choice = placement.best(replace(fits, **{name: value}))
        assert choice == ((0, 0) if name == "share_milli" else None), name
