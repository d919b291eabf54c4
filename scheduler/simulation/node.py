"""The effects of a node whose machine is simulated: launcher, GPUs, processes, each behind its Protocol."""

import asyncio
import errno
import math
import os
from collections.abc import Callable
from dataclasses import replace

from scheduler.effects.gpus import GpuReadings
from scheduler.effects.launcher import (
    Acknowledged,
    AttemptKey,
    Exited,
    Frozen,
    HeldAttempt,
    LauncherGone,
    LauncherHello,
    Report,
    Signalled,
    Started,
    StartFailed,
    StartOrder,
    StopOrder,
    Thawed,
    TreeStuck,
)
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuLimit, GpuProcess, GpuSample
from scheduler.simulation.boards import DRIVER_VERSION, Board
from scheduler.simulation.machine import Machine, Process

# From the order to the program's first line, as measured on a quiet machine.
START_S = 0.002
# From the order to the last process that is stopped.
FREEZE_S = 0.003
# From a SIGKILL that did not help to the report of it.
STUCK_S = 5.0


class SimulatedLauncher:
    """Starts and ends a machine's processes; outlives the daemon. Serves the Protocol `Launcher`."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine; the launcher hears of each end there."""
        self._machine = machine
        self.start_s = START_S
        machine.on_exit = self._exited
        self._generation = 1
        self._on_report: Callable[[Report], None] | None = None
        self._held: dict[AttemptKey, list[Report]] = {}
        self._running: dict[AttemptKey, Process] = {}
        self._timers: dict[AttemptKey, list[asyncio.TimerHandle]] = {}
        self._deadlines: dict[AttemptKey, float] = {}
        self._frozen: set[AttemptKey] = set()  # or about to be
        self._begun: set[tuple[str, int]] = set()

    def was_begun(self, job_id: str, attempt: int) -> bool:
        """Whether an order to start the attempt ever came."""
        return (job_id, attempt) in self._begun

    async def connect(self, on_report: Callable[[Report], None]) -> LauncherHello:
        self._on_report = on_report
        held = tuple(HeldAttempt(key, tuple(reports)) for key, reports in self._held.items())
        return LauncherHello(f"launcher-{self._generation}", self._machine.boot_id, 1, "simulated", held)

    def prepare(self, order: StartOrder) -> None:
        pass  # nothing of it would show

    def start(self, order: StartOrder) -> None:
        if self._on_report is None or order.key in self._held:
            return  # nobody is connected, or it was said before
        self._held[order.key] = []
        self._begun.add((order.key.job_id, order.key.attempt))
        named = order.environment["CUDA_VISIBLE_DEVICES"]
        gpus = tuple(named.split(",")) if named else ()
        self._later(order.key, self.start_s, self._spawn, order.key, gpus)

    def stop(self, order: StopOrder) -> None:
        key, loop = order.key, asyncio.get_running_loop()
        left_s = max(0.0, order.deadline_s - self._machine.clock.now_s())
        deadline_s = loop.time() + left_s
        if self._on_report is None or not self._is_held(key):
            return
        if deadline_s >= self._deadlines.get(key, math.inf):
            return
        self._deadlines[key] = deadline_s
        if left_s > 0.0:
            self._later(key, left_s, self._kill, key)
        self._give_notice(key)
        if left_s <= 0.0:
            self._kill(key)

    def freeze(self, key: AttemptKey) -> None:
        if self._on_report is None or not self._is_held(key) or key in self._deadlines:
            return  # a notice is to be heard
        if key in self._running and key not in self._frozen:
            self._frozen.add(key)
            self._later(key, FREEZE_S, self._freeze, key)

    def thaw(self, key: AttemptKey) -> None:
        if self._on_report is not None:
            self._thaw(key)

    def _freeze(self, key: AttemptKey) -> None:
        if key in self._frozen and key in self._running:
            self._machine.freeze(self._running[key])
            self._report_last(Frozen(key, self._machine.clock.now_s()))

    def _thaw(self, key: AttemptKey) -> None:
        if key in self._frozen and key in self._running:
            self._machine.thaw(self._running[key])
            self._report_last(Thawed(key, self._machine.clock.now_s()))
        self._frozen.discard(key)

    def _report_last(self, report: Frozen | Thawed) -> None:
        """Report what makes the earlier ones of its kind needless."""
        held = self._held[report.key]
        held[:] = [one for one in held if not isinstance(one, Frozen | Thawed)]
        self._report(report)

    def end_grace(self, key: AttemptKey) -> None:
        if self._on_report is not None:
            self._kill(key)

    def forget(self, key: AttemptKey) -> None:
        if self._on_report is not None and not self._is_held(key):  # what is not over is not forgotten
            self._held.pop(key, None)
            self._deadlines.pop(key, None)

    async def close(self) -> None:
        self._on_report = None

    def leave(self) -> None:
        """The daemon is gone without a word; its jobs go on and their reports are kept."""
        self._on_report = None

    def die(self) -> None:
        """The launcher ends and takes all its processes along; another answers from now on."""
        for process in list(self._running.values()):
            self._running.pop(process.key)
            self._machine.kill(process)
        self._forget_all()
        self.hang_up()

    def hang_up(self) -> None:
        """The connection breaks: nothing is told and no order comes until the next."""
        if self._on_report is not None:
            on_report, self._on_report = self._on_report, None
            on_report(LauncherGone(self._machine.clock.now_s()))

    def reboot(self) -> None:
        """The machine starts anew, and nobody hears of what ran on it."""
        self._on_report = None
        self._running.clear()
        self._forget_all()
        self._machine.reboot()

    def _forget_all(self) -> None:
        for key in list(self._timers):
            self._cancel(key)
        self._held.clear()
        self._frozen.clear()
        self._deadlines.clear()
        self._generation += 1

    def _is_held(self, key: AttemptKey) -> bool:
        """Whether the attempt is held and not over."""
        reports = self._held.get(key)
        return reports is not None and not any(isinstance(one, Exited | StartFailed) for one in reports)

    def _spawn(self, key: AttemptKey, gpus: tuple[str, ...]) -> None:
        workload = self._machine.workload(key.job_id)
        if key.attempt <= workload.failed_starts:
            self._fail(key, workload.start_error, errno.ENOENT)
            return
        process = self._running[key] = self._machine.spawn(key, gpus)
        self._report(Started(key, self._machine.clock.now_s(), process.pid, process.start_ticks))
        self._give_notice(key)

    def _fail(self, key: AttemptKey, what: str, number: int) -> None:
        message = f"{what}: {os.strerror(number)}"
        self._report(StartFailed(key, self._machine.clock.now_s(), what, number, message))

    def _give_notice(self, key: AttemptKey) -> None:
        """Signal once, as soon as there is a stop and somebody to be told of it."""
        process = self._running.get(key)
        if process is None or key not in self._deadlines:
            return
        if any(isinstance(report, Signalled) for report in self._held[key]):
            return
        self._thaw(key)
        self._report(Signalled(key, self._machine.clock.now_s()))
        self._machine.terminate(process)
        acknowledges_s = process.workload.acknowledges_s
        if acknowledges_s is not None:
            self._later(key, acknowledges_s, self._acknowledged, key)

    def _acknowledged(self, key: AttemptKey) -> None:
        self._report(Acknowledged(key, self._machine.clock.now_s()))
        self._kill(key)

    def _kill(self, key: AttemptKey) -> None:
        if not self._is_held(key):
            return
        process = self._running.get(key)
        if process is None:  # it was about to start
            self._cancel(key)
            self._fail(key, "fork", errno.ECANCELED)
            return
        self._machine.kill(process)
        if key in self._running:
            self._later(key, STUCK_S, self._stuck, process)

    def _stuck(self, process: Process) -> None:
        if any(isinstance(report, TreeStuck) for report in self._held[process.key]):
            return
        self._report(TreeStuck(process.key, self._machine.clock.now_s(), (process.pid,)))

    def _exited(self, process: Process, exit_code: int | None, signal: int | None) -> None:
        if self._running.pop(process.key, None) is None:
            return
        self._cancel(process.key)
        self._frozen.discard(process.key)
        self._report(Exited(process.key, self._machine.clock.now_s(), exit_code, signal))

    def _report(self, report: Report) -> None:
        assert not isinstance(report, LauncherGone)
        if report.key not in self._held:
            return
        self._held[report.key].append(report)
        if self._on_report is not None:
            self._on_report(report)

    def _later(self, key: AttemptKey, delay_s: float, act: Callable[..., None], *args: object) -> None:
        timer = asyncio.get_running_loop().call_later(delay_s, act, *args)
        self._timers.setdefault(key, []).append(timer)

    def _cancel(self, key: AttemptKey) -> None:
        for timer in self._timers.pop(key, ()):
            timer.cancel()


class MachineGpus:
    """A machine's boards as a driver shows them. Serves the Protocol `Gpus`."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine; nobody samples before `start`."""
        self._machine = machine
        self._released = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> GpuReadings:
        self._task = asyncio.get_running_loop().create_task(self._sample(on_readings, period_s))
        return self.readings()

    async def holders(self, uuid: str) -> GpuHolders:
        return replace(self._board(uuid).holders(self._machine.clock.true_s()), at_s=self._now_s())

    async def set_power_limit(self, uuid: str, power_limit_w: float) -> GpuLimit:
        self._board(uuid)
        self._machine.set_power_limit(uuid, power_limit_w)
        return GpuLimit(power_limit_w, power_limit_w)

    async def release(self) -> None:
        self._released = True

    async def acquire(self) -> None:
        self._released = False

    async def close(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Whoever sampled is gone."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def readings(self) -> GpuReadings:
        """A round of readings now."""
        true_s, now_s = self._machine.clock.true_s(), self._now_s()
        boards = self._machine.boards.values()
        return GpuReadings(
            identities=tuple(board.identity for board in boards),
            samples=tuple(_seen_at(board.sample(true_s), now_s) for board in boards),
            errors={},
            driver_version=DRIVER_VERSION,
        )

    async def _sample(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            if not self._released:
                on_readings(self.readings())

    def _board(self, uuid: str) -> Board:
        board = self._machine.boards.get(uuid)
        if board is None or self._released:
            raise GpuReadError("ERROR_NOT_FOUND", f"no simulated GPU {uuid}")
        return board

    def _now_s(self) -> float:
        return self._machine.clock.now_s()


def _seen_at(sample: GpuSample, now_s: float) -> GpuSample:
    """The sample with the time that the daemon's clock tells."""
    return sample if sample.at_s == now_s else replace(sample, at_s=now_s)


class MachineProcesses:
    """A machine's processes, each a tree of one. Serves the Protocol `Processes`."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine."""
        self._machine = machine

    def belongs_to(self, pid: int, main_pid: int, main_start_ticks: int) -> bool:
        found = self._machine.processes.get(pid)
        return found is not None and pid == main_pid and found.start_ticks == main_start_ticks

    def end(self, process: GpuProcess, *, at_once: bool) -> bool:
        found = self._machine.processes.get(process.pid)
        if found is not None:
            self._machine.kill(found) if at_once else self._machine.terminate(found)
        self._machine.leave(process.pid)
        return True

    def named(self, pids: tuple[int, ...]) -> tuple[GpuProcess, ...]:
        return tuple(GpuProcess(pid) for pid in pids)

    def openers(self, device: str) -> tuple[GpuProcess, ...]:  # noqa: ARG002 (its devices are no files)
        return ()

    def knows_host_pids(self) -> bool:
        return True
