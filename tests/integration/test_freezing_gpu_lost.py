"""A GPU falls off the bus while a frozen job holds it: the real daemon and launcher on the fake driver."""

import getpass
from pathlib import Path

from scheduler.v1 import node_pb2
from tests.fakes.nvml.fake import FakeNvml
from tests.fakes.nvml.reading import needs_gcc
from tests.harness.daemon import PENDING, RUNNING, Daemon, logged, until, word
from tests.harness.freezing import FREEZABLE, MET, ended, frozen
from tests.harness.miners import mined

pytestmark = needs_gcc

CONFIG = f'[jobs]\nuser = "{getpass.getuser()}"\n{FREEZABLE}'
# Of a load each board draws this part of its watts: at work, and with a frozen job on it.
WORKS, FROZEN = 0.75, 0.1
# Two boards of 560 W and their limits: one must give, whatever the other is lowered by.
EVENT_W = 700.0
LOST = node_pb2.GPU_STATE_LOST


def test_the_job_is_woken_to_go_and_comes_back_with_board_and_watts(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path, gpus=2, is_live=True)
    with Daemon(gpus="", config=CONFIG) as daemon, logged(daemon):
        daemon.environment = fake.environment()
        daemon.start()
        until("all mine", lambda: mined(daemon) == 2)
        for index in range(2):
            fake.load(index, WORKS)
        until("they draw", lambda: daemon.get_power().draw_w > 1000)
        daemon.offer_event("e1", EVENT_W, until_s=600)
        (job,) = until("one is frozen", lambda: frozen(daemon))
        uuids = [gpu.uuid for gpu in fake.gpus[:2]]
        index = uuids.index(job.attempts[-1].gpus[0])
        fake.load(index, FROZEN)
        until("the event is met", lambda: daemon.grid_event("e1").state == MET)
        pid, (other,) = job.attempts[-1].pid, daemon.running("miner")

        fake.gpus[index].lost = 1
        fake.xid(index, 79)

        until("it is lost", lambda: daemon.get_node().gpus[index].state == LOST)
        first = until("its job gave way", lambda: ended(daemon, job.id))
        assert (word(first.notice.reason), first.exit_code) == ("GPU_FAILED", 0), "it heard its notice"
        assert pid not in daemon.processes()
        stays = daemon.get(other.id)
        assert (stays.state, stays.attempt) == (RUNNING, 1)
        power = daemon.get_power()
        assert max(power.draw_w, power.committed_w) <= EVENT_W
        assert daemon.get(job.id).state == PENDING

        fake.gpus[index].lost = 0
        daemon.cancel_event("e1")
        assert daemon.cli("uncordon", str(index)).returncode == 0
        back = daemon.wait_attempt(job.id, 2)
        assert list(back.attempts[-1].gpus) == [uuids[index]]
        assert daemon.verify().returncode == 0
