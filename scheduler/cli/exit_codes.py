"""Exit codes of every `wattshift` command, in one place; the help and docs/operating/cli.md show them."""

from enum import IntEnum

SIGNAL_BASE = 128  # shells report death by signal n as 128 + n


class ExitCode(IntEnum):
    """How a command ended. From 64 on the numbers are those of sysexits.h, timeout(1) and the shells."""

    OK = 0
    FAILED = 1
    INVALID = 2
    NOT_FOUND = 3
    PRECONDITION = 4
    LIMIT = 5
    EXISTS = 6
    GONE = 7
    DENIED = 8
    CANCELLED = 9
    UNREACHABLE = 69
    INTERNAL = 70
    INPUT_OUTPUT = 74
    TRY_AGAIN = 75
    CONFIG = 78
    TIMEOUT = 124
    INTERRUPTED = 130
    PIPE = 141


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "Done; a job that was waited for succeeded.",
    ExitCode.FAILED: "The job that was waited for failed and left no exit code; a check failed.",
    ExitCode.INVALID: "The command line or the request is wrong; the message names the option or field.",
    ExitCode.NOT_FOUND: "No such job or GPU.",
    ExitCode.PRECONDITION: "The present state does not allow it, such as cancelling a finished job.",
    ExitCode.LIMIT: "A named limit is reached; try again later.",
    ExitCode.EXISTS: "The request id was used before, for another job.",
    ExitCode.GONE: "What was asked for is no longer kept.",
    ExitCode.DENIED: "Not allowed.",
    ExitCode.CANCELLED: "The job that was waited for was cancelled and left no exit code but 0.",
    ExitCode.UNREACHABLE: "No server answers at the address.",
    ExitCode.INTERNAL: "The server failed; its log says why.",
    ExitCode.INPUT_OUTPUT: "A file could not be read or written.",
    ExitCode.TRY_AGAIN: "The server answers but can't do it at the moment.",
    ExitCode.CONFIG: "The configuration is wrong; the message names file and key.",
    ExitCode.TIMEOUT: "`wait --timeout` ran out; the job goes on.",
    ExitCode.INTERRUPTED: "Ctrl-C; a job that was waited for goes on.",
    ExitCode.PIPE: "Whoever read the output has closed it.",
}

# Keyed by the names of gRPC's codes, so that nothing here needs to import gRPC.
OF_STATUS: dict[str, ExitCode] = {
    "INVALID_ARGUMENT": ExitCode.INVALID,
    "NOT_FOUND": ExitCode.NOT_FOUND,
    "FAILED_PRECONDITION": ExitCode.PRECONDITION,
    "ABORTED": ExitCode.PRECONDITION,
    "RESOURCE_EXHAUSTED": ExitCode.LIMIT,
    "ALREADY_EXISTS": ExitCode.EXISTS,
    "OUT_OF_RANGE": ExitCode.GONE,
    "PERMISSION_DENIED": ExitCode.DENIED,
    "UNAUTHENTICATED": ExitCode.DENIED,
    "UNAVAILABLE": ExitCode.TRY_AGAIN,
    "DEADLINE_EXCEEDED": ExitCode.UNREACHABLE,
}


def of_status(name: str) -> ExitCode:
    """Return the exit code for a gRPC status; what a client can't act upon is INTERNAL."""
    return OF_STATUS.get(name, ExitCode.INTERNAL)


def of_job(state: str, exit_code: int | None) -> int:
    """Return the exit code that a final job gives to whoever waited for it.

    The job's own code wins, but never 0 for a job that did not succeed.

    Args:
        state: SUCCEEDED, FAILED or CANCELLED.
        exit_code: The job's; None where it has none.
    """
    if state == "SUCCEEDED":
        return exit_code or ExitCode.OK
    return exit_code or (ExitCode.CANCELLED if state == "CANCELLED" else ExitCode.FAILED)


def table() -> str:
    """Return the table as the help shows it, one line a code."""
    return "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())
