"""A real daemon's decisions, made again by the command: after kill -9, a reload, a budget; beside it too."""

import json
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from scheduler.effects.journal_file import chained, encode_head
from tests.harness.daemon import WATTSHIFT, Daemon, until
from tests.harness.miners import MINERS, mined

POLICY = '[policy]\norder = "{}"\nhysteresis_ratio = {}\n'
SECRET = "swordfish-4711"
DIGEST = '"plan_digest":"'
ALTERED = f"""
    UPDATE events SET body = CAST(replace(body, '{DIGEST}', '{DIGEST}f') AS BLOB) WHERE kind = 'PlanDecided'
"""


def wattshift(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [WATTSHIFT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def replayed(journal: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return wattshift("simulate", "--replay-journal", journal, *options)


def lines(told: subprocess.CompletedProcess[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a script gets: a line a decision that differs, and the totals."""
    *decisions, last = map(json.loads, told.stdout.splitlines())
    return decisions, last["totals"]


def rehash(db: sqlite3.Connection, changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Change the bodies of these kinds of events, and make the chain fit again."""
    running = bytes(32)
    for seq, kind, body in db.execute("SELECT seq, kind, body FROM events ORDER BY seq").fetchall():
        new = body if kind not in changes else json.dumps(changes[kind](json.loads(body))).encode()
        running = chained(running, seq, kind, new)
        db.execute("UPDATE events SET body = ?, hash = ? WHERE seq = ?", (new, running, seq))
        db.execute("UPDATE meta SET value = ? WHERE key = 'head'", (encode_head(seq, running),))


@pytest.fixture(scope="module")
def lived() -> Iterator[Daemon]:
    """A daemon that has decided much, was killed twice, was told another policy, and runs."""
    config = MINERS + POLICY.format("class", 0.3)
    with Daemon(gpus="4xH100", config=config) as daemon:
        daemon.start()
        until("all mine", lambda: mined(daemon) == 4)
        training = {"job_class": "training", "value_usd_per_gpu_hour": 0.3}
        daemon.run("sleep", "60", gpus=2, environment={"TOKEN": SECRET}, **training)
        until("two gave way", lambda: mined(daemon) == 2)
        prices = daemon.directory / "prices.csv"
        prices.write_text(f"start,usd_per_kwh\n{time.time() - 60:.0f},0.001\n")
        assert daemon.cli("power", "prices", str(prices)).returncode == 0
        daemon.set_budget(1500)
        until("somebody was stopped for it", lambda: mined(daemon) < 2)
        daemon.restart()
        daemon.set_budget(None)
        until("the miners are back", lambda: mined(daemon) == 2)
        daemon.config.write_text(MINERS + POLICY.format("value", 0.0))
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        until("it was reloaded", lambda: "configuration reloaded" in daemon.log())
        daemon.run("sleep", "60", gpus=1, job_class="batch", value_usd_per_gpu_hour=1.0)
        daemon.restart()
        daemon.run("sleep", "60", gpus=1, job_class="inference")
        yield daemon


def test_beside_the_daemon_every_decision_is_the_same(lived: Daemon) -> None:
    told = replayed(lived.state)
    assert told.returncode == 0, told.stderr
    decisions, totals = lines(replayed(lived.state, "-o", "json"))
    assert decisions == []
    assert totals["decisions"] == totals["same"] >= 8
    assert told.stdout == f"{totals['decisions']} decisions replayed, all the same\n"
    acted = {kind for kind, count in totals["actions"].items() if count}
    assert acted >= {"START", "PREEMPT", "REQUEUE", "LIMIT"}
    assert lived.verify().returncode == 0


def test_another_policy_is_shown_beside_each_decision_in_words_and_for_scripts(
    lived: Daemon, tmp_path: Path
) -> None:
    """By value the training that displaced the miners was worth too little more than they."""
    other = tmp_path / "other.toml"
    other.write_text('[policy]\norder = "value"\nhysteresis_ratio = 10.0\n')
    told = replayed(lived.state, "--policy", other, "--out", tmp_path / "out")
    assert told.returncode == 0
    decisions, totals = lines(replayed(lived.state, "--policy", other, "-o", "json"))
    assert totals["otherwise"] == len(decisions) > 0
    assert totals["other_actions"]["PREEMPT"] < totals["actions"]["PREEMPT"]
    assert f"the other policy decides {len(decisions)} of them otherwise" in told.stdout
    kept = [
        one for decision in decisions for one in decision["otherwise"] if one["other"]["action"] == "NONE"
    ]
    assert {(one["class"], one["then"]["action"], one["then"]["reason"]) for one in kept} == {
        ("MINING", "PREEMPT", "PREEMPTED_BY_HIGHER_RANK")
    }
    victim = kept[0]
    words = (
        f"{victim['who']} (mining) gives way to {victim['then']['preemptor']}: preempted by higher rank "
        "stays as it is"
    )
    assert any(" ".join(line.split()).endswith(words) for line in told.stdout.splitlines())
    every = [json.loads(line) for line in (tmp_path / "out/decisions.jsonl").read_text().splitlines()]
    assert len(every) == totals["decisions"]
    assert [decision for decision in every if decision["otherwise"]] == decisions
    assert json.loads((tmp_path / "out/totals.json").read_text()) == totals


def test_no_secret_is_in_what_decisions_are_made_from(lived: Daemon) -> None:
    bodies = [body for (body,) in lived.query("SELECT body FROM events")]
    assert len(bodies) > 20
    assert not any(SECRET.encode() in bytes(body) for body in bodies)


@pytest.fixture
def copy(lived: Daemon, tmp_path: Path) -> Path:
    """The journal as a file of its own."""
    path = tmp_path / "copy.sqlite"
    with closing(sqlite3.connect(lived.state / "journal.sqlite")) as db:
        db.execute("VACUUM INTO ?", (str(path),))
    return path


def test_a_copy_of_the_file_will_do(copy: Path) -> None:
    told = replayed(copy)
    assert (told.returncode, told.stderr) == (0, "")


def changed(path: Path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(sql, values)


def test_a_decision_that_is_another_one_now_is_told_with_exit_code_1(copy: Path) -> None:
    """As after an upgrade that plans otherwise; the chain is made to fit."""
    with closing(sqlite3.connect(copy)) as db, db:
        rehash(db, {"PlanDecided": lambda event: {**event, "plan_digest": "0" * 32}})
    told = replayed(copy)
    assert told.returncode == 1
    assert f"made plan {'0' * 32}" in told.stdout
    assert "starts on GPU-" in told.stdout
    decisions, totals = lines(replayed(copy, "-o", "json"))
    assert totals["different"] == totals["decisions"] == len(decisions)
    actions = [action["action"] for decision in decisions for action in decision["actions"]]
    assert actions[0] == "START"


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        (ALTERED, r"event \d+ \(PlanDecided\) does not match its hash"),
        ("DELETE FROM events WHERE seq = 7", "event 7 is missing"),
        ("UPDATE meta SET value = 2 WHERE key = 'format'", "has format 2, .* Use the version that wrote it"),
        ("DELETE FROM meta WHERE key = 'head'", "lacks its head"),
        ("DROP TABLE events", "no such table: events; name a daemon's state directory"),
    ],
)
def test_a_journal_that_is_not_whole_is_refused_with_the_remedy(copy: Path, sql: str, words: str) -> None:
    changed(copy, sql)
    told = replayed(copy)
    assert told.returncode == 1
    assert re.search(words, told.stderr), told.stderr
    assert "Traceback" not in told.stderr


def test_what_is_no_journal_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for content in (b"", b"not a database, however long it is " * 100):
        (tmp_path / "journal.sqlite").write_bytes(content)
        told = replayed(tmp_path)
        assert (told.returncode, told.stdout) == (1, "")
        assert "name a daemon's state directory" in told.stderr
    (tmp_path / "journal.sqlite").unlink()
    assert "does not exist; name the daemon's state directory" in replayed(tmp_path).stderr
    assert replayed(tmp_path / "nowhere").returncode == 2


def test_a_replay_takes_its_inputs_from_the_journal_alone(copy: Path) -> None:
    told = replayed(copy, "--synthetic", "--until", 5)
    assert told.returncode == 2
    assert "leave --synthetic, --until out" in told.stderr
    assert "goes with --replay-journal" in wattshift("simulate", "--synthetic", "-o", "json").stderr
