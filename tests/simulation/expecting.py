"""What a scenario expects of a job, a GPU or a class at a moment, compared with what is."""

from typing import TYPE_CHECKING, Any

from scheduler.model.jobs import Job, JobClass, JobState, job_number
from tests.simulation.script import Expectation

if TYPE_CHECKING:
    from tests.simulation.world import World


def found_otherwise(world: "World", expected: Expectation) -> str:
    """What is other than expected, in words; empty where all is as it should be."""
    if not world.daemon.serves:
        return "no daemon serves"
    if expected.job:
        subject, facts = f"job {expected.job}", _job_facts(world, expected.job)
    elif expected.gpu is not None:
        subject, facts = f"GPU {expected.gpu}", _gpu_facts(world, expected.gpu)
    else:
        subject, facts = f"class {expected.job_class}", _class_facts(world, JobClass[expected.job_class])
    wrong = [
        f"{name} is {facts[name]!r}, not {wanted!r}"
        for name, wanted in expected.facts
        if not _agrees(name, facts[name], wanted)
    ]
    return f"{subject}: {'; '.join(wrong)}" if wrong else ""


def _agrees(name: str, found: Any, wanted: Any) -> bool:
    if name.endswith("_max"):
        return bool(found <= wanted)
    if name.endswith("_min"):
        return bool(found >= wanted)
    return bool(found == wanted)


def _job_facts(world: "World", name: str) -> dict[str, Any]:
    job_id = world.acknowledged.get(f"request of {name}")
    job = world.daemon.journal.job(job_number(job_id) or 0) if job_id else None
    if job is None:
        return {"state": "UNKNOWN", "reason": "", "attempt": 0, "exit_code": None, "useful_s_min": 0.0}
    return {
        "state": job.state.value,
        "reason": job.reason.value,
        "attempt": job.attempt,
        "exit_code": job.exit_code,
        "lost": job.attempts[-1].lost if job.attempts else None,
        "gpus": [world.gpus.index(uuid) for uuid in job.attempts[-1].gpus] if job.attempts else [],
        "useful_s_min": world.machine.useful_s(job.id),
    }


def _gpu_facts(world: "World", number: int) -> dict[str, Any]:
    views = world.daemon.controller.board.views(world.clock.now_s())
    view = next(view for view in views if view.identity.uuid == world.gpus[number])
    return {
        "state": view.state.value,
        "reason": view.reason.value,
        "power_limit_w_max": world.machine.boards[world.gpus[number]].power_limit_w,
    }


def _class_facts(world: "World", job_class: JobClass) -> dict[str, Any]:
    ledger = world.daemon.controller.ledger
    numbers = range(1, ledger.next_number)
    jobs = [job for n in numbers if (job := ledger.job(n)) is not None and job.spec.job_class is job_class]
    return {
        "jobs": len(jobs),
        "running": sum(job.state is JobState.RUNNING for job in jobs),
        "wait_s_max": max((_waited_s(job) for job in jobs), default=0.0),
        "draw_w_max": sum(board.power_w for board in world.machine.boards.values()),
    }


def _waited_s(job: Job) -> float:
    """How long until its first start; one that has not started waits for ever."""
    started = [attempt.started_s for attempt in job.attempts if attempt.number == 1]
    return started[0] - job.submitted_s if started and started[0] is not None else float("inf")
