"""Bugs that were planted on purpose are found; docs/TESTING.md lists which seed or scenario caught each."""

import re
from pathlib import Path

import pytest

from tests.simulation.planted import PLANTED
from tests.simulation.scenario import FOLDER, scripts
from tests.simulation.script import drawn
from tests.simulation.shrink import played

PAGE = Path(__file__).resolve().parents[2] / "docs" / "TESTING.md"
_ROW = re.compile(r"^\| `(\w+)` \|.*\| (\w+) \|$", re.MULTILINE)
FOUND = dict(_ROW.findall(PAGE.read_text(encoding="utf-8")))  # by bug: a seed, or a scenario's name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(FOUND))
def test_what_the_page_names_finds_the_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by = FOUND[name]
    told = [drawn(int(by))] if by.isdigit() else scripts(FOLDER / f"{by}.toml").values()
    assert not any(played(script)[1] for script in told)
    PLANTED[name](monkeypatch)
    assert any(played(script)[1] for script in told)


def test_at_least_nine_of_ten_are_found() -> None:
    assert set(FOUND) <= set(PLANTED)
    assert len(PLANTED) >= 10
    assert len(FOUND) >= 0.9 * len(PLANTED)
