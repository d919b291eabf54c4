"""What the site draws, second by second, in the journal; and what it would go on drawing, were nothing shed.

A second in which not every board was read is missing there: nothing is made up for it. A minute is written
at a time, ten seconds while a grid event is in force, so `kill -9` loses no more than that.
"""

from collections import deque
from typing import TYPE_CHECKING

from scheduler.model.actions import WAIT_REASONS
from scheduler.model.gpus import GpuIdentity
from scheduler.model.jobs import job_id
from scheduler.model.power import GRID_EVENT_REPORTED_S, Baseline, BaselineJob, GridEvent
from scheduler.model.power_events import DrawRecorded, GridEventDelayed
from scheduler.model.reasons import Reason

if TYPE_CHECKING:
    from scheduler.control.loop import Controller
    from scheduler.control.power import PowerControl

PERIOD_S = 60.0
EVENT_PERIOD_S = 10.0
# A board counts in the baseline with its mean over so long.
BASELINE_S = 60.0
# Readings further apart than this are in separate records, with nothing between them.
GAP_S_MAX = 60
# Jobs that are named as delayed by one event.
DELAYED_MAX = 1000
_WAITS_FOR_POWER = WAIT_REASONS.index(Reason.WAITING_FOR_POWER)

_Round = tuple[float, tuple[GpuIdentity, ...], list[float | None]]


class DrawLog:
    """The seconds that are not written yet, and the boards' last minute."""

    def __init__(self, controller: "Controller", power: "PowerControl") -> None:
        self._control = controller
        self._power = power
        self._seconds: dict[int, tuple[float, int]] = {}  # sum and count of the readings in each
        self._staged: dict[int, tuple[float, int]] = {}  # in a tick that may yet be undone
        self._rounds: deque[_Round] = deque()
        self._written_s = 0.0
        self._delayed: dict[str, set[int]] = {}  # numbers of jobs, by event

    def read(self, draw_w: float | None, now_s: float) -> None:
        """Take what a round of readings says of the whole site; None: a board has no fresh one."""
        if not self._control.ledger.touched:
            self._staged = {}  # the tick that wrote them is over
        board = self._control.board
        samples = (board.samples.get(gpu.uuid) for gpu in board.identities)
        watts = [sample.power_w if sample is not None else None for sample in samples]
        self._rounds.append((now_s, board.identities, watts))
        while not now_s - BASELINE_S < self._rounds[0][0] <= now_s:  # a clock that was set back says nothing
            self._rounds.popleft()
        second = int(now_s)
        if self._seconds:
            last = next(reversed(self._seconds))
            if not last <= second <= last + GAP_S_MAX:
                self.write(now_s)
        if draw_w is not None:
            sum_w, count = self._seconds.get(second, (0.0, 0))
            self._seconds[second] = sum_w + draw_w, count + 1
        in_force = [event for event in self._control.ledger.power.events if _is_shed(event, now_s)]
        if in_force:
            self._note_delayed(min(in_force, key=lambda event: (event.budget_w, event.id)), now_s)
        if not 0.0 <= now_s - self._written_s < (EVENT_PERIOD_S if in_force else PERIOD_S):
            self.write(now_s)

    def unwritten(self, now_s: float) -> DrawRecorded | None:
        """What is not written yet; None where nothing is."""
        if not self._seconds:
            return None
        first, last = next(iter(self._seconds)), next(reversed(self._seconds))
        means = {second: round(sum_w / count, 1) for second, (sum_w, count) in self._seconds.items()}
        draw_w = tuple(means.get(second) for second in range(first, last + 1))
        # What a daemon has seen for a moment only is no trial of the method.
        has_seen = now_s - self._rounds[0][0] >= BASELINE_S / 2
        return DrawRecorded(now_s, first, draw_w, self.baseline(now_s).site_w if has_seen else None)

    def write(self, now_s: float) -> None:
        """Put what is not written yet into the ledger's transaction."""
        recorded = self.unwritten(now_s)
        if recorded is None:
            return
        self._control.ledger.apply(recorded)
        self._staged |= self._seconds
        self._seconds = {}
        self._written_s = now_s

    def undo(self) -> None:
        """The tick was not kept: what it wrote is yet to be written."""
        self._seconds = self._staged | self._seconds
        self._staged = {}
        self._written_s = 0.0
        self._delayed = {}

    def baseline(self, now_s: float) -> Baseline:
        """What the site would go on drawing from now on."""
        control, config = self._control, self._control.config.power
        board, (means, unmeasured) = control.board, self._means()
        jobs, held = [], set[str]()
        for job in sorted(control.ledger.live_jobs(), key=lambda job: job.number):
            gpus = job.attempts[-1].gpus
            if gpus:
                held.update(gpus)
                parts = [self._part_w(uuid, job.spec.gpu_share_milli, means.get(uuid)) for uuid in gpus]
                known = [part for part in parts if part is not None]
                is_known = len(known) == len(parts) and unmeasured.isdisjoint(gpus)
                draw_w = round(sum(known), 1) if is_known else None
                jobs.append(BaselineJob(job.id, job.spec.job_class.name, gpus, draw_w))
        boards_w = [means[gpu.uuid] for gpu in board.identities if gpu.uuid in means]
        is_whole = len(boards_w) == len(board.identities) > 0
        return Baseline(
            now_s,
            round(self._power.site_w(sum(boards_w)), 1) if is_whole else None,
            tuple(jobs),
            round(sum(watts for uuid, watts in means.items() if uuid not in held), 1),
            config.base_w,
            config.pue,
            {gpu.uuid: self._power.limits.in_force_w(gpu) for gpu in board.identities},
            control.ledger.pending,
        )

    def _means(self) -> tuple[dict[str, float], set[str]]:
        """What each board drew in the last minute, or since who holds it now came.

        And the boards that were not read since then: they count with what they drew before. A board that the
        driver has lost counts as idle.
        """
        board = self._control.board
        before: dict[str, list[float]] = {}
        since: dict[str, list[float]] = {}
        came_s = {
            gpu.uuid: max((job.attempts[-1].decided_s for job in board.holders(gpu.uuid)), default=0.0)
            for gpu in board.identities
        }
        for at_s, identities, draws_w in self._rounds:
            for gpu, watts in zip(identities, draws_w, strict=True):
                if watts is not None:
                    found = since if at_s > came_s.get(gpu.uuid, 0.0) else before
                    found.setdefault(gpu.uuid, []).append(watts)
        means = {uuid: sum(draws_w) / len(draws_w) for uuid, draws_w in (before | since).items()}
        absent = {gpu.uuid: gpu for gpu in board.identities if not board.is_present(gpu.uuid)}
        means |= {uuid: self._power.idle.of(gpu) for uuid, gpu in absent.items()}
        return means, set(means) - set(since)

    def _part_w(self, uuid: str, share_milli: int, board_w: float | None) -> float | None:
        """What a holder has of its board's draw: by its share of what is held."""
        held_milli = sum(job.spec.gpu_share_milli for job in self._control.board.holders(uuid))
        return None if board_w is None else board_w * share_milli / max(held_milli, share_milli, 1)

    def _note_delayed(self, event: GridEvent, now_s: float) -> None:
        """Name the jobs that wait for power while it is in force, each once."""
        plan = self._control.last_plan
        if plan is None:
            return
        known = self._delayed.setdefault(event.id, set())
        numbers = plan.waits.numbers[plan.waits.reasons == _WAITS_FOR_POWER].tolist()
        fresh = [number for number in numbers if number not in known][: DELAYED_MAX - len(known)]
        if fresh:
            known.update(fresh)
            ids = tuple(map(job_id, fresh))
            self._control.ledger.apply(GridEventDelayed(now_s, event.id, ids))


def _is_shed(event: GridEvent, now_s: float) -> bool:
    """Whether its shed is reported now."""
    began_s = event.shed_began_s
    return event.binds and began_s is not None and now_s - began_s < GRID_EVENT_REPORTED_S
