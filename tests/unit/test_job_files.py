"""A job's files without a job: logs that rotate under a reader, and removal that nothing can redirect."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.effects import job_files
from scheduler.effects.job_files import AttemptFiles, JobLog, JobUser, remove_job
from scheduler.effects.job_logs import OutputReader

NOBODY_UID = 65534


@pytest.fixture
def jobs_dir(tmp_path: Path) -> Path:
    path = tmp_path / "jobs"
    path.mkdir()
    return path


@pytest.fixture
def attempt_dir(jobs_dir: Path) -> Path:
    path = jobs_dir / "job-1" / "1"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def attempt_fd(attempt_dir: Path) -> Iterator[int]:
    fd = os.open(attempt_dir, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def everything(reader: OutputReader) -> bytes:
    text = b""
    while piece := reader.read(1000):
        text += piece
    return text


# Notices -----------------------------------------------------------------------------------------

FIRST, SECOND = {"reason": "first", "deadline_s": 20.0}, {"reason": "2nd"}


@pytest.fixture
def files(jobs_dir: Path, attempt_dir: Path) -> Iterator[AttemptFiles]:
    fd = os.open(jobs_dir, os.O_RDONLY | os.O_DIRECTORY)
    with closing(AttemptFiles(fd, "job-1", 1, JobUser())) as made:
        yield made
    os.close(fd)


def notice(attempt_dir: Path) -> object:
    return json.loads((attempt_dir / "notice.json").read_text())


@pytest.mark.parametrize("ahead", [False, True])
def test_the_last_notice_stands(files: AttemptFiles, attempt_dir: Path, ahead: bool) -> None:
    if ahead:
        files.prepare_notice()
    assert list(attempt_dir.iterdir()) == []
    for said in (FIRST, SECOND):
        files.write_notice(said)
        assert notice(attempt_dir) == said
        assert [path.name for path in attempt_dir.iterdir()] == ["notice.json"]


def test_a_prepared_notice_takes_the_place_of_what_the_job_put_there(
    files: AttemptFiles, attempt_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("precious")
    (attempt_dir / "notice.json").symlink_to(tmp_path / "precious")
    files.prepare_notice()
    files.write_notice(FIRST)
    assert notice(attempt_dir) == FIRST
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_notice_needs_no_nameless_files(
    files: AttemptFiles, attempt_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that has none: the flag asks for something that fails there, too."""
    monkeypatch.setattr(job_files, "_OPEN_NAMELESS", os.O_WRONLY | os.O_DIRECTORY)
    files.prepare_notice()
    files.write_notice(FIRST)
    assert notice(attempt_dir) == FIRST


# Reading while it rotates ------------------------------------------------------------------------


def test_a_reader_that_keeps_up_loses_nothing(jobs_dir: Path, attempt_fd: int) -> None:
    with (
        closing(JobLog(attempt_fd, JobUser(), 10, 2)) as log,
        closing(OutputReader(jobs_dir, "job-1", 1)) as reader,
    ):
        text = b""
        for number in range(40):
            log.write(b"%04d\n" % number)
            text += everything(reader)
        assert text == b"".join(b"%04d\n" % number for number in range(40))
        assert reader.lost == 0


def test_a_reader_that_is_overtaken_goes_on_with_the_oldest_and_says_so(
    jobs_dir: Path, attempt_fd: int
) -> None:
    with (
        closing(JobLog(attempt_fd, JobUser(), 10, 3)) as log,
        closing(OutputReader(jobs_dir, "job-1", 1)) as reader,
    ):
        log.write(b"0000\n")
        assert everything(reader) == b"0000\n"
        for number in range(1, 20):
            log.write(b"%04d\n" % number)
        # Its own piece is open and readable to the end, the following ones were dropped.
        assert everything(reader) == b"0001\n" + b"".join(b"%04d\n" % number for number in range(14, 20))
        assert reader.lost == 1


def test_a_reader_that_came_before_the_log_gets_it_all(jobs_dir: Path, attempt_fd: int) -> None:
    with (
        closing(JobLog(attempt_fd, JobUser(), 100, 3)) as log,
        closing(OutputReader(jobs_dir, "job-1", 1)) as reader,
    ):
        assert reader.read(10) == b""
        log.write(b"here")
        assert everything(reader) == b"here"


def test_a_log_of_one_file_starts_over(jobs_dir: Path, attempt_dir: Path, attempt_fd: int) -> None:
    with closing(JobLog(attempt_fd, JobUser(), 10, 1)) as log:
        log.write(b"0123456789abc")
    assert [path.name for path in attempt_dir.iterdir()] == ["output.log"]
    assert (attempt_dir / "output.log").read_bytes() == b"abc"


def test_a_log_goes_on_where_an_earlier_launcher_left_off(attempt_dir: Path, attempt_fd: int) -> None:
    for text in (b"01234", b"56789ab"):
        with closing(JobLog(attempt_fd, JobUser(), 10, 2)) as log:
            log.write(text)
    assert (attempt_dir / "output.log.1").read_bytes() == b"0123456789"
    assert (attempt_dir / "output.log").read_bytes() == b"ab"


@settings(max_examples=50, deadline=None)
@given(
    pieces=st.lists(st.binary(max_size=40), max_size=30),
    bytes_max=st.integers(1, 30),
    files_max=st.integers(1, 5),
)
def test_the_log_is_the_end_of_what_was_written_and_bounded(
    pieces: list[bytes], bytes_max: int, files_max: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        attempt = Path(directory, "job-1", "1")
        attempt.mkdir(parents=True)
        fd = os.open(attempt, os.O_RDONLY | os.O_DIRECTORY)
        with closing(JobLog(fd, JobUser(), bytes_max, files_max)) as log:
            for piece in pieces:
                log.write(piece)
        os.close(fd)
        sizes = [path.stat().st_size for path in attempt.iterdir()]
        assert len(sizes) <= files_max
        assert all(size <= bytes_max for size in sizes)
        with closing(OutputReader(Path(directory), "job-1", 1)) as reader:
            kept = everything(reader)
        written = b"".join(pieces)
        assert kept == written[len(written) - sum(sizes) :]
        assert len(kept) >= min(len(written), bytes_max * (files_max - 1) + 1)


def test_output_that_cannot_be_written_is_dropped_and_counted(attempt_dir: Path, attempt_fd: int) -> None:
    (attempt_dir / "output.log").mkdir()
    with closing(JobLog(attempt_fd, JobUser(), 10, 2)) as log:
        log.write(b"x" * 7)
        assert log.dropped_bytes == 7
        (attempt_dir / "output.log").rmdir()
        log.write(b"seen")
        assert log.dropped_bytes == 7
    assert (attempt_dir / "output.log").read_bytes() == b"seen"


def test_there_is_no_reader_of_what_does_not_exist(jobs_dir: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OutputReader(jobs_dir, "job-1", 1)


def test_a_reader_follows_no_link_to_another_directory(jobs_dir: Path, attempt_dir: Path) -> None:
    (attempt_dir / "output.log").write_text("other's")
    (jobs_dir / "job-2").mkdir()
    (jobs_dir / "job-2" / "1").symlink_to(attempt_dir)
    (jobs_dir / "job-3").symlink_to(jobs_dir / "job-1")
    for job_id in ("job-2", "job-3"):
        with pytest.raises(NotADirectoryError):
            OutputReader(jobs_dir, job_id, 1)


def test_a_directory_of_another_user_is_refused(jobs_dir: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    (jobs_dir / "job-1").mkdir()
    os.chown(jobs_dir / "job-1", NOBODY_UID, NOBODY_UID)
    fd = os.open(jobs_dir, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(PermissionError, match="job-1 belongs to another user"):
        AttemptFiles(fd, "job-1", 1, JobUser())
    os.close(fd)


# Removing ----------------------------------------------------------------------------------------


def test_a_job_is_removed_with_all_it_left_and_nothing_else(jobs_dir: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "below").mkdir(parents=True)
    (victim / "below" / "file").write_text("precious")
    job = jobs_dir / "job-1"
    (job / "checkpoint" / "deep" / "er").mkdir(parents=True)
    (job / "1").mkdir()
    (job / "1" / "output.log").write_text("text")
    (job / "checkpoint" / "link").symlink_to(victim)
    (job / "1" / "link").symlink_to(victim / "below" / "file")
    (job / ".removed.1").write_text("in the way")
    (job / ".removed.2" / "full").mkdir(parents=True)
    os.mkfifo(job / "checkpoint" / "fifo")
    (jobs_dir / "job-2").mkdir()
    remove_job(jobs_dir, "job-1")
    assert [path.name for path in jobs_dir.iterdir()] == ["job-2"]
    assert (victim / "below" / "file").read_text() == "precious"


def test_a_job_that_is_a_link_is_unlinked(jobs_dir: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (jobs_dir / "job-1").symlink_to(victim)
    remove_job(jobs_dir, "job-1")
    assert victim.is_dir()
    assert list(jobs_dir.iterdir()) == []


def test_what_is_not_there_is_removed_already(jobs_dir: Path) -> None:
    remove_job(jobs_dir, "job-1")


def test_depth_is_no_protection(jobs_dir: Path) -> None:
    (jobs_dir / "job-1").mkdir()
    here = os.open(jobs_dir / "job-1", os.O_RDONLY)
    name = "deep"
    for _ in range(1100):  # deeper than a path can be long, and than Python recurses
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove_job(jobs_dir, "job-1")
    assert list(jobs_dir.iterdir()) == []


def test_rights_that_a_job_took_from_itself_are_no_protection() -> None:
    user = os.getuid() or NOBODY_UID  # root may everything anyway
    with tempfile.TemporaryDirectory() as directory:
        jobs = Path(directory)
        os.chown(jobs, user, -1)
        os.seteuid(user)
        try:
            (jobs / "job-1" / "a" / "b" / "c").mkdir(parents=True)
            (jobs / "job-1" / "a" / "file").write_text("text")
            for path in ("job-1/a/b/c", "job-1/a/b", "job-1/a", "job-1"):
                (jobs / path).chmod(0)
            remove_job(jobs, "job-1")
        finally:
            os.seteuid(os.getuid())
        assert list(jobs.iterdir()) == []
