"""What the driver tells by itself: XIDs, uncorrectable memory errors, MIG changes, recovery actions.

Heard by a thread of the NVML child; each GPU's lane registers its own GPU, so that one that hangs there
keeps nobody else from being heard. Nothing that happened before the registration is told: so each
registration is told itself, and whoever read the GPU before knows that something may be missing. What was
heard outlives the library that it was heard from.
"""

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from scheduler.effects import nvml
from scheduler.errors import GpuReadError
from scheduler.model.gpus import EVENTS_BEGIN, GpuEvent

# By NVML's bit; what else it could tell (clocks, P-states, single-bit storms) is read with each sample.
KINDS = {
    0x2: "ecc_double_bit",
    0x8: "xid",
    0x100: "mig_changed",
    0x4000: "unavailable",
    0x8000: "recovery_action",
}
MASK = sum(KINDS)
# The daemon takes them once a round; a node that tells more meanwhile is beyond single causes.
EVENTS_KEPT_MAX = 256
# So soon the thread sees that it is to end. Each wait that brings nothing costs 0.1 ms of processor time.
WAIT_MS = 400
RENEW_S = 1.0  # after a wait that failed
NO_EVENT = "ERROR_TIMEOUT"
EVERY_INSTANCE = 2**32 - 1  # of a MIG GPU, or there are none
Told = tuple[int, GpuEvent, int]  # number, event, MIG instance


class EventLog:
    """What was heard and is not known to have arrived, numbered for as long as the process lives."""

    def __init__(self, tell: Callable[[], None]) -> None:
        """Keep events; `tell` is called for the first one after each `after` that should not wait."""
        self._tell = tell
        self._is_told = False
        self._lock = threading.Lock()
        self._events: deque[Told] = deque()
        self._last = 0
        self._dropped: set[str] = set()  # GPUs of which something could not be kept

    def put(self, event: GpuEvent, instance: int = EVERY_INSTANCE) -> None:
        """Keep an event behind the others; where there is no room, that its GPU told something."""
        with self._lock:
            if len(self._events) == EVENTS_KEPT_MAX:
                self._dropped.add(event.uuid)
            else:
                self._append(event, instance)
            tells = not self._is_told and event.kind != EVENTS_BEGIN
            self._is_told |= tells
        if tells:
            self._tell()

    def after(self, number: int) -> list[Told]:
        """Return what was heard after the event of that number, oldest first; the others have arrived."""
        with self._lock:
            self._is_told = False
            while self._events and self._events[0][0] <= number:
                self._events.popleft()
            if self._dropped and len(self._events) < EVENTS_KEPT_MAX:
                for uuid in sorted(self._dropped):
                    self._append(GpuEvent(uuid, time.time(), EVENTS_BEGIN, 0), EVERY_INSTANCE)
                self._dropped.clear()
            return list(self._events)

    def _append(self, event: GpuEvent, instance: int) -> None:
        self._last += 1
        self._events.append((self._last, event, instance))


class EventWatch:
    """Hears events from when it is made until `close`; a driver without events only never tells any."""

    def __init__(self, log: EventLog) -> None:
        """Hear events into the log."""
        self._log = log
        self.generation = 0  # of the set: lanes register again in each
        self._set: Any = None
        self._uuids: dict[int, str] = {}
        self._lock = threading.Lock()  # never held over a call
        self._registering = 0  # lanes that use the set now
        self._is_broken = False  # the set: another must be made
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._renew()
        self._thread.start()

    def register(self, gpu: nvml.OpenGpu) -> str:
        """Hear of this GPU from now on, as far as it tells; return what keeps it from that, or "".

        Raises:
            GpuReadError: The GPU or the driver is gone.
        """
        with self._lock:
            into = self._set
            self._registering += 1
        try:
            supported = nvml.unless_dead("nvmlDeviceGetSupportedEventTypes", gpu.handle) or 0
            if into is None or not supported & MASK:
                return ""
            self._uuids[_address(gpu.handle)] = gpu.identity.uuid
            nvml.call("nvmlDeviceRegisterEvents", gpu.handle, supported & MASK, into)
        except GpuReadError as error:
            if error.code in nvml.DEAD:
                raise
            if error.code in nvml.ABSENT:
                return ""
            self._is_broken = True  # what else the set hears is not to be relied on [nvml.h]
            return error.code
        finally:
            with self._lock:
                self._registering -= 1
        self._log.put(GpuEvent(gpu.identity.uuid, time.time(), EVENTS_BEGIN, 0))
        return ""

    def close(self, within_s: float) -> bool:
        """Hear no more; whether the thread has left the library in time."""
        self._is_closing = True
        self._thread.join(max(0.0, within_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        # When the driver is gone, whoever reads the GPUs opens the library anew, with a new watch.
        with contextlib.suppress(GpuReadError):
            while not self._is_closing:
                try:
                    if self._set is not None and not self._is_broken:
                        self._hear(nvml.call("nvmlEventSetWait_v2", self._set, WAIT_MS))
                        continue
                except GpuReadError as error:
                    if error.code == NO_EVENT:
                        continue
                    if error.code in nvml.DRIVER_GONE:
                        raise
                # That says nothing of any one GPU: each is judged by what it answers itself.
                time.sleep(RENEW_S)
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            old, self._set = self._set, None
            is_used = self._registering > 0
        # A GPU that hangs while it is registered keeps the old set; that goes with the library.
        if old is not None and not is_used:
            nvml.unless_dead("nvmlEventSetFree", old)
        self._is_broken = False
        try:
            fresh = nvml.call("nvmlEventSetCreate")
        except GpuReadError as error:
            if error.code in nvml.DEAD:
                raise
            self._is_closing |= error.code in nvml.ABSENT  # it never will
            return
        with self._lock:
            self._set = fresh
            self.generation += 1

    def _hear(self, data: Any) -> None:
        address = _address(data.device)
        uuid = self._uuids.get(address) or nvml.unless_dead("nvmlDeviceGetUUID", data.device) or ""
        kind = KINDS.get(data.eventType)
        if uuid and kind:
            event = GpuEvent(uuid=uuid, at_s=time.time(), kind=kind, code=data.eventData)
            self._log.put(event, data.gpuInstanceId)


def _address(handle: Any) -> int:
    """Return where a handle points: two handles of one GPU point to the same."""
    return ctypes.addressof(handle.contents)
