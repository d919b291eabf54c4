"""A simulated machine: its boards and the processes on them, as they are, whatever a daemon thinks of them.

A process works off its job's duration at the speed that its boards' limits allow; what a job has done is kept
between its attempts, and each start after the first works off the restart loss before anything else.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from scheduler.effects.launcher import AttemptKey
from scheduler.model.jobs import SHARE_MILLI_WHOLE
from scheduler.model.power import Curve
from scheduler.simulation.boards import PROCESS_MEMORY_MIB, Board, Occupant
from scheduler.simulation.virtual_time import VirtualClock

SIGKILL = 9
SIGTERM = 15
# Field 22 of /proc/<pid>/stat counts these since the boot.
_TICKS_PER_S = 100
_FIRST_PID = 1000
_MILLI = 1000
_STRANGERS_COMMAND = "python3"
_STRANGERS_USER = "somebody"


@dataclass(frozen=True, slots=True)
class Workload:
    """What a job's process does: how much work it is, what it takes, how it ends."""

    duration_s: float = math.inf  # at full speed
    exit_code: int = 0  # when the work is done
    restart_loss_s: float = 0.0  # worked off first in each attempt but the first
    draw_w: float | None = None  # per GPU; None = the largest limit
    memory_mib: int = PROCESS_MEMORY_MIB  # per GPU
    share_milli: int = SHARE_MILLI_WHOLE
    power_curve: Curve | None = None  # work against draw under a limit; None = in proportion
    stop_s: float | None = 0.0  # from SIGTERM to the exit; None = it ignores SIGTERM
    stop_exit_code: int | None = None  # None = the signal ends it
    release_s: float = 0.0  # from the exit until its GPU memory is free
    fails_after_s: float | None = None  # ends with exit code 1 after so long in an attempt
    acknowledges_s: float | None = None  # from SIGTERM until it says that it is ready to be stopped
    stuck_s: float = 0.0  # from SIGKILL to the end: it hangs in the driver
    start_error: str = ""  # no process comes to be; which `StartFailed.what` it is
    failed_starts: int = 0  # of the first attempts, those that end so


@dataclass(slots=True)
class Process:
    """One attempt's process."""

    key: AttemptKey
    pid: int
    workload: Workload
    gpus: tuple[str, ...]
    started_s: float
    start_ticks: int
    restart_left_s: float
    at_s: float  # up to when its work is counted
    speed: float = 1.0
    working: bool = True  # until it is told to go
    frozen: bool = False
    killed: bool = False
    done: asyncio.TimerHandle | None = None
    ending: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Work:
    """What a job has got done in all its attempts, in seconds at full speed."""

    useful_s: float = 0.0
    lost_s: float = 0.0  # restart losses worked off
    restarts: int = 0


OnExit = Callable[[Process, int | None, int | None], None]  # exit code, signal


@dataclass(slots=True)
class Machine:
    """Boards and processes in virtual time; they outlive daemons and launchers, but no reboot."""

    boards: Mapping[str, Board]
    clock: VirtualClock
    workload: Callable[[str], Workload]  # by job id
    work: dict[str, Work] = field(default_factory=dict)
    processes: dict[int, Process] = field(default_factory=dict)  # alive, by pid
    on_exit: OnExit | None = None
    boots: int = 0
    strangers: dict[int, str] = field(default_factory=dict)  # processes of others: pid -> the GPU it is on
    # The kernel's next choices; one that wraps gives pids of the dead again.
    pids: Iterator[int] = field(default_factory=lambda: itertools.count(_FIRST_PID))
    _left_behind: Iterator[int] = field(default_factory=lambda: itertools.count(-1, -1))

    @property
    def boot_id(self) -> str:
        """Another one after each reboot."""
        return f"boot-{self.boots}"

    def spawn(self, key: AttemptKey, gpus: tuple[str, ...]) -> Process:
        """Start an attempt's process on these boards (UUIDs of other machines are not seen)."""
        now_s = self.clock.true_s()
        workload = self.workload(key.job_id)
        work = self.work.get(key.job_id)
        again = work is not None
        if work is None:
            work = self.work[key.job_id] = Work()
        else:
            work.restarts += 1
        process = Process(
            key=key,
            pid=self._free_pid(),
            workload=workload,
            gpus=gpus,
            started_s=now_s,
            start_ticks=round(asyncio.get_running_loop().time() * _TICKS_PER_S),
            restart_left_s=workload.restart_loss_s if again else 0.0,
            at_s=now_s,
        )
        self.processes[process.pid] = process
        occupant = Occupant(
            process.pid,
            command=key.job_id,
            memory_mib=workload.memory_mib,
            share_milli=workload.share_milli,
            draw_w=workload.draw_w,
        )
        for uuid in gpus:
            self.boards[uuid].put(occupant, now_s)
        self._speeds_changed(gpus)
        if not gpus:
            self._await_done(process)
        if workload.fails_after_s is not None:
            process.ending = asyncio.get_running_loop().call_later(
                workload.fails_after_s, self._end, process, 1, None
            )
        return process

    def terminate(self, process: Process) -> None:
        """SIGTERM: it works no more, and ends when it likes."""
        if process.pid not in self.processes or not process.working or process.killed:
            return
        stop_s = process.workload.stop_s
        if stop_s is None:
            return
        self.thaw(process)
        self._count(process)
        process.working = False
        self._stop_timers(process)
        code = process.workload.stop_exit_code
        signal = SIGTERM if code is None else None
        process.ending = asyncio.get_running_loop().call_later(stop_s, self._end, process, code, signal)

    def freeze(self, process: Process) -> None:
        """It works no more for now; its boards draw what a context does."""
        self._set_frozen(process, frozen=True)

    def thaw(self, process: Process) -> None:
        """It works again."""
        self._set_frozen(process, frozen=False)

    def _set_frozen(self, process: Process, *, frozen: bool) -> None:
        if process.pid not in self.processes or process.frozen is frozen:
            return
        self._count(process)
        process.frozen = frozen
        now_s = self.clock.true_s()
        for uuid in process.gpus:
            board = self.boards[uuid]
            (occupant,) = (one for one in board.occupants if one.pid == process.pid)
            board.put(replace(occupant, is_frozen=frozen), now_s)
        self._speeds_changed(process.gpus)
        if not process.gpus:
            self._await_done(process)

    def kill(self, process: Process) -> None:
        """SIGKILL: it works no more, and ends when the kernel can end it."""
        if process.pid not in self.processes or process.killed:
            return
        process.killed = True
        stuck_s = process.workload.stuck_s
        if not stuck_s:
            self._end(process, None, SIGKILL)
            return
        self._count(process)
        process.working = False
        self._stop_timers(process)
        process.ending = asyncio.get_running_loop().call_later(stuck_s, self._end, process, None, SIGKILL)

    def fail(self, process: Process, exit_code: int = 1) -> None:
        """It ends by itself, for reasons of its own."""
        if process.pid in self.processes and not process.killed:
            self._end(process, exit_code, None)

    def intrude(self, uuid: str, memory_mib: int = PROCESS_MEMORY_MIB) -> int:
        """A process that nobody here started comes onto a GPU; returns its pid."""
        pid = self._free_pid()
        self.strangers[pid] = uuid
        self.boards[uuid].put(
            Occupant(pid, _STRANGERS_COMMAND, _STRANGERS_USER, memory_mib), self.clock.true_s()
        )
        self._speeds_changed((uuid,))
        return pid

    def leave(self, pid: int) -> None:
        """A process that nobody here started ends."""
        uuid = self.strangers.pop(pid, None)
        if uuid is not None:
            self.boards[uuid].remove(pid, self.clock.true_s())
            self._speeds_changed((uuid,))

    def set_power_limit(self, uuid: str, power_limit_w: float) -> None:
        """Limit a board; who works on it slows down with it."""
        self.boards[uuid].set_power_limit(power_limit_w, self.clock.true_s())
        self._speeds_changed((uuid,))

    def useful_s(self, job_id: str) -> float:
        """Seconds of useful work that the job has got done until now."""
        for process in self.processes.values():
            if process.key.job_id == job_id:
                self._count(process)
        work = self.work.get(job_id)
        return work.useful_s if work else 0.0

    def settle(self) -> None:
        """Count the work of all that runs until now."""
        for process in self.processes.values():
            self._count(process)

    @property
    def is_endless(self) -> bool:
        """Whether nothing that runs would ever end by itself."""
        return all(p.done is None and p.ending is None for p in self.processes.values())

    def reboot(self) -> None:
        """Every process is gone at once and says nothing; the boards' counters begin anew."""
        now_s = self.clock.true_s()
        for process in list(self.processes.values()):
            self._count(process)
            self._stop_timers(process)
        self.processes.clear()
        self.strangers.clear()
        for board in self.boards.values():
            for occupant in board.occupants:
                board.remove(occupant.pid, now_s)
            board.restart(now_s)
        self.boots += 1

    def _free_pid(self) -> int:
        return next(pid for pid in self.pids if pid not in self.processes and pid not in self.strangers)

    def _speeds_changed(self, uuids: tuple[str, ...]) -> None:
        """Count what was done at the old speed, and say anew when each will be done."""
        touched = {o.pid for uuid in uuids for o in self.boards[uuid].occupants}
        for pid in sorted(touched):
            process = self.processes.get(pid)
            if process is not None:
                self._count(process)
                draw = min((self.boards[uuid].draw_ratio for uuid in process.gpus), default=1.0)
                process.speed = speed_at(process.workload.power_curve, draw)
                self._await_done(process)

    def _await_done(self, process: Process) -> None:
        if process.done is not None:
            process.done.cancel()
            process.done = None
        left_s = process.workload.duration_s - self.work[process.key.job_id].useful_s
        if process.working and not process.frozen and math.isfinite(left_s):
            wait_s = (process.restart_left_s + max(0.0, left_s)) / process.speed
            process.done = asyncio.get_running_loop().call_later(wait_s, self._worked_off, process)

    def _worked_off(self, process: Process) -> None:
        self._end(process, process.workload.exit_code, None)

    def _count(self, process: Process) -> None:
        """Count the work since the last count: the restart loss first."""
        now_s = self.clock.true_s()
        did_s = max(0.0, now_s - process.at_s) * process.speed if process.working else 0.0
        did_s = 0.0 if process.frozen else did_s
        process.at_s = now_s
        lost_s = min(did_s, process.restart_left_s)
        process.restart_left_s -= lost_s
        work = self.work[process.key.job_id]
        work.lost_s += lost_s
        work.useful_s += did_s - lost_s

    def _end(self, process: Process, exit_code: int | None, signal: int | None) -> None:
        self._count(process)
        self._stop_timers(process)
        process.working = False
        del self.processes[process.pid]
        now_s, release_s = self.clock.true_s(), process.workload.release_s
        for uuid in process.gpus:
            board = self.boards[uuid]
            board.remove(process.pid, now_s)
            if release_s:
                # Its pid may soon be another's.
                memory_mib = process.workload.memory_mib
                left = Occupant(next(self._left_behind), memory_mib=memory_mib, is_listed=False)
                board.put(left, now_s)
                asyncio.get_running_loop().call_later(release_s, self._release, board, left.pid)
        self._speeds_changed(process.gpus)
        if self.on_exit is not None:
            self.on_exit(process, exit_code, signal)

    def _release(self, board: Board, pid: int) -> None:
        board.remove(pid, self.clock.true_s())

    @staticmethod
    def _stop_timers(process: Process) -> None:
        for timer in (process.done, process.ending):
            if timer is not None:
                timer.cancel()
        process.done = process.ending = None


def speed_at(curve: Curve | None, draw_ratio: float) -> float:
    """How fast work proceeds at a part of the natural draw; in proportion below the curve's last point."""
    if curve is None or draw_ratio >= 1.0:
        return draw_ratio
    least_draw, least_work = curve.points[-1]
    draw_milli = draw_ratio * _MILLI
    if draw_milli < least_draw:
        return draw_milli / least_draw * least_work / _MILLI
    return curve.work_milli(round(draw_milli)) / _MILLI
