"""Workers join, leave and die while events flow: nothing lost, order kept, repeats bounded."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.conftest import tiny_bundle
from tests.integration.support import World, event, eventually
from worker.history import History
from worker.local.kafka import KafkaBroker
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker

USERS = 60
#: Events a second while workers come and go.
RATE = 1_000
IN_FLIGHT = 1_024
COMMIT_S = 0.5


@pytest.fixture
def world(tmp_path: Path, broker: TansuBroker | KafkaBroker, redis_server: RedisServer) -> World:
    tiny_bundle(tmp_path / "registry" / "posts" / "v1")
    return World(
        tmp_path, broker, redis_server, tmp_path / "registry",
        max_in_flight_events=str(IN_FLIGHT), commit_interval_s=str(COMMIT_S), batch_max_events="64",
    )  # fmt: skip


def user_of(number: int) -> str:
    return f"user-{number % USERS}"


def item_of(number: int) -> str:
    return f"item-{number}"


class Sender(threading.Thread):
    """Sends events evenly until it is told to stop."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._enough = threading.Event()
        self.sent = 0

    def run(self) -> None:
        step = RATE // 5
        while not self._enough.is_set():
            began = time.monotonic()
            numbers = range(self.sent, self.sent + step)
            self._world.send(event(user_of(n), item_of(n), n) for n in numbers)
            self.sent += step
            time.sleep(max(0.0, step / RATE - (time.monotonic() - began)))

    def stop(self) -> int:
        """Send no more; returns how many were sent."""
        self._enough.set()
        self.join(60)
        return self.sent


@pytest.fixture
def sender(world: World) -> Iterator[Sender]:
    made = Sender(world)
    made.start()
    yield made
    made.stop()


def applied(worker: object, outcome: str) -> float:
    return worker.metric(  # type: ignore[attr-defined, no-any-return]
        f'streamrec_events_total{{event_type="view",outcome="{outcome}"'
    )


def check_nothing_lost_and_in_order(world: World, count: int) -> None:
    with Redis.from_url(world.redis.url) as client:
        for user in range(USERS):
            stored = client.get(f"hist:{{user-{user}}}:posts")
            assert isinstance(stored, bytes), f"user-{user} has no history"
            sent = [item_of(n) for n in range(count) if n % USERS == user]
            assert list(History.from_bytes(stored, 10_000).items) == sent[-200:]
    # What was published for a user follows the log, but for going back after a rebalance.
    backwards = 0
    reached: dict[str, int] = {}
    for record in world.read(world.recommendations):
        user = record.key.decode()
        offset = int(record.value.partition(b'"offset":')[2].partition(b"}")[0])
        backwards += offset < reached.get(user, -1)
        reached[user] = offset
    assert backwards <= USERS * 3
    last = {record.key.decode(): record.offset for record in world.read(world.events)}
    assert reached == last


def test_joining_and_leaving_loses_nothing_and_repeats_little(world: World, sender: Sender) -> None:
    with world.worker() as stays:
        eventually(lambda: applied(stays, "applied") > 500, "under way")
        with world.worker() as comes_and_goes:
            eventually(lambda: applied(comes_and_goes, "applied") > 300, "the second has events")
            repeats = applied(comes_and_goes, "duplicate")
        before = applied(stays, "applied")
        eventually(lambda: applied(stays, "applied") > before + 500, "the first has all again")
        count = sender.stop()
        eventually(lambda: sum(world.committed().values()) == count, "all is committed")
        repeats += applied(stays, "duplicate")
        # Both drain and commit before they give partitions up; a commit may fail under way.
        assert repeats <= IN_FLIGHT
    check_nothing_lost_and_in_order(world, count)


def test_a_kill_repeats_no_more_than_was_uncommitted(world: World, sender: Sender) -> None:
    with world.worker() as survivor:
        killed = world.worker()
        with killed:
            eventually(lambda: applied(killed, "applied") > 500, "the second has events")
            killed.process.kill()
            eventually(lambda: not killed.process.running, "it is dead")
        before = applied(survivor, "applied")
        eventually(lambda: applied(survivor, "applied") > before + 4_000, "it took over")
        count = sender.stop()
        eventually(lambda: sum(world.committed().values()) == count, "all is committed")
        # In flight when it died and when the survivor was asked to rejoin, and done since the last
        # commit.
        assert applied(survivor, "duplicate") <= 2 * IN_FLIGHT + 2 * COMMIT_S * RATE
    check_nothing_lost_and_in_order(world, count)
