"""Send real events to Kafka: MovieLens 100K in time order, as a social platform would send them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from worker.errors import BrokerError
from worker.events import EventType, Surface, UserEvent
from worker.kafka_security import kafka_client
from worker.local.ml100k import Ml100k, load_ml100k
from worker.refusals import kafka_refusal
from worker.settings import Settings

#: Events between two looks at the clock when a rate is set.
_STRIDE = 20
#: Sends that may wait for the broker at once.
_WINDOW = 2000

_ENCODE = msgspec.json.Encoder().encode


def ml100k_events(data: Ml100k) -> Iterator[UserEvent]:
    """Each rating as an event, in time order: 4 and 5 are likes, the rest views."""
    for number, (user, item, rating, timestamp) in enumerate(
        zip(
            data.users.tolist(),
            data.items.tolist(),
            data.ratings.tolist(),
            data.timestamps.tolist(),
            strict=True,
        )
    ):
        yield UserEvent(
            user_id=user,
            item_id=item,
            event_type=EventType.LIKE if rating >= 4 else EventType.VIEW,
            timestamp=timestamp * 1000,
            surface=Surface.POSTS,
            event_id=f"ml100k-{number}",
        )


@asynccontextmanager
async def event_producer(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    """A producer that waits for all replicas and never writes twice.

    Raises:
        BrokerError: Kafka does not answer.
    """
    producer = AIOKafkaProducer(
        **kafka_client(settings), acks="all", linger_ms=5, max_batch_size=128 * 1024
    )
    try:
        await producer.start()
    except KafkaError as error:
        await producer.stop()
        raise BrokerError(
            await kafka_refusal(settings, error)
            or f"Kafka at {settings.kafka} does not answer ({error}): start it, or set"
            " STREAMREC_KAFKA to where it is"
        ) from None
    try:
        yield producer
    finally:
        await producer.stop()


async def send_events(
    settings: Settings,
    events: Iterator[UserEvent],
    *,
    rate: float | None = None,
    on_sent: Callable[[int], object] = lambda count: None,
) -> int:
    """Send `events`, keyed by user; returns how many the broker acknowledged.

    Args:
        rate: events a second, spread evenly; as fast as the broker takes them where None.
        on_sent: called with each further number of events sent.
    """
    sent = 0
    started = time.monotonic()
    pending: set[asyncio.Future[Any]] = set()
    async with event_producer(settings) as producer:
        for event in events:
            if len(pending) >= _WINDOW:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    future.result()
            pending.add(
                await producer.send(
                    settings.events_topic, value=_ENCODE(event), key=event.user_id.encode()
                )
            )
            sent += 1
            if sent % _STRIDE == 0:
                on_sent(_STRIDE)
                if rate is not None:
                    await asyncio.sleep(max(0.0, started + sent / rate - time.monotonic()))
        on_sent(sent % _STRIDE)
        await asyncio.gather(*pending)
    return sent


async def replay_ml100k(
    settings: Settings, *, rate: float | None = None, limit: int | None = None
) -> int:
    """Send ML-100K (its first `limit` events) with a progress bar; returns how many."""
    from tqdm import tqdm  # noqa: PLC0415 - of the demo extra

    data = load_ml100k()
    events = list(ml100k_events(data))[:limit]
    with tqdm(total=len(events), unit=" events", desc="replaying") as progress:
        return await send_events(settings, iter(events), rate=rate, on_sent=progress.update)
