"""What the planner asks of its array library is there on CuPy too, in the form in which it is asked for."""

import importlib.util

import pytest

from tests.harness.cupy_calls import ARRAYS, allowed, api, planning_problems, problems, uses

REMEDY = "see what is new with tests/harness/cupy_calls.py, and what is gone: take that out of the list"


def test_cupy_has_what_the_planner_uses_in_the_form_in_which_it_does() -> None:
    assert {"where", "count_nonzero"} <= set(uses()), "nothing was looked at"
    assert planning_problems() == allowed(), REMEDY


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("xp.ediff1d_(a)", "CuPy has no ediff1d_"),
        ("f = xp.busday_count", "CuPy has no busday_count"),
        ("xp.sort(a, kind='stable', stable=True)", "CuPy's sort has no argument stable"),
        ("xp.argsort(a)", 'argsort without kind="stable"'),
        ("xp.argsort(a, kind='quicksort')", 'argsort without kind="stable"'),
        ("a.argsort()", 'argsort without kind="stable"'),
        ("xp.where(a, b, c, d)", "CuPy's where takes 3 arguments without a name at most"),
        ("xp.lexsort((a, b))", "CuPy's lexsort takes an array where this is a sequence"),
        ("xp.isin(a, [1, 2])", "CuPy's isin takes an array where this is a sequence"),
        ("xp.maximum.accumulate(a)", "CuPy has no maximum.accumulate"),
        ("xp.multiply.at(a, b, c)", "CuPy has no multiply.at"),
        ("xp.add.at(a, b, c)", "CuPy's add.at takes no int64"),
        ("xp.maximum(a, b, where=c)", "CuPy's maximum has no argument where"),
        ("a.setflags(write=False)", "CuPy's arrays have no setflags"),
        ("a.sum(where=b)", "CuPy's sum has no argument where"),
        ("import numpy as np", "imports numpy itself"),
    ],
)
def test_what_cupy_lacks_is_found_by_file_and_function(code: str, problem: str) -> None:
    source = f"class Planner:\n    def run(self, a, b, c, d):\n        {code}\n"
    assert problems(source, "some.py", api()) == [f"some.py Planner.run: {problem}"]


@pytest.mark.parametrize(
    "code",
    [
        "xp.where(a, 0, b)",
        "xp.argsort(a, kind='stable')",
        "xp.concatenate((a, b))",
        "xp.add.reduceat(a, b)",
        "xp.bitwise_or.at(a, b, c)",
        "xp.maximum.at(a.view(xp.uint64), b, c.view(xp.uint64))",
        "xp.sort(a)",
        "xp.zeros((2, 3), dtype=xp.int64)",
        "a.sum(axis=1).reshape(1, 2, 3, 4)",
        "[3, 1].sort(key=abs, reverse=True)",
        "a.something.of.ours(1, 2)",
        "import json\njson.dumps(a, separators=b)",
    ],
)
def test_what_cupy_has_is_no_problem(code: str) -> None:
    assert problems(code, "some.py", api()) == []


def test_only_the_choice_of_the_library_may_ask_what_it_is() -> None:
    code = "def finish():\n    xp.cuda.get_current_stream()\n"
    assert problems(code, ARRAYS, api()) == []
    assert problems(code, "scheduler/planning/queue.py", api()) != []


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_list_is_what_the_installed_cupy_has() -> None:
    from tools import list_cupy

    made = list_cupy.HEAD.format(version=list_cupy.cupy.__version__) + "\n".join([*list_cupy.lines(), ""])
    assert list_cupy.PAGE.read_text(encoding="utf-8") == made
