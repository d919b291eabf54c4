"""Figures that can't be: a library that lies costs the figure that it lies about, and says so.

Ranges are wide: what is only odd is passed on. Absent figures are in every range.
"""

from collections.abc import Callable, Mapping
from typing import Any

from scheduler.model.gpus import POWER_W_MAX

# A board that is on draws something; some say zero for ever.
_POWER_W = (0.001, POWER_W_MAX)
_CELSIUS = (0.0, 200.0)  # who is on is warm
_CLOCK_MHZ = (0, 20_000)
_RATIO = (0.0, 1.0)
_COUNT = (0, 2**32 - 2)  # all ones are no count
MEMORY_MIB_MAX = 2**23  # 8 TiB
# The journal's integers have 63 bits.
ENERGY_MJ_MAX = 2**63 - 1

SAMPLE_RANGES: dict[str, tuple[float, float]] = {
    "utilization_ratio": _RATIO,
    "memory_utilization_ratio": _RATIO,
    "encoder_utilization_ratio": _RATIO,
    "decoder_utilization_ratio": _RATIO,
    "fan_speed_ratio": (0.0, 2.0),  # it may be more than what counts as full speed [nvml.h]
    "power_w": _POWER_W,
    "power_w_average": _POWER_W,
    "power_limit_w": _POWER_W,
    "power_limit_w_enforced": _POWER_W,
    "power_capped_s": (0.0, 1e10),
    "energy_mj": (0, ENERGY_MJ_MAX),
    "temperature_celsius": _CELSIUS,
    "memory_temperature_celsius": _CELSIUS,
    "sm_clock_mhz": _CLOCK_MHZ,
    "memory_clock_mhz": _CLOCK_MHZ,
    "clock_reasons": (0, 2**32 - 1),
    "ecc_corrected": _COUNT,
    "ecc_uncorrected": _COUNT,
    "rows_remapped_corrected": _COUNT,
    "rows_remapped_uncorrected": _COUNT,
    "recovery_action": (0, 255),  # a word that we do not know asks for a person; all ones are no word
    "ramp_down_w_per_s": (0.0, 1e6),
    "nvlink_tx_bytes": (0, 2**63 - 1),
    "nvlink_rx_bytes": (0, 2**63 - 1),
}
IDENTITY_RANGES: dict[str, tuple[float, float]] = {
    "memory_total_mib": (0, MEMORY_MIB_MAX),
    "numa": (0, 4096),
    "minor_number": (0, 2**20),
    "power_limit_w_min": _POWER_W,
    "power_limit_w_max": _POWER_W,
    "power_limit_w_default": _POWER_W,
    "sm_clock_mhz_max": _CLOCK_MHZ,
    "temperature_celsius_slowdown": _CELSIUS,
    "temperature_celsius_shutdown": _CELSIUS,
}


def doubtful(figure: Callable[[str], Any], ranges: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Return by name the figures that are outside of what can be; `figure` gives one by its name."""
    return {
        name: value
        for name, (low, high) in ranges.items()
        if (value := figure(name)) is not None and not low <= value <= high
    }


def doubtful_memory(used_mib: int | None, total_mib: int) -> dict[str, Any]:
    """Return the figure by its name where more memory is used than there is."""
    return {"memory_used_mib": used_mib} if 0 < total_mib < (used_mib or 0) else {}


def in_words(doubts: Mapping[str, Any]) -> str:
    """Return what was said that can't be: "power_w=0.0, temperature_celsius=4294967295.0"."""
    return ", ".join(f"{name}={value}" for name, value in sorted(doubts.items()))


def is_uuid(text: str) -> bool:
    """Whether a program can be told to use it: one word of letters, digits, dashes and slashes."""
    return text.isascii() and bool(text) and all(letter.isalnum() or letter in "-/" for letter in text)
