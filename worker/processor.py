"""One micro-batch, from records to lists in Redis; the only module that knows the order of steps.

    records -> decode -> histories -> score -> rank -> Redis

Everything here blocks and runs in one thread, beside the event loop: handing a batch from thread
to thread costs more than a step of a small batch does (docs/benchmarks.md).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from worker.arms import judged_as
from worker.cache import REDIS_FAILURES, Cache, Partition, PartitionKey, Refused, UserKey, encode
from worker.cold_items import ColdItems
from worker.early_write import EarlyWrite, RedisAwayError
from worker.events import (
    Decoder,
    Event,
    EventBatch,
    EventType,
    Reason,
    Records,
    Rejected,
    Surface,
    Tombstone,
)
from worker.forget import erased, keys_of
from worker.held import Held
from worker.histories import Histories
from worker.history import History
from worker.lists import Compared, ListMaker
from worker.logs import hashed_user, place_of
from worker.metrics import Metrics
from worker.models import Models, Serving
from worker.popularity import PopularityTable, most_popular
from worker.progress import Progress
from worker.ranking import Origin, Recommendations
from worker.retry import Outage
from worker.rules import Rules
from worker.session import MAX_RUN_ROWS
from worker.settings import Settings
from worker.shedding import Shedding
from worker.text import MAX_TEXT_CHARS
from worker.trials import Trials

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Candidates of the fallback are found anew after this many seconds at most.
POPULAR_REFRESH_S = 1.0
#: Users whose lists are made together: a run of the model, or half of a small micro-batch, but not
#: so few that the model would take longer for each.
MOST_AT_ONCE, FEWEST_AT_ONCE = MAX_RUN_ROWS, 16
#: Histories in one write of a repair.
REPAIR_BATCH = 512
#: Cold items of other workers are asked for again this far back: their clocks may be behind.
CLOCK_SKEW_S = 60.0


@dataclass(slots=True)
class Touched:
    """What a micro-batch did to one user on one surface."""

    history: History
    #: The newest event that was applied.
    event: Event
    #: Whether there is more than views, or the list before is gone.
    active: bool


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
    #: Whether Redis has all effects, those of earlier micro-batches included.
    durable: bool = True
    #: Offsets from which partitions must be read again, since Redis has lost what came of them.
    rewind: dict[Partition, int] = field(default_factory=dict)


class LostDataError(Exception):
    """Redis has lost what was written before; `found` are the positions that it has."""

    def __init__(self, found: dict[Partition, int]) -> None:
        super().__init__(f"Redis has lost data: {found}")
        self.found = found


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
        self._outage = Outage(metrics.degraded.labels("redis").set)
        self._shedding = Shedding(settings.shed_lag_s, metrics.degraded.labels("overload").set)
        self._held = Held()
        self._progress = Progress()
        #: Histories that are to be written before anything else, since Redis has lost them.
        self._unrepaired: list[UserKey] = []
        #: Counts rebalances; `process` clears what it keeps of partitions after one.
        self._generation = 0
        self._cleared = 0

    def forget(self) -> None:
        """The partitions were taken away: another worker may change their users from now on.

        From any thread.
        """
        self._generation += 1

    @property
    def waits_for_redis(self) -> bool:
        """Whether Redis was away when it was asked last; from any thread."""
        return self._outage.away

    @property
    def retry_in_s(self) -> float:
        """Seconds until Redis should be asked again, by `process`, with or without records."""
        return self._outage.due_in_s()

    def process(self, batches: Sequence[Records]) -> Made:
        """Take in records and write what follows from them to Redis.

        Where Redis does not take it, it is held back; each call tries again. Repeating it changes
        nothing.
        """
        generation = self._generation
        if self._cleared != generation:
            self._clear()
            self._cleared = generation
        self._share_cold_items()
        made = Made()
        with self._stage("decode"):
            now_ms = int(time.time() * 1000)
            parts = [
                part
                for records in batches
                for part in self._decoder.decode(records, now_ms=now_ms).cut()
            ]
        if batches:
            self._metrics.batch_events.observe(sum(map(len, batches)))
        made.rejected = [one for part in parts for one in part.rejected]
        self._progress.took(batches)
        oldest_ms = min((one.timestamps_ms[0] for one in batches), default=now_ms)
        # Without a record time (-1) nothing is known of its age.
        self._shedding.see((now_ms - oldest_ms) / 1000.0 if oldest_ms > 0 else 0.0)
        try:
            self._take(parts, made)
        except LostDataError as error:
            return Made(rewind=self._repair(error.found))
        if generation != self._generation:
            # A rebalance came in between. The batch is read again by whoever owns it now.
            return Made()
        made.durable = not self._held
        return made

    def _take(self, parts: Sequence[EventBatch], made: Made) -> None:
        """Apply `parts` and make lists; write what follows from them, and all that was held back,
        unless Redis is away.

        Raises:
            LostDataError: Redis has lost what was written before.
        """
        generation, held = self._generation, self._held
        first_time = True
        while True:
            with self._stage("history"):
                ready = self._ready(parts)
                changes = self._apply(ready, made, first_time=first_time)
            refused: set[UserKey] = set()
            with closing(self._head_start()) as early:
                lists = self._make_lists(self._wanting(changes.touched), early, generation)
                if generation != self._generation:
                    return
                encoded = {key: data for key, (_, data) in lists.items()}
                held.hold(ready, changes.touched, changes.emptied, encoded, made.cold_items)
                # With all that was parked, or not at all: what is written says how far all was
                # taken.
                if not held.parked:
                    sent_s, began = early.seconds, time.perf_counter()
                    with suppress(RedisAwayError):
                        refused, parts = self._write(early)
                    self._metrics.stage_seconds.labels("cache").observe(
                        sent_s + time.perf_counter() - began
                    )
            made.lists += [pair for key, pair in lists.items() if key not in refused]
            made.forgotten += [
                one
                for one in changes.tombstones
                if not refused.issuperset(keys_of(one.user_id)) and one not in made.forgotten
            ]
            if not refused:
                return
            # Another worker has been at these users. Once more, on top of what it wrote: events
            # that it has taken are repeats then.
            first_time = False

    def _wanting(self, touched: dict[UserKey, Touched]) -> dict[UserKey, Touched]:
        """Those for whom lists are made."""
        if not self._shedding.on:
            return touched
        for key, one in touched.items():
            if not one.active:
                self._metrics.lists_shed.labels(key.surface.value).inc()
        return {key: one for key, one in touched.items() if one.active}

    def _ready(self, parts: Sequence[EventBatch]) -> Sequence[EventBatch]:
        """What can be applied, that is, whose histories and popularity tables are in memory: all,
        with what was parked before, unless Redis is away. The rest is parked."""
        every = [*self._held.parked, *parts]
        try:
            self._load(every)
        except RedisAwayError:
            ready = self._park(parts)
        else:
            self._held.unpark()
            ready = every
        for part in every:
            counted: dict[Surface, list[Event]] = {}
            for event in part.events:
                counted.setdefault(event.surface, []).append(event)
            for surface, events in counted.items():
                table = self._popularity.get(_place_of(part, surface))
                if table is not None:
                    table.add(events)
        return ready

    def _park(self, parts: Sequence[EventBatch]) -> list[EventBatch]:
        return self._held.split(parts, self._histories.__contains__, self._popularity.__contains__)

    def _load(self, parts: Sequence[EventBatch]) -> None:
        self._histories.load(_keys(parts))
        for part in parts:
            for surface in {event.surface for event in part.events}:
                self._load_table(_place_of(part, surface))

    def _load_table(self, place: PartitionKey) -> None:
        if place in self._popularity:
            return
        table = PopularityTable(
            half_life_ms=int(self._settings.popularity_half_life_s * 1000),
            max_items=self._settings.popularity_max_items,
        )
        self._redis("read_popularity", lambda: self._cache.read_popularity(place, table))
        partition = place.topic, place.partition
        if table.offset >= 0 and not self._progress.written(partition):
            position = self._redis("read_position", lambda: self._cache.read_position(partition))
            if position is None:
                # Written by a release that kept no positions.
                log.info("position_adopted topic=%s partition=%d", *partition)
                self._progress.adopt({partition: 0})
        self._popularity[place] = table

    def _repair(self, found: Mapping[Partition, int]) -> dict[Partition, int]:
        """Redis has lost effects, as after a restart or a failover. What is in memory is written
        once more; returns the offsets from which to read partitions again for the rest."""
        for (topic, number), offset in found.items():
            log.error(
                "redis_lost_data topic=%s partition=%d stored_position=%d expected_position=%d;"
                " events are read again from there",
                topic, number, offset, self._progress.expected[topic, number],
            )  # fmt: skip
        self._metrics.redis_losses.inc(len(found))
        self._held.clear()
        self._trials.clear()
        # Counted again, on top of what Redis has.
        self._popularity.clear()
        self._unrepaired = self._histories.doubt()
        return self._progress.go_back(found)

    def _write_unrepaired(self) -> None:
        """Write the histories in memory after a loss: what Kafka keeps no longer is only there.

        Raises:
            RedisAwayError: some are still to be written.
        """
        while self._unrepaired:
            stored = self._histories.stored(self._unrepaired[:REPAIR_BATCH])
            self._redis(
                "repair",
                lambda stored=stored: self._cache.write_batch(  # type: ignore[misc]
                    histories=stored, recommendations={}, popularity={}
                ),
            )
            del self._unrepaired[:REPAIR_BATCH]

    def _clear(self) -> None:
        self._histories.clear()
        self._popularity.clear()
        self._unrepaired.clear()
        self._popular.clear()
        self._trials.clear()
        self._held.clear()
        self._progress.clear()

    # -- events

    def _apply(self, decoded: Sequence[EventBatch], made: Made, *, first_time: bool) -> Changes:
        """Apply events to histories, and erase users.

        Args:
            decoded: each with its tombstones behind its events (`EventBatch.cut`).
        """
        histories = self._histories.loaded(_keys(decoded))
        touched: dict[UserKey, Touched] = {}
        emptied: set[UserKey] = set()
        tombstones: list[Tombstone] = []
        outcomes: Counter[tuple[Surface, str, str]] = Counter()
        # Taken once: a swap in between must not mix two trials.
        serving = {surface: self._models.serving(surface) for surface in Surface}
        for batch in decoded:
            for event in batch.events:
                key = UserKey(event.user_id, event.surface)
                history = histories[key]
                judging = self._trials.wants(event, history)
                serves = serving[event.surface]
                item = None if serves is None else serves.stable.own(event.item_id)
                try:
                    outcome: str = history.apply(event, item)
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
                        before = touched.get(key)
                        active = (
                            event.event_type is not EventType.VIEW
                            or key in emptied
                            or (before is not None and before.active)
                        )
                        touched[key] = Touched(history, event, active)
                    if judging and outcome == "applied":
                        self._judge(serves, event, history)
                    if event.text:
                        self._note_text(event, event.text, made)
                outcomes[event.surface, event.event_type, outcome] += 1
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

    def _judge(self, serving: Serving | None, event: Event, history: History) -> None:
        """Count whether what the user wanted was on the list served before."""
        self._trials.count(event, history)
        judged = None if serving is None else judged_as(serving, event.user_id, history)
        if serving is not None and judged is not None:
            # Where the tally cannot be read, its figures go without this event.
            with suppress(RedisAwayError):
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
        if now < self._cold_read_at or not self._settings.cold_items_max or self._outage.away:
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

    def _make_lists(
        self, touched: dict[UserKey, Touched], early: EarlyWrite, generation: int
    ) -> dict[UserKey, tuple[Recommendations, bytes]]:
        """Lists for `touched`, with their JSON; each portion is sent as soon as it is made.

        A rebalance since `generation` ends it early.
        """
        lists: dict[UserKey, tuple[Recommendations, bytes]] = {}
        for surface, users in _by_surface(touched).items():
            compared: dict[int, Compared] = {}
            for some in _portions(users):
                made = self._recommend(surface, some, compared)
                if generation != self._generation:
                    return lists
                encoded = {key: encode(one) for key, one in made.items()}
                lists |= {key: (one, encoded[key]) for key, one in made.items()}
                if early.alive:
                    early.users(self._histories.stored(made), encoded)
            place = _place(next(iter(users.values())).event)
            for period, both in compared.items():
                with suppress(RedisAwayError):
                    self._trials.compared(place, period, both)
        return lists

    def _recommend(
        self,
        surface: Surface,
        users: dict[UserKey, Touched],
        compared: dict[int, Compared],
    ) -> dict[UserKey, Recommendations]:
        """Lists for `users`, all of one surface.

        Args:
            compared: how the versions of a trial did, by its period; these users are added.
        """
        # Taken once: a swap in the middle must not mix two versions' item indexes.
        serving = self._models.serving(surface)
        listings, both = self._lists[surface].make(
            serving,
            [key.user_id for key in users],
            [one.history for one in users.values()],
            lambda: self._most_popular(surface),
        )
        if serving is not None and both is not None:
            before = compared.get(serving.period)
            compared[serving.period] = both if before is None else before.with_(both)
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

    def _head_start(self) -> EarlyWrite:
        """Begin to write what is about to be made; what is held back goes first, if anything is."""
        if self._held or self._unrepaired or self._outage.away:
            return EarlyWrite(None, self._attempt)
        positions = self._progress.positions()
        return EarlyWrite(lambda: self._cache.begin(positions), self._attempt)

    def _write(self, early: EarlyWrite) -> tuple[set[UserKey], list[EventBatch]]:
        """Write what is held: histories, lists, popularity and cold items, and remove what was
        erased.

        Args:
            early: has written some of it already.

        Returns:
            Users of whom Redis has something newer, and who were not written; and their events.

        Raises:
            RedisAwayError: Redis does not take it.
            LostDataError: Redis has lost what was written before; nothing was written.
        """
        self._write_unrepaired()
        held = self._held
        forgotten = self._histories.stored(held.emptied)
        popularity = {
            place: table.copy_changes()
            for place, table in self._popularity.items()
            if table.changed or table.removed
        }
        reached = {
            place: (table.offset, table.record_time_ms) for place, table in self._popularity.items()
        }
        tallies = self._trials.changes(reached)

        rest: Any = {
            "forgotten": forgotten,
            "popularity": popularity,
            "cold_items": held.cold_items,
            "tallies": tallies,
        }
        try:
            refused = self._finish(early, rest)
            while refused.lost:
                self._accept(refused.lost)
                refused = self._finish(early, rest)
        except BaseException:
            for place, changes in popularity.items():
                self._popularity[place].put_back(changes)
            raise
        self._outage.over()
        self._progress.wrote()
        self._histories.trust()
        self._trials.written()
        self._drop(refused)
        self._histories.trim()
        users = set(refused.users)
        again = [_only(part, users) for part in held.taken] if users else []
        held.written()
        return users, again

    def _finish(self, early: EarlyWrite, rest: Mapping[str, Any]) -> Refused:
        """Write what is left, or all of it where the head start was given up."""
        held = self._held
        if early.alive:
            left = self._histories.stored([key for key in held.touched if key not in early.sent])
            try:
                return early.finish(left, held.lists, rest)
            finally:
                self._metrics.redis_seconds.labels("write_batch").observe(early.seconds)
        histories = self._histories.stored(held.touched)
        return self._redis(
            "write_batch",
            lambda: self._cache.write_batch(
                histories=histories,
                recommendations=held.lists,
                positions=self._progress.positions(),
                **rest,
            ),
        )

    def _accept(self, found: Mapping[Partition, int]) -> None:
        """Go on from the positions that Redis has, where that is right.

        Raises:
            LostDataError: it is not.
        """
        lost = {}
        for partition, offset in found.items():
            if self._settings.redis_repair:
                lost[partition] = offset
            else:
                self._metrics.redis_losses.inc()
                log.error(
                    "redis_lost_data topic=%s partition=%d stored_position=%d"
                    " expected_position=%d; STREAMREC_REDIS_REPAIR is off: nothing is done",
                    *partition, offset, self._progress.expected[partition],
                )  # fmt: skip
        if lost:
            raise LostDataError(lost)
        self._progress.adopt(found)

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
        """Run an operation of Redis, once, and note how long it takes.

        Raises:
            RedisAwayError: as `_attempt`.
        """

        def timed() -> T:
            with self._metrics.redis_seconds.labels(name).time():
                return operation()

        return self._attempt(name, timed)

    def _attempt(self, name: str, operation: Callable[[], T]) -> T:
        """Run an operation of Redis, or a part of one.

        Raises:
            RedisAwayError: it failed, or another has and it is too early to ask again.
        """
        if self._outage.due_in_s():
            raise RedisAwayError(name)
        try:
            return operation()
        except REDIS_FAILURES as error:
            self._metrics.redis_errors.labels(name).inc()
            self._outage.failed(name, error)
            raise RedisAwayError(name) from error

    def _stage(self, name: str) -> AbstractContextManager[object]:
        return self._metrics.stage_seconds.labels(name).time()


def _keys(parts: Iterable[EventBatch]) -> Iterator[UserKey]:
    for part in parts:
        for event in part.events:
            yield UserKey(event.user_id, event.surface)
        for tombstone in part.tombstones:
            yield from keys_of(tombstone.user_id)


def _place_of(part: EventBatch, surface: Surface) -> PartitionKey:
    return PartitionKey(surface, part.records.topic, part.records.partition)


def _by_surface(touched: dict[UserKey, Touched]) -> dict[Surface, dict[UserKey, Touched]]:
    grouped: dict[Surface, dict[UserKey, Touched]] = {}
    for key, one in touched.items():
        grouped.setdefault(key.surface, {})[key] = one
    return grouped


def _portions(users: dict[UserKey, Touched]) -> Iterator[dict[UserKey, Touched]]:
    """Users in portions whose lists are made together and then sent to Redis: at least two where
    there are enough users, so that Redis has something to do meanwhile. Those with histories of
    about one length go together, so that a model computes little padding."""
    ordered = sorted(users.items(), key=lambda one: len(one[1].history.items))
    size = min(MOST_AT_ONCE, max(FEWEST_AT_ONCE, (len(ordered) + 1) // 2))
    for start in range(0, len(ordered), size):
        yield dict(ordered[start : start + size])


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
