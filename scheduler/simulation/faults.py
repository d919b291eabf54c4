"""What can go wrong around a daemon: each of its effects with the faults that the world has at the moment.

The faults themselves are state, set and taken back from outside; nothing here draws chance. A daemon can be
killed at each of its effects, before and after it: `on_point` is called there and may do so, and from then on
nothing of that daemon acts any more.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from scheduler.control.loop import Effects
from scheduler.effects.gpus import GpuReadings, Gpus
from scheduler.effects.launcher import (
    AttemptKey,
    Launcher,
    LauncherHello,
    Report,
    StartOrder,
    StopOrder,
)
from scheduler.errors import GpuReadError, LauncherError
from scheduler.model.gpus import GpuEvent, GpuHolders, GpuIdentity, GpuLimit, GpuSample
from scheduler.simulation.storage import Disk, Moment

TIMEOUT = "ERROR_TIMEOUT"
LOST = "ERROR_GPU_IS_LOST"
NOT_FOUND = "ERROR_NOT_FOUND"
_Order = TypeVar("_Order")

# A call that hangs is given up after this long; the child that made it is replaced.
HANGS_S = 2.0


class Crashed(BaseException):
    """The daemon was killed in the middle of a step. Not an Exception: nobody of it may catch it."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a reading that reached the daemon said, and when by the loop's time."""

    at_s: float
    energy_mj: int
    power_w: float


@dataclass(slots=True)
class Faults:
    """What is wrong at the moment."""

    failing: dict[str, str] = field(default_factory=dict)  # by GPU: the code with which each call fails
    hanging: set[str] = field(default_factory=set)  # GPUs whose calls do not come back
    slow_s: dict[str, float] = field(default_factory=dict)  # by GPU: how long each call takes
    is_driver_hanging: bool = False
    lost: dict[str, bool] = field(default_factory=dict)  # by GPU: whether the driver still lists it
    # GPUs that say yes to a limit and do not take it, and whether their readings say that they did.
    deaf: dict[str, bool] = field(default_factory=dict)
    read: dict[str, Read] = field(default_factory=dict)  # by GPU: its last reading
    verdicts: dict[str, int] | None = (
        None  # recovery actions by GPU, 0 where none; None: the driver gives none
    )
    events: list[GpuEvent] = field(default_factory=list)  # to be told with the next round
    is_launcher_unreachable: bool = False
    is_heard_twice: bool = False  # each order reaches the launcher again
    on_order: Callable[[StartOrder | StopOrder | AttemptKey, str], None] | None = None
    on_point: Callable[[str], None] | None = None
    _life: "Life | None" = None

    def wrap(self, effects: Effects) -> Effects:
        """The effects of a daemon that begins now."""
        life = self._life = Life(self)
        return replace(
            effects, launcher=FaultyLauncher(effects.launcher, life), gpus=FaultyGpus(effects.gpus, life)
        )

    def watch(self, disk: Disk) -> None:
        """Let the daemon be killed before and after each commit, and after one with a given kind of event."""
        disk.on_commit = self._committing

    def end_life(self) -> None:
        """The daemon that was begun last is dead."""
        if self._life is not None:
            self._life.is_over = True

    def _committing(self, moment: Moment, kinds: tuple[str, ...]) -> None:
        if self._life is None or self._life.is_over:
            return  # the journal is opened before there are effects
        self._life.point(f"{moment} commit")
        if moment == "after":
            for kind in dict.fromkeys(kinds):
                self._life.point(f"after {kind}")


@dataclass(slots=True)
class Life:
    """One daemon's time, from its start to its death."""

    faults: Faults
    is_over: bool = False

    def point(self, name: str) -> None:
        """The daemon may die here.

        Raises:
            Crashed: It has.
        """
        if not self.is_over and self.faults.on_point is not None:
            self.faults.on_point(name)
        if self.is_over:
            raise Crashed(name)


class FaultyLauncher:
    """A launcher that can be out of reach. Serves the Protocol `Launcher`."""

    def __init__(self, launcher: Launcher, life: Life) -> None:
        """Take the launcher and the life of the daemon that speaks to it."""
        self._launcher = launcher
        self._life = life

    async def connect(self, on_report: Callable[[Report], None]) -> LauncherHello:
        self._life.point("before connect")
        if self._life.faults.is_launcher_unreachable:
            raise LauncherError("no launcher answers and none could be started")
        hello = await self._launcher.connect(on_report)
        self._life.point("after connect")
        return hello

    def prepare(self, order: StartOrder) -> None:
        self._life.point("before prepare")
        self._launcher.prepare(order)

    def start(self, order: StartOrder) -> None:
        self._ordered(order, "start")
        self._say(self._launcher.start, order)
        self._life.point("after start")

    def stop(self, order: StopOrder) -> None:
        self._ordered(order, "stop")
        self._say(self._launcher.stop, order)
        self._life.point("after stop")

    def freeze(self, key: AttemptKey) -> None:
        self._ordered(key, "freeze")
        self._say(self._launcher.freeze, key)
        self._life.point("after freeze")

    def thaw(self, key: AttemptKey) -> None:
        self._ordered(key, "thaw")
        self._say(self._launcher.thaw, key)
        self._life.point("after thaw")

    def end_grace(self, key: AttemptKey) -> None:
        self._ordered(key, "end_grace")
        self._say(self._launcher.end_grace, key)
        self._life.point("after end_grace")

    def forget(self, key: AttemptKey) -> None:
        self._ordered(key, "forget")
        self._say(self._launcher.forget, key)
        self._life.point("after forget")

    async def close(self) -> None:
        await self._launcher.close()

    def _say(self, order: Callable[[_Order], None], said: _Order) -> None:
        for _ in range(1 + self._life.faults.is_heard_twice):
            order(said)

    def _ordered(self, order: StartOrder | StopOrder | AttemptKey, what: str) -> None:
        self._life.point(f"before {what}")
        if self._life.faults.on_order is not None:
            self._life.faults.on_order(order, what)


class FaultyGpus:
    """GPUs whose driver fails, hangs or loses them. Serves the Protocol `Gpus`."""

    def __init__(self, gpus: Gpus, life: Life) -> None:
        """Take the GPUs and the life of the daemon that reads them."""
        self._gpus = gpus
        self._life = life
        self._identities: tuple[GpuIdentity, ...] = ()
        self._said_w: dict[str, float] = {}  # limits that were not taken

    async def start(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> GpuReadings:
        self._life.point("before the first round")
        return self._shown(await self._gpus.start(lambda one: on_readings(self._shown(one)), period_s))

    async def holders(self, uuid: str) -> GpuHolders:
        self._life.point("before holders")
        await self._answer(uuid)
        holders = await self._gpus.holders(uuid)
        self._life.point("after holders")
        return holders

    async def set_power_limit(self, uuid: str, power_limit_w: float) -> GpuLimit:
        self._life.point("before set_power_limit")
        await self._answer(uuid)
        if uuid in self._life.faults.deaf:
            self._said_w[uuid] = power_limit_w
            return GpuLimit(power_limit_w, power_limit_w)
        limit = await self._gpus.set_power_limit(uuid, power_limit_w)
        self._life.point("after set_power_limit")
        return limit

    async def release(self) -> None:
        await self._gpus.release()

    async def acquire(self) -> None:
        await self._gpus.acquire()

    async def close(self) -> None:
        await self._gpus.close()

    async def _answer(self, uuid: str) -> None:
        """Return when the GPU answers a call.

        Raises:
            GpuReadError: It does not.
        """
        faults = self._life.faults
        if uuid in faults.slow_s:
            await asyncio.sleep(faults.slow_s[uuid])
        if faults.is_driver_hanging or uuid in faults.hanging:
            await asyncio.sleep(HANGS_S)
            raise GpuReadError(TIMEOUT, f"GPU {uuid} did not answer within {HANGS_S} s")
        code = faults.failing.get(uuid)
        if uuid in faults.lost:
            code = LOST if faults.lost[uuid] else NOT_FOUND
        if code is not None:
            raise GpuReadError(code, f"GPU {uuid}: {code}")

    def _shown(self, readings: GpuReadings) -> GpuReadings:
        """A round as the driver gives it at the moment."""
        faults = self._life.faults
        if faults.is_driver_hanging:
            return GpuReadings(self._identities, (), {"driver": TIMEOUT}, readings.driver_version)
        errors = {
            **readings.errors,
            **faults.failing,
            **dict.fromkeys(sorted(faults.hanging), TIMEOUT),
            **{uuid: LOST for uuid, is_listed in faults.lost.items() if is_listed},
        }
        self._identities = tuple(gpu for gpu in readings.identities if faults.lost.get(gpu.uuid, True))
        seen = {gpu.uuid for gpu in self._identities}
        samples = tuple(
            self._told(one) for one in readings.samples if one.uuid in seen and one.uuid not in errors
        )
        at_s = asyncio.get_running_loop().time()
        faults.read.update((one.uuid, Read(at_s, one.energy_mj or 0, one.power_w or 0.0)) for one in samples)
        events, faults.events = tuple(faults.events), []
        return GpuReadings(self._identities, samples, errors, readings.driver_version, events)

    def _told(self, sample: GpuSample) -> GpuSample:
        """A reading with the driver's verdict, and the limit that it says is in force."""
        faults, uuid = self._life.faults, sample.uuid
        if faults.verdicts is not None:
            sample = replace(sample, recovery_action=faults.verdicts.get(uuid, 0))
        if faults.deaf.get(uuid) and uuid in self._said_w:
            sample = replace(sample, power_limit_w=self._said_w[uuid])
        return sample
