"""Power limits of the real daemon on the fake driver: kept, given back, changed by others, refused."""

import getpass
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.nvml.fake import FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import CANCELLED, WATTSHIFT, Daemon, reason_of, until

pytestmark = needs_gcc

CONFIG = f"""
[jobs]
user = "{getpass.getuser()}"

[sampling]
period_s = 0.1

[power]
budget_w = 2000.0
return_jitter_s = 0.0
"""
GPUS = 4
W = 1000  # the driver counts in mW


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, gpus=GPUS, is_live=True)


@pytest.fixture
def daemon(fake: FakeNvml) -> Iterator[Daemon]:
    with Daemon(gpus="", config=CONFIG) as daemon:
        daemon.environment = fake.environment()
        daemon.start()
        until("all GPUs are there", lambda: len(daemon.get_node().gpus) == GPUS)
        yield daemon


def limits_w(fake: FakeNvml) -> list[int]:
    return [gpu.limit_mw // W for gpu in fake.gpus[:GPUS]]


def run_under_a_limit(daemon: Daemon, fake: FakeNvml) -> str:
    job = daemon.run("/bin/sleep", "1000", job_class="batch", draw_w=300.0)
    until("its limit is set", lambda: 306 in limits_w(fake))
    return job.id


def release_offline(daemon: Daemon, fake: FakeNvml) -> subprocess.CompletedProcess[str]:
    command = [WATTSHIFT, "release", "--offline", "--state-dir", daemon.state]
    return subprocess.run(command, env=fake.environment(), capture_output=True, text=True, check=False)


def test_limits_stay_over_a_kill_while_a_job_runs_and_go_back_at_a_stop_without_one(
    fake: FakeNvml, daemon: Daemon
) -> None:
    job_id = run_under_a_limit(daemon, fake)

    daemon.restart()

    assert 306 in limits_w(fake)
    until("it is known again", lambda: any(gpu.limit_w_found == 700 for gpu in daemon.get_power().gpus))
    daemon.cancel(job_id)
    daemon.wait(job_id, CANCELLED)
    daemon.terminate()
    assert limits_w(fake) == [700] * GPUS


def test_a_stop_with_a_job_leaves_its_limits(fake: FakeNvml, daemon: Daemon) -> None:
    run_under_a_limit(daemon, fake)
    daemon.terminate()
    assert 306 in limits_w(fake)


def test_without_a_daemon_limits_are_given_back_unless_a_job_may_still_run(
    fake: FakeNvml, daemon: Daemon
) -> None:
    job_id = run_under_a_limit(daemon, fake)
    busy = release_offline(daemon, fake)
    assert busy.returncode == 1
    assert "another wattshift daemon uses the state directory" in busy.stderr
    daemon.kill()
    refused = release_offline(daemon, fake)
    assert (refused.returncode, 306 in limits_w(fake)) == (4, True)
    assert f"jobs {job_id} may still run under the limits" in refused.stderr

    daemon.start()
    daemon.cancel(job_id)
    daemon.wait(job_id, CANCELLED)
    daemon.kill()
    assert 306 in limits_w(fake)
    done = release_offline(daemon, fake)
    assert done.returncode == 0, done.stderr
    assert limits_w(fake) == [700] * GPUS
    assert "has the power limit back" in done.stdout
    assert "no power limit is to be given back" in release_offline(daemon, fake).stderr


def test_a_limit_that_somebody_else_changes_is_reported_and_respected(fake: FakeNvml, daemon: Daemon) -> None:
    run_under_a_limit(daemon, fake)
    held = limits_w(fake).index(306)
    fake.gpus[held].limit_mw = 250 * W
    problems = until(
        "it is reported",
        lambda: [text for text in daemon.get_node().problems if "somebody else changed it" in text],
    )
    assert "is 250 W; it was set to 306 W" in problems[0]
    assert limits_w(fake)[held] == 250
    assert daemon.get_power().gpus[held].limit_w_max == 250


def test_boards_that_refuse_count_as_they_are_and_are_named(fake: FakeNvml, daemon: Daemon) -> None:
    fake.set_privileged(False)
    job = daemon.submit("/bin/sleep", "1000", job_class="batch", draw_w=300.0)
    others = [daemon.submit("/bin/sleep", "1000", job_class="batch", draw_w=300.0) for _ in range(3)]

    until("the boards' refusals show", lambda: any(gpu.refusal for gpu in daemon.get_power().gpus))

    # 700 W each: two fit into 2,000 W beside the others' idle draw, as if nothing were declared.
    until("two run", lambda: len(daemon.running()) == 2)
    waiting = [one for one in map(daemon.get, (job.id, *(other.id for other in others))) if not one.attempts]
    assert {reason_of(one) for one in waiting} == {"WAITING_FOR_POWER"}
    assert limits_w(fake) == [700] * GPUS
