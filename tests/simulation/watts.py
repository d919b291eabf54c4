"""R6 on the boards themselves: what they may draw fits the budget; a shed is met when the watts are down."""

from typing import TYPE_CHECKING

from scheduler.model.jobs import JobState
from scheduler.model.power import GridEvent, ShedState
from tests.simulation.watching import Watch

if TYPE_CHECKING:
    from tests.simulation.world import World

# Plans count whole watts of each board, and idle draw in steps of five.
ROUNDING_W = 6.0
# Measured draw may be this much above what was planned: boards are read in tenths of a watt.
SENSOR_W = 1.0


class Watts(Watch):
    """Watches what boards may draw, and what they do."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self._states: dict[str, ShedState] = {}
        self._deaf_s: dict[str, float] = {}  # by GPU: until when it took no limit, and said so or not

    def budget_w(self) -> float | None:
        """What the site may draw now, by the journal; None where nobody has said."""
        daemon = self._world.daemon
        now_s, power = self._world.clock.now_s(), daemon.controller.ledger.power
        said = [] if daemon.config.power.budget_w is None else [daemon.config.power.budget_w]
        lost_s = power.budget_valid_until_s
        if lost_s is None or now_s < lost_s:
            said += [
                one.budget_w
                for one in power.budget
                if one.start_s <= now_s and (one.end_s is None or now_s < one.end_s)
            ]
        said += [event.budget_w for event in power.events if _is_on(event, now_s)]
        return min(said, default=None)

    def has_budget(self) -> bool:
        """Whether there is anything for which somebody might have to be stopped."""
        return self._world.daemon.controller.power.is_active

    def had_emergency(self, at_s: float) -> bool:
        """Whether a grid emergency was in force then, though it may be cancelled by now."""
        return any(
            event.emergency
            and (event.start_s if event.shed_began_s is None else event.shed_began_s) <= at_s < event.end_s
            and (event.ended_s is None or at_s <= event.ended_s)
            for event in self._world.daemon.controller.ledger.power.events
        )

    def before_more(self, what: str, uuids: tuple[str, ...] = ()) -> None:
        """Something is about to draw more: a job starts on these GPUs, or a limit has been raised.

        What is occupied may draw up to its real limit. Strangers are not ours to keep down: they count with
        what was read of them, and who has come since then is not known yet.
        """
        world = self._world
        if not world.daemon.serves or self._is_deceived() or (budget_w := self.budget_w()) is None:
            return
        held = {uuid for job in world.daemon.controller.ledger.live_jobs() for uuid in job.attempts[-1].gpus}
        awake = {
            uuid
            for job in world.daemon.controller.ledger.live_jobs()
            if job.state is not JobState.SUSPENDED or job.attempts[-1].suspend_s is None
            for uuid in job.attempts[-1].gpus
        }
        frozen = held - awake
        known = world.daemon.controller.board.row  # one that was lost before the daemon's start is in no plan
        boards = {uuid: board for uuid, board in world.machine.boards.items() if uuid in known}
        read, strangers = world.faults.read, set(world.machine.strangers.values())
        seen_w = {uuid: read[uuid].power_w for uuid in strangers if uuid in read}
        may_w = sum(
            board.power_limit_w
            if (uuid in held and uuid not in frozen) or uuid in uuids
            # idle, or what a frozen job's context takes
            else min(board.target_w, seen_w.get(uuid, board.target_w))
            for uuid, board in boards.items()
        )
        room_w = ROUNDING_W * len(boards)
        self._demand(
            may_w <= budget_w + room_w,
            f"{what}, and the boards may draw {may_w:.0f} W of {budget_w:.0f} W",
        )

    def takes_limits_again(self, uuid: str) -> None:
        """From the next reading on the daemon can know which limit the board really has."""
        self._deaf_s[uuid] = self._now_s()

    def _is_deceived(self) -> bool:
        faults = self._world.faults
        unread = (
            uuid not in faults.read or faults.read[uuid].at_s <= until_s
            for uuid, until_s in self._deaf_s.items()
        )
        return bool(faults.deaf) or any(unread)

    def hold(self) -> None:
        """A shed is met when the watts are down, and not when an order was given."""
        world = self._world
        for event in world.daemon.controller.ledger.power.events:
            before = self._states.get(event.id)
            self._states[event.id] = event.state
            if event.state is ShedState.MET and before is not ShedState.MET and not world.faults.lost:
                drawn_w = self.drawn_w()
                self._demand(
                    drawn_w <= event.budget_w + SENSOR_W,
                    f"{event.id} is met at {event.measured_w} W, and the boards draw {drawn_w:.0f} W",
                )

    def drawn_w(self) -> float:
        """What the boards draw now."""
        now_s = self._world.clock.true_s()
        return sum(board.sample(now_s).power_w or 0.0 for board in self._world.machine.boards.values())

    def are_kept(self) -> None:
        """At the end the draw is inside the budget, or nobody could be stopped for it any more."""
        world = self._world
        budget_w = self.budget_w()
        if budget_w is None or world.machine.strangers or (drawn_w := self.drawn_w()) <= budget_w + SENSOR_W:
            return
        now_s = world.clock.now_s()
        for job in world.daemon.controller.ledger.live_jobs():
            last = job.attempts[-1]
            if last.gpus and job.spec.preemptible and job.state is JobState.RUNNING:
                assert last.started_s is not None
                may_stop = now_s - last.started_s >= job.spec.min_runtime_s
                self._demand(
                    not may_stop, f"{drawn_w:.0f} W are drawn of {budget_w:.0f} W, and {job.id} runs on"
                )


def _is_on(event: GridEvent, now_s: float) -> bool:
    begins_s = event.start_s if event.shed_began_s is None else event.shed_began_s
    return event.binds and begins_s <= now_s < event.end_s
