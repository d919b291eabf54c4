"""The rules of style that a machine can check, so that no review has to."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70  # one screen
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
LEFT_OVER = re.compile(r"\b(TODO|FIXME|XXX)\b")
BLANKET_IGNORE = re.compile(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!:)")
MAKE_CALL = re.compile(r"\bmake ((?:[a-z][a-z-]*)(?:-[a-z]+)*)")
# The launcher outlives the daemon and forks; gRPC's threads would deadlock it, the driver could hang it.
LAUNCHER = "scheduler.effects.launcher_process"
NEVER_IN_THE_LAUNCHER = ("grpc", "google.protobuf", "pynvml", "numpy", "cupy")


def git_files(*arguments: str) -> tuple[Path, ...]:
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "-z", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(sorted(ROOT / name for name in listing.stdout.split("\0") if name))


def repository_files() -> tuple[Path, ...]:
    """Return what is tracked, and what is new and not ignored, as far as it exists."""
    return tuple(path for path in git_files("--cached", "--others", "--exclude-standard") if path.is_file())


def python_files(*folders: str) -> tuple[Path, ...]:
    return tuple(
        path
        for path in repository_files()
        if path.suffix == ".py"
        and path.relative_to(ROOT).parts[0] in folders
        and not GENERATED.search(path.name)
    )


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def matches(pattern: re.Pattern[str], paths: tuple[Path, ...]) -> list[str]:
    return [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def line_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def shell_scripts() -> tuple[Path, ...]:
    def is_shell(path: Path) -> bool:
        first_line = path.read_bytes().split(b"\n", 1)[0]
        return first_line.startswith(b"#!") and (b"bash" in first_line or first_line.endswith(b"/sh"))

    return tuple(path for path in repository_files() if path.suffix == ".sh" or is_shell(path))


def test_no_file_is_longer_than_a_sitting() -> None:
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files("scheduler")
    }
    assert lengths, "no sources found: this test would check nothing"
    assert {name: count for name, count in lengths.items() if count > FILE_LINES_MAX} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    too_long = [
        f"{name_of(path)}:{function.lineno}: {function.name} has {line_count(function)} lines"
        for path in python_files("scheduler", "proto", "tools")
        for function in functions(path)
        if line_count(function) > FUNCTION_LINES_MAX
    ]
    assert too_long == []


def test_nothing_is_left_to_be_done_in_a_comment() -> None:
    sources = tuple(path for path in python_files("scheduler", "proto", "tools", "tests"))
    others = tuple(path for path in repository_files() if path.suffix in {".proto", ".sh", ".service"})
    itself = Path(__file__).resolve()
    assert matches(LEFT_OVER, tuple(path for path in (*sources, *others) if path != itself)) == []


def test_every_silenced_check_says_which() -> None:
    itself = Path(__file__).resolve()
    sources = python_files("scheduler", "proto", "tools", "tests")
    assert matches(BLANKET_IGNORE, tuple(path for path in sources if path != itself)) == []


@pytest.mark.parametrize(
    ("line", "is_blanket"),
    [
        ("x = f()  # type: ignore", True),
        ("x = f()  # type: ignore[arg-type]", False),
        ("x = f()  # noqa", True),
        ("x = f()  # noqa: S602", False),
    ],
)
def test_the_pattern_tells_a_blanket_ignore_from_a_precise_one(line: str, is_blanket: bool) -> None:
    assert bool(BLANKET_IGNORE.search(line)) is is_blanket


def test_every_test_module_has_a_test() -> None:
    modules = [path for path in python_files("tests") if path.name.startswith("test_")]
    empty = [
        name_of(path)
        for path in modules
        if not any(function.name.startswith("test_") for function in functions(path))
        # A Hypothesis state machine is a test without a function.
        and "TestCase" not in path.read_text(encoding="utf-8")
    ]
    assert modules, "no test modules found: this test would check nothing"
    assert empty == []


def test_generated_code_is_not_tracked() -> None:
    assert [name_of(path) for path in git_files("--cached") if GENERATED.search(path.name)] == []


def test_every_make_target_that_the_documents_name_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    assert {"setup", "test", "lint"} <= targets
    documents = [path for path in repository_files() if path.suffix == ".md" or path == ROOT / ".ci/run"]
    # In prose only what stands in code counts: "make sure" is not a target.
    unknown = {
        f"{name_of(path)}: make {target}"
        for path in documents
        for code in code_in(path)
        for target in MAKE_CALL.findall(code)
        if target not in targets
    }
    assert unknown == set()


def code_in(document: Path) -> list[str]:
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".md":
        return [text]
    blocks = re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)
    return [*blocks, *re.findall(r"`([^`\n]+)`", text)]


def test_every_shell_script_parses() -> None:
    scripts = shell_scripts()
    assert ROOT / ".ci/run" in scripts
    broken = {
        name_of(script): parsed.stderr
        for script in scripts
        if (
            parsed := subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        ).returncode
    }
    assert broken == {}


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_by("scheduler", ("grpc", "google.protobuf", "pynvml", "numpy", "cupy", "asyncio")) == []


def test_the_launcher_process_never_loads_grpc_the_driver_or_numpy() -> None:
    if not (ROOT / "scheduler/effects/launcher_process.py").exists():
        pytest.skip(f"{LAUNCHER} does not exist yet")
    assert loaded_by(LAUNCHER, NEVER_IN_THE_LAUNCHER) == []


def loaded_by(module: str, unwanted: tuple[str, ...]) -> list[str]:
    """Return which of the unwanted modules a fresh interpreter holds after importing `module`."""
    program = f"import sys, {module}; print(*(n for n in {unwanted!r} if n in sys.modules))"
    fresh = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return fresh.stdout.split()
