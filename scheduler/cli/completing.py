"""Arguments that the shell completes by asking the daemon: jobs and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from scheduler.cli import words
from scheduler.cli.failures import CliError
from scheduler.cli.session import Session

if TYPE_CHECKING:
    from scheduler.cli.client import Client

CONNECT_TIMEOUT_S = 0.5  # Tab answers or gives up before the person types on
CALL_TIMEOUT_S = 1.0
COMPLETIONS_MAX = 200


def complete_jobs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Return the jobs whose id begins like this."""
    return _complete(ctx, incomplete, partial(_jobs, active_only=False))


def complete_active_jobs(
    ctx: click.Context,
    param: click.Parameter,  # noqa: ARG001 (click's signature)
    incomplete: str,
) -> list[CompletionItem]:
    """Return the jobs that are not finished and whose id begins like this."""
    return _complete(ctx, incomplete, partial(_jobs, active_only=True))


def complete_gpus(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Return the GPUs whose index begins like this."""
    return _complete(ctx, incomplete, _gpus)


def _complete(
    ctx: click.Context, incomplete: str, candidates: Callable[[Client], Iterable[tuple[str, str]]]
) -> list[CompletionItem]:
    """Return the candidates, each with a word of help; nothing where no daemon answers."""
    session = ctx.ensure_object(Session)
    session.connect_timeout_s = CONNECT_TIMEOUT_S
    try:
        with session.connect() as client:
            known = list(candidates(client))
    except CliError:
        return []
    return [CompletionItem(value, help=text) for value, text in known if value.startswith(incomplete)]


def _jobs(client: Client, *, active_only: bool) -> list[tuple[str, str]]:
    from scheduler.v1 import job_service_pb2

    request = job_service_pb2.ListJobsRequest(active_only=active_only, page_size=COMPLETIONS_MAX)
    answer = client.call(
        client.jobs.ListJobs, request, job_service_pb2.ListJobsResponse, timeout_s=CALL_TIMEOUT_S
    )
    return [(job.id, words.clean(f"{job.name} {words.word(job, 'state')}")) for job in answer.jobs]


def _gpus(client: Client) -> list[tuple[str, str]]:
    from scheduler.v1 import node_service_pb2

    answer = client.call(
        client.node.GetNode,
        node_service_pb2.GetNodeRequest(),
        node_service_pb2.GetNodeResponse,
        timeout_s=CALL_TIMEOUT_S,
    )
    return [
        (str(gpu.index), words.clean(f"{gpu.model} {words.word(gpu, 'state')}")) for gpu in answer.node.gpus
    ]
