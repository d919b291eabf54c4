"""What a person reads, and what a script gets, when a command fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.cli.exit_codes import ExitCode, of_status

if TYPE_CHECKING:
    import grpc

DETAILS_KEY = "grpc-status-details-bin"


class CliError(Exception):
    """A command failed: lines for a person, a code for a script."""

    def __init__(self, code: ExitCode, *lines: str) -> None:
        assert lines
        super().__init__("\n".join(lines))
        self.code = code
        self.lines = lines


class ConnectionLost(CliError):
    """A stream that had begun was cut; the caller may open it again."""


def unreachable(address: str, waited_s: float, cause: str) -> CliError:
    """Return the error of an address where no server answers, with what to do about it."""
    if "Permission denied" in cause:
        return CliError(
            ExitCode.DENIED,
            f"you may not open {address}; ask its owner to add you to the group that may, "
            "or name another server with --address or WATTSHIFT_ADDRESS",
        )
    why = f" ({cause})" if cause else ""
    return CliError(
        ExitCode.UNREACHABLE,
        f"no server answers at {address} after {waited_s:g} s{why}; start one with `wattshift serve`, "
        "or name another with --address or WATTSHIFT_ADDRESS",
    )


def connect_cause(details: str) -> str:
    """Return the last words, the operating system's, of gRPC's long account of a failed connection."""
    return details.rpartition(": ")[2].strip()


def from_rpc(error: grpc.RpcError) -> CliError:
    """Return what a failed call says to a person: the fields that are wrong, else the server's message."""
    name = error.code().name
    message = (error.details() or "").strip() or name.lower().replace("_", " ")
    code = of_status(name)
    if name == "UNIMPLEMENTED":
        return CliError(code, f"this server does not know the call: {message}; is it of another version?")
    if name == "DEADLINE_EXCEEDED":
        return CliError(code, "the server did not answer in time; it may be overloaded or stopped")
    return CliError(code, *(_violations(error) or (message,)))


def answered(error: grpc.RpcError) -> bool:
    """Return whether the status comes from the server itself, not from a connection that failed."""
    return any(entry.key == DETAILS_KEY for entry in error.trailing_metadata() or ())


def _violations(error: grpc.RpcError) -> list[str]:
    """Return the fields that the server found wrong, a line each."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    lines: list[str] = []
    for entry in error.trailing_metadata() or ():
        if entry.key != DETAILS_KEY or not isinstance(entry.value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(entry.value)
        except DecodeError:
            continue  # a proxy's own details; the message still says what happened
        for detail in status.details:
            bad_request = error_details_pb2.BadRequest()
            if detail.Unpack(bad_request):
                lines += [
                    f"{v.field.removeprefix('spec.')}: {v.description}" for v in bad_request.field_violations
                ]
    return lines
