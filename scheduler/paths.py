"""Where the daemon keeps its things and where a client finds it, for root and for an ordinary user.

Stdlib only, and little of it: every `wattshift` command pays for this import.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM_SOCKET = Path("/run/wattshift/wattshift.sock")


@dataclass(frozen=True, slots=True)
class Paths:
    """The places of one daemon."""

    config: Path  # a file
    state_dir: Path
    socket: Path

    @property
    def address(self) -> str:
        """The socket as clients write it: `unix:///path`."""
        return f"unix://{self.socket}"


SYSTEM = Paths(
    config=Path("/etc/wattshift/wattshift.toml"),
    state_dir=Path("/var/lib/wattshift"),
    socket=SYSTEM_SOCKET,
)


def for_daemon(environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Paths:
    """Return the defaults of a daemon started by `uid` (None = the caller): the system's for root."""
    uid = os.geteuid() if uid is None else uid
    return SYSTEM if uid == 0 else for_user(environ, uid)


def for_user(environ: Mapping[str, str], uid: int) -> Paths:
    """Return an ordinary user's defaults, after the XDG base directory specification.

    A variable that is unset, empty or relative counts as unset, as the specification says. Without
    XDG_RUNTIME_DIR (no login session) the socket lies in a directory of its own under /tmp, which
    `make_private` must have made or checked before anyone trusts it.
    """
    home = _absolute(environ.get("HOME")) or Path("/")
    config = _absolute(environ.get("XDG_CONFIG_HOME")) or home / ".config"
    state = _absolute(environ.get("XDG_STATE_HOME")) or home / ".local/state"
    runtime = _absolute(environ.get("XDG_RUNTIME_DIR")) or _temporary_runtime_dir(uid)
    return Paths(
        config=config / "wattshift/wattshift.toml",
        state_dir=state / "wattshift",
        socket=runtime / "wattshift.sock",
    )


def default_address(
    environ: Mapping[str, str] = os.environ, uid: int | None = None, system_socket: Path = SYSTEM_SOCKET
) -> str:
    """Return the address that a client tries where none was given.

    The system's daemon for root, and for whoever may write to its socket; else the user's own.
    """
    uid = os.geteuid() if uid is None else uid
    if uid == 0 or os.access(system_socket, os.W_OK):
        return f"unix://{system_socket}"
    return for_user(environ, uid).address


def make_private(directory: Path) -> None:
    """Make a directory of mode 0700 with its parents, or check one that is there.

    Raises:
        PermissionError: It belongs to someone else or others may write to it, so that what lies in it
            can't be trusted: /tmp is everybody's.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(directory):
        raise PermissionError(
            f"{directory}: must be a directory of the calling user, writable by nobody else"
        )


def is_private(directory: Path, uid: int | None = None) -> bool:
    """Return whether it is a directory, not a link, of `uid` (None = the caller), writable by nobody else."""
    uid = os.geteuid() if uid is None else uid
    try:
        status = directory.lstat()
    except OSError:
        return False
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not others_write


def _temporary_runtime_dir(uid: int) -> Path:
    return Path(f"/tmp/wattshift-{uid}")


def _absolute(value: str | None) -> Path | None:
    return Path(value) if value and Path(value).is_absolute() else None
