"""Who holds which GPU, kept up to date by change: as jobs by GPU, and as the snapshot's columns."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scheduler.model.jobs import Job

_ROWS_AT_FIRST = 64
_JOB = 0  # row of a job's row in the columns


class Holdings:
    """A row per GPU that a live job holds; the order of the rows means nothing."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}  # live ones, as they are now
        self._by_gpu: dict[str, dict[int, Job]] = {}
        self._gpu_row: Mapping[str, int] = {}
        self._columns: Any = np.zeros((4, _ROWS_AT_FIRST), dtype=np.int64)
        self._count = 0
        self._rows: dict[int, list[int]] = {}  # of each job that has any
        self._owner: list[int] = []  # job number by row

    @property
    def by_gpu(self) -> Mapping[str, Mapping[int, Job]]:
        """The live jobs, by number, of each GPU that somebody holds."""
        return self._by_gpu

    def jobs(self, uuid: str) -> list[Job]:
        """The live jobs that hold a GPU."""
        return list(self._by_gpu.get(uuid, {}).values())

    def columns(self) -> Any:
        """Shape (4, holdings): row of the job, of the GPU, share in thousandths, memory in MiB. A view."""
        return self._columns[:, : self._count]

    def see_gpus(self, gpu_row: Mapping[str, int], job_row: Mapping[int, int]) -> None:
        """GPUs have these rows from now on; a holding of one that has none is in no column."""
        self._gpu_row = gpu_row
        self._count = 0
        self._rows.clear()
        self._owner.clear()
        for number, job in self._jobs.items():
            self._add(job, job_row[number])

    def put(self, job: Job, row: int) -> None:
        """Note a live job as it is now, in its row of the snapshot's jobs."""
        before = self._jobs.get(job.number)
        gpus = job.attempts[-1].gpus
        moved = before is None or before.attempts[-1].gpus != gpus
        if moved:
            self.drop(job.number)
        self._jobs[job.number] = job
        for uuid in gpus:
            self._by_gpu.setdefault(uuid, {})[job.number] = job
        if moved:
            self._add(job, row)

    def drop(self, number: int) -> None:
        """Forget what a job held, if anything."""
        before = self._jobs.pop(number, None)
        if before is None:
            return
        for uuid in before.attempts[-1].gpus:
            held = self._by_gpu[uuid]
            held.pop(number)
            if not held:
                del self._by_gpu[uuid]
        for row in sorted(self._rows.pop(number, ()), reverse=True):
            self._take_out(row)

    def job_moved(self, number: int, row: int) -> None:
        """A job has another row among the snapshot's jobs."""
        for mine in self._rows.get(number, ()):
            self._columns[_JOB, mine] = row

    def _add(self, job: Job, row: int) -> None:
        spec = job.spec
        for uuid in job.attempts[-1].gpus:
            gpu = self._gpu_row.get(uuid)
            if gpu is None:  # an adopted job may hold a GPU that has not come back
                continue
            if self._count == self._columns.shape[1]:
                self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
            self._columns[:, self._count] = row, gpu, spec.gpu_share_milli, spec.gpu_memory_mib
            self._rows.setdefault(job.number, []).append(self._count)
            self._owner.append(job.number)
            self._count += 1

    def _take_out(self, row: int) -> None:
        """The last row takes the place of one that goes."""
        self._count -= 1
        owner = self._owner.pop()
        if row != self._count:
            self._columns[:, row] = self._columns[:, self._count]
            self._owner[row] = owner
            theirs = self._rows[owner]
            theirs[theirs.index(self._count)] = row
