"""More days with faults, each another: bookings stay near what the GPUs counted."""

from pathlib import Path

import pytest

from tests.fakes.energy_day import run_day
from tests.unit.test_energy_day import ERROR_MAX, MISBOOKED_MAX


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(2, 6))
def test_any_days_bookings_are_what_the_gpus_counted(tmp_path: Path, seed: int) -> None:
    found = run_day(tmp_path, seed)
    assert abs(found.error) < ERROR_MAX
    assert found.misbooked < MISBOOKED_MAX
