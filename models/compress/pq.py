"""Product quantization of the item table (Jégou et al., 2011), for large catalogues.

An item's vector is cut into `codes` pieces, each replaced by the nearest of 256 centroids: 8 bytes
an item where float32 takes 256 (RecJPQ, Petrov & Macdonald, WSDM 2024, trains them; here they are
found after training, and `finetune` after `pq` trains them with the codes fixed). Centroids are
int8 with one scale a dimension.

A rotation before cutting, found together with the centroids (Ge et al., "Optimized product
quantization", 2013), spreads what the pieces hold in common. The table feeds the input too, so a
product with one small matrix turns looked-up rows back.

How scores are computed, `score`:

- `int8`: the table of int8 is put together while loading, and multiplied as integers. The disk
  holds 8 bytes an item, memory 128.
- `lookup`: PQTopK (Petrov, Macdonald & Tonellotto, RecSys 2024): the products of the state with
  all centroids, then 8 look-ups an item. Memory holds the codes only, until a batch comes. ONNX
  Runtime gathers floats one by one where it multiplies 64 integers at once: at 100 k items this
  takes half of float32's time for one user, twice for 16, three times for 64, and more than
  `int8` always (docs/large-catalogues.md).
- `float`: the table of float32 is put together while loading: the time and memory of float32, and
  the same scores on every processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from models.compress.draft import CompressionError, Context, Draft
from models.compress.kmeans import Floats, kmeans, nearest
from models.compress.rewriter import Rewriter
from models.compress.tail import Nodes

SCORES = ("auto", "lookup", "int8", "float")
#: `int8` was the fastest of the three at batches 1 to 256 and 10 k to 1 M items.
AUTO = "int8"
#: Rows that rotation and centroids are learned from; all rows get codes.
_SAMPLE = 50_000
_ROTATIONS = 8


@dataclass(frozen=True, eq=False)
class Codebook:
    """Centroids as stored: `integers * scale`, in the turned space.

    `integers`: int8 values `[codes, centroids, piece]`; `scale`: float32 `[width]`.
    """

    integers: NDArray[np.int8]
    scale: Floats


@dataclass(frozen=True, eq=False)
class Pq:
    """A table in product-quantized form. The codes are fixed; centroids follow the weights.

    Args:
        codes: uint8 `[rows, codes]`.
        centroids: how many a piece has.
        weights: float32 `[rows]`, how much each row counts in its centroids.
        rotation: float32 `[width, width]`, orthogonal, or None.
        score: `lookup`, `int8` or `float`.
    """

    codes: NDArray[np.uint8]
    centroids: int
    weights: Floats
    rotation: Floats | None
    score: str

    @property
    def label(self) -> str:
        """pq8: eight codes an item."""
        return f"pq{self.codes.shape[1]}"

    @property
    def exact(self) -> bool:
        """Whether products are of floats."""
        return self.score != "int8"

    def rounded(self, weight: Any, xp: Any) -> Any:
        """What the weight becomes, float32; centroids are the means of the rows that have them."""
        integers, scale = self._centroids(weight, xp)
        codes = self.codes_of(len(weight))
        pieces = [part[codes[:, place]] for place, part in enumerate(integers)]
        rows = xp.concatenate(pieces, axis=1) * scale
        return rows if self.rotation is None else rows @ self.rotation.T

    def codebook(self, weight: Floats) -> Codebook:
        """Centroids for the weight's values."""
        integers, scale = self._centroids(weight, np)
        return Codebook(np.stack(integers).astype(np.int8), scale)

    def codes_of(self, rows: int) -> NDArray[np.uint8]:
        """uint8 `[rows, codes]`; rows that fill up the table have code 0."""
        return np.pad(self.codes, ((0, rows - len(self.codes)), (0, 0)))

    def _centroids(self, weight: Any, xp: Any) -> tuple[list[Any], Any]:
        """Rounded to integers, each `[centroids, piece]`, and their scale `[width]`."""
        rows, pieces = self.codes.shape
        if len(weight) < rows or weight.shape[1] % pieces:
            raise CompressionError(
                f"pq: codes of {rows} rows do not fit a table {list(weight.shape)}: put `pq` after"
                " the steps that change the table's size"
            )
        weight = weight[:rows]
        turned = weight if self.rotation is None else weight @ self.rotation
        counted = turned * self.weights[:, None]
        parts, scales = [], []
        for place, part in enumerate(np.split(np.arange(turned.shape[1]), pieces)):
            order = np.argsort(self.codes[:, place], kind="stable")
            used, starts = np.unique(self.codes[order, place], return_index=True)
            sums = xp.add.reduceat(counted[order][:, part], starts, axis=0)
            means = sums / np.add.reduceat(self.weights[order], starts)[:, None]
            largest = xp.abs(means).max(axis=0)
            scale = xp.where(largest > 0, largest / 127, 1.0).astype(np.float32)
            # A centroid that no row has is a copy of another.
            at = np.searchsorted(used, np.arange(self.centroids)).clip(max=len(used) - 1)
            parts.append(xp.clip(xp.round(means / scale), -127, 127)[at])
            scales.append(scale)
        return parts, xp.concatenate(scales)

    def lower(self, rewriter: Rewriter, name: str, weight: NDArray[np.float32]) -> None:
        """Store codes and centroids; look rows up by them, and score as `score` says."""
        book = self.codebook(weight)
        rewriter.remove_weight(name)
        nodes = Nodes(rewriter.model, f"{name}_pq")
        codes = rewriter.weight(f"{name}_codes", self.codes_of(len(weight)))
        decoder = Decoder(rewriter, nodes, name, book, self.rotation)
        if self.score == "lookup":
            rest = []
            for node in rewriter.consumers(name):
                if node.op_type == "Gather":
                    found = nodes.add("Gather", codes, node.input[1], axis=0)
                    decoder.floats(decoder.integers(found, 2), node.output[0])
                    rewriter.replace(node, nodes.taken())
                elif not self._replace_product(rewriter, node, decoder, codes, len(weight)):
                    rest.append(node)
        else:
            rows = decoder.integers(codes, 1)
            nodes.unpack_into(rewriter)
            rest = rewriter.consumers(name)
            if self.score == "int8":
                rest = [n for n in rest if not _replace_by_integers(rewriter, n, decoder, rows)]
        if rest:
            if self.score == "lookup":
                rows = decoder.integers(codes, 1)
            decoder.floats(rows, name)
            nodes.unpack_into(rewriter)

    def _replace_product(
        self, rewriter: Rewriter, node: NodeProto, decoder: Decoder, codes: str, rows: int
    ) -> bool:
        """Score by look-ups; False where the product is not of the transposed table."""
        products = _products(rewriter, node)
        if products is None:
            return False
        pieces = self.codes.shape[1]
        turned = rewriter.unpack("Transpose", [codes], f"{codes}_by_piece", perm=[1, 0])
        for product in products:
            nodes = decoder.nodes
            table = decoder.table(decoder.turned(product.input[0]))
            batch = nodes.add("Shape", product.input[0], start=0, end=1)
            shape = nodes.add("Concat", batch, nodes.integers(rows), axis=0)
            total = ""
            for place in range(pieces):
                # Kept in bytes: expanded to all users only while one piece is added.
                at = nodes.integers(place)
                own = rewriter.unpack("Gather", [turned, at], f"{turned}_{place}", axis=0)
                index = nodes.add("Expand", own, shape)
                index = nodes.add("Cast", index, to=TensorProto.INT32)
                values = nodes.add("Gather", table, nodes.integers(place), axis=1)
                values = nodes.add("Squeeze", values, nodes.integers(1))
                found = nodes.add("GatherElements", values, index, axis=1)
                last = product.output[0] if place == pieces - 1 else None
                if total:
                    total = nodes.add("Add", total, found, output=last)
                else:
                    total = nodes.add("Identity", found, output=last)
            rewriter.replace(product, nodes.taken())
        rewriter.replace(node, [])
        return True


class Decoder:
    """Nodes that turn codes into vectors; used by pq.py and cells.py."""

    def __init__(
        self, rewriter: Rewriter, nodes: Nodes, name: str, book: Codebook, rotation: Floats | None
    ) -> None:
        self.nodes = nodes
        self.pieces, self.count, self.piece = book.integers.shape
        flat = book.integers.reshape(-1, self.piece)
        self.centroids = rewriter.weight(f"{name}_centroids", flat)
        self.scale = rewriter.weight(f"{name}_scale", book.scale)
        self._rotation = (
            rewriter.weight(f"{name}_rotation", rotation) if rotation is not None else None
        )
        self._rewriter = rewriter
        self._name = name
        self._unpacked: set[str] = set()

    def flat(self, codes: str) -> str:
        """int32 indexes of centroids, for uint8 codes `[..., codes]`."""
        offsets = np.arange(self.pieces, dtype=np.int32) * self.count
        index = self.nodes.add("Cast", codes, to=TensorProto.INT32)
        return self.nodes.add("Add", index, self.nodes.constant(offsets))

    def integers(self, codes: str, dimensions: int) -> str:
        """int8 vectors `[..., width]` for uint8 codes `[..., codes]`, `dimensions` before those."""
        found = self.nodes.add("Gather", self.centroids, self.flat(codes), axis=0)
        shape = self.nodes.integers(*[0] * dimensions, self.pieces * self.piece)
        return self.nodes.add("Reshape", found, shape)

    def floats(self, integers: str, output: str) -> str:
        """float32 vectors in the model's space for int8 ones."""
        found = self.nodes.add("Cast", integers, to=TensorProto.FLOAT)
        if self._rotation is None:
            return self.nodes.add("Mul", found, self.scale, output=output)
        found = self.nodes.add("Mul", found, self.scale)
        back = f"{self._rotation}_back"
        self._once("Transpose", [self._rotation], back, perm=[1, 0])
        return self.nodes.add("MatMul", found, back, output=output)

    def turned(self, state: str) -> str:
        """The state in the space of the integers, so that a score is its product with them."""
        if self._rotation is not None:
            state = self.nodes.add("MatMul", state, self._rotation)
        return self.nodes.add("Mul", state, self.scale)

    def table(self, state: str) -> str:
        """float32 `[batch, codes, centroids]`: products of a turned state with all centroids."""
        floats, stacked = f"{self._name}_centroid_floats", f"{self._name}_centroid_stack"
        columns = f"{self._name}_centroid_columns"
        shape = self.nodes.integers(self.pieces, self.count, self.piece)
        self._once("Cast", [self.centroids], floats, to=TensorProto.FLOAT)
        self._once("Reshape", [floats, shape], stacked)
        self._once("Transpose", [stacked], columns, perm=[0, 2, 1])
        state = self.nodes.add("Reshape", state, self.nodes.integers(0, self.pieces, 1, self.piece))
        found = self.nodes.add("MatMul", state, columns)
        return self.nodes.add("Squeeze", found, self.nodes.integers(2))

    def _once(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        if output not in self._unpacked:
            self._unpacked.add(output)
            self._rewriter.unpack(op, inputs, output, **attributes)


def _replace_by_integers(rewriter: Rewriter, node: NodeProto, decoder: Decoder, rows: str) -> bool:
    nodes = decoder.nodes
    if node.op_type == "Gather":
        decoder.floats(nodes.add("Gather", rows, node.input[1], axis=0), node.output[0])
        rewriter.replace(node, nodes.taken())
        return True
    products = _products(rewriter, node)
    if products is None:
        return False
    one = nodes.constant(np.ones(1, dtype=np.float32))
    for product in products:
        turned = NodeProto()
        turned.CopyFrom(product)
        turned.input[0] = decoder.turned(product.input[0])
        rewriter.replace(product, [*nodes.taken(), turned])
        rewriter.integer_product(turned, rows, one, transposed=True)
    rewriter.replace(node, [])
    return True


def _products(rewriter: Rewriter, node: NodeProto) -> list[NodeProto] | None:
    """Products with a transposed table; None where there is something else."""
    if node.op_type != "Transpose":
        return None
    products = rewriter.consumers(node.output[0])
    if all(p.op_type == "MatMul" and p.input[1] == node.output[0] for p in products):
        return products
    return None


def pq(
    draft: Draft,
    context: Context,
    *,
    codes: int = 8,
    centroids: int = 256,
    score: str = "auto",
    rotate: bool = True,
    popularity: float = 0.5,
) -> Draft:
    """The item table in product-quantized form.

    Args:
        codes: pieces of a vector, and bytes of an item on disk; must divide the table's width.
        centroids: of each piece, at most 256.
        score: `lookup`, `int8`, `float`, or `auto`, which is `int8`: see the module.
        rotate: turn the table before cutting.
        popularity: rows count by their place to the power of minus this, since items are numbered
            by popularity; 0 lets all count alike.
    """
    if score not in SCORES:
        raise CompressionError(f"pq: score {score!r} must be one of {', '.join(SCORES)}")
    if not 2 <= centroids <= 256:
        raise CompressionError(f"pq: centroids {centroids} must be 2 to 256")
    tables = draft.weights("table")
    if not tables:
        raise CompressionError("pq: the graph looks no item table up by `history`")
    table = draft.value(tables[0].name)
    width = table.shape[1]
    if codes < 1 or width % codes:
        raise CompressionError(
            f"pq: codes {codes} must divide the width of the item table, {width}"
        )
    weights = (1.0 + np.arange(len(table), dtype=np.float32)) ** -np.float32(popularity)
    rng = np.random.default_rng(context.seed)
    chosen = np.sort(rng.choice(len(table), min(len(table), _SAMPLE), replace=False))
    rotation = None
    if rotate:
        rotation = _rotation(table[chosen], weights[chosen], codes, centroids, context.seed)
    turned = table if rotation is None else table @ rotation
    found = np.empty((len(table), codes), dtype=np.uint8)
    for place, part in enumerate(np.split(np.arange(width), codes)):
        own = np.ascontiguousarray(turned[:, part])
        middle = kmeans(own[chosen], centroids, weights=weights[chosen], seed=context.seed)
        found[:, place] = nearest(own, middle)
    mode = AUTO if score == "auto" else score
    return draft.encoded([tables[0].name], Pq(found, centroids, weights, rotation, mode))


def _rotation(table: Floats, weights: Floats, codes: int, centroids: int, seed: int) -> Floats:
    """float32 `[width, width]`: alternately centroids for a rotation, and the rotation that brings
    the table nearest to its centroids (an orthogonal Procrustes problem)."""
    width = table.shape[1]
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    parts = np.split(np.arange(width), codes)
    middles: list[Floats | None] = [None] * codes
    for _ in range(_ROTATIONS):
        turned = table @ rotation
        near = np.empty_like(turned)
        for place, part in enumerate(parts):
            own = np.ascontiguousarray(turned[:, part])
            middle = kmeans(
                own, centroids, weights=weights, start=middles[place], iterations=3, seed=seed
            )
            near[:, part] = middle[nearest(own, middle)]
            middles[place] = middle
        left, _, right = np.linalg.svd(table.T @ (near * weights[:, None]))
        rotation = (left @ right).astype(np.float32)
    return rotation
