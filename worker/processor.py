"""One micro-batch, from records to lists in Redis; the only module that knows the order of steps.

    records -> decode -> histories -> score -> rank -> Redis

Everything here blocks and runs in one thread, beside the event loop: handing a batch from thread
to thread costs more than a step of a small batch does (docs/benchmarks.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from worker.arms import judged_as
from worker.cache import REDIS_FAILURES, Cache, PartitionKey, Refused, UserKey, encode
from worker.cold_items import ColdItems
from worker.events import (
    Decoder,
    Event,
    EventBatch,
    Reason,
    Records,
    Rejected,
    Surface,
    Tombstone,
)
from worker.forget import erased, keys_of
from worker.histories import Histories
from worker.history import History
from worker.lists import ListMaker
from worker.logs import hashed_user, place_of
from worker.metrics import Metrics
from worker.models import Models, Serving
from worker.popularity import PopularityTable, most_popular
from worker.ranking import Origin, Recommendations
from worker.retry import until_it_works_or_stops
from worker.rules import Rules
from worker.settings import Settings
from worker.text import MAX_TEXT_CHARS
from worker.trials import Trials

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Candidates of the fallback are found anew after this many seconds at most.
POPULAR_REFRESH_S = 1.0
#: Cold items of other workers are asked for again this far back: their clocks may be behind.
CLOCK_SKEW_S = 60.0


@dataclass(slots=True)
class Touched:
    """What a micro-batch did to one user on one surface."""

    history: History
    #: The newest event that was applied.
    event: Event


@dataclass(slots=True)
class Changes:
    """What events and tombstones did to what is kept of users."""

    #: By events, since the last tombstone.
    touched: dict[UserKey, Touched]
    #: By tombstones, and not touched after.
    emptied: set[UserKey]
    #: Those that erased anything, repeats included.
    tombstones: list[Tombstone]


@dataclass(slots=True)
class Made:
    """What a micro-batch made, and Redis has; to be published."""

    #: With their JSON.
    lists: list[tuple[Recommendations, bytes]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    #: Users who were erased, before any of `lists` was made.
    forgotten: list[Tombstone] = field(default_factory=list)
    #: Text by item of the cold items that were seen first in this batch.
    cold_items: dict[Surface, dict[str, str]] = field(default_factory=dict)


class Processor:
    """Turns records into recommendations. One per worker; `process` is for one thread."""

    def __init__(
        self, settings: Settings, *, cache: Cache, models: Models, rules: Rules, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._models = models
        self._metrics = metrics
        self._decoder = Decoder(
            max_bytes=settings.event_max_bytes,
            max_future_ms=int(settings.event_max_future_s * 1000),
            require_user_key=settings.require_user_key,
        )
        self._histories = Histories(
            self._read_users,
            lambda keys: self._redis(
                "delete_histories", lambda: self._cache.delete_histories(keys)
            ),
            length=settings.history_length,
            max_bytes=settings.history_cache_mb * 1e6,
            metrics=metrics,
        )
        self._popularity: dict[PartitionKey, PopularityTable] = {}
        self._popular: dict[Surface, tuple[float, list[tuple[str, float]]]] = {}
        self._cold = {
            surface: ColdItems(
                max_items=settings.cold_items_max, ttl_s=float(settings.cold_items_ttl_s)
            )
            for surface in Surface
        }
        self._lists = {
            surface: ListMaker(
                surface, rules, top_k=settings.top_k, cold=self._cold[surface], metrics=metrics
            )
            for surface in Surface
        }
        self._trials = Trials(
            lambda place: self._redis("read_tally", lambda: self._cache.read_tallies([place])[0]),
            metrics,
        )
        #: When cold items are read from Redis next, in `time.monotonic()`, and from when on.
        self._cold_read_at = 0.0
        self._cold_since_s = dict.fromkeys(self._cold, 0.0)
        self._stopping = threading.Event()
        #: Counts rebalances; `process` clears what it keeps of partitions after one.
        self._generation = 0
        self._cleared = 0

    def forget(self) -> None:
        """The partitions were taken away: another worker may change their users from now on.

        From any thread.
        """
        self._generation += 1

    def stop(self) -> None:
        """End a wait for Redis; from any thread."""
        self._stopping.set()

    def process(self, batches: Sequence[Records]) -> Made:
        """Take in records and write what follows from them to Redis, however long that takes.

        Repeating it changes nothing.

        Raises:
            StoppedError: `stop` was called while Redis was away.
        """
        generation = self._generation
        if self._cleared != generation:
            self._clear()
            self._cleared = generation
        self._share_cold_items()
        made = Made()
        with self._stage("decode"):
            now_ms = int(time.time() * 1000)
            decoded = [
                part
                for records in batches
                for part in self._decoder.decode(records, now_ms=now_ms).cut()
            ]
        self._metrics.batch_events.observe(sum(map(len, batches)))
        first_time = True
        while decoded:
            with self._stage("history"):
                changes = self._apply(decoded, made, first_time=first_time)
            lists: dict[UserKey, Recommendations] = {}
            for surface, users in _by_surface(changes.touched).items():
                lists |= self._recommend(surface, users)
            if generation != self._generation:
                # A rebalance came in between. The batch is read again by whoever owns it now.
                return Made()
            with self._stage("cache"):
                refused = self._write(changes, lists, made)
            # Another worker has been at these users. Once more, on top of what it wrote: events
            # that it has taken are repeats then.
            decoded = [_only(batch, refused) for batch in decoded] if refused else []
            first_time = False
        return made

    def _clear(self) -> None:
        self._histories.clear()
        self._popularity.clear()
        self._popular.clear()
        self._trials.clear()

    # -- events

    def _apply(self, decoded: Sequence[EventBatch], made: Made, *, first_time: bool) -> Changes:
        """Apply events to histories and popularity, and erase users.

        Args:
            decoded: each with its tombstones behind its events (`EventBatch.cut`).
        """
        keys = [
            [UserKey(event.user_id, event.surface) for event in batch.events] for batch in decoded
        ]
        histories = self._histories.load(
            chain(
                chain.from_iterable(keys),
                *(keys_of(one.user_id) for batch in decoded for one in batch.tombstones),
            )
        )
        touched: dict[UserKey, Touched] = {}
        emptied: set[UserKey] = set()
        tombstones: list[Tombstone] = []
        outcomes: Counter[tuple[Surface, str, str]] = Counter()
        # Taken once: a swap in between must not mix two trials.
        serving = {surface: self._models.serving(surface) for surface in Surface}
        for batch, own in zip(decoded, keys, strict=True):
            made.rejected += batch.rejected
            counted: dict[Surface, list[Event]] = {}
            for event, key in zip(batch.events, own, strict=True):
                history = histories[key]
                judging = self._trials.wants(event, history)
                try:
                    outcome: str = history.apply(event)
                except Exception as error:
                    # One event must never stop the stream.
                    log.error(
                        "event_failed surface=%s user=%s topic=%s partition=%d offset=%d error=%s",
                        event.surface.value, hashed_user(event.user_id), batch.records.topic,
                        batch.records.partition, event.offset, place_of(error),
                    )  # fmt: skip
                    outcome = "failed"
                    made.rejected.append(_failed(batch, event, error))
                else:
                    # A user's last event is written again where it is a repeat: its first effects
                    # may never have arrived. Those before it could only bring back an older list.
                    if outcome != "duplicate" or _is_last(event, history):
                        touched[key] = Touched(history, event)
                    counted.setdefault(event.surface, []).append(event)
                    if judging and outcome == "applied":
                        self._judge(serving[event.surface], event, history)
                    if event.text:
                        self._note_text(event, event.text, made)
                outcomes[event.surface, event.event_type, outcome] += 1
            for surface, events in counted.items():
                place = PartitionKey(surface, batch.records.topic, batch.records.partition)
                self._table(place).add(events)
            for tombstone in batch.tombstones:
                erased_keys = self._forget_user(tombstone, histories, touched)
                if erased_keys:
                    emptied.update(erased_keys)
                    tombstones.append(tombstone)
        if first_time:
            for labels, count in outcomes.items():
                self._metrics.events.labels(*labels).inc(count)
        return Changes(touched, emptied - touched.keys(), tombstones)

    def _forget_user(
        self,
        tombstone: Tombstone,
        histories: dict[UserKey, History],
        touched: dict[UserKey, Touched],
    ) -> list[UserKey]:
        """Erase a user from `histories` and `touched`; returns what was erased.

        A repeat that comes after later events of the user leaves them.
        """
        emptied = []
        anew = False
        for key in keys_of(tombstone.user_id):
            before = histories[key]
            after = erased(before, tombstone)
            if after is None:
                continue
            anew = anew or before.applied != after.applied
            histories[key] = after
            self._histories.put(key, after)
            touched.pop(key, None)
            emptied.append(key)
        if anew:
            self._metrics.forgotten_users.inc()
            log.info(
                "user_forgotten topic=%s partition=%d offset=%d",
                tombstone.topic, tombstone.partition, tombstone.offset,
            )  # fmt: skip
        return emptied

    def _table(self, place: PartitionKey) -> PopularityTable:
        table = self._popularity.get(place)
        if table is None:
            fresh = table = PopularityTable(
                half_life_ms=int(self._settings.popularity_half_life_s * 1000),
                max_items=self._settings.popularity_max_items,
            )
            self._redis("read_popularity", lambda: self._cache.read_popularity(place, fresh))
            self._popularity[place] = table
        return table

    def _judge(self, serving: Serving | None, event: Event, history: History) -> None:
        """Count whether what the user wanted was on the list served before."""
        self._trials.count(event, history)
        judged = None if serving is None else judged_as(serving, event.user_id, history)
        if serving is not None and judged is not None:
            self._trials.note(_place(event), event, history, serving.period, judged)

    # -- items that a model has not seen

    def _note_text(self, event: Event, text: str, made: Made) -> None:
        """Keep the text of an item that a serving model does not know."""
        serving = self._models.serving(event.surface)
        if serving is None or not any(
            bundle.text is not None and event.item_id not in bundle.index
            for bundle in serving.bundles.values()
        ):
            return
        if self._cold[event.surface].note(event.item_id, text, time.time()):
            made.cold_items.setdefault(event.surface, {})[event.item_id] = text[:MAX_TEXT_CHARS]

    def _share_cold_items(self) -> None:
        """Take in the cold items that other workers saw, and those from before a restart."""
        now = time.monotonic()
        if now < self._cold_read_at or not self._settings.cold_items_max:
            return
        self._cold_read_at = now + self._settings.cold_items_poll_s
        now_s = time.time()
        try:
            for surface, cold in self._cold.items():
                cold.expire(now_s)
                serving = self._models.serving(surface)
                if serving is None or all(
                    bundle.text is None for bundle in serving.bundles.values()
                ):
                    continue
                for found in self._cache.read_cold_items(surface, self._cold_since_s[surface]):
                    cold.note(*found)
                self._cold_since_s[surface] = now_s - CLOCK_SKEW_S
        except REDIS_FAILURES as error:
            self._metrics.redis_errors.labels("read_cold_items").inc()
            log.warning("cold_items_unread error=%r", error)

    # -- lists

    def _recommend(
        self, surface: Surface, users: dict[UserKey, Touched]
    ) -> dict[UserKey, Recommendations]:
        """Lists for `users`, all of one surface."""
        # Taken once: a swap in the middle must not mix two versions' item indexes.
        serving = self._models.serving(surface)
        listings, compared = self._lists[surface].make(
            serving,
            [key.user_id for key in users],
            [one.history for one in users.values()],
            lambda: self._most_popular(surface),
        )
        if serving is not None and compared is not None:
            place = _place(next(iter(users.values())).event)
            self._trials.compared(place, serving.period, compared)
        now_ms = int(time.time() * 1000)
        return {
            key: Recommendations(
                user_id=key.user_id,
                surface=surface,
                items=listing.items,
                scores=listing.scores,
                model_version=listing.version,
                source=listing.source,
                generated_at_ms=now_ms,
                origin=Origin(one.event.topic, one.event.partition, one.event.offset),
            )
            for (key, one), listing in zip(users.items(), listings, strict=True)
        }

    def _most_popular(self, surface: Surface) -> list[tuple[str, float]]:
        """Candidates of the fallback: enough to fill a list after the longest history."""
        known = self._popular.get(surface)
        now = time.monotonic()
        if known is None or now - known[0] > POPULAR_REFRESH_S:
            tables = [
                table.weights
                for place, table in self._popularity.items()
                if place.surface is surface
            ]
            count = self._settings.top_k + 2 * self._settings.history_length
            known = self._popular[surface] = (now, most_popular(tables, count))
        return known[1]

    # -- Redis

    def _write(
        self, changes: Changes, lists: dict[UserKey, Recommendations], made: Made
    ) -> set[UserKey]:
        """Write histories, lists, popularity and cold items, and remove what was erased; returns
        users of whom Redis has something newer, and who were not written."""
        encoded = {key: encode(one) for key, one in lists.items()}
        histories = self._histories.stored(changes.touched)
        forgotten = self._histories.stored(changes.emptied)
        popularity = {
            place: table.copy_changes()
            for place, table in self._popularity.items()
            if table.changed or table.removed
        }
        reached = {
            place: (table.offset, table.record_time_ms) for place, table in self._popularity.items()
        }
        tallies = self._trials.changes(reached)
        refused = self._redis(
            "write_batch",
            lambda: self._cache.write_batch(
                histories=histories,
                forgotten=forgotten,
                recommendations=encoded,
                popularity=popularity,
                cold_items=made.cold_items,
                tallies=tallies,
            ),
        )
        self._trials.written()
        self._drop(refused)
        self._histories.trim()
        users = set(refused.users)
        made.lists += [(one, encoded[key]) for key, one in lists.items() if key not in users]
        made.forgotten += [
            one
            for one in changes.tombstones
            if not users.issuperset(keys_of(one.user_id)) and one not in made.forgotten
        ]
        return users

    def _drop(self, refused: Refused) -> None:
        """Read again what another worker has changed."""
        counts = {
            "user": len(refused.users),
            "popularity": len(refused.popularity),
            "tally": len(refused.tallies),
        }
        for kind, count in counts.items():
            if count:
                self._metrics.stale_writes.labels(kind).inc(count)
                log.warning("stale_write kind=%s count=%d", kind, count)
        self._histories.drop(refused.users)
        for place in refused.popularity:
            del self._popularity[place]
        self._trials.drop(refused.tallies)

    def _read_users(self, keys: Sequence[UserKey]) -> list[tuple[bytes | None, bytes | None]]:
        return self._redis("read_users", lambda: self._cache.read_users(keys))

    def _redis(self, name: str, operation: Callable[[], T]) -> T:
        seconds = self._metrics.redis_seconds.labels(name)

        def timed() -> T:
            with seconds.time():
                return operation()

        return until_it_works_or_stops(
            timed,
            name=name,
            failures=REDIS_FAILURES,
            stopping=self._stopping,
            on_failure=self._metrics.redis_errors.labels(name).inc,
        )

    def _stage(self, name: str) -> AbstractContextManager[object]:
        return self._metrics.stage_seconds.labels(name).time()


def _by_surface(touched: dict[UserKey, Touched]) -> dict[Surface, dict[UserKey, Touched]]:
    grouped: dict[Surface, dict[UserKey, Touched]] = {}
    for key, one in touched.items():
        grouped.setdefault(key.surface, {})[key] = one
    return grouped


def _only(batch: EventBatch, users: set[UserKey]) -> EventBatch:
    """What a part of a batch holds for `users`."""
    names = {key.user_id for key in users}
    return EventBatch(
        batch.records,
        [one for one in batch.events if UserKey(one.user_id, one.surface) in users],
        [one for one in batch.tombstones if one.user_id in names],
    )


def _is_last(event: Event, history: History) -> bool:
    """Whether no later record of the event's partition is in the history."""
    last = history.last_applied(event.topic, event.partition)
    return last is None or last[0] <= event.offset


def _place(event: Event) -> PartitionKey:
    return PartitionKey(event.surface, event.topic, event.partition)


def _failed(batch: EventBatch, event: Event, error: Exception) -> Rejected:
    row = batch.records.offsets.index(event.offset)
    return Rejected(batch.records.at(row), Reason.PROCESSING_FAILED, repr(error))
