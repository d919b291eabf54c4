"""What a GPU used between two readings: by its counter, or by its draw where the counter does not say.

The counter is NVML's total energy in millijoules since the driver was loaded. It begins anew with the driver,
a 32-bit one begins anew when it is full, and a library may say anything. A difference is never booked that is
negative, or more than any board draws. `docs/operating/energy.md` says the same for operators.
"""

from dataclasses import dataclass

from scheduler.model.gpus import POWER_W_MAX

# What went wrong with an interval; a log line, and a label of wattshift_telemetry_errors_total.
COUNTER_RESET = "ENERGY_COUNTER_RESET"  # it began anew, as it does with the driver
COUNTER_BACKWARDS = "ENERGY_COUNTER_BACKWARDS"
COUNTER_JUMPED = "ENERGY_COUNTER_JUMPED"  # by more than any board draws
COUNTER_SILENT = "ENERGY_COUNTER_SILENT"  # it was there, and is absent or stands still
GAP = "ENERGY_GAP"  # no counter, and no reading for too long: nothing is booked

# So long a counter is waited for that is absent, stands still or can't be: once well again, it says what was
# used meanwhile. Then what was drawn is booked, and counted from what it shows.
PATIENCE_S = 60.0
# One that stands still for less may only be slow.
SILENT_S = 10.0
# Between readings that are further apart nothing is known of the draw.
BRIDGED_S_MAX = 3600.0
# A counter is brought up to date ten times a second or so: what it shows may be older than the reading.
LAG_S = 1.0
_MJ_PER_J = 1000
_WRAP = 2**32


@dataclass(frozen=True, slots=True)
class Used:
    """Energy of one GPU over an interval of time."""

    since_s: float
    until_s: float  # not after `since_s` where the clock was set back
    energy_mj: int


class EnergyMeter:
    """One GPU's energy, from reading to reading."""

    def __init__(self, at_s: float, counter_mj: int | None, power_w: float | None) -> None:
        """Begin with a reading: what was used before it is not ours to count."""
        self.at_s = at_s  # up to here it is counted
        self.counter_mj = counter_mj  # as it stood then
        self.power_w = power_w  # at the last reading
        self.seen_s = at_s  # the last reading
        self.fault = ""  # of it
        self._drawn_mj = 0.0  # since `at_s`, by the draw
        self._drawn_at: list[tuple[float, float]] = []  # how much of it up to each reading
        self._has_gap = False

    def driver_is_new(self) -> None:
        """Know that the driver was loaded since the last reading, nobody knows when: its counter is new."""
        self._has_gap = True
        if self.counter_mj is not None:
            self.counter_mj = 0

    def read(
        self, at_s: float, counter_mj: int | None, power_w: float | None, held_until_s: float = 0.0
    ) -> tuple[Used, ...]:
        """Take a reading; return what was used since the last that counted, nothing while that can't be said.

        `held_until_s`: when the last job left the GPU that had it since; its driver can't be unloaded before.
        """
        if at_s == self.seen_s:
            return ()
        before_mj = self._drawn_mj + (self.power_w or 0.0) * max(0.0, held_until_s - self.seen_s) * _MJ_PER_J
        self._draw(at_s, power_w)
        waited_s = at_s - self.at_s
        energy_mj, self.fault = self._by_counter(counter_mj, waited_s)
        if energy_mj is None:
            if self.counter_mj is not None and 0.0 <= waited_s < PATIENCE_S:
                return ()
            energy_mj = self._by_draw
        used = self._spread(at_s, energy_mj)
        if self.fault == COUNTER_RESET and waited_s >= PATIENCE_S and self.at_s < held_until_s < at_s:
            used = [
                Used(self.at_s, held_until_s, round(before_mj)),
                Used(held_until_s, at_s, energy_mj),
            ]
        self.at_s, self.counter_mj = at_s, counter_mj
        self._drawn_mj, self._drawn_at, self._has_gap = 0.0, [], False
        return tuple(used)

    def _spread(self, at_s: float, energy_mj: int) -> list[Used]:
        """Spread it over the readings that the counter was waited for, in proportion to the draw.

        In one piece where that is not known. Time of which it is not goes with the reading after it.
        """
        is_known = not self._has_gap and self._drawn_mj > 0.0
        if not is_known or len(self._drawn_at) < 2 or self._drawn_at[-1][0] != at_s:
            return [Used(self.at_s, at_s, energy_mj)]
        found: list[Used] = []
        since_s, given_mj = self.at_s, 0
        for until_s, drawn_mj in self._drawn_at:
            upto_mj = round(energy_mj * (drawn_mj / self._drawn_mj))
            found.append(Used(since_s, until_s, upto_mj - given_mj))
            since_s, given_mj = until_s, upto_mj
        return found

    def _draw(self, at_s: float, power_w: float | None) -> None:
        """Integrate the draw up to this reading, as a straight line from the last."""
        elapsed_s = max(0.0, at_s - self.seen_s)
        known_w = [watts for watts in (self.power_w, power_w) if watts is not None]
        if elapsed_s > BRIDGED_S_MAX:
            self._has_gap = True
        elif known_w:
            self._drawn_mj += sum(known_w) / len(known_w) * elapsed_s * _MJ_PER_J
            self._drawn_at.append((at_s, self._drawn_mj))
        self.seen_s, self.power_w = at_s, power_w

    @property
    def _by_draw(self) -> int:
        return 0 if self._has_gap else round(self._drawn_mj)

    def _by_counter(self, counter_mj: int | None, waited_s: float) -> tuple[int | None, str]:
        """Return what the counter says that was used, None where it can't be believed; and what is wrong."""
        if self.counter_mj is None:
            return None, GAP if self._has_gap else ""
        if counter_mj is None or counter_mj == self.counter_mj:
            draws = counter_mj is None or self.power_w is None or self._drawn_mj > _MJ_PER_J
            return None, COUNTER_SILENT if waited_s >= SILENT_S and draws else ""
        difference_mj = counter_mj - self.counter_mj
        # Where the clock was set back nobody knows how long it was, and waiting might take a day.
        lasted_s = waited_s if waited_s >= 0.0 else BRIDGED_S_MAX
        possible_mj = _possible_mj(lasted_s)
        if difference_mj > 0:
            return (difference_mj, "") if difference_mj <= possible_mj else (None, COUNTER_JUMPED)
        # The draw knows what was used before a counter began anew, but not even whether the GPU was on where
        # nobody looked for longer.
        drawn_mj = self._by_draw if waited_s < PATIENCE_S else 0
        full_mj = difference_mj + _WRAP
        if self.counter_mj < _WRAP and drawn_mj / 2 <= full_mj <= drawn_mj * 2:
            return full_mj, ""
        if 0 <= counter_mj <= possible_mj:
            return max(counter_mj, drawn_mj), COUNTER_RESET
        return None, COUNTER_BACKWARDS


def begins_anew(counter_mj: int, before_mj: int, lasted_s: float) -> bool:
    """Whether a counter fell as one does that began anew: to what could be drawn in so many seconds."""
    return counter_mj < before_mj and counter_mj <= _possible_mj(max(0.0, lasted_s))


def _possible_mj(lasted_s: float) -> float:
    return POWER_W_MAX * (lasted_s + LAG_S) * _MJ_PER_J
