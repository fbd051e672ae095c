"""Which of the worker's threads give way to the others."""

from __future__ import annotations

import os
import sys

#: As `nice` counts. A thread at it gets a tenth of a core that another wants whole, so that what
#: it does is slow then, yet comes to an end.
LOADER_NICENESS = 10


def give_way() -> None:
    """Lower the priority of this thread, and of the threads that it will start, for good.

    Linux alone has priorities of threads; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        os.nice(LOADER_NICENESS)
