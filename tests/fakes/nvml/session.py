"""The unmodified pynvml in a process of its own, one call at a time: what a program sees of the fake."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

SERVER = """
import json, sys
import pynvml

kept = {}

def plain(value):
    if hasattr(value, "_fields_"):
        if hasattr(value, "contents") or value.__class__.__name__.startswith(("LP_", "c_nvmlDevice_t")):
            return keep(value)
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, (list, tuple)) or hasattr(value, "_length_"):
        return [plain(one) for one in value]
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "__dict__") and value.__class__.__name__ == "nvmlFriendlyObject":
        return {name: plain(one) for name, one in vars(value).items()}
    return keep(value)

def keep(value):
    kept[f"#{len(kept)}"] = value
    return f"#{len(kept) - 1}"

for line in sys.stdin:
    function, arguments = json.loads(line)
    try:
        answer = getattr(pynvml, function)(*(kept.get(a, a) if isinstance(a, str) else a for a in arguments))
        print(json.dumps({"value": plain(answer)}), flush=True)
    except pynvml.NVMLError as error:
        print(json.dumps({"code": error.value}), flush=True)
"""


class NvmlFailure(Exception):
    """A call failed; `code` is NVML's."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function}: {code}")
        self.code = code


class Session:
    """A client of the driver; handles come as strings that later calls take."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
        )
        self.call("nvmlInit")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def call(self, function: str, *arguments: object) -> Any:
        """Return what the call returns.

        Raises:
            NvmlFailure: It failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "code" in answer:
            raise NvmlFailure(function, answer["code"])
        return answer["value"]

    def gpu(self, index: int) -> str:
        """Return the GPU's handle."""
        handle = self.call("nvmlDeviceGetHandleByIndex", index)
        assert isinstance(handle, str)
        return handle
