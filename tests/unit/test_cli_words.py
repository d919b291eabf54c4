import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from scheduler.cli import story, words
from scheduler.v1 import job_pb2, node_pb2, reason_pb2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0, "0s"), (0.04, "0s"), (0.44, "0.4s"), (3, "3s"), (9.94, "9.9s"), (9.96, "10s"),
     (12.4, "12s"), (59.7, "1m00s"), (192, "3m12s"), (3599.6, "1h00m"), (7500, "2h05m"),
     (86400, "1d00h"), (273600, "3d04h")],
)  # fmt: skip
def test_a_span_shows_its_two_largest_units(seconds: float, text: str) -> None:
    assert words.span(seconds) == text


def test_a_name_cant_command_the_terminal() -> None:
    assert words.clean("run\x1b[31m\n\tπ") == "run\\x1b[31m\\n\\tπ"


def test_enums_and_reasons_are_shown_as_words() -> None:
    job = job_pb2.Job(state="JOB_STATE_RUNNING", reason="REASON_WAITING_FOR_GPU_MEMORY", detail="40 GiB")
    setattr(job, "class", job_pb2.JOB_CLASS_MINING)
    assert words.word(job, "state") == "RUNNING"
    assert words.word(job, "class") == "MINING"
    assert words.reason(job) == "waiting for GPU memory"
    assert words.because(job) == "waiting for GPU memory: 40 GiB"


def test_what_is_unset_has_no_words_and_what_a_newer_daemon_says_is_its_number() -> None:
    assert words.word(job_pb2.Job(), "state") == ""
    assert words.because(node_pb2.Gpu(detail="dust")) == "dust"
    newer = job_pb2.Job.FromString(job_pb2.Job(state="JOB_STATE_RUNNING").SerializeToString()[:-1] + b"\x63")
    assert words.word(newer, "state") == "99"


def test_every_reason_has_words_without_a_prefix_or_an_underscore() -> None:
    for number in reason_pb2.Reason.values()[1:]:
        text = words.reason(job_pb2.Job(reason=number))
        assert text
        assert "_" not in text
        assert "reason" not in text


def test_gpus_are_named_by_the_shortest_beginnings_that_tell_them_apart() -> None:
    assert words.gpu_names(["GPU-1a2b3c4d-1", "GPU-1a2b3c4e-1"]) == {
        "GPU-1a2b3c4d-1": "GPU-1a2b3c4d",
        "GPU-1a2b3c4e-1": "GPU-1a2b3c4e",
    }
    assert words.gpu_names(["GPU-00000000-0001", "GPU-00000000-0002"]) == {
        "GPU-00000000-0001": "GPU-00000000-0001",
        "GPU-00000000-0002": "GPU-00000000-0002",
    }
    assert words.gpu_names(["MIG-1a2b3c4d-1"]) == {"MIG-1a2b3c4d-1": "MIG-1a2b3c4d"}
    assert words.gpu_names([]) == {}


@pytest.mark.parametrize(
    ("gpus", "share", "text"), [(4, 1000, "4"), (4, 0, "4"), (1, 500, "0.5"), (0, 1000, "-")]
)
def test_what_a_job_asks_for_is_short(gpus: int, share: int, text: str) -> None:
    assert words.gpus_asked(gpus, share) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0.00"), (0.05, "0.05"), (0.125, "0.1250"), (1234.5, "1,234.50"), (0.00004, "0.00")],
)
def test_money_has_cents_and_more_only_where_there_is_more(amount: float, text: str) -> None:
    assert words.usd(amount) == text


def test_the_stages_of_giving_way_are_shown_with_the_time_between_them() -> None:
    attempt = job_pb2.Attempt(
        signalled_at=Timestamp(seconds=100, nanos=3_000_000),
        exited_at=Timestamp(seconds=100, nanos=250_000_000),
        verified_at=Timestamp(seconds=100, nanos=262_000_000),
        notice=job_pb2.Notice(decided_at=Timestamp(seconds=100)),
    )
    assert story.stages(attempt) == (
        "decided, +3.0 ms signalled, +247 ms exited, +12 ms verified free (in all 262 ms)"
    )


def test_an_attempt_that_nobody_stopped_has_no_stages() -> None:
    ended = job_pb2.Attempt(exited_at=Timestamp(seconds=5), verified_at=Timestamp(seconds=6))
    assert story.stages(ended) == ""
