"""OpenADR: what a VTN says becomes grid events and prices, by the same commands that clients use.

Each answer of the VTN is the whole truth: what it asks for is compared with the grid events that are there
from it, what is missing is offered, what it no longer asks for is cancelled. The journal keeps the grid
events, so that they hold through restarts and while nobody answers; the fail-safe level is one of them
(`model/openadr_terms.py`).
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from scheduler.control.inbox import CancelGridEvent, OfferGridEvent, SetPrices
from scheduler.control.sheds import SETTLE_S
from scheduler.effects.openadr import HttpVtn, Vtn, VtnObjects
from scheduler.effects.webhook import Webhook
from scheduler.errors import FeedError, RequestError
from scheduler.model.openadr import FOREVER_S, read
from scheduler.model.openadr_terms import Terms, TermsKind, Wanted, wanted
from scheduler.model.power import GridEvent
from scheduler.model.prices import PricePoint
from scheduler.model.settings import OpenAdrConfig, split_host_port

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

log = logging.getLogger("wattshift.openadr")

PREFIX = "openadr-"
RETRY_S = 2.0
RETRY_S_MAX = 300.0
# However many notifications come, the VTN is not asked more often.
GAP_S = 1.0
# A VTN that was set up anew knows no subscription any more.
SUBSCRIBE_S = 300.0
PROBLEMS_SHOWN_MAX = 8
# Between looking and offering a tick passes.
SLACK_S = 0.5
# What is held in place of what can't be reached is offered anew when so much of it would do.
NEARER = 0.95
# Starts that are looked at for one event.
STARTS_MAX = 16
_DIGEST_DIGITS = 10
_NAME_CHARACTERS = 24


@dataclass(frozen=True, slots=True)
class OpenAdrView:
    """How it stands with the VTN, for somebody who looks."""

    vtn: str
    program: str
    contact_age_s: float | None  # None: it has not answered yet
    lost: bool
    problems: tuple[str, ...]
    unused: tuple[str, ...]


class OpenAdr:
    """The VEN."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self._config = OpenAdrConfig()  # that it goes by
        self._running: asyncio.Task[None] | None = None
        self._hint = asyncio.Event()
        self._rebooted = controller.rebooted  # and no VTN has answered since
        self._begin()

    def _begin(self) -> None:
        """Know nothing of a VTN yet."""
        self._seen: VtnObjects | None = None
        self._contact_s: float | None = None
        self._began_s = 0.0
        self._subscribed_s = -math.inf
        self._trouble = ""  # why it did not answer last
        self._webhook_trouble = ""
        self._problems: tuple[str, ...] = ()  # of what it says
        self._unused: tuple[str, ...] = ()
        self._held: dict[Terms, str] = {}  # the grid event that was offered for them
        self._floors: dict[Terms, float] = {}  # of what can't be reached: what is held in its place
        self._prices: tuple[PricePoint, ...] = ()  # that were set last

    # Life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Follow the VTN that the configuration names; without one, let its grid events go."""
        self._config = self._control.config.openadr
        self._began_s = self._control.effects.clock.now_s()
        work = self._run() if self._config.vtn_url else self._let_go()
        self._running = asyncio.get_running_loop().create_task(work)

    def stop(self) -> None:
        """Follow it no more; its grid events stay."""
        if self._running is not None:
            self._running.cancel()
            self._running = None

    def reload(self) -> None:
        """Go by other settings, where they are others."""
        if self._control.config.openadr != self._config:
            self.stop()
            self._begin()
            self._control.problems.pop("openadr", None)
            self.start()

    def view(self, now_s: float) -> OpenAdrView | None:
        """How it stands; None without a VTN."""
        if not self._config.vtn_url:
            return None
        age_s = None if self._contact_s is None else max(0.0, now_s - self._contact_s)
        troubles = [text for text in (self._trouble, self._webhook_trouble) if text]
        return OpenAdrView(
            self._config.vtn_url,
            self._config.program,
            age_s,
            self._is_lost(now_s),
            (*troubles, *self._problems),
            self._unused,
        )

    def _lost_s(self) -> float:
        """When contact counts as lost."""
        since_s = self._began_s if self._contact_s is None else self._contact_s
        return since_s + self._config.contact_lost_s

    def _is_lost(self, now_s: float) -> bool:
        return now_s >= self._lost_s()

    def _lost_in_s(self) -> float:
        """Until then, so that it is noticed however seldom the VTN is asked; inf once it is."""
        left_s = self._lost_s() - self._control.effects.clock.now_s()
        return left_s + SLACK_S if left_s > 0 else math.inf

    async def _run(self) -> None:
        vtn: Vtn = HttpVtn(self._config)
        webhook = Webhook(urlsplit(self._config.webhook_url).path, self._hint.set)
        try:
            await self._listen(webhook)
            await self._distrust()
            retry_s = RETRY_S
            while True:
                wait_s = self._config.poll_s
                if not await self._polled(vtn):
                    wait_s, retry_s = retry_s, min(2 * retry_s, RETRY_S_MAX)
                else:
                    retry_s = RETRY_S
                await self._follow()
                wait_s = min(wait_s, self._lost_in_s())
                await asyncio.sleep(min(GAP_S, wait_s))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hint.wait(), max(0.0, wait_s - GAP_S))
        finally:
            webhook.close()

    async def _listen(self, webhook: Webhook) -> None:
        if not self._config.webhook_listen:
            return
        try:
            host, port = await webhook.start(*split_host_port(self._config.webhook_listen))
        except FeedError as error:  # polls do without
            self._webhook_trouble = str(error)
            log.error("%s", error)
        else:
            log.info("the OpenADR webhook listens on %s:%d", host, port)

    async def _polled(self, vtn: Vtn) -> bool:
        """Whether the VTN answered."""
        self._hint.clear()
        try:
            self._seen = await vtn.poll()
        except FeedError as error:
            if str(error) != self._trouble:
                log.warning("no contact with the VTN: %s", error)
            self._trouble = str(error)
            return False
        except Exception:  # a defect of ours must not end the watch
            log.exception("the VTN could not be asked")
            self._trouble = "the VTN could not be asked; the daemon's log says why"
            return False
        if self._trouble or self._contact_s is None:
            log.info("the VTN answers: %s, program %s", vtn.name, self._config.program)
        self._trouble, self._rebooted = "", False
        self._contact_s = self._control.effects.clock.now_s()
        await self._subscribe(vtn, self._contact_s)
        return True

    async def _subscribe(self, vtn: Vtn, now_s: float) -> None:
        if not self._config.webhook_url or now_s - self._subscribed_s < SUBSCRIBE_S:
            return
        try:
            await vtn.subscribe(f"wattshift-{self._control.config.node.name}", self._config.webhook_url)
        except FeedError as error:  # asked again with the next poll
            if str(error) != self._webhook_trouble:
                log.warning("no notifications: %s", error)
            self._webhook_trouble = str(error)
        else:
            self._subscribed_s, self._webhook_trouble = now_s, ""

    # What follows -------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Bring the grid events and prices in line with what the VTN said last."""
        now_s = self._control.effects.clock.now_s()
        try:
            if self._seen is not None:
                node = self._control.config.node.name
                signals = read(
                    self._seen.events,
                    self._seen.program,
                    now_s,
                    # The same in each poll, after each restart, in each replay; another on each node.
                    lambda event_id: random.Random(f"{node} {event_id}").uniform(-1.0, 1.0),
                )
                follows = wanted(signals, self._config, self._least_w, self._fallback_w(now_s), now_s)
                problems = [*follows.problems, *await self._settle(follows, now_s)]
                self._say(tuple(problems), signals.unused)
            elif self._is_lost(now_s):
                await self._subscribe_safely(now_s)
        except Exception:  # a defect of ours must not end the watch
            log.exception("what the VTN said could not be followed")
            self._problems = ("what the VTN said could not be followed; the daemon's log says why",)
        self._publish()

    def _say(self, problems: tuple[str, ...], unused: tuple[str, ...]) -> None:
        for text in problems:
            if text not in self._problems:
                log.warning("%s", text)
        for name in unused:
            if name not in self._unused:
                log.info("payloads of type %s are not used", name)
        self._problems, self._unused = problems, unused

    def _publish(self) -> None:
        texts = [text for text in (self._trouble, self._webhook_trouble, *self._problems) if text]
        if len(texts) > PROBLEMS_SHOWN_MAX:
            texts = [*texts[:PROBLEMS_SHOWN_MAX], f"and {len(texts) - PROBLEMS_SHOWN_MAX} more"]
        if texts:
            self._control.problems["openadr"] = "; ".join(texts)
        else:
            self._control.problems.pop("openadr", None)

    @property
    def _least_w(self) -> float:
        config = self._control.config.power
        return config.base_w * config.pue

    def _fallback_w(self, now_s: float) -> float | None:
        """The subscription where the VTN names none; while it is lost, at least the declared safe level."""
        if self._config.subscription_w is not None:
            return self._config.subscription_w
        return self._control.config.power.safe_budget_w if self._is_lost(now_s) else None

    async def _distrust(self) -> None:
        """After a restart of the machine no limit of before counts; the subscription does."""
        if not self._rebooted:
            return
        now_s = self._control.effects.clock.now_s()
        limits = [event for event in self._ours(now_s) if _kind(event) is TermsKind.LIMIT]
        await self._subscribe_safely(now_s)
        for event in limits:
            await self._cancel(event)
        if limits:
            log.warning("the machine was restarted: %d limits of before don't count", len(limits))

    async def _subscribe_safely(self, now_s: float) -> None:
        """Before the VTN has answered: hold the subscription, if no limit of the journal is in force."""
        ours = self._ours(now_s)
        known = [event for event in ours if _kind(event) is TermsKind.SUBSCRIPTION]
        level_w = min((event.budget_w for event in known), default=self._fallback_w(now_s))
        if level_w is None or any(event.end_s == FOREVER_S and event.start_s <= now_s for event in known):
            return
        terms = Terms(TermsKind.SUBSCRIPTION, "", now_s, FOREVER_S, max(level_w, self._least_w))
        if self._rebooted or not known:
            await self._offer(terms, now_s)

    # Grid events --------------------------------------------------------------------------------

    def _ours(self, now_s: float) -> list[GridEvent]:
        return [
            event
            for event in self._control.ledger.power.events
            if event.binds and event.id.startswith(PREFIX) and now_s < event.end_s
        ]

    async def _settle(self, follows: Wanted, now_s: float) -> list[str]:
        """Offer what is missing, then cancel what nobody asks for; returns what went wrong."""
        problems = []
        left = self._ours(now_s)
        self._floors = {terms: w for terms, w in self._floors.items() if terms in follows.terms}
        self._held = {terms: name for terms, name in self._held.items() if terms in follows.terms}
        for terms in follows.terms:
            floor_w = self._floors.get(terms)
            if floor_w is not None and self._soonest(terms, now_s)[1] < NEARER * floor_w:
                del self._floors[terms], self._held[terms]
                floor_w = None
            there = next((event for event in left if self._serves(event, terms, now_s)), None)
            if there is not None:
                left.remove(there)
                problem = "" if floor_w is None else _short_of(terms, floor_w)
            else:
                problem = await self._offer(terms, now_s)
            if problem:
                problems.append(problem)
        for event in left:
            await self._cancel(event)
        problems += await self._price(follows.prices)
        return problems

    def _serves(self, event: GridEvent, terms: Terms, now_s: float) -> bool:
        """Whether the grid event is what the terms ask for; once both have begun, when they did is past."""
        if terms in self._held:
            return self._held[terms] == event.id
        begins_alike = event.start_s == terms.start_s or max(event.start_s, terms.start_s) <= now_s
        return begins_alike and (_kind(event), event.end_s, event.budget_w, event.emergency) == (
            terms.kind,
            terms.end_s,
            terms.budget_w,
            terms.emergency,
        )

    async def _offer(self, terms: Terms, now_s: float) -> str:
        """Take it on, as soon and as far as it can be reached; returns what is wrong with it."""
        start_s, floor_w = self._soonest(terms, now_s)
        if not terms.event_id:  # the configuration says from when on: from now
            start_s = max(start_s, now_s)
        event = self._event(terms, start_s, max(terms.budget_w, floor_w), now_s)
        try:
            await self._control.ask(OfferGridEvent(event))
        except RequestError as error:
            return f"{_name(terms)} was refused: {error}"
        self._held[terms] = event.id
        if floor_w <= terms.budget_w:
            return ""
        self._floors[terms] = floor_w
        return _short_of(terms, floor_w)

    def _soonest(self, terms: Terms, now_s: float) -> tuple[float, float]:
        """When it can start, and the least watts then; 0 W where it is reached.

        A voluntary event that begins now leaves nobody his grace: it starts when the graces are over of those
        who must go, and its shed begins at once.
        """
        if terms.emergency:
            return terms.start_s, 0.0
        jobs = [job for job in self._control.ledger.live_jobs() if job.attempts[-1].gpus]
        graces = sorted({job.spec.grace_s for job in jobs})
        later = [
            now_s + SETTLE_S + SLACK_S + grace_s for grace_s in (*graces[: STARTS_MAX - 1], *graces[-1:])
        ]
        start_s, least_w = terms.start_s, 0.0
        for moment_s in (terms.start_s, *(m for m in later if terms.start_s < m < terms.end_s)):
            start_s = moment_s
            least_w = self._control.power.reachable(max(now_s, moment_s), now_s)[0]
            if least_w <= terms.budget_w:
                return start_s, 0.0
        return start_s, float(math.ceil(least_w))

    def _event(self, terms: Terms, start_s: float, budget_w: float, now_s: float) -> GridEvent:
        """The grid event, under a name that none had before: one that was cancelled may be wanted again."""
        exact = f"{terms.event_id} {terms.start_s} {terms.end_s} {budget_w} {terms.emergency}"
        digest = hashlib.sha256(exact.encode()).hexdigest()[:_DIGEST_DIGITS]
        words = "".join(c for c in terms.event_id if c.isascii() and (c.isalnum() or c in "._-"))
        stem = "-".join(filter(None, (f"{PREFIX}{terms.kind}", words[:_NAME_CHARACTERS], digest)))
        taken = {event.id for event in self._control.ledger.power.events}
        name, turn = stem, 2
        while name in taken:
            name, turn = f"{stem}-{turn}", turn + 1
        return GridEvent(name, start_s, terms.end_s, budget_w, terms.emergency, now_s, now_s)

    async def _cancel(self, event: GridEvent) -> None:
        with contextlib.suppress(RequestError):  # it is over in the meantime
            await self._control.ask(CancelGridEvent(event.id))

    async def _let_go(self) -> None:
        """There is no VTN any more: nothing that it asked for holds."""
        for event in self._ours(self._control.effects.clock.now_s()):
            await self._cancel(event)

    async def _price(self, points: tuple[PricePoint, ...]) -> list[str]:
        if points == self._prices:
            return []
        feed = self._control.prices.polled.feed
        if feed is not None:
            return [f"PRICE is not used: prices come from {feed.name} ([power] price_source)"]
        try:
            await self._control.ask(SetPrices(points))
        except RequestError as error:
            return [f"PRICE was refused: {error}"]
        self._prices = points
        return []


def _kind(event: GridEvent) -> TermsKind | None:
    word = event.id.removeprefix(PREFIX).partition("-")[0]
    return TermsKind(word) if word in list(TermsKind) else None


def _name(terms: Terms) -> str:
    of = f" of event {terms.event_id[:64]!r}" if terms.event_id else ""
    return f"the {terms.kind}{of} ({terms.budget_w:.0f} W)"


def _short_of(terms: Terms, floor_w: float) -> str:
    return f"{_name(terms)} can't be reached: {floor_w:.0f} W is held, the least that can be"
