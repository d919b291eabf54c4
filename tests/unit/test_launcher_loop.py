"""The launcher's event loop: order within a turn, timers, and errors that stay where they are."""

import os
import time
from collections.abc import Iterator

import pytest

from scheduler.effects.launcher_loop import Loop, Timer


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_fd, write_fd = os.pipe()
    yield read_fd, write_fd
    os.close(read_fd)
    os.close(write_fd)


def test_what_is_urgent_comes_before_timers_and_these_before_bulk() -> None:
    happened: list[str] = []
    loop = Loop(lambda: happened.append("before bulk"))
    bulk, urgent = os.pipe(), os.pipe()
    for _, write_fd in (bulk, urgent):
        os.write(write_fd, b"x")

    def pump() -> None:
        happened.append("bulk")
        loop.stop()

    loop.watch_bulk(bulk[0], pump)
    loop.watch(urgent[0], lambda: happened.append("urgent"))
    loop.call_after(0.0, lambda: happened.append("timer"))
    loop.run()
    assert happened == ["urgent", "timer", "before bulk", "bulk"]
    for fd in (*bulk, *urgent):
        os.close(fd)


def test_timers_come_in_the_order_of_their_times_and_equal_ones_as_they_were_made() -> None:
    happened: list[int] = []
    loop = Loop(lambda: None)
    for number, delay_s in enumerate((0.02, 0.0, 0.01, 0.0)):
        loop.call_after(delay_s, lambda number=number: happened.append(number))  # type: ignore[misc]
    loop.call_after(0.03, loop.stop)
    loop.run()
    assert happened == [1, 3, 2, 0]


def test_a_cancelled_timer_does_nothing() -> None:
    loop = Loop(lambda: None)
    timer = loop.call_after(0.0, lambda: pytest.fail("it was cancelled"))
    timer.cancel()
    timer.cancel()
    loop.call_after(0.01, loop.stop)
    loop.run()


def test_cancelled_timers_do_not_add_up() -> None:
    loop = Loop(lambda: None)
    happened: list[int] = []
    kept: list[Timer] = []
    for number in range(10_000):
        timer = loop.call_after(86_400.0, lambda: None)
        if number % 1000:
            timer.cancel()
        else:
            kept.append(timer)
    assert len(loop._timers) < 1000
    loop.call_after(0.0, lambda: happened.append(1))
    loop.call_after(0.0, loop.stop)
    loop.run()
    assert happened == [1]


def test_a_timer_may_be_made_and_cancelled_by_a_timer() -> None:
    loop = Loop(lambda: None)
    never = loop.call_after(0.0, lambda: None)

    def first() -> None:
        never.cancel()
        loop.call_after(0.0, loop.stop)

    loop.call_after(0.0, first)
    loop.run()


def test_what_one_callback_raises_is_printed_and_stops_no_other(
    pipe: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    loop = Loop(lambda: None)
    os.write(pipe[1], b"x")

    def fails() -> None:
        loop.unwatch(pipe[0])
        raise ValueError("broken on purpose")

    loop.watch(pipe[0], fails)
    loop.call_after(0.0, loop.stop)
    loop.run()
    assert "ValueError: broken on purpose" in capsys.readouterr().err


def test_a_descriptor_that_a_callback_stopped_watching_is_not_called_in_the_same_turn() -> None:
    loop = Loop(lambda: None)
    pairs = [os.pipe(), os.pipe()]
    called: list[int] = []

    def call(index: int) -> None:
        called.append(index)
        for read_fd, _ in pairs:
            loop.unwatch(read_fd)
        loop.stop()

    for index, (read_fd, write_fd) in enumerate(pairs):
        os.write(write_fd, b"x")
        loop.watch(read_fd, lambda index=index: call(index))  # type: ignore[misc]
    loop.run()
    assert len(called) == 1
    for pair in pairs:
        for fd in pair:
            os.close(fd)


def test_the_loop_sleeps_until_the_next_timer() -> None:
    loop = Loop(lambda: None)
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    loop.call_after(0.05, loop.stop)
    loop.run()
    assert time.monotonic() - begun_s >= 0.05
    assert time.process_time() - begun_cpu_s < 0.04
