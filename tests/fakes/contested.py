"""Seeded worlds of one node of up to 8 GPUs and 40 jobs that want more than there is, by kind.

No job declares a run time and every pending job gives way at once, so that no promise (R9) holds anybody
back; and each earns something for each GPU-hour, so that no price gate does. What is left to decide is who
is served, where, and who gives way.
"""

import math
import random
from dataclasses import dataclass, replace

from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    RUNNING,
    SECOND_US,
    TRAINING,
    UNKNOWN,
    G,
    J,
    N,
    W,
)

CLASSES = (INFERENCE, TRAINING, TRAINING, BATCH, BATCH, MINING)
# What a job of each class earns where it says nothing, in micro-USD per GPU-hour.
VALUE = {INFERENCE: 4_000_000, TRAINING: 2_000_000, BATCH: 500_000, MINING: 50_000}
# A job is worth up to e^0.7, twice, what its class is, or as little as half.
VALUE_SPREAD = 0.7
SHARES_MILLI = (100, 200, 250, 300, 400, 500, 750)
JOBS_MAX = 40


@dataclass(frozen=True)
class Kind:
    """What the worlds of a kind have beside whole GPUs of two sizes and models."""

    gang_ratio: float = 0.0  # of the jobs
    share_ratio: float = 0.0
    live_ratio: float = 0.0  # of the GPUs that are held
    is_host_scarce: bool = False


KINDS = {
    "singles": Kind(),
    "gangs": Kind(gang_ratio=0.4),
    "shares": Kind(share_ratio=0.7),
    "preemption": Kind(live_ratio=0.85),
    "everything": Kind(gang_ratio=0.25, share_ratio=0.3, live_ratio=0.6, is_host_scarce=True),
}


def contested(kind: str, seed: int) -> W:
    """The world of this kind and seed, the same on every machine."""
    rng, what = random.Random(f"{kind}/{seed}"), KINDS[kind]
    gpus = _gpus(rng)
    spare = {gpu.uuid: [1000, gpu.memory_mib] for gpu in gpus if rng.random() < what.live_ratio}
    node = N(cpus=rng.choice((32, 64)), memory_mib=400_000) if what.is_host_scarce else N(cpus=1000)
    used = [0, 0]
    jobs: list[J] = []
    for number in range(1, JOBS_MAX + 1):
        job = _job(rng, number, what, len(gpus))
        on = _place(rng, job, gpus, spare)
        if on and used[0] + job.cpus <= node.cpus and used[1] + job.memory_mib <= node.memory_mib:
            used = [used[0] + job.cpus, used[1] + job.memory_mib]
            for uuid in on:
                spare[uuid][0] -= job.share_milli
                spare[uuid][1] -= job.gpu_memory_mib if job.share_milli < 1000 else 0
            jobs.append(_live(rng, job, on))
        else:
            jobs.append(job)
    # What a restart would lose would keep some from giving way to a promised job of nearly their value.
    pending = [replace(job, restart_loss_us=0) for job in jobs if not job.is_live]
    wanted = rng.sample(pending, rng.randint(min(2, len(pending)), len(pending)))
    live = (job for job in jobs if job.is_live)
    return W(jobs=tuple(sorted((*live, *wanted), key=lambda job: job.number)), gpus=gpus, nodes=(node,))


def _gpus(rng: random.Random) -> tuple[G, ...]:
    count, mixed = rng.choice((2, 4, 8, 8)), rng.random() < 0.3
    return tuple(
        G(f"GPU-{index}", index, memory_mib=40_000, model="A100")
        if mixed and rng.random() < 0.5
        else G(f"GPU-{index}", index)
        for index in range(count)
    )


def _job(rng: random.Random, number: int, what: Kind, gpus: int) -> J:
    job_class = rng.choice(CLASSES)
    factor = math.exp(rng.uniform(-VALUE_SPREAD, VALUE_SPREAD))
    job = J(
        number,
        job_class,
        priority=rng.choice((100, 500, 500, 900)),
        value=round(VALUE[job_class] * factor / 1000) * 1000,
        models=rng.choice(((), (), (), ("H100",), ("A100", "H100"))),
        gpu_memory_mib=rng.choice((0, 10_000, 30_000, 60_000)),
        cpus=rng.choice((0, 2, 4, 8)),
        memory_mib=rng.choice((0, 20_000, 60_000)),
        restart_loss_us=rng.choice((0, 0, 60, 600, 1800)) * SECOND_US,
    )
    shape = rng.random()
    if shape < what.gang_ratio and job_class in (TRAINING, BATCH):
        return replace(job, gpus=min(gpus, rng.choice((2, 2, 3, 4, 4, 8))))
    if shape > 1 - what.share_ratio:
        return replace(
            job, share_milli=rng.choice(SHARES_MILLI), gpu_memory_mib=rng.choice((0, 5_000, 10_000, 30_000))
        )
    return job


def _place(rng: random.Random, job: J, gpus: tuple[G, ...], spare: dict[str, list[int]]) -> tuple[str, ...]:
    """GPUs on which the job runs already; none where it is pending. What earns little is likelier to run."""
    room = [
        gpu.uuid
        for gpu in gpus
        if gpu.uuid in spare
        and spare[gpu.uuid][0] >= job.share_milli
        and spare[gpu.uuid][1] >= job.gpu_memory_mib
        and (not job.models or gpu.model in job.models)
    ]
    is_chosen = rng.random() < (0.3 if job.job_class <= TRAINING else 0.8)
    return tuple(rng.sample(room, job.gpus)) if is_chosen and len(room) >= job.gpus else ()


def _live(rng: random.Random, job: J, on: tuple[str, ...]) -> J:
    """The job after it ran for a while: some may not be preempted, some not yet."""
    ran_s = rng.randint(1, 7200)
    saved_us = NOW_US - rng.randint(0, ran_s) * SECOND_US
    return replace(
        job,
        state=RUNNING,
        on=on,
        node=0,
        started_us=NOW_US - ran_s * SECOND_US,
        checkpoint_us=rng.choice((saved_us, UNKNOWN)),
        preemptible=rng.random() < 0.85,
        min_runtime_us=rng.choice((0, 0, 0, 600, 3600)) * SECOND_US,
    )
