"""Random worlds from a seed, run for long, and what `docs/PREEMPTION_ENDS.md` says of every tick of them."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from scheduler.model.actions import PreemptJob, StartJob
from scheduler.model.policy import Order, Policy
from scheduler.model.reasons import Reason
from scheduler.planning.explain import preview
from tests.fakes.worlds import (
    INFERENCE,
    MINING,
    NOW_US,
    PENDING,
    PREEMPTING,
    RUNNING,
    SECOND_US,
    STOPPING,
    UNKNOWN,
    G,
    J,
    N,
    W,
    gpus,
    snapshot,
)
from tests.properties.dividing import spans, ways
from tests.properties.oracle import rank
from tests.properties.runs import Run

# A place of a job: none, waiting for a hand-over that will serve it, live.
NONE, CLAIMS, LIVE = range(3)
VALUES = (0, 50_000, 500_000, 600_000, 650_000, 2_000_000, -100_000)


class Hunt(Run):
    """A run that looks at every tick, on end after end of a grace that the job may not use up."""

    def __init__(self, world: W, policy: Policy, random: Random) -> None:
        super().__init__(world, policy, {job.number: None for job in world.jobs})
        self.random = random
        self.places = {job.number: LIVE for job in world.jobs if job.state == RUNNING}
        self.before: W = world
        self.starts = 0
        self.ticks = 0
        self.shifts = 0  # claims lost to a job of higher rank that moved to another claim
        self.slips = 0  # claims of jobs that are held back now for a blocked one above them
        self.used_percent: dict[tuple[int, int], int] = {}

    def gone_us(self, job: J) -> int:
        key = (job.number, job.stop_us)
        percent = self.used_percent.setdefault(key, self.random.randrange(101))
        return job.stop_us + job.grace_us * percent // 100

    def tick(self) -> int:
        """Plan, carry out and look; returns how many actions there were."""
        self.ticks += 1
        before, actions = self.world, self.plan()
        self.starts += sum(isinstance(action, StartJob) for action in self.made.actions)
        places = {job.number: self._place(job) for job in self.world.jobs}
        self._look(places, before)
        self.places, self.before = places, before
        return actions

    @property
    def displaces(self) -> bool:
        """Whether the last plan displaced anybody."""
        return any(isinstance(action, PreemptJob) for action in self.made.actions)

    def rest(self, ticks_max: int) -> None:
        """Go on until nothing happens any more."""
        for _ in range(ticks_max):
            actions, next_us = self.tick(), self.next_us()
            if next_us is None and not actions:
                return
            self.pass_to(max(self.world.now_us, self.world.now_us if next_us is None else next_us))
        raise AssertionError(f"no rest after {ticks_max} ticks: displaced {self.preempted}")

    def _place(self, job: J) -> int:
        if job.state in (PREEMPTING, STOPPING):
            return NONE
        return LIVE if job.state != PENDING else CLAIMS if job.number in self.made.awaited else NONE

    def _look(self, places: dict[int, int], before: W) -> None:
        """Nobody loses its place but to a job of higher rank that gains one: the potential rises."""
        order = self.policy.order
        changed = [job for job in self.world.jobs if places[job.number] != self.places.get(job.number, NONE)]
        preemptors = {a.job: a.preemptor for a in self.made.actions if isinstance(a, PreemptJob)}
        for number, preemptor in preemptors.items():
            assert rank(order, before.job(preemptor)) < rank(order, before.job(number))
        if not changed:
            return
        first = min(changed, key=lambda job: rank(order, job))
        if places[first.number] > self.places.get(first.number, NONE):
            return
        if self.made.waits.get(first.number) is Reason.WAITING_FOR_PROMISED_START:
            self.slips += 1
            return
        above = [n for n in self.made.awaited if rank(order, before.job(n)) < rank(order, first)]
        assert any(self._moved(number, before) for number in above), (
            f"{first.number} lost its place to nobody at {(before.now_us - NOW_US) / SECOND_US} s: {before}"
        )
        self.shifts += 1

    def _moved(self, number: int, before: W) -> bool:
        """Whether a job that waits claims other GPUs than a tick ago."""
        if self.places.get(number) != CLAIMS:
            return False
        claims = [preview(snapshot(world), self.policy, number).gpus for world in (self.before, before)]
        return claims[0] != claims[1]


def potential(hunt: Hunt, ranked: list[int]) -> int:
    """A bit for each job that has a place, the highest rank first."""
    bits = "".join("1" if hunt.places.get(number, NONE) else "0" for number in ranked)
    return int(bits, 2)


def equal_world(random: Random, size_max: int) -> W:
    """A node of equal GPUs and jobs that want whole ones of them, up to so many, and nothing else."""
    count = random.randint(1, 6)
    return _filled(random, gpus(count), (N(live_jobs_max=1000),), lambda n: _job(random, n, size_max))


def mixed_world(random: Random) -> W:
    """One to three nodes of two models; gangs, shares, jobs that want CPUs alone."""
    nodes = tuple(N(cpus=random.choice((8, 64))) for _ in range(random.randint(1, 3)))
    places = [row for row in range(len(nodes)) for _ in range(random.randint(1, 4))]
    cards = tuple(
        G(f"GPU-{(index * 5 + 3) % 16:02d}", index, row, model=random.choice(("H100", "H100", "A100")))
        for index, row in enumerate(places)
    )
    return _filled(random, cards, nodes, lambda number: mixed_job(random, number))


def cluster_world(random: Random) -> W:
    """Equal nodes of up to three GPUs, and gangs that need several of them among jobs of every kind."""
    size = random.randint(1, 3)
    nodes = tuple(N(cpus=random.choice((8, 64))) for _ in range(random.randint(2, 4)))
    cards = tuple(G(f"GPU-{(n * 5 + 3) % 16:02d}", n, n // size) for n in range(len(nodes) * size))
    return _filled(random, cards, nodes, lambda number: cluster_job(random, number, size, len(cards)))


def cluster_job(random: Random, number: int, size: int, most: int) -> J:
    """A job of any kind, or a gang that no node can hold."""
    job = mixed_job(random, number)
    if random.random() < 0.5:
        job = replace(job, gpus=random.randint(size + 1, most), share_milli=1000, gpu_memory_mib=0, models=())
    return job


def arrival(random: Random, number: int, world: W) -> J:
    """A job of any kind for this world."""
    size = max(sum(gpu.node == row for gpu in world.gpus) for row in range(len(world.nodes)))
    most = len(world.gpus)
    return cluster_job(random, number, size, most) if most > size else mixed_job(random, number)


def mixed_job(random: Random, number: int) -> J:
    """A gang, a share or a job of no GPUs, with wishes."""
    job = _job(random, number, 4)
    kind = random.randrange(8)
    if kind == 0:
        job = replace(job, gpus=0)
    elif kind < 4:
        job = replace(job, gpus=1, share_milli=random.choice((250, 400, 500, 750)))
    return replace(
        job,
        gpu_memory_mib=random.choice((0, 0, 20_000, 50_000)) if job.share_milli < 1000 else 0,
        models=random.choice(((), (), ("H100",), ("A100",))) if job.gpus else (),
        cpus=random.choice((0, 0, 1, 4)),
        expected_us=random.choice((UNKNOWN, UNKNOWN, 20 * SECOND_US, 200 * SECOND_US)),
    )


def random_policy(random: Random, *, ages: bool) -> Policy:
    """Either order, with and without hysteresis and backfill."""
    return Policy(
        order=random.choice(tuple(Order)),
        hysteresis_ratio=random.choice((0.3, 0.0)),
        backfill=random.random() < 0.7,
        aging_after_preemptions=random.choice((1, 3)) if ages else 1_000_000,
        preemption_backoff_s=random.choice((0.0, 1.0, 30.0)),
    )


def _job(random: Random, number: int, size_max: int) -> J:
    return J(
        number,
        random.randint(INFERENCE, MINING),
        priority=random.choice((500, 500, 100, 900)),
        value=random.choice(VALUES),
        gpus=random.randint(1, size_max),
        preemptible=random.random() < 0.9,
        eligible_us=NOW_US + random.choice((0, 0, 1, 7, 40, 100)) * SECOND_US,
        min_runtime_us=random.choice((0, 0, 0, 5, 60)) * SECOND_US,
        grace_us=random.choice((0, 2, 10, 60)) * SECOND_US,
        restart_loss_us=random.choice((0, 0, 600)) * SECOND_US,
    )


def _filled(random: Random, cards: tuple[G, ...], nodes: tuple[N, ...], make: Callable[[int], J]) -> W:
    """The world with jobs of which many run already, wherever they have room."""
    spare = {card.uuid: [1000, card.memory_mib] for card in cards}
    cpus = [node.cpus for node in nodes]
    numbers = random.sample(range(1, 40), random.randint(4, 14))
    jobs = []
    for job in map(make, numbers):
        if job.gpus > 1 and random.random() < 0.5 and (on := _over_nodes(job, cards, len(nodes), spare)):
            for uuid in on:
                spare[uuid][0] = 0
            first = min(card.node for card in cards if card.uuid in on)
            jobs.append(replace(job, cpus=0, state=RUNNING, on=on, node=first, started_us=NOW_US - SECOND_US))
            continue
        node = random.randrange(len(nodes))
        room = [
            card.uuid
            for card in cards
            if card.node == node
            and spare[card.uuid][0] >= job.share_milli
            and spare[card.uuid][1] >= job.gpu_memory_mib
            and (not job.models or card.model in job.models)
        ]
        if len(room) < job.gpus or cpus[node] < job.cpus or random.random() < 0.3:
            jobs.append(job)
            continue
        on = tuple(room[: job.gpus])
        for uuid in on:
            spare[uuid][0] -= job.share_milli
            spare[uuid][1] -= job.gpu_memory_mib
        cpus[node] -= job.cpus
        ran_us = random.choice((0, 3, 50, 4000)) * SECOND_US
        jobs.append(replace(job, state=RUNNING, on=on, node=node, started_us=NOW_US - ran_us))
    return W(jobs=tuple(jobs), gpus=cards, nodes=nodes)


def _over_nodes(job: J, cards: tuple[G, ...], nodes: int, spare: dict[str, list[int]]) -> tuple[str, ...]:
    """Free GPUs of the first nodes that can hold a gang over several; none where one or no node can."""
    world = W(jobs=(job,), gpus=cards, nodes=(N(),) * nodes)
    for kind in ways(world, job) if spans(world, job) else ():
        for way in kind:
            free = {
                node: [c.uuid for c in cards if c.node == node and spare[c.uuid][0] == 1000]
                for node, _ in way
            }
            if all(len(free[node]) >= count for node, count in way):
                return tuple(uuid for node, count in way for uuid in free[node][:count])
    return ()
