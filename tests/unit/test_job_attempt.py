"""An attempt whose processes do what the test says: what real ones do too rarely."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.effects import job_attempt
from scheduler.effects.job_attempt import Attempt
from scheduler.effects.job_files import JobUser, open_directory
from scheduler.effects.job_spawn import Program
from scheduler.effects.job_tree import Containment, Listener, Tree
from scheduler.effects.job_workshop import Workshop
from scheduler.effects.launcher_loop import Loop
from scheduler.effects.launcher_wire import Message
from scheduler.effects.linux import Inotify

ORDER = {"command": ["it"], "environment": {}, "working_directory": "", "stop_command": []}
KEY = ("job-1", 1)


class FakeTree(Tree):
    """Does nothing by itself; survives as many kills as it is told to."""

    def __init__(self, loop: Loop, listener: Listener, survives: int) -> None:
        self._loop = loop
        self.listener = listener
        self.is_over = False
        self.kills = 0
        self.survives = survives

    def load(self, program: Program, output_fd: int) -> None:
        pass

    def go(self, environment: dict[str, str]) -> None:
        self._loop.call_after(0.0, lambda: self.listener.has_started(77, 1234))

    def pids(self) -> set[int]:
        return {77, 78}

    def terminate(self) -> None:
        pass

    def kill(self) -> None:
        self.kills += 1
        if self.kills > self.survives:
            self._loop.call_after(0.0, self.end)

    def end(self, status: int = 9) -> None:
        if not self.is_over:
            self.is_over = True
            self.listener.main_has_exited(status)
            self.listener.is_empty()


class FakeContainment(Containment):
    """Gives out fake trees and remembers them."""

    def __init__(self, survives: int) -> None:
        self.survives = survives
        self.trees: list[FakeTree] = []
        self.forks_fail = False

    def tree(self, loop: Loop, listener: Listener) -> Tree:
        tree = FakeTree(loop, listener, self.survives)
        self.trees.append(tree)
        if self.forks_fail:
            listener.has_failed_to_start("fork", 11, "Resource temporarily unavailable")
            tree.is_over = True
            listener.is_empty()
        return tree


class World:
    """An attempt and all around it."""

    def __init__(self, directory: Path, survives: int = 0, order: Message = ORDER) -> None:
        self.loop = Loop(lambda: None)
        self.containment = FakeContainment(survives)
        self.jobs_fd = open_directory(str(directory))
        self.inotify = Inotify()
        shop = Workshop(
            self.loop, self.containment, self.inotify, JobUser(), str(directory), self.jobs_fd, 1000, 2
        )
        self.reports: list[dict[str, Any]] = []
        self.attempt = Attempt(shop, KEY, dict(order), self.reports.append, self.loop.stop)

    def kinds(self) -> list[str]:
        return [report["report"] for report in self.reports]

    def start(self) -> None:
        self.attempt.prepare()
        assert not self.reports, "nothing is said before the start is ordered"
        self.attempt.start({})

    def run(self) -> None:
        """Run until the attempt is over."""
        self.loop.run()

    def close(self) -> None:
        self.inotify.close()
        os.close(self.jobs_fd)


def open_files() -> dict[str, str]:
    """What this process holds open, but for the look at it."""
    gc.collect()  # what earlier tests left must not be closed between two looks
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def test_a_tree_that_survives_sigkill_is_told_once_and_killed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_attempt, "STUCK_S", 0.01)
    world = World(tmp_path, survives=3)
    world.start()
    world.attempt.end_grace()
    world.run()
    assert world.kinds() == ["started", "tree_stuck", "exited"]
    assert world.reports[1]["pids"] == [77, 78]
    assert world.containment.trees[0].kills == 4
    world.close()


def test_a_step_of_the_clock_does_not_stretch_a_deadline(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(job_attempt.time, "time", lambda: now_s[0])
    world.start()
    world.attempt.stop(1000.05, {})
    now_s[0] = 0.0
    world.run()
    assert world.kinds() == ["started", "signalled", "exited"]


def test_a_deadline_too_far_off_is_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_attempt, "GRACE_S_MAX", 0.02)
    world.start()
    world.attempt.stop(1e11, {})
    world.run()
    assert world.kinds()[-1] == "exited"


def test_a_kill_before_the_exec_is_known_is_said_in_order(world: World) -> None:
    world.start()
    world.attempt.stop(0.0, {"reason": "now"})
    world.run()
    assert world.kinds() == ["started", "signalled", "exited"]


def test_without_directories_nothing_starts_and_nothing_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "job-1").write_text("in the way")
    world = World(tmp_path)
    before = open_files()
    world.start()
    world.run()
    (report,) = world.reports
    assert (report["report"], report["what"]) == ("start_failed", "files")
    assert world.attempt.is_over
    assert open_files() == before
    world.close()


def test_nothing_is_left_open_after_the_exit(world: World) -> None:
    before = open_files()
    world.start()
    world.attempt.stop(0.0, {})
    world.run()
    assert open_files() == before


def test_orders_after_the_exit_change_nothing(world: World) -> None:
    world.start()
    world.attempt.end_grace()
    world.run()
    said = list(world.reports)
    world.attempt.stop(0.0, {})
    world.attempt.end_grace()
    assert world.reports == said


def test_without_a_process_a_start_fails_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tree(loop: Loop, listener: Listener) -> Tree:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(world.containment, "tree", no_tree)
    world.start()
    (report,) = world.reports
    assert (report["report"], report["what"], report["errno"]) == ("start_failed", "fork", 11)
    assert world.attempt.is_over


def test_a_fork_that_fails_at_once_fails_the_start(world: World) -> None:
    before = open_files()
    world.containment.forks_fail = True
    world.start()
    (report,) = world.reports
    assert (report["report"], report["what"], report["errno"]) == ("start_failed", "fork", 11)
    assert open_files() == before


def test_a_stop_command_whose_fork_fails_at_once_does_not_hold_up_the_end(tmp_path: Path) -> None:
    world = World(tmp_path, order={**ORDER, "stop_command": ["stop-it"]})
    world.start()
    world.containment.forks_fail = True
    world.loop.call_after(0.02, lambda: world.attempt.stop(0.0, {}))
    world.run()
    assert world.kinds() == ["started", "signalled", "exited"]
    world.close()


def test_a_stop_command_that_cannot_be_forked_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, order={**ORDER, "stop_command": ["stop-it"]})
    world.start()
    real = world.containment.tree

    def no_tree(loop: Loop, listener: Listener) -> Tree:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(world.containment, "tree", no_tree)
    world.loop.call_after(0.02, lambda: world.attempt.stop(0.0, {}))
    world.run()
    monkeypatch.setattr(world.containment, "tree", real)
    assert world.kinds() == ["started", "signalled", "exited"]
    assert "the stop command did not start" in (tmp_path / "job-1" / "1" / "output.log").read_text()
    world.close()


def test_the_exit_waits_for_the_stop_command_but_its_time_ends_with_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, order={**ORDER, "stop_command": ["stop-it"]})
    world.start()
    world.loop.call_after(0.01, lambda: world.attempt.stop(job_attempt.time.time() + 0.05, {}))
    world.loop.call_after(0.03, lambda: world.containment.trees[0].end(0))
    world.run()
    job, stop = world.containment.trees
    assert (job.kills, stop.kills) == (0, 1)
    assert world.kinds() == ["started", "signalled", "exited"]
    assert world.reports[-1]["exit_code"] == 0
    world.close()
