"""Exact top-k in two stages, for large catalogues.

TopK over all scores is a scan with a comparison and a jump for each; at 100 k items it takes as
long as the product before it. The maximum of every 32 neighbours is found many at a time. The k
best scores lie in the k chunks with the largest maxima, so the second stage looks at 32 k scores.
(Chern et al., "TPU-KNN", NeurIPS 2022, keep but the maximum of each chunk: faster, approximate.)
Of items with the same score, others may be kept than by TopK.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import numpy_helper

from models.compress.draft import CompressionError, Context, Draft, copied
from models.compress.tail import Nodes, find_tail, without

#: Chunks that are looked at beyond k: the one with the padding item 0, whose score is not its
#: place's, and the last, which rows of zeros fill up.
_SPOILT = 2


@dataclass(frozen=True)
class TwoStages:
    """Scores by chunks of neighbours."""

    chunk: int

    def rewrite(self, draft: Draft) -> Draft:
        """Fill the table up to whole chunks; replace slicing and TopK."""
        model = copied(draft.model)
        tail = find_tail(model, "topk")
        table = draft.value(tail.table)
        rows = len(table)
        chunks = -(-rows // self.chunk)
        filled = np.zeros((chunks * self.chunk, table.shape[1]), dtype=np.float32)
        filled[:rows] = table
        stored = next(w for w in model.graph.initializer if w.name == tail.table)
        stored.CopyFrom(numpy_helper.from_array(filled, tail.table))
        # Shapes noted for the smaller table no longer hold.
        del model.graph.value_info[:]

        without(model, [tail.slice, tail.top, tail.add])
        nodes = Nodes(model, "topk")
        scores = tail.score.output[0]
        one, two = nodes.integers(1), nodes.integers(2)
        by_chunk = nodes.add("Reshape", scores, nodes.integers(0, chunks, self.chunk))
        largest = nodes.add("ReduceMax", by_chunk, two, keepdims=0)
        wanted = nodes.add("Add", tail.top.input[1], nodes.integers(_SPOILT))
        wanted = nodes.add("Min", wanted, nodes.integers(chunks))
        _, best = nodes.top(largest, wanted, ranked=False)
        first = nodes.add("Mul", best, nodes.integers(self.chunk))
        within = nodes.constant(np.arange(self.chunk, dtype=np.int64)[None, None])
        items = nodes.add("Add", nodes.add("Unsqueeze", first, two), within)
        items = nodes.add("Reshape", items, nodes.integers(0, -1))
        found = nodes.add("GatherElements", scores, items, axis=1)
        real = nodes.add(
            "And",
            nodes.add("GreaterOrEqual", items, one),
            nodes.add("Less", items, nodes.integers(rows)),
        )
        nothing = nodes.constant(np.array([-np.inf], dtype=np.float32))
        found = nodes.add("Where", real, found, nothing)
        values, places = nodes.top(found, tail.top.input[1])
        nodes.add("Identity", values, output="scores")
        nodes.add("GatherElements", items, places, axis=1, output="items")
        model.graph.node.extend(nodes.taken())
        return replace(draft, model=model)


def topk(draft: Draft, context: Context, *, chunk: int = 32) -> Draft:
    """Rank in two stages; the result is the same. Slower below some 10 k items.

    Args:
        chunk: neighbours of which the maximum is taken.
    """
    if chunk < 2:
        raise CompressionError(f"topk: chunk {chunk} must be at least 2")
    find_tail(draft.model, "topk")
    return replace(draft, late=(*draft.late, TwoStages(chunk)))
