"""What is wrong with the readings, by GPU: told in the log once, counted, and shown while it lasts.

A GPU that does not answer is *silent*: nobody knows who is on it, so it is given to nobody. One slow sample
makes none silent, and one answer after a silence is not trusted: both take two rounds.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.control.meters import Meters
from scheduler.effects.gpus import GpuReadings

log = logging.getLogger("wattshift.telemetry")

# The same trouble of the same GPU is not logged again before.
LOGGED_AGAIN_S = 3600.0
READING = "reading"
# Troubles remembered for that: a few of each of the most GPUs that are read.
LOGGED_MAX = 1024
# A reading says something of now for two periods, and a moment to arrive.
FRESH_S = 1.0
# So many rounds in a row make a GPU silent, or let it be heard again.
ROUNDS_AGREED = 2


def fresh_s(period_s: float) -> float:
    """For how long a reading counts as one of now."""
    return 2 * period_s + FRESH_S


@dataclass(slots=True)
class _Gap:
    """The rounds that a GPU has missed, or answered since."""

    since_s: float
    missed: int = 0
    answered: int = 0


class Telemetry:
    """The present troubles: by GPU (its UUID, or "index N" where it has none), then by where they show."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self.silent: dict[str, str] = {}  # by UUID: with what failure the GPU does not answer
        self._gaps: dict[str, _Gap] = {}
        self._troubles: dict[str, dict[str, str]] = {}
        self._logged_s: dict[tuple[str, str, str], float] = {}

    def read(self, readings: GpuReadings, now_s: float) -> None:
        """Take what a round says of itself; a GPU that it does not name reads well."""
        for code in readings.errors.values():
            self._meters.telemetry_errors[(code,)] += 1
        doubts = {sample.uuid: sample.doubts for sample in readings.samples if sample.doubts}
        errors = {name: code for name, code in readings.errors.items() if name != "driver"}
        told = {name: ": ".join(filter(None, (code, doubts.get(name)))) for name, code in errors.items()}
        for name in {*told, *self._troubles}:
            fields = ",".join(part.partition("=")[0] for part in doubts.get(name, "").split(", "))
            self._set(name, READING, told.get(name, ""), f"{errors.get(name)} {fields}", now_s)

    def listen(self, readings: GpuReadings, now_s: float, period_s: float) -> frozenset[str]:
        """Take who answered in a round; returns the GPUs that are silent from now on."""
        heard = {sample.uuid for sample in readings.samples}
        missed = {gpu.uuid for gpu in readings.identities} - heard
        before = frozenset(self.silent)
        for uuid in missed:
            # From the first round that it missed: between rounds the daemon may let go of all GPUs.
            gap = self._gaps.setdefault(uuid, _Gap(now_s))
            gap.since_s = min(gap.since_s, now_s)  # the clock may be set back
            gap.missed, gap.answered = gap.missed + 1, 0
            if gap.missed >= ROUNDS_AGREED and now_s - gap.since_s >= fresh_s(period_s):
                failure = readings.errors.get(uuid) or readings.errors.get("driver", "")
                self.silent[uuid] = failure
        for uuid in self._gaps.keys() - missed:
            gap = self._gaps[uuid]
            gap.missed, gap.answered = 0, gap.answered + 1
            if uuid not in heard or uuid not in self.silent or gap.answered >= ROUNDS_AGREED:
                del self._gaps[uuid]
                self.silent.pop(uuid, None)
        return frozenset(self.silent) - before

    def note(self, name: str, source: str, code: str, now_s: float) -> None:
        """Take what was found out about one figure of a GPU; "" = it is well."""
        if code:
            self._meters.telemetry_errors[(code,)] += 1
        self._set(name, source, code, code, now_s)

    def of(self, name: str) -> tuple[str, ...]:
        """The troubles with a GPU, in words that begin with their code."""
        return tuple(text for _, text in sorted(self._troubles.get(name, {}).items()))

    def nameless(self, known: Mapping[str, int]) -> str:
        """The troubles with what is none of the known GPUs, in words; or ""."""
        return "; ".join(
            f"GPU at {name} is not used: {', '.join(self.of(name))}"
            for name in sorted(self._troubles)
            if name not in known and name.startswith("index ")
        )

    def _set(self, name: str, source: str, text: str, kind: str, now_s: float) -> None:
        troubles = self._troubles.setdefault(name, {})
        if text:
            troubles[source] = text
            if now_s - self._logged_s.get((name, source, kind), -LOGGED_AGAIN_S) >= LOGGED_AGAIN_S:
                if len(self._logged_s) >= LOGGED_MAX:
                    self._logged_s.clear()
                self._logged_s[name, source, kind] = now_s
                log.warning("GPU %s: %s", name, text)
        else:
            troubles.pop(source, None)
        if not troubles:
            del self._troubles[name]
