from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from scheduler.cli import values

NOON_S = 1_767_268_800.0  # 2026-01-01T12:00:00Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("1.5", 1.5), ("0", 0.0), ("90s", 90.0), ("15m", 900.0), ("2h", 7200.0), ("1d", 86400.0),
     ("1h30m", 5400.0), ("0.5h", 1800.0), ("250ms", 0.25)],
)  # fmt: skip
def test_a_duration_is_seconds_or_has_units(text: str, seconds: float) -> None:
    assert values.duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "-5s", "nan", "inf", "1e999", "five", "5 s", "5x", "h", "1h30"])
def test_what_is_no_duration_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write seconds or 90s"):
        values.duration_s(text)


@pytest.mark.parametrize(
    ("text", "mib"),
    [("40960", 40960), ("0", 0), ("40GiB", 40960), ("40G", 40960), ("40gib", 40960), ("512MiB", 512),
     ("512 MiB", 512), ("1.5TiB", 1_572_864), ("1KiB", 1), ("40GB", 38147), ("1MB", 1)],
)  # fmt: skip
def test_a_size_is_mib_or_has_a_unit_and_is_rounded_up(text: str, mib: int) -> None:
    assert values.size_mib(text) == mib


@pytest.mark.parametrize("text", ["", "-1", "1.5", "40X", "GiB", "40 GiB each"])
def test_what_is_no_size_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write MiB as a number, or 512MiB"):
        values.size_mib(text)


@pytest.mark.parametrize(
    ("text", "milli"), [("500", 500), ("0.5", 500), ("1", 1), ("1000", 1000), ("1.0", 1000)]
)
def test_a_share_is_thousandths_or_a_fraction(text: str, milli: int) -> None:
    assert values.share_milli(text) == milli


@pytest.mark.parametrize("text", ["0", "1001", "1.5", "0.0", "-1", "half", "50%", "nan."])
def test_a_share_is_more_than_nothing_and_at_most_a_gpu(text: str) -> None:
    with pytest.raises(ValueError, match="is not a share of a GPU; write thousandths, 1 to 1000"):
        values.share_milli(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("+2h", NOON_S + 7200), ("2026-01-01T12:00:00Z", NOON_S), ("2026-01-01T13:00:00+01:00", NOON_S),
     ("2026-01-01T12:00:00.250Z", NOON_S + 0.25)],
)  # fmt: skip
def test_a_deadline_is_a_time_or_from_now(text: str, seconds: float) -> None:
    assert values.time_s(text, NOON_S) == pytest.approx(seconds)


def test_a_time_without_offset_is_local() -> None:
    assert values.time_s("2026-01-01T12:00:00", 0.0) == datetime(2026, 1, 1, 12).astimezone().timestamp()


def test_a_start_of_usage_is_a_time_or_so_long_ago() -> None:
    assert values.past_s("2h", NOON_S) == NOON_S - 7200
    assert values.past_s("2026-01-01T12:00:00Z", 0.0) == NOON_S


@pytest.mark.parametrize("parse", [values.time_s, values.past_s])
@pytest.mark.parametrize("text", ["", "tomorrow", "2026-13-01", "12:00"])
def test_what_is_no_time_is_refused_with_the_right_form(
    parse: Callable[[str, float], float], text: str
) -> None:
    with pytest.raises(ValueError, match="is not a time; write 2026-01-31T18:00:00Z"):
        parse(text, NOON_S)


def test_an_environment_sets_variables_and_passes_the_callers_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret=x")
    entries = ("A=1", "EMPTY=", "URL=http://x/?a=b", "TOKEN")
    assert values.environment_of(entries, "--env") == {
        "A": "1",
        "EMPTY": "",
        "URL": "http://x/?a=b",
        "TOKEN": "s3cret=x",
    }


def test_a_variable_that_is_not_set_here_cant_be_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKEN", raising=False)
    with pytest.raises(ValueError, match="--env: TOKEN is not set here; set it or write TOKEN=VALUE"):
        values.environment_of(("TOKEN",), "--env")


@pytest.mark.parametrize("entry", ["", "=1", "1A=1", "A-B=1", "A B=1"])
def test_what_is_no_variable_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="write KEY=VALUE, or KEY to pass yours on"):
        values.environment_of((entry,), "--env")


def test_an_environment_file_has_comments_and_empty_lines(tmp_path: Path) -> None:
    file = tmp_path / "job.env"
    file.write_text("# for the job\n\nA=1\n  B=two words  \n", encoding="utf-8")
    assert values.environment_file(file) == {"A": "1", "B": "two words"}


def test_a_wrong_line_of_an_environment_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.env"
    file.write_text("export A=1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"job\.env: 'export A=1': write KEY=VALUE"):
        values.environment_file(file)
