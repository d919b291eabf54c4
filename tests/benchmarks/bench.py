"""Benchmark figures as one JSON object on standard output: `make bench`.

    bench.py [--quick] [--only NAME ...] [--crash-instants N]

Each figure starts real daemons of its own on simulated GPUs, with real processes, in a temporary directory,
and reaches them over a Unix socket. Times don't fail a run; what does not work does. Times depend on what
else the machine does: each figure carries the load, and processor time beside wall time. Virtual processors
that others share change their speed by half from one second to the next: around each round of a latency a
loop that is always the same is timed, and targets are judged by the rounds in which it ran at its best.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import idle
import latency
import measure
import nvml_child
import recovery
import scrape
import throughput
from measure import DidNotWork, Figure
from node import Node, StartLine, naming, until

FIGURES: dict[str, Callable[["Bench"], Figure]] = {
    "start": latency.start,
    "start_after_a_pause": latency.start_after_a_pause,
    "preempt_one": latency.preempt_one,
    "preempt_eight": latency.preempt_eight,
    "command": latency.command,
    "true_jobs": throughput.true_jobs,
    "submissions": throughput.submissions,
    "restart": recovery.restart,
    "crash": recovery.crash,
    "idle": idle.idle,
    "nvml_child": nvml_child.nvml_child,
    "scrape": scrape.scrape,
}
CRASH_INSTANTS = 20
CRASH_INSTANTS_QUICK = 3


class Bench:
    """One run: its directory, its nodes, its options."""

    def __init__(self, directory: Path, *, quick: bool, crash_instants: int) -> None:
        self.directory = directory
        self.quick = quick
        self.crash_instants = crash_instants
        self.line = StartLine(directory)
        self.yardstick = measure.Yardstick()
        self._nodes = 0
        self._begun_s = time.perf_counter()

    def say(self, text: str) -> None:
        """Tell a person how far the run is."""
        print(f"{time.perf_counter() - self._begun_s:7.1f} s  {text}", file=sys.stderr, flush=True)

    @contextmanager
    def node(self, *, start: bool = True) -> Iterator[Node]:
        """A fresh node; nothing of it is left running."""
        self._nodes += 1
        node = Node(self.directory / f"node{self._nodes}")
        try:
            if start:
                node.start()
            yield node
        finally:
            node.stop()


def run(bench: Bench, names: list[str]) -> tuple[Figure, list[str]]:
    """Take the figures; returns them, and what did not work."""
    figures: Figure = {}
    problems = []
    for name in names:
        bench.say(name)
        load, begun_s = measure.load(), time.perf_counter()
        try:
            figure = FIGURES[name](bench)
        except (DidNotWork, grpc.RpcError, OSError) as error:
            problems.append(f"{name}: {error}")
            figure = {"failed": str(error)}
        summary = FIGURES[name].__doc__ or ""
        figures[name] = {
            "what": " ".join(summary.partition("\n\n")[0].split()),
            **figure,
            "load": {"before": load, "after": measure.load()},
            "took_s": round(time.perf_counter() - begun_s, 1),
        }
        for target in figure.get("targets", ()):
            bench.say(f"  {'met   ' if target['met'] else 'MISSED'} {target['target']}: {target['value']}")
    return figures, problems


def main() -> int:
    """Take the figures that are asked for and print them; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--quick", action="store_true", help="about a minute, less exact")
    parser.add_argument("--crash-instants", type=int, help="kills of the daemon (200 = the full figure)")
    options = parser.parse_args()
    crashes = options.crash_instants or (CRASH_INSTANTS_QUICK if options.quick else CRASH_INSTANTS)
    directory = Path(tempfile.mkdtemp(prefix="wattshift-bench-"))
    where = {"machine": measure.machine(), "code": measure.code()}
    bench = Bench(directory, quick=options.quick, crash_instants=crashes)
    figures, problems = run(bench, options.only or list(FIGURES))
    bench.line.close()
    try:
        until("nothing is left running", lambda: not naming(directory))
    except DidNotWork as error:
        problems.append(f"{error}: processes {naming(directory)}, see {directory}")
    else:
        shutil.rmtree(directory)
    print(json.dumps({**where, "quick": options.quick, "figures": figures, "problems": problems}, indent=2))
    for problem in problems:
        print(f"did not work: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
