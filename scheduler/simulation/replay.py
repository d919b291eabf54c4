"""A workload under the real loop in virtual time: jobs come when their rows say, until nothing can change.

A victim stops as soon as it is signalled: its grace bounds what it may take, and a trace does not know what
it would. The files say how long things take, so that no start and no commit takes time besides.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from scheduler.control.board import NodeSize
from scheduler.control.inbox import Item, Submission, Submit
from scheduler.control.loop import Controller
from scheduler.control.pace import Pace
from scheduler.model.jobs import JobSpec, JobState, RestartRule
from scheduler.model.policy import CLASS_DEFAULTS, Policy
from scheduler.model.power import curve_of
from scheduler.model.settings import (
    MICROUSD_PER_USD,
    Config,
    JobsConfig,
    MiningConfig,
    OperatingPoint,
    PowerConfig,
    SamplingConfig,
    StateConfig,
)
from scheduler.simulation.boards import PROCESS_MEMORY_MIB, RESERVE_MIB, Board, Profile, boards
from scheduler.simulation.daemon import SimulatedDaemon
from scheduler.simulation.inputs import EventRow, JobRow, JobStore, NodeRow, PriceRow
from scheduler.simulation.machine import Machine, Workload
from scheduler.simulation.record import Changes, Progress, Recorder
from scheduler.simulation.signals import Signals, look
from scheduler.simulation.site import Site, budget_steps, price_steps
from scheduler.simulation.virtual_time import EPOCH_S, VirtualClock, VirtualLoop, run

# Nothing of a plan hangs on how often boards are read; what they use is booked as often.
SAMPLING_PERIOD_S = 6 * 3600.0
_PENDING_MAX = 100_000_000
_DAY_S = 86_400.0
# What a finished job leaves in the journal is of no use here.
_STATE = StateConfig(
    finished_jobs_kept_s=600.0,
    finished_jobs_kept_max=10_000,
    journal_segment_events_max=20_000,
    journal_segments_kept_max=1,
    free_mib_min=1,
)
# Submissions of one moment that go in one command.
_SUBMISSIONS_AT_ONCE = 500
_SM_CLOCK_MHZ = 1500
# Memory as a disk, so that a commit costs no seek.
_MEMORY = Path("/dev/shm")


# Under a limit work slows down in proportion to the draw, unless a policy names a curve.
IN_PROPORTION = ((1.0, 1.0), (0.01, 0.01))
CLASSES = {
    job_class: replace(defaults, power_curve=IN_PROPORTION) for job_class, defaults in CLASS_DEFAULTS.items()
}


class OneTickAMoment(Pace):
    """All that happens in one moment is known to one tick, so that no order within it decides anything."""

    def linger_s(self, item: Item, *, awaits_exits: bool = False) -> float:
        del item, awaits_exits
        return 0.0

    def schedule(self, tick: Callable[[], None], item: Item | None) -> asyncio.Handle:
        del item
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return loop.call_when_quiet(tick)


@dataclass(frozen=True, slots=True)
class World:
    """What is replayed."""

    nodes: tuple[NodeRow, ...]
    prices: tuple[PriceRow, ...] = ()
    events: tuple[EventRow, ...] = ()
    policy: Policy = Policy(classes=CLASSES)  # noqa: RUF009 (frozen)
    power: PowerConfig = PowerConfig()  # noqa: RUF009 (frozen); its base_w is the nodes'
    until_s: float | None = None  # None = until no job can change any more


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    end_s: float
    record: Recorder
    refusals: tuple[str, ...]  # grid events that the daemon did not take on


def replay(
    world: World, jobs: JobStore, folder: Path, on_progress: Callable[[Progress], None] = lambda _: None
) -> Outcome:
    """Replay the jobs on the nodes; attempts.csv and timeline.csv are written into the folder."""
    directory = str(_MEMORY) if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="wattshift-journal-", dir=directory) as state:
        return run(_Replay(world, jobs, folder, on_progress).run(Path(state)))


class _Replay:
    """One replay."""

    def __init__(
        self, world: World, jobs: JobStore, folder: Path, on_progress: Callable[[Progress], None]
    ) -> None:
        self._world = world
        self._jobs = jobs
        self._folder = folder
        self._on_progress = on_progress
        self._workloads: dict[str, Workload] = {}  # by job id, of those that are not final
        self._all_submitted = False
        self._signals = Signals(world.prices, world.events, EPOCH_S)

    async def run(self, state_dir: Path) -> Outcome:
        """Replay until the end."""
        world = self._world
        machine = Machine(_boards(world.nodes), VirtualClock(EPOCH_S), self._workloads.__getitem__)
        power = replace(world.power, base_w=sum(node.base_w for node in world.nodes), price_source="")
        config = Config(
            policy=world.policy,
            power=power,
            # [mining] is no input of a simulation; and of work that falls in proportion no point is better.
            mining=MiningConfig(operating_point=OperatingPoint.FULL),
            state=_STATE,
            jobs=JobsConfig(pending_max=_PENDING_MAX),
            sampling=SamplingConfig(SAMPLING_PERIOD_S, _DAY_S),
        )
        live_jobs_max = world.policy.live_jobs_max
        sizes = tuple(NodeSize(node.cpus_milli, node.memory_mib, live_jobs_max) for node in world.nodes)
        # The journal is thrown away, and so is what its decisions could be made again from.
        daemon = SimulatedDaemon(machine, state_dir, config, sizes, keeps_decisions=False)
        budgets = budget_steps(world.events, power.budget_w)
        site = Site(price_steps(world.prices), budgets, world.events, power.base_w, power.pue)
        names = [node.node_id for node in world.nodes]
        record = Recorder(machine, site, names, self._folder, self._on_progress)
        daemon.launcher.start_s = 0.0
        try:
            await daemon.start()
            daemon.controller.pace = OneTickAMoment()
            # A replay has no readings between one change and the next that would tell.
            daemon.controller.power.idle.declare(
                {uuid: board.profile.idle_w for uuid, board in daemon.machine.boards.items()}
            )
            await self._until_over(daemon, record)
            record.finish()
            end_s = asyncio.get_running_loop().time()
            assert not daemon.controller.meters.tick_failures, "a tick failed; the log says why"
            daemon.stop()
        finally:
            record.close()
        return Outcome(end_s, record, tuple(self._signals.refusals))

    async def _until_over(self, daemon: SimulatedDaemon, record: Recorder) -> None:
        watchers = daemon.controller.watchers
        watchers.join(Changes(record.see))
        ticked = watchers.watch_node()
        signals = self._signals
        tasks = [
            asyncio.ensure_future(work)
            for work in (
                signals.tell_events(daemon),
                signals.tell_prices(daemon),
                self._feed(daemon, record, ticked),
                self._over(daemon, ticked),
                look(daemon, daemon.machine, record.moved),
                record.sample(),
            )
        ]
        loop = asyncio.get_running_loop()
        until_s = self._world.until_s
        left_s = None if until_s is None else until_s - loop.time()
        *to_end, _, _ = tasks
        try:
            done, _ = await asyncio.wait(to_end, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _feed(self, daemon: SimulatedDaemon, record: Recorder, ticked: asyncio.Event) -> None:
        """Submit every job at its time."""
        loop = asyncio.get_running_loop()
        batch: list[JobRow] = []
        for row in self._jobs:
            if batch and (row.submit_s > batch[0].submit_s or len(batch) == _SUBMISSIONS_AT_ONCE):
                await self._submit(daemon, record, batch)
                batch = []
            if row.submit_s > loop.time():
                await asyncio.sleep(row.submit_s - loop.time())
            batch.append(row)
        if batch:
            await self._submit(daemon, record, batch)
        self._all_submitted = True
        ticked.set()

    async def _submit(self, daemon: SimulatedDaemon, record: Recorder, rows: list[JobRow]) -> None:
        submissions = []
        for row in rows:
            record.announce(row)
            submissions.append(Submission(_spec(row, self._world.policy), {}))
        for row, job in zip(rows, await daemon.ask(Submit(tuple(submissions))), strict=True):
            self._workloads[job.id] = _workload(row, self._world.policy)

    async def _over(self, daemon: SimulatedDaemon, ticked: asyncio.Event) -> None:
        """Come back when no job can change any more."""
        while not self._is_over(daemon.controller, daemon.machine):
            await ticked.wait()
            ticked.clear()

    def _is_over(self, control: Controller, machine: Machine) -> bool:
        """Whether nothing is under way, nobody ends by himself, and time alone changes no plan."""
        if not self._all_submitted:
            return False
        jobs = control.ledger.jobs
        if not jobs:
            return True
        if not self._signals.is_over or asyncio.get_running_loop().time() < self._signals.last_s:
            return False
        if len(control.inbox) or not machine.is_endless or control.board.occupants():
            return False
        if control.ledger.power.returned_from_w is not None:
            return False
        if any(job.state not in (JobState.PENDING, JobState.RUNNING) for job in jobs.values()):
            return False
        return control.last_plan is None or control.last_plan.wake_us is None


def _boards(nodes: Iterable[NodeRow]) -> dict[str, Board]:
    """All nodes' boards: what jobs may book of one is its memory less the driver's reserve."""
    found: dict[str, Board] = {}
    for row, node in enumerate(nodes):
        profile = Profile(
            model=node.gpu_model,
            memory_mib=node.gpu_memory_mib + RESERVE_MIB,
            idle_w=node.gpu_idle_w,
            power_limit_w_min=node.gpu_power_limit_w_min,
            power_limit_w_max=node.gpu_power_limit_w_max,
            sm_clock_mhz=_SM_CLOCK_MHZ,
        )
        found |= boards([profile] * node.gpus, node.node_id, EPOCH_S, row)
    return found


def _spec(row: JobRow, policy: Policy) -> JobSpec:
    """The row as a client's submission: what it does not say is its class's."""
    said = policy.classes[row.job_class]

    def default(value: float | None, other: float) -> float:
        return other if value is None else value

    return JobSpec(
        name=row.job_id,
        command=("simulated",),
        job_class=row.job_class,
        priority=row.priority,
        value_microusd_per_gpu_hour=round(
            default(row.value_usd_per_gpu_hour, said.value_usd_per_gpu_hour) * MICROUSD_PER_USD
        ),
        gpus=row.gpus,
        gpu_share_milli=row.gpu_share_milli,
        gpu_memory_mib=said.gpu_memory_mib if row.gpu_memory_mib is None else row.gpu_memory_mib,
        gpu_models=row.gpu_models,
        # Thousandths of CPUs, here and in the node's size: a plan only compares.
        cpus=said.cpus * 1000 if row.cpus_milli is None else row.cpus_milli,
        memory_mib=said.memory_mib if row.memory_mib is None else row.memory_mib,
        preemptible=said.preemptible if row.preemptible is None else row.preemptible,
        on_preempt=said.on_preempt,
        grace_s=default(row.grace_s, said.grace_s),
        min_runtime_s=default(row.min_runtime_s, said.min_runtime_s),
        restart_loss_s=default(row.restart_loss_s, said.restart_loss_s),
        exit_zero_is_done=True,  # only who has done all its work exits 0 here
        restart=RestartRule.NEVER,
        expected_duration_s=row.expected_s,
        deadline_s=None if row.deadline_s is None else EPOCH_S + row.deadline_s,
        draw_w=row.draw_w,
        tenant=row.tenant,
    )


def _workload(row: JobRow, policy: Policy) -> Workload:
    said = policy.classes[row.job_class]
    return Workload(
        duration_s=row.duration_s,
        restart_loss_s=said.restart_loss_s if row.restart_loss_s is None else row.restart_loss_s,
        draw_w=row.draw_w,
        memory_mib=row.gpu_memory_mib or PROCESS_MEMORY_MIB,
        share_milli=row.gpu_share_milli,
        # In proportion is exact; a curve is in thousandths.
        power_curve=None if said.power_curve == IN_PROPORTION else curve_of(said.power_curve),
    )
