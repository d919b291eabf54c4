"""What the metrics page says of GPUs: who they are, where they stand, and the last reading of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from scheduler.api.exposition import Page
from scheduler.control.board import GpuView
from scheduler.control.meters import Labels
from scheduler.model.gpus import GpuIdentity, GpuSample, GpuState

_MIB = 1 << 20
_HZ_PER_MHZ = 1_000_000
GPU = ("gpu",)

_Thing = TypeVar("_Thing")

# Name, help, and the value in base units; None = the GPU does not report it, and has no line.
_SAMPLED: tuple[tuple[str, str, Callable[[GpuSample], float | None]], ...] = (
    (
        "gpu_utilization_ratio",
        "Part of the last period in which a kernel ran.",
        lambda s: s.utilization_ratio,
    ),
    (
        "gpu_memory_utilization_ratio",
        "Part of the last period in which GPU memory was read or written.",
        lambda s: s.memory_utilization_ratio,
    ),
    (
        "gpu_encoder_utilization_ratio",
        "How busy the video encoder was.",
        lambda s: s.encoder_utilization_ratio,
    ),
    (
        "gpu_decoder_utilization_ratio",
        "How busy the video decoder was.",
        lambda s: s.decoder_utilization_ratio,
    ),
    ("gpu_memory_used_bytes", "GPU memory in use.", lambda s: _scaled(s.memory_used_mib, _MIB)),
    ("gpu_power_watts", "Board draw.", lambda s: s.power_w),
    ("gpu_power_average_watts", "Board draw over about a second.", lambda s: s.power_w_average),
    ("gpu_power_limit_watts", "Board power limit that was asked for.", lambda s: s.power_limit_w),
    (
        "gpu_power_limit_enforced_watts",
        "Limit that holds; below the one that was asked for, somebody else caps too.",
        lambda s: s.power_limit_w_enforced,
    ),
    ("gpu_power_smoothed", "1 where the GPU may not shed at once.", lambda s: s.is_power_smoothed),
    (
        "gpu_power_ramp_down_watts_per_second",
        "How fast the draw of a smoothed GPU may fall.",
        lambda s: s.ramp_down_w_per_s,
    ),
    ("gpu_temperature_celsius", "Temperature of the GPU.", lambda s: s.temperature_celsius),
    (
        "gpu_memory_temperature_celsius",
        "Temperature of the GPU's memory.",
        lambda s: s.memory_temperature_celsius,
    ),
    ("gpu_fan_speed_ratio", "Speed that the fans are told to turn at.", lambda s: s.fan_speed_ratio),
    ("gpu_sm_clock_hertz", "Clock of the multiprocessors.", lambda s: _scaled(s.sm_clock_mhz, _HZ_PER_MHZ)),
    (
        "gpu_memory_clock_hertz",
        "Clock of the GPU's memory.",
        lambda s: _scaled(s.memory_clock_mhz, _HZ_PER_MHZ),
    ),
    ("gpu_clock_reasons", "What holds the clock back: NVML's bits.", lambda s: s.clock_reasons),
    (
        "gpu_remap_pending",
        "1 where a row of memory is remapped at the next reset.",
        lambda s: s.is_remap_pending,
    ),
    ("gpu_remap_failed", "1 where a row of memory can't be remapped.", lambda s: s.has_remap_failed),
    (
        "gpu_recovery_action",
        "What the driver says that the GPU needs, 0 = nothing.",
        lambda s: s.recovery_action,
    ),
)
# What the GPU counts itself.
_COUNTED: tuple[tuple[str, str, Callable[[GpuSample], float | None]], ...] = (
    (
        "gpu_power_capped_seconds",
        "Time for which the power limit held the clock back, since the driver was loaded.",
        lambda s: s.power_capped_s,
    ),
    (
        "gpu_nvlink_transmitted_bytes",
        "Data sent over all NVLinks, since the driver was loaded.",
        lambda s: s.nvlink_tx_bytes,
    ),
    (
        "gpu_nvlink_received_bytes",
        "Data received over all NVLinks, since the driver was loaded.",
        lambda s: s.nvlink_rx_bytes,
    ),
    (
        "gpu_remapped_rows_corrected",
        "Rows of memory remapped for good after correctable errors.",
        lambda s: s.rows_remapped_corrected,
    ),
    (
        "gpu_remapped_rows_uncorrected",
        "Rows of memory remapped for good after uncorrectable errors.",
        lambda s: s.rows_remapped_uncorrected,
    ),
)
# What does not change while the driver is loaded.
_FIXED: tuple[tuple[str, str, Callable[[GpuIdentity], float | None]], ...] = (
    ("gpu_memory_total_bytes", "GPU memory.", lambda gpu: _scaled(gpu.memory_total_mib or None, _MIB)),
    ("gpu_power_limit_min_watts", "Lowest power limit that can be set.", lambda gpu: gpu.power_limit_w_min),
    ("gpu_power_limit_max_watts", "Highest power limit that can be set.", lambda gpu: gpu.power_limit_w_max),
    ("gpu_power_limit_default_watts", "Power limit of the board.", lambda gpu: gpu.power_limit_w_default),
    (
        "gpu_power_limit_settable",
        "0 where the driver does not let us set the power limit.",
        lambda gpu: None if gpu.power_limit_w_max is None else not gpu.power_limit_refusal,
    ),
    (
        "gpu_sm_clock_max_hertz",
        "Highest clock of the multiprocessors.",
        lambda gpu: _scaled(gpu.sm_clock_mhz_max, _HZ_PER_MHZ),
    ),
    (
        "gpu_temperature_slowdown_celsius",
        "Temperature at which the GPU slows itself down.",
        lambda gpu: gpu.temperature_celsius_slowdown,
    ),
    (
        "gpu_temperature_shutdown_celsius",
        "Temperature at which the GPU turns itself off.",
        lambda gpu: gpu.temperature_celsius_shutdown,
    ),
    ("gpu_slices", "Compute slices of a MIG instance.", lambda gpu: gpu.slices),
)
_INFO: tuple[tuple[str, Callable[[GpuIdentity], str]], ...] = (
    ("gpu", lambda gpu: gpu.uuid),
    ("index", lambda gpu: str(gpu.index)),
    ("model", lambda gpu: gpu.model),
    ("driver", lambda gpu: gpu.driver_version),
    ("cuda", lambda gpu: gpu.cuda_version),
    ("compute_capability", lambda gpu: gpu.compute_capability),
    ("pci_bus_id", lambda gpu: gpu.pci_bus_id),
    ("power_scope", lambda gpu: gpu.power_scope),
    ("parent", lambda gpu: gpu.parent_uuid),
)
_STATES = tuple((state, state.value) for state in GpuState)


def put_gpus(page: Page, views: list[GpuView], energy_j: Mapping[Labels, float], now_s: float) -> None:
    """Put all GPUs on the page; `energy_j` is what each has used, as it is booked."""
    page.gauge(
        "gpu_info",
        "A GPU of this node.",
        ((tuple(read(view.identity) for _, read in _INFO), 1) for view in views),
        tuple(label for label, _ in _INFO),
    )
    page.gauge(
        "gpu_state",
        "1 for the GPU's present state.",
        (((view.identity.uuid, value), view.state is state) for view in views for state, value in _STATES),
        ("gpu", "state"),
    )
    page.gauge(
        "gpu_foreign_processes",
        "Processes on it that Wattshift did not start and that the policy does not ignore.",
        (((view.identity.uuid,), len(view.foreign)) for view in views),
        GPU,
    )
    identities = [((view.identity.uuid,), view.identity) for view in views]
    for name, text, read in _FIXED:
        page.gauge(name, text, _reported(identities, read), GPU)
    samples = [((view.identity.uuid,), view.sample) for view in views if view.sample is not None]
    page.gauge(
        "gpu_sample_age_seconds",
        "Age of the last reading; it grows while a GPU does not answer.",
        ((key, max(0.0, now_s - sample.at_s)) for key, sample in samples),
        GPU,
    )
    for name, text, read_sample in _SAMPLED:
        page.gauge(name, text, _reported(samples, read_sample), GPU)
    for name, text, read_sample in _COUNTED:
        page.counter(name, text, _reported(samples, read_sample), GPU)
    page.counter(
        "gpu_energy_joules",
        "Energy that the GPU used since the daemon was started, whatever its own counter did.",
        ((key, energy_j[key]) for key, _ in identities if key in energy_j),
        GPU,
    )


def _reported(
    things: Sequence[tuple[Labels, _Thing]], read: Callable[[_Thing], float | None]
) -> Iterator[tuple[Labels, float]]:
    return ((key, value) for key, thing in things if (value := read(thing)) is not None)


def _scaled(value: float | None, factor: int) -> float | None:
    return None if value is None else value * factor
