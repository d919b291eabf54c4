"""Bugs that were planted on purpose are found by the seeds; docs/TESTING.md lists which seed caught each."""

import re
from pathlib import Path

import pytest

from tests.simulation.planted import PLANTED
from tests.simulation.script import drawn
from tests.simulation.shrink import played

PAGE = Path(__file__).resolve().parents[2] / "docs" / "TESTING.md"
_ROW = re.compile(r"^\| `(\w+)` \|.*\| (\d+|none of 200) \|", re.MULTILINE)
FOUND = {name: int(seed) for name, seed in _ROW.findall(PAGE.read_text(encoding="utf-8")) if seed.isdigit()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(FOUND))
def test_the_seed_that_the_page_names_finds_the_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = drawn(FOUND[name])
    assert played(script)[1] is None
    PLANTED[name](monkeypatch)
    assert played(script)[1] is not None


def test_at_least_nine_of_ten_are_found() -> None:
    assert set(FOUND) <= set(PLANTED)
    assert len(PLANTED) >= 10
    assert len(FOUND) >= 0.9 * len(PLANTED)
