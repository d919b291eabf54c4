"""What a request that can't be served lacks, and the smallest request that lacks it too."""

from dataclasses import replace
from typing import Any

from scheduler.model.reasons import Reason
from scheduler.model.snapshot import UNKNOWN
from scheduler.planning.allocator import Node, Request, Spare, fits, gpus_fit

# More than any request asks for.
_AMPLE = 1 << 62
_HOST: tuple[tuple[Reason, dict[str, Any]], ...] = (
    (Reason.WAITING_FOR_CPUS, {"cpus": _AMPLE}),
    (Reason.WAITING_FOR_MEMORY, {"memory_mib": _AMPLE}),
    (Reason.WAITING_FOR_START_SLOT, {"slots": _AMPLE}),
)
# Where nodes lack different things: the one that lacks least says why the job waits.
_NEAREST_FIRST = (
    Reason.WAITING_FOR_START_SLOT,
    Reason.WAITING_FOR_MEMORY,
    Reason.WAITING_FOR_CPUS,
    Reason.WAITING_FOR_GPU_MEMORY,
    Reason.WAITING_FOR_GPUS,
)

Spares = list[tuple[Node, Spare]]  # nodes, and what each has to give to this request
_Step = dict[str, Any]


def lack(request: Request, spares: Spares) -> Reason:
    """Why the request waits: on the node that is nearest to serving it, what alone binds, else GPUs first."""
    return min((_lack_on(request, node, spare) for node, spare in spares), key=_NEAREST_FIRST.index)


def least_lacking(request: Request, reason: Reason, spares: Spares) -> Request:
    """The smallest request found that fails on all nodes for the same lack: whoever wants as much fails."""
    of_gpus = reason in (Reason.WAITING_FOR_GPUS, Reason.WAITING_FOR_GPU_MEMORY)
    least = replace(request, cpus=0, memory_mib=0) if of_gpus else request
    for steps in _steps_down(request, reason, spares):
        for step in steps:
            tried = replace(least, **step)
            if any(gpus_fit(tried, *each) if of_gpus else fits(tried, *each) for each in spares):
                break
            least = tried
    return least


def _lack_on(request: Request, node: Node, spare: Spare) -> Reason:
    if not gpus_fit(request, node, spare):
        only_memory = gpus_fit(replace(request, gpu_memory_mib=0), node, spare)
        return Reason.WAITING_FOR_GPU_MEMORY if only_memory else Reason.WAITING_FOR_GPUS
    for reason, ample in _HOST:
        if fits(request, node, replace(spare, **ample)):
            return reason
    return Reason.WAITING_FOR_CPUS if request.cpus > spare.cpus else Reason.WAITING_FOR_MEMORY


def _steps_down(request: Request, reason: Reason, spares: Spares) -> list[list[_Step]]:
    """What to spare a request of, in series; a series ends where the request would fit."""
    if reason is Reason.WAITING_FOR_GPUS:
        counts = [{"gpus": count} for count in (4, 2, 1) if count < request.gpus]
        shares = [{"share_milli": milli} for milli in (500, 250, 1) if milli < request.share_milli]
        return [[{"gpu_memory_mib": 0}], [{"models": UNKNOWN}], counts, shares]
    if reason is Reason.WAITING_FOR_CPUS:
        cpus = 1 + max(0, *(spare.cpus for _, spare in spares))
        return [[{"memory_mib": 0}], [{"cpus": min(cpus, request.cpus)}]]
    if reason is Reason.WAITING_FOR_MEMORY:
        memory_mib = 1 + max(0, *(spare.memory_mib for _, spare in spares))
        return [[{"cpus": 0}], [{"memory_mib": min(memory_mib, request.memory_mib)}]]
    if reason is Reason.WAITING_FOR_START_SLOT:
        return [[{"gpus": 0, "share_milli": 1, "gpu_memory_mib": 0, "cpus": 0, "memory_mib": 0}]]
    return [[{"models": UNKNOWN}]]
