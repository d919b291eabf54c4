"""Small worlds drawn by Hypothesis: every mix of states, shapes and limits that a node can be in."""

from dataclasses import replace

from hypothesis import strategies as st

from scheduler.model.policy import Order, Policy
from scheduler.model.snapshot import DRAINING, DRAINING_STOP, NOT_DRAINING
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    PREEMPTING,
    RUNNING,
    SECOND_US,
    STARTING,
    STOPPING,
    SUSPENDED,
    TRAINING,
    UNKNOWN,
    G,
    HandOver,
    J,
    N,
    W,
)
from tests.properties.dividing import by_node, spans, suits, ways

MODELS = ("H100", "A100")
SHARES = (250, 400, 500, 501, 750)  # a thousandth too much beside a half
SPLITS = ((1000,), (1000,), (500, 500), (250, 750), (400, 250, 250))
MEMORY_MIB = (0, 0, 20_000, 50_000, 70_000)
VALUES = (0, 50_000, 500_000, 600_000, 650_000, 2_000_000, -100_000)
RATIOS = (0.3, 0.0)


@st.composite
def policies(draw: st.DrawFn, backfill: bool | None = None) -> Policy:
    return Policy(
        order=draw(st.sampled_from(Order)),
        hysteresis_ratio=draw(st.sampled_from(RATIOS)),
        backfill=draw(st.booleans()) if backfill is None else backfill,
    )


@st.composite
def worlds(
    draw: st.DrawFn, *, nodes_max: int = 2, gpus_max: int = 6, jobs_max: int = 12, plain: bool = False
) -> W:
    """A world whose holdings fit; `plain`: one model, no GPU memory, no host limits, one node."""
    nodes = tuple(draw(_nodes(plain)) for _ in range(1 if plain else draw(st.integers(1, nodes_max))))
    gpus = tuple(
        draw(_gpu(index, 1 if plain else len(nodes), plain))
        for index in range(draw(st.integers(0, gpus_max)))
    )
    jobs: list[J] = []
    spare = {gpu.uuid: [1000, gpu.memory_mib] for gpu in gpus}
    numbers = draw(st.permutations(range(1, draw(st.integers(1, jobs_max)) + 1)))
    for number in numbers:
        job = draw(_jobs(number, plain))
        jobs.append(draw(_placed(job, gpus, len(nodes), spare)) if draw(st.integers(0, 2)) else job)
    handovers: list[HandOver] = []
    if not plain:
        handovers = [
            draw(_hand_over(gpu, spare))
            for gpu in gpus
            if spare[gpu.uuid][0] == 1000 and draw(st.integers(0, 5)) == 0
        ]
    return W(jobs=tuple(jobs), gpus=gpus, nodes=nodes, handovers=tuple(handovers))


@st.composite
def fleets(draw: st.DrawFn, *, jobs_max: int = 12, plain: bool = False) -> W:
    """A world of two or three nodes of 1 to 4 GPUs each; `plain` as in `worlds`."""
    nodes = tuple(draw(_nodes(plain)) for _ in range(draw(st.integers(2, 3))))
    places = [row for row in range(len(nodes)) for _ in range(draw(st.integers(1, 4)))]
    gpus = tuple(replace(draw(_gpu(index, 1, plain)), node=row) for index, row in enumerate(places))
    jobs: list[J] = []
    spare = {gpu.uuid: [1000, gpu.memory_mib] for gpu in gpus}
    for number in draw(st.permutations(range(1, draw(st.integers(1, jobs_max)) + 1))):
        job = draw(_jobs(number, plain))
        jobs.append(draw(_placed(job, gpus, len(nodes), spare)) if draw(st.integers(0, 2)) else job)
    return W(jobs=tuple(jobs), gpus=gpus, nodes=nodes)


@st.composite
def contested(draw: st.DrawFn, *, nodes_max: int = 3, tight: bool = True) -> W:
    """Full nodes: gangs, whole GPUs and shares of low rank hold everything, and a few jobs want it.

    `tight`: GPU memory and CPUs are scarce as well.
    """
    nodes = tuple(N(cpus=16 if tight else 64) for _ in range(draw(st.integers(1, nodes_max))))
    places = [row for row in range(len(nodes)) for _ in range(draw(st.integers(1, 4)))]
    gpus = tuple(replace(draw(_gpu(index, 1, plain=True)), node=row) for index, row in enumerate(places))
    numbers = iter(draw(st.randoms(use_true_random=False)).sample(range(1, 60), 59))
    jobs: list[J] = []
    for row in range(len(nodes)):
        free = [gpu.uuid for gpu in gpus if gpu.node == row]
        while free:
            size = draw(st.integers(1, len(free)))
            on, free = tuple(free[:size]), free[size:]
            shares = draw(st.sampled_from(SPLITS)) if size == 1 else (1000,)
            jobs += [draw(_incumbent(next(numbers), row, on, share, tight)) for share in shares]
    for _ in range(draw(st.integers(1, 4))):
        wanted = replace(
            draw(_jobs(next(numbers), plain=True)),
            job_class=draw(st.sampled_from((INFERENCE, TRAINING, TRAINING, BATCH))),
            cpus=draw(st.sampled_from((0, 0, 4, 10))) if tight else 0,
        )
        memory_mib = draw(st.sampled_from(MEMORY_MIB)) if tight and wanted.gpus else 0
        jobs.append(replace(wanted, gpu_memory_mib=memory_mib))
    return W(jobs=tuple(jobs), gpus=gpus, nodes=nodes)


@st.composite
def clusters(draw: st.DrawFn) -> W:
    """Nodes of which most are equal, gangs that none of them can hold, and others among them.

    Some of each are live: a live gang has whole nodes and, where it needs it, a part of one more.
    """
    size = draw(st.integers(1, 3))
    sizes = [
        draw(st.sampled_from((size, size, size, 1, 2)))
        for _ in range(draw(st.integers(2, 4 if size < 3 else 3)))
    ]
    nodes = tuple(draw(_nodes(plain=draw(st.booleans()))) for _ in sizes)
    gpus = []
    for row, count in enumerate(sizes):
        model = draw(st.sampled_from(("H100", *MODELS)))
        for _ in range(count):
            card = draw(_gpu(len(gpus), 1, draw(st.booleans())))
            gpus.append(replace(card, node=row, model=model))
    jobs: list[J] = []
    spare = {gpu.uuid: [1000, gpu.memory_mib] for gpu in gpus}
    for number in draw(st.permutations(range(1, draw(st.integers(2, 9)) + 1))):
        job = draw(_jobs(number, plain=draw(st.booleans())))
        if draw(st.integers(0, 2)) == 0:
            wanted = draw(st.integers(max(sizes) + 1, max(sizes) * 3))
            job = replace(job, gpus=wanted, share_milli=1000)
            jobs.append(draw(_placed_over(job, tuple(gpus), spare)))
        else:
            jobs.append(draw(_placed(job, tuple(gpus), len(nodes), spare)) if draw(st.booleans()) else job)
    return W(jobs=tuple(jobs), gpus=tuple(gpus), nodes=nodes)


@st.composite
def full_clusters(draw: st.DrawFn) -> W:
    """Equal nodes, full of gangs over several of them, gangs, whole jobs and shares of low rank."""
    size, tight = draw(st.integers(1, 3)), draw(st.booleans())
    nodes = tuple(N(cpus=8 if tight else 64) for _ in range(draw(st.integers(2, 4 if size < 3 else 3))))
    gpus = tuple(
        replace(draw(_gpu(index, 1, plain=True)), node=index // size) for index in range(len(nodes) * size)
    )
    numbers = iter(draw(st.randoms(use_true_random=False)).sample(range(1, 60), 59))
    jobs: list[J] = []
    free = [gpu.uuid for gpu in gpus]
    while free:
        left = len(free) % size or size  # of the node that is filled next
        over = draw(st.integers(0, 2)) == 0 and left == size < len(free)
        count = draw(st.integers(size + 1, len(free))) if over else draw(st.integers(1, left))
        on, free = tuple(free[:count]), free[count:]
        shares = draw(st.sampled_from(SPLITS)) if count == 1 else (1000,)
        row = gpus[[gpu.uuid for gpu in gpus].index(on[0])].node
        jobs += [draw(_incumbent(next(numbers), row, on, share, tight)) for share in shares]
    for _ in range(draw(st.integers(1, 3))):
        wanted = replace(
            draw(_jobs(next(numbers), plain=True)),
            job_class=draw(st.sampled_from((INFERENCE, TRAINING, TRAINING, BATCH))),
            cpus=draw(st.sampled_from((0, 4, 10))) if tight else 0,
        )
        if draw(st.integers(0, 3)):
            wanted = replace(wanted, gpus=draw(st.integers(size + 1, len(gpus))), share_milli=1000)
        jobs.append(wanted)
    return W(jobs=tuple(jobs), gpus=gpus, nodes=nodes)


@st.composite
def crowds(draw: st.DrawFn) -> W:
    """So many jobs of odd amounts of CPUs and memory that their cheapest set can't be found by trying all."""
    random = draw(st.randoms(use_true_random=False))
    jobs = [
        J(
            number,
            MINING,
            state=RUNNING,
            gpus=0,
            cpus=random.randint(1, 29),
            memory_mib=random.randint(1, 290),
            value=random.choice(VALUES),
            restart_loss_us=random.randrange(600) * SECOND_US,
            started_us=NOW_US - random.randrange(5000) * SECOND_US,
            node=0,
        )
        for number in range(1, draw(st.integers(15, 30)))
    ]
    wanted = [draw(st.integers(1, most)) for most in (150, 1500)]
    jobs.append(J(40, TRAINING, gpus=0, cpus=wanted[0], memory_mib=wanted[1]))
    node = N(cpus=sum(job.cpus for job in jobs[:-1]), memory_mib=sum(job.memory_mib for job in jobs[:-1]))
    return W(jobs=tuple(jobs), nodes=(node,))


def any_worlds() -> st.SearchStrategy[W]:
    """One node or several, full or not."""
    return worlds() | fleets() | contested() | clusters() | full_clusters()


@st.composite
def _incumbent(draw: st.DrawFn, number: int, node: int, on: tuple[str, ...], share: int, tight: bool) -> J:
    ran_us, saved_us = (draw(st.sampled_from((0, 3, 50, 4000))) * SECOND_US for _ in range(2))
    state = draw(st.sampled_from((RUNNING, RUNNING, RUNNING, STARTING)))
    saved_us = draw(st.sampled_from((UNKNOWN, NOW_US - min(ran_us, saved_us))))
    return J(
        number,
        job_class=draw(st.sampled_from((TRAINING, TRAINING, BATCH, MINING))),
        state=state,
        on=on,
        priority=draw(st.sampled_from((500, 500, 100))),
        value=draw(st.sampled_from(VALUES)),
        gpus=len(on),
        share_milli=share,
        # Of a GPU's 80,000 MiB no more than its part.
        gpu_memory_mib=draw(st.sampled_from((0, 80 * share // 2))) if tight and share < 1000 else 0,
        cpus=draw(st.sampled_from((0, 1, 2))) if tight else 0,
        preemptible=draw(st.integers(0, 7)) > 0,
        min_runtime_us=draw(st.sampled_from((0, 0, 0, 60))) * SECOND_US,
        restart_loss_us=draw(st.sampled_from((0, 0, 600))) * SECOND_US,
        started_us=NOW_US - ran_us if state == RUNNING else UNKNOWN,
        checkpoint_us=saved_us if state == RUNNING else UNKNOWN,
        node=node,
    )


@st.composite
def _nodes(draw: st.DrawFn, plain: bool) -> N:
    if plain:
        return N()
    drain = draw(st.sampled_from((NOT_DRAINING,) * 8 + (DRAINING, DRAINING_STOP)))
    return N(
        draw(st.sampled_from((4, 16, 64))),
        draw(st.sampled_from((100, 1000))),
        draw(st.sampled_from((3, 20, 20))),
        drain,
    )


@st.composite
def _gpu(draw: st.DrawFn, index: int, nodes: int, plain: bool) -> G:
    uuid = f"GPU-{(index * 5 + 3) % 16:02d}"  # not in the order of the indices
    if plain:
        return G(uuid, index)
    return G(
        uuid,
        index,
        draw(st.integers(0, nodes - 1)),
        draw(st.sampled_from((80_000, 80_000, 40_000))),
        draw(st.sampled_from(("H100", *MODELS))),
        draw(st.integers(0, 7)) > 0,
        instance=draw(st.integers(0, 5)) == 0,
    )


@st.composite
def _jobs(draw: st.DrawFn, number: int, plain: bool) -> J:
    kind = draw(st.integers(0, 9))
    job = J(
        number,
        job_class=draw(st.integers(0, MINING)),
        priority=draw(st.sampled_from((500, 500, 100, 900, 1001))),
        value=draw(st.sampled_from(VALUES)),
        gpus=0 if kind == 0 else 1 if kind < 7 else draw(st.integers(1, 4)),
        share_milli=draw(st.sampled_from(SHARES)) if 1 <= kind <= 3 else 1000,
        preemptible=draw(st.integers(0, 4)) > 0,
        min_runtime_us=draw(st.sampled_from((0, 0, 0, 5, 60))) * SECOND_US,
        grace_us=draw(st.sampled_from((0, 2, 30))) * SECOND_US,
        restart_loss_us=draw(st.sampled_from((0, 0, 600))) * SECOND_US,
        expected_us=draw(st.sampled_from((UNKNOWN, 0, 10 * SECOND_US, 100 * SECOND_US, 5000 * SECOND_US))),
    )
    if plain:
        return job
    return replace(
        job,
        gpu_memory_mib=draw(st.sampled_from(MEMORY_MIB)) if job.gpus else 0,
        models=draw(st.sampled_from(((), (), (), ("H100",), ("A100",), ("A100", "H100"), ("B200",)))),
        cpus=draw(st.sampled_from((0, 0, 1, 4, 10))),
        memory_mib=draw(st.sampled_from((0, 0, 50, 300))),
        eligible_us=draw(st.sampled_from((0, 0, 0, 0, NOW_US, NOW_US + 7 * SECOND_US))),
        deadline_us=draw(
            st.sampled_from((UNKNOWN,) * 6 + (NOW_US, NOW_US + 50 * SECOND_US, NOW_US + 200 * SECOND_US))
        ),
        time_limit_us=draw(st.sampled_from((UNKNOWN,) * 4 + (100 * SECOND_US, 4000 * SECOND_US))),
    )


@st.composite
def _placed(draw: st.DrawFn, job: J, gpus: tuple[G, ...], nodes: int, spare: dict[str, list[int]]) -> J:
    """The job live on GPUs that have room for it, in some state; the job itself where none have."""
    node = draw(st.integers(0, nodes - 1))
    room = [
        gpu.uuid
        for gpu in draw(st.permutations(gpus))
        if gpu.node == node
        and spare[gpu.uuid][0] >= job.share_milli
        and spare[gpu.uuid][1] >= job.gpu_memory_mib
        and (not job.models or gpu.model in job.models)
    ]
    if len(room) < job.gpus:
        return job
    return draw(_live(job, node, tuple(room[: job.gpus]), spare))


@st.composite
def _placed_over(draw: st.DrawFn, job: J, gpus: tuple[G, ...], spare: dict[str, list[int]]) -> J:
    """The gang live on whole nodes and a part of one more; the gang itself where they aren't free."""
    world = W(jobs=(job,), gpus=gpus, nodes=tuple(N() for _ in range(max(gpu.node for gpu in gpus) + 1)))
    found = [way for kind in ways(world, job) for way in kind] if spans(world, job) else []
    if not found or draw(st.booleans()):
        return job
    on: list[str] = []
    for row, count in draw(st.sampled_from(found)):
        free = [
            gpu.uuid
            for gpu in gpus
            if gpu.node == row and suits(job, gpu) and spare[gpu.uuid] == [1000, gpu.memory_mib]
        ]
        if len(free) < count:
            return job
        on += free[:count]
    return draw(_live(job, min(row for row in by_node(world, tuple(on))), tuple(on), spare))


@st.composite
def _live(draw: st.DrawFn, job: J, node: int, on: tuple[str, ...], spare: dict[str, list[int]]) -> J:
    """The job live on these GPUs, in some state."""
    for uuid in on:
        spare[uuid][0] -= job.share_milli
        spare[uuid][1] -= job.gpu_memory_mib
    state = draw(st.sampled_from((RUNNING, RUNNING, RUNNING, STARTING, SUSPENDED, PREEMPTING, STOPPING)))
    ran_us = draw(st.sampled_from((0, 3, 50, 4000))) * SECOND_US
    saved_us = draw(st.sampled_from((None, 0, 2, 3000)))
    leaving = state in (PREEMPTING, STOPPING)
    return replace(
        job,
        state=state,
        on=on,
        node=node,
        started_us=UNKNOWN if state == STARTING else NOW_US - ran_us,
        checkpoint_us=UNKNOWN if state == STARTING or saved_us is None else NOW_US - saved_us * SECOND_US,
        preemptor=draw(st.sampled_from((UNKNOWN, 1, 2))) if state == PREEMPTING else UNKNOWN,
        stop_us=NOW_US - draw(st.integers(1, 3)) * SECOND_US if leaving else UNKNOWN,
    )


@st.composite
def _hand_over(draw: st.DrawFn, gpu: G, spare: dict[str, list[int]]) -> HandOver:
    share = draw(st.sampled_from((1000, 500)))
    spare[gpu.uuid][0] -= share
    return HandOver(gpu.uuid, share, 0, draw(st.sampled_from((UNKNOWN, 1))), NOW_US - 5 * SECOND_US)
