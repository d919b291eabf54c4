"""Which of a node's free GPUs are nearest to each other.

Two GPUs are nearer the faster their best way: the same NVLink island before the same PCIe switch before the
same NUMA node. Of all sets of the wanted size the one with the nearest pairs is taken; of those the one that
leaves the nearest pairs behind, so that the next gang finds its island whole; then the first GPUs in order.
"""

from functools import lru_cache
from itertools import combinations
from math import comb

from scheduler.model.snapshot import UNKNOWN

# NVLink island, PCIe switch, NUMA node; UNKNOWN is near nobody.
Near = tuple[int, int, int]

# A pair on one island outweighs all pairs of a node (at most 120 of 16 GPUs) that only share a switch.
_WEIGHTS = (1_000_000, 1_000, 1)
# So many sets are compared (all of 8 GPUs are 70 at most); where there are more, GPUs are added one by one.
SETS_MAX = 2_000
_REMEMBERED = 4_096


@lru_cache(maxsize=_REMEMBERED)
def best_connected(near: tuple[Near, ...], count: int) -> tuple[int, ...]:
    """The indexes of so many of these GPUs, ascending."""
    everything = range(len(near))
    if count in (0, len(near)) or len(set(near)) == 1:
        return tuple(everything[:count])
    link = [[_link(one, other) for other in near] for one in near]
    if comb(len(near), count) > SETS_MAX:
        return _grown(link, count)

    def worth(chosen: tuple[int, ...]) -> tuple[int, int]:
        rest = [i for i in everything if i not in chosen]
        return _inside(link, chosen), _inside(link, rest)

    # `max` keeps the first of equals, and combinations come in order.
    return max(combinations(everything, count), key=worth)


def _link(one: Near, other: Near) -> int:
    return sum(
        weight for weight, mine, theirs in zip(_WEIGHTS, one, other, strict=True) if mine == theirs != UNKNOWN
    )


def _inside(link: list[list[int]], chosen: tuple[int, ...] | list[int]) -> int:
    return sum(link[one][other] for one, other in combinations(chosen, 2))


def _grown(link: list[list[int]], count: int) -> tuple[int, ...]:
    """From each GPU add the nearest until there are enough; the best of these sets."""
    best: tuple[int, list[int]] | None = None
    for first in range(len(link)):
        chosen = [first]
        while len(chosen) < count:
            others = [i for i in range(len(link)) if i not in chosen]
            chosen.append(max(others, key=lambda i: (sum(link[i][j] for j in chosen), -i)))
        worth = _inside(link, chosen)
        if best is None or worth > best[0]:
            best = (worth, chosen)
    assert best is not None
    return tuple(sorted(best[1]))
