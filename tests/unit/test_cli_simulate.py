"""`wattshift simulate` as a person calls it: results, messages, exit codes, equal bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.cli import main
from scheduler.cli.exit_codes import ExitCode

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/simulate"
INPUTS = [f"--{name}={EXAMPLE / name}.csv" for name in ("nodes", "jobs", "prices", "events")]
RESULTS = ("summary.json", "report.html", "attempts.csv", "timeline.csv")


def simulate(*arguments: object) -> int:
    return main(["simulate", *map(str, arguments)])


def test_the_example_gives_all_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(*INPUTS, "--seed=3", "--out", tmp_path / "out") == ExitCode.OK
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(RESULTS)
    printed = capsys.readouterr()
    site = json.loads((tmp_path / "out/summary.json").read_text())["site"]
    assert f"profit {site['profit_usd']:.2f} USD" in printed.out
    assert "simulated in" in printed.err


def test_equal_inputs_give_equal_bytes_whatever_the_process(tmp_path: Path) -> None:
    def results(name: str, hash_seed: str) -> list[bytes]:
        out = tmp_path / name
        program = [sys.executable, "-c", "from scheduler.cli import main; main()"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "TZ": f"UTC+{hash_seed}"}
        command = [*program, "simulate", "--synthetic", "--seed=5", "--until=9000", f"--out={out}"]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=50)
        return [(out / file).read_bytes() for file in RESULTS]

    first, second = results("a", "1"), results("b", "2")
    assert [x == y for x, y in zip(first, second, strict=True)] == [True] * len(RESULTS)


def test_two_policies_are_compared_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = (EXAMPLE / "by-class.toml", EXAMPLE / "by-value.toml")
    assert simulate(*INPUTS, "--compare", *policies, "--out", tmp_path) == ExitCode.OK
    assert (tmp_path / "compare.html").is_file()
    assert all((tmp_path / name / file).is_file() for name in ("by-class", "by-value") for file in RESULTS)
    assert "BY-CLASS" in capsys.readouterr().out


def test_what_a_policy_file_says_beyond_the_policy_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "wattshift.toml"
    policy.write_text('[policy]\norder = "value"\n[server]\nmetrics_listen = ""\n')
    assert simulate(*INPUTS, "--policy", policy, "--until=100", "--out", tmp_path / "out") == ExitCode.OK
    assert "not used in a simulation: [server]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--jobs=x.csv", "--out=o"], ExitCode.INVALID, "missing --nodes"),
        (INPUTS, ExitCode.INVALID, "missing --out"),
        ([*INPUTS, "--synthetic", "--out=o"], ExitCode.INVALID, "leave --jobs out"),
        ([*INPUTS, "--compare", "a", "b", "--policy=c", "--out=o"], ExitCode.INVALID, "leave --policy out"),
        (
            [*INPUTS, "--compare", "a.toml", "b/a.toml", "--out=o"],
            ExitCode.INVALID,
            "both files are called a",
        ),
        ([*INPUTS, "--until=0", "--out=o"], ExitCode.INVALID, "--until"),
        ([*INPUTS, "--policy=none.toml", "--out=o"], ExitCode.CONFIG, "none.toml: can't be read"),
        (["--nodes=none.csv", "--jobs=x", "--out=o"], ExitCode.INVALID, "none.csv: can't be read"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(
    arguments: list[str],
    code: ExitCode,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert simulate(*arguments) == code
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "o/summary.json").exists()


def test_a_wrong_row_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("job_id,submit_s,class,gpus,duration_s\na,0,BATCH,1,nan\nb,0,BATCH,99,5\n")
    assert simulate(INPUTS[0], f"--jobs={jobs}", "--out", tmp_path / "out") == ExitCode.INVALID
    error = capsys.readouterr().err
    assert f"{jobs}:2: duration_s: must be a number" in error
    assert f"{jobs}:3: gpus: must be at most 4" in error
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["philly", "azure"])
def test_a_trace_is_converted_and_replayed(name: str, tmp_path: Path) -> None:
    source = tmp_path / "trace.csv"
    if name == "philly":
        source.write_text(
            "job_id,num_gpu,submit_time,duration,model_name\n0,1,0,60000,vgg\n1,4,5000,90000,bert\n"
        )
    else:
        source.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    assert simulate("convert", name, source, "--out", tmp_path) == ExitCode.OK
    arguments = (INPUTS[0], f"--jobs={tmp_path / 'jobs.csv'}", "--out", tmp_path / "out")
    assert simulate(*arguments) == ExitCode.OK
    classes = json.loads((tmp_path / "out/summary.json").read_text())["classes"]
    assert sum(each["completed"] for each in classes.values()) == {"philly": 2, "azure": 1}[name]
