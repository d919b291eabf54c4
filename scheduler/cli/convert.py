"""`simulate convert`: public traces made into the files that `simulate` reads."""

from __future__ import annotations

from pathlib import Path

import click

# Ten times what there is: whoever waits beyond that waits for the same.
FILL_PERCENT_MAX = 1000
_SOURCE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the files go."
)


@click.group()
def convert() -> None:
    """Make the input files of a public trace."""


@convert.command()
@click.argument("nodes", type=_SOURCE)
@click.argument("tasks", type=_SOURCE)
@click.option(
    "--fill",
    type=click.IntRange(1, FILL_PERCENT_MAX),
    metavar="PERCENT",
    help="Instead of the trace: a task a second, drawn by chance, all batch and endless, that ask for so "
    "much of all GPUs together.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what --fill draws.")
@_FOLDER
def openb(nodes: Path, tasks: Path, fill: int | None, seed: int, out: Path) -> None:
    """Alibaba's cluster trace of 2023 (openb): its list of NODES and a list of TASKS.

    Latency-sensitive tasks become inference, guaranteed and burstable ones training, best effort batch. Tasks
    that never ran or never ended are left out.
    """
    import itertools
    import random

    from scheduler.simulation import converters

    converters.openb_nodes(nodes, _target(out, "nodes.csv"))
    jobs = _target(out, "jobs.csv")
    if fill is None:
        converters.openb_jobs(tasks, jobs)
    else:
        chance = random.Random(seed)
        converters.openb_filling(
            nodes, tasks, jobs, fill, lambda count: (chance.randrange(count) for _ in itertools.repeat(None))
        )


@convert.command()
@click.argument("jobs", type=_SOURCE)
@click.option(
    "--restart-loss",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="What each start after a job's first costs.",
)
@click.option(
    "--value-by-service",
    is_flag=True,
    help='Worth more the less GPU time a job needs, so that order = "value" serves the smallest first.',
)
@_FOLDER
def philly(jobs: Path, restart_loss: float, out: Path, *, value_by_service: bool) -> None:
    """A list of training JOBS in the Philly style: job_id, num_gpu, submit_time and duration in ms."""
    from scheduler.simulation import converters

    converters.philly_jobs(
        jobs, _target(out, "jobs.csv"), restart_loss_s=restart_loss, value_by_service=value_by_service
    )


@convert.command()
@click.argument("requests", type=_SOURCE)
@click.option(
    "--tokens-per-second",
    type=click.FloatRange(0, min_open=True),
    default=200.0,
    show_default=True,
    help="Tokens that one GPU serves.",
)
@click.option(
    "--context-weight",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="What a token of context counts; one that is generated counts 1.",
)
@click.option(
    "--window",
    type=click.FloatRange(1),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How often the number of replicas follows the requests.",
)
@_FOLDER
def azure(requests: Path, tokens_per_second: float, context_weight: float, window: float, out: Path) -> None:
    """Azure's LLM inference trace: REQUESTS with their tokens become replicas of one GPU each."""
    from scheduler.simulation import converters

    converters.azure_jobs(
        requests,
        _target(out, "jobs.csv"),
        tokens_per_s=tokens_per_second,
        context_weight=context_weight,
        window_s=window,
    )


def _target(out: Path, name: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return out / name
