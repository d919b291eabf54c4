"""Commands of clients, by the loop of a simulated machine."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scheduler.control.inbox import Submission, Submit
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.simulation.machine import Workload
from scheduler.simulation.virtual_time import run
from tests.harness.simulated import SimulatedNode
from tests.harness.values import SPEC


def test_a_request_that_nobody_knew_is_looked_up_again_only_where_something_happened_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    plainly = SqliteJournal.request

    def noted(self: SqliteJournal, request_id: str) -> Any:
        looked.append(request_id)
        return plainly(self, request_id)

    async def story() -> None:
        node = SimulatedNode(tmp_path, lambda _: Workload(duration_s=10.0))
        await node.daemon.start()
        await asyncio.sleep(5.0)  # the empty GPU is learnt
        head = node.daemon.journal.head
        wanted = Submission(replace(SPEC), {}, "r-1", "digest", unknown_at=head)
        monkeypatch.setattr(SqliteJournal, "request", noted)
        (first,), (second,) = await asyncio.gather(*(node.daemon.ask(Submit((wanted,))) for _ in range(2)))
        assert (first.id, looked) == (second.id, [])  # the second was found in the tick that made the first
        (third,) = await node.daemon.ask(Submit((wanted,)))
        assert (first.id, looked) == (third.id, ["r-1"])
        node.daemon.stop()

    run(story())
