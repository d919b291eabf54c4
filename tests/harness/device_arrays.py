"""Arrays that behave like a GPU's, on a machine without one: what would break or wait there is found here.

`DeviceLibrary` stands for CuPy. Its arrays live on a fake device of array-api-strict, which says what may be
combined: arrays of one device, and of types that promote. What that library leaves open is guarded here,
because on a GPU each costs a wait for the device or fails: `bool()`, `int()`, `float()`, use as an index,
iteration, `in`, and a host's array where a device's is needed. Nothing stops at a finding: it is noted with
the place in our code that caused it, and the values go on as numpy would have them, so that one run finds
everything. `tolist`, `item` and `tobytes` say plainly that values come to the host: they are allowed.
"""

import operator
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CODE = str(ROOT / "scheduler")
TESTS = str(ROOT / "tests")
DEVICE = strict.Device("device1")
HOST = strict.Device("CPU_DEVICE")
# These bring a host's values to the device, and say so.
UPLOADS = ("array", "asarray", "ascontiguousarray")

# (file, line, function, what) -> how often.
Findings = Counter[tuple[str, int, str, str]]
findings: Findings = Counter()


def note(what: str) -> None:
    """Count a finding at the innermost place of our code; what a test does itself doesn't count."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(CODE):
            file = str(Path(code.co_filename).relative_to(ROOT))
            # From Python 3.12 on a list comprehension has no frame of its own (PEP 709).
            function = code.co_qualname.replace(".<locals>.<listcomp>", "")
            findings[file, frame.f_lineno, function, what] += 1
            return
        if code.co_filename.startswith(TESTS) and code.co_filename != __file__:
            return
        frame = frame.f_back


class DeviceArray:
    """An array on the fake device."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    # What brings a value to the host without saying so.

    def __bool__(self) -> bool:
        note("bool()")
        return bool(self._values)

    def __int__(self) -> int:
        note("int()")
        return int(self._values)

    def __float__(self) -> float:
        note("float()")
        return float(self._values)

    def __index__(self) -> int:
        note("used as an index")
        return operator.index(self._values.item())

    def __iter__(self) -> Any:
        note("iteration")
        return map(on_device, list(self._values))

    def __contains__(self, value: Any) -> bool:
        note("in")
        return value in self._values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        note("becomes a host's array")
        return np.array(self._values, dtype=dtype)

    # What stays on the device.

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"DeviceArray({self._values!r})"

    def __hash__(self) -> int:
        raise TypeError("an array has no hash")

    def __getitem__(self, key: Any) -> Any:
        _check_devices((self, key))
        return on_device(self._values[on_host(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        _check_devices((self, key, value))
        self._values[on_host(key)] = on_host(value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as __array_interface__, a way to the host that nobody would see
            raise AttributeError(name)
        value = getattr(self._values, name)
        if not callable(value):
            return on_device(value)

        def method(*arguments: Any, **options: Any) -> Any:
            _check_devices((self, arguments, options))
            return on_device(value(*on_host(arguments), **on_host(options)))

        return method

    def __array_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        return DeviceFunction(function)(*arguments, **options)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        function = DeviceFunction(ufunc)
        return (function if method == "__call__" else getattr(function, method))(*inputs, **options)


def _operation(name: str) -> Callable[..., Any]:
    def operate(self: DeviceArray, *others: Any) -> Any:
        _check_devices((self, others))
        _check_types(lambda *parts: getattr(parts[0], name)(*parts[1:]), (self, *others))
        result = getattr(self._values, name)(*on_host(others))
        return result if result is NotImplemented else on_device(result)

    return operate


_BINARY = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
for _name in (
    *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r")),
    *(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "abs", "invert")),
):
    setattr(DeviceArray, _name, _operation(_name))


def _in_place(name: str) -> Callable[..., Any]:
    def operate(self: DeviceArray, other: Any) -> Any:
        _check_devices((self, other))
        _check_types(lambda a, b: getattr(a, f"__{name}__")(b), (self, other))
        self._values = getattr(operator, f"i{name}")(self._values, on_host(other))
        return self

    return operate


for _name in _BINARY:
    setattr(DeviceArray, f"__i{_name}__", _in_place(_name))


class DeviceFunction:
    """One of numpy's functions on the device."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        name = self._function.__name__
        if name not in UPLOADS:
            _check_devices((arguments, options))
        if hasattr(strict, name) and not options:
            _check_types(getattr(strict, name), arguments)
        return on_device(self._function(*on_host(arguments), **on_host(options)))

    def __getattr__(self, name: str) -> Any:
        return DeviceFunction(getattr(self._function, name))  # `reduceat`, `accumulate`, `at` of a ufunc


class DeviceLibrary:
    """numpy's names for arrays on the device."""

    __name__ = "arrays of a fake device"

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        return DeviceFunction(value)


def on_device(value: Any) -> Any:
    """The value with numpy's arrays and scalars as arrays of the device."""
    if isinstance(value, np.ndarray | np.generic):
        return DeviceArray(np.asarray(value))
    if isinstance(value, tuple | list):
        return type(value)(map(on_device, value)) if type(value) in (tuple, list) else value
    return value


def on_host(value: Any) -> Any:
    """The value with the device's arrays as numpy's."""
    if isinstance(value, DeviceArray):
        return value._values
    if type(value) in (tuple, list):
        return type(value)(map(on_host, value))
    if type(value) is dict:
        return {name: on_host(each) for name, each in value.items()}
    return value


def _parts(value: Any) -> Any:
    if type(value) in (tuple, list):
        for each in value:
            yield from _parts(each)
    elif type(value) is dict:
        yield from _parts(list(value.values()))
    else:
        yield value


def _check_devices(values: Any) -> None:
    """Note it if arrays of the device and of the host meet; a scalar travels with the call."""
    if any(isinstance(part, np.ndarray) and part.ndim for part in _parts(values)):
        note("meets a host's array")


def _check_types(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Note it if the strict library refuses to promote the types to one another."""
    try:
        function(*map(_strict, arguments))
    except TypeError as error:
        if "promoted" in str(error) or "dtypes are allowed" in str(error):
            note(f"types: {str(error).replace('array_api_strict.', '')}")
    except (ValueError, IndexError, AttributeError):
        return  # not its case: numpy and CuPy take more forms of arguments than the standard


def _strict(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return strict.asarray(value._values, device=DEVICE)
    if isinstance(value, np.ndarray) and value.ndim:
        return strict.asarray(value, device=HOST)
    return value.item() if isinstance(value, np.generic | np.ndarray) else value
