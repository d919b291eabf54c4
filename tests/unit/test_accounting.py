"""Who pays for what: time and energy of those who held a GPU, idle, and what nobody knows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.control.accounting import BOOKING_PERIOD_S, FORGOTTEN_S
from scheduler.effects.gpus import GpuReadings
from scheduler.model.events import AttemptResumed, AttemptSuspended, Event, SuspendDecided
from scheduler.model.jobs import JobState
from scheduler.model.power_events import PricesSet
from scheduler.model.prices import PricePoint
from scheduler.model.reasons import Reason
from scheduler.model.settings import PowerConfig
from tests.harness.books import Books, identity, lost, priced, readings, sample
from tests.harness.values import end, start, started, submission

GPUS = (identity("GPU-a", 0), identity("GPU-b", 1))
W = 500  # what each GPU draws
START_MJ = 7_000_000_000


class Node:
    """Two GPUs that draw 500 W each, and the books about them."""

    def __init__(self, directory: Path, power: PowerConfig | None = None) -> None:
        self.books = Books(directory, power)
        self.at_s = 1000.0
        self.energy_mj = START_MJ
        self.pass_time(0.0)

    def pass_time(self, seconds: float, *events: Event, is_kept: bool = True) -> None:
        """Time passes, both GPUs are read, and then events arrive."""
        self.at_s += seconds
        self.energy_mj += round(seconds * W * 1000)
        self.books.tick(self.at_s, self.readings(), *events, is_kept=is_kept)

    def readings(self) -> GpuReadings:
        return readings(GPUS, (sample(gpu.uuid, self.at_s, self.energy_mj, W) for gpu in GPUS))

    def sums(self, group: str) -> dict[str, tuple[int, int]]:
        """Seconds and joules by key, all booked."""
        self.books.book(self.at_s)
        return {key: (ms // 1000, mj // 1000) for key, (ms, mj) in self.books.sums(group).items()}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.books.close()


def runs(number: int, at_s: float, *gpus: str, **spec: object) -> tuple[Event, ...]:
    return submission(number, at_s, **spec), start(number, 1, at_s, *gpus), started(number, 1, at_s)


def test_time_and_energy_go_to_who_held_the_gpu_and_the_rest_to_idle(node: Node) -> None:
    node.pass_time(10.0, *runs(1, 1010.0))
    node.pass_time(30.0, end(1, at_s=1040.0))
    node.pass_time(5.0)
    assert node.sums("job_id") == {"": (60, 60 * W), "j1": (30, 30 * W)}
    assert node.sums("uuid") == {"GPU-a": (45, 45 * W), "GPU-b": (45, 45 * W)}


def test_who_held_a_gpu_for_a_part_of_an_interval_has_that_part_of_its_energy(node: Node) -> None:
    node.books.tick(1002.0, None, *runs(1, 1002.0), *runs(2, 1002.0, gpu_share_milli=250))
    node.books.tick(1005.0, None, end(1, at_s=1004.5))
    node.books.tick(1006.0, None, *runs(3, 1005.5))
    node.pass_time(10.0)
    a_mj = 10 * W * 1000
    node.books.book(node.at_s)
    energy_mj = node.books.energy_mj("job_id")
    # j1 2.5 s, j2 a quarter of 8 s, j3 4.5 s of 10; together more than the GPU where they overlapped.
    assert energy_mj["j1"] == pytest.approx(a_mj * 2.5 / 10, rel=1e-6)
    assert energy_mj["j2"] == pytest.approx(a_mj * 2.0 / 10, rel=1e-6)
    assert energy_mj["j3"] == pytest.approx(a_mj * 4.5 / 10, rel=1e-6)
    assert sum(energy_mj.values()) == 2 * a_mj


def test_a_share_pays_its_share(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0, gpu_share_milli=250))
    node.pass_time(10.0)
    assert node.sums("class") == {"TRAINING": (2, 10 * W // 4), "IDLE": (17, 2 * 10 * W - 10 * W // 4)}


def test_a_jobs_energy_is_on_its_attempts_and_on_itself(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0, "GPU-a", "GPU-b"))
    node.pass_time(10.0, end(1, JobState.PENDING, at_s=1010.0))
    node.pass_time(2.0, start(1, 2, 1012.0), started(1, 2, 1012.0))
    node.pass_time(5.0, end(1, attempt=2, at_s=1017.0))
    node.pass_time(1.0)
    job = node.books.journal.job(1)
    assert job is not None
    assert [attempt.energy_mj for attempt in job.attempts] == [2 * 10 * W * 1000, 5 * W * 1000]
    assert job.energy_mj == 25 * W * 1000


def test_what_a_finished_job_used_is_booked_with_the_next_reading(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0))
    node.pass_time(5.0)
    node.books.tick(1007.0, None, end(1, at_s=1006.5))
    assert "j1" not in node.books.sums("job_id"), "half a second of energy is not known yet"
    node.pass_time(3.0)
    assert node.books.sums("job_id")["j1"] == (6500, 6500 * W)


def test_all_is_booked_once_a_period(node: Node) -> None:
    before = node.books.sums("uuid")
    node.pass_time(BOOKING_PERIOD_S - 1)
    assert node.books.sums("uuid") == before
    node.pass_time(1)
    assert node.books.sums("uuid")["GPU-a"] == (BOOKING_PERIOD_S * 1000, BOOKING_PERIOD_S * W * 1000)


def test_what_could_not_be_kept_is_booked_later_and_once(node: Node) -> None:
    node.pass_time(BOOKING_PERIOD_S, *runs(1, 1060.0))
    node.pass_time(BOOKING_PERIOD_S, is_kept=False)
    node.pass_time(1.0, is_kept=False)
    node.pass_time(1.0)
    assert node.sums("uuid") == {gpu.uuid: (122, 122 * W) for gpu in GPUS}
    assert node.sums("job_id")["j1"] == (62, 62 * W)


def test_an_end_that_could_not_be_kept_is_an_end_all_the_same(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0))
    node.pass_time(10.0, end(1, at_s=1010.0), is_kept=False)
    node.pass_time(10.0)
    node.pass_time(10.0, end(1, at_s=1010.0))
    assert node.sums("job_id") == {"": (50, 50 * W), "j1": (10, 10 * W)}


# While no daemon ran ---------------------------------------------------------------------------


def test_a_job_that_runs_on_pays_for_the_time_without_a_daemon(node: Node) -> None:
    node.pass_time(1.0, *runs(1, 1001.0))
    node.pass_time(9.0)
    node.books.kill()
    node.pass_time(300.0)
    assert node.sums("job_id") == {"": (311, 311 * W), "j1": (309, 309 * W)}
    assert node.sums("uuid") == {gpu.uuid: (310, 310 * W) for gpu in GPUS}


def test_a_job_that_ended_meanwhile_pays_until_its_end(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0))
    node.books.kill()
    node.pass_time(300.0, end(1, at_s=1100.0))
    assert node.sums("job_id") == {"": (500, 500 * W), "j1": (100, 100 * W)}


def test_a_job_that_ended_before_the_daemon_did_pays_until_its_end(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0))
    node.books.tick(1030.0, None, end(1, at_s=1030.0))
    node.books.kill()
    node.pass_time(300.0)
    assert node.sums("job_id") == {"": (570, 570 * W), "j1": (30, 30 * W)}


def test_an_end_between_a_reading_and_its_booking_survives(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0))
    node.books.tick(1004.0, None, end(1, at_s=1004.0))
    node.books.book(1005.0)  # its energy is known up to the second 1000 only
    node.books.kill()
    node.pass_time(20.0)
    assert node.sums("job_id") == {"": (36, 36 * W), "j1": (4, 4 * W)}


def test_what_was_lost_unseen_is_nobodys_and_says_so(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0, gpu_share_milli=500), *runs(2, 1000.0, "GPU-b"))
    node.pass_time(10.0)
    node.books.book(node.at_s)
    node.books.kill()
    node.pass_time(100.0, lost(1, 1110.0))
    assert node.sums("class") == {
        "TRAINING": (5 + 110, (5 + 110) * W),
        "UNKNOWN": (50, 50 * W),
        "IDLE": (55, 55 * W),
    }


def test_after_a_reboot_the_time_and_the_new_counter_are_idle(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0))
    node.pass_time(10.0)
    node.books.book(node.at_s)
    node.books.kill(rebooted=True)
    node.energy_mj = 0
    node.pass_time(100.0, lost(1, 1110.0, Reason.NODE_REBOOTED))
    assert node.sums("class") == {"IDLE": (210, 10 * W + 2 * 100 * W), "TRAINING": (10, 10 * W)}


def test_a_daemon_that_ends_in_good_order_leaves_nothing_to_guess(node: Node) -> None:
    node.pass_time(0.0, *runs(1, 1000.0))
    node.pass_time(10.0)
    node.books.stop(node.at_s)
    assert node.books.energy_mj("job_id")["j1"] == 10 * W * 1000
    node.pass_time(10.0)
    assert node.sums("job_id") == {"": (20, 20 * W), "j1": (20, 20 * W)}


def test_a_gpu_that_was_taken_out_is_forgotten_in_time_and_not_before(node: Node) -> None:
    node.books.book(node.at_s)
    node.books.kill()
    node.at_s += FORGOTTEN_S
    node.energy_mj += 1000
    only = readings(GPUS[:1], (sample("GPU-a", node.at_s, node.energy_mj, W),))
    node.books.tick(node.at_s, only)
    assert set(node.books.ledger.booked) == {"GPU-a", "GPU-b"}
    assert set(node.books.sums("uuid")) == {"GPU-a"}, "what is not in the node has no idle time"
    for _ in range(2):
        node.at_s += BOOKING_PERIOD_S
        node.books.tick(node.at_s, only)
    assert set(node.books.ledger.booked) == {"GPU-a"}


# MIG -------------------------------------------------------------------------------------------


def test_instances_split_their_gpus_energy_by_slices_and_then_by_share(tmp_path: Path) -> None:
    books = Books(tmp_path)
    parts = (
        identity("MIG-3", 0, "GPU-p", 3),
        identity("MIG-2", 0, "GPU-p", 2),
        identity("MIG-1", 0, "GPU-p", 1),
    )

    def tick(at_s: float, *events: Event) -> None:
        counter_mj = round((at_s - 1000) * 600_000)
        books.tick(at_s, readings(parts, (sample(part.uuid, at_s, counter_mj) for part in parts)), *events)

    tick(1000.0, *runs(1, 1000.0, "MIG-3"), *runs(2, 1000.0, "MIG-2", gpu_share_milli=500))
    tick(1010.0)
    books.book(1010.0)
    assert books.energy_mj("uuid") == {"MIG-3": 3_000_000, "MIG-2": 2_000_000, "MIG-1": 1_000_000}
    assert books.energy_mj("job_id") == {"j1": 3_000_000, "j2": 1_000_000, "": 2_000_000}
    # Another layout after a crash, and then none: what was used belongs to the layout of then.
    books.kill()
    parts = (identity("MIG-7", 0, "GPU-p", 7),)
    tick(1020.0, end(1, at_s=1015.0), end(2, at_s=1010.0))
    tick(1030.0)
    parts = (identity("GPU-p"),)
    tick(1040.0)
    tick(1050.0)
    books.book(1050.0)
    assert books.energy_mj("job_id") == {"j1": 4_500_000, "j2": 1_000_000, "": 24_500_000}
    assert books.energy_mj("uuid")["MIG-7"] == 12_000_000
    assert books.energy_mj("uuid")["GPU-p"] == 6_000_000
    books.close()


# Money -----------------------------------------------------------------------------------------

J_PER_KWH = 3_600_000


def cost_microusd(joules: float, usd_per_kwh: float) -> float:
    return joules / J_PER_KWH * usd_per_kwh * 1e6


def costs(node: Node, group: str) -> dict[str, tuple[int, int]]:
    """Micro-USD and unpriced joules by key, all booked."""
    node.books.book(node.at_s)
    return {key: (row.cost_microusd, row.unpriced_mj // 1000) for key, row in node.books.rows(group).items()}


def test_energy_costs_what_it_cost_when_it_was_used_and_idle_pays_too(node: Node) -> None:
    prices = priced(1000.0, (1000.0, 1010.0, 0.20), (1010.0, 1e9, -0.05))
    node.pass_time(0.0, prices, *runs(1, 1000.0))
    node.pass_time(30.0)  # one reading: 10 s at the one price, 20 s at the other
    mine = cost_microusd(10 * W, 0.20) - cost_microusd(20 * W, 0.05)
    assert costs(node, "class") == {
        "TRAINING": (pytest.approx(mine, abs=1), 0),
        "IDLE": (pytest.approx(mine, abs=1), 0),
    }


def test_who_used_the_dear_part_of_an_interval_pays_for_it(node: Node) -> None:
    node.pass_time(0.0, priced(1000.0, (1000.0, 1010.0, 0.0), (1010.0, 1e9, 3.6)), *runs(1, 1000.0))
    node.books.tick(1010.0, None, end(1, at_s=1010.0), *runs(2, 1010.0))
    node.pass_time(20.0)
    found = costs(node, "job_id")
    assert found["j1"] == (0, 0)
    assert found["j2"] == (10 * W, 0)


def test_a_price_that_nobody_knew_is_not_zero_and_one_that_comes_later_changes_nothing(node: Node) -> None:
    node.pass_time(10.0, *runs(1, 1010.0))
    node.pass_time(10.0)
    node.pass_time(10.0, priced(1030.0, (1000.0, 1e9, 3.6)))  # what was used since 1020 is read with it
    node.pass_time(20.0)
    assert costs(node, "job_id")["j1"] == ((10 + 20) * W, 10 * W)


def test_a_price_that_is_corrected_counts_for_what_is_yet_to_be_read(node: Node) -> None:
    node.pass_time(0.0, priced(1000.0, (1000.0, 1e9, 3.6)), *runs(1, 1000.0))
    node.pass_time(10.0)
    node.books.tick(1015.0, None, priced(1015.0, (1000.0, 1e9, 7.2)))
    node.pass_time(10.0)
    assert costs(node, "job_id")["j1"] == ((10 + 5) * W + 2 * 5 * W, 0)


def test_the_last_price_holds_until_it_is_too_old_and_a_stand_in_is_no_price(tmp_path: Path) -> None:
    node = Node(tmp_path, PowerConfig(price_max_age_s=30.0))
    node.books.tick(1000.0, None, PricesSet(1000.0, (PricePoint(1000.0, 3.6),)))
    node.pass_time(50.0)
    assert costs(node, "uuid")["GPU-a"] == (30 * W, 20 * W)
    node.books.close()


def test_the_node_pays_for_its_overhead_and_for_what_it_draws_beside_its_boards(tmp_path: Path) -> None:
    node = Node(tmp_path, PowerConfig(base_w=200.0, pue=1.5))
    node.pass_time(0.0, priced(1000.0, (1000.0, 1e9, 3.6)))
    node.pass_time(10.0)
    node.books.kill()
    node.pass_time(10.0)
    found = costs(node, "class")
    assert found == {"IDLE": (1.5 * 2 * 20 * W, 0), "BASE": (1.5 * 20 * 200, 0)}
    assert node.books.energy_mj("class")["BASE"] == 20 * 200 * 1000
    node.books.close()


def test_cost_survives_once_whatever_becomes_of_the_daemon_and_its_disk(node: Node) -> None:
    node.pass_time(0.0, priced(1000.0, (1000.0, 1e9, 0.0371)), *runs(1, 1000.0))
    for _ in range(5):
        node.pass_time(7.0)
        node.books.book(node.at_s)
        node.books.kill()
        for _ in range(10):
            node.pass_time(BOOKING_PERIOD_S, is_kept=False)
    node.pass_time(1.0)
    whole = cost_microusd((5 * (7 + 10 * BOOKING_PERIOD_S) + 1) * W, 0.0371)
    by_gpu = costs(node, "uuid")
    assert [by_gpu[gpu.uuid][0] for gpu in GPUS] == [int(whole), int(whole)], "what is less goes on"
    by_job = node.books.rows("job_id")
    assert by_job["j1"].cost_microusd == pytest.approx(whole, abs=12), "within one for each booking"


def test_meters_tell_cost_credit_and_what_has_no_price(node: Node) -> None:
    node.pass_time(10.0)
    node.books.book(node.at_s)
    node.books.tick(1010.0, None, priced(1010.0, (1010.0, 1020.0, 3.6), (1020.0, 1e9, -3.6)))
    for _ in range(2):
        node.pass_time(10.0)
        node.books.book(node.at_s)
    node.books.accounts.settle()
    meters = node.books.meters
    told = (meters.energy_cost_usd, meters.energy_credit_usd, meters.energy_unpriced_j)
    assert told == pytest.approx((2 * 10 * W / 1e6, 2 * 10 * W / 1e6, 2 * 10 * W))


# Figures ---------------------------------------------------------------------------------------


def test_meters_count_what_is_durable_and_gpus_what_was_read(node: Node) -> None:
    node.pass_time(BOOKING_PERIOD_S, *runs(1, 1060.0))
    node.pass_time(1.0)
    assert node.books.meters.class_energy_j == {("IDLE",): 2 * BOOKING_PERIOD_S * W}
    assert node.books.meters.gpu_energy_j == {(gpu.uuid,): (BOOKING_PERIOD_S + 1) * W for gpu in GPUS}


def test_a_counter_that_lies_is_told_once_and_counted(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        node.energy_mj -= 400_000_000
        node.pass_time(1.0)
        assert node.books.telemetry.of("GPU-a") == ("ENERGY_COUNTER_BACKWARDS",)
    assert [record.message for record in caplog.records] == [
        "GPU GPU-a: ENERGY_COUNTER_BACKWARDS",
        "GPU GPU-b: ENERGY_COUNTER_BACKWARDS",
    ]
    assert node.books.meters.telemetry_errors == {("ENERGY_COUNTER_BACKWARDS",): 6}
    node.energy_mj = START_MJ + 4 * W * 1000
    node.at_s += 1
    node.pass_time(0.0)
    assert node.books.telemetry.of("GPU-a") == ()
    assert node.sums("uuid") == {gpu.uuid: (4, 4 * W) for gpu in GPUS}


def test_a_frozen_job_holds_its_gpu_and_earns_nothing_meanwhile(node: Node) -> None:
    node.pass_time(10.0, *runs(1, 1010.0, value_microusd_per_gpu_hour=3_600_000))
    node.pass_time(10.0, SuspendDecided(1020.0, "j1", 1, Reason.SHED_FOR_POWER))
    node.pass_time(0.0, AttemptSuspended(1020.0, "j1", 1))
    node.pass_time(20.0)
    node.pass_time(2.0, AttemptResumed(1042.0, "j1", 1))
    node.pass_time(8.0)
    node.books.book(node.at_s)
    row = node.books.rows("job_id")["j1"]
    assert row.gpu_ms == 40_000
    assert row.value_microusd == 18 * 1000, "10 s before, 8 s after"
