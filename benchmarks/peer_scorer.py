"""The one scorer that all the other systems share, so that none is handicapped by how we wrote it.

It does what the worker does with a batch, without what makes the worker dependable: histories are
in memory only, nothing is deduplicated, a broken event ends the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from redis import Redis

from benchmarks.cases.common import CaseConfig
from worker.bundle import Bundle, open_bundle

TTL_S = 7 * 24 * 3600
#: Rows of one run that are tried, and for how long each (three times).
_ROWS = (8, 16, 32, 64, 128, 256)
_TRY_S = 0.05


class _Event(msgspec.Struct):
    user_id: str
    item_id: str


class _Recommendations(msgspec.Struct):
    user_id: str
    surface: str
    items: list[str]
    scores: list[float]
    model_version: str
    generated_at_ms: int


_DECODE = msgspec.json.Decoder(_Event).decode
_ENCODE = msgspec.json.Encoder().encode


def best_rows(bundle: Bundle, batch: int, count: int) -> int:
    """How many histories one run of the model should have, to be the fastest per history.

    A large run's intermediate results leave the processor's caches: half as many rows may take
    less than half of the time. Tried here, by processor time, so that nobody is held back by a size
    that suits another machine.
    """
    length, most = bundle.manifest.max_length, bundle.manifest.item_count
    rng = np.random.default_rng(0)
    found: list[tuple[float, int]] = []
    for rows in sorted({*_ROWS, batch}):
        history = rng.integers(1, most + 1, size=(rows, length))
        bundle.score(history, count)
        times = []
        for _ in range(3):
            started, runs = time.process_time(), 0
            while time.process_time() - started < _TRY_S:
                bundle.score(history, count)
                runs += 1
            times.append((time.process_time() - started) / (rows * runs))
        found.append((min(times), rows))
    return min(found)[1]


class PeerScorer:
    """Histories, model and ranking, by the batch."""

    def __init__(self, config: CaseConfig) -> None:
        self._bundle: Bundle = open_bundle(Path(config.bundle), warmup_batches=(1,))
        self._rows = best_rows(
            self._bundle,
            config.batch,
            min(self._bundle.manifest.most, config.top_k + self._bundle.manifest.max_length),
        )
        self._histories: dict[str, list[int]] = msgspec.msgpack.decode(
            Path(config.histories).read_bytes(), type=dict[str, list[int]]
        )
        self._top_k = config.top_k
        self._kept = config.history_length

    def score(self, values: Iterable[bytes]) -> list[tuple[str, bytes]]:
        """Take events in; Redis key and value of the list of each user that they are of.

        Each user is scored once, however many events of theirs there are.
        """
        index = self._bundle.index
        touched: dict[str, list[int]] = {}
        for value in values:
            event = _DECODE(value)
            history = self._histories.setdefault(event.user_id, [])
            item = index.get(event.item_id)
            if item is not None and (not history or history[-1] != item):
                history.append(item)
                if len(history) > self._kept:
                    del history[0]
            if history:
                touched[event.user_id] = history
        return list(self._recommend(touched)) if touched else []

    def _recommend(self, histories: dict[str, list[int]]) -> Iterator[tuple[str, bytes]]:
        manifest, names = self._bundle.manifest, self._bundle.items
        length = manifest.max_length
        tensor = np.zeros((len(histories), length), dtype=np.int64)
        for row, history in enumerate(histories.values()):
            known = history[-length:]
            tensor[row, length - len(known) :] = known
        count = min(manifest.most, self._top_k + max(map(len, histories.values())))
        runs = [
            self._bundle.score(tensor[start : start + self._rows], count)
            for start in range(0, len(tensor), self._rows)
        ]
        items = np.concatenate([items for items, _ in runs])
        scores = np.concatenate([scores for _, scores in runs])
        version, now_ms = manifest.reference, int(time.time() * 1000)
        for (user, history), own_items, own_scores in zip(
            histories.items(), items.tolist(), scores.tolist(), strict=True
        ):
            seen = set(history)
            best = [at for at, item in enumerate(own_items) if item not in seen][: self._top_k]
            made = _Recommendations(
                user,
                "posts",
                [names[own_items[at] - 1] for at in best],
                [own_scores[at] for at in best],
                version,
                now_ms,
            )
            yield f"rec:{{{user}}}:posts", _ENCODE(made)


def write(redis: Redis, lists: Iterable[tuple[str, bytes]]) -> None:
    """Set all `lists` in one round trip."""
    pipe = redis.pipeline(transaction=False)
    fill(pipe, lists)
    pipe.execute()


def fill(pipe: Any, lists: Iterable[tuple[str, bytes]]) -> None:
    """Put a SET of each list on a pipeline, of either kind of client."""
    for key, value in lists:
        pipe.set(key, value, ex=TTL_S)
