"""The small parts of the loop: who watches."""

import asyncio

import pytest

from scheduler.control.watch import UNREAD_JOBS_MAX, JobSubscription, Watchers
from scheduler.errors import LimitReached
from scheduler.model.events import submitted
from scheduler.model.jobs import Job
from tests.harness.values import submission

# Watches ---------------------------------------------------------------------------------------


def job(number: int, revision: int = 1) -> Job:
    return submitted(submission(number), revision)


async def test_a_slow_reader_gets_the_newest_state_of_each_job_in_the_order_of_change() -> None:
    subscription = JobSubscription()
    for number, revision in ((1, 1), (2, 2), (1, 3), (3, 4), (2, 5)):
        subscription.offer(job(number, revision))
    assert [(j.number, j.revision) for j in await subscription.take()] == [(1, 3), (3, 4), (2, 5)]


async def test_a_reader_with_nothing_to_read_waits() -> None:
    subscription = JobSubscription(frozenset({2}))
    subscription.offer(job(1))
    waiting = asyncio.ensure_future(subscription.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    subscription.offer(job(2))
    assert [j.number for j in await waiting] == [2]


async def test_a_reader_too_far_behind_is_told_so() -> None:
    subscription = JobSubscription()
    for number in range(UNREAD_JOBS_MAX + 1):
        subscription.offer(job(number))
    with pytest.raises(LimitReached, match="since_revision"):
        await subscription.take()


def test_the_number_of_watches_is_bounded_and_leaving_makes_room() -> None:
    watchers = Watchers(2)
    first = watchers.watch_jobs()
    node = watchers.watch_node()
    with pytest.raises(LimitReached):
        watchers.watch_jobs()
    watchers.leave(first)
    watchers.leave(first)
    watchers.watch_node()
    watchers.publish_node()
    assert node.is_set()
