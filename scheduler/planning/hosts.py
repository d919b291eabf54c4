"""What live jobs have of nodes beside GPUs: CPUs, host memory and a slot on each node that they are on."""

from typing import Any, NamedTuple

from scheduler.model.snapshot import UNKNOWN, Snapshot
from scheduler.planning.arrays import rows_where, some, xp


class Hosts(NamedTuple):
    """Shape (jobs and nodes,) each: a row for each live job, of a gang over several nodes one for each."""

    job: Any  # row of `JobColumns`
    node: Any
    cpus: Any
    memory_mib: Any

    def of(self, jobs: Any) -> "Hosts":
        """Those of the jobs in the mask, which is by `job`."""
        chosen = jobs[self.job]
        return Hosts(self.job[chosen], self.node[chosen], self.cpus[chosen], self.memory_mib[chosen])

    @property
    def amounts(self) -> tuple[Any, Any, Any]:
        """CPUs, MiB and slots of each row."""
        return self.cpus, self.memory_mib, xp.ones(len(self.node), dtype=xp.int64)


def hosts_of(snapshot: Snapshot, live: Any, holder: Any) -> Hosts:
    """What the live jobs have, by the nodes on which they hold GPUs.

    Args:
        snapshot: The world.
        live: Bool, shape (jobs,).
        holder: Shape (holdings,). The row of the live job that holds it; UNKNOWN where none does.
    """
    jobs = snapshot.jobs
    rows = rows_where(live)
    on_one = Hosts(rows, jobs.node[rows], jobs.cpus[rows], jobs.memory_mib[rows])
    if len(snapshot.nodes) < 2 or not len(rows):
        return on_one
    node = snapshot.gpus.node[snapshot.holdings.gpu]
    away = (holder != UNKNOWN) & (node != jobs.node[holder])
    if not some(away):
        return on_one
    over_several = xp.zeros(len(jobs), dtype=bool)
    over_several[holder[away]] = True
    held = (holder != UNKNOWN) & over_several[holder]
    # Each pair of job and node, and how many GPUs that is.
    nodes = len(snapshot.nodes)
    key = xp.sort(holder[held] * nodes + node[held])
    pairs = xp.unique(key)
    starts = xp.searchsorted(key, pairs)
    gpus = xp.concatenate([starts[1:], xp.asarray([len(key)], dtype=xp.int64)]) - starts
    job = pairs // nodes
    parts = Hosts(
        job,
        pairs % nodes,
        part_of(jobs.cpus[job], gpus, jobs.gpus[job]),
        part_of(jobs.memory_mib[job], gpus, jobs.gpus[job]),
    )
    rest = on_one.of(~over_several)
    return Hosts(*(xp.concatenate(pair) for pair in zip(rest, parts, strict=True)))


def part_of(amount: Any, gpus: Any, all_gpus: Any) -> Any:
    """What a gang's CPUs or host memory come to on a node with so many of its GPUs, rounded up."""
    return -(-(amount * gpus) // all_gpus)
