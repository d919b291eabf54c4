"""The power part of the metrics page."""

import math

from scheduler.api.exposition import Page
from scheduler.control.loop import Controller
from scheduler.model.power import ShedState
from scheduler.model.settings import MICROUSD_PER_USD


def put_power(page: Page, control: Controller, now_s: float) -> None:
    """Add what the site draws and may draw, how its sheds went, and what electricity costs."""
    power, meters = control.power, control.meters
    plan = control.last_plan
    outlook = plan.power if plan is not None and power.is_active else None
    shadow = None if outlook is None else outlook.shadow_microusd_per_wh
    price = control.prices.price
    active = sum(event.binds and event.shed_began_s is not None for event in control.ledger.power.events)
    for name, text, value in (
        (
            "power_draw_watts",
            "What the site draws, by fresh readings of all boards.",
            power.measured_w(now_s),
        ),
        ("power_budget_watts", "What the site may draw; absent without a budget.", power.budget.in_force_w),
        ("power_committed_watts", "What the limits in force let the site draw.", power.committed_w()),
        (
            "power_shadow_price_usd_per_watt_hour",
            "Value lost for each Wh that is not there, at the margin; absent without a budget.",
            None if shadow is None else shadow / MICROUSD_PER_USD,
        ),
        ("grid_event_active", "Grid events in force.", float(active)),
        (
            "electricity_price_usd_per_kwh",
            "What a kilowatt-hour counts for now; absent without a source of prices.",
            None if price is None else price.usd_per_kwh,
        ),
        (
            "electricity_price_age_seconds",
            "For how long the price has been out of date; absent where none was ever known.",
            None if price is None or not math.isfinite(price.age_s) else price.age_s,
        ),
    ):
        page.gauge(name, text, [] if value is None else [((), value)])
    for name, text, total in (
        ("energy_cost_usd", "What energy cost at prices above zero.", meters.energy_cost_usd),
        ("energy_credit_usd", "What energy earned at prices below zero.", meters.energy_credit_usd),
        ("energy_unpriced_joules", "Energy whose price nobody knew.", meters.energy_unpriced_j),
    ):
        page.counter(name, text, [((), total)])
    page.counter(
        "power_over_budget_seconds",
        "Time for which the measured draw was above the budget.",
        [((), meters.power_over_budget_s)],
    )
    page.histogram("power_limit_set_seconds", "Time to set a board's limit.", {(): meters.power_limit_s})
    page.counter(
        "power_limit_errors",
        "Limits that could not be set.",
        sorted(meters.power_limit_errors.items()),
        ("code",),
    )
    page.counter(
        "power_limits_changed", "Limits that somebody else changed.", [((), meters.power_limits_changed)]
    )
    page.histogram(
        "grid_shed_seconds", "From the begin of a shed until it was met.", {(): meters.grid_shed_s}
    )
    # From zero on: an alert asks by how much it grew.
    sheds = {(state.value,): 0 for state in (ShedState.MET, ShedState.FAILED)} | meters.grid_sheds
    page.counter("grid_sheds", "Sheds by how they went.", sorted(sheds.items()), ("state",))
