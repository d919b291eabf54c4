"""The VEN in virtual time: what holds while no VTN has answered since the daemon or the machine started."""

import asyncio
from pathlib import Path

import pytest

from scheduler.control.board import NodeSize
from scheduler.control.inbox import OfferGridEvent
from scheduler.effects.openadr import HttpVtn, VtnObjects
from scheduler.errors import FeedError
from scheduler.model.power import GridEvent, ShedState
from scheduler.model.settings import Config, OpenAdrConfig
from scheduler.simulation.boards import PROFILES, boards
from scheduler.simulation.daemon import SimulatedDaemon
from scheduler.simulation.machine import Machine
from scheduler.simulation.virtual_time import EPOCH_S, VirtualClock, run

NOBODY = OpenAdrConfig(vtn_url="http://127.0.0.1:1", program="p", subscription_w=300.0)
HOUR_S = 3600.0
LIMIT = GridEvent("openadr-limit-l-1", EPOCH_S, EPOCH_S + 9 * HOUR_S, 500.0, False, EPOCH_S)
OTHERS = GridEvent("theirs", EPOCH_S, EPOCH_S + 9 * HOUR_S, 600.0, False, EPOCH_S)


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a refused connection does, but at once: a thread takes any amount of virtual time."""

    async def refused(_: HttpVtn) -> VtnObjects:
        raise FeedError("connection refused")

    monkeypatch.setattr(HttpVtn, "poll", refused)


def daemon_of(tmp_path: Path, openadr: OpenAdrConfig) -> SimulatedDaemon:
    made = boards([PROFILES["H100"]] * 2, "n0", EPOCH_S, 0)
    machine = Machine(made, VirtualClock(), {}.__getitem__)
    return SimulatedDaemon(machine, tmp_path, Config(openadr=openadr), (NodeSize(64, 512_000, 100),))


def binding(daemon: SimulatedDaemon) -> dict[str, float]:
    """The watts of the grid events that have a say, by the first two words of their ids."""
    events = daemon.controller.ledger.power.events
    return {"-".join(one.id.split("-")[:2]): one.budget_w for one in events if one.binds}


async def started(daemon: SimulatedDaemon) -> None:
    await daemon.start()
    await asyncio.sleep(5.0)


def test_limits_survive_a_crash_of_the_daemon_but_no_restart_of_the_machine(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = daemon_of(tmp_path, NOBODY)
        await started(daemon)
        await daemon.ask(OfferGridEvent(LIMIT))
        await daemon.ask(OfferGridEvent(OTHERS))
        daemon.crash()
        await started(daemon)
        assert binding(daemon) == {"openadr-limit": 500.0, "theirs": 600.0}
        daemon.reboot()
        await started(daemon)
        assert binding(daemon) == {"openadr-subscription": 300.0, "theirs": 600.0}
        assert daemon.controller.power.budget.in_force_w == 300.0
        limit = next(one for one in daemon.controller.ledger.power.events if one.id == LIMIT.id)
        assert limit.state is ShedState.CANCELLED
        daemon.reboot()  # once more changes nothing
        await started(daemon)
        assert binding(daemon) == {"openadr-subscription": 300.0, "theirs": 600.0}
        daemon.stop()

    run(story())


def test_the_subscription_holds_once_a_vtn_that_never_answered_is_lost(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = daemon_of(tmp_path, NOBODY)
        await started(daemon)
        view = daemon.controller.openadr.view(EPOCH_S + 5.0)
        assert view is not None
        assert (view.contact_age_s, view.lost) == (None, False)
        assert "openadr" in daemon.controller.problems
        assert binding(daemon) == {}
        await asyncio.sleep(1200.0)
        assert binding(daemon) == {"openadr-subscription": 300.0}
        daemon.stop()

    run(story())


def test_without_a_vtn_nothing_that_one_asked_for_holds(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = daemon_of(tmp_path, OpenAdrConfig())
        await started(daemon)
        await daemon.ask(OfferGridEvent(LIMIT))
        await daemon.ask(OfferGridEvent(OTHERS))
        daemon.crash()
        await started(daemon)
        assert binding(daemon) == {"theirs": 600.0}
        daemon.stop()

    run(story())
