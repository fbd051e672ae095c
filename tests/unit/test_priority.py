"""Which threads give way."""

import os
import sys
import threading

import pytest

from worker.priority import LOADER_NICENESS, give_way


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_a_thread_that_gives_way_and_those_it_starts_come_behind_all_others() -> None:
    before = niceness()
    found = []

    def load() -> None:
        give_way()
        found.append(niceness())
        feed = threading.Thread(target=lambda: found.append(niceness()))
        feed.start()
        feed.join()

    loader = threading.Thread(target=load)
    loader.start()
    loader.join()
    assert found == [min(19, before + LOADER_NICENESS)] * 2
    assert niceness() == before
