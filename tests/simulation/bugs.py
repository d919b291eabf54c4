"""Bugs that somebody could make in good faith, as exact replacements of text; `planted.py` plants them."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOOP, LEDGER = "scheduler/control/loop.py", "scheduler/control/ledger.py"
REPORTS, ORDERS = "scheduler/control/reports.py", "scheduler/control/orders.py"
JOURNAL, LAUNCHER = "scheduler/effects/journal_sqlite.py", "scheduler/simulation/node.py"


@dataclass(frozen=True)
class Bug:
    """One bug: what it is, and each text that becomes another."""

    name: str
    where: str
    what: str
    file: str
    old: str
    new: str

    def planted(self) -> str:
        """The text of the file with the bug in it.

        Raises:
            ValueError: The code has moved on: what was to be replaced is not there once.
        """
        text = (ROOT / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            found = f"in {self.file} this is there {count} times, not once"
            raise ValueError(f"{self.name}: {found}; bring the bug up to date:\n{self.old}")
        return text.replace(self.old, self.new)


BUGS = (
    Bug(
        "orders_before_the_commit",
        "loop",
        "what follows from a tick is sent before it is on disk",
        LOOP,
        """        begun = time.perf_counter()
        committed = self.ledger.commit()
""",
        """        begun = time.perf_counter()
        for number, before in list(self.ledger._undo.items()):
            self.orders.follow(before, self.ledger._current(number))
        self._send()
        committed = self.ledger.commit()
""",
    ),
    Bug(
        "reports_of_a_tick_that_was_not_kept_are_dropped",
        "loop",
        "what arrived is not put back when the journal can't be written",
        LOOP,
        "        self.inbox.put_back(items)\n",
        "",
    ),
    Bug(
        "what_was_left_is_free",
        "hand-over",
        "a whole GPU that its job has left is free before anything is proved",
        "scheduler/control/board.py",
        "                if leaving.share_milli <= room and (job_id, attempt, uuid) not in self._proved:\n",
        "                if leaving.share_milli < room and (job_id, attempt, uuid) not in self._proved:\n",
    ),
    Bug(
        "nobody_is_buried",
        "recovery",
        "an attempt that no launcher holds any more is believed to run",
        REPORTS,
        "            else:\n                self._bury(job, now_s)\n",
        "",
    ),
    Bug(
        "a_stop_is_not_said_again",
        "recovery",
        "who was told to go before the crash, and was not signalled, is not stopped after it",
        REPORTS,
        "            self._control.orders.stop(current, current.attempts[-1], now_s)\n",
        "            pass\n",
    ),
    Bug(
        "a_start_is_not_said_again",
        "recovery",
        "an order to start that never arrived is believed to have",
        REPORTS,
        """        self._control.orders.start(job)
        if job.attempts[-1].notice""",
        """        if job.attempts[-1].notice""",
    ),
    Bug(
        "what_the_journal_knows_as_over_runs_on",
        "recovery",
        "a process whose attempt ended by the journal is left alone",
        REPORTS,
        "                control.orders.kill(key)\n",
        "                control.orders.forget(key)\n",
    ),
    Bug(
        "a_rollback_forgets_who_is_live",
        "ledger",
        "a tick that was not kept leaves its new jobs among the live ones",
        LEDGER,
        "                self._index(now, earlier)\n",
        "                pass\n",
    ),
    Bug(
        "commits_are_not_synced",
        "journal",
        "`synchronous` is off",
        "scheduler/effects/journal_file.py",
        'db.execute("PRAGMA synchronous = FULL")',
        'db.execute("PRAGMA synchronous = OFF")',
    ),
    Bug(
        "a_failed_commit_stays_staged",
        "journal",
        "events of a commit that failed go with the next",
        JOURNAL,
        """        self._head, self._hash = self._committed
        self._staged.clear()
""",
        "",
    ),
    Bug(
        "request_ids_are_not_kept",
        "journal",
        "a request_id is known only until its tick is over",
        JOURNAL,
        '            db.executemany("INSERT INTO requests VALUES (?, ?, ?)", self._requests)\n',
        "            pass\n",
    ),
    Bug(
        "memory_is_not_looked_at",
        "hand-over",
        "a GPU without processes is given on, whatever it still holds",
        "scheduler/control/handover.py",
        "        is_back = is_accounted(allowed)\n",
        "        is_back = True\n",
    ),
    Bug(
        "graces_are_halved",
        "launcher",
        "half of a grace is over when it begins",
        LAUNCHER,
        "        deadline_s = loop.time() + left_s\n",
        "        left_s /= 2\n        deadline_s = loop.time() + left_s\n",
    ),
    Bug(
        "starts_are_not_idempotent",
        "launcher",
        "an order to start that is said again starts again",
        LAUNCHER,
        "        if self._on_report is None or order.key in self._held:\n",
        "        if self._on_report is None:\n",
    ),
    Bug(
        "an_exit_is_told_to_nobody_later",
        "launcher",
        "what ends while no daemon listens is not held for the next",
        LAUNCHER,
        """        self._held[report.key].append(report)
        if self._on_report is not None:
            self._on_report(report)
""",
        """        if self._on_report is not None:
            self._held[report.key].append(report)
            self._on_report(report)
""",
    ),
    Bug(
        "attempts_are_forgotten_before_their_end_is_on_disk",
        "orders",
        "the launcher may drop an end as soon as it has told it",
        REPORTS,
        "        error = self._control.health.error_near(",
        "        self._control.effects.launcher.forget(report.key)\n"
        "        error = self._control.health.error_near(",
    ),
    Bug(
        "one_victim_too_many",
        "planner",
        "of those that may go all go, whether it takes them or not",
        "scheduler/planning/preemption.py",
        "    return None if best is None else (best >> len(candidates), table.victims(best))\n",
        "    return None if best is None else (best >> len(candidates), table.candidates)\n",
    ),
    Bug(
        "a_raise_counts_when_it_is_done",
        "power",
        "a limit that is about to rise counts as the lower one until it has",
        "scheduler/control/limits.py",
        "        return max(watts, self._asked.get(gpu.uuid, 0.0))\n",
        "        return watts\n",
    ),
    Bug(
        "a_shed_is_met_when_it_was_ordered",
        "power",
        "a shed is done when its limits are set",
        "scheduler/control/sheds.py",
        "if measured_w is not None and measured_w <= event.budget_w and self._is_news(event):",
        "if event.state is ShedState.SHEDDING and not self._power.limits._asked:",
    ),
    Bug(
        "the_energy_of_the_last_seconds_is_lost",
        "accounts",
        "what a job used after its last reading is booked for nobody when its tick is not kept",
        "scheduler/control/accounting.py",
        "                for user, sums in used.items():\n                    gpu.add(user, sums)\n",
        "",
    ),
)
