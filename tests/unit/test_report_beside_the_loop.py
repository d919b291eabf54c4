"""A report reads weeks of the journal: beside the loop, one at a time, by a connection of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from scheduler.api.power_service import PowerService
from scheduler.control.meters import Meters
from scheduler.model.power import GridEvent, PowerState
from scheduler.v1 import power_service_pb2

EVENT = GridEvent("e1", 100.0, 200.0, 1000.0, emergency=False, accepted_s=0.0)
STATE = SimpleNamespace(power=PowerState(events=(EVENT,)))
WAIT_S = 30.0  # of a defect


class SlowJournal:
    """Its history can be read when somebody says so."""

    def __init__(self) -> None:
        self.may_read = threading.Event()
        self.begun = threading.Semaphore(0)
        self.readers: list[str] = []

    @contextmanager
    def history(self) -> Iterator[Any]:
        self.readers.append(threading.current_thread().name)
        self.begun.release()
        assert self.may_read.wait(WAIT_S)
        yield SimpleNamespace(node_state=lambda: STATE)


def service_of(journal: SlowJournal) -> PowerService:
    effects = SimpleNamespace(journal=journal, clock=SimpleNamespace(now_s=lambda: 50.0))
    log = SimpleNamespace(unwritten=lambda now_s: None)
    controller: Any = SimpleNamespace(effects=effects, meters=Meters(), power=SimpleNamespace(log=log))
    return PowerService(controller)


async def test_the_loop_goes_on_while_a_report_is_made_and_another_waits_for_it() -> None:
    journal = SlowJournal()
    context: Any = None
    service = service_of(journal)
    request = power_service_pb2.GetGridEventReportRequest(event_id="e1")
    calls = [asyncio.ensure_future(service.GetGridEventReport(request, context)) for _ in range(3)]
    # That this is reached says that the loop goes on.
    assert await asyncio.to_thread(journal.begun.acquire, timeout=WAIT_S)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(journal.readers) == 1
    journal.may_read.set()
    answers = await asyncio.gather(*calls)
    assert [answer.report.event.id for answer in answers] == ["e1"] * 3
    assert threading.main_thread().name not in journal.readers
    assert len(journal.readers) == 3
