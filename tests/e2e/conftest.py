"""Fixtures of the tests with a real daemon, and their order."""

import pytest

from tests.harness.fixtures import daemon, make_daemon, shared_daemon

__all__ = ["daemon", "make_daemon", "shared_daemon"]


def pytest_configure(config: pytest.Config) -> None:
    """Say what our own marker means."""
    config.addinivalue_line("markers", "last: uses up what its module's tests share, and runs after them")


@pytest.hookimpl(trylast=True)  # in the order that chance has given them by then
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that are marked `last` behind the others of their module."""
    modules = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (modules.index(item.path), item.get_closest_marker("last") is not None))
