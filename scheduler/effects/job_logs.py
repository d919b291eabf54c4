"""A job's output as the daemon reads it: all kept pieces in order, while the launcher writes and rotates.

The files belong to the job's user (`job_files.py`): nothing is opened through a symbolic link, and only
regular files with one name are read.
"""

import asyncio
import os
from pathlib import Path

from scheduler.effects.job_files import (
    LOG_FILES_MAX,
    LOG_NAME,
    check_plain,
    open_directory,
    open_job_directory,
)
from scheduler.effects.linux import IN_CREATE, IN_MODIFY, IN_Q_OVERFLOW, Inotify

_OPEN_FOR_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# A rotation that overtakes the reader between two looks makes it look again; it takes as many files as these
# to overtake it each time.
_LOOKS_MAX = 10


class OutputReader:
    """Reads an attempt's output from its oldest kept piece on, then what is added to it.

    It knows a piece by the file, not by the name, which changes with each rotation. A reader that is
    overtaken (the piece that it would read next was dropped) goes on with the oldest; `lost` counts that.
    """

    def __init__(self, jobs_dir: Path, job_id: str, attempt: int) -> None:
        """Open the attempt's directory.

        Raises:
            OSError: FileNotFoundError, the attempt has no files (any more); else what the job did to them.
        """
        jobs_fd = open_directory(str(jobs_dir))
        try:
            self.directory_fd = open_job_directory(jobs_fd, job_id, str(attempt))
        finally:
            os.close(jobs_fd)
        self._fd = -1
        self._file: tuple[int, int] | None = None
        self.lost = 0

    def read(self, bytes_max: int) -> bytes:
        """Return what comes next, at most `bytes_max`; empty if there is nothing more yet.

        Raises:
            OSError: What is in the log's place is not a plain file.
        """
        assert bytes_max > 0
        for _ in range(LOG_FILES_MAX):
            if self._fd < 0 and not self._open_oldest():
                return b""
            number = self._number()
            # Only after its name is known: a piece that is not the newest will not grow any more.
            piece = os.read(self._fd, bytes_max)
            if piece or number == 0:
                return piece
            self._open_after(number)
        return b""

    def close(self) -> None:
        """Let go of the files."""
        for fd in (self._fd, self.directory_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self.directory_fd = -1

    def _number(self) -> int | None:
        """Return which piece we are reading: 0 is the one that grows; None if it was dropped."""
        for _ in range(_LOOKS_MAX):
            files = self._files()
            for number, file in files.items():
                if file == self._file:
                    return number
            if files == self._files():
                return None
        return None

    def _open_oldest(self) -> bool:
        for _ in range(_LOOKS_MAX):
            files = self._files()
            if not files:
                return False
            oldest = max(files)
            if self._open(oldest, files[oldest]):
                return True
        return False

    def _open_after(self, number: int | None) -> None:
        """Go on to the piece after the one that is `number` at the moment."""
        if number is not None:
            for _ in range(_LOOKS_MAX):
                files = self._files()
                now = next((n for n, file in files.items() if file == self._file), None)
                if now is None:
                    break
                if now - 1 in files and self._open(now - 1, files[now - 1]):
                    return
        self.lost += 1
        self._open_oldest()

    def _open(self, number: int, file: tuple[int, int]) -> bool:
        """Open a piece if it still has that number."""
        name = _name(number)
        try:
            fd = os.open(name, _OPEN_FOR_READING, dir_fd=self.directory_fd)
        except FileNotFoundError:
            return False
        status = os.fstat(fd)
        try:
            check_plain(status, name)
        except OSError:
            os.close(fd)
            raise
        if (status.st_dev, status.st_ino) != file:
            os.close(fd)
            return False
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._file = file
        return True

    def _files(self) -> dict[int, tuple[int, int]]:
        """Return the pieces that there are: number to identity."""
        files = {}
        for number in range(LOG_FILES_MAX):
            try:
                status = os.stat(_name(number), dir_fd=self.directory_fd, follow_symlinks=False)
            except FileNotFoundError:
                # In a rotation one name is free for a moment, two never are.
                if number - 1 not in files and number > 0:
                    break
                continue
            files[number] = (status.st_dev, status.st_ino)
        return files


class OutputWatch:
    """Wakes who follows output, with one inotify queue for all of them."""

    def __init__(self) -> None:
        """Begin; needs the running event loop.

        Raises:
            OSError: No inotify queue is left to this user (fs.inotify.max_user_instances).
        """
        self._inotify = Inotify()
        self._followers: dict[int, set[asyncio.Event]] = {}
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._changed)

    def follow(self, reader: OutputReader) -> "Following":
        """Return what is set when there may be more to read.

        Raises:
            OSError: ENOSPC, no watch is left to this user.
        """
        watch = self._inotify.add(reader.directory_fd, IN_CREATE | IN_MODIFY)
        event = asyncio.Event()
        self._followers.setdefault(watch, set()).add(event)
        return Following(self, watch, event)

    def unfollow(self, watch: int, event: asyncio.Event) -> None:
        """Undo `follow`."""
        followers = self._followers.get(watch, set())
        followers.discard(event)
        if not followers and self._followers.pop(watch, None) is not None:
            self._inotify.remove(watch)

    def close(self) -> None:
        """End; nobody is woken any more."""
        asyncio.get_running_loop().remove_reader(self._inotify.fd)
        self._inotify.close()

    def _changed(self) -> None:
        for watch, mask, _ in self._inotify.read():
            woken = (watch,) if not mask & IN_Q_OVERFLOW else tuple(self._followers)
            for number in woken:
                for event in self._followers.get(number, ()):
                    event.set()


class Following:
    """One follower. To lose nothing: `clear`, read until nothing comes, then await `changed`."""

    def __init__(self, watch: OutputWatch, number: int, event: asyncio.Event) -> None:
        self._watch = watch
        self._number = number
        self._event = event

    def clear(self) -> None:
        """From here on `changed` waits for the next change."""
        self._event.clear()

    async def changed(self) -> None:
        """Return when something changed since the last `clear`."""
        await self._event.wait()

    def close(self) -> None:
        """Stop following."""
        self._watch.unfollow(self._number, self._event)


def _name(number: int) -> str:
    return f"{LOG_NAME}.{number}" if number else LOG_NAME
