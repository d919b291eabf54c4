from pathlib import Path

import pytest

from scheduler import paths

UID = 1000


def test_root_keeps_the_systems_places() -> None:
    assert paths.for_daemon({"XDG_STATE_HOME": "/elsewhere"}, uid=0) == paths.Paths(
        config=Path("/etc/wattshift/wattshift.toml"),
        state_dir=Path("/var/lib/wattshift"),
        socket=Path("/run/wattshift/wattshift.sock"),
    )


def test_a_user_keeps_the_places_that_xdg_names() -> None:
    environ = {
        "HOME": "/home/ann",
        "XDG_CONFIG_HOME": "/c",
        "XDG_STATE_HOME": "/s",
        "XDG_RUNTIME_DIR": "/run/user/1000",
    }
    assert paths.for_daemon(environ, uid=UID) == paths.Paths(
        config=Path("/c/wattshift/wattshift.toml"),
        state_dir=Path("/s/wattshift"),
        socket=Path("/run/user/1000/wattshift.sock"),
    )


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_a_user_without_xdg_falls_back_to_home_and_tmp(value: str | None) -> None:
    names = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")
    environ = {"HOME": "/home/ann"} | ({} if value is None else dict.fromkeys(names, value))
    assert paths.for_user(environ, UID) == paths.Paths(
        config=Path("/home/ann/.config/wattshift/wattshift.toml"),
        state_dir=Path("/home/ann/.local/state/wattshift"),
        socket=Path("/tmp/wattshift-1000/wattshift.sock"),
    )


def test_root_asks_the_system_daemon_even_while_it_is_down(tmp_path: Path) -> None:
    absent = tmp_path / "absent.sock"
    assert paths.default_address({}, uid=0, system_socket=absent) == f"unix://{absent}"


def test_a_user_asks_the_system_daemon_where_its_socket_lets_them(tmp_path: Path) -> None:
    socket = tmp_path / "wattshift.sock"
    socket.touch()
    environ = {"XDG_RUNTIME_DIR": "/run/user/1000"}
    assert paths.default_address(environ, uid=UID, system_socket=socket) == f"unix://{socket}"


def test_a_user_without_a_system_daemon_asks_their_own(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/1000"}
    address = paths.default_address(environ, uid=UID, system_socket=tmp_path / "absent.sock")
    assert address == "unix:///run/user/1000/wattshift.sock"


def test_a_private_directory_is_made_and_may_be_there_already(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    paths.make_private(directory)
    paths.make_private(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(PermissionError, match="open: must be a directory of the calling user"):
        paths.make_private(directory)


def test_a_directory_of_someone_else_or_a_link_is_not_private(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert not paths.is_private(tmp_path, uid=UID + tmp_path.stat().st_uid)
    assert not paths.is_private(link)
    assert not paths.is_private(tmp_path / "absent")
