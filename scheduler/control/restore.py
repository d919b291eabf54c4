"""Power limits given back without a daemon: when it can't come back, or was removed."""

import asyncio
from dataclasses import dataclass, replace

from scheduler.effects.gpus import Gpus
from scheduler.effects.journal import Derived, Journal
from scheduler.errors import GpuReadError
from scheduler.model.power_events import LimitsRestored, folded


@dataclass(frozen=True, slots=True)
class Restored:
    """What was given back, what could not be and why, and the jobs for whose sake nothing was touched."""

    done: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()


async def restore(journal: Journal, gpus: Gpus, now_s: float) -> Restored:
    """Set every limit back to what it was found with, unless a job may still run under it.

    Raises:
        JournalError: What was given back could not be written down.
    """
    node = journal.node_state()
    kept = node.power.limits
    if not kept:
        return Restored()
    holders = tuple(sorted(job.id for job in journal.active_jobs() if job.holds and job.attempts[-1].gpus))
    if holders:
        return Restored(holders=holders)
    await gpus.start(lambda _: None, 60.0)
    try:
        answers = await asyncio.gather(
            *(gpus.set_power_limit(uuid, limit.found_w) for uuid, limit in kept.items()),
            return_exceptions=True,
        )
    finally:
        await gpus.close()
    done, failed = [], []
    for uuid, answer in zip(kept, answers, strict=True):
        if isinstance(answer, GpuReadError):
            failed.append(f"GPU {uuid}: {answer}")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            done.append(uuid)
    if done:
        event = LimitsRestored(now_s, tuple(done))
        journal.stage(event)
        journal.commit(Derived([], {}, [], replace(node, power=folded(node.power, event))))
    return Restored(tuple(done), tuple(failed))
