"""Boards that the fake can be, as far as their drivers tell them apart.

Limits and memory are NVIDIA's own mock profiles and data sheets; sensor windows those that were measured
[JimZeyuYang/GPU_Power_Benchmark]; what a board does not report is ABSENT, as its driver answers.
"""

from dataclasses import dataclass, field

ABSENT = 2**64 - 1
LIVE = 2**64 - 2
MIB = 2**20
SCOPE_GPU, SCOPE_MODULE = 0, 1
# Single- and double-bit ECC, XID, MIG change, GPU unavailable, recovery action.
EVENTS_DATA_CENTRE = 0x1 | 0x2 | 0x8 | 0x100 | 0x4000 | 0x8000
SWITCHES = tuple(f"00000000:{bus:02X}:00.0" for bus in (0xC4, 0xC5, 0xC6, 0xC7))
LINKS_MAX = 18

# Everything that any board reports; the figures are an H100's at rest.
WHOLE = {
    "memory_reserved": 308 * MIB,
    "memory_used": 4 * MIB,
    "utilization_percent": 0,
    "memory_utilization_percent": 0,
    "encoder_percent": 0,
    "decoder_percent": 0,
    "power_instant_mw": 71_800,
    "power_average_mw": 72_000,
    "limit_enforced_mw": LIVE,
    "limit_outside_mw": ABSENT,
    "energy_mj": 1_000_000,
    "temperature_celsius": 31,
    "memory_temperature_celsius": 38,
    "slowdown_celsius": 87,
    "shutdown_celsius": 92,
    "sm_clock_mhz": 345,
    "memory_clock_mhz": 2619,
    "memory_clock_max_mhz": 2619,
    "clock_reasons": 1,
    "power_capped_ns": 0,
    "performance_state": 0,
    "fan_percent": ABSENT,
    "persistence": 1,
    "ecc_corrected": 0,
    "ecc_uncorrected": 0,
    "remapped_corrected": 0,
    "remapped_uncorrected": 0,
    "remap_pending": 0,
    "remap_failure": 0,
    "recovery_action": 0,
    "event_types": EVENTS_DATA_CENTRE,
    "numa_node": ABSENT,
    "mig_mode": 0,
    "mig_instances_max": 7,
    "video_clock_mhz": 765,
    "pcie_kib_per_s": 1024,
    "link_kib": 0,
    "links_claimed": ABSENT,  # it says how many there are, unless it lies
    # Power smoothing is Blackwell's.
    "smoothing_enabled": ABSENT,
    "smoothing_profile": ABSENT,
    "ramp_down_mw_per_s": ABSENT,
    "ramp_down_override_mw_per_s": ABSENT,
    "sensor_period_us": 100_000,
    "sensor_window_us": 25_000,
    "average_window_us": 1_000_000,
    "power_scope": SCOPE_GPU,
    "board": 0,
}
NO_MIG = {"mig_mode": ABSENT, "mig_instances_max": ABSENT}
NO_AVERAGE = {"power_average_mw": ABSENT, "average_window_us": 0}
NO_ROWS = dict.fromkeys(
    ("remapped_corrected", "remapped_uncorrected", "remap_pending", "remap_failure"), ABSENT
)
# GeForce has "limited support": no ECC, no rows, no memory sensor, no verdict of the driver.
GEFORCE = {
    **NO_MIG,
    **NO_ROWS,
    "ecc_corrected": ABSENT,
    "ecc_uncorrected": ABSENT,
    "recovery_action": ABSENT,
    "memory_temperature_celsius": ABSENT,
}
# What LIVE replaces: all that follows from load, limit and clocks.
FOLLOWING = (
    "power_instant_mw",
    "power_average_mw",
    "energy_mj",
    "utilization_percent",
    "temperature_celsius",
    "sm_clock_mhz",
    "clock_reasons",
    "power_capped_ns",
)


@dataclass(frozen=True)
class Profile:
    """A board: NVML's name and what differs from `WHOLE`."""

    name: str
    memory_mib: int
    limits_w: tuple[int, int, int]  # min, default, max
    idle_w: float
    sm_clock_max_mhz: int
    compute_capability: int
    links: int = 0  # NVLinks, all to NVSwitches
    differs: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, int]:
        """Return every figure and input but where the GPU sits."""
        low, default, high = (watts * 1000 for watts in self.limits_w)
        return {
            **WHOLE,
            "memory_total": self.memory_mib * MIB,
            "limit_mw": default,
            "limit_min_mw": low,
            "limit_max_mw": high,
            "limit_default_mw": default,
            "idle_mw": round(self.idle_w * 1000),
            "natural_mw": default,
            "sm_clock_max_mhz": self.sm_clock_max_mhz,
            "compute_capability": self.compute_capability,
            **self.differs,
        }


PROFILES = {
    "A100": Profile(
        "NVIDIA A100-SXM4-80GB", 81_920, (100, 400, 400), 53.7, 1410, 80, links=12, differs=NO_AVERAGE
    ),
    "H100": Profile("NVIDIA H100 80GB HBM3", 81_559, (200, 700, 700), 71.8, 1980, 90, links=18),
    "H200": Profile("NVIDIA H200", 143_771, (200, 700, 700), 75.0, 1980, 90, links=18),
    "B200": Profile(
        "NVIDIA B200",
        183_359,
        (400, 1000, 1200),
        140.0,
        1965,
        100,
        links=18,
        differs={
            "smoothing_enabled": 0,
            "smoothing_profile": 0,
            "ramp_down_mw_per_s": 200_000,
            "ramp_down_override_mw_per_s": 2**32 - 1,
        },
    ),
    "RTX4090": Profile(
        "NVIDIA GeForce RTX 4090",
        24_564,
        (150, 450, 450),
        20.0,
        2520,
        89,
        differs={**GEFORCE, "event_types": 0x8, "fan_percent": 30, "sensor_window_us": 90_000},
    ),
    "T4": Profile(
        "Tesla T4",
        15_360,
        (60, 70, 70),
        10.0,
        1590,
        75,
        differs={
            **NO_MIG,
            **NO_AVERAGE,
            **NO_ROWS,
            "recovery_action": ABSENT,
            "memory_temperature_celsius": ABSENT,
        },
    ),
    # Power is the whole module's, and the GPU is a NUMA node of its own.
    "GH200": Profile(
        "NVIDIA GH200 480GB",
        97_871,
        (100, 900, 900),
        80.0,
        1980,
        90,
        differs={"power_scope": SCOPE_MODULE, "numa_node": 1},
    ),
}
