"""A simulated day with faults: jobs, idle and what nobody knows add up to what the GPUs counted."""

from pathlib import Path

import pytest

from tests.fakes.energy_day import run_day

# What the issue asks for; docs/operating/energy.md says what was seen.
ERROR_MAX = 0.005
# Of the jobs' energy, with readings 10 s apart and gaps of minutes.
MISBOOKED_MAX = 0.02


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1])
def test_a_days_bookings_are_what_the_gpus_counted(tmp_path: Path, seed: int) -> None:
    found = run_day(tmp_path, seed)
    assert abs(found.error) < ERROR_MAX
    assert found.misbooked < MISBOOKED_MAX
    assert found.by_group["job_id"] == found.by_group["class"] == found.by_group["uuid"]
    # It was a bad day: else this proves little.
    assert all(found.happened.get(what, 0) >= 1 for what in ("kill", "stop", "reload", "hang", "lie", "fail"))
    assert found.jobs > 200
