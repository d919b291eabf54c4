"""Who is on the GPUs, as events: proofs of hand-overs, quarantines that end, processes that are not ours."""

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from scheduler.control.board import describe
from scheduler.control.forecast import Forecast
from scheduler.control.handover import GpuFacts, Look
from scheduler.control.inbox import HandoverResult
from scheduler.effects.launcher import AttemptKey, TreeStuck
from scheduler.model.events import AttemptVerified, GpuMarked, GpuUnmarked
from scheduler.model.gpus import GpuHolders, GpuIdentity, GpuProcess, GpuState
from scheduler.model.jobs import JobState
from scheduler.model.reasons import Reason
from scheduler.model.settings import ForeignAction

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

log = logging.getLogger("wattshift.occupancy")

# Quarantines of GPUs that are well: only somebody was left on them. They end when nobody is.
_UNTIL_FREE = frozenset({Reason.HANDOVER_TIMED_OUT, Reason.PROCESS_TREE_STUCK})
# Of a GPU that takes its time, and while nobody has the driver open.
LATE = frozenset({"ERROR_TIMEOUT", "ERROR_UNINITIALIZED"})
_GOING = frozenset({JobState.PREEMPTING, JobState.STOPPING})


class Occupancy:
    """Takes what was seen on the GPUs; ends strangers where the policy says so."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self.forecast = Forecast(controller.ledger, controller.board)
        # By GPU, PID and start: strangers that were asked to end.
        self._asked: dict[str, set[tuple[int, int]]] = {}
        self._not_permitted: dict[str, str] = {}  # by GPU
        self._stuck: dict[AttemptKey, TreeStuck] = {}  # trees that SIGKILL has not ended yet
        self._verified_s: dict[str, float] = {}  # by GPU: what was seen before is of those who are gone

    def facts(self) -> GpuFacts:
        """What a hand-over is judged by."""
        control = self._control
        return GpuFacts(
            foreign=lambda: control.config.foreign,
            empty_mib=control.board.empty_mib,
            is_held=self._is_held,
            is_foreign=self._is_foreign,
            openers=self._openers,
        )

    def _is_held(self, uuid: str, pid: int) -> bool:
        """Whether the process belongs to a live job that holds the GPU."""
        return any(
            last.pid is not None
            and self._control.effects.processes.belongs_to(pid, last.pid, last.pid_start_ticks or 0)
            for last in (job.attempts[-1] for job in self._control.board.holders(uuid))
        )

    def _is_foreign(self, uuid: str, process: GpuProcess) -> bool:
        named = {(one.pid, one.start_ticks) for one in self._control.board.foreign.get(uuid, ())}
        return process.pid > 0 and (process.pid, process.start_ticks) in named

    async def _openers(self, uuid: str) -> tuple[GpuProcess, ...]:
        minors = (gpu.minor_number for gpu in self._control.board.identities if gpu.uuid == uuid)
        minor = next(minors, None)
        if minor is None:
            return ()
        return await asyncio.to_thread(self._control.effects.processes.openers, f"/dev/nvidia{minor}")

    # Hand-overs -------------------------------------------------------------------------------

    def fresh(self, fresh: tuple[GpuIdentity, ...]) -> None:
        """GPUs that are new, or back: nobody knows who is on them."""
        control = self._control
        self.forecast.recall(fresh)
        for gpu in fresh:
            self.prove_again(gpu.uuid)
        if fresh:
            control.standing.reload()

    def vanished(self, now_s: float) -> None:
        """What a new MIG layout ended is free of whoever left it: nobody can be on it."""
        control = self._control
        for uuid in sorted(control.board.vanished):
            control.verifier.forget(uuid)
            mark = control.ledger.marks.get(uuid)
            if mark is not None and mark.reason in _UNTIL_FREE:
                control.ledger.apply(GpuUnmarked(now_s, uuid, Reason.GPU_RECOVERED))
            self._verify(uuid, now_s)

    def silent(self, uuids: frozenset[str]) -> None:
        """GPUs that do not answer any more: nobody knows who will be on them when they do."""
        for uuid in sorted(uuids):
            if self._control.board.is_present(uuid):
                self.prove_again(uuid)

    def unseen(self, uuid: str, code: str) -> None:
        """A routine look failed. What is only late is silent soon; else nobody knows who is on the GPU."""
        control = self._control
        if code in LATE or control.board.is_held(uuid) or uuid in control.ledger.marks:
            return
        if not control.verifier.is_watched(uuid):
            self.prove_again(uuid)

    def prove_again(self, uuid: str) -> None:
        """Give the GPU to nobody before it is proved free; who is on it and not ours is foreign at once."""
        control = self._control
        control.board.doubt(uuid)
        is_left = control.board.is_left(uuid)
        # Where jobs fill it and none left there is nothing to prove before one does.
        if is_left or control.board.has_room(uuid):
            # What a job left before a restart of ours has the time that it always has; and a process of one
            # that starts may be listed before the launcher tells its PID.
            control.orders.watch(uuid, nobody_left=not is_left and not control.board.is_held(uuid))

    def forget(self, known: frozenset[str]) -> None:
        """Remember nothing of other GPUs than these."""
        for of_gpus in (self._asked, self._not_permitted, self._verified_s):
            for uuid in of_gpus.keys() - known:
                of_gpus.pop(uuid)

    def clock_was_set_back(self, now_s: float) -> None:
        """Reckon from now on where it was from a time that is still to come."""
        self._verified_s = {uuid: min(at_s, now_s) for uuid, at_s in self._verified_s.items()}
        for key, report in self._stuck.items():
            self._stuck[key] = replace(report, at_s=min(report.at_s, now_s))

    def handover(self, result: HandoverResult, now_s: float) -> None:
        """A GPU is proved free, or could not be in time."""
        control, uuid, look = self._control, result.uuid, result.look
        if look is not None and look.free:
            self._is_free(uuid, look, now_s)
            return
        mark = control.ledger.marks.get(uuid)
        is_foreign = mark is None and not control.board.is_left(uuid)
        if look is not None and look.strangers and (look.freed or is_foreign):
            # Nothing of ours is left there.
            self._verify(uuid, now_s)
            control.board.foreign[uuid] = look.strangers
        elif mark is None:
            failure = f"it can't be read: {result.error}"
            found = failure if look is None else f"still held by {_left(look)}"
            self._mark(uuid, Reason.HANDOVER_TIMED_OUT, found, now_s)

    def _is_free(self, uuid: str, look: Look, now_s: float) -> None:
        control = self._control
        control.board.foreign.pop(uuid, None)
        holders = control.board.holders(uuid)
        if not holders and look.memory_used_mib is not None:
            control.board.learn_baseline(uuid, look.memory_used_mib - look.ignored_mib, now_s)
        self._verify(uuid, now_s)
        mark = control.ledger.marks.get(uuid)
        if (
            mark is not None
            and mark.reason in _UNTIL_FREE
            and not any(job.state in _GOING for job in holders)
        ):
            control.ledger.apply(GpuUnmarked(now_s, uuid, Reason.GPU_RECOVERED))
            log.warning("GPU %s is free at last; it was quarantined: %s", uuid, mark.detail)

    def _verify(self, uuid: str, now_s: float) -> None:
        self._verified_s[uuid] = now_s
        for job_id, attempt in self._control.board.prove(uuid):
            job = self._control.ledger.by_id(job_id)
            if job is not None:
                self.forecast.learn(job, attempt, now_s)
            self._control.ledger.apply(AttemptVerified(now_s, job_id, attempt))

    def _mark(self, uuid: str, reason: Reason, detail: str, now_s: float) -> None:
        self._control.ledger.apply(GpuMarked(now_s, uuid, GpuState.QUARANTINED.value, reason, detail))
        log.error("GPU %s is quarantined: %s", uuid, detail)

    def stuck(self, report: TreeStuck) -> None:
        """Note that SIGKILL did not end a job's tree; the driver may only take its time with it."""
        self._stuck[report.key] = report

    def read(self, now_s: float) -> None:
        """Quarantine the GPUs of trees that have had all the time that a hand-over may take."""
        control = self._control
        for key, report in list(self._stuck.items()):
            job = control.ledger.by_key(key.job_id, key.attempt)
            if job is not None and now_s - report.at_s < control.config.policy.handover_timeout_s:
                continue
            del self._stuck[key]
            for uuid in () if job is None else job.attempts[-1].gpus:
                if uuid not in control.ledger.marks:
                    who = describe(control.effects.processes.named(report.pids))
                    detail = f"SIGKILL did not end {who} of job {key.job_id}"
                    self._mark(uuid, Reason.PROCESS_TREE_STUCK, detail, now_s)

    # Routine looks ----------------------------------------------------------------------------

    def seen(self, holders: GpuHolders, now_s: float) -> None:
        """A routine look: who is there that Wattshift did not start."""
        control, uuid = self._control, holders.uuid
        is_old = holders.at_s < self._verified_s.get(uuid, 0.0)
        # A job's process may be listed before the launcher told its PID.
        if is_old or any(job.attempts[-1].pid is None for job in control.board.holders(uuid)):
            return
        look = control.verifier.judge(uuid, holders)
        self._evict(uuid, look.strangers)
        if control.verifier.is_watched(uuid):
            return  # a hand-over runs; its own looks decide
        mark = control.ledger.marks.get(uuid)
        if (mark is not None and mark.reason in _UNTIL_FREE) or self._control.board.is_left(uuid):
            if look.free or look.freed:
                self.handover(HandoverResult(uuid, look, ""), now_s)
        elif look.strangers:
            control.board.foreign[uuid] = look.strangers
        elif uuid in control.board.foreign:
            control.orders.watch(uuid)  # what they held must be back, too

    def _evict(self, uuid: str, strangers: tuple[GpuProcess, ...]) -> None:
        """End those whom the policy sends away: asked at the first look, made to at the next."""
        control, rules = self._control, self._control.config.foreign
        unwanted = [p for p in strangers if p.pid and rules.action(p.user, p.command) is ForeignAction.EVICT]
        asked = self._asked.pop(uuid, set())
        failure = ""
        if unwanted and not control.effects.processes.knows_host_pids():
            failure = f"{describe(tuple(unwanted))}: PIDs can't be trusted in this PID namespace"
            unwanted = []
        for process in unwanted:
            name = (process.pid, process.start_ticks)
            if not control.effects.processes.end(process, at_once=name in asked):
                failure = f"no permission to end {describe((process,))}"
            self._asked.setdefault(uuid, set()).add(name)
        if failure:
            self._not_permitted[uuid] = failure
        else:
            self._not_permitted.pop(uuid, None)
        if self._not_permitted:
            control.problems["evict"] = "; ".join(
                f"GPU {gpu}: {text}" for gpu, text in sorted(self._not_permitted.items())
            )
        else:
            control.problems.pop("evict", None)


def _left(look: Look) -> str:
    """What keeps a GPU from being free, in words."""
    if look.strangers:
        return describe(look.strangers)
    used = f"{look.memory_used_mib} MiB in use and no process to name"
    return f"{used}; it is open in {describe(look.holding)}" if look.holding else used
