"""Whose processes a GPU's lists name: PIDs looked up in /proc, entries that name nobody kept as unknown."""

import functools
import pwd
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scheduler.effects.job_signals import start_ticks
from scheduler.model.gpus import PID_LIMIT, GpuProcess

# Any node has fewer users on its GPUs; a lookup may ask a directory server.
USERS_CACHED_MAX = 256
COMM_LENGTH_MAX = 15  # the kernel cuts /proc/<pid>/comm here
NAME_LENGTH_MAX = 255  # NAME_MAX of a file system
# More than fit on any GPU, and their names fit in a line of the protocol; one entry is enough to be held.
PROCESSES_MAX = 512
BYTES_PER_MIB = 2**20
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose process it is, what it runs, and since when."""

    user: str
    command: str
    start_ticks: int


def merge_processes(
    entries: Iterable[tuple[str, int, int | None]], utilization: Mapping[int, float] | None = None
) -> tuple[GpuProcess, ...]:
    """Return one process per living PID, by PID, and one unknown holder (PID 0) per entry that names none.

    Args:
        entries: (kind, PID, bytes) as listed. A process in several lists keeps its first kind and the
            largest figure, because each list reports all that the process holds.
        utilization: By PID how busy it keeps the GPU, as far as that is known.
    """
    merged: dict[int, tuple[str, int | None]] = {}
    unknown: list[GpuProcess] = []
    for kind, pid, memory_bytes in entries:
        memory_mib = None if memory_bytes is None else memory_bytes // BYTES_PER_MIB
        if not 0 < pid < PID_LIMIT:
            unknown.append(GpuProcess(pid=0, memory_mib=memory_mib, kind=kind, listed_pid=pid))
            continue
        first_kind, first_mib = merged.get(pid, (kind, None))
        known = [mib for mib in (first_mib, memory_mib) if mib is not None]
        merged[pid] = (first_kind, max(known, default=None))
    living: list[GpuProcess] = []
    busy = utilization or {}
    for pid, (kind, mib) in sorted(merged.items())[:PROCESSES_MAX]:
        owner = owner_of(pid)
        if owner is None:
            unknown.append(GpuProcess(pid=0, memory_mib=mib, kind=kind, listed_pid=pid))
        else:
            named = (owner.user, owner.command, busy.get(pid), owner.start_ticks)
            living.append(GpuProcess(pid, mib, kind, *named))
    return (*unknown, *living)[:PROCESSES_MAX]


def owner_of(pid: int) -> Owner | None:
    """Return whose process it is and what it runs, or None if there is no such process."""
    status = read_text(PROC / str(pid) / "status")
    uid = next((line.split()[1] for line in status.splitlines() if line.startswith("Uid:")), "")
    if not uid:
        return None
    return Owner(_user_name(int(uid)), _command(pid), start_ticks(pid))


@functools.lru_cache(maxsize=USERS_CACHED_MAX)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _command(pid: int) -> str:
    """Return the base name of the executable, or the process's own word where we may not look."""
    process = PROC / str(pid)
    try:
        name = (process / "exe").readlink().name
    except OSError:
        comm = read_text(process / "comm").strip()
        argument = read_text(process / "cmdline").split("\0", 1)[0].rsplit("/", 1)[-1]
        is_cut = len(comm) == COMM_LENGTH_MAX and argument.startswith(comm)
        name = argument if is_cut else comm
    return printable(name.removesuffix(" (deleted)"), NAME_LENGTH_MAX)


def printable(name: str, length_max: int) -> str:
    """Return a foreign word without what would steer an operator's terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:length_max]


def read_text(path: Path) -> str:
    """Return what the file holds, or "" where it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
