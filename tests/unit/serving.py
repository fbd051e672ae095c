"""A registry of tiny models, what a worker loads of it, and events, for tests of trials."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.conftest import ITEMS, tiny_bundle
from worker.bundle import Bundle, open_bundle
from worker.cache import Partition, Position, Refused, UserKey
from worker.events import Event, EventType, Surface
from worker.metrics import Metrics
from worker.models import Models, Serving
from worker.registry import LocalRegistry, Registry
from worker.settings import ModelChoice

POSTS = Surface.POSTS


class WritesAtOnce:
    """Gives a stand-in for `Cache` that has `write_batch` its `begin`."""

    def write_batch(self, **effects: Any) -> Refused:
        """Write all effects of a batch."""
        raise NotImplementedError

    def begin(self, positions: Mapping[Partition, Position]) -> _Gathered:
        """A write that gathers what it is given until it is finished."""
        return _Gathered(self, positions)


class _Gathered:
    def __init__(self, cache: WritesAtOnce, positions: Mapping[Partition, Position]) -> None:
        self._cache, self._positions = cache, positions
        self._histories: dict[UserKey, bytes] = {}
        self._lists: dict[UserKey, bytes] = {}

    def users(self, histories: Mapping[UserKey, bytes], lists: Mapping[UserKey, bytes]) -> None:
        self._histories |= histories
        self._lists |= {key: lists[key] for key in histories if key in lists}

    def finish(self, **rest: Any) -> Refused:
        return self._cache.write_batch(
            histories=self._histories,
            recommendations=self._lists,
            positions=self._positions,
            **rest,
        )

    def close(self) -> None:
        pass


#: Revisions of tests are small, so that every order of them can be written down.
AT = datetime(1970, 1, 1, tzinfo=UTC)
#: Versions of `registry`: two models of other lists, and one that knows none of `ITEMS`.
V1, V2, STRANGE = "v1", "v2", "v3-strange"
BROKEN = "v4-broken"


def registry(root: Path) -> LocalRegistry:
    """`V1`, `V2`, `STRANGE` and `BROKEN` of the model `posts`; nothing is promoted."""
    tiny_bundle(root / "posts" / V1, seed=1)
    tiny_bundle(root / "posts" / V2, seed=2)
    tiny_bundle(root / "posts" / STRANGE, items=tuple(f"other-{item}" for item in ITEMS))
    tiny_bundle(root / "posts" / BROKEN, seed=3)
    with (root / "posts" / BROKEN / "model.onnx").open("ab") as file:
        file.write(b"x")
    return LocalRegistry(root)


def opened(root: Path, version: str) -> Bundle:
    """One of its bundles."""
    return open_bundle(root / "posts" / version)


def models(
    registry: Registry,
    metrics: Metrics | None = None,
    *,
    pinned: str | None = None,
    choices: Mapping[Surface, ModelChoice] | None = None,
) -> Models:
    """What a worker with `registry` has, before it loads anything."""
    return Models(
        registry,
        choices or {POSTS: ModelChoice("posts", pinned)},
        inference_threads=1,
        warmup_batches=(1,),
        shadow_share=1.0,
        memory_budget_bytes=None,
        public_keys=(),
        metrics=metrics or Metrics(),
    )


def canary(stable: Bundle, rival: Bundle, *, share: float = 0.5, period: int = 7) -> Serving:
    """A trial of `rival` with `share` of the users."""
    return Serving(POSTS, stable, rival=rival, role="canary", share=share, period=period)


def shadow(stable: Bundle, rival: Bundle, *, share: float = 1.0, period: int = 7) -> Serving:
    """A trial of `rival` whose lists nobody is served."""
    return Serving(POSTS, stable, rival=rival, role="shadow", share=share, period=period)


_OFFSETS = itertools.count()


def event(user: str, item: str, kind: EventType = EventType.LIKE, **changes: object) -> Event:
    """An event on posts at the end of partition 0 of the topic `events`."""
    offset = next(_OFFSETS)
    fields: dict[str, object] = {
        "user_id": user, "item_id": item, "event_type": kind, "surface": POSTS,
        "timestamp_ms": 1_764_000_000_000 + offset, "event_id": None, "text": None,
        "topic": "events", "partition": 0, "offset": offset, "record_time_ms": 1_764_000_000_000,
    } | changes  # fmt: skip
    return Event(**fields)  # type: ignore[arg-type]


def samples(metrics: Metrics, name: str, **labels: str) -> dict[tuple[str, ...], float]:
    """Samples of a metric that have `labels`, by all their labels' values."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """Sum of such samples."""
    return sum(samples(metrics, name, **labels).values())
