"""Store an item table once that a graph holds twice: for looking up, and transposed for scoring.

Exporters of other frameworks write both; our own graphs are tied already.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import helper, numpy_helper

from models.compress.draft import CompressionError, Context, Draft, copied


def tie(draft: Draft, context: Context) -> Draft:
    """Make the scoring product read the look-up table, where their values are the same.

    Raises:
        CompressionError: there is no such pair: nothing to tie.
    """
    tables = draft.weights("table")
    for table in tables:
        rows = draft.value(table.name)
        for linear in draft.weights("linear"):
            columns = draft.value(linear.name).T
            # With or without the row of the padding item 0.
            start = len(rows) - len(columns)
            if start not in {0, 1} or columns.shape[1] != rows.shape[1]:
                continue
            if np.array_equal(rows[start:], columns):
                return _tied(draft, table.name, linear.name, start)
    raise CompressionError(
        "tie: no linear weight is the transposed item table; it is stored once already, or the"
        " model's output weights are its own"
    )


def _tied(draft: Draft, table: str, linear: str, start: int) -> Draft:
    model = copied(draft.model)
    graph = model.graph
    turned, whole = f"{table}_transposed", f"{table}_scores"
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] == linear:
            nodes.append(helper.make_node("Transpose", [table], [turned], perm=[1, 0]))
            product = whole if start else node.output[0]
            nodes.append(
                helper.make_node("MatMul", [node.input[0], turned], [product], name=node.name)
            )
            if start:
                one, end = f"{table}_one", f"{table}_end"
                graph.initializer.extend(
                    [
                        numpy_helper.from_array(np.array([1]), one),
                        numpy_helper.from_array(np.array([2**31]), end),
                        numpy_helper.from_array(np.array([-1]), f"{table}_last"),
                    ]
                )
                cut = [whole, one, end, f"{table}_last"]
                nodes.append(helper.make_node("Slice", cut, list(node.output)))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    stored = next(w for w in graph.initializer if w.name == linear)
    graph.initializer.remove(stored)
    return replace(draft, model=model)
