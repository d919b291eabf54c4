"""Virtual time: an asyncio loop whose clock jumps to whatever comes next, and the daemon's clock in it.

Nothing ever waits: a day passes as fast as its events can be handled, in the same order each time. Timers and
tasks only; what would go to a thread is done at once, and there are no sockets or subprocesses.
"""

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

from scheduler.errors import SimulationStuck

# Where a simulation begins unless somebody says otherwise: 2026-01-01 00:00 UTC.
EPOCH_S = 1_767_225_600.0
# Timers closer together than this go off together. It is far below a microsecond: who wants to wake that far
# from now, as plans do, must find that time has passed.
_RESOLUTION_S = 1e-9

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, which begins at 0."""

    def __init__(self) -> None:
        self._now_s = 0.0
        # Called when nothing is left to do at this moment, before time goes on.
        self.on_quiet: Callable[[], None] | None = None
        self._when_quiet: list[asyncio.Handle] = []
        super().__init__(_Jump(self._jump))
        self._clock_resolution = _RESOLUTION_S

    def time(self) -> float:
        return self._now_s

    def call_when_quiet(self, callback: Callable[[], None]) -> asyncio.Handle:
        """Call it when nothing else is left to do at this moment."""
        handle = asyncio.Handle(callback, (), self)
        self._when_quiet.append(handle)
        return handle

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """Do it here and now: another thread would end whenever it likes."""
        del executor
        done: asyncio.Future[_T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _jump(self, by_s: float | None) -> None:
        handles, self._when_quiet = self._when_quiet, []
        for handle in handles:
            if not handle.cancelled():
                self.call_soon(handle._run)
        if handles:
            return
        if by_s is None:
            raise SimulationStuck("everything waits and no timer is set: nothing will ever happen again")
        if self.on_quiet is not None:
            self.on_quiet()
        self._now_s += by_s
        # From half a year on it is less than the next number after this one, and nothing would ever be due.
        self._clock_resolution = max(_RESOLUTION_S, math.ulp(self._now_s))


class _Jump(selectors.BaseSelector):
    """Waits for nothing, and says how long it would have waited."""

    def __init__(self, on_wait: Callable[[float | None], None]) -> None:
        self._on_wait = on_wait
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, -1, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._on_wait(timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualClock:
    """Serves the Protocol `Clock` from the running virtual loop; it can be set wrong."""

    def __init__(self, epoch_s: float = EPOCH_S) -> None:
        self.epoch_s = epoch_s
        self.step_s = 0.0  # by how much somebody has set it forward (or back) since

    def true_s(self) -> float:
        """Unix time as it really is, whatever the clock has been set to."""
        return self.epoch_s + asyncio.get_running_loop().time()

    def now_s(self) -> float:
        return self.true_s() + self.step_s


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run to the end in a virtual loop of its own.

    Raises:
        SimulationStuck: Everything waits for something that can't come.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
