"""Code broken on purpose: each cell names a mutation that turns it red, or the matrix would prove
nothing. Applied inside a worker process by `injected.py`; `make faults ARGS=--mutations` runs every
cell with its own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tests.faults.injected import replace

#: Seconds after which those give up or drop who may not.
IMPATIENT_S = 1.0


@dataclass(frozen=True)
class Mutation:
    """A defect that somebody could have written."""

    what: str
    apply: Callable[[], None]


def _commit_at_start() -> None:
    def start(function: Any) -> Any:
        def run(batch: Any) -> bool:
            ours: bool = function(batch)
            if ours:
                batch.finish()
            return ours

        return run

    replace("worker.intake:RecordBatch.start", start)
    # Else the next worker finds that Redis lacks what was committed, and reads it again.
    _ignore_losses()


def _commit_position() -> None:
    def commit(function: Any) -> Any:
        async def run(thread: Any, offsets: Any) -> Any:
            consumer = thread._ensure_consumer()
            assigned = consumer.assignment()
            read = {tp: await consumer.position(tp) for tp in assigned}
            return await function(thread, {tp: read.get(tp, at) for tp, at in offsets.items()})

        return run

    replace("worker.intake:BatchConsumerThread._commit", commit)
    _ignore_losses()


def _forget_offsets() -> None:
    def advance(function: Any) -> Any:
        def run(history: Any, event: Any) -> bool:
            function(history, event)
            return True

        return run

    def add(function: Any) -> Any:
        def run(table: Any, events: Any) -> None:
            reached, table.offset = table.offset, -1
            function(table, events)
            table.offset = max(reached, table.offset)

        return run

    replace("worker.history:History._advance", advance)
    # A history shows a repeat only where a user's event before it is repeated too.
    replace("worker.popularity:PopularityTable.add", add)


def _forget_event_ids() -> None:
    replace("worker.history:History._note_id", lambda _: lambda history, event_id: True)


def _order_by_arrival() -> None:
    def insert(function: Any) -> Any:
        def run(history: Any, item: str, timestamp_ms: int) -> Any:
            newest = history.timestamps[-1] if history.timestamps else timestamp_ms
            return function(history, item, max(newest, timestamp_ms))

        return run

    replace("worker.history:History._insert", insert)


def _keep_cache() -> None:
    replace("worker.processor:Processor.forget", lambda _: lambda processor: None)


def _write_regardless() -> None:
    from worker import versions

    # Before any module takes them from there.
    versions.WRITE = versions.WRITE.replace(b"if not newer then return 0 end", b"")
    versions.WRITE_TABLE = versions.WRITE_TABLE.replace(b"    return 0\n", b"")


def _no_drain() -> None:
    async def wait_empty(consumer: Any) -> None:
        """Give partitions up at once, with what is in hand."""

    replace("worker.intake:BatchConsumer.wait_empty", lambda _: wait_empty)


def _drop_rejected() -> None:
    def publish(function: Any) -> Any:
        async def run(pipeline: Any, made: Any) -> None:
            for one in made:
                one.rejected.clear()
            await function(pipeline, made)

        return run

    replace("worker.pipeline:Pipeline._publish", publish)


def _give_up_publishing() -> None:
    def send(function: Any) -> Any:
        async def run(outbox: Any, records: Any) -> None:
            try:
                await asyncio.wait_for(function(outbox, records), IMPATIENT_S)
            except (TimeoutError, OSError):
                return

        return run

    replace("worker.outbox:Outbox.send", send)


def _no_backpressure() -> None:
    async def wait_for_room(consumer: Any, fetcher: Any) -> None:
        """There is always room."""

    replace("worker.intake:BatchConsumer._wait_for_room", lambda _: wait_for_room)


def _drop_when_behind() -> None:
    def process(function: Any) -> Any:
        def run(processor: Any, batches: Any) -> Any:
            oldest_ms = time.time() * 1000 - IMPATIENT_S * 1000
            return function(processor, [one for one in batches if one.timestamps_ms[0] > oldest_ms])

        return run

    replace("worker.processor:Processor.process", process)


def _wall_clock() -> None:
    import worker.app
    import worker.health
    import worker.intake

    walled = SimpleNamespace(time=time.time, monotonic=time.time)
    for module in (worker.app, worker.health, worker.intake):
        module.time = walled  # type: ignore[attr-defined]


def _failed_copy_is_fatal() -> None:
    def add(function: Any) -> Any:
        from worker.errors import StoreError

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except StoreError:
                os._exit(70)

        return run

    replace("worker.mirror:Mirror.add", add)


def _ignore_losses() -> None:
    def accept(_: Any) -> Any:
        def run(processor: Any, found: Any) -> None:
            processor._progress.adopt(found)

        return run

    replace("worker.processor:Processor._accept", accept)


def _redis_failure_is_fatal() -> None:
    def redis(_: Any) -> Any:
        def run(processor: Any, name: str, operation: Any) -> Any:
            return operation()

        return run

    replace("worker.processor:Processor._attempt", redis)


MUTATIONS = {
    "redis_failure_is_fatal": Mutation(
        "what Redis does not answer ends the worker", _redis_failure_is_fatal
    ),
    "commit_at_start": Mutation("a batch counts as finished before its effects", _commit_at_start),
    "commit_position": Mutation("what was read is committed", _commit_position),
    "forget_offsets": Mutation(
        "a history, or a sum, takes a record that it knows", _forget_offsets
    ),
    "forget_event_ids": Mutation("event ids are not remembered", _forget_event_ids),
    "order_by_arrival": Mutation("histories are in order of arrival", _order_by_arrival),
    "keep_cache": Mutation("histories in memory outlive a rebalance", _keep_cache),
    "write_regardless": Mutation("Redis takes a write whatever it holds", _write_regardless),
    "no_drain": Mutation("partitions are given up at once", _no_drain),
    "drop_rejected": Mutation("no dead letters", _drop_rejected),
    "give_up_publishing": Mutation(
        f"a publish is given up after {IMPATIENT_S:.0f} s", _give_up_publishing
    ),
    "ignore_losses": Mutation("Redis is not held to what it had", _ignore_losses),
    "no_backpressure": Mutation("reading never pauses", _no_backpressure),
    "drop_when_behind": Mutation(
        f"events older than {IMPATIENT_S:.0f} s are passed over", _drop_when_behind
    ),
    "wall_clock": Mutation("timers go by the wall clock", _wall_clock),
    "failed_copy_is_fatal": Mutation(
        "a version that cannot be copied ends the worker", _failed_copy_is_fatal
    ),
}
