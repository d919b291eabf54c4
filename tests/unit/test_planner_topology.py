"""Which GPUs of a node, and which node, a gang gets: those that are nearest to each other.

The servers are as `nvidia-smi topo -m` shows them: DGX A100 and DGX H100 (all eight GPUs on one NVSwitch, two
NUMA nodes, pairs of the A100 behind one PCIe switch, each H100 with a switch of its own), a server of eight
PCIe cards (no NVLink, four cards on each switch and NUMA node), and one whose cards are bridged in pairs.
"""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.actions import StartJob
from scheduler.model.policy import Policy
from scheduler.planning import topology
from scheduler.planning.planner import plan
from scheduler.planning.topology import Near, best_connected
from tests.fakes.worlds import UNKNOWN, G, J, N, W, running, snapshot

DGX_A100 = tuple((0, gpu // 2, gpu // 4) for gpu in range(8))
DGX_H100 = tuple((0, gpu, gpu // 4) for gpu in range(8))
PCIE = tuple((UNKNOWN, gpu // 4, gpu // 4) for gpu in range(8))
BRIDGED = tuple((gpu // 2, gpu // 4, gpu // 4) for gpu in range(8))


def server(near: tuple[Near, ...], node: int = 0) -> tuple[G, ...]:
    return tuple(
        G(f"N{node}-{index}", index, node, island=island, switch=switch, numa=numa)
        for index, (island, switch, numa) in enumerate(near)
    )


def given_gpus(world: W, number: int) -> list[str]:
    (started,) = (
        action
        for action in plan(snapshot(world), Policy()).actions
        if isinstance(action, StartJob) and action.job == number
    )
    return [uuid.removeprefix("N") for uuid in started.gpus]


@pytest.mark.parametrize(
    ("near", "held", "wanted", "expected"),
    [
        (DGX_A100, (), 2, "01"),
        (DGX_A100, (0,), 2, "23"),  # the pair behind one switch, not 1 and 2
        (DGX_A100, (0, 2), 4, "4567"),  # one NUMA node
        (DGX_A100, (0, 3, 5, 6), 2, "12"),  # no pair is left: two of one NUMA node
        (DGX_A100, (0,), 1, "1"),  # the GPU whose neighbour is gone
        (DGX_A100, (), 8, "01234567"),
        (DGX_H100, (0, 1), 4, "4567"),
        (DGX_H100, (0, 4, 5), 2, "67"),  # of two NUMA nodes the one with fewer left
        (PCIE, (0, 1), 4, "4567"),
        (PCIE, (0, 1), 2, "23"),  # the half that is broken already
        (PCIE, (0, 1, 2, 4), 4, "3567"),  # as many as one switch has, and one more
        (BRIDGED, (0,), 2, "23"),
        (BRIDGED, (0,), 1, "1"),
        (BRIDGED, (2,), 4, "4567"),
        (BRIDGED, (1, 2, 5, 6), 2, "03"),  # no bridge is whole: the same switch
    ],
)
def test_a_gang_gets_the_best_connected_free_set(
    near: tuple[Near, ...], held: tuple[int, ...], wanted: int, expected: str
) -> None:
    stays = tuple(running(100 + gpu, f"N0-{gpu}", job_class=0, preemptible=False, node=0) for gpu in held)
    world = W(jobs=(*stays, J(1, gpus=wanted)), gpus=server(near))
    assert given_gpus(world, 1) == [f"0-{gpu}" for gpu in expected]


def test_a_gang_goes_to_the_node_where_its_gpus_are_near_rather_than_to_the_fuller_one() -> None:
    stays = (
        running(100, "N0-0", "N0-4", job_class=0, preemptible=False, node=0),
        running(101, "N1-0", job_class=0, preemptible=False, node=1),
    )
    gang = J(1, gpus=4)
    world = W(jobs=(*stays, gang), gpus=(*server(PCIE), *server(PCIE, 1)), nodes=(N(), N()))
    assert given_gpus(world, 1) == ["1-4", "1-5", "1-6", "1-7"]


def test_a_job_that_no_island_could_hold_starts_all_the_same() -> None:
    world = W(jobs=(J(1, gpus=6),), gpus=server(PCIE))
    assert given_gpus(world, 1) == ["0-0", "0-1", "0-2", "0-3", "0-4", "0-5"]


nears = st.lists(
    st.tuples(st.integers(-1, 2), st.integers(-1, 2), st.integers(-1, 1)), min_size=1, max_size=8
).map(tuple)


def links(near: tuple[Near, ...], chosen: tuple[int, ...]) -> tuple[int, int, int]:
    """How many pairs share an island, a switch, a NUMA node."""
    pairs = list(combinations(chosen, 2))
    island, switch, numa = (
        sum(near[a][level] == near[b][level] != UNKNOWN for a, b in pairs) for level in range(3)
    )
    return island, switch, numa


@given(nears, st.data())
def test_no_other_set_is_nearer(near: tuple[Near, ...], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(near)))
    chosen = best_connected(near, count)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == count
    assert links(near, chosen) == max(links(near, other) for other in combinations(range(len(near)), count))


@given(nears, st.data())
def test_names_of_islands_and_switches_do_not_matter(near: tuple[Near, ...], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(near)))
    renamed = tuple(tuple(UNKNOWN if n == UNKNOWN else 7 - n for n in each) for each in near)
    assert best_connected(renamed, count) == best_connected(near, count)  # type: ignore[arg-type]


def test_where_there_are_too_many_sets_a_whole_island_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    near = tuple((gpu % 2, UNKNOWN, UNKNOWN) for gpu in range(16))
    assert best_connected(near, 8) == (0, 2, 4, 6, 8, 10, 12, 14)
    topology.best_connected.cache_clear()
    monkeypatch.setattr(topology, "SETS_MAX", 1)
    assert best_connected(near[:8], 4) == (0, 2, 4, 6)
    topology.best_connected.cache_clear()
