from pathlib import Path

import grpc
import pytest

from scheduler.cli import exit_codes
from scheduler.cli.exit_codes import ExitCode

MANUAL = Path(__file__).resolve().parents[2] / "docs/operating/cli.md"


@pytest.mark.parametrize(
    ("state", "exit_code", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("SUCCEEDED", None, 0),
        ("FAILED", 3, 3),
        ("FAILED", 137, 137),
        ("FAILED", None, ExitCode.FAILED),
        ("FAILED", 0, ExitCode.FAILED),
        ("CANCELLED", 143, 143),
        ("CANCELLED", 0, ExitCode.CANCELLED),
        ("CANCELLED", None, ExitCode.CANCELLED),
    ],
)
def test_the_jobs_own_code_wins_but_never_a_zero_that_was_no_success(
    state: str, exit_code: int | None, code: int
) -> None:
    assert exit_codes.of_job(state, exit_code) == code


def test_every_status_of_grpc_has_a_code_that_is_not_success() -> None:
    names = {status.name for status in grpc.StatusCode}
    assert exit_codes.OF_STATUS.keys() <= names
    assert all(exit_codes.of_status(name) is not ExitCode.OK for name in names)


def test_the_manual_and_the_help_list_every_code() -> None:
    assert set(exit_codes.MEANINGS) == set(ExitCode)
    manual = MANUAL.read_text(encoding="utf-8")
    for code, meaning in exit_codes.MEANINGS.items():
        assert f"| {code:d} | {meaning} |" in manual
