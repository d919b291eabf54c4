"""Bugs can be planted on purpose, and are found; `python -m tests.simulation.planted` plants them all."""

import ast
import re
from pathlib import Path

import pytest

from tests.simulation import bugs
from tests.simulation.bugs import BUGS, Bug
from tests.simulation.planted import SEEDS, found, row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "TESTING.md"
ROWS = re.findall(r"^\| `(\w+)` \| (.*) \| (\d+|none yet) \| .*\|$", PAGE.read_text("utf-8"), re.MULTILINE)
KNOWN = {bug.name: bug for bug in BUGS}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_each_bug_fits_the_code_of_today(bug: Bug) -> None:
    ast.parse(bug.planted())


def test_a_bug_that_does_not_fit_any_more_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bug = KNOWN["nobody_is_buried"]
    monkeypatch.setattr(bugs, "ROOT", tmp_path)
    (tmp_path / bug.file).parent.mkdir(parents=True)
    (tmp_path / bug.file).write_text("something else\n")
    with pytest.raises(ValueError, match=f"in {bug.file} this is there 0 times, not once; bring the bug up"):
        bug.planted()


# A dozen runs at most, in a process of their own.
@pytest.mark.timeout(300)
def test_a_planted_bug_is_found_by_a_seed_and_told_in_a_row() -> None:
    bug = KNOWN["nobody_is_buried"]
    by = found(bug, 0, 9)
    assert by is not None
    assert row(bug, by, 10) == f"| `nobody_is_buried` | recovery: {bug.what} | {by[0]} | {by[1]} |"
    assert by[1].endswith("is running and has no process")


def test_the_page_tells_of_each_bug_and_nine_of_ten_were_found_by_seeds() -> None:
    assert {name: words for name, words, _ in ROWS} == {bug.name: f"{bug.where}: {bug.what}" for bug in BUGS}
    # Of the parts that must survive any fault; power and accounts have property tests of their own.
    parts = ("loop", "recovery", "ledger", "journal", "launcher", "orders", "hand-over")
    by_seeds = {name: int(seed) for name, _, seed in ROWS if seed.isdigit()}
    must_be_found = [bug.name for bug in BUGS if bug.where in parts]
    assert len(must_be_found) >= 10
    assert sum(name in by_seeds for name in must_be_found) >= 0.9 * len(must_be_found)
    assert max(by_seeds.values()) < SEEDS
