"""What happens in a fault run, drawn from its seed before it begins: jobs, wishes of operators, faults.

A script is data. The same script gives the same run, and one with fewer faults is a run with fewer faults:
so a failure can be told with the few that it takes.
"""

import math
import random
from dataclasses import dataclass, field, fields, replace
from typing import Any

from scheduler.model.jobs import JobClass, JobSpec, OnPreempt, RestartRule
from scheduler.simulation.machine import Workload
from scheduler.simulation.node import START_S
from scheduler.simulation.virtual_time import EPOCH_S
from tests.harness.values import SPEC

# Jobs and faults come in this time; a fault that lasts is over by the end of it.
FAULTS_S = 150.0
ARRIVALS_S = 120.0
# XIDs of each outcome of the table: counted, the job's own, a reset, a reboot, a person, an unknown one.
XIDS = (43, 45, 13, 31, 94, 48, 95, 119, 79, 54, 999)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, from `at_s` on."""

    kind: str
    at_s: float
    for_s: float = 0.0
    gpu: int = 0
    number: int = 0  # an XID, a count of steps, a seed of what is torn, milliseconds
    word: str = ""  # a code of NVML, the name of a step

    def __str__(self) -> str:
        said = [f"{self.at_s:.3f} s {self.kind}"]
        said += [f"for {self.for_s:.3f} s"] if self.for_s else []
        said += [f"GPU {self.gpu}"] if self.kind in GPU_KINDS else []
        said += [str(self.number)] if self.number else []
        return " ".join(said + ([self.word] if self.word else []))


@dataclass(frozen=True)
class Arrival:
    """A job and its client."""

    at_s: float
    spec: JobSpec
    workload: Workload
    gives_up_s: float = (
        1e9  # the client waits so long for an answer, then asks again with the same request_id
    )
    says_again: int = 0  # so often it asks again although it was answered

    def __str__(self) -> str:
        """The job, and what its process does other than most."""
        usual = {each.name: each.default for each in fields(Workload)} | {
            "stop_exit_code": self.workload.stop_exit_code
        }
        odd = [
            f"{name} {getattr(self.workload, name)}"
            for name in usual
            if getattr(self.workload, name) != usual[name]
        ]
        return f"{self.at_s:.3f} s {self.spec.name}: {', '.join(odd) or 'works until it is stopped'}"


@dataclass(frozen=True)
class Wish:
    """A command of an operator, the grid or the market; jobs and GPUs are named by their numbers."""

    at_s: float
    what: str
    target: int = 0  # a job, a GPU, watts
    lead_s: int = 0  # of a grid event: when it begins, from then
    for_s: float = 60.0  # how long what is asked for lasts

    def __str__(self) -> str:
        if self.what not in OF_WATTS:
            return f"{self.at_s:.3f} s {self.what} {self.target}"
        begins = f", begins in {self.lead_s} s" if self.lead_s else ""
        return f"{self.at_s:.3f} s {self.what} of {self.target} W for {self.for_s:g} s{begins}"


@dataclass(frozen=True)
class Expectation:
    """What must be so at a moment: of a job, a GPU or all jobs of a class; the facts by their names."""

    at_s: float
    job: str = ""
    gpu: int | None = None
    job_class: str = ""
    facts: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Script:
    """A run, from its first moment to its last."""

    seed: int
    gpus: int
    arrivals: tuple[Arrival, ...]
    wishes: tuple[Wish, ...] = ()
    faults: tuple[Fault, ...] = ()
    miners: bool = False  # a standing job fills what is idle
    miners_freeze: bool = False  # a shed freezes them rather than stop them
    gives_verdicts: bool = True  # the driver tells recovery actions
    sampling_s: float = 1.0
    start_s: float = START_S  # from the order to the program's first line
    pids: int = 0  # the kernel has only so many; 0 = as many as it likes
    budget_w: float | None = None  # by configuration
    node: dict[str, int] = field(default_factory=lambda: {"cpus": 64, "memory_mib": 512_000})
    faults_s: float = FAULTS_S  # until then jobs come and things go wrong
    expectations: tuple[Expectation, ...] = ()

    def __str__(self) -> str:
        """The place, in words."""
        said = [f"{self.gpus} GPUs, read each {self.sampling_s:g} s, starts take {self.start_s:g} s"]
        freeze = " that may be frozen" if self.miners_freeze else ""
        said += [f"miners{freeze} on idle GPUs"] if self.miners else []
        said += [] if self.budget_w is None else [f"a budget of {self.budget_w:g} W"]
        said += [f"{self.pids} PIDs"] if self.pids else []
        return ", ".join(said)


def drawn(seed: int) -> Script:
    """The script of a seed."""
    chance = random.Random(seed)
    gpus = chance.choice((1, 2, 3, 4))
    rates = {kind: chance.choice(_RATES) for kind in KINDS if kind not in LATER_KINDS}
    behaves = {kind: chance.choice((0.0, 0.0, 0.2, 0.5)) for kind in BEHAVIOURS}
    count = chance.randint(6, 16)
    arrivals = sorted((_arrival(chance, n, gpus, behaves) for n in range(count)), key=lambda a: a.at_s)
    faults = [_fault(chance, kind, gpus) for kind, rate in rates.items() for _ in range(rate)]
    script = Script(
        seed=seed,
        gpus=gpus,
        arrivals=tuple(arrivals),
        wishes=tuple(
            sorted((_wish(chance, gpus, count) for _ in range(chance.choice((0, 0, 2, 5)))), key=_at)
        ),
        miners=chance.random() < 0.4,
        gives_verdicts=chance.random() < 0.7,
        sampling_s=chance.choice((1.0, 5.0, 5.0)),
        pids=chance.choice((0, 0, 12)),
        start_s=chance.choice((START_S, START_S, 0.5)),
        budget_w=chance.choice((*(None,) * 6, *(float(gpus * watts) for watts in _NODE_BUDGETS_W))),
    )
    faults += [_fault(chance, kind, gpus) for kind in LATER_KINDS for _ in range(chance.choice(_RATES))]
    script = replace(script, faults=tuple(sorted(faults, key=lambda fault: (fault.at_s, fault.kind))))
    return _with_freezing(chance, script) if chance.random() < _FREEZES else script


def _with_freezing(chance: random.Random, script: Script) -> Script:
    """The same with jobs that a shed freezes rather than stop, and sheds that limits don't reach."""
    sheds = (
        Wish(
            chance.uniform(10.0, FAULTS_S * 0.8),
            chance.choice(("budget", "event", "emergency")),
            script.gpus * chance.choice(_FREEZING_W),
            for_s=chance.choice((20.0, 60.0)),
        )
        for _ in range(chance.choice((2, 3, 4)))
    )
    return replace(
        script,
        arrivals=tuple(replace(arrival, spec=_freezable(arrival.spec)) for arrival in script.arrivals),
        # Of so many faults as others have hardly a job would be left to be frozen.
        faults=tuple(fault for fault in script.faults if chance.random() < _FREEZING_FAULTS),
        wishes=tuple(sorted((*script.wishes, *sheds), key=_at)),
        miners=True,
        miners_freeze=True,
    )


def _freezable(spec: JobSpec) -> JobSpec:
    """The job such that a stop would cost more than a shed lasts."""
    return replace(spec, on_preempt=OnPreempt.SUSPEND, restart_loss_s=600.0) if spec.preemptible else spec


# In how many runs jobs may be frozen, and what a shed leaves them by GPU: too little for all at lower limits.
_FREEZES = 0.3
_FREEZING_W = (150, 190, 300)
_FREEZING_FAULTS = 0.3
# How often a kind of fault happens in a run: off in many.
_RATES = (0, 0, 1, 2, 4)
# By GPU: what none can be run with, what a lowered limit keeps, almost all.
_NODE_BUDGETS_W = (180, 350, 600)


def _at(wish: Wish) -> float:
    return wish.at_s


# Jobs -------------------------------------------------------------------------------------------

BEHAVIOURS = (
    "ignores_sigterm",
    "exits_in_grace",
    "acknowledges",
    "dies_at_start",
    "start_fails",
    "pins_memory",
    "hangs_in_driver",
    "client_retries",
)
_GRACES_S = {JobClass.INFERENCE: 4.0, JobClass.TRAINING: 12.0, JobClass.BATCH: 5.0, JobClass.MINING: 1.0}
_CLASS_WEIGHTS = {JobClass.INFERENCE: 3, JobClass.TRAINING: 5, JobClass.BATCH: 4, JobClass.MINING: 3}


def _arrival(chance: random.Random, number: int, gpus: int, behaves: dict[str, float]) -> Arrival:
    job_class = chance.choices(list(_CLASS_WEIGHTS), list(_CLASS_WEIGHTS.values()))[0]
    grace_s = _GRACES_S[job_class]
    takes = _takes(chance, gpus)
    spec = replace(
        SPEC,
        name=f"job{number}",
        command=("work", f"job{number}"),
        job_class=job_class,
        priority=chance.choice((300, 500, 500, 700)),
        value_microusd_per_gpu_hour=chance.choice((100_000, 500_000, 2_000_000, 4_000_000)),
        preemptible=job_class is not JobClass.INFERENCE or chance.random() < 0.3,
        on_preempt=chance.choice((OnPreempt.REQUEUE, OnPreempt.REQUEUE, OnPreempt.SUSPEND, OnPreempt.CANCEL)),
        grace_s=grace_s,
        min_runtime_s=chance.choice((0.0, 0.0, 8.0)),
        exit_zero_is_done=chance.random() < 0.3,
        restart=chance.choice(list(RestartRule)),
        expected_duration_s=chance.choice((None, None, 30.0)),
        time_limit_s=chance.choice((None, None, None, 40.0)),
        deadline_s=chance.choice((*(None,) * 7, EPOCH_S + chance.uniform(20.0, FAULTS_S))),
        **takes,
    )
    duration_s = chance.choice((2.0, 10.0, 30.0, 60.0, math.inf))
    works = Workload(
        duration_s=duration_s,
        exit_code=chance.choice((0, 0, 0, 3)),
        restart_loss_s=chance.choice((0.0, 3.0)),
        draw_w=chance.choice((None, 300.0, 500.0)),
        memory_mib=takes["gpu_memory_mib"] or 4096,
        share_milli=takes["gpu_share_milli"],
        stop_s=chance.uniform(0.05, 0.8) * grace_s,
        stop_exit_code=chance.choice((None, 0, 0, 1)),
    )
    retries = chance.random() < behaves["client_retries"]
    return Arrival(
        at_s=chance.choice((0.5, chance.uniform(0.0, ARRIVALS_S))),
        spec=spec,
        workload=replace(works, **_misbehaviour(chance, grace_s, behaves)),
        gives_up_s=chance.choice((0.001, 0.5)) if retries else 1e9,
        says_again=2 if retries else 0,
    )


def _takes(chance: random.Random, gpus: int) -> dict[str, Any]:
    kind = chance.random()
    if kind < 0.2:
        share = chance.choice((250, 500, 700))
        return {"gpus": 1, "gpu_share_milli": share, "gpu_memory_mib": 81_000 * share // 1000}
    if kind < 0.28:
        return {"gpus": 0, "gpu_share_milli": 1000, "gpu_memory_mib": 0, "cpus": chance.choice((4, 40))}
    count = min(gpus, chance.choice((1, 1, 1, 2, 2, 4)))
    return {"gpus": count, "gpu_share_milli": 1000, "gpu_memory_mib": 0, "cpus": chance.choice((0, 0, 20))}


def _misbehaviour(chance: random.Random, grace_s: float, behaves: dict[str, float]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for kind in BEHAVIOURS:
        if chance.random() >= behaves[kind]:
            continue
        match kind:
            case "ignores_sigterm":
                said["stop_s"] = None
            case "exits_in_grace":
                said |= {
                    "stop_s": chance.uniform(0.0, 0.01) * grace_s,
                    "stop_exit_code": chance.choice((0, 7)),
                }
            case "acknowledges":
                said |= {"acknowledges_s": 0.5 * grace_s, "stop_s": None}
            case "dies_at_start":
                said["fails_after_s"] = chance.choice((0.0, 0.01, 1.0))
            case "start_fails":
                said["start_error"] = chance.choice(("fork", "files", "command", "working_directory"))
                said["failed_starts"] = chance.choice((1, 2))
            case "pins_memory":
                said["release_s"] = chance.choice((0.05, 2.0, 20.0, 90.0))
            case "hangs_in_driver":
                said["stuck_s"] = chance.choice((0.5, 8.0, 70.0))
    return said


# Wishes and faults ------------------------------------------------------------------------------

# Drawn behind everything else, so that they changed nothing else in the stories of older seeds.
LATER_KINDS = ("nvml_slow", "launcher_hears_twice")
KINDS = (
    "nvml_fails",
    "nvml_hangs",
    "limit_not_taken",
    "driver_hangs",
    "gpu_lost",
    "xid",
    "stranger",
    "launcher_dies",
    "launcher_hangs_up",
    "launcher_unreachable",
    "crash",
    "crash_at_step",
    "restart",
    "reboot",
    "torn_commit",
    "torn_folding",
    "fsync_error",
    "write_error",
    "disk_full",
    "clock_step",
    *LATER_KINDS,
)
# Moments that seldom come, so that a death in a number of steps would seldom find them.
RARE_STEPS = ("before start", "before stop", "before end_grace", "before forget", "before connect")
GPU_KINDS = frozenset(
    {"nvml_fails", "nvml_hangs", "nvml_slow", "limit_not_taken", "gpu_lost", "xid", "stranger"}
)


WISHES = (
    "cancel",
    "requeue",
    "cordon",
    "drain",
    "acknowledge",
    "budget",
    "signal_lost",
    "event",
    "emergency",
    "prices",
)
OF_WATTS = frozenset({"budget", "signal_lost", "event", "emergency", "prices"})
# What a grid or a meter may say: a tenth of the node, most of it, nothing, less than nothing, the Sun.
BUDGETS_W = (300, 1000, 1500, 2500, 0, -1000, 10**9)
# When an event is to begin, from now: long ago, late, at once, soon, in the far future.
LEADS_S = (-(10**9), -30, 0, 20, 10**7)


def _wish(chance: random.Random, gpus: int, jobs: int) -> Wish:
    what = chance.choice(WISHES)
    at_s = chance.uniform(1.0, FAULTS_S * 0.8)
    if what in OF_WATTS:
        return Wish(at_s, what, chance.choice(BUDGETS_W), chance.choice(LEADS_S))
    return Wish(at_s, what, chance.randrange(gpus if what == "cordon" else jobs))


def _fault(chance: random.Random, kind: str, gpus: int) -> Fault:
    at_s = chance.uniform(1.0, FAULTS_S)
    left_s = FAULTS_S - at_s
    gpu = chance.randrange(gpus)
    match kind:
        case "nvml_fails":
            code = chance.choice(("ERROR_UNKNOWN", "ERROR_NO_PERMISSION", "ERROR_RESET_REQUIRED"))
            return Fault(kind, at_s, min(left_s, chance.choice((0.1, 5.0, 80.0))), gpu, word=code)
        case "nvml_hangs" | "driver_hangs":
            return Fault(kind, at_s, min(left_s, chance.choice((0.5, 5.0, 80.0))), gpu)
        case "limit_not_taken":
            pretends = chance.choice((0, 1))  # the readings say that it was
            return Fault(kind, at_s, min(left_s, chance.choice((5.0, 80.0))), gpu, pretends)
        case "gpu_lost":
            return Fault(kind, at_s, min(left_s, chance.choice((2.0, 30.0))), gpu, chance.choice((0, 1)))
        case "xid":
            return Fault(kind, at_s, min(left_s, 15.0), gpu, chance.choice(XIDS))
        case "stranger":
            return Fault(kind, at_s, min(left_s, chance.choice((0.5, 40.0))), gpu)
        case "nvml_slow":
            return Fault(kind, at_s, min(left_s, 60.0), gpu, chance.choice((30, 300, 1500)))
        case "launcher_hears_twice":
            return Fault(kind, at_s, min(left_s, 60.0))
        case "launcher_unreachable":
            return Fault(kind, at_s, min(left_s, chance.choice((1.0, 20.0))))
        case "crash":
            return Fault(kind, at_s, chance.choice((0.01, 1.0, 15.0)), number=chance.randint(0, 4))
        case "crash_at_step":
            word = chance.choice(("", "", *RARE_STEPS))
            steps = chance.randint(1, 3 if word else 40)
            return Fault(kind, at_s, chance.choice((0.01, 1.0, 15.0)), number=steps, word=word)
        case "restart" | "reboot":
            return Fault(kind, at_s, chance.choice((0.5, 20.0)))
        case "torn_commit" | "torn_folding":
            return Fault(kind, at_s, chance.choice((0.5, 20.0)), number=chance.randrange(1, 1 << 30))
        case "fsync_error" | "write_error" | "disk_full":
            return Fault(kind, at_s, min(left_s, chance.choice((0.01, 3.0, 20.0))))
        case "clock_step":
            return Fault(kind, at_s, number=chance.choice((-86_400, -30, 5, 3600, 3 * 86_400)))
        case _:
            return Fault(kind, at_s)
