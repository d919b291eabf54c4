"""What every RPC shares: errors as canonical statuses with details, and its two metrics."""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from scheduler.control.meters import Meters
from scheduler.errors import (
    FieldViolation,
    IllegalMove,
    InvalidRequest,
    JournalError,
    LimitReached,
    NotFound,
    RequestError,
    RequestIdReused,
    RevisionGone,
    Unavailable,
    Unreachable,
)

log = logging.getLogger("wattshift.api")

ERROR_DOMAIN = "wattshift"
# Message and details travel in header lines, the message in both and as %XX where it is not ASCII. Of more
# than 8 KiB in all gRPC's clients drop the whole status and say RESOURCE_EXHAUSTED.
MESSAGE_BYTES_MAX = 1024
DETAILS_BYTES_MAX = 2048
WORDS_BYTES_MAX = 256  # of a field's path, and of what is wrong with it
_DETAILS_KEY = "grpc-status-details-bin"
_OURS = "/wattshift."
UNREADABLE = object()

_CODES: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    RequestIdReused: grpc.StatusCode.ALREADY_EXISTS,
    IllegalMove: grpc.StatusCode.FAILED_PRECONDITION,
    Unreachable: grpc.StatusCode.FAILED_PRECONDITION,
    LimitReached: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RevisionGone: grpc.StatusCode.OUT_OF_RANGE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}

Context = grpc.aio.ServicerContext[Any, Any]
_S = TypeVar("_S")
_Q = TypeVar("_Q")
_R = TypeVar("_R")
_Unary = Callable[[_S, _Q, Context], Awaitable[_R]]
_Stream = Callable[[_S, _Q, Context], AsyncIterator[_R]]


def unary(method: _Unary[_S, _Q, _R]) -> _Unary[_S, _Q, _R]:
    """Serve one answer: counted, timed, errors translated. The servicer has a `meters`."""

    @functools.wraps(method)
    async def served(self: _S, request: _Q, context: Context) -> _R:
        meter = _Meter(self.meters, method.__name__)  # type: ignore[attr-defined]
        try:
            _check_readable(request)
            answer = await method(self, request, context)
        except asyncio.CancelledError:  # the client has gone
            meter.done(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            await refuse(context, error, meter)
        meter.done(grpc.StatusCode.OK)
        return answer

    return served


def stream(method: _Stream[_S, _Q, _R]) -> _Stream[_S, _Q, _R]:
    """Serve a stream of answers: counted, timed, errors translated. The servicer has a `meters`."""

    @functools.wraps(method)
    async def served(self: _S, request: _Q, context: Context) -> AsyncIterator[_R]:
        meter = _Meter(self.meters, method.__name__)  # type: ignore[attr-defined]
        try:
            _check_readable(request)
            async for answer in method(self, request, context):
                yield answer
        except (GeneratorExit, asyncio.CancelledError):  # the client has gone, or the daemon stops
            meter.done(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            await refuse(context, error, meter)
        meter.done(grpc.StatusCode.OK)

    return served


class Decoding(grpc.aio.ServerInterceptor):
    """Takes bytes that are no message as the caller's mistake; gRPC would log a traceback and say UNKNOWN."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler of the call, with `UNREADABLE` for a request that can't be read."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OURS):
            return handler
        decode = handler.request_deserializer

        def decoded(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError:
                return UNREADABLE

        return handler._replace(request_deserializer=decoded)


class _Meter:
    """Counts and times one call."""

    def __init__(self, meters: Meters, method: str) -> None:
        self._meters = meters
        self._method = method
        self._begun = time.perf_counter()

    def done(self, code: grpc.StatusCode) -> None:
        labels = (self._method, code.name)
        self._meters.rpc_requests[labels] += 1
        self._meters.rpc_s[labels].observe(time.perf_counter() - self._begun)


def _check_readable(request: object) -> None:
    if request is UNREADABLE:
        raise InvalidRequest(
            FieldViolation("request", "is no message of this method, or has text that is not UTF-8")
        )


async def refuse(context: Context, error: Exception, meter: _Meter) -> NoReturn:
    """End a call with the status that fits the error."""
    if isinstance(error, RequestError):
        code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
        message, details = str(error), _details(error)
    elif isinstance(error, JournalError):
        code, message, details = grpc.StatusCode.UNAVAILABLE, str(error), []
    else:
        log.error("an RPC failed", exc_info=error)
        code, message, details = grpc.StatusCode.INTERNAL, "the daemon failed; its log says why", []
    message = _shortened(message, MESSAGE_BYTES_MAX)
    meter.done(code)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(code, message, ((_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort returned")


def _details(error: RequestError) -> list[Any]:
    if isinstance(error, InvalidRequest):
        told = error_details_pb2.BadRequest()
        for wrong in error.violations:
            told.field_violations.add(
                field=_shortened(wrong.field, WORDS_BYTES_MAX),
                description=_shortened(wrong.description, WORDS_BYTES_MAX),
            )
            if told.ByteSize() > DETAILS_BYTES_MAX:
                del told.field_violations[-1]
                break
        return [told]
    return [error_details_pb2.ErrorInfo(reason=_reason(error), domain=ERROR_DOMAIN)]


def _shortened(text: str, bytes_max: int) -> str:
    """The text, cut to a number of bytes."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= bytes_max:
        return text
    return encoded[: bytes_max - len("…".encode())].decode(errors="ignore") + "…"


def _reason(error: RequestError) -> str:
    """The error's own name in capitals: `LIMIT_REACHED`."""
    name = type(error).__name__
    return "".join("_" + c if c.isupper() and i else c.upper() for i, c in enumerate(name)).upper()
