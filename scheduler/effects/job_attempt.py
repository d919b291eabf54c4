"""One attempt in the launcher: what its tree, its files and its orders make of each other.

Preparing: the directories are made, and a waiting process gets its program. Nothing is reported, and all of
it can be discarded: whether the attempt begins at all is being decided elsewhere.

Starting: the waiting process becomes the program. The exec decides between `started` and `start_failed`. A
stop that comes meanwhile waits for that (not its deadline).

Running: output is pumped into the log. When the first process ends by itself, what it leaves behind is killed
at once; `exited` is said when nothing is left.

Frozen: no process of the tree runs, and `frozen` is said once that is so. An order, or a notice, thaws it;
whoever is killed while frozen is gone like any other.

Stopping: the notice file appears, SIGTERM goes to the whole tree, the stop command runs in a tree of its
own. From here on each process may take until the deadline, also when the first one ends earlier (a shell
does, while the trainer that it started saves). The acknowledgement file, or the daemon, ends that early for
the job's tree; not for the stop command, which may be in the middle of ending something elsewhere. `exited`
is said when both trees are gone. The deadline belongs to the launcher and is kept without a daemon; it is
counted on the monotonic clock from the order's arrival, so that a step of the clock changes nothing.
"""

import os
import time
from collections.abc import Callable

from scheduler.effects.job_files import (
    CHECKPOINT_MARK,
    AttemptFiles,
    JobLog,
    attempt_environment,
    remove_unused_attempt,
)
from scheduler.effects.job_spawn import Program
from scheduler.effects.job_tree import Listener, Tree
from scheduler.effects.job_workshop import Workshop
from scheduler.effects.launcher_loop import Timer, log
from scheduler.effects.launcher_wire import Message
from scheduler.effects.linux import IN_ATTRIB, IN_CLOSE_WRITE, IN_CREATE, IN_MOVED_TO

Key = tuple[str, int]

GRACE_S_MAX = 7 * 86400.0  # the configuration allows no more; further off is a mistake, and a GPU would wait
STUCK_S = 5.0  # after SIGKILL; then the daemon is told, and SIGKILL is sent again as often as this
CHECKPOINT_REPORTS_S = 0.1  # a job that marks checkpoints in a loop is heard this often
# A tree that is being frozen is looked at again so soon, then ever later: what is in the kernel stops when it
# comes out.
FREEZE_AGAIN_S, FREEZE_AGAIN_S_MAX = 0.002, 0.5

# So long after its start what a notice needs is made ready: jobs of milliseconds never get one, and the fork
# for the next start is done.
NOTICE_AHEAD_S = 0.01

_FROZEN_OR_THAWED = ("frozen", "thawed")
_PIECE_BYTES = 65536  # what a pipe holds; one turn of the loop moves one piece of a job's output
_DRAIN_PIECES_MAX = 16  # the largest pipe an unprivileged process can make (1 MiB), in pieces

_CHECKPOINT_EVENTS = IN_CREATE | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_TO
_ACK_EVENTS = IN_CREATE | IN_MOVED_TO


class StopTree(Listener):
    """Listens to the stop command's tree: what it does is in the log, only its end matters."""

    __slots__ = ("_attempt",)

    def __init__(self, attempt: "Attempt") -> None:
        self._attempt = attempt

    def has_started(self, pid: int, start_ticks: int) -> None:
        """Nothing to say."""

    def has_failed_to_start(self, what: str, number: int, message: str) -> None:
        """The job's owner reads it in the log."""
        del number
        self._attempt.write_log_line(f"the stop command did not start ({what}): {message}")

    def main_has_exited(self, status: int) -> None:
        """The job's owner reads it in the log if it failed."""
        code = os.waitstatus_to_exitcode(status)
        if code > 0:
            self._attempt.write_log_line(f"the stop command ended with exit code {code}")
        elif code < 0:
            self._attempt.write_log_line(f"the stop command ended by signal {-code}")

    def rest_remains(self) -> None:
        """What a stop command leaves behind ends with it."""
        self._attempt.kill_stop_command()

    def is_empty(self) -> None:
        """The stop command and all that it started is gone."""
        self._attempt.stop_command_is_over()


class Attempt(Listener):
    """One start of a job, from the order to its end."""

    __slots__ = (
        "_ack_watch",
        "_checkpoint_timer",
        "_checkpoint_waits",
        "_checkpoint_watch",
        "_command",
        "_deadline_s",
        "_deadline_timer",
        "_environment",
        "_exit_status",
        "_failure",
        "_files",
        "_freeze_timer",
        "_is_started",
        "_is_to_freeze",
        "_kill_timer",
        "_killed",
        "_log",
        "_notice",
        "_notice_timer",
        "_output_fd",
        "_output_write_fd",
        "_over",
        "_report",
        "_said_stuck",
        "_shop",
        "_signalled",
        "_stop_command",
        "_stop_tree",
        "_tree",
        "_tree_is_gone",
        "_working_directory",
        "is_ordered",
        "is_over",
        "key",
        "reports",
    )

    def __init__(
        self,
        shop: Workshop,
        key: Key,
        order: Message,
        report: Callable[[Message], None],
        over: Callable[[], None],
    ) -> None:
        """Take the order, checked by the caller; `over` is called when there is nothing more to report."""
        self._shop = shop
        self._report = report
        self.key = key
        self.reports: list[Message] = []
        self.is_ordered = False  # to start; before that nothing is reported
        self.is_over = False
        self._command: list[str] = order["command"]
        self._environment: dict[str, str] = order["environment"]
        self._working_directory: str = order["working_directory"]
        self._stop_command: list[str] = order["stop_command"]
        self._files: AttemptFiles | None = None
        self._log: JobLog | None = None
        self._tree: Tree | None = None
        self._stop_tree: Tree | None = None
        self._is_started = False
        self._over = over
        self._tree_is_gone = False
        self._exit_status: int | None = None
        self._failure: Message | None = None
        self._output_fd = self._output_write_fd = -1
        self._deadline_s: float | None = None
        self._deadline_timer: Timer | None = None
        self._notice: dict[str, object] = {}
        self._notice_timer: Timer | None = None
        self._signalled = False
        self._killed: list[Tree] = []
        self._kill_timer: Timer | None = None
        self._said_stuck = False
        self._ack_watch = self._checkpoint_watch = -1
        self._checkpoint_timer: Timer | None = None
        self._checkpoint_waits = False
        self._is_to_freeze = False
        self._freeze_timer: Timer | None = None

    # Orders ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the files and tell a waiting process its program."""
        shop = self._shop
        self._environment.update(attempt_environment(shop.jobs_dir, *self.key))
        try:
            self._output_fd, self._output_write_fd = os.pipe()
            os.set_blocking(self._output_fd, False)
            tree = shop.containment.tree(shop.loop, self)
        except OSError as error:
            self.refuse(error.errno or 0, str(error))
            return
        if self.is_over:
            return  # the fork failed while we looked, and that was said
        self._tree = tree
        shop.loop.watch_bulk(self._output_fd, self._pump)
        what = "files"
        try:
            files = AttemptFiles(shop.jobs_fd, *self.key, shop.user)
            self._files = files
            self._log = JobLog(files.attempt_fd, shop.user, shop.log_bytes_max, shop.log_files_max)
            self._watch_checkpoints(files)
            what = "fork"
            tree.load(self._program(self._command), self._output_write_fd)
        except OSError as error:
            self.has_failed_to_start(what, error.errno or 0, str(error))
            self._kill(tree)
        if not self._stop_command:
            self._close_output_writer()

    def start(self, environment: dict[str, str]) -> None:
        """Let the process become the program, with this more in its environment; later only say all again."""
        if not self.is_ordered:
            self.is_ordered = True
            self._environment.update(environment)
            if self._tree is not None and self._failure is None:
                self._tree.go(environment)
        for report in self.reports:
            self._report(report)

    def discard(self) -> None:
        """Take back what was prepared: nobody is ever to know that it was."""
        remove_unused_attempt(self._shop.jobs_fd, *self.key, self._shop.user)
        if self._tree is not None and not self._tree_is_gone:
            self._kill(self._tree)

    def refuse(self, number: int, message: str) -> None:
        """Say, once it is asked for, why the attempt is not even tried."""
        self.has_failed_to_start("fork", number, message)
        self.is_empty()

    def stop(self, deadline_s: float, notice: dict[str, object]) -> None:
        """Give notice, signal, and kill at the deadline (Unix time); later orders can only shorten that."""
        tree = self._tree
        if tree is None or self._tree_is_gone:
            return
        grace_s = min(max(0.0, deadline_s - time.time()), GRACE_S_MAX)
        deadline_s = time.monotonic() + grace_s
        if self._deadline_s is not None and deadline_s >= self._deadline_s:
            return
        self._deadline_s = deadline_s
        self._notice = notice
        if self._is_started:
            self._give_notice(tree)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        if grace_s > 0.0:
            self._deadline_timer = self._shop.loop.call_after(grace_s, self._deadline_has_come)
        else:
            self._deadline_has_come()

    def end_grace(self) -> None:
        """SIGKILL the job's tree now; a stop command that runs may take until the deadline."""
        if self._tree is not None and not self._tree_is_gone:
            self._kill(self._tree)

    def freeze(self) -> None:
        """Stop the whole tree, and say so when nothing of it runs; said twice it is looked at once."""
        if self._tree is None or not self._is_started or self._tree_is_gone or self._deadline_s is not None:
            return  # a notice is to be heard
        if not self._is_to_freeze:
            self._is_to_freeze = True
            self._freeze_on(FREEZE_AGAIN_S)

    def thaw(self) -> None:
        """Let the tree run again."""
        if not self._is_to_freeze:
            return
        self._is_to_freeze = False
        if self._freeze_timer is not None:
            self._freeze_timer.cancel()
            self._freeze_timer = None
        if self._tree is not None and not self._tree_is_gone:
            self._tree.thaw()
            self._say_last("thawed", of=_FROZEN_OR_THAWED)

    def _freeze_on(self, wait_s: float) -> None:
        """Stop what runs, and look again until nothing does: a process may be in the kernel, or fork."""
        self._freeze_timer = None
        if self._tree is None or self._tree_is_gone:
            return
        self._tree.freeze()
        if self._tree.is_frozen():
            self._say_last("frozen", of=_FROZEN_OR_THAWED)
            return
        self._tree.help_freeze()
        again_s = min(2.0 * wait_s, FREEZE_AGAIN_S_MAX)
        self._freeze_timer = self._shop.loop.call_after(wait_s, lambda: self._freeze_on(again_s))

    # What the tree says ------------------------------------------------------------------------

    def has_started(self, pid: int, start_ticks: int) -> None:
        """The program runs; a stop that waited for it goes on."""
        if self._failure is not None:
            return  # it waited for a program that will not come
        self._is_started = True
        self._say("started", pid=pid, pid_start_ticks=start_ticks)
        if self._deadline_s is not None and self._tree is not None:
            self._give_notice(self._tree)
        else:
            self._notice_timer = self._shop.loop.call_after(NOTICE_AHEAD_S, self._prepare_notice)

    def has_failed_to_start(self, what: str, number: int, message: str) -> None:
        """There is no process, or there will be none in a moment: then it is said."""
        if self._failure is not None:
            return  # the first one counts
        if what == "command":
            message = f"{self._command[0]}: {message}"
        elif what == "working_directory":
            message = f"{self._working_directory or 'the job directory'}: {message}"
        self._failure = {"what": what, "errno": number, "message": message}

    def main_has_exited(self, status: int) -> None:
        """The first process ended; its exit is the attempt's."""
        if self._is_started:
            self._exit_status = status

    def rest_remains(self) -> None:
        """The first process ended and others did not; without a stop they have no time of their own."""
        if not self._signalled and self._tree is not None:
            self._kill(self._tree)

    def is_empty(self) -> None:
        """The job's tree is gone."""
        self._tree_is_gone = True
        if self._stop_tree is None:
            self._finish()

    def stop_command_is_over(self) -> None:
        """The stop command's tree is gone."""
        self._stop_tree = None
        if self._tree_is_gone:
            self._finish()

    def kill_stop_command(self) -> None:
        """SIGKILL the stop command's tree."""
        if self._stop_tree is not None:
            self._kill(self._stop_tree)

    def write_log_line(self, text: str) -> None:
        """Tell the job's owner something in the job's log, after all that was written until now."""
        if self._output_fd >= 0:
            self._drain()
        if self._log is not None:
            self._log.write(f"wattshift: {text}\n".encode("utf-8", "replace"))

    # Stopping ----------------------------------------------------------------------------------

    def _prepare_notice(self) -> None:
        """Do ahead what can be done of a notice: a job of higher rank will wait for it."""
        self._notice_timer = None
        files = self._files
        if files is not None and not self._tree_is_gone and not self._signalled:
            files.prepare_notice()
            try:
                self._watch_acknowledgement(files)
            except OSError:
                pass  # the notice tries again, and says so

    def _give_notice(self, tree: Tree) -> None:
        files = self._files
        assert files is not None
        try:
            if not self._signalled:
                # Watched before an older one is removed, so that none slips through between.
                if self._ack_watch < 0:
                    self._watch_acknowledgement(files)
                files.remove_acknowledgement()
            files.write_notice(self._notice)
        except OSError as error:
            log(f"{self.key}: no notice file: {error}")
        if self._signalled:
            return
        self._signalled = True
        self.thaw()  # it can't answer while it is frozen
        tree.terminate()
        self._say("signalled")
        if self._stop_command:
            self._run_stop_command()

    def _run_stop_command(self) -> None:
        shop = self._shop
        try:
            tree = shop.containment.tree(shop.loop, StopTree(self))
            if not tree.is_over:
                self._stop_tree = tree
                tree.load(self._program(self._stop_command), self._output_write_fd)
                tree.go({})
        except OSError as error:
            self.write_log_line(f"the stop command did not start: {error}")
            self.kill_stop_command()
        self._close_output_writer()

    def look_for_acknowledgement(self) -> None:
        """Events were lost: look whether one of them was the acknowledgement."""
        if self._ack_watch >= 0:
            self._attempt_directory_changed(b"ack")

    def _watch_acknowledgement(self, files: AttemptFiles) -> None:
        self._ack_watch = self._shop.watch(files.attempt_fd, _ACK_EVENTS, self._attempt_directory_changed)

    def _attempt_directory_changed(self, name: bytes) -> None:
        if name != b"ack" or not self._signalled or self._tree is None or self._tree_is_gone:
            return
        # One of before the notice was removed; that it came may be read only now.
        if self._files is not None and self._files.has_acknowledgement():
            self._unwatch_ack()
            self._say("acknowledged")
            self._kill(self._tree)

    def _deadline_has_come(self) -> None:
        self.kill_stop_command()
        self.end_grace()

    def _kill(self, tree: Tree) -> None:
        if tree not in self._killed:
            self._killed.append(tree)
        if self._kill_timer is None:
            self._kill_timer = self._shop.loop.call_after(STUCK_S, self._is_stuck)
        tree.kill()

    def _is_stuck(self) -> None:
        self._kill_timer = None
        stuck = [tree for tree in self._killed if not tree.is_over]
        if stuck and not self._said_stuck:
            self._said_stuck = True
            self._say("tree_stuck", pids=[pid for tree in stuck for pid in tree.stuck_pids()])
        for tree in stuck:
            self._kill(tree)

    # Output ------------------------------------------------------------------------------------

    def _pump(self) -> None:
        if self._pump_piece():
            return
        self._shop.loop.unwatch(self._output_fd)
        os.close(self._output_fd)
        self._output_fd = -1

    def _pump_piece(self) -> bool:
        """Move one piece of output into the log; False at its end."""
        try:
            piece = os.read(self._output_fd, _PIECE_BYTES)
        except BlockingIOError:
            return True
        if piece and self._log is not None:
            self._log.write(piece)
        return bool(piece)

    def _drain(self) -> None:
        """Move what is in the pipe.

        When the tree is gone this is all. The pipe's end is not waited for: somebody outside of the tree may
        have been handed the other end.
        """
        for _ in range(_DRAIN_PIECES_MAX):
            try:
                piece = os.read(self._output_fd, _PIECE_BYTES)
            except BlockingIOError:
                break
            if not piece:
                break
            if self._log is not None:
                self._log.write(piece)

    def _close_output_writer(self) -> None:
        if self._output_write_fd >= 0:
            os.close(self._output_write_fd)
            self._output_write_fd = -1

    # Checkpoints -------------------------------------------------------------------------------

    def _watch_checkpoints(self, files: AttemptFiles) -> None:
        try:
            self._checkpoint_watch = self._shop.watch(
                files.checkpoint_fd, _CHECKPOINT_EVENTS, self._checkpoint_directory_changed
            )
        except OSError as error:
            # Not worth a job: its checkpoints can still be reported by RPC.
            log(f"{self.key}: the checkpoint directory is not watched: {error}")
        files.close_checkpoints()

    def _checkpoint_directory_changed(self, name: bytes) -> None:
        if name != CHECKPOINT_MARK:
            return
        if self._checkpoint_timer is not None:
            self._checkpoint_waits = True
            return
        self._say_checkpoint()

    def _say_checkpoint(self) -> None:
        self._checkpoint_waits = False
        self._say_last("checkpoint_saved", of=("checkpoint_saved",))
        self._checkpoint_timer = self._shop.loop.call_after(CHECKPOINT_REPORTS_S, self._checkpoint_pause_over)

    def _checkpoint_pause_over(self) -> None:
        self._checkpoint_timer = None
        if self._checkpoint_waits:
            self._say_checkpoint()

    # Shared ------------------------------------------------------------------------------------

    def _program(self, command: list[str]) -> Program:
        return Program(command, self._environment, self._working_directory, self.key[0])

    def _unwatch_ack(self) -> None:
        self._shop.unwatch(self._ack_watch, self._attempt_directory_changed)
        self._ack_watch = -1

    def _say_last(self, kind: str, of: tuple[str, ...]) -> None:
        """Say what makes the earlier ones of these needless to a daemon that returns."""
        self.reports = [report for report in self.reports if report["report"] not in of]
        self._say(kind)

    def _say(self, kind: str, **fields: object) -> None:
        report = {
            "report": kind,
            "job_id": self.key[0],
            "attempt": self.key[1],
            "at_s": time.time(),
            **fields,
        }
        self.reports.append(report)
        if self.is_ordered:
            self._report(report)

    def _finish(self) -> None:
        """Nothing is left: let go of everything but what a daemon may ask for, then say so."""
        shop = self._shop
        if self.is_over:
            return
        self.is_over = True
        self._close_output_writer()
        if self._output_fd >= 0:
            self._drain()
            if self._tree is not None:
                shop.loop.unwatch(self._output_fd)
            os.close(self._output_fd)
            self._output_fd = -1
        for timer in (
            self._deadline_timer,
            self._kill_timer,
            self._checkpoint_timer,
            self._freeze_timer,
            self._notice_timer,
        ):
            if timer is not None:
                timer.cancel()
        if self._checkpoint_waits:
            self._say_checkpoint()
            if self._checkpoint_timer is not None:
                self._checkpoint_timer.cancel()
        self._unwatch_ack()
        shop.unwatch(self._checkpoint_watch, self._checkpoint_directory_changed)
        if self._log is not None:
            self._log.close()
            if self._log.dropped_bytes:
                log(f"{self.key}: {self._log.dropped_bytes} bytes of output could not be written")
        if self._files is not None:
            self._files.close()
        self._environment = {}
        self._tree = None
        self._killed = []
        if self._failure is not None:
            self._say("start_failed", **self._failure)
        elif self._exit_status is not None:
            code = os.waitstatus_to_exitcode(self._exit_status)
            self._say("exited", exit_code=code if code >= 0 else None, signal=-code if code < 0 else None)
        self._over()
