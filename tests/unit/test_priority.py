"""Which threads give way."""

import os
import sys
import threading
from collections.abc import Callable

import pytest

from worker.priority import LOADER_NICENESS, give_way

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has priorities of threads"
)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def policy() -> int:
    return os.sched_getscheduler(threading.get_native_id())


def of_a_loader(look: Callable[[], int]) -> list[int]:
    """What `look` says in a thread that gave way, and in one that this starts."""
    found = []

    def load() -> None:
        give_way()
        found.append(look())
        feed = threading.Thread(target=lambda: found.append(look()))
        feed.start()
        feed.join()

    loader = threading.Thread(target=load)
    loader.start()
    loader.join()
    return found


def test_a_thread_that_gives_way_and_those_it_starts_run_when_no_other_wants_to() -> None:
    before = policy()
    assert of_a_loader(policy) == [os.SCHED_IDLE] * 2
    assert policy() == before != os.SCHED_IDLE


def test_where_policies_are_not_allowed_it_is_nicer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    before = niceness()
    assert of_a_loader(niceness) == [min(19, before + LOADER_NICENESS)] * 2
    assert niceness() == before
