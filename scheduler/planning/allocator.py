"""Fit and placement: what a node has to spare, and on which of its GPUs a request goes.

A node's capacity is in three layers. *Free*: nobody has it. *Leaving*: jobs that were told to stop, and
what ended jobs still occupy until their hand-over is verified; it comes free without a further decision.
*Live*: held by jobs that stay unless they are displaced. A claim takes what is free first, then what
leaves, its own victims' before others', the oldest stop first, of equally old ones those that are for
nobody: so a waiting job's claim is the same in each plan however many later stops are added (R7), without
remembering one.

Placement: whole GPUs that the fewest model sets accept, then the smallest, then the best connected
(`topology.py`), then by index; a share goes to the GPU with the smallest remaining share that fits (best
fit), so that whole GPUs stay whole.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from scheduler.model.snapshot import UNKNOWN, WHOLE_MILLI
from scheduler.planning.topology import Near, best_connected

# Of a hold: the how-manieth claim of this plan its preemptor's is. What stops for nobody was decided before
# all claims; what stops for somebody who has none yet, after them.
FOR_NOBODY, NOT_SERVED = 0, 1 << 62
# When a hold's turn is: not its own victim, when its stop was decided, how its preemptor ranks, its number.
Turn = tuple[bool, int, int, int]
# The turn of what fits without any stop.
NO_STOP: Turn = (False, -NOT_SERVED, 0, 0)

# GPU position -> how much placement would rather not use it; 0 where it is not named.
Penalty = Mapping[int, int]
NO_PENALTY: Penalty = MappingProxyType({})


class Request(NamedTuple):
    """A pending job as planning sees it. `memory_mib` is host memory; 0 = not accounted."""

    number: int
    job_class: int
    priority: int
    value: int
    gpus: int
    share_milli: int
    gpu_memory_mib: int
    models: int  # UNKNOWN = any
    cpus: int
    memory_mib: int
    preemptible: bool
    min_runtime_us: int
    restart_loss_us: int
    expected_us: int
    grace_us: int

    @property
    def is_share(self) -> bool:
        """Whether it wants a part of one GPU."""
        return self.share_milli < WHOLE_MILLI

    @property
    def gpu_part(self) -> tuple[int, int, int, int]:
        """What it wants of GPUs: requests that want the same have this in common."""
        return (self.gpus, self.share_milli, self.gpu_memory_mib, self.models)


@dataclass(slots=True)
class Hold:
    """What one job, or one hand-over, has of a node. `parts`: GPU position -> [thousandths, MiB]."""

    number: int  # UNKNOWN for a hand-over whose job has ended
    parts: dict[int, list[int]]
    cpus: int
    memory_mib: int
    slots: int  # 1 while it counts as a live job
    preemptor: int  # of a leaving job: the number of the job that it gives way to; else UNKNOWN
    stop_us: int  # of a leaving job: when its stop was decided
    ready_us: int  # of a leaving job: until when its grace runs, at most
    served: int = NOT_SERVED  # of a leaving job: how its preemptor ranks, by its claim

    def told(self, preemptor: int, stop_us: int) -> "Hold":
        """The same as if its job had been told to give way."""
        host = (self.cpus, self.memory_mib, self.slots)
        return Hold(self.number, self.parts, *host, preemptor, stop_us, self.ready_us)


@dataclass(slots=True)
class Live:
    """A live job that stays unless it is displaced."""

    index: int  # of `world.Incumbents`
    rows: tuple[int, ...]  # of the nodes that it is on
    hold: Hold  # what it has of this one
    gpus: int  # on all its nodes
    job_class: int
    priority: int
    value_bar: int  # least value that displaces it at equal priority
    may_yield: bool  # preemptible, in a state to give way, past its minimum runtime
    yields_us: int  # when its minimum runtime is over; NEVER for one that may not be preempted
    ends_us: int  # declared end, now for an overrun; NEVER where unknown
    started_us: int
    lost_gpu_ms: int
    loss_microusd: int

    @property
    def number(self) -> int:
        """The job's number."""
        return self.hold.number


@dataclass(slots=True)
class Spare:
    """An amount of each of a node's resources; lists are by GPU position."""

    milli: list[int]
    mib: list[int]
    cpus: int
    memory_mib: int
    slots: int

    def copy(self) -> "Spare":
        """An independent amount."""
        return Spare(self.milli[:], self.mib[:], self.cpus, self.memory_mib, self.slots)

    def add(self, hold: Hold) -> None:
        """Put in what the hold has."""
        for position, (milli, mib) in hold.parts.items():
            self.milli[position] += milli
            self.mib[position] += mib
        self.cpus += hold.cpus
        self.memory_mib += hold.memory_mib
        self.slots += hold.slots

    def remove(self, hold: Hold) -> None:
        """Undo `add`."""
        for position, (milli, mib) in hold.parts.items():
            self.milli[position] -= milli
            self.mib[position] -= mib
        self.cpus -= hold.cpus
        self.memory_mib -= hold.memory_mib
        self.slots -= hold.slots

    def take(self, request: Request, positions: tuple[int, ...]) -> None:
        """Take out what the request needs at these positions."""
        mib = request.gpu_memory_mib if request.share_milli < WHOLE_MILLI else 0
        for position in positions:
            self.milli[position] -= request.share_milli
            self.mib[position] -= mib
        self.cpus -= request.cpus
        self.memory_mib -= request.memory_mib
        self.slots -= 1


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as placement sees it; its position is its place in `Node.gpus`."""

    row: int
    uuid: str
    index: int
    memory_mib: int
    is_open: bool
    serves: tuple[bool, ...]  # by model set
    asked_for: int  # how many of the sets it serves: what few accept is given away first
    near: Near = (UNKNOWN, UNKNOWN, UNKNOWN)
    is_instance: bool = False  # of MIG: for requests of one GPU only


class Part(NamedTuple):
    """What a request has of one node: of a gang over several nodes, `request` is as much as goes there."""

    request: Request
    row: int
    positions: tuple[int, ...]


@dataclass(slots=True)
class Claim:
    """What a request was given: `awaited` are the leaving jobs whose capacity it counts on."""

    request: Request
    parts: tuple[Part, ...]  # by node; one, but for a gang over several nodes
    is_free: bool  # nothing of it has to be awaited
    awaited: tuple[int, ...]
    ready_us: int  # when all of it is free at the latest; 0 where it is free


@dataclass(slots=True)
class Node:
    """A node while a plan is made. `free` and `leaving` change as jobs are served; then call `changed`."""

    row: int
    gpus: tuple[Gpu, ...]
    free: Spare
    drains: bool
    leaving: list[Hold] = field(default_factory=list)
    _suitable: dict[tuple[int, int, bool], tuple[int, ...]] = field(default_factory=dict)
    # Until it changes: what `preemption.choose_victims` found, by what it was asked; and `soon`.
    choices: dict[tuple[object, ...], tuple[int, list[Live]] | None] = field(default_factory=dict)
    _soon: Spare | None = None
    _only: frozenset[int] | None = None  # the positions that may be used; None: all

    @property
    def soon(self) -> Spare:
        """What is free, and what leaves. Not to be changed."""
        if self._soon is None:
            self._soon = self.spare_with(self.leaving)
        return self._soon

    def changed(self) -> None:
        """Forget what held of the node before something was given away, or told to leave."""
        self._soon = None
        self.choices.clear()

    def suitable(self, request: Request) -> tuple[int, ...]:
        """Positions of the open GPUs that serve the request at all, the best to give away first."""
        key = (request.models, request.gpu_memory_mib, request.gpus > 1)
        known = self._suitable.get(key)
        if known is None:
            fit = [
                (gpu.asked_for, gpu.memory_mib, gpu.index, gpu.uuid, position)
                for position, gpu in enumerate(self.gpus)
                if gpu.is_open
                and (request.models == UNKNOWN or gpu.serves[request.models])
                and (request.gpu_memory_mib == 0 or gpu.memory_mib >= request.gpu_memory_mib)
                and not (request.gpus > 1 and gpu.is_instance)
            ]
            known = self._suitable[key] = tuple(entry[-1] for entry in sorted(fit))
        if self._only is not None:
            return tuple([position for position in known if position in self._only])
        return known

    def only(self, positions: frozenset[int]) -> "Node":
        """This node with its other GPUs closed; what is free and leaving is shared with it."""
        made = Node(self.row, self.gpus, self.free, self.drains, self.leaving, self._suitable)
        made._soon, made._only = self._soon, positions
        return made

    def spare_with(self, holds: Iterable[Hold]) -> Spare:
        """What would be free without these holds."""
        spare = self.free.copy()
        for hold in holds:
            spare.add(hold)
        return spare


class Found(NamedTuple):
    """Room for a request, not yet taken."""

    parts: tuple[Part, ...]  # by node; one, but for a gang over several nodes
    victims: tuple[Live, ...] = ()  # those that have to stop for it, by number
    ready_us: int = 0  # when all of it is free at the latest; 0 where it is free now
    is_free: bool = False  # known to take nothing of what leaves


def host_fits(request: Request, spare: Spare) -> bool:
    """Whether CPUs, host memory and a job slot are there; what is not accounted always fits."""
    return (
        spare.slots >= 1
        and (request.cpus == 0 or request.cpus <= spare.cpus)
        and (request.memory_mib == 0 or request.memory_mib <= spare.memory_mib)
    )


def lack_of_host(request: Request, spare: Spare) -> tuple[int, int, int]:
    """How many CPUs, MiB of host memory and job slots are missing; what is not accounted never is."""
    return (
        max(0, request.cpus - spare.cpus) if request.cpus else 0,
        max(0, request.memory_mib - spare.memory_mib) if request.memory_mib else 0,
        max(0, 1 - spare.slots),
    )


def gpus_fit(request: Request, node: Node, spare: Spare) -> bool:
    """Whether the GPU part of the request fits."""
    if request.gpus == 0:
        return True
    suitable = node.suitable(request)
    if request.is_share:
        return any(share_fits(request, spare, position) for position in suitable)
    milli = spare.milli
    return [milli[position] for position in suitable].count(WHOLE_MILLI) >= request.gpus


def share_fits(request: Request, spare: Spare, position: int) -> bool:
    """Whether a share fits on this GPU."""
    memory = request.gpu_memory_mib
    return spare.milli[position] >= request.share_milli and (memory == 0 or spare.mib[position] >= memory)


def fits(request: Request, node: Node, spare: Spare) -> bool:
    """Whether the request fits in the amount."""
    return host_fits(request, spare) and gpus_fit(request, node, spare)


def fits_at(request: Request, spare: Spare, position: int) -> bool:
    """Whether a suitable GPU has what the request wants of each of its GPUs."""
    return share_fits(request, spare, position) if request.is_share else spare.milli[position] == WHOLE_MILLI


def place(
    request: Request, node: Node, spare: Spare, penalty: Penalty = NO_PENALTY
) -> tuple[int, ...] | None:
    """Positions for the request, those of the least penalty first, or None where it does not fit."""
    if not host_fits(request, spare):
        return None
    if request.gpus == 0:
        return ()
    suitable = node.suitable(request)
    if not request.is_share:
        whole = [position for position in suitable if spare.milli[position] == WHOLE_MILLI]
        if len(whole) < request.gpus:
            return None
        return _best_connected(request, node, whole, penalty)
    found = [
        (penalty.get(position, 0), spare.milli[position], spare.mib[position], turn, position)
        for turn, position in enumerate(suitable)
        if share_fits(request, spare, position)
    ]
    return (min(found)[-1],) if found else None


def _best_connected(request: Request, node: Node, whole: list[int], penalty: Penalty) -> tuple[int, ...]:
    """Which of these whole GPUs to give: those that placement would rather use, of equals the nearest."""
    gpus = node.gpus
    tiers = [
        ((penalty.get(position, 0), gpus[position].asked_for, gpus[position].memory_mib), place)
        for place, position in enumerate(whole)
    ]
    tiers.sort()
    sure: list[int] = []
    worst = tiers[request.gpus - 1][0]
    if tiers[0][0] != tiers[-1][0]:
        sure = [whole[place] for tier, place in tiers if tier < worst]
        whole = [whole[place] for tier, place in tiers if tier == worst]
    near = tuple([gpus[position].near for position in whole])
    return (*sure, *[whole[i] for i in best_connected(near, request.gpus - len(sure))])


def find_leaving_on(
    request: Request, node: Node, penalty: Penalty = NO_PENALTY, victims: Sequence[Hold] = ()
) -> tuple[Turn, Found] | None:
    """Room in what is free and what leaves, as few stops in turn as will do, and the turn of the last.

    `victims` leave too: holds of live jobs, with their stop and preemptor as if it were decided. Of the GPUs
    those come first that fit after fewer stops, as they look at that moment: so later stops change nothing.
    """
    holds = [*node.leaving, *victims]
    if not fits(request, node, node.spare_with(holds) if victims else node.soon):
        return None
    spare, ready_us, number, is_share = node.free.copy(), 0, request.number, request.is_share
    order = {position: place for place, position in enumerate(node.suitable(request) if request.gpus else ())}
    ready: list[tuple[int, int, int, int, int, int]] = []
    in_turn = sorted([(_turn(hold, number), place) for place, hold in enumerate(holds)])
    more: Iterable[int] = tuple(order)  # GPUs that may serve it now and did not before
    for stops in range(len(in_turn) + 1):
        if stops:
            hold = holds[in_turn[stops - 1][1]]
            spare.add(hold)
            ready_us = max(ready_us, hold.ready_us)
            more = hold.parts
        for position in more:
            if position in order and fits_at(request, spare, position):
                best_fit = (spare.milli[position], spare.mib[position]) if is_share else (0, 0)
                ready.append((penalty.get(position, 0), stops, *best_fit, order.pop(position), position))
        if len(ready) >= request.gpus and host_fits(request, spare):
            positions = tuple([entry[-1] for entry in sorted(ready)[: request.gpus]])
            part = Part(request, node.row, positions)
            return in_turn[stops - 1][0] if stops else NO_STOP, Found((part,), ready_us=ready_us)
    raise AssertionError("what fits after all stops fits after some")


def claim(request: Request, found: Found, node_of: Callable[[int], Node]) -> Claim:
    """Take the request's needs out of what is free, and what is lacking out of what leaves, in turn."""
    drawn: list[Hold] = []
    parts = found.parts
    if found.is_free:
        for part in parts:
            node_of(part.row).free.take(part.request, part.positions)
        return Claim(request, parts, True, (), 0)
    for part in parts:
        drawn += _taken(part.request, node_of(part.row), part.positions)
    if not drawn:
        return Claim(request, parts, True, (), 0)
    awaited = tuple(sorted({hold.number for hold in drawn} - {UNKNOWN}))
    return Claim(request, parts, False, awaited, max(hold.ready_us for hold in drawn))


def _taken(request: Request, node: Node, positions: tuple[int, ...]) -> list[Hold]:
    """Take the needs out of the node; the leaving holds out of which some of it is."""
    free, memory = node.free, request.gpu_memory_mib if request.is_share else 0
    if host_fits(request, free) and all(fits_at(request, free, position) for position in positions):
        free.take(request, positions)
        return []
    lacking: dict[int, list[int]] = {}
    for position in positions:
        milli = min(max(free.milli[position], 0), request.share_milli)
        mib = min(max(free.mib[position], 0), memory)
        free.milli[position] -= milli
        free.mib[position] -= mib
        if milli < request.share_milli or mib < memory:
            lacking[position] = [request.share_milli - milli, memory - mib]
    cpus = min(max(free.cpus, 0), request.cpus)
    memory_mib = min(max(free.memory_mib, 0), request.memory_mib)
    slots = min(max(free.slots, 0), 1)
    free.cpus -= cpus
    free.memory_mib -= memory_mib
    free.slots -= slots
    host = [request.cpus - cpus, request.memory_mib - memory_mib, 1 - slots]
    if not lacking and not any(host):
        return []
    in_turn = sorted(node.leaving, key=lambda hold: _turn(hold, request.number))
    drawn = [hold for hold in in_turn if _draw(hold, lacking, host)]
    assert not any(host), "what is taken was found before"
    assert not any(any(need) for need in lacking.values()), "what is taken was found before"
    return drawn


def _turn(hold: Hold, number: int) -> Turn:
    return (hold.preemptor != number, hold.stop_us, hold.served, hold.number)


def _draw(hold: Hold, lacking: dict[int, list[int]], host: list[int]) -> bool:
    """Take from the hold what is still lacking; whether anything was."""
    drawn = 0
    for position, part in hold.parts.items():
        need = lacking.get(position)
        if need is not None:
            for i in (0, 1):
                amount = min(part[i], need[i])
                part[i] -= amount
                need[i] -= amount
                drawn += amount
    if any(host):
        amounts = (min(hold.cpus, host[0]), min(hold.memory_mib, host[1]), min(hold.slots, host[2]))
        hold.cpus -= amounts[0]
        hold.memory_mib -= amounts[1]
        hold.slots -= amounts[2]
        host[:] = [need - amount for need, amount in zip(host, amounts, strict=True)]
        drawn += sum(amounts)
    return drawn > 0
