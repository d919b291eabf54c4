"""How long GPUs will take to come free of a job that is done with them: from what is known.

The driver unpins a job's host memory before it lets go of the GPU. What a job took before, or jobs of its
class on such a GPU, says most; what it declares to pin is the least that is expected.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterable

from scheduler.control.board import GpuBoard
from scheduler.control.ledger import Ledger
from scheduler.model.gpus import GpuIdentity
from scheduler.model.jobs import Attempt, Job, JobClass

# One H100 after SIGKILL [sgl-project/sglang PRs #32829, #36589, #39545]: contexts with device memory alone
# take 0.4 to 0.8 s, with 243 GB of pinned host memory 25.9 s.
CONTEXT_S = 0.8
PINNED_S_PER_MIB = (25.9 - CONTEXT_S) / (243e9 / 2**20)
# Hand-overs remembered of each class on each model, and which of them is told: nine of ten were faster.
REMEMBERED_MAX = 32
QUANTILE = 0.9


class Forecast:
    """Remembers hand-overs of this node; predicts those to come."""

    def __init__(self, ledger: Ledger, board: GpuBoard) -> None:
        self._ledger = ledger
        self._board = board
        self._took_s: defaultdict[tuple[JobClass, str], deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED_MAX)
        )
        self._recalled: set[str] = set()

    def recall(self, gpus: Iterable[GpuIdentity]) -> None:
        """Take from the attempts that the ledger still has what happened on these GPUs before a restart."""
        fresh = {gpu.uuid: gpu.model for gpu in gpus if gpu.uuid not in self._recalled}
        self._recalled |= fresh.keys()
        for job in self._ledger.jobs.values() if fresh else ():
            for attempt in job.attempts:
                took_s = _took_s(attempt)
                if took_s is not None:
                    for model in {fresh[uuid] for uuid in attempt.gpus if uuid in fresh}:
                        self._took_s[job.spec.job_class, model].append(took_s)

    def learn(self, job: Job, attempt: int, verified_s: float) -> None:
        """Note that all GPUs of an attempt are proved free now."""
        ended = next((one for one in job.attempts if one.number == attempt), None)
        if ended is not None and ended.exited_s is not None:
            for model in self._models(ended.gpus):
                self._took_s[job.spec.job_class, model].append(max(0.0, verified_s - _left_s(ended)))

    def handover_s(self, job: Job) -> float:
        """Seconds from the job's SIGKILL, or its end before, until the GPUs that it has are proved free."""
        if job.last is None or not job.last.gpus:
            return 0.0
        own = [took_s for attempt in job.attempts if (took_s := _took_s(attempt)) is not None]
        of_class = [
            _quantile(self._took_s[job.spec.job_class, model])
            for model in self._models(job.last.gpus)
            if (job.spec.job_class, model) in self._took_s
        ]
        seen_s = max(own or of_class or [CONTEXT_S])
        pinned_mib = job.spec.pinned_memory_mib
        return max(seen_s, CONTEXT_S + pinned_mib * PINNED_S_PER_MIB if pinned_mib else 0.0)

    def until_free_s(self, uuids: Iterable[str], told: Iterable[int], now_s: float) -> float:
        """Seconds until these GPUs are proved free of all who leave them, graces included.

        `told` are the numbers of live jobs that would be told to leave now.
        """
        wanted, going = frozenset(uuids), {*told, *self._ledger.stopping}
        waits = [0.0]
        for job in self._ledger.live_jobs():
            last = job.attempts[-1]
            if job.number in going and wanted.intersection(last.gpus):
                left_s = now_s + job.spec.grace_s if last.notice is None else _left_s(last)
                waits.append(left_s + self.handover_s(job) - now_s)
        for job_id, number in {
            (one.job_id, one.attempt)
            for uuid, occupants in self._board.occupants().items()
            for one in occupants
            if uuid in wanted and one.job_id
        }:
            waits.append(self._still_s(job_id, number, now_s))
        return max(waits)

    def _still_s(self, job_id: str, number: int, now_s: float) -> float:
        """How long an attempt that has ended may still take; 0 where nothing is known of it any more."""
        job = self._ledger.by_id(job_id)
        if job is None:
            return 0.0
        ended = (one for one in job.attempts if one.number == number)
        return max((_left_s(one) + self.handover_s(job) - now_s for one in ended), default=0.0)

    def _models(self, uuids: Iterable[str]) -> set[str]:
        wanted = frozenset(uuids)
        return {gpu.model for gpu in self._board.identities if gpu.uuid in wanted}


def _took_s(attempt: Attempt) -> float | None:
    if attempt.exited_s is None or attempt.verified_s is None or not attempt.gpus:
        return None
    return max(0.0, attempt.verified_s - _left_s(attempt))


def _left_s(attempt: Attempt) -> float:
    """When the job was done with its GPUs: at its SIGKILL at the latest, for the rest is the driver's."""
    notice = attempt.notice
    moments = (attempt.exited_s, attempt.acknowledged_s, notice.deadline_s if notice else None)
    return min(moment for moment in moments if moment is not None)


def _quantile(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(QUANTILE * len(ordered)) - 1]
