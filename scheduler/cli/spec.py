"""The options that describe a job, for `submit` and `preview`, and the JobSpec they make.

What is not given stays unset in the message: the daemon fills in the defaults of the job's class.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from scheduler.cli import values
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.session import Session

if TYPE_CHECKING:
    from scheduler.v1 import job_pb2, job_service_pb2

Function = TypeVar("Function", bound=Callable[..., Any])

CLASSES = ("inference", "training", "batch", "mining")
# Prefixes of the enums of a JobSpec, so that a job file may say "batch" as the command line does.
ENUM_PREFIXES = {"class": "JOB_CLASS_", "on_preempt": "ON_PREEMPT_", "restart": "RESTART_RULE_"}
# Options whose value becomes the field of the same name as it is.
PLAIN_FIELDS = (
    "name",
    "priority",
    "value_usd_per_gpu_hour",
    "gpus",
    "gpu_share_milli",
    "gpu_memory_mib",
    "cpus",
    "memory_mib",
    "preemptible",
    "grace_s",
    "min_runtime_s",
    "restart_loss_s",
    "exit_zero_is_done",
    "expected_duration_s",
    "time_limit_s",
    "draw_w",
    "pinned_memory_mib",
    "tenant",
)


def job_options(function: Function) -> Function:
    """Give a command the options that describe a job; `build` reads what they said."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def build(session: Session, command: Sequence[str]) -> job_pb2.JobSpec:
    """Return the job that the options and the command describe.

    Raises:
        click.UsageError: The class or the command is missing.
    """
    from scheduler.v1 import job_pb2

    given = session.job_options
    if "class" not in given:
        raise click.UsageError(f"Missing option '--class': one of {', '.join(CLASSES)}.")
    if not command:
        raise click.UsageError("Missing the command to run; write it last, after --.")
    spec = job_pb2.JobSpec(
        command=command,
        gpu_models=given.get("gpu_models", ()),
        stop_command=given.get("stop_command", ()),
    )
    for entries in (*given.get("env_files", ()), *given.get("env", ())):
        spec.environment.update(entries)
    for name in PLAIN_FIELDS:
        if name in given:
            setattr(spec, name, given[name])
    for name, prefix in ENUM_PREFIXES.items():
        if name in given:
            kind = spec.DESCRIPTOR.fields_by_name[name].enum_type
            assert kind is not None
            setattr(spec, name, kind.values_by_name[prefix + given[name].upper().replace("-", "_")].number)
    if "working_directory" in given:
        spec.working_directory = str(Path(given["working_directory"]).absolute())
    if "miner" in given:
        api, port, algorithm = given["miner"]
        spec.miner.api, spec.miner.port, spec.miner.algorithm = getattr(job_pb2, api), port, algorithm
    if "deadline" in given:
        spec.deadline.FromMicroseconds(round(given["deadline"] * 1e6))
    return spec


def read_requests(text: str, source: str) -> list[job_service_pb2.SubmitJobRequest]:
    """Return the submissions that a job file describes.

    One JobSpec in protobuf JSON after another (a line each, or spread out), a list of them, or a
    SubmitJobsRequest; where a SubmitJobRequest stands instead of a JobSpec, its request_id counts.

    Raises:
        CliError: The file isn't that; the message names the job.
    """
    from google.protobuf import json_format

    from scheduler.v1 import job_service_pb2

    requests = []
    for number, document in enumerate(_documents(text, source), start=1):
        request = job_service_pb2.SubmitJobRequest()
        wrapped = document if isinstance(document, dict) and "spec" in document else {"spec": document}
        try:
            json_format.ParseDict(_with_enum_prefixes(wrapped), request)
        except json_format.ParseError as error:
            raise CliError(ExitCode.INVALID, f"{source}: job {number}: {error}") from None
        requests.append(request)
    if not requests:
        raise CliError(ExitCode.INVALID, f"{source}: holds no job; write one JobSpec in JSON a line")
    return requests


def _documents(text: str, source: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    position = 0
    while rest := text[position:].lstrip():
        try:
            document, length = decoder.raw_decode(rest)
        except json.JSONDecodeError as error:
            line = text[: len(text) - len(rest) + error.pos].count("\n") + 1
            raise CliError(ExitCode.INVALID, f"{source}:{line}: not JSON: {error.msg}") from None
        position = len(text) - len(rest) + length
        if isinstance(document, dict) and isinstance(document.get("jobs"), list):
            document = document["jobs"]
        yield from document if isinstance(document, list) else (document,)


def _with_enum_prefixes(request: dict[str, Any]) -> dict[str, Any]:
    spec = request["spec"]
    if not isinstance(spec, dict):
        return request
    full = dict(spec)
    for name, prefix in ENUM_PREFIXES.items():
        value = full.get(name)
        if isinstance(value, str) and not value.upper().startswith(prefix):
            full[name] = prefix + value.upper().replace("-", "_")
    return request | {"spec": full}


def _remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value not in (None, ()):
        assert parameter.name
        ctx.ensure_object(Session).job_options[parameter.name] = value


def _option(
    *names: str,
    type: Any,  # noqa: A002
    text: str,
    many: bool = False,
    metavar: str | None = None,
) -> Callable[[Function], Function]:
    return click.option(
        *names,
        type=type,
        help=text,
        multiple=many,
        metavar=metavar,
        default=None,
        expose_value=False,
        callback=_remember,
    )


def _read_environment(name: str) -> dict[str, str]:
    try:
        return values.environment_file(Path(name))
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None


DEADLINE = values.typed("time", lambda text: values.time_s(text, time.time()))
ENVIRONMENT = values.typed("KEY=VALUE", lambda text: values.environment_of((text,), "--env"))
ENVIRONMENT_FILE = values.typed("file", _read_environment)
WORDS = values.typed("command", shlex.split)
MINER = values.typed("miner", values.miner)

OPTIONS = (
    _option(
        "-c",
        "--class",
        "class",
        type=click.Choice(CLASSES, case_sensitive=False),
        text="Kind of work. Required.",
    ),
    _option("--name", type=str, text="For people [default: the command's base name]."),
    _option("-g", "--gpus", type=int, text="Whole GPUs; 0 for none [default: 1]."),
    _option(
        "--share",
        "gpu_share_milli",
        type=values.SHARE_MILLI,
        text="A part of one GPU instead: thousandths, or a fraction as 0.5.",
    ),
    _option(
        "--gpu-memory",
        "gpu_memory_mib",
        type=values.SIZE_MIB,
        text="GPU memory to book on each GPU: MiB, or 40GiB.",
    ),
    _option(
        "--gpu-model",
        "gpu_models",
        type=str,
        many=True,
        text="A model that will do, such as H100; may be repeated [default: any].",
    ),
    _option("--cpus", type=int, text="CPUs to book."),
    _option("--memory", "memory_mib", type=values.SIZE_MIB, text="Host memory to book: MiB, or 64GiB."),
    _option(
        "--pinned-memory",
        "pinned_memory_mib",
        type=values.SIZE_MIB,
        text="Host memory that the job pins, if known; it slows the hand-over.",
    ),
    _option("--draw", "draw_w", type=float, text="Watts that the job draws per GPU, if known."),
    _option("--priority", type=int, text="0 to 1000 within the class, larger goes first [default: 500]."),
    _option("--value", "value_usd_per_gpu_hour", type=float, text="What it is worth, USD per GPU-hour."),
    _option(
        "--miner",
        type=MINER,
        metavar="API:PORT:ALGORITHM",
        text="Of a mining job: its API (t-rex, lolminer, rigel, xmrig, cgminer), that API's port on GPU 0, "
        "and what it mines.",
    ),
    _option("--tenant", type=str, text="Whose job it is, for usage reports."),
    _option(
        "--env",
        type=ENVIRONMENT,
        many=True,
        text="KEY=VALUE, or KEY to pass yours on; may be repeated. Kept secret.",
    ),
    _option(
        "--env-file",
        "env_files",
        type=ENVIRONMENT_FILE,
        many=True,
        text="A file of such entries, one a line; --env wins.",
    ),
    _option(
        "--cwd", "working_directory", type=str, text="Where to start [default: the job's own directory]."
    ),
    _option(
        "--stop-command",
        type=WORDS,
        text="Ends what the job started elsewhere, such as a container; quoted as in a shell.",
    ),
    _option("--preemptible/--no-preemptible", type=bool, text="May it be stopped for a higher-ranked job?"),
    _option(
        "--on-preempt",
        type=click.Choice(("requeue", "suspend", "cancel"), case_sensitive=False),
        text="What a preemption does to it [default: requeue].",
    ),
    _option("--grace", "grace_s", type=values.DURATION_S, text="Time between the notice and SIGKILL."),
    _option(
        "--min-runtime",
        "min_runtime_s",
        type=values.DURATION_S,
        text="A started attempt can't be preempted for so long.",
    ),
    _option("--restart-loss", "restart_loss_s", type=values.DURATION_S, text="Work that each restart costs."),
    _option(
        "--exit-zero-is-done/--exit-zero-is-not-done",
        type=bool,
        text="Whether exit code 0 after the notice means that the work is done [default: it doesn't].",
    ),
    _option(
        "--expected-duration",
        "expected_duration_s",
        type=values.DURATION_S,
        text="How long it will run, if known; lets it fill gaps.",
    ),
    _option(
        "--deadline",
        type=DEADLINE,
        text="Complete by then (2026-01-31T18:00:00Z or +2h), or it is worth nothing.",
    ),
    _option(
        "--time-limit",
        "time_limit_s",
        type=values.DURATION_S,
        text="An attempt that runs longer is stopped, and the job fails.",
    ),
    _option(
        "--restart",
        type=click.Choice(("never", "on-failure", "always"), case_sensitive=False),
        text="Whether it is started again when it ends by itself [default: never].",
    ),
)
