"""What process lists prove: an entry whose PID another process took over names nobody."""

from dataclasses import replace

from scheduler.effects.gpus import Gpus
from scheduler.model.gpus import GpuHolders, GpuProcess


class Witness:
    """Reads who is on a GPU, and remembers it until the next look.

    A driver may keep the entry of a process that is gone, and the kernel gives its PID to another process. An
    entry that was there before is of whoever started first: as an unknown holder it is neither a live job's
    process nor anybody who may be ended.
    """

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._started: dict[str, dict[int, int]] = {}  # by GPU and listed PID: when its process started

    async def holders(self, uuid: str) -> GpuHolders:
        """Who is on this GPU now.

        Raises:
            GpuReadError: It could not be read in time; `code` says why.
        """
        holders = await self._gpus.holders(uuid)
        before = self._started.get(uuid, {})
        now: dict[int, int] = {}
        processes = []
        for process in holders.processes:
            pid = process.pid or process.listed_pid or 0
            known = before.get(pid, 0) or process.start_ticks
            if known:
                now[pid] = known
            if process.pid and process.start_ticks != known:
                processes.append(GpuProcess(0, process.memory_mib, process.kind, listed_pid=pid))
            else:
                processes.append(process)
        self._started[uuid] = now
        return replace(holders, processes=tuple(processes))

    def forget(self, known: frozenset[str]) -> None:
        """Remember nothing of other GPUs than these."""
        for uuid in self._started.keys() - known:
            del self._started[uuid]
