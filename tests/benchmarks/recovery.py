"""What a restart costs, and that a crash costs nothing."""

import itertools
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from measure import MS_PER_S, DidNotWork, Figure, at_most, spread
from node import GPUS, Node, job

from scheduler.control.ledger import Ledger
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.model.events import AttemptEnded, AttemptStarted, AttemptVerified, JobSubmitted, StartDecided
from scheduler.model.jobs import JobClass, JobSpec, JobState, OnPreempt, RestartRule, job_id
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason

if TYPE_CHECKING:
    from bench import Bench

RESTART_MS = 500.0
FINISHED_JOBS = 100_000
_JOBS_PER_COMMIT = 2_000
# The daemon is killed at a moment drawn from here, counted from its first answer.
CRASH_AFTER_S_MAX = 0.2
_SUBMITTERS = 3

_SPEC = JobSpec(
    name="true",
    command=("/bin/true",),
    job_class=JobClass.BATCH,
    priority=500,
    value_microusd_per_gpu_hour=500_000,
    gpus=1,
    gpu_share_milli=1000,
    gpu_memory_mib=0,
    gpu_models=(),
    cpus=0,
    memory_mib=0,
    preemptible=True,
    on_preempt=OnPreempt.REQUEUE,
    grace_s=10.0,
    min_runtime_s=0.0,
    restart_loss_s=0.0,
    exit_zero_is_done=False,
    restart=RestartRule.NEVER,
)


def restart(bench: "Bench") -> Figure:
    """From the start after a kill -9 to GetNode's answer: with 100,000 finished jobs, and with none."""
    jobs = 10_000 if bench.quick else FINISHED_JOBS
    rounds = 3 if bench.quick else 8
    figure: Figure = {"finished_jobs": jobs}
    for name, count in (("empty_journal_ms", 0), ("full_journal_ms", jobs)):
        with bench.node(start=False) as node:
            begun_s = time.perf_counter()
            build_journal(node.state_dir, count)
            if count:
                figure["built_in_s"] = round(time.perf_counter() - begun_s, 1)
                figure["journal_mib"] = round((node.state_dir / "journal.sqlite").stat().st_size / 2**20)
            node.start()
            took = []
            for _ in range(rounds):
                node.crash()
                took.append(MS_PER_S * node.start())
            figure[name] = spread(took, 1)
            if count and sum(1 for _ in itertools.islice(node.listed(), 1000)) != 1000:
                raise DidNotWork("the finished jobs are not listed")
    figure["targets"] = [at_most("full_journal_ms p50", figure["full_journal_ms"]["p50"], RESTART_MS, "ms")]
    return figure


def build_journal(state_dir: Path, jobs: int) -> None:
    """Write the whole life of so many finished jobs, five events each, through the daemon's own code."""
    now_s = time.time()
    journal = SqliteJournal(state_dir, now_s=now_s)
    ledger = Ledger(journal, Policy())
    for number in range(1, jobs + 1):
        name = job_id(number)
        for event in (
            JobSubmitted(now_s, name, number, _SPEC, f"request-{number}", f"{number:064x}"),
            StartDecided(now_s, name, 1, ("GPU-0",), "launcher", Reason.STARTED_ON_FREE_GPUS),
            AttemptStarted(now_s, name, 1, number, number),
            AttemptEnded(now_s, name, 1, JobState.SUCCEEDED, Reason.EXITED_ZERO, 0),
            AttemptVerified(now_s, name, 1),
        ):
            ledger.apply(event)
        if number % _JOBS_PER_COMMIT == 0:
            ledger.commit()
    ledger.commit()
    journal.close()


def crash(bench: "Bench") -> Figure:
    """kill -9 at random moments of a stream of submissions, while eight jobs run; then look who is known."""
    instants = bench.crash_instants
    moments = random.Random(7)
    counts = {"acknowledged": 0, "known": 0, "ids_used_twice": 0, "alive": 0, "adopted": 0}
    restarts: list[float] = []
    all_names: dict[str, str] = {}
    with bench.node() as node:
        node.fill(bench.line, "INFERENCE")
        before = {one.id: one.attempts[-1].pid for one in node.running().values()}
        starts = {pid: _start_ticks(pid) for pid in before.values()}
        for instant in range(instants):
            names = _submit_until_killed(node, instant, moments.uniform(0.0, CRASH_AFTER_S_MAX))
            counts["alive"] += sum(_start_ticks(pid) == ticks for pid, ticks in starts.items())
            restarts.append(MS_PER_S * node.start())
            counts["ids_used_twice"] += len(names.keys() & all_names.keys())
            counts["acknowledged"] += len(names)
            counts["known"] += sum(_is_known(node, one, name) for one, name in names.items())
            after = {one.id: one.attempts[-1].pid for one in node.running().values()}
            counts["adopted"] += sum(after.get(one) == pid for one, pid in before.items())
            all_names |= names
            if instant % 20 == 19:
                bench.say(f"{instant + 1} of {instants} crashes: {counts}")
        listed = {one.id: one.name for one in node.listed(active_only=True)}
    counts["known_at_the_end"] = sum(listed.get(one) == name for one, name in all_names.items())
    figure = {"instants": instants, **counts, "processes": GPUS * instants, "restart_ms": spread(restarts, 1)}
    whole = (
        counts["known"] == counts["known_at_the_end"] == counts["acknowledged"]
        and counts["alive"] == counts["adopted"] == GPUS * instants
        and not counts["ids_used_twice"]
    )
    if not whole:
        raise DidNotWork(f"a crash lost something: {figure}")
    figure["targets"] = [
        {"target": "all acknowledged known, all processes adopted", "value": whole, "met": whole}
    ]
    return figure


def _submit_until_killed(node: Node, instant: int, after_s: float) -> dict[str, str]:
    """Submit from several threads until the daemon is killed; returns what was acknowledged."""
    acknowledged: dict[str, str] = {}

    def go_on(client: int) -> None:
        for number in itertools.count():
            name = f"crash-{instant}-{client}-{number}"
            try:
                acknowledged[node.submit(job(["/bin/true"], name=name), name).id] = name
            except (grpc.RpcError, ValueError):  # killed, or the channel is closed
                return

    clients = [threading.Thread(target=go_on, args=(client,)) for client in range(_SUBMITTERS)]
    for client in clients:
        client.start()
    time.sleep(after_s)
    node.crash()
    for client in clients:
        client.join()
    return acknowledged


def _is_known(node: Node, wanted: str, name: str) -> bool:
    try:
        return node.get(wanted).name == name
    except grpc.RpcError:
        return False


def _start_ticks(pid: int) -> int:
    """When a process began; 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])
