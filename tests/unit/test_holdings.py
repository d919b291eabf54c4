"""Holdings kept up to date by change say what a look at all live jobs would say."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.control.holdings import Holdings
from scheduler.model.jobs import Attempt, Job, JobState
from scheduler.model.reasons import Reason
from tests.harness.values import SPEC

GPUS = tuple("abcde")
Step = tuple[str, int, tuple[str, ...]]


def live(number: int, gpus: tuple[str, ...], started_s: float | None = None) -> Job:
    attempt = Attempt(1, gpus, 1000, 0.0, "l", started_s=started_s)
    spec = replace(SPEC, gpu_memory_mib=number * 10)
    state, reason = JobState.STARTING, Reason.SUBMITTED
    return Job(f"j{number}", number, spec, "", 0.0, state, reason, 0.0, 1, attempts=(attempt,), attempt=1)


def steps() -> st.SearchStrategy[list[Step]]:
    kinds = st.sampled_from(["put", "put", "put", "drop", "move", "see"])
    gpus = st.lists(st.sampled_from(GPUS), unique=True, max_size=4).map(tuple)
    return st.lists(st.tuples(kinds, st.integers(1, 5), gpus), max_size=40)


@given(steps())
def test_they_are_what_the_live_jobs_say(story: list[Step]) -> None:
    holdings, jobs, rows = Holdings(), {}, {number: number for number in range(1, 6)}
    seen: dict[str, int] = {}
    for kind, number, gpus in story:
        match kind:
            case "put":
                jobs[number] = live(number, gpus, float(len(story)))
                holdings.put(jobs[number], rows[number])
            case "drop":
                jobs.pop(number, None)
                holdings.drop(number)
            case "move":
                rows[number] += 10
                holdings.job_moved(number, rows[number])
            case _:
                seen = {uuid: row for row, uuid in enumerate(gpus)}
                holdings.see_gpus(seen, rows)
        wanted = sorted(
            (rows[n], seen[uuid], 1000, n * 10)
            for n, job in jobs.items()
            for uuid in job.attempts[-1].gpus
            if uuid in seen
        )
        assert sorted(map(tuple, holdings.columns().T.tolist())) == wanted
        by_gpu = {u: [n for n, job in jobs.items() if u in job.attempts[-1].gpus] for u in GPUS}
        assert {u: sorted(held) for u, held in holdings.by_gpu.items()} == {
            u: sorted(numbers) for u, numbers in by_gpu.items() if numbers
        }
        assert all(job is jobs[job.number] for uuid in GPUS for job in holdings.jobs(uuid))
