"""Explanations and previews: facts that a person can act on, from the planner itself."""

from typing import Any

from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from scheduler.model.snapshot import DRAINING
from scheduler.planning.explain import (
    Explanation,
    Obstacle,
    Preview,
    PreviewVictim,
    Remedy,
    RemedyKind,
    Rule,
    explain,
    preview,
)
from tests.fakes.worlds import (
    BATCH,
    INFERENCE,
    MINING,
    NOW_US,
    SECOND_US,
    TRAINING,
    G,
    J,
    N,
    W,
    gpus,
    running,
    snapshot,
)

POLICY = Policy()
S = SECOND_US


def explained(world: W, number: int, policy: Policy = POLICY) -> Explanation:
    return explain(snapshot(world), policy, number)


def explanation(number: int, reason: Reason | None, **others: Any) -> Explanation:
    said = {
        "obstacles": (),
        "remedies": (),
        "awaited": (),
        "gpus": (),
        "expected_start_us": None,
        "ahead": 0,
        "behind_promise_of": None,
        "eligible_us": None,
    }
    return Explanation(number, reason, **{**said, **others})


def stays(number: int, *on: str, **others: object) -> J:
    return running(number, *on, job_class=INFERENCE, preemptible=False, **others)


def test_each_rule_says_how_many_gpus_it_keeps_from_the_job_and_who_is_in_the_way() -> None:
    world = W(
        jobs=(
            stays(1, "GPU-0"),
            running(2, "GPU-1", value=9_000_000),
            running(3, "GPU-2", job_class=MINING, ran_s=10, min_runtime_us=60 * S),
            running(4, "GPU-3", job_class=MINING, ran_s=20, min_runtime_us=60 * S),
            running(5, "GPU-4", job_class=MINING),
            J(9, gpus=8, gpu_memory_mib=70_000, models=("H100",)),
        ),
        gpus=(
            *(G(f"GPU-{n}", n) for n in range(5)),
            G("GPU-5", 5, is_open=False),
            G("GPU-6", 6, model="A100"),
            G("GPU-7", 7, memory_mib=40_000),
            *(G(f"GPU-{n}", n) for n in (8, 9)),
            *(G(f"GPU-1{n}", 10 + n, is_open=n > 1) for n in range(2)),
        ),
    )
    found = explained(world, 9)
    assert found.reason is Reason.NO_SUITABLE_GPU
    assert found.obstacles == (
        Obstacle(Rule.CLOSED, ("GPU-10", "GPU-11", "GPU-5")),
        Obstacle(Rule.MODEL, ("GPU-6",)),
        Obstacle(Rule.GPU_MEMORY_SIZE, ("GPU-7",)),
        Obstacle(Rule.NOT_PREEMPTIBLE, ("GPU-0",), (1,)),
        Obstacle(Rule.RANK, ("GPU-1",), (2,)),
        Obstacle(Rule.MINIMUM_RUNTIME, ("GPU-2", "GPU-3"), (3, 4), until_us=NOW_US + 40 * S),
    )
    # Three are free or can be freed; three closed ones make six: not enough.
    assert found.remedies == (Remedy(RemedyKind.FEWER_GPUS, 3),)


def test_the_smallest_changes_that_would_do_are_offered() -> None:
    world = W(
        jobs=(
            running(1, "GPU-0", priority=600),
            running(2, "GPU-1", priority=500, value=1_000_000),
            J(9, gpus=1, priority=500, value=1_000_000),
        ),
        gpus=gpus(2),
    )
    assert explained(world, 9) == explanation(
        9,
        Reason.WAITING_FOR_GPUS,
        obstacles=(Obstacle(Rule.RANK, ("GPU-0", "GPU-1"), (1, 2)),),
        remedies=(
            Remedy(RemedyKind.HIGHER_PRIORITY, 501),
            Remedy(RemedyKind.HIGHER_VALUE, 1_300_000),
            Remedy(RemedyKind.HIGHER_CLASS, INFERENCE),
        ),
    )


def test_a_job_that_lacks_cpus_and_memory_is_told_how_much() -> None:
    hog = stays(1, cpus=60, memory_mib=900, gpus=0)
    world = W(jobs=(hog, J(9, cpus=10)), gpus=gpus(1), nodes=(N(cpus=64, memory_mib=1000),))
    assert explained(world, 9) == explanation(
        9,
        Reason.WAITING_FOR_CPUS,
        obstacles=(Obstacle(Rule.CPUS, lacking=6),),
        remedies=(Remedy(RemedyKind.FEWER_CPUS, 4),),
    )
    both = W(jobs=(hog, J(9, cpus=10, memory_mib=300)), gpus=gpus(1), nodes=(N(cpus=64, memory_mib=1000),))
    assert explained(both, 9).obstacles == (
        Obstacle(Rule.CPUS, lacking=6),
        Obstacle(Rule.MEMORY, lacking=200),
    )
    assert explained(both, 9).remedies == ()


def test_a_share_that_lacks_memory_is_told_how_much_it_could_have() -> None:
    world = W(
        jobs=(
            stays(1, "GPU-0", share_milli=300, gpu_memory_mib=50_000),
            J(9, share_milli=300, gpu_memory_mib=40_000),
        ),
        gpus=gpus(1),
    )
    assert explained(world, 9) == explanation(
        9,
        Reason.WAITING_FOR_GPU_MEMORY,
        obstacles=(Obstacle(Rule.NOT_PREEMPTIBLE, ("GPU-0",), (1,)),),
        remedies=(Remedy(RemedyKind.LESS_GPU_MEMORY, 30_000),),
    )


def test_a_cordoned_gpu_and_another_model_are_remedies() -> None:
    mixed = (G("GPU-0", 0, is_open=False), G("GPU-1", 1, model="A100"))
    assert explained(W(jobs=(J(9, models=("H100",)),), gpus=mixed), 9) == explanation(
        9,
        Reason.NO_SUITABLE_GPU,
        obstacles=(Obstacle(Rule.CLOSED, ("GPU-0",)), Obstacle(Rule.MODEL, ("GPU-1",))),
        remedies=(Remedy(RemedyKind.OPEN_GPUS, 1), Remedy(RemedyKind.ANY_MODEL)),
    )


def test_a_closed_gpu_with_too_little_memory_is_none_that_would_help_if_it_were_opened() -> None:
    closed = (G("GPU-0", 0, memory_mib=40_000, is_open=False), G("GPU-1", 1, is_open=False))
    told = explained(W(jobs=(J(9, gpu_memory_mib=50_000),), gpus=closed), 9)
    assert Remedy(RemedyKind.OPEN_GPUS, 1) in told.remedies


def test_a_job_held_back_is_told_whose_start_it_may_not_delay_and_how_to_pass() -> None:
    first = running(1, "GPU-0", job_class=INFERENCE, preemptible=False, expected_us=3700 * S)
    world = W(
        jobs=(first, J(2, gpus=2), J(9, BATCH, preemptible=False, value=0)),
        gpus=gpus(2),
    )
    assert explained(world, 9) == explanation(
        9,
        Reason.WAITING_FOR_PROMISED_START,
        obstacles=(Obstacle(Rule.NOT_PREEMPTIBLE, ("GPU-0",), (1,)),),
        remedies=(
            Remedy(RemedyKind.SHORTER_DURATION, 100 * S),
            Remedy(RemedyKind.BE_PREEMPTIBLE),
            Remedy(RemedyKind.HIGHER_CLASS, INFERENCE),
        ),
        ahead=1,
        behind_promise_of=2,
    )
    assert explained(world, 2).expected_start_us == NOW_US + 100 * S


def test_a_job_that_backs_off_is_told_until_when() -> None:
    until_us = NOW_US + 5 * S
    assert explained(W(jobs=(J(9, eligible_us=until_us),), gpus=gpus(1)), 9) == explanation(
        9, Reason.BACKING_OFF, remedies=(Remedy(RemedyKind.CLEAR_BACKOFF),), eligible_us=until_us
    )


def test_a_job_on_a_draining_node_is_told_so() -> None:
    world = W(jobs=(J(9),), gpus=gpus(1), nodes=(N(drain=DRAINING),))
    assert explained(world, 9) == explanation(
        9,
        Reason.NODE_DRAINING,
        obstacles=(Obstacle(Rule.DRAINS, ("GPU-0",)),),
        remedies=(Remedy(RemedyKind.UNDRAIN_NODE),),
    )


def test_a_preemptor_is_told_whose_stop_it_waits_for_and_when_they_are_gone_at_the_latest() -> None:
    leaving = running(1, "GPU-0", state="PREEMPTING", preemptor=9, stop_us=NOW_US - 2 * S, grace_us=30 * S)
    world = W(jobs=(leaving, J(9)), gpus=gpus(1))
    assert explained(world, 9) == explanation(
        9, Reason.WAITING_FOR_HANDOVER, awaited=(1,), gpus=("GPU-0",), expected_start_us=NOW_US + 28 * S
    )


def test_only_jobs_that_could_go_before_it_are_ahead() -> None:
    world = W(
        jobs=(
            stays(1, "GPU-0"),
            J(2, INFERENCE),
            J(3, TRAINING, gpus=4),
            J(4, INFERENCE, eligible_us=NOW_US + 1),
            J(9),
            J(10, BATCH),
        ),
        gpus=gpus(1),
    )
    assert explained(world, 9).ahead == 1


def test_what_a_higher_job_claims_is_an_obstacle_and_what_a_lower_one_gets_is_not() -> None:
    world = W(jobs=(J(1, INFERENCE), J(9, gpus=2), J(10, BATCH)), gpus=gpus(2))
    assert explained(world, 9).obstacles == (Obstacle(Rule.CLAIMED, ("GPU-0",)),)


def test_a_preview_of_a_job_that_starts_says_where() -> None:
    assert preview(snapshot(W(jobs=(J(9, gpus=2),), gpus=gpus(3))), POLICY, 9) == Preview(
        9,
        starts_now=True,
        gpus=("GPU-0", "GPU-1"),
        victims=(),
        reason=None,
        start_within_us=0,
        expected_start_us=NOW_US,
    )


def test_a_preview_names_the_victims_what_they_lose_and_their_grace() -> None:
    filler = running(1, "GPU-0", job_class=MINING, value=3_600_000, ran_s=60, grace_us=2 * S)
    world = W(jobs=(filler, J(9)), gpus=gpus(1))
    assert preview(snapshot(world), POLICY, 9) == Preview(
        9,
        starts_now=False,
        gpus=("GPU-0",),
        victims=(PreviewVictim(1, ("GPU-0",), 2 * S, 60_000, 60_000),),
        reason=Reason.WAITING_FOR_HANDOVER,
        start_within_us=2 * S,
        expected_start_us=NOW_US + 2 * S,
    )


def test_a_preview_of_a_job_that_waits_or_fails_says_why() -> None:
    full = W(jobs=(stays(1, "GPU-0"), J(9)), gpus=gpus(1))
    late = W(jobs=(J(9, deadline_us=NOW_US - 1),), gpus=gpus(1))
    waits, fails = (preview(snapshot(world), POLICY, 9) for world in (full, late))
    assert waits == Preview(9, False, (), (), Reason.WAITING_FOR_GPUS, None, None)
    assert fails == Preview(9, False, (), (), Reason.DEADLINE_UNREACHABLE, None, None)


def test_no_shorter_duration_helps_where_the_promised_moment_is_now() -> None:
    overrun = running(1, "GPU-0", job_class=INFERENCE, preemptible=False, expected_us=S)
    world = W(jobs=(overrun, J(2, gpus=2), J(9, BATCH, preemptible=False)), gpus=gpus(2))
    kinds = [remedy.kind for remedy in explained(world, 9).remedies]
    assert kinds == [RemedyKind.BE_PREEMPTIBLE, RemedyKind.HIGHER_CLASS]


def test_a_preview_that_no_open_gpu_could_ever_serve_names_those_that_are_closed() -> None:
    there = (*gpus(3), G("GPU-3", is_open=False))
    all_of_them = preview(snapshot(W(jobs=(J(9, gpus=4),), gpus=there)), POLICY, 9)
    assert (all_of_them.reason, all_of_them.closed) == (Reason.NO_SUITABLE_GPU, ("GPU-3",))
    another_model = preview(snapshot(W(jobs=(J(9, gpus=5),), gpus=there)), POLICY, 9)
    assert another_model.closed == ("GPU-3",)
    open_ones = preview(snapshot(W(jobs=(J(9, gpus=3), stays(1, "GPU-0")), gpus=there)), POLICY, 9)
    assert (open_ones.reason, open_ones.closed) == (Reason.WAITING_FOR_GPUS, ())
