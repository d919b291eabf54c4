"""The effects of a node whose machine is simulated: launcher, GPUs, processes, each behind its Protocol."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from scheduler.effects.gpus import GpuReadings
from scheduler.effects.launcher import (
    AttemptKey,
    Exited,
    HeldAttempt,
    LauncherGone,
    LauncherHello,
    Report,
    Signalled,
    Started,
    StartOrder,
    StopOrder,
)
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuLimit, GpuProcess
from scheduler.simulation.boards import DRIVER_VERSION, Board
from scheduler.simulation.machine import Machine, Process

# From the order to the program's first line, as measured on a quiet machine.
START_S = 0.002


class SimulatedLauncher:
    """Starts and ends a machine's processes; outlives the daemon. Serves the Protocol `Launcher`."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine; the launcher hears of each end there."""
        self._machine = machine
        machine.on_exit = self._exited
        self._generation = 1
        self._on_report: Callable[[Report], None] | None = None
        self._held: dict[AttemptKey, list[Report]] = {}
        self._running: dict[AttemptKey, Process] = {}
        self._timers: dict[AttemptKey, list[asyncio.TimerHandle]] = {}
        self._deadlines: dict[AttemptKey, float] = {}
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
        if order.key in self._held:
            return
        self._held[order.key] = []
        self._begun.add((order.key.job_id, order.key.attempt))
        named = order.environment["CUDA_VISIBLE_DEVICES"]
        gpus = tuple(named.split(",")) if named else ()
        self._later(order.key, START_S, self._spawn, order.key, gpus)

    def stop(self, order: StopOrder) -> None:
        left_s = max(0.0, order.deadline_s - self._machine.clock.now_s())
        loop = asyncio.get_running_loop()
        if order.key not in self._held or loop.time() + left_s >= self._deadlines.get(
            order.key, float("inf")
        ):
            return
        self._deadlines[order.key] = loop.time() + left_s
        self._later(order.key, left_s, self.end_grace, order.key)
        if not any(isinstance(report, Signalled) for report in self._held[order.key]):
            self._later(order.key, 0.0, self._signal, order.key)

    def end_grace(self, key: AttemptKey) -> None:
        process = self._running.get(key)
        if process is not None:
            self._machine.kill(process)

    def forget(self, key: AttemptKey) -> None:
        self._cancel(key)
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
        self._deadlines.clear()
        self._generation += 1

    def _spawn(self, key: AttemptKey, gpus: tuple[str, ...]) -> None:
        process = self._running[key] = self._machine.spawn(key, gpus)
        self._report(Started(key, self._machine.clock.now_s(), process.pid, process.start_ticks))

    def _signal(self, key: AttemptKey) -> None:
        self._report(Signalled(key, self._machine.clock.now_s()))
        process = self._running.get(key)
        if process is not None:
            self._machine.terminate(process)

    def _exited(self, process: Process, exit_code: int | None, signal: int | None) -> None:
        if self._running.pop(process.key, None) is None:
            return
        self._cancel(process.key)
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
            samples=tuple(replace(board.sample(true_s), at_s=now_s) for board in boards),
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


class MachineProcesses:
    """A machine's processes, each a tree of one. Serves the Protocol `Processes`."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine."""
        self._machine = machine

    def belongs_to(self, pid: int, main_pid: int, main_start_ticks: int) -> bool:  # noqa: ARG002
        # No PID is used again.
        return pid == main_pid

    def end(self, process: GpuProcess, *, at_once: bool) -> bool:
        found = self._machine.processes.get(process.pid)
        if found is not None:
            self._machine.kill(found) if at_once else self._machine.terminate(found)
        return True

    def named(self, pids: tuple[int, ...]) -> tuple[GpuProcess, ...]:
        return tuple(GpuProcess(pid) for pid in pids)

    def openers(self, device: str) -> tuple[GpuProcess, ...]:  # noqa: ARG002 (its devices are no files)
        return ()

    def knows_host_pids(self) -> bool:
        return True
