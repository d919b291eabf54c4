"""Verified hand-over: what one look at a GPU proves, and how long a GPU is looked at."""

import asyncio
from typing import Any

from scheduler.control.handover import (
    MEMORY_TOLERANCE_MIB,
    MPS_SERVER,
    MPS_SERVER_MIB_MAX,
    GpuFacts,
    HandoverVerifier,
    Look,
)
from scheduler.control.witness import Witness
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuProcess
from scheduler.model.settings import ForeignAction, ForeignConfig, ForeignRule

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
    empty_mib: int | None = BASELINE_MIB,
    foreign: tuple[GpuProcess, ...] = (),
    openers: tuple[GpuProcess, ...] = (),
) -> tuple[HandoverVerifier, FakeGpus, "asyncio.Queue[tuple[Look | None, str]]"]:
    gpus: Any = FakeGpus(*looks)
    results: asyncio.Queue[tuple[Look | None, str]] = asyncio.Queue()
    rules = ForeignConfig(rules=(ForeignRule(ForeignAction.IGNORE, command="Xorg"),))

    async def opened_by(uuid: str) -> tuple[GpuProcess, ...]:
        return openers

    facts = GpuFacts(
        foreign=lambda: rules,
        empty_mib=lambda uuid: empty_mib,
        is_held=lambda uuid, pid: pid in held,
        is_foreign=lambda uuid, process: process in foreign,
        openers=opened_by,
    )
    made = HandoverVerifier(
        Witness(gpus),
        facts,
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
    assert judged(process(7), used_mib=1500 + 2 * MEMORY_TOLERANCE_MIB, held=frozenset({7})).free
    assert not judged(process(7), used_mib=1501 + 2 * MEMORY_TOLERANCE_MIB, held=frozenset({7})).free
    assert not judged(process(7), used_mib=2600, held=frozenset({7})).free


async def test_who_is_ignored_may_stay_with_its_memory() -> None:
    look = judged(process(7, 1000, "Xorg"), used_mib=1500)
    assert (look.free, look.ignored_mib) == (True, 1000)


async def test_where_memory_is_not_known_the_lists_decide() -> None:
    assert judged(used_mib=None).free
    assert judged(used_mib=99_999, empty_mib=None).free
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


async def test_where_no_job_left_strangers_are_not_waited_for_but_memory_is() -> None:
    made, gpus, results = verifier(holders(used_mib=9000), holders(used_mib=9000), holders(process(7)))
    made.watch(UUID, nobody_left=True)
    look, _ = await results.get()
    assert look is not None
    assert (look.free, look.strangers, gpus.count) == (False, (process(7),), 3)


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


# Who was there before --------------------------------------------------------------------------


async def test_a_gpu_is_freed_of_its_victim_where_only_strangers_of_before_are_left() -> None:
    before = process(7)
    look = judged(before, used_mib=1500, foreign=(before,))
    assert (look.free, look.freed, look.strangers) == (False, True, (before,))
    made, gpus, results = verifier(holders(before, used_mib=1500), foreign=(before,))
    made.watch(UUID)
    assert await results.get() == (look, "")
    assert gpus.count == 1


async def test_a_gpu_is_not_freed_while_anybody_or_anything_else_is_left() -> None:
    before = process(7)
    assert not judged(before, process(8), used_mib=2500, foreign=(before,)).freed
    assert not judged(before, used_mib=1501 + 2 * MEMORY_TOLERANCE_MIB, foreign=(before,)).freed


async def test_a_share_is_freed_beside_its_neighbour_and_a_stranger_of_before() -> None:
    before, neighbour = process(7), process(9, 3000)
    options: dict[str, Any] = {"held": frozenset({9}), "foreign": (before,)}
    assert judged(before, neighbour, used_mib=4500, **options).freed
    assert not judged(before, neighbour, used_mib=6000, **options).freed, "the victim's memory"


# An MPS server ---------------------------------------------------------------------------------


def server(memory_mib: int) -> GpuProcess:
    return process(5, memory_mib, MPS_SERVER)


async def test_an_mps_server_may_stay_with_its_own_context() -> None:
    look = judged(server(30), used_mib=BASELINE_MIB + 30)
    assert (look.free, look.ignored_mib) == (True, 30)


async def test_memory_that_clients_left_on_their_mps_server_keeps_a_gpu_and_names_the_server() -> None:
    look = judged(server(9000), used_mib=BASELINE_MIB + 9000)
    assert (look.free, look.holding) == (False, (server(9000),))
    assert look.ignored_mib == MPS_SERVER_MIB_MAX, "so it does not become the baseline either"


async def test_an_mps_server_may_hold_what_a_neighbour_who_stays_has_booked_on_it() -> None:
    client = process(9, 0)
    assert judged(server(9000), client, used_mib=BASELINE_MIB + 9000, held=frozenset({9})).free


# Who may have what did not come back -----------------------------------------------------------


async def test_where_memory_does_not_come_back_whoever_has_the_device_open_is_named() -> None:
    opener, xorg, neighbour = process(7, None), process(8, None, "Xorg"), process(9, None)
    made, _, results = verifier(
        holders(used_mib=9000),
        timeout_s=0.02,
        held=frozenset({9}),
        openers=(opener, xorg, neighbour),
    )
    made.watch(UUID)
    look, _ = await results.get()
    assert look is not None
    assert (look.free, look.holding) == (False, (opener,))


# PIDs that another process took over -----------------------------------------------------------


def since(pid: int, start_ticks: int) -> GpuProcess:
    return GpuProcess(pid, 1000, "compute", "alice", "python3", start_ticks=start_ticks)


async def seen(*looks: GpuHolders) -> list[tuple[GpuProcess, ...]]:
    gpus: Any = FakeGpus(*looks)
    witness = Witness(gpus)
    return [(await witness.holders(UUID)).processes for _ in looks]


async def test_an_entry_whose_pid_went_to_another_process_names_nobody_until_it_is_gone() -> None:
    nobody = GpuProcess(0, 1000, "compute", listed_pid=7)
    assert await seen(
        holders(since(7, 100)),
        holders(nobody),  # its process is gone
        holders(since(7, 200)),  # and its PID is somebody else's
        holders(since(7, 200)),
        holders(),
        holders(since(7, 200)),  # an entry of its own
    ) == [(since(7, 100),), (nobody,), (nobody,), (nobody,), (), (since(7, 200),)]


async def test_a_process_that_stays_is_itself() -> None:
    assert await seen(holders(since(7, 100)), holders(since(7, 100), since(8, 50))) == [
        (since(7, 100),),
        (since(7, 100), since(8, 50)),
    ]


async def test_an_entry_is_not_taken_for_that_of_another_gpu() -> None:
    gpus: Any = FakeGpus(holders(since(7, 100)), holders(since(7, 200)))
    witness = Witness(gpus)
    await witness.holders("GPU-a")
    assert (await witness.holders("GPU-b")).processes == (since(7, 200),)
    witness.forget(frozenset({"GPU-b"}))
    assert (await witness.holders("GPU-a")).processes == (since(7, 200),)
