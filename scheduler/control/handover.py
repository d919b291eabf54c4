"""Verified hand-over: a GPU is given on only when it is proved free of those who left it.

Looked at at once when an attempt ends, then after 1, 2, 5, 10 and every 20 ms, that GPU alone. Free
of all means: no process on it but ignored ones, and memory back to the baseline learnt on that GPU
while it was empty. Where shares are still held, the processes of the live holders may be there.

A GPU on which only strangers are left that were there before, and that account for all its memory, is proved
free of its victim, too: it isn't free, but nothing of ours is on it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from scheduler.control.witness import Witness
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuProcess
from scheduler.model.settings import ForeignAction, ForeignConfig

DELAYS_S = (0.0, 0.001, 0.002, 0.005, 0.010)
DELAY_S_LATER = 0.020
# After this long nobody waits on the millisecond any more; the read itself costs the driver's lock.
DELAY_S_SLOW = 0.5
SLOW_AFTER_S = 5.0
# Reserves breathe by a few MiB, and so does what the driver books for a context and nobody's list has; a
# context itself is hundreds. Once for the GPU, and once for each process that may be there.
MEMORY_TOLERANCE_MIB = 32
# A server may stay, and its own context with it: hundreds of MiB at most. What is beyond that its clients
# left: older MPS books the memory of all of them on the server.
MPS_SERVER = "nvidia-cuda-mps-server"
MPS_SERVER_MIB_MAX = 512


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a GPU found: is it free, and if not, who or what is still there."""

    free: bool  # of everybody
    strangers: tuple[GpuProcess, ...]
    memory_used_mib: int | None
    ignored_mib: int = 0  # of it, by processes that the policy ignores
    freed: bool = False  # of what ended here: who is left was there before, and is not ours
    holding: tuple[GpuProcess, ...] = ()  # who may have memory that did not come back


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What is known of a GPU, for whoever judges who is on it."""

    foreign: Callable[[], ForeignConfig]
    # The most that the empty GPU shows as used; None where memory proves nothing.
    empty_mib: Callable[[str], int | None]
    # Whether the process belongs to a live job that holds that GPU.
    is_held: Callable[[str, int], bool]
    # Whether it was there, and no job's, before now.
    is_foreign: Callable[[str, GpuProcess], bool]
    # Who has the GPU's device open; slow.
    openers: Callable[[str], Awaitable[tuple[GpuProcess, ...]]]


class HandoverVerifier:
    """One watcher per GPU that has something to prove."""

    def __init__(
        self,
        witness: Witness,
        facts: GpuFacts,
        *,
        on_result: Callable[[str, Look | None, str], None],
        timeout_s: Callable[[], float],
    ) -> None:
        """Watch GPUs; `on_result(uuid, look, error)` is called once, at the end of a watch.

        That is when the GPU is free, or freed of what ended there, or out of time.
        """
        self._witness = witness
        self._facts = facts
        self._on_result = on_result
        self._timeout_s = timeout_s
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()

    def watch(self, uuid: str, *, nobody_left: bool = False) -> None:
        """Look at the GPU from now on, from the first delay.

        `nobody_left`: no job of ours left it, so that strangers are not waited for.
        """
        if uuid in self._watches:
            self._again.add(uuid)  # a look that is under way began before what we are to see
            return
        self._watches[uuid] = asyncio.get_running_loop().create_task(self._watch(uuid, nobody_left))

    def is_watched(self, uuid: str) -> bool:
        """Whether a watch of the GPU is under way."""
        return uuid in self._watches

    def forget(self, uuid: str) -> None:
        """Look no more."""
        task = self._watches.pop(uuid, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Look at nothing any more."""
        for uuid in list(self._watches):
            self.forget(uuid)

    async def _watch(self, uuid: str, nobody_left: bool) -> None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        tries = 0
        while True:
            delay_s = DELAYS_S[tries] if tries < len(DELAYS_S) else DELAY_S_LATER
            waited_s = loop.time() - begun_s
            if waited_s > SLOW_AFTER_S:
                delay_s = DELAY_S_SLOW
            if delay_s:
                await asyncio.sleep(delay_s)
            look, error = None, ""
            self._again.discard(uuid)
            try:
                look = self.judge(uuid, await self._witness.holders(uuid))
            except GpuReadError as failure:
                error = failure.code
            if uuid in self._again:
                tries = 0
                continue
            late = loop.time() - begun_s >= self._timeout_s()
            if late or (
                look is not None and (look.free or look.freed or (nobody_left and bool(look.strangers)))
            ):
                if look is not None and not look.free and not look.strangers:
                    look = replace(look, holding=(*look.holding, *await self._openers(uuid)))
                if uuid in self._again:
                    continue
                self._watches.pop(uuid, None)
                self._on_result(uuid, look, error)
                return
            tries += 1

    async def _openers(self, uuid: str) -> tuple[GpuProcess, ...]:
        """Who has the device open and is nobody that may be there."""
        rules = self._facts.foreign()
        return tuple(
            process
            for process in await self._facts.openers(uuid)
            if not is_ignored(rules, process) and not self._facts.is_held(uuid, process.pid)
        )

    def judge(self, uuid: str, holders: GpuHolders) -> Look:
        """Whether the GPU is free of everybody who is not allowed on it."""
        facts, rules = self._facts, self._facts.foreign()
        theirs = [p for p in holders.processes if p.pid and facts.is_held(uuid, p.pid)]
        ignored = [p for p in holders.processes if p not in theirs and is_ignored(rules, p)]
        strangers = tuple(p for p in holders.processes if p not in theirs and p not in ignored)
        if not theirs:  # whose memory may be booked on a server
            ignored = [_at_rest(process) for process in ignored]
        used_mib, empty_mib = holders.memory_used_mib, facts.empty_mib(uuid)

        def is_accounted(processes: list[GpuProcess]) -> bool:
            if used_mib is None or empty_mib is None or any(p.memory_mib is None for p in processes):
                return True  # it can't be judged: the process lists alone decide
            tolerance_mib = MEMORY_TOLERANCE_MIB * (1 + len(processes))
            return used_mib <= empty_mib + _sum_mib(processes) + tolerance_mib

        allowed = [*theirs, *ignored]
        is_back = is_accounted(allowed)
        return Look(
            free=not strangers and is_back,
            strangers=strangers,
            memory_used_mib=used_mib,
            ignored_mib=_sum_mib(ignored),
            freed=bool(strangers)
            and all(facts.is_foreign(uuid, process) for process in strangers)
            and is_accounted([*allowed, *strangers]),
            holding=() if is_back else tuple(p for p in holders.processes if _at_rest(p) != p),
        )


def is_ignored(rules: ForeignConfig, process: GpuProcess) -> bool:
    """Whether the policy says that the process does not matter."""
    return process.pid > 0 and rules.action(process.user, process.command) is ForeignAction.IGNORE


def _at_rest(process: GpuProcess) -> GpuProcess:
    """The process as it is without clients: of an MPS server no more memory than its own."""
    if process.command != MPS_SERVER or (process.memory_mib or 0) <= MPS_SERVER_MIB_MAX:
        return process
    return replace(process, memory_mib=MPS_SERVER_MIB_MAX)


def _sum_mib(processes: list[GpuProcess]) -> int:
    return sum(process.memory_mib or 0 for process in processes)
