"""A table that a file or a URL renews: read at its pace, and again ever later while it can't be read."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from scheduler.effects.feed import Feed
from scheduler.errors import FeedError, IllegalMove

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

log = logging.getLogger("wattshift.prices")

# A source that can't be read is tried again after this, then ever later, at most after this.
RETRY_S = 10.0
RETRY_S_MAX = 900.0

_T = TypeVar("_T")


class Polled(Generic[_T]):
    """A feed that the configuration names, if it names one."""

    def __init__(
        self,
        controller: "Controller",
        kind: str,
        key: str,
        feed: Callable[[], Feed[_T] | None],
        poll_s: Callable[[], float],
        take: Callable[[_T, str], None],
    ) -> None:
        """`kind` is what it brings, for people and as the key of its problem; `take` gets all that was read.

        `feed` and `poll_s` say what the configuration says now, `key` where it says it.
        """
        self._control = controller
        self._kind = kind
        self._key = key
        self._feed_now = feed
        self._poll_s = poll_s
        self._take = take
        self.feed = feed()
        self.problem = ""  # why it could not be read last
        self._polling: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The source for a person; empty where there is none."""
        return self.feed.name if self.feed is not None else ""

    def refuse_clients(self) -> None:
        """Refuse what a client says where there is a source.

        Raises:
            IllegalMove: The configuration names one.
        """
        if self.feed is not None:
            raise IllegalMove(
                f"{self._kind} come from {self.name} ({self._key}); "
                "take that out of the configuration and reload to set them from here"
            )

    def start(self) -> None:
        """Read it from now on, if there is one."""
        self._polling = asyncio.get_running_loop().create_task(self._poll()) if self.feed else None

    def stop(self) -> None:
        """Read it no more."""
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None

    def reload(self) -> None:
        """Go by another source, where the configuration names another."""
        feed = self._feed_now()
        if (feed and feed.name) != (self.feed and self.feed.name):
            self.stop()
            self.feed, self.problem = feed, ""
            self._control.problems.pop(self._kind, None)
            self.start()

    async def _poll(self) -> None:
        retry_s = RETRY_S
        while self.feed is not None:
            wait_s = self._poll_s()
            try:
                found = await self.feed.fetch()
            except FeedError as error:
                if str(error) != self.problem:
                    log.warning("no %s: %s", self._kind, error)
                self.problem = self._control.problems[self._kind] = str(error)
                wait_s, retry_s = retry_s, min(2 * retry_s, RETRY_S_MAX)
            else:
                if self.problem:
                    log.info("%s come again from %s", self._kind, self.name)
                self.problem, retry_s = "", RETRY_S
                self._control.problems.pop(self._kind, None)
                self._take(found, self.name)
            await asyncio.sleep(wait_s)
