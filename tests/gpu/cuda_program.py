"""A CUDA program without a toolkit: holds memory on every GPU that it may see, and writes to it.

    python cuda_program.py MIB [--pin MIB] [--deaf] [--fault]

MIB is what it takes of each GPU. `--pin` locks host memory too, which takes the driver its time to give back;
with `--deaf` it ignores SIGTERM. It says "ready" once it holds all of it, and works until it is ended; with
`--fault` it then writes where it may not, for which the driver ends its work with XID 31.
"""

import argparse
import ctypes
import signal

BYTES_PER_MIB = 1024**2
# Stores to an address that is nobody's.
FAULT = b"""
.version 7.0
.target sm_52
.address_size 64
.visible .entry fault() {
  .reg .u32 %r1;
  .reg .u64 %rd1;
  mov.u32 %r1, 1;
  mov.u64 %rd1, 4096;
  st.global.u32 [%rd1], %r1;
  ret;
}
"""

_CUDA = ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: object) -> None:
    """Call the driver; raises RuntimeError with its code where it refuses."""
    code = getattr(_CUDA, name)(*arguments)
    if code != 0:
        raise RuntimeError(f"{name} gave {code}")


def fault() -> None:
    """Run the kernel that fails, on the GPU of the current context."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), FAULT)
    call("cuModuleGetFunction", ctypes.byref(function), module, b"fault")
    call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
    call("cuCtxSynchronize")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mib", type=int)
    parser.add_argument("--pin", type=int, default=0)
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--fault", action="store_true")
    wanted = parser.parse_args()
    if wanted.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    size = ctypes.c_size_t(wanted.mib * BYTES_PER_MIB)
    held = []
    for index in range(count.value):
        device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        call("cuCtxSetCurrent", context)
        call("cuMemAlloc_v2", ctypes.byref(memory), size)
        held.append((context, memory))
    if wanted.pin:
        pinned = ctypes.c_void_p()
        call("cuMemHostAlloc", ctypes.byref(pinned), ctypes.c_size_t(wanted.pin * BYTES_PER_MIB), 0)
    print("ready", flush=True)
    if wanted.fault:
        fault()
    while True:
        for context, memory in held:
            call("cuCtxSetCurrent", context)
            call("cuMemsetD32_v2", memory, 0, ctypes.c_size_t(size.value // 4))
        call("cuCtxSynchronize")


if __name__ == "__main__":
    main()
