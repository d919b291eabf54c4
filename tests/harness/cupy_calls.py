"""What the planner asks of its array library that CuPy lacks, or not in that form: found in the source.

    python tests/harness/cupy_calls.py           print it
    python tests/harness/cupy_calls.py --write   also write it down as what is allowed from now on

`cupy_api.txt` beside it says what CuPy has. Beyond names and arguments some things are known to differ. CuPy
takes an array where numpy also takes a tuple or a list. Few methods of ufuncs are there, and `at`, which
rests on the device's atomic operations, mostly not for int64, of which our columns are. Its `argsort` is
always stable, so that ours says `kind="stable"` or differs.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
API = Path(__file__).with_name("cupy_api.txt")
ALLOWED = Path(__file__).with_name("cupy_calls_allowed.txt")
PLANNING = ROOT / "scheduler/planning"
LIBRARY = "xp"
# arrays.py looks at which library it is, and asks CuPy for what only CuPy has.
ARRAYS = "scheduler/planning/arrays.py"
ONLY_IN_ARRAYS = frozenset(("__name__", "bind", "cuda", "get_default_memory_pool"))
# These make an array of a sequence, put arrays together, or take a shape.
TAKE_SEQUENCES = frozenset(
    ("array", "asarray", "concatenate", "stack", "vstack", "hstack", "column_stack", "zeros", "ones", "empty")
) | frozenset(("full", "reshape", "transpose", "broadcast_to", "broadcast_arrays", "ix_", "tile"))
# `cupy._core._routines_indexing._scatter_op_default`: of int64 only the bitwise ones.
AT_WITHOUT_INT64 = frozenset(("add", "subtract", "maximum", "minimum"))
# What tells a list's method from an array's of the same name.
LIST_OPTIONS = frozenset(("key", "reverse"))
LITERALS = (ast.Tuple, ast.List, ast.ListComp, ast.GeneratorExp, ast.Set, ast.Dict)


@dataclass(frozen=True)
class Form:
    """How something is called. `positional` is None where any number will do."""

    positional: int | None
    names: frozenset[str]
    ufunc_methods: frozenset[str] | None = None  # None: not a ufunc

    def __contains__(self, name: str) -> bool:
        return name in self.names


@dataclass(frozen=True)
class Api:
    """What CuPy has; None where it is no function."""

    names: dict[str, Form | None]
    methods: dict[str, Form | None]


def api() -> Api:
    """What the list says."""
    found = Api({}, {})
    for line in API.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        kind, _, rest = line.partition(" ")
        name, _, rest = rest.partition("(")
        target = found.methods if kind in ("method", "attribute") else found.names
        target[name] = _form(kind, rest) if kind in ("function", "method", "ufunc") else None
    return found


def _form(kind: str, text: str) -> Form:
    inside, _, after = text.partition(")")
    arguments = [argument.strip() for argument in inside.split(",") if argument.strip()]
    starred = next((place for place, name in enumerate(arguments) if name.startswith("*")), None)
    takes_any = starred is not None and arguments[starred] != "*"
    return Form(
        positional=None if takes_any else len(arguments) if starred is None else starred,
        names=frozenset(name for name in arguments if not name.startswith("*")),
        ufunc_methods=frozenset(after.split()) if kind == "ufunc" else None,
    )


def planning_problems() -> list[str]:
    """What CuPy could not do as it is written: file, function, and what."""
    known = api()
    return sorted(
        problem
        for path in sorted(PLANNING.glob("*.py"))
        for problem in problems(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)), known)
    )


def allowed() -> list[str]:
    """What is allowed."""
    lines = ALLOWED.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def problems(source: str, file: str, known: Api) -> list[str]:
    """What CuPy could not do in one file."""
    scan = _Scan(file, known)
    scan.visit(ast.parse(source))
    return scan.found


class _Scan(ast.NodeVisitor):
    def __init__(self, file: str, known: Api) -> None:
        self.found: list[str] = []
        self._file = file
        self._known = known
        self._within: list[str] = []
        self._modules: set[str] = set()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._enter(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._enter(node)

    def visit_Import(self, node: ast.Import) -> None:
        self._modules.update(alias.asname or alias.name for alias in node.names)
        if self._file != ARRAYS and any(alias.name == "numpy" for alias in node.names):
            self._note("imports numpy itself")

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute):
            if _is_library(function.value):
                self._call(function.attr, node)
            elif isinstance(function.value, ast.Attribute) and _is_library(function.value.value):
                self._ufunc_method_call(function.value.attr, function.attr, node)
            elif self._is_of_an_array(function):
                self._method_call(function.attr, node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _is_library(node.value):
            ours = self._file == ARRAYS and node.attr in ONLY_IN_ARRAYS
            if node.attr not in self._known.names and not ours:
                self._note(f"CuPy has no {node.attr}")
        elif isinstance(node.value, ast.Attribute) and _is_library(node.value.value):
            form = self._known.names.get(node.value.attr)
            if form and form.ufunc_methods is not None and node.attr not in form.ufunc_methods:
                self._note(f"CuPy has no {node.value.attr}.{node.attr}")
        elif self._is_of_an_array(node) and node.attr not in self._known.methods:
            self._note(f"CuPy's arrays have no {node.attr}")
        self.generic_visit(node)

    def _is_of_an_array(self, node: ast.Attribute) -> bool:
        """Whether it could be: arrays have such a thing, and what it is asked of is no module."""
        of_module = isinstance(node.value, ast.Name) and node.value.id in self._modules
        return node.attr in vars(np.ndarray) and not node.attr.startswith("__") and not of_module

    def _call(self, name: str, node: ast.Call) -> None:
        form = self._known.names.get(name)
        if form is None:
            return
        self._options(name, form, node)
        if form.positional is not None and len(node.args) > form.positional:
            self._note(f"CuPy's {name} takes {form.positional} arguments without a name at most")
        if name not in TAKE_SEQUENCES and any(isinstance(each, LITERALS) for each in node.args):
            self._note(f"CuPy's {name} takes an array where this is a sequence")
        if name == "argsort":
            self._stable(node)

    def _method_call(self, name: str, node: ast.Call) -> None:
        form = self._known.methods.get(name)
        if form is None or any(option.arg in LIST_OPTIONS for option in node.keywords):
            return
        self._options(name, form, node)
        if name == "argsort":
            self._stable(node)

    def _ufunc_method_call(self, ufunc: str, method: str, node: ast.Call) -> None:
        """`at` on a view as uint64 is fine: for numbers that are not negative it is the same."""
        is_view = bool(node.args) and ast.unparse(node.args[0]).endswith(f".view({LIBRARY}.uint64)")
        if method == "at" and ufunc in AT_WITHOUT_INT64 and not is_view:
            self._note(f"CuPy's {ufunc}.at takes no int64")

    def _options(self, name: str, form: Form, node: ast.Call) -> None:
        for option in node.keywords:
            if option.arg is not None and option.arg not in form:
                self._note(f"CuPy's {name} has no argument {option.arg}")

    def _stable(self, node: ast.Call) -> None:
        kinds = [option.value for option in node.keywords if option.arg == "kind"]
        if not (kinds and isinstance(kinds[0], ast.Constant) and kinds[0].value == "stable"):
            self._note('argsort without kind="stable"')

    def _enter(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self._within.append(node.name)
        self.generic_visit(node)
        self._within.pop()

    def _note(self, what: str) -> None:
        self.found.append(f"{self._file} {'.'.join(self._within) or '<module>'}: {what}")


def uses(folder: Path = PLANNING) -> Iterator[str]:
    """Each name of the library that the planner uses."""
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _is_library(node.value):
                yield node.attr


def _is_library(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == LIBRARY


def main() -> None:
    """Print what CuPy could not do."""
    found = planning_problems()
    print("\n".join(found))
    if "--write" in sys.argv[1:]:
        head = ALLOWED.read_text(encoding="utf-8").partition("\n\n")[0]
        ALLOWED.write_text("\n".join([head, "", *found, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
