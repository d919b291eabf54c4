"""The stories of `scenarios/*.toml` come out as they are told, and nothing goes wrong on the way."""

import dataclasses

import pytest

from tests.simulation.scenario import DATA, FOLDER, scripts
from tests.simulation.shrink import played

STORIES = [
    pytest.param(script, id=f"{path.stem}-{what}" if what else path.stem)
    for path in sorted(FOLDER.glob("*.toml"))
    for what, script in scripts(path).items()
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", STORIES)
def test_the_story_comes_out_as_it_is_told(script) -> None:
    if script is None:
        pytest.skip(f"no data at {DATA}")
    log, violation = played(script)
    assert violation is None, "\n".join([str(violation), *log[-100:]])


def test_a_story_that_comes_out_otherwise_is_noticed() -> None:
    path = FOLDER / "a_client_retries_through_three_restarts.toml"
    (script,) = scripts(path).values()
    first = script.expectations[0]
    wrong = dataclasses.replace(first, facts=(("state", "PENDING"),))
    _, violation = played(dataclasses.replace(script, expectations=(wrong,)))
    assert str(violation) == "at 25 s job precious: state is 'RUNNING', not 'PENDING'"
