"""What `wattshift-launcher.service` starts: the launcher, told by the configuration what the daemon is told.

    python -I -m scheduler.launcher_unit --config FILE --socket PATH

It reads the file, then becomes `effects/launcher_process.py`, which loads nothing of this. Where the file
does not allow it, whoever waits at the socket is told why: a connection that nobody took would have
systemd start this again and again.
"""

import os
import pwd
import socket
import sys
from pathlib import Path

from scheduler import config as configuration
from scheduler import paths
from scheduler.effects.launcher_wire import encode
from scheduler.errors import ConfigError
from scheduler.model.settings import Config

EX_CONFIG = 78  # sysexits.h; as every `wattshift` command says it
LISTEN_FD = 3  # sd_listen_fds(3)
REFUSALS_MAX = 64  # the socket's backlog is shorter
LAUNCHER = "scheduler.effects.launcher_process"


def command(config: Config, socket_path: str, user_id: int) -> list[str]:
    """The launcher's command line.

    Raises:
        ConfigError: Jobs are to run as somebody whom this user can't start processes as.
    """
    state_dir = config.state.directory or paths.for_daemon(uid=user_id).state_dir
    options = {
        "--socket": socket_path,
        "--jobs-dir": str(state_dir / "jobs"),
        "--log-bytes": str(config.jobs.log_bytes_max),
        "--log-files": str(config.jobs.log_files_kept),
    }
    if config.jobs.user and pwd.getpwnam(config.jobs.user).pw_uid != user_id:
        if user_id != 0:
            raise ConfigError(
                f'jobs.user = "{config.jobs.user}": this launcher runs as {pwd.getpwuid(user_id).pw_name}; '
                "only root can start processes as somebody else. Leave jobs.user out, or run both units as "
                "that user (User=)"
            )
        options["--user"] = config.jobs.user
    return [sys.executable, "-I", "-m", LAUNCHER, *(word for pair in options.items() for word in pair)]


def main() -> None:
    """Become the launcher; exit with EX_CONFIG where the configuration does not allow it."""
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    if set(arguments) != {"--config", "--socket"}:
        sys.exit(__doc__)
    try:
        words = command(configuration.load(Path(arguments["--config"])), arguments["--socket"], os.geteuid())
    except ConfigError as error:
        print(error, file=sys.stderr)
        _refuse(str(error))
        sys.exit(EX_CONFIG)
    os.execv(words[0], words)  # the sockets that systemd handed over go along


def _refuse(message: str) -> None:
    """Tell those who wait at the socket that systemd handed over, if it did, that there is no launcher."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return
    listener = socket.socket(fileno=LISTEN_FD)
    listener.setblocking(False)
    for _ in range(REFUSALS_MAX):
        try:
            peer, _ = listener.accept()
        except BlockingIOError:
            return
        with peer:
            try:
                peer.sendall(encode({"report": "refused", "message": message}))
            except OSError:
                continue  # it did not wait


if __name__ == "__main__":
    main()
