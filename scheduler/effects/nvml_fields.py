"""NVML's field-value call, as its header has it; most of a sample comes with one call."""

import struct

ECC_CORRECTED = 3
ECC_UNCORRECTED = 4
POWER_CAPPED_NS = 74
MEMORY_TEMPERATURE = 82
NVLINKS = 91
NVLINKS_MAX = 36  # NVML_NVLINK_MAX_LINKS; a library that says more is not asked for ever
NVLINK_TX_KIB = 138  # their scope is the number of a link, or all
NVLINK_RX_KIB = 139
REMAPPED_CORRECTED = 142
REMAPPED_UNCORRECTED = 143
REMAP_PENDING = 144
REMAP_FAILURE = 145
POWER_AVERAGE = 185
POWER_INSTANT = 186  # GetPowerUsage is a 1 s average on Ampere and newer, this one is not
RECOVERY_ACTION = 230
SMOOTHING_ENABLED = 251
SMOOTHING_RAMP_DOWN = 262  # its scope is the number of a preset profile
SMOOTHING_PROFILE = 264
SMOOTHING_RAMP_DOWN_OVERRIDE = 267
NOT_OVERRIDDEN = 2**32 - 1
EVERY_NVLINK = 2**32 - 1

# A field as the call answers it: its id and scope, when it was read and how long that took, the type of the
# value, the verdict, the value. Read at one go: each look at a member through pynvml's class costs 1 µs.
ANSWER = struct.Struct("=IIqqII8s")
# Which member of the value's union is valid, by its type: double, unsigned int, long, long long, signed ones,
# unsigned short.
VALUES = tuple(struct.Struct(f"@{code}") for code in "dILQqiH")
