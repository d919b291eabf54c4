"""What there is of a node, and what a job has of it: the oracle's own account."""

from tests.fakes.worlds import J

MILLI, MIB = 0, 1


class Amount:
    """Resources of one node: per GPU [thousandths, MiB], then CPUs, memory, job slots."""

    def __init__(self, gpus: dict[str, list[int]], host: list[int]) -> None:
        self.gpus = gpus
        self.host = host

    def plus(self, other: "Amount", sign: int = 1) -> "Amount":
        gpus = {uuid: list(amount) for uuid, amount in self.gpus.items()}
        for uuid, amount in other.gpus.items():
            have = gpus.setdefault(uuid, [0, 0])
            have[MILLI] += sign * amount[MILLI]
            have[MIB] += sign * amount[MIB]
        return Amount(gpus, [a + sign * b for a, b in zip(self.host, other.host, strict=True)])


NOTHING = Amount({}, [0, 0, 0])


def used_by(job: J, uuids: tuple[str, ...]) -> Amount:
    mib = job.gpu_memory_mib if job.share_milli < 1000 else 0
    return Amount({uuid: [job.share_milli, mib] for uuid in uuids}, [job.cpus, job.memory_mib, 1])
