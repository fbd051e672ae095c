"""What a fetch brings at a bad moment is read again; how long it waits."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from faust.types import TP

from worker.commits import OffsetTracker
from worker.intake import BatchConsumer, BatchConsumerThread

PLACE = TP("events", 0)
#: Offsets of the log.
LOG = range(10)


class Consumer(BatchConsumer):
    """Faust's part of a consumer played: a log of one partition, and a position in it."""

    def __init__(self) -> None:
        self.tracker = OffsetTracker()
        self.end_offsets = {}
        self.progress_at = 0.0
        self._batches = {}
        self._changed = asyncio.Event()
        self._dropped = False
        self._read_at = 0.0
        self.fetches = 0
        self.wants_more = True
        self.log = SimpleNamespace(warning=lambda *_: None)
        self.flow_active = True
        self.can_resume_flow = asyncio.Event()
        self.position_ = 0
        self.handed_over: list[int] = []
        self.during_fetch: list[Callable[[], None]] = []
        self._rewinds = {}
        self._changed = asyncio.Event()
        self.failing_seeks = 0
        self.stopped = False
        demand = asyncio.Event()
        demand.set()
        self.transport = SimpleNamespace(
            max_in_flight_events=100,
            min_interval_s=0.0,
            demand=demand,
            batches=SimpleNamespace(put=self.take),
        )

    @property
    def should_stop(self) -> bool:
        return self.stopped

    async def take(self, batches: Any) -> None:
        self.fetches += 1
        for batch in batches:
            self.handed_over += batch.records.offsets
        if self.wants_more:
            self.transport.demand.set()

    def highwater(self, tp: TP) -> int:
        return len(LOG)

    async def wait(self, event: Any) -> None:
        await event.wait()

    async def perform_seek(self) -> None:
        await asyncio.sleep(0)
        if self.failing_seeks:
            self.failing_seeks -= 1
            raise RuntimeError("the group is rebalancing")
        self.position_ = 0  # nothing is committed

    async def seek_wait(self, partitions: Any) -> None:
        await self.perform_seek()
        self.position_ = partitions[PLACE]

    async def _wait_next_records(self, timeout: float) -> Any:
        found = [
            SimpleNamespace(offset=offset, key=b"u", value=b"{}", timestamp=0)
            for offset in LOG[self.position_ : self.position_ + 2]
        ]
        self.position_ += len(found)
        if self.during_fetch:
            self.during_fetch.pop(0)()
        if not found:
            self.stopped = True
        return {PLACE: found}, None

    def stop(self) -> None:
        self.flow_active = False
        # The rebalance is soon over; Faust has sought the committed offsets before the fetch.
        asyncio.get_running_loop().call_later(0.01, self.resume)

    def resume(self) -> None:
        self.flow_active = True
        self.can_resume_flow.set()


def run(consumer: Consumer) -> list[int]:
    async def drain() -> None:
        await asyncio.wait_for(
            consumer._drain_messages(SimpleNamespace(should_stop=False)), timeout=10
        )

    asyncio.run(drain())
    return consumer.handed_over


@pytest.mark.parametrize("failing_seeks", [0, 2])
def test_a_fetch_that_returns_before_records_may_flow_is_read_again(failing_seeks: int) -> None:
    consumer = Consumer()
    consumer.failing_seeks = failing_seeks
    consumer.during_fetch = [consumer.stop]
    assert run(consumer) == list(LOG)


def test_twice_in_a_row_as_well() -> None:
    consumer = Consumer()
    consumer.during_fetch = [consumer.stop, consumer.stop]
    assert run(consumer) == list(LOG)


def test_one_fetch_follows_each_demand() -> None:
    consumer = Consumer()
    consumer.wants_more = False

    async def drain() -> None:
        task = asyncio.create_task(consumer._drain_messages(SimpleNamespace(should_stop=False)))
        await asyncio.sleep(0.05)
        assert consumer.fetches == 1
        consumer.transport.demand.set()
        await asyncio.sleep(0.05)
        assert consumer.fetches == 2
        consumer.wants_more = True
        consumer.transport.demand.set()
        await asyncio.wait_for(task, timeout=10)

    asyncio.run(drain())
    assert consumer.handed_over == list(LOG)


def test_reading_goes_on_after_a_rebalance_took_back_what_was_to_answer_the_demand() -> None:
    consumer = Consumer()
    consumer.wants_more = False

    async def rebalance() -> None:
        task = asyncio.create_task(consumer._drain_messages(SimpleNamespace(should_stop=False)))
        await asyncio.sleep(0.05)
        # Faust has cleared the channel, so that nobody starts the batch or demands another.
        consumer._batches.clear()
        consumer.tracker.forget()
        consumer.position_ = 0
        consumer.wants_more = True
        await asyncio.wait_for(task, timeout=10)

    asyncio.run(rebalance())
    assert consumer.handed_over == [0, 1, *LOG]


@pytest.mark.parametrize("failing_seeks", [0, 2])
def test_a_partition_is_read_again_from_where_it_is_told(failing_seeks: int) -> None:
    """Told while a fetch is under way: what that brings is dropped, as is what is in flight."""
    consumer = Consumer()
    consumer.failing_seeks = failing_seeks
    consumer.during_fetch = [lambda: None, lambda: None, lambda: consumer.rewind({PLACE: 1})]
    assert run(consumer) == [0, 1, 2, 3, *LOG[1:]]
    # Committed from there on, and all of it may be.
    assert consumer.tracker.positions() == {PLACE: 1}
    assert consumer.tracker.in_flight == len(LOG) - 1
    for batch in list(consumer._batches[PLACE]):
        assert batch.start()
        batch.finish()
    assert consumer.tracker.committable() == {PLACE: len(LOG)}


def test_batches_from_before_it_was_told_to_go_back_are_not_worked_on_nor_finished() -> None:
    consumer = Consumer()
    before: list[Any] = []

    def go_back() -> None:
        before.extend(consumer._batches[PLACE])
        assert before[0].start()
        consumer.rewind({PLACE: 0})

    consumer.during_fetch = [lambda: None, go_back]
    assert run(consumer) == [0, 1, *LOG]
    for batch in before:
        batch.finish()
        assert not batch.start()
    assert consumer.tracker.committable() == {}


def test_fetches_keep_their_distance() -> None:
    consumer = Consumer()
    consumer.transport.min_interval_s = 0.05
    started = time.monotonic()
    run(consumer)
    assert time.monotonic() - started >= 0.05 * (consumer.fetches - 1)
    assert consumer.fetches > 2


class Paused:
    """The calls of aiokafka's consumer that a fetch makes, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def assignment(self) -> set[TP]:
        return {PLACE}

    def pause(self, *partitions: TP) -> None:
        self.calls.append("pause")

    def resume(self, *partitions: TP) -> None:
        self.calls.append("resume")


@pytest.mark.parametrize(("found", "calls"), [(1, ["resume", "pause"]), (0, ["resume"])])
def test_nothing_is_fetched_ahead_of_demand(
    monkeypatch: pytest.MonkeyPatch, found: int, calls: list[str]
) -> None:
    async def fetched(*_: Any) -> dict[TP, list[int]]:
        return {PLACE: [1]} if found else {}

    monkeypatch.setattr(AIOKafkaConsumerThread, "_fetch_records", fetched)
    consumer, thread = Paused(), BatchConsumerThread.__new__(BatchConsumerThread)
    asyncio.run(thread._fetch_records(consumer, {PLACE}, 1.0, 10))
    assert consumer.calls == calls


def test_a_fetch_waits_as_long_as_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    async def made() -> Any:
        consumer = AIOKafkaConsumer(fetch_max_wait_ms=1500)
        monkeypatch.setattr(AIOKafkaConsumerThread, "_create_worker_consumer", lambda *_: consumer)
        thread = BatchConsumerThread.__new__(BatchConsumerThread)
        return thread._create_worker_consumer(cast(Any, SimpleNamespace(fetch_wait_ms=7)))

    assert asyncio.run(made())._fetch_max_wait_ms == 7
