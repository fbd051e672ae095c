"""Registries of bundles: `<registry>/<model name>/<version>/`, on this machine or in a store.

A version is a directory with a manifest; since the manifest comes last, or all of it by one rename,
it is whole. Versions sort by name, so names begin with the time (`20261124T1030Z-int8`).
`release.json` beside them says which serve (worker/releases.py); without it the newest does.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from worker.bundle_files import write_durably
from worker.checksums import verify
from worker.errors import BundleError, Refusal, ReleaseChangedError, StoreError
from worker.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, decode_manifest
from worker.releases import (
    MAX_RELEASE_BYTES,
    Release,
    decode_release,
    encode_release,
    plan,
    promoted,
    require_version,
)
from worker.settings import ModelChoice

RELEASE_FILE = "release.json"
LOCK_FILE = ".release.lock"
#: Schemes that mean a directory of this machine, which keeps more promises than a store.
_LOCAL_SCHEMES = ("file://", "local://")


class Registry(ABC):
    """Bundles and releases of models. Calls block; every method may raise StoreError where the
    registry cannot be reached.

    Args:
        url: what people call it.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def names(self) -> list[str]:
        """Model names, sorted."""

    @abstractmethod
    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first; empty where there is none."""

    @abstractmethod
    def release(self, name: str) -> Release | None:
        """What the release file says; None where nothing was promoted yet.

        Raises:
            BundleError: it is damaged.
        """

    @abstractmethod
    def open(self, name: str, version: str, file: str) -> AbstractContextManager[BinaryIO]:
        """Read one file of a version; FileNotFoundError where it is missing."""

    @abstractmethod
    def path(self, name: str, version: str) -> Path:
        """A version as a directory of this machine; a store's is copied here first.

        Raises:
            BundleError: there is no such version, or it is damaged.
        """

    @abstractmethod
    def keep(self, name: str, versions: Collection[str]) -> None:
        """Drop this machine's copies of a model's other versions; the registry loses nothing."""

    @abstractmethod
    def _locked(self, name: str) -> AbstractContextManager[None]:
        """Keep others from changing the release meanwhile, as far as the registry can."""

    @abstractmethod
    def _write_release(self, name: str, content: bytes) -> None:
        """Replace the release file."""

    def refresh(self, name: str) -> tuple[Release | None, tuple[str, ...]]:
        """The release and the versions now, oldest first.

        Raises:
            BundleError: the release file is damaged.
        """
        # The release first: a version published and promoted in between is then among the versions.
        release = self.release(name)
        return release, tuple(self.versions(name))

    def serving(self, name: str) -> str:
        """The version that serves, canaries aside, where none is pinned; see `releases.plan`.

        Raises:
            BundleError: there is none, or the release file is damaged.
        """
        release, known = self.refresh(name)
        return plan(release, known, ModelChoice(name, None), where=self.url).stable

    def require(self, name: str, version: str) -> str:
        """`version`, where the registry has it.

        Raises:
            BundleError: it has not; the message lists what it has.
        """
        return require_version(version, self._known(name), self.url, name)

    def manifest_bytes(self, name: str, version: str) -> bytes | None:
        """The manifest as stored; None where the version is absent."""
        try:
            with self.open(name, version, MANIFEST_FILE) as stream:
                return stream.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def manifest(self, name: str, version: str) -> Manifest:
        """The manifest of a version.

        Raises:
            BundleError: there is none, it is damaged, or it is that of another version.
        """
        self.require(name, version)
        return self._parsed(name, version, self.manifest_bytes(name, version) or b"")

    def verify(self, name: str, version: str, manifest: Manifest) -> None:
        """Read every file again and compare it with `manifest`.

        Raises:
            BundleError: one is missing, or not what the manifest says.
        """
        verify(
            manifest, lambda file: self.open(name, version, file), f"{self.url}/{name}/{version}"
        )

    def change(
        self,
        name: str,
        transition: Callable[[Release | None], Release],
        *,
        expect_revision: int | None = None,
        repair: bool = False,
    ) -> Release:
        """Replace the release by what `transition` makes of it.

        A local registry does one change at a time and loses none. A store has no lock: it is read,
        compared and written, and of two changes at the same moment the later write stays.

        Args:
            transition: from worker/releases.py; versions that it brings must be in the registry.
            expect_revision: make no change where the release has another revision; 0 means none.
            repair: give `transition` None where the release file is damaged; its history is lost.

        Raises:
            BundleError: there is no such model or version, or the release file is damaged.
            ReleaseChangedError: the revision is not `expect_revision`.
            ReleaseRefusedError: as `transition` says.
            StoreError: the registry cannot be written.
        """
        self._known(name)
        with self._locked(name):
            try:
                old = self.release(name)
            except BundleError:
                if not repair:
                    raise
                old = None
            revision = 0 if old is None else old.revision
            if expect_revision is not None and revision != expect_revision:
                raise ReleaseChangedError(
                    f"the release of {name} in {self.url} is at revision {revision}, not"
                    f" {expect_revision}: another changed it meanwhile; read it and decide again"
                )
            new = transition(old)
            known = self._known(name)
            for version in _named(new) - (_named(old) if old else set()):
                require_version(version, known, self.url, name)
            self._write_release(name, encode_release(new))
        return new

    def promote(self, name: str, version: str, *, force: bool = False, by: str = "") -> Release:
        """Make `version` the one that serves; running workers swap to it. See `releases.promoted`.

        A damaged release file is replaced, and its history lost.

        Raises:
            BundleError: there is no such model or version.
            ReleaseRefusedError: it is quarantined, and `force` is not set.
            StoreError: the registry cannot be written.
        """
        return self.change(
            name,
            lambda old: promoted(old, version, force=force, by=by, at=datetime.now(UTC)),
            repair=True,
        )

    def _known(self, name: str) -> list[str]:
        """Versions of a model that must be there."""
        known = self.versions(name)
        if not known:
            listing = ", ".join(self.names()) or "no model at all"
            raise BundleError(f"{self.url} has no model {name!r}; it has {listing}")
        return known

    def _parsed(self, name: str, version: str, data: bytes) -> Manifest:
        where = f"{self.url}/{name}/{version}"
        manifest = decode_manifest(data, f"{where}/{MANIFEST_FILE}")
        if (manifest.name, manifest.version) != (name, version):
            raise BundleError(
                f"{where} says that it is {manifest.reference}: it was copied by"
                " hand; use streamrec models publish --name NAME --version VERSION",
                Refusal.IDENTITY,
            )
        return manifest


class LocalRegistry(Registry):
    """A directory of this machine, or one that is mounted."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root

    def names(self) -> list[str]:
        """Model names, sorted.

        Raises:
            BundleError: the registry is no directory.
        """
        if not self.root.is_dir():
            raise BundleError(
                f"the registry {self.root} is not a directory; set STREAMREC_REGISTRY to the one"
                " that holds <model name>/<version>/"
            )
        return sorted(
            entry.name
            for entry in self.root.iterdir()
            if not entry.name.startswith(".") and self.versions(entry.name)
        )

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first."""
        check_part(name, "model name")
        try:
            entries = list((self.root / name).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"{self.root / name} cannot be read: {error.strerror}") from None
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and (entry / MANIFEST_FILE).is_file()
        )

    def release(self, name: str) -> Release | None:
        """What the release file says."""
        check_part(name, "model name")
        file = self.root / name / RELEASE_FILE
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_RELEASE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{file} cannot be read: {error.strerror}") from None
        return decode_release(data, file)

    @contextmanager
    def open(self, name: str, version: str, file: str) -> Iterator[BinaryIO]:
        """Read one file of a version."""
        path = self.root / place(name, version, file)
        try:
            with path.open("rb") as stream:
                yield stream
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from None

    def path(self, name: str, version: str) -> Path:
        """The directory itself."""
        return self.root / name / self.require(name, version)

    def keep(self, name: str, versions: Collection[str]) -> None:
        """There are no copies to drop."""

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process, and one thread, at a time. The kernel frees the lock of one that dies."""
        directory = self.root / name
        try:
            # Opened for writing, since NFS grants an exclusive lock on nothing else.
            with (directory / LOCK_FILE).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise StoreError(
                f"{directory / RELEASE_FILE} cannot be written: {error.strerror}"
            ) from None

    def _write_release(self, name: str, content: bytes) -> None:
        _replace_durably(self.root / name / RELEASE_FILE, content)


def open_registry(address: str, mirror_dir: Path) -> Registry:
    """The registry at a directory or fsspec URL (`s3://bucket/models`).

    Args:
        mirror_dir: where copies of a store's versions are kept.

    Raises:
        ExtraMissingError: fsspec, or the driver that the URL needs, is not installed.
        StoreError: the URL names no known kind of store.
    """
    directory = local_directory(address)
    if directory is not None:
        return LocalRegistry(directory)
    # That module builds on this one.
    from worker.remote import RemoteRegistry, connect  # noqa: PLC0415

    return RemoteRegistry(*connect(address), address, mirror_dir)


def local_directory(address: str) -> Path | None:
    """The directory that an address names; None where it is the URL of a store."""
    for scheme in _LOCAL_SCHEMES:
        if address.startswith(scheme):
            return Path(address.removeprefix(scheme))
    return None if "://" in address else Path(address)


def place(name: str, version: str, *file: str) -> str:
    """`<name>/<version>[/<file>]`.

    Raises:
        BundleError: a part is no plain name, so that it might lead elsewhere.
    """
    check_part(name, "model name")
    check_part(version, "version")
    for part in file:
        check_part(part, "file name")
    return "/".join((name, version, *file))


def check_part(part: str, what: str) -> None:
    """Refuse what is no plain directory name.

    Raises:
        BundleError: it is not; `what` says what it should have been.
    """
    if not part or part.startswith(".") or "/" in part or "\0" in part:
        raise BundleError(
            f"{part!r} is not a {what}: it must be a plain directory name", Refusal.PATH
        )


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(release: Release) -> set[str]:
    """Versions that workers load for it."""
    canary = {release.canary.version} if release.canary else set()
    shadow = {release.shadow} if release.shadow else set()
    return {release.stable} | canary | shadow


def _replace_durably(file: Path, data: bytes) -> None:
    building = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write_durably(building, data)
        building.replace(file)
    finally:
        building.unlink(missing_ok=True)
    sync_directory(file.parent)
