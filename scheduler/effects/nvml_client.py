"""NVML seen from the daemon: `NvmlGpus` keeps one NVML child alive, asks it for readings, replaces it.

Nothing here calls the driver. What hangs there hangs in the child, which can be left behind: it is told to
end, killed if it does not, and never waited for but at `release` and `close`, and there only so long.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from scheduler.effects.gpus import GpuReadings
from scheduler.effects.nvml_protocol import (
    LINE_BYTES_MAX,
    PROTOCOL_VERSION,
    TIMEOUT,
    Message,
    decode,
    encode,
    holders_from_json,
    sample_from_row,
)
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuEvent, GpuHolders, GpuIdentity, GpuLimit

log = logging.getLogger(__name__)

CHILD_MODULE = "scheduler.effects.nvml_child"
NOT_OPEN = "ERROR_UNINITIALIZED"  # NVML's word for a library that nobody has open
NOT_STARTED = "ERROR_OPERATING_SYSTEM"  # and for what the system refused
BACKOFF_FACTOR = 2
# Events that come one upon the other are read at this pace; a program needs longer to die of an error.
WAKE_S = 0.005
# 535.43, 535.54 and 535.86 fill a longer struct than they say [wookayin/gpustat#161, XuehaiPan/nvitop#75].
SCRAMBLING_BRANCH = "535"
SCRAMBLING_MINORS = ("43", "54", "86")


@dataclass(frozen=True, slots=True)
class NvmlLimits:
    """How long is waited, and how often tried. Tests shorten them; nothing else has a reason to."""

    round_s: float = 1.0  # a round's wait for its slowest GPU, if the period is not shorter
    # The first of each child: a driver without persistence mode initialises its GPUs now.
    first_round_s: float = 10.0
    holders_s: float = 2.0  # a process list takes 5 ms, and waits for a sample at most
    set_s: float = 5.0  # a set and two reads, behind a sample at most
    # The child answers in time whatever the driver does; one that is this late is stopped or broken.
    silence_s: float = 5.0
    # A dead GSP lets go of a call after 45 s; what hangs longer will not come back.
    stuck_s: float = 60.0
    end_s: float = 2.0  # to end by itself, before SIGKILL; it uses 1 s
    killed_s: float = 1.0  # to vanish after SIGKILL, before it counts as left behind
    backoff_s_first: float = 0.25
    backoff_s_max: float = 60.0
    # Children that not even SIGKILL ends each hold a driver call; more would only hang too.
    left_behind_max: int = 4


class NvmlGpus:
    """The node's GPUs through NVML, as `Gpus`.

    A GPU can be in a round's samples and errors: then some of the sample's fields failed. One that hangs is
    in errors as ERROR_TIMEOUT. While the whole driver hangs, or the child is being replaced, rounds carry the
    last identities, no samples and errors["driver"]: that says nothing about the GPUs.
    """

    def __init__(
        self, limits: NvmlLimits | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._limits = limits or NvmlLimits()
        self._environment = dict(os.environ if environment is None else environment)
        self._on_readings: Callable[[GpuReadings], None] | None = None
        self._period_s = 0.0
        self._last = GpuReadings((), (), {"driver": NOT_OPEN})
        self._sampling: asyncio.Task[None] | None = None
        self._child: _Child | None = None
        self._backoff_s = self._limits.backoff_s_first  # what the next failure costs
        self._retry_at_s = 0.0  # the loop's clock
        self._leaving: set[asyncio.Task[None]] = set()  # one per child that has not ended yet

    async def start(self, on_readings: Callable[[GpuReadings], None], period_s: float) -> GpuReadings:
        """Return the first round; deliver one every `period_s` from then on. Never raises."""
        assert self._on_readings is None, "started twice"
        self._on_readings, self._period_s = on_readings, period_s
        readings = await self._round()
        self._sampling = asyncio.create_task(self._sample_for_ever(period_s), name="nvml-sampling")
        return readings

    async def holders(self, uuid: str) -> GpuHolders:
        """Who is on this GPU now.

        Raises:
            GpuReadError: It could not be read within `holders_s`; `code` says why.
        """
        answer = await self._ask({"do": "holders", "uuid": uuid}, self._limits.holders_s)
        return holders_from_json(answer["holders"])

    async def set_power_limit(self, uuid: str, power_limit_w: float) -> GpuLimit:
        """Set this GPU's limit and read it back.

        Raises:
            GpuReadError: It was refused, was not kept, or is not known to have arrived; `code` says why.
        """
        request = {"do": "set_power_limit", "uuid": uuid, "power_limit_w": power_limit_w}
        return GpuLimit(**(await self._ask(request, self._limits.set_s))["limit"])

    async def _ask(self, request: Message, within_s: float) -> Message:
        """Return what the child answers about the GPU that the request names.

        Raises:
            GpuReadError: It answers with an error, or not in time.
        """
        uuid = request["uuid"]
        if self._child is None:
            raise GpuReadError(NOT_OPEN, f"GPU {uuid}: NVML is not open (released, or its child is starting)")
        try:
            answer = await self._child.ask({**request, "within_s": within_s}, within_s)
        except TimeoutError:
            raise GpuReadError(TIMEOUT, f"GPU {uuid} did not answer within {within_s} s") from None
        except _ChildEnded as ended:
            raise GpuReadError(NOT_OPEN, f"GPU {uuid}: {ended}") from None
        if "error" in answer:
            raise GpuReadError(answer["error"], answer["message"])
        return answer

    async def release(self) -> None:
        """End the child, and with it every handle; no reading comes until `acquire`.

        Returns after `end_s` + `killed_s` at the latest; a child that outlives that holds its GPU still, and
        the log says so.
        """
        if self._sampling:
            self._sampling.cancel()
            await asyncio.wait([self._sampling])
            self._sampling = None
        self._retire()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=self._limits.end_s + self._limits.killed_s)

    async def acquire(self) -> None:
        """Open the GPUs again after `release`; readings go on."""
        assert self._on_readings is not None, "acquire before start"
        if self._sampling is None:
            self._backoff_s, self._retry_at_s = self._limits.backoff_s_first, 0.0
            self._sampling = asyncio.create_task(self._sample_for_ever(0.0), name="nvml-sampling")

    async def close(self) -> None:
        """Stop sampling, then let go; as bounded as `release`."""
        await self.release()
        for task in self._leaving:
            task.cancel()

    async def _sample_for_ever(self, first_in_s: float) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + first_in_s
        while True:
            await self._pause(due_s)
            readings = await self._round()
            assert self._on_readings is not None
            # Not from this task: what a receiver raises must not end the sampling.
            loop.call_soon(self._on_readings, readings)
            if loop.time() >= due_s:  # else the child woke us, and the next round comes when it was due
                due_s = max(due_s + self._period_s, loop.time())  # one that was late is not made up for

    async def _pause(self, until_s: float) -> None:
        """Return at that time, or when the child has something to tell."""
        child = self._child
        if child is None:
            await asyncio.sleep(until_s - asyncio.get_running_loop().time())
            return
        try:
            async with asyncio.timeout_at(until_s):
                await child.woken.wait()
        except TimeoutError:
            return
        child.woken.clear()
        await asyncio.sleep(WAKE_S)

    async def _round(self) -> GpuReadings:
        """Return one round: the child's, or one that says why there is none."""
        limits = self._limits
        # A new child opens the GPUs first; what it says before they had time for that is no news.
        within_s = min(self._period_s, limits.round_s) if self._child else limits.first_round_s
        if self._child is None and asyncio.get_running_loop().time() < self._retry_at_s:
            return self._nothing_new(self._last.errors.get("driver", NOT_OPEN))
        if self._child is None and len(self._leaving) > limits.left_behind_max:
            return self._fail(TIMEOUT, f"{len(self._leaving)} before it hang and have not ended")
        try:
            child = self._child = self._child or await _Child.start(self._environment)
            request = {
                "do": "sample",
                "within_s": within_s,
                "stuck_s": limits.stuck_s,
                "events_after": child.events_seen,
                "list": child.list_number,
            }
            answer = await child.ask(request, within_s + limits.silence_s)
            readings = child.readings(answer)
            child.events_seen = max((number for number, _ in answer["events"]), default=child.events_seen)
            is_lost = answer["replace_me"]
        except TimeoutError:
            return self._fail(TIMEOUT, f"silent for {limits.silence_s} s")
        except (_ChildEnded, KeyError, TypeError) as error:
            return self._fail(NOT_OPEN, str(error))
        except (OSError, RuntimeError) as error:  # no process, or no thread that would wait for it
            return self._fail(NOT_STARTED, str(error))
        self._distrust(readings.driver_version)
        if readings.errors.get("driver") == TIMEOUT:
            readings = replace(self._nothing_new(TIMEOUT), events=readings.events)
        self._last = readings
        if is_lost:
            self._replace_later(f"it can't recover: {readings.errors}")
        else:
            self._backoff_s = limits.backoff_s_first
        return readings

    def _distrust(self, driver_version: str) -> None:
        """Say once of each driver that scrambles its process lists that it does."""
        if driver_version == self._last.driver_version:
            return
        branch, _, minor = driver_version.partition(".")
        if branch == SCRAMBLING_BRANCH and minor.split(".")[0] in SCRAMBLING_MINORS:
            log.warning(
                "driver %s fills its process lists with wrong PIDs: GPUs may look held by unknown processes; "
                "upgrade it to 535.98 or later",
                driver_version,
            )

    def _fail(self, code: str, message: str) -> GpuReadings:
        self._replace_later(message)
        return self._nothing_new(code)

    def _nothing_new(self, code: str) -> GpuReadings:
        self._last = GpuReadings(self._last.identities, (), {"driver": code}, self._last.driver_version)
        return self._last

    def _replace_later(self, message: str) -> None:
        self._retire()
        self._retry_at_s = asyncio.get_running_loop().time() + self._backoff_s
        log.warning("NVML child is replaced in %.2f s: %s", self._backoff_s, message)
        self._backoff_s = min(self._backoff_s * BACKOFF_FACTOR, self._limits.backoff_s_max)

    def _retire(self) -> None:
        """Tell the child to end and see to it, without waiting."""
        if self._child is not None:
            leaving = asyncio.create_task(self._child.end(self._limits), name="nvml-child-ends")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            self._child = None


class _ChildEnded(Exception):
    """The child is gone or not to be understood; the message says how that showed."""


class _Child:
    """One NVML child and the requests that it has not answered."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.events_seen = 0
        self.list_number = 0  # of the identities
        self._identities: tuple[GpuIdentity, ...] = ()
        self.woken = asyncio.Event()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._why_ended = ""
        self._receiving = asyncio.create_task(self._receive(), name="nvml-child-answers")

    @classmethod
    async def start(cls, environment: dict[str, str]) -> "_Child":
        """Return a child; what is asked of it waits until it is up.

        Raises:
            OSError: The system refused it.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # Connected first: once the process is there, nothing may come between it and its owner.
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_BYTES_MAX)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-m", CHILD_MODULE, str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                    start_new_session=True,  # a Ctrl-C is for the daemon, which ends its child in good order
                )
            except BaseException:
                writer.transport.abort()
                raise
        return cls(process, reader, writer)

    async def ask(self, request: Message, within_s: float) -> Message:
        """Return the answer.

        Raises:
            TimeoutError: There was none in time.
            _ChildEnded: There will be none.
        """
        if self._why_ended:
            raise _ChildEnded(self._why_ended)
        request_id = next(self._ids)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answer
        try:
            self._writer.write(encode({"id": request_id, **request}))
            async with asyncio.timeout(within_s):
                return await answer
        finally:
            del self._waiting[request_id]

    def readings(self, answer: Message) -> GpuReadings:
        """Return the round that the answer tells.

        Raises:
            KeyError, TypeError: It is none of this version's.
        """
        if answer["identities"] is not None:
            self._identities = tuple(GpuIdentity(**fields) for fields in answer["identities"])
            self.list_number = answer["list"]
        return GpuReadings(
            identities=self._identities,
            samples=tuple(map(sample_from_row, answer["samples"])),
            errors=answer["errors"],
            driver_version=answer["driver_version"],
            events=tuple(GpuEvent(**fields) for _, fields in answer["events"]),
        )

    async def end(self, limits: NvmlLimits) -> None:
        """Return when the process is gone: by itself if it can, else killed."""
        self._writer.transport.abort()  # the end of the stream tells it
        try:
            async with asyncio.timeout(limits.end_s):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        try:
            async with asyncio.timeout(limits.killed_s):
                await self._process.wait()
        except TimeoutError:
            log.error(
                "NVML child %d hangs in the driver, SIGKILL included, and holds its GPUs still",
                self._process.pid,
            )
            await self._process.wait()

    async def _receive(self) -> None:
        try:
            hello = decode(await self._reader.readline())
            if hello.get("protocol") == PROTOCOL_VERSION:
                while line := await self._reader.readline():
                    self._answer(decode(line))
                self._why_ended = "it ended"
            else:
                self._why_ended = f"it speaks protocol {hello.get('protocol')}, not {PROTOCOL_VERSION}"
        except (OSError, ValueError, KeyError) as error:
            self._why_ended = f"it ended, or can't be understood: {error}"
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_ChildEnded(self._why_ended))

    def _answer(self, message: Message) -> None:
        if "wake" in message:
            self.woken.set()
            return
        # An answer that nobody waits for any more came too late.
        answer = self._waiting.get(message["id"])
        if answer is not None and not answer.done():
            answer.set_result(message)
