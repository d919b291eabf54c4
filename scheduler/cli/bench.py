"""`bench`: what planning costs on this machine, on worlds of any size."""

from __future__ import annotations

import sys

import click

# Ten times the largest fleet that is known of, in both directions: beyond it the columns alone fill a host.
JOBS_MAX = 10_000_000
GPUS_MAX = 1_000_000
SEED_MAX = (1 << 63) - 1


@click.group()
def bench() -> None:
    """Measure what planning costs on this machine."""


@bench.command()
@click.option(
    "--jobs",
    type=click.IntRange(1, JOBS_MAX),
    default=10_000,
    show_default=True,
    help="Jobs of the world, live and waiting.",
)
@click.option(
    "--gpus",
    type=click.IntRange(1, GPUS_MAX),
    default=64,
    show_default=True,
    help="GPUs of the world, 8 a node.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "numpy", "cupy"], case_sensitive=False),
    default="auto",
    show_default=True,
    help="What computes; auto takes CuPy only where it was measured to be faster.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, SEED_MAX),
    default=0,
    show_default=True,
    help="Equal seeds give equal worlds.",
)
@click.option(
    "--changes",
    type=click.IntRange(0, JOBS_MAX),
    default=1_000,
    show_default=True,
    help="Things that change before each tick.",
)
@click.option(
    "--settled",
    is_flag=True,
    help="Let plans be carried out until nothing is left to do, and measure then.",
)
def allocator(jobs: int, gpus: int, backend: str, seed: int, changes: int, settled: bool) -> None:
    """Print how long the allocator plans for a world, as one JSON object.

    Cold, from columns to a plan (plan_seconds), and after so many changes (next_tick_seconds). Beside it
    stands the time to read the columns once at the memory's bandwidth (memory_floor_seconds).
    """
    import json
    from dataclasses import asdict

    from scheduler.errors import BackendUnavailable
    from scheduler.planning.arrays import Backend, choose
    from scheduler.simulation import plan_time

    try:
        # Nothing else is using the GPU that a person names for a benchmark: it is set aside.
        chosen = choose(Backend(backend.lower()), jobs, gpu_is_set_aside=True)
    except BackendUnavailable as error:
        raise click.BadParameter(str(error), param_hint="'--backend'") from None
    with _Waiting(chosen) as waiting:
        found = plan_time.measure(jobs, gpus, seed, waiting.tell, changes=changes, is_settled=settled)
    print(json.dumps(asdict(found)))


class _Waiting:
    """Tells a person on standard error what is being measured, if that is a terminal.

    Nothing is drawn while something is timed: rich's own thread would take turns with what is measured.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __enter__(self) -> _Waiting:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=console, auto_refresh=False, transient=True, disable=not sys.stderr.isatty()
        )
        self._progress.start()
        self._task = self._progress.add_task("")
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def tell(self, stage: str, done: int) -> None:
        """Say which stage runs, and how many of its rounds are done."""
        self._progress.update(self._task, description=f"{self._backend}: {stage} {done + 1}", refresh=True)
