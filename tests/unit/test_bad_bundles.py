"""Each way in which a bundle can be bad is refused with a reason of its own, in words that name the
problem, and leaves nothing behind."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, external_data_helper, helper, load_model, numpy_helper

from tests.conftest import ITEMS, tiny_bundle, tiny_model
from worker.bundle import open_bundle
from worker.bundle_checks import check_bundle
from worker.bundle_files import MAX_FILE_BYTES, BundleFiles
from worker.errors import BundleError, Refusal
from worker.manifest import MANIFEST_FILE, Manifest, decode_manifest
from worker.metrics import resident_bytes
from worker.session import load_session
from worker.weights import MAX_DEPTH, check_onnx


def manifest_of(bundle: Path) -> dict[str, object]:
    read: dict[str, object] = json.loads((bundle / MANIFEST_FILE).read_text())
    return read


def rewrite(bundle: Path, **changes: object) -> None:
    (bundle / MANIFEST_FILE).write_text(json.dumps({**manifest_of(bundle), **changes}))


def put(bundle: Path, name: str, data: bytes) -> None:
    """A file whose checksum and size are right: only its content is bad."""
    (bundle / name).write_bytes(data)
    listing = decode_manifest((bundle / MANIFEST_FILE).read_bytes(), "").files
    files = {own: {"sha256": spec.sha256, "bytes": spec.bytes} for own, spec in listing.items()}
    files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(bundle, files=files)


def listed(bundle: Path, name: str, size: int) -> None:
    files = manifest_of(bundle)["files"]
    assert isinstance(files, dict)
    rewrite(bundle, files={**files, name: {"sha256": "0" * 64, "bytes": size}})


def edited(change: Callable[[ModelProto], None]) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        model = load_model(bundle / "model.onnx")
        change(model)
        put(bundle, "model.onnx", model.SerializeToString())

    return damage


def weight(value: float, dtype: type = np.float32) -> Callable[[ModelProto], None]:
    """One number of an added weight is `value`."""

    def change(model: ModelProto) -> None:
        values = np.ones((7, 3), dtype=dtype)
        values[3, 1] = value
        model.graph.initializer.append(numpy_helper.from_array(values, "scale"))

    return change


def bfloat16(model: ModelProto) -> None:
    raw = np.array([0x3F80, 0x7FC0], dtype=np.uint16).tobytes()
    model.graph.initializer.append(
        helper.make_tensor("scale", TensorProto.BFLOAT16, [2], raw, raw=True)
    )


def half_as_integers(model: ModelProto) -> None:
    tensor = TensorProto(name="scale", data_type=TensorProto.FLOAT16, dims=[2])
    tensor.int32_data.extend([0x3C00, 0x7C00])
    model.graph.initializer.append(tensor)


def as_numbers(model: ModelProto) -> None:
    model.graph.initializer.append(
        helper.make_tensor("scale", TensorProto.FLOAT, [2], [1.0, float("nan")])
    )


def in_a_constant(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.array([np.nan], dtype=np.float32))
    model.graph.node.append(helper.make_node("Constant", [], ["scale"], value=values))


def in_a_branch(model: ModelProto) -> None:
    inner = helper.make_graph(
        [], "inner", [], [], [numpy_helper.from_array(np.array([np.inf]), "scale")]
    )
    model.graph.node.append(
        helper.make_node("If", ["k"], ["y"], then_branch=inner, else_branch=inner)
    )


def in_a_function(model: ModelProto) -> None:
    node = helper.make_node("Evil", ["x"], ["y"], domain="acme")
    model.functions.append(
        helper.make_function("acme", "F", ["x"], ["y"], [node], [helper.make_opsetid("acme", 1)])
    )


def external(model: ModelProto, location: str) -> None:
    tensor = model.graph.initializer[0]
    external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")


def custom(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Own", ["k"], ["y"], domain="acme.ops"))


def nested(model: ModelProto) -> None:
    graph = helper.make_graph([], "g", [], [])
    for _ in range(MAX_DEPTH + 2):
        node = helper.make_node("If", ["k"], [], then_branch=graph)
        graph = helper.make_graph([node], "g", [], [])
    model.graph.node.extend(graph.node)


def unpacking(model: ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(2, dtype=np.float32), "bomb")
    tensor.dims[:] = [1 << 40]
    model.graph.initializer.append(tensor)


def empty_of_strings(model: ModelProto) -> None:
    model.graph.initializer.append(
        TensorProto(name="bomb", data_type=TensorProto.STRING, dims=[1 << 40])
    )


def renamed_input(model: ModelProto) -> None:
    model.graph.input[1].name = "top"
    model.graph.node[3].input[1] = "top"


def integer_scores(model: ModelProto) -> None:
    model.graph.node[3].output[0] = "raw"
    model.graph.node.append(helper.make_node("Cast", ["raw"], ["scores"], to=TensorProto.INT64))
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64


def swapped_items(model: ModelProto) -> None:
    """Scores of another item order: what an items.txt that is off by one comes to."""
    scorer = next(one for one in model.graph.initializer if one.name == "scorer")
    rolled = np.roll(numpy_helper.to_array(scorer), 1, axis=1)
    scorer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rolled), "scorer"))


def items(*ids: str) -> Callable[[Path], None]:
    return lambda bundle: put(bundle, "items.txt", lines(*ids))


def model(data: bytes) -> Callable[[Path], None]:
    return lambda bundle: put(bundle, "model.onnx", data)


def lines(*items: str) -> bytes:
    return "".join(f"{item}\n" for item in items).encode()


def link_to(target: str, name: str = "items.txt") -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        (bundle / name).replace(bundle.parent / "outside")
        (bundle / name).symlink_to(target)

    return damage


def linked_directory(bundle: Path) -> None:
    (bundle.parent / "away").mkdir()
    (bundle / "more").symlink_to(bundle.parent / "away")
    listed(bundle, "more", 0)


def link_inside(bundle: Path) -> None:
    (bundle / "copy.onnx").symlink_to("model.onnx")
    listed(bundle, "copy.onnx", (bundle / "model.onnx").stat().st_size)


def fifo(bundle: Path) -> None:
    (bundle / "items.txt").unlink()
    os.mkfifo(bundle / "items.txt")


def directory(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").mkdir()


def cut(bundle: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(data[:-10])


def cut_and_listed(bundle: Path) -> None:
    put(bundle, "model.onnx", (bundle / "model.onnx").read_bytes()[:-10])


def flipped(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (bundle / "model.onnx").write_bytes(bytes(data))


def huge_manifest(bundle: Path) -> None:
    with (bundle / MANIFEST_FILE).open("ab") as file:
        file.truncate(100 << 20)


def ragged_golden(bundle: Path) -> None:
    golden = {"history": [[1, 2], [3]], "k": 1, "items": [[1], [2]], "scores": [[1.0], [2.0]]}
    rewrite(bundle, golden=[golden])


BAD: list[tuple[Refusal, str, Callable[[Path], None]]] = [
    (Refusal.MISSING, "manifest.json is missing", lambda b: (b / MANIFEST_FILE).unlink()),
    (Refusal.MISSING, "model.onnx is missing", lambda b: (b / "model.onnx").unlink()),
    (Refusal.MANIFEST, "not a manifest", lambda b: (b / MANIFEST_FILE).write_bytes(b"{")),
    (Refusal.MANIFEST, "not a manifest", lambda b: (b / MANIFEST_FILE).write_bytes(b"[" * 99_999)),
    (Refusal.MANIFEST, "not a manifest", lambda b: rewrite(b, item_count="many")),
    (Refusal.MANIFEST, "max_length 999999", lambda b: rewrite(b, max_length=999_999)),
    (Refusal.MANIFEST, "golden_tolerance", lambda b: rewrite(b, golden_tolerance=-1.0)),
    (Refusal.FORMAT, "format_version 2", lambda b: rewrite(b, format_version=2)),
    (Refusal.IDENTITY, "version '../v1'", lambda b: rewrite(b, version="../v1")),
    (Refusal.IDENTITY, r"name 'a\\nb'", lambda b: rewrite(b, name="a\nb")),
    (Refusal.IDENTITY, "unknown surface", lambda b: rewrite(b, surface="mail")),
    (Refusal.PATH, "'../secret' is not a plain name", lambda b: listed(b, "../secret", 1)),
    (Refusal.PATH, "'/etc/passwd' is not a plain", lambda b: listed(b, "/etc/passwd", 1)),
    (Refusal.PATH, "not a plain name", lambda b: listed(b, "..\\secret", 1)),
    (Refusal.PATH, "not a plain name", lambda b: listed(b, "a\0b", 1)),
    (Refusal.PATH, "items.txt is no plain file", fifo),
    (Refusal.PATH, "model.onnx is no plain file", directory),
    (Refusal.SYMLINK, "items.txt is a link", link_to("../outside")),
    (Refusal.SYMLINK, "manifest.json is a link", link_to("../outside", MANIFEST_FILE)),
    (Refusal.SYMLINK, "items.txt is a link", link_to("/dev/zero")),
    (Refusal.SYMLINK, "more is a link", linked_directory),
    (Refusal.SYMLINK, "copy.onnx is a link", link_inside),
    (Refusal.FILES, "model.onnx has .* the manifest says", cut),
    (Refusal.FILES, "not listed .*extra", lambda b: (b / "extra").write_bytes(b"")),
    (Refusal.FILES, "lists no model.onnx", lambda b: rewrite(b, files={})),
    (Refusal.CHECKSUM, "not the file that was published", flipped),
    (Refusal.MEMORY, "manifest.json has more than", huge_manifest),
    (Refusal.MEMORY, "at most 2147483647", lambda b: listed(b, "model.onnx", 1 << 40)),
    (Refusal.MEMORY, "at most 2147483647", lambda b: listed(b, "model.onnx", -1)),
    (Refusal.NOT_ONNX, "does not load model.onnx", model(b"not onnx")),
    (Refusal.NOT_ONNX, "has no graph", model(b"")),
    (Refusal.NOT_ONNX, "longer than what holds it|ends at byte", cut_and_listed),
    (Refusal.NOT_ONNX, "lie in each other", edited(nested)),
    (Refusal.NOT_ONNX, "'bomb' of shape", edited(unpacking)),
    (Refusal.NOT_ONNX, "'bomb' of shape", edited(empty_of_strings)),
    (Refusal.EXTERNAL_DATA, "in another file", edited(lambda m: external(m, "../../secret"))),
    (Refusal.EXTERNAL_DATA, "in another file", edited(lambda m: external(m, "items.txt"))),
    (Refusal.OPERATORS, "acme.ops.Own", edited(custom)),
    (Refusal.OPERATORS, "acme.Evil", edited(in_a_function)),
    (Refusal.WEIGHTS, "'scale' has weights", edited(weight(np.nan))),
    (Refusal.WEIGHTS, "'scale' has weights", edited(weight(np.inf))),
    (Refusal.WEIGHTS, "'scale' has weights", edited(weight(-np.inf))),
    (Refusal.WEIGHTS, "'scale' has weights", edited(weight(np.nan, np.float16))),
    (Refusal.WEIGHTS, "'scale' has weights", edited(weight(np.nan, np.float64))),
    (Refusal.WEIGHTS, "'scale' has weights", edited(bfloat16)),
    (Refusal.WEIGHTS, "'scale' has weights", edited(half_as_integers)),
    (Refusal.WEIGHTS, "'scale' has weights", edited(as_numbers)),
    (Refusal.WEIGHTS, "has weights", edited(in_a_constant)),
    (Refusal.WEIGHTS, "'scale' has weights", edited(in_a_branch)),
    (Refusal.CONTRACT, "has no input 'k'", edited(renamed_input)),
    (Refusal.CONTRACT, r"scores is tensor\(int64\)", edited(integer_scores)),
    (Refusal.CONTRACT, "the contract is", lambda b: rewrite(b, outputs=[])),
    (Refusal.CONTRACT, "fails on a history", model(tiny_model(length=9))),
    (Refusal.ITEMS, "line 40: 'item-1' comes", items(*ITEMS[:39], "item-1")),
    (Refusal.ITEMS, "line 40: .* this one 0", items(*ITEMS[:39], "")),
    (Refusal.ITEMS, "this one 70000", lambda b: put(b, "items.txt", b"x" * 70_000)),
    (Refusal.ITEMS, "not UTF-8", lambda b: put(b, "items.txt", b"\xff\n")),
    (Refusal.ITEMS, "carriage return", lambda b: put(b, "items.txt", b"one\r\ntwo\r\n")),
    (Refusal.ITEMS, "item_count is 40", items(*ITEMS[1:])),
    (Refusal.ITEMS, "item_count is 40", items(*ITEMS, "one")),
    (Refusal.ITEMS, "the catalogue has 1 to 40", model(tiny_model(items=41))),
    (Refusal.GOLDEN, "the manifest allows 0.001", model(tiny_model(seed=1))),
    (Refusal.GOLDEN, "golden", edited(swapped_items)),
    (Refusal.GOLDEN, "not tensors", ragged_golden),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "message", "damage"), BAD, ids=[f"{one[0]}-{n}" for n, one in enumerate(BAD)]
)
def test_a_bad_bundle_is_refused_with_its_reason_and_nothing_is_left_behind(
    tmp_path: Path, reason: Refusal, message: str, damage: Callable[[Path], None]
) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    damage(bundle)
    before = contents(tmp_path)
    descriptors, threads = open_files(), threading.active_count()
    with pytest.raises(BundleError, match=message) as refused:
        open_bundle(bundle)
    assert refused.value.reason is reason
    assert str(bundle) in str(refused.value)
    assert contents(tmp_path) == before
    assert (open_files(), threading.active_count()) == (descriptors, threads)
    assert reason in {finding.check for finding in check_bundle(bundle)}


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that is there."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.rglob("*")
    }


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_every_reason_of_a_bad_bundle_is_among_these() -> None:
    elsewhere = {Refusal.SIGNATURE, Refusal.OTHER}  # test_signing.py; not about a bundle
    assert {reason for reason, _, _ in BAD} == set(Refusal) - elsewhere


def test_a_mask_of_minus_infinity_is_no_bad_weight(tmp_path: Path) -> None:
    def masked(model: ModelProto) -> None:
        mask = np.triu(np.full((8, 8), -np.inf, dtype=np.float32), 1)
        model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))

    bundle = tiny_bundle(tmp_path / "v1")
    edited(masked)(bundle)
    assert open_bundle(bundle).index["item-40"] == 40


def test_a_function_that_the_file_defines_is_no_foreign_operator(tmp_path: Path) -> None:
    def with_function(model: ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("own", 1))
        node = helper.make_node("Identity", ["x"], ["y"])
        model.functions.append(
            helper.make_function("own", "Same", ["x"], ["y"], [node], [helper.make_opsetid("", 18)])
        )
        model.graph.node[3].output[0] = "raw"
        model.graph.node.append(helper.make_node("Same", ["raw"], ["scores"], domain="own"))

    bundle = tiny_bundle(tmp_path / "v1")
    edited(with_function)(bundle)
    assert open_bundle(bundle).index["item-40"] == 40


def test_a_bundle_that_needs_more_memory_than_allowed_is_refused_before_its_files_are_read(
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    flipped(bundle)
    with pytest.raises(BundleError, match=r"about 17 MB and 1 MB are free") as refused:
        open_bundle(bundle, memory_budget_bytes=1_000_000)
    assert refused.value.reason is Refusal.MEMORY
    with pytest.raises(BundleError) as refused:
        open_bundle(bundle, memory_budget_bytes=1 << 30)
    assert refused.value.reason is Refusal.CHECKSUM


def test_a_graph_of_few_bytes_is_not_unpacked_to_gigabytes_while_it_loads(tmp_path: Path) -> None:
    def bomb(model: ModelProto) -> None:
        shape = numpy_helper.from_array(np.array([1 << 14, 1 << 14]), "shape")
        model.graph.initializer.append(shape)
        model.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["bomb"]))
        model.graph.output.append(
            helper.make_tensor_value_info("bomb", TensorProto.FLOAT, ["a", "b"])
        )

    model = ModelProto.FromString(tiny_model())
    bomb(model)
    data = model.SerializeToString()
    before = resident_bytes()
    session = load_session("model.onnx", iter([data]), 1, file_bytes=len(data))
    assert resident_bytes() - before < 256 << 20  # unpacked, it has 1 GiB
    assert len(session.get_outputs()) == 3


def specs(bundle: Path) -> Manifest:
    return decode_manifest((bundle / MANIFEST_FILE).read_bytes(), "")


def test_a_file_that_changes_after_its_checksum_was_compared_is_not_used(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    spec = specs(bundle).files["model.onnx"]
    with BundleFiles(bundle) as files:
        for _ in files.chunks("model.onnx", spec, verify=True):
            pass
        (bundle / "model.onnx").write_bytes(tiny_model(seed=1))
        with pytest.raises(BundleError) as refused:
            load_session(
                "model.onnx",
                files.chunks("model.onnx", spec, verify=True),
                1,
                file_bytes=spec.bytes,
            )
    assert refused.value.reason is Refusal.CHECKSUM


def test_a_file_that_is_replaced_after_it_was_checked_is_not_seen(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    spec = specs(bundle).files["items.txt"]
    with BundleFiles(bundle) as files:
        files.check_listing(specs(bundle))
        (tmp_path / "other").write_bytes(b"forged\n" * 40)
        (tmp_path / "other").replace(bundle / "items.txt")
        read = b"".join(files.chunks("items.txt", spec, verify=True))
    assert read == lines(*ITEMS)


@pytest.mark.parametrize("size", [MAX_FILE_BYTES + 1, 1 << 62])
def test_a_size_beyond_all_limits_is_refused_by_the_listing_alone(
    tmp_path: Path, size: int
) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    listed(bundle, "items.txt", size)
    with BundleFiles(bundle) as files, pytest.raises(BundleError, match="make the model smaller"):
        files.check_listing(specs(bundle))


def test_onnx_is_read_alike_however_the_stream_is_cut() -> None:
    model = ModelProto.FromString(tiny_model())
    weight(np.nan)(model)
    data = model.SerializeToString()
    for size in (1, 3, 7, len(data)):
        pieces = (data[at : at + size] for at in range(0, len(data), size))
        with pytest.raises(BundleError, match="'scale' has weights"):
            check_onnx("model.onnx", pieces)


@settings(max_examples=200)
@given(data=st.data())
def test_no_damage_to_a_graph_makes_its_reader_fail_otherwise_than_by_refusing(
    data: st.DataObject,
) -> None:
    graph = bytearray(tiny_model())
    for _ in range(data.draw(st.integers(1, 4))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    del graph[data.draw(st.integers(1, len(graph))) :]
    with suppress(BundleError):
        check_onnx("model.onnx", iter([bytes(graph)]))
