"""A bundle keeps the contract, or is refused with words that say what is wrong."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from tests.conftest import ITEMS, tiny_bundle, tiny_model
from worker.bundle import open_bundle
from worker.bundle_checks import check_bundle
from worker.bundle_files import read_manifest
from worker.errors import BundleError, Refusal
from worker.manifest import MANIFEST_FILE
from worker.registry import LocalRegistry


def test_a_sound_bundle_scores_the_whole_catalogue(tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(tmp_path / "v1"))
    items, scores = bundle.score(np.array([[0] * 7 + [3]] * 5), len(ITEMS))
    assert items.shape == scores.shape == (5, len(ITEMS))
    assert sorted(items[0].tolist()) == list(range(1, len(ITEMS) + 1))
    assert bundle.index["item-1"] == 1
    assert not check_bundle(bundle.path)


def test_item_ids_are_shared_with_an_open_bundle_of_the_same_ids(tmp_path: Path) -> None:
    first = open_bundle(tiny_bundle(tmp_path / "v1"))
    second = open_bundle(tiny_bundle(tmp_path / "v2", seed=1), beside=[first])
    assert second.items is first.items
    assert second.index is first.index
    swapped = ("item-2", "item-1", *ITEMS[2:])
    other = open_bundle(tiny_bundle(tmp_path / "v3", items=swapped), beside=[first, second])
    assert other.items == swapped
    assert other.index == {item: number for number, item in enumerate(swapped, start=1)}


def failing_beyond(rows: int) -> bytes:
    """A model that runs for fewer than `rows` histories at once."""
    model = ModelProto.FromString(tiny_model())
    graph, node = model.graph, helper.make_node
    # A table of `rows` zeros is asked for the row of the batch size.
    graph.initializer.append(numpy_helper.from_array(np.zeros(rows, dtype=np.float32), "sizes"))
    graph.initializer.append(numpy_helper.from_array(np.array(0), "first"))
    graph.node.extend(
        [
            node("Shape", ["history"], ["shape"]),
            node("Gather", ["shape", "first"], ["size"]),
            node("Gather", ["sizes", "size"], ["nothing"]),
            node("Add", ["untouched", "nothing"], ["scores"]),
        ]
    )
    next(one for one in graph.node if one.op_type == "TopK").output[0] = "untouched"
    return bytes(model.SerializeToString())


def test_a_model_that_fails_on_a_full_batch_is_refused(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "v1", model=failing_beyond(64))
    open_bundle(path, warmup_batches=(1, 32))
    with pytest.raises(BundleError, match="fails on batches of") as refused:
        open_bundle(path, warmup_batches=(1, 64))
    assert refused.value.reason is Refusal.CONTRACT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": b"not onnx"}, "does not load"),
        ({"items": ITEMS[:-1]}, "the catalogue has 1 to 39"),
        ({"items": (*ITEMS, "one more")}, "fails on a history"),
        ({"items": (*ITEMS[:-1], ITEMS[0])}, "comes twice"),
        ({"items": (*ITEMS[:-1], "")}, "1 to 256 characters"),
        ({"model": tiny_model(length=9)}, "fails on a history"),
    ],
)
def test_a_broken_bundle_is_never_written(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        tiny_bundle(tmp_path / "v1", golden_histories=None, **changes)
    assert list(tmp_path.iterdir()) == []


@given(data=st.binary(max_size=200))
def test_no_bytes_as_manifest_crash_the_reader(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("bundle")
    (directory / MANIFEST_FILE).write_bytes(data)
    with pytest.raises(BundleError):
        read_manifest(directory)


def test_the_shipped_bundles_pass_their_own_checks() -> None:
    shipped = LocalRegistry(Path(__file__).parents[2] / "models" / "shipped")
    for name in ("posts", "posts-recurrent"):
        assert shipped.versions(name)
        for version in shipped.versions(name):
            assert check_bundle(shipped.path(name, version)) == []
