"""What the driver lets this daemon do: told in the log once it changes, and shown while it lasts.

A problem keeps jobs from running, or may soon. A limitation does not: it says what would not work if it were
asked for, and what would change that. Both are sentences for operators, and end in what to do.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, MutableMapping

from scheduler.control.board import GpuBoard
from scheduler.effects.gpus import GpuReadings
from scheduler.model.gpus import GpuIdentity

log = logging.getLogger("wattshift.driver")

# Kinds of problems. Without a driver the node is not ready; without a GPU it is.
DRIVER = "driver"
MISSING = "missing_gpus"
NO_PERMISSION = "ERROR_NO_PERMISSION"
# By NVML's name of what it answers when it is opened.
REMEDIES = {
    "ERROR_LIBRARY_NOT_FOUND": "libnvidia-ml.so.1 is not on this machine; install NVIDIA's driver",
    "ERROR_DRIVER_NOT_LOADED": "the driver's kernel module is not loaded; `modprobe nvidia`",
    "ERROR_LIB_RM_VERSION_MISMATCH": (
        "the driver's library and its kernel module are of two versions; load the new module, or reboot"
    ),
    "ERROR_GPU_NOT_FOUND": "the driver has none; `lspci -d 10de:` shows what is plugged in",
    "ERROR_TIMEOUT": "the driver does not answer; `journalctl -k -g NVRM` says what hurts it",
    "ERROR_UNINITIALIZED": "the process that reads them is being started anew",
    NO_PERMISSION: "the daemon's user may not open /dev/nvidiactl; `ls -l /dev/nvidia*`",
}
GRANT = "run the daemon as root, or give its unit CAP_SYS_ADMIN (operating/systemd.md)"


class Abilities:
    """Keeps up with each round of readings."""

    def __init__(self, problems: MutableMapping[str, str]) -> None:
        """Keep the node's problems up to date, as far as they are the driver's."""
        self._problems = problems
        self.limitations: tuple[str, ...] = ()

    def read(self, readings: GpuReadings, board: GpuBoard) -> None:
        """Take a round, which the board has taken."""
        had_driver = DRIVER not in self._problems
        problem = driver_problem(readings.errors.get("driver", ""))
        self._put(DRIVER, problem)
        self._put(MISSING, "" if problem else missing_gpus(board))
        if not problem and not had_driver:
            log.info("GPUs can be read: driver %s, %d GPUs", readings.driver_version, len(board.row))
        told, self.limitations = self.limitations, limitations(board.identities)
        for text in self.limitations:
            if text not in told:
                log.warning("%s", text)

    def _put(self, kind: str, problem: str) -> None:
        if problem and self._problems.get(kind) != problem:
            log.error("%s", problem)
        if problem:
            self._problems[kind] = problem
        else:
            self._problems.pop(kind, None)


def driver_problem(code: str) -> str:
    """Return why no GPU can be read, and what to do about it; "" where the driver answers."""
    return ": ".join(filter(None, ("no GPU can be read", code, REMEDIES.get(code)))) if code else ""


def missing_gpus(board: GpuBoard) -> str:
    """Return which GPUs of jobs were never seen since the daemon's start; "" where all were."""
    return "; ".join(
        f"GPU {uuid} of {', '.join(job.id for job in jobs)} is not in the driver's list: it was removed, "
        "or is lost since before the daemon's start"
        for uuid, jobs in sorted(board.held_unseen().items())
    )


def limitations(known: Iterable[GpuIdentity]) -> tuple[str, ...]:
    """Return what can't be done with these GPUs, a sentence for each cause."""
    refused: defaultdict[str, set[int]] = defaultdict(set)
    for gpu in known:
        if gpu.power_limit_refusal:
            refused[gpu.power_limit_refusal].add(gpu.index)
    return tuple(_refusal(code, sorted(indices)) for code, indices in sorted(refused.items()))


def _refusal(code: str, indices: list[int]) -> str:
    gpus = ", ".join(map(str, indices))
    remedy = f"; {GRANT}" if code == NO_PERMISSION else ""
    return f"power limits can't be set on GPU {gpus}: {code}; jobs run all the same{remedy}"
