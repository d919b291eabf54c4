"""When to tick: at once, or after a moment in which others are likely to come along and share the commit.

A lone client never waits. Where many submit one by one, gRPC hands their calls to the loop one at a time;
without a moment's patience each would pay for a commit of its own (400 a second; with it 1,300).
"""

import asyncio
from collections.abc import Callable

from scheduler.control.inbox import Asked, HandoverResult, HoldersSeen, Item, LookFailed, MinerRead, Submit
from scheduler.effects.launcher import Acknowledged, CheckpointSaved, Exited, Signalled, Started

# As long as a few calls take to arrive; a submission's commit takes a quarter of it.
SUBMIT_LINGER_S = 0.002
# Nobody waits for these reports: the next tick takes them along, at the latest after this.
REPORT_LINGER_S = 0.005
_UNHURRIED = Started | Signalled | Acknowledged | CheckpointSaved | HoldersSeen | LookFailed | MinerRead
# Of several that were told to go, the first to be gone wait this long for the others.
EXIT_LINGER_S = 0.003
# So often a submission is made to wait to see whether it has company: 2 ms in 64 calls.
PROBE_EVERY_TICKS = 64


class Pace:
    """Learns from each tick whether patience paid."""

    def __init__(self) -> None:
        self._in_company = False
        self._alone_ticks = 0

    def linger_s(self, item: Item, *, awaits_exits: bool = False) -> float:
        """How long the item may wait for others; 0 = not at all.

        `awaits_exits`: jobs that were told to go have gone, and others that were told so have not.
        """
        if awaits_exits and isinstance(item, Exited | HandoverResult):
            return EXIT_LINGER_S
        if isinstance(item, _UNHURRIED):
            return REPORT_LINGER_S
        if isinstance(item, Asked) and isinstance(item.command, Submit) and self._in_company:
            return SUBMIT_LINGER_S
        return 0.0

    def schedule(self, tick: Callable[[], None], item: Item | None) -> asyncio.Handle:
        """Have the tick called for the item when its time has come.

        For an end that is behind the looks that begin with it, and with ends that came along: one tick knows
        them all.
        """
        loop = asyncio.get_running_loop()
        if isinstance(item, Exited):
            return loop.call_soon(loop.call_soon, tick)
        return loop.call_soon(tick)

    def took(self, items: list[Item]) -> None:
        """A tick took these."""
        submissions = sum(isinstance(item, Asked) and isinstance(item.command, Submit) for item in items)
        if not submissions:
            return
        self._in_company = submissions > 1
        self._alone_ticks = 0 if self._in_company else self._alone_ticks + 1
        if self._alone_ticks == PROBE_EVERY_TICKS:
            self._in_company = True
            self._alone_ticks = 0
