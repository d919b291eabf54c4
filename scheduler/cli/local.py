"""`serve`, `check-config`, `journal verify`, `completion`, `version`: what runs here, not over gRPC."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from scheduler import paths
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError

LOG_LEVELS = ("debug", "info", "warning", "error")
SHELLS = ("bash", "zsh", "fish")
# Where each shell looks for it; said on standard error, so that the script itself can be redirected.
INSTALL = {
    "bash": 'eval "$(wattshift completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(wattshift completion zsh)"   # in ~/.zshrc',
    "fish": "wattshift completion fish > ~/.config/fish/completions/wattshift.fish",
}


@click.command()
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Configuration file [default: {paths.SYSTEM.config} for root, if it is there].",
)
@click.option(
    "--simulate",
    metavar="GPUS",
    help="Simulated GPUs, such as 8xH100, under real processes: no GPU is needed.",
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Journal, logs and checkpoints [default: {paths.SYSTEM.state_dir} for root].",
)
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="Where clients connect: unix:///path or a loopback host:port; port 0 takes any "
    f"[default: {paths.SYSTEM.address} for root].",
)
@click.option(
    "--metrics-listen",
    metavar="HOST:PORT",
    help="Where Prometheus scrapes; port 0 takes any [default: 127.0.0.1:9477].",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="The least that is logged.",
)
def serve(
    config: Path | None,
    simulate: str | None,
    state_dir: Path | None,
    listen: str | None,
    metrics_listen: str | None,
    log_level: str,
) -> int:
    """Run the daemon of this node in the foreground.

    Root uses the system's directories, an ordinary user those of XDG.
    """
    from scheduler import daemon

    return daemon.serve(
        config_path=config,
        simulate=simulate,
        state_dir=state_dir,
        listen=listen,
        metrics_listen=metrics_listen,
        log_level=log_level,
    )


@click.command()
@click.argument("config", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
def check_config(config: Path | None) -> None:
    """Check a configuration file.

    The message names the key and the line that is wrong.
    """
    from scheduler import config as configuration

    path = config or paths.for_daemon().config
    configuration.load(path)
    print(f"{path}: OK")


@click.group()
def journal() -> None:
    """Look at the journal."""


@journal.command()
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"The daemon's [default: {paths.SYSTEM.state_dir} for root].",
)
def verify(state_dir: Path | None) -> None:
    """Check the journal's chain of hashes, also beside a running daemon.

    The exit code is 0 only if the whole chain holds.
    """
    from scheduler.effects import journal_verify

    directory = state_dir or paths.for_daemon().state_dir
    found = journal_verify.verify(directory)
    if not found.ok:
        raise CliError(ExitCode.FAILED, f"{directory}: {found.problem}")
    print(f"{directory}: OK, {found.events} events, {found.first} to {found.last}")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    It completes commands and options, and asks the daemon for jobs and GPUs.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(ctx.find_root().command, {}, "wattshift", "_WATTSHIFT_COMPLETE").source())
    if sys.stdout.isatty():
        print(f"# to install: {INSTALL[shell]}", file=sys.stderr)


@click.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(f"wattshift {installed('wattshift')}")
