"""What GPUs that report errors do to themselves and to the jobs on them, round by round."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.control.board import GpuBoard, NodeSize
from scheduler.control.commands import CommandHandler
from scheduler.control.health import OWN_KILL_S, RETURNS_MAX, WELL_S_FIRST, Health
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.control.telemetry import Telemetry
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.effects.nvml_events import KINDS
from scheduler.model.events import GpuMarked
from scheduler.model.gpus import EVENTS_BEGIN, GpuBooked, GpuEvent, GpuIdentity, GpuSample, GpuState
from scheduler.model.health import (
    TABLE_VERSION,
    Outcome,
    is_known_xid,
    outcome_of_event,
    outcome_of_recovery_action,
    outcome_of_xid,
)
from scheduler.model.jobs import Job, JobState
from scheduler.model.policy import Policy
from scheduler.model.reasons import Reason
from tests.harness.values import end, start, started, submission

A = GpuIdentity("GPU-a", 0, "NVIDIA H100 80GB HBM3", 81_559)
B = GpuIdentity("GPU-b", 1, "NVIDIA H100 80GB HBM3", 81_559)
HEALTH_PAGE = Path(__file__).resolve().parents[2] / "docs/operating/health.md"
PERIOD_S = 1.0
LOST = "ERROR_GPU_IS_LOST"


class Ward:
    """Two GPUs whose every round a test writes; a job may run on the first."""

    def __init__(self, journal: SqliteJournal, *, rebooted: bool = False, begins: bool = False) -> None:
        self.ledger = Ledger(journal, Policy())
        self.board = GpuBoard(self.ledger, (NodeSize(8, 1024, 64),), Telemetry(Meters()))
        self.meters = Meters()
        self.watched: list[str] = []
        self.at_s = 1000.0
        self.energy_mj = 10_000
        controller: Any = SimpleNamespace(
            ledger=self.ledger,
            board=self.board,
            meters=self.meters,
            commands=CommandHandler(self.ledger, self.board, pending_max=10),
            occupancy=SimpleNamespace(prove_again=self.watched.append),
            rebooted=rebooted,
        )
        self.health = Health(controller)
        self.health.start()
        self.tick(*[0][: int(begins)], kind=EVENTS_BEGIN)

    def run_job(self) -> None:
        for event in (submission(1), start(1, 1, 1.0, "GPU-a"), started(1)):
            self.ledger.apply(event)

    def tick(self, *xids: int, seconds: float = PERIOD_S, kind: str = "xid", **sample: Any) -> None:
        """A round in which the first GPU tells these XIDs and reads like that."""
        errors = {"GPU-a": sample.pop("error")} if "error" in sample else {}
        self.at_s += seconds
        self.energy_mj += 1000
        fields = {"recovery_action": 0, "energy_mj": self.energy_mj, **sample}
        readings = GpuReadings(
            identities=(A, B),
            samples=(
                *((GpuSample("GPU-a", self.at_s, **fields),) if LOST not in errors.values() else ()),
                GpuSample("GPU-b", self.at_s, recovery_action=0, energy_mj=self.energy_mj),
            ),
            errors=errors,
            events=tuple(GpuEvent("GPU-a", self.at_s, kind, xid) for xid in xids),
        )
        fresh = self.board.read(readings)
        self.health.read(readings, fresh, self.at_s)

    def tick_for(self, seconds: float, **sample: Any) -> None:
        for _ in range(round(seconds / PERIOD_S)):
            self.tick(**sample)

    @property
    def mark(self) -> tuple[str, str] | None:
        mark = self.ledger.marks.get("GPU-a")
        return None if mark is None else (mark.reason, mark.detail.partition(" (")[0])

    @property
    def job(self) -> Job:
        job = self.ledger.job(1)
        assert job is not None
        return job

    def errors(self) -> dict[str, int]:
        return {kind: count for (_, kind), count in self.meters.gpu_errors.items()}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path, now_s=0.0)
    yield journal
    journal.close()


@pytest.fixture
def ward(journal: SqliteJournal) -> Ward:
    return Ward(journal)


# The table -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (13, Outcome.RESTART_JOB),
        (31, Outcome.RESTART_JOB),
        (43, Outcome.IGNORE),
        (45, Outcome.IGNORE),
        (48, Outcome.RESET),
        (54, Outcome.SERVICE),
        (63, Outcome.IGNORE),
        (74, Outcome.RESET),
        (79, Outcome.REBOOT),
        (94, Outcome.RESTART_JOB),
        (95, Outcome.RESET),
        (109, Outcome.RESET),
        (119, Outcome.RESET),
        (149, Outcome.RESET),
        (154, Outcome.IGNORE),
        (164, Outcome.SERVICE),
        (999, Outcome.SERVICE),
    ],
)
def test_an_xid_means_what_the_catalogue_says_and_an_unknown_one_asks_for_a_person(
    number: int, outcome: Outcome
) -> None:
    assert outcome_of_xid(number) is outcome


def test_the_table_for_operators_is_the_table_that_decides() -> None:
    rows = [line.split("|")[1] for line in HEALTH_PAGE.read_text().splitlines() if line.startswith("| XIDs ")]
    outcomes = (Outcome.IGNORE, Outcome.RESTART_JOB, Outcome.RESET, Outcome.REBOOT, Outcome.SERVICE)
    documented: dict[int, Outcome] = {}
    for row, outcome in zip(rows, outcomes, strict=True):
        words = row.partition(";")[0].partition(" and ")[0].removeprefix(" XIDs ").split(",")
        for first, _, last in (word.strip().partition("–") for word in words):
            documented |= dict.fromkeys(range(int(first), int(last or first) + 1), outcome)
    assert documented == {xid: outcome_of_xid(xid) for xid in range(1000) if is_known_xid(xid)}
    assert TABLE_VERSION in HEALTH_PAGE.read_text()


def test_every_event_and_every_recovery_action_has_an_outcome() -> None:
    assert [outcome_of_event(kind, 48) for kind in KINDS.values()].count(Outcome.RESET) == 3
    assert [outcome_of_recovery_action(action).name for action in range(9)] == [
        *("IGNORE", "RESET", "REBOOT", "RESET", "RESET", "SERVICE", "RESET", "REBOOT", "SERVICE")
    ]


# Quarantine ------------------------------------------------------------------------------------


def test_an_error_that_needs_a_reset_quarantines_the_gpu_and_moves_its_job(ward: Ward) -> None:
    ward.run_job()
    ward.tick(62, recovery_action=None)
    assert ward.mark == ("GPU_NEEDS_RESET", "XID 62")
    assert ward.job.state is JobState.PREEMPTING
    notice = ward.job.attempts[-1].notice
    assert notice is not None
    assert notice.reason is Reason.GPU_FAILED
    assert "GPU-b" not in ward.ledger.marks


def test_an_error_of_the_job_itself_leaves_gpu_and_job_alone_and_is_told_with_its_end(ward: Ward) -> None:
    ward.run_job()
    ward.tick(31)
    assert (ward.mark, ward.job.state) == (None, JobState.RUNNING)
    assert ward.health.error_near(ward.job, ward.at_s + 5.0) == "GPU GPU-a reported XID 31"
    assert ward.health.error_near(ward.job, ward.at_s + 500.0) == ""
    assert ward.errors() == {"xid_31": 1}


def test_the_worse_of_two_errors_counts_and_a_lesser_one_later_changes_nothing(ward: Ward) -> None:
    ward.tick(48, 79)
    assert ward.mark == ("GPU_NEEDS_REBOOT", "XID 79")
    ward.tick(48)
    assert ward.mark == ("GPU_NEEDS_REBOOT", "XID 79")
    ward.tick(54)
    assert ward.mark == ("GPU_NEEDS_SERVICE", "XID 54")


def test_what_an_operator_closed_stays_the_operators(ward: Ward) -> None:
    ward.ledger.apply(
        GpuMarked(1.0, "GPU-a", GpuState.CORDONED.value, Reason.CORDONED_BY_OPERATOR, "riser swap")
    )
    ward.tick(62)
    ward.tick_for(10 * WELL_S_FIRST)
    assert ward.mark == ("CORDONED_BY_OPERATOR", "riser swap")


@pytest.mark.parametrize(
    ("sample", "mark"),
    [
        ({"has_remap_failed": True}, ("GPU_NEEDS_SERVICE", "rows of its memory that can't be remapped")),
        ({"is_remap_pending": True}, None),
        ({"recovery_action": 1}, ("GPU_NEEDS_RESET", "recovery action 1")),
        ({"recovery_action": 2}, ("GPU_NEEDS_REBOOT", "recovery action 2")),
        ({"error": LOST}, ("GPU_NEEDS_REBOOT", "gpu is lost")),
        ({"error": "ERROR_RESET_REQUIRED"}, ("GPU_NEEDS_RESET", "reset required")),
        ({"error": "ERROR_TIMEOUT"}, None),
    ],
)
def test_what_a_sample_says_counts_as_an_event_does(
    ward: Ward, sample: dict[str, Any], mark: tuple[str, str] | None
) -> None:
    ward.tick(**sample)
    assert ward.mark == mark


def test_uncorrectable_errors_count_where_nobody_else_tells_of_them(ward: Ward) -> None:
    ward.tick(ecc_uncorrected=3, recovery_action=None)
    assert ward.mark is None, "what was there before us is no news"
    ward.tick(ecc_uncorrected=5, recovery_action=None)
    assert ward.mark == ("GPU_NEEDS_RESET", "an uncorrectable error of its memory")
    assert ward.errors() == {"ecc_uncorrected": 2}


def test_uncorrectable_errors_are_only_counted_where_the_driver_gives_its_verdict(ward: Ward) -> None:
    ward.tick(ecc_uncorrected=3)
    ward.tick(ecc_uncorrected=5, ecc_corrected=1)
    assert (ward.mark, ward.errors()) == (None, {"ecc_uncorrected": 2})


# Our own kills ---------------------------------------------------------------------------------


@pytest.mark.parametrize("xid", [43, 45])
def test_what_follows_our_own_kill_is_no_error_of_the_gpu(ward: Ward, xid: int) -> None:
    ward.run_job()
    ward.health.ended(ward.job, ward.at_s)
    ward.ledger.apply(end(1))
    ward.tick(xid)
    assert (ward.mark, ward.errors()) == (None, {"own_kill": 1})
    ward.tick(xid, seconds=2 * OWN_KILL_S)
    assert (ward.mark, ward.errors()) == (None, {"own_kill": 1, f"xid_{xid}": 1})


def test_a_real_error_beside_our_own_kill_counts(ward: Ward) -> None:
    ward.run_job()
    ward.health.ended(ward.job, ward.at_s)
    ward.tick(45, 119, recovery_action=None)
    assert ward.mark == ("GPU_NEEDS_RESET", "XID 119")


# Coming back -----------------------------------------------------------------------------------


# Events that were missed -----------------------------------------------------------------------


def test_a_gpu_that_is_heard_anew_may_have_told_something_meanwhile(ward: Ward) -> None:
    ward.run_job()
    ward.tick(0, kind=EVENTS_BEGIN)
    assert ward.errors() == {"events_missed": 1}
    assert "XIDs may have been missed" in ward.health.error_near(ward.job, ward.at_s)
    assert ward.mark is None


def test_that_a_gpu_is_heard_for_the_first_time_is_no_gap(journal: SqliteJournal) -> None:
    ward = Ward(journal, begins=True)
    assert ward.errors() == {}
    ward.tick(0, kind=EVENTS_BEGIN)
    assert ward.errors() == {"events_missed": 1}


def test_a_gap_does_not_hide_the_error_that_was_heard(ward: Ward) -> None:
    ward.run_job()
    ward.tick(31)
    ward.tick(0, kind=EVENTS_BEGIN)
    assert "XID 31" in ward.health.error_near(ward.job, ward.at_s)


def test_memory_errors_of_a_gap_show_in_the_counters_where_the_driver_gives_no_verdict(ward: Ward) -> None:
    ward.tick(recovery_action=None, rows_remapped_uncorrected=1)
    assert ward.mark is None, "remapped long ago"
    ward.tick(0, kind=EVENTS_BEGIN, recovery_action=None, rows_remapped_uncorrected=2)
    assert ward.mark == ("GPU_NEEDS_RESET", "an uncorrectable error of its memory")


def test_a_gpu_comes_back_when_the_driver_has_needed_nothing_for_a_while(ward: Ward) -> None:
    ward.tick(62, recovery_action=1)
    ward.tick_for(5 * WELL_S_FIRST, recovery_action=1)
    assert ward.mark == ("GPU_NEEDS_RESET", "XID 62")
    ward.tick_for(WELL_S_FIRST)
    assert ward.mark is not None
    ward.tick()
    assert (ward.mark, ward.watched) == (None, ["GPU-a"]), "it is to be proved free before it is used"


def test_without_a_verdict_a_reset_must_be_seen(ward: Ward) -> None:
    ward.tick(62, recovery_action=None)
    ward.tick_for(10 * WELL_S_FIRST, recovery_action=None)
    assert ward.mark == ("GPU_NEEDS_RESET", "XID 62")
    ward.energy_mj = 0  # counters begin anew
    ward.tick_for(WELL_S_FIRST + 2, recovery_action=None)
    assert ward.mark is None


def test_a_gpu_that_fell_off_the_bus_comes_back_when_it_is_there_again(ward: Ward) -> None:
    ward.tick(79, error=LOST)
    ward.tick_for(100.0, error=LOST)
    assert ward.mark == ("GPU_NEEDS_REBOOT", "XID 79")
    assert not ward.board.is_present("GPU-a")
    ward.tick_for(WELL_S_FIRST + 1, recovery_action=None)
    assert ward.mark is None


def test_a_reboot_is_a_reset(ward: Ward, journal: SqliteJournal) -> None:
    ward.tick(79, recovery_action=None)
    ward.ledger.commit()
    after = Ward(journal, rebooted=True)
    assert after.mark == ("GPU_NEEDS_REBOOT", "XID 79")
    after.tick_for(WELL_S_FIRST + 1, recovery_action=None)
    assert after.mark is None


def test_a_daemon_that_comes_again_has_seen_no_reset(ward: Ward, journal: SqliteJournal) -> None:
    ward.tick(79, recovery_action=None)
    ward.ledger.commit()
    after = Ward(journal)
    after.tick_for(10 * WELL_S_FIRST, recovery_action=None)
    assert after.mark == ("GPU_NEEDS_REBOOT", "XID 79")


def test_a_reset_while_no_daemon_ran_shows_in_the_counter(ward: Ward, journal: SqliteJournal) -> None:
    ward.tick(62, recovery_action=None)
    ward.ledger.commit()
    after = Ward(journal)
    booked = GpuBooked("GPU-a", after.at_s, after.at_s, 10**12, 70.0, (("GPU-a", 1),))
    after.ledger.booked = {"GPU-a": booked}
    after.health.start()
    after.tick_for(WELL_S_FIRST + 1, recovery_action=None)
    assert after.mark is None


@pytest.mark.parametrize("energy_mj", [None, 500_000_000], ids=["not read", "backwards by a little"])
def test_a_counter_that_is_only_wrong_for_a_moment_is_no_reset(ward: Ward, energy_mj: int | None) -> None:
    ward.energy_mj = 600_000_000
    ward.tick(62, recovery_action=None)
    ward.tick(recovery_action=None, energy_mj=energy_mj)
    ward.tick_for(10 * WELL_S_FIRST, recovery_action=None)
    assert ward.mark == ("GPU_NEEDS_RESET", "XID 62")


def test_a_reset_shows_although_a_counter_was_not_read_in_between(ward: Ward) -> None:
    ward.energy_mj = 600_000_000
    ward.tick(62, recovery_action=None)
    ward.tick(recovery_action=None, energy_mj=None)
    ward.energy_mj = 0
    ward.tick_for(WELL_S_FIRST + 2, recovery_action=None)
    assert ward.mark is None


def test_errors_of_its_memory_count_although_they_were_not_read_in_between(ward: Ward) -> None:
    ward.tick(ecc_uncorrected=3, recovery_action=None)
    ward.tick(recovery_action=None)
    ward.tick(ecc_uncorrected=5, recovery_action=None)
    assert ward.mark == ("GPU_NEEDS_RESET", "an uncorrectable error of its memory")
    assert ward.errors() == {"ecc_uncorrected": 2}


def test_what_needs_a_person_never_comes_back_by_itself(ward: Ward) -> None:
    ward.tick(54)
    ward.energy_mj = 0
    ward.tick_for(100 * WELL_S_FIRST)
    assert ward.mark == ("GPU_NEEDS_SERVICE", "XID 54")


def test_a_gpu_that_fails_again_and_again_waits_longer_and_then_for_a_person(ward: Ward) -> None:
    waited = []
    for _ in range(RETURNS_MAX):
        ward.tick(62)
        begun_s = ward.at_s
        while ward.mark is not None:
            ward.tick()
        waited.append(ward.at_s - begun_s - PERIOD_S)
    assert waited == [WELL_S_FIRST, 2 * WELL_S_FIRST, 4 * WELL_S_FIRST]
    ward.tick(62)
    assert ward.mark == ("GPU_NEEDS_SERVICE", "XID 62, after it came back 3 times within a day")
    ward.tick_for(100 * WELL_S_FIRST)
    assert ward.mark is not None


def test_other_quarantines_are_not_health_s_to_end(ward: Ward) -> None:
    ward.ledger.apply(
        GpuMarked(1.0, "GPU-a", GpuState.QUARANTINED.value, Reason.HANDOVER_TIMED_OUT, "still held")
    )
    ward.energy_mj = 0
    ward.tick_for(10 * WELL_S_FIRST)
    assert ward.mark == ("HANDOVER_TIMED_OUT", "still held")
