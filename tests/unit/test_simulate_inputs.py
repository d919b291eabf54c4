"""Files given to the simulation: what is legal, and what is refused with file, line, column and remedy."""

import math
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.errors import InputError
from scheduler.model.jobs import JobClass
from scheduler.simulation import csv_files
from scheduler.simulation.inputs import (
    JobRow,
    JobStore,
    NodeRow,
    Room,
    read_events,
    read_nodes,
    read_prices,
)

NODE = NodeRow("n0", "H100", 8, 80_000, 64_000, 500_000, 70.0, 200.0, 700.0, 300.0)
JOBS_HEADER = "job_id,submit_s,class,gpus,duration_s"


@pytest.fixture
def store() -> Iterator[JobStore]:
    made = JobStore()
    yield made
    made.close()


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "file.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jobs(tmp_path: Path, store: JobStore, text: str | bytes, *nodes: NodeRow) -> list[JobRow]:
    store.load(write(tmp_path, text), Room(nodes or (NODE,)))
    return list(store)


def test_a_node_that_says_little_is_like_the_board_that_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, "gpus,node_id,gpu_model\n8,a,h100\n0,b,\n2,c,Mystery\n")
    first, second, third = read_nodes(path)
    assert (first.gpu_power_limit_w_max, first.gpu_idle_w, first.gpu_memory_mib) == (700.0, 70.0, 81_559)
    assert (second.gpus, second.gpu_model) == (0, "GPU")
    assert (third.gpu_power_limit_w_min, third.gpu_power_limit_w_max, third.base_w) == (100.0, 400.0, 0.0)


def test_jobs_come_in_the_order_of_submission_whatever_the_order_of_the_rows(
    tmp_path: Path, store: JobStore
) -> None:
    text = f"{JOBS_HEADER}\nc,50,BATCH,1,10\na,0.5,training,2,inf\nb,0.5,MINING,1,1e3\n\n"
    found = jobs(tmp_path, store, text)
    assert [job.job_id for job in found] == ["a", "b", "c"]
    assert (found[0].job_class, found[0].duration_s, found[0].gpu_milli) == (
        JobClass.TRAINING,
        math.inf,
        2000,
    )
    assert (store.count, store.last_submit_s) == (3, 50.0)
    assert found[0].value_usd_per_gpu_hour is None


def test_every_cell_of_a_job_is_read(tmp_path: Path, store: JobStore) -> None:
    text = (
        "job_id,submit_s,class,priority,gpus,gpu_share_milli,gpu_memory_mib,cpus,memory_mib,duration_s,"
        "expected_s,value_usd_per_gpu_hour,deadline_s,preemptible,grace_s,min_runtime_s,restart_loss_s,"
        "gpu_models,draw_w,tenant\n"
        '"x, y",1,INFERENCE,7,1,250,1000,2.5,64,60,70,1.25,500,TRUE,3,4,5,H100|A100,333.5,red\n'
    )
    (found,) = jobs(tmp_path, store, text)
    assert found == JobRow(
        "x, y", 1.0, JobClass.INFERENCE, 60.0, 1, 250, 7, 1000, 2500, 64, 70.0, 1.25, 500.0, True, 3.0,
        4.0, 5.0, ("H100", "A100"), 333.5, "red",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("a,0,BATCH,1,", ":2: duration_s: is empty, and there is no default for it"),
        ("a,nan,BATCH,1,5", ":2: submit_s: must be a number from 0 to 1e+09, is 'nan'"),
        ("a,-1,BATCH,1,5", ":2: submit_s: must be a number from 0 to 1e+09, is '-1'"),
        ("a,1_0,BATCH,1,5", ":2: submit_s: must be a number from 0 to 1e+09, is '1_0'"),
        ("a,0,GAMING,1,5", ":2: class: must be one of INFERENCE, TRAINING, BATCH, MINING, is 'GAMING'"),
        ("a,0,BATCH,1.5,5", ":2: gpus: must be a whole number from 0 to 65536, is '1.5'"),
        ("a,0,BATCH,1,0", ":2: duration_s: must be above 0, is '0'"),
        ("a,0,BATCH,1,soon", ":2: duration_s: must be a number from 0 to 1e+09 or inf, is 'soon'"),
        (
            "a,0,BATCH,9,5",
            ":2: gpus: must be at most 8, what the largest node has that fits otherwise, is '9'",
        ),
        ("a,0,BATCH,1", ":2: has 4 cells; the header names 5 columns"),
        ('a,0,BATCH,1,"5', "is no CSV (unexpected end of data)"),
        ("a\x00,0,BATCH,1,5", "has a zero byte in it"),
        ("a\x1b[2J,0,BATCH,1,5", ":2: job_id: must be at most 128 printable characters, is 'a\\x1b[2J'"),
        ("a,0,BATCH,1,5\nb,0,BATCH,1,5\na,3,BATCH,1,5", ":4: job_id: 'a' is the job_id of line 2 already"),
    ],
)
def test_a_wrong_job_is_named_with_its_remedy(
    row: str, complaint: str, tmp_path: Path, store: JobStore
) -> None:
    with pytest.raises(InputError) as refused:
        jobs(tmp_path, store, f"{JOBS_HEADER}\n{row}\n")
    assert complaint in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "file.csv:"))


@pytest.mark.parametrize(
    ("columns", "cells", "complaint"),
    [
        ("deadline_s", "5", "deadline_s: time runs backwards: must not be before submit_s (10), is '5'"),
        ("gpu_share_milli", "1001", "gpu_share_milli: must be a whole number from 0 to 1000, is '1001'"),
        ("gpu_models", "T4", "gpu_models: no node has such a GPU, is 'T4'"),
        ("gpu_models", "A||B", "gpu_models: must be words of GPU names, separated by |, is 'A||B'"),
        ("gpu_memory_mib", "90000", "gpu_memory_mib: must be at most 80000, what the largest node has"),
        (
            "cpus",
            "64.5",
            "cpus: must be at most 64, what the largest node has that fits otherwise, is '64.5'",
        ),
        ("cpus", "0.0005", "cpus: must be a number from 0 to 1000000 with at most three decimals"),
        ("memory_mib", "500001", "memory_mib: must be at most 500000, what the largest node has"),
        ("preemptible", "maybe", "preemptible: must be true or false, is 'maybe'"),
        ("priority", "1001", "priority: must be a whole number from 0 to 1000, is '1001'"),
        ("draw_w", "0", "draw_w: must be a number from 1 to"),
        (
            "value_usd_per_gpu_hour",
            "inf",
            "value_usd_per_gpu_hour: must be a number from 0 to 10000, is 'inf'",
        ),
    ],
)
def test_a_wrong_optional_cell_is_named(
    columns: str, cells: str, complaint: str, tmp_path: Path, store: JobStore
) -> None:
    with pytest.raises(InputError) as refused:
        jobs(tmp_path, store, f"{JOBS_HEADER},{columns}\na,10,BATCH,1,5,{cells}\n")
    assert complaint in str(refused.value)


def test_a_share_is_of_one_gpu_and_a_dated_job_must_end(tmp_path: Path, store: JobStore) -> None:
    header = f"{JOBS_HEADER},gpu_share_milli,deadline_s"
    with pytest.raises(InputError) as refused:
        jobs(tmp_path, store, f"{header}\na,10,BATCH,2,5,500,\nb,10,BATCH,1,inf,,50\n")
    assert ":2: gpu_share_milli: a share is of one GPU, and gpus is 2" in str(refused.value)
    assert ":3: deadline_s: a job that never ends can't be complete by then" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty; its first line must name the columns: job_id, submit_s"),
        (f"{JOBS_HEADER}\n", ":1: there is no row after the header"),
        ("job_id,submit_s,class,gpus\na,0,BATCH,1\n", ":1: duration_s: this column is missing"),
        (f"{JOBS_HEADER},draw\na,0,BATCH,1,5,\n", ":1: 'draw': unknown column; did you mean draw_w?"),
        (f"{JOBS_HEADER},gpus\na,0,BATCH,1,5,1\n", ":1: gpus: is there twice"),
        (f"{JOBS_HEADER}\n".encode() + b"\xff,0,BATCH,1,5\n", "is not UTF-8"),
        (f"{JOBS_HEADER}\n" + "a" * 70_000, "is longer than 65536 characters"),
    ],
)
def test_a_wrong_file_is_refused(text: str | bytes, complaint: str, tmp_path: Path, store: JobStore) -> None:
    with pytest.raises(InputError) as refused:
        jobs(tmp_path, store, text)
    assert complaint in str(refused.value)


def test_a_file_that_is_not_there_or_a_directory_is_refused(tmp_path: Path, store: JobStore) -> None:
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_nodes(tmp_path / "none.csv")
    with pytest.raises(InputError, match="can't be read: Is a directory"):
        store.load(tmp_path, Room((NODE,)))


def test_what_is_wrong_is_told_all_at_once_and_not_without_end(tmp_path: Path, store: JobStore) -> None:
    rows = "\n".join(f"j{n},x,BATCH,1,5" for n in range(1000))
    with pytest.raises(InputError) as refused:
        jobs(tmp_path, store, f"{JOBS_HEADER}\n{rows}\n")
    lines = str(refused.value).splitlines()
    assert len(lines) == csv_files.PROBLEMS_SHOWN_MAX + 1
    assert lines[-1].endswith("the rest was not looked at")


def test_nodes_must_have_names_of_their_own_and_limits_that_agree(tmp_path: Path) -> None:
    header = "node_id,gpus,gpu_idle_w,gpu_power_limit_w_min,gpu_power_limit_w_max"
    path = write(tmp_path, f"{header}\na,1,,,300\na,2,,,\nb,1,,500,400\nc,1,500,,400\n")
    with pytest.raises(InputError) as refused:
        read_nodes(path)
    text = str(refused.value)
    assert ":3: node_id: 'a' is the node_id of line 2 already" in text
    assert ":4: gpu_power_limit_w_min: must be at most gpu_power_limit_w_max (400)" in text
    assert ":5: gpu_idle_w: must be at most gpu_power_limit_w_max (400)" in text


def test_prices_may_be_negative_but_time_must_not_run_backwards(tmp_path: Path) -> None:
    found = read_prices(write(tmp_path, "usd_per_mwh,start_s,known_s\n-70.5,0,\n12,900,1000\n"))
    assert [(row.start_s, row.usd_per_mwh, row.known_s) for row in found] == [
        (0.0, -70.5, 0.0), (900.0, 12.0, 1000.0),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r":4: start_s: time runs backwards: 900 is not after 900"):
        read_prices(write(tmp_path, "start_s,usd_per_mwh\n0,1\n900,2\n900,3\n"))


def test_events_may_overlap_and_must_last(tmp_path: Path) -> None:
    found = read_events(
        write(tmp_path, "event_id,start_s,end_s,site_power_w,emergency\na,0,100,500,\nb,50,60,200,true\n")
    )
    assert [(row.event_id, row.emergency, row.notice_s) for row in found] == [
        ("a", False, 0.0), ("b", True, 0.0),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r":2: end_s: time runs backwards: must be after start_s \(100\)"):
        read_events(write(tmp_path, "event_id,start_s,end_s,site_power_w\na,100,100,500\n"))


def test_a_gang_may_take_several_nodes_that_are_alike(tmp_path: Path, store: JobStore) -> None:
    nodes = [replace(NODE, node_id=f"n{n}") for n in range(3)]
    nodes += [replace(NODE, node_id=f"a{n}", gpu_model="A100", gpus=4) for n in range(5)]
    header = f"{JOBS_HEADER},gpu_models,cpus"
    text = f"{header}\na,0,TRAINING,24,5,,192\nb,0,TRAINING,20,5,A100,\n"
    assert [job.gpus for job in jobs(tmp_path, store, text, *nodes)] == [24, 20]
    with pytest.raises(InputError) as refused, closing(JobStore()) as other:
        jobs(tmp_path, other, f"{header}\na,0,TRAINING,25,5,,\nb,0,TRAINING,24,5,,193\n", *nodes)
    assert ":2: gpus: must be at most 24, what nodes that are alike have together" in str(refused.value)
    assert ":3: cpus: must be at most 192, what nodes that are alike have together" in str(refused.value)


def test_a_job_of_no_gpus_may_go_to_a_node_without_any(tmp_path: Path, store: JobStore) -> None:
    node = NodeRow("cpu", "GPU", 0, 1, 8000, 1000, 0.0, 0.0, 1.0, 100.0)
    assert jobs(tmp_path, store, f"{JOBS_HEADER},cpus\na,0,BATCH,0,5,8\n", node)[0].cpus_milli == 8000
    with pytest.raises(InputError, match="gpus: no node has such a GPU"):
        jobs(tmp_path, store, f"{JOBS_HEADER}\nb,0,BATCH,1,5\n", node)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, store: JobStore) -> None:
    count = 20_000
    path = tmp_path / "many.csv"
    with path.open("w") as file:
        file.write(f"{JOBS_HEADER}\n")
        file.writelines(f"job-{n},{count - n},BATCH,1,60\n" for n in range(count))
    tracemalloc.start()
    try:
        store.load(path, Room((NODE,)))
        assert sum(1 for _ in store) == count
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (
        peak_bytes / count < 150
    )  # all rows as values take 500 bytes each; some thousand are held at a time
