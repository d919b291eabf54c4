import json
from pathlib import Path

import click
import pytest

from scheduler.cli import spec
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.session import Session
from scheduler.v1 import job_pb2


def built(*arguments: str) -> job_pb2.JobSpec:
    """The job that a command line with these arguments describes."""
    made: list[job_pb2.JobSpec] = []

    @click.command(context_settings={"allow_interspersed_args": False})
    @spec.job_options
    @click.argument("command", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def parse(ctx: click.Context, command: tuple[str, ...]) -> None:
        made.append(spec.build(ctx.ensure_object(Session), command))

    parse.main(arguments, standalone_mode=False)
    return made[0]


def refused(*arguments: str) -> str:
    with pytest.raises(click.UsageError) as caught:
        built(*arguments)
    return caught.value.format_message()


def expected(job_class: str = "JOB_CLASS_BATCH", **fields: object) -> job_pb2.JobSpec:
    job = job_pb2.JobSpec(command=["true"], **fields)  # type: ignore[arg-type]
    setattr(job, "class", job_pb2.JobClass.Value(job_class))
    return job


def test_what_is_not_said_stays_unset() -> None:
    assert built("-c", "batch", "true") == expected()


def test_a_command_keeps_its_own_options_with_or_without_dashes() -> None:
    for before in ((), ("--",)):
        job = built("-c", "batch", *before, "python", "train.py", "--class", "none", "--", "-g", "4")
        assert list(job.command) == ["python", "train.py", "--class", "none", "--", "-g", "4"]


def test_every_option_reaches_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t")
    job = built(
        *(
            "--class",
            "Training",
            "--name",
            "n",
            "--gpus",
            "4",
            "--gpu-memory",
            "40GiB",
            "--gpu-model",
            "H100",
        ),
        *(
            "--gpu-model",
            "A100",
            "--cpus",
            "8",
            "--memory",
            "64GiB",
            "--pinned-memory",
            "1GiB",
            "--draw",
            "350",
        ),
        *("--priority", "700", "--value", "1.25", "--tenant", "t1", "--env", "A=1", "--env", "TOKEN"),
        *("--cwd", "/data", "--stop-command", "docker stop 'my box'", "--no-preemptible"),
        *("--on-preempt", "SUSPEND", "--grace", "1m", "--min-runtime", "10m", "--restart-loss", "90"),
        *("--exit-zero-is-done", "--expected-duration", "2h", "--deadline", "2026-01-01T12:00:00Z"),
        *("--time-limit", "1d", "--restart", "on-failure", "true"),
    )
    wanted = expected(
        "JOB_CLASS_TRAINING",
        name="n",
        gpus=4,
        gpu_memory_mib=40960,
        gpu_models=["H100", "A100"],
        cpus=8,
        memory_mib=65536,
        pinned_memory_mib=1024,
        draw_w=350,
        priority=700,
        value_usd_per_gpu_hour=1.25,
        tenant="t1",
        environment={"A": "1", "TOKEN": "t"},
        working_directory="/data",
        stop_command=["docker", "stop", "my box"],
        preemptible=False,
        on_preempt="ON_PREEMPT_SUSPEND",
        grace_s=60,
        min_runtime_s=600,
        restart_loss_s=90,
        exit_zero_is_done=True,
        expected_duration_s=7200,
        time_limit_s=86400,
        restart="RESTART_RULE_ON_FAILURE",
    )
    wanted.deadline.FromJsonString("2026-01-01T12:00:00Z")
    assert job == wanted


def test_every_field_of_a_job_has_its_option() -> None:
    reached = {option for decorate in spec.OPTIONS for option in _names(decorate)}
    fields = {field.name for field in job_pb2.JobSpec.DESCRIPTOR.fields} - {"command", "environment"}
    assert fields <= reached
    assert reached - fields == {"env", "env_files"}


def _names(decorate: object) -> list[str]:
    assert callable(decorate)
    command = click.command()(decorate(lambda: None))
    return [parameter.name for parameter in command.params if parameter.name]


def test_zero_gpus_and_a_share_are_said_not_left_out() -> None:
    assert built("-c", "batch", "-g", "0", "true") == expected(gpus=0)
    assert built("-c", "batch", "--share", "0.25", "true") == expected(gpu_share_milli=250)
    assert built("-c", "batch", "--preemptible", "true") == expected(preemptible=True)


def test_the_command_line_wins_over_an_environment_file(tmp_path: Path) -> None:
    file = tmp_path / "e"
    file.write_text("A=file\nB=file\n", encoding="utf-8")
    assert built("-c", "batch", "--env", "A=line", "--env-file", str(file), "true") == expected(
        environment={"A": "line", "B": "file"}
    )


def test_a_working_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert built("-c", "batch", "--cwd", "run", "true").working_directory == f"{tmp_path}/run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("true",), "Missing option '--class': one of inference, training, batch, mining."),
        (("-c", "batch"), "Missing the command to run; write it last, after --."),
        (("-c", "fun", "true"), "'fun' is not one of"),
        (("-c", "batch", "--grace", "soon", "true"), "'soon' is not a duration; write seconds or 90s"),
        (("-c", "batch", "--share", "2.0", "true"), "'2.0' is not a share of a GPU"),
        (("-c", "batch", "--memory", "lots", "true"), "'lots' is not a size"),
        (("-c", "batch", "--deadline", "soon", "true"), "'soon' is not a time"),
        (("-c", "batch", "--env", "A B=1", "true"), "--env: 'A B=1': write KEY=VALUE"),
        (("-c", "batch", "--env-file", "/absent", "true"), "/absent: No such file or directory"),
        (("-c", "batch", "--stop-command", "docker stop 'x", "true"), "No closing quotation"),
    ],
)
def test_what_cant_be_read_is_refused_by_name(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(*arguments)


JOB = {"command": ["true"], "class": "JOB_CLASS_BATCH", "gpus": 2}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(JOB) + "\n\n" + json.dumps(JOB) + "\n",
        json.dumps(JOB, indent=2) + json.dumps(JOB, indent=2),
        json.dumps([JOB, JOB]),
        json.dumps({"jobs": [{"spec": JOB}, {"spec": JOB}]}),
        json.dumps([JOB | {"class": "batch"}, JOB | {"class": "Batch"}]),
    ],
)
def test_a_job_file_is_lines_or_a_list_or_a_request(text: str) -> None:
    assert [request.spec for request in spec.read_requests(text, "jobs")] == [expected(gpus=2)] * 2


def test_a_job_file_may_name_its_request_ids_and_use_short_words() -> None:
    document = {"request_id": "r1", "spec": JOB | {"restart": "on-failure", "on_preempt": "cancel"}}
    (request,) = spec.read_requests(json.dumps(document), "jobs")
    assert request.request_id == "r1"
    assert request.spec == expected(gpus=2, restart="RESTART_RULE_ON_FAILURE", on_preempt="ON_PREEMPT_CANCEL")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "jobs.jsonl: holds no job; write one JobSpec in JSON a line"),
        (json.dumps(JOB) + "\n\n{'a'}", "jobs.jsonl:3: not JSON"),
        (json.dumps(JOB) + "\n" + json.dumps(JOB | {"gpu": 1}), "jobs.jsonl: job 2: "),
        (json.dumps(JOB | {"class": "fun"}), "jobs.jsonl: job 1: "),
        ("7", "jobs.jsonl: job 1: "),
        ('{"spec": 7}', "jobs.jsonl: job 1: "),
    ],
)
def test_a_wrong_job_file_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(CliError) as caught:
        spec.read_requests(text, "jobs.jsonl")
    assert caught.value.code is ExitCode.INVALID
    assert caught.value.lines[0].startswith(message)
