"""Orders that follow from what a tick made durable, sent in the order of safety.

One thing is asked for earlier: the launcher prepares starts while the tick is made, and those of preemptors
from their last victim's end on. It shows nowhere, and is taken back if nothing comes of it.

The orders are derived from each job's change, so that none can be forgotten: a new notice is a stop, a new
attempt is a start, an end is a hand-over to watch and an attempt that the launcher may forget.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from scheduler.control.handover import HandoverVerifier
from scheduler.effects.launcher import AttemptKey, Launcher, StartOrder, StopOrder
from scheduler.model.jobs import FINAL_STATES, Attempt, Job

# Each waits in a process of its own, perhaps through a long grace.
PREPARED_AHEAD_MAX = 16


class Orders:
    """What the effects are asked to do after the commit."""

    def __init__(
        self,
        launcher: Launcher,
        environment: Callable[[int], dict[str, str]],
        verifier: HandoverVerifier,
        base_environment: Mapping[str, str],
        on_gpus: Callable[[Job, tuple[str, ...]], dict[str, str]],
    ) -> None:
        """Take the effects, how to look up a job's own environment, that of every job, and that on GPUs."""
        self._launcher = launcher
        self._environment = environment
        self._verifier = verifier
        self._base_environment = base_environment
        self._on_gpus = on_gpus
        self._kills: list[AttemptKey] = []
        self._stops: list[StopOrder] = []
        self._freezes: dict[AttemptKey, bool] = {}  # else they thaw; the last word counts
        self._forgets: list[AttemptKey] = []
        self._watches: dict[str, bool] = {}  # by GPU: whether no job left it
        self._starts: list[Job] = []
        self._prepared: dict[int, StartOrder] = {}  # by job number; not started yet
        self._unkept: list[int] = []  # of these, those of a tick that is not durable yet
        self._expected: int | None = None  # of these, the one that is prepared for this tick only

    def follow(self, before: Job | None, after: Job) -> None:
        """Note the orders that follow from a job's change."""
        if after.state in FINAL_STATES:
            self._take_back(after.number)
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
            self.stop(job, now)  # which thaws it, too
        elif was is not None and (was.suspend_s is None) != (now.suspend_s is None):
            self.freeze(job, now)
        if now.notice is not None and now.acknowledged_s and (was is None or not was.acknowledged_s):
            self.kill(AttemptKey(job.id, now.number))

    def prepare(self, job: Job) -> None:
        """Have the job's newest attempt ready to start; before the tick is durable."""
        last = job.attempts[-1]
        self._prepare(job, last.number, last.gpus)

    def prepare_ahead(self, job: Job) -> None:
        """Have a pending job's next attempt ready, on whatever GPUs, for a start that is soon to come."""
        if len(self._prepared) < PREPARED_AHEAD_MAX:
            self._prepare(job, job.attempt + 1, ())

    def expect(self, job: Job) -> None:
        """Have a pending job's next attempt ready, which is likely to start in this tick."""
        self._expected = job.number
        self.prepare_ahead(job)

    def launcher_is_new(self) -> None:
        """Another launcher, or another connection: nothing is prepared any more."""
        self._prepared.clear()

    def _prepare(self, job: Job, attempt: int, gpus: tuple[str, ...]) -> None:
        key = AttemptKey(job.id, attempt)
        prepared = self._prepared.get(job.number)
        if prepared is None or prepared.key != key:
            self._take_back(job.number)
            order = self._prepared[job.number] = self._start_order(job, key, gpus)
            self._unkept.append(job.number)
            self._launcher.prepare(order)

    def _take_back(self, number: int) -> None:
        order = self._prepared.pop(number, None)
        if order is not None:
            self._launcher.forget(order.key)

    def start(self, job: Job) -> None:
        """Start the job's newest attempt (again: the launcher does it once)."""
        self._starts.append(job)

    def stop(self, job: Job, attempt: Attempt, since_s: float | None = None) -> None:
        """Stop an attempt as its notice says; its grace runs from `since_s`, None = from the decision."""
        notice = attempt.notice
        assert notice is not None
        deadline_s = notice.deadline_s
        if since_s is not None:
            deadline_s = max(deadline_s, since_s + deadline_s - notice.decided_s)
        words: dict[str, str | float] = {
            "job_id": job.id,
            "attempt": float(attempt.number),
            "reason": notice.reason.value,
            "decided_s": notice.decided_s,
            "deadline_s": deadline_s,
            "preempted_by": notice.preempted_by,
        }
        key = AttemptKey(job.id, attempt.number)
        self._freezes.pop(key, None)  # said again after a crash, say: the notice has the last word
        self._stops.append(StopOrder(key, deadline_s, words))

    def freeze(self, job: Job, attempt: Attempt) -> None:
        """Freeze an attempt, or let it run again, as was decided last."""
        self._freezes[AttemptKey(job.id, attempt.number)] = attempt.suspend_s is not None

    def kill(self, key: AttemptKey) -> None:
        """End an attempt's grace."""
        self._kills.append(key)

    def forget(self, key: AttemptKey) -> None:
        """The attempt's end is in the journal."""
        self._forgets.append(key)

    def watch(self, uuid: str, *, nobody_left: bool = False) -> None:
        """Prove that a GPU is free; `nobody_left`: no job of ours left it."""
        self._watches[uuid] = nobody_left

    def clear(self) -> None:
        """The tick was not kept: nothing follows from it but looks at GPUs, which do no harm."""
        watches = dict(self._watches)
        for number in self._unkept:
            self._take_back(number)
        self._begin()
        self._watches.update(watches)

    def _begin(self) -> None:
        for orders in (self._kills, self._stops, self._forgets, self._starts, self._unkept):
            orders.clear()
        self._expected = None
        self._watches.clear()
        self._freezes.clear()

    def send(self) -> None:
        """Send everything: stops and freezes before starts; who is started again is stopped after that."""
        starting = {AttemptKey(job.id, job.attempts[-1].number) for job in self._starts}
        later = {stop.key: stop for stop in self._stops if stop.key in starting}
        for key in self._kills:
            self._launcher.end_grace(key)
        for stop in self._stops:
            if stop.key not in later:
                self._launcher.stop(stop)
        for key, freezes in self._freezes.items():
            (self._launcher.freeze if freezes else self._launcher.thaw)(key)
        for job in self._starts:
            last = job.attempts[-1]
            key = AttemptKey(job.id, last.number)
            order = self._prepared.pop(job.number, None)
            if order is not None and order.key == key:
                order = replace(order, environment={**order.environment, **self._placed(job, last.gpus)})
            else:
                order = self._start_order(job, key, last.gpus)
            self._launcher.start(order)
            if key in later:  # a launcher takes no stop of what it does not know
                self._launcher.stop(later[key])
        if self._expected is not None:
            self._take_back(self._expected)  # unless it started
        for uuid, nobody_left in self._watches.items():
            self._verifier.watch(uuid, nobody_left=nobody_left)
        for key in self._forgets:  # nobody waits for that
            self._launcher.forget(key)
        self._begin()

    def _start_order(self, job: Job, key: AttemptKey, gpus: tuple[str, ...]) -> StartOrder:
        return StartOrder(
            key=key,
            command=job.spec.command,
            environment={
                **self._base_environment,
                **(self._environment(job.number) if job.spec.environment_digest else {}),
                **self._placed(job, gpus),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "WATTSHIFT_JOB_ID": job.id,
                "WATTSHIFT_ATTEMPT": str(key.attempt),
            },
            working_directory=job.spec.working_directory,
            stop_command=job.spec.stop_command,
        )

    def _placed(self, job: Job, gpus: tuple[str, ...]) -> dict[str, str]:
        """What a job is told of where it is."""
        names = ",".join(gpus)
        # One invalid entry would hide all behind it; an empty string hides every GPU.
        devices = {"CUDA_VISIBLE_DEVICES": names, "NVIDIA_VISIBLE_DEVICES": names or "void"}
        return {**devices, **self._on_gpus(job, gpus)}
