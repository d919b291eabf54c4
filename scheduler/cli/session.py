"""What the options in front of and behind a sub-command say about the connection, and how to use it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from scheduler.cli.values import DURATION_S

if TYPE_CHECKING:
    from scheduler.cli.client import Client

CONNECT_TIMEOUT_S = 5.0

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(slots=True)
class Session:
    """The connection's settings, filled in while the command line is parsed; the last word wins."""

    address: str | None = None
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    output: str = "table"
    job_options: dict[str, Any] = field(default_factory=dict)  # see cli/spec.py

    @property
    def json(self) -> bool:
        """Whether answers are printed as JSON."""
        return self.output == "json"

    def connect(self) -> Client:
        """Return a client of the daemon; nothing is sent yet."""
        from scheduler import paths
        from scheduler.cli.client import Client

        address = self.address or os.environ.get("WATTSHIFT_ADDRESS") or paths.default_address()
        return Client(address, self.connect_timeout_s)


def talks(function: Function) -> Function:
    """Give a command the options of everything that talks to the daemon."""
    for option in reversed((OUTPUT_OPTION, *CONNECTION_OPTIONS)):
        function = option(function)
    return function


def _remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        assert parameter.name
        setattr(ctx.ensure_object(Session), parameter.name, value)


OUTPUT_OPTION = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"], case_sensitive=False),
    expose_value=False,
    callback=_remember,
    help="Form of the answer [default: table].",
)
CONNECTION_OPTIONS = (
    click.option(
        "--address",
        expose_value=False,
        callback=_remember,
        metavar="ADDRESS",
        help="The daemon: unix:///path or host:port [env: WATTSHIFT_ADDRESS].",
    ),
    click.option(
        "--connect-timeout",
        "connect_timeout_s",
        type=DURATION_S,
        expose_value=False,
        callback=_remember,
        metavar="SECONDS",
        help=f"Give up when no server answers for so long [default: {CONNECT_TIMEOUT_S:g}].",
    ),
)
