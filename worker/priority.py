"""Which of the worker's threads give way to the others."""

from __future__ import annotations

import os
import sys

#: Where a thread may not become idle, as `nice` counts. It gets a tenth of a core that another
#: wants whole then.
LOADER_NICENESS = 10


def give_way() -> None:
    """Let this thread, and the threads that it will start, run when no other wants to, for good.

    With `SCHED_IDLE` a thread that wakes up takes the core from it at once; from one that is merely
    nicer it does so some milliseconds later, many times a second. A worker under load is never so
    busy that nothing is left: what takes .2 s otherwise takes 2 or 3 (docs/benchmarks.md).

    Linux alone has priorities of threads; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # some sandboxes know no policies
            os.nice(LOADER_NICENESS)
