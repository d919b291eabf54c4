"""What the driver tells by itself: XIDs, uncorrectable memory errors, MIG changes, recovery actions.

Heard by a thread of the NVML child; each GPU's lane registers its own GPU, so that one that hangs there
keeps nobody else from being heard. Nothing that happened before the registration is told.
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
from scheduler.model.gpus import GpuEvent

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
WAIT_MS = 100  # so soon the thread sees that it is to end
RENEW_S = 1.0  # after a wait that failed
NO_EVENT = "ERROR_TIMEOUT"


class EventWatch:
    """Hears events from when it is made until `close`; a driver without events only never tells any."""

    def __init__(self, tell: Callable[[], None]) -> None:
        """Hear events; `tell` is called for the first one after each `after`."""
        self._tell = tell
        self._is_told = False
        self.generation = 0  # of the set: lanes register again in each
        self._set: Any = None
        self._uuids: dict[int, str] = {}
        self._lock = threading.Lock()  # never held over a call
        self._registering = 0  # lanes that use the set now
        self._events: deque[tuple[int, GpuEvent, int]] = deque(maxlen=EVENTS_KEPT_MAX)
        self._heard = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._renew()
        self._thread.start()

    def register(self, gpu: nvml.OpenGpu) -> None:
        """Hear of this GPU from now on, as far as it tells.

        Raises:
            GpuReadError: The GPU or the driver is gone.
        """
        with self._lock:
            into = self._set
            self._registering += 1
        try:
            supported = nvml.unless_dead("nvmlDeviceGetSupportedEventTypes", gpu.handle) or 0
            if into is not None and supported & MASK:
                self._uuids[_address(gpu.handle)] = gpu.identity.uuid
                nvml.unless_dead("nvmlDeviceRegisterEvents", gpu.handle, supported & MASK, into)
        finally:
            with self._lock:
                self._registering -= 1

    def after(self, number: int) -> list[tuple[int, GpuEvent, int]]:
        """Return what was heard after the event of that number, oldest first: number, event, MIG instance."""
        self._is_told = False
        return [one for one in self._events.copy() if one[0] > number]

    def close(self, within_s: float) -> bool:
        """Hear no more; whether the thread has left the library in time."""
        self._is_closing = True
        self._thread.join(max(0.0, within_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        # When the driver is gone, whoever reads the GPUs opens the library anew, with a new watch.
        with contextlib.suppress(GpuReadError):
            while self._set is not None and not self._is_closing:
                try:
                    self._hear(nvml.call("nvmlEventSetWait_v2", self._set, WAIT_MS))
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
        fresh = nvml.unless_dead("nvmlEventSetCreate")
        with self._lock:
            self._set = fresh
            self.generation += 1

    def _hear(self, data: Any) -> None:
        address = _address(data.device)
        uuid = self._uuids.get(address) or nvml.unless_dead("nvmlDeviceGetUUID", data.device) or ""
        kind = KINDS.get(data.eventType)
        if uuid and kind:
            self._heard += 1
            event = GpuEvent(uuid=uuid, at_s=time.time(), kind=kind, code=data.eventData)
            self._events.append((self._heard, event, data.gpuInstanceId))
            if not self._is_told:
                self._is_told = True
                self._tell()


def _address(handle: Any) -> int:
    """Return where a handle points: two handles of one GPU point to the same."""
    return ctypes.addressof(handle.contents)
