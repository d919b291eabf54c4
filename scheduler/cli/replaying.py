"""`simulate --replay-journal`: decisions made again, and what another policy would have decided."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from scheduler.cli import words
from scheduler.cli.exit_codes import ExitCode
from scheduler.cli.failures import CliError
from scheduler.cli.progress import ProgressBar

if TYPE_CHECKING:
    from collections import Counter

    from scheduler.model.policy import Policy
    from scheduler.simulation.decisions import Decision, Deed, Otherwise, Totals

DECISIONS_NAME = "decisions.jsonl"
TOTALS_NAME = "totals.json"
# Rows for a person, who can't read more; the JSON has all.
ROWS_SHOWN_MAX = 100
_ACTIONS = {
    "START": "starts",
    "PREEMPT": "gives way",
    "STOP": "is stopped",
    "REQUEUE": "is requeued",
    "FAIL": "fails",
    "LIMIT": "is limited",
    "WAIT": "waits",
    "NONE": "stays as it is",
}
_COUNTED = {
    "START": "start",
    "PREEMPT": "preemption",
    "STOP": "stop",
    "REQUEUE": "requeue",
    "FAIL": "failure",
    "LIMIT": "power limit",
}


def replay(journal: Path, policy: Policy | None, out: Path | None, *, as_json: bool) -> int:
    """Make the decisions again, tell what differs, and return the exit code."""
    from scheduler.simulation.decisions import Decisions

    decisions = Decisions(journal, policy)
    told = _Told(with_policy=policy is not None)
    with ExitStack() as stack:
        bar = stack.enter_context(ProgressBar("replaying"))
        file = None if out is None else stack.enter_context(_opened(out))
        for decision in decisions.again():
            bar.tell(decision.part, f"{decisions.totals.decisions:,} decisions")
            line = ""
            if file is not None or (as_json and _differs(decision)):
                line = json.dumps(_record(decision))
            if file is not None:
                file.write(line + "\n")
            if not _differs(decision):
                continue
            if as_json:
                print(line)
            else:
                told.add(decision)
    totals = decisions.totals
    if not totals.decisions:
        raise _nothing(journal, totals)
    figures = _figures(totals, with_policy=policy is not None)
    if out is not None:
        (out / TOTALS_NAME).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps({"totals": figures}))
    else:
        told.print()
        for sentence in _sentences(totals, with_policy=policy is not None):
            print(sentence)
    if out is not None:
        print(f"every decision: {out / DECISIONS_NAME}", file=sys.stderr)
    return ExitCode.OK if totals.same == totals.decisions else ExitCode.FAILED


def _nothing(journal: Path, totals: Totals) -> CliError:
    why = "the daemon has not decided anything yet"
    if totals.skipped:
        why = f"{totals.skipped} decisions are left of a row whose beginning has aged out"
    return CliError(
        ExitCode.FAILED,
        f"{journal} has no decision that can be made again: {why}. Try again when it has decided more",
    )


def _opened(out: Path) -> TextIO:
    out.mkdir(parents=True, exist_ok=True)
    return (out / DECISIONS_NAME).open("w", encoding="utf-8")


def _differs(decision: Decision) -> bool:
    return not decision.is_same or bool(decision.otherwise)


# For a person -------------------------------------------------------------------------------------


class _Told:
    """The first differences, for a person."""

    def __init__(self, *, with_policy: bool) -> None:
        self._with_policy = with_policy
        self._others: list[tuple[str, ...]] = []
        self._changed: list[str] = []
        self._left_out = 0

    def add(self, decision: Decision) -> None:
        """Take a decision that is not what it was, or that the other policy makes otherwise."""
        changed = [] if decision.is_same else list(_change(decision))
        others = list(_other_rows(decision))
        if len(self._changed) + len(self._others) + len(changed) + len(others) > ROWS_SHOWN_MAX:
            self._left_out += 1
            return
        self._changed += changed
        self._others += others

    def print(self) -> None:
        """Write them."""
        from scheduler.cli.output import print_table, table

        for line in self._changed:
            print(line)
        if self._others:
            print_table(
                table(("WHEN", "EVENT", "WHO", "POLICY THEN", "OTHER POLICY"), self._others, ("EVENT",))
            )
        if self._left_out:
            print(f"... and {words.count(self._left_out, 'more decision')}; --out DIR or -o json has all")


def _change(decision: Decision) -> Iterator[str]:
    from importlib.metadata import version

    by = f"wattshift {decision.version}" if decision.version else "an earlier wattshift"
    yield (
        f"event {decision.event} of {_moment(decision)}: {by} made plan {decision.stored_digest}, "
        f"wattshift {version('wattshift')} makes {decision.digest}:"
    )
    names = words.gpu_names(decision.snapshot.gpus.uuid)
    if not decision.deeds:
        yield "  it does nothing; who waits goes on waiting"
    for subject, deed in decision.deeds:
        yield words.clean(f"  {names.get(subject, subject)} {_deed_words(deed, names)}")


def _other_rows(decision: Decision) -> Iterator[tuple[str, ...]]:
    names = words.gpu_names(decision.snapshot.gpus.uuid)
    for one in decision.otherwise:
        yield (
            _moment(decision),
            str(decision.event),
            f"{one.job} ({one.job_class.name.lower()})" if one.job_class is not None else names[one.gpu],
            _deed_words(one.then, names),
            _deed_words(one.other, names),
        )


def _moment(decision: Decision) -> str:
    return datetime.fromtimestamp(decision.at_s).astimezone().isoformat(" ", timespec="milliseconds")


def _deed_words(deed: Deed, names: dict[str, str]) -> str:
    text = _ACTIONS[deed.action]
    if deed.gpus:
        text += f" on {', '.join(names[uuid] for uuid in deed.gpus)}"
    if deed.preemptor:
        text += f" to {deed.preemptor}"
    if deed.limit_w is not None:
        text += f" to {deed.limit_w} W"
    return text if deed.reason is None else f"{text}: {words.spoken(deed.reason)}"


def _sentences(totals: Totals, *, with_policy: bool) -> Iterator[str]:
    different = totals.decisions - totals.same
    replayed = f"{words.count(totals.decisions, 'decision')} replayed"
    yield f"{replayed}, {different} not the same" if different else f"{replayed}, all the same"
    if totals.skipped:
        yield f"{totals.skipped} before them were left out: what they are told against has aged out"
    if with_policy:
        yield f"the other policy decides {totals.otherwise} of them otherwise"
        yield f"policy then:  {_counted(totals.then)}"
        yield f"other policy: {_counted(totals.other)}"


def _counted(actions: Counter[str]) -> str:
    return ", ".join(words.count(actions[kind], name) for kind, name in _COUNTED.items())


# For a script -------------------------------------------------------------------------------------


def _record(decision: Decision) -> dict[str, Any]:
    return {
        "event": decision.event,
        "at_s": decision.at_s,
        "version": decision.version,
        "same": decision.is_same,
        "plan_digest": decision.stored_digest,
        "replayed_digest": decision.digest,
        "actions": [{"who": subject, **_deed_record(deed)} for subject, deed in decision.deeds],
        "otherwise": [_other_record(one) for one in decision.otherwise],
    }


def _other_record(one: Otherwise) -> dict[str, Any]:
    return {
        "who": one.job or one.gpu,
        "class": "" if one.job_class is None else one.job_class.name,
        "then": _deed_record(one.then),
        "other": _deed_record(one.other),
    }


def _deed_record(deed: Deed) -> dict[str, Any]:
    return {
        "action": deed.action,
        "gpus": list(deed.gpus),
        "preemptor": deed.preemptor,
        "limit_w": deed.limit_w,
        "reason": "" if deed.reason is None else deed.reason.value,
    }


def _figures(totals: Totals, *, with_policy: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "decisions": totals.decisions,
        "same": totals.same,
        "different": totals.decisions - totals.same,
        "skipped": totals.skipped,
        "actions": {kind: totals.then[kind] for kind in _COUNTED},
    }
    if with_policy:
        figures["otherwise"] = totals.otherwise
        figures["other_actions"] = {kind: totals.other[kind] for kind in _COUNTED}
    return figures
