"""Scenarios: stories in TOML (`scenarios/*.toml`), read into scripts.

A scenario has `gpus`, `until_s` (the story's end; then all must come right as in any run), perhaps
`sampling_s`, `miners` and `node`, and tables: `[[jobs]]` (a name, when it comes, what it wants of us
and how its process behaves), `[[operators]]` (what they, the grid and the market ask for), `[[faults]]`, and
`[[expect]]` (what must be so at a moment). `crash_at` names steps: the story is told once for each, with the
daemon killed there. `[inference]` makes jobs of a trace of requests: as many replicas as each minute needs.
"""

import csv
import math
import os
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from scheduler.model.jobs import JobClass, JobSpec, OnPreempt, RestartRule
from scheduler.simulation.machine import Workload
from tests.harness.values import SPEC
from tests.simulation.script import Arrival, Expectation, Fault, Script, Wish

FOLDER = Path(__file__).parent / "scenarios"
# Data sets aren't shipped with the project.
DATA = Path(os.environ.get("WATTSHIFT_BENCH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
_MINUTE_S = 60.0

Table = dict[str, Any]


def scripts(path: Path) -> dict[str, Script | None]:
    """The scripts of a scenario's file, by what is different in each; None where its data set is not here."""
    said = tomllib.loads(path.read_text(encoding="utf-8"))
    crash_at, crash_from_s = said.pop("crash_at", []), said.pop("crash_from_s", 0.0)
    down_s = said.pop("crash_for_s", 1.0)
    traces = said.get("inference", {}).pop("traces", [""])
    if crash_at:
        script = _script(said, "")
        return {
            word: replace(
                script, faults=(*script.faults, Fault("crash_at_step", crash_from_s, down_s, 0, 1, word))
            )
            for word in crash_at
        }
    return {trace: _script(said, trace) if _path(trace).exists() else None for trace in traces}


def _script(said: Table, trace: str) -> Script:
    jobs = [_arrival(table) for table in said.get("jobs", [])]
    if trace:
        jobs += _replicas(said["inference"], _trace(trace))
    return Script(
        seed=0,
        gpus=said["gpus"],
        arrivals=tuple(jobs),
        wishes=tuple(Wish(**table) for table in said.get("operators", [])),
        faults=tuple(Fault(**table) for table in said.get("faults", [])),
        miners=said.get("miners", False),
        sampling_s=said.get("sampling_s", 1.0),
        node=said.get("node", {"cpus": 64, "memory_mib": 512_000}),
        faults_s=said["until_s"],
        expectations=tuple(_expectation(table) for table in said.get("expect", [])),
    )


_ENUMS = {"job_class": JobClass, "on_preempt": OnPreempt, "restart": RestartRule}
_CLIENT = ("at_s", "gives_up_s", "says_again")
_WORK_FIELDS = {field.name for field in fields(Workload)}


def _arrival(table: Table) -> Arrival:
    table = {("job_class" if key == "class" else key): value for key, value in table.items()}
    client = {key: table.pop(key) for key in _CLIENT if key in table}
    work = {key: table.pop(key) for key in list(table) if key in _WORK_FIELDS and key != "restart_loss_s"}
    wanted = {key: _ENUMS[key][value] if key in _ENUMS else value for key, value in table.items()}
    spec = _spec(**wanted)
    behaviour = Workload(
        **{"restart_loss_s": spec.restart_loss_s, "share_milli": spec.gpu_share_milli, **work}
    )
    return Arrival(spec=spec, workload=behaviour, **client)


def _spec(*, name: str, job_class: JobClass, **wanted: Any) -> JobSpec:
    preemptible = {"preemptible": job_class is not JobClass.INFERENCE}
    return replace(SPEC, name=name, command=("work", name), job_class=job_class, **{**preemptible, **wanted})


def _expectation(table: Table) -> Expectation:
    table = dict(table)
    who = {key: table.pop(key) for key in ("at_s", "job", "gpu") if key in table}
    return Expectation(**who, job_class=table.pop("class", ""), facts=tuple(table.items()))


# Traces -----------------------------------------------------------------------------------------


def _path(trace: str) -> Path:
    """Ours lie beside the stories."""
    return FOLDER / trace if (FOLDER / trace).exists() else DATA / "azure_llm_2023" / trace


def _trace(name: str) -> list[float]:
    """The arrivals of requests, in seconds from the first."""
    with _path(name).open(newline="", encoding="utf-8") as file:
        # Seven digits of a second's fraction are one more than Python reads.
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in csv.DictReader(file)]
    return [time - times[0] for time in sorted(times)]


def _replicas(how: Table, requests: list[float]) -> Iterator[Arrival]:
    """Jobs that together are, in each minute, as many replicas as its requests need."""
    minutes = math.ceil((requests[-1] + 1e-9) / _MINUTE_S)
    needed = [0] * (minutes + 1)
    for at_s in requests:
        needed[int(at_s // _MINUTE_S)] += 1
    needed = [min(how["replicas_max"], math.ceil(n / how["requests_per_minute"])) for n in needed]
    for replica in range(1, how["replicas_max"] + 1):
        begun: int | None = None
        for minute, count in enumerate([*needed, 0]):
            if count >= replica and begun is None:
                begun = minute
            elif count < replica and begun is not None:
                yield _arrival(
                    {
                        "name": f"replica {replica} of minute {begun}",
                        "class": "INFERENCE",
                        "at_s": how["from_s"] + begun * _MINUTE_S,
                        "duration_s": (minute - begun) * _MINUTE_S,
                        "value_microusd_per_gpu_hour": 4_000_000,
                    }
                )
                begun = None
