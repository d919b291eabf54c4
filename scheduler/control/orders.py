"""Orders that follow from what a tick made durable, sent in the order of safety.

One thing is asked for earlier: while the journal syncs, the launcher prepares the starts that the tick has
decided. It shows nowhere, and is taken back if the tick is not kept.

The orders are derived from each job's change, so that none can be forgotten: a new notice is a stop, a new
attempt is a start, an end is a hand-over to watch and an attempt that the launcher may forget.
"""

from collections.abc import Callable, Mapping

from scheduler.control.handover import HandoverVerifier
from scheduler.effects.launcher import AttemptKey, Launcher, StartOrder, StopOrder
from scheduler.model.jobs import Attempt, Job


class Orders:
    """What the effects are asked to do after the commit."""

    def __init__(
        self,
        launcher: Launcher,
        environment: Callable[[int], dict[str, str]],
        verifier: HandoverVerifier,
        base_environment: Mapping[str, str],
    ) -> None:
        """Take the effects, how to look up a job's own environment, and that of every job."""
        self._launcher = launcher
        self._environment = environment
        self._verifier = verifier
        self._base_environment = base_environment
        self._kills: list[AttemptKey] = []
        self._stops: list[StopOrder] = []
        self._forgets: list[AttemptKey] = []
        self._watches: dict[str, bool] = {}
        self._starts: list[Job] = []
        self._prepared: dict[AttemptKey, StartOrder] = {}

    def follow(self, before: Job | None, after: Job) -> None:
        """Note the orders that follow from a job's change."""
        earlier = {attempt.number: attempt for attempt in before.attempts} if before is not None else {}
        for attempt in after.attempts:  # one may end and the next begin in one tick
            self._follow_attempt(after, earlier.get(attempt.number), attempt)

    def _follow_attempt(self, job: Job, was: Attempt | None, now: Attempt) -> None:
        if now.exited_s is not None:
            if was is None or was.exited_s is None:
                self.forget(AttemptKey(job.id, now.number))
                for uuid in now.gpus if now.verified_s is None else ():
                    self.watch(uuid)
            return
        if was is None:
            self.start(job)
        if now.notice is not None and (was is None or was.notice is None):
            self.stop(job, now)
        if now.notice is not None and now.acknowledged_s and (was is None or not was.acknowledged_s):
            self.kill(AttemptKey(job.id, now.number))

    def prepare(self, job: Job) -> None:
        """Have the job's newest attempt ready to start; before the tick is durable."""
        order = self._start_order(job)
        self._prepared[order.key] = order
        self._launcher.prepare(order)

    def start(self, job: Job) -> None:
        """Start the job's newest attempt (again: the launcher does it once)."""
        self._starts.append(job)

    def stop(self, job: Job, attempt: Attempt) -> None:
        """Stop an attempt as its notice says."""
        notice = attempt.notice
        assert notice is not None
        words: dict[str, str | float] = {
            "job_id": job.id,
            "attempt": float(attempt.number),
            "reason": notice.reason.value,
            "decided_s": notice.decided_s,
            "deadline_s": notice.deadline_s,
            "preempted_by": notice.preempted_by,
        }
        self._stops.append(StopOrder(AttemptKey(job.id, attempt.number), notice.deadline_s, words))

    def kill(self, key: AttemptKey) -> None:
        """End an attempt's grace."""
        self._kills.append(key)

    def forget(self, key: AttemptKey) -> None:
        """The attempt's end is in the journal."""
        self._forgets.append(key)

    def watch(self, uuid: str, *, once: bool = False) -> None:
        """Prove that a GPU is free."""
        self._watches[uuid] = once

    def clear(self) -> None:
        """The tick was not kept: nothing follows from it."""
        for orders in (self._kills, self._stops, self._forgets, self._starts):
            orders.clear()
        self._watches.clear()
        for key in self._prepared:
            self._launcher.forget(key)
        self._prepared.clear()

    def send(self) -> None:
        """Send everything: stops before starts."""
        for key in self._kills:
            self._launcher.end_grace(key)
        for stop in self._stops:
            self._launcher.stop(stop)
        for key in self._forgets:
            self._launcher.forget(key)
        for uuid, once in self._watches.items():
            self._verifier.watch(uuid, once=once)
        for job in self._starts:
            prepared = self._prepared.pop(AttemptKey(job.id, job.attempt), None)
            self._launcher.start(self._start_order(job) if prepared is None else prepared)
        self.clear()

    def _start_order(self, job: Job) -> StartOrder:
        attempt = job.attempts[-1]
        return StartOrder(
            key=AttemptKey(job.id, attempt.number),
            command=job.spec.command,
            environment={
                **self._base_environment,
                **(self._environment(job.number) if job.spec.environment_digest else {}),
                # One invalid entry would hide all behind it; an empty string hides every GPU.
                "CUDA_VISIBLE_DEVICES": ",".join(attempt.gpus),
                "NVIDIA_VISIBLE_DEVICES": ",".join(attempt.gpus) or "void",
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "WATTSHIFT_JOB_ID": job.id,
                "WATTSHIFT_ATTEMPT": str(attempt.number),
            },
            working_directory=job.spec.working_directory,
            stop_command=job.spec.stop_command,
        )
