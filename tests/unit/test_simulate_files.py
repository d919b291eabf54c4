"""What `simulate` writes and what it makes itself: report, comparison, a made-up day, converted traces."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from scheduler.errors import InputError
from scheduler.model.policy import Order, Policy
from scheduler.simulation import charts, compare, converters, outputs, report, synthetic
from scheduler.simulation.inputs import JobStore, Room, read_events, read_nodes, read_prices
from scheduler.simulation.replay import World, replay

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/simulate"


def simulated(folder: Path, policy: Policy) -> dict[str, Any]:
    """The shipped example, replayed into a folder."""
    folder.mkdir()
    nodes = tuple(read_nodes(EXAMPLE / "nodes.csv"))
    prices = tuple(read_prices(EXAMPLE / "prices.csv"))
    world = World(nodes, prices, tuple(read_events(EXAMPLE / "events.csv")), policy)
    with closing(JobStore()) as store:
        store.load(EXAMPLE / "jobs.csv", Room(nodes))
        outcome = replay(world, store, folder)
    found = outputs.summary(outcome)
    report.write_report(folder, outcome, found, 6)
    return found


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    simulated(tmp_path / "out", Policy())
    page = (tmp_path / "out/report.html").read_text()
    assert not re.search(r"<script|<link|src=|https?://(?!www\.w3\.org)|@import|url\(", page)
    for title in ("GPUs", "Queue", "Power", "Price", "Value and cost", "Waits", "Preemptions", "Lost work"):
        assert f"<b>{title}</b>" in page
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(drawn) == 9
    numbers = [
        float(n)
        for svg in drawn
        for e in svg.iter()
        for n in re.findall(r"-?[\d.]+|nan|inf", e.get("points") or e.get("d") or "")
    ]
    assert len(numbers) > 1000
    assert all(0.0 <= n <= charts.WIDTH for n in numbers)


def test_the_report_draws_the_timelines_means(tmp_path: Path) -> None:
    found = simulated(tmp_path / "out", Policy())
    end_s = found["site"]["end_seconds"]
    buckets = report.read_buckets(tmp_path / "out/timeline.csv", end_s)
    for name in found["classes"]:
        held = [value or 0.0 for value in buckets.columns[f"{name}_gpu_milli"]]
        mean = sum(held) / len(held) / 1000.0
        assert mean * end_s == pytest.approx(found["classes"][name]["gpu_seconds"], rel=1e-3, abs=1.0)


def test_two_policies_are_told_apart(tmp_path: Path) -> None:
    found = {
        "first": simulated(tmp_path / "first", Policy()),
        "second": simulated(tmp_path / "second", Policy(order=Order.VALUE)),
    }
    head, table = compare.differences(found)
    assert head == ("OF", "FIGURE", "FIRST", "SECOND", "CHANGE")
    changes = {row[:2]: row[4] for row in table}
    assert changes["site", "energy_kwh"] != "=" or changes["batch", "wait_seconds_mean"] != "="
    assert changes["mining", "completion_seconds_mean"] == "-"
    compare.write_page(tmp_path, found)
    page = (tmp_path / "compare.html").read_text()
    assert 'src="first/report.html"' in page
    assert 'src="second/report.html"' in page


def test_equal_seeds_make_equal_days_and_others_make_others(tmp_path: Path) -> None:
    made = [synthetic.write(tmp_path / name, seed, None) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, same, other = ([path.read_bytes() for path in files.values()] for files in made)
    assert first == same
    assert [x == y for x, y in zip(first, other, strict=True)] == [True, False, False, False]
    nodes = read_nodes(made[0]["nodes"])
    with closing(JobStore()) as store:
        store.load(made[0]["jobs"], Room(nodes))
        jobs = list(store)
    asked_s = sum(job.gpus * job.duration_s for job in jobs if job.duration_s < 1e9)
    assert 0.7 * 8 * 86_400 < asked_s < 1.4 * 8 * 86_400
    assert {job.job_class.name for job in jobs} == {"INFERENCE", "TRAINING", "BATCH", "MINING"}
    assert any(row.usd_per_mwh < 0 for row in read_prices(made[0]["prices"]))
    assert read_events(made[0]["events"])


def test_a_made_up_day_is_for_the_nodes_that_are_given(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes.csv"
    nodes.write_text("node_id,gpus\na,2\nb,1\n")
    made = synthetic.write(tmp_path / "day", 0, nodes)
    assert made["nodes"] == nodes
    found = rows(made["jobs"])
    assert sum(row["class"] == "MINING" for row in found) == 3
    assert max(int(row["gpus"]) for row in found) == 2


def test_openb_tasks_become_jobs(tmp_path: Path) -> None:
    nodes, tasks = tmp_path / "n.csv", tmp_path / "t.csv"
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\nx,96000,393216,2,V100M32\ny,64000,1000,0,\n")
    tasks.write_text(
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,"
        "scheduled_time\n"
        "p1,3152,5600,1,460,,LS,Running,1000,2000,1100\n"
        "p2,12000,16384,2,1000,V100M16|V100M32,Guaranteed,Running,900,1500,900\n"
        "p3,1000,10,0,0,,BE,Pending,950,,\n"
    )
    converters.openb_nodes(nodes, tmp_path / "nodes.csv")
    converters.openb_jobs(tasks, tmp_path / "jobs.csv")
    found = read_nodes(tmp_path / "nodes.csv")
    assert [(n.node_id, n.gpus, n.cpus_milli, n.gpu_power_limit_w_max) for n in found] == [
        ("x", 2, 96_000, 300.0), ("y", 0, 64_000, 400.0),
    ]  # fmt: skip
    with closing(JobStore()) as store:
        store.load(tmp_path / "jobs.csv", Room(found))
        second, first = list(store)
    assert (first.job_id, first.submit_s, first.duration_s, first.gpu_share_milli) == (
        "p1",
        100.0,
        900.0,
        460,
    )
    assert (first.cpus_milli, first.job_class.name) == (3152, "INFERENCE")
    assert (second.gpu_models, second.gpus, second.job_class.name) == (("V100M16", "V100M32"), 2, "TRAINING")


OPENB_NODES = "sn,cpu_milli,memory_mib,gpu,model\nx,96000,393216,2,T4\ny,64000,1000,1,T4\n"
OPENB_TASKS = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos\n"
    "p2,12000,16384,2,1000,T4,LS\np1,3152,5600,1,460,,BE\np3,1000,10,0,0,,LS\n"
)


def test_openb_nodes_are_filled_with_endless_tasks_until_so_much_is_asked_for(tmp_path: Path) -> None:
    nodes, tasks, target = tmp_path / "n.csv", tmp_path / "t.csv", tmp_path / "jobs.csv"
    nodes.write_text(OPENB_NODES)
    tasks.write_text(OPENB_TASKS)
    converters.openb_filling(nodes, tasks, target, 83, lambda count: [1, 2, 0, 0, count])  # of 3 GPUs: 2.49
    found = rows(target)
    assert [(row["job_id"], row["submit_s"]) for row in found] == [
        ("0-p2", "0.0"), ("1-p3", "1.0"), ("2-p1", "2.0"),
    ]  # fmt: skip
    assert {(row["class"], row["duration_s"]) for row in found} == {("BATCH", "inf")}


@pytest.mark.parametrize("wrong", ["nodes", "tasks"])
def test_openb_nodes_are_not_filled_with_nothing(tmp_path: Path, wrong: str) -> None:
    texts = {"nodes": OPENB_NODES, "tasks": OPENB_TASKS}
    empty = {
        "nodes": "sn,cpu_milli,memory_mib,gpu\nx,1,1,0\n",
        "tasks": "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,1,1,0,0\n",
    }
    for name, text in (texts | {wrong: empty[wrong]}).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{wrong}: there is no GPU in the list"):
        converters.openb_filling(tmp_path / "nodes", tmp_path / "tasks", tmp_path / "jobs.csv", 100, range)


def test_philly_times_are_in_milliseconds_and_the_smaller_may_be_worth_more(tmp_path: Path) -> None:
    source = tmp_path / "trace.csv"
    source.write_text(
        "job_id,num_gpu,submit_time,duration,model_name\n0,1,0,3600000,vgg\n1,4,5000,7200000,bert\n"
    )
    converters.philly_jobs(source, tmp_path / "jobs.csv", restart_loss_s=30.0, value_by_service=True)
    first, second = rows(tmp_path / "jobs.csv")
    assert (first["value_usd_per_gpu_hour"], second["value_usd_per_gpu_hour"]) == ("100.000000", "12.500000")
    assert (second["submit_s"], second["duration_s"], second["restart_loss_s"]) == ("5.0", "7200.0", "30.0")
    converters.philly_jobs(source, tmp_path / "plain.csv", restart_loss_s=0.0, value_by_service=False)
    assert rows(tmp_path / "plain.csv")[0]["value_usd_per_gpu_hour"] == ""


def test_requests_become_the_replicas_that_serve_them(tmp_path: Path) -> None:
    source = tmp_path / "requests.csv"
    tokens = ((0, 100), (5, 100), (12, 400), (21, 50), (25, 150), (43, 10))
    source.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2023-11-16 18:17:{3 + s:02d}.9799600,{n * 5},{n // 2}\n" for s, n in tokens)
    )
    converters.azure_jobs(source, tmp_path / "jobs.csv", tokens_per_s=10.0, context_weight=0.1, window_s=10.0)
    # Tokens in windows of 10 s: 200, 400, 200, 0, 10; a GPU serves 100 in each.
    found = [(r["job_id"], r["submit_s"], r["duration_s"]) for r in rows(tmp_path / "jobs.csv")]
    assert found == [
        ("replica-0-0", "0.0", "30.0"),
        ("replica-1-0", "0.0", "30.0"),
        ("replica-2-1", "10.0", "10.0"),
        ("replica-3-1", "10.0", "10.0"),
        ("replica-0-4", "40.0", "10.0"),
    ]


def test_a_wrong_trace_is_named(tmp_path: Path) -> None:
    source = tmp_path / "requests.csv"
    source.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.5,1,1\n2023-11-16 18:17:04.4,1,1\nnow,1,1\n"
    )
    with pytest.raises(InputError) as refused:
        converters.azure_jobs(
            source, tmp_path / "jobs.csv", tokens_per_s=10.0, context_weight=0.1, window_s=10.0
        )
    assert ":3: TIMESTAMP: time runs backwards" in str(refused.value)
    assert ":4: TIMESTAMP: must be a time such as" in str(refused.value)
    tasks = tmp_path / "tasks.csv"
    tasks.write_text("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,1,1,1,1000\n")
    with pytest.raises(InputError, match="no task has creation_time"):
        converters.openb_jobs(tasks, tmp_path / "jobs.csv")
