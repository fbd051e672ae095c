"""`streamrec recommend --explain` on a real Redis; what it says is true of a real model."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from models.dataset import index_interactions, leave_one_out, padded
from models.evaluate import bundle_score
from tests.conftest import ITEMS, tiny_bundle
from worker import explain as explaining
from worker.bundle import Bundle, open_bundle
from worker.cache import Cache, UserKey, encode
from worker.cli import main
from worker.events import Event, EventType, Surface
from worker.history import History
from worker.local.ml100k import load_ml100k
from worker.local.redis_server import RedisServer
from worker.local.wheels import DatasetError
from worker.ranking import Origin, Recommendations
from worker.scorer import model_inputs, score
from worker.settings import load_settings

ANN = UserKey("ann", Surface.POSTS)
SHIPPED = Path(__file__).parents[2] / "models" / "shipped"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    tiny_bundle(tmp_path / "registry" / "posts" / "v1", seed=1)
    return tmp_path / "registry"


def seen(*items: str) -> History:
    history = History(200)
    for number, item in enumerate(items):
        history.apply(
            Event(
                "ann", item, EventType.VIEW, Surface.POSTS, number, None, None, "events", 0, number,
                number,
            )
        )  # fmt: skip
    return history


def listed(registry: Path, history: History, **changes: Any) -> Recommendations:
    """What the worker makes of `history`."""
    bundle = open_bundle(registry / "posts" / "v1")
    candidates, _ = score(bundle, model_inputs([history], bundle).runs[0], 5)
    items, scores = zip(*candidates.of(0), strict=True)
    fields: dict[str, Any] = {
        "user_id": "ann",
        "surface": Surface.POSTS,
        "items": list(items),
        "scores": list(scores),
        "model_version": "posts@v1",
        "source": "model",
        "generated_at_ms": 1_764_000_000_000,
        "origin": Origin("events", 0, len(history.items) - 1),
    }
    return Recommendations(**fields | changes)


def store(redis: RedisServer, history: bytes | None, recommendations: Recommendations) -> None:
    async def write() -> None:
        cache = Cache.from_settings(load_settings(redis=redis.url))
        cache.write_batch(
            histories={ANN: b"" if history is None else history},
            recommendations={ANN: encode(recommendations)},
            popularity={},
        )
        if history is None:
            cache.delete_histories([ANN])
        cache.close()

    asyncio.run(write())


def recommend(redis: RedisServer, registry: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["recommend", "ann", "--redis", redis.url, "--registry", str(registry), *arguments]
    )


def explained(redis: RedisServer, registry: Path) -> dict[str, Any]:
    result = recommend(redis, registry, "--explain")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout)["explanations"])


def test_each_score_is_the_one_that_was_served(redis_server: RedisServer, registry: Path) -> None:
    history = seen(*ITEMS[:6])
    made = listed(registry, history)
    store(redis_server, history.to_bytes(), made)
    found = explained(redis_server, registry)
    assert (found["note"], found["history_changed"], found["history_items"]) == (None, False, 6)
    assert [one["item"] for one in found["items"]] == made.items
    for one, score_served in zip(found["items"], made.scores, strict=True):
        assert one["score"] == pytest.approx(score_served, abs=1e-4)
        assert 1 <= len(one["raised"]) <= 3 and len(one["lowered"]) <= 1
        assert {named["item"] for named in one["raised"]} <= set(ITEMS[:6])


def test_json_stays_as_it_was_without_the_flag(redis_server: RedisServer, registry: Path) -> None:
    history = seen(*ITEMS[:3])
    store(redis_server, history.to_bytes(), listed(registry, history))
    plain = json.loads(recommend(redis_server, registry).stdout)
    assert set(plain) == set(Recommendations.__struct_fields__)
    with_reasons = json.loads(recommend(redis_server, registry, "--explain").stdout)
    assert {**plain, "explanations": with_reasons["explanations"]} == with_reasons


def test_text_names_the_history_items(redis_server: RedisServer, registry: Path) -> None:
    history = seen(*ITEMS[:3])
    store(redis_server, history.to_bytes(), listed(registry, history))
    result = recommend(redis_server, registry, "--explain", "--text")
    assert result.exit_code == 0
    assert result.stdout.startswith("user ann on posts: 5 items by posts@v1")
    assert result.stdout.count("raised   item-") == 5


def test_a_history_that_moved_on_is_said_and_scored_anew(
    redis_server: RedisServer, registry: Path
) -> None:
    made = listed(registry, seen(*ITEMS[:3]))
    store(redis_server, seen(*ITEMS[:4]).to_bytes(), made)
    found = explained(redis_server, registry)
    assert found["history_changed"] is True
    assert "changed since the list was made" in found["note"]
    assert found["history_items"] == 4
    assert found["items"][0]["score"] != pytest.approx(made.scores[0], abs=1e-3)
    assert "(now " in recommend(redis_server, registry, "--explain", "--text").stdout


def test_a_list_by_popularity_is_explained_in_a_sentence(
    redis_server: RedisServer, registry: Path
) -> None:
    history = seen(*ITEMS[:3])
    fallback = listed(registry, history, source="fallback", model_version="popularity")
    store(redis_server, history.to_bytes(), fallback)
    found = explained(redis_server, registry)
    assert found["note"].startswith("by popularity") and not found["items"]


@pytest.mark.parametrize(
    ("history", "note"), [(None, "holds no history"), (b"\x00", "history in Redis is damaged")]
)
def test_without_a_history_the_list_is_shown_and_the_note_says_why(
    redis_server: RedisServer, registry: Path, history: bytes | None, note: str
) -> None:
    store(redis_server, history, listed(registry, seen(*ITEMS[:3])))
    found = explained(redis_server, registry)
    assert note in found["note"] and not found["items"]


def test_a_bundle_that_is_gone_is_named_with_what_to_do(
    redis_server: RedisServer, registry: Path
) -> None:
    history = seen(*ITEMS[:3])
    store(redis_server, history.to_bytes(), listed(registry, history))
    tiny_bundle(registry / "posts" / "v2")
    shutil.rmtree(registry / "posts" / "v1")
    result = recommend(redis_server, registry, "--explain")
    assert result.exit_code == 66
    assert "made by posts@v1" in result.stderr and "it has v2" in result.stderr
    assert "set STREAMREC_REGISTRY" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    # The list itself needs no bundle.
    assert recommend(redis_server, registry).exit_code == 0


def test_a_history_of_a_later_release_is_refused(redis_server: RedisServer, registry: Path) -> None:
    whole = seen("item-1").to_bytes()
    later = whole[:1] + b"\x09" + whole[2:]  # the format is the array's first number
    store(redis_server, later, listed(registry, seen(*ITEMS[:3])))
    result = recommend(redis_server, registry, "--explain")
    assert result.exit_code == 78 and "format 9" in result.stderr


# -- a real model


def shipped(precision: str) -> Bundle:
    return open_bundle(sorted((SHIPPED / "posts").glob(f"*-{precision}"))[-1])


@pytest.fixture(scope="module")
def real_histories() -> list[NDArray[np.int64]]:
    """100 users' histories of MovieLens 100K, in the shipped models' indexes."""
    try:
        source = load_ml100k()
    except DatasetError as error:
        pytest.skip(str(error))
    data = index_interactions(source.users.tolist(), source.items.tolist())
    assert data.item_ids == shipped("fp32").items
    _, _, test = leave_one_out(data)
    chosen = np.random.default_rng(0).choice(len(test), 100, replace=False)
    return [test.histories[number][-50:] for number in chosen]


def test_removing_the_top_influencer_costs_an_item_more_places_than_removing_any_other(
    real_histories: list[NDArray[np.int64]],
) -> None:
    bundle = shipped("int8")
    full = bundle_score(bundle)
    rng = np.random.default_rng(1)
    by_influence, by_chance = [], []
    for history in real_histories:
        whole = full(padded([history], 50))[0]
        whole[history - 1] = -np.inf
        best = int(whole.argmax()) + 1
        made = explaining.leave_one_out(bundle, history, np.array([best]))
        top = int(made.influence[:, 0].argmax())
        other = int(rng.choice(np.delete(np.arange(len(history)), top)))
        without = [np.delete(history, place) for place in (top, other)]
        scores = full(padded([history, *without], 50))
        ranks = (scores > scores[:, [best - 1]]).sum(axis=1)
        by_influence.append(int(ranks[1] - ranks[0]))
        by_chance.append(int(ranks[2] - ranks[0]))
    assert np.mean(by_influence) > 5 + 2 * np.mean(by_chance)
    assert np.mean(np.array(by_influence) >= np.array(by_chance)) > 0.8


def test_int8_serves_and_explains_much_as_fp32_does(
    real_histories: list[NDArray[np.int64]],
) -> None:
    from models.explanations import agreement

    found = agreement(shipped("fp32"), shipped("int8"), real_histories[:20])
    assert found.top1.low > 0.8
    assert found.rank_correlation.low > 0.9
