"""The benchmark of sheds: it sees what it is to see, and the loop is as fast as it says."""

from pathlib import Path

from scheduler.simulation.virtual_time import run
from tests.benchmarks.powered import LIMIT_CALL_S
from tests.benchmarks.shed import SHED_S, emergencies


def test_an_emergencys_limits_go_out_at_once_and_watts_fall_with_them(tmp_path: Path) -> None:
    for shed in run(emergencies(tmp_path, 2)):
        assert 0.99 * LIMIT_CALL_S <= shed.limits_s <= 0.02, "all boards at the same time"
        assert LIMIT_CALL_S < shed.fell_s <= 0.25
        assert shed.fell_s < shed.inside_s < SHED_S
        assert shed.met_s < SHED_S
