"""The virtual loop: time jumps, order is kept, and a world in which nothing can happen says so."""

import asyncio
import time

import pytest

from scheduler.errors import SimulationStuck
from scheduler.simulation.virtual_time import EPOCH_S, VirtualClock, run

WEEK_S = 7 * 86_400.0


def test_a_week_passes_at_once_and_in_order() -> None:
    heard: list[tuple[str, float]] = []
    clock = VirtualClock()

    async def sleeper(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        heard.append((name, clock.now_s()))

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, delay_s in (("late", WEEK_S), ("early", 1.5), ("middle", 86_400.25)):
                tasks.create_task(sleeper(name, delay_s))

    begun = time.monotonic()
    run(all_of_them())
    assert heard == [("early", EPOCH_S + 1.5), ("middle", EPOCH_S + 86_400.25), ("late", EPOCH_S + WEEK_S)]
    assert time.monotonic() - begun < WEEK_S / 2


def test_a_timer_of_years_from_now_goes_off_at_its_time() -> None:
    async def waits() -> list[float]:
        loop = asyncio.get_running_loop()
        woken = []
        for _ in range(100):
            await asyncio.sleep(7.3 * WEEK_S + 0.1)
            due = asyncio.Event()
            loop.call_at(loop.time(), due.set)
            await due.wait()
            woken.append(loop.time())
        return woken

    woken = run(waits())
    assert woken == pytest.approx([(7.3 * WEEK_S + 0.1) * (1 + count) for count in range(100)])


def test_a_clock_that_is_set_differs_from_the_true_time() -> None:
    async def reads() -> tuple[float, float]:
        clock = VirtualClock()
        clock.step_s = -3600.0
        await asyncio.sleep(10.0)
        return clock.now_s() - EPOCH_S, clock.true_s() - EPOCH_S

    assert run(reads()) == (-3590.0, 10.0)


def test_waiting_for_nothing_is_an_error_and_no_hang() -> None:
    async def waits() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SimulationStuck, match="nothing will ever happen"):
        run(waits())


def test_what_would_go_to_a_thread_is_done_at_once() -> None:
    async def works() -> list[str]:
        done: list[str] = []
        work = asyncio.to_thread(done.append, "work")
        await work
        done.append("after")
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        return done

    assert run(works()) == ["work", "after"]


def test_a_microsecond_passes_too() -> None:
    async def wakes() -> int:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(25_200.0)
        begun_s, turns = loop.time(), 0
        while loop.time() < begun_s + 1e-6 and turns < 10:
            await asyncio.sleep(9.5e-7)
            turns += 1
        return turns

    assert run(wakes()) == 2
