"""A steady load: a thread that sends a plan's records, and knows which of them Kafka took."""

from __future__ import annotations

import asyncio
import threading
import time
from asyncio import Future
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from tests.faults.plan import Plan, Planned

#: Header with the number of a record.
NUMBER = "number"
_TICK_S = 0.02


class Load(threading.Thread):
    """Sends `plan` at `rate` records a second (which may be changed) until it is stopped.

    The producer is idempotent and waits for all in-sync replicas; what it acknowledged is
    accepted, and must never be lost.
    """

    def __init__(self, bootstrap: str, topic: str, plan: Plan, rate: float) -> None:
        super().__init__(name="load", daemon=True)
        self.rate = rate
        self.accepted: dict[int, Planned] = {}
        #: Sent, and not (yet) acknowledged.
        self.doubtful: dict[int, Planned] = {}
        self._servers = bootstrap
        self._topic = topic
        self._plan = plan
        self._enough = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._send())
        except BaseException as error:
            self.error = error
            raise

    async def _send(self) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._servers,
            acks="all",
            enable_idempotence=True,
            metadata_max_age_ms=2000,
        )
        await producer.start()
        try:
            number, due = 0, 0.0
            before = time.monotonic()
            while not self._enough.is_set():
                await asyncio.sleep(_TICK_S)
                now = time.monotonic()
                # What a broker that was away kept from being sent is not made up for.
                due = min(due + self.rate * (now - before), 2 * self.rate * _TICK_S + due % 1 + 50)
                before = now
                while due >= 1:
                    due -= 1
                    await self._send_one(producer, self._plan.at(number))
                    number += 1
            await producer.flush()
        finally:
            await producer.stop()

    async def _send_one(self, producer: AIOKafkaProducer, planned: Planned) -> None:
        self.doubtful[planned.number] = planned
        header = [(NUMBER, str(planned.number).encode())]
        try:
            sent = await producer.send(self._topic, planned.value, planned.key, headers=header)
        except KafkaError:
            return  # never left
        sent.add_done_callback(lambda done: self._acknowledged(planned, done))

    def _acknowledged(self, planned: Planned, done: Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.accepted[planned.number] = self.doubtful.pop(planned.number)

    def finish(self) -> None:
        """Send no more, and wait until what was sent is acknowledged."""
        self._enough.set()
        self.join(120)
        assert not self.is_alive(), "the load does not end"
        assert self.error is None, f"the load failed: {self.error!r}"
