"""The launcher's unit is told by the configuration what the daemon is told."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler import config, launcher_unit
from scheduler.effects import launcher_process
from scheduler.errors import ConfigError

ME = os.geteuid()


def words(text: str, user_id: int = ME) -> list[str]:
    return launcher_unit.command(config.parse(text, "w.toml"), "/run/l.sock", user_id)


def options(text: str, user_id: int = ME) -> dict[str, str]:
    found = words(text, user_id)
    assert found[:4] == [sys.executable, "-I", "-m", launcher_process.__name__]
    return dict(zip(found[4::2], found[5::2], strict=True))


def test_the_launcher_gets_its_directory_and_its_limits_from_the_configuration() -> None:
    text = '[state]\ndirectory = "/srv/w"\n[jobs]\nlog_bytes_max = 4096\nlog_files_kept = 2'
    assert options(text) == {
        "--socket": "/run/l.sock",
        "--jobs-dir": "/srv/w/jobs",
        "--log-bytes": "4096",
        "--log-files": "2",
    }


def test_root_s_jobs_are_in_the_system_s_state_directory_and_may_run_as_another_user() -> None:
    found = options('[jobs]\nuser = "nobody"', user_id=0)
    assert (found["--jobs-dir"], found["--user"]) == ("/var/lib/wattshift/jobs", "nobody")


def test_the_unit_follows_its_own_xdg_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/lib")
    assert options("", user_id=65534)["--jobs-dir"] == "/var/lib/wattshift/jobs"


def test_a_user_s_own_name_is_no_other_user() -> None:
    assert "--user" not in options('[jobs]\nuser = "nobody"', user_id=65534)


def test_only_root_runs_jobs_as_somebody_else() -> None:
    with pytest.raises(ConfigError, match=r'jobs.user = "root": this launcher runs as nobody; only root'):
        words('[jobs]\nuser = "root"', user_id=65534)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--config", "{file}", "--socket", "/run/l.sock"], 78, "w.toml:1: polcy: unknown key"),
        (["--config", "{file}"], 1, "--config FILE --socket PATH"),
    ],
)
def test_what_is_wrong_is_said_and_told_by_the_exit_code(
    tmp_path: Path, arguments: list[str], status: int, said: str
) -> None:
    file = tmp_path / "w.toml"
    file.write_text("[polcy]")
    ended = subprocess.run(
        [sys.executable, "-m", "scheduler.launcher_unit", *(a.format(file=file) for a in arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == status
    assert said in ended.stderr


# As systemd starts it: the socket is descriptor 3, and LISTEN_PID is the process's own number.
AS_SYSTEMD = 'exec 3<&"$0"; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'


def test_who_waits_at_the_socket_is_told_why_there_is_no_launcher(tmp_path: Path) -> None:
    file = tmp_path / "w.toml"
    file.write_text("[polcy]")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as daemon:
        listener.bind(str(tmp_path / "l.sock"))
        listener.listen()
        daemon.connect(str(tmp_path / "l.sock"))
        program = [sys.executable, "-m", "scheduler.launcher_unit", "--config", file, "--socket", "unused"]
        command = ["bash", "-c", AS_SYSTEMD, str(listener.fileno()), *program]
        ended = subprocess.run(command, pass_fds=[listener.fileno()], capture_output=True, check=False)
        said = json.loads(daemon.makefile().readline())
    assert ended.returncode == 78
    assert said["report"] == "refused"
    assert "w.toml:1: polcy: unknown key" in said["message"]
