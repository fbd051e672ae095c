"""What differs between two bundles: manifest, size, metrics, graph, items and recommendations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.dataset import padded
from worker.bundle import Bundle, open_bundle
from worker.manifest import MODEL_FILE, Manifest

AT = 10
#: Manifest fields that have a comparison of their own.
_APART = {"files", "metrics", "golden"}


@dataclass(frozen=True)
class MetricChange:
    """One metric; None where a bundle does not have it."""

    a: float | None
    b: float | None
    #: `b - a`.
    absolute: float | None
    #: `(b - a) / a`; None where `a` is 0 too.
    relative: float | None


@dataclass(frozen=True)
class Weights:
    """Initializers of one or both graphs."""

    count: int = 0
    #: As stored.
    bytes: int = 0


@dataclass(frozen=True)
class GraphChange:
    """How two ONNX graphs differ."""

    #: Operators whose number differs: `[in a, in b]`.
    ops: dict[str, tuple[int, int]]
    #: Initializers by type: `[in a, in b]`.
    weights: dict[str, tuple[Weights, Weights]]
    #: Names of initializers that only one graph has, or whose type, shape or values differ.
    only_a: list[str]
    only_b: list[str]
    changed: list[str]
    same: int


@dataclass(frozen=True)
class ItemChange:
    """How two catalogues differ."""

    shared: int
    added: list[str]
    removed: list[str]
    #: Shared items with another model index.
    moved: int


@dataclass(frozen=True)
class Drift:
    """How far two bundles recommend the same to the same histories."""

    histories: int
    #: Mean share, 0..1, of the first `AT` items that both recommend.
    overlap: float
    #: Share of histories whose first item is the same.
    same_first: float
    #: Absolute difference of the scores of items that both recommend.
    mean_score_change: float
    max_score_change: float
    #: Mean difference between a's first and last score, to judge the change by.
    score_range: float


@dataclass(frozen=True)
class Diff:
    """Everything that differs from bundle `a` to bundle `b`."""

    a: str
    b: str
    #: Manifest fields that differ: `[in a, in b]`.
    fields: dict[str, tuple[Any, Any]]
    bytes: tuple[int, int]
    #: `a / b`: above 1, b is smaller.
    times_smaller: float
    metrics: dict[str, MetricChange]
    #: None where the onnx package is missing.
    graph: GraphChange | None
    items: ItemChange
    #: By kind of history, `golden` or `random`; empty where the catalogues share no item.
    drift: dict[str, Drift] = field(default_factory=dict)


def diff_bundles(a: Path, b: Path, *, histories: int = 256, seed: int = 0) -> Diff:
    """Compare the bundles in two directories; runs both models.

    Args:
        histories: random ones to ask both; golden histories are asked besides where both
            manifests have the same.

    Raises:
        BundleError: one of them is damaged.
    """
    one, two = open_bundle(a), open_bundle(b)
    sizes = (_size(one.manifest), _size(two.manifest))
    return Diff(
        a=one.manifest.reference,
        b=two.manifest.reference,
        fields=_fields(one.manifest, two.manifest),
        bytes=sizes,
        times_smaller=sizes[0] / sizes[1],
        metrics=_metrics(one.manifest.metrics, two.manifest.metrics),
        graph=_graphs(a / MODEL_FILE, b / MODEL_FILE),
        items=_items(one.items, two.items),
        drift=_drifts(one, two, histories, seed),
    )


def _size(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files.values())


def _fields(a: Manifest, b: Manifest) -> dict[str, tuple[Any, Any]]:
    one, two = msgspec.to_builtins(a), msgspec.to_builtins(b)
    return {
        name: (one[name], two[name])
        for name in one
        if name not in _APART and one[name] != two[name]
    }


def _metrics(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, MetricChange]:
    return {name: _metric(a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys())}


def _metric(a: float | None, b: float | None) -> MetricChange:
    if a is None or b is None:
        return MetricChange(a, b, None, None)
    return MetricChange(a, b, b - a, (b - a) / a if a else None)


def _items(a: Sequence[str], b: Sequence[str]) -> ItemChange:
    before = {item: place for place, item in enumerate(a)}
    after = {item: place for place, item in enumerate(b)}
    shared = before.keys() & after.keys()
    return ItemChange(
        shared=len(shared),
        added=[item for item in b if item not in before],
        removed=[item for item in a if item not in after],
        moved=sum(before[item] != after[item] for item in shared),
    )


def _graphs(a: Path, b: Path) -> GraphChange | None:
    try:
        import onnx  # noqa: PLC0415 - of the train extra
    except ImportError:
        return None
    one, two = (onnx.load(path, load_external_data=False).graph for path in (a, b))
    ops_a, ops_b = Counter(_ops(one)), Counter(_ops(two))
    stored_a = {w.name: w for w in one.initializer}
    stored_b = {w.name: w for w in two.initializer}
    weights_a, weights_b = (_by_type(stored.values(), onnx) for stored in (stored_a, stored_b))
    both = stored_a.keys() & stored_b.keys()
    changed = sorted(
        name for name in both if _content(stored_a[name], onnx) != _content(stored_b[name], onnx)
    )
    return GraphChange(
        ops={
            op: (ops_a[op], ops_b[op])
            for op in sorted(ops_a.keys() | ops_b.keys())
            if ops_a[op] != ops_b[op]
        },
        weights={
            kind: (weights_a.get(kind, Weights()), weights_b.get(kind, Weights()))
            for kind in sorted(weights_a.keys() | weights_b.keys())
        },
        only_a=sorted(stored_a.keys() - both),
        only_b=sorted(stored_b.keys() - both),
        changed=changed,
        same=len(both) - len(changed),
    )


def _ops(graph: Any) -> Iterator[str]:
    """Operators of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _ops(inner)


def _content(tensor: Any, onnx: Any) -> tuple[Any, ...]:
    """Type, shape and values; the same values may be serialized in more than one way."""
    if tensor.external_data:
        return (tensor.SerializeToString(),)
    values = onnx.numpy_helper.to_array(tensor)
    return tensor.data_type, *values.shape, values.tobytes()


def _by_type(initializers: Any, onnx: Any) -> dict[str, Weights]:
    found: dict[str, Weights] = {}
    for tensor in initializers:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        known = found.get(kind, Weights())
        found[kind] = Weights(known.count + 1, known.bytes + tensor.ByteSize())
    return found


def _drifts(a: Bundle, b: Bundle, count: int, seed: int) -> dict[str, Drift]:
    shared = [item for item in a.items if item in b.index]
    if not shared:
        return {}
    rng = np.random.default_rng(seed)
    longest = min(a.manifest.max_length, b.manifest.max_length)
    random = [
        [shared[place] for place in rng.integers(0, len(shared), rng.integers(1, longest + 1))]
        for _ in range(count)
    ]
    asked = {"golden": _shared_golden(a, b), "random": random}
    return {kind: _drift(a, b, histories) for kind, histories in asked.items() if histories}


def _shared_golden(a: Bundle, b: Bundle) -> list[list[str]]:
    """Golden histories of `a`, as item ids, that `b` records too."""

    def recorded(bundle: Bundle) -> list[list[str]]:
        return [
            [bundle.items[index - 1] for index in row if index]
            for golden in bundle.manifest.golden
            for row in golden.history
        ]

    others = recorded(b)
    return [history for history in recorded(a) if history and history in others]


def _drift(a: Bundle, b: Bundle, histories: Sequence[Sequence[str]]) -> Drift:
    """Ask both for the first `AT` items, compared by item id."""
    lists_a, lists_b = _top(a, histories), _top(b, histories)
    overlaps, first, changes, ranges = [], [], [], []
    for one, two in zip(lists_a, lists_b, strict=True):
        common = one.keys() & two.keys()
        overlaps.append(len(common) / max(len(one), len(two)))
        first.append(next(iter(one)) == next(iter(two)))
        changes += [abs(one[item] - two[item]) for item in common]
        scores = list(one.values())
        ranges.append(scores[0] - scores[-1])
    return Drift(
        histories=len(histories),
        overlap=float(np.mean(overlaps)),
        same_first=float(np.mean(first)),
        mean_score_change=float(np.mean(changes)) if changes else 0.0,
        max_score_change=max(changes, default=0.0),
        score_range=float(np.mean(ranges)),
    )


def _top(bundle: Bundle, histories: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Scores by item id of the first `AT` items, best first, for each history."""
    indexes: list[NDArray[np.int64]] = [
        np.array([bundle.index[item] for item in history], dtype=np.int64) for history in histories
    ]
    items, scores = bundle.score(
        padded(indexes, bundle.manifest.max_length), min(AT, bundle.manifest.most)
    )
    return [
        {bundle.items[index - 1]: score for index, score in zip(row, values, strict=True)}
        for row, values in zip(items.tolist(), scores.tolist(), strict=True)
    ]
