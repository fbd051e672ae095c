"""Where bundles are published: a local directory, or any store that fsspec reaches.

Both hold `<name>/<version>/` with the manifest written last, and `<name>/release.json`. A version
without a manifest is absent. What each guarantees is in docs/publish.md.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from models.errors import ExtraMissingError, StoreError
from worker import registry
from worker.bundle import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    FileSpec,
    Manifest,
    decode_manifest,
    write_durably,
)
from worker.errors import BundleError, StreamrecError
from worker.registry import RELEASE_FILE, Release, check_part, require_version, sync_directory

_CHUNK = 1 << 20
#: Schemes that mean a directory of this machine, which keeps more promises than a store.
_LOCAL_SCHEMES = ("file://", "local://")


class Store(ABC):
    """A registry of bundles, local or not."""

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
        """What was promoted; None where nothing was.

        Raises:
            BundleError: the release file is damaged.
        """

    @abstractmethod
    def promote(self, name: str, version: str, *, by: str = "") -> Release:
        """As `worker.registry.promote`."""

    @abstractmethod
    def rollback(self, name: str, to: str | None = None, *, by: str = "") -> Release:
        """As `worker.registry.rollback`."""

    @abstractmethod
    def open(self, name: str, version: str, file: str) -> AbstractContextManager[BinaryIO]:
        """Read one file of a version; FileNotFoundError where it is missing."""

    @abstractmethod
    def write(self, name: str, version: str, files: Mapping[str, Path], manifest: bytes) -> None:
        """Add a version: copy `files` there, check them against `manifest`, then show it.

        Raises:
            BundleError: the copies are not what the manifest says.
            VersionExistsError: another publisher was faster.
        """

    @abstractmethod
    def local(self, name: str, version: str) -> AbstractContextManager[Path]:
        """A version as a directory of this machine, while the context lasts."""

    def serving(self, name: str) -> str:
        """The version that workers without a pinned one serve; see `choose_serving`."""
        release = self.release(name)
        return registry.choose_serving(release, self.versions(name), self.url, name)

    def require(self, name: str, version: str) -> str:
        """`version`, where the store has it.

        Raises:
            BundleError: it has not; the message lists what it has.
        """
        known = self.versions(name)
        if not known:
            listing = ", ".join(self.names()) or "no model at all"
            raise BundleError(f"{self.url} has no model {name!r}; it has {listing}")
        return require_version(version, known, self.url, name)

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
        data = self.manifest_bytes(name, version) or b""
        where = f"{self.url}/{name}/{version}"
        manifest = decode_manifest(data, f"{where}/{MANIFEST_FILE}")
        if (manifest.name, manifest.version) != (name, version):
            raise BundleError(
                f"{where} says that it is {manifest.reference}: it was copied by"
                " hand; use streamrec models publish --name NAME --version VERSION"
            )
        return manifest

    def verify(self, name: str, version: str, manifest: Manifest) -> None:
        """Read every file again and compare it with `manifest`.

        Raises:
            BundleError: one is missing, or not what the manifest says.
        """
        _verify(
            manifest, lambda file: self.open(name, version, file), f"{self.url}/{name}/{version}"
        )


class VersionExistsError(StreamrecError):
    """A version is there already; versions are never overwritten."""

    exit_code = 73  # EX_CANTCREAT


class LocalStore(Store):
    """A directory of this machine. A version appears by one rename."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root

    def names(self) -> list[str]:
        """Model names, sorted."""
        return registry.names(self.root)

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first."""
        return registry.versions(self.root, name)

    def release(self, name: str) -> Release | None:
        """What was promoted."""
        return registry.read_release(self.root, name)

    def promote(self, name: str, version: str, *, by: str = "") -> Release:
        """As `worker.registry.promote`."""
        return registry.promote(self.root, name, version, by=by)

    def rollback(self, name: str, to: str | None = None, *, by: str = "") -> Release:
        """As `worker.registry.rollback`."""
        return registry.rollback(self.root, name, to, by=by)

    @contextmanager
    def open(self, name: str, version: str, file: str) -> Iterator[BinaryIO]:
        """Read one file of a version."""
        for part, what in ((name, "model name"), (version, "version"), (file, "file name")):
            check_part(part, what)
        path = self.root / name / version / file
        try:
            with path.open("rb") as stream:
                yield stream
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from None

    def write(self, name: str, version: str, files: Mapping[str, Path], manifest: bytes) -> None:
        """Add a version by one rename."""
        parent = self.root / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{version}.", dir=parent))
            try:
                for file, source in files.items():
                    write_durably(building / file, source.read_bytes())
                write_durably(building / MANIFEST_FILE, manifest)
                _verify(
                    decode_manifest(manifest, MANIFEST_FILE),
                    lambda file: (building / file).open("rb"),
                    str(building),
                )
                building.chmod(0o755)
                sync_directory(building)
                _rename(building, parent / version)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            sync_directory(parent)
        except OSError as error:
            raise StoreError(f"{parent / version} cannot be written: {error}") from None

    @contextmanager
    def local(self, name: str, version: str) -> Iterator[Path]:
        """The directory itself."""
        self.require(name, version)
        yield self.root / name / version


class RemoteStore(Store):
    """Any fsspec file system. Files go first, the manifest last.

    Args:
        filesystem: an `fsspec.AbstractFileSystem`.
        root: path of the registry in it.
        url: what people call it.
    """

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        super().__init__(url.rstrip("/"))
        self._files = filesystem
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """Model names, sorted."""
        return sorted({name for name, _ in self._manifests(self._root, 3)})

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first."""
        check_part(name, "model name")
        return sorted(version for _, version in self._manifests(f"{self._root}/{name}", 2))

    def release(self, name: str) -> Release | None:
        """What was promoted."""
        check_part(name, "model name")
        with self._reaching():
            try:
                data = self._files.cat_file(f"{self._root}/{name}/{RELEASE_FILE}")
            except FileNotFoundError:
                return None
        return registry.decode_release(data, f"{self.url}/{name}/{RELEASE_FILE}")

    def promote(self, name: str, version: str, *, by: str = "") -> Release:
        """As `worker.registry.promote`, without its lock: see docs/publish.md."""
        self.require(name, version)
        try:
            old = self.release(name)
        except BundleError:
            old = None
        return self._write_release(name, registry.promoted(old, version, by))

    def rollback(self, name: str, to: str | None = None, *, by: str = "") -> Release:
        """As `worker.registry.rollback`, without its lock: see docs/publish.md."""
        if not (known := self.versions(name)):
            self.require(name, "any")
        new = registry.rolled_back(self.release(name), name, to, by)
        require_version(new.stable, known, self.url, name)
        return self._write_release(name, new)

    @contextmanager
    def open(self, name: str, version: str, file: str) -> Iterator[BinaryIO]:
        """Read one file of a version."""
        path = self._path(name, version, file)
        with self._reaching(FileNotFoundError), self._files.open(path, "rb") as stream:
            yield cast(BinaryIO, stream)

    def write(self, name: str, version: str, files: Mapping[str, Path], manifest: bytes) -> None:
        """Add a version: its manifest, written last, is what makes it one.

        What an interrupted upload left is replaced.
        """
        listed = {self._path(name, version, file): source for file, source in files.items()}
        final = self._path(name, version, MANIFEST_FILE)
        with self._reaching():
            for path, source in listed.items():
                self._files.put_file(str(source), path)
            for stray in self._find(final.rpartition("/")[0]):
                if stray not in listed and stray != final:
                    self._files.rm_file(stray)
        expected = decode_manifest(manifest, MANIFEST_FILE)
        self.verify(name, version, expected)
        # An unreadable manifest is what a store without atomic writes keeps of an interrupted one.
        mode = "create" if self.manifest_bytes(name, version) is None else "overwrite"
        try:
            with self._reaching(FileExistsError):
                self._files.pipe_file(final, manifest, mode=mode)
        except FileExistsError:
            raise VersionExistsError(
                f"{self.url}/{name}/{version} was published by another at the same time;"
                " choose another with --version"
            ) from None
        # Once more: another publisher may have replaced files meanwhile.
        self.verify(name, version, expected)

    @contextmanager
    def local(self, name: str, version: str) -> Iterator[Path]:
        """A copy of the files that the manifest lists, in a temporary directory."""
        manifest = self.manifest(name, version)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / version
            copy.mkdir()
            (copy / MANIFEST_FILE).write_bytes(self.manifest_bytes(name, version) or b"")
            for file, spec in manifest.files.items():
                check_part(file, "file name")
                try:
                    with self.open(name, version, file) as source:
                        _copy(source, copy / file, spec.bytes)
                except FileNotFoundError:
                    raise BundleError(
                        f"{self.url}/{name}/{version} is damaged: {file} is missing;"
                        " publish it again under another version"
                    ) from None
            yield copy

    def _path(self, name: str, version: str, file: str) -> str:
        for part, what in ((name, "model name"), (version, "version"), (file, "file name")):
            check_part(part, what)
        return f"{self._root}/{name}/{version}/{file}"

    def _manifests(self, under: str, depth: int) -> Iterator[tuple[str, str]]:
        """Name and version of each manifest, `depth` levels below `under`."""
        for path in self._find(under, depth):
            parts = path.removeprefix(self._root).strip("/").split("/")
            hidden = any(part.startswith(".") for part in parts)
            if len(parts) == 3 and parts[2] == MANIFEST_FILE and not hidden:
                yield parts[0], parts[1]

    def _find(self, under: str, depth: int | None = None) -> list[str]:
        with self._reaching():
            self._files.invalidate_cache()
            try:
                return list(self._files.find(under, maxdepth=depth))
            except FileNotFoundError:
                return []

    def _write_release(self, name: str, release: Release) -> Release:
        with self._reaching():
            self._files.pipe_file(
                f"{self._root}/{name}/{RELEASE_FILE}", registry.encode_release(release)
            )
        return release

    @contextmanager
    def _reaching(self, *expected: type[Exception]) -> Iterator[None]:
        """Turn what a driver raises into one line, but for what is `expected`. Each driver has
        errors of its own."""
        try:
            yield
        except Exception as error:
            if isinstance(error, (StreamrecError, *expected)):
                raise
            text = (str(error).strip().splitlines() or [""])[0]
            raise StoreError(
                f"{self.url} cannot be used: {type(error).__name__}: {text};"
                " check the address, the network and your credentials"
            ) from error


def open_store(url: str) -> Store:
    """The store at a directory or fsspec URL.

    Raises:
        ExtraMissingError: fsspec, or the driver that the URL needs, is not installed.
        StoreError: the URL names no known kind of store.
    """
    for scheme in _LOCAL_SCHEMES:
        if url.startswith(scheme):
            return LocalStore(Path(url.removeprefix(scheme)))
    if "://" not in url:
        return LocalStore(Path(url))
    try:
        # Of the train extra; comes without types.
        from fsspec.core import url_to_fs  # noqa: PLC0415
    except ImportError:
        raise ExtraMissingError(f"{url} needs fsspec: pip install 'streamrec[train]'") from None
    scheme = url.partition("://")[0]
    try:
        filesystem, root = url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
        hint = f"pip install {package}" if package else str(error)
        raise ExtraMissingError(f"{url} needs the driver for {scheme}://: {hint}") from None
    except ValueError as error:
        raise StoreError(
            f"{url} is no store: {error}; use a directory, or a URL such as s3://bucket/models"
        ) from None
    return RemoteStore(filesystem, root, url)


def _rename(building: Path, target: Path) -> None:
    try:
        # Replaces an empty directory, and nothing else.
        building.rename(target)
    except OSError:
        if not target.exists():
            raise
        raise VersionExistsError(
            f"{target} exists; versions are never overwritten: choose another with --version,"
            " or remove it where it is the rest of a copy"
        ) from None


def _verify(
    manifest: Manifest, reading: Callable[[str], AbstractContextManager[BinaryIO]], where: str
) -> None:
    for file, spec in manifest.files.items():
        try:
            with reading(file) as stream:
                problem = _difference(stream, spec)
        except FileNotFoundError:
            problem = "is missing"
        if problem:
            raise BundleError(
                f"{where} is damaged: {file} {problem}; publish it again under another version"
            )


def _difference(stream: BinaryIO, spec: FileSpec) -> str | None:
    """How the stream's content differs from what a file must be; None where it does not."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    if size != spec.bytes:
        return f"has {size} bytes, the manifest says {spec.bytes}"
    if digest.hexdigest() != spec.sha256.lower():
        return f"is not the file that was published (sha256 {digest.hexdigest()})"
    return None


def _copy(source: BinaryIO, target: Path, limit: int) -> None:
    """Copy at most `limit` bytes and one: enough to see that there are too many."""
    left = limit + 1
    with target.open("wb") as stream:
        while left > 0 and (chunk := source.read(min(_CHUNK, left))):
            stream.write(chunk)
            left -= len(chunk)
