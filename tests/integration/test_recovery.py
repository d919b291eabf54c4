"""kill -9 of the daemon at any moment: nothing accepted is lost, nothing runs twice."""

import os
import random
import time

import pytest

from scheduler.v1 import job_pb2
from tests.harness.daemon import FAILED, RUNNING, SUCCEEDED, until
from tests.harness.fixtures import Make
from tests.harness.storm import Storm

# Seeds to try, and how often each one's daemon is killed; 10 seeds and 8 kills take some minutes.
SEEDS = int(os.environ.get("WATTSHIFT_CRASH_SEEDS", "1"))
FIRST_SEED = int(os.environ.get("WATTSHIFT_CRASH_SEED", "1"))
KILLS = int(os.environ.get("WATTSHIFT_CRASH_KILLS", "5"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + SEEDS))
def test_nothing_is_lost_or_run_twice_however_often_the_daemon_is_killed(
    make_daemon: Make, seed: int
) -> None:
    daemon = make_daemon().start()
    storm = Storm(daemon, seed)
    chance = random.Random(seed)
    for _ in range(KILLS):
        storm.blow(chance.uniform(0.0, 0.5))
        daemon.spawn()
        if chance.random() < 0.3:  # killed while it starts, too
            time.sleep(chance.uniform(0.0, 0.6))
            daemon.kill()
            daemon.spawn()
        daemon.connect()
        daemon.await_answer()
    storm.check(storm.calm())
    assert "Traceback" not in daemon.log()


def attempts_of(job: job_pb2.Job) -> list[job_pb2.Attempt]:
    """Its attempts, but for their energy, which goes on."""
    found = []
    for attempt in job.attempts:
        kept = job_pb2.Attempt()
        kept.CopyFrom(attempt)
        kept.ClearField("energy_j")
        found.append(kept)
    return found


def test_running_jobs_are_adopted_with_their_processes(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    before = [daemon.run("sleep", "60", gpus=gpus) for gpus in (0, 1, 2)]
    daemon.restart()
    after = [daemon.get(job.id) for job in before]
    assert [job.state for job in after] == [RUNNING] * 3
    assert [attempts_of(job) for job in after] == [attempts_of(job) for job in before]


def test_the_exit_codes_of_jobs_that_end_while_the_daemon_is_down_are_true(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    gate = daemon.directory / "gate"
    waits = f"until [ -e {gate} ]; do sleep 0.02; done; "
    jobs = {code: daemon.run(script=f"{waits} exit {code}", gpus=0) for code in (0, 3, 99)}
    jobs[128 + 9] = daemon.run(script=f"{waits} kill -9 $$")
    daemon.kill()
    gate.touch()
    pids = [job.attempts[0].pid for job in jobs.values()]
    until("all have ended", lambda: not any(pid in daemon.processes() for pid in pids))
    daemon.start()
    for code, job in jobs.items():
        ended = daemon.wait(job.id)
        assert (ended.exit_code, ended.state) == (code, FAILED if code else SUCCEEDED)
        assert ended.attempts[0].exited_at.ToNanoseconds() > job.attempts[0].started_at.ToNanoseconds()


def test_a_number_is_not_given_out_twice_after_a_crash(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    first = daemon.submit("true")
    daemon.restart()
    second = daemon.submit("true")
    assert (first.id, second.id) == ("j1", "j2")
    daemon.wait(second.id)


def test_a_stop_leaves_jobs_alone_too(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    job = daemon.run("sleep", "60")
    assert daemon.terminate() == 0
    assert daemon.processes().keys() >= {job.attempts[0].pid}
    daemon.start()
    assert attempts_of(daemon.get(job.id)) == attempts_of(job)


def test_the_launcher_ends_by_itself_when_nobody_needs_it(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    daemon.finish("true")
    daemon.terminate()
    until("nothing is left", lambda: not daemon.processes())
