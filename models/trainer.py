"""From events to a float32 bundle with its accuracy, beside baselines and published figures.

One path for every surface: posts and ads (what does this user want next?) and friends (whom will
they follow next?), whose items are users.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import friends, lrurec, sasrec
from models.baselines import (
    EASE_MOST_ITEMS,
    ease,
    item_knn,
    popularity_score,
    sequential_rules,
)
from models.dataset import (
    Interactions,
    Queries,
    Split,
    before_test,
    index_by,
    index_interactions,
    padded,
    sample,
    split,
)
from models.evaluate import Accuracy, Score, accuracy, ranks
from models.events import Events, at_least, merged
from models.export import export
from models.family import Params, Shape, param_score
from models.provenance import provenance
from models.report.published import published
from models.train import Recipe, fit
from worker.bundle import write_bundle
from worker.errors import StreamrecError
from worker.events import Surface

FAMILIES = ("sasrec", "lrurec")
#: Items of a user's history that the linear baselines look at.
_BASELINE_HISTORY = 200


class TrainingError(StreamrecError):
    """There is nothing to train on, or an option makes no sense."""

    exit_code = 65


@dataclass(frozen=True)
class Options:
    """What to train, and how to judge it."""

    split: str = "time"
    #: Rarer items are left out: nothing can be learned of them.
    minimum_item_events: int = 1
    #: Items of a history that the model reads.
    length: int = 50
    width: int = 64
    blocks: int = 2
    #: Kind of model, of `FAMILIES`.
    family: str = "sasrec"
    #: Attention heads of a SASRec's block.
    heads: int = 2
    #: Complex numbers of the state that a block of an LRURec keeps.
    channels: int = 64
    #: Train again, on validation events too, for as many epochs as were best.
    refit: bool = False
    baselines: bool = True
    #: Validation and test queries at most, drawn at random.
    queries: int = 20_000
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class Trained:
    """A bundle, and how it compares: rows of `model`, `hr@10`, `ndcg@10` and a `source`."""

    path: Path
    rows: list[dict[str, Any]]
    epochs: int
    seconds: float
    queries: int


def prepare(
    events: Events, options: Options, surface: str, item_ids: Sequence[str] | None = None
) -> tuple[Interactions, Split]:
    """Number items (as `item_ids` does, where given) and divide events.

    On the surface friends, nobody is a candidate for themselves.

    Raises:
        TrainingError: no user has two events, or the split is none.
    """
    events = merged(events)
    if item_ids is None:
        kept = at_least(events, options.minimum_item_events)
        data = index_interactions(kept.users.tolist(), kept.items.tolist())
    else:
        data = index_by(events.users.tolist(), events.items.tolist(), item_ids)
    try:
        parts = split(data, options.split, limit=options.queries) if len(data.users) else None
    except ValueError as error:
        raise TrainingError(str(error)) from None
    if parts is None or not any(len(sequence) >= 2 for sequence in parts.train):
        raise TrainingError(
            f"{events.name} holds no user with two events on known items to train on: check the"
            " surface, the minimum of events per item, and that items are those of the bundle"
        )
    if surface == Surface.FRIENDS:
        parts = friends.without_self(parts, friends.own_items(events, data))
    return data, parts


def train(
    events: Events,
    options: Options,
    *,
    registry: Path,
    name: str,
    surface: str,
    version: str | None = None,
    work: Path | None = None,
) -> Trained:
    """Train, write `<registry>/<name>/<version>/`, and judge it on the test queries.

    Args:
        version: the time of day and `-fp32` where none is given.
        work: directory for checkpoints; a run that was broken off goes on from there.

    Raises:
        TrainingError: the events do not suffice.
        BundleError: the version exists.
    """
    started = time.monotonic()
    shape = _shape(options)
    on_friends = surface == Surface.FRIENDS
    ids = friends.catalogue(events, options.minimum_item_events) if on_friends else None
    data, parts = prepare(events, options, surface, ids)
    own = friends.own_items(events, data) if on_friends else None
    shape = replace(shape, item_count=data.item_count)
    lessons, start = _lessons(data, parts.train, own, shape, options.recipe.seed)
    fitted = fit(
        lessons, shape, options.recipe, validation=parts.validation, start=start,
        checkpoint=work / "train.npz" if work is not None else None,
    )  # fmt: skip
    params = fitted.params
    if options.refit:
        lessons, start = _lessons(
            data, before_test(data, options.split), own, shape, options.recipe.seed
        )
        params = fit(
            lessons, shape, replace(options.recipe, epochs=fitted.epochs), validation=None,
            start=start,
            checkpoint=work / "refit.npz" if work is not None else None, label="training again",
        ).params  # fmt: skip
    rows = (
        _baseline_rows(data, parts, own, options) if options.baselines and len(parts.test) else []
    )
    model = export(params, shape)
    stamp = datetime.now(UTC)
    path = registry / name / (version or f"{stamp:%Y%m%dT%H%M%SZ}-fp32")
    measured = _accuracy(params, shape, parts.test)
    write_bundle(
        path,
        model=model,
        items=data.item_ids,
        golden_histories=_golden(parts, shape.length),
        golden_k=min(10, data.item_count),
        name=name,
        version=path.name,
        surface=surface,
        created_at=stamp.isoformat(timespec="seconds"),
        precision="fp32",
        recipe=f"{shape.describe()}, cross-entropy over"
        f" {options.recipe.negatives or 'all'} items, {fitted.epochs} epochs",
        max_length=shape.length,
        any_length=True,
        metrics=measured.as_metrics() if measured is not None else {},
        provenance=provenance(
            events.name,
            events.sha256,
            split=options.split,
            minimum_item_events=str(options.minimum_item_events),
            refit=str(options.refit).lower(),
            seed=str(options.recipe.seed),
            test_queries=str(len(parts.test)),
        ),
    )
    if measured is not None:
        rows.append(
            {"model": f"{shape.title}, this bundle", **measured.as_metrics(), "source": "measured"}
        )
        rows += published(events.name, options.split)
    return Trained(path, rows, fitted.epochs, round(time.monotonic() - started, 1), len(parts.test))


def _shape(options: Options) -> Shape:
    """The shape of a model to be trained, of no items yet: options are judged before data.

    Raises:
        TrainingError: an option makes no sense.
    """
    sizes = {"length": options.length, "width": options.width, "blocks": options.blocks}
    if options.family == "lrurec":
        return lrurec.Shape.fresh(0, **sizes, channels=options.channels)
    if options.family != "sasrec":
        raise TrainingError(f"no family {options.family!r}; there are {', '.join(FAMILIES)}")
    if options.width % options.heads:
        raise TrainingError(
            f"a width of {options.width} cannot be shared by {options.heads} heads: choose a"
            " multiple"
        )
    return sasrec.Shape.fresh(0, **sizes, heads=options.heads)


def _accuracy(params: Params, shape: Shape, test: Queries) -> Accuracy | None:
    if not len(test):
        return None
    return accuracy(ranks(param_score(params, shape), test, length=shape.length))


def _lessons(
    data: Interactions,
    train: list[NDArray[np.int64]],
    own: NDArray[np.int64] | None,
    shape: Shape,
    seed: int,
) -> tuple[list[NDArray[np.int64]], Params | None]:
    """Sequences to train on and weights to begin with: where items are users (`own` are the users'
    own items), what the graph around them adds."""
    if own is None:
        return train, None
    graph = friends.graph_of(data, train, own)
    vectors = friends.spectral(graph, shape.width, seed=seed)
    return train + friends.followers(graph), {**shape.init(seed), "items": vectors}


def _baseline_rows(
    data: Interactions, parts: Split, own: NDArray[np.int64] | None, options: Options
) -> list[dict[str, Any]]:
    train = parts.train
    scores: dict[str, Score] = {
        "popularity": popularity_score(np.concatenate(train), data.item_count)
    }
    if data.item_count <= EASE_MOST_ITEMS:
        scores["EASE"] = ease(train, data.item_count, l2=500.0, recency=0.85)
    scores["item-kNN"] = item_knn(train, data.item_count, neighbours=200, shrink=50.0, recency=0.7)
    scores["sequential rules"] = sequential_rules(train, data.item_count)
    if own is not None:
        graph = friends.graph_of(data, train, own)
        scores["friends of friends"] = friends.friends_of_friends(graph)
        scores["Adamic-Adar"] = friends.adamic_adar(graph)
    return [
        {
            "model": name,
            **accuracy(ranks(score, parts.test, length=_BASELINE_HISTORY)).as_metrics(),
            "source": "measured",
        }
        for name, score in scores.items()
    ]


def _golden(parts: Split, length: int) -> NDArray[np.int64]:
    """A few histories of different users, `[4, length]`."""
    queries = sample(parts.test if len(parts.test) else parts.validation, 4)
    return padded(list(queries.histories), length)
