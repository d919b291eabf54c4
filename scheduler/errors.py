"""Every error type of Wattshift, under two roots.

    WattshiftError
    ├── RequestError            the caller can fix it; becomes a gRPC status
    │   ├── InvalidRequest      fields that are wrong, each with its remedy    INVALID_ARGUMENT
    │   ├── Infeasible          can never run on this node                     INVALID_ARGUMENT
    │   ├── NotFound            no such job, GPU                               NOT_FOUND
    │   ├── RequestIdReused     same request_id, another submission            ALREADY_EXISTS
    │   ├── Unreachable         a grid event asks for less than can be reached FAILED_PRECONDITION
    │   ├── IllegalMove         the job's state does not allow it              FAILED_PRECONDITION
    │   ├── LimitReached        a named limit; "not now"                       RESOURCE_EXHAUSTED
    │   ├── RevisionGone        a watch can't be resumed from there            OUT_OF_RANGE
    │   └── Unavailable         the node can't do it at the moment             UNAVAILABLE
    └── NodeError               the operator must act
        ├── ConfigError         a key of the config file, with its line
        ├── InputError          a cell of a file given to `simulate`, with its line
        ├── JournalError
        │   ├── JournalCorrupt  the chain is broken or a row can't be read
        │   ├── JournalFull     the disk took no more
        │   └── StateLocked     another daemon owns the state directory
        ├── LauncherError       the launcher can't be reached or misbehaves
        ├── GpuReadError        a GPU could not be read
        ├── FeedError           a source of prices or grid signals could not be read
        ├── BackendUnavailable  the array library that was asked for is not there, or has no GPU
        ├── InstallationError   this environment can't run the daemon
        └── SimulationStuck     a simulated world in which nothing can happen any more

`FrameError`, `SnapshotError` and `TransitionError` are defects of ours: they derive from AssertionError.
"""

from dataclasses import dataclass


class WattshiftError(Exception):
    """Root of what Wattshift raises on purpose."""


class RequestError(WattshiftError):
    """The caller can fix it."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request: its path and what to do about it."""

    field: str
    description: str


class InvalidRequest(RequestError):
    """One or more fields are wrong; each is named."""

    def __init__(self, *violations: FieldViolation) -> None:
        assert violations
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class Infeasible(InvalidRequest):
    """The request can never be met on this node; the field that rules it out is named."""


class NotFound(RequestError):
    """No such thing; `kind` says what was looked for."""

    def __init__(self, kind: str, name: str, remedy: str = "") -> None:
        super().__init__(f"no {kind} {name!r}" + (f"; {remedy}" if remedy else ""))
        self.kind = kind
        self.name = name


class RequestIdReused(RequestError):
    """A request_id was sent again with another submission."""

    def __init__(self, request_id: str, job_id: str) -> None:
        super().__init__(
            f"request_id {request_id!r} was used for job {job_id} with another specification; "
            "use a new request_id for a new job"
        )


class IllegalMove(RequestError):
    """The job's present state does not allow what was asked."""


class Unreachable(RequestError):
    """A grid event asks for less than can be reached by its start; the floor is named."""

    def __init__(self, asked_w: float, floor_w: float, why: str) -> None:
        super().__init__(
            f"{asked_w:g} W can't be reached by then; the least is {floor_w:.0f} W ({why}); offer that or "
            "more, a later start, or an emergency"
        )
        self.floor_w = floor_w


class LimitReached(RequestError):
    """A named limit is reached; try again later."""

    def __init__(self, limit: str, value: int, remedy: str) -> None:
        super().__init__(f"limit {limit} = {value} is reached; {remedy}")
        self.limit = limit


class RevisionGone(RequestError):
    """A watch asked to resume from a revision that is no longer kept."""


class Unavailable(RequestError):
    """The node can't do it at the moment; the caller may try again."""


class NodeError(WattshiftError):
    """The operator must act."""


class ConfigError(NodeError):
    """A key of the configuration is wrong; the message names file, line and key."""


class InputError(NodeError):
    """A file given to the simulation is wrong; the message names file, line and column."""


class JournalError(NodeError):
    """The journal can't be used."""


class JournalCorrupt(JournalError):
    """The hash chain is broken or a row can't be read."""


class JournalFull(JournalError):
    """The disk took no more; nothing of the last transaction was kept."""


class StateLocked(JournalError):
    """Another daemon owns the state directory."""


class LauncherError(NodeError):
    """The launcher can't be reached or broke its protocol."""


class GpuReadError(NodeError):
    """A GPU could not be read; `code` is the library's name for the failure."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FeedError(NodeError):
    """A source of prices or grid signals could not be read, or what it sent makes no sense."""


class BackendUnavailable(NodeError):
    """The array library that was asked for can't plan here; the message says what to install."""


class InstallationError(NodeError):
    """This Python environment can't run the daemon."""


class SimulationStuck(NodeError):
    """Nothing in the simulated world can ever happen again, and somebody still waits."""


class FrameError(AssertionError):
    """Stored inputs of a plan can't be read; nothing is known of those told against them."""


class SnapshotError(AssertionError):
    """A snapshot contradicts itself; the message names the row."""


class TransitionError(AssertionError):
    """An event does not fit the state of its job; nothing was changed."""
