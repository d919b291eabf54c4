"""List what of numpy CuPy has in tests/harness/cupy_api.txt: `python tools/list_cupy.py`.

Needs CuPy, but no GPU. The list stands in for CuPy, which takes 365 MB on disk, wherever the tests run.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cupy
import numpy as np

PAGE = Path(__file__).parent.parent / "tests/harness/cupy_api.txt"
HEAD = """\
# Which of numpy's names CuPy {version} has, and how they are called; written by tools/list_cupy.py.
# After a bare * come arguments that must be named. After a ufunc stand the methods that work on it.
"""
# Tried on nothing: without a GPU a method that exists fails otherwise than one that is "not supported yet".
UFUNC_METHODS: dict[str, Callable[[Any], Any]] = {
    "accumulate": lambda ufunc: ufunc.accumulate(None),
    "at": lambda ufunc: ufunc.at(None, None, None),
    "outer": lambda ufunc: ufunc.outer(None, None),
    "reduce": lambda ufunc: ufunc.reduce(None),
    "reduceat": lambda ufunc: ufunc.reduceat(None, None),
}


def lines() -> Iterator[str]:
    """The list, one name a line."""
    for name in sorted(set(dir(np)) & set(dir(cupy))):
        found = getattr(cupy, name)
        if name.startswith("_") or inspect.ismodule(found):
            continue
        if isinstance(found, cupy.ufunc):
            inputs = ", ".join(f"x{position + 1}" for position in range(found.nin))
            methods = [method for method, call in UFUNC_METHODS.items() if works(call, found)]
            yield " ".join([f"ufunc {name}({inputs}, out, *, casting, dtype)", *methods])
        elif inspect.isfunction(found):
            yield f"function {name}({', '.join(names(inspect.signature(found)))})"
        else:
            yield f"value {name}"
    for name in sorted(set(dir(np.ndarray)) & set(dir(cupy.ndarray))):
        if not name.startswith("_"):
            yield method_line(name)


def names(signature: inspect.Signature) -> Iterator[str]:
    """The arguments' names; a bare * before the first that must be named."""
    named_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not named_only:
            named_only = True
            yield "*"
        if parameter.kind is parameter.VAR_POSITIONAL:
            named_only = True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        yield star + parameter.name


def method_line(name: str) -> str:
    """A method by the signature in the first line of its documentation; what has none is an attribute."""
    text = (getattr(cupy.ndarray, name).__doc__ or "").partition("\n")[0]
    match = re.match(rf"\w+\.{name}\(self(.*)\)( ->.*)?$", text)
    if not match:
        return f"attribute {name}"
    arguments = [part.partition("=")[0].split()[-1] for part in match[1].split(",") if part.strip()]
    return f"method {name}({', '.join(arguments)})"


def works(call: Callable[[Any], Any], ufunc: Any) -> bool:
    """Whether a method of the ufunc is more than a message that it isn't supported."""
    try:
        call(ufunc)
    except NotImplementedError:
        return False
    except (AttributeError, TypeError, ValueError):
        return True
    return True


if __name__ == "__main__":
    PAGE.write_text(HEAD.format(version=cupy.__version__) + "\n".join([*lines(), ""]), encoding="utf-8")
