"""The NVML child: the process in which the driver may hang.

    python -I -m scheduler.effects.nvml_child FD

FD is one end of a socket pair; `nvml_protocol.py` says what goes over it. The main thread reads requests and
never calls the library. Every GPU has one thread, its lane, that makes one call after the other, so that a
hung GPU costs only itself and nothing is stacked on it; one more lane opens and closes the library, and a
thread waits for what the driver tells by itself. The process holds nothing of the daemon's but FD, and ends
when that does.
"""

import contextlib
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from scheduler.effects import nvml
from scheduler.effects.nvml_events import EVERY_INSTANCE, EventLog, EventWatch
from scheduler.effects.nvml_mig import Instance, Instances
from scheduler.effects.nvml_protocol import (
    LINE_BYTES_MAX,
    PROTOCOL_VERSION,
    TIMEOUT,
    Message,
    decode,
    encode,
    holders_to_json,
    sample_to_row,
    value_to_json,
)
from scheduler.effects.nvml_topology import Neighbours
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuEvent, GpuIdentity, GpuSample

# One sample and a hand-over's checks, each of which the daemon gives up before it asks again.
LANE_WAITING_MAX = 8
NO_GPU = "ERROR_GPU_NOT_FOUND"  # the driver is there and counts none
TWICE = "UUID_TWICE"  # ours: a second GPU says that it is the first
COUNT_CHANGED = "GPU_COUNT_CHANGED"  # ours: the driver has more GPUs, or fewer, than when it was opened
COUNTS_AGREED = 3  # so many times in a row; a count that comes and goes costs nothing
GPUS_MAX = 64  # a lane each; the largest boards hold 16
# Ends the sampling and the library before the process: killing a client in mid-call has frozen GPUs.
ORDERLY_END_S = 1.0

Readable = nvml.OpenGpu | Instance


def main() -> None:
    """Serve the daemon until its end of the socket is closed."""
    # Systemd signals the whole control group; the end of the socket says when it is time.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as end:
        server = Server(end)
        server.serve()
    # Not sys.exit: the interpreter would wait for a thread that is hung in the driver.
    os._exit(0)


class Server:
    """Answers the daemon's requests; each answer is sent by the thread that has it."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()
        self._gpus = GpuLanes(lambda: self._send({"wake": True}))
        # Rounds wait for lanes; holders are answered meanwhile.
        self._rounds = Lane("rounds")
        self._listed: tuple[GpuIdentity, ...] = ()
        self._list_number = 0

    def serve(self) -> None:
        """Return when the daemon closed its end, and the library is closed as far as it lets itself."""
        self._send({"protocol": PROTOCOL_VERSION})
        with contextlib.suppress(OSError), self._end.makefile("rb") as lines:
            while line := lines.readline(LINE_BYTES_MAX):
                self._handle(decode(line))
        self._gpus.close(ORDERLY_END_S)

    def _handle(self, request: Message) -> None:
        match request["do"]:
            case "sample":
                # The daemon waits for the answer before it asks again, so one can't be refused.
                self._rounds.submit(lambda: self._round(request))
            case "holders":
                self._ask_gpu(request, lambda gpu: {"holders": holders_to_json(gpu.holders())})
            case "set_power_limit":
                power_limit_w = request["power_limit_w"]
                self._ask_gpu(
                    request, lambda gpu: {"limit": value_to_json(gpu.set_power_limit(power_limit_w))}
                )
            case unknown:
                raise ValueError(f"no such request: {unknown}")

    def _round(self, request: Message) -> None:
        readings = self._gpus.readings(request["within_s"], request["stuck_s"])
        events = self._gpus.events_after(request["events_after"])
        identities = self._list(readings.pop("identities"), request["list"])
        self._send({"id": request["id"], **readings, **identities, "events": events})

    def _list(self, identities: tuple[GpuIdentity, ...], known: int) -> Message:
        """Return the list of GPUs, unless the daemon has it."""
        if not self._list_number or identities != self._listed:
            self._list_number, self._listed = self._list_number + 1, identities
        if self._list_number == known:
            return {"list": known, "identities": None}
        return {"list": self._list_number, "identities": [value_to_json(gpu) for gpu in identities]}

    def _ask_gpu(self, request: Message, work: Callable[[Readable], Message]) -> None:
        """Answer with what the work returns, done in the GPU's lane: one call after the other."""

        def answer(gpu: Readable) -> None:
            try:
                self._send({"id": request["id"], **work(gpu)})
            except GpuReadError as error:
                self._refuse(request["id"], error)

        try:
            self._gpus.submit(request["uuid"], answer, request["within_s"])
        except GpuReadError as error:
            self._refuse(request["id"], error)

    def _refuse(self, request_id: int, error: GpuReadError) -> None:
        self._send({"id": request_id, "error": error.code, "message": str(error)})

    def _send(self, message: Message) -> None:
        # The daemon may be gone; then the main thread reads the end of the stream.
        with self._sending, contextlib.suppress(OSError):
            self._end.sendall(encode(message))


class Lane:
    """A daemon thread that does one piece of work after the other."""

    def __init__(self, name: str) -> None:
        self._waiting: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._busy_since_s: float | None = None
        self._has_failed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], None], within_s: float = math.inf) -> bool:
        """Queue the work; whether there was room. It is dropped if it has not begun in time."""
        if self._waiting.qsize() >= LANE_WAITING_MAX:
            return False
        self._waiting.put((time.monotonic() + within_s, work))
        return True

    @property
    def busy_s(self) -> float:
        """Return for how long the work at hand has taken, or 0 without one."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def stop(self) -> None:
        """End the thread after what is queued."""
        self._waiting.put(None)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            expires_s, work = item
            if time.monotonic() >= expires_s:
                continue
            self._busy_since_s = time.monotonic()
            try:
                work()
            except Exception:  # a defect of ours: told once in the daemon's log, and the lane goes on
                if not self._has_failed:
                    traceback.print_exc()
                self._has_failed = True
            self._busy_since_s = None


class Driver:
    """The open library, and what its GPUs share."""

    def __init__(self, log: EventLog) -> None:
        self.library = nvml.open_library()
        self.neighbours = Neighbours()
        self.events = EventWatch(log)


class GpuLane:
    """One GPU by its index: opened when it is first read, then read again and again."""

    def __init__(self, index: int, driver: "Driver", changed: threading.Condition, awaited: set[int]) -> None:
        self.index = index
        self.gpu: nvml.OpenGpu | None = None
        self._instances: Instances | None = None
        self.lane = Lane(f"gpu-{index}")
        self._driver = driver
        self._registered = 0  # the generation of events in which it is heard
        self._changed = changed
        self._awaited = awaited
        self.is_sampling = False
        self._result: tuple[tuple[GpuSample, ...], str] | None = None

    @property
    def name(self) -> str:
        """Return the UUID, or "index N" while it isn't known."""
        return self.gpu.identity.uuid if self.gpu else f"index {self.index}"

    @property
    def names(self) -> list[str]:
        """Return the UUIDs of all that can be used of it: its own, or those of its instances."""
        if self._is_cut:
            return [one.uuid for one in self._parts] or [f"index {self.index}"]
        return [self.name]

    @property
    def _is_cut(self) -> bool:
        return self._instances is not None and self._instances.is_on

    @property
    def _parts(self) -> tuple[Instance, ...]:
        return self._instances.present if self._instances else ()

    def find(self, uuid: str) -> Readable | None:
        """Return what of it has that UUID and can be used."""
        if self._is_cut:
            return next((one for one in self._parts if one.uuid == uuid), None)
        return self.gpu if self.gpu and self.name == uuid else None

    def identities(self, whole: GpuIdentity) -> list[GpuIdentity]:
        """Return who can be used of it, given who it is as a whole."""
        return [one.identity(whole) for one in self._parts] if self._is_cut else [whole]

    def events(self, event: GpuEvent, instance: int) -> list[GpuEvent]:
        """Return the event as it concerns those who can be used: with MIG the driver tells it of the GPU."""
        if not self._is_cut:
            return [event]
        return [
            replace(event, uuid=one.uuid) for one in self._parts if instance in (one.number, EVERY_INSTANCE)
        ]

    def begin_sample(self) -> bool:
        """Start a sample; False while the one before hangs."""
        if self.is_sampling:
            return False
        self.is_sampling = self.lane.submit(self._sample)
        return self.is_sampling

    def take(self) -> tuple[tuple[GpuSample, ...], str]:
        """Return the samples and the failure of the last one that came back; each is given once."""
        result, self._result = self._result, None
        return ((), TIMEOUT) if result is None else result

    def _sample(self) -> None:
        result: tuple[tuple[GpuSample, ...], str] = ((), "ERROR_UNKNOWN")
        try:
            gpu, instances = self.gpu, self._instances
            if gpu is None or instances is None:
                gpu = nvml.OpenGpu(self.index, self._driver.library)
                instances = Instances(gpu)
            hidden = instances.look()
            if self.gpu is None:  # not before it is known whether it is one GPU or several
                self._driver.neighbours.add(gpu)
                self._instances, self.gpu = instances, gpu
            unheard = self._register(gpu)
            whole, failure = gpu.sample()
            result = (instances.samples(whole), failure or hidden or unheard)
        except GpuReadError as error:
            result = ((), error.code)
        finally:
            with self._changed:
                self.is_sampling = False
                self._result = result
                self._awaited.discard(self.index)
                if not self._awaited:  # only the last wakes the round that waits for all
                    self._changed.notify_all()

    def _register(self, gpu: nvml.OpenGpu) -> str:
        """Have its events heard; return the failure that keeps them from it until the next try, or ""."""
        generation = self._driver.events.generation
        if self._registered == generation:
            return ""
        failure = self._driver.events.register(gpu)
        if not failure:
            self._registered = generation
        return failure


class GpuLanes:
    """All GPUs. Opens the library when it is asked for readings, and again after the driver went away."""

    def __init__(self, tell: Callable[[], None]) -> None:
        """Read GPUs; `tell` is called when the driver told something that the next round will carry."""
        self._log = EventLog(tell)
        self._changed = threading.Condition()  # guards what lanes hand over
        self._awaited: set[int] = set()  # by index: the GPUs whose samples a round waits for
        self._opening = Lane("driver")
        self._is_opening = False
        self._failure = ""  # why the library isn't open
        self._driver: Driver | None = None
        self._gpus: tuple[GpuLane, ...] = ()
        self._counts: deque[int] = deque(maxlen=COUNTS_AGREED)  # the last, newest last
        self._is_counting = False

    def readings(self, within_s: float, stuck_s: float) -> Message:
        """Return one round after at most `within_s`: what has not answered by then has timed out.

        `replace_me` asks for another process: this one can't recover, or all calls hang for `stuck_s`.
        """
        until_s = time.monotonic() + within_s
        with self._changed:
            was_open = bool(self._gpus)
            message = self._round(until_s, stuck_s)
            if was_open and not self._gpus and not message["replace_me"]:
                # A driver that was only reloaded is open again before its loss is news.
                message = self._round(until_s, stuck_s)
            return message

    def submit(self, uuid: str, work: Callable[[Readable], None], within_s: float) -> None:
        """Do the work in the GPU's lane.

        Raises:
            GpuReadError: There is no such GPU, or its lane hangs.
        """
        with self._changed:
            found = next(((each.lane, gpu) for each in self._gpus if (gpu := each.find(uuid))), None)
            failure = self._failure or "ERROR_NOT_FOUND"
        if found is None:
            raise GpuReadError(failure, f"no GPU {uuid} is open: {failure}")
        lane, gpu = found
        if lane.busy_s > within_s or not lane.submit(lambda: work(gpu), within_s):
            raise GpuReadError(TIMEOUT, f"a call to GPU {uuid} has not come back for {lane.busy_s:.1f} s")

    def close(self, within_s: float) -> None:
        """Let the calls at hand come back, then close the library; bounded."""
        until_s = time.monotonic() + within_s

        def is_done(lane: Lane, work: Callable[[], None]) -> bool:
            done = threading.Event()

            def run() -> None:
                with contextlib.suppress(GpuReadError):
                    work()
                done.set()

            return lane.submit(run) and done.wait(until_s - time.monotonic())

        # Beneath a call that hangs the library is left as it is: the process ends anyway.
        lanes = all(is_done(gpu.lane, lambda: None) for gpu in self._gpus)
        if lanes and (self._driver is None or self._driver.events.close(until_s - time.monotonic())):
            is_done(self._opening, nvml.close_library)

    def events_after(self, number: int) -> list[tuple[int, Message]]:
        """Return what the driver told after the event of that number."""
        lanes = {lane.name: lane for lane in self._gpus}
        return [
            (number, value_to_json(each))
            for number, event, instance in self._log.after(number)
            for each in (lanes[event.uuid].events(event, instance) if event.uuid in lanes else [event])
        ]

    def _wait(self, is_met: Callable[[], bool], until_s: float) -> bool:
        return self._changed.wait_for(is_met, max(0.0, until_s - time.monotonic()))

    def _round(self, until_s: float, stuck_s: float) -> Message:
        if not self._gpus:
            if not self._is_opening:
                self._is_opening = self._opening.submit(self._open)
            self._wait(lambda: not self._is_opening, until_s)
            if not self._gpus:
                return self._without_driver(TIMEOUT if self._is_opening else self._failure, stuck_s)
        if self._has_other_count:
            return self._lose_driver(COUNT_CHANGED, stuck_s)
        self._count()
        self._awaited.clear()
        self._awaited.update(gpu.index for gpu in self._gpus if gpu.begin_sample())
        self._wait(lambda: not self._awaited, until_s)
        return self._collect(stuck_s)

    @property
    def _has_other_count(self) -> bool:
        """Whether the driver has another number of GPUs than were opened: then indices mean others, too."""
        driver = self._driver
        assert driver is not None, "open lanes have their driver"
        counts = set(self._counts)
        return (
            len(self._counts) == COUNTS_AGREED and len(counts) == 1 and driver.library.gpu_count not in counts
        )

    def _count(self) -> None:
        """Let the GPUs be counted for the next round; nothing is stacked on a count that hangs."""

        def count() -> None:
            try:
                found = nvml.gpu_count()
            except GpuReadError:  # the GPUs' own samples tell what that means
                found = None
            with self._changed:
                self._is_counting = False
                if found is not None:
                    self._counts.append(found)

        if not self._is_counting:
            self._is_counting = self._opening.submit(count)

    def _open(self) -> None:
        gpus: tuple[GpuLane, ...] = ()
        failure = "ERROR_UNKNOWN"
        try:
            if self._driver is not None:
                self._driver.events.close(ORDERLY_END_S)
            nvml.close_library()
            driver = self._driver = Driver(self._log)
            count = driver.library.gpu_count
            gpus = tuple(
                GpuLane(index, driver, self._changed, self._awaited) for index in range(min(count, GPUS_MAX))
            )
            failure = "" if count else NO_GPU
        except GpuReadError as error:
            failure = error.code
        finally:
            with self._changed:
                self._gpus, self._failure = gpus, failure
                self._counts.clear()
                self._is_opening = False
                self._changed.notify_all()

    def _collect(self, stuck_s: float) -> Message:
        results = [(gpu, *gpu.take()) for gpu in self._gpus]
        gone = {failure for _, _, failure in results if failure in nvml.DRIVER_GONE}
        # One GPU may say so alone, and costs only itself; but no other is there to contradict where it is
        # lost, or hangs.
        if gone and not any(samples or not failure for _, samples, failure in results):
            return self._lose_driver(min(gone), stuck_s)
        identities, twice = self._identities()
        errors = {
            sample.uuid: nvml.IMPLAUSIBLE for _, samples, _ in results for sample in samples if sample.doubts
        }
        errors |= {name: failure for gpu, _, failure in results if failure for name in gpu.names}
        return {
            "identities": identities,
            "samples": [
                sample_to_row(sample) for gpu, samples, _ in results if gpu not in twice for sample in samples
            ],
            "errors": errors | {f"index {gpu.index}": TWICE for gpu in twice},
            "driver_version": self._driver_version,
            "replace_me": all(gpu.lane.busy_s > stuck_s for gpu in self._gpus),
        }

    def _identities(self) -> tuple[tuple[GpuIdentity, ...], list[GpuLane]]:
        """Return who is there, and the GPUs that can't be told from one before them."""
        by_uuid: dict[str, GpuLane] = {}
        twice = []
        for lane in self._gpus:
            if lane.gpu and lane.name in by_uuid:
                twice.append(lane)
            elif lane.gpu:
                by_uuid[lane.name] = lane
        assert self._driver is not None, "a lane has the driver that made it"
        wholes = tuple(lane.gpu.identity for lane in by_uuid.values() if lane.gpu)
        placed = self._driver.neighbours.place(wholes)
        return tuple(part for whole in placed for part in by_uuid[whole.uuid].identities(whole)), twice

    @property
    def _driver_version(self) -> str:
        return self._driver.library.driver_version if self._driver else ""

    def _lose_driver(self, failure: str, stuck_s: float) -> Message:
        """Drop all handles, so that the library is opened again."""
        # Opening it again beside a call that hangs would hang a second one.
        is_hung = any(gpu.is_sampling for gpu in self._gpus)
        for gpu in self._gpus:
            gpu.lane.stop()
        self._gpus = ()
        self._failure = failure
        return self._without_driver(failure, stuck_s) | ({"replace_me": True} if is_hung else {})

    def _without_driver(self, failure: str, stuck_s: float) -> Message:
        return {
            "identities": (),
            "samples": [],
            "errors": {"driver": failure},
            "driver_version": self._driver_version,
            # A library that was exchanged stays mapped until the process ends.
            "replace_me": failure == "ERROR_LIB_RM_VERSION_MISMATCH" or self._opening.busy_s > stuck_s,
        }


if __name__ == "__main__":
    main()
