"""The real ledger, journal, board and accounts over virtual time: what the loop does with them in a tick."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from scheduler.control.accounting import Accounts
from scheduler.control.board import GpuBoard, NodeSize
from scheduler.control.ledger import Ledger
from scheduler.control.meters import Meters
from scheduler.control.prices import Prices
from scheduler.control.telemetry import Telemetry
from scheduler.effects.gpus import GpuReadings
from scheduler.effects.journal import UsageRow
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.model.events import AttemptEnded, Event
from scheduler.model.gpus import GpuIdentity, GpuSample
from scheduler.model.jobs import JobState
from scheduler.model.policy import Policy
from scheduler.model.power_events import PricesSet
from scheduler.model.prices import PricePoint
from scheduler.model.reasons import Reason
from scheduler.model.settings import Config, PowerConfig


class Books:
    """One daemon's accounts after the other on the same journal."""

    def __init__(self, directory: Path, power: PowerConfig | None = None) -> None:
        self._directory = directory
        self.config = Config(power=power or PowerConfig())
        self._open(rebooted=False)

    def _open(self, *, rebooted: bool) -> None:
        self.journal = SqliteJournal(self._directory, now_s=0.0)
        # Daemons die here, machines do not: what was written stays, and a day of commits takes no time.
        self.journal._db.execute("PRAGMA synchronous = OFF")
        self.ledger = Ledger(self.journal, Policy())
        self.meters = Meters()
        self.telemetry = Telemetry(self.meters)
        self.board = GpuBoard(self.ledger, (NodeSize(8, 1024, 64),), self.telemetry)
        no_limits = SimpleNamespace(points=SimpleNamespace(mined=lambda: (None, 0)))
        parts = SimpleNamespace(config=self.config, ledger=self.ledger, board=self.board, power=no_limits)
        self.prices = Prices(parts)  # type: ignore[arg-type]
        self.accounts = Accounts(self.ledger, self.board, self.meters, self.telemetry, self.prices)
        self.accounts.resume(rebooted=rebooted)

    def close(self) -> None:
        self.journal.close()

    def kill(self, *, rebooted: bool = False) -> None:
        """End the daemon as `kill -9` does, and start another."""
        self.close()
        self._open(rebooted=rebooted)

    def stop(self, now_s: float) -> None:
        """End the daemon in good order, and start another."""
        self.accounts.settle()
        self.book(now_s)
        self.kill()

    def tick(
        self, now_s: float, readings: GpuReadings | None = None, *events: Event, is_kept: bool = True
    ) -> None:
        """Take a turn of the loop; `is_kept`: whether the journal took it."""
        self.accounts.settle()
        if readings is not None:
            self.board.read(readings)
        for event in events:
            if isinstance(event, AttemptEnded):
                job = self.ledger.by_key(event.job_id, event.attempt)
                assert job is not None
                self.accounts.ended(job, event.at_s, event.reason, lost=event.lost)
            self.ledger.apply(event)
        self.prices.advance(now_s)
        if readings is not None:
            self.accounts.read(now_s)
            self.accounts.book(now_s)
        if is_kept:
            self.ledger.commit()
        else:
            self.ledger.abandon()

    def book(self, now_s: float) -> None:
        """Book all and commit."""
        self.accounts.book_all(now_s)
        self.ledger.commit()

    def rows(self, group: str) -> dict[str, UsageRow]:
        """All that is booked, by key."""
        return {row.key: row for row in self.journal.usage(group, 0.0, 1e12, None, 1_000_000)}

    def sums(self, group: str) -> dict[str, tuple[int, int]]:
        """GPU-milliseconds and millijoules by key."""
        return {key: (row.gpu_ms, row.energy_mj) for key, row in self.rows(group).items()}

    def energy_mj(self, group: str) -> dict[str, int]:
        """Millijoules by key."""
        return {key: energy_mj for key, (_, energy_mj) in self.sums(group).items()}


def identity(uuid: str, index: int = 0, parent: str = "", slices: int | None = None) -> GpuIdentity:
    """A GPU, or an instance of one."""
    return GpuIdentity(uuid, index, "NVIDIA H100", memory_total_mib=80_000, parent_uuid=parent, slices=slices)


def sample(uuid: str, at_s: float, energy_mj: int | None, power_w: float | None = None) -> GpuSample:
    """A reading of what counts for energy."""
    return GpuSample(uuid, at_s, utilization_ratio=0.5, power_w=power_w, energy_mj=energy_mj)


def readings(identities: Iterable[GpuIdentity], samples: Iterable[GpuSample]) -> GpuReadings:
    """A round without errors."""
    return GpuReadings(tuple(identities), tuple(samples), {}, "1")


def priced(at_s: float, *points: tuple[float, float, float]) -> PricesSet:
    """Somebody says what electricity costs: starts, ends and USD per kWh."""
    return PricesSet(
        at_s, tuple(PricePoint(start_s, usd_per_kwh, end_s) for start_s, end_s, usd_per_kwh in points)
    )


def lost(number: int, at_s: float, reason: Reason = Reason.LAUNCHER_LOST) -> AttemptEnded:
    """An attempt ended while nobody looked."""
    return AttemptEnded(at_s, f"j{number}", 1, JobState.FAILED, reason, lost=True)
