"""What a request that can't be served lacks, and the smallest request that lacks it too.

Where nodes lack different things the one that lacks least says why the job waits: a job slot, then host
memory, then CPUs, then GPU memory, then GPUs. Of one node that lacks several of its host, CPUs are named.
"""

from typing import Any

from scheduler.model.reasons import Reason
from scheduler.model.snapshot import UNKNOWN
from scheduler.planning.allocator import Request
from scheduler.planning.arrays import some
from scheduler.planning.kinds import Kinds, fits_over
from scheduler.planning.pool import Pool

_Step = dict[str, Any]


def lack(request: Request, reach: Pool, nodes: Any) -> Reason:
    """Why the request waits, of the nodes in the mask; `reach` is what it could have of each."""
    here = reach.fit_gpus(request) & nodes
    if some(here):
        cpus = (reach.cpus[here] >= request.cpus) | (request.cpus == 0)
        memory = (reach.memory_mib[here] >= request.memory_mib) | (request.memory_mib == 0)
        if some(cpus & memory):
            return Reason.WAITING_FOR_START_SLOT
        return Reason.WAITING_FOR_MEMORY if some(cpus) else Reason.WAITING_FOR_CPUS
    if request.gpu_memory_mib and some(reach.fit_gpus(request._replace(gpu_memory_mib=0)) & nodes):
        return Reason.WAITING_FOR_GPU_MEMORY
    return Reason.WAITING_FOR_GPUS


def lack_over(request: Request, reach: Pool, nodes: Any, kinds: Kinds) -> Reason:
    """Why a gang over several nodes waits."""
    ways = kinds.divisions(request)
    if not fits_over(ways, reach.fit_gpus, nodes):
        of_any_size = kinds.divisions(request._replace(gpu_memory_mib=0))
        if fits_over(of_any_size, reach.fit_gpus, nodes):
            return Reason.WAITING_FOR_GPU_MEMORY
        return Reason.WAITING_FOR_GPUS

    def fit_cpus(part: Request) -> Any:
        return reach.fit_gpus(part) & ((reach.cpus >= part.cpus) | (part.cpus == 0))

    def fit_memory(part: Request) -> Any:
        return fit_cpus(part) & ((reach.memory_mib >= part.memory_mib) | (part.memory_mib == 0))

    if not fits_over(ways, fit_cpus, nodes):
        return Reason.WAITING_FOR_CPUS
    if not fits_over(ways, fit_memory, nodes):
        return Reason.WAITING_FOR_MEMORY
    return Reason.WAITING_FOR_START_SLOT


def least_lacking_over(request: Request, reason: Reason) -> Request:
    """A smaller gang over several nodes that fails for the same lack."""
    of_gpus = reason in (Reason.WAITING_FOR_GPUS, Reason.WAITING_FOR_GPU_MEMORY)
    return request._replace(cpus=0, memory_mib=0) if of_gpus else request


def least_lacking(request: Request, reason: Reason, reach: Pool, nodes: Any) -> Request:
    """The smallest request found that fails on all nodes for the same lack: whoever wants as much fails."""
    of_gpus = reason in (Reason.WAITING_FOR_GPUS, Reason.WAITING_FOR_GPU_MEMORY)
    fit = reach.fit_gpus if of_gpus else reach.fit
    least = request._replace(cpus=0, memory_mib=0) if of_gpus else request
    for steps in _steps_down(request, reason, reach, nodes):
        for step in steps:
            tried = least._replace(**step)
            if tried != least and some(fit(tried) & nodes):
                break
            least = tried
    return least


def _steps_down(request: Request, reason: Reason, reach: Pool, nodes: Any) -> list[list[_Step]]:
    """What to spare a request of, in series; a series ends where the request would fit."""
    if reason is Reason.WAITING_FOR_GPUS:
        counts = [{"gpus": count} for count in (4, 2, 1) if count < request.gpus]
        shares = [{"share_milli": milli} for milli in (500, 250, 1) if milli < request.share_milli]
        return [[{"gpu_memory_mib": 0}], [{"models": UNKNOWN}], counts, shares]
    if reason is Reason.WAITING_FOR_CPUS:
        cpus = 1 + max(0, int(reach.cpus[nodes].max()))
        return [[{"memory_mib": 0}], [{"cpus": min(cpus, request.cpus)}]]
    if reason is Reason.WAITING_FOR_MEMORY:
        memory_mib = 1 + max(0, int(reach.memory_mib[nodes].max()))
        return [[{"cpus": 0}], [{"memory_mib": min(memory_mib, request.memory_mib)}]]
    if reason is Reason.WAITING_FOR_START_SLOT:
        return [[{"gpus": 0, "share_milli": 1, "gpu_memory_mib": 0, "cpus": 0, "memory_mib": 0}]]
    return [[{"models": UNKNOWN}]]
