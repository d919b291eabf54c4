"""Fixtures over `Daemon`; a conftest imports them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.harness.daemon import Daemon, logged

Make = Callable[..., Daemon]


@pytest.fixture(scope="module")
def shared_daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """One daemon for a module, which says by GPUS and CONFIG what it wants."""
    gpus = getattr(request.module, "GPUS", "4xH100")
    config = getattr(request.module, "CONFIG", "")
    with Daemon(gpus=gpus, config=config) as daemon, logged(daemon):
        yield daemon.start()


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """The module's daemon; after the test nothing of it may be left there."""
    yield shared_daemon
    with logged(shared_daemon):
        shared_daemon.settle()


@pytest.fixture
def make_daemon() -> Iterator[Make]:
    """Makes daemons for one test alone, not started; each must leave nothing behind."""
    with ExitStack() as stack:

        def make(**options: str) -> Daemon:
            made = stack.enter_context(Daemon(**options))
            stack.enter_context(logged(made))
            return made

        yield make
