"""What an ONNX file holds, read from a stream before ONNX Runtime sees it: weights that are no
numbers, data outside the file, operators that ONNX Runtime does not come with.

A reader of the wire format of Protocol Buffers (https://protobuf.dev/programming-guides/encoding/)
for the messages of onnx.proto that matter here. It keeps no weights, so that a model need not be in
memory twice, and needs no onnx package, which a worker does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.errors import BundleError, Refusal

#: Domains of the operators that ONNX Runtime comes with; "" is that of ONNX itself.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
#: Fields read of one file. A real graph has thousands; each costs a microsecond of Python.
MAX_FIELDS = 1_000_000
#: Graphs within graphs, such as bodies of loops.
MAX_DEPTH = 16
#: Longest text that is kept: names.
_MAX_TEXT = 4096
_PIECE = 1 << 20

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: Of TensorProto.DataType: bits of one element.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64,
    15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
_FLOATS: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
_FLOAT16, _BFLOAT16 = 10, 16
#: Fields of TensorProto that hold data.
_DATA = frozenset({4, 5, 6, 7, 9, 10, 11})
#: Fields that hold floats as they are, and of which types.
_FLOAT_FIELDS = {4: {1}, 9: {1, _FLOAT16, 11, _BFLOAT16}, 10: {11}}
_MAX_RANK = 8


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    #: Of a varint.
    value: int = 0
    #: Of bytes, and of the fixed widths: where they end.
    end: int = 0


class _Stream:
    """A file's bytes, taken in order.

    Raises:
        BundleError: they end early, or are no fields.
    """

    def __init__(self, name: str, chunks: Iterator[bytes]) -> None:
        self.name = name
        self.at = 0
        self._chunks = chunks
        self._chunk = b""
        self._place = 0
        self._fields = 0

    def take(self, count: int) -> bytes:
        """At least one of the next `count` bytes; empty at the end."""
        if self._place == len(self._chunk):
            self._chunk, self._place = next(self._chunks, b""), 0
        part = self._chunk[self._place : self._place + count]
        self._place += len(part)
        self.at += len(part)
        return part

    def pieces(self, end: int) -> Iterator[bytes]:
        while self.at < end:
            part = self.take(min(end - self.at, _PIECE))
            if not part:
                raise self.broken(f"it ends at byte {self.at}, within a field")
            yield part

    def text(self, end: int) -> str:
        if end - self.at > _MAX_TEXT:
            raise self.broken(f"a name has {end - self.at} bytes")
        return b"".join(self.pieces(end)).decode("utf-8", "replace")

    def fields(self, end: int | None) -> Iterator[_Field]:
        """The fields of a message that ends at `end`, or with the file. Of bytes, what the caller
        does not take is passed over."""
        while end is None or self.at < end:
            key = self._varint(at_end=end is None)
            if key is None:
                return
            self._count()
            number, wire = key >> 3, key & 7
            if wire == _VARINT:
                yield _Field(number, wire, value=self.varint())
            elif wire in {_BYTES, _FIXED32, _FIXED64}:
                size = self.varint() if wire == _BYTES else 4 if wire == _FIXED32 else 8
                stop = self.at + size
                if end is not None and stop > end:
                    raise self.broken(f"a field at byte {self.at} is longer than what holds it")
                yield _Field(number, wire, end=stop)
                for _ in self.pieces(stop):
                    pass
            else:
                raise self.broken(f"there is no field at byte {self.at}")
        if end is not None and self.at != end:
            raise self.broken(f"a message runs over its end at byte {end}")

    def varint(self) -> int:
        value = self._varint(at_end=False)
        assert value is not None
        return value

    def varints(self, end: int) -> Iterator[int]:
        while self.at < end:
            self._count()
            yield self.varint()

    def _count(self) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise BundleError(
                f"{self.name} has more than {MAX_FIELDS} fields: store weights as raw data",
                Refusal.MEMORY,
            )

    def _varint(self, *, at_end: bool) -> int | None:
        """The next number; None at the end of the file where `at_end` allows it."""
        value = shift = 0
        while True:
            part = self.take(1)
            if not part:
                if at_end and not shift:
                    return None
                raise self.broken(f"it ends at byte {self.at}, within a field")
            value |= (part[0] & 0x7F) << shift
            if part[0] < 0x80:
                return value & (1 << 64) - 1
            shift += 7
            if shift > 63:
                raise self.broken(f"there is no number at byte {self.at}")

    def broken(self, why: str) -> BundleError:
        return BundleError(
            f"ONNX Runtime does not load {self.name}: it is not ONNX, or is damaged: {why}",
            Refusal.NOT_ONNX,
        )


@dataclass
class _Finite:
    """Whether numbers that come in pieces are weights: all finite, or a mask of 0 and -inf."""

    masked: bool = False
    weighted: bool = False
    broken: bool = False
    _rest: bytes = b""

    def add(self, data: bytes, data_type: int) -> None:
        size = 2 if data_type == _BFLOAT16 else _FLOATS[data_type].itemsize
        data = self._rest + data if self._rest else data
        whole = len(data) - len(data) % size
        self._rest = data[whole:]
        if data_type == _BFLOAT16:
            # The upper half of a float32.
            values = np.frombuffer(data, dtype="<u2", count=whole // size).astype("<u4") << 16
            self._numbers(values.view("<f4"))
        else:
            self._numbers(np.frombuffer(data, dtype=_FLOATS[data_type], count=whole // size))

    def _numbers(self, values: NDArray[np.floating]) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            if not np.isneginf(values[~finite]).all():
                self.broken = True
            self.masked = True
            values = values[finite]
        self.weighted = self.weighted or bool(values.any())

    @property
    def sound(self) -> bool:
        return not self.broken and not (self.masked and self.weighted)


@dataclass
class _Found:
    #: Operators in use, by domain and name.
    operators: set[tuple[str, str]] = field(default_factory=set)
    #: Functions that the file itself defines of operators.
    functions: set[tuple[str, str]] = field(default_factory=set)
    has_graph: bool = False


def check_onnx(name: str, chunks: Iterator[bytes]) -> None:
    """Read an ONNX file to its end.

    A weight must be finite; -inf is let pass in a tensor of nothing but 0 and -inf, a mask.

    Args:
        name: for the message.
        chunks: the file's bytes, cut anywhere.

    Raises:
        BundleError: it is not ONNX, is cut short, has a weight that is no number, keeps data in
            another file, or uses an operator of a domain beyond `DOMAINS`.
    """
    stream = _Stream(name, chunks)
    found = _Found()
    for part in stream.fields(None):
        if part.wire != _BYTES:
            continue
        if part.number == 7:
            found.has_graph = True
            _graph(stream, part.end, found, 0)
        elif part.number == 25:
            _function(stream, part.end, found)
    if not found.has_graph:
        raise stream.broken("it has no graph")
    foreign = sorted(
        f"{domain}.{operator}"
        for domain, operator in found.operators - found.functions
        if domain not in DOMAINS
    )
    if foreign:
        raise BundleError(
            f"{name} uses operators that ONNX Runtime does not come with: {', '.join(foreign[:5])};"
            " export it without custom operators",
            Refusal.OPERATORS,
        )


def _graph(stream: _Stream, end: int, found: _Found, depth: int) -> None:
    """GraphProto: 1 node, 5 initializer, 15 sparse_initializer."""
    if depth > MAX_DEPTH:
        raise stream.broken(f"more than {MAX_DEPTH} graphs lie in each other")
    for part in stream.fields(end):
        if part.wire != _BYTES:
            continue
        if part.number == 1:
            _node(stream, part.end, found, depth)
        elif part.number == 5:
            _tensor(stream, part.end)
        elif part.number == 15:
            _sparse(stream, part.end)


def _node(stream: _Stream, end: int, found: _Found, depth: int) -> None:
    """NodeProto: 4 op_type, 5 attribute, 7 domain."""
    operator = domain = ""
    for part in stream.fields(end):
        if part.wire != _BYTES:
            continue
        if part.number == 4:
            operator = stream.text(part.end)
        elif part.number == 7:
            domain = stream.text(part.end)
        elif part.number == 5:
            _attribute(stream, part.end, found, depth)
    found.operators.add((domain, operator))


def _attribute(stream: _Stream, end: int, found: _Found, depth: int) -> None:
    """AttributeProto: 5 t, 10 tensors, 6 g, 11 graphs, 22 sparse_tensor, 23 sparse_tensors."""
    for part in stream.fields(end):
        if part.wire != _BYTES:
            continue
        if part.number in {5, 10}:
            _tensor(stream, part.end)
        elif part.number in {6, 11}:
            _graph(stream, part.end, found, depth + 1)
        elif part.number in {22, 23}:
            _sparse(stream, part.end)


def _function(stream: _Stream, end: int, found: _Found) -> None:
    """FunctionProto: 1 name, 7 node, 10 domain, 11 attribute_proto."""
    name = domain = ""
    for part in stream.fields(end):
        if part.wire != _BYTES:
            continue
        if part.number == 1:
            name = stream.text(part.end)
        elif part.number == 10:
            domain = stream.text(part.end)
        elif part.number == 7:
            _node(stream, part.end, found, 0)
        elif part.number == 11:
            _attribute(stream, part.end, found, 0)
    found.functions.add((domain, name))


def _sparse(stream: _Stream, end: int) -> None:
    """SparseTensorProto: 1 values, 2 indices."""
    for part in stream.fields(end):
        if part.wire == _BYTES and part.number in {1, 2}:
            _tensor(stream, part.end)


def _tensor(stream: _Stream, end: int) -> None:
    """TensorProto: 1 dims, 2 data_type, 8 name, 13 external_data, 14 data_location; data in one of
    4 float_data, 5 int32_data (float16 and bfloat16 too), 6 string_data, 7 int64_data, 9 raw_data,
    10 double_data, 11 uint64_data."""
    dims: list[int] = []
    data_type = stored = 0
    name = ""
    raw: int | None = None
    weights = _Finite()
    for part in stream.fields(end):
        if part.number == 1:
            dims += [part.value] if part.wire == _VARINT else stream.varints(part.end)
        elif part.number == 2 and part.wire == _VARINT:
            if stored:
                raise stream.broken(f"a tensor's type comes after its data, at byte {stream.at}")
            data_type = part.value
        elif part.number == 8 and part.wire == _BYTES:
            name = stream.text(part.end)
        elif part.number == 13 or (part.number == 14 and part.value):
            raise BundleError(
                f"{stream.name} keeps data in another file; a bundle's graph has all of it inside:"
                " save it without external data",
                Refusal.EXTERNAL_DATA,
            )
        elif part.number in _DATA:
            size = max(1, part.end - stream.at)
            stored += size
            raw = size if part.number == 9 else raw
            _numbers(stream, part, data_type, weights)
    where = f"{stream.name}: the tensor {name[:200]!r}"
    elements = math.prod(dims) if len(dims) <= _MAX_RANK else math.inf
    bits = _BITS.get(data_type, 1)
    # Whichever field it is, four elements of 2 bits are the most that a byte holds.
    if elements > 4 * stored or (raw is not None and raw != max(1, (elements * bits + 7) // 8)):
        raise BundleError(
            f"{where} of shape {dims[:_MAX_RANK]} has {stored} bytes: it is damaged, or would"
            " unpack to more than it is",
            Refusal.NOT_ONNX,
        )
    if not weights.sound:
        raise BundleError(
            f"{where} has weights that are not all finite (NaN or infinite): training diverged, or"
            " a scale overflowed in compression",
            Refusal.WEIGHTS,
        )


def _numbers(stream: _Stream, part: _Field, data_type: int, weights: _Finite) -> None:
    """The data of a tensor of floats, in whichever field it lies."""
    if part.number == 5 and data_type in {_FLOAT16, _BFLOAT16}:
        # Each as the number that its 16 bits are.
        packed = stream.varints(part.end) if part.wire == _BYTES else [part.value]
        bits = np.fromiter((value & 0xFFFF for value in packed), dtype="<u2")
        weights.add(bits.tobytes(), data_type)
    elif part.wire != _VARINT and data_type in _FLOAT_FIELDS.get(part.number, ()):
        for piece in stream.pieces(part.end):
            weights.add(piece, data_type)
