"""A text becomes grams, a vector of the model's space, and a part of the bundle that is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.conftest import ITEMS, tiny_bundle, tiny_model
from worker.bundle import Bundle, open_bundle
from worker.bundle_checks import check_bundle
from worker.errors import BundleError
from worker.text import SCHEME, TextSpec, grams, padded_grams

pytest.importorskip("sklearn")

from models.events import Events
from models.text import Encoder, TextError, TextRecipe, fit, item_vectors
from models.text_bundle import make_text_bundle
from models.text_export import export_text, with_state

WIDTH = 4  # of tests.conftest.tiny_model
SPEC = TextSpec(SCHEME, buckets=64, max_grams=128)


def an_encoder(width: int = WIDTH, *, seed: int = 0) -> Encoder:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(SPEC.buckets + 1, width)).astype(np.float32)
    rows[0] = 0.0
    idf = rng.uniform(1.0, 5.0, SPEC.buckets + 1).astype(np.float32)
    idf[0] = 0.0
    return Encoder(SPEC, rows, idf, rng.normal(size=width).astype(np.float32), gain=1.3)


def text_bundle(directory: Path, **changes: object) -> Path:
    fields: dict[str, object] = {
        "model": model_with_state(),
        "text_model": export_text(an_encoder()),
        "text": SPEC,
    }
    return tiny_bundle(directory, **fields | changes)


def model_with_state(**options: int) -> bytes:
    """`tiny_model` computes a tensor `state` already; this makes it an output."""
    import onnx

    model = onnx.load_from_string(tiny_model(**options))
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, ["batch", "width"])
    )
    return bytes(model.SerializeToString())


def test_the_grams_of_a_word_are_those_that_the_docs_say() -> None:
    expected = [(b"abc", 1), (b"<ab", 3), (b"abc", 3), (b"bc>", 3)]
    expected += [(b"<abc", 3), (b"abc>", 3), (b"<abc>", 3)]
    numbers = [crc32(gram, kind) % (1 << 20) + 1 for gram, kind in expected]
    assert grams("Abc", buckets=1 << 20, limit=512) == numbers
    pair = crc32(b"abc de", 2) % (1 << 20) + 1
    assert pair in grams("abc, DE", buckets=1 << 20, limit=512)
    # Full-width letters are the same letters.
    assert grams("\uff21\uff22\uff23", buckets=1 << 20, limit=512) == numbers


@given(st.text(max_size=700), st.integers(1, 1 << 20), st.integers(1, 64))
def test_any_text_has_at_most_so_many_distinct_grams_all_in_range(
    text: str, buckets: int, limit: int
) -> None:
    found = grams(text, buckets=buckets, limit=limit)
    assert len(found) == len(set(found)) <= limit
    assert all(1 <= gram <= buckets for gram in found)
    assert found == grams(text, buckets=buckets, limit=limit)


def test_grams_are_padded_with_zeros_on_the_right() -> None:
    tensor = padded_grams(["", "a b", "a longer text"], SPEC)
    assert tensor.dtype == np.int64
    assert not tensor[0].any()
    assert tensor[1].astype(bool).tolist() == sorted(tensor[1].astype(bool), reverse=True)
    assert padded_grams([""], SPEC).shape == (1, 1)


def test_the_exported_encoder_says_what_the_fitted_one_says(tmp_path: Path) -> None:
    encoder = an_encoder()
    texts = ["", "Star Wars (1977)", "été", "a" * 600, "two words"]
    expected = encoder.encode(texts)
    assert np.allclose(expected[0], encoder.base)
    for int8, tolerance in ((False, 1e-4), (True, 0.05)):
        opened = open_bundle(
            text_bundle(tmp_path / f"int8-{int8}", text_model=export_text(encoder, int8=int8))
        )
        assert opened.text is not None
        found = opened.text.encode(texts)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < tolerance
        assert np.allclose(opened.text.encode(texts[1:2]), found[1:2], atol=1e-5)


def test_a_bundle_with_text_keeps_its_scores_and_gives_states(tmp_path: Path) -> None:
    plain = open_bundle(tiny_bundle(tmp_path / "v1"))
    bundle = open_bundle(text_bundle(tmp_path / "v2"))
    assert plain.text is None
    assert not check_bundle(bundle.path)
    history = np.array([[0] * 7 + [3], [0] * 6 + [5, 9]])
    items, scores, states = bundle.score_with_states(history, 5)
    assert (plain.score(history, 5)[0] == items).all()
    assert states.shape == (2, WIDTH)
    vectors = item_vectors(bundle, _histories(400))
    assert np.allclose(np.take_along_axis(states @ vectors.T, items - 1, 1), scores, atol=1e-3)


def _histories(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, len(ITEMS) + 1, (count, 8))


def nan_encoder() -> bytes:
    encoder = an_encoder()
    encoder.base[0] = np.nan
    return export_text(encoder)


def short_table() -> bytes:
    encoder = an_encoder()
    return export_text(Encoder(SPEC, encoder.rows[:-1], encoder.idf[:-1], encoder.base))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "belong together"),
        ({"text_model": None}, "belong together"),
        ({"text": TextSpec("other-hash", 64, 128)}, "reads 'other-hash'"),
        ({"model": tiny_model()}, "has no output 'state'"),
        ({"text_model": lambda: export_text(an_encoder(WIDTH + 1))}, "of one width"),
        ({"text_model": nan_encoder}, "not all finite"),
        ({"text_model": short_table}, "fails"),
        ({"text_model": b"not onnx"}, "does not load text.onnx"),
        ({"text_model": model_with_state}, "text.onnx has no input 'grams'"),
    ],
)
def test_a_text_encoder_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object | Callable[[], object]], message: str
) -> None:
    made = {name: value() if callable(value) else value for name, value in changes.items()}
    with pytest.raises(BundleError, match=message):
        text_bundle(tmp_path / "v1", **made)
    assert not list(tmp_path.iterdir())


def test_a_graph_without_a_state_gets_it_or_a_reason() -> None:
    from models.graph import Graph  # a graph of another kind

    assert with_state(model_with_state()) == model_with_state()
    with pytest.raises(TextError, match="add that output"):
        with_state(tiny_model())
    assert Graph().nodes == []


def clustered(items: int, width: int = 8) -> tuple[list[str], NDArray[np.float32]]:
    """Items whose vector is that of their topic, and texts that name the topic."""
    rng = np.random.default_rng(1)
    topics = ["football", "astronomy", "cooking", "jazz"]
    centres = rng.normal(size=(len(topics), width)) * 3.0
    topic = rng.integers(0, len(topics), items)
    texts = [f"{topics[t]} story {n}" for n, t in enumerate(topic)]
    return texts, (centres[topic] + rng.normal(size=(items, width)) * 0.3).astype(np.float32)


def test_a_new_text_lands_near_the_items_that_it_resembles() -> None:
    texts, vectors = clustered(200)
    found = fit(texts, vectors, np.full(200, 10), TextRecipe(buckets=2048, folds=4))
    assert found.r2 > 0.8
    football, unknown = found.encoder.encode(["more football", "zzz qqq xxx yyy vvv"])
    distance = np.linalg.norm(vectors - football, axis=1)
    nearest = [texts[at] for at in np.argsort(distance)[:20]]
    assert all(text.startswith("football") for text in nearest)
    # Padding beside a longer text changes nothing.
    assert np.allclose(found.encoder.encode(["more football"])[0], football, atol=1e-6)
    # What training never saw says little: near the mean of all.
    assert np.linalg.norm(unknown - found.encoder.base) < np.linalg.norm(
        football - found.encoder.base
    )


def test_frequent_items_count_for_more() -> None:
    texts = ["same words"] * 60
    vectors = np.zeros((60, 2), dtype=np.float32)
    vectors[:30, 0] = 1.0
    counts = np.array([100] * 30 + [1] * 30)
    found = fit(texts, vectors, counts, TextRecipe(buckets=256, folds=4))
    assert found.encoder.base[0] > 0.8


def test_too_few_items_are_said_to_be_too_few() -> None:
    with pytest.raises(TextError, match="at least 50 are needed"):
        fit(["a"] * 3, np.zeros((3, 2), dtype=np.float32), np.ones(3, dtype=np.int64), TextRecipe())


def test_scores_that_are_no_product_of_the_state_are_refused(tmp_path: Path) -> None:
    class Other:
        """As a bundle whose graph squares the scores at its end."""

        path = tmp_path
        manifest = open_bundle(text_bundle(tmp_path / "v1")).manifest
        inner: Bundle = open_bundle(tmp_path / "v1")

        def score_with_states(self, history: NDArray[np.int64], k: int) -> tuple[object, ...]:
            items, scores, states = self.inner.score_with_states(history, k)
            return items, np.square(scores), states

    with pytest.raises(TextError, match="R2 is"):
        item_vectors(Other(), _histories(400))  # type: ignore[arg-type]


TOPICS = ("football", "astronomy", "cooking", "jazz")
KNOWN, NEW = 80, 12


def a_world(directory: Path) -> tuple[Path, Events]:
    """A model whose items lie by topic, and events of users who keep to one topic.

    `new-...` items come up in the last fifth of time only; the model does not know them.
    """
    import onnx

    rng = np.random.default_rng(3)
    names = [f"item-{n}" for n in range(1, KNOWN + 1)]
    topic_of = {name: n % len(TOPICS) for n, name in enumerate(names)}
    topic_of |= {f"new-{n}": n % len(TOPICS) for n in range(NEW)}
    table = np.zeros((KNOWN + 1, WIDTH), dtype=np.float32)
    for n, name in enumerate(names, start=1):
        table[n, topic_of[name]] = 3.0
    table[1:] += rng.normal(size=(KNOWN, WIDTH)) * 0.5
    model = onnx.load_from_string(model_with_state(items=KNOWN))
    for weight in model.graph.initializer:
        if weight.name in ("table", "scorer"):
            value = table if weight.name == "table" else table[1:].T
            weight.CopyFrom(onnx.numpy_helper.from_array(value.copy(), weight.name))
    bundle = tiny_bundle(
        directory / "v1",
        model=model.SerializeToString(),
        items=names,
        golden_histories=None,
    )
    events, count = [], 6000
    for number in range(count):
        user = int(rng.integers(200))
        late = number >= 0.8 * count and rng.random() < 0.3
        choice = [
            item
            for item, topic in topic_of.items()
            if topic == user % len(TOPICS) and item.startswith("new") == late
        ]
        events.append((f"user-{user}", str(rng.choice(choice))))
    texts = {item: f"{TOPICS[topic]} {item}" for item, topic in topic_of.items()}
    users, items = (np.array(column) for column in zip(*events, strict=True))
    when = np.arange(count) + 1_700_000_000_000
    return bundle, Events(users, items, np.full(count, "view"), when, texts, "made up", "0" * 64)


def test_an_encoder_finds_new_items_at_a_bounded_price(tmp_path: Path) -> None:
    path, events = a_world(tmp_path)
    recipe = TextRecipe(buckets=1024, folds=5)
    made = make_text_bundle(path, events, recipe, train_share=0.8, max_warm_loss=0.1)
    assert made.path.name == "v1-text"
    assert made.items == KNOWN
    rows = {row.name: row for row in made.rows}
    ours, random = rows["text, int8"], rows["random vector"]
    assert ours.cold.queries > 100 < ours.warm.queries
    assert ours.among_cold.ndcg > 1.3 * random.among_cold.ndcg
    assert rows["mean item"].cold.hit_rate == 0.0
    assert ours.warm_loss < 0.2
    low, high = ours.cold_ndcg_interval
    assert low <= ours.cold.ndcg <= high
    bundle = open_bundle(made.path)
    assert bundle.manifest.parents == ["v1"]
    assert bundle.manifest.provenance["text_data"] == "made up"
    assert bundle.manifest.metrics["cold_ndcg@10"] == ours.cold.ndcg
    # Not again over it, and not after minutes of work.
    with pytest.raises(BundleError, match="never overwritten"):
        make_text_bundle(path, events, recipe, train_share=0.8, max_warm_loss=0.1)
    # A higher price buys more.
    (tmp_path / "other").mkdir()
    other, events = a_world(tmp_path / "other")
    dearer = make_text_bundle(other, events, recipe, train_share=0.8, max_warm_loss=0.6)
    assert dearer.gain > made.gain
    assert dearer.rows[-1].cold.ndcg >= ours.cold.ndcg


def test_events_that_the_model_knows_nothing_of_are_refused(tmp_path: Path) -> None:
    path, events = a_world(tmp_path)
    strange = Events(
        events.users, np.char.add("x-", events.items), events.types, events.timestamps_ms,
        {}, "strange", "0" * 64,
    )  # fmt: skip
    with pytest.raises(TextError, match="no event between"):
        make_text_bundle(path, strange, TextRecipe(), train_share=0.8, max_warm_loss=0.1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["v1"]
