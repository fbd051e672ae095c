"""Try a draft: what it weighs, how fast it is beside the original, and what it lost, on validation
queries. Nothing is written; the graph is the one that would be served."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.compress.draft import CompressionError, Draft, lower
from models.dataset import Queries, padded
from models.evaluate import bundle_accuracy, bundle_score
from models.measure import K
from worker.bundle import Bundle
from worker.manifest import MODEL_FILE, FileSpec
from worker.session import session_options

ROUNDS = 15


def in_memory(draft: Draft) -> Bundle:
    """The draft as the bundle that it would become, without files.

    Raises:
        CompressionError: ONNX Runtime does not run its graph.
    """
    data = lower(draft)
    try:
        session = ort.InferenceSession(data, session_options(1), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CompressionError(
            f"ONNX Runtime does not load {' + '.join(draft.steps)}: {str(error)[:300]}"
        ) from None
    manifest = msgspec.structs.replace(
        draft.manifest,
        precision=draft.precision,
        files={MODEL_FILE: FileSpec(hashlib.sha256(data).hexdigest(), len(data))},
    )
    return Bundle(manifest, Path(), session, draft.items)


@dataclass(frozen=True)
class Cost:
    """`bytes` of the graph; `latency_ratio`: processor time of a batch of 64 over the reference's,
    medians of interleaved rounds, one thread; `batch_ms`: milliseconds of that batch."""

    bytes: int
    latency_ratio: float
    batch_ms: float


def cost(bundle: Bundle, reference: Bundle, queries: Queries) -> Cost:
    """Weigh and time a variant against the reference; both of `in_memory`."""

    def batch(of: Bundle) -> NDArray[np.int64]:
        return padded(list(queries.histories[:64]), of.manifest.max_length)

    mine, theirs = batch(bundle), batch(reference)
    k = min(K, bundle.manifest.most)
    own, other = [], []
    for _ in range(ROUNDS + 2):
        own.append(_timed(bundle, mine, k))
        other.append(_timed(reference, theirs, k))
    ratios = np.array(own[2:]) / np.array(other[2:])
    size = bundle.manifest.files[MODEL_FILE].bytes
    return Cost(size, float(np.median(ratios)), float(np.median(own[2:])) * 1000.0)


def relative_loss(ndcg: float, reference: float) -> float:
    """Relative loss of an NDCG against the reference's on the same queries; negative is a gain."""
    return 1.0 - ndcg / max(reference, 1e-9)


def ndcg(bundle: Bundle, queries: Queries) -> float:
    """NDCG@10."""
    return bundle_accuracy(bundle, queries).ndcg


def surprise(bundle: Bundle, queries: Queries, *, batch: int = 128) -> float:
    """Mean negative log-likelihood of the targets, nats: smoother than NDCG, so it tells the
    effects of small changes apart on few queries."""
    score = bundle_score(bundle)
    total = 0.0
    for start in range(0, len(queries), batch):
        histories = list(queries.histories[start : start + batch])
        table = score(padded(histories, bundle.manifest.max_length)).astype(np.float64)
        top = table.max(axis=1)
        everything = np.log(np.exp(table - top[:, None]).sum(axis=1)) + top
        targets = queries.targets[start : start + batch]
        total += float((everything - table[np.arange(len(table)), targets - 1]).sum())
    return total / len(queries)


def _timed(bundle: Bundle, history: NDArray[np.int64], k: int) -> float:
    # Processor time of this thread, which does all the work: other processes do not count.
    started = time.thread_time()
    bundle.score(history, k)
    return time.thread_time() - started
