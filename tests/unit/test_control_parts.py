"""The small parts of the loop: who watches, who may have a GPU next."""

import asyncio
from typing import Any

import pytest

from scheduler.control.handover import MEMORY_TOLERANCE_MIB, HandoverVerifier, Look
from scheduler.control.watch import UNREAD_JOBS_MAX, JobSubscription, Watchers
from scheduler.errors import GpuReadError, LimitReached
from scheduler.model.events import submitted
from scheduler.model.gpus import GpuHolders, GpuProcess
from scheduler.model.jobs import Job
from scheduler.model.settings import ForeignAction, ForeignConfig, ForeignRule
from tests.harness.values import submission

# Watches ---------------------------------------------------------------------------------------


def job(number: int, revision: int = 1) -> Job:
    return submitted(submission(number), revision)


async def test_a_slow_reader_gets_the_newest_state_of_each_job_in_the_order_of_change() -> None:
    subscription = JobSubscription()
    for number, revision in ((1, 1), (2, 2), (1, 3), (3, 4), (2, 5)):
        subscription.offer(job(number, revision))
    assert [(j.number, j.revision) for j in await subscription.take()] == [(1, 3), (3, 4), (2, 5)]


async def test_a_reader_with_nothing_to_read_waits() -> None:
    subscription = JobSubscription(frozenset({2}))
    subscription.offer(job(1))
    waiting = asyncio.ensure_future(subscription.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    subscription.offer(job(2))
    assert [j.number for j in await waiting] == [2]


async def test_a_reader_too_far_behind_is_told_so() -> None:
    subscription = JobSubscription()
    for number in range(UNREAD_JOBS_MAX + 1):
        subscription.offer(job(number))
    with pytest.raises(LimitReached, match="since_revision"):
        await subscription.take()


def test_the_number_of_watches_is_bounded_and_leaving_makes_room() -> None:
    watchers = Watchers(2)
    first = watchers.watch_jobs()
    node = watchers.watch_node()
    with pytest.raises(LimitReached):
        watchers.watch_jobs()
    watchers.leave(first)
    watchers.leave(first)
    watchers.watch_node()
    watchers.publish_node()
    assert node.is_set()


# Hand-over -------------------------------------------------------------------------------------

UUID = "GPU-a"
BASELINE_MIB = 500


def process(pid: int, memory_mib: int | None = 1000, command: str = "python3") -> GpuProcess:
    return GpuProcess(pid, memory_mib, "compute", "alice", command)


class FakeGpus:
    """A GPU whose holders come one after the other; the last stay."""

    def __init__(self, *looks: GpuHolders | GpuReadError) -> None:
        self.looks = list(looks)
        self.count = 0

    async def holders(self, uuid: str) -> GpuHolders:
        self.count += 1
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, GpuReadError):
            raise found
        return found


def holders(*processes: GpuProcess, used_mib: int | None = BASELINE_MIB) -> GpuHolders:
    return GpuHolders(UUID, 0.0, processes, used_mib)


def verifier(
    *looks: GpuHolders | GpuReadError,
    held: frozenset[int] = frozenset(),
    timeout_s: float = 5.0,
    baseline: int | None = BASELINE_MIB,
) -> tuple[HandoverVerifier, FakeGpus, "asyncio.Queue[tuple[Look | None, str]]"]:
    gpus: Any = FakeGpus(*looks)
    results: asyncio.Queue[tuple[Look | None, str]] = asyncio.Queue()
    rules = ForeignConfig(rules=(ForeignRule(ForeignAction.IGNORE, command="Xorg"),))
    made = HandoverVerifier(
        gpus,
        foreign=lambda: rules,
        baseline_mib=lambda uuid: baseline,
        is_held=lambda uuid, pid: pid in held,
        on_result=lambda uuid, look, error: results.put_nowait((look, error)),
        timeout_s=lambda: timeout_s,
    )
    return made, gpus, results


def judged(*processes: GpuProcess, used_mib: int | None = BASELINE_MIB, **options: Any) -> Look:
    return verifier(holders(), **options)[0].judge(UUID, holders(*processes, used_mib=used_mib))


async def test_an_empty_gpu_is_free() -> None:
    assert judged().free
    assert judged(used_mib=BASELINE_MIB + MEMORY_TOLERANCE_MIB).free


async def test_memory_that_has_not_come_back_keeps_a_gpu() -> None:
    assert not judged(used_mib=BASELINE_MIB + MEMORY_TOLERANCE_MIB + 1).free


async def test_a_stranger_keeps_a_gpu_and_is_named() -> None:
    look = judged(process(7), used_mib=1500)
    assert (look.free, look.strangers) == (False, (process(7),))


async def test_a_process_that_can_not_be_named_keeps_a_gpu() -> None:
    assert not judged(process(0, None)).free


async def test_who_holds_a_share_may_stay_with_its_memory() -> None:
    assert judged(process(7), used_mib=1500, held=frozenset({7})).free
    assert not judged(process(7), used_mib=2600, held=frozenset({7})).free


async def test_who_is_ignored_may_stay_with_its_memory() -> None:
    look = judged(process(7, 1000, "Xorg"), used_mib=1500)
    assert (look.free, look.ignored_mib) == (True, 1000)


async def test_where_memory_is_not_known_the_lists_decide() -> None:
    assert judged(used_mib=None).free
    assert judged(used_mib=99_999, baseline=None).free
    assert judged(process(7, None), used_mib=99_999, held=frozenset({7})).free


async def test_a_gpu_is_looked_at_until_it_is_free_and_reported_once() -> None:
    made, gpus, results = verifier(
        holders(process(7), used_mib=1500),
        GpuReadError("ERROR_TIMEOUT", "busy"),
        holders(used_mib=1500),
        holders(),
    )
    made.watch(UUID)
    made.watch(UUID)
    look, error = await results.get()
    assert look is not None
    assert (look.free, error, gpus.count) == (True, "", 4)
    await asyncio.sleep(0.05)
    assert (results.empty(), gpus.count) == (True, 4)
    made.close()


async def test_a_gpu_that_does_not_come_free_in_time_is_reported_with_its_holder() -> None:
    made, _, results = verifier(holders(process(7), used_mib=1500), timeout_s=0.05)
    made.watch(UUID)
    look, _ = await results.get()
    assert look is not None
    assert (look.free, look.strangers) == (False, (process(7),))


async def test_a_gpu_that_can_not_be_read_is_reported_with_the_error() -> None:
    made, _, results = verifier(GpuReadError("ERROR_GPU_IS_LOST", "gone"), timeout_s=0.05)
    made.watch(UUID)
    assert await results.get() == (None, "ERROR_GPU_IS_LOST")


async def test_one_look_decides_where_that_is_wanted() -> None:
    made, gpus, results = verifier(holders(process(7)))
    made.watch(UUID, once=True)
    look, _ = await results.get()
    assert look is not None
    assert (look.free, gpus.count) == (False, 1)


async def test_a_look_that_began_before_the_last_exit_proves_nothing() -> None:
    made, gpus, results = verifier(holders())
    first = gpus.holders

    async def slow(uuid: str) -> GpuHolders:
        found = await first(uuid)
        if gpus.count == 1:
            made.watch(uuid)  # another share ended while the driver was answering
        return found

    gpus.holders = slow  # type: ignore[method-assign]
    made.watch(UUID)
    look, _ = await results.get()
    assert look is not None
    assert (look.free, gpus.count) == (True, 2)


async def test_nobody_hears_of_a_gpu_after_the_end() -> None:
    made, gpus, results = verifier(holders(process(7)))
    made.watch(UUID)
    await asyncio.sleep(0)
    made.close()
    seen = gpus.count
    await asyncio.sleep(0.05)
    assert (gpus.count, results.empty()) == (seen, True)
