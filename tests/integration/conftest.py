"""Fixtures of the tests with a real daemon."""

from tests.harness.fixtures import daemon, make_daemon, shared_daemon

__all__ = ["daemon", "make_daemon", "shared_daemon"]
