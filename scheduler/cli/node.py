"""`gpus`, `cordon`, `uncordon`, `drain`, `undrain`, `release`: the node and its GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scheduler.cli import output, words
from scheduler.cli.completing import complete_gpus
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.session import Session, talks

if TYPE_CHECKING:
    from scheduler.v1 import node_pb2, node_service_pb2

# A GPU is read every second or so; an older reading is marked.
SAMPLE_AGE_S_MAX = 10.0
TITLES = ("GPU", "UUID", "MODEL", "PART OF", "STATE", "JOB", "MEM GiB", "UTIL", "POWER W", "TEMP", "REASON")
SHOWN_IF_ANY = ("PART OF", "REASON")
NUMBERS = ("GPU", "MEM GiB", "UTIL", "POWER W", "TEMP")
VENDOR = "NVIDIA "  # all are; the model tells more
# States that need no explanation.
PLAIN_STATES = ("FREE", "ALLOCATED")
PROCESSES_SHOWN_MAX = 3
HOLDERS_SHOWN_MAX = 8


@click.command()
@talks
@click.pass_obj
def gpus(session: Session) -> None:
    """List the node's GPUs.

    State, holder, memory, load, power and power limit, temperature.
    """
    from scheduler.v1 import node_service_pb2

    with session.connect() as client:
        request = node_service_pb2.GetNodeRequest()
        answer = client.call(client.node.GetNode, request, node_service_pb2.GetNodeResponse)
    if session.json:
        output.print_message(answer)
        return
    output.print_table(gpus_table(answer.node.gpus))
    for line in node_remarks(answer.node):
        output.note(line)


def gpus_table(shown: Iterable[node_pb2.Gpu]) -> output.Table:
    """Return GPUs as a table, by index."""
    ordered = sorted(shown, key=lambda gpu: (gpu.index, gpu.uuid))
    names = words.gpu_names(uuid for gpu in ordered for uuid in (gpu.uuid, gpu.parent_uuid) if uuid)
    rows = [gpu_row(gpu, names) for gpu in ordered]
    shown_titles = [title for title in TITLES if title not in SHOWN_IF_ANY or any(row[title] for row in rows)]
    return output.table(shown_titles, ([row[title] for title in shown_titles] for row in rows), right=NUMBERS)


def gpu_row(gpu: node_pb2.Gpu, names: Mapping[str, str]) -> dict[str, str]:
    """Return a GPU as a row by TITLES, given what GPUs are called; what it does not report is a dash."""
    memory = words.gib(gpu.memory_used_mib) if gpu.HasField("memory_used_mib") else words.NONE
    power = f"{gpu.power_w:.0f}" if gpu.HasField("power_w") else words.NONE
    limit = f"{gpu.power_limit_w:.0f}" if gpu.HasField("power_limit_w") else words.NONE
    cells = (
        str(gpu.index),
        names[gpu.uuid],
        gpu.model.removeprefix(VENDOR),
        f"{words.count(gpu.slices, 'slice')} of {names[gpu.parent_uuid]}" if gpu.parent_uuid else "",
        words.word(gpu, "state"),
        ",".join(gpu.job_ids) or words.NONE,
        f"{memory}/{words.gib(gpu.memory_total_mib)}",
        f"{gpu.utilization_ratio:.0%}" if gpu.HasField("utilization_ratio") else words.NONE,
        f"{power}/{limit}",
        f"{gpu.temperature_celsius:.0f} °C" if gpu.HasField("temperature_celsius") else words.NONE,
        gpu_remark(gpu),
    )
    return dict(zip(TITLES, cells, strict=True))


def gpu_remark(gpu: node_pb2.Gpu) -> str:
    """Return what a person should know of a GPU beyond its state: why, who else is there, an old reading."""
    # A plain state has no reason worth a word, but it may have a fact: a job's GPU does not answer.
    is_plain = words.word(gpu, "state") in PLAIN_STATES
    parts = [words.clean(gpu.detail) if is_plain else words.because(gpu)]
    processes = [
        f"{process.command} (PID {process.pid}, {process.user})"
        for process in gpu.processes[:PROCESSES_SHOWN_MAX]
        # The detail often names the holder already.
        if str(process.pid) not in gpu.detail
    ]
    parts += [", ".join(processes)] if processes else []
    parts += [words.clean(problem) for problem in gpu.telemetry_problems if problem not in gpu.detail]
    if gpu.HasField("sampled_at") and time.time() - words.epoch_s(gpu.sampled_at) > SAMPLE_AGE_S_MAX:
        parts.append(f"last read {words.since(gpu.sampled_at)} ago")
    return "; ".join(part for part in parts if part)


def node_remarks(node: node_pb2.Node) -> Iterator[str]:
    """Yield what an operator should know of the node."""
    if not node.gpus:
        yield "no GPUs"
    if node.draining and not node.released:
        yield "the node is draining: nothing starts; `wattshift undrain` ends it"
    if node.released:
        yield "the node is released: no GPU is held; `wattshift undrain` takes them back"
    yield from node.problems
    yield from node.limitations


@click.command()
@click.argument("gpu", metavar="GPU", shell_complete=complete_gpus)
@click.option("--reason", default="", help="For people: why.")
@talks
@click.pass_obj
def cordon(session: Session, gpu: str, reason: str) -> None:
    """Start nothing new on a GPU; what runs there goes on. GPU is an index, a UUID or its beginning."""
    from scheduler.v1 import node_service_pb2

    with session.connect() as client:
        request = node_service_pb2.CordonGpuRequest(gpu=gpu, reason=reason)
        answer = client.call(client.node.CordonGpu, request, node_service_pb2.CordonGpuResponse)
    _print_gpu(session, answer)


@click.command()
@click.argument("gpu", metavar="GPU", shell_complete=complete_gpus)
@talks
@click.pass_obj
def uncordon(session: Session, gpu: str) -> None:
    """End a GPU's cordon or quarantine. GPU is an index, a UUID or its beginning."""
    from scheduler.v1 import node_service_pb2

    with session.connect() as client:
        request = node_service_pb2.UncordonGpuRequest(gpu=gpu)
        answer = client.call(client.node.UncordonGpu, request, node_service_pb2.UncordonGpuResponse)
    _print_gpu(session, answer)


def _print_gpu(
    session: Session, answer: node_service_pb2.CordonGpuResponse | node_service_pb2.UncordonGpuResponse
) -> None:
    if session.json:
        output.print_message(answer)
        return
    gpu = answer.gpu
    why = words.because(gpu)
    print(
        words.clean(
            f"GPU {gpu.index} {words.gpu_name(gpu.uuid)} {words.word(gpu, 'state')}" + (why and f": {why}")
        )
    )


@click.command()
@click.option("--stop-jobs", is_flag=True, help="Requeue what runs, with notice and grace.")
@talks
@click.pass_obj
def drain(session: Session, stop_jobs: bool) -> None:
    """Start nothing on this node.

    What runs goes on, unless --stop-jobs.
    """
    from scheduler.v1 import node_service_pb2

    with session.connect() as client:
        request = node_service_pb2.DrainNodeRequest(stop_jobs=stop_jobs)
        answer = client.call(client.node.DrainNode, request, node_service_pb2.DrainNodeResponse)
    _print_node(session, answer)


@click.command()
@talks
@click.pass_obj
def undrain(session: Session) -> None:
    """End a drain or a release: jobs start again."""
    from scheduler.v1 import node_service_pb2

    with session.connect() as client:
        request = node_service_pb2.UndrainNodeRequest()
        answer = client.call(client.node.UndrainNode, request, node_service_pb2.UndrainNodeResponse)
    _print_node(session, answer)


@click.command()
@click.option("--offline", is_flag=True, help="Without a daemon: only give power limits back.")
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="With --offline: the daemon's [default: as the daemon's].",
)
@talks
@click.pass_obj
def release(session: Session, offline: bool, state_dir: Path | None) -> None:
    """Let go of every GPU, for a reset or a change of MIG.

    Drains the node and gives power limits back; refused while jobs hold GPUs.
    """
    if offline:
        _release_offline(state_dir)
        return
    from scheduler.v1 import node_service_pb2

    with session.connect() as client:
        request = node_service_pb2.ReleaseNodeRequest()
        answer = client.call(client.node.ReleaseNode, request, node_service_pb2.ReleaseNodeResponse)
    _print_node(session, answer)


def _release_offline(state_dir: Path | None) -> None:
    """Give back what a daemon that is gone set; the journal says what that was."""
    import asyncio

    from scheduler import paths
    from scheduler.control.restore import restore
    from scheduler.effects.journal_file import DATABASE_NAME
    from scheduler.effects.journal_sqlite import SqliteJournal
    from scheduler.effects.nvml_client import NvmlGpus

    directory = state_dir or paths.for_daemon().state_dir
    if not (directory / DATABASE_NAME).exists():
        raise CliError(ExitCode.INVALID, f"{directory} has no journal; name the daemon's with --state-dir")
    journal = SqliteJournal(directory, now_s=time.time())
    try:
        found = asyncio.run(restore(journal, NvmlGpus(), time.time()))
    finally:
        journal.close()
    if found.holders:
        jobs = ", ".join(found.holders[:HOLDERS_SHOWN_MAX])
        raise CliError(
            ExitCode.PRECONDITION,
            f"jobs {jobs} may still run under the limits as they are; nothing was touched",
        )
    for uuid in found.done:
        print(f"{uuid} has the power limit back that it was found with")
    if found.failed:
        raise CliError(ExitCode.FAILED, *found.failed)
    if not found.done:
        output.note("no power limit is to be given back")


def _print_node(
    session: Session,
    answer: node_service_pb2.DrainNodeResponse
    | node_service_pb2.UndrainNodeResponse
    | node_service_pb2.ReleaseNodeResponse,
) -> None:
    if session.json:
        output.print_message(answer)
        return
    node = answer.node
    state = "released" if node.released else "draining" if node.draining else "open"
    print(words.clean(f"{node.name} is {state}: {node.live_jobs} running, {node.pending_jobs} pending"))
