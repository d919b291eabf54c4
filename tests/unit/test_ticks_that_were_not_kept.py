"""A tick that the journal could not keep leaves nothing behind: what was taken back is done again later."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.control.board import NodeSize
from scheduler.control.inbox import Drain, Elapsed, Inbox, LauncherBack
from scheduler.control.loop import Effects
from scheduler.effects.launcher import AttemptKey, Exited, LauncherGone, LauncherHello
from scheduler.errors import Unavailable
from scheduler.model.events import PolicyChanged
from scheduler.model.gpus import GpuState
from scheduler.model.jobs import JobState
from scheduler.model.policy import Policy
from scheduler.model.settings import Config, StandingJob
from scheduler.simulation.boards import PROFILES, boards
from scheduler.simulation.daemon import SimulatedDaemon
from scheduler.simulation.machine import Machine, Workload
from scheduler.simulation.virtual_time import EPOCH_S, VirtualClock, run


def a_daemon(directory: Path, config: Config) -> SimulatedDaemon:
    """One whose journal can't be written from the moment that it is open."""

    def wrap(effects: Effects) -> Effects:
        daemon.disk.failure = "write"
        return effects

    machine = Machine(boards([PROFILES["H100"]] * 2, "n", EPOCH_S), VirtualClock(), lambda _: Workload())
    daemon = SimulatedDaemon(machine, directory, config, (NodeSize(64, 512_000, 100),), wrap)
    return daemon


def test_gpus_are_looked_at_and_miners_made_once_the_journal_can_be_written(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = a_daemon(tmp_path, Config(standing_jobs=(StandingJob("miner", ("mine",)),)))
        await daemon.start()
        await asyncio.sleep(5.0)
        assert daemon.controller.ledger.jobs == {}
        daemon.disk.failure = ""
        await asyncio.sleep(5.0)
        jobs = daemon.controller.ledger.jobs.values()
        assert [job.state for job in jobs] == [JobState.RUNNING] * 2
        daemon.stop()

    run(story())


def test_an_empty_gpu_does_not_stay_in_hand_over(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = a_daemon(tmp_path, Config())
        await daemon.start()
        await asyncio.sleep(5.0)
        daemon.disk.failure = ""
        await asyncio.sleep(5.0)
        assert [view.state for view in daemon.controller.board.views(0.0)] == [GpuState.FREE] * 2
        daemon.stop()

    run(story())


def test_a_release_that_was_refused_releases_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = a_daemon(tmp_path, Config())
        await daemon.start()
        with pytest.raises(Unavailable, match="nothing was accepted"):
            await daemon.ask(Drain(stop_jobs=False, release=True))
        assert not daemon.controller.board.released
        daemon.disk.failure = ""
        daemon.stop()

    run(story())


def test_a_launcher_that_dies_meanwhile_is_connected_to_once(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = a_daemon(tmp_path, Config())
        await daemon.start()
        connect, connected = daemon.launcher.connect, 0

        async def counted(on_report: object) -> LauncherHello:
            nonlocal connected
            connected += 1
            return await connect(on_report)  # type: ignore[arg-type]

        daemon.launcher.connect = counted  # type: ignore[method-assign]
        daemon.launcher.die()
        await asyncio.sleep(5.0)
        daemon.disk.failure = ""
        await asyncio.sleep(5.0)
        assert (connected, daemon.controller.launcher_id) == (1, "launcher-2")
        daemon.stop()

    run(story())


def test_a_policy_that_was_reloaded_is_in_the_journal_once_that_can_be_written(tmp_path: Path) -> None:
    async def story() -> None:
        daemon = a_daemon(tmp_path, Config())
        await daemon.start()
        daemon.disk.failure = ""
        await asyncio.sleep(5.0)
        daemon.disk.failure = "write"
        policy = replace(daemon.config.policy, hysteresis_ratio=0.7)
        daemon.controller.reload(replace(daemon.config, policy=policy))
        await asyncio.sleep(0.5)
        assert policies(daemon) == [Config().policy], "no tick was kept"
        daemon.disk.failure = ""
        await asyncio.sleep(5.0)
        assert policies(daemon) == [Config().policy, policy], "once"
        daemon.stop()

    run(story())


def policies(daemon: SimulatedDaemon) -> list[Policy]:
    with daemon.journal.history() as history:
        events = history.events(0.0, 2 * EPOCH_S, (PolicyChanged,))
    return [event.policy for event in events if isinstance(event, PolicyChanged)]


def test_of_what_is_put_back_a_launchers_end_and_the_greetings_before_it_are_left_out() -> None:
    inbox = Inbox(lambda _: None)
    old, new = (LauncherBack(LauncherHello(name, "boot", 1, "cgroup", ())) for name in ("old", "new"))
    ended = Exited(AttemptKey("j1", 1), 1.0, 0, None)
    inbox.put(Elapsed())
    inbox.put_back([old, ended, LauncherGone(2.0), new])
    assert inbox.drain() == [ended, new, Elapsed()]
