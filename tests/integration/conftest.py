"""Fixtures of the tests with a real daemon, and of those with a real launcher."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness.fixtures import daemon, make_daemon, shared_daemon
from tests.integration.launching import Bench, a_launcher, cgroups_are_writable

__all__ = ["daemon", "make_daemon", "shared_daemon"]


@pytest.fixture(params=["cgroup", "supervisor"])
def containment(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind: str = request.param
    if kind == "cgroup" and not cgroups_are_writable(tmp_path):
        pytest.skip("no cgroup v2 is writable here")
    return kind


@pytest.fixture
async def bench(tmp_path: Path, containment: str) -> AsyncIterator[Bench]:
    async with a_launcher(tmp_path / "state", containment) as launcher:
        assert launcher.hello is not None
        assert launcher.hello.containment == containment
        yield launcher
