"""A tree in a cgroup whose first process can't be signalled."""

from collections.abc import Iterator
from typing import Any

import pytest

from scheduler.effects import job_cgroup
from scheduler.effects.job_cgroup import CgroupTree
from scheduler.effects.job_spawn import StartLine
from scheduler.effects.job_tree import Listener
from scheduler.effects.launcher_loop import Loop

PATH = "/nowhere/cgroup"


class Containment:
    """As far as a tree that is stopped looks at it."""

    reaped_pid = 0


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cgroups that were killed; signals are refused."""

    def refuse(pid: int, number: int) -> None:
        raise PermissionError(f"{number} to {pid}")

    found: list[str] = []
    monkeypatch.setattr(job_cgroup.os, "kill", refuse)
    monkeypatch.setattr(job_cgroup, "kill_cgroup", found.append)
    return found


@pytest.fixture
def tree() -> Iterator[CgroupTree]:
    containment: Any = Containment()
    line = StartLine()
    made = CgroupTree(containment, Loop(lambda: None), Listener(), line, PATH)
    made.main_pid = 77
    yield made
    line.close()


def test_who_became_another_user_is_killed_with_his_cgroup(tree: CgroupTree, killed: list[str]) -> None:
    tree.terminate()
    assert killed == []
    tree.kill()
    assert killed == [PATH]


def test_who_was_reaped_is_not_among_the_processes(tree: CgroupTree) -> None:
    assert tree.pids() == {77}
    tree._containment.reaped_pid = 77
    assert tree.pids() == set()
