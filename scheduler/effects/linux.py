"""What Linux offers and Python's standard library does not: inotify and prctl, through libc."""

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# linux/inotify.h
IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_Q_OVERFLOW = 0x4000
_IN_ONLYDIR = 0x1000000

_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name that follows
# One read takes this much of the queue, so that a job that touches many files has to wait for its turn.
_READ_BYTES = 16384


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this process `number` when its parent dies; the caller checks for a lost race."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def set_child_subreaper() -> None:
    """Make orphans among this process's descendants its children."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


class Inotify:
    """One inotify queue; `fd` is readable when events wait."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = int(_checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)))

    def add(self, directory_fd: int, mask: int) -> int:
        """Watch an open directory; return the watch's number (the same directory gives the same number).

        Raises:
            OSError: ENOSPC when the user's fs.inotify.max_user_watches is used up.
        """
        path = b"/proc/self/fd/%d" % directory_fd
        return int(_checked(_libc.inotify_add_watch(self.fd, path, mask | _IN_ONLYDIR)))

    def remove(self, watch: int) -> None:
        """Stop watching; a watch that the kernel already dropped (directory removed) is no error."""
        _libc.inotify_rm_watch(self.fd, watch)

    def read(self) -> list[tuple[int, int, bytes]]:
        """Return some of the waiting events as (watch, mask, name); empty if none waits."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return []
        events = []
        offset = 0
        while offset < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            events.append((watch, mask, data[offset : offset + length].rstrip(b"\0")))
            offset += length
        return events

    def close(self) -> None:
        """Let go of the queue and all its watches."""
        os.close(self.fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
