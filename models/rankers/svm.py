"""Fewer support vectors. Their op holds floats only, so there is nothing to quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from models.rankers.errors import RecipeError
from models.rankers.graph import (
    SVM_OPS,
    attributes,
    ranker_nodes,
    set_attributes,
    values_at,
    with_nodes,
)


@dataclass(frozen=True)
class Machine:
    """Decision = alphas x kernel(vectors, row) + rho.

    `vectors` float64 `[vectors, features]`, `alphas` `[decisions, vectors]`, `per_class` int64
    `[classes]` (how many vectors of each, empty for regression), `rho` float64.
    """

    vectors: NDArray[np.float64]
    alphas: NDArray[np.float64]
    per_class: NDArray[np.int64]
    rho: NDArray[np.float64]
    kernel: str
    #: gamma, coef0, degree.
    params: tuple[float, float, float]

    def kernels(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 `[rows, vectors]`."""
        gamma, coef0, degree = self.params
        product = rows @ self.vectors.T
        if self.kernel == "LINEAR":
            return np.asarray(product)
        if self.kernel == "POLY":
            return np.asarray((gamma * product + coef0) ** degree)
        if self.kernel == "SIGMOID":
            return np.asarray(np.tanh(gamma * product + coef0))
        square = (rows**2).sum(axis=1)[:, None] + (self.vectors**2).sum(axis=1)
        return np.asarray(np.exp(-gamma * np.maximum(square - 2 * product, 0.0)))


def read_svm(node: NodeProto) -> Machine:
    """The machine in an SVMRegressor or SVMClassifier node.

    Raises:
        ValueError: it has no support vectors.
    """
    given = attributes(node)
    per_class = np.array(given.get("vectors_per_class") or [], dtype=np.int64)
    count = int(per_class.sum()) if node.op_type == "SVMClassifier" else given.get("n_supports", 0)
    if count == 0:
        raise ValueError("a support vector machine without support vectors")
    params = [*given.get("kernel_params", []), 0.0, 0.0, 3.0][:3]
    return Machine(
        vectors=np.array(given["support_vectors"], dtype=np.float64).reshape(count, -1),
        alphas=np.array(given["coefficients"], dtype=np.float64).reshape(-1, count),
        per_class=per_class,
        rho=np.array(given["rho"], dtype=np.float64),
        kernel=given.get("kernel_type", b"LINEAR").decode(),
        params=(params[0], params[1], params[2]),
    )


def prune_vectors(model: ModelProto, rows: NDArray[Any], share: float) -> ModelProto:
    """Drop `share` of the support vectors: those with the least |alpha| x mean |kernel| on `rows`.

    Where there is one decision (regression, two classes) alphas and rho of the others are fitted
    to the full decision by least squares, which makes up for much of the loss (a reduced set, as
    in Burges, "Simplified support vector decision rules", ICML 1996).

    Raises:
        RecipeError: there are no support vectors.
    """
    replaced = {}
    for node in ranker_nodes(model, SVM_OPS):
        try:
            machine = read_svm(node)
        except ValueError as error:
            raise RecipeError(f"prune: {error}: leave prune out") from None
        drop = int(len(machine.vectors) * share)
        if drop == 0:
            continue
        kernels = machine.kernels(values_at(model, node.input[0], rows).astype(np.float64))
        weight = np.abs(machine.alphas).max(axis=0) * np.abs(kernels).mean(axis=0)
        kept = np.sort(np.argsort(weight, kind="stable")[drop:])
        alphas, rho = machine.alphas[:, kept], machine.rho
        if len(machine.alphas) == 1 and len(rho) == 1:
            decision = kernels @ machine.alphas[0]
            alphas, moved = _refitted(kernels[:, kept], decision)
            rho = rho + moved
        values = {
            "support_vectors": machine.vectors[kept].ravel().tolist(),
            "coefficients": alphas.ravel().tolist(),
            "rho": rho.tolist(),
        }
        if node.op_type == "SVMRegressor":
            values["n_supports"] = len(kept)
        else:
            owner = np.repeat(np.arange(len(machine.per_class)), machine.per_class)
            counts = np.bincount(owner[kept], minlength=len(machine.per_class))
            values["vectors_per_class"] = counts.tolist()
        replaced[node.output[0]] = [set_attributes(node, (), **values)]
    return with_nodes(model, replaced)


def _refitted(
    kernels: NDArray[np.float64], decision: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Alphas `[1, vectors]` and what to add to rho so that they give `decision` `[rows]`."""
    center, middle = kernels.mean(axis=0), decision.mean()
    spread = kernels - center
    gram = spread.T @ spread
    # A little ridge: support vectors lie close together, and float32 stores the result.
    gram[np.diag_indices_from(gram)] += 1e-5 * max(float(np.trace(gram)) / len(gram), 1e-12)
    alphas = np.linalg.solve(gram, spread.T @ (decision - middle))
    return alphas[None, :], float(middle - center @ alphas)
