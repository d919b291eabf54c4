"""What goes wrong in a world, fault by fault, as its script says."""

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

from scheduler.model.gpus import GpuEvent
from scheduler.simulation.faults import Crashed
from tests.simulation.script import Fault

if TYPE_CHECKING:
    from tests.simulation.world import World

# A GPU that fell off the bus takes its processes along after a moment.
_LOST_PROCESS_S = 0.3
# XIDs of which whoever was on the GPU dies, and of these the ones after which the driver wants something.
_DEADLY = (13, 31, 94, 48, 95, 119, 79)
_WANTING = (48, 95, 119, 79)


class Troubles:
    """Lets faults happen: a method for each kind, which returns what ends it where it lasts."""

    def __init__(self, world: "World") -> None:
        """Take the world that they befall."""
        self._world = world

    async def befall(self, fault: Fault) -> None:
        """Wait for its moment, let it happen, and end it where it lasts."""
        await asyncio.sleep(fault.at_s)
        begin = getattr(self, f"_{fault.kind}")
        self._world.say(f"FAULT {fault}")
        end = begin(fault)
        if end is not None:
            await asyncio.sleep(fault.for_s)
            end()
            self._world.say(f"{fault.kind} is over")

    def _nvml_fails(self, fault: Fault) -> Any:
        uuid = self._world.gpus[fault.gpu]
        self._world.faults.failing[uuid] = fault.word
        if fault.word == "ERROR_RESET_REQUIRED":
            self._world.invariants.stops.hurt(uuid)
        return lambda: self._world.faults.failing.pop(uuid, None)

    def _nvml_hangs(self, fault: Fault) -> Any:
        uuid = self._world.gpus[fault.gpu]
        self._world.faults.hanging.add(uuid)
        return lambda: self._world.faults.hanging.discard(uuid)

    def _limit_not_taken(self, fault: Fault) -> Any:
        uuid = self._world.gpus[fault.gpu]
        self._world.faults.deaf[uuid] = bool(fault.number)

        def end() -> None:
            self._world.faults.deaf.pop(uuid, None)
            self._world.invariants.watts.takes_limits_again(uuid)

        return end

    def _nvml_slow(self, fault: Fault) -> Any:
        uuid, faults = self._world.gpus[fault.gpu], self._world.faults
        faults.slow_s[uuid] = fault.number / 1e3
        return lambda: faults.slow_s.pop(uuid, None)

    def _launcher_hears_twice(self, fault: Fault) -> Any:
        self._world.faults.is_heard_twice = True
        return lambda: setattr(self._world.faults, "is_heard_twice", False)

    def _driver_hangs(self, fault: Fault) -> Any:
        self._world.faults.is_driver_hanging = True
        return lambda: setattr(self._world.faults, "is_driver_hanging", False)

    def _gpu_lost(self, fault: Fault) -> Any:
        uuid = self._world.gpus[fault.gpu]
        self._world.faults.lost[uuid] = bool(fault.number)
        self._world.invariants.stops.hurt(uuid)
        asyncio.get_running_loop().call_later(_LOST_PROCESS_S, self._fail_processes, uuid)
        return lambda: self._world.faults.lost.pop(uuid, None)

    def _fail_processes(self, uuid: str) -> None:
        for process in list(self._world.machine.processes.values()):
            if uuid in process.gpus:
                self._world.machine.fail(process)

    def _xid(self, fault: Fault) -> Any:
        uuid = self._world.gpus[fault.gpu]
        self._world.faults.events.append(GpuEvent(uuid, self._world.clock.now_s(), "xid", fault.number))
        self._world.invariants.stops.hurt(uuid)
        if fault.number in _DEADLY:
            self._fail_processes(uuid)
        if self._world.faults.verdicts is None or fault.number not in _WANTING:
            return None
        self._world.faults.verdicts[uuid] = 1
        return lambda: self._world.faults.verdicts.pop(uuid, None)  # type: ignore[union-attr]

    def _stranger(self, fault: Fault) -> Any:
        pid = self._world.machine.intrude(self._world.gpus[fault.gpu])
        return lambda: self._world.machine.leave(pid)

    def _launcher_dies(self, fault: Fault) -> None:
        with self._world.invariants.anybody_may_be_killed():
            self._world.daemon.launcher.die()

    def _launcher_hangs_up(self, fault: Fault) -> None:
        self._world.daemon.launcher.hang_up()

    def _launcher_unreachable(self, fault: Fault) -> Any:
        self._world.faults.is_launcher_unreachable = True
        self._world.daemon.launcher.hang_up()
        return lambda: setattr(self._world.faults, "is_launcher_unreachable", False)

    def _crash(self, fault: Fault, steps: int | None = None) -> None:
        """After so many turns of the loop: between any two awaits."""
        left = fault.number if steps is None else steps
        if left > 0:
            asyncio.get_running_loop().call_soon(self._crash, fault, left - 1)
            return
        self._world.down_s = fault.for_s
        if self._world.daemon.runs:
            self._world.die("the daemon is killed")

    def _crash_at_step(self, fault: Fault) -> None:
        """At the effect that it comes to after so many others."""
        left = fault.number

        def count(name: str) -> None:
            nonlocal left
            left -= fault.word in ("", name)
            if left <= 0:
                self._world.down_s = fault.for_s
                self._world.die(f"the daemon is killed {name}")

        self._world.faults.on_point = count

    def _restart(self, fault: Fault) -> None:
        if self._world.daemon.serves:
            self._world.say("the daemon is stopped")
            try:
                self._world.daemon.stop()
            except Crashed:
                return  # its last booking was one step too many
            self._world.faults.end_life()
            self._world.invariants.died()
            self._world.start_later(fault.for_s)

    def _reboot(self, fault: Fault) -> None:
        self._world.down_s = fault.for_s
        self._world.die("the power fails", is_power_lost=True)

    def _torn_commit(self, fault: Fault) -> None:
        if self._world.daemon.serves:
            self._tear_next(fault)

    def _tear_next(self, fault: Fault) -> None:
        disk = self._world.daemon.disk
        disk.chance = random.Random(fault.number)

        def fail() -> None:
            self._world.down_s = fault.for_s
            self._world.die("the power fails in the middle of a write", is_power_lost=True)
            raise Crashed("power")

        disk.on_torn = fail

    def _torn_folding(self, fault: Fault) -> None:
        if self._world.daemon.serves:
            self._tear_next(fault)
            with contextlib.suppress(Crashed):
                self._world.daemon.disk.fold_now()

    def _fsync_error(self, fault: Fault) -> Any:
        self._world.daemon.disk.failure = "fsync"
        return lambda: setattr(self._world.daemon.disk, "failure", "")

    def _write_error(self, fault: Fault) -> Any:
        self._world.daemon.disk.failure = "write"
        return lambda: setattr(self._world.daemon.disk, "failure", "")

    def _disk_full(self, fault: Fault) -> Any:
        self._world.daemon.disk.is_full = True
        return lambda: setattr(self._world.daemon.disk, "is_full", False)

    def _clock_step(self, fault: Fault) -> None:
        self._world.clock.step_s += fault.number
        self._world.invariants.clock_stepped(fault.number)
