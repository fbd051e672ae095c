"""Publishing: whole or not at all, never overwritten; what differs; the commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from models.diff import diff_bundles
from models.provenance import REQUIRED, commit, missing_provenance, provenance
from models.publish import RefusedError, publish
from models.stores import LocalStore, RemoteStore, Store, VersionExistsError, open_store
from tests.conftest import ITEMS, tiny_bundle, tiny_model
from tests.unit.faulty_store import FaultyFileSystem, Killed
from worker.bundle import open_bundle
from worker.bundle_checks import check_bundle
from worker.bundle_files import read_manifest
from worker.cli import main
from worker.errors import BundleError, ExtraMissingError, StoreError
from worker.manifest import MANIFEST_FILE, MODEL_FILE
from worker.registry import LocalRegistry

SHIPPED = Path(__file__).parents[2] / "models" / "shipped" / "posts"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "made" / "v1")


def streamrec(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


# Publishing


def test_a_published_bundle_is_the_one_that_was_made(store: Store, bundle: Path) -> None:
    assert publish(bundle, store).written
    assert (store.names(), store.versions("posts")) == (["posts"], ["v1"])
    copy = store.path("posts", "v1")
    assert check_bundle(copy) == []
    assert read_manifest(copy) == read_manifest(bundle)


def test_publishing_the_same_again_changes_nothing(store: Store, bundle: Path) -> None:
    publish(bundle, store)
    assert not publish(bundle, store).written


def test_a_version_is_never_overwritten(store: Store, bundle: Path, tmp_path: Path) -> None:
    publish(bundle, store)
    other = tiny_bundle(tmp_path / "other" / "v1", seed=1)
    with pytest.raises(VersionExistsError, match="other content"):
        publish(other, store)
    assert store.manifest("posts", "v1") == read_manifest(bundle)
    store.verify("posts", "v1", read_manifest(bundle))


def test_the_same_version_spoiled_in_the_store_is_not_taken_for_whole(
    remote: RemoteStore, files: FaultyFileSystem, bundle: Path
) -> None:
    publish(bundle, remote)
    files.pipe_file("/models/posts/v1/items.txt", b"x")
    with pytest.raises(BundleError, match=r"items\.txt has 1 bytes"):
        publish(bundle, remote)


def test_a_broken_bundle_is_refused_with_every_reason_and_nothing_is_written(
    store: Store, bundle: Path, tmp_path: Path
) -> None:
    file = bundle / MANIFEST_FILE
    manifest = json.loads(file.read_text())
    manifest["golden"][0]["scores"][0][0] += 1.0
    file.write_text(json.dumps({**manifest, "item_count": 7}))
    with pytest.raises(RefusedError) as refusal:
        publish(bundle, store)
    assert {"items", "golden"} <= {finding.check for finding in refusal.value.findings}
    assert not (tmp_path / "registry").exists()
    assert not FaultyFileSystem.store


@pytest.mark.parametrize("leaves_half", [False, True])
def test_a_reader_never_sees_half_an_upload_and_a_retry_completes_it(
    files: FaultyFileSystem, remote: RemoteStore, bundle: Path, leaves_half: bool
) -> None:
    files.leaves_half = leaves_half
    publish(bundle, remote)
    assert files.changes == 3  # the model, the items, the manifest
    for step in range(1, 4):
        files.store.clear()
        files.changes, files.dies_at = 0, step
        with pytest.raises(Killed):
            publish(bundle, remote)
        # Only a manifest that the store itself keeps half of can be listed, and it opens nothing.
        if remote.versions("posts"):
            assert leaves_half
            with pytest.raises(BundleError, match="not a manifest"):
                remote.path("posts", "v1")
        files.dies_at = None
        assert publish(bundle, remote).written
        assert check_bundle(remote.path("posts", "v1")) == []


@pytest.mark.parametrize("step", range(1, 4))
def test_a_local_publisher_killed_at_any_step_leaves_no_version(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from models import stores

    store, calls, write = LocalStore(tmp_path / "registry"), 0, stores.write_durably

    def dying(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        write(path, data[: len(data) // 2])
        if calls == step:
            raise Killed
        write(path, data)

    # A killed process cleans nothing up.
    monkeypatch.setattr(stores, "write_durably", dying)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        publish(bundle, store)
    assert (store.names(), store.versions("posts")) == ([], [])
    monkeypatch.undo()
    assert publish(bundle, store).written
    assert store.versions("posts") == ["v1"]


def test_what_an_interrupted_upload_left_is_cleared_away(
    files: FaultyFileSystem, remote: RemoteStore, bundle: Path
) -> None:
    files.pipe_file("/models/posts/v1/extra.bin", b"left")
    publish(bundle, remote)
    assert not files.exists("/models/posts/v1/extra.bin")


def test_an_upload_that_arrives_damaged_never_gets_a_manifest(
    files: FaultyFileSystem, remote: RemoteStore, bundle: Path
) -> None:
    files.flips_bytes = True
    with pytest.raises(BundleError, match="not the file that was published"):
        publish(bundle, remote)
    assert remote.versions("posts") == []


def test_of_two_publishers_at_once_the_later_is_refused(
    files: FaultyFileSystem, remote: RemoteStore, bundle: Path, tmp_path: Path
) -> None:
    other = tiny_bundle(tmp_path / "other" / "v1", seed=1)
    create = files.pipe_file

    def after_the_other(path: str, value: bytes, mode: str = "overwrite") -> None:
        files.pipe_file = create  # type: ignore[method-assign]
        publish(other, remote)
        create(path, value, mode=mode)

    files.pipe_file = after_the_other  # type: ignore[assignment, method-assign]
    with pytest.raises(VersionExistsError, match="by another at the same time"):
        publish(bundle, remote)
    copy = remote.path("posts", "v1")
    assert read_manifest(copy) == read_manifest(other)
    assert check_bundle(copy) == []


def test_of_two_local_publishers_at_once_the_later_is_refused(tmp_path: Path, bundle: Path) -> None:
    store = LocalStore(tmp_path / "registry")
    publish(bundle, store)
    with pytest.raises(VersionExistsError, match="exists"):
        store.write(
            "posts", "v1", {f: bundle / f for f in read_manifest(bundle).files},
            (bundle / MANIFEST_FILE).read_bytes(),
        )  # fmt: skip
    assert sorted(entry.name for entry in (tmp_path / "registry" / "posts").iterdir()) == ["v1"]


def test_a_renamed_bundle_says_what_it_was_called(store: Store, bundle: Path) -> None:
    publish(bundle, store, name="feed")
    publish(store.path("feed", "v1"), store, version="v2")
    manifest = store.manifest("feed", "v2")
    assert manifest.provenance["renamed_from"] == "feed@v1, posts@v1"
    assert check_bundle(store.path("feed", "v2")) == []


@pytest.mark.parametrize("name", ["a b", "a@b", "../x", ".x", "x" * 129, "a/b", "a\nb"])
def test_a_name_that_fits_no_place_is_refused(store: Store, bundle: Path, name: str) -> None:
    with pytest.raises(BundleError, match="--name"):
        publish(bundle, store, name=name)


def test_a_version_copied_by_hand_to_another_place_is_told(tmp_path: Path, bundle: Path) -> None:
    shutil.copytree(bundle, tmp_path / "registry" / "posts" / "v9")
    with pytest.raises(BundleError, match="says that it is posts@v1"):
        LocalStore(tmp_path / "registry").manifest("posts", "v9")


# Stores


def test_a_file_url_is_the_directory_that_it_names(tmp_path: Path, bundle: Path) -> None:
    publish(bundle, open_store(f"file://{tmp_path}/registry", tmp_path / "mirror"))
    assert LocalStore(tmp_path / "registry").versions("posts") == ["v1"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [("s3fs", "pip install s3fs"), ("fsspec.core", r"pip install 'streamrec\[remote\]'")],
)
def test_a_missing_driver_is_named_with_its_pip_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ExtraMissingError, match=message):
        open_store("s3://bucket/models", tmp_path)


def test_an_unknown_kind_of_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nope://x is no store"):
        open_store("nope://x", tmp_path)


def test_what_a_driver_raises_becomes_one_line(
    files: FaultyFileSystem, remote: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied\nRequestId: 1")

    monkeypatch.setattr(files, "find", refused)
    with pytest.raises(StoreError, match=r"memory://models .*Access Denied; check") as error:
        remote.names()
    assert "\n" not in str(error.value)


# Provenance


def test_provenance_has_all_that_a_published_manifest_should(tmp_path: Path) -> None:
    made = provenance("clicks", "ab12", seed="7")
    assert set(made) == {*REQUIRED, "seed"}
    assert missing_provenance(read_manifest(tiny_bundle(tmp_path / "v1", provenance=made))) == []


def test_publishing_warns_of_what_a_manifest_does_not_say(store: Store, tmp_path: Path) -> None:
    bare = tiny_bundle(tmp_path / "v1", provenance={"data": "clicks"}, precision="int8", recipe="")
    warnings = " ".join(publish(bare, store).warnings)
    assert "data_sha256, commit, streamrec, onnxruntime, recipe, parents" in warnings


def test_the_commit_is_that_of_the_code_and_marks_changes_to_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    code = tmp_path / "models" / "__init__.py"
    code.parent.mkdir()
    code.write_text("")
    assert commit(tmp_path) == "unknown"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project's")
    assert commit(tmp_path) == "unknown"
    git("add", ".")
    git("commit", "-q", "-m", "code")
    head = commit(tmp_path)
    assert len(head) == 40
    (tmp_path / "models" / "bundle.onnx").write_text("no code")
    assert commit(tmp_path) == head
    code.write_text("changed = True\n")
    assert commit(tmp_path) == f"{head}+dirty"


# Differences


def test_the_difference_of_the_shipped_bundles_is_the_quantization() -> None:
    fp32, int8 = (next(SHIPPED.glob(f"*-{precision}")) for precision in ("fp32", "int8"))
    diff = diff_bundles(fp32, int8)
    assert diff.fields["precision"] == ("fp32", "int8")
    assert 3.4 < diff.times_smaller < 3.6
    assert diff.graph is not None
    before, after = diff.graph.ops["MatMul"]
    assert diff.graph.ops["MatMulInteger"] == (0, before - after)
    assert "TopK" not in diff.graph.ops
    assert diff.graph.changed == []  # quantized weights have other names
    assert "item_table" in diff.graph.only_a
    assert diff.graph.weights["int8"][0].count == 0
    assert diff.graph.weights["int8"][1].bytes > 0.6 * diff.bytes[1]
    ndcg = diff.metrics["ndcg@10"]
    assert ndcg.a is not None and ndcg.b is not None and ndcg.relative is not None
    assert ndcg.relative == pytest.approx(ndcg.b / ndcg.a - 1)
    assert (diff.items.shared, diff.items.moved, diff.items.added) == (1682, 0, [])
    assert diff.drift["golden"].histories == 4
    assert 0.95 < diff.drift["random"].overlap < 1.0
    assert 0.0 < diff.drift["random"].mean_score_change < 0.05


def test_a_bundle_does_not_differ_from_itself(bundle: Path) -> None:
    diff = diff_bundles(bundle, bundle)
    assert (diff.fields, diff.times_smaller) == ({}, 1.0)
    assert diff.graph is not None
    assert (diff.graph.ops, diff.graph.changed, diff.graph.only_a) == ({}, [], [])
    for drift in diff.drift.values():
        assert (drift.overlap, drift.same_first, drift.max_score_change) == (1.0, 1.0, 0.0)


def test_recommendations_are_compared_by_item_not_by_index(tmp_path: Path, bundle: Path) -> None:
    model = onnx.load_from_string(tiny_model())
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if weight.name == "table":
            values = np.concatenate([values[:1], values[:0:-1]])
        elif weight.name == "scorer":
            values = np.ascontiguousarray(values[:, ::-1])
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    renumbered = tiny_bundle(tmp_path / "v2", model=model.SerializeToString(), items=ITEMS[::-1])
    diff = diff_bundles(bundle, renumbered)
    assert (diff.items.moved, diff.items.shared) == (len(ITEMS), len(ITEMS))
    assert diff.drift["random"].overlap == 1.0
    assert diff.drift["random"].max_score_change < 1e-5
    assert "golden" not in diff.drift


def test_items_added_and_removed_are_named(tmp_path: Path, bundle: Path) -> None:
    changed = tiny_bundle(tmp_path / "v2", items=(*ITEMS[:-1], "new"))
    items = diff_bundles(bundle, changed).items
    assert (items.added, items.removed, items.moved) == (["new"], [ITEMS[-1]], 0)


def test_catalogues_without_a_common_item_are_not_asked(tmp_path: Path, bundle: Path) -> None:
    other = tiny_bundle(tmp_path / "v2", items=tuple(f"x{item}" for item in ITEMS))
    assert diff_bundles(bundle, other).drift == {}


# The command line


@pytest.fixture
def registry(tmp_path: Path) -> str:
    store = LocalStore(tmp_path / "registry")
    publish(tiny_bundle(tmp_path / "made" / "a"), store)
    publish(tiny_bundle(tmp_path / "made" / "b", seed=1, parents=["a", "gone@v0"]), store)
    return store.url


def test_commands_lead_from_publishing_to_rollback(tmp_path: Path, bundle: Path) -> None:
    there = ("--registry", str(tmp_path / "new"))
    first = streamrec("publish", str(bundle), *there)
    assert "serves from now on: it is the newest, and none is promoted" in first.output
    assert "nothing to do" in streamrec("publish", str(bundle), *there, "--promote").output
    streamrec("publish", str(bundle), *there, "--version", "v2")
    assert "* " in next(
        line for line in streamrec("list", *there).output.splitlines() if "@v1" in line
    )
    streamrec("promote", "posts", "v2", *there)
    assert "(serving)" in streamrec("show", "posts@v2", *there).output
    assert streamrec("rollback", "posts", *there).output == "posts@v1 serves from now on\n"
    assert "(rollback)" in streamrec("show", "posts", *there).output


def test_show_follows_the_parents(registry: str) -> None:
    output = streamrec("show", "posts@b", "--registry", registry).output
    assert "  posts@a  fp32" in output
    assert "gone@v0  (not in this registry)" in output


def test_every_reading_command_speaks_json(registry: str) -> None:
    for command in (["list"], ["show", "posts"], ["diff", "posts@a", "posts@b"]):
        assert json.loads(streamrec(*command, "--json", "--registry", registry).stdout)
    promotion = streamrec("promote", "posts", "a", "--json", "--registry", registry)
    assert json.loads(promotion.stdout)["stable"] == "a"


def test_a_damaged_version_does_not_hide_the_others(registry: str) -> None:
    (Path(registry) / "posts" / "a" / MANIFEST_FILE).write_text("{")
    done = streamrec("list", "--registry", registry)
    assert "posts@b" in done.stdout
    assert done.exit_code == 66
    assert "manifest.json is not a manifest" in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["list", "feed"], "has no model 'feed'; it has posts"),
        (["show", "feed"], "has no model 'feed'; it has posts"),
        (["show", "posts@c"], "has no version 'c' of model 'posts'; it has a, b"),
        (["diff", "posts@a", "posts@c"], "has no version 'c'"),
        (["promote", "posts", "c"], "has no version 'c'"),
        (["rollback", "feed"], "has no model 'feed'"),
        (["promote", "posts", "b"], "model.onnx has 9 bytes"),
        (["diff", "posts@a", "posts@b"], "model.onnx has 9 bytes"),
    ],
)
def test_what_cannot_be_done_is_one_line(registry: str, command: list[str], message: str) -> None:
    (Path(registry) / "posts" / "b" / MODEL_FILE).write_bytes(b"truncated")
    done = streamrec(*command, "--registry", registry)
    assert done.exit_code != 0
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_reader_of_the_worker_opens_what_was_published(registry: str) -> None:
    reader = LocalRegistry(Path(registry))
    path = reader.path("posts", reader.serving("posts"))
    assert open_bundle(path).manifest.version == "b"
