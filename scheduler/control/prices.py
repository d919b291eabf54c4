"""What electricity costs: read from a file or a URL or set by clients, and told to the planner.

Without a source there is no price, and energy costs nothing. With one the price gate holds from the first
moment on, by the declared price until a real one is known.
"""

from typing import TYPE_CHECKING

from scheduler.control.inbox import PricesRead, SetPrices
from scheduler.control.polling import Polled
from scheduler.control.table import EnergyPrice
from scheduler.effects.feed import feed_of
from scheduler.effects.price_feed import parse_prices
from scheduler.model.power_events import PricesSet
from scheduler.model.prices import Price, PricePoint, PriceSeries

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

MICROUSD_PER_MWH = 1_000_000_000  # for a USD per kWh
# What a job counts for of which nobody knows the draw, where no board says what it can draw at most.
UNKNOWN_W = 1000


class Prices:
    """The price in force, and the source that renews it."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self.price: Price | None = None
        self.polled = Polled(
            controller,
            "prices",
            "[power] price_source",
            lambda: feed_of(controller.config.power.price_source, parse_prices),
            lambda: controller.config.power.price_poll_s,
            lambda points, source: controller.inbox.put(PricesRead(points, source)),
        )
        self._series = PriceSeries(())
        self.points: tuple[PricePoint, ...] = ()  # that hold, or will

    def advance(self, now_s: float) -> None:
        """Tell the planner what energy costs now."""
        control, config = self._control, self._control.config.power
        state = control.ledger.power
        points = state.prices if state.prices_from == self.polled.name else ()
        if points is not self.points:
            self.points, self._series = points, PriceSeries(points)
        if not points and self.polled.feed is None:
            self.price = control.ledger.table.energy = None
            return
        self.price = self._series.at(now_s, config.price_max_age_s, config.price_unknown_usd_per_kwh)
        limits = [gpu.power_limit_w_max or UNKNOWN_W for gpu in control.board.identities]
        most_w = round(max(limits, default=UNKNOWN_W))
        energy = EnergyPrice(self.price.usd_per_kwh * config.pue, most_w, *control.power.points.mined())
        if energy != control.ledger.table.energy:
            control.ledger.table.energy = energy

    @property
    def base_w(self) -> float:
        """What the node draws beside its boards."""
        return self._control.config.power.base_w

    def pieces(self, since_s: float, until_s: float) -> list[tuple[float, int | None]]:
        """The pieces of a time by their ends, and what energy cost then, micro-USD per MWh of the node's.

        None where nobody knew; a declared stand-in is no price. Of the time before the prices were set last
        what was known then counts, for the latest hour.
        """
        power, config = self._control.ledger.power, self._control.config.power
        if not power.prices and not power.prices_past:
            return [(until_s, None)]
        past_s = power.prices_past[-1].end_s if power.prices_past else None
        found: list[tuple[float, int | None]] = []
        at_s = since_s
        while True:
            is_past = past_s is not None and at_s < past_s
            series = PriceSeries(power.prices_past) if is_past else self._series
            price = series.at(at_s, config.price_max_age_s, config.price_unknown_usd_per_kwh)
            ends = (until_s, series.next_change_s(at_s, config.price_max_age_s), past_s if is_past else None)
            at_s = min(end_s for end_s in ends if end_s is not None)
            rate = None if price.is_declared else round(price.usd_per_kwh * config.pue * MICROUSD_PER_MWH)
            found.append((at_s, rate))
            if at_s >= until_s:
                return found

    def wake_s(self, now_s: float) -> float | None:
        """When the price could be another by itself."""
        if self.price is None:
            return None
        return self._series.next_change_s(now_s, self._control.config.power.price_max_age_s)

    def set(self, command: SetPrices, now_s: float) -> None:
        """A client says what electricity costs.

        Raises:
            IllegalMove: The configuration names another source.
        """
        self.polled.refuse_clients()
        self._keep(command.points, "", now_s)

    def take(self, item: PricesRead, now_s: float) -> None:
        """Take what the source says, if it is still the source."""
        if item.source == self.polled.name:
            self._keep(item.points, item.source, now_s)

    def _keep(self, points: tuple[PricePoint, ...], source: str, now_s: float) -> None:
        """Journal the points that still say something, if they say anything new."""
        past = sum(point.start_s <= now_s for point in points)
        points = points[max(0, past - 1) :]  # the one in force, and what comes
        state = self._control.ledger.power
        if (points, source) != (state.prices, state.prices_from):
            self._control.ledger.apply(PricesSet(now_s, points, source))
