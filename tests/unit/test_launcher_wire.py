"""The launcher's protocol as values: lines, versions, reports."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.effects.launcher import (
    Acknowledged,
    AttemptKey,
    CheckpointSaved,
    Exited,
    Report,
    Signalled,
    Started,
    StartFailed,
    TreeStuck,
)
from scheduler.effects.launcher_client import report_of
from scheduler.effects.launcher_wire import (
    LINE_BYTES_MAX,
    VERSION_NEWEST,
    VERSION_OLDEST,
    LineSplitter,
    WireError,
    agreed_version,
    decode,
    encode,
    hello,
)

KEY = AttemptKey("job-1", 2)
NAMED = {"job_id": "job-1", "attempt": 2, "at_s": 12.5}

texts = st.text(st.characters(codec=None, categories=None))


@settings(deadline=None)
@given(st.dictionaries(texts, st.none() | st.integers() | texts | st.lists(texts, max_size=5), max_size=5))
def test_what_is_encoded_is_decoded(message: dict[str, object]) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line[:-1]) == message


def test_a_name_that_is_not_unicode_survives() -> None:
    name = b"\xff\xfe/data".decode("utf-8", "surrogateescape")
    assert decode(encode({"working_directory": name})) == {"working_directory": name}


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"1", b'"x"', b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(line: bytes) -> None:
    with pytest.raises(WireError):
        decode(line)


def test_a_message_longer_than_the_limit_is_not_encoded() -> None:
    frame = len(encode({"x": ""}))
    assert len(encode({"x": "y" * (LINE_BYTES_MAX - frame)})) == LINE_BYTES_MAX
    with pytest.raises(WireError, match=f"at most {LINE_BYTES_MAX}"):
        encode({"x": "y" * (LINE_BYTES_MAX - frame + 1)})


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b" "))), st.data())
def test_lines_come_out_as_they_went_in_however_they_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    splitter = LineSplitter()
    out = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        out += splitter.feed(stream[:cut])
        stream = stream[cut:]
    assert out == lines


def test_the_longest_line_passes_and_a_longer_one_does_not() -> None:
    splitter = LineSplitter()
    longest = b"x" * (LINE_BYTES_MAX - 1)
    assert splitter.feed(longest + b"\n" + longest) == [longest]
    with pytest.raises(WireError, match="more than"):
        splitter.feed(b"x")


def test_a_longer_line_that_comes_at_once_does_not_pass() -> None:
    with pytest.raises(WireError, match=f"at most {LINE_BYTES_MAX}"):
        LineSplitter().feed(b"x" * LINE_BYTES_MAX + b"\n")


def test_both_sides_of_this_version_agree_on_the_newest() -> None:
    assert agreed_version(hello()) == VERSION_NEWEST


@pytest.mark.parametrize(
    ("oldest", "newest", "version"), [(3, 3, 3), (0, 5, 3), (1, 9, 3), (3, 9, 3), (2, 2, None), (4, 9, None)]
)
def test_versions_are_negotiated(oldest: int, newest: int, version: int | None) -> None:
    assert (VERSION_OLDEST, VERSION_NEWEST) == (3, 3), "this test says what version 3 does"
    message = {"order": "hello", "oldest": oldest, "newest": newest}
    if version is not None:
        assert agreed_version(message) == version
        return
    with pytest.raises(WireError, match=f"speaks launcher protocol {oldest} to {newest}"):
        agreed_version(message)


@pytest.mark.parametrize(
    "message", [{}, {"order": "start"}, {"order": "hello"}, {"order": "hello", "oldest": "1", "newest": 1}]
)
def test_a_first_line_that_is_no_hello_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(WireError, match="must be a hello"):
        agreed_version(message)


@pytest.mark.parametrize(
    ("kind", "fields", "report"),
    [
        ("started", {"pid": 7, "pid_start_ticks": 99}, Started(KEY, 12.5, 7, 99)),
        (
            "start_failed",
            {"what": "command", "errno": 2, "message": "x: gone"},
            StartFailed(KEY, 12.5, "command", 2, "x: gone"),
        ),
        ("signalled", {}, Signalled(KEY, 12.5)),
        ("acknowledged", {}, Acknowledged(KEY, 12.5)),
        ("checkpoint_saved", {}, CheckpointSaved(KEY, 12.5)),
        ("exited", {"exit_code": None, "signal": 9}, Exited(KEY, 12.5, None, 9)),
        ("tree_stuck", {"pids": [3, 4]}, TreeStuck(KEY, 12.5, (3, 4))),
    ],
)
def test_each_report_is_read(kind: str, fields: dict[str, object], report: Report) -> None:
    message = json.loads(json.dumps({"report": kind, **NAMED, **fields}))
    assert report_of(message) == report
    assert report_of({**message, "of a later version": 1}) == report


def test_a_report_without_a_field_is_an_error() -> None:
    with pytest.raises(KeyError):
        report_of({"report": "exited", **NAMED, "exit_code": 0})
