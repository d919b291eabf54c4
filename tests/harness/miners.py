"""Standing miners on simulated boards, for tests of power through the real daemon."""

from tests.harness.daemon import Daemon

MINER = "trap 'exit 0' TERM; while :; do sleep 0.2 & wait; done"
# Watts that were taken come back at once, and fast.
MINERS = f"""
[sampling]
period_s = 0.1
processes_period_s = 1.0

[power]
return_jitter_s = 0.0
return_w_per_s = 2000.0

[[standing_jobs]]
name = "miner"
class = "mining"
command = ["/bin/sh", "-c", "{MINER}"]
"""


def mined(daemon: Daemon) -> int:
    """How many miners run."""
    return len(daemon.running("miner"))
