"""The report of a grid event: what was asked, drawn, delivered, done to whom, and the method's error."""

import asyncio
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.control.event_report import KNOWN_RATIO_MIN, EventReport, back_test, event_report
from scheduler.control.event_touched import Deed, Touched
from scheduler.control.inbox import Cancel, CancelGridEvent, OfferGridEvent
from scheduler.control.ledger import Ledger
from scheduler.effects.journal import DrawPiece
from scheduler.effects.journal_history import DRAWS_KEPT_S, open_history
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.errors import JournalError, NotFound
from scheduler.model.jobs import JobClass
from scheduler.model.policy import Policy
from scheduler.model.power import GRID_EVENT_REPORTED_S, GridEvent, ShedState
from scheduler.model.power_events import DrawRecorded, GridEventAccepted
from scheduler.model.settings import Config, PowerConfig, SamplingConfig
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import EPOCH_S, run
from tests.harness.simulated import SimulatedNode

MINUTE_S = 60.0
DRAWS_W = {"j1": 600.0, "j2": 400.0, "j3": 300.0}
POWER = PowerConfig(base_w=300.0, pue=1.1, return_jitter_s=0.0, return_w_per_s=1000.0)
# Two boards of the gang, the miner's, the batch job's.
BASELINE_W = (2 * 600.0 + 400.0 + 300.0 + 300.0) * 1.1


class Site(SimulatedNode):
    """Four boards: a gang of training, a miner, a batch job; all draw what they draw, second by second."""

    def __init__(self, tmp_path: Path) -> None:
        config = Config(power=POWER, sampling=SamplingConfig(period_s=1.0))
        super().__init__(tmp_path, lambda job_id: Workload(draw_w=DRAWS_W.get(job_id)), gpus=4, config=config)

    async def begin(self) -> None:
        await self.daemon.start()
        await self.submit(gpus=2, job_class=JobClass.TRAINING, draw_w=600.0, grace_s=1.0)
        await self.submit(
            job_class=JobClass.MINING, draw_w=400.0, grace_s=1.0, value_microusd_per_gpu_hour=50
        )
        await self.submit(job_class=JobClass.BATCH, draw_w=300.0, grace_s=1.0, value_microusd_per_gpu_hour=9)

    async def offer(self, budget_w: float, in_s: float, for_s: float, **fields: Any) -> None:
        now_s = self.now_s
        event = GridEvent(
            fields.pop("name", "e1"), now_s + in_s, now_s + in_s + for_s, budget_w,
            fields.pop("emergency", False), now_s, now_s,
        )  # fmt: skip
        await self.daemon.ask(OfferGridEvent(event))

    @property
    def now_s(self) -> float:
        return self.machine.clock.now_s()

    def energy_wh(self) -> float:
        """What the site has used, as its boards truly did."""
        boards_j = sum(board.energy_j(self.machine.clock.true_s()) for board in self.machine.boards.values())
        return (boards_j / 3600.0 + POWER.base_w * (self.now_s - EPOCH_S) / 3600.0) * POWER.pue

    def report(self, name: str = "e1") -> EventReport:
        unwritten = self.daemon.controller.power.log.unwritten(self.now_s)
        with self.daemon.journal.history() as history:
            return event_report(history, name, self.now_s, unwritten)


def draws_of(journal: SqliteJournal, until_s: float = 1e9) -> list[DrawPiece]:
    with journal.history() as history:
        return history.draws(0.0, until_s)


def deeds(report: EventReport) -> dict[str, set[Deed]]:
    found: dict[str, set[Deed]] = {}
    for one in report.touched:
        found.setdefault(one.job_id, set()).add(one.deed)
    return found


def the_one(report: EventReport, job_id: str, deed: Deed) -> Touched:
    (found,) = [one for one in report.touched if (one.job_id, one.deed) == (job_id, deed)]
    return found


def test_a_voluntary_event_is_told_from_the_offer_to_the_return(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(20 * MINUTE_S)
        offered_s = site.now_s
        await site.offer(1600.0, in_s=60.0, for_s=60.0)
        await asyncio.sleep(60.0)
        begin_wh = site.energy_wh()
        await asyncio.sleep(60.0)
        used_wh = site.energy_wh() - begin_wh
        await asyncio.sleep(20 * MINUTE_S)

        report = site.report()

        event = report.event
        assert (event.received_s, event.accepted_s) == (offered_s, offered_s)
        assert [(one.to, one.is_over) for one in report.moves] == [
            (ShedState.SHEDDING, False), (ShedState.MET, False), (ShedState.MET, True),
        ]  # fmt: skip
        assert event.shed_began_s is not None
        assert event.shed_began_s < event.start_s == offered_s + 60.0
        assert event.ended_s == pytest.approx(event.end_s, abs=0.1)
        assert report.first_fall_s is not None
        assert event.shed_began_s < report.first_fall_s <= event.start_s
        baseline = report.baseline
        assert baseline is not None
        assert baseline.site_w == pytest.approx(BASELINE_W, rel=1e-3)
        watts = [(job.job_id, job.job_class, len(job.gpus), job.draw_w) for job in baseline.jobs]
        assert watts == [
            ("j1", "TRAINING", 2, 1200.0), ("j2", "MINING", 1, 400.0), ("j3", "BATCH", 1, 300.0),
        ]  # fmt: skip
        delivery = report.delivery
        assert delivery is not None
        assert (delivery.known, delivery.missing) == (delivery.until_s - delivery.since_s, 0)
        assert delivery.asked_w == pytest.approx(BASELINE_W - 1600.0, rel=1e-3)
        assert delivery.delivered_wh == pytest.approx(BASELINE_W / 60.0 - used_wh, rel=0.03)
        assert delivery.mean_w >= delivery.asked_w
        assert (delivery.short, delivery.short_wh) == (0, 0.0)
        assert delivery.over_wh == pytest.approx(
            (delivery.mean_w - delivery.asked_w) * delivery.known / 3600.0, rel=1e-6
        )
        rebound = report.rebound
        assert rebound is not None
        assert (rebound.known, rebound.most_w) == (900, pytest.approx(BASELINE_W, rel=0.01))
        assert not report.missing
        assert len(report.draw_w) == pytest.approx(300 + 900 + event.end_s - event.shed_began_s, abs=3)
        site.daemon.stop()

    run(story())


def test_the_back_test_of_a_steady_site_finds_next_to_no_error_and_leaves_events_out(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(8 * MINUTE_S)
        await site.offer(700.0, in_s=1.0, for_s=300.0, emergency=True)
        early = site.report().back_test
        assert (early.windows, early.bias_w) == (0, None), "it has not begun"
        await asyncio.sleep(20.0)
        early = site.report().back_test
        assert early.windows in (6, 7, 8)
        assert (early.window_s, early.bias_w, early.error_w) == (60, None, None), "not enough history"
        await asyncio.sleep(40 * MINUTE_S)
        await site.offer(1600.0, in_s=60.0, for_s=60.0, name="e2")
        await asyncio.sleep(5 * MINUTE_S)

        found = site.report("e2").back_test

        assert found.windows >= 10
        assert found.mean_w == pytest.approx(BASELINE_W, rel=1e-3)
        assert (found.error_w or 0.0) < 5.0
        assert abs(found.bias_w or 0.0) < 1.0
        site.daemon.stop()

    run(story())


def test_everybody_who_was_touched_is_named_with_what_was_done_to_him(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(5 * MINUTE_S)
        await site.offer(1500.0, in_s=0.0, for_s=600.0, emergency=True)
        await asyncio.sleep(60.0)
        late = await site.submit(job_class=JobClass.TRAINING, gpus=2, draw_w=600.0)
        await asyncio.sleep(60.0)
        await site.daemon.ask(Cancel(late))
        await asyncio.sleep(20 * MINUTE_S)

        report = site.report()

        done = deeds(report)
        assert Deed.DELAYED in done[late]
        assert the_one(report, late, Deed.DELAYED).job_class == "TRAINING"
        stopped = [one for one in report.touched if one.deed is Deed.STOPPED]
        assert stopped
        for one in stopped:
            assert one.reason == "SHED_IN_EMERGENCY"
            assert one.again_s is not None
            assert one.again_s > report.event.end_s
            assert Deed.DELAYED not in done[one.job_id], "who was stopped waits, of course"
        limited = [one for one in report.touched if one.deed is Deed.LIMITED]
        assert {one.job_id for one in limited} >= {"j1"}
        for one in limited:
            assert one.gpu in site.machine.boards
            assert (one.limit_w_before or 0.0) > (one.limit_w_least or 0.0) >= 200.0
        site.daemon.stop()

    run(story())


def test_who_left_by_himself_is_told_apart_from_who_was_stopped(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(5 * MINUTE_S)
        await site.offer(2000.0, in_s=0.0, for_s=120.0, emergency=True)
        await asyncio.sleep(30.0)
        (process,) = [one for one in site.machine.processes.values() if one.key.job_id == "j1"]
        site.machine.fail(process)
        await asyncio.sleep(30.0)

        left = the_one(site.report(), "j1", Deed.LEFT)

        assert (left.reason, left.draw_w) == ("EXITED_NONZERO", 1200.0)
        site.daemon.stop()

    run(story())


def test_a_kill_costs_ten_seconds_at_most_and_what_is_missing_is_marked(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(5 * MINUTE_S)
        await site.offer(1500.0, in_s=0.0, for_s=300.0, emergency=True)
        await asyncio.sleep(93.5)
        before = site.report()
        killed_s = site.now_s
        site.daemon.crash()
        await asyncio.sleep(20.0)
        await site.daemon.start()
        await asyncio.sleep(30 * MINUTE_S)

        report = site.report()

        assert report.baseline == before.baseline
        ((since_s, until_s),) = report.missing
        assert killed_s - 11.0 <= since_s <= killed_s
        assert until_s == math.floor(killed_s + 20.0)
        lost = slice(since_s - report.first_s, until_s - report.first_s)
        assert all(math.isnan(watts) for watts in report.draw_w[lost])
        assert report.delivery is not None
        assert report.delivery.missing == until_s - since_s
        kept = report.draw_w[: since_s - report.first_s]
        assert kept.tolist() == before.draw_w[: len(kept)].tolist()
        site.daemon.stop()

    run(story())


def test_what_was_drawn_before_an_event_survives_a_kill_right_after_it(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(5 * MINUTE_S + 55.0)
        await site.offer(1500.0, in_s=0.0, for_s=300.0, emergency=True)
        site.daemon.crash()
        await site.daemon.start()
        await asyncio.sleep(60.0)
        report = site.report()
        assert sum(until_s - since_s for since_s, until_s in report.missing) <= 1
        site.daemon.stop()

    run(story())


def test_seconds_that_could_not_be_written_are_written_later(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(2 * MINUTE_S)
        await site.offer(1500.0, in_s=0.0, for_s=300.0, emergency=True)
        await asyncio.sleep(30.0)
        site.daemon.disk.failure = "write"
        await asyncio.sleep(45.0)
        site.daemon.disk.failure = ""
        await asyncio.sleep(60.0)
        report = site.report()
        assert report.delivery is not None
        assert report.delivery.missing == 0
        site.daemon.stop()

    run(story())


def test_a_board_that_does_not_answer_leaves_seconds_missing(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(5 * MINUTE_S)
        await site.offer(1500.0, in_s=0.0, for_s=300.0, emergency=True)
        await asyncio.sleep(60.0)
        gpus = site.daemon._gpus
        read = gpus.readings
        gpus.readings = lambda: replace(read(), samples=read().samples[1:])  # type: ignore[method-assign]
        mute_s = site.now_s
        await asyncio.sleep(30.0)
        gpus.readings = read  # type: ignore[method-assign]
        await asyncio.sleep(60.0)
        ((since_s, until_s),) = site.report().missing
        assert mute_s < since_s
        assert 20 <= until_s - since_s <= 30
        site.daemon.stop()

    run(story())


def test_an_event_that_has_not_begun_or_was_cancelled_early_has_no_figures(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(MINUTE_S)
        await site.offer(1600.0, in_s=3600.0, for_s=60.0)
        for _ in range(2):
            report = site.report()
            assert (report.baseline, report.delivery, report.rebound, len(report.draw_w)) == (None,) * 3 + (
                0,
            )
            await site.daemon.ask(CancelGridEvent("e1"))
        assert report.event.ended_s is not None
        site.daemon.stop()

    run(story())


def test_the_same_is_read_from_the_files_beside_a_daemon_and_after_it(tmp_path: Path) -> None:
    async def story() -> None:
        site = Site(tmp_path)
        await site.begin()
        await asyncio.sleep(3 * MINUTE_S)
        await site.offer(1500.0, in_s=0.0, for_s=60.0, emergency=True)
        await asyncio.sleep(30 * MINUTE_S)
        now_s, told = site.now_s, repr(site.report())
        with site.daemon.journal.history() as history:
            beside = repr(event_report(history, "e1", now_s))
        site.daemon.stop()
        with open_history(tmp_path) as history:
            # What was not written yet then is now: all of the report but what came since.
            assert repr(event_report(history, "e1", now_s)) == told != beside
            with pytest.raises(NotFound, match="grid event 'e9'"):
                event_report(history, "e9", now_s)

    run(story())
    with pytest.raises(JournalError, match="does not exist"), open_history(tmp_path / "elsewhere"):
        pass


# The back-test by itself -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Makes journals with these minutes of draw in them."""
    made: list[SqliteJournal] = []

    def make(minutes: list[tuple[float, list[float | None]]]) -> SqliteJournal:
        journal = SqliteJournal(tmp_path_factory.mktemp("draws"), now_s=0.0)
        journal._db.execute("PRAGMA synchronous = OFF")
        made.append(journal)
        ledger = Ledger(journal, Policy())
        for place, (baseline_w, draw_w) in enumerate(minutes):
            first_s = 60 * place
            ledger.apply(DrawRecorded(first_s + 60.0, first_s, tuple(draw_w), baseline_w))
        ledger.commit()
        return journal

    yield make
    for journal in made:
        journal.close()


WATTS = st.one_of(st.none(), st.floats(0.0, 1e4, width=32))


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 1e4), st.lists(WATTS, min_size=6, max_size=6)), min_size=12, max_size=60
    )
)
def test_the_error_is_that_of_each_window_whose_draw_is_known(journals: Any, drawn: Any) -> None:
    minutes = [(baseline_w, [watts for watts in six for _ in range(10)]) for baseline_w, six in drawn]
    now_s = 60 * len(minutes)
    found = back_test(draws_of(journals(minutes)), [], 60, now_s)
    errors = []
    for (baseline_w, _), (_, after) in itertools.pairwise(minutes):
        known = [watts for watts in after if watts is not None]
        if len(known) >= KNOWN_RATIO_MIN * 60:
            errors.append(baseline_w - sum(known) / len(known))
    assert found.windows == len(errors)
    if len(errors) < 10:
        assert found.bias_w is None
        return
    assert found.bias_w == pytest.approx(sum(errors) / len(errors), abs=1e-3)
    assert found.error_w is not None
    assert sum(abs(error) <= found.error_w + 1e-3 for error in errors) >= 0.95 * len(errors)


def test_windows_in_which_something_was_shed_are_left_out(journals: Any) -> None:
    minutes = [(1000.0, [1000.0] * 60)] * 30 + [(1000.0, [100.0] * 60)] * 10 + [(1000.0, [1000.0] * 60)] * 30
    found = back_test(draws_of(journals(minutes)), [(1790.0, 2400.0)], 120, 4200.0)
    assert (found.bias_w, found.error_w) == (0.0, 0.0)
    assert 20 <= found.windows <= 30
    with_it = back_test(draws_of(journals(minutes)), [], 120, 4200.0)
    assert (with_it.error_w or 0.0) == pytest.approx(900.0)


def test_draws_are_kept_for_a_month_and_then_dropped(journals: Any) -> None:
    journal = journals([(1000.0, [1000.0] * 60)] * 3)
    assert len(draws_of(journal, 1000.0)) == 3
    journal.expire(DRAWS_KEPT_S + 130.0, kept_s=10 * DRAWS_KEPT_S, kept_max=100)
    assert [piece.first_s for piece in draws_of(journal, 1000.0)] == [120]


def test_a_standing_limit_is_no_event_to_the_back_test_and_its_report_ends_with_its_first_day(
    tmp_path: Path,
) -> None:
    began_s, now_s = 1000.0, 1000.0 + 3 * GRID_EVENT_REPORTED_S
    standing = GridEvent("s", began_s, 1e9, 2000.0, False, 900.0, shed_began_s=began_s)
    short = GridEvent("e", 5000.0, 6000.0, 500.0, False, 900.0, shed_began_s=5000.0, ended_s=6000.0)
    journal = SqliteJournal(tmp_path, now_s=0.0)
    ledger = Ledger(journal, Policy())
    for event in (standing, short):
        ledger.apply(GridEventAccepted(900.0, event))
    for minute in range(60):
        at_s = now_s - 3600.0 + 60.0 * minute
        ledger.apply(DrawRecorded(at_s, int(at_s) - 60, (1000.0,) * 60, 1000.0))
    ledger.commit()
    with journal.history() as history:
        report, other = event_report(history, "s", now_s), event_report(history, "e", now_s)
    assert report.is_cut
    assert len(report.draw_w) == 300 + GRID_EVENT_REPORTED_S + 900
    assert other.back_test.windows >= 3
    assert other.others == ("s",)
    journal.close()
