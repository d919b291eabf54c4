"""Placement chooses by its definition, remembers only what is still true, and ignores the order of rows."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.model.snapshot import UNKNOWN, WHOLE_MILLI, MixColumns
from scheduler.planning import alike, arrays
from scheduler.planning.fragmentation import (
    NO_POSITION,
    QUANTUM_MILLI,
    W_PER_QUANTUM,
    Fragmentation,
)
from scheduler.planning.pool import Pool
from tests.fakes.pools import (
    GPU_MIB,
    PACKAGE_BUSY_W,
    PACKAGE_IDLE_W,
    Ask,
    Gpu,
    Node,
    mix,
    pool,
    put_back,
    take,
    watts,
)
from tests.harness import device_arrays
from tests.harness.device_arrays import DeviceLibrary

SETS = 2
PRESSURES = 7
FIT_PARTS = 100
Kinds = tuple[tuple[Ask, int], ...]
Choice = tuple[int, int] | None


@dataclass(frozen=True)
class World:
    """Nodes, the mix, requests that come one after the other, and whether power counts."""

    nodes: tuple[Node, ...]
    kinds: Kinds
    asks: tuple[Ask, ...]
    by_power: bool

    def placement(self, free: Pool, tie_rank: Any = None) -> Fragmentation:
        return Fragmentation(free, mix(self.kinds), watts(self.nodes) if self.by_power else None, tie_rank)


_gpus = st.builds(
    Gpu,
    milli=st.sampled_from((0, 100, 300, 500, 700, 1000, 1000, 1000)),
    mib=st.sampled_from((200, 500, GPU_MIB)),
    serves=st.frozensets(st.integers(0, SETS - 1)),
    is_open=st.sampled_from((True, True, True, False)),
    is_instance=st.sampled_from((False, False, False, True)),
    idle_w=st.sampled_from((10, 50)),
    busy_w=st.sampled_from((70, 120, 400)),
)
_nodes = st.builds(
    Node,
    gpus=st.lists(_gpus, max_size=4).map(tuple),
    cpus=st.integers(-1, 12),
    memory_mib=st.sampled_from((-10, 50, 100)),
    slots=st.integers(0, 3),
    cpus_there=st.just(12),
    package_cpus=st.sampled_from((4, 5)),
)
_hosts = {
    "models": st.sampled_from((UNKNOWN, UNKNOWN, *range(SETS))),
    "cpus": st.sampled_from((0, 0, 1, 3)),
    "memory_mib": st.sampled_from((0, 0, 20, 60)),
}
_asks = st.one_of(
    st.builds(
        Ask,
        share_milli=st.sampled_from((100, 200, 300, 500)),
        gpu_memory_mib=st.sampled_from((0, 0, 150, 400)),
        **_hosts,
    ),
    st.builds(Ask, gpus=st.integers(1, 3), gpu_memory_mib=st.sampled_from((0, 0, 600)), **_hosts),
    st.builds(Ask, gpus=st.just(0), **_hosts),
)
worlds = st.builds(
    World,
    nodes=st.lists(_nodes, min_size=1, max_size=5).map(tuple),
    kinds=st.lists(st.tuples(_asks, st.integers(1, 9)), max_size=5).map(tuple),
    asks=st.lists(_asks, min_size=1, max_size=6).map(tuple),
    by_power=st.booleans(),
)


# Rarely drawn: a gang beside MIG instances, which serve it nowhere.
_CUT = Node(gpus=(Gpu(is_instance=True), Gpu()))
_BESIDE_INSTANCES = World(
    nodes=(_CUT, Node(gpus=(*_CUT.gpus, Gpu()))),
    kinds=((Ask(gpus=2), 3), (Ask(share_milli=500), 1)),
    asks=(Ask(gpus=2), Ask(gpus=3), Ask()),
    by_power=False,
)


@given(worlds)
@example(_BESIDE_INSTANCES)
def test_the_choice_is_the_least_by_the_definition(world: World) -> None:
    free = pool(world.nodes, SETS)
    for ask in world.asks:
        assert world.placement(free).best(ask) == _by_definition(world, free, ask)


@given(worlds, st.lists(st.integers(0, 4), max_size=4))
def test_what_is_remembered_is_what_would_be_computed_afresh(world: World, released: list[int]) -> None:
    free = pool(world.nodes, SETS)
    placement = world.placement(free)
    held: list[tuple[Ask, int, tuple[int, ...]]] = []
    # Each request twice, so that what was remembered of it is renewed.
    for turn, ask in enumerate(world.asks * 2):
        choice = placement.best(ask)
        assert choice == world.placement(free).best(ask)
        if choice is not None:
            positions = _positions(world, free, ask, choice)
            take(free, ask, choice[0], positions)
            placement.changed(choice[0])
            held.append((ask, choice[0], positions))
        if turn in released and held:
            ended = held.pop(0)
            put_back(free, *ended)
            placement.changed(ended[1])


@given(worlds)
def test_nodes_that_are_alike_are_chosen_as_if_each_were_rated_by_itself(world: World) -> None:
    twice = replace(world, nodes=world.nodes * 2, by_power=False)
    one, two = pool(twice.nodes, SETS), pool(twice.nodes, SETS)
    expected = _choices(twice, twice.placement(one), one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alike, "NODES_FEW", 0)
        assert _choices(twice, twice.placement(two), two) == expected


@given(worlds, st.randoms(use_true_random=False))
def test_the_order_of_nodes_kinds_and_sets_changes_nothing(world: World, random: Any) -> None:
    rank = random.sample(range(50), len(world.nodes))
    order = random.sample(range(len(world.nodes)), len(world.nodes))
    shuffled = World(
        tuple(_swap_sets(world.nodes[row]) for row in order),
        tuple((_swap_set(ask), weight) for ask, weight in random.sample(world.kinds, len(world.kinds))),
        world.asks,
        world.by_power,
    )
    free, other = pool(world.nodes, SETS), pool(shuffled.nodes, SETS)
    one = world.placement(free, np.array(rank))
    two = shuffled.placement(other, np.array([rank[row] for row in order]))
    for ask in world.asks:
        choice = one.best(ask)
        expected = choice and (order.index(choice[0]), choice[1])
        assert two.best(_swap_set(ask)) == expected


@given(worlds)
def test_on_a_device_the_choices_are_the_same_and_none_waits_unsaid_for_it(world: World) -> None:
    expected = _choices(world, world.placement(free := pool(world.nodes, SETS)), free)
    noted = Counter(device_arrays.findings)
    before = arrays.bind(DeviceLibrary())
    try:
        free = _on_device(pool(world.nodes, SETS))
        power = _on_device(watts(world.nodes)) if world.by_power else None
        placement = Fragmentation(free, _on_device(mix(world.kinds)), power)
        assert _choices(world, placement, free) == expected
    finally:
        arrays.bind(before)
    assert device_arrays.findings == noted


def _choices(world: World, placement: Fragmentation, free: Pool) -> list[Choice]:
    """What is chosen for each request, while those before it are booked."""
    choices = []
    for ask in world.asks:
        choices.append(choice := placement.best(ask))
        if choice is not None:
            free.cpus[choice[0]] -= ask.cpus
            free.slots[choice[0]] -= 1
            if choice[1] != NO_POSITION:
                free.milli[choice] -= ask.share_milli
            placement.changed(choice[0])
    return choices


def _on_device(record: Any) -> Any:
    columns = {name: arrays.xp.asarray(getattr(record, name)) for name in record.__slots__}
    return type(record)(**columns)


def _swap_sets(node: Node) -> Node:
    gpus = tuple(replace(gpu, serves=frozenset(SETS - 1 - each for each in gpu.serves)) for gpu in node.gpus)
    return replace(node, gpus=gpus)


def _swap_set(ask: Ask) -> Ask:
    return ask if ask.models == UNKNOWN else replace(ask, models=SETS - 1 - ask.models)


def _by_definition(world: World, free: Pool, ask: Ask) -> Choice:
    """The best choice, computed for each node and GPU alone, straight from the module's words."""
    found = [
        _rating(world, free, ask, row, positions)
        for row in range(len(world.nodes))
        for positions in _options(world, free, ask, row)
    ]
    if not found:
        return None
    _, _, _, row, _, *positions = min(found)
    return (row, positions[0] if ask.share_milli < WHOLE_MILLI else NO_POSITION)


def _options(world: World, free: Pool, ask: Ask, row: int) -> list[tuple[int, ...]]:
    """The positions that could be taken on a node: each for a share, one choice for whole GPUs."""
    if free.slots[row] < 1:
        return []
    if (ask.cpus and free.cpus[row] < ask.cpus) or (ask.memory_mib and free.memory_mib[row] < ask.memory_mib):
        return []
    usable = [g for g in range(free.milli.shape[1]) if _serves(free, ask, row, g)]
    if ask.gpus == 0:
        return [()]
    if ask.share_milli < WHOLE_MILLI:
        return [(position,) for position in usable]
    pressures = _pressures(world, free)
    usable.sort(key=lambda g: (pressures[row][g], free.mib[row, g], g))
    return [tuple(usable[: ask.gpus])] if len(usable) >= ask.gpus else []


def _positions(world: World, free: Pool, ask: Ask, choice: tuple[int, int]) -> tuple[int, ...]:
    row, position = choice
    return (position,) if position != NO_POSITION else _options(world, free, ask, row)[0]


def _serves(free: Pool, ask: Ask, row: int, position: int) -> bool:
    milli, mib = int(free.milli[row, position]), int(free.mib[row, position])
    serves = ask.models == UNKNOWN or bool(free.fits[ask.models, row, position])
    serves = serves and (ask.gpus <= 1 or bool(free.whole[row, position]))
    return serves and milli >= ask.share_milli and (ask.gpu_memory_mib == 0 or mib >= ask.gpu_memory_mib)


def _rating(world: World, free: Pool, ask: Ask, row: int, positions: tuple[int, ...]) -> tuple[int, ...]:
    """Cost, pressure, best fit, row, what is free on the (first) GPU, positions: the least is the best."""
    after = Pool(**{name: getattr(free, name).copy() for name in Pool.__slots__})
    take(after, ask, row, positions)
    weight = max(1, sum(weight for _, weight in world.kinds))
    added = _fragments(world, after, row) - _fragments(world, free, row)
    cost = added // (QUANTUM_MILLI * weight)
    if world.by_power:
        cost = cost * W_PER_QUANTUM + _draw_w(world, after, row) - _draw_w(world, free, row)
    pressures = _pressures(world, free)
    pressure = max((pressures[row][position] for position in positions), default=0)
    columns: MixColumns = mix(world.kinds)
    fit = 0
    for left, asked in (
        (int(after.cpus[row]), int((columns.cpus * columns.weight).sum())),
        (int(after.milli[row].sum()), int((columns.gpus * columns.share_milli * columns.weight).sum())),
    ):
        fit += max(0, left) * FIT_PARTS * weight // asked if asked else 0
    left = int(free.milli[row, positions[0]]) if positions else 0
    return (cost, pressure, fit, row, left, *positions)


def _fragments(world: World, free: Pool, row: int) -> int:
    """The node's free thousandths that each kind of the mix can't use, times its weight."""
    total = 0
    for kind, weight in world.kinds:
        whole = int(free.milli[row].sum())
        large = [g for g in range(free.milli.shape[1]) if _serves(free, kind, row, g)]
        fits = free.slots[row] >= 1 and kind.gpus > 0 and len(large) >= kind.gpus
        fits = fits and (kind.cpus == 0 or free.cpus[row] >= kind.cpus)
        fits = fits and (kind.memory_mib == 0 or free.memory_mib[row] >= kind.memory_mib)
        total += weight * (whole - sum(int(free.milli[row, g]) for g in large) if fits else whole)
    return total


def _draw_w(world: World, free: Pool, row: int) -> int:
    node = world.nodes[row]
    drawn = sum(
        gpu.busy_w if free.milli[row, position] < WHOLE_MILLI else gpu.idle_w
        for position, gpu in enumerate(node.gpus)
        if gpu.is_open
    )
    busy = -(-(node.cpus_there - int(free.cpus[row])) // node.package_cpus)
    return drawn + busy * (PACKAGE_BUSY_W - PACKAGE_IDLE_W)


def _pressures(world: World, free: Pool) -> list[list[int]]:
    """By node and GPU what is asked for it by its model, from 0 to PRESSURES."""
    asked = [(kind.models, weight * kind.gpus * kind.share_milli) for kind, weight in world.kinds]
    total = sum(milli for _, milli in asked)
    raw = np.zeros(free.milli.shape, np.int64)
    for models in range(SETS):
        milli, gpus = sum(m for each, m in asked if each == models), int(free.fits[models].sum())
        if milli and gpus:
            raw += np.where(free.fits[models], milli * 10**12 // total // gpus, 0)
    return (raw * PRESSURES // max(1, int(raw.max(initial=0)))).tolist()
