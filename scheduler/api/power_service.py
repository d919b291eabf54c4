"""PowerService: the budget and grid events over gRPC."""

import asyncio
import math
import re
from typing import Any

from scheduler.api import convert
from scheduler.api.mining import hashprices, mining
from scheduler.api.power_report import report_message
from scheduler.api.rpc import Context, unary
from scheduler.api.submission import DURATION_S_MAX, Violations
from scheduler.control import inbox
from scheduler.control.event_report import event_report
from scheduler.control.loop import Controller
from scheduler.model.power import BUDGET_INTERVALS_MAX, BudgetInterval, BudgetKind, GridEvent, LimitCause
from scheduler.model.prices import PricePoint, checked
from scheduler.model.settings import MICROUSD_PER_USD
from scheduler.v1 import power_pb2, power_service_pb2, power_service_pb2_grpc

SITE_W_MAX = 1e9
# Reports that are made at a time, beside the loop; others wait. Each reads up to five weeks of the journal.
REPORTS_MAX = 1
EVENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A moment that lies further ahead is a mistake of units: ten years.
AHEAD_S_MAX = DURATION_S_MAX

_KINDS: dict[BudgetKind, Any] = {
    kind: power_pb2.BudgetKind.Value(f"BUDGET_KIND_{kind.value}") for kind in BudgetKind
}
_CAUSES: dict[LimitCause | None, Any] = {None: power_pb2.LIMIT_CAUSE_UNSPECIFIED} | {
    cause: power_pb2.LimitCause.Value(f"LIMIT_CAUSE_{cause.value}") for cause in LimitCause
}


class PowerService(power_service_pb2_grpc.PowerServiceServicer):
    """Turns messages into commands and looks; decides nothing."""

    def __init__(self, controller: Controller) -> None:
        self._control = controller
        self.meters = controller.meters
        self._reports = asyncio.Semaphore(REPORTS_MAX)

    @unary
    async def GetPower(
        self, request: power_service_pb2.GetPowerRequest, context: Context
    ) -> power_service_pb2.GetPowerResponse:
        return power_service_pb2.GetPowerResponse(power=power(self._control))

    @unary
    async def SetPowerBudget(
        self, request: power_service_pb2.SetPowerBudgetRequest, context: Context
    ) -> power_service_pb2.SetPowerBudgetResponse:
        now_s = self._control.effects.clock.now_s()
        found = Violations()
        if len(request.intervals) > BUDGET_INTERVALS_MAX:
            found.add("intervals", f"are {len(request.intervals)}; give at most {BUDGET_INTERVALS_MAX}")
        intervals = tuple(
            self._interval(one, f"intervals[{number}]", found, now_s)
            for number, one in enumerate(request.intervals[:BUDGET_INTERVALS_MAX])
        )
        valid_s = found.number("valid_for_s", request.valid_for_s, 0.0, DURATION_S_MAX, "s")
        found.check()
        await self._control.ask(inbox.SetPowerBudget(intervals, now_s + valid_s if valid_s else None))
        return power_service_pb2.SetPowerBudgetResponse(power=power(self._control))

    @unary
    async def SubmitGridEvent(
        self, request: power_service_pb2.SubmitGridEventRequest, context: Context
    ) -> power_service_pb2.SubmitGridEventResponse:
        now_s = self._control.effects.clock.now_s()
        found = Violations()
        wanted = request.event
        if not EVENT_ID.fullmatch(wanted.id):
            found.add("event.id", "must be 1 to 64 letters, digits, dots, dashes and underscores")
        if not wanted.HasField("end"):
            found.add("event.end", "is missing; give the moment at which the event ends")
        one = self._interval(wanted, "event", found, now_s)
        found.check()
        assert one.end_s is not None
        event = GridEvent(wanted.id, one.start_s, one.end_s, one.budget_w, wanted.emergency, now_s, now_s)
        answer = await self._control.ask(inbox.OfferGridEvent(event))
        return power_service_pb2.SubmitGridEventResponse(event=convert.grid_event(answer))

    @unary
    async def CancelGridEvent(
        self, request: power_service_pb2.CancelGridEventRequest, context: Context
    ) -> power_service_pb2.CancelGridEventResponse:
        answer = await self._control.ask(inbox.CancelGridEvent(request.event_id))
        return power_service_pb2.CancelGridEventResponse(event=convert.grid_event(answer))

    @unary
    async def GetGridEventReport(
        self, request: power_service_pb2.GetGridEventReportRequest, context: Context
    ) -> power_service_pb2.GetGridEventReportResponse:
        control = self._control
        async with self._reports:
            now_s = control.effects.clock.now_s()
            unwritten = control.power.log.unwritten(now_s)

            def made() -> power_service_pb2.GetGridEventReportResponse:
                with control.effects.journal.history() as history:
                    report = event_report(history, request.event_id, now_s, unwritten)
                return power_service_pb2.GetGridEventReportResponse(report=report_message(report))

            return await asyncio.to_thread(made)

    @unary
    async def SetPrices(
        self, request: power_service_pb2.SetPricesRequest, context: Context
    ) -> power_service_pb2.SetPricesResponse:
        found = Violations()
        for number, one in enumerate(request.prices):
            if not one.HasField("start"):
                found.add(f"prices[{number}].start", "is missing; say from when on the price holds")
        found.check()
        try:
            points = checked(
                PricePoint(
                    convert.seconds(one.start),
                    one.usd_per_kwh,
                    convert.seconds(one.end) if one.HasField("end") else None,
                )
                for one in request.prices
            )
        except ValueError as error:
            found.add("prices", str(error))
            found.check()
        await self._control.ask(inbox.SetPrices(points))
        return power_service_pb2.SetPricesResponse(power=power(self._control))

    @unary
    async def SetHashprices(
        self, request: power_service_pb2.SetHashpricesRequest, context: Context
    ) -> power_service_pb2.SetHashpricesResponse:
        wanted = hashprices(request.hashprices, self._control.effects.clock.now_s())
        await self._control.ask(inbox.SetHashprices(wanted))
        return power_service_pb2.SetHashpricesResponse(power=power(self._control))

    @unary
    async def ListGridEvents(
        self, request: power_service_pb2.ListGridEventsRequest, context: Context
    ) -> power_service_pb2.ListGridEventsResponse:
        events = sorted(self._control.ledger.power.events, key=lambda event: (event.start_s, event.id))
        return power_service_pb2.ListGridEventsResponse(
            events=[convert.grid_event(event) for event in events if request.all or event.binds]
        )

    def _interval(self, message: Any, field: str, found: Violations, now_s: float) -> BudgetInterval:
        """Start, end and watts of a budget's interval or of an event; what is wrong is noted."""
        config = self._control.config.power
        start_s = convert.seconds(message.start) if message.HasField("start") else now_s
        end_s = convert.seconds(message.end) if message.HasField("end") else None
        least_w = config.base_w * config.pue
        budget_w = found.number(f"{field}.budget_w", message.budget_w, 0.0, SITE_W_MAX, "W")
        if budget_w < least_w:
            found.add(
                f"{field}.budget_w",
                f"is {budget_w:g}; base_w times pue alone is {least_w:g} W: give that or more",
            )
        if start_s > now_s + AHEAD_S_MAX:
            found.add(f"{field}.start", "lies more than ten years ahead; give Unix time in seconds")
        if end_s is not None and end_s <= start_s:
            found.add(f"{field}.end", "is not after the start; give a later moment")
        elif end_s is not None and end_s <= now_s:
            found.add(f"{field}.end", "is in the past; give a moment that is still to come")
        return BudgetInterval(start_s, end_s, budget_w)


def power(control: Controller) -> power_pb2.Power:
    """The power of the node, now."""
    view = control.power.view(control.effects.clock.now_s())
    state, config = control.ledger.power, control.config.power
    return power_pb2.Power(
        budget_w=view.budget_w,
        sources=[
            power_pb2.BudgetSource(
                kind=_KINDS[source.kind],
                budget_w=source.budget_w,
                until=convert.timestamp(source.until_s),
                event_id=source.name,
            )
            for source in sorted(view.sources, key=lambda source: source.budget_w)
        ],
        draw_w=view.draw_w,
        committed_w=view.committed_w,
        floor_w=view.floor_w,
        base_w=config.base_w,
        pue=config.pue,
        shadow_price_usd_per_wh=view.shadow_microusd_per_wh / MICROUSD_PER_USD,
        gpus=[
            power_pb2.GpuPower(
                uuid=gpu.uuid,
                index=gpu.index,
                draw_w=gpu.draw_w,
                limit_w=gpu.limit_w,
                limit_w_min=gpu.limit_w_min,
                limit_w_max=gpu.limit_w_max,
                limit_w_found=gpu.limit_w_found,
                refusal=gpu.refusal,
                limit_cause=_CAUSES[gpu.cause],
            )
            for gpu in view.gpus
        ],
        intervals=[
            power_pb2.BudgetInterval(
                start=convert.timestamp(one.start_s),
                end=convert.timestamp(one.end_s),
                budget_w=one.budget_w,
            )
            for one in state.budget
        ],
        valid_until=convert.timestamp(state.budget_valid_until_s),
        price=_price(control),
        openadr=_openadr(control),
        mining=mining(control),
    )


def _openadr(control: Controller) -> power_pb2.OpenAdr | None:
    view = control.openadr.view(control.effects.clock.now_s())
    if view is None:
        return None
    return power_pb2.OpenAdr(
        vtn=view.vtn,
        program=view.program,
        contact_age_s=view.contact_age_s,
        lost=view.lost,
        problems=view.problems,
        unused=view.unused,
    )


def _price(control: Controller) -> power_pb2.ElectricityPrice | None:
    prices = control.prices
    if prices.price is None:
        return None
    return power_pb2.ElectricityPrice(
        usd_per_kwh=prices.price.usd_per_kwh,
        age_s=prices.price.age_s if math.isfinite(prices.price.age_s) else None,
        declared=prices.price.is_declared,
        source=prices.polled.name,
        problem=prices.polled.problem,
        prices=[
            power_pb2.PricePoint(
                start=convert.timestamp(one.start_s),
                end=None if one.end_s is None else convert.timestamp(one.end_s),
                usd_per_kwh=one.usd_per_kwh,
            )
            for one in prices.points
        ],
    )
