"""A frozen tree runs no more, whatever it detached; it thaws when ordered, or to hear a notice."""

import os
import signal
import sys
from pathlib import Path

from scheduler.effects.job_signals import runs
from scheduler.effects.launcher import AttemptKey, Exited, Frozen, LauncherGone, Signalled, Started, Thawed
from tests.integration.launching import Bench, eventually, is_alive

# Three that write on and on: the first process, a child, and a grandchild in a session of its own, whose
# parent has ended.
WRITE = "write() { while :; do echo >$1; sleep 0.01; done; }"
FAMILY = f"{WRITE}; (write child) & (setsid sh -c '{WRITE}; write far' &) ; write main"
WRITERS = ("main", "child", "far")
# Forks as fast as it can, each child in the way of whoever lists them.
FORKING = "echo up; while :; do (sleep 0.001 &); done"


async def a_family(bench: Bench) -> tuple[AttemptKey, Path]:
    """A tree of which each process writes into a file of its own, in this directory."""
    directory = bench.directory / "work"
    directory.mkdir()
    key = bench.start("sh", "-c", FAMILY, working_directory=str(directory))
    await eventually(lambda: all((directory / name).exists() for name in WRITERS), "three that write")
    return key, directory


def mtimes(directory: Path) -> list[int]:
    return [(directory / name).stat().st_mtime_ns for name in WRITERS]


async def frozen(bench: Bench, key: AttemptKey, times: int = 1) -> None:
    bench.client.freeze(key)
    await bench.until(lambda: len(bench.of(key, Frozen)) == times, f"Frozen of {key}")


async def test_a_frozen_tree_runs_no_more_and_goes_on_as_it_was(bench: Bench) -> None:
    key, directory = await a_family(bench)
    await frozen(bench, key)
    before = mtimes(directory)
    assert await bench.run("sleep", "0.2", job="job-2") == (0, None)  # long enough for many writes
    assert mtimes(directory) == before
    bench.client.thaw(key)
    await bench.report(key, Thawed)
    await eventually(
        lambda: all(new > old for new, old in zip(mtimes(directory), before, strict=True)), "all that write"
    )
    told = [type(report) for report in bench.reports if report.key == key]  # type: ignore[union-attr]
    assert told == [Started, Frozen, Thawed]


async def test_what_is_said_twice_happens_once(bench: Bench) -> None:
    key, _ = await a_family(bench)
    bench.client.thaw(key)  # nothing to do
    await frozen(bench, key)
    bench.client.freeze(key)
    bench.client.thaw(key)
    bench.client.thaw(key)
    await frozen(bench, key, times=2)
    told = [type(report) for report in bench.reports]
    assert told == [Started, Frozen, Thawed, Frozen]


async def test_who_forks_all_the_time_is_frozen_too(bench: Bench) -> None:
    key = bench.start("sh", "-c", FORKING)
    await bench.wrote(key, "up")
    await frozen(bench, key)
    pid = (await bench.started(key)).pid
    # The kernel's freezer leaves the state of a process as it was; who was stopped by a signal is seen so.
    assert bench.containment == "cgroup" or not runs(pid)
    bench.client.end_grace(key)
    await bench.report(key, Exited)


async def test_a_notice_wakes_a_frozen_tree_to_hear_it(bench: Bench) -> None:
    program = 'trap "echo saved; exit 7" TERM; echo up; while :; do sleep 0.01; done'
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    await frozen(bench, key)
    bench.stop(key, grace_s=30.0)
    exited = await bench.report(key, Exited)
    assert (exited.exit_code, "saved" in bench.output(key)) == (7, True)
    assert [type(report) for report in bench.reports] == [Started, Frozen, Thawed, Signalled, Exited]


async def test_a_freeze_that_comes_after_the_notice_is_no_freeze(bench: Bench) -> None:
    program = 'trap "sleep 0.2; echo saved; exit 7" TERM; echo up; while :; do sleep 0.01; done'
    key = bench.start("sh", "-c", program)
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=30.0)
    bench.client.freeze(key)
    assert (await bench.report(key, Exited)).exit_code == 7
    assert not bench.of(key, Frozen)


async def test_a_frozen_tree_is_killed_like_any_other(bench: Bench) -> None:
    key, _ = await a_family(bench)
    await frozen(bench, key)
    bench.client.end_grace(key)
    assert (await bench.report(key, Exited)).signal == signal.SIGKILL


async def test_somebody_else_kills_a_frozen_job_and_that_is_told(bench: Bench) -> None:
    key, _ = await a_family(bench)
    await frozen(bench, key)
    os.kill((await bench.started(key)).pid, signal.SIGKILL)
    assert (await bench.report(key, Exited)).signal == signal.SIGKILL


async def test_a_frozen_job_outlives_the_daemon_and_the_next_one_hears_how_it_is(bench: Bench) -> None:
    key, directory = await a_family(bench)
    await frozen(bench, key)
    bench.client.thaw(key)
    await bench.report(key, Thawed)
    await frozen(bench, key, times=2)
    before = mtimes(directory)
    await bench.client.close()
    hello = await bench.connect()
    (held,) = hello.attempts
    assert [type(report) for report in held.reports] == [Started, Frozen]  # only the last of its kind
    assert mtimes(directory) == before
    bench.client.thaw(key)
    await bench.report(key, Thawed)


async def test_a_killed_launcher_takes_its_frozen_jobs_along(bench: Bench) -> None:
    key = bench.start(sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(1000)")
    await bench.wrote(key, "up")
    await frozen(bench, key)
    pid = (await bench.started(key)).pid
    os.kill(bench.pid, signal.SIGKILL)
    await bench.until(lambda: any(isinstance(one, LauncherGone) for one in bench.reports), "LauncherGone")
    hello = await bench.connect()
    assert not hello.attempts
    await eventually(lambda: not is_alive(pid), "the end of what was frozen")
