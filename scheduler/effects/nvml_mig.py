"""MIG: the instances of a GPU, each a GPU of its own with a share of its parent's power.

A GPU in MIG mode can't be used whole, so it is not listed beside its instances. Power is the whole GPU's: it
is split over the instances that there are by their compute slices, so that the sum is the GPU's. The energy
counter is passed on as it is, for whoever books it must see it whole. What happens to the GPU happens to all
of them: heat, clocks, errors and verdicts are the parent's.
"""

from dataclasses import dataclass, replace
from typing import Any

from scheduler.effects import nvml
from scheduler.effects.nvml_plausible import doubtful_memory, in_words
from scheduler.effects.nvml_processes import BYTES_PER_MIB, printable
from scheduler.errors import GpuReadError
from scheduler.model.gpus import GpuHolders, GpuIdentity, GpuLimit, GpuSample

EMPTY_SLOT = "ERROR_NOT_FOUND"
SLOTS_MAX = 64  # boards have 7 or 8; a library that says more is not asked for ever


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance, as it was when the GPU was last sampled."""

    uuid: str
    model: str
    number: int  # of the GPU instance, which events name
    slices: int
    memory_total_mib: int
    handle: Any

    def identity(self, parent: GpuIdentity) -> GpuIdentity:
        """Return who it is; limits are its parent's, and links it has none."""
        return replace(
            parent,
            uuid=self.uuid,
            model=self.model,
            memory_total_mib=self.memory_total_mib,
            parent_uuid=parent.uuid,
            slices=self.slices,
            island=None,
            power_limit_w_min=None,
            power_limit_w_max=None,
            power_limit_w_default=None,
        )

    def holders(self) -> GpuHolders:
        """Return who is on it.

        Raises:
            GpuReadError: It could not be read, or the handle has come to mean another instance.
        """
        if nvml.call("nvmlDeviceGetUUID", self.handle) != self.uuid:
            raise GpuReadError(EMPTY_SLOT, f"instance {self.uuid} is gone")
        return nvml.holders_of(self.handle, self.uuid, self.memory_total_mib)

    def set_power_limit(self, power_limit_w: float) -> GpuLimit:
        """Refuse: the limit is the whole GPU's.

        Raises:
            GpuReadError: Always.
        """
        raise GpuReadError(
            "ERROR_NOT_SUPPORTED", f"{self.uuid} is a MIG instance: {power_limit_w} W can't be its own limit"
        )


class Instances:
    """The instances of one GPU. They are looked up with each sample: handles do not outlive a layout."""

    def __init__(self, gpu: nvml.OpenGpu) -> None:
        self._gpu = gpu
        self.is_on = False
        self._by_slot: dict[int, Instance] = {}
        self._unread: frozenset[int] = frozenset()  # slots that could not be looked up now

    @property
    def present(self) -> tuple[Instance, ...]:
        """Return those that there are, as far as that is known."""
        return tuple(self._by_slot.values())

    def look(self) -> str:
        """Find the instances that there are now; return a failure that hid some of them, or "".

        One that was there and can't be looked up is still there: only the driver's word ends it, for a job
        may be on it.

        Raises:
            GpuReadError: It can't be said whether the GPU is cut, or it or the driver is gone. What was known
                before still is.
        """
        handle = self._gpu.handle
        found: dict[int, Instance] = {}
        failures: dict[int, str] = {}
        slots = _slots(handle)
        for slot in range(slots):
            try:
                found[slot] = _instance(nvml.call("nvmlDeviceGetMigDeviceHandleByIndex", handle, slot))
            except GpuReadError as error:
                if error.code in nvml.DEAD:
                    raise
                if error.code != EMPTY_SLOT:
                    failures[slot] = error.code
        kept = {slot: self._by_slot[slot] for slot in failures if slot in self._by_slot}
        self.is_on, self._by_slot = slots > 0, dict(sorted((found | kept).items()))
        self._unread = frozenset(kept)
        return next(iter(failures.values()), "")

    def samples(self, parent: GpuSample) -> tuple[GpuSample, ...]:
        """Return the samples of the instances that were just looked up, or the GPU's own out of MIG mode.

        Raises:
            GpuReadError: The GPU or the driver is gone.
        """
        if not self.is_on:
            return (parent,)
        return tuple(
            self._sample(one, parent) for slot, one in self._by_slot.items() if slot not in self._unread
        )

    def _share(self, one: Instance) -> float:
        return one.slices / sum(each.slices for each in self.present)

    def _sample(self, one: Instance, parent: GpuSample) -> GpuSample:
        share = self._share(one)
        used_mib = nvml.or_none(nvml.memory_used_mib, one.handle)
        doubts = in_words(doubtful_memory(used_mib, one.memory_total_mib))
        return replace(
            parent,
            uuid=one.uuid,
            memory_used_mib=None if doubts else used_mib,
            doubts=", ".join(filter(None, (parent.doubts, doubts))),
            utilization_ratio=None,
            memory_utilization_ratio=None,
            encoder_utilization_ratio=None,
            decoder_utilization_ratio=None,
            nvlink_tx_bytes=None,
            nvlink_rx_bytes=None,
            power_w=None if parent.power_w is None else parent.power_w * share,
            power_w_average=None if parent.power_w_average is None else parent.power_w_average * share,
            power_limit_w=None,
            power_limit_w_enforced=None,
        )


def _slots(handle: Any) -> int:
    """Return how many instances there can be; 0 = it is not in MIG mode, and one GPU.

    Raises:
        GpuReadError: It does not say; or it or the driver is gone.
    """
    try:
        is_cut = bool(nvml.call("nvmlDeviceGetMigMode", handle)[0])
    except GpuReadError as error:
        if error.code in nvml.DEAD:
            raise
        is_cut = error.code not in nvml.ABSENT  # then the count says so, which is 0 out of MIG mode
    return min(nvml.call("nvmlDeviceGetMaxMigDeviceCount", handle), SLOTS_MAX) if is_cut else 0


def _instance(handle: Any) -> Instance:
    attributes = nvml.call("nvmlDeviceGetAttributes", handle)
    memory = nvml.or_none(nvml.memory, handle)
    return Instance(
        uuid=printable(nvml.call("nvmlDeviceGetUUID", handle), nvml.NAME_LENGTH_MAX),
        model=printable(nvml.call("nvmlDeviceGetName", handle), nvml.NAME_LENGTH_MAX),
        number=nvml.call("nvmlDeviceGetGpuInstanceId", handle),
        slices=max(1, attributes.computeInstanceSliceCount),
        memory_total_mib=memory.total // BYTES_PER_MIB if memory else attributes.memorySizeMB,
        handle=handle,
    )
