"""The clock: the only place where the daemon learns the time of day."""

import time
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """Tells the time."""

    def now_s(self) -> float:
        """Unix time in seconds."""


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        return time.time()


def boot_id() -> str:
    """The kernel's name for this boot; another one means that every process of before is gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
