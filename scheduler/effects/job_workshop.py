"""What all attempts in a launcher share."""

from collections.abc import Callable

from scheduler.effects.job_files import JobUser
from scheduler.effects.job_tree import Containment
from scheduler.effects.launcher_loop import Loop
from scheduler.effects.linux import Inotify


class Workshop:
    """The launcher's loop, containment and files, and who looks at which directory."""

    __slots__ = (
        "containment",
        "inotify",
        "jobs_dir",
        "jobs_fd",
        "log_bytes_max",
        "log_files_max",
        "loop",
        "user",
        "watches",
    )

    def __init__(
        self,
        loop: Loop,
        containment: Containment,
        inotify: Inotify,
        user: JobUser,
        jobs_dir: str,
        jobs_fd: int,
        log_bytes_max: int,
        log_files_max: int,
    ) -> None:
        self.loop = loop
        self.containment = containment
        self.inotify = inotify
        self.user = user
        self.jobs_dir = jobs_dir
        self.jobs_fd = jobs_fd
        self.log_bytes_max = log_bytes_max
        self.log_files_max = log_files_max
        self.watches: dict[int, Callable[[bytes], None]] = {}  # by inotify's number; takes the file's name

    def watch(self, directory_fd: int, events: int, callback: Callable[[bytes], None]) -> int:
        """Have it called with the name of what changes in a directory; return the watch's number.

        Raises:
            OSError: No watch is left.
        """
        watch = self.inotify.add(directory_fd, events)
        self.watches[watch] = callback
        return watch

    def unwatch(self, watch: int, callback: Callable[[bytes], None]) -> None:
        """Call it no more; of no watch (-1), or one that somebody else has by now, nothing changes."""
        # A later attempt of a job watches the same checkpoint directory under the same number.
        if watch >= 0 and self.watches.get(watch) == callback:
            del self.watches[watch]
            self.inotify.remove(watch)
