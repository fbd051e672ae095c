"""Registries: local and in stores, changes at the same time, copies of what is in a store."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from msgspec.structs import replace

from models.publish import publish
from models.stores import LocalStore, RemoteStore, Store
from tests.conftest import tiny_bundle
from tests.unit.faulty_store import FaultyFileSystem, Killed
from worker.bundle_checks import check_bundle
from worker.bundle_files import MAX_FILE_BYTES, read_manifest
from worker.errors import BundleError, ReleaseChangedError, ReleaseRefusedError, StoreError
from worker.manifest import (
    ITEMS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    SIGNATURE_FILE,
    FileSpec,
    Manifest,
)
from worker.mirror import Mirror
from worker.registry import RELEASE_FILE, LocalRegistry, Registry, open_registry
from worker.releases import Release, promoted, rolled_back, with_canary, with_quarantined
from worker.remote import RemoteRegistry

#: Long past, so that revisions made with it are the one before and one.
NOW = datetime(2025, 1, 1, tzinfo=UTC)


def published(store: Store, tmp_path: Path, *versions: str) -> None:
    for version in versions:
        publish(tiny_bundle(tmp_path / "made" / version), store)


# Finding


def test_a_directory_is_local_and_any_other_address_a_store(tmp_path: Path) -> None:
    for address in (str(tmp_path), f"file://{tmp_path}"):
        found = open_registry(address, tmp_path / "mirror")
        assert isinstance(found, LocalRegistry) and found.root == tmp_path
    assert isinstance(open_registry("memory://models", tmp_path / "mirror"), RemoteRegistry)


def test_a_refresh_tells_release_and_versions(store: Store, tmp_path: Path) -> None:
    published(store, tmp_path, "b", "a")
    assert store.refresh("posts") == (None, ("a", "b"))
    assert store.serving("posts") == "b"
    release = store.promote("posts", "a", by="ann")
    assert store.refresh("posts") == (release, ("a", "b"))
    assert store.serving("posts") == "a"
    assert store.refresh("feed") == (None, ())


def test_a_version_that_is_not_there_is_answered_with_those_that_are(
    store: Store, tmp_path: Path
) -> None:
    published(store, tmp_path, "v1")
    with pytest.raises(BundleError, match="has no version 'v2' of model 'posts'; it has v1"):
        store.path("posts", "v2")
    with pytest.raises(BundleError, match="has no model 'feed'; it has posts"):
        store.path("feed", "v1")


@pytest.mark.parametrize("part", ["..", "../posts", ".hidden", "", "a/b", "a\0b"])
def test_no_name_or_version_leads_out_of_the_registry(
    store: Store, tmp_path: Path, part: str
) -> None:
    published(store, tmp_path, "v1")
    for attempt in (
        lambda: store.versions(part),
        lambda: store.release(part),
        lambda: store.path(part, "v1"),
        lambda: store.manifest_bytes("posts", part),
        lambda: store.change(part, lambda old: promoted(old, "v1", at=NOW)),
    ):
        with pytest.raises(BundleError, match="plain directory name"):
            attempt()
    with pytest.raises(BundleError, match="has no version"):
        store.path("posts", part)


# Changes


def test_a_change_to_a_version_that_is_not_there_is_refused(store: Store, tmp_path: Path) -> None:
    published(store, tmp_path, "a", "b")
    store.promote("posts", "a")
    with pytest.raises(BundleError, match="has no version 'c'"):
        store.promote("posts", "c")
    with pytest.raises(BundleError, match="has no version 'c'"):
        store.change("posts", lambda old: with_canary(old, "c", 0.1, at=NOW))
    with pytest.raises(BundleError, match="has no model 'feed'; it has posts"):
        store.promote("feed", "a")
    assert store.serving("posts") == "a"


def test_a_version_that_is_gone_is_not_rolled_back_to(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "registry")
    published(store, tmp_path, "a", "b")
    for version in ("a", "b"):
        store.promote("posts", version)
    shutil.rmtree(store.root / "posts" / "a")
    with pytest.raises(BundleError, match="has no version 'a'"):
        store.change("posts", lambda old: rolled_back(old, at=NOW))
    assert store.serving("posts") == "b"


def test_a_change_is_refused_where_the_revision_is_another(store: Store, tmp_path: Path) -> None:
    published(store, tmp_path, "a", "b")
    first = store.change("posts", lambda old: promoted(old, "a", at=NOW), expect_revision=0)
    with pytest.raises(ReleaseChangedError, match=f"revision {first.revision}, not 0"):
        store.change("posts", lambda old: promoted(old, "b", at=NOW), expect_revision=0)
    assert store.release("posts") == first
    store.change("posts", lambda old: promoted(old, "b", at=NOW), expect_revision=first.revision)
    assert store.serving("posts") == "b"


def test_a_refused_change_leaves_the_release_as_it_was(store: Store, tmp_path: Path) -> None:
    published(store, tmp_path, "a")
    release = store.promote("posts", "a")
    with pytest.raises(ReleaseRefusedError):
        store.change("posts", lambda old: rolled_back(old, at=NOW))
    assert store.release("posts") == release


def test_of_many_deciders_at_one_revision_one_decides(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "posts" / "a")
    registry = LocalRegistry(tmp_path)
    start = registry.promote("posts", "a").revision
    together = threading.Barrier(8)

    def decide(number: int) -> bool:
        together.wait(30)
        try:
            registry.change(
                "posts",
                lambda old: with_quarantined(old, f"b{number}", "bad", at=NOW),
                expect_revision=start,
            )
        except ReleaseChangedError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(decide, range(8))) == 1
    release = registry.release("posts")
    assert release is not None and len(release.quarantined) == 1


def test_threads_that_change_a_release_at_once_lose_nothing(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "posts" / "a")
    registry = LocalRegistry(tmp_path)
    start = registry.promote("posts", "a").revision

    def quarantine(number: int) -> None:
        registry.change("posts", lambda old: with_quarantined(old, f"b{number}", "bad", at=NOW))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(quarantine, range(40)))
    release = registry.release("posts")
    assert release is not None
    assert set(release.quarantined) == {f"b{number}" for number in range(40)}
    assert release.revision == start + 40


PROMOTE_IN_TURN = """
import sys
from pathlib import Path
from worker.registry import LocalRegistry
for number in range(6):
    by = f"{sys.argv[2]}.{number}"
    LocalRegistry(Path(sys.argv[1])).promote("posts", "ab"[number % 2], by=by)
"""


def test_processes_that_promote_at_once_lose_no_history(tmp_path: Path) -> None:
    for version in "ab":
        tiny_bundle(tmp_path / "posts" / version)
    processes = [
        subprocess.Popen([sys.executable, "-c", PROMOTE_IN_TURN, str(tmp_path), str(process)])
        for process in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    release = LocalRegistry(tmp_path).release("posts")
    assert release is not None
    assert {e.by for e in release.history} == {f"{p}.{n}" for p in range(3) for n in range(6)}
    assert release.stable == release.history[-1].version


def test_an_interrupted_promotion_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in "ab":
        tiny_bundle(tmp_path / "posts" / version)
    registry = LocalRegistry(tmp_path)
    registry.promote("posts", "a")

    def dying(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(Killed):
        registry.promote("posts", "b")
    assert registry.serving("posts") == "a"


def test_promoting_repairs_a_damaged_release_file(
    store: Store, files: FaultyFileSystem, tmp_path: Path
) -> None:
    published(store, tmp_path, "a")
    if isinstance(store, LocalStore):
        (store.root / "posts" / RELEASE_FILE).write_text('{"stable":')
    else:
        files.pipe_file(f"/models/posts/{RELEASE_FILE}", b'{"stable":')
    with pytest.raises(BundleError, match=r"is damaged: .*; promote a version again"):
        store.serving("posts")
    with pytest.raises(BundleError, match="is damaged"):
        store.change("posts", lambda old: rolled_back(old, at=NOW))
    store.promote("posts", "a")
    assert store.serving("posts") == "a"


def test_a_registry_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "posts" / "a")
    (tmp_path / "posts" / ".release.lock").mkdir()  # root may write whatever the mode says
    with pytest.raises(StoreError, match=r"release\.json cannot be written"):
        LocalRegistry(tmp_path).promote("posts", "a")


# Copies of a store's versions


class Source:
    """A version that is read file by file."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.manifest: Manifest = read_manifest(bundle)
        self.unlisted = {MANIFEST_FILE: (bundle / MANIFEST_FILE).read_bytes()}
        self.reads: list[str] = []

    @contextmanager
    def reading(self, file: str) -> Iterator[BinaryIO]:
        self.reads.append(file)
        yield io.BytesIO((self.bundle / file).read_bytes())

    def into(self, mirror: Mirror) -> Path:
        return mirror.add(self.manifest, self.unlisted, self.reading, "memory://models/posts/v1")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tiny_bundle(tmp_path / "made" / "v1"))


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(tmp_path / "mirror")


def visible(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "mirror" / "posts").glob("[!.]*"))


def test_a_copy_is_the_version_and_is_used_again(source: Source, mirror: Mirror) -> None:
    copy = source.into(mirror)
    assert check_bundle(copy) == []
    assert sorted(source.reads) == sorted([MODEL_FILE, ITEMS_FILE])
    assert source.into(mirror) == copy
    assert len(source.reads) == 2


def test_a_copy_that_was_spoiled_is_made_again(source: Source, mirror: Mirror) -> None:
    copy = source.into(mirror)
    content = (copy / MODEL_FILE).read_bytes()
    for spoil in (
        lambda: (copy / MODEL_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        (copy / ITEMS_FILE).unlink,
        lambda: (copy / MANIFEST_FILE).write_bytes(b"{"),
        lambda: (copy / "left").write_bytes(b""),
    ):
        spoil()
        assert check_bundle(source.into(mirror)) == []


def test_a_version_that_was_replaced_in_the_store_is_copied_again(
    source: Source, mirror: Mirror, tmp_path: Path
) -> None:
    source.into(mirror)
    other = Source(tiny_bundle(tmp_path / "other" / "v1", seed=1))
    assert read_manifest(other.into(mirror)) == other.manifest


def test_a_copy_has_the_signature_of_the_store_also_where_it_came_later(
    files: FaultyFileSystem, remote: RemoteStore, tmp_path: Path
) -> None:
    published(remote, tmp_path, "v1")
    assert not (remote.path("posts", "v1") / SIGNATURE_FILE).exists()
    files.pipe_file("/models/posts/v1/manifest.sig", b"signed\n")
    assert (remote.path("posts", "v1") / SIGNATURE_FILE).read_bytes() == b"signed\n"
    files.rm_file("/models/posts/v1/manifest.sig")
    assert not (remote.path("posts", "v1") / SIGNATURE_FILE).exists()


@pytest.mark.parametrize("file", [MODEL_FILE, ITEMS_FILE])
def test_a_copy_cut_off_on_the_way_is_not_visible_and_the_next_one_is_whole(
    source: Source,
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
) -> None:
    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise Killed
            return super().read(10)

    @contextmanager
    def cut(name: str) -> Iterator[BinaryIO]:
        content = (source.bundle / name).read_bytes()
        yield Cut(content) if name == file else io.BytesIO(content)

    # A killed process cleans nothing up.
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            mirror.add(source.manifest, source.unlisted, cut, "here")
    assert visible(tmp_path) == []
    assert check_bundle(source.into(mirror)) == []
    (left,) = (tmp_path / "mirror" / "posts").glob(".building-*")
    mirror.keep("posts", ["v1"])
    assert left.exists()  # it might be another process's
    os.utime(left, (time.time() - 7200,) * 2)
    mirror.keep("posts", ["v1"])
    assert not left.exists()
    assert visible(tmp_path) == ["v1"]


def test_of_two_copies_at_once_the_first_stays_in_place(source: Source, mirror: Mirror) -> None:
    faster: list[int] = []

    @contextmanager
    def overtaken(file: str) -> Iterator[BinaryIO]:
        if not faster:
            faster.append(source.into(mirror).stat().st_ino)
        with source.reading(file) as stream:
            yield stream

    copy = mirror.add(source.manifest, source.unlisted, overtaken, "here")
    assert [copy.stat().st_ino] == faster
    assert check_bundle(copy) == []
    assert [path.name for path in copy.parent.iterdir()] == ["v1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", r"items\.txt has 5 bytes, the manifest says"),
        (b"x" * (5 << 20), r"items\.txt has more than the \d+ bytes"),
        (None, r"items\.txt is missing"),
    ],
)
def test_a_file_that_is_not_the_published_one_is_not_copied(
    source: Source, mirror: Mirror, tmp_path: Path, content: bytes | None, message: str
) -> None:
    (source.bundle / ITEMS_FILE).unlink()
    if content is not None:
        (source.bundle / ITEMS_FILE).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        source.into(mirror)
    assert list((tmp_path / "mirror" / "posts").iterdir()) == []


def test_a_file_that_never_ends_is_not_read_to_its_end(source: Source, mirror: Mirror) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return b"x" * size

    endless = Endless()

    @contextmanager
    def reading(file: str) -> Iterator[BinaryIO]:
        yield endless  # type: ignore[misc]

    with pytest.raises(BundleError, match="has more than"):
        mirror.add(source.manifest, source.unlisted, reading, "here")
    assert endless.given <= 2 << 20


def test_a_version_too_large_to_copy_is_refused_before_it_is_read(
    source: Source, mirror: Mirror
) -> None:
    spec = source.manifest.files[MODEL_FILE]
    source.manifest = replace(
        source.manifest, files={MODEL_FILE: FileSpec(spec.sha256, MAX_FILE_BYTES + 1)}
    )
    with pytest.raises(BundleError, match="is not copied"):
        source.into(mirror)
    assert source.reads == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": ".."},
        {"version": "../v1"},
        {"files": {"../../secret": FileSpec("0", 1)}},
        {"files": {"/secret": FileSpec("0", 1)}},
    ],
)
def test_no_manifest_makes_a_copy_leave_the_mirror(
    source: Source, mirror: Mirror, tmp_path: Path, change: dict[str, Any]
) -> None:
    source.manifest = replace(source.manifest, **change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match="plain directory name"):
        source.into(mirror)
    assert sorted(tmp_path.rglob("*")) == before


def test_versions_out_of_use_are_dropped(remote: RemoteStore, tmp_path: Path) -> None:
    published(remote, tmp_path, "v1", "v2", "v3")
    remote.keep("posts", ["v1"])  # nothing is copied yet
    for version in ("v1", "v2", "v3"):
        remote.path("posts", version)
    remote.keep("posts", ["v1", "v3"])
    assert visible(tmp_path) == ["v1", "v3"]
    remote.keep("feed", [])
    assert visible(tmp_path) == ["v1", "v3"]


def test_a_mirror_that_cannot_be_written_says_so(
    files: FaultyFileSystem, remote: RemoteStore, tmp_path: Path
) -> None:
    published(remote, tmp_path, "v1")
    (tmp_path / "file").write_text("")
    registry: Registry = RemoteRegistry(files, "/models", "memory://models", tmp_path / "file")
    with pytest.raises(StoreError, match="STREAMREC_REGISTRY_MIRROR_DIR"):
        registry.path("posts", "v1")


def test_of_two_changes_of_a_store_at_once_the_later_write_stays(
    remote: RemoteStore, tmp_path: Path
) -> None:
    published(remote, tmp_path, "a", "b")
    remote.promote("posts", "a")

    def overtaken(old: Release | None) -> Release:
        remote.promote("posts", "a", by="faster")
        return promoted(old, "b", at=NOW)

    remote.change("posts", overtaken)
    assert remote.serving("posts") == "b"
