"""Cold items: known by their text, bounded, scored among the model's own, warm in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ITEMS
from tests.unit.serving import WritesAtOnce
from tests.unit.test_text import text_bundle
from worker.bundle import Bundle, open_bundle
from worker.cache import Refused
from worker.cold_items import ColdIndex, ColdItems
from worker.events import Records, Surface
from worker.metrics import Metrics
from worker.models import Serving
from worker.processor import Made, Processor
from worker.rules import Rules
from worker.scorer import Run, score
from worker.settings import load_settings
from worker.text import MAX_TEXT_CHARS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(text_bundle(tmp_path_factory.mktemp("registry") / "v1"))


def encode(cold: ColdItems, bundle: Bundle) -> None:
    texts = cold.without_vector(bundle)
    assert bundle.text is not None
    cold.add_vectors(bundle, list(texts), bundle.text.encode(list(texts.values())))


def found(cold: ColdItems, bundle: Bundle) -> tuple[str, ...]:
    """Items that have a vector of `bundle`."""
    index = cold.index(bundle)
    if index is None:
        return ()
    assert len(index.vectors) == len(index.items)
    return index.items


def test_an_item_needs_one_vector_and_keeps_its_first_text(bundle: Bundle) -> None:
    cold = ColdItems(max_items=10, ttl_s=60.0)
    assert cold.note("post", "first", 0.0)
    assert not cold.note("post", "second", 1.0)
    assert cold.without_vector(bundle) == {"post": "first"}
    encode(cold, bundle)
    assert cold.without_vector(bundle) == {}
    assert found(cold, bundle) == ("post",)


def test_a_text_is_kept_up_to_a_bound(bundle: Bundle) -> None:
    cold = ColdItems(max_items=10, ttl_s=60.0)
    cold.note("post", "x" * 10_000, 0.0)
    assert len(cold.without_vector(bundle)["post"]) == MAX_TEXT_CHARS


def test_items_go_when_their_time_is_over(bundle: Bundle) -> None:
    cold = ColdItems(max_items=10, ttl_s=60.0)
    cold.note("old", "a", 0.0)
    cold.note("new", "b", 30.0)
    encode(cold, bundle)
    cold.expire(61.0)
    assert found(cold, bundle) == ("new",)
    cold.expire(200.0)
    assert found(cold, bundle) == () and len(cold) == 0
    # It may come again, with a vector of its own.
    assert cold.note("old", "a", 201.0)


def test_each_version_has_vectors_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    cold = ColdItems(max_items=10, ttl_s=60.0)
    cold.note("post", "a", 0.0)
    cold.note("other", "b", 0.0)
    encode(cold, bundle)
    newer = replace(bundle, path=tmp_path / "v2", items=(*ITEMS[:-1], "post"))
    assert cold.without_vector(newer) == {"other": "b"}
    assert found(cold, newer) == ()
    encode(cold, newer)
    assert found(cold, newer) == ("other",)
    # Beside each other, as in a trial.
    assert found(cold, bundle) == ("post", "other")
    assert cold.without_vector(bundle) == {}
    cold.keep([newer])
    assert found(cold, newer) == ("other",)
    # Taken back, the old version does not know the post again.
    assert cold.without_vector(bundle) == {"post": "a", "other": "b"}


def test_vectors_of_items_that_went_meanwhile_are_dropped(bundle: Bundle) -> None:
    cold = ColdItems(max_items=10, ttl_s=60.0)
    cold.note("post", "a", 0.0)
    texts = cold.without_vector(bundle)
    cold.expire(100.0)
    cold.add_vectors(bundle, list(texts), np.zeros((1, 4), dtype=np.float32))
    assert found(cold, bundle) == ()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=120), st.integers(0, 20))
def test_there_are_never_more_than_the_bound(
    bundle: Bundle, notes: list[tuple[int, bool]], most: int
) -> None:
    cold = ColdItems(max_items=most, ttl_s=50.0)
    for now, (number, look) in enumerate(notes):
        cold.note(f"post-{number}", f"text {number}", float(now))
        if look:
            encode(cold, bundle)
            cold.expire(float(now))
        assert len(cold) <= most
    encode(cold, bundle)
    items = found(cold, bundle)
    assert len(items) == len(set(items)) == len(cold)


@pytest.mark.parametrize("count", [3, 12, len(ITEMS), 200])
def test_cold_items_stand_where_their_score_puts_them(bundle: Bundle, count: int) -> None:
    rng = np.random.default_rng(5)  # other vectors than the model's
    vectors = rng.normal(size=(25, 4)).astype(np.float32)
    cold = ColdIndex(tuple(f"cold-{n}" for n in range(25)), vectors)
    history = np.array([[0] * 7 + [3], [0] * 6 + [5, 9]])
    items, scores, states = bundle.score_with_states(history, len(ITEMS))
    merged, _ = score(bundle, Run(np.arange(2), history), count, cold)
    for row in range(2):
        everything = dict(zip((ITEMS[i - 1] for i in items[row]), scores[row], strict=True))
        everything |= dict(zip(cold.items, states[row] @ vectors.T, strict=True))
        expected = sorted(everything, key=lambda item: -everything[item])
        found = list(merged.of(row))
        wanted = len(everything) if count >= len(ITEMS) else count
        assert [item for item, _ in found] == expected[:wanted]
        assert all(abs(value - everything[item]) < 1e-4 for item, value in found)
    assert merged.complete == (count >= len(ITEMS))


class FakeCache(WritesAtOnce):
    """Histories nowhere; cold items in a list."""

    def __init__(self) -> None:
        self.stored: list[tuple[str, str, float]] = []
        self.written: list[dict[str, Any]] = []

    def write_batch(self, **effects: Any) -> Refused:
        self.written.append({name: dict(effect) for name, effect in effects.items()})
        return Refused()

    def read_users(self, keys: list[Any]) -> list[tuple[None, None]]:
        return [(None, None)] * len(keys)

    def read_tallies(self, keys: list[Any]) -> list[None]:
        return [None] * len(keys)

    def read_popularity(self, key: object, into: object) -> None:
        return None

    def read_cold_items(self, surface: Surface, since_s: float) -> list[tuple[str, str, float]]:
        return self.stored if surface is Surface.POSTS else []


def processor(bundle: Bundle, cache: FakeCache, **flags: Any) -> Processor:
    serving = Serving(Surface.POSTS, bundle)
    models = SimpleNamespace(serving=lambda surface: serving if surface is Surface.POSTS else None)
    return Processor(
        load_settings(require_user_key=False, top_k=45, **flags),
        cache=cast(Any, cache),
        models=cast(Any, models),
        rules=Rules(),
        metrics=Metrics(),
    )


def a_batch(*events: bytes, start: int = 0) -> Records:
    count = len(events)
    return Records(
        "events",
        0,
        list(range(start, start + count)),
        [b"ann"] * count,
        events,
        [1_764_000_000_000] * count,
    )


def event(item: str, text: str | None = None, user: str = "ann") -> bytes:
    said = f',"text":"{text}"' if text else ""
    return (
        f'{{"user_id":"{user}","item_id":"{item}","event_type":"view",'
        f'"timestamp":1764000000000,"surface":"posts"{said}}}'
    ).encode()


def items_for(made: Made, user: str) -> list[str]:
    return next(one.items for one, _ in made.lists if one.user_id == user)


def test_a_post_of_this_very_batch_can_be_recommended(bundle: Bundle) -> None:
    cache = FakeCache()
    ours = processor(bundle, cache)
    batch = a_batch(
        event("fresh", "a post about something", user="bob"), event(ITEMS[0]), event(ITEMS[1])
    )
    assert "fresh" in items_for(ours.process([batch]), "ann")
    assert cache.written[-1]["cold_items"] == {Surface.POSTS: {"fresh": "a post about something"}}
    # Its own reader has seen it; known items and repeats are not noted.
    again = a_batch(event("fresh", "a post"), event(ITEMS[2], "a known item"), start=3)
    assert "fresh" not in items_for(ours.process([again]), "ann")
    assert cache.written[-1]["cold_items"] == {}


def test_what_other_workers_saw_is_taken_in(bundle: Bundle) -> None:
    cache = FakeCache()
    cache.stored = [("theirs", "seen elsewhere", 4e9)]
    made = processor(bundle, cache).process([a_batch(event(ITEMS[0]))])
    assert "theirs" in items_for(made, "ann")
    assert cache.written[-1]["cold_items"] == {}


@pytest.mark.parametrize("off", ["no encoder", "by setting"])
def test_without_an_encoder_or_by_setting_texts_are_ignored(bundle: Bundle, off: str) -> None:
    served = replace(bundle, text=None) if off == "no encoder" else bundle
    flags = {"cold_items_max": 0} if off == "by setting" else {}
    cache = FakeCache()
    ours = processor(served, cache, **flags)
    made = ours.process([a_batch(event("fresh", "a post", user="bob"), event(ITEMS[0]))])
    assert "fresh" not in items_for(made, "ann")
    assert not cache.written[-1]["cold_items"]
