"""Prices and grid events as the daemon hears of them: each when its row says that it is known."""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.control.inbox import OfferGridEvent, SetPrices
from scheduler.errors import RequestError
from scheduler.model.power import GridEvent
from scheduler.model.prices import PricePoint
from scheduler.simulation.daemon import SimulatedDaemon
from scheduler.simulation.inputs import TIME_S_MAX, EventRow, PriceRow
from scheduler.simulation.machine import Machine
from scheduler.simulation.node import MachineGpus

_USD_PER_MWH = 1000.0  # of one per kWh
# Prices that the daemon is told at a time, the nearest ones; told anew when half of them are over.
_PRICES_TOLD_MAX = 500
# After a change of draw boards are read again when most has settled, and when all has.
_LOOKS_S = (1.0, 2.5)


@dataclass(slots=True)
class Signals:
    """Tells the daemon what the files say, and remembers what it refused."""

    prices: Sequence[PriceRow]  # in the order of time
    events: Sequence[EventRow]
    epoch_s: float
    refusals: list[str] = field(default_factory=list)
    _told: int = 0

    @property
    def is_over(self) -> bool:
        """Whether all of them were told; what they say of the future is not over."""
        return self._told == bool(self.prices) + len(self.events)

    @property
    def last_s(self) -> float:
        """When the last of them has its last effect."""
        starts_s = [max(row.start_s, row.known_s) for row in self.prices]
        return max([0.0, *starts_s, *(row.end_s for row in self.events)])

    async def tell_events(self, daemon: SimulatedDaemon) -> None:
        """Offer each grid event as long before its start as its notice says."""
        ordered = sorted(self.events, key=lambda row: (_offered_s(row), row.start_s, row.event_id))
        for row in ordered:
            await _until(_offered_s(row))
            event = GridEvent(
                id=row.event_id,
                start_s=self.epoch_s + row.start_s,
                end_s=self.epoch_s + row.end_s,
                budget_w=row.site_power_w,
                emergency=row.emergency,
                accepted_s=daemon.machine.clock.now_s(),
            )
            try:
                await daemon.ask(OfferGridEvent(event))
            except RequestError as error:
                self.refusals.append(f"grid event {row.event_id} was refused: {error}")
            self._told += 1

    async def tell_prices(self, daemon: SimulatedDaemon) -> None:
        """Tell the prices that are known and not over, at each moment at which more become known."""
        if not self.prices:
            return
        ends_s = [*(row.start_s for row in self.prices[1:]), TIME_S_MAX]
        points = [
            PricePoint(self.epoch_s + row.start_s, row.usd_per_mwh / _USD_PER_MWH, self.epoch_s + end_s)
            for row, end_s in zip(self.prices, ends_s, strict=True)
        ]
        unknown = sorted(range(len(points)), key=lambda place: (-self.prices[place].known_s, -place))
        known: list[int] = []  # places of those that are not over, in the order of time
        while unknown or len(known) > _PRICES_TOLD_MAX:
            moments_s = [self.prices[unknown[-1]].known_s] if unknown else []
            if len(known) > _PRICES_TOLD_MAX:
                moments_s.append(self.prices[known[_PRICES_TOLD_MAX // 2]].start_s)
            now_s = min(moments_s)
            await _until(now_s)
            while unknown and self.prices[unknown[-1]].known_s <= now_s:
                place = unknown.pop()
                known.insert(bisect_right(known, place), place)
            while len(known) > 1 and ends_s[known[0]] <= now_s:
                del known[0]
            await daemon.ask(SetPrices(tuple(points[place] for place in known[:_PRICES_TOLD_MAX])))
        self._told += 1


async def look(daemon: SimulatedDaemon, machine: Machine, moved: asyncio.Event) -> None:
    """Read the boards after each change of draw, while there is a budget that measured watts decide on."""
    gpus = MachineGpus(machine)
    loop = asyncio.get_running_loop()
    while True:
        await moved.wait()
        moved.clear()
        begun_s = loop.time()
        for after_s in _LOOKS_S if daemon.controller.power.is_active else ():
            await asyncio.sleep(begun_s + after_s - loop.time())
            daemon.controller.inbox.put(gpus.readings())


def _offered_s(row: EventRow) -> float:
    return max(0.0, row.start_s - row.notice_s)


async def _until(time_s: float) -> None:
    """Sleep until a moment since the beginning."""
    wait_s = time_s - asyncio.get_running_loop().time()
    if wait_s > 0.0:
        await asyncio.sleep(wait_s)
