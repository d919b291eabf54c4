"""The launcher's event loop: epoll and timers, nothing else.

asyncio would do, but it costs 9 MiB and 40 ms at start; the launcher lives on every node, and its
supervisors are copies of it.
"""

from __future__ import annotations

import heapq
import select
import sys
import time
from collections.abc import Callable

EVENTS_MAX = 256  # taken in one turn; the rest wait for the next
_CANCELLED_MAX = 100  # timers


class Timer:
    """A call to come; `cancel` makes it nothing."""

    __slots__ = ("_loop", "callback")

    def __init__(self, loop: Loop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call; a second time is no error."""
        if self.callback is not None:
            self.callback = None
            self._loop.timer_was_cancelled()


class Loop:
    """Calls back when a descriptor is ready or a time has come, one call after the other.

    In each turn orders, exits and timers come first, then `before_bulk`, then what was watched as bulk
    (jobs' output), one bounded piece each: a chatty job can't delay a kill by more than that.
    """

    __slots__ = (
        "_before_bulk",
        "_bulk",
        "_epoll",
        "_stopping",
        "_timers",
        "_timers_cancelled",
        "_timers_made",
        "_urgent",
    )

    def __init__(self, before_bulk: Callable[[], None]) -> None:
        self._epoll = select.epoll()
        self._urgent: dict[int, Callable[[], None]] = {}
        self._bulk: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timers_cancelled = 0  # and still in the heap
        self._timers_made = 0
        self._before_bulk = before_bulk
        self._stopping = False

    def watch(self, fd: int, callback: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Call back in each turn in which `fd` is ready; a call may come when it no longer is."""
        self._epoll.register(fd, events)
        self._urgent[fd] = callback

    def watch_bulk(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back in each turn in which `fd` is readable, after all that is urgent."""
        self._epoll.register(fd, select.EPOLLIN)
        self._bulk[fd] = callback

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of a watched descriptor."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`, which must still be open."""
        self._epoll.unregister(fd)
        self._urgent.pop(fd, None)
        self._bulk.pop(fd, None)

    def call_after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call back once, `delay_s` from now on the monotonic clock."""
        timer = Timer(self, callback)
        self._timers_made += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timers_made, timer))
        return timer

    def timer_was_cancelled(self) -> None:
        """Forget cancelled timers when they are most of all: a deadline can be days off."""
        self._timers_cancelled += 1
        if self._timers_cancelled > _CANCELLED_MAX and 2 * self._timers_cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    def stop(self) -> None:
        """Return from `run` at the end of this turn."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop`. What a callback raises is printed, and the loop goes on."""
        urgent, bulk = self._urgent, self._bulk
        while not self._stopping:
            ready = self._epoll.poll(self._timeout_s(), EVENTS_MAX)
            later = []
            for fd, _ in ready:
                if (callback := urgent.get(fd)) is not None:
                    guarded(callback)
                elif fd in bulk:
                    later.append(fd)
            self._run_timers()
            guarded(self._before_bulk)
            for fd in later:
                if (callback := bulk.get(fd)) is not None:
                    guarded(callback)

    def _timeout_s(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
            self._timers_cancelled -= 1
        if not self._timers:
            return -1.0
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        if not self._timers:
            return
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            timer = heapq.heappop(self._timers)[2]
            if (callback := timer.callback) is not None:
                timer.callback = None
                guarded(callback)
            else:
                self._timers_cancelled -= 1


def guarded(callback: Callable[..., None], *arguments: object) -> None:
    """Call; what it raises is printed and goes no further: one job's trouble is not another's."""
    try:
        callback(*arguments)
    except Exception:
        # What `traceback` would print, without the megabyte that its import costs.
        sys.excepthook(*sys.exc_info())


def log(text: str) -> None:
    """Print a line for the operator; a log that can't be written is not worth dying for."""
    try:
        sys.stderr.write(f"launcher: {text.rstrip()}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
