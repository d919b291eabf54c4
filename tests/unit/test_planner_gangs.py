"""Gangs that no node can hold: whole equal nodes, as few as will do, all or nothing."""

from dataclasses import replace

import pytest

from scheduler.model.actions import PreemptJob, Promise, StartJob
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import DRAINING, DRAINING_STOP
from scheduler.planning.explain import Obstacle, Remedy, RemedyKind, Rule, explain, preview
from scheduler.planning.planner import plan
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    SECOND_US,
    TRAINING,
    UNKNOWN,
    G,
    J,
    N,
    Outcome,
    W,
    applied,
    outcome,
    running,
    snapshot,
)

# As `nvidia-smi topo -m` shows them: NVLink island, PCIe switch, NUMA node of each GPU.
SERVERS = {
    "A100": tuple((0, gpu // 2, gpu // 4) for gpu in range(8)),
    "H100": tuple((0, gpu, gpu // 4) for gpu in range(8)),
    "L40S": tuple((UNKNOWN, gpu // 4, gpu // 4) for gpu in range(8)),  # PCIe only
    "T4": tuple((UNKNOWN, 0, 0) for _ in range(4)),
}
DGX_MODELS = ("A100", "H100")


def cluster(*models: str) -> tuple[G, ...]:
    """A server of each of these models; its GPUs are 0-0, 0-1, ..."""
    return tuple(
        G(f"{row}-{index}", index, row, model=model, island=island, switch=switch, numa=numa)
        for row, model in enumerate(models)
        for index, (island, switch, numa) in enumerate(SERVERS[model])
    )


def world(models: tuple[str, ...], *jobs: J, nodes: N | None = None) -> W:
    return W(jobs=jobs, gpus=cluster(*models), nodes=(nodes or N(),) * len(models))


def whole(*rows: int, gpus: int = 8) -> tuple[str, ...]:
    return tuple(f"{row}-{index}" for row in rows for index in range(gpus))


def stays(number: int, *on: str, **others: object) -> J:
    node = int(on[0].split("-")[0]) if on else 0
    return running(number, *on, **{"job_class": INFERENCE, "preemptible": False, "node": node, **others})


def miner(number: int, *on: str, **others: object) -> J:
    return running(number, *on, **{"job_class": MINING, "node": int(on[0].split("-")[0]), **others})


def planned(world: W, policy: Policy | None = None) -> Outcome:
    return outcome(plan(snapshot(world), policy or Policy()))


def started(world: W, number: int = 1) -> tuple[str, ...]:
    (found,) = (a for a in planned(world).actions if isinstance(a, StartJob) and a.job == number)
    assert found.node == int(found.gpus[0].split("-")[0])
    return found.gpus


def victims(world: W) -> set[int]:
    return {action.job for action in planned(world).actions if isinstance(action, PreemptJob)}


@pytest.mark.parametrize("model", DGX_MODELS)
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(16, (0, 1)), (32, (0, 1, 2, 3))],
)
def test_a_gang_takes_whole_nodes_and_few_of_them(model: str, wanted: int, expected: tuple[int, ...]) -> None:
    assert started(world((model,) * 5, J(1, gpus=wanted))) == whole(*expected)


def test_a_node_of_which_anything_is_held_is_left_to_others() -> None:
    held = stays(2, "1-3", share_milli=250)
    assert started(world(("H100",) * 4, held, J(1, gpus=16))) == whole(0, 2)


@pytest.mark.parametrize(
    ("models", "wanted", "expected"),
    [
        (("H100", "A100", "H100", "A100"), (), whole(0, 2)),
        (("H100", "A100", "H100", "A100"), ("A100",), whole(1, 3)),
        (("H100", "L40S", "A100", "L40S"), (), whole(1, 3)),  # PCIe-only nodes: the only two of one model
        (("T4", "T4", "T4", "T4", "A100", "H100", "A100"), (), whole(4, 6)),  # two nodes rather than four
        (("T4", "T4", "T4", "T4", "A100", "H100"), (), whole(0, 1, 2, 3, gpus=4)),
        # What fewer sets of models accept is given away first: here A100s are asked for by name, too.
        (("A100", "A100", "H100", "H100"), ("A100", "H100"), whole(2, 3)),
    ],
)
def test_all_nodes_are_of_one_model(
    models: tuple[str, ...], wanted: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    gang = J(1, gpus=16, models=wanted)
    by_name = (("A100",),) if len(wanted) > 1 else ()
    assert started(replace(world(models, gang), model_sets=((), *by_name))) == expected


def test_nodes_of_two_models_are_no_place_for_one_gang() -> None:
    assert planned(world(("H100", "A100"), J(1, gpus=16))).waits == {1: Reason.NO_SUITABLE_GPU}


def test_a_node_of_mixed_models_is_no_part_of_a_gang_over_several() -> None:
    w = world(("H100", "H100", "H100"), J(1, gpus=16))
    mixed = tuple(replace(gpu, model="A100") if gpu.uuid == "0-3" else gpu for gpu in w.gpus)
    assert started(replace(w, gpus=mixed)) == whole(1, 2)


def test_a_gang_that_a_node_could_hold_stays_on_one_node() -> None:
    busy = (stays(2, "0-0"), stays(3, "1-0"))
    waits = planned(world(("H100", "H100"), *busy, J(1, gpus=8)))
    assert waits.waits == {1: Reason.WAITING_FOR_GPUS}
    cordoned = replace(cluster("H100", "T4", "T4")[0], is_open=False)
    w = world(("H100", "T4", "T4"), J(1, gpus=8))
    w = replace(w, gpus=(cordoned, *w.gpus[1:]))
    assert planned(w).waits == {1: Reason.NO_SUITABLE_GPU}, "though eight T4s are free"


@pytest.mark.parametrize(
    ("model", "held", "rest"),
    [
        ("A100", (), ("2-0", "2-1")),
        ("A100", ("2-0", "2-3", "2-4"), ("2-6", "2-7")),  # the pair behind one switch that is left
        ("H100", ("2-0", "2-1", "2-2", "2-4"), ("2-5", "2-6")),  # one NUMA node
        ("L40S", ("2-0", "2-1", "2-2"), ("2-4", "2-5")),
    ],
)
def test_what_is_left_over_is_the_nearest_part_of_one_more_node(
    model: str, held: tuple[str, ...], rest: tuple[str, ...]
) -> None:
    jobs = [stays(100 + place, uuid) for place, uuid in enumerate(held)]
    assert started(world((model,) * 3, *jobs, J(1, gpus=18))) == (*whole(0, 1), *rest)


def test_the_rest_goes_where_the_fewest_gpus_are_free() -> None:
    w = world(("H100",) * 4, stays(2, "3-0", "3-1"), J(1, gpus=12))
    assert started(w) == (*whole(0), *whole(3)[4:])


def test_cpus_memory_and_slots_are_taken_in_proportion_to_the_gpus_of_each_node() -> None:
    gang = J(1, gpus=12, cpus=18, memory_mib=120)  # 12 CPUs with eight GPUs, 6 with four
    w = world(("H100", "H100"), gang, nodes=N(cpus=14, memory_mib=100, live_jobs_max=2))
    after = applied(w, plan(snapshot(w), Policy()))
    # Left are 2 CPUs on the first node and 8 on the second, and one slot on each.
    others = [J(2, gpus=0, cpus=8), J(3, gpus=0, cpus=3), J(4, gpus=0)]
    made = planned(after.with_jobs(*others))
    assert [(a.job, a.node) for a in made.actions if isinstance(a, StartJob)] == [(2, 1), (4, 0)]
    assert made.waits == {3: Reason.WAITING_FOR_CPUS}


def test_odd_amounts_are_rounded_up_on_each_node() -> None:
    fits = N(cpus=3)
    assert planned(world(("H100", "H100"), J(1, gpus=16, cpus=5), nodes=fits)).waits == {}
    few = planned(world(("H100", "H100"), J(1, gpus=16, cpus=7), nodes=fits))
    assert few.waits == {1: Reason.WAITING_FOR_CPUS}


def test_nothing_is_held_back_for_a_gang_of_which_only_a_part_could_start() -> None:
    busy = stays(2, "1-0")
    made = planned(world(("H100", "H100"), busy, J(1, gpus=16), J(3, BATCH)))
    assert [action.job for action in made.actions] == [3]
    assert made.waits == {1: Reason.WAITING_FOR_GPUS}


def test_the_cheapest_mix_gives_way_wherever_it_is() -> None:
    mined = [miner(10 + gpu, f"0-{gpu}", value=0) for gpu in range(8)]
    half = miner(20, *whole(1)[:4], value=10_000, ran_s=60)
    shares = [miner(21 + n, "1-4", share_milli=500, value=0) for n in range(2)]
    dear = miner(30, *whole(2), value=9_000_000)
    w = world(("H100",) * 3, *mined, half, *shares, dear, J(1, gpus=16))
    assert victims(w) == {*range(10, 18), 20, 21, 22}


def test_loss_comes_before_few_nodes() -> None:
    dear = [miner(10 + row, *whole(row), value=3_000_000, ran_s=3600) for row in (0, 1)]
    cheap = [miner(20 + row, *whole(row, gpus=4), value=1_000_000, ran_s=3600) for row in (2, 3, 4, 5)]
    w = world(("H100", "H100", "T4", "T4", "T4", "T4"), *dear, *cheap, J(1, gpus=16))
    assert victims(w) == {22, 23, 24, 25}


def test_who_is_on_two_of_the_nodes_is_paid_for_once() -> None:
    # 12 and 4 GPU-hours on the first two nodes, 9 on each of the others.
    over = miner(10, *whole(0), *whole(1)[:4], value=1_000_000, ran_s=3600)
    beside = miner(11, *whole(1)[4:], value=1_000_000, ran_s=3600)
    others = [miner(20 + row, *whole(row), value=1_125_000, ran_s=3600) for row in (2, 3)]
    half = Policy(assumed_checkpoint_interval_s=7200.0)
    w = world(("H100",) * 4, over, beside, *others, J(1, gpus=16))
    made = planned(w, half)
    assert {action.job for action in made.actions} == {10, 11}


def test_a_gang_that_gives_way_leaves_all_its_nodes_and_is_paid_for_once() -> None:
    both = miner(10, *whole(0, 1), value=3_000_000, ran_s=3600)
    each = [miner(20 + row, *whole(row), value=4_000_000, ran_s=3600) for row in (2, 3)]
    w = world(("H100",) * 4, both, *each, J(1, gpus=16))
    # 48 GPU-hours' worth against 64: the two nodes of one gang, not one of each.
    assert victims(w) == {10}
    after = applied(w, plan(snapshot(w), Policy()))
    again = planned(after)
    assert again.actions == ()
    assert again.awaited == {1: (10,)}


def test_what_a_gang_leaves_beyond_what_is_wanted_comes_free_for_the_next() -> None:
    w = world(("H100",) * 2, miner(10, *whole(0, 1)), J(1, gpus=2), J(2, BATCH, gpus=8))
    made = planned(w)
    assert [action.job for action in made.actions] == [10]
    assert made.waits == {1: Reason.WAITING_FOR_HANDOVER, 2: Reason.WAITING_FOR_HANDOVER}


def test_a_claim_over_several_nodes_is_kept_from_all_that_rank_lower() -> None:
    w = world(("H100",) * 2, miner(10, "1-0"), J(1, gpus=16), J(2, BATCH, gpus=1))
    made = planned(w)
    assert [action.job for action in made.actions] == [10]
    assert made.awaited == {1: (10,)}
    assert made.waits == {1: Reason.WAITING_FOR_HANDOVER, 2: Reason.WAITING_FOR_GPUS}
    again = planned(applied(w, plan(snapshot(w), Policy())))
    assert again.actions == ()
    assert again.waits == made.waits


def test_a_gang_of_its_class_of_the_same_worth_is_not_displaced() -> None:
    held = running(2, *whole(0, 1), node=0)
    assert victims(world(("H100",) * 2, held, J(1, gpus=16, value=2_500_000))) == set()
    assert victims(world(("H100",) * 2, held, J(1, gpus=16, value=2_600_000))) == {2}
    protected = replace(held, job_class=MINING, min_runtime_us=7200 * SECOND_US)
    assert victims(world(("H100",) * 2, protected, J(1, gpus=16))) == set()


def test_what_is_drained_with_its_jobs_ends_a_gang_of_which_a_part_is_there() -> None:
    held = running(2, *whole(0, 1), node=0)
    w = world(("H100",) * 3, held)
    made = planned(replace(w, nodes=(N(), N(drain=DRAINING_STOP), N())))
    assert [(action.job, action.reason) for action in made.actions] == [(2, Reason.NODE_DRAINED)]
    waits = planned(replace(world(("H100",) * 2, J(1, gpus=16)), nodes=(N(), N(drain=DRAINING))))
    assert waits.waits == {1: Reason.NODE_DRAINING}


def test_a_promise_names_the_moment_at_which_all_its_nodes_are_free_and_nobody_delays_it() -> None:
    ends = [stays(10 + row, f"{row}-0", ran_s=0, expected_us=(60 + 40 * row) * SECOND_US) for row in (0, 1)]
    gang = J(1, gpus=16)
    late = J(2, BATCH, preemptible=False, expected_us=200 * SECOND_US)
    short = J(3, BATCH, preemptible=False, expected_us=90 * SECOND_US)
    w = world(("H100",) * 2, *ends, gang, late, short)
    made = planned(w)
    assert made.promise == Promise(1, NOW_US + 100 * SECOND_US)
    assert made.waits == {1: Reason.WAITING_FOR_GPUS, 2: Reason.WAITING_FOR_PROMISED_START}
    assert [action.job for action in made.actions] == [3]


def test_beside_a_promised_rest_there_is_room() -> None:
    ends = stays(10, "0-0", ran_s=0, expected_us=60 * SECOND_US)
    # The gang will take node 0 or 1 whole and half of the other.
    w = world(("H100",) * 2, ends, stays(11, "1-0"), J(1, gpus=12), J(2, BATCH, gpus=3, preemptible=False))
    made = planned(w)
    assert made.promise == Promise(1, NOW_US + 60 * SECOND_US)
    (start,) = made.actions
    assert isinstance(start, StartJob)
    assert {uuid[0] for uuid in start.gpus} == {"1"}
    more = planned(w.with_jobs(J(3, BATCH, gpus=1, preemptible=False)))
    assert more.waits == {1: Reason.WAITING_FOR_GPUS, 3: Reason.WAITING_FOR_PROMISED_START}


def test_a_preview_names_the_gpus_and_victims_of_all_nodes() -> None:
    w = world(("H100",) * 2, miner(10, "0-7"), miner(11, "1-0", grace_us=2 * SECOND_US), J(1, gpus=16))
    found = preview(snapshot(w), Policy(), 1)
    assert found.gpus == whole(0, 1)
    assert [victim.number for victim in found.victims] == [10, 11]
    assert found.start_within_us == 10 * SECOND_US


def test_an_explanation_counts_gpus_and_nodes() -> None:
    w = world(
        ("H100", "H100", "H100", "A100"),
        stays(2, "0-0"),
        stays(3, "1-0", "1-1"),
        J(1, gpus=24, models=("H100",)),
    )
    found = explain(snapshot(w), Policy(), 1)
    assert found.reason is Reason.WAITING_FOR_GPUS
    assert found.obstacles == (
        Obstacle(Rule.MODEL, whole(3)),
        Obstacle(Rule.NOT_PREEMPTIBLE, ("0-0", "1-0", "1-1"), (2, 3), nodes=2),
        Obstacle(Rule.NODE_NOT_WHOLE, (*whole(0)[1:], *whole(1)[2:]), nodes=2),
    )
    # 8 and a part of 7: the same node can't be both.
    assert found.remedies == (Remedy(RemedyKind.FEWER_GPUS, 15),)


def test_an_explanation_says_what_the_hosts_lack_and_on_how_many_nodes() -> None:
    w = world(("H100",) * 3, J(1, gpus=16, cpus=40), nodes=N(cpus=16))
    found = explain(snapshot(w), Policy(), 1)
    assert found.reason is Reason.WAITING_FOR_CPUS
    assert found.obstacles == (Obstacle(Rule.CPUS, lacking=4, nodes=3),)
    assert found.remedies == (Remedy(RemedyKind.FEWER_CPUS, 32),)


def test_a_gang_that_waits_for_a_closed_gpu_is_told_to_open_it() -> None:
    w = world(("H100",) * 2, J(1, gpus=16))
    closed = replace(w, gpus=(replace(w.gpus[0], is_open=False), *w.gpus[1:]))
    found = explain(snapshot(closed), Policy(), 1)
    assert found.reason is Reason.NO_SUITABLE_GPU
    assert found.obstacles == (
        Obstacle(Rule.CLOSED, ("0-0",)),
        Obstacle(Rule.NODE_NOT_WHOLE, whole(0)[1:]),
    )
    assert found.remedies == (Remedy(RemedyKind.OPEN_GPUS, 1), Remedy(RemedyKind.FEWER_GPUS, 15))


def test_a_small_job_refused_does_not_refuse_a_gang_that_finds_other_nodes() -> None:
    full = [stays(10 + row, f"{row}-0") for row in range(1)]
    # No node of eight is free for the gang of eight; four of four are for the one of sixteen.
    w = world(("H100", "T4", "T4", "T4", "T4"), *full, J(1, INFERENCE, gpus=8), J(2, gpus=16))
    assert started(w, 2) == whole(1, 2, 3, 4, gpus=4)
    # And a larger gang with less of the host for each GPU starts where a smaller could not.
    narrow = world(("T4",) * 4, J(1, INFERENCE, gpus=8, cpus=20), J(2, gpus=16, cpus=32), nodes=N(cpus=8))
    assert planned(narrow).waits == {1: Reason.WAITING_FOR_CPUS}
    assert started(narrow, 2) == whole(0, 1, 2, 3, gpus=4)


def test_many_equal_gangs_are_refused_by_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    from scheduler.planning import planner

    looks = []
    look = planner.find_free_over
    monkeypatch.setattr(planner, "find_free_over", lambda *given: looks.append(1) or look(*given))
    many = [J(number, TRAINING, gpus=16 + number % 3) for number in range(102, 402)]
    made = planned(world(("H100",) * 3, stays(2, "0-0"), stays(3, "1-0"), *many))
    assert len(made.waits) == 300
    assert len(looks) == 1
