"""The inputs of plans come back from their bytes as they were, whatever changed in between."""

import zlib
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.errors import FrameError
from scheduler.model.frames import Frame, PlanInputs, SaidColumns, decode, encode, inputs_of
from scheduler.model.policy import Policy
from scheduler.model.snapshot import MixColumns, Snapshot
from scheduler.planning.planner import digest, plan
from tests.fakes import power, worlds
from tests.fakes.power import B, P
from tests.fakes.worlds import W
from tests.properties.strategies import worlds as drawn_worlds

WATTS = st.integers(-1000, 20_000)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def same(first: Any, second: Any) -> bool:
    """To the last bit, types included."""
    if is_dataclass(first):
        return type(first) is type(second) and all(
            same(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)
        )
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return type(first) is type(second) and bool(first == second)


@st.composite
def snapshots(draw: st.DrawFn, world: W) -> Snapshot:
    if draw(st.booleans()):
        return worlds.snapshot(replace(world, has_price=draw(st.booleans())))
    boards = {gpu.uuid: B(measured_w=draw(st.integers(-1, 700))) for gpu in world.gpus}
    promised = draw(st.none() | WATTS)
    natural = {job.number: draw(st.integers(-1, 900)) for job in world.jobs}
    best = {job.number: draw(st.integers(-1, 900)) for job in world.jobs}
    emergency = draw(st.booleans())
    return power.snapshot(
        P(world, draw(WATTS), boards, natural, promised, is_emergency=emergency, best_w=best)
    )


@st.composite
def inputs(draw: st.DrawFn) -> PlanInputs:
    snapshot = draw(snapshots(draw(drawn_worlds())))
    said = SaidColumns(
        *(np.array([draw(INT64) for _ in range(len(snapshot.jobs))], dtype=np.int64) for _ in range(4))
    )
    return PlanInputs(snapshot, said)


@given(st.lists(inputs(), min_size=1, max_size=4))
def test_what_was_written_is_read_however_one_frame_differs_from_the_next(row: list[PlanInputs]) -> None:
    written: Frame | None = None
    read: Frame | None = None
    for one in row:
        data, written = encode(one, written)
        read = decode(data, read)
        assert same(inputs_of(read), one)


@given(drawn_worlds(), st.data())
def test_jobs_that_come_go_and_change_are_told_against_what_was_there(world: W, data: st.DataObject) -> None:
    """As a table of jobs has them: the last one takes the place of one that leaves."""
    written: Frame | None = None
    read: Frame | None = None
    for second in range(4):
        jobs = list(world.jobs)
        for _ in range(data.draw(st.integers(0, 2))):
            row = data.draw(st.integers(0, len(jobs) - 1)) if jobs else 0
            what = data.draw(st.sampled_from(("leave", "change", "come")))
            if what == "come":
                jobs.append(worlds.J(100 + 10 * second + len(jobs), value=data.draw(st.integers(0, 10**9))))
            elif jobs and what == "leave":
                jobs[row] = jobs[-1]
                jobs.pop()
            elif jobs:
                jobs[row] = replace(jobs[row], priority=data.draw(st.integers(0, 1000)))
        world = replace(world, jobs=tuple(jobs), now_us=world.now_us + second)
        snapshot = worlds.snapshot(world)
        said = SaidColumns(*(snapshot.jobs.number for _ in range(4)))
        one = PlanInputs(snapshot, said)
        data_bytes, written = encode(one, written)
        read = decode(data_bytes, read)
        assert same(inputs_of(read), one)


@given(inputs())
def test_a_plan_of_inputs_that_were_read_is_the_plan_of_those_that_were_written(one: PlanInputs) -> None:
    data, _ = encode(one, None)
    again = inputs_of(decode(data, None))
    assert digest(plan(again.snapshot, Policy())) == digest(plan(one.snapshot, Policy()))


def some_inputs(**changes: Any) -> PlanInputs:
    world = W(jobs=(worlds.running(1, "GPU-0"), worlds.J(2)), gpus=worlds.gpus(2))
    snapshot = replace(worlds.snapshot(world), **changes)
    return PlanInputs(snapshot, SaidColumns(*(snapshot.jobs.number for _ in range(4))))


def test_the_mix_that_a_site_expects_is_kept() -> None:
    ones = np.ones(3, dtype=np.int64)
    one = some_inputs(mix=MixColumns(ones, 1000 * ones, ones, ones, ones, 0 * ones, ones))
    data, first = encode(some_inputs(), None)
    then, _ = encode(one, first)
    assert same(inputs_of(decode(then, decode(data, None))), one)


def test_what_did_not_change_takes_no_room() -> None:
    whole, first = encode(some_inputs(), None)
    changes, _ = encode(some_inputs(), first)
    assert len(changes) < 40 < len(whole)


@given(st.data())
def test_a_damaged_frame_is_an_error_or_the_damage_means_nothing(data: st.DataObject) -> None:
    whole, _ = encode(some_inputs(), None)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] ^= data.draw(st.integers(1, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    odd = zlib.compress(data.draw(st.binary(max_size=200) | st.integers(0, 200).map(bytes)))
    for bytes_read in (bytes(damaged), cut, odd):
        try:
            read = inputs_of(decode(bytes_read, None))
        except FrameError:
            continue
        # Bits of a deflated text may mean nothing: what was read is what was written, or it is not read.
        assert same(read, some_inputs())


def test_a_frame_is_read_only_behind_the_one_that_it_is_told_against() -> None:
    _, first = encode(some_inputs(), None)
    second_bytes, second = encode(some_inputs(), first)
    third_bytes, _ = encode(some_inputs(), second)
    for data, before in ((second_bytes, None), (third_bytes, first), (second_bytes, second)):
        with pytest.raises(FrameError, match="is missing"):
            decode(data, before)
