"""Read, run and store ONNX models that hold a ranker."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from models.rankers.errors import RankerError

ML = "ai.onnx.ml"
TREE_OPS = ("TreeEnsembleRegressor", "TreeEnsembleClassifier", "TreeEnsemble")
LINEAR_OPS = ("LinearRegressor", "LinearClassifier")
SVM_OPS = ("SVMRegressor", "SVMClassifier")
RANKER_OPS = TREE_OPS + LINEAR_OPS + SVM_OPS

_INPUT_TYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
}


def load_ranker(path: Path) -> ModelProto:
    """Read the model at `path` and make sure that it is a ranker that ONNX Runtime runs.

    Raises:
        RankerError: it is missing, no ONNX file, truncated, refers to other files, holds no
            ranker, or does not load.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RankerError(f"{path} cannot be read: {error.strerror}") from None
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # the parser raises kinds of its own
        raise RankerError(
            f"{path} is not an ONNX file, or is cut short ({_line(error)}): export it again"
        ) from None
    if not model.graph.node:
        raise RankerError(f"{path} is not an ONNX model: it has no graph; export it again")
    if any(w.data_location == TensorProto.EXTERNAL for w in model.graph.initializer):
        raise RankerError(f"{path} keeps weights in other files: save it as one file")
    if not ranker_nodes(model, RANKER_OPS):
        raise RankerError(
            f"{path} holds no ranker; this command takes models with one of {', '.join(RANKER_OPS)}"
        )
    model_input(model)
    try:
        open_session(data)
    except Exception as error:
        raise RankerError(f"ONNX Runtime does not load {path}: {_line(error)}") from None
    return model


def ranker_nodes(model: ModelProto, ops: Iterable[str]) -> list[NodeProto]:
    """The nodes of the graph that are one of `ops`."""
    wanted = set(ops)
    return [n for n in model.graph.node if n.domain == ML and n.op_type in wanted]


def model_input(model: ModelProto) -> tuple[str, type[Any], int | None]:
    """Name, numpy dtype and number of features (None where free) of the only input.

    Raises:
        RankerError: there are several inputs, or it is no numeric matrix.
    """
    weights = {w.name for w in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise RankerError(
            f"the model has {len(inputs)} inputs; export it with one [rows, features] matrix"
        )
    tensor = inputs[0].type.tensor_type
    dims = tensor.shape.dim
    if tensor.elem_type not in _INPUT_TYPES or len(dims) != 2:
        raise RankerError(
            f"input {inputs[0].name} is no numeric [rows, features] matrix; export it with one"
        )
    width = dims[1].dim_value if dims[1].HasField("dim_value") else None
    return inputs[0].name, _INPUT_TYPES[tensor.elem_type], width or None


def open_session(data: bytes) -> ort.InferenceSession:
    """A session on the CPU with one thread, as re-ranking inside a worker runs it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised; nothing is printed
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feed(model: ModelProto, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Inputs of a run on features `[rows, features]`.

    Raises:
        RankerError: the model wants another number of features.
    """
    name, dtype, width = model_input(model)
    if width is not None and rows.shape[1] != width:
        raise RankerError(
            f"the data has {rows.shape[1]} features, the model wants {width}: give the features"
            " that it was trained on, in that order, and name label and group columns"
        )
    return {name: rows.astype(dtype)}


def values_at(model: ModelProto, tensor: str, rows: NDArray[Any]) -> NDArray[Any]:
    """The value of an inner tensor, `[rows, ...]`, when the model is run on `rows`."""
    inputs = feed(model, rows)
    if tensor in inputs:
        return inputs[tensor]
    probe = ModelProto()
    probe.CopyFrom(model)
    if all(output.name != tensor for output in probe.graph.output):
        probe.graph.output.append(helper.make_empty_tensor_value_info(tensor))
    value: NDArray[Any] = run(open_session(probe.SerializeToString()), [tensor], inputs)[0]
    return value


class Score(NamedTuple):
    """Where a model's score is: an output, and a column of it."""

    output: str
    column: int


def find_score(model: ModelProto) -> Score:
    """What to rank by: the last output that is not a label; its last column, that of a
    classifier's last class.

    Raises:
        RankerError: the model gives labels only.
    """
    found = [
        output.name
        for output in model.graph.output
        if output.type.HasField("sequence_type")
        or output.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.DOUBLE)
    ]
    if not found:
        raise RankerError("the model gives labels only; export it with its scores")
    for node in ranker_nodes(model, ("SVMClassifier",)):
        given = attributes(node)
        if len(class_labels(given)) == 2 and not given.get("prob_a"):
            # Without probabilities ONNX Runtime gives the second class's score first.
            return Score(str(found[-1]), 0)
    return Score(str(found[-1]), -1)


def scores(
    session: ort.InferenceSession, score: Score, inputs: dict[str, NDArray[Any]]
) -> NDArray[np.float64]:
    """float64 `[rows]`: what to rank by, larger is better."""
    value = run(session, [score.output], inputs)[0]
    if isinstance(value, list):  # ZipMap gives a dictionary per row
        value = np.array([list(row.values()) for row in value])
    return np.asarray(value, dtype=np.float64).reshape(len(value), -1)[:, score.column]


def run(
    session: ort.InferenceSession, outputs: list[str] | None, inputs: dict[str, NDArray[Any]]
) -> list[Any]:
    """Run a session; what ONNX Runtime refuses becomes a `RankerError`."""
    try:
        found: list[Any] = session.run(outputs, inputs)
    except Exception as error:
        raise RankerError(
            f"the model does not run on this data (its feature count?): {_line(error)}"
        ) from None
    return found


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name, as Python values; tensors as arrays."""
    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        found[attribute.name] = (
            numpy_helper.to_array(value) if isinstance(value, TensorProto) else value
        )
    return found


def set_attributes(node: NodeProto, drop: Iterable[str], **values: Any) -> NodeProto:
    """A copy of `node` without the attributes `drop`, and with `values` set."""
    gone = {*drop, *values}
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.attribute[:]
    copy.attribute.extend(a for a in node.attribute if a.name not in gone)
    copy.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    return copy


def with_nodes(
    model: ModelProto, replacements: dict[str, list[NodeProto]], weights: Iterable[Any] = ()
) -> ModelProto:
    """A copy of `model` in which the node with first output NAME became `replacements[NAME]`."""
    copy = ModelProto()
    copy.CopyFrom(model)
    nodes = [new for node in model.graph.node for new in replacements.get(node.output[0], [node])]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(weights)
    del copy.graph.value_info[:]
    return copy


class NodeBuilder:
    """Nodes and weights that take another node's place; names begin with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self._prefix = prefix

    def weight(self, value: NDArray[Any] | TensorProto) -> str:
        """Add a constant; return its name."""
        tensor = value
        if not isinstance(tensor, TensorProto):
            array = np.asarray(value)
            tensor = numpy_helper.from_array(
                array.astype(object) if array.dtype.kind in "SU" else array
            )
        tensor.name = f"{self._prefix}_w{len(self.weights)}"
        self.weights.append(tensor)
        return str(tensor.name)

    def add(self, op: str, *inputs: str, out: str = "", domain: str = "", **given: Any) -> str:
        """Add a node with one output, named `out` if given; return the output's name."""
        out = out or f"{self._prefix}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], domain=domain, **given))
        return out

    def transform(self, raw: str, transform: str, out: str) -> None:
        """Add a `post_transform`, from scores `raw` to `out`.

        Raises:
            ValueError: no plain operator does it.
        """
        if transform == "NONE":
            if raw != out:
                self.add("Identity", raw, out=out)
        elif transform == "LOGISTIC":
            self.add("Sigmoid", raw, out=out)
        elif transform == "SOFTMAX":
            self.add("Softmax", raw, out=out, axis=-1)
        else:
            raise ValueError(f"no operator for {transform}")

    def best_label(self, table: str, labels: list[Any], out: str) -> None:
        """Add the label of the largest of scores `[rows, classes]`."""
        best = self.add("ArgMax", table, axis=1, keepdims=0)
        self.add("Gather", self.weight(np.array(labels)), best, out=out)

    def binary_label(self, raw: str, border: float, labels: list[Any], out: str) -> None:
        """Add the second label where `raw` `[rows, 1]` is above `border`, else the first."""
        above = self.add("Greater", raw, self.weight(np.full(1, border, np.float32)))
        flat = self.add("Reshape", above, self.weight(np.array([-1])))
        one, zero = (self.weight(np.array([labels[place]])) for place in (1, 0))
        self.add("Where", flat, one, zero, out=out)


def class_labels(given: dict[str, Any]) -> list[Any]:
    """Labels among a classifier's attributes, whatever its exporter called them.

    Raises:
        ValueError: there are none.
    """
    for name in ("classlabels_int64s", "classlabels_ints", "classlabels_strings"):
        if given.get(name):
            return [v.decode() if isinstance(v, bytes) else v for v in given[name]]
    raise ValueError("a classifier without labels")


def raise_opset(model: ModelProto, domain: str, version: int) -> None:
    """Make `model`, in place, import at least `version` of `domain`."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    versions[domain] = max(version, versions.get(domain, 0))
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(d, v) for d, v in versions.items())


def is_float(model: ModelProto, tensor: str, rows: NDArray[Any]) -> bool:
    """Whether `tensor` is float32 when the model is run; ONNX infers no types behind a Scaler."""
    return values_at(model, tensor, rows[:1]).dtype == np.float32


def to_bytes(model: ModelProto) -> bytes:
    """Serialize with the numbers of nodes' attributes packed.

    onnx.proto does not declare AttributeProto's `ints` and `floats` packed, so every number costs
    a tag byte. Protocol Buffers parsers must accept both forms, so packing them here is lossless
    and saves one byte a number. Subgraphs are left as they are.
    """
    head = ModelProto()
    head.CopyFrom(model)
    head.ClearField("graph")
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    graph.ClearField("node")
    nodes = b"".join(_field(1, _packed_node(node)) for node in model.graph.node)
    return bytes(head.SerializeToString()) + _field(7, nodes + graph.SerializeToString())


def _packed_node(node: NodeProto) -> bytes:
    bare = NodeProto()
    bare.CopyFrom(node)
    bare.ClearField("attribute")
    data = bytes(bare.SerializeToString())
    for attribute in node.attribute:
        rest = onnx.AttributeProto()
        rest.CopyFrom(attribute)
        rest.ClearField("ints")
        rest.ClearField("floats")
        body = bytes(rest.SerializeToString())
        if attribute.ints:
            body += _field(8, b"".join(_varint(number) for number in attribute.ints))
        if attribute.floats:
            body += _field(7, np.array(attribute.floats, dtype="<f4").tobytes())
        data += _field(5, body)
    return data


def _field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1  # negative numbers take their two's complement
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
