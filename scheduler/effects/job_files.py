"""The files of a job's attempt, as the launcher makes and writes them.

    <jobs-dir>/<job_id>/checkpoint/        kept between attempts
    <jobs-dir>/<job_id>/<attempt>/         notice.json, ack, output.log, output.log.1 (older), …

They belong to the job's user, who can put anything in their place at any time. So every open goes by the
descriptor of its directory and follows no symbolic link; what is opened is looked at before it is used; and
as root it all happens with the job's user's rights: whatever the job sets up, it gains nothing that it
could not do itself.
"""

import errno
import json
import os
import stat
from types import TracebackType

CHECKPOINT_DIRECTORY = "checkpoint"
CHECKPOINT_MARK = b"checkpoint"
NOTICE_NAME = "notice.json"
ACK_NAME = "ack"
LOG_NAME = "output.log"

LOG_BYTES_DEFAULT = 8 << 20
LOG_FILES_DEFAULT = 4  # with 8 MiB each, a job's output takes 32 MiB at most
LOG_FILES_MAX = 100

_NOTICE_NEW_NAME = ".notice.json.new"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_NAMELESS = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
# O_NONBLOCK: to open a FIFO that the job put there must not wait for its other end.
_OPEN_FOR_WRITING = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class JobUser:
    """Who jobs run as; as a context, who this process acts as. Without a name: whoever we are."""

    __slots__ = ("gid", "groups", "name", "uid")

    def __init__(self, name: str = "") -> None:
        """Look the user up.

        Raises:
            KeyError: There is no such user.
        """
        self.name = name
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.groups: list[int] = []
        if name:
            import pwd  # only here: most launchers run as their user

            entry = pwd.getpwnam(name)
            self.uid, self.gid = entry.pw_uid, entry.pw_gid
            self.groups = os.getgrouplist(name, self.gid)

    def __enter__(self) -> None:
        if self.name:
            os.setegid(self.gid)
            os.seteuid(self.uid)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.name:
            os.seteuid(os.getuid())
            os.setegid(os.getgid())


def attempt_environment(jobs_dir: str, job_id: str, attempt: int) -> dict[str, str]:
    """Return the variables that tell a job where its files are."""
    job = f"{jobs_dir}/{job_id}"
    return {
        "WATTSHIFT_CHECKPOINT_DIR": f"{job}/{CHECKPOINT_DIRECTORY}",
        "WATTSHIFT_NOTICE_FILE": f"{job}/{attempt}/{NOTICE_NAME}",
        "WATTSHIFT_ACK_FILE": f"{job}/{attempt}/{ACK_NAME}",
    }


class AttemptFiles:
    """The open directories of one attempt."""

    __slots__ = ("_notice_fd", "_user", "attempt_fd", "checkpoint_fd")

    def __init__(self, jobs_fd: int, job_id: str, attempt: int, user: JobUser) -> None:
        """Make what is missing and open it.

        Raises:
            OSError: A directory can't be made, is not one, or is not the job's user's.
        """
        self._user = user
        self.checkpoint_fd = self.attempt_fd = self._notice_fd = -1
        # Only we can write here, so only here a directory changes hands after it is made.
        job_fd = _open_directory(jobs_fd, job_id, user, hand_over=True)
        try:
            with user:
                self.checkpoint_fd = _open_directory(job_fd, CHECKPOINT_DIRECTORY, user)
                self.attempt_fd = _open_directory(job_fd, str(attempt), user)
        except OSError:
            self.close()
            raise
        finally:
            os.close(job_fd)

    def prepare_notice(self) -> None:
        """Have a file without a name ready for the notice: to make one takes most of the time of a notice."""
        with self._user:
            try:
                self._notice_fd = os.open(".", _OPEN_NAMELESS, 0o600, dir_fd=self.attempt_fd)
            except OSError:
                pass  # not every file system has them, and it can be made later

    def write_notice(self, notice: dict[str, object]) -> None:
        """Put the notice file in place, whole or not at all.

        Raises:
            OSError: The job took its own notice file's place, or the disk is full.
        """
        text = json.dumps(notice).encode() + b"\n"
        with self._user:
            if self._notice_fd < 0 or not self._name_notice(text):
                self._replace_notice(text)

    def _name_notice(self, text: bytes) -> bool:
        """Give the prepared file its name; False if something has it, or it can't be done."""
        fd, self._notice_fd = self._notice_fd, -1
        try:
            _write_whole(fd, text)
            os.link(f"/proc/self/fd/{fd}", NOTICE_NAME, dst_dir_fd=self.attempt_fd)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def _replace_notice(self, text: bytes) -> None:
        flags = _OPEN_FOR_WRITING | os.O_CREAT | os.O_EXCL
        try:
            fd = os.open(_NOTICE_NEW_NAME, flags, 0o600, dir_fd=self.attempt_fd)
        except FileExistsError:  # ours, from a full disk, or the job's
            _unlink(_NOTICE_NEW_NAME, self.attempt_fd)
            fd = os.open(_NOTICE_NEW_NAME, flags, 0o600, dir_fd=self.attempt_fd)
        try:
            _write_whole(fd, text)
        finally:
            os.close(fd)
        os.rename(_NOTICE_NEW_NAME, NOTICE_NAME, src_dir_fd=self.attempt_fd, dst_dir_fd=self.attempt_fd)

    def remove_acknowledgement(self) -> None:
        """Remove an `ack` from before the notice: it can't be the answer to it."""
        with self._user:
            _unlink(ACK_NAME, self.attempt_fd)

    def has_acknowledgement(self) -> bool:
        """Say whether something is called `ack` now; what it is doesn't matter, it is never opened."""
        try:
            os.stat(ACK_NAME, dir_fd=self.attempt_fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def close_checkpoints(self) -> None:
        """Let go of the checkpoint directory: once it is watched it need not be open."""
        if self.checkpoint_fd >= 0:
            os.close(self.checkpoint_fd)
            self.checkpoint_fd = -1

    def close(self) -> None:
        """Let go of all that is open."""
        self.close_checkpoints()
        if self._notice_fd >= 0:
            os.close(self._notice_fd)
            self._notice_fd = -1
        if self.attempt_fd >= 0:
            os.close(self.attempt_fd)
            self.attempt_fd = -1


class JobLog:
    """The attempt's output: `output.log` grows to `bytes_max`, then becomes `output.log.1`, and so on.

    At most `files_max` files are kept, the growing one among them. Output that can't be written (disk full,
    the job tampered with its log) is dropped and counted: the job goes on.
    """

    __slots__ = ("_attempt_fd", "_bytes_max", "_fd", "_files_max", "_user", "_written", "dropped_bytes")

    def __init__(self, attempt_fd: int, user: JobUser, bytes_max: int, files_max: int) -> None:
        """Name the log. Nothing is opened before the first output: on ext4 a new file takes 0.4 ms."""
        assert bytes_max > 0
        assert 1 <= files_max <= LOG_FILES_MAX
        self._attempt_fd = attempt_fd
        self._user = user
        self._bytes_max = bytes_max
        self._files_max = files_max
        self.dropped_bytes = 0
        self._fd = -1
        self._written = 0

    def write(self, piece: bytes) -> None:
        """Append; rotates as often as needed."""
        view = memoryview(piece)
        try:
            while view:
                if self._fd < 0:
                    self._open(os.O_APPEND)
                if self._written >= self._bytes_max:
                    self._rotate()
                count = os.write(self._fd, view[: self._bytes_max - self._written])
                self._written += count
                view = view[count:]
        except OSError:
            self.dropped_bytes += len(view)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, flags: int) -> None:
        with self._user:
            fd = os.open(LOG_NAME, _OPEN_FOR_WRITING | os.O_CREAT | flags, 0o600, dir_fd=self._attempt_fd)
        status = os.fstat(fd)
        try:
            check_plain(status, LOG_NAME)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        self._written = status.st_size

    def _rotate(self) -> None:
        directory = self._attempt_fd
        try:
            with self._user:
                for number in range(self._files_max - 1, 0, -1):
                    source = LOG_NAME if number == 1 else f"{LOG_NAME}.{number - 1}"
                    try:
                        os.rename(source, f"{LOG_NAME}.{number}", src_dir_fd=directory, dst_dir_fd=directory)
                    except FileNotFoundError:
                        pass
                if self._files_max == 1:
                    _unlink(LOG_NAME, directory)
            old_fd = self._fd
            self._open(os.O_EXCL | os.O_APPEND)
            os.close(old_fd)
        except OSError:
            # The job put something in the way. Its output stays bounded: the file starts over.
            os.ftruncate(self._fd, 0)
            self._written = 0


def remove_unused_attempt(jobs_fd: int, job_id: str, attempt: int, user: JobUser) -> None:
    """Remove the directory of an attempt that was never begun: who looks later must not think that it was."""
    try:
        job_fd = open_job_directory(jobs_fd, job_id)
    except OSError:
        return  # not even that was made
    try:
        with user:
            os.rmdir(str(attempt), dir_fd=job_fd)
    except OSError:
        pass  # the job's user took it, or put something there
    finally:
        os.close(job_fd)


def remove_job(jobs_dir: str | os.PathLike[str], job_id: str) -> None:
    """Remove all that a finished job left; nothing there is no error. May take long: not for an event loop.

    No symbolic link is followed. Directories move up into the job's own before they are emptied, so that no
    depth of them takes more than three descriptors.

    Raises:
        OSError: Something can't be removed.
    """
    jobs_fd = open_directory(os.fspath(jobs_dir))
    try:
        try:
            job_fd = _open_to_empty(job_id, jobs_fd)
        except FileNotFoundError:
            return
        except NotADirectoryError:  # a symbolic link, or a file
            os.unlink(job_id, dir_fd=jobs_fd)
            return
        try:
            _empty(job_fd)
        finally:
            os.close(job_fd)
        os.rmdir(job_id, dir_fd=jobs_fd)
    finally:
        os.close(jobs_fd)


def check_plain(status: os.stat_result, name: str) -> None:
    """Accept only a regular file with one name: another name could be somebody else's file.

    Raises:
        OSError: EPERM, and what it is instead.
    """
    if not stat.S_ISREG(status.st_mode):
        raise PermissionError(errno.EPERM, f"{name} is not a regular file")
    if status.st_nlink != 1:
        raise PermissionError(errno.EPERM, f"{name} has {status.st_nlink} names (hard links)")


def open_directory(path: str) -> int:
    """Return a descriptor of a directory that the operator named; symbolic links on the way are theirs.

    Raises:
        OSError: It is missing or not a directory.
    """
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def open_job_directory(jobs_fd: int, *names: str) -> int:
    """Return a descriptor of a directory below the jobs directory; no symbolic link is followed.

    Raises:
        OSError: It is missing or not a directory.
    """
    fd = os.dup(jobs_fd)
    for name in names:
        try:
            below_fd = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below_fd
    return fd


def _open_directory(parent_fd: int, name: str, user: JobUser, *, hand_over: bool = False) -> int:
    try:
        os.mkdir(name, 0o700, dir_fd=parent_fd)
        is_new = True
    except FileExistsError:
        is_new = False
    fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent_fd)
    try:
        if is_new and hand_over and user.name:
            os.fchown(fd, user.uid, user.gid)
        elif os.fstat(fd).st_uid != user.uid:
            raise PermissionError(errno.EPERM, f"{name} belongs to another user")
    except OSError:
        os.close(fd)
        raise
    return fd


def _unlink(name: str, directory_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=directory_fd)
    except OSError:
        pass  # not there, or a directory that the job made there: what comes next fails if it matters


def _open_to_empty(name: str, parent_fd: int) -> int:
    """Open a directory, whatever rights its owner, who we are unless we are root, took from himself."""
    if os.geteuid() != 0:
        path_fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        try:
            os.chmod(f"/proc/self/fd/{path_fd}", 0o700)
        finally:
            os.close(path_fd)
    return os.open(name, _OPEN_DIRECTORY, dir_fd=parent_fd)


def _empty(top_fd: int) -> None:
    """Remove everything in a directory: the directories in a directory in it are moved up first."""
    moved = 0
    while names := os.listdir(top_fd):
        for name in names:
            if _unlink_file(name, top_fd):
                continue
            fd = _open_to_empty(name, top_fd)
            try:
                for below in os.listdir(fd):
                    if not _unlink_file(below, fd):
                        os.close(_open_to_empty(below, fd))  # to move a directory takes its owner's rights
                        moved = _move_up(below, fd, top_fd, moved)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=top_fd)


def _write_whole(fd: int, text: bytes) -> None:
    if os.write(fd, text) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _unlink_file(name: str, directory_fd: int) -> bool:
    """Remove anything but a directory; False if it is one."""
    try:
        os.unlink(name, dir_fd=directory_fd)
    except IsADirectoryError:
        return False
    return True


def _move_up(name: str, directory_fd: int, top_fd: int, moved: int) -> int:
    """Move a directory to the top under a free number above `moved`; return the number."""
    while True:
        moved += 1
        try:
            os.rename(name, f".removed.{moved}", src_dir_fd=directory_fd, dst_dir_fd=top_fd)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            continue  # the job has something of that name
        return moved
