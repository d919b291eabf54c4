"""The `wattshift` command: one module a group of commands, each loaded when it is called.

This package and whatever parses a command line import only click: gRPC, protobuf, rich and the daemon
are imported by the command that needs them, so that `wattshift jobs` answers in the blink of an eye.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from scheduler.cli import exit_codes
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.session import CONNECTION_OPTIONS, Session
from scheduler.errors import ConfigError, InputError, WattshiftError

# In the order of the help: daily use first.
COMMANDS = {
    "submit": "submit",
    "preview": "submit",
    "jobs": "jobs",
    "show": "story",
    "explain": "story",
    "wait": "jobs",
    "logs": "logs",
    "cancel": "jobs",
    "requeue": "jobs",
    "top": "top",
    "gpus": "node",
    "cordon": "node",
    "uncordon": "node",
    "drain": "node",
    "undrain": "node",
    "release": "node",
    "power": "power",
    "usage": "usage",
    "simulate": "simulate",
    "bench": "bench",
    "serve": "local",
    "check-config": "local",
    "journal": "local",
    "completion": "local",
    "version": "local",
}

HELP_WIDTH_MAX = 100
EPILOG = f"""\b
Exit codes:
{exit_codes.table()}
With --wait and in `wait` the job's own exit code wins, 128 + n where signal n ended it.
"""


class LazyGroup(click.Group):
    """A group whose commands live in modules of this package, imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """Return the commands' names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command; None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"scheduler.cli.{COMMANDS[cmd_name]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Return what the command returns; a reader that has closed our output ends it in silence."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still buffered goes nowhere; else the interpreter complains at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(ExitCode.PIPE) from None
        return result


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH_MAX},
)
@click.version_option(package_name="wattshift", message="%(prog)s %(version)s")
@click.pass_context
def wattshift(ctx: click.Context) -> None:
    """Turn this node's GPUs and its changing supply of power into the most value.

    Jobs are submitted, watched and stopped here; `serve` is the daemon itself.
    """
    ctx.ensure_object(Session)


for option in CONNECTION_OPTIONS:  # of a finished command: each is appended
    wattshift = option(wattshift)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; what fails is told on standard error."""
    try:
        result = wattshift.main(arguments, prog_name="wattshift", standalone_mode=False)
    except click.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except CliError as error:
        return _fail(error.code, *error.lines)
    except ConfigError as error:
        return _fail(ExitCode.CONFIG, str(error))
    except InputError as error:
        return _fail(ExitCode.INVALID, str(error))
    except WattshiftError as error:
        return _fail(ExitCode.FAILED, str(error))
    except OSError as error:
        return _fail(ExitCode.INPUT_OUTPUT, str(error))
    return result if isinstance(result, int) else ExitCode.OK


def _fail(code: ExitCode, *lines: str) -> ExitCode:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return code
