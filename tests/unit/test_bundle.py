"""A bundle keeps the contract, or is refused with words that say what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ITEMS, tiny_bundle, tiny_model
from worker.bundle import MANIFEST_FILE, check_bundle, open_bundle, read_manifest
from worker.errors import BundleError
from worker.registry import find, promote, serving_version, versions


def rewrite(bundle: Path, **changes: object) -> None:
    file = bundle / MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_sound_bundle_scores_the_whole_catalogue(tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle(tmp_path / "v1"))
    items, scores = bundle.score(np.array([[0] * 7 + [3]] * 5), len(ITEMS))
    assert items.shape == scores.shape == (5, len(ITEMS))
    assert sorted(items[0].tolist()) == list(range(1, len(ITEMS) + 1))
    assert bundle.index["item-1"] == 1
    assert not check_bundle(bundle.path)


def unlisted(bundle: Path) -> None:
    (bundle / "extra.bin").write_bytes(b"x")


def truncated(bundle: Path) -> None:
    model = bundle / "model.onnx"
    model.write_bytes(model.read_bytes()[:-10])


def flipped(bundle: Path) -> None:
    model = bundle / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 0xFF
    model.write_bytes(bytes(data))


def linked(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    (bundle / "items.txt").replace(outside)
    (bundle / "items.txt").symlink_to(outside)


def no_manifest(bundle: Path) -> None:
    (bundle / MANIFEST_FILE).unlink()


def escaping(bundle: Path) -> None:
    files = read_manifest(bundle).files
    listing = {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in files.items()}
    rewrite(bundle, files={**listing, "../../secret": {"sha256": "0", "bytes": 1}})


def spoiled_golden(bundle: Path) -> None:
    golden = json.loads((bundle / MANIFEST_FILE).read_text())["golden"]
    golden[0]["scores"][0][0] += 1.0
    rewrite(bundle, golden=golden)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unlisted, "not listed in the manifest: extra.bin"),
        (truncated, "the manifest says"),
        (flipped, "not the file that was published"),
        (linked, "is a link out of the bundle"),
        (no_manifest, "was not written to the end"),
        (escaping, "not a plain name"),
        (spoiled_golden, "differ from the golden ones"),
        (lambda b: rewrite(b, format_version=9), "format_version 9"),
        (lambda b: rewrite(b, item_count=7), "item_count is 7"),
        (lambda b: rewrite(b, max_length=9), "fails on a history"),
        (lambda b: rewrite(b, surface="mail"), "unknown surface"),
        (lambda b: rewrite(b, inputs=[]), "the contract is history int64"),
    ],
)
def test_each_damage_has_its_own_words(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)
    assert any(message in finding.message for finding in check_bundle(bundle))


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


def test_the_newest_version_serves_until_one_is_promoted(tmp_path: Path) -> None:
    for version in ("20260101T0000Z-fp32", "20260102T0000Z-int8"):
        tiny_bundle(tmp_path / "posts" / version)
    assert serving_version(tmp_path, "posts") == "20260102T0000Z-int8"
    promote(tmp_path, "posts", "20260101T0000Z-fp32")
    assert serving_version(tmp_path, "posts") == "20260101T0000Z-fp32"
    assert serving_version(tmp_path, "posts", "20260102T0000Z-int8") == "20260102T0000Z-int8"


def test_a_version_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "posts" / "v1")
    with pytest.raises(BundleError, match="it has v1"):
        find(tmp_path, "posts", "v2")
    with pytest.raises(BundleError, match="plain directory name"):
        versions(tmp_path, "../posts")


def test_the_shipped_bundles_pass_their_own_checks() -> None:
    shipped = Path(__file__).parents[2] / "models" / "shipped"
    for name in ("posts", "posts-recurrent"):
        assert versions(shipped, name)
        for version in versions(shipped, name):
            assert check_bundle(find(shipped, name, version)) == []
