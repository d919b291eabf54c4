"""The launcher: a small process that starts and ends jobs, outlives the daemon and never loads gRPC.

    launcher_process.py --socket PATH --jobs-dir DIR [--user NAME] [--log-bytes N] [--log-files N]
                        [--containment auto|cgroup|supervisor] [--ready-fd N]

It may be run by path under `python -I -S`, which is the fast way, or as a module, or by systemd with a
listening socket (LISTEN_FDS).

One launcher serves a socket (a lock beside it says so), one daemon at a time: whoever says hello last. Orders
and reports are those of `launcher_wire.py`. Whoever connects must be root or the launcher's own user.

It ends IDLE_S after it holds no attempt and has no daemon; an attempt counts until the daemon forgets it, so
no exit code is lost with the launcher. (Once the socket is removed nobody can ask any more, and an attempt
counts until it is over.) SIGTERM (systemd stops the unit, the machine shuts down) stops all jobs with a grace
of TERM_GRACE_S, takes no new ones, and ends the launcher when all are gone; a second one kills them now. If
the launcher itself is killed, its jobs are: their first processes at once by the kernel (PR_SET_PDEATHSIG),
the rest by their supervisors, or by the next launcher, which clears their cgroups before it takes an order.
"""

import os
import sys

if __name__ == "__main__":  # run by path: nobody has said yet where the package lies
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

# What is run by path is compiled at each start. So here is almost nothing.
from scheduler.effects.launcher_setup import run

if __name__ == "__main__":
    run()
