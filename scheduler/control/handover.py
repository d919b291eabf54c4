"""Verified hand-over: a GPU is given on only when it is proved free of those who left it.

Looked at at once when an attempt ends, then after 1, 2, 5, 10 and every 20 ms, that GPU alone. Free
of all means: no process on it but ignored ones, and memory back to the baseline learnt on that GPU
while it was empty. Where shares are still held, the processes of the live holders may be there.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.effects.gpus import Gpus
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuProcess
from scheduler.model.settings import ForeignAction, ForeignConfig

DELAYS_S = (0.0, 0.001, 0.002, 0.005, 0.010)
DELAY_S_LATER = 0.020
# After this long nobody waits on the millisecond any more; the read itself costs the driver's lock.
DELAY_S_SLOW = 0.5
SLOW_AFTER_S = 5.0
# Reserves breathe by a few MiB; a CUDA context is hundreds.
MEMORY_TOLERANCE_MIB = 32


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a GPU found: is it free, and if not, who or what is still there."""

    free: bool
    strangers: tuple[GpuProcess, ...]
    memory_used_mib: int | None
    ignored_mib: int = 0  # of it, by processes that the policy ignores


class HandoverVerifier:
    """One watcher per GPU that has something to prove."""

    def __init__(
        self,
        gpus: Gpus,
        *,
        foreign: Callable[[], ForeignConfig],
        baseline_mib: Callable[[str], int | None],
        is_held: Callable[[str, int], bool],
        on_result: Callable[[str, Look | None, str], None],
        timeout_s: Callable[[], float],
    ) -> None:
        """Watch GPUs.

        `is_held(uuid, pid)` says whether the process belongs to a live job that holds that GPU;
        `on_result(uuid, look, error)` is called once, when the GPU is free or out of time.
        """
        self._gpus = gpus
        self._foreign = foreign
        self._baseline_mib = baseline_mib
        self._is_held = is_held
        self._on_result = on_result
        self._timeout_s = timeout_s
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()

    def watch(self, uuid: str, *, once: bool = False) -> None:
        """Look at the GPU from now on, from the first delay; `once`: the first look decides."""
        if uuid in self._watches:
            self._again.add(uuid)  # a look that is under way began before what we are to see
            return
        self._watches[uuid] = asyncio.get_running_loop().create_task(self._watch(uuid, once))

    def forget(self, uuid: str) -> None:
        """Look no more."""
        task = self._watches.pop(uuid, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Look at nothing any more."""
        for uuid in list(self._watches):
            self.forget(uuid)

    async def _watch(self, uuid: str, once: bool) -> None:
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
                look = self.judge(uuid, await self._gpus.holders(uuid))
            except GpuReadError as failure:
                error = failure.code
            if uuid in self._again:
                tries = 0
                continue
            late = loop.time() - begun_s >= self._timeout_s()
            if late or (look is not None and (look.free or once)):
                self._watches.pop(uuid, None)
                self._on_result(uuid, look, error)
                return
            tries += 1

    def judge(self, uuid: str, holders: GpuHolders) -> Look:
        """Whether the GPU is free of everybody who is not allowed on it."""
        rules = self._foreign()
        theirs = [p for p in holders.processes if p.pid and self._is_held(uuid, p.pid)]
        ignored = [p for p in holders.processes if p not in theirs and is_ignored(rules, p)]
        strangers = tuple(p for p in holders.processes if p not in theirs and p not in ignored)
        baseline, used = self._baseline_mib(uuid), holders.memory_used_mib
        accounted = [*theirs, *ignored]
        if baseline is None or used is None or any(p.memory_mib is None for p in accounted):
            memory_free = True  # it can't be judged: the process lists alone decide
        else:
            held_mib = sum(p.memory_mib or 0 for p in accounted)
            memory_free = used <= baseline + held_mib + MEMORY_TOLERANCE_MIB
        ignored_mib = sum(p.memory_mib or 0 for p in ignored)
        return Look(not strangers and memory_free, strangers, used, ignored_mib)


def is_ignored(rules: ForeignConfig, process: GpuProcess) -> bool:
    """Whether the policy says that the process does not matter."""
    return process.pid > 0 and rules.action(process.user, process.command) is ForeignAction.IGNORE
