"""Record batches out of Faust, and offsets back in.

Faust keeps what it does well: group membership, assignment, rebalance, the supervisor. What it
does per event (a Message, an Event, an acknowledgement each) limits a worker to 17.9 thousand
events a second and is where events get lost (docs/design.md, "Faust"). So this module subclasses
Faust's own pluggable classes, `Transport` and `Consumer`, and hands records over by the batch.

Contract:

- `BatchConsumer` puts what one fetch brought, a list of `RecordBatch`es, one per partition and in
  offset order, on the channel given to `BatchTransport`. Each batch begins a span in an
  `OffsetTracker`.
- The receiver calls `batch.start()` before it works on a batch, and drops the batch where that
  says False: its partition was taken away while the batch waited.
- The receiver calls `batch.finish()` once all effects of the batch are durable. Nothing else moves
  an offset: an exception, a cancelled task or a crash leaves the batch uncommitted.
- Offsets are committed for the contiguous finished prefix only, every `commit_interval_s`, before
  partitions are given up, and at a stop. A failed commit is retried; it never crashes the worker.
- At most `max_in_flight_events` events (and one fetch more) are unfinished; beyond that fetching
  stops until some are finished.
- One fetch follows each time that the receiver sets `demand`, that is when it has nothing to do;
  and one follows where nothing that was handed over is in flight.
  Meanwhile records gather at the broker, so that one fetch brings many. (Fetching on regardless, a
  loaded worker spends more time on fetches of a few records than on the records.) Two fetches are
  at least `min_interval_s` apart.
- On revocation, batches not yet started are dropped; started ones are waited for, at most
  `shutdown_timeout_s`. Whatever is unfinished then is read again by the next owner.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from faust.transport.drivers import aiokafka as driver
from faust.types import TP, AppT, ChannelT

from worker.commits import OffsetTracker, Span
from worker.events import Records
from worker.metrics import Metrics
from worker.outbox import BatchProducer

#: Seconds until a failed seek is tried again.
SEEK_AGAIN_S = 0.1


@dataclass(slots=True, eq=False)
class RecordBatch:
    """Records of one partition, in offset order."""

    partition: TP
    records: Records
    #: `time.monotonic()` when the records left the fetcher.
    read_at: float
    _span: Span
    _consumer: BatchConsumer = field(repr=False)
    _started: bool = False
    _abandoned: bool = False

    @property
    def oldest_s(self) -> float | None:
        """Unix time of its first record in Kafka; None where that has none."""
        timestamp_ms = self.records.timestamps_ms[0]
        return timestamp_ms / 1000.0 if timestamp_ms >= 0 else None

    def start(self) -> bool:
        """Whether the batch is still ours to work on."""
        self._started = not self._abandoned
        return self._started

    def finish(self) -> None:
        """All effects are durable: the offsets may be committed."""
        self._consumer.finish(self)


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread that talks to Kafka; a failed commit is reported, not fatal."""

    def _create_worker_consumer(self, transport: BatchTransport) -> Any:
        """Faust's consumer, whose fetches wait as long as is set: Faust says 1,500 ms, always."""
        consumer = super()._create_worker_consumer(transport)
        # Read once, when the consumer starts.
        assert consumer._fetch_max_wait_ms
        consumer._fetch_max_wait_ms = transport.fetch_wait_ms
        return consumer

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        consumer = self._ensure_consumer()
        assignment = self.assignment()
        wanted = {
            driver.ensure_aiokafka_TP(tp): driver.OffsetAndMetadata(offset, "")
            for tp, offset in offsets.items()
            if tp in assignment
        }
        if not wanted:
            return False
        try:
            await consumer.commit(wanted)
        except Exception as error:
            # Also when the group moved on: what is not committed is read again, never lost.
            self.log.warning("commit_failed error=%r; it is tried again", error)
            return False
        return True

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: set[TP],
        timeout: float | None = None,  # noqa: ASYNC109 - Faust's signature
        max_records: int | None = None,
    ) -> Any:
        """What one fetch brings.

        Partitions are paused in between, or aiokafka would fetch the first record that comes while
        a batch is worked on, and the next batch would be that record alone.
        """
        consumer.resume(*consumer.assignment())
        records = await super()._fetch_records(consumer, active_partitions, timeout, max_records)
        if records:
            consumer.pause(*consumer.assignment())
        return records


class BatchConsumer(driver.Consumer):
    """Faust's aiokafka consumer, by the batch."""

    transport: BatchTransport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tracker: OffsetTracker[TP] = OffsetTracker()
        #: Next offset that the broker would write, per partition, as last seen.
        self.end_offsets: dict[TP, int] = {}
        #: `time.monotonic()` of the last finished batch, assignment, or time with nothing to do.
        self.progress_at = time.monotonic()
        self._batches: dict[TP, list[RecordBatch]] = {}
        self._changed = asyncio.Event()
        #: Records were fetched and not handed over.
        self._dropped = False
        #: `time.monotonic()` of the last fetch that brought something.
        self._read_at = 0.0
        #: Where to go back to before anything else is read.
        self._rewinds: dict[TP, int] = {}

    def _new_consumer_thread(self) -> BatchConsumerThread:
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # -- reading

    async def _drain_messages(self, fetcher: Any) -> None:
        """Faust's fetcher service runs this: fetch, hand over, for as long as both live."""
        try:
            await self._fetch_and_hand_over(fetcher)
        except asyncio.CancelledError:
            # Faust takes this for a crash while a rebalance goes on, even where the app stops: the
            # process would end with a traceback and exit code 1.
            if not self.app.should_stop:
                raise

    async def _fetch_and_hand_over(self, fetcher: Any) -> None:
        while not (self.should_stop or fetcher.should_stop):
            await self._wait_for_room(fetcher)
            await self._wait_for_demand(fetcher)
            if self._dropped and not await self._go_back():
                continue
            if self._rewinds and not await self._seek_back():
                continue
            records, active = await self._wait_next_records(1.0)
            if not records or self.should_stop:
                await asyncio.sleep(0)
                continue
            if not self.flow_active:
                # A rebalance began, or is not over, while the fetch was under way.
                self._dropped = True
                continue
            self._read_at = time.monotonic()
            wanted = {
                TP(tp.topic, tp.partition): raw
                for tp, raw in records.items()
                if raw
                and (active is None or tp in active)
                # A fetch that was under way when it was told to go back.
                and TP(tp.topic, tp.partition) not in self._rewinds
            }
            if wanted:
                self.transport.demand.clear()
                # Never waits: the channel has room for all that may be in flight.
                await self.transport.batches.put(
                    [self._begin(tp, raw, self._read_at) for tp, raw in wanted.items()]
                )

    async def _go_back(self) -> bool:
        """Read again what was dropped, before anything else; False where that must wait.

        Faust goes to the committed offsets of an assignment some time before it lets records flow.
        A fetch that returns in between has moved its partitions on, so that what it brought would
        be skipped, and later committed past. Nothing of this assignment was handed over yet, since
        only the loop that calls this does; so the committed offsets are the place to go to.
        """
        if not self.flow_active:
            await self.wait(self.can_resume_flow)
        try:
            await self.perform_seek()
        except Exception as error:  # the group may have moved on again
            self.log.warning("seek_failed error=%r; it is tried again", error)
            await asyncio.sleep(SEEK_AGAIN_S)
            return False
        self._dropped = not self.flow_active
        return not self._dropped

    def rewind(self, offsets: Mapping[TP, int]) -> None:
        """Read partitions again from these offsets; what is in flight of them is dropped.

        From there on offsets are committed anew, so that a crash on the way repeats it.
        """
        for tp, offset in offsets.items():
            for batch in self._batches.pop(tp, ()):
                batch._abandoned = True
            self.tracker.rewind(tp)
            self._rewinds[tp] = offset
        self._changed.set()

    async def _seek_back(self) -> bool:
        """Go to where `rewind` said; False where that must be tried again."""
        offsets = dict(self._rewinds)
        try:
            await self.seek_wait(offsets)
        except Exception as error:  # the group may have moved on
            self.log.warning("seek_failed error=%r; it is tried again", error)
            await asyncio.sleep(SEEK_AGAIN_S)
            return False
        for tp, at in offsets.items():
            # It may have been told to go elsewhere meanwhile.
            if self._rewinds.get(tp) == at:
                del self._rewinds[tp]
        return True

    async def _wait_for_room(self, fetcher: Any) -> None:
        limit = self.transport.max_in_flight_events
        while self.tracker.in_flight >= limit and not (self.should_stop or fetcher.should_stop):
            self._changed.clear()
            await _set_within(self._changed, 1.0)

    async def _wait_for_demand(self, fetcher: Any) -> None:
        demand = self.transport.demand
        # A rebalance drops what is on the channel (Faust clears its queues): then the receiver
        # never sees what was to answer its demand, and does not ask again. Nothing is in flight.
        while self.tracker.in_flight and not (
            demand.is_set() or self.should_stop or fetcher.should_stop
        ):
            await _set_within(demand, 1.0)
        early_s = self._read_at + self.transport.min_interval_s - time.monotonic()
        if early_s > 0:
            await asyncio.sleep(early_s)

    def _begin(self, tp: TP, raw: Sequence[Any], read_at: float) -> RecordBatch:
        records = Records.of(tp.topic, tp.partition, raw)
        first, next_ = records.offsets[0], records.offsets[-1] + 1
        self.end_offsets[tp] = max(self.highwater(tp) or 0, next_)
        if not self.tracker.unfinished():
            # Idle until now: a stall is measured from here.
            self.progress_at = read_at
        batch = RecordBatch(
            tp, records, read_at, self.tracker.begin(tp, first, next_, len(records)), self
        )
        self._batches.setdefault(tp, []).append(batch)
        return batch

    # -- finishing and committing

    def finish(self, batch: RecordBatch) -> None:
        """Note that all effects of `batch` are durable."""
        if not self.tracker.finish(batch.partition, batch._span):
            return
        self._batches[batch.partition].remove(batch)
        self.progress_at = time.monotonic()
        self._changed.set()

    def oldest_unfinished_s(self, tp: TP) -> float | None:
        """Unix time, in Kafka, of the oldest event in flight; None where none is, or has none."""
        batches = self._batches.get(tp)
        return batches[0].oldest_s if batches else None

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        return (
            tp
            for tp in self.tracker.committable()
            if topics is None or tp in topics or tp.topic in topics
        )

    async def _commit_tps(self, tps: Iterable[TP], start_new_transaction: bool) -> bool:
        committable = self.tracker.committable()
        offsets = {tp: committable[tp] for tp in tps if tp in committable}
        if not offsets:
            return False
        committed: bool = await self._commit(offsets)
        if committed:
            self.tracker.committed(offsets)
            self.app.monitor.on_tp_commit(offsets)
        self.transport.metrics.commits.labels("ok" if committed else "failed").inc()
        return committed

    async def wait_empty(self) -> None:
        """Wait, a bounded time, for started batches; then commit. Others are dropped."""
        for batches in self._batches.values():
            for batch in batches:
                batch._abandoned = not batch._started
        deadline = time.monotonic() + self.transport.shutdown_timeout_s
        while any(b._started for batches in self._batches.values() for b in batches):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                self.log.warning(
                    "drain_timed_out unfinished_events=%d; they are read again",
                    self.tracker.in_flight,
                )
                break
            self._changed.clear()
            await _set_within(self._changed, min(remaining, 1.0))
        await self.commit_and_end_transactions()

    # -- rebalance

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Drain and commit (in the parent, through `wait_empty`), then forget everything."""
        await super().on_partitions_revoked(revoked)
        for batches in self._batches.values():
            for batch in batches:
                batch._abandoned = True
        self._batches.clear()
        self.tracker.forget()
        self.end_offsets.clear()
        self._rewinds.clear()
        self._changed.set()
        self.transport.on_change(None)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Start afresh from the committed offsets of `assigned`."""
        self.progress_at = time.monotonic()
        self.transport.on_change(frozenset(assigned))
        await super().on_partitions_assigned(assigned, generation_id)
        self.progress_at = time.monotonic()

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's stall messages rest on per-event bookkeeping; worker/health.py watches here."""


class BatchTransport(driver.Transport):
    """Faust's aiokafka transport with `BatchConsumer`.

    Args:
        batches: channel that fetches are put on; it must have room for as many as there may be
            events in flight, and one fetch more.
        demand: set by the receiver when it wants records, cleared when it gets some.
        min_interval_s: shortest time from one fetch that brought something to the next.
        fetch_wait_ms: longest that the broker holds a fetch that finds nothing.
        max_in_flight_events: events handed over and unfinished, beyond which fetching stops.
        shutdown_timeout_s: longest wait for started batches when partitions are given up.
        on_change: called with the assigned partitions, and with None when they are revoked.
    """

    Consumer: ClassVar[Any] = BatchConsumer
    Producer: ClassVar[Any] = BatchProducer

    def __init__(
        self,
        url: Any,
        app: AppT,
        *,
        batches: ChannelT,
        demand: asyncio.Event,
        min_interval_s: float,
        fetch_wait_ms: int,
        max_in_flight_events: int,
        shutdown_timeout_s: float,
        metrics: Metrics,
        on_change: Callable[[frozenset[TP] | None], None],
    ) -> None:
        super().__init__(url, app)
        self.batches = batches
        self.demand = demand
        self.min_interval_s = min_interval_s
        self.fetch_wait_ms = fetch_wait_ms
        self.max_in_flight_events = max_in_flight_events
        self.shutdown_timeout_s = shutdown_timeout_s
        self.metrics = metrics
        self.on_change = on_change


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for `event`, but no longer than this."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


def batch_consumer(app: AppT) -> BatchConsumer:
    """The consumer of an app whose transport is a `BatchTransport`."""
    return cast(BatchConsumer, app.consumer)
