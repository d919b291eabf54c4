"""How often a GPU's energy counter is asked for: as often as what it costs allows.

`nvmlDeviceGetTotalEnergyConsumption` keeps a core busy for 4.0 ms on an H100 under driver 580, ten times what
the rest of a sample takes: on eight GPUs, asked for each second, more than 3 % of a core.
"""

import time
from collections.abc import Callable

# What the counter may cost, seconds of a core each second.
COST_MAX = 0.001
# Yet it is asked for so often, well before one that stands still is taken for silent.
PERIOD_S_MAX = 5.0


class EnergyCounter:
    """The counter of one GPU; between two times that it is asked for, it stands as it was told last."""

    def __init__(self, cpu_s: Callable[[], float] = time.thread_time) -> None:
        self._cpu_s = cpu_s
        self._told_mj: int | None = None
        self._told_s = 0.0
        self._period_s = 0.0

    def read(self, at_s: float, ask: Callable[[], int | None]) -> int | None:
        """Return the counter, in millijoules, asked for where it is due; None where there is none."""
        if self._told_mj is None or not 0.0 <= at_s - self._told_s < self._period_s:
            begun_s = self._cpu_s()
            self._told_mj, self._told_s = ask(), at_s
            self._period_s = min(PERIOD_S_MAX, (self._cpu_s() - begun_s) / COST_MAX)
        return self._told_mj
