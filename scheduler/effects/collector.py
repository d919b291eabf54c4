"""The garbage collector in a process that has to answer at once."""

import gc

# Young objects before a look at them; looks before one at the older and the oldest.
COLLECTOR_THRESHOLDS = (10_000, 20, 1000)


def calm_collector() -> None:
    """Take what is there for good out of the garbage collector's sight, and look for garbage less often.

    A full collection took 11 to 29 ms in the first second, and 22 to 65 ms with 30,000 jobs waiting: in the
    middle of somebody's submission. What the loop makes is freed by its reference count.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
