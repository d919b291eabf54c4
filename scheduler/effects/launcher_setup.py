"""From the launcher's command line to a server that serves: options, lock, socket, containment."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import sys

from scheduler.effects.job_cgroup import CgroupContainment, CgroupsUnusable
from scheduler.effects.job_files import (
    LOG_BYTES_DEFAULT,
    LOG_FILES_DEFAULT,
    LOG_FILES_MAX,
    JobUser,
    open_directory,
)
from scheduler.effects.job_spawn import Spawner, close_descriptors
from scheduler.effects.job_supervisor import SupervisorContainment
from scheduler.effects.job_tree import Containment
from scheduler.effects.job_workshop import Workshop
from scheduler.effects.launcher_loop import log
from scheduler.effects.launcher_server import Server
from scheduler.effects.linux import IN_DELETE, IN_MOVED_FROM, Inotify, set_child_subreaper

TYPE_CHECKING = False  # as in `launcher_wire.py`
if TYPE_CHECKING:
    from typing import NoReturn

READY = b"ready\n"  # said on --ready-fd; anything else there is why there will be no launcher

_EXIT_USAGE = 2
_LISTEN_FD = 3  # sd_listen_fds(3)
_BACKLOG = 16
# The daemon can be started again without harm, the launcher can't: jobs go first when memory is short.
_OOM_SCORE = -500
_OOM_SCORE_PATH = "/proc/self/oom_score_adj"


class Options:
    """The command line."""

    def __init__(self, arguments: list[str]) -> None:
        """Read `--name value` pairs (argparse would cost 2 MiB and 10 ms).

        Raises:
            ValueError: They make no sense; the message says which.
        """
        known = {
            "--socket": "",
            "--jobs-dir": "",
            "--user": "",
            "--log-bytes": str(LOG_BYTES_DEFAULT),
            "--log-files": str(LOG_FILES_DEFAULT),
            "--containment": "auto",
            "--ready-fd": "-1",
        }
        if len(arguments) % 2:
            raise ValueError(f"{arguments[-1]} has no value")
        for name, value in zip(arguments[::2], arguments[1::2], strict=True):
            if name not in known:
                raise ValueError(f"{name} is not known; known are {', '.join(known)}")
            known[name] = value
        if not known["--socket"] or not known["--jobs-dir"]:
            raise ValueError("--socket and --jobs-dir are needed")
        self.socket_path = os.path.abspath(known["--socket"])
        self.jobs_dir = os.path.abspath(known["--jobs-dir"])
        self.user_name = known["--user"]
        self.log_bytes_max = _whole("--log-bytes", known["--log-bytes"], 1, 1 << 40)
        self.log_files_max = _whole("--log-files", known["--log-files"], 1, LOG_FILES_MAX)
        self.containment = known["--containment"]
        if self.containment not in ("auto", "cgroup", "supervisor"):
            raise ValueError("--containment is auto, cgroup or supervisor")
        self.ready_fd = _whole("--ready-fd", known["--ready-fd"], -1, 1 << 20)
        if self.user_name and os.getuid() != 0:
            raise ValueError("--user needs root: only root can start jobs as somebody else")


class Refusal(Exception):
    """There will be no launcher; the message says why."""


def run() -> NoReturn:
    """Be the launcher that the command line asks for, to its end."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # nothing is left to tidy up, and the interpreter would take milliseconds over it


def main(arguments: list[str]) -> int:
    """Serve until nobody needs the launcher; return the exit code."""
    try:
        options = Options(arguments)
    except ValueError as error:
        log(str(error))
        return _EXIT_USAGE
    try:
        inherited = _inherited_listener()
        close_descriptors({options.ready_fd, -1 if inherited is None else inherited.fileno()})
        server, workshop = _set_up(options, inherited)
    except (Refusal, OSError, KeyError, CgroupsUnusable) as error:
        message = str(error) if not isinstance(error, KeyError) else f"no user {options.user_name!r}"
        log(message)
        _say(options.ready_fd, message.encode("utf-8", "replace"))
        return 1
    _say(options.ready_fd, READY)
    gc.collect()
    gc.freeze()  # what lives for ever is not looked at again, nor copied by that in every fork
    server.serve(workshop)
    workshop.containment.close()
    return 0


def _set_up(options: Options, inherited: socket.socket | None) -> tuple[Server, Workshop]:
    os.chdir("/")
    lock_fd = _lock(options.socket_path)  # held to the end of the process
    del lock_fd
    user = JobUser(options.user_name)
    if options.user_name:
        os.setgroups([])  # acting as the job's user must not bring root's groups along
    jobs_fd = _open_jobs_directory(options.jobs_dir)
    set_child_subreaper()
    _check_reach(options.jobs_dir, user)
    spawner = Spawner(user, jobs_fd, _lower_oom_score())
    spawner.raise_open_files_limit()
    containment = _containment(options.containment, jobs_fd, spawner)
    inotify = Inotify()
    listener = _listen(options.socket_path) if inherited is None else inherited
    identity = {
        "launcher_id": os.urandom(8).hex(),
        "boot_id": _boot_id(),
        "pid": os.getpid(),
        "containment": containment.kind,
        "jobs_dir": os.path.realpath(options.jobs_dir),
    }
    server = Server(listener, identity)
    workshop = Workshop(
        server.loop,
        containment,
        inotify,
        user,
        options.jobs_dir,
        jobs_fd,
        options.log_bytes_max,
        options.log_files_max,
    )
    if inherited is None:
        _watch_socket(options.socket_path, server, workshop)
    return server, workshop


def _watch_socket(path: str, server: Server, workshop: Workshop) -> None:
    """Have the server told when somebody removes its socket (with the whole state directory, say)."""
    name = os.path.basename(path).encode()

    def removed(what: bytes) -> None:
        if what == name:
            server.socket_is_gone()

    directory_fd = open_directory(os.path.dirname(path))
    workshop.watch(directory_fd, IN_DELETE | IN_MOVED_FROM, removed)
    os.close(directory_fd)


def _open_jobs_directory(path: str) -> int:
    """Make it if it is missing, for all to pass through: what is below is each job's own."""
    try:
        return open_directory(path)
    except FileNotFoundError:
        os.makedirs(path)
        os.chmod(path, 0o711)
        return open_directory(path)


def _check_reach(jobs_dir: str, user: JobUser) -> None:
    with user:
        if not os.access(jobs_dir, os.X_OK, effective_ids=True):
            raise Refusal(
                f"{jobs_dir} can't be reached by the jobs' user {user.name}; open it and what is above"
            )


def _containment(wanted: str, jobs_fd: int, spawner: Spawner) -> Containment:
    if wanted == "supervisor":
        return SupervisorContainment(spawner)
    try:
        return CgroupContainment(jobs_fd, spawner)
    except CgroupsUnusable as error:
        if wanted == "cgroup":
            raise
        log(f"jobs run under supervisors, not in cgroups: {error}")
        return SupervisorContainment(spawner)


def _lock(socket_path: str) -> int:
    path = f"{socket_path}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Refusal(f"another launcher serves {socket_path}") from error
    return fd


def _listen(socket_path: str) -> socket.socket:
    """Return a listening socket that only our user can open.

    It is reached through its directory's descriptor: sun_path holds 108 bytes, paths can be longer.
    """
    directory_fd = open_directory(os.path.dirname(socket_path))
    name = os.path.basename(socket_path)
    try:
        os.unlink(name, dir_fd=directory_fd)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(f"/proc/self/fd/{directory_fd}/{name}")
    finally:
        os.umask(umask)
        os.close(directory_fd)
    listener.listen(_BACKLOG)
    return listener


def _inherited_listener() -> socket.socket | None:
    """Return the socket that systemd opened for us, if it did."""
    count = os.environ.pop("LISTEN_FDS", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count:
        return None
    if count != "1":
        raise Refusal(f"systemd passes {count} sockets; the launcher serves one")
    os.set_inheritable(_LISTEN_FD, False)
    return socket.socket(fileno=_LISTEN_FD)


def _lower_oom_score() -> bytes | None:
    """Make the kernel spare this process; return what jobs are to have, None if that is what we have."""
    with open(_OOM_SCORE_PATH, "rb", buffering=0) as own:
        before = int(own.read(32))
    now = before
    if before > _OOM_SCORE:
        try:
            with open(_OOM_SCORE_PATH, "wb", buffering=0) as own:
                own.write(b"%d" % _OOM_SCORE)
            now = _OOM_SCORE
        except PermissionError:
            pass  # only root may; systemd does it for others (OOMScoreAdjust=)
    jobs = max(before, 0)
    return b"%d" % jobs if jobs != now else None


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as text:
        return text.read().strip()


def _whole(name: str, text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise ValueError(f"{name} {text}: a whole number from {least} to {most} is needed")
    return value


def _say(fd: int, text: bytes) -> None:
    if fd >= 0:
        try:
            os.write(fd, text)
        except OSError:
            pass  # whoever started us did not wait
        os.close(fd)
