"""`top`: the node and its jobs, live, in a plain terminal."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

import click

from scheduler.cli import output, words
from scheduler.cli.failures import CliError
from scheduler.cli.jobs import JOBS_SHOWN_MAX, jobs_table, list_jobs
from scheduler.cli.node import gpus_table, node_remarks
from scheduler.cli.session import Session, talks

if TYPE_CHECKING:
    from scheduler.cli.client import Client
    from scheduler.v1 import job_pb2, job_service_pb2, node_pb2, node_service_pb2

FRAME_S_MIN = 0.25  # between two frames: more often nobody can read
FRAME_S_MAX = 1.0  # the spans of time shown move on
RETRY_S = 0.5
KEY_WAIT_S = 0.2
# Readers wait when the screen can't keep up; the server then sends the newest state only.
EVENTS_MAX = 1000
QUIT_KEYS = b"qQ"
ENTER_SCREEN = "\x1b[?1049h\x1b[?25l"
LEAVE_SCREEN = "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
# Who holds GPUs stands above who waits.
STATE_ORDER = ("PREEMPTING", "STOPPING", "STARTING", "RUNNING", "SUSPENDED", "PENDING")
WATTS_PER_KW = 1000


@dataclass(frozen=True, slots=True)
class JobsRestarted:
    """The whole state of the jobs comes again."""


@dataclass(frozen=True, slots=True)
class Lost:
    """No news from the daemon: why."""

    why: str


@dataclass(frozen=True, slots=True)
class KeyPressed:
    """The person wants to leave."""


if TYPE_CHECKING:
    Event = (
        node_service_pb2.WatchNodeResponse
        | job_service_pb2.WatchJobsResponse
        | JobsRestarted
        | Lost
        | KeyPressed
    )


@dataclass(slots=True)
class View:
    """What is known of the node, for the next frame."""

    node: node_pb2.Node | None = None
    jobs: dict[str, job_pb2.Job] = field(default_factory=dict)
    lost: str = ""

    def take(self, event: Event) -> None:
        """Take in what happened; a finished job is no longer shown."""
        from scheduler.v1 import job_service_pb2, node_service_pb2

        match event:
            case node_service_pb2.WatchNodeResponse():
                self.node, self.lost = event.node, ""  # news: the daemon is there
            case job_service_pb2.WatchJobsResponse():
                if words.word(event.job, "state") in words.FINAL_STATES:
                    self.jobs.pop(event.job.id, None)
                elif event.HasField("job"):
                    self.jobs[event.job.id] = event.job
            case JobsRestarted():
                self.jobs.clear()
            case Lost():
                self.lost = event.why
            case KeyPressed():
                pass
            case _:
                assert_never(event)


@click.command()
@click.option("--once", is_flag=True, help="Print one frame and end.")
@talks
@click.pass_obj
def top(session: Session, once: bool) -> None:
    """Show GPUs and jobs, live; q or Ctrl-C ends it. It bears a restart of the daemon."""
    with session.connect() as client:
        if once or not (session.json or sys.stdout.isatty()):
            _print_once(client, json=session.json)
            return
        view = View(node=_get_node(client).node)  # an address where nobody answers is told at once
        with _Readers(client) as readers, contextlib.suppress(KeyboardInterrupt):
            if session.json:
                _print_events(readers)
            else:
                with _screen(), readers.keys():
                    _run(view, readers)


def _get_node(client: Client) -> node_service_pb2.GetNodeResponse:
    from scheduler.v1 import node_service_pb2

    request = node_service_pb2.GetNodeRequest()
    return client.call(client.node.GetNode, request, node_service_pb2.GetNodeResponse)


def _print_once(client: Client, *, json: bool) -> None:
    from scheduler.v1 import job_service_pb2

    node = _get_node(client)
    jobs = list_jobs(client, job_service_pb2.ListJobsRequest(active_only=True), JOBS_SHOWN_MAX)
    if json:
        output.print_line(node)
        output.print_line(jobs)
        return
    view = View(node=node.node, jobs={job.id: job for job in jobs.jobs})
    for line in frame(view):
        print(line)


def _print_events(readers: _Readers) -> None:
    while True:
        match readers.events.get():
            case JobsRestarted() | Lost() | KeyPressed():
                pass
            case message:
                output.print_line(message)


def _run(view: View, readers: _Readers) -> None:
    drawn_s = 0.0
    news = True
    while True:
        wait_s = drawn_s + (FRAME_S_MIN if news else FRAME_S_MAX) - time.monotonic()
        try:
            event = readers.events.get(timeout=max(0.0, wait_s))
        except queue.Empty:
            _draw(view)
            drawn_s, news = time.monotonic(), False
            continue
        if isinstance(event, KeyPressed):
            return
        view.take(event)
        news = True


def _draw(view: View) -> None:
    width, height = os.get_terminal_size(sys.stdout.fileno())
    lines = frame(view, width, height)
    sys.stdout.write(HOME + f"{CLEAR_LINE}\n".join(lines) + CLEAR_LINE + CLEAR_BELOW)
    sys.stdout.flush()


def frame(view: View, width: int | None = None, height: int | None = None) -> list[str]:
    """Return the screen's lines: the node, its GPUs, its jobs.

    Args:
        width: None = plain text of any width, without colours.
        height: Jobs beyond it are counted, not shown; None = all are shown.
    """

    def lines_of(shown: output.Table) -> list[str]:
        return output.plain_lines(shown) if width is None else output.coloured_lines(shown, width)

    assert view.node is not None
    lines = [words.clean(line)[:width] for line in _headlines(view)]
    lines += ["", *lines_of(gpus_table(view.node.gpus)), ""] if view.node.gpus else [""]
    jobs = sorted(view.jobs.values(), key=_job_order)
    room = len(jobs) if height is None else max(0, height - len(lines) - 2)
    lines += lines_of(jobs_table(jobs[:room])) if jobs else ["no jobs"]
    if len(jobs) > room:
        lines.append(f"{len(jobs) - room} more")
    return lines[:height]


def _headlines(view: View) -> Iterator[str]:
    node = view.node
    assert node is not None
    states: dict[str, int] = {}
    for gpu in node.gpus:
        state = words.word(gpu, "state").lower()
        states[state] = states.get(state, 0) + 1
    counts = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    gpus = words.count(len(node.gpus), "GPU") + (f" ({counts})" if counts else "")
    kind = " (simulated)" if node.simulated else ""
    draw_w = sum(gpu.power_w for gpu in node.gpus)
    limit_w = sum(gpu.power_limit_w for gpu in node.gpus)
    watts = f"{draw_w / WATTS_PER_KW:.2f} of {limit_w / WATTS_PER_KW:.2f} kW"
    jobs = f"{node.live_jobs} running, {node.pending_jobs} pending"
    yield f"{node.name}{kind}  {gpus}  {watts}  {jobs}  {time.strftime('%H:%M:%S')}"
    if view.lost:
        yield f"no news: {view.lost}"
    yield from node_remarks(node)


def _job_order(job: job_pb2.Job) -> tuple[int, int, int, float, str]:
    state = words.word(job, "state")
    position = STATE_ORDER.index(state) if state in STATE_ORDER else len(STATE_ORDER)
    return (position, getattr(job, "class"), -job.priority, words.epoch_s(job.submitted_at), job.id)


class _Readers:
    """Threads that turn the daemon's streams and the keyboard into one bounded queue of events."""

    def __init__(self, client: Client) -> None:
        self.events: queue.Queue[Event] = queue.Queue(EVENTS_MAX)
        self._client = client
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Readers:
        self._start(lambda: self._read_for_ever(self._read_node))
        self._start(lambda: self._read_for_ever(self._read_jobs))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._client.close()  # cancels the streams
        for thread in self._threads:
            while thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    self.events.get_nowait()  # a reader may wait for room
                thread.join(timeout=0.01)

    @contextlib.contextmanager
    def keys(self) -> Iterator[None]:
        """Watch the keyboard too, each key as it is pressed."""
        if not sys.stdin.isatty():
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)
        try:
            self._start(self._read_keys)
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _read_for_ever(self, read: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                read()
            except CliError as error:
                self.events.put(Lost(error.lines[0]))
            except ValueError:
                # What gRPC raises for a call on the channel that `__exit__` has closed meanwhile.
                if not self._stopping.is_set():
                    raise
            self._stopping.wait(RETRY_S)

    def _read_node(self) -> None:
        from scheduler.v1 import node_service_pb2

        request = node_service_pb2.WatchNodeRequest()
        for message in self._client.stream(
            self._client.node.WatchNode, request, node_service_pb2.WatchNodeResponse
        ):
            self.events.put(message)

    def _read_jobs(self) -> None:
        from scheduler.cli.watching import watch_jobs

        self.events.put(JobsRestarted())
        for message in watch_jobs(self._client, restarted=lambda: self.events.put(JobsRestarted())):
            self.events.put(message)

    def _read_keys(self) -> None:
        while not self._stopping.is_set():
            ready, _, _ = select.select([sys.stdin], [], [], KEY_WAIT_S)
            key = os.read(sys.stdin.fileno(), 1) if ready else None
            if key is not None and key in QUIT_KEYS:  # b"", the end of input, is in it too
                self.events.put(KeyPressed())
                return


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    sys.stdout.write(ENTER_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE_SCREEN)
        sys.stdout.flush()
