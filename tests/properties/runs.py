"""A world under a clock: plans are applied, jobs run, are displaced, requeued, and end."""

from dataclasses import replace

from scheduler.model.actions import PreemptJob, StartJob
from scheduler.model.jobs import JobClass
from scheduler.model.policy import Policy, aged_priority, backoff_s
from scheduler.planning.planner import plan
from tests.fakes.worlds import (
    PENDING,
    PREEMPTING,
    RUNNING,
    SECOND_US,
    STARTING,
    STOPPING,
    UNKNOWN,
    HandOver,
    J,
    Outcome,
    W,
    applied,
    outcome,
    snapshot,
)

ROUNDS_MAX = 400


class Run:
    """A world under a clock. A job needs `needs_us` of running in one piece; None = it never ends.

    What a job had of GPUs is verified free `handover_us` after its end.
    """

    def __init__(self, world: W, policy: Policy, needs_us: dict[int, int | None]) -> None:
        self.world = world
        self.policy = policy
        self.needs_us = needs_us
        self.priority = {job.number: job.priority for job in world.jobs}
        self.preempted = dict.fromkeys(self.priority, 0)
        self.by_own_class = dict.fromkeys(self.priority, 0)
        self.started_us: dict[int, int] = {}
        self.done: set[int] = set()
        self.wake_us: int | None = None
        self.handover_us = 0
        self.handovers: list[tuple[int, HandOver]] = []  # when it is verified, what it occupies until then
        self.made = Outcome()

    def submit(self, job: J, needs_us: int | None) -> None:
        self.world = self.world.with_jobs(job)
        self.needs_us[job.number] = needs_us
        self.priority[job.number] = job.priority
        self.preempted[job.number] = self.by_own_class[job.number] = 0

    def plan(self) -> int:
        """Plan and carry it out; returns how many actions there were."""
        made = self.made = outcome(plan(snapshot(self.world), self.policy))
        for action in made.actions:
            if isinstance(action, PreemptJob):
                self.preempted[action.job] += 1
                mine, other = self.world.job(action.job), self.world.job(action.preemptor)
                self.by_own_class[action.job] += mine.job_class == other.job_class
            if isinstance(action, StartJob):
                self.started_us.setdefault(action.job, self.world.now_us)
        self.world = applied(self.world, made)  # type: ignore[arg-type]
        self.wake_us = made.wake_us
        jobs = (
            replace(job, state=RUNNING, started_us=self.world.now_us) if job.state == STARTING else job
            for job in self.world.jobs
        )
        self.world = replace(self.world, jobs=tuple(jobs))
        return len(made.actions)

    def next_us(self) -> int | None:
        """When something happens by itself: a grace or a job ends, the plan wakes."""
        moments = [verified_us for verified_us, _ in self.handovers]
        if self.wake_us is not None:
            moments.append(self.wake_us)
        for job in self.world.jobs:
            if job.state in (PREEMPTING, STOPPING):
                moments.append(max(self.world.now_us, self.gone_us(job)))
            elif job.state == RUNNING and self.needs_us[job.number] is not None:
                moments.append(job.started_us + self.needs_us[job.number])
        return min(moments, default=None)

    def pass_to(self, now_us: int) -> None:
        """Let time pass: who was told to stop stops, who is done ends."""
        jobs = []
        for job in self.world.jobs:
            need_us = self.needs_us[job.number]
            if job.state in (PREEMPTING, STOPPING) and self.gone_us(job) <= now_us:
                self.hand_over(job, now_us)
                if job.state == PREEMPTING:
                    jobs.append(self.requeued(job, now_us))
            elif job.state == RUNNING and need_us is not None and job.started_us + need_us <= now_us:
                self.done.add(job.number)
                self.hand_over(job, now_us)
            else:
                jobs.append(job)
        self.handovers = [each for each in self.handovers if each[0] > now_us]
        occupied = tuple(over for _, over in self.handovers)
        self.world = replace(self.world, jobs=tuple(jobs), now_us=now_us, handovers=occupied)

    def gone_us(self, job: J) -> int:
        """When a job that was told to stop has ended."""
        return job.stop_us + job.grace_us

    def hand_over(self, job: J, now_us: int) -> None:
        """Its GPUs stay occupied until they are verified."""
        mib = job.gpu_memory_mib if job.share_milli < 1000 else 0
        for uuid in job.on if self.handover_us else ():
            over = HandOver(uuid, job.share_milli, mib, job.preemptor, job.stop_us)
            self.handovers.append((now_us + self.handover_us, over))

    def requeued(self, job: J, now_us: int) -> J:
        count = self.preempted[job.number]
        policy = self.policy
        wait_s = backoff_s(policy.preemption_backoff_s, policy.preemption_backoff_s_max, count - 1)
        priority = aged_priority(JobClass(job.job_class), self.priority[job.number], count, policy)
        return replace(
            job,
            state=PENDING,
            on=(),
            node=UNKNOWN,
            priority=priority,
            eligible_us=now_us + round(wait_s * SECOND_US),
            started_us=UNKNOWN,
            checkpoint_us=UNKNOWN,
            preemptor=UNKNOWN,
            stop_us=UNKNOWN,
        )

    def settle(self) -> int:
        """Go on until nothing happens any more; returns after how many rounds."""
        for rounds in range(ROUNDS_MAX):
            actions = self.plan()
            next_us = self.next_us()
            if next_us is None and not actions:
                return rounds
            self.pass_to(max(self.world.now_us, self.world.now_us if next_us is None else next_us))
        raise AssertionError(f"still turning after {ROUNDS_MAX} rounds: {self.preempted}")
