"""Output, notices and checkpoints of real jobs: bounded, in order, and no way for a job to redirect us."""

import asyncio
import json
import os
import pwd
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from scheduler.effects.job_logs import OutputReader, OutputWatch
from scheduler.effects.launcher import Acknowledged, AttemptKey, CheckpointSaved, Exited, StartFailed
from scheduler.effects.launcher_client import LauncherClient
from scheduler.errors import LauncherError
from tests.integration.launching import PATIENCE_S, RAN_S, Bench, a_launcher, eventually

OTHER_USER = "nobody"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """Small logs, so that they rotate."""
    options = {"log_bytes_max": 10_000, "log_files_max": 3}
    async with a_launcher(tmp_path / "state", "supervisor", **options) as launcher:
        yield launcher


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that no job may have us touch."""
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def all_output(bench: Bench, key: AttemptKey, piece_bytes: int = 65536) -> bytes:
    with closing(OutputReader(bench.jobs_dir, key.job_id, key.attempt)) as reader:
        text = b""
        while piece := reader.read(piece_bytes):
            text += piece
        return text


# Logs --------------------------------------------------------------------------------------------


async def test_output_is_rotated_and_bounded_and_its_end_is_kept(bench: Bench) -> None:
    key = bench.start(sys.executable, "-c", "for n in range(20000): print(n)")
    await bench.report(key, Exited)
    files = sorted(path.name for path in bench.attempt_dir(key).glob("output.log*"))
    assert files == ["output.log", "output.log.1", "output.log.2"]
    sizes = [(bench.attempt_dir(key) / name).stat().st_size for name in files]
    assert sizes[1:] == [10_000, 10_000]
    assert 0 < sizes[0] <= 10_000
    written = "".join(f"{n}\n" for n in range(20000)).encode()
    assert all_output(bench, key) == written[-sum(sizes) :]


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096, 1 << 20])
async def test_a_reader_gets_all_pieces_in_order(bench: Bench, piece_bytes: int) -> None:
    key = bench.start(sys.executable, "-c", "for n in range(5000): print(n)")
    await bench.report(key, Exited)
    expected = "".join(f"{n}\n" for n in range(5000)).encode()
    assert all_output(bench, key, piece_bytes) == expected


async def test_a_follower_sees_everything_across_rotations(bench: Bench) -> None:
    end = bench.directory / "end"
    os.mkfifo(end)
    job = (
        "import sys\n"
        "for n in range(900):\n"
        "    print(f'{n:09}', flush=True)\n"
        "    if n % 300 == 299:\n"
        f"        open({str(end)!r}).read()\n"
    )
    key = bench.start(sys.executable, "-c", job)
    await bench.started(key)
    reader = OutputReader(bench.jobs_dir, key.job_id, key.attempt)
    watch = OutputWatch()
    following = watch.follow(reader)
    text = b""
    for until in (300, 600, 900):
        async with asyncio.timeout(PATIENCE_S):
            while len(text) < until * 10:
                following.clear()
                while piece := reader.read(1000):
                    text += piece
                if len(text) < until * 10:
                    await following.changed()
        await asyncio.to_thread(end.write_text, "go on")
    await bench.report(key, Exited)
    assert text == "".join(f"{n:09}\n" for n in range(900)).encode()
    assert reader.lost == 0
    following.close()
    watch.close()
    reader.close()


async def test_a_job_that_closes_its_output_goes_on(bench: Bench) -> None:
    key = bench.start("sh", "-c", "echo before; exec >/dev/null 2>&1; sleep 0.1; exit 6")
    exited = await bench.report(key, Exited)
    assert exited.exit_code == 6
    assert bench.output(key) == "before\n"


async def test_a_flood_of_output_delays_no_kill(bench: Bench) -> None:
    flood = "trap '' TERM; yes wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww & yes & yes"
    keys = [bench.start("sh", "-c", flood, job=f"flood-{number}") for number in range(3)]
    quiet = bench.start("sh", "-c", 'trap "" TERM; echo up; while :; do sleep 1000; done', job="quiet")
    await bench.wrote(quiet, "up")
    await eventually(lambda: (bench.attempt_dir(keys[0]) / "output.log.2").exists(), "rotation")
    begun_s = time.monotonic()
    for key in (quiet, *keys):
        bench.stop(key, grace_s=0.2)
    for key in (quiet, *keys):
        await bench.report(key, Exited)
    assert time.monotonic() - begun_s < 1.2
    total = sum(path.stat().st_size for key in keys for path in bench.attempt_dir(key).iterdir())
    assert total <= len(keys) * (3 * 10_000 + 1000)


async def test_binary_output_without_an_end_of_line_is_kept_as_it_is(bench: Bench) -> None:
    key = bench.start(sys.executable, "-c", "import os; os.write(1, bytes(range(256)))")
    await bench.report(key, Exited)
    assert all_output(bench, key) == bytes(range(256))


async def test_a_silent_job_has_an_empty_log(bench: Bench) -> None:
    key = bench.start("true")
    await bench.report(key, Exited)
    assert all_output(bench, key) == b""


# Attacks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        "ln -s {victim} output.log",
        "ln {victim} output.log",
        "mkfifo output.log",
        "mkfifo output.log; sleep 1000 <> output.log &",
        "mkdir output.log",
    ],
)
async def test_a_log_put_elsewhere_by_the_job_is_not_written(bench: Bench, victim: Path, attack: str) -> None:
    command = (
        f"cd $(dirname $WATTSHIFT_ACK_FILE); {attack.format(victim=victim)}\nyes | head -c 100000; exit 3"
    )
    key = bench.start("sh", "-c", command)
    exited = await bench.report(key, Exited)
    assert exited.exit_code == 3
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "attack",
    [
        "rm output.log; ln -s {victim} output.log",
        "rm output.log; mkfifo output.log",
        "ln -s {victim} output.log.1; ln -s {victim} output.log.2",
        "mkdir output.log.1; touch output.log.1/full",
        "mkdir -p output.log.1/a output.log.2/b; rm output.log; mkdir output.log",
    ],
)
async def test_a_rotation_cannot_be_redirected_or_made_to_grow(
    bench: Bench, victim: Path, attack: str
) -> None:
    enter = "echo first; cd $(dirname $WATTSHIFT_ACK_FILE); while ! [ -e output.log ]; do :; done"
    key = bench.start("sh", "-c", f"{enter}; {attack.format(victim=victim)}\nyes | head -c 100000; exit 3")
    exited = await bench.report(key, Exited)
    assert exited.exit_code == 3
    assert victim.read_text() == "precious"
    sizes = [path.stat().st_size for path in bench.attempt_dir(key).iterdir() if path.is_file()]
    assert all(size <= 10_000 for size in sizes)


@pytest.mark.parametrize("attack", ["ln -s {victim} {name}", "ln {victim} {name}", "mkfifo {name}"])
async def test_a_reader_reads_nothing_that_the_job_put_in_the_logs_place(
    bench: Bench, victim: Path, attack: str
) -> None:
    command = attack.format(victim=victim, name="output.log")
    key = bench.start("sh", "-c", f"cd $(dirname $WATTSHIFT_ACK_FILE); {command}")
    await bench.report(key, Exited)
    with pytest.raises(OSError):  # noqa: PT011 - ELOOP or EPERM
        all_output(bench, key)


@pytest.mark.parametrize(
    "attack", ["ln -s {victim} notice.json", "ln -s {victim} .notice.json.new", "ln {victim} notice.json"]
)
@pytest.mark.parametrize("ran_s", RAN_S)
async def test_a_notice_is_written_in_its_own_place(
    bench: Bench, victim: Path, attack: str, ran_s: float
) -> None:
    attack = f"{attack.format(victim=victim)}; sleep {ran_s}"
    command = f"cd $(dirname $WATTSHIFT_ACK_FILE); {attack}; echo up; sleep 1000"
    key = bench.start("sh", "-c", command)
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=30.0, reason="TEST")
    await bench.report(key, Exited)
    assert victim.read_text() == "precious"
    notice = bench.attempt_dir(key) / "notice.json"
    assert not notice.is_symlink()
    assert json.loads(notice.read_text())["reason"] == "TEST"


@pytest.mark.parametrize("attack", ["mkdir notice.json", "mkdir .notice.json.new", "chmod 500 ."])
@pytest.mark.parametrize("ran_s", RAN_S)
async def test_a_job_that_prevents_its_notice_is_stopped_without(
    bench: Bench, attack: str, ran_s: float
) -> None:
    attack = f"{attack}; sleep {ran_s}"
    key = bench.start("sh", "-c", f"cd $(dirname $WATTSHIFT_ACK_FILE); {attack}; echo up; sleep 1000")
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=30.0)
    exited = await bench.report(key, Exited)
    assert exited.signal == signal.SIGTERM


@pytest.mark.parametrize("make", ["ln -s {victim}", "mkfifo", "mkdir", "ln {victim}"])
async def test_whatever_is_called_ack_acknowledges_and_is_not_opened(
    bench: Bench, victim: Path, make: str
) -> None:
    command = f"{make.format(victim=victim)} $WATTSHIFT_ACK_FILE"
    key = bench.start("sh", "-c", f'trap "{command}" TERM; echo up; while :; do sleep 0.01; done')
    await bench.wrote(key, "up")
    bench.stop(key, grace_s=1000.0)
    await bench.report(key, Exited)
    assert bench.of(key, Acknowledged)
    assert victim.read_text() == "precious"


async def test_a_checkpoint_that_is_a_link_is_told_and_not_opened(bench: Bench, victim: Path) -> None:
    key = bench.start("sh", "-c", f"ln -s {victim} $WATTSHIFT_CHECKPOINT_DIR/checkpoint; sleep 1000")
    await bench.report(key, CheckpointSaved)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["checkpoint", "2"])
async def test_a_directory_put_elsewhere_by_an_earlier_attempt_fails_the_next(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    await bench.run("sh", "-c", f"rm -rf {name}; ln -s {elsewhere} {name}")
    key = bench.start("true", attempt=2)
    failed = await bench.report(key, StartFailed)
    assert failed.what == "files"
    assert name in failed.message
    assert [report for report in bench.reports if report.key == key] == [failed]  # type: ignore[union-attr]
    assert list(elsewhere.iterdir()) == []


async def test_a_busy_checkpoint_directory_delays_nobody(bench: Bench) -> None:
    program = (
        "import os\n"
        "os.chdir(os.environ['WATTSHIFT_CHECKPOINT_DIR'])\n"
        "print('busy', flush=True)\n"
        "while True:\n"
        "    open('checkpoint', 'w').close()\n"
        "    open('other', 'w').close()\n"
    )
    busy = bench.start(sys.executable, "-c", program, job="busy")
    await bench.wrote(busy, "busy")
    assert await bench.run("true", job="other") == (0, None)
    bench.stop(busy, grace_s=0.0)
    await bench.report(busy, Exited)


# Another user ------------------------------------------------------------------------------------


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that another user can reach; pytest's own is root's alone."""
    path = Path(tempfile.mkdtemp(prefix="wattshift-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["cgroup", "supervisor"])
async def as_other(request: pytest.FixtureRequest, open_directory: Path) -> AsyncIterator[Bench]:
    if os.getuid() != 0:
        pytest.skip("only root can start jobs as somebody else")
    async with a_launcher(open_directory, request.param, user=OTHER_USER, log_bytes_max=10_000) as launcher:
        yield launcher


async def test_a_job_runs_as_its_user_with_that_users_groups_and_files(as_other: Bench) -> None:
    user = pwd.getpwnam(OTHER_USER)
    program = (
        "import os\n"
        "print(os.getresuid(), os.getresgid(), os.getgroups(), flush=True)\n"
        "open(os.environ['WATTSHIFT_CHECKPOINT_DIR'] + '/checkpoint', 'w').close()\n"
    )
    key = as_other.start("/usr/bin/python3", "-c", program)
    await as_other.report(key, Exited)
    uid, gid = user.pw_uid, user.pw_gid
    groups = os.getgrouplist(OTHER_USER, gid)
    assert as_other.output(key) == f"{(uid,) * 3} {(gid,) * 3} {groups}\n"
    for path in (as_other.attempt_dir(key), as_other.checkpoint_dir(key), as_other.jobs_dir / key.job_id):
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (uid, 0o700)
    assert (as_other.attempt_dir(key) / "output.log").stat().st_uid == uid
    assert all_output(as_other, key)


async def test_another_users_job_is_noticed_stopped_and_cannot_harm_the_launcher(as_other: Bench) -> None:
    program = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for pid in {os.getppid(), " + str(as_other.pid) + "}:\n"
        "    try:\n"
        "        os.kill(pid, signal.SIGKILL)\n"
        "        print('killed', pid, flush=True)\n"
        "    except PermissionError:\n"
        "        print('denied', flush=True)\n"
        "time.sleep(1000)\n"
    )
    key = as_other.start("/usr/bin/python3", "-c", program)
    await as_other.wrote(key, "denied")
    as_other.stop(key, grace_s=0.2, reason="TEST")
    exited = await as_other.report(key, Exited)
    assert exited.signal == signal.SIGKILL
    assert "killed" not in as_other.output(key)
    notice = as_other.attempt_dir(key) / "notice.json"
    assert notice.stat().st_uid == pwd.getpwnam(OTHER_USER).pw_uid
    assert json.loads(notice.read_text())["reason"] == "TEST"


async def test_roots_files_are_out_of_another_users_reach(as_other: Bench, open_directory: Path) -> None:
    secret = open_directory / "secret"
    secret.mkdir(mode=0o700)
    enter = "echo first; cd $(dirname $WATTSHIFT_ACK_FILE); while ! [ -e output.log ]; do :; done"
    attack = f"rm output.log; ln -s {secret}/new output.log; ln -s {secret}/notice .notice.json.new"
    key = as_other.start("sh", "-c", f"{enter}; {attack}; yes | head -c 100000; sleep 1000")
    await eventually(lambda: (as_other.attempt_dir(key) / "output.log.2").exists(), "rotation")
    as_other.stop(key, grace_s=30.0)
    await as_other.report(key, Exited)
    assert list(secret.iterdir()) == []


async def test_a_jobs_directory_out_of_the_users_reach_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can start jobs as somebody else")
    client = LauncherClient(tmp_path / "launcher.sock", tmp_path / "jobs", user=OTHER_USER)
    with pytest.raises(LauncherError, match=f"can't be reached by the jobs' user {OTHER_USER}"):
        await client.connect(lambda report: None)
    await client.close()
