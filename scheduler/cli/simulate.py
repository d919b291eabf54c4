"""`simulate`: what Wattshift would have done with a workload: the real loop and planner, in virtual time."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scheduler.cli.convert import convert
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.progress import ProgressBar
from scheduler.cli.session import OUTPUT_OPTION, Session

if TYPE_CHECKING:
    from scheduler.model.settings import Config
    from scheduler.simulation.inputs import JobStore
    from scheduler.simulation.record import Progress
    from scheduler.simulation.replay import World

SEED_MAX = (1 << 63) - 1
_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(invoke_without_command=True, subcommand_metavar="[convert FORMAT ...]")
@click.option("--nodes", type=_FILE, help="The nodes: a CSV file.")
@click.option("--jobs", type=_FILE, help="The jobs: a CSV file, in any order.")
@click.option("--prices", type=_FILE, help="Electricity prices: a CSV file.")
@click.option("--events", type=_FILE, help="Grid events: a CSV file.")
@click.option("--policy", type=_FILE, help="A wattshift.toml: its [policy], [classes.*] and [power] hold.")
@click.option("--compare", nargs=2, type=_FILE, metavar="A.toml B.toml", help="Two policies side by side.")
@click.option("--synthetic", is_flag=True, help="Make up a busy day; with --nodes, for those nodes.")
@click.option(
    "--seed",
    type=click.IntRange(0, SEED_MAX),
    default=0,
    show_default=True,
    help="Of what is drawn by chance: the synthetic day. A replay of files draws nothing.",
)
@click.option(
    "--until",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End then  [default: when no job can change any more].",
)
@click.option("--out", type=_FOLDER, metavar="DIR", help="Where the results go.")
@click.option(
    "--replay-journal",
    type=click.Path(exists=True, path_type=Path),
    metavar="STATE_DIR",
    help="Make a daemon's decisions again instead; with --policy, beside those of another policy.",
)
@OUTPUT_OPTION
@click.pass_context
def simulate(
    ctx: click.Context, /, out: Path | None, replay_journal: Path | None, **options: Any
) -> int | None:
    """Replay a workload in virtual time, under the loop and the planner that run a node.

    Into DIR go summary.json, report.html, attempts.csv and timeline.csv. Equal inputs give equal files.
    The formats are in docs/SIMULATE.md; `simulate convert` makes them of public traces.

    With --replay-journal the decisions of a daemon are made again from its journal, also beside it while it
    runs: exit code 0 if each is the same to the last bit. With --policy it shows what that policy would have
    decided otherwise in the same moments; its [power] is not used, for budgets were what they were.
    """
    if ctx.invoked_subcommand is not None:
        return None
    as_json = ctx.ensure_object(Session).json
    if replay_journal is not None:
        return _decide_again(ctx, replay_journal, options, out, as_json=as_json)
    if as_json:
        raise click.UsageError("-o json goes with --replay-journal; a simulation writes summary.json", ctx)
    _check(ctx, options, out)
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    files = _files(options, out)
    world = _world(files, options["until"])
    with closing(_load(files["jobs"], world)) as store:
        if options["compare"]:
            _compare(world, store, options["compare"], out)
        else:
            _simulate(world, store, _config(options["policy"]), out, "")
    return None


simulate.add_command(convert)


def _check(ctx: click.Context, options: dict[str, Any], out: Path | None) -> None:
    """What can't be together, or is missing."""
    wanted = ["--out"] if out is None else []
    if options["synthetic"]:
        if options["jobs"]:
            raise click.UsageError("--synthetic makes up the jobs; leave --jobs out", ctx)
    else:
        wanted += [f"--{name}" for name in ("nodes", "jobs") if options[name] is None]
    if wanted:
        raise click.UsageError(f"missing {', '.join(wanted)}", ctx)
    if options["compare"] and options["policy"]:
        raise click.UsageError("--compare names both policies; leave --policy out", ctx)


def _decide_again(
    ctx: click.Context, journal: Path, options: dict[str, Any], out: Path | None, *, as_json: bool
) -> int:
    """Replay a journal's decisions; returns the exit code."""
    from scheduler import config as configuration
    from scheduler.cli import replaying

    others = ("nodes", "jobs", "prices", "events", "compare", "synthetic", "until")
    if wrong := [f"--{name}" for name in others if options[name]]:
        raise click.UsageError(f"--replay-journal has all its inputs; leave {', '.join(wrong)} out", ctx)
    policy = None if options["policy"] is None else configuration.load(options["policy"]).policy
    return replaying.replay(journal, policy, out, as_json=as_json)


def _files(options: dict[str, Any], out: Path) -> dict[str, Path | None]:
    """The input files; those of a synthetic day are made first, for a person to look at and change."""
    files = {name: options[name] for name in ("nodes", "jobs", "prices", "events")}
    if options["synthetic"]:
        from scheduler.simulation import synthetic

        made = synthetic.write(out / "inputs", options["seed"], files["nodes"])
        files = {**made, **{name: path for name, path in files.items() if path is not None}}
        _tell(f"the synthetic day is in {out / 'inputs'}")
    return files


def _world(files: dict[str, Path | None], until_s: float | None) -> World:
    from scheduler.simulation import inputs, replay

    nodes, prices, events = (files[name] for name in ("nodes", "prices", "events"))
    assert nodes is not None
    return replay.World(
        nodes=tuple(inputs.read_nodes(nodes)),
        prices=() if prices is None else tuple(inputs.read_prices(prices)),
        events=() if events is None else tuple(inputs.read_events(events)),
        until_s=until_s,
    )


def _load(jobs: Path | None, world: World) -> JobStore:
    from scheduler.simulation import inputs

    assert jobs is not None
    store = inputs.JobStore()
    try:
        store.load(jobs, inputs.Room(world.nodes))
    except BaseException:
        store.close()
        raise
    return store


def _config(path: Path | None) -> Config:
    """The settings of a policy file; what of them a simulation does not use is said."""
    from dataclasses import fields, replace

    from scheduler import config as configuration
    from scheduler.model.settings import Config, NodeConfig
    from scheduler.simulation.replay import CLASSES

    found = configuration.load(path, CLASSES)
    plain = Config(node=NodeConfig(name=found.node.name))
    used = ("policy", "power")
    idle = [
        f.name
        for f in fields(Config)
        if f.name not in used and getattr(found, f.name) != getattr(plain, f.name)
    ]
    if idle:
        _tell(f"{path}: not used in a simulation: {', '.join(f'[{name}]' for name in idle)}")
    for key, instead in (("base_w", "nodes.csv"), ("price_source", "prices.csv")):
        if getattr(found.power, key) != getattr(plain.power, key):
            _tell(f"{path}: power.{key} is not used in a simulation; {instead} says it")
    return replace(plain, policy=found.policy, power=found.power)


def _simulate(world: World, store: JobStore, config: Config, out: Path, label: str) -> dict[str, Any]:
    """Replay once; returns the summary, which is written and told."""
    from dataclasses import replace

    from scheduler.simulation import outputs, report
    from scheduler.simulation import replay as replays

    world = replace(world, policy=config.policy, power=config.power)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    bar = _Bar(world.until_s, store.count, label)
    with bar:
        outcome = replays.replay(world, store, out, bar.show)
    for refusal in outcome.refusals:
        _tell(refusal)
    found = outputs.summary(outcome)
    outputs.write_summary(out / "summary.json", found)
    report.write_report(out, outcome, found, sum(node.gpus for node in world.nodes))
    _print(found, label)
    _tell(f"{outcome.end_s:.0f} s simulated in {time.monotonic() - begun:.1f} s; see {out / 'report.html'}")
    return found


def _print(found: dict[str, Any], label: str) -> None:
    from scheduler.cli.output import print_table, table
    from scheduler.simulation import outputs

    head, rows = outputs.statistics(found)
    if label:
        print(label)
    print_table(table(head, rows, right=head[1:]))
    site = found["site"]
    print(
        f"value {site['value_usd']:.2f} USD, energy {site['energy_kwh']:.1f} kWh for "
        f"{site['energy_cost_usd']:.2f} USD, profit {site['profit_usd']:.2f} USD; "
        f"above the budget for {site['over_budget_seconds']:.0f} s"
    )


def _compare(world: World, store: JobStore, policies: tuple[Path, Path], out: Path) -> None:
    from scheduler.simulation import compare

    names = [path.stem for path in policies]
    if names[0] == names[1]:
        raise CliError(ExitCode.INVALID, f"--compare: both files are called {names[0]}; rename one")
    configs = [_config(path) for path in policies]
    found = {
        name: _simulate(world, store, config, out / name, name)
        for name, config in zip(names, configs, strict=True)
    }
    head, rows = compare.differences(found)
    from scheduler.cli.output import print_table, table

    print_table(table(head, rows, right=head[2:]))
    compare.write_page(out, found)
    _tell(f"side by side: {out / 'compare.html'}")


class _Bar(ProgressBar):
    """How far a replay is."""

    def __init__(self, until_s: float | None, jobs: int, label: str) -> None:
        super().__init__(label or "simulating")
        self._until_s = until_s
        self._jobs = jobs

    def show(self, progress: Progress) -> None:
        """Show how far it is: of the time if that is bounded, or of the jobs."""
        done = progress.ended / max(1, self._jobs)
        if self._until_s is not None:
            done = max(done, progress.now_s / self._until_s)
        self.tell(done, f"{progress.now_s / 3600.0:,.1f} h, {progress.ended:,} of {self._jobs:,} jobs ended")


def _tell(text: str) -> None:
    """Standard output is for results."""
    print(text, file=sys.stderr)
