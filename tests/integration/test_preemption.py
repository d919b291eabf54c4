"""Who gives way to whom, how a victim is told and ended, and what is recorded of it."""

import json
import os
import signal
from itertools import pairwise

import pytest

from scheduler.v1 import job_pb2, job_service_pb2
from tests.harness.daemon import (
    CANCELLED,
    FAILED,
    PENDING,
    PREEMPTING,
    RUNNING,
    STARTING,
    SUCCEEDED,
    Daemon,
    reason_of,
    until,
    word,
)
from tests.harness.fixtures import Make

CONFIG = """
[policy]
preemption_backoff_s = 0.05
preemption_backoff_s_max = 0.05
"""
IGNORES_TERM = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
SLEEPS = "echo ready; exec sleep 600"
# Has saved when it is told to give way, says so, and waits to be ended.
ACKNOWLEDGES = "trap 'touch $WATTSHIFT_ACK_FILE' TERM; echo ready; while :; do sleep 0.02; done"
# Each generation ignores what it can, is a child of nobody, in a session of its own, without an environment.
FAMILY = """
trap '' TERM HUP INT
echo $$ >> "$1"
[ "$2" = 0 ] || (setsid env -i /bin/sh "$0" "$1" $(($2 - 1)) &)
while :; do sleep 0.2; done
"""
RANKS = ("mining", "batch", "training", "inference")


def fill(daemon: Daemon, count: int = 4, script: str = SLEEPS, **fields: object) -> list[job_pb2.Job]:
    """Jobs of one GPU each, all running."""
    return [daemon.run(script=script, gpus=1, **fields) for _ in range(count)]


def stamps(attempt: job_pb2.Attempt) -> dict[str, int]:
    return {
        "decided": attempt.notice.decided_at.ToNanoseconds(),
        "signalled": attempt.signalled_at.ToNanoseconds(),
        "exited": attempt.exited_at.ToNanoseconds(),
        "verified": attempt.verified_at.ToNanoseconds(),
        "successor started": attempt.successor_started_at.ToNanoseconds(),
    }


# Who -------------------------------------------------------------------------------------------


def test_a_gang_preempts_just_what_it_needs_and_both_directions_are_recorded(daemon: Daemon) -> None:
    miners = fill(daemon, job_class="mining")
    gang = daemon.submit("sleep", "60", job_class="training", gpus=2)
    leaving = [job.id for job in map(daemon.get, [m.id for m in miners]) if job.state != RUNNING]
    assert len(leaving) == 2
    gang = daemon.wait(gang.id, RUNNING)
    assert reason_of(gang) == "PROCESS_STARTED"
    assert sorted(gang.attempts[0].preempted) == sorted(leaving)
    victims = [daemon.get(job_id) for job_id in leaving]
    assert {victim.attempts[0].gpus[0] for victim in victims} == set(gang.attempts[0].gpus)
    assert [(v.attempts[0].preempted_by, v.preemptions) for v in victims] == [(gang.id, 1)] * 2
    assert [word(v.attempts[0].notice.reason) for v in victims] == ["PREEMPTED_BY_HIGHER_RANK"] * 2
    assert len(daemon.running()) == 3, "the others went on"


def test_free_gpus_are_taken_before_anyone_is_preempted(daemon: Daemon) -> None:
    fill(daemon, 2, job_class="mining")
    gang = daemon.submit("sleep", "60", job_class="inference", gpus=2)
    assert daemon.wait(gang.id, RUNNING).attempts[0].preempted == []


@pytest.mark.parametrize(("low", "high"), list(pairwise(RANKS)))
def test_a_class_gives_way_to_the_next_higher_one_and_not_the_other_way(
    daemon: Daemon, low: str, high: str
) -> None:
    first = daemon.run(script=SLEEPS, job_class=high, gpus=4, preemptible=True)
    assert daemon.submit("sleep", "60", job_class=low, gpus=4, priority=1000).state == PENDING
    assert daemon.get(first.id).state == RUNNING
    daemon.cancel_all()
    second = daemon.run(script=SLEEPS, job_class=low, gpus=4, preemptible=True)
    third = daemon.submit("sleep", "60", job_class=high, gpus=1, priority=0)
    assert daemon.get(second.id).attempts[0].preempted_by == third.id


def test_a_job_that_is_not_preemptible_stays(daemon: Daemon) -> None:
    stays = daemon.run(script=SLEEPS, job_class="mining", gpus=4, preemptible=False)
    assert daemon.submit("sleep", "60", job_class="inference").state == PENDING
    assert daemon.get(stays.id).state == RUNNING


def test_inference_stays_if_nothing_else_is_said(daemon: Daemon) -> None:
    stays = daemon.run(script=SLEEPS, job_class="inference", gpus=4)
    assert daemon.submit("sleep", "60", job_class="inference", priority=1000).state == PENDING
    assert daemon.get(stays.id).state == RUNNING


def test_a_job_is_left_alone_for_its_minimum_runtime(daemon: Daemon) -> None:
    victim = daemon.run(script=SLEEPS, job_class="mining", gpus=4, min_runtime_s=0.7)
    preemptor = daemon.submit("sleep", "60", job_class="inference", gpus=4)
    assert (preemptor.state, daemon.get(victim.id).state) == (PENDING, RUNNING)
    daemon.wait(preemptor.id, RUNNING)
    attempt = daemon.get(victim.id).attempts[0]
    assert attempt.notice.decided_at.ToNanoseconds() - attempt.started_at.ToNanoseconds() >= 0.7e9


def test_equals_do_not_displace_each_other_nor_does_a_little_more_value(daemon: Daemon) -> None:
    stays = daemon.run(script=SLEEPS, gpus=4, value_usd_per_gpu_hour=1.0)
    for value in (1.0, 1.29):
        assert daemon.submit("sleep", "60", gpus=4, value_usd_per_gpu_hour=value).state == PENDING
    assert daemon.get(stays.id).state == RUNNING
    better = daemon.submit("sleep", "60", gpus=4, value_usd_per_gpu_hour=1.31)
    assert daemon.get(stays.id).attempts[0].preempted_by == better.id


def test_a_higher_priority_displaces_within_a_class(daemon: Daemon) -> None:
    victim = daemon.run(script=SLEEPS, gpus=4)
    preemptor = daemon.submit("sleep", "60", gpus=4, priority=501)
    assert daemon.get(victim.id).attempts[0].preempted_by == preemptor.id


def test_shares_of_one_gpu_run_beside_each_other_and_only_enough_of_them_give_way(daemon: Daemon) -> None:
    whole = daemon.run(script=SLEEPS, job_class="inference", gpus=3)
    shares = [daemon.run(script=SLEEPS, job_class="mining", gpu_share_milli=250) for _ in range(4)]
    assert len({job.attempts[0].gpus[0] for job in shares}) == 1
    assert shares[0].attempts[0].gpus[0] not in whole.attempts[0].gpus
    preemptor = daemon.wait(
        daemon.submit("sleep", "60", job_class="training", gpu_share_milli=500).id, RUNNING
    )
    assert len(preemptor.attempts[0].preempted) == 2
    assert preemptor.attempts[0].gpus == shares[0].attempts[0].gpus
    gpu = next(g for g in daemon.get_node().gpus if g.uuid == preemptor.attempts[0].gpus[0])
    assert (len(gpu.job_ids), gpu.free_share_milli) == (3, 0)


def test_the_youngest_of_equal_victims_goes(daemon: Daemon) -> None:
    miners = fill(daemon, job_class="mining", restart_loss_s=10.0)
    preemptor = daemon.submit("sleep", "60", job_class="inference")
    lost = [m.id for m in miners if daemon.get(m.id).state != RUNNING]
    assert lost == [miners[-1].id] == list(daemon.wait(preemptor.id, RUNNING).attempts[0].preempted)


@pytest.mark.parametrize("how", ["file", "rpc"])
def test_who_has_just_saved_is_the_cheaper_victim(daemon: Daemon, how: str) -> None:
    # Without a checkpoint less than half an hour of work counts as lost, of either the same at their start.
    jobs = fill(
        daemon,
        job_class="training",
        script='echo ready; while :; do [ -e "$WATTSHIFT_CHECKPOINT_DIR/go" ] && touch '
        '"$WATTSHIFT_CHECKPOINT_DIR/checkpoint" && rm "$WATTSHIFT_CHECKPOINT_DIR/go"; sleep 0.02; done',
    )
    saved = jobs[0]
    until("they have run a while", lambda: daemon.get(jobs[-1].id).attempts[0].HasField("started_at"))
    if how == "file":
        (daemon.state / "jobs" / saved.id / "checkpoint" / "go").touch()
    else:
        daemon.jobs.ReportCheckpoint(job_service_pb2.ReportCheckpointRequest(job_id=saved.id))
    until("the checkpoint is known", lambda: daemon.get(saved.id).attempts[0].HasField("checkpoint_at"))
    preemptor = daemon.submit("sleep", "60", job_class="inference")
    assert list(daemon.wait(preemptor.id, RUNNING).attempts[0].preempted) == [saved.id]


# How -------------------------------------------------------------------------------------------


def test_every_stage_of_a_preemption_is_timed_and_in_order(daemon: Daemon) -> None:
    victim = daemon.run_ready(SLEEPS, job_class="mining", gpus=4)
    preemptor = daemon.submit("sleep", "60", job_class="inference", gpus=4)
    assert preemptor.state == PENDING
    daemon.wait(preemptor.id, RUNNING)
    found = stamps(daemon.get(victim.id).attempts[0])
    assert all(found.values()), found
    assert list(found.values()) == sorted(found.values()), found
    page = daemon.metrics()
    for stage in ("signalled", "exited", "verified", "successor_started", "total"):
        assert f'wattshift_preemption_stage_seconds_count{{stage="{stage}",victim_class="mining"}}' in page


def test_file_watch_and_attempt_tell_the_same_deadline(daemon: Daemon) -> None:
    victim = daemon.run_ready(IGNORES_TERM, job_class="mining", gpus=4, grace_s=60.0)
    watch = daemon.jobs.WatchJobs(job_service_pb2.WatchJobsRequest(job_ids=[victim.id]), timeout=20)
    assert next(watch).synced
    daemon.submit("sleep", "60", job_class="inference", gpus=4)
    seen = next(message.job for message in watch if message.job.state == PREEMPTING)
    watch.cancel()
    notice = daemon.get(victim.id).attempts[0].notice
    assert seen.attempts[0].notice == notice
    assert notice.deadline.ToNanoseconds() - notice.decided_at.ToNanoseconds() == 60 * 10**9
    path = daemon.files(victim.id) / "notice.json"
    until("the notice is there", path.exists)
    assert round(json.loads(path.read_text())["deadline_s"] * 1e6) == notice.deadline.ToMicroseconds()


@pytest.mark.parametrize("how", ["file", "rpc"])
def test_an_acknowledgement_ends_the_grace_at_once(daemon: Daemon, how: str) -> None:
    script = ACKNOWLEDGES if how == "file" else IGNORES_TERM
    victim = daemon.run_ready(script, job_class="mining", gpus=4, grace_s=600.0)
    preemptor = daemon.submit("sleep", "60", job_class="inference", gpus=4)
    if how == "rpc":
        assert daemon.acknowledge(victim.id).attempts[0].HasField("acknowledged_at")
    daemon.wait(preemptor.id, RUNNING)
    attempt = daemon.get(victim.id).attempts[0]
    assert attempt.HasField("acknowledged_at")
    assert attempt.exit_code == 128 + signal.SIGKILL


def test_a_victim_that_hides_its_children_and_ignores_everything_is_gone_at_its_deadline(
    daemon: Daemon,
) -> None:
    pids, script = daemon.directory / "pids", daemon.directory / "family.sh"
    script.write_text(FAMILY)
    victim = daemon.run("/bin/sh", str(script), str(pids), "3", job_class="mining", gpus=4, grace_s=0.5)
    until("four generations run", lambda: pids.exists() and pids.read_text().count("\n") == 4)
    family = [int(line) for line in pids.read_text().split()]
    assert len(set(family)) == 4
    preemptor = daemon.submit("sleep", "60", job_class="inference", gpus=4)
    daemon.wait(preemptor.id, RUNNING)
    attempt = daemon.get(victim.id).attempts[0]
    late_s = (attempt.exited_at.ToNanoseconds() - attempt.notice.deadline.ToNanoseconds()) / 1e9
    assert 0 <= late_s < 1.0
    for pid in family:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_exit_with_zero_after_the_notice_is_requeued(daemon: Daemon) -> None:
    saves = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.02; done"
    victim = daemon.run_ready(saves, job_class="mining", gpus=4)
    preemptor = daemon.submit(script="exit 0", job_class="inference", gpus=4)
    assert daemon.wait(preemptor.id).state == SUCCEEDED
    again = daemon.wait_attempt(victim.id, 2)
    assert (again.attempts[0].exit_code, word(again.attempts[0].end_reason)) == (
        0,
        "REQUEUED_AFTER_PREEMPTION",
    )


def test_an_exit_with_zero_after_the_notice_is_a_success_where_the_job_says_so(daemon: Daemon) -> None:
    saves = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.02; done"
    victim = daemon.run_ready(saves, job_class="mining", gpus=4, exit_zero_is_done=True)
    daemon.submit("true", job_class="inference", gpus=4)
    assert daemon.wait(victim.id).state == SUCCEEDED


def test_a_job_that_wants_to_be_cancelled_by_a_preemption_is(daemon: Daemon) -> None:
    victim = daemon.run_ready(SLEEPS, job_class="mining", gpus=4, on_preempt=job_pb2.ON_PREEMPT_CANCEL)
    daemon.submit("true", job_class="inference", gpus=4)
    job = daemon.wait(victim.id)
    assert (job.state, reason_of(job)) == (CANCELLED, "CANCELLED_BY_PREEMPTION")


def test_the_stop_command_runs_with_the_jobs_own_environment(daemon: Daemon) -> None:
    stopped = daemon.directory / "stopped"
    says = 'echo "$WATTSHIFT_JOB_ID $CONTAINER"'
    victim = daemon.run_ready(
        IGNORES_TERM,
        job_class="mining",
        gpus=4,
        grace_s=60.0,
        environment={"CONTAINER": "c-17"},
        stop_command=["/bin/sh", "-c", f"{says} > {stopped}; touch $WATTSHIFT_ACK_FILE"],
    )
    preemptor = daemon.submit("sleep", "60", job_class="inference", gpus=4)
    daemon.wait(preemptor.id, RUNNING)
    assert stopped.read_text() == f"{victim.id} c-17\n"


def test_a_victim_that_is_cancelled_while_it_leaves_does_not_come_back(daemon: Daemon) -> None:
    victim = daemon.run_ready(IGNORES_TERM, job_class="mining", gpus=4, grace_s=60.0)
    preemptor = daemon.submit("sleep", "60", job_class="inference", gpus=4)
    assert daemon.cancel(victim.id).state == PREEMPTING
    daemon.acknowledge(victim.id)
    job = daemon.wait(victim.id)
    assert (job.state, reason_of(job)) == (CANCELLED, "CANCELLED_BY_REQUEST")
    daemon.wait(preemptor.id, RUNNING)


def test_victims_come_back_when_their_preemptor_is_cancelled_while_they_leave(daemon: Daemon) -> None:
    victim = daemon.run_ready(IGNORES_TERM, job_class="mining", gpus=4, grace_s=60.0)
    preemptor = daemon.submit("sleep", "60", job_class="inference", gpus=4)
    assert daemon.cancel(preemptor.id).state == CANCELLED
    daemon.acknowledge(victim.id)
    again = daemon.wait_attempt(victim.id, 2)
    assert again.attempts[0].preempted_by == preemptor.id
    assert not again.attempts[0].HasField("successor_started_at")


def test_gpus_that_come_free_go_to_the_preemptor_and_not_to_who_came_later(daemon: Daemon) -> None:
    victims = [daemon.run_ready(IGNORES_TERM, job_class="mining", gpus=1, grace_s=60.0) for _ in range(4)]
    gang = daemon.submit("sleep", "60", job_class="training", gpus=4)
    late = daemon.submit("sleep", "60", job_class="training", gpus=1)
    for victim in victims[:3]:
        daemon.acknowledge(victim.id)
    until("three are gone", lambda: sum(daemon.get(v.id).state == PENDING for v in victims) == 3)
    assert (daemon.get(gang.id).state, daemon.get(late.id).state) == (PENDING, PENDING)
    daemon.acknowledge(victims[3].id)
    assert sorted(daemon.wait(gang.id, RUNNING).attempts[0].preempted) == sorted(v.id for v in victims)


def test_a_job_preempted_while_it_starts_is_told_and_requeued(daemon: Daemon) -> None:
    victim = daemon.submit("sleep", "60", job_class="mining", gpus=4)
    preemptor = daemon.submit("true", job_class="inference", gpus=4)
    assert victim.state in (STARTING, RUNNING)
    daemon.wait(preemptor.id)
    again = daemon.wait_attempt(victim.id, 2)
    assert again.attempts[0].preempted_by == preemptor.id


# Standing jobs ---------------------------------------------------------------------------------

STANDING = """
[policy]
restart_backoff_s = 0.1
restart_backoff_s_max = 100.0
[[standing_jobs]]
name = "{name}"
command = ["/bin/sh", "-c", "{script}"]
"""


def test_standing_jobs_fill_the_node_give_way_and_come_back(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="4xT4", config=STANDING.format(name="miner", script="exec sleep 600")).start()
    until("four mine", lambda: len(daemon.running("miner")) == 4)
    before = {job.id for job in daemon.running("miner")}
    burst = daemon.run("sleep", "60", job_class="inference", gpus=3)
    assert len(daemon.running("miner")) == 1
    daemon.cancel(burst.id)
    until("four mine again", lambda: len(daemon.running("miner")) == 4)
    assert {job.id for job in daemon.running("miner")} == before


def test_a_standing_job_that_crashes_backs_off_ever_longer_but_never_gives_up(make_daemon: Make) -> None:
    daemon = make_daemon(gpus="1xT4", config=STANDING.format(name="crash", script="exit 1")).start()
    (job,) = until("it has crashed four times", lambda: [j for j in daemon.all_jobs() if j.attempt >= 4])
    waits = [
        later.decided_at.ToNanoseconds() - earlier.exited_at.ToNanoseconds()
        for earlier, later in pairwise(job.attempts)
    ]
    for wait, least_s in zip(waits, (0.1, 0.2, 0.4), strict=False):
        assert wait >= least_s * 1e9
    assert daemon.get(job.id).state != FAILED
