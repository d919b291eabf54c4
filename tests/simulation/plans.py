"""What every plan must be: what the rules say, of the world as it is; and nothing to add once it is done."""

from typing import TYPE_CHECKING

from scheduler.control.loop import Controller
from scheduler.model.actions import Action, PreemptJob, SetPowerLimit
from scheduler.model.events import PlanDecided
from scheduler.model.gpus import GpuState
from scheduler.model.jobs import SHARE_MILLI_WHOLE, Job, JobState
from scheduler.model.policy import aged_priority
from scheduler.model.reasons import Reason
from scheduler.planning.planner import digest, plan
from tests.fakes.worlds import snapshot
from tests.properties.checking import check
from tests.simulation.opinion import world_of
from tests.simulation.watching import Watch

if TYPE_CHECKING:
    from tests.simulation.world import World

# Nothing takes longer once nothing goes wrong: a grace, a hand-over, a process that hangs in the driver.
UNDER_WAY_S = 100.0


class Plans(Watch):
    """Watches what the loop plans."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self._planned: object = None
        self._given: object = None  # the journal's head when it was seen that nothing is given twice

    def died(self) -> None:
        """The daemon that planned is no more."""
        self._planned = None

    def decided(self, controller: Controller, event: PlanDecided) -> None:
        """A decision is about to be written, and nothing of it is done: is it what the rules say?

        R8 always: from the world as it is, by other code, the same plan. R1 to R5 and R9 by exhaustive search
        where somebody has to give way.
        """
        world = world_of(controller, event.at_s)
        if world is None:
            return
        other = plan(snapshot(world), controller.config.policy)
        self._demand(
            digest(other) == event.plan_digest, f"from the world as it is another plan: {other.actions}"
        )
        if any(isinstance(action, PreemptJob) for action in other.actions):
            self._rules_hold(controller, event.at_s)

    def _rules_hold(self, controller: Controller, now_s: float) -> None:
        """R1 to R5 and R9 of what would be planned now, by exhaustive search."""
        world, policy = world_of(controller, now_s), controller.config.policy
        if world is None:
            return
        wrong = ""
        try:
            check(world, policy, plan(snapshot(world), policy))
        except AssertionError as error:
            wrong = str(error) or "an exhaustive search finds another answer"
        self._demand(not wrong, f"the plan breaks a rule: {wrong}")

    def hold(self) -> None:
        """R7: what was just planned and done leaves nothing to do."""
        controller = self._world.daemon.controller
        made = controller.last_plan
        if made is None or not made.actions or made is self._planned:
            return
        self._planned = made
        if controller.inbox or not controller.launcher_id or self._world.daemon.disk.fails:
            return  # nothing can be planned, or not all is known
        more = self._planned_again()
        self._demand(not more, f"planned again, there is more to do: {more}")

    def _planned_again(self) -> list[Action]:
        """What a plan would do now. Limits follow what is measured, so there is always more of them."""
        controller = self._world.daemon.controller
        again = plan(controller.board.snapshot(self._world.clock.now_s()), controller.config.policy)
        return [action for action in again.actions if not isinstance(action, SetPowerLimit)]

    # The end -------------------------------------------------------------------------------------

    def are_at_rest(self) -> None:
        """Faults are over for a good while: nothing is left to do, and who waits has to."""
        controller, now_s = self._world.daemon.controller, self._world.clock.now_s()
        more = self._planned_again()
        self._demand(not more, f"there is something to do: {more}")
        self._rules_hold(controller, now_s)
        self._nobody_waits_for_what_is_free()
        self._nobody_stopped_for_nothing()

    def _nobody_waits_for_what_is_free(self) -> None:
        """R4, in its simplest form: a job that waits, may start, and finds its GPUs free."""
        world, controller = self._world, self._world.daemon.controller
        ledger, now_s = controller.ledger, world.clock.now_s()
        views = {view.identity.uuid: view for view in controller.board.views(now_s)}
        free = [uuid for uuid, view in views.items() if view.state is GpuState.FREE]
        cpus = world.script.node["cpus"] - sum(job.spec.cpus for job in ledger.live_jobs())
        waiting = [
            job for job in ledger.jobs.values() if job.state is JobState.PENDING and job.eligible_s <= now_s
        ]
        for job in waiting:
            reason = controller.reason(job)
            if any(self.rank(other) < self.rank(job) for other in waiting):
                continue  # what is free may be kept for who ranks higher
            held_back = reason is Reason.WAITING_FOR_PROMISED_START
            self._demand(not held_back, f"{job.id} is held back for a higher rank, and nobody ranks higher")
            if (reason is Reason.WAITING_FOR_POWER and controller.power.is_active) or (
                reason is Reason.WAITING_FOR_PRICE and controller.prices.price is not None
            ):
                continue
            fits = len(free) >= job.spec.gpus and cpus >= job.spec.cpus
            self._demand(not fits, f"{job.id} waits ({reason}) and what it wants is free")

    def _nobody_stopped_for_nothing(self) -> None:
        """Whom somebody gave way to has started, is over, or does not wait for that any more."""
        ledger, now_s = self._world.daemon.controller.ledger, self._world.clock.now_s()
        for job in ledger.jobs.values():
            for attempt in job.attempts:
                over_s = attempt.exited_s
                preemptor = ledger.by_id(attempt.preempted_by) if attempt.preempted_by else None
                if preemptor is None or over_s is None or now_s - over_s <= UNDER_WAY_S:
                    continue
                waits = preemptor.state is JobState.PENDING and preemptor.state_since_s < over_s
                reason = self._world.daemon.controller.reason(preemptor)
                self._demand(
                    not (waits and reason is Reason.WAITING_FOR_HANDOVER) or self._anybody_left(now_s),
                    f"{job.id} gave way to {preemptor.id}, which waits for it for ever",
                )

    def _anybody_left(self, now_s: float) -> bool:
        """Whether somebody has ended lately: whoever waits for a hand-over may wait for that one."""
        jobs = self._world.daemon.controller.ledger.jobs.values()
        ends_s = (attempt.exited_s for job in jobs for attempt in job.attempts)
        return any(over_s is not None and now_s - over_s <= UNDER_WAY_S for over_s in ends_s)

    # Who goes before whom --------------------------------------------------------------------------

    def rank(self, job: Job) -> tuple[int, ...]:
        """The smaller, the higher."""
        policy = self._world.daemon.config.policy
        priority = aged_priority(job.spec.job_class, job.spec.priority, job.preemptions, policy)
        value = job.spec.value_microusd_per_gpu_hour
        return (int(job.spec.job_class), -priority, -value, job.number)

    def nothing_is_over_committed(self) -> None:
        """R1 and R2 of what is given to live jobs."""
        controller, node = self._world.daemon.controller, self._world.script.node
        given = (controller, controller.ledger.journal.head)
        if given == self._given:
            return
        self._given = given
        jobs = list(controller.ledger.live_jobs())
        for name in ("cpus", "memory_mib"):
            used = sum(getattr(job.spec, name) for job in jobs)
            self._demand(used <= node[name], f"{used} {name} are given out of {node[name]}")
        shares = dict.fromkeys(self._world.gpus, 0)
        for job in jobs:
            gpus = job.attempts[-1].gpus
            self._demand(len(set(gpus)) == job.spec.gpus, f"{job.id} wants {job.spec.gpus} GPUs, has {gpus}")
            for uuid in gpus:
                shares[uuid] += job.spec.gpu_share_milli
        for uuid, share in shares.items():
            self._demand(share <= SHARE_MILLI_WHOLE, f"{self._world.names((uuid,))} is given to {share}/1000")
