"""A pytest plugin that gives the planner arrays of a fake device, and the list of what it may still do.

    python tests/harness/on_device.py           print what the planner does that a GPU would suffer from
    python tests/harness/on_device.py --write   also write it down as what is allowed from now on

The list shrinks as the planner learns: whatever is not in it any more fails the test, and so does an entry
that no longer occurs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = Path(__file__).with_name("on_device_allowed.txt")
# Those that go through a whole plan; properties call parts of the planner with numpy's arrays.
PLANNER_TESTS = tuple(
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tests/unit").glob("test_planner_*.py"))
    if path.stem not in ("test_planner_on_device", "test_planner_cupy")
)
REPORT_VARIABLE = "WATTSHIFT_DEVICE_REPORT"


def pytest_configure() -> None:
    """Let `xp` and every world of the tests be on the device."""
    from scheduler.planning import arrays
    from tests.fakes import worlds
    from tests.harness.device_arrays import DeviceLibrary

    made = worlds.snapshot
    arrays.bind(DeviceLibrary())
    worlds.snapshot = lambda world: arrays.on_backend(made(world))


def pytest_unconfigure() -> None:
    """Leave what was found to whoever asked for it."""
    from tests.harness.device_arrays import findings

    lines = [[*place, count] for place, count in findings.items()]
    Path(os.environ[REPORT_VARIABLE]).write_text(json.dumps(lines), encoding="utf-8")


def planner_tests_on_device() -> tuple[str, list[Any]]:
    """Run the planner's tests on the fake device; returns what failed ("" = none did) and what was found."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "found.json"
        environment = os.environ | {REPORT_VARIABLE: str(report), "HYPOTHESIS_PROFILE": "fast"}
        plugins = ("-p", "no:randomly", "-p", "no:cacheprovider", "-p", "tests.harness.on_device")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *plugins, *PLANNER_TESTS],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            return done.stdout + done.stderr, []
        return done.stdout if done.returncode else "", json.loads(report.read_text(encoding="utf-8"))


def places(found: list[Any]) -> list[str]:
    """What was found by file and function, without lines, which every edit moves."""
    return sorted({f"{file} {function}: {what}" for file, _, function, what, _ in found})


def allowed() -> list[str]:
    """What is allowed."""
    lines = ALLOWED.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def main() -> int:
    """Print the report; returns the exit status."""
    failed, found = planner_tests_on_device()
    for file, line, function, what, count in sorted(found):
        print(f"{file}:{line} {function}: {what}, {count} times")
    print(f"{len(places(found))} places, by kind: {dict(Counter(what for *_, what, _ in found))}")
    if "--write" in sys.argv[1:]:
        head = ALLOWED.read_text(encoding="utf-8").partition("\n\n")[0]
        ALLOWED.write_text("\n".join([head, "", *places(found), ""]), encoding="utf-8")
    if failed:
        print(failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
